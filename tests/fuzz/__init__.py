"""Fuzzing of everything that reads bytes of strangers: `make fuzz`, and a bounded run of it in test_fuzz.py.

One file a parser in `targets/`, each with

    def one(data: bytes) -> None      # feeds one input; raises whatever must never come out
    def seeds() -> Iterable[bytes]    # inputs to begin with, made by code
    TOKENS = (b"...",)                # optional: words of the language that is parsed
    MAX_LEN = 4096                    # optional: the longest input, in bytes

Only the declared errors of the parser may come out (`refused`), in bounded time and memory, and each file says what
else must hold. atheris looks for inputs by the code's coverage; where it is not to be had, hypothesis draws them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

FOLDER = Path(__file__).parent / "targets"
TARGETS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
ROOMS = frozenset({"layer_tree"})
"""Targets that write to the disk: they run in a mount namespace where nothing else can be written to (room.py)."""
MAX_LEN = 4096


class Target(Protocol):
    """A module of `targets`."""

    def one(self, data: bytes) -> None: ...
    def seeds(self) -> Iterable[bytes]: ...


def load(name: str) -> Target:
    """The target of that name."""
    return cast(Target, importlib.import_module(f"fuzz.targets.{name}"))

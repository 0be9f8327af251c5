"""What a pull tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Step = Literal[
    "resolving", "waiting", "downloading", "exists", "downloaded", "stored", "converting", "converted", "unpacking",
    "unpacked", "uploading", "uploaded", "mounted", "done",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of one thing. `name` is the image's name or a digest; offset and total are bytes (total 0: unknown)."""

    name: str
    step: Step
    kind: str = ""
    offset: int = 0
    total: int = 0


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """The callback of those who do not listen."""

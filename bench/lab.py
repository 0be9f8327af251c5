"""Where it is measured: the sides' nodes, the images in one registry, and the order of the runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .containerd import ContainerdNode
from .driver import MeasureError
from .node import Node
from .rows import Results
from .wherry_side import WherryNode

NODES: dict[str, type[Node]] = {"containerd": ContainerdNode, "wherry": WherryNode}
FAILURES = (MeasureError, OSError, subprocess.SubprocessError)


@dataclass(frozen=True)
class Pushed:
    """An image in the registry; `top` is the chain id of its topmost layer, the name of its snapshot."""

    reference: str
    top: str


def chain_id(diff_ids: Sequence[str]) -> str:
    """OCI image specification, "Layer ChainID"."""
    chain = diff_ids[0]
    for diff_id in diff_ids[1:]:
        chain = "sha256:" + hashlib.sha256(f"{chain} {diff_id}".encode()).hexdigest()
    return chain


class Lab:
    """Used as a context manager. Everything lies in one temporary directory, deleted at the very end: deleting a large
    tree makes whatever is unpacked next slow."""

    def __init__(self, results: Results, work: Path, runs: int, quick: bool, say: Callable[[str], None]) -> None:
        self.results = results
        self.runs = runs
        self.quick = quick
        self._work = work
        self._say = say
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._work.mkdir(parents=True, exist_ok=True)
        self.base = Path(tempfile.mkdtemp(prefix="wherry-bench-", dir=self._work))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        finally:
            began = time.monotonic()
            _delete(self.base)
            self.say(f"everything is deleted ({time.monotonic() - began:.0f} s)")

    def say(self, words: str) -> None:
        self._say(words)

    def seldom(self, full: int, quick: int) -> int:
        """A number of repetitions: `full`, or `quick` for a quick run."""
        return quick if self.quick else full

    # ---- images

    @cached_property
    def _registry(self) -> Any:
        from images import Registry

        return self._stack.enter_context(Registry())

    def image(self, name: str) -> Pushed:
        """One of examples/images' images, built and pushed when it is asked for the first time."""
        known: dict[str, Pushed] = self.__dict__.setdefault("_pushed", {})
        if name not in known:
            from images import RECIPES

            image = RECIPES[name]()
            reference = self._registry.push(image, f"bench/{name}", "1")
            known[name] = Pushed(reference, chain_id(image.config()["rootfs"]["diff_ids"]))
        return known[name]

    # ---- nodes

    @contextmanager
    def fresh(self, side: str) -> Iterator[Node]:
        """A node of one side on fresh directories."""
        with NODES[side](self.base) as node:
            yield node

    def node(self, side: str, *, replicas: int = 1, together: bool = False) -> Node:
        """The node that all rows share which leave little behind; started when it is asked for the first time.

        replicas: one with so many content services. together: one whose services share a process.
        """
        known: dict[tuple[str, int, bool], Node | str] = self.__dict__.setdefault("_nodes", {})
        key = side, replicas, together
        if key not in known:
            made = NODES[side](self.base)
            made.replicas, made.together = replicas, together
            try:
                known[key] = self._stack.enter_context(made)
            except FAILURES as error:
                known[key] = _reason(error)
        found = known[key]
        if isinstance(found, str):
            raise MeasureError(found)
        return found

    def with_image(self, node: Node, name: str) -> Pushed:
        """An image, pulled into this node where it is not there."""
        pushed = self.image(name)
        had: set[str] = node.__dict__.setdefault("_had", set())
        if name not in had:
            node.driver.call("pull", reference=pushed.reference)
            had.add(name)
        return pushed

    # ---- runs

    def alternate(
        self, rows: Sequence[str], runs: int, measure: Callable[[Node], Mapping[str, float]], warm_up: int = 0,
        rest: float = 0.0,
    ) -> None:  # fmt: skip
        """Measure on the shared nodes: one side, the other, the one again... The first `warm_up` rounds are dropped.

        rest: seconds before each, so that none finds the kernel as the other side left it.
        """

        def on_shared(side: str) -> Mapping[str, float]:
            node = self.node(side)
            time.sleep(rest)
            return measure(node)

        self.alternate_sides(rows, runs, on_shared, warm_up)

    def alternate_sides(
        self, rows: Sequence[str], runs: int, measure: Callable[[str], Mapping[str, float]], warm_up: int = 0
    ) -> None:
        """The same, where `measure` gets its node by itself."""
        if not self.results.wanted_of(rows):
            return
        began = time.monotonic()
        for run in range(warm_up + runs):
            for side in self.results.sides:
                if self.results.failed(rows, side):
                    continue
                try:
                    values = measure(side)
                except FAILURES as error:
                    self.say(f"{side}: {rows[0]}: {_reason(error)}")
                    self.results.fail(rows, side, _reason(error))
                    continue
                if run >= warm_up:
                    for row, value in values.items():
                        self.results.add(row, side, value)
        self.say(f"{' '.join(self.results.wanted_of(rows))} ({time.monotonic() - began:.0f} s)")


def _delete(base: Path) -> None:
    """Each node's tree by a process of its own: on a disk with `discard` deleting is waiting, not work."""
    removals = [subprocess.Popen(["rm", "-rf", "--one-file-system", str(path)]) for path in base.iterdir()]
    for removal in removals:
        removal.wait()
    base.rmdir()


def settle() -> None:
    """Nobody pays for what somebody else left to be written."""
    os.sync()


def _reason(error: BaseException) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} was not done after {error.timeout:.0f} s"
    return str(error) or type(error).__name__

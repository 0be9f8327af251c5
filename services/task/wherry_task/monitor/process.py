"""One process of the container - its init or an exec - and how the runtime is made to start it."""

from __future__ import annotations

import os

from wherry_task.monitor import records, wire
from wherry_task.monitor.console import ConsoleSocket
from wherry_task.monitor.stdio import Stdio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from wherry_task.monitor.loop import Loop, Task
    from wherry_task.monitor.runtime import Runtime

_ID_BYTES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class Process:
    """`pid` is 0 until it runs; `exit` is set once it is on record, `told` once the clients were told."""

    def __init__(self, exec_id: str) -> None:
        self.exec_id = exec_id
        self.pid = 0
        self.exit: dict[str, Any] | None = None
        self.told = False
        self.held = True  # the reply that announces the process has not been sent yet
        self.stdio: Stdio | None = None
        self.waiters: list[Callable[[None], None]] = []

    def ended(self) -> bool:
        """Whether its exit status is known."""
        return self.exit is not None

    def until_told(self, resume: Callable[[None], None]) -> None:
        """A wait for the loop: until the exit was told."""
        self.waiters.append(resume)

    def describe(self) -> dict[str, Any]:
        """As `state` shows it."""
        return {"pid": self.pid, "exit": self.exit if self.told else None}

    def launch(
        self, loop: Loop, runtime: Runtime, verb: str, flags: Sequence[str], args: dict[str, Any], log: str = ""
    ) -> Task[None]:
        """Open the streams, run the verb, learn the pid. On Failure nothing of the process is left but, it may be, `pid`."""
        name = f"exec-{self.exec_id}" if self.exec_id else "init"
        terminal = bool(args.get("terminal"))
        stdio = Stdio(loop, bool(args.get("copy")))
        stdio.open(text(args, "stdin"), text(args, "stdout"), text(args, "stderr"), terminal)
        console = None
        try:
            if terminal:
                console = ConsoleSocket(f"{name}.tty")
                flags = [*flags, "--console-socket", console.name]
            yield from runtime.run(verb, *flags, "--pid-file", f"{name}.pid", stdio=stdio.child, log=log)
            self.pid = _read_pid(f"{name}.pid")
            if console:
                stdio.attach(console.master())
        except BaseException:
            stdio.close()
            raise
        finally:
            stdio.release_child()
            if console:
                console.close()
            if self.exec_id:
                records.remove(f"{name}.pid")
        self.stdio = stdio


def text(args: dict[str, Any], key: str) -> str:
    """A string of the request; "" when absent. Raises Failure."""
    value = args.get(key) or ""
    if not isinstance(value, str) or "\0" in value:
        raise wire.Failure(wire.INVALID, f"{key} must be a string")
    return value


def identifier(args: dict[str, Any], key: str) -> str:
    """A required identifier that is safe as part of a file name. Raises Failure."""
    value = text(args, key)
    if not 0 < len(value) <= 76 or value[0] in "._-" or not _ID_BYTES.issuperset(value):
        raise wire.Failure(wire.INVALID, f"{key} {value[:80]!r} is not an identifier")
    return value


def words(args: dict[str, Any], key: str) -> list[str]:
    """A list of strings of the request; [] when absent. Raises Failure."""
    value = args.get(key) or []
    if not isinstance(value, list) or not all(isinstance(word, str) and "\0" not in word for word in value):
        raise wire.Failure(wire.INVALID, f"{key} must be a list of strings")
    return value


def number(args: dict[str, Any], key: str, low: int, high: int) -> int:
    """A required number within bounds. Raises Failure."""
    value = args.get(key)
    if not isinstance(value, int) or not low <= value <= high:
        raise wire.Failure(wire.INVALID, f"{key} must be a number from {low} to {high}")
    return value


def _read_pid(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read(32))
    except (OSError, ValueError) as error:
        raise wire.Failure(wire.UNKNOWN, f"the runtime wrote no usable {os.path.basename(path)}: {error}") from None

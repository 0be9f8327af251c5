"""What the verbs share: the options that every one has, one event loop, tables and JSON."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from wherry import Client

T = TypeVar("T")

CHUNK = 1 << 20
# So soon a reader of a silent pipe notices that it is to stop.
PATIENCE_MS = 200
# For what is to be taken back. Then a thread may sit at a pipe that nobody reads: it is not waited for.
END_SECONDS = 10.0


class Format(enum.StrEnum):
    """How a verb prints."""

    table = "table"
    json = "json"


NamespaceOption = Annotated[
    str, typer.Option("--namespace", "-n", envvar="WHERRY_NAMESPACE", help="The namespace to act in.")
]
FormatOption = Annotated[Format, typer.Option("--format", help="Print a table or JSON.")]


def labels_of(given: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` arguments as labels; an empty value is one, too. InvalidArgument: no label can be so."""
    from wherry_shared.values import check_labels

    return check_labels(dict(text.partition("=")[::2] for text in given))


def with_client(namespace: str, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """Connect, do the work, disconnect. Told to end meanwhile, it ends as an interrupt would end it: what was begun
    is taken back, and no container stays paused.
    """
    import uvloop

    import wherry

    got: list[signal.Signals] = []

    async def main() -> T:
        _cancelled_by(got)
        async with wherry.connect(namespace=namespace) as client:
            return await work(client)

    try:
        return uvloop.run(main())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        if got:
            _end_by(got[0])


def _cancelled_by(got: list[signal.Signals]) -> None:
    """Let the first of the signals that end us cancel the task in hand, and note it; the second one ends us at once."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def end(number: signal.Signals) -> None:
        got.append(number)
        loop.remove_signal_handler(number)
        loop.call_later(END_SECONDS, _end_by, number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # else it is ignored: nohup
            loop.add_signal_handler(number, end, number)


def _end_by(number: signal.Signals) -> None:
    """Whoever waits for us sees what ended us."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


async def waiting_reads(fd: int) -> AsyncIterator[bytes]:
    """What comes from a pipe or a terminal, so that an interrupt is heeded while nothing does: no thread of it waits
    for long.
    """
    import asyncio

    while (chunk := await asyncio.to_thread(_read, fd)) != b"":
        if chunk:
            yield chunk


def _read(fd: int) -> bytes | None:
    """What there is, b"" at the end, None when nothing came yet."""
    import select

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return os.read(fd, CHUNK) if poller.poll(PATIENCE_MS) else None


def show(rows: Sequence[dict[str, Any]], columns: Sequence[str], how: Format) -> None:
    """Print rows: the named columns as an aligned table, or everything as JSON."""
    if how is Format.json:
        print(json.dumps(rows, indent=2, default=_plain))
        return
    cells = [[column.upper() for column in columns]]
    cells += [[clean(str(row.get(column, ""))) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show_one(value: dict[str, Any], how: Format) -> None:
    """Print one thing: a line a field, or JSON."""
    if how is Format.json:
        print(json.dumps(value, indent=2, default=_plain))
        return
    width = max((len(key) for key in value), default=0)
    for key, item in value.items():
        print(f"{key.ljust(width)}  {clean(str(item))}")


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} cannot be printed as JSON")


def clean(text: str) -> str:
    """Text of foreign origin without the control characters that would steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def clean_lines(text: str) -> str:
    """The same for what may have several lines."""
    return "\n".join(clean(line) for line in text.split("\n"))


def size(count: int) -> str:
    """A number of bytes for people: 1.2 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def age(at: datetime | None) -> str:
    """How long ago, for people."""
    if at is None:
        return ""
    seconds = max(0, int((datetime.now(UTC) - at).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"


def explained(name: str, e: Exception) -> str:
    """What is wrong with one of several; an error of the bus names only what was asked."""
    return str(e) if name in str(e) else f"{name}: {e}"


def fail(message: str, code: int) -> typer.Exit:
    """Say why on stderr; raise what this answers."""
    print(clean_lines(f"wherry: {message}"), file=sys.stderr)
    return typer.Exit(code)

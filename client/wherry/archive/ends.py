"""Where archives come from and go to: a path, a file object, an async stream."""

from __future__ import annotations

import asyncio
import errno
import inspect
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from wherry_shared.errors import Canceled, InvalidArgument
from wherry_shared.files import atomic_file, os_errors

T = TypeVar("T")

CHUNK = 1 << 20
# Between two looks whether somebody reads a pipe.
PAUSE_SECONDS = 0.05


class Readable(Protocol):
    """A binary file object, or an asyncio.StreamReader."""

    def read(self, size: int = -1, /) -> Any: ...


class Writable(Protocol):
    """A binary file object, or an asyncio.StreamWriter."""

    def write(self, data: Any, /) -> Any: ...


Source = str | os.PathLike[str] | Readable | AsyncIterable[bytes]
Target = str | os.PathLike[str] | Writable
Write = Callable[[bytes], Awaitable[None]]


async def chunks(source: Source) -> AsyncGenerator[bytes, None]:
    """The bytes of a source, in pieces of about 1 MiB. NotFound, PermissionDenied: a path cannot be read."""
    if isinstance(source, str | os.PathLike):
        with os_errors(os.fspath(source)), open(source, "rb", buffering=0) as file:  # noqa: ASYNC230
            async for chunk in chunks(file):
                yield chunk
    elif hasattr(source, "read"):
        read = source.read
        while chunk := await (read(CHUNK) if inspect.iscoroutinefunction(read) else asyncio.to_thread(_read, read)):
            yield chunk
    elif isinstance(source, AsyncIterable):
        async for chunk in source:
            yield chunk
    else:
        raise InvalidArgument(f"an archive is read from a path or a binary stream, not from a {type(source).__name__}")


def _read(read: Callable[[int], Any]) -> bytes:
    data = read(CHUNK)
    if data is None:
        raise InvalidArgument("the archive's stream does not block: give an asyncio.StreamReader")
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InvalidArgument("the archive's stream gives text: open it in binary mode")
    return bytes(data)


@asynccontextmanager
async def writing(target: Target, what: str = "the archive") -> AsyncIterator[Write]:
    """Where to write an archive, or what else it is. A regular file at a path is there, whole and durably, when the
    block ended well."""
    if not isinstance(target, str | os.PathLike):
        yield _writer(target, what)
        if not inspect.iscoroutinefunction(target.write) and not hasattr(target, "drain"):
            await asyncio.to_thread(getattr(target, "flush", _nothing))
        return
    path = Path(target)
    with os_errors(str(path)):
        special = path.exists() and not stat.S_ISREG(path.stat().st_mode)
        if special:
            with os.fdopen(await _open_special(path), "wb", buffering=0) as file:
                yield _writer(file, what)
            return
        async with _in_thread(atomic_file(path, mode=0o644)) as file:
            yield _writer(file, what)


async def _open_special(path: Path) -> int:
    """A device, or a pipe once somebody reads it: to open that at once would hold up the loop until then."""
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as e:
            if e.errno != errno.ENXIO or not path.is_fifo():
                raise
            await asyncio.sleep(PAUSE_SECONDS)
        else:
            os.set_blocking(fd, True)
            return fd


@asynccontextmanager
async def _in_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave it in a thread: its fsync must not hold up the event loop."""
    value = await asyncio.to_thread(manager.__enter__)
    try:
        yield value
    except BaseException as e:
        await asyncio.shield(asyncio.to_thread(_leave, manager, e))
        raise
    await asyncio.to_thread(manager.__exit__, None, None, None)


def _leave(manager: AbstractContextManager[Any], error: BaseException) -> None:
    with suppress(BaseException):  # it raises the error that it was given, which the caller raises himself
        manager.__exit__(type(error), error, error.__traceback__)


def _nothing() -> None:
    return None


def _writer(target: Writable, what: str) -> Write:
    write = target.write
    drain = getattr(target, "drain", None)
    if drain is not None:  # an asyncio.StreamWriter

        async def feed(data: bytes) -> None:
            write(data)
            await drain()

        return feed
    if inspect.iscoroutinefunction(write):
        return write

    async def in_thread(data: bytes) -> None:
        with os_errors(what):
            try:
                await asyncio.to_thread(_write_all, write, data)
            except BrokenPipeError:
                raise Canceled(f"{what}: its reader went away") from None

    return in_thread


def _write_all(write: Callable[[Any], Any], data: bytes) -> None:
    view = memoryview(data)
    while view:
        done = write(view)
        view = view[done if isinstance(done, int) else len(view) :]

"""A process in the foreground: the caller's terminal, raw, its size, its signals and its detach keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wherry import Process

DETACH_KEYS = "ctrl-p,ctrl-q"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def parse_keys(text: str) -> bytes:
    """Detach keys as Docker writes them: `ctrl-p,ctrl-q` or `a`. InvalidArgument."""
    from wherry_shared.errors import InvalidArgument

    keys = bytearray()
    for word in text.split(",") if text else ():
        letter = word.lower().removeprefix("ctrl-")
        if len(word) == 1 and word.isascii():
            keys += word.encode()
        elif word.lower().startswith("ctrl-") and len(letter) == 1 and letter in "@abcdefghijklmnopqrstuvwxyz[\\]^_":
            keys.append(ord(letter.upper()) - 64)
        else:
            raise InvalidArgument(f"detach keys {text!r}: letters and ctrl-<letter>, separated by commas")
    return bytes(keys)


async def attended(
    process: Process, *, start: bool = False, raw: bool = False, sized: bool = False, signals: bool = True
) -> int | None:
    """See a process through: answers its exit code, or None when the detach keys were typed.

    start: it is made and is to be started first. raw: keystrokes go to it as they are. sized: it has a terminal, which
    is to be as large as ours. signals: those that we get go to it; at the second interrupt it is killed, and at the
    third we go, whoever still has output to take. Else they end the attendance, with 128 and the signal's number, as
    a closed pipe always does (SIGPIPE).
    """
    with _raw(raw), _signals(process, wanted=signals) as told:
        if start:
            await process.start()
        with _sized(process, wanted=sized):
            ending = asyncio.ensure_future(process.wait())
            parting = asyncio.ensure_future(process.parted())
            try:
                first: list[asyncio.Future[Any]] = [ending, parting, told]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if ending.done():
                    process.check_output()  # that it went well with the process is not all
                    return ending.result().code
                if told.done():
                    return 128 + told.result()
                parting.result()
                return None
            except BrokenPipeError:
                return 128 + signal.SIGPIPE
            finally:
                for each in (ending, parting):
                    each.cancel()
                await asyncio.gather(ending, parting, return_exceptions=True)


@contextlib.contextmanager
def _raw(wanted: bool) -> Iterator[None]:
    """The terminal is as before at the end, whatever happens."""
    if not wanted or not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)  # what was typed ahead stays
    try:
        yield
    finally:
        # At once: output that a stopped terminal does not take must not keep it raw.
        with contextlib.suppress(termios.error):  # it has hung up
            termios.tcsetattr(fd, termios.TCSANOW, before)


@contextlib.contextmanager
def _sized(process: Process, *, wanted: bool) -> Iterator[None]:
    screen = next((f.fileno() for f in (sys.stdout, sys.stdin) if f.isatty()), -1)
    if not wanted or screen < 0:
        yield
        return
    with _running() as run:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, lambda: run(_resize(process, screen)))
        run(_resize(process, screen))
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)


async def _resize(process: Process, screen: int) -> None:
    from wherry_shared.errors import WherryError

    with contextlib.suppress(WherryError, OSError):
        columns, lines = os.get_terminal_size(screen)
        await process.resize(columns, lines)


@contextlib.contextmanager
def _signals(process: Process, *, wanted: bool) -> Iterator[asyncio.Future[int]]:
    """What our signals mean; gives the first of those that are ours alone."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[int] = loop.create_future()
    got: list[int] = []
    with _running() as run:

        def pass_on(number: int) -> None:
            got.append(number)
            # The first process of a container gets only signals that it handles; whoever asks twice means it.
            asked = got.count(signal.SIGINT) + got.count(signal.SIGTERM)
            run(_kill(process, signal.SIGKILL if asked > 1 else number))
            if asked > 2:
                take(number)

        def take(number: int) -> None:
            if not told.done():
                told.set_result(number)

        for number in PASSED_ON:
            loop.add_signal_handler(number, pass_on if wanted else take, number)
        try:
            yield told
        finally:
            told.cancel()


async def _kill(process: Process, number: int) -> None:
    from wherry_shared.errors import WherryError

    with contextlib.suppress(WherryError):
        await process.kill(number)


@contextlib.contextmanager
def _running() -> Iterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Starts little works, and keeps them until they are done."""
    running: set[asyncio.Task[None]] = set()

    def run(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        running.add(task)
        task.add_done_callback(running.discard)

    yield run

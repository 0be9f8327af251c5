"""A poll loop, child processes, and generators that wait for either: all the concurrency a monitor needs.

A task is a generator that yields waits. A wait is a function that is given `resume` and calls it once with a value;
`loop.child(pid)`, `loop.ready(fd, ...)` and `loop.sleep(...)` make them.
"""

from __future__ import annotations

import os
import select
import time

from wherry_task.monitor import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, TypeVar

    T = TypeVar("T")
    Wait = Callable[[Callable[[Any], None]], None]
    Task = Generator[Wait, Any, T]


class Loop:
    """One per process. Blocks SIGCHLD, SIGINT, SIGHUP and SIGTERM; `terminate` is called for the last."""

    def __init__(self, orphan: Callable[[int, int], None], terminate: Callable[[], None]) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._children: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._orphan = orphan
        self._terminate = terminate
        self._signals = libc.signal_descriptor(libc.SIGCHLD, libc.SIGINT, libc.SIGHUP, libc.SIGTERM)
        self.watch(self._signals, select.POLLIN, self._signalled)
        self.running = True

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call the handler with the poll events whenever one occurs; replaces an earlier watch of the descriptor."""
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Must come before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call once, no sooner than that many seconds from now."""
        self._timers.append((time.monotonic() + seconds, call))

    def child(self, pid: int) -> Wait:
        """Wait for a child that was started just now; gives its exit status (128 + n when a signal n ended it)."""

        def wait(resume: Callable[[int], None]) -> None:
            self._children[pid] = resume

        return wait

    def sleep(self, seconds: float) -> Wait:
        """Wait for time to pass; gives None."""
        return lambda resume: self.after(seconds, lambda: resume(None))

    def ready(self, fd: int, events: int, seconds: float) -> Wait:
        """Wait for the descriptor; gives the events, or 0 when the time ran out first."""

        def wait(resume: Callable[[int], None]) -> None:
            waiting = [resume]

            def fire(got: int = 0) -> None:
                if waiting:
                    self.unwatch(fd)
                    waiting.pop()(got)

            self.watch(fd, events, fire)
            self.after(seconds, fire)

        return wait

    def start(self, task: Task[T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """Run a task; `done` gets its result, or the exception that ended it."""

        def step(value: Any) -> None:
            try:
                wait = task.send(value)
            except StopIteration as stop:
                done(stop.value, None)
            except Exception as error:
                done(None, error)
            else:
                wait(step)

        step(None)

    def run(self) -> None:
        """Until someone sets `running` to False."""
        while self.running:
            for fd, events in self._poll.poll(self._patience()):
                # A handler earlier in this round may have closed this one.
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(events)
            self._ring()

    def _patience(self) -> float | None:
        if not self._timers:
            return None
        # Rounded up: waking a fraction too early would spin.
        return max(0.0, min(when for when, _ in self._timers) - time.monotonic()) * 1000 + 1

    def _ring(self) -> None:
        if not self._timers:
            return
        now = time.monotonic()
        due = [call for when, call in self._timers if when <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for call in due:
            call()

    def _signalled(self, _: int) -> None:
        record = os.read(self._signals, 128)
        if int.from_bytes(record[:4], "little") == libc.SIGTERM:
            self._terminate()
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
            resume = self._children.pop(pid, None)
            if resume is None:
                self._orphan(pid, code)
            else:
                resume(code)

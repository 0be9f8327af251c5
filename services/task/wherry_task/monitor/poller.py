"""The monitor's loop: descriptors and their handlers, and calls that are repeated until they are done."""

from __future__ import annotations

import select

from wherry_task.monitor import worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_TICK = 20  # milliseconds between two looks at what cannot be polled for


class Poller:
    """Runs until it is stopped. `pending` calls are made every tick until they return True."""

    __slots__ = ("_handlers", "_poll", "_running", "pending")

    def __init__(self) -> None:
        self.pending: list[Callable[[], bool]] = []
        self._running = True
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[int, int], None]] = {}

    def run(self) -> None:
        """Serve; returns when the work is over."""
        while self._running:
            for fd, events in self._poll.poll(_TICK if self.pending else None):
                # A handler earlier in this round may have closed this one.
                handler = self._handlers.get(fd)
                if handler is not None:
                    try:
                        handler(fd, events)
                    except Exception as error:
                        worker.note(error)  # a mistake here is bad; a container killed by it would be worse
            if self.pending:
                calls, self.pending = self.pending, []
                self.pending += [call for call in calls if not call()]

    def watch(self, fd: int, events: int, handler: Callable[[int, int], None]) -> None:
        """Call the handler with the descriptor and its poll events; replaces an earlier watch."""
        self._handlers[fd] = handler
        self._poll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Must come before the descriptor is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def stop(self) -> None:
        """End the run after this round."""
        self._running = False

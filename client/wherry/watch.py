"""Events in the order of the node's stream, from any place in it into the present, and on after hours away.

They are read from the stream; what happens live only says when to read on. So a slow reader, a bus that was away and
a process that was gone are all the same: the token says where to go on, and what cannot follow it is told as a Gap.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from wherry_shared.api.events import Envelope, Events, Replay
from wherry_shared.bus import events
from wherry_shared.bus.transport import Message, Subscription
from wherry_shared.errors import DeadlineExceeded, InvalidArgument, OutOfRange, ResourceExhausted, Unavailable
from wherry_shared.filters import compile_filters
from wherry_shared.values import now

if TYPE_CHECKING:
    from .client import Client

T = TypeVar("T")

PAUSE: Final = 0.2
WINDOW: Final = 500
# Between two looks for an event that was heard of and is not in the stream yet: it is synced to the disk first.
LOOK_FIRST, LOOK_LAST = 0.001, 0.25
_HEARD_MAX: Final = 8192
_AWAY = (Unavailable, DeadlineExceeded)


class Gap(OutOfRange):
    """Events are missing here, and nobody can tell which: read the state again. Reading on goes on behind them."""


@dataclass(frozen=True, slots=True)
class Listed(Generic[T]):
    """The whole state, as of now: what was told before is out of date."""

    state: T


class Watch:
    """Events of the client's namespace or of all, on the client's node: `async for envelope in watch`. Each once.

    Gap is raised where events are missing, and the watch may be read on. `token` continues after the last event read.
    Close it, or enter it with `async with`: it listens until then, or until the client is closed.
    """

    def __init__(
        self, client: Client, *, since: datetime | None = None, until: datetime | None = None, token: str = "",
        filters: list[str] | None = None, all_namespaces: bool = False, follow: bool = True,
    ) -> None:  # fmt: skip
        """See Client.watch."""
        self.token = token
        self._client = client
        self._since, self._until, self._follow = since, until, follow
        self._filters = filters or []
        self._matches = compile_filters(self._filters)
        self._source = client.bus.proxy(Events) if all_namespaces else client.events
        self._ear = _Ear(client, "*" if all_namespaces else client.namespace)
        self._ready: deque[tuple[Envelope, str]] = deque()
        self._place = token  # where the next window begins; "" for `since`, or for the first that is kept
        self._begins_now = follow and not token and since is None
        self._caught_up = self._ended = False

    def __aiter__(self) -> AsyncIterator[Envelope]:
        return self

    async def __anext__(self) -> Envelope:
        try:
            while not self._ready:
                if self._ended:
                    raise StopAsyncIteration
                await self._fill()
        except (StopAsyncIteration, InvalidArgument):
            await self.aclose()
            raise
        envelope, self.token = self._ready.popleft()
        return envelope

    async def aclose(self) -> None:
        """Watch no more; `token` stays."""
        self._ended = True
        self._ready.clear()
        await self._ear.close()

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _fill(self) -> None:
        """Read on, or wait until there is something to read."""
        try:
            if self._follow:
                await self._ear.open()
            if self._caught_up and not await self._ear.hear(self._until):
                self._ended = True  # its time is over
                return
            over = self._until is not None and now() >= self._until
            self._take(await self._read(), over)
        except _AWAY:
            if not self._follow:
                raise
            self._caught_up = False
            await asyncio.sleep(PAUSE)

    async def _read(self) -> Replay:
        """The next window. Gap when the place is lost, or what follows it."""
        if self._begins_now:
            began = now()
            self._place = self.token = (await self._source.stream()).token
            self._since, self._begins_now = began, False
        try:
            return await self._source.replay(
                since=None if self._place else self._since, token=self._place, limit=WINDOW, until=self._until,
                filters=[] if self._caught_up else self._filters,
            )  # fmt: skip
        except OutOfRange as error:
            # What is there may be read again, but for what came before this watch, and what it has told and forgotten.
            self._since = max(filter(None, (self._since, self._ear.remembers_since)), default=None)
            self._place, self._caught_up = "", False
            raise Gap(error.message) from None

    def _take(self, window: Replay, over: bool) -> None:
        for envelope, token in zip(window.events, window.tokens, strict=True):
            # Live ones come unfiltered, so that all that was heard of is seen to arrive.
            if self._ear.first(envelope) and (not self._caught_up or self._wanted(envelope)):
                self._ready.append((envelope, token))
        self._place = window.token
        if not self._ready:
            self.token = window.token
        if not window.more:
            self._caught_up = True
            self._ended = over or not self._follow
        if window.gap is not None:
            lost = window.gap.last - window.gap.first + 1
            raise Gap(f"the stream has lost {lost} events (numbers {window.gap.first} to {window.gap.last})")

    def _wanted(self, envelope: Envelope) -> bool:
        try:
            return self._matches(events.field_of(envelope))
        except ResourceExhausted as e:  # of the pattern, not of the reader
            raise InvalidArgument(str(e)) from None


class _Ear:
    """Hears live of what the stream is going to have."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._transport = client.bus.transport
        self._pattern = events.pattern(client.bus.node, namespace, "")
        self._subscription: Subscription | None = None
        self._heard: OrderedDict[str, float] = OrderedDict()  # since when (the loop's time) it is looked for
        self._recent: OrderedDict[str, datetime] = OrderedDict()
        self._forgot = False
        self._more = asyncio.Event()
        self._now = asyncio.get_running_loop().time
        self._pause = 0.0
        self._later: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        if self._subscription is None:
            self._subscription = await self._transport.subscribe(self._pattern, self._on_message)
            self._transport.on_state.append(self._on_state)
            self._look_later()

    def _look_later(self) -> None:
        """What was told before we listened may get into the stream after we have looked: that takes so long at most."""
        if self._later is not None:
            self._later.cancel()
        self._later = asyncio.get_running_loop().call_later(events.ACK_TIMEOUT, self._more.set)

    async def close(self) -> None:
        subscription, self._subscription = self._subscription, None
        if self._later is not None:
            self._later.cancel()
        if subscription is not None:
            self._transport.on_state.remove(self._on_state)
            await subscription.unsubscribe()

    def _on_message(self, message: Message) -> None:
        event_id = events.id_of(message)
        if event_id and event_id not in self._recent:
            self._heard[event_id] = self._now()
            if len(self._heard) > _HEARD_MAX:
                self._heard.popitem(last=False)
            self._pause = 0.0
            self._more.set()

    def _on_state(self, connected: bool) -> None:
        self._look_later()
        self._more.set()

    def first(self, envelope: Envelope) -> bool:
        """The stream has it; whether it was not seen before, in a stream that was read again after a gap."""
        self._heard.pop(envelope.id, None)
        if envelope.id in self._recent:
            return False
        self._recent[envelope.id] = envelope.timestamp
        if len(self._recent) > _HEARD_MAX:
            self._recent.popitem(last=False)
            self._forgot = True
        return True

    @property
    def remembers_since(self) -> datetime | None:
        """From when on what the stream got is remembered if it was seen; None where all is.

        Times are the publishers', some of which may be wrong or long ago; the stream got an event after its time.
        """
        if not self._forgot:
            return None
        return min(sorted(self._recent.values())[len(self._recent) // 4], now())

    async def hear(self, until: datetime | None) -> bool:
        """Return True when it is time to look at the stream again, False when `until` has come."""
        left = None if until is None else max(0.0, (until - now()).total_seconds())
        while self._heard and next(iter(self._heard.values())) < self._now() - events.ACK_TIMEOUT:
            self._heard.popitem(last=False)  # nobody got it into the stream; sent again, it is heard again
        if self._heard:
            self._pause = min(self._pause * 2, LOOK_LAST) or LOOK_FIRST
            left = self._pause if left is None else min(left, self._pause)
        try:
            async with asyncio.timeout(left):
                await self._more.wait()
        except TimeoutError:
            if not self._heard:
                return False
        self._more.clear()
        return True


async def list_and_watch(
    client: Client, state: Callable[[], Awaitable[T]], *, filters: list[str] | None = None, all_namespaces: bool = False
) -> AsyncIterator[Listed[T] | Envelope]:
    """The state, and then every event since; the state again wherever events were missing."""
    source = client.bus.proxy(Events) if all_namespaces else client.events
    while True:
        try:
            token = (await source.stream()).token
            listed = Listed(await state())
        except _AWAY:
            await asyncio.sleep(PAUSE)
            continue
        yield listed
        async with Watch(client, token=token, filters=filters, all_namespaces=all_namespaces) as watch:
            try:
                async for envelope in watch:
                    yield envelope
            except Gap:
                continue

"""The direct path, the caller's side: requests to the services of this node's host go to their own sockets.

Everything else goes by the bus, and so does every request that finds no socket there or is sent away from it. One that
gets lost with its process is sent again by its Caller, with the same key, so that it takes effect once
(docs/decisions/0013).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from ..contract import OWNERS
from ..errors import DeadlineExceeded, Unavailable
from . import sockets, subjects
from .pipe import BATCH, MAX_PAYLOAD, MUTATIONS, Pipe
from .protocol import Message, encode_headers
from .proxy import KEY, RETRY
from .transport import Answer, Callback, EventLog, Lost, Subscription, Transport
from .transport import Message as AnyMessage
from .waiting import Waiting

log = logging.getLogger("wherry.direct")

LOOK_SECONDS: Final = 2.0  # between two looks for replicas that are new
REST_SECONDS: Final = 2.0  # a process that answers nothing at all until a request's time is over is left alone for
AWAKE_SECONDS: Final = 150e-6
SLEEPS_AFTER: Final = 15  # requests that are not waited for awake, after one that took longer
_PREFIX: Final = subjects.RPC + "."
_ROUTES_MAX: Final = 1024
_RETRY: Final = RETRY.encode()


class _Refused(Unavailable):
    """Not done here: the process is stopping, or sends this caller to the bus."""


class Lane(Pipe):
    """The connection to one process.

    A caller whose only request is under way may stay awake for its answer: to wake a processor that has gone to sleep
    costs more than the answer takes, on both sides.
    """

    def __init__(self, sock: socket.socket, waiting: Waiting) -> None:
        super().__init__(sock)
        self.waiting = waiting
        self.answers = 0  # so many came
        self.resting = 0.0  # until then (the loop's time) it is not used: it is silent
        self.leaving = False  # its process has said goodbye
        self.now = self._loop.time
        self._sleeps = 0  # for so many requests nobody stays awake: one took too long

    def stay_awake(self) -> None:
        """Have the loop turn until the answer is here, for AWAKE_SECONDS at most. Whatever else is due runs as ever."""
        if self._sleeps:
            self._sleeps -= 1
        else:
            self._loop.call_soon(self._turn, time.perf_counter() + AWAKE_SECONDS)

    def _turn(self, until: float) -> None:
        if len(self.waiting) != 1:
            return
        if time.perf_counter() < until:
            self._loop.call_soon(self._turn, until)
        else:
            self._sleeps = SLEEPS_AFTER

    def on_message(self, sid: str, subject: str, reply: str, block: bytes | None, data: bytes) -> None:
        self.answers += 1
        asked = self.waiting.take(subject)
        if asked is None:
            return
        message = Message(subject, data, reply, block)
        if block is not None and (message.no_responders or _RETRY in block):
            asked[0].set_exception(_Refused(f"{asked[1]} is to be asked on the bus"))
        else:
            asked[0].set_result(message)

    def on_info(self, info: bytes) -> None:
        self.leaving = True

    def on_lost(self, error: Exception | None) -> None:
        ended = _Refused if self.leaving else Lost
        self.waiting.fail(lambda subject: ended(f"the direct connection ended before {subject} was answered"))


class Lanes:
    """The connections to the processes of one service, opened when they are first needed."""

    def __init__(self, folder: Path, inbox_prefix: str) -> None:
        self._folder = folder
        self._inbox_prefix = inbox_prefix
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[str, Lane] = {}
        self._look_at = 0.0

    def choose(self, instance: str) -> Lane | None:
        """The connection for one request: to that instance, or the one where the fewest wait."""
        now = self._loop.time()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look()
        lanes = self._lanes
        if instance:
            found = lanes.get(instance)
        elif len(lanes) == 1:
            (found,) = lanes.values()
        else:
            usable = [lane for lane in lanes.values() if not lane.ended and lane.resting <= now]
            found = min(usable, key=lambda lane: len(lane.waiting) + random.random(), default=None)  # noqa: S311
        if found is None or (not found.ended and found.resting <= now):
            return found
        if found.ended:
            self._look_at = 0.0
        return None

    def _look(self) -> None:
        """Connect to who is new, and forget who is gone."""
        self._lanes = {instance: lane for instance, lane in self._lanes.items() if not lane.ended}
        try:
            sockets.check_folder(self._folder)
            there = sockets.instances(self._folder)
        except OSError as error:
            log.debug("no direct path: %s", error)
            return
        for instance in there:
            if instance not in self._lanes:
                self._open(instance)

    def _open(self, instance: str) -> None:
        try:
            sock = sockets.connect(self._folder / f"{instance}{sockets.SUFFIX}")
        except OSError as error:  # not ours to open, left behind by one that was killed, or too busy
            log.debug("no direct path to %s: %s", instance, error)
            return
        self._lanes[instance] = Lane(sock, Waiting(f"{self._inbox_prefix}.{os.urandom(8).hex()}"))

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.end()
        self._lanes = {}


class Shortcut:
    """A transport whose requests take the direct path where there is one. Everything else is that of the bus."""

    def __init__(self, bus: Transport, state: Path, *, awake: bool = False) -> None:
        """state: the node's state directory on this host. awake: stay awake for the answer to a single request."""
        self._awake = awake and len(os.sched_getaffinity(0)) > 1
        self._bus = bus
        self._state = state
        self._services: dict[tuple[str, str], Lanes] = {}
        self._routes: dict[str, tuple[Lanes, str]] = {}
        self._closed = False

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> AnyMessage:
        """Ask, by the direct path or else by the bus; errors as of Transport.request.

        Lost: the process is gone; sent again, it goes by the bus.
        """
        route = self._routes.get(subject) or self._route(subject)
        lane = route[0].choose(route[1]) if route is not None else None
        block = encode_headers(headers) if headers else b""
        if lane is None or len(block) + len(data) > MAX_PAYLOAD:
            return await self._bus.request(subject, data, headers=headers, timeout=timeout)
        waiting, answers = lane.waiting, lane.answers
        until = lane.now() + timeout
        reply, answer = waiting.ask(subject, timeout)
        try:
            alone = len(waiting) == 1
            batch = MUTATIONS if headers and KEY in headers else BATCH
            lane.send(subject, reply, block, data, alone=alone, batch=batch)
            if alone and self._awake:
                lane.stay_awake()
            return await answer
        except _Refused:
            return await self._bus.request(subject, data, headers=headers, timeout=until - lane.now())
        except DeadlineExceeded:
            if lane.answers == answers:
                lane.resting = lane.now() + REST_SECONDS
            raise
        finally:
            waiting.forget(reply)

    def _route(self, subject: str) -> tuple[Lanes, str] | None:
        """The processes that a subject is for, and the instance of them or ""."""
        parts = subject.split(".")
        if self._closed or not subject.startswith(_PREFIX) or len(parts) not in (7, 8):
            return None
        key = parts[3], parts[5]
        lanes = self._services.get(key)
        if lanes is None:
            folder = sockets.folder(self._state, OWNERS.get(parts[5], parts[5]), *key)
            lanes = self._services[key] = Lanes(folder, self._bus.inbox_prefix)
        if len(self._routes) >= _ROUTES_MAX:
            self._routes.clear()
        found = self._routes[subject] = lanes, parts[7] if len(parts) == 8 else ""
        return found

    async def close(self) -> None:
        self._closed = True
        for lanes in self._services.values():
            lanes.close()
        self._services, self._routes = {}, {}
        await self._bus.close()

    # ---- the bus's own

    @property
    def on_state(self) -> list[Callable[[bool], None]]:
        return self._bus.on_state

    @property
    def connected(self) -> bool:
        return self._bus.connected

    @property
    def max_payload(self) -> int:
        return self._bus.max_payload

    @property
    def inbox_prefix(self) -> str:
        return self._bus.inbox_prefix

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        return await self._bus.subscribe(subject, callback, queue=queue)

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._bus.publish(subject, data, reply=reply, headers=headers)

    def ask(
        self, subject: str, data: bytes, answer: Answer, *, headers: Mapping[str, str] | None = None, timeout: float
    ) -> None:
        self._bus.ask(subject, data, answer, headers=headers, timeout=timeout)

    async def flush(self, timeout: float = 5.0) -> None:
        await self._bus.flush(timeout)

    def event_log(self, name: str, subject: str) -> EventLog:
        return self._bus.event_log(name, subject)

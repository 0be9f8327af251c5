"""The durable stream of events in JetStream, spoken in its own JSON requests: make it, ask its bounds, read windows.

Reading is batched direct get (NATS 2.11, ADR-31): no consumer has to be made, kept or cleaned up.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from datetime import UTC, datetime
from typing import Any

from ..errors import Internal, ResourceExhausted, Unavailable
from .transport import SUM, LogState, Message, NoResponders, Stored, Transport

API_TIMEOUT = 5.0
BATCH_BYTES = 8 << 20
DUPLICATE_WINDOW_SECONDS = 600
_NO_STREAM, _NAME_IN_USE = 10059, 10058
# nats-server counts nanoseconds from 1970 on in 64 bits: of a time that has no place there it makes another.
_TIMES = datetime(1970, 1, 1, tzinfo=UTC), datetime(2262, 1, 1, tzinfo=UTC)
_EPOCH = "wherry-epoch"  # in the stream's metadata: its epoch, besides the time when it was made


def _own(info: dict[str, Any]) -> dict[str, str]:
    """Our part of the stream's metadata; the rest is nats-server's."""
    metadata: dict[str, str] = info["config"].get("metadata") or {}
    return {key: value for key, value in metadata.items() if key == _EPOCH}


class JetStreamLog:
    """One stream over one subject pattern. Implements transport.EventLog."""

    def __init__(self, transport: Transport, name: str, subject: str) -> None:
        self._transport = transport
        self._name = name
        self._subject = subject

    async def ensure(self, *, max_age: float, max_bytes: int) -> None:
        """Make the stream, or change its bounds. Unavailable while JetStream is starting."""
        config: dict[str, Any] = {
            "name": self._name, "subjects": [self._subject], "retention": "limits", "storage": "file",
            "discard": "old", "num_replicas": 1, "max_age": int(max_age * 1e9), "max_bytes": max_bytes,
            "max_msgs": -1, "max_consumers": -1, "allow_direct": True,
            "duplicate_window": int(min(DUPLICATE_WINDOW_SECONDS, max_age) * 1e9),
        }  # fmt: skip
        there = await self._ask("STREAM.INFO", None)
        if "error" not in there:
            config["metadata"] = _own(there)
        answer = await self._ask("STREAM.CREATE" if "error" in there else "STREAM.UPDATE", config)
        if answer.get("error", {}).get("err_code") == _NAME_IN_USE:
            answer = await self._ask("STREAM.UPDATE", config)
        self._check(answer)

    async def state(self) -> LogState:
        """The stream's epoch and bounds. Unavailable when there is none."""
        answer = self._check(await self._ask("STREAM.INFO", None))
        epoch = str(answer["created"]) + _own(answer).get(_EPOCH, "")
        return LogState(epoch, int(answer["state"]["first_seq"]), int(answer["state"]["last_seq"]))

    async def renew(self) -> None:
        """Give the stream another epoch, for good."""
        answer = self._check(await self._ask("STREAM.INFO", None))
        config = {**answer["config"], "metadata": {_EPOCH: f"-{secrets.token_hex(4)}"}}
        self._check(await self._ask("STREAM.UPDATE", config))

    async def read(self, *, after: int = 0, since: datetime | None = None, limit: int = 500) -> list[Stored]:
        """Up to `limit` events (and about 8 MiB) after a sequence number, or since a time."""
        request: dict[str, Any] = {"batch": limit, "max_bytes": BATCH_BYTES, "next_by_subj": self._subject}
        if after or since is None:
            request["seq"] = after + 1
        else:
            first, last = _TIMES
            request["start_time"] = min(max(since, first), last).astimezone(UTC).isoformat().replace("+00:00", "Z")
        return await self._batch(request)

    async def _batch(self, request: dict[str, Any]) -> list[Stored]:
        found: list[Stored] = []
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_message(message: Message) -> None:
            if end.done():
                return
            headers = message.headers or {}
            sequence = headers.get("Nats-Sequence")
            if sequence is not None:
                at = datetime.fromisoformat(headers["Nats-Time-Stamp"])
                subject, data = headers.get("Nats-Subject", ""), bytes(message.data)
                found.append(Stored(int(sequence), subject, data, at, headers.get(SUM)))
            elif headers.get("Status") in ("204", "404"):  # the batch's end; nothing (more) to find
                end.set_result(None)
            else:
                described = headers.get("Description", "") or headers.get("Status", "") or "no answer"
                end.set_exception(Unavailable(f"stream {self._name}: {described}"))

        inbox = f"{self._transport.inbox_prefix}.{secrets.token_hex(8)}"
        subscription = await self._transport.subscribe(inbox, on_message)
        try:
            self._transport.publish(f"$JS.API.DIRECT.GET.{self._name}", json.dumps(request).encode(), reply=inbox)
            async with asyncio.timeout(API_TIMEOUT):
                await end
        except TimeoutError:
            raise Unavailable(f"stream {self._name} does not answer") from None
        finally:
            await subscription.unsubscribe()
        return found

    async def _ask(self, verb: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else b""
        try:
            message = await self._transport.request(f"$JS.API.{verb}.{self._name}", data, timeout=API_TIMEOUT)
        except NoResponders:
            raise Unavailable("JetStream is not enabled on this NATS server") from None
        answer: dict[str, Any] = json.loads(message.data)
        return answer

    def _check(self, answer: dict[str, Any]) -> dict[str, Any]:
        error = answer.get("error")
        if error is None:
            return answer
        text = f"stream {self._name}: {error.get('description', error)}"
        if error.get("err_code") == _NO_STREAM or error.get("code") == 503:
            raise Unavailable(text)
        if error.get("code") in (500, 507) and "resource" in text:
            raise ResourceExhausted(text)
        raise Internal(text)

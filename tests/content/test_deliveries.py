"""Requests that come three times at once, at two replicas, and bodies that no client of ours would send."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest
from contentd import Replica, digest_of
from wherry_shared import context
from wherry_shared.api.content import Content, Opened
from wherry_shared.bus import subjects
from wherry_shared.bus.proxy import ERROR_CODE, at_instance
from wherry_shared.contract import pack
from wherry_shared.errors import InvalidArgument, NotFound, Unavailable
from wherry_shared.streams import write_blob

DATA = os.urandom(10_000)
DIGEST = digest_of(DATA)

Start = Callable[..., Awaitable[Replica]]
Call = Callable[[Content], Awaitable[Any]]


async def thrice(at: list[Content], call: Call) -> list[Any]:
    """The same request, with one key, three times at once."""
    with context.use(key="the-same"):
        return await asyncio.gather(*(call(content) for content in at), return_exceptions=True)


@pytest.fixture
async def both(start: Start) -> tuple[Replica, list[Content]]:
    """Two replicas on one root, and whom a request is delivered to."""
    one, _ = await start("one"), await start("two")
    at = [at_instance(one.content, name) for name in ("one", "two", "one")]
    return one, at


def events(replica: Replica, topic: str) -> int:
    return int(replica.database.one("SELECT count(*) FROM outbox WHERE topic = ?", (topic,))[0])


async def test_put(both: tuple[Replica, list[Content]]) -> None:
    replica, at = both
    answers = await thrice(at, lambda c: c.put(DATA, DIGEST, {"a": "b"}))
    assert answers[0].labels == {"a": "b"} and answers == [answers[0]] * 3
    assert events(replica, "/content/create") == 1


async def test_update(both: tuple[Replica, list[Content]]) -> None:
    replica, at = both
    await write_blob(replica.content, "r", DATA, expected=DIGEST)
    answers = await thrice(at, lambda c: c.update(DIGEST, {"a": "b"}))
    assert answers == [await replica.content.info(DIGEST)] * 3


async def test_delete(both: tuple[Replica, list[Content]]) -> None:
    replica, at = both
    await write_blob(replica.content, "r", DATA, expected=DIGEST)
    assert await thrice(at, lambda c: c.delete(DIGEST)) == [None] * 3
    assert events(replica, "/content/delete") == 1
    with pytest.raises(NotFound):
        await replica.content.delete(DIGEST)


async def test_open(both: tuple[Replica, list[Content]]) -> None:
    replica, at = both
    answers = await thrice(at, lambda c: c.open("r"))
    opened = [answer for answer in answers if isinstance(answer, Opened)]
    assert opened and opened == [opened[0]] * len(opened)
    # One that comes while the first is under way elsewhere is told to ask again, which its caller does.
    assert all(isinstance(answer, Opened | Unavailable) for answer in answers)
    assert len(await replica.content.statuses()) == 1
    with context.use(key="the-same"):
        assert await at[1].open("r") == opened[0]


async def test_write_commit_and_close_at_their_instance(both: tuple[Replica, list[Content]]) -> None:
    replica, at = both
    one = at[0]
    await one.open("r")
    assert await thrice([one] * 3, lambda c: c.write("r", 0, DATA)) == [len(DATA)] * 3
    assert (await one.status("r")).offset == len(DATA)
    assert isinstance((await thrice(at[1:2], lambda c: c.write("r", 0, DATA)))[0], NotFound)
    infos = await thrice([one] * 3, lambda c: c.commit("r", len(DATA), DIGEST, {"a": "b"}))
    assert infos == [infos[0]] * 3 and infos[0].digest == DIGEST
    assert events(replica, "/content/create") == 1
    await one.open("s")
    assert await thrice([one] * 3, lambda c: c.close("s")) == [None] * 3
    assert [ingest.ref for ingest in await one.statuses()] == ["s"]


async def test_abort(both: tuple[Replica, list[Content]]) -> None:
    replica, at = both
    await at[0].open("r")
    assert await thrice(at, lambda c: c.abort("r")) == [None] * 3
    assert await replica.content.statuses() == []
    with pytest.raises(NotFound):
        await replica.content.abort("r")


# ---- bodies


def _deep(levels: int) -> bytes:
    return b"\x81\xa6labels" + b"\x91" * levels + b"\xc0"


NONE = f"sha256:{'0' * 64}"
WHOLE = pack({"ref": "r", "offset": 0, "data": b"x" * 100})
BODIES = {
    "not msgpack": b"\xc1\xc1", "cut": WHOLE[: len(WHOLE) // 2], "more behind it": WHOLE + b"\0",
    "no map": b"\x93\1\2\3",
    "deep": _deep(10_000), "ext": msgpack.packb({"ref": msgpack.ExtType(5, b"x")}), "numbers": b"\x81\x01\x02",
    "nan": pack({"ref": "r", "offset": float("nan"), "data": b""}), "text for bytes": pack({"ref": "r", "data": "x"}),
    "no ref": pack({"ref": ""}), "ref of bytes": pack({"ref": b"\xff"}), "long ref": pack({"ref": "r" * 70_000}),
    "digest": pack({"digest": "sha256:../../../etc/passwd", "expected": "sha256:..", "data": b""}),
    "minus": pack({"ref": "r", "digest": NONE, "offset": -1, "total": -1, "size": -1, "data": b"x"}),
    "labels": pack({"ref": "r", "digest": NONE, "expected": NONE, "data": b"", "labels": {"k": "v" * 5000}}),
    "one label twice": b"\x82\xa3ref\xa1r\xa6labels\x82\xa1a\x91\xc0\xa1a\xa1b",
    "huge number": pack({"ref": "r", "offset": 2**63, "total": 2**63, "size": 2**63, "digest": NONE, "data": b""}),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=str)
async def test_what_no_client_of_ours_would_send(start: Start, body: str) -> None:
    replica = await start()
    await write_blob(replica.content, "there", DATA, expected=DIGEST)
    for operation in Content.endpoints:
        subject = subjects.rpc("n1", "default", "content", operation, "one")
        answer = await replica.bus.transport.request(subject, BODIES[body], timeout=10.0)
        code = int((answer.headers or {}).get(ERROR_CODE, "0"))
        assert code != 13, (operation, answer)  # Internal would be a bug of ours
    assert (await replica.content.read(DIGEST)) == DATA
    assert (await replica.content.info(DIGEST)).labels == {}
    assert {ingest.ref for ingest in await replica.content.statuses()} <= {"r"}


async def test_bodies_that_are_refused_by_name(start: Start) -> None:
    content = (await start()).content
    with pytest.raises(InvalidArgument, match="total"):
        await content.open("r", total=-1)
    with pytest.raises(InvalidArgument, match="total"):
        await content.open("r", total=2**63)
    with pytest.raises(InvalidArgument, match="label"):
        await content.put(DATA, DIGEST, {"k": "v" * 5000})
    assert await content.statuses() == []

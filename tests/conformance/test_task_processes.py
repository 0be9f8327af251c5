"""Processes whose specification is too long for a request, and those that are too long for the kernel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from contentd import Replica, digest_of
from housebus import PATIENCE
from task_house import RUNTIMES, SH, House, exec_of, house_of
from wherry_shared import context
from wherry_shared.api.task import PROCESS_MAX, Stdio
from wherry_shared.bus import Bus
from wherry_shared.contract import pack
from wherry_shared.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted, WherryError
from wherry_shared.streams import write_blob

MIB = 1 << 20


@pytest.fixture(params=RUNTIMES)
async def house(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with house_of(bus, tmp_path, request.param) as made:
        yield made


@pytest.fixture
async def replica(house: House) -> AsyncIterator[Replica]:
    made = Replica(house.bus, house.root / "content")
    await made.start()
    yield made
    await made.stop()


SUM = "n=0; for a; do n=$((n + ${#a})); done; [ $# -eq 15 ] && [ $n -eq 1500000 ]"
LONG = [*SH, SUM, "sh", *["x" * 100_000] * 15]


def specified(*args: str, **fields: Any) -> bytes:
    return pack(exec_of("true") | {"args": list(args)} | fields)


async def put(replica: Replica, document: bytes) -> str:
    digest = digest_of(document)
    await write_blob(replica.content, f"process-{digest}", document, size=len(document), expected=digest)
    return digest


async def test_a_process_too_long_for_a_request_lies_in_content(house: House, replica: Replica) -> None:
    """It is run as one that came with the request: once under its key, whatever has become of the blob."""
    id = await house.running("/bin/sleep", "1000")
    digest = await put(replica, specified(*LONG))
    with context.use(key="once"):
        await house.tasks.exec(id, "long", {}, digest=digest)
    with pytest.raises(AlreadyExists):
        await house.tasks.exec(id, "long", {}, digest=digest)
    await replica.content.delete(digest)
    await house.stop_tasks()
    await house.start_tasks()
    with context.use(key="once"):
        await house.tasks.exec(id, "long", {}, digest=digest)
    await house.tasks.start(id, "long")
    assert await house.exit(id, "long") == 0
    await house.tasks.delete(id, "long")
    # So many, and the kernel would take no more; a request could not have half of them.
    await house.tasks.exec(id, "many", {}, digest=await put(replica, specified("/bin/true", *["ab"] * 180_000)))
    await house.tasks.start(id, "many")
    assert await house.exit(id, "many") == 0
    await house.tasks.delete(id, "many")
    assert not list(Path(house.state / "tasks/default" / id).glob("process-*"))


async def test_what_is_no_process_in_content_is_refused(house: House, replica: Replica) -> None:
    id = await house.running("/bin/sleep", "1000")
    nested: list[Any] = []
    for _ in range(70):
        nested = [nested]
    for document, error, reason in (
        (b"{}", InvalidArgument, "not a valid msgpack document"),
        (pack(["/bin/true"]), InvalidArgument, "no map"),
        (specified("/bin/true", nested=nested), InvalidArgument, "deeper than 64"),
        (specified(*["a"] * 300_000), InvalidArgument, "exceeds max_array_len"),
        (specified("true", many=[["a"] * 9] * 30_000), InvalidArgument, "too many"),
        (specified("/bin/true", blob=b"bytes"), InvalidArgument, "bytes"),
        (specified("x" * PROCESS_MAX), ResourceExhausted, f"{PROCESS_MAX} fit"),
        (specified("true", note="\n" * (PROCESS_MAX - MIB)), ResourceExhausted, f"{PROCESS_MAX} fit"),
    ):
        with pytest.raises(error, match=reason):
            await house.tasks.exec(id, "bad", {}, digest=await put(replica, document))
    digest = await put(replica, specified("/bin/true"))
    for name, process, named, error in (
        (id, {}, f"sha256:{'0' * 64}", NotFound),
        (id, {}, "sha256:x", InvalidArgument),
        (id, exec_of("true"), digest, InvalidArgument),
        ("nobody", {}, digest, NotFound),
    ):
        with pytest.raises(error):
            await house.tasks.exec(name, "bad", process, digest=named)
    with pytest.raises(NotFound):
        await house.tasks.get(id, "bad")
    assert not list(Path(house.state / "tasks/default" / id).glob("process-*"))


async def test_more_arguments_than_the_kernel_takes(house: House, replica: Replica) -> None:
    """The runtimes say so on the process's stderr, when it counts as started; here nothing is made."""
    id = await house.running("/bin/sleep", "1000")
    stack = [{"type": "RLIMIT_STACK", "soft": 4 << 20, "hard": 8 << 20}]
    for document, reason in (
        (specified("/bin/true", "x" * 131_072), "one takes 131073 bytes, at most 131072 fit"),
        (specified("/bin/true", *["x" * 100_000] * 30), "it takes 3000"),
        (specified("/bin/true", env=["A=" + "x" * 100_000] * 30), "it takes 3000"),
        (specified("/bin/true", *["x" * 100_000] * 15, rlimits=stack), f"it takes .* at most {MIB} fit"),
    ):
        with pytest.raises(InvalidArgument, match=f"argument list too long: {reason}"):
            await house.tasks.exec(id, "long", {}, digest=await put(replica, document))
    with pytest.raises(InvalidArgument, match="argument list too long"):
        await house.created("/bin/true", "x" * 131_072)
    for args in ["x" * 131_071], ["x" * 99_999] * 20:
        await house.tasks.exec(id, "long", {}, digest=await put(replica, specified("/bin/true", *args)))
        await house.tasks.start(id, "long")
        assert await house.exit(id, "long") == 0
        await house.tasks.delete(id, "long")
    # With what the runtime adds it is too much, which the kernel tells when the runtime has answered already.
    stack[0]["soft"] = 1 << 20
    words = ["x" * 50_000, "x" * 100_000, "x" * ((256 << 10) - 150_000 - len("/bin/truePATH=/bin") - 5 * 9)]
    last = specified("/bin/true", *words, rlimits=stack)
    await house.tasks.exec(id, "last", {}, digest=await put(replica, last))
    await house.tasks.start(id, "last")
    assert await house.exit(id, "last") != 0
    await house.tasks.delete(id, "last")


def files_of(house: House, id: str) -> list[str]:
    bundle = house.state / "tasks" / "default" / id
    places = [*bundle.glob("process-*.json"), *bundle.glob("exits/exec-*"), *bundle.glob("io/exec-*")]
    return [str(path.relative_to(bundle)) for path in places]


async def test_what_nobody_comes_back_for_goes(house: House) -> None:
    """Once it has ended, and its time is over; also where the service was another one meanwhile."""
    id = await house.running("/bin/sleep", "1000")
    out = Stdio(stdin="bus://", stdout="bus://", stderr="bus://")
    ends: list[asyncio.Task[int]] = []
    for name, kept in (("at-once", 0), ("later", 2), ("never", -1)):
        await house.tasks.exec(id, name, exec_of("sleep", "0.5"), out, kept=kept)
        await house.tasks.start(id, name)
        if kept:
            ends.append(asyncio.create_task(house.exit(id, name)))
    await house.tasks.exec(id, "over-a-restart", exec_of("cat"), out, kept=1)
    await house.tasks.start(id, "over-a-restart")
    assert await asyncio.gather(*ends) == [0, 0]
    async with asyncio.timeout(PATIENCE):
        while "at-once" in house.supervisor.task("default", id).processes:
            await asyncio.sleep(0.05)
    await house.stop_tasks()
    await house.start_tasks()
    assert (await house.tasks.get(id, "over-a-restart")).status == "running"
    await house.tasks.input(id, "w", 0, b"", "over-a-restart", eof=True)
    async with asyncio.timeout(PATIENCE):
        while set(house.supervisor.task("default", id).processes) != {"", "never"}:
            await asyncio.sleep(0.05)
    with pytest.raises(NotFound):
        await house.tasks.get(id, "later")
    await house.tasks.delete(id, "never")
    assert files_of(house, id) == []


async def test_whoever_asks_keeps_it(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    for number in range(20):
        name, late = f"asked{number}", 0.0
        await house.tasks.exec(id, name, exec_of("true"), kept=1)
        await house.tasks.start(id, name)
        assert await house.exit(id, name) == 0
        for _ in range(6):
            asked = time.monotonic()
            await asyncio.sleep(0.4)
            try:
                assert await house.exit(id, name) == 0
            except NotFound:
                late = time.monotonic() - asked
                break
        if not late:
            return
        assert late > 1, "it went though it was asked for"  # the machine stood still
    raise AssertionError("the machine stands still for ever")


async def test_what_is_never_started_goes(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wherry_task.lingering.START_SECONDS", 0.5)
    id = await house.running("/bin/sleep", "1000")
    await house.tasks.exec(id, "added", exec_of("true"), kept=0)
    async with asyncio.timeout(PATIENCE):
        while len(house.supervisor.task("default", id).processes) > 1:
            await asyncio.sleep(0.05)
    assert files_of(house, id) == []


async def test_what_does_not_start_leaves_no_file(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    for name in ("one", "two"):
        await house.tasks.exec(id, name, exec_of("true") | {"args": ["/nonexistent"]})
        with pytest.raises(WherryError):
            await house.tasks.start(id, name)
        await house.tasks.delete(id, name, force=True)
    await house.tasks.exec(id, "three", exec_of("true"))
    await house.tasks.delete(id, "three")
    assert files_of(house, id) == []

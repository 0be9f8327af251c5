"""The rest of what can be done to a task, over each real runtime: limits, statistics, checkpoints, execs, memory."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest
from contentd import Replica
from housebus import PATIENCE
from task_house import RUNTIMES, SH, SHIM, House, exec_of, gone, house_of
from wherry_shared import context
from wherry_shared.api.container import Containers
from wherry_shared.api.task import CheckpointOptions, Stats, Stdio, Tasks
from wherry_shared.bus import Bus
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unimplemented,
    WherryError,
)
from wherry_shared.values import Mount
from wherry_task import checkpoints, runtimes

MIB = 1 << 20


@pytest.fixture(params=RUNTIMES)
async def house(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with house_of(bus, tmp_path, request.param) as made:
        yield made


async def stats_of(house: House, id: str) -> Stats:
    """Asked again where it could not be asked: a busy machine may take longer than one look may."""
    async with asyncio.timeout(60):
        while True:
            (one,) = (await house.tasks.stats([id])).items
            if not one.error:
                return one


def limit_of(stats: Stats) -> int:
    return stats.v1.memory.usage.limit if stats.v1 else stats.v2.memory.usage_limit if stats.v2 else -1


async def test_limits_can_be_changed_until_it_ends(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    assert limit_of(await stats_of(house, id)) != 64 * MIB
    await house.tasks.update(id, {"memory": {"limit": 64 * MIB}})
    assert limit_of(await stats_of(house, id)) == 64 * MIB
    await house.tasks.kill(id, signal.SIGKILL)
    await house.exit(id)
    with pytest.raises(FailedPrecondition, match="cannot update a stopped container"):
        await house.tasks.update(id, {"memory": {"limit": 32 * MIB}})
    with pytest.raises(NotFound):
        await house.tasks.update("nobody", {})


async def test_what_tasks_use(house: House) -> None:
    busy = await house.running(*SH, "while true; do echo; done", stdio=Stdio())
    ended = await house.running("/bin/true")
    await house.exit(ended)
    made = await house.created("/bin/sleep", "1000")
    before = await stats_of(house, busy)
    await asyncio.sleep(0.2)
    after = await stats_of(house, busy)
    assert after.timestamp > before.timestamp
    if before.v1 and after.v1:
        assert after.v1.cpu.usage.total > before.v1.cpu.usage.total > 0
        assert after.v1.memory.usage.usage > 0 and after.v1.pids.current >= 1
    elif before.v2 and after.v2:
        assert after.v2.cpu.usage_usec > before.v2.cpu.usage_usec > 0
        assert after.v2.memory.usage > 0 and after.v2.pids.current >= 1
    else:
        raise AssertionError("no metrics")
    # One that has ended is missing, and so is one that never was.
    page = await house.tasks.stats()
    assert [s.container_id for s in page.items] == sorted([busy, made])
    assert [s.container_id for s in (await house.tasks.stats([busy, ended, "nobody"])).items] == [busy]
    first = await house.tasks.stats(limit=1)
    assert len(first.items) == 1 and first.next == first.items[0].container_id
    rest = await house.tasks.stats(after=first.next)
    assert [s.container_id for s in first.items + rest.items] == sorted([busy, made])


async def test_a_checkpoint_or_why_there_is_none(house: House, tmp_path: Path) -> None:
    """Where CRIU works the task goes on from its image; where it does not, that is said and nothing has changed."""
    id = await house.container("/bin/sleep", "1000")
    mounts = [Mount(type="bind", source=str(house.rootfs), options=["rbind", "rw"])]  # CRIU makes a directory in it
    await house.tasks.create(id, mounts)
    image = CheckpointOptions(image=str(tmp_path / "image"), exit=True)
    with pytest.raises(FailedPrecondition, match="cannot checkpoint a created container"):
        await house.tasks.checkpoint(id, image)
    await house.tasks.start(id)
    with pytest.raises(InvalidArgument, match="absolute"):
        await house.tasks.checkpoint(id, CheckpointOptions(image="somewhere"))
    with pytest.raises(NotFound):
        await house.tasks.checkpoint("nobody", image)
    try:
        await house.tasks.checkpoint(id, image)
    except Unimplemented as e:
        assert "CRIU does not work on this node: " in e.message or "has no checkpoints" in e.message
        assert (await house.tasks.get(id)).status == "running"
        await house.tasks.delete(id, force=True)
        with pytest.raises(WherryError):
            assert await house.tasks.create(id, mounts, checkpoint=str(tmp_path / "image")) == 0
            await house.tasks.start(id)
        return
    assert await house.exit(id) >= 0
    await house.tasks.delete(id)
    assert await house.tasks.create(id, mounts, checkpoint=str(tmp_path / "image")) == 0
    assert await house.tasks.start(id) > 0
    assert (await house.tasks.get(id)).status == "running"


# As a runtime whose CRIU works would: the image holds what /state says, and a restored container says it again.
FREEZER = """#!/bin/sh
run={runtime}; globals="$1 $2 $3 $4 $5 $6"; verb=$7
case $verb in checkpoint|restore) ;; *) exec $run "$@" ;; esac
shift 7
while [ $# -gt 1 ]; do
  case $1 in --image-path) image=$2 ;; --pid-file) pid=$2 ;; --leave-running) stay=1 ;; esac; shift
done
if [ $verb = checkpoint ]; then
  mkdir -p $image && cp {root}/memory $image/pages-1.img && echo inventory > $image/inventory.img || exit 1
  [ "$stay" ] || $run $globals kill $1 KILL
else
  cp $image/pages-1.img {root}/restored && test -s $image/inventory.img &&
  $run $globals create --bundle . --pid-file $pid $1 && $run $globals start $1
fi
"""


async def test_a_checkpoint_is_content(house: House) -> None:
    """CRIU does not work on every kernel: here the runtime only says that it does, and the rest is as always."""
    if house.runtime == SHIM:
        pytest.skip("a shim has its runtime's own way to CRIU")
    freezer = house.root / "criu-runtime"
    freezer.write_text(FREEZER.format(runtime=runtimes.find(house.runtime), root=house.root))
    freezer.chmod(0o700)
    house.allowed.append(str(freezer))
    (house.root / "memory").write_text("all that it knew")
    replica = Replica(house.bus, house.root / "content")
    await replica.start()
    id = await house.container("/bin/sleep", "1000")
    await house.tasks.create(id, house.mounts, runtime=str(freezer))
    await house.tasks.start(id)
    image, config = await house.tasks.checkpoint(id)
    assert (await house.tasks.get(id)).status == "running"
    assert (image.media_type, config.media_type) == (checkpoints.IMAGE, checkpoints.CONFIG)
    assert (await replica.content.info(image.digest)).size == image.size
    assert await house.tasks.checkpoint(id, CheckpointOptions(exit=True)) != []
    assert await house.exit(id) == 137
    await house.tasks.delete(id)
    none = f"sha256:{'0' * 64}"
    for digest, error in ((none, NotFound), (config.digest, InvalidArgument), ("sha256:x", InvalidArgument)):
        with pytest.raises(error):
            await house.tasks.create(id, house.mounts, runtime=str(freezer), checkpoint=digest)
    assert await house.tasks.create(id, house.mounts, runtime=str(freezer), checkpoint=image.digest) == 0
    with pytest.raises(AlreadyExists):
        await house.tasks.create(id, house.mounts, runtime=str(freezer), checkpoint=image.digest)
    left = house.root / "checkpoints/rooms/left"
    left.mkdir()
    await house.stop_tasks()
    await house.start_tasks()  # what waits for its start keeps what it needs for it
    assert not left.exists()
    assert await house.tasks.start(id) == (await house.tasks.get(id)).pid > 0
    assert (house.root / "restored").read_text() == "all that it knew"
    assert not [path for path in (house.root / "checkpoints").rglob("*") if path.is_file()]
    await house.tasks.delete(id, force=True)
    await replica.stop()


async def test_a_created_task_can_be_killed(house: House) -> None:
    id = await house.created("/bin/sleep", "1000")
    await house.tasks.kill(id, signal.SIGKILL)
    assert await house.exit(id) == 137
    with pytest.raises(FailedPrecondition, match="cannot start a stopped process"):
        await house.tasks.start(id)
    assert (await house.tasks.delete(id)).exit_status == 137


async def refused(*calls: tuple[Awaitable[object], str]) -> None:
    for call, words in calls:
        with pytest.raises(FailedPrecondition, match=words):
            await call


async def test_what_is_out_of_place_is_refused_in_these_words(house: House) -> None:
    id = await house.created("/bin/sleep", "1000")
    await refused(
        (house.tasks.pause(id), "cannot pause a created container"),
        (house.tasks.resume(id), "cannot resume a created container"),
    )
    await house.tasks.start(id)
    await refused(
        (house.tasks.start(id), "cannot start a running process"),
        (house.tasks.resume(id), "cannot resume a running container"),
        (house.tasks.delete(id), "cannot delete a running process"),
    )
    await house.tasks.pause(id)
    await refused(
        (house.tasks.pause(id), "cannot pause a paused container"),
        (house.tasks.start(id), "cannot start a paused process"),
        (house.tasks.delete(id), "cannot delete a paused process"),
        (house.tasks.exec(id, "x", exec_of("true")), "cannot exec in a paused state"),
    )
    await house.tasks.resume(id)
    await house.tasks.kill(id, signal.SIGKILL, all=True)
    assert await house.exit(id) == 137
    await refused(
        (house.tasks.pause(id), "cannot pause a stopped container"),
        (house.tasks.resume(id), "cannot resume a stopped container"),
        (house.tasks.exec(id, "x", exec_of("true")), "cannot exec in a stopped state"),
    )
    for everyone in (False, True):
        with pytest.raises(NotFound, match="process already finished"):
            await house.tasks.kill(id, signal.SIGKILL, all=everyone)


async def test_an_exec_waits_for_its_start_and_ends_with_the_init(house: House) -> None:
    id = await house.created("/bin/sleep", "1000")
    await house.tasks.exec(id, "early", exec_of("sleep", "1000"))
    with pytest.raises(InvalidArgument):
        await house.tasks.exec(id, "", exec_of("true"))
    await house.tasks.start(id)
    await house.tasks.start(id, "early")
    await house.tasks.exec(id, "late", exec_of("true"))
    async with await house.bus.subscribe(namespace="default", topic="/tasks/exit") as exits:
        await house.tasks.kill(id, signal.SIGKILL)
        assert await house.exit(id) == 137 and await house.exit(id, "early") == 137
        async with asyncio.timeout(PATIENCE):
            assert [(await anext(exits)).event["id"] for _ in range(2)] == ["early", id]
    with pytest.raises(FailedPrecondition, match="init process is not running"):
        await house.tasks.start(id, "late")


async def test_many_execs_at_once(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")

    async def one(number: int) -> int:
        exec_id = f"e{number}"
        await house.tasks.exec(id, exec_id, exec_of("sh", "-c", f"exit {number}"))
        await house.tasks.start(id, exec_id)
        code = await house.exit(id, exec_id)
        assert (await house.tasks.delete(id, exec_id)).exit_status == code
        return code

    assert await asyncio.gather(*(one(number) for number in range(16))) == list(range(16))
    assert [p.exec_id for p in await house.tasks.pids(id)] == [""]


async def test_an_exec_with_the_longest_arguments(house: House, tmp_path: Path) -> None:
    """A single one may have 128 KiB less its end; more than a request has room for: test_task_processes.py."""
    id = await house.running("/bin/sleep", "1000")
    out = tmp_path / "lengths"
    words = ["x" * ((128 << 10) - 1)] * 6
    await house.tasks.exec(
        id, "long", exec_of("sh", "-c", "echo $# ${#1} ${#6}", "sh", *words), Stdio(stdout=f"file://{out}")
    )
    await house.tasks.start(id, "long")
    assert await house.exit(id, "long") == 0
    await house.tasks.delete(id, "long")
    assert out.read_text().split() == ["6", "131071", "131071"]
    with pytest.raises(InvalidArgument, match="argument list too long"):
        await house.tasks.exec(id, "longer", exec_of("echo", "x" * (128 << 10)))


async def test_a_terminals_size(house: House, tmp_path: Path) -> None:
    (house.rootfs / "bin/stty").symlink_to("busybox")
    id = await house.running("/bin/sleep", "1000")
    await house.tasks.resize(id, 80, 24)  # it has none: nothing happens
    out = tmp_path / "out"
    out.touch()
    terminal = Stdio(stdout=str(out), terminal=True)
    script = 'until [ "$(stty size 2>/dev/null)" = "43 132" ]; do sleep 0.02; done; stty size'
    await house.tasks.exec(id, "t", exec_of("sh", "-c", script, terminal=True), terminal)
    await house.tasks.start(id, "t")
    await house.tasks.resize(id, 132, 43, "t")
    assert await house.exit(id, "t") == 0
    with pytest.raises(FailedPrecondition, match="cannot resize a stopped container"):
        await house.tasks.resize(id, 80, 24, "t")
    with pytest.raises(InvalidArgument):
        await house.tasks.resize(id, -1, 24)
    await house.tasks.delete(id, "t")
    assert out.read_text().split() == ["43", "132"]


async def test_want_of_memory_is_told_and_marked(house: House) -> None:
    """threats 38: the kernel kills the hog; the event comes before the exit, which says what it was."""
    limits = {"memory": {"limit": 32 * MIB, "swap": 32 * MIB}}
    hog = "a=x; while true; do a=$a$a; done"
    id = await house.container(*SH, hog)
    await house.changed(id, resources={**limits, "devices": [{"allow": True, "access": "rwm"}]})
    rss = _rss()
    async with await house.bus.subscribe(namespace="default", topic="") as events:
        await house.tasks.create(id, house.mounts)
        await house.tasks.start(id)
        assert await house.exit(id) == 137
        seen = []
        async with asyncio.timeout(PATIENCE):
            async for event in events:
                if event.topic in ("/tasks/oom", "/tasks/exit"):
                    seen.append((event.topic, event.event.get("oom")))
                if {topic for topic, _ in seen} == {"/tasks/oom", "/tasks/exit"}:
                    break
    assert ("/tasks/exit", True) in seen
    if house.runtime != SHIM:  # a shim's own event travels apart from what it answers
        assert [topic for topic, _ in seen] == ["/tasks/oom", "/tasks/exit"]
    assert _rss() - rss < 16 * MIB
    await house.tasks.delete(id)


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_whose_program_runs(house: House) -> None:
    """A runtime's path, or a program among its options, is one that the node's admin allowed; for tenants neither."""
    own = house.root / "own" / Path(runtimes.find(house.runtime)).name
    own.parent.mkdir()
    own.symlink_to(runtimes.find(house.runtime))
    house.allowed.append(str(own))
    id = await house.container(*SH, "exit 6")
    for path in (f"{own}-not", f"{own.parent}/../own/{own.name}", "/bin/sh"):
        with pytest.raises(PermissionDenied, match="not among those"):
            await house.tasks.create(id, house.mounts, runtime=path)
    await house.tasks.create(id, house.mounts, runtime=str(own))
    assert house.supervisor.task("default", id).row.binary == str(own)
    await house.tasks.start(id)
    assert await house.exit(id) == 6
    await house.tasks.delete(id)
    tenant = context.Context(namespace="default", identity=context.Identity("tenant-default", "tenant", "default"))
    token = context.enter(tenant)
    try:
        with pytest.raises(PermissionDenied, match="not among those"):
            await house.service.create(id, house.mounts, runtime=str(own))
    finally:
        context.leave(token)
    record = await house.containers.get(id)
    options = record.runtime.model_copy(update={"options": {"BinaryName": "/bin/sh"}})
    await house.containers.create(record.model_copy(update={"id": f"{id}-o", "runtime": options}))
    with pytest.raises(PermissionDenied, match="/bin/sh"):
        await house.tasks.create(f"{id}-o", house.mounts)
    assert house.leftovers(id) == []


async def test_what_cannot_be_made_leaves_nothing(house: House) -> None:
    id = await house.container("/bin/true")
    record = await house.containers.get(id)
    assert record.spec is not None
    cases: list[tuple[dict[str, Any] | None, list[Mount], type[WherryError], str]] = [
        (None, house.mounts, InvalidArgument, "no runtime specification"),
        ({"ociVersion": "1.0.2"}, house.mounts, InvalidArgument, "with a process"),
        ({**record.spec, "ociVersion": ""}, house.mounts, InvalidArgument, "with a process"),
        ({**record.spec, "linux": []}, house.mounts, InvalidArgument, "is no object"),
        (record.spec, [Mount(type="bind", source="/no/such/root", options=["rbind"])], WherryError, "such/root|mount"),
        (record.spec, [Mount(type="nosuchfs", source="x")], WherryError, "nosuchfs|such device|mount"),
    ]  # fmt: skip
    for spec, mounts, error, words in cases:
        await house.containers.update(record.model_copy(update={"spec": spec}), mask=["spec"])
        with pytest.raises(error, match=words):
            await house.tasks.create(id, mounts)
        assert house.leftovers(id) == []
    await house.containers.update(record, mask=["spec"])
    await house.tasks.create(id, house.mounts)
    assert (await house.tasks.delete(id)).exit_status in (0, 137)
    assert house.leftovers(id) == []


async def test_an_exec_that_cannot_run_harms_nobody(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    bad = [{**exec_of("true"), "args": ["/no/such/program"]}, {}]
    for number, process in enumerate(bad):
        await house.tasks.exec(id, f"bad{number}", process)
        with pytest.raises(WherryError):
            await house.tasks.start(id, f"bad{number}")
        assert (await house.tasks.get(id, f"bad{number}")).status == "created"
        await house.tasks.delete(id, f"bad{number}")
    for call in (
        house.tasks.start(id, "nope"), house.tasks.kill(id, 9, "nope"), house.tasks.wait(id, "nope"),
        house.tasks.delete(id, "nope"), house.tasks.resize(id, 1, 1, "nope"), house.tasks.close_stdin(id, "nope"),
    ):  # fmt: skip
        with pytest.raises(NotFound, match="nope"):
            await call
    await house.tasks.exec(id, "good", exec_of("sleep", "1000"))
    await house.tasks.start(id, "good")
    await refused(
        (house.tasks.start(id, "good"), "cannot start a running process"),
        (house.tasks.delete(id, "good"), "cannot delete a running process"),
    )
    assert (await house.tasks.delete(id, "good", force=True)).exit_status == 137
    assert (await house.tasks.get(id)).status == "running"


async def test_waiting_before_and_after(house: House) -> None:
    id = await house.created(*SH, "exit 7")
    assert await house.tasks.wait(id, patience=0) is None
    waiting = [asyncio.create_task(house.exit(id)) for _ in range(3)]
    await house.tasks.start(id)
    assert await asyncio.gather(*waiting) == [7, 7, 7]
    first, second = await house.tasks.wait(id), await house.tasks.wait(id)
    assert first is not None and first == second and first.exit_status == 7
    assert await house.tasks.delete(id) == first
    with pytest.raises(NotFound):
        await house.tasks.wait(id)
    id = await house.running("/bin/sleep", "1000")
    waiter = asyncio.create_task(house.exit(id))
    await house.tasks.delete(id, force=True)
    assert await waiter == 137


async def test_a_shared_pid_namespace_is_killed_whole(house: House) -> None:
    """Nobody of a container outlives it, though the kernel does not end them with the init."""
    id = await house.container(*SH, "sleep 1001 & sleep 1002 & wait")
    record = await house.containers.get(id)
    assert record.spec is not None
    shared = [each for each in record.spec["linux"]["namespaces"] if each["type"] != "pid"]
    await house.changed(id, namespaces=shared)
    for everyone in (True, False):
        await house.tasks.create(id, house.mounts)
        await house.tasks.start(id)
        async with asyncio.timeout(PATIENCE):
            while len(pids := [each.pid for each in await house.tasks.pids(id)]) < 3:
                await asyncio.sleep(0.02)
        await house.tasks.kill(id, signal.SIGKILL, all=everyone)
        assert await house.exit(id) == 137
        await house.tasks.delete(id)
        async with asyncio.timeout(PATIENCE):
            while not all(gone(pid) for pid in pids):
                await asyncio.sleep(0.02)
        assert house.leftovers(id) == []


async def test_each_has_its_own_environment(house: House, tmp_path: Path) -> None:
    """CVE-2021-21334: many at once of one image, and execs beside them; nobody sees another's."""

    def out(name: str) -> Stdio:
        return Stdio(stdout=f"file://{tmp_path}/{name}")

    async def life(number: int) -> None:
        id = await house.container(*SH, "echo $MARK")
        record = await house.containers.get(id)
        assert record.spec is not None
        record.spec["process"]["env"] = [f"MARK=c{number}"]
        await house.containers.update(record, mask=["spec"])
        await house.tasks.create(id, house.mounts, out(f"c{number}"))
        await house.tasks.start(id)
        await house.exit(id)
        await house.tasks.delete(id)

    async def beside(id: str, number: int) -> None:
        process = {**exec_of("sh", "-c", "echo $MARK"), "env": [f"MARK=e{number}"]}
        await house.tasks.exec(id, f"e{number}", process, out(f"e{number}"))
        await house.tasks.start(id, f"e{number}")
        await house.exit(id, f"e{number}")
        await house.tasks.delete(id, f"e{number}")

    steady = await house.running("/bin/sleep", "1000")
    await asyncio.gather(*(life(n) for n in range(12)), *(beside(steady, n) for n in range(12)))
    marks = [f"{kind}{number}" for kind in "ce" for number in range(12)]
    assert {(tmp_path / mark).read_text() for mark in marks} == {f"{mark}\n" for mark in marks}
    assert all((tmp_path / mark).read_text() == f"{mark}\n" for mark in marks)


async def test_names_are_identifiers_and_namespaces_apart(house: House) -> None:
    """threats 23."""
    id = await house.created("/bin/sleep", "1000")
    for bad in ("", "*", ">", "a b", "a..b", "..", "a\r\nb", "a\0", "n" * 77, "кс8", "a/b"):
        for call in (
            house.tasks.get(bad), house.tasks.start(bad), house.tasks.create(bad, house.mounts), house.tasks.wait(bad),
            house.tasks.exec(id, bad, exec_of("true")), house.tasks.delete(bad, force=True), house.tasks.kill(bad, 9),
        ):  # fmt: skip
            with pytest.raises(InvalidArgument):
                await call
    k8s = house.bus.proxy(Tasks, namespace="k8s.io")
    await house.bus.proxy(Containers, namespace="k8s.io").create(await house.containers.get(id))
    await k8s.create(id, house.mounts)
    assert (await k8s.get(id)).pid != (await house.tasks.get(id)).pid
    assert (await house.bus.proxy(Tasks, namespace="k8s").walk()).items == []
    await k8s.delete(id, force=True)
    assert (await house.tasks.get(id)).status == "created"

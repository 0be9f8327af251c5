"""What the task service finds when it starts again, and monitors that hang: nothing is lost, nothing told twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from housebus import PATIENCE
from task_house import RUNTIMES, SHIM, House, exec_of, gone, house_of, parent_of
from wherry_shared.api.task import Exit, Stdio
from wherry_shared.bus import Bus
from wherry_shared.bus.events import Subscriber
from wherry_shared.errors import FailedPrecondition, Internal, NotFound, Unavailable
from wherry_shared.sqlite import Database
from wherry_task import metadata
from wherry_task.backends.channel import Channel
from wherry_task.backends.oci import MonitorShim
from wherry_task.backends.shim import V2Shim
from wherry_task.bundles import Bundles
from wherry_task.monitor import runtime
from wherry_task.monitor.mounts import unmount_rootfs
from wherry_task.recovery import remove_unused_fifos


@pytest.fixture(params=RUNTIMES)
async def house(request: pytest.FixtureRequest, bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with house_of(bus, tmp_path, request.param) as made:
        yield made


def impatient_with(shim: Any, patch: pytest.MonkeyPatch) -> None:
    """This one hangs if it does not answer within half a second; the others may have a slow machine."""

    async def call(method: str, request: Mapping[int, Any], patience: float | None = 0.5) -> bytes:
        return await V2Shim.call(shim, method, request, patience)

    if isinstance(shim, V2Shim):
        patch.setattr(shim, "call", call)
    else:
        patch.setattr(shim.channel, "ask", partial(shim.channel.ask, patience=0.5))


@pytest.fixture
def impatient() -> Iterator[pytest.MonkeyPatch]:
    """Who does not answer within half a second hangs, until this is undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Channel.ask.__kwdefaults__ or {}, "patience", 0.5)
        defaults = V2Shim.call.__defaults__ or ()
        patch.setattr(V2Shim.call, "__defaults__", (0.5, *defaults[1:]))
        yield patch


async def told(events: Subscriber, count: int) -> list[tuple[str, int]]:
    """The exits that were told; one too many has half a second to come."""
    found: list[tuple[str, int]] = []
    try:
        while True:
            async with asyncio.timeout(PATIENCE if len(found) < count else 0.5):
                event = (await anext(events)).event
            found.append((str(event["id"]), int(event["exit_status"])))
    except TimeoutError:
        return sorted(found)


async def test_a_reboot_ends_everything_once(house: House) -> None:
    """Another boot id, an empty state directory: what ran is told to have ended, once, and can be deleted."""
    async with await house.bus.subscribe(namespace="default", topic="/tasks/exit") as events:
        runs, waits = await house.running("/bin/sleep", "1000"), await house.created("/bin/sleep", "1000")
        ended = await house.running("/bin/sh", "-c", "exit 4")
        await house.tasks.exec(runs, "e", exec_of("sleep", "1000"))
        await house.tasks.start(runs, "e")
        assert await house.exit(ended) == 4
        pids = [(await house.tasks.get(id)).pid for id in (runs, waits)]
        bundles = [house.supervisor.task("default", id).bundle.path for id in (runs, waits, ended)]
        monitors = [_monitor_of(bundle) for bundle in bundles]
        await house.stop_tasks()
        _power_cut([*monitors, *pids], bundles)
        database = await Database.open(house.root / "task.db", metadata.MIGRATIONS)
        await database.write(lambda tx: tx.execute("UPDATE tasks SET boot = 'an-earlier-one'").rowcount)
        await database.close()
        for _ in range(2):
            await house.start_tasks()
            assert [(await house.tasks.get(id)).status for id in (runs, waits, ended)] == ["stopped"] * 3
            assert [(await house.tasks.get(id)).exit_status for id in (runs, waits, ended)] == [137, 137, 4]
            await house.stop_tasks()
        await house.start_tasks()
        assert await told(events, 4) == sorted([("e", 137), (runs, 137), (waits, 137), (ended, 4)])
    for id in (runs, waits, ended):
        assert isinstance(await house.tasks.delete(id), Exit)
        with pytest.raises(NotFound):
            await house.tasks.get(id)


@pytest.mark.parametrize("moved", [True, False])
async def test_what_ran_from_a_state_directory_that_is_gone_runs_no_more(house: House, moved: bool) -> None:
    """Moved, or removed, while the service was away: nobody could ever speak to it again, or tell it from its next."""
    if house.runtime == SHIM and not moved:
        pytest.skip("a shim's rootfs is mounted there for all to see: who removes that removes the container's files")
    runs, waits = await house.running("/bin/sleep", "1000"), await house.created("/bin/sleep", "1000")
    pids = [(await house.tasks.get(id)).pid for id in (runs, waits)]
    monitors = [parent_of(pid) for pid in pids] if house.runtime != SHIM else []
    unheard = [] if moved else [*monitors, *{parent_of(pid) for pid in monitors}]  # the zygote, too
    await house.stop_tasks()
    before = Bundles(house.state)
    if moved:
        house.state = house.state.rename(house.root / "elsewhere")
    else:
        shutil.rmtree(house.state)
        house.state.mkdir(mode=0o700)
    await house.start_tasks()
    async with asyncio.timeout(PATIENCE):
        while not all(map(gone, pids)) or (moved and not all(map(gone, monitors))):
            await asyncio.sleep(0.01)
    for id in (runs, waits):
        assert (await house.tasks.delete(id)).exit_status == 137
        await house.tasks.create(id, house.mounts)
        await house.tasks.start(id)
        assert (await house.tasks.delete(id, force=True)).exit_status == 137
    for pid in unheard:
        os.kill(pid, signal.SIGKILL)
    before.remove_empty()  # of the cgroups that were named after the directory


async def test_what_runs_is_found_from_another_state_directory(house: House) -> None:
    """`wherry up --state` of another: the root is the same, so the containers are the node's own."""
    ids = [await house.running("/bin/sleep", "1000") for _ in range(2)]
    pids = [(await house.tasks.get(id)).pid for id in ids]
    unheard = {parent_of(parent_of(pid)) for pid in pids} if house.runtime != SHIM else set()  # the first one's zygote
    await house.stop_tasks()
    before, house.state = Bundles(house.state), house.root / "another"
    house.state.mkdir(mode=0o700)
    await house.start_tasks()
    assert [(await house.tasks.get(id)).pid for id in ids] == pids
    await house.tasks.kill(ids[0], signal.SIGKILL)
    assert await house.exit(ids[0]) == 137
    assert (await house.tasks.delete(ids[0])).exit_status == 137
    assert (await house.tasks.delete(ids[1], force=True)).exit_status == 137
    assert all(map(gone, pids))
    for pid in unheard:
        os.kill(pid, signal.SIGKILL)
    before.remove_empty()


async def test_a_copied_root_does_not_touch_what_the_original_runs(house: House) -> None:
    """A backup that is tried out beside its node: its tasks have ended, and those of the node go on."""
    id = await house.running("/bin/sleep", "1000")
    pid = (await house.tasks.get(id)).pid
    await house.stop_tasks()
    original, house.state = house.state, house.root / "another"
    house.state.mkdir(mode=0o700)
    shutil.copy(house.root / "task.db", house.root / "kept.db")
    with contextlib.closing(sqlite3.connect(house.root / "task.db")) as copy, copy:
        copy.execute("UPDATE home SET place = 'where it was copied from'")
    await house.start_tasks()
    assert (await house.tasks.get(id)).exit_status == 137
    await house.stop_tasks()
    await house.start_tasks()  # it is at home here now, and that is still not its container
    assert not gone(pid)
    assert (await house.tasks.delete(id)).exit_status == 137
    await house.stop_tasks(everything=True)
    assert not gone(pid)
    house.state = original
    for suffix in ("-wal", "-shm"):
        (house.root / f"task.db{suffix}").unlink(missing_ok=True)
    shutil.move(house.root / "kept.db", house.root / "task.db")
    await house.start_tasks()
    assert (await house.tasks.get(id)).pid == pid and not gone(pid)


async def test_a_deletion_whose_monitor_fails_late_is_answered_and_cleaned_up_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the container itself is gone its record goes, whatever becomes of the monitor; the bundle is for later."""
    id = await house.running("/bin/sh", "-c", "exit 3")
    assert await house.exit(id) == 3
    task = house.supervisor.task("default", id)
    if house.runtime == SHIM:
        assert not task.shim.removed()
        await house.tasks.delete(id)
        return
    async with asyncio.timeout(PATIENCE):
        while not task.shim.removed():
            await asyncio.sleep(0.01)

    async def fails(*_: object, **__: object) -> None:
        raise Internal("no")

    monkeypatch.setattr(MonitorShim, "delete", fails)
    assert (await house.tasks.delete(id)).exit_status == 3
    monkeypatch.undo()
    with pytest.raises(NotFound):
        await house.tasks.get(id)
    assert house.leftovers(id) == [str(task.bundle.path)]
    await house.stop_tasks()
    await house.start_tasks()
    assert house.leftovers(id) == []


async def test_what_still_has_a_cgroup_is_not_forgotten_before_it_is_gone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deletion that fails leaves the task as it was, to be deleted again."""
    id = await house.running("/bin/sleep", "1000")
    failing = V2Shim if house.runtime == SHIM else MonitorShim

    async def fails(*_: object, **__: object) -> None:
        raise Internal("no")

    with monkeypatch.context() as patch:
        patch.setattr(failing, "delete", fails)
        patch.setattr(failing, "removed", lambda self: False)
        with pytest.raises(Internal):
            await house.tasks.delete(id, force=True)
    assert (await house.tasks.get(id)).status == "stopped"
    assert (await house.tasks.delete(id)).exit_status == 137
    assert house.leftovers(id) == []


def _power_cut(pids: list[int], bundles: list[Path]) -> None:
    """Nothing that ran runs, and no file of a tmpfs and no mount is there any more."""
    for pid in pids:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
    for bundle in bundles:
        unmount_rootfs(str(bundle / "rootfs"))
        os.rmdir(bundle / "rootfs")  # fails, rather than that something below a mount goes
        shutil.rmtree(bundle)


async def test_a_start_whose_record_was_lost(house: House) -> None:
    """Killed between letting the init go and saying so: the next service finds it running, and says so."""
    if house.runtime == SHIM:
        id = await house.created("/bin/sleep", "1000")
        await house.supervisor.task("default", id).shim.start()
    else:
        id = await house.created("/bin/sleep", "1000")
        bundle, pid = house.supervisor.task("default", id).bundle, (await house.tasks.get(id)).pid
        assert runtime.release(bundle.binary, str(bundle.root / id), pid)
    async with await house.bus.subscribe(namespace="default", topic="/tasks/start") as starts:
        await house.stop_tasks()
        await house.start_tasks()
        assert (await house.tasks.get(id)).status == "running"
        async with asyncio.timeout(PATIENCE):
            assert (await anext(starts)).event["container_id"] == id
    # Whoever has waited for that start's answer asks again.
    assert await house.tasks.start(id) == (await house.tasks.get(id)).pid
    with pytest.raises(FailedPrecondition, match="cannot start a running process"):
        await house.tasks.start(id)
    await house.tasks.pause(id)
    await house.tasks.resume(id)
    assert (await house.tasks.delete(id, force=True)).exit_status == 137


async def test_a_pause_and_a_resume_whose_records_were_lost(house: House) -> None:
    """Killed between the deed and its record: nothing says what is not so, and either can be asked for."""
    id = await house.running("/bin/sleep", "1000")

    async def cut_off(deed: str) -> None:
        await getattr(house.supervisor.task("default", id).shim, deed)()
        await house.stop_tasks()
        await house.start_tasks()
        assert (await house.tasks.get(id)).status == "pausing"

    await cut_off("pause")
    async with await house.bus.subscribe(namespace="default", topic="/tasks/paused") as events:
        await house.tasks.pause(id)  # whoever has waited for that pause's answer asks again
        async with asyncio.timeout(PATIENCE):
            assert (await anext(events)).event["container_id"] == id
    assert (await house.tasks.get(id)).status == "paused"
    with pytest.raises(FailedPrecondition, match="cannot pause a paused container"):
        await house.tasks.pause(id)
    await cut_off("resume")
    await house.tasks.resume(id)
    assert (await house.tasks.get(id)).status == "running"
    await cut_off("pause")
    await house.tasks.resume(id)  # somebody else's
    assert (await house.tasks.get(id)).status == "running"
    await house.tasks.pause(id)
    await cut_off("resume")
    await house.tasks.pause(id)
    assert (await house.tasks.delete(id, force=True)).exit_status == 137


async def test_a_pause_that_nobody_waits_for_to_the_end(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    await house.pause_unanswered(id)
    assert (await house.tasks.get(id)).status == "pausing"
    await house.tasks.resume(id)
    assert (await house.tasks.get(id)).status == "running"
    assert (await house.tasks.delete(id, force=True)).exit_status == 137


async def test_a_monitor_that_hangs_costs_its_own_container_only(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, other = await house.running("/bin/sleep", "1000"), await house.running("/bin/sleep", "1000")
    pid = (await house.tasks.get(hangs)).pid
    monitor = _monitor_of(house.supervisor.task("default", hangs).bundle.path)
    impatient_with(house.supervisor.task("default", hangs).shim, monkeypatch)
    os.kill(monitor, signal.SIGSTOP)
    with pytest.raises(Unavailable, match="has not answered"):
        await house.tasks.kill(hangs, signal.SIGTERM)
    # What is asked of it costs nobody else anything, and what is known needs no asking.
    assert (await house.tasks.get(hangs)).status == "running"
    assert [p.container_id for p in (await house.tasks.walk()).items] == sorted([hangs, other])
    stats = {s.container_id: s for s in (await house.tasks.stats()).items}
    assert stats.keys() == {hangs, other} and (stats[other].v1 or stats[other].v2)
    # Of OCI runtimes the service reads the cgroups itself; a shim has to be asked, and says nothing.
    assert ("has not answered" in stats[hangs].error) is (house.runtime == SHIM)
    await house.tasks.pause(other)
    await house.tasks.resume(other)
    async with asyncio.timeout(PATIENCE):
        assert (await house.tasks.delete(hangs, force=True)).exit_status == 137
    assert gone(pid) and gone(monitor)
    assert (await house.tasks.get(other)).status == "running"


async def test_a_start_beside_a_monitor_that_hangs(house: House, impatient: pytest.MonkeyPatch) -> None:
    """The service starts all the same, and finds the container again when its monitor speaks again."""
    id = await house.running("/bin/sleep", "1000")
    monitor = _monitor_of(house.supervisor.task("default", id).bundle.path)
    await house.stop_tasks()
    os.kill(monitor, signal.SIGSTOP)
    async with asyncio.timeout(PATIENCE):
        await house.start_tasks()
    assert (await house.tasks.get(id)).status == "running"
    with pytest.raises(Unavailable):
        await house.tasks.pause(id)
    impatient.undo()
    os.kill(monitor, signal.SIGCONT)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await house.tasks.kill(id, signal.SIGKILL)
                break
            except Unavailable:
                await asyncio.sleep(0.1)
    assert await house.exit(id) == 137
    await house.tasks.delete(id)


def _monitor_of(bundle: Path) -> int:
    """What stands by the container, as it wrote down itself."""
    shim = bundle / "shim.json"
    known = json.loads((shim if shim.exists() else bundle / "monitor.json").read_text())
    return int(known["pid"] if shim.exists() else known["monitor"]["pid"])


async def test_everything_of_a_killed_node(house: House) -> None:
    """Services, zygote and monitors all at once: whatever went on alone is ended, told once, and goes."""
    used, left, young = (house.state / "fifo" / f"default:{name}" for name in ("used", "left", "young"))
    for folder in (used, left, young):
        folder.mkdir(parents=True, mode=0o700)
        os.mkfifo(folder / "stdout", 0o600)
    for folder in (used, left):
        os.utime(folder, (0, 0))
    reader = os.open(used / "stdout", os.O_RDONLY | os.O_NONBLOCK)  # shims wait for one
    runs = await house.running("/bin/sleep", "1000", stdio=Stdio(stdout=str(used / "stdout")))
    waits, still = await house.created("/bin/sleep", "1000"), await house.running("/bin/sleep", "1000")
    await house.tasks.pause(still)
    await house.tasks.exec(runs, "e", exec_of("sleep", "1000"))
    ids, pids = (runs, waits, still), [await house.tasks.start(runs, "e")]
    pids += [(await house.tasks.get(id)).pid for id in ids]
    monitors = [_monitor_of(house.supervisor.task("default", id).bundle.path) for id in ids]
    async with await house.bus.subscribe(namespace="default", topic="/tasks/exit") as events:
        await house.stop_tasks()
        if house.runtime != SHIM:
            zygote = parent_of(monitors[0])
            assert b"zygote" in Path(f"/proc/{zygote}/cmdline").read_bytes()
            os.kill(zygote, signal.SIGKILL)
        for monitor in monitors:
            os.kill(monitor, signal.SIGKILL)
        assert not gone(pids[1])  # there is nobody to end it
        await house.start_tasks()
        assert [(await house.tasks.get(id)).exit_status for id in ids] == [137, 137, 137]
        for _ in range(3000):  # killed, and out of its cgroup, but still on its way
            if not (alive := [pid for pid in pids if not gone(pid)]):
                break
            await asyncio.sleep(0.02)
        assert not alive, [Path(f"/proc/{pid}/status").read_text() for pid in alive]
        assert await told(events, 4) == sorted([("e", 137), *((id, 137) for id in ids)])
    remove_unused_fifos(house.state / "fifo", house.supervisor.stdio())
    assert (used.exists(), left.exists(), young.exists()) == (True, False, True)
    os.close(reader)
    for id in ids:
        await house.tasks.delete(id)
        assert house.leftovers(id) == []
        await house.tasks.create(id, house.mounts)


async def test_what_lies_about_is_cleaned(house: House) -> None:
    """Directories of bundles in every stage of being made."""
    namespace = house.state / "tasks/default"
    for name, files in (("empty", []), ("half", ["config.json"]), ("named", ["config.json", "shim-binary-path"])):
        (namespace / name / "rootfs").mkdir(parents=True, mode=0o700)
        for file in files:
            (namespace / name / file).write_text("/usr/bin/crun" if "path" in file else "{}")
    (namespace / "c..d").mkdir()
    await house.stop_tasks()
    await house.start_tasks()
    assert not namespace.exists() or list(namespace.iterdir()) == []

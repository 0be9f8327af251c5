"""kill -9 at every step: a key is absent or usable afterwards, asking again works, and nothing is left behind.

Each test forks; the child arms one trap, does one operation and dies there by SIGKILL.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from snapshot_rig import House, mounted, needs_root, tree
from wherry_shared import context
from wherry_shared.api.snapshot import REBASE_LABEL, Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import FailedPrecondition, NotFound
from wherry_shared.memory import MemoryTransport
from wherry_shared.sqlite import Database
from wherry_snapshot.backends import btrfs, mkfs, trees

pytestmark = needs_root

Work = Callable[[House, Snapshots], Awaitable[Any]]
Ground = Callable[[str], Path]


@dataclass(frozen=True)
class Trap:
    """Where the process dies: before or after the first call of `owner.name` whose arguments `when` accepts."""

    owner: Any
    name: str
    when: Callable[..., bool]
    after: bool = False

    def arm(self) -> None:
        original = getattr(self.owner, self.name)

        def sprung(*args: Any, **kwargs: Any) -> Any:
            hit = self.when(*args)
            if hit and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(self.owner, self.name, sprung)


def on(text: str) -> Callable[..., bool]:
    return lambda *args: any(text in str(a) for a in args)


def requests(_: Any, group: Any) -> bool:
    """Whether a transaction is one that a request waits for, and not the outbox's or the counter's."""
    return any(write.remember for write in group)


TRANSACTION = Trap(Database, "_transact", requests)
COMMITTED = Trap(Database, "_transact", requests, after=True)


async def _run(root: Path, work: Work) -> Any:
    house = House(Bus(MemoryTransport(), node="n1"), root)
    await house.start()
    try:
        return await work(house, house.bus.proxy(Snapshots, namespace="default"))
    finally:
        await house.stop()


def run(root: Path, work: Work) -> Any:
    return asyncio.run(_run(root, work))


def die(root: Path, trap: Trap, work: Work, *, at_start: bool = False) -> None:
    """Do `work` in a child that dies in the trap; fails when it does not. at_start: the start may spring it."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            if at_start:
                trap.arm()

            async def armed(house: House, api: Snapshots) -> Any:
                for snapshotter in await api.snapshotters():
                    await api.cleanup(snapshotter)  # what the start sweeps would fall into traps set for `work`
                if not at_start:
                    trap.arm()
                return await work(house, api)

            run(root, armed)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the trap was not sprung: {status:#x}"


def furnished(snapshotter: str) -> Work:
    """A committed `base` with two files, and an active `key` on it."""

    async def work(house: House, api: Snapshots) -> None:
        mounts = await api.prepare(snapshotter, "base-key")
        with mounted(mounts, house.root / "mnt") as at:
            (at / "file").write_text("1")
            (at / "dir").mkdir()
            (at / "dir/inner").write_text("2")
            os.link(at / "file", at / "link")
        await api.commit(snapshotter, "base", "base-key")
        await api.prepare(snapshotter, "key", "base")

    return work


FILES = {"file": "1", "link": "1", "dir": None, "dir/inner": "2"}


async def sound(house: House, api: Snapshots, snapshotter: str) -> None:
    """As many directories as snapshots, every one of them whole, and a database that checks out."""
    await api.cleanup(snapshotter)
    infos = (await api.walk(snapshotter)).items
    directories = house.directories(snapshotter)
    assert len(directories) == len(infos) and all(d.isdigit() for d in directories)
    for info in infos:
        if info.kind != "committed":
            with mounted(await api.mounts(snapshotter, info.name), house.root / "mnt") as at:
                assert tree(at) == (FILES if info.parent else {})
    connection = sqlite3.connect(house.root / "root/snapshot/metadata.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


PREPARE = {
    "before the directory": Trap(os, "mkdir", on("new-")),
    "after the directory": Trap(os, "mkdir", on("new-"), after=True),
    "before the rename": Trap(os, "rename", on("new-")),
    "after the rename": Trap(os, "rename", on("new-"), after=True),
    "before the row": TRANSACTION,
    "after the row": COMMITTED,
}
OVERLAY = {
    "before fs": Trap(os, "mkdir", on("/fs")),
    "after fs": Trap(os, "mkdir", on("/fs"), after=True),
    "owner": Trap(os, "chown", on("/fs")),
    "after work": Trap(os, "mkdir", on("/work"), after=True),
}
NATIVE = {
    "links": Trap(os, "mkdir", on("-links"), after=True),
    "in the copy": Trap(os, "copy_file_range", lambda *_: True, after=True),
    "in a directory": Trap(os, "mkdir", lambda name, *_: name == "dir", after=True),
    "at a link": Trap(os, "link", lambda *_: True, after=True),
    "attributes": Trap(os, "fchown", lambda *_: True, after=True),
    "links removed": Trap(os, "rmdir", on("-links"), after=True),
}


BTRFS = {
    "before the volume": Trap(btrfs, "_ioctl", on("new-")),
    "after the volume": Trap(btrfs, "_ioctl", on("new-"), after=True),
    **{k: v for k, v in PREPARE.items() if "directory" not in k},
}
STEPS = {
    "overlay": {**PREPARE, **OVERLAY},
    "native": {**PREPARE, **NATIVE},
    "btrfs": BTRFS,
    "erofs": {**PREPARE, **OVERLAY},
}


@pytest.mark.parametrize(("snapshotter", "step"), [(name, step) for name, steps in STEPS.items() for step in steps])
def test_prepare(ground: Ground, snapshotter: str, step: str) -> None:
    tmp_path = ground(snapshotter)
    run(tmp_path, furnished(snapshotter))

    async def prepare(house: House, api: Snapshots) -> Any:
        with context.use(key="once"):
            return await api.prepare(snapshotter, "new", "base")

    die(tmp_path, STEPS[snapshotter][step], prepare)

    async def check(house: House, api: Snapshots) -> None:
        await sound(house, api, snapshotter)
        names = [i.name for i in (await api.walk(snapshotter)).items]
        assert names == ["base", "key", *(["new"] if step == "after the row" else [])]
        mounts = await prepare(house, api)
        assert await api.mounts(snapshotter, "new") == mounts
        await sound(house, api, snapshotter)

    run(tmp_path, check)


SEALED = Trap(btrfs, "_set_read_only", lambda fd, wanted: wanted, after=True)
EROFS_COMMIT = {
    "before the image": Trap(mkfs, "_run", on("/fs")),
    "image unfinished": Trap(os, "rename", on("layer.erofs")),
    "image there": Trap(os, "rename", on("layer.erofs"), after=True),
}
EROFS_SETTLED = {
    "settling": Trap(trees, "remove", lambda fd, name, check: name == "fs"),
    "half settled": Trap(trees, "remove", lambda fd, name, check: name == "fs", after=True),
    "settled": Trap(trees, "remove", lambda fd, name, check: name == "work", after=True),
}
COMMIT = {"before the row": TRANSACTION, "after the row": COMMITTED}
COMMITS = [
    *((name, step) for name in STEPS for step in COMMIT), ("btrfs", "sealed"),
    *(("erofs", step) for step in {**EROFS_COMMIT, **EROFS_SETTLED}),
]  # fmt: skip


@pytest.mark.parametrize(("snapshotter", "step"), COMMITS)
def test_commit(ground: Ground, snapshotter: str, step: str) -> None:
    tmp_path = ground(snapshotter)
    run(tmp_path, furnished(snapshotter))

    async def commit(house: House, api: Snapshots) -> Any:
        with context.use(key="once"):
            return await api.commit(snapshotter, "name", "key")

    die(tmp_path, {**COMMIT, **EROFS_COMMIT, **EROFS_SETTLED, "sealed": SEALED}[step], commit)

    async def check(house: House, api: Snapshots) -> None:
        await sound(house, api, snapshotter)
        committed = step == "after the row" or step in EROFS_SETTLED
        names = [i.name for i in (await api.walk(snapshotter)).items]
        assert names == (["base", "name"] if committed else ["base", "key"])
        if not committed:
            with mounted(await api.mounts(snapshotter, "key"), house.root / "mnt") as at:
                (at / "more").write_text("still active")
        info = await commit(house, api)
        assert info == await api.stat(snapshotter, "name")
        with mounted(await api.view(snapshotter, "view", "name"), house.root / "mnt") as at:
            assert tree(at) == (FILES if committed else {**FILES, "more": "still active"})
        with pytest.raises(NotFound):
            await api.stat(snapshotter, "key")

    run(tmp_path, check)


@pytest.mark.parametrize("trap", [Trap(os, "chown", on("/fs"), after=True), TRANSACTION, COMMITTED])
def test_commit_onto_a_parent(tmp_path: Path, trap: Trap) -> None:
    async def furnish(house: House, api: Snapshots) -> None:
        await furnished("overlay")(house, api)
        await api.prepare("overlay", "layer", labels={REBASE_LABEL: "1"})

    run(tmp_path, furnish)

    async def commit(house: House, api: Snapshots) -> Any:
        with context.use(key="once"):
            return await api.commit("overlay", "name", "layer", "base")

    die(tmp_path, trap, commit)

    async def check(house: House, api: Snapshots) -> None:
        await sound(house, api, "overlay")
        assert (await commit(house, api)).parent == "base"
        with mounted(await api.view("overlay", "view", "name"), house.root / "mnt") as at:
            assert tree(at) == FILES

    run(tmp_path, check)


REMOVE = {
    "before the row": TRANSACTION,
    "after the row": COMMITTED,
    "before the rename": Trap(os, "rename", on("rm-")),
    "after the rename": Trap(os, "rename", on("rm-"), after=True),
    "in the removal": Trap(os, "unlink", on("inner"), after=True),
    "before the last step": Trap(os, "rmdir", on("rm-")),
    "after the last step": Trap(os, "rmdir", on("rm-"), after=True),
}


BTRFS_REMOVE = {
    "before the volume's end": Trap(btrfs, "_destroy", on("rm-")),
    "after the volume's end": Trap(btrfs, "_destroy", on("rm-"), after=True),
    **{k: v for k, v in REMOVE.items() if "removal" not in k and "last" not in k},
}


@pytest.mark.parametrize(
    ("snapshotter", "step"),
    [(name, step) for name in ("overlay", "native") for step in REMOVE]
    + [("erofs", step) for step in REMOVE if "removal" not in step]
    + [("btrfs", step) for step in BTRFS_REMOVE],
)
def test_remove(ground: Ground, snapshotter: str, step: str) -> None:
    tmp_path = ground(snapshotter)

    async def furnish(house: House, api: Snapshots) -> None:
        await furnished(snapshotter)(house, api)
        await api.remove(snapshotter, "key")
        await api.cleanup(snapshotter)

    run(tmp_path, furnish)

    async def remove(house: House, api: Snapshots) -> Any:
        with context.use(key="once"):
            await api.remove(snapshotter, "base")
        await api.cleanup(snapshotter)

    die(tmp_path, {**REMOVE, **BTRFS_REMOVE}[step], remove)

    async def check(house: House, api: Snapshots) -> None:
        await sound(house, api, snapshotter)
        names = [i.name for i in (await api.walk(snapshotter)).items]
        assert names == (["base"] if step == "before the row" else [])
        await remove(house, api)
        assert house.directories(snapshotter) == set()

    run(tmp_path, check)


def test_a_crash_in_the_cleanup_is_cleaned_up(tmp_path: Path) -> None:
    run(tmp_path, furnished("overlay"))
    at = tmp_path / "root/snapshot/overlay/snapshots"
    for name in ("new-10", "rm-11", "12"):
        (at / name / "fs/deep/er").mkdir(parents=True)
        (at / name / "fs/file").write_text("")
    (at / "not ours").mkdir()

    async def nothing(house: House, api: Snapshots) -> None:
        await api.cleanup("overlay")

    for name in ("er", "deep", "new-10"):
        die(tmp_path, Trap(os, "rmdir", on(name), after=True), nothing, at_start=True)
    run(tmp_path, nothing)
    assert (at / "not ours").is_dir()
    (at / "not ours").rmdir()
    run(tmp_path, lambda house, api: sound(house, api, "overlay"))


def test_numbers_never_come_twice(tmp_path: Path) -> None:
    seen: set[str] = set()

    async def prepare(house: House, api: Snapshots) -> Any:
        mounts = await api.prepare("overlay", "key")
        assert mounts[0].source not in seen
        seen.add(mounts[0].source)
        await api.remove("overlay", "key")
        return mounts

    for _ in range(3):
        run(tmp_path, prepare)
        die(tmp_path, Trap(os, "rename", on("new-"), after=True), prepare)
    assert len(seen) == 3


def test_a_lost_database_does_not_take_the_snapshots_along(tmp_path: Path) -> None:
    run(tmp_path, furnished("overlay"))
    at = tmp_path / "root/snapshot"
    before = tree(at / "overlay")
    kept = {path: path.read_bytes() for path in at.glob("metadata.db*")}
    for path in kept:
        path.unlink()
    with pytest.raises(FailedPrecondition, match="lost or out of date"):
        run(tmp_path, lambda house, api: sound(house, api, "overlay"))
    for path, data in kept.items():
        path.write_bytes(data)
    run(tmp_path, lambda house, api: sound(house, api, "overlay"))
    assert tree(at / "overlay").keys() >= before.keys()

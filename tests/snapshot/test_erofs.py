"""The erofs backend: what an image holds, how mounts are named, and what happens when no image can be made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from node import small_disk
from snapshot_rig import House, mounted, needs_root, tree
from wherry_shared.api.snapshot import REBASE_LABEL, Kind, Snapshots
from wherry_shared.bus import Bus
from wherry_shared.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted
from wherry_shared.memory import MemoryTransport
from wherry_shared.values import Mount
from wherry_snapshot.backends import Snapshot, mkfs
from wherry_snapshot.backends.erofs import ErofsBackend

pytestmark = needs_root


@pytest.fixture
def backend(tmp_path: Path) -> ErofsBackend:
    try:
        return ErofsBackend(tmp_path / "erofs", {"mount_options": "volatile"})
    except FailedPrecondition as e:
        pytest.skip(e.message)


def snapshot(number: int, kind: Kind = "active", *parents: int, **labels: str) -> Snapshot:
    return Snapshot(number, kind, parents, labels)


def never() -> None:
    return None


def test_the_mounts_are_images_and_an_overlay_on_them(backend: ErofsBackend) -> None:
    at = f"{backend.root}/snapshots"
    images = [Mount(type="erofs", source=f"{at}/{n}/layer.erofs", options=["ro"]) for n in (2, 1)]
    (plain,) = backend.mounts(snapshot(3))
    assert (plain.type, plain.source, plain.options) == ("bind", f"{at}/3/fs", ["rw", "rbind"])
    *first, last = backend.mounts(snapshot(3, "active", 2, 1))
    assert first == images and (last.type, last.source) == ("format/overlay", "overlay")
    own = [f"workdir={at}/3/work", f"upperdir={at}/3/fs"]
    assert last.options[:4] == [*own, "lowerdir={{ overlay 0 1 }}", "volatile"]
    assert backend.mounts(snapshot(3, "view", 2)) == images[:1]
    assert backend.mounts(snapshot(3, "view", 2, 1))[2].options[:2] == ["lowerdir={{ overlay 0 1 }}", "volatile"]
    (apart,) = backend.mounts(Snapshot(3, "active", (), {REBASE_LABEL: "1"}))
    assert apart.type == "overlay" and apart.options[:3] == [*own, f"lowerdir={backend.root}/empty"]


def test_an_image_holds_what_the_directory_held(backend: ErofsBackend, tmp_path: Path) -> None:
    backend.create(snapshot(1), never)
    fs = Path(backend.tree(1))
    (fs / "dir").mkdir(mode=0o1777)
    os.setxattr(fs / "dir", "trusted.overlay.opaque", b"y")
    (fs / "file").write_text("text")
    (fs / "file").chmod(0o6755)
    os.setxattr(fs / "file", "user.note", b"n" * 300)
    os.link(fs / "file", fs / "dir/hard")
    (fs / "link").symlink_to("/etc/passwd")
    os.mknod(fs / "gone", 0o020000, os.makedev(0, 0))
    os.mknod(fs / "null", 0o020666, os.makedev(1, 3))
    os.mkfifo(fs / "fifo")
    os.lchown(fs / "link", 70000, 80000)
    os.utime(fs / "file", ns=(1, 1_234_567_890_123_456_789))
    os.chown(fs, 5, 6)
    wanted = described(fs)
    backend.seal(snapshot(1), False, never)
    backend.settle(1)
    backend.settle(1)
    assert os.listdir(backend.path(1)) == ["layer.erofs"]
    with mounted(backend.mounts(snapshot(2, "view", 1)), tmp_path / "mnt") as at:
        assert described(at) == wanted
        assert os.stat(at / "file").st_ino == os.stat(at / "dir/hard").st_ino
    backend.create(snapshot(3, "active", 1), never)
    st = os.stat(backend.tree(3))
    assert (st.st_uid, st.st_gid) == (5, 6)


def described(root: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for path in [root, *root.rglob("*")]:
        st = path.lstat()
        attributes = {a: os.getxattr(path, a, follow_symlinks=False) for a in os.listxattr(path, follow_symlinks=False)}
        size = 0 if path.is_dir() else st.st_size
        text = path.read_text() if path.is_file() and not path.is_symlink() else ""
        found[str(path.relative_to(root))] = (
            st.st_mode, st.st_uid, st.st_gid, st.st_rdev, size, st.st_mtime_ns, attributes, text,
            os.readlink(path) if path.is_symlink() else "",
        )  # fmt: skip
    return found


def test_a_commit_that_failed_leaves_it_active(backend: ErofsBackend) -> None:
    backend.create(snapshot(1), never)
    backend.seal(snapshot(1), False, never)
    backend.seal(snapshot(1), False, never)
    backend.unseal(1)
    backend.unseal(1)
    assert sorted(os.listdir(backend.path(1))) == ["fs", "work"]
    backend.settle(1)  # without an image there is nothing to settle
    assert sorted(os.listdir(backend.path(1))) == ["fs", "work"]
    backend.unseal(77)


def test_a_directory_that_becomes_a_link_leads_nowhere(
    backend: ErofsBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that still runs swaps a directory after mkfs.erofs has looked at it and before it goes into it."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("of the host")
    backend.create(snapshot(1), never)
    (Path(backend.tree(1)) / "dir").symlink_to(secret)
    seen = tmp_path / "seen"
    program = tmp_path / "bin/mkfs.erofs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nfor tree; do :; done\ncat "$tree/dir/key" > {seen}; touch "$tree/new"; exit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    with pytest.raises(Internal, match="symbolic links"):
        mkfs.make_image(backend.tree(1), str(tmp_path / "image"), never)
    assert seen.read_text() == "" and not (Path(backend.tree(1)) / "new").exists()
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(tmp_path) in line]


def test_what_takes_too_long_is_stopped(backend: ErofsBackend) -> None:
    backend.create(snapshot(1), never)
    with (Path(backend.tree(1)) / "sparse").open("wb") as file:
        file.truncate(1 << 40)

    calls = []

    def late() -> None:
        calls.append(1)
        if len(calls) > 6:
            raise DeadlineExceeded("late")

    with pytest.raises(DeadlineExceeded):
        backend.seal(snapshot(1), False, late)
    assert sorted(os.listdir(backend.path(1))) == ["fs", "work"]
    assert subprocess.run(["pgrep", "-f", backend.tree(1)], capture_output=True, check=False).stdout == b""


async def test_without_room_for_the_image_it_stays_active(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "24M") as disk:
        house = House(Bus(MemoryTransport(), node="n1"), disk)
        await house.start()
        api = house.bus.proxy(Snapshots, namespace="default")
        with mounted(await api.prepare("erofs", "key"), tmp_path / "mnt") as at:
            for i in range(12):
                (at / f"f{i}").write_bytes(os.urandom(1 << 20))
            with pytest.raises(ResourceExhausted):
                await api.commit("erofs", "name", "key")
            assert (await api.stat("erofs", "key")).kind == "active"
            for i in range(11):
                (at / f"f{i}").unlink()
            await api.commit("erofs", "name", "key")
        await api.cleanup("erofs")
        with mounted(await api.view("erofs", "look", "name"), tmp_path / "mnt") as at:
            assert [p.name for p in at.iterdir()] == ["f11"]
        await house.stop()


def test_a_host_without_it_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(FailedPrecondition, match="erofs-utils"):
            ErofsBackend(tmp_path / "a", {})
    monkeypatch.setattr(mkfs, "_create", lambda image: (_ for _ in ()).throw(OSError(15, "Block device required")))
    with pytest.raises(FailedPrecondition, match="from a file"):
        ErofsBackend(tmp_path / "b", {})
    assert sorted(os.listdir(tmp_path / "b")) == ["empty", "snapshots"]


def test_trees_are_as_they_were(backend: ErofsBackend, tmp_path: Path) -> None:
    """A chain with a whiteout, through images."""
    backend.create(snapshot(1), never)
    (Path(backend.tree(1)) / "a").write_text("1")
    backend.seal(snapshot(1), False, never)
    backend.settle(1)
    backend.create(snapshot(2, "active", 1), never)
    with mounted(backend.mounts(snapshot(2, "active", 1)), tmp_path / "mnt") as at:
        (at / "a").unlink()
        (at / "b").write_text("2")
    backend.seal(snapshot(2, "active", 1), False, never)
    backend.settle(2)
    with mounted(backend.mounts(snapshot(3, "view", 2, 1)), tmp_path / "mnt") as at:
        assert tree(at) == {"b": "2"}

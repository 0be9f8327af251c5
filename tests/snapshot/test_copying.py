"""A native snapshot is its parent in everything that a container can see."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from snapshot_rig import needs_root
from wherry_shared.errors import DeadlineExceeded
from wherry_snapshot.backends import Snapshot, copying
from wherry_snapshot.backends.native import NativeBackend

pytestmark = needs_root

# A capability set of version 2 (linux/capability.h): cap_net_bind_service, effective and permitted.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
# A POSIX ACL (linux/posix_acl_xattr.h): user::rw, user:1000:rwx, group::r, mask::rwx, other::-.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, bits, who)
    for tag, bits, who in ((1, 6, 2**32 - 1), (2, 7, 1000), (4, 4, 2**32 - 1), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1))
)


def never() -> None:
    return None


@pytest.fixture
def backend(tmp_path: Path) -> NativeBackend:
    return NativeBackend(tmp_path / "native", {})


def child(backend: NativeBackend) -> Path:
    backend.create(Snapshot(2, "active", (1,), {}), never)
    return Path(backend.tree(2))


def base(backend: NativeBackend) -> Path:
    backend.create(Snapshot(1, "active", (), {}), never)
    return Path(backend.tree(1))


def look(root: Path) -> dict[str, Any]:
    """All that stat, xattrs and contents tell of a tree; hard links as the first name of each file."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        st = path.lstat()
        name = str(path.relative_to(root))
        attributes = {x: os.getxattr(path, x, follow_symlinks=False) for x in os.listxattr(path, follow_symlinks=False)}
        content: Any = None
        if stat.S_ISREG(st.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(st.st_mode):
            content = os.readlink(path)
        same = name if path.is_dir() and not path.is_symlink() else first.setdefault(st.st_ino, name)
        found[name] = (st.st_mode, st.st_uid, st.st_gid, st.st_rdev, st.st_mtime_ns, attributes, content, same)
    return found


def furnish(root: Path) -> None:
    """One of everything."""
    (root / "dir/sub").mkdir(parents=True)
    (root / "plain").write_bytes(os.urandom(300_000))
    (root / "empty").write_bytes(b"")
    (root / "setuid").write_bytes(b"#!/bin/sh\n")
    os.chown(root / "setuid", 1234, 5678)
    os.setxattr(root / "setuid", "user.note", b"n\0te")
    os.setxattr(root / "setuid", "security.capability", CAPABILITY)
    os.chmod(root / "setuid", 0o6755)
    (root / "acl").write_bytes(b"")
    os.setxattr(root / "acl", "system.posix_acl_access", ACL)
    os.link(root / "plain", root / "dir/sub/plain too")
    os.link(root / "plain", root / "zz")
    (root / "link").symlink_to("/etc/passwd")
    (root / "broken").symlink_to("nowhere/at all")
    os.chown(root / "link", 7, 8, follow_symlinks=False)
    os.setxattr(root / "link", "trusted.mark", b"on the link", follow_symlinks=False)
    os.link(root / "link", root / "link too", follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o620)
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(root / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(root / "disk", 0o660 | stat.S_IFBLK, os.makedev(8, 17))
    os.mknod(root / "socket", 0o700 | stat.S_IFSOCK)
    os.chmod(root / "null", 0o666)
    os.setxattr(root / "dir", "trusted.overlay.opaque", b"y")
    os.chown(root / "dir/sub", 3, 4)
    os.chmod(root / "dir/sub", 0o3711)
    os.chmod(root / "dir", 0o1777)
    os.mkdir(os.fsencode(root) + b"/\xff\xfe")
    os.chown(root, 11, 12)
    os.chmod(root, 0o750)
    for when, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(10**18 + when, 10**18 + 7 * when + 1), follow_symlinks=False)
    os.utime(root, ns=(5, 999_999_999))


def test_everything_is_kept(backend: NativeBackend) -> None:
    furnish(base(backend))
    before = look(Path(backend.tree(1)))
    assert look(child(backend)) == before
    assert look(Path(backend.tree(1))) == before
    assert sorted(os.listdir(backend.snapshots)) == ["1", "2"]


def test_copies_share_no_file_with_their_source(backend: NativeBackend) -> None:
    root = base(backend)
    (root / "a").write_text("old")
    os.link(root / "a", root / "b")
    copy = child(backend)
    (copy / "a").write_text("new")
    assert ((copy / "b").read_text(), (root / "a").read_text()) == ("new", "old")
    assert (copy / "a").stat().st_nlink == 2


def test_holes_stay_holes(backend: NativeBackend) -> None:
    root = base(backend)
    with (root / "holes").open("wb") as f:
        for at in (0, 40 << 20, 300 << 20):
            f.seek(at)
            f.write(b"data" * 5000)
        f.truncate(1 << 30)
    with (root / "only").open("wb") as f:
        f.truncate(1 << 33)
    copy = child(backend)
    for name in ("holes", "only"):
        assert (copy / name).stat().st_size == (root / name).stat().st_size
        assert (copy / name).stat().st_blocks <= (root / name).stat().st_blocks
    with (root / "holes").open("rb") as a, (copy / "holes").open("rb") as b:
        for at in (0, 20_000 - 8, 40 << 20, 300 << 20):
            assert a.seek(at) == b.seek(at)
            assert a.read(20_008) == b.read(20_008)


def test_without_copy_file_range_it_is_read_and_written(
    backend: NativeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(base(backend))
    before = look(Path(backend.tree(1)))

    def refuse(*args: Any) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert look(child(backend)) == before


def test_links_lead_nowhere(backend: NativeBackend, tmp_path: Path) -> None:
    root = base(backend)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    (root / "dir").symlink_to(tmp_path / "outside")
    (root / "bound").mkdir()
    subprocess.run(["mount", "--bind", str(tmp_path / "outside"), str(root / "bound")], check=True)
    try:
        copy = child(backend)
    finally:
        subprocess.run(["umount", str(root / "bound")], check=True)
    assert os.readlink(copy / "dir") == str(tmp_path / "outside")
    assert not list(copy.rglob("secret"))


def test_a_copy_that_is_stopped_leaves_nothing(backend: NativeBackend) -> None:
    furnish(base(backend))
    calls = iter(range(100))

    def check() -> None:
        if next(calls) == 15:
            raise DeadlineExceeded("late")

    with pytest.raises(DeadlineExceeded):
        backend.create(Snapshot(2, "active", (1,), {}), check)
    assert os.listdir(backend.snapshots) == ["1"]


@pytest.fixture
def reflinking(tmp_path: Path) -> Iterator[Path]:
    """A filesystem whose files can share blocks."""
    mkfs = shutil.which("mkfs.xfs")
    if mkfs is None:
        pytest.skip("mkfs.xfs (xfsprogs) is not installed: no filesystem that can reflink")
    image, at = tmp_path / "xfs.img", tmp_path / "xfs"
    with image.open("wb") as f:
        f.truncate(400 << 20)
    subprocess.run([mkfs, "-q", "-m", "reflink=1", str(image)], check=True)
    at.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(at)], check=True)
    yield at
    subprocess.run(["umount", str(at)], check=True)


def test_blocks_are_shared_where_they_can_be(reflinking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = NativeBackend(reflinking / "native", {})
    root = base(backend)
    (root / "big").write_bytes(os.urandom(20 << 20))
    furnish(root)
    os.sync()
    before = os.statvfs(reflinking).f_bfree
    monkeypatch.setattr(copying._Files, "_extent", None)  # not one byte is copied
    assert look(child(backend)) == look(root)
    os.sync()
    assert (before - os.statvfs(reflinking).f_bfree) * 4096 < 5 << 20

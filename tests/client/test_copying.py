"""Trees to tar streams and back: nothing lands outside, whatever the names and links are."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
import threading
import time
from pathlib import Path

import pytest
from wherry.copying.packing import pack
from wherry.copying.roots import Tree
from wherry.copying.unpacking import Rules, unpack
from wherry_shared.errors import DataLoss, FailedPrecondition, InvalidArgument

MINE = Rules(owner=(os.geteuid(), os.getegid()), set_id=False)


def tree(path: Path) -> Tree:
    return Tree(os.open(path, os.O_PATH | os.O_DIRECTORY))


def packed(root: Path, path: str, name: str) -> bytes:
    out = io.BytesIO()
    with tree(root) as inside, inside.open(path, follow=False) as start:
        pack(start, name, out)
    return out.getvalue()


def into(directory: Path, data: bytes, rules: Rules = MINE) -> list[str]:
    with tree(directory) as target:
        return unpack(target.fd, io.BytesIO(data), rules)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        for member, content in members:
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.mode = kind, link, mode
    return made


def test_whoever_writes_the_tar_gets_to_its_end(tmp_path: Path) -> None:
    """What fills an archive up comes late, and finds the pipe open."""
    data = tar((member("f"), b"content"))
    assert data.endswith(bytes(tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE))
    reader, writer = os.pipe()
    failed: list[OSError] = []

    def write() -> None:
        with open(writer, "wb", buffering=0) as pipe:
            try:
                pipe.write(data + bytes(tarfile.RECORDSIZE))
                time.sleep(0.3)
                pipe.write(bytes(tarfile.RECORDSIZE))
            except OSError as e:
                failed.append(e)

    writing = threading.Thread(target=write)
    writing.start()
    with open(reader, "rb") as stream, tree(tmp_path) as target:
        assert unpack(target.fd, stream, MINE) == []
    writing.join()
    assert (tmp_path / "f").read_bytes() == b"content" and failed == []


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "a/deep/dir").mkdir(parents=True)
    target.mkdir()
    (source / "a/file").write_bytes(b"x" * 100_000)
    (source / "a/file").chmod(0o4750)
    (source / "a/deep/link").symlink_to("/etc/passwd")
    os.mkfifo(source / "a/pipe")
    (source / "a/deep/dir").chmod(0o500)
    os.utime(source / "a/deep", (1, 1))
    assert into(target, packed(source, "/a", "b")) == []
    assert (target / "b/file").read_bytes() == b"x" * 100_000
    assert (target / "b/file").stat().st_mode & 0o7777 == 0o750, "a set-id bit does not leave a container"
    assert os.readlink(target / "b/deep/link") == "/etc/passwd"
    assert (target / "b/pipe").is_fifo()
    assert (target / "b/deep/dir").stat().st_mode & 0o777 == 0o500
    assert (target / "b/deep").stat().st_mtime == 1


def test_links_are_resolved_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("the container's\n")
    (root / "way").symlink_to("/etc")
    (root / "out").symlink_to("../../../../../../etc/passwd")
    with tree(root) as inside:
        for path in ("/way/passwd", "/out", "/../../etc/passwd"):
            with inside.open(path, follow=True) as found:
                assert os.readlink(f"/proc/self/fd/{found.fd}") == str(root / "etc/passwd")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/../evil"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    with pytest.raises(InvalidArgument, match="leads out"):
        into(inside, tar((member(name), b"x")))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_link_of_the_tar_is_not_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "out", tmp_path / "in"
    outside.mkdir(mode=0o755)
    inside.mkdir()
    with pytest.raises(FailedPrecondition):
        into(inside, tar((member("a", tarfile.SYMTYPE, str(outside)), b""), (member("a/x"), b"evil")))
    with pytest.raises(FailedPrecondition):
        into(
            inside,
            tar((member("b", tarfile.SYMTYPE, str(outside)), b""), (member("b", tarfile.DIRTYPE, mode=0o777), b"")),
        )
    assert list(outside.iterdir()) == [] and outside.stat().st_mode & 0o777 == 0o755
    (tmp_path / "secret").write_text("secret")
    data = tar((member("c", tarfile.SYMTYPE, "../secret"), b""), (member("c"), b"mine"))
    into(inside, data)
    assert (inside / "c").read_text() == "mine" and (tmp_path / "secret").read_text() == "secret"


def test_a_hard_link_stays_inside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    inside = tmp_path / "in"
    inside.mkdir()
    with pytest.raises(InvalidArgument):
        into(inside, tar((member("a", tarfile.LNKTYPE, "../secret"), b"")))
    into(inside, tar((member("x"), b"1"), (member("sub/y", tarfile.LNKTYPE, "x"), b"")))
    assert (inside / "x").samefile(inside / "sub/y")


def test_devices_are_left_out(tmp_path: Path) -> None:
    device = member("dev/sda", tarfile.BLKTYPE)
    device.devmajor, device.devminor = 8, 0
    assert into(tmp_path, tar((device, b""), (member("ok"), b"1"))) == ["dev/sda"]
    assert [p.name for p in tmp_path.iterdir()] == ["ok"]


def test_a_file_takes_no_directorys_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("1")
    with pytest.raises(FailedPrecondition):
        into(tmp_path, tar((member("a"), b"x")))
    with pytest.raises(FailedPrecondition):
        into(tmp_path, tar((member("b", tarfile.DIRTYPE), b"")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_a_file_takes_no_devices_place(tmp_path: Path, kind: bytes) -> None:
    """`wherry cp web:/log /dev/null` made that a file, for everybody on the host."""
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with pytest.raises(FailedPrecondition, match="not replaced"):
        into(tmp_path, tar((member("null", kind), b"")))
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_what_is_mounted_is_written_only_if_it_is_a_file(tmp_path: Path) -> None:
    """A container with a user namespace of its own may mount a device over a file: that one is not forbidden to us."""
    (tmp_path / "f").write_text("old")
    (tmp_path / "mounted").write_text("its own")
    (tmp_path / "device").touch()
    os.mknod(tmp_path / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    done = []
    try:
        for source, target in (("f", "mounted"), ("null", "device")):
            subprocess.run(["mount", "--bind", tmp_path / source, tmp_path / target], check=True)
            done.append(tmp_path / target)
        into(tmp_path, tar((member("mounted"), b"new")))
        assert (tmp_path / "f").read_text() == "new"
        with pytest.raises(FailedPrecondition, match="device is no regular file"):
            into(tmp_path, tar((member("device"), b"new")))
    finally:
        for target in done:
            subprocess.run(["umount", target], check=True)


def test_a_tar_that_is_cut_off_is_said(tmp_path: Path) -> None:
    data = tar((member("a"), b"x" * 5000))
    with pytest.raises(DataLoss):
        into(tmp_path, data[:3000])


def test_proc_is_no_storage(tmp_path: Path) -> None:
    out = io.BytesIO()
    with Tree.of_host() as host, host.open("/proc", follow=True) as start:
        assert pack(start, "proc", out) == ["proc"]

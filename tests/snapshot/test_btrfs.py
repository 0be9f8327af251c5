"""The btrfs backend: subvolumes made, sealed and destroyed, also when what is in them does not want that."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from snapshot_rig import mounted, needs_root, tree
from wherry_shared.api.snapshot import Kind
from wherry_shared.errors import FailedPrecondition
from wherry_snapshot.backends import Snapshot, btrfs
from wherry_snapshot.backends.btrfs import BtrfsBackend

pytestmark = needs_root


@pytest.fixture
def backend(ground: Callable[[str], Path]) -> BtrfsBackend:
    return BtrfsBackend(ground("btrfs") / "btrfs", {})


def snapshot(number: int, kind: Kind = "active", *parents: int) -> Snapshot:
    return Snapshot(number, kind, parents, {})


def never() -> None:
    return None


def test_elsewhere_it_cannot_be_had_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="not on a btrfs"):
        BtrfsBackend(tmp_path / "a/b", {})
    assert list(tmp_path.iterdir()) == []


def test_a_child_shares_what_it_does_not_change(backend: BtrfsBackend) -> None:
    backend.create(snapshot(1), never)
    one = Path(backend.tree(1))
    for i in range(20):
        (one / f"f{i}").write_text("x" * (1 << 16))
    (one / "dir").mkdir()
    os.link(one / "f0", one / "dir/link")
    base = backend.seal(snapshot(1), False, never)
    assert (base.inodes, base.size >= 20 << 16) == (22, True)
    backend.create(snapshot(2, "active", 1), never)
    assert tree(Path(backend.tree(2))).keys() == tree(one).keys()
    unchanged = backend.usage(snapshot(2, "active", 1), never)
    assert unchanged.inodes == 1
    (Path(backend.tree(2)) / "f3").write_bytes(b"x" * (1 << 16))
    (Path(backend.tree(2)) / "new").write_bytes(b"x" * (1 << 16))
    (Path(backend.tree(2)) / "f4").unlink()
    changed = backend.usage(snapshot(2, "active", 1), never)
    assert changed.inodes == 3 and changed.size - unchanged.size == 2 << 16


def test_what_is_sealed_is_read_only_also_where_it_is_mounted(backend: BtrfsBackend, tmp_path: Path) -> None:
    backend.create(snapshot(1), never)
    with mounted(backend.mounts(snapshot(1)), tmp_path / "mnt") as at:
        (at / "old").touch()
        backend.seal(snapshot(1), False, never)
        for write in ((at / "old").open, (at / "new").open):
            with pytest.raises(OSError) as caught:
                write("w")
            assert caught.value.errno == errno.EROFS
        backend.unseal(1)
        backend.unseal(1)
        (at / "new").touch()
    backend.unseal(77)


def test_a_view_shows_its_parent_or_nothing(backend: BtrfsBackend, tmp_path: Path) -> None:
    backend.create(snapshot(1), never)
    Path(backend.tree(1), "file").write_text("1")
    backend.create(snapshot(2, "view", 1), never)
    backend.create(snapshot(3, "view"), never)
    with mounted(backend.mounts(snapshot(2, "view", 1)), tmp_path / "mnt") as at:
        assert tree(at) == {"file": "1"}
    with mounted(backend.mounts(snapshot(3, "view")), tmp_path / "mnt") as at:
        assert tree(at) == {}
    for number in (2, 3, 1):
        backend.detach(number)
        backend.delete(f"rm-{number}", never)
    assert backend.entries() == []


def nested(at: Path) -> None:
    """Subvolumes in subvolumes, one of them read-only, and a file that is immutable."""
    for path in (at / "sub", at / "dir/sub", at / "sub/inner"):
        path.parent.mkdir(exist_ok=True)
        subprocess.run(["btrfs", "-q", "subvolume", "create", str(path)], check=True)
        (path / "file").write_text("1")
    subprocess.run(["btrfs", "property", "set", str(at / "sub/inner"), "ro", "true"], check=True)
    subprocess.run(["btrfs", "property", "set", str(at / "sub"), "ro", "true"], check=True)
    subprocess.run(["chattr", "+i", str(at / "dir/sub/file")], check=True)


def test_subvolumes_in_a_snapshot_go_with_it(backend: BtrfsBackend) -> None:
    backend.create(snapshot(1), never)
    nested(Path(backend.tree(1)))
    backend.seal(snapshot(1), False, never)
    backend.detach(1)
    backend.delete("rm-1", never)
    backend.delete("rm-1", never)
    assert backend.entries() == []


def test_a_link_out_of_a_snapshot_is_not_followed(backend: BtrfsBackend, tmp_path: Path) -> None:
    outside = backend.root / "outside"
    subprocess.run(["btrfs", "-q", "subvolume", "create", str(outside)], check=True)
    (outside / "file").write_text("mine")
    backend.create(snapshot(1), never)
    at = Path(backend.tree(1))
    nested(at)
    (at / "out").symlink_to(outside)
    (at / "dir/out").symlink_to("../../../outside")
    backend.detach(1)
    backend.delete("rm-1", never)
    assert backend.entries() == [] and (outside / "file").read_text() == "mine"


def test_what_fails_in_the_making_leaves_nothing(backend: BtrfsBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.create(snapshot(1), never)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(btrfs.os, "rename", full)
    for parents in ((), (1,)):
        with pytest.raises(OSError, match="No space"):
            backend.create(snapshot(2, "active", *parents), never)
    assert [e.name for e in backend.entries()] == ["1"]

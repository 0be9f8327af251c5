"""The overlay backend names mounts exactly as containerd does, and makes what they need."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from snapshot_rig import needs_root
from wherry_shared.api.snapshot import REBASE_LABEL, Kind
from wherry_shared.errors import FailedPrecondition
from wherry_shared.values import Mount
from wherry_snapshot.backends import Snapshot, overlay
from wherry_snapshot.backends.overlay import OverlayBackend

pytestmark = needs_root


@pytest.fixture
def backend(tmp_path: Path) -> OverlayBackend:
    return OverlayBackend(tmp_path / "overlay", {"mount_options": "volatile,xino=off"})


def snapshot(number: int, kind: Kind = "active", *parents: int, **labels: str) -> Snapshot:
    return Snapshot(number, kind, parents, labels)


def never() -> None:
    return None


def options_at_the_end() -> list[str]:
    index = ["index=off"] if Path("/sys/module/overlay/parameters/index").exists() else []
    return ["volatile", "xino=off", *index]


def test_without_parents_it_is_a_bind(backend: OverlayBackend) -> None:
    fs = f"{backend.root}/snapshots/1/fs"
    assert backend.mounts(snapshot(1)) == [Mount(type="bind", source=fs, options=["rw", "rbind"])]
    assert backend.mounts(snapshot(1, "view")) == [Mount(type="bind", source=fs, options=["ro", "rbind"])]


def test_a_view_of_one_parent_is_a_bind_of_it(backend: OverlayBackend) -> None:
    fs = f"{backend.root}/snapshots/1/fs"
    assert backend.mounts(snapshot(2, "view", 1)) == [Mount(type="bind", source=fs, options=["ro", "rbind"])]


def test_the_options_stand_in_containerds_order(backend: OverlayBackend) -> None:
    at = f"{backend.root}/snapshots"
    lower = f"lowerdir={at}/2/fs:{at}/1/fs"
    assert backend.mounts(snapshot(3, "active", 2, 1)) == [
        Mount(
            type="overlay", source="overlay",
            options=[f"workdir={at}/3/work", f"upperdir={at}/3/fs", lower, *options_at_the_end()],
        )
    ]  # fmt: skip
    assert backend.mounts(snapshot(3, "view", 2, 1)) == [
        Mount(type="overlay", source="overlay", options=[lower, *options_at_the_end()])
    ]


def test_what_is_to_be_rebased_stands_on_an_empty_directory(backend: OverlayBackend) -> None:
    (mount,) = backend.mounts(Snapshot(3, "active", (), {REBASE_LABEL: "1"}))
    at = f"{backend.root}/snapshots/3"
    assert mount.type == "overlay"
    assert mount.options[:2] == [f"workdir={at}/work", f"upperdir={at}/fs"]
    lower = mount.options[2].removeprefix("lowerdir=")
    assert os.listdir(lower) == [] and Path(lower).parent == backend.root


@pytest.mark.parametrize("umask", [0, 0o077])
def test_directories_have_their_modes_and_owners(backend: OverlayBackend, umask: int) -> None:
    old = os.umask(umask)
    try:
        backend.create(snapshot(1), never)
        os.chown(f"{backend.root}/snapshots/1/fs", 1000, 2000)
        backend.create(snapshot(2, "active", 1), never)
        backend.create(snapshot(3, "view", 1), never)
    finally:
        os.umask(old)
    found = {}
    for path in sorted(Path(backend.root / "snapshots").rglob("*")):
        st = path.stat()
        found[str(path.relative_to(backend.root / "snapshots"))] = (st.st_mode & 0o7777, st.st_uid, st.st_gid)
    assert found == {
        "1": (0o700, 0, 0), "1/fs": (0o755, 1000, 2000), "1/work": (0o711, 0, 0),
        "2": (0o700, 0, 0), "2/fs": (0o755, 1000, 2000), "2/work": (0o711, 0, 0),
        "3": (0o700, 0, 0), "3/fs": (0o755, 1000, 2000),
    }  # fmt: skip


def test_a_rebased_root_takes_its_parents_owner_unless_its_layer_said_one(backend: OverlayBackend) -> None:
    for number in (1, 2, 3):
        backend.create(snapshot(number), never)
    os.chown(backend.tree(1), 1000, 1000)
    os.chown(backend.tree(3), 5, 6)
    backend.rebase(2, 1, never)
    backend.rebase(3, 1, never)
    owners = [(os.stat(backend.tree(n)).st_uid, os.stat(backend.tree(n)).st_gid) for n in (2, 3)]
    assert owners == [(1000, 1000), (5, 6)]


def test_a_host_without_overlay_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match="mount options"):
        OverlayBackend(tmp_path / "a:b", {})
    with monkeypatch.context() as patch:
        patch.setattr(overlay, "_OVERLAY_MAGIC", overlay._magic(tmp_path))
        with pytest.raises(FailedPrecondition, match="overlay itself"):
            OverlayBackend(tmp_path / "o", {})
    real = Path.read_text
    without = "nodev\tproc\n\text4\n"
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a: without if str(self) == "/proc/filesystems" else real(self, *a)
    )
    with pytest.raises(FailedPrecondition, match="/proc/filesystems"):
        OverlayBackend(tmp_path / "o", {})

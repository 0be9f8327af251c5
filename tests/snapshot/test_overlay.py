"""The overlay backend names mounts exactly as containerd does, and makes what they need."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from snapshot_rig import needs_root
from wherry_shared.api.snapshot import GID_LABEL, REBASE_LABEL, UID_LABEL, UPPERDIR_LABEL, Kind
from wherry_shared.errors import FailedPrecondition, InvalidArgument
from wherry_shared.values import Mount
from wherry_snapshot.backends import Snapshot, layered, overlay
from wherry_snapshot.backends.directories import has_filesystem, magic
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
    for number in (2, 3):
        backend.seal(snapshot(number, "active", 1), True, never)
    owners = [(os.stat(backend.tree(n)).st_uid, os.stat(backend.tree(n)).st_gid) for n in (2, 3)]
    assert owners == [(1000, 1000), (5, 6)]


def test_whiteouts_of_a_rebased_layer_that_hide_nothing_are_gone(backend: OverlayBackend, tmp_path: Path) -> None:
    def whiteout(path: Path) -> None:
        os.mknod(path, 0o600 | 0o020000, os.makedev(0, 0))

    trees = {}
    for number in (1, 2, 3):
        backend.create(snapshot(number), never)
        trees[number] = Path(backend.tree(number))
    (trees[1] / "both").mkdir()
    (trees[1] / "both/old").touch()
    (trees[1] / "file").touch()
    (trees[1] / "gone").mkdir()
    (trees[1] / "link").symlink_to("both")
    whiteout(trees[2] / "gone")
    for name in ("both", "file", "gone", "link", "own", "own/deep"):
        (trees[3] / name).mkdir()
        whiteout(trees[3] / name / "old")
    whiteout(trees[3] / "top")
    usage = backend.seal(snapshot(3, "active", 2, 1), True, never)
    assert usage == backend.usage(snapshot(3), never)
    left = sorted(str(path.relative_to(trees[3])) for path in trees[3].rglob("*") if path.is_char_device())
    assert left == ["both/old", "top"]
    shown = [f"lowerdir={trees[3]}:{trees[2]}:{trees[1]}", tmp_path / "merged"]
    (tmp_path / "merged").mkdir()
    subprocess.run(["mount", "-t", "overlay", "-o", shown[0], "none", shown[1]], check=True)
    try:
        assert all(path.lstat() for path in (tmp_path / "merged").rglob("*"))
    finally:
        subprocess.run(["umount", shown[1]], check=True)


def test_a_kernel_loads_overlay_when_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a boot nobody has mounted one yet, and Debian's kernel has it as a module."""
    real, asked = Path.read_text, []

    def read_text(self: Path, *a: str) -> str:
        if str(self) != "/proc/filesystems" or asked:
            return real(self, *a)
        asked.append(self)
        return "nodev\tproc\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    OverlayBackend(tmp_path / "o", {})
    assert asked
    assert not has_filesystem("none-such")


def test_a_host_without_overlay_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedPrecondition, match="mount options"):
        OverlayBackend(tmp_path / "a:b", {})
    with monkeypatch.context() as patch:
        patch.setattr(layered, "_OVERLAY_MAGIC", magic(tmp_path))
        with pytest.raises(FailedPrecondition, match="overlay itself"):
            OverlayBackend(tmp_path / "o", {})
    real = Path.read_text
    without = "nodev\tproc\n\text4\n"
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a: without if str(self) == "/proc/filesystems" else real(self, *a)
    )
    with pytest.raises(FailedPrecondition, match="/proc/filesystems"):
        OverlayBackend(tmp_path / "o", {})


def test_what_the_user_says_of_an_option_holds(tmp_path: Path) -> None:
    assert layered.mount_options("index=on,volatile") == ["index=on", "volatile"]
    assert layered.mount_options("") == options_at_the_end()[2:]


def test_in_a_user_namespace_attributes_are_users(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text
    maps = "0 100000 65536"
    monkeypatch.setattr(Path, "read_text", lambda self, *a: maps if str(self).endswith("uid_map") else real(self, *a))
    assert layered.mount_options("volatile")[:2] == ["volatile", "userxattr"]
    assert layered.mount_options("userxattr").count("userxattr") == 1


def test_the_upper_directory_is_told_of_where_that_is_wanted(tmp_path: Path, backend: OverlayBackend) -> None:
    assert backend.shown_labels(3) == {}
    telling = OverlayBackend(tmp_path / "telling", {"upperdir_label": "true"})
    assert telling.shown_labels(3) == {UPPERDIR_LABEL: f"{telling.root}/snapshots/3/fs"}


# ---- id mappings


MAPPED = {UID_LABEL: "0:100000:65536", GID_LABEL: "0:200000:65536"}


def test_mappings_stand_first_and_root_is_mapped(backend: OverlayBackend) -> None:
    backend.create(snapshot(1), never)
    backend.create(Snapshot(2, "active", (1,), MAPPED), never)
    st = os.stat(backend.tree(2))
    assert (st.st_uid, st.st_gid) == (100000, 200000)
    (mount,) = backend.mounts(Snapshot(2, "active", (1,), MAPPED))
    assert mount.options[:2] == ["uidmap=0:100000:65536", "gidmap=0:200000:65536"]
    assert mount.options[2].startswith("workdir=") and mount.options[3].startswith("upperdir=")
    (view,) = backend.mounts(Snapshot(3, "view", (2, 1), MAPPED))
    assert view.options[:2] == mount.options[:2] and view.options[2].startswith("lowerdir=")


@pytest.mark.parametrize(
    "labels",
    [
        {UID_LABEL: "0:1:1"}, {GID_LABEL: "0:1:1"}, {UID_LABEL: "0:1:1", GID_LABEL: "x"},
        {UID_LABEL: "0:1", GID_LABEL: "0:1:1"}, {UID_LABEL: "0:1:0", GID_LABEL: "0:1:1"},
        {UID_LABEL: "5:1:1", GID_LABEL: "0:1:1"}, {UID_LABEL: "0:4294967290:100", GID_LABEL: "0:1:1"},
        {UID_LABEL: "0:-1:5", GID_LABEL: "0:1:1"}, {UID_LABEL: "0:1:1,lowerdir=/", GID_LABEL: "0:1:1"},
        {UID_LABEL: ",".join(["0:1:1"] * 341), GID_LABEL: "0:1:1"},
    ],
)  # fmt: skip
def test_a_malformed_mapping_is_refused(backend: OverlayBackend, labels: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="mapping"):
        backend.create(Snapshot(1, "active", (), labels), never)
    assert backend.entries() == []


def test_without_the_kernel_no_mapping_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "remap-ids" in OverlayBackend(tmp_path / "with", {}).capabilities
    monkeypatch.setattr(overlay.idmap, "works_on", lambda directory: False)
    assert OverlayBackend(tmp_path / "without", {}).capabilities == {"rebase"}


def test_whether_ids_can_be_mapped_is_tried(tmp_path: Path) -> None:
    assert overlay.idmap.works_on(tmp_path)
    assert not overlay.idmap.works_on(Path("/proc"))
    assert not overlay.idmap.works_on(tmp_path / "nothing")


def test_a_layers_tree_is_put_where_there_is_room(backend: OverlayBackend) -> None:
    """On ext4; what stands on others stays near them."""
    for made in (snapshot(1), snapshot(2, "active", 1), snapshot(3, "view")):
        backend.create(made, never)
    paths = [f"{backend.root}/snapshots/{number}" for number in (1, 2, 3)]
    said = subprocess.run(["lsattr", "-d", *paths], capture_output=True, text=True, check=False)
    if said.returncode or magic(backend.root) != 0xEF53:
        pytest.skip("not on ext4")
    assert ["T" in line.split()[0] for line in said.stdout.splitlines()] == [True, False, False]

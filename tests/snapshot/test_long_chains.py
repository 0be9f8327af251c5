"""200 layers through the mounters that containers and diffs really go through, not those of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from snapshot_rig import needs_root
from wherry_diff import mounts as looking
from wherry_shared.errors import FailedPrecondition
from wherry_shared.values import Mount
from wherry_snapshot.backends import Snapshot
from wherry_snapshot.backends.erofs import ErofsBackend
from wherry_snapshot.backends.layered import Layered
from wherry_snapshot.backends.overlay import OverlayBackend

pytestmark = needs_root

LAYERS = 200
# A container's monitor mounts in a namespace of its own, and prints what it sees there.
MONITOR = """
import json, os, sys
from wherry_task.monitor import libc, mounts
libc.unshare_mounts()
libc.mount(None, "/", None, libc.MS_PRIVATE | libc.MS_REC)
target, wanted = sys.argv[1], json.load(sys.stdin)
mounts.mount_rootfs(wanted, target)
if os.access(target, os.W_OK):
    os.mkdir(target + "/written") if "upperdir" in str(wanted[-1]) else None
found = {name: open(f"{target}/{name}").read() for name in os.listdir(target) if name != "written"}
mounts.unmount_rootfs(target)
print(json.dumps([found, os.listdir(target)]))
"""


@pytest.fixture(params=[OverlayBackend, ErofsBackend])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Layered:
    """With a path of 100 bytes, the list is longer than the page that mount(2) takes."""
    root = tmp_path / ("long-" * 12)
    try:
        made: Layered = request.param(root, {})
    except FailedPrecondition as e:
        pytest.skip(e.message)
    for number in range(1, LAYERS + 1):
        snapshot = Snapshot(number, "active", tuple(range(number - 1, 0, -1)), {})
        made.create(snapshot, lambda: None)
        for name in (f"f{number}", "top"):
            Path(made.tree(number), name).write_text(str(number))
        made.seal(snapshot, False, lambda: None)
        made.settle(number)
    return made


def wanted() -> dict[str, str]:
    return {**{f"f{n}": str(n) for n in range(1, LAYERS + 1)}, "top": str(LAYERS)}


def seen_by_a_monitor(mounts: Sequence[Mount], target: Path) -> tuple[dict[str, str], list[str]]:
    target.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MONITOR, str(target)], input=json.dumps([m.model_dump() for m in mounts]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    found, left = json.loads(done.stdout)
    return found, left


def test_many_layers(backend: Layered, tmp_path: Path) -> None:
    chain = tuple(range(LAYERS, 0, -1))
    for kind in ("active", "view"):
        snapshot = Snapshot(LAYERS + (1 if kind == "active" else 2), kind, chain, {})  # type: ignore[arg-type]
        backend.create(snapshot, lambda: None)
        mounts = backend.mounts(snapshot)
        assert seen_by_a_monitor(mounts, tmp_path / f"monitor-{kind}") == (wanted(), [])
        (tmp_path / f"diff-{kind}").mkdir()
        with looking.opened([looking.read_only(m) for m in mounts], str(tmp_path / f"diff-{kind}")) as fd:
            at = f"/proc/self/fd/{fd}"
            found = {n: Path(at, n).read_text() for n in os.listdir(at) if n != "written"}
        assert found == wanted()
    assert os.listdir(backend.tree(LAYERS + 1)) == ["written"]
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(tmp_path) in line]

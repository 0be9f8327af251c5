"""What the demo says about itself can be believed: whatever is left behind is found, and nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import leftovers
import pytest

PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
from leftovers import Watch, _cgroup_mounts, descendants

place = Path(sys.argv[1])
watch = Watch(place)
made, undo = None, []
with watch:
{act}
print(json.dumps([made, watch.leftovers(0.5)]))
for step in undo:
    step()
"""

CGROUP = """
    mounts = _cgroup_mounts()
    made = (mounts.get("") or mounts["pids"]) + f"/wherry-test-{os.getpid()}"
    os.mkdir(made)
    undo.append(lambda: os.rmdir(made))
    child = subprocess.Popen(["sleep", "60"])
    Path(made, "cgroup.procs").write_text(str(child.pid))
    while made not in watch.seen_cgroups:
        time.sleep(0.01)
    child.kill()
    child.wait()
"""


def left(act: str, place: Path) -> tuple[str | None, list[str]]:
    """Run `act` under a watch in a process of its own; answers what it made and what the watch found."""
    examples = Path(leftovers.__file__).parent
    command = [sys.executable, "-c", PROGRAM.format(act=act), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=examples, timeout=60)
    assert done.returncode == 0, done.stderr
    made, found = json.loads(done.stdout)
    return made, found


def test_a_run_that_cleans_up_leaves_nothing(tmp_path: Path) -> None:
    assert left("    subprocess.run(['true'], check=True)\n", tmp_path) == (None, [])


def test_a_process_that_detached_itself_is_found(tmp_path: Path) -> None:
    act = """
    subprocess.run(["setsid", "--fork", "sleep", "61"], check=True)
    undo.append(lambda: [os.kill(pid, 9) for pid in descendants(os.getpid())])
"""
    _, found = left(act, tmp_path)
    (line,) = found
    assert line.startswith("process ") and line.endswith(": sleep 61")


def test_a_mount_is_found(tmp_path: Path) -> None:
    act = """
    made = str(place / "mounted")
    os.mkdir(made)
    subprocess.run(["mount", "-t", "tmpfs", "none", made], check=True)
    undo.append(lambda: subprocess.run(["umount", made], check=True))
"""
    made, found = left(act, tmp_path)
    assert found == [f"mount {made}"]


def test_a_cgroup_is_found_after_its_process_has_gone(tmp_path: Path) -> None:
    made, found = left(CGROUP, tmp_path)
    assert found == [f"cgroup {made}"]


def test_a_cgroup_that_was_removed_is_not_reported(tmp_path: Path) -> None:
    _, found = left(f"{CGROUP}    undo.pop()()\n", tmp_path)
    assert found == []


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_state_that_a_runtime_keeps_elsewhere_is_found(tmp_path: Path, runtime: str) -> None:
    act = f"""
    import shutil
    state = Path("/run/{runtime}") / f"wherry-test-{{os.getpid()}}"
    state.mkdir(parents=True)
    undo.append(lambda: shutil.rmtree(state))
    (state / "state.json").write_text(json.dumps({{"bundle": str(place / "bundle")}}))
    made = str(state)
"""
    made, found = left(act, tmp_path)
    assert found == [f"runtime state {made}"]

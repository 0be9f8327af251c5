"""A runtime starts from one sealed copy of itself: what runs in a container cannot write it, and another is not it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for monitor_rig.py

from monitor_rig import PYTHON, Client, Rig, eventually
from wherry_task.monitor import sealed

RUNTIMES = {name: shutil.which(name, path=os.environ.get("PATH", "")) for name in sealed.NUMBERS}
pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not all(RUNTIMES.values()), reason="takes root, crun and runc")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(tmp_path_factory.mktemp("sealed"))
    yield rig
    rig.close()
    assert rig.leftovers() == []


@pytest.fixture(params=sealed.NUMBERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def created(rig: Rig, name: str, args: list[str], **stdio: str) -> tuple[Client, Path, int]:
    binary = RUNTIMES[name]
    assert binary
    container = f"c{uuid.uuid4().hex[:8]}"
    path = rig.bundle(container, rig.spec(container, args))
    client = rig.spawn(path, binary)
    made = client.call("create", mounts=rig.mounts(), **stdio)
    return client, path, int(made["pid"])


def test_a_container_runs_from_the_copy_and_cannot_write_it(rig: Rig, name: str) -> None:
    client, _, pid = created(rig, name, ["sleep", "60"])
    copy = f"/proc/{rig.zygote_pid}/fd/{sealed.NUMBERS[name]}"
    before = Path(copy).read_bytes()
    binary = RUNTIMES[name]
    assert binary and before.startswith(Path(binary).read_bytes())
    assert os.path.samestat(os.stat(f"/proc/{pid}/exe"), os.stat(copy))
    for path in (f"/proc/{pid}/exe", copy):
        fd = os.open(path, os.O_RDONLY)
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == SEALS
        os.close(fd)
    client.call("start")
    # No longer executed by anybody, it could be opened for writing; the seal forbids that, or each write.
    with pytest.raises(OSError), open(copy, "r+b", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(OSError):
        os.truncate(copy, 0)
    assert Path(copy).read_bytes() == before
    rig.finish(client)


def test_no_process_of_a_container_has_the_copy_open(rig: Rig, name: str) -> None:
    client, path, pid = created(rig, name, ["sleep", "60"])
    client.call("start")
    execd = rig.exec(client, path, "e", ["sleep", "60"])
    for each in (pid, execd):
        eventually(lambda each=each: os.readlink(f"/proc/{each}/exe") == "/bin/busybox")
        assert [fd for fd in os.listdir(f"/proc/{each}/fd") if "memfd" in os.readlink(f"/proc/{each}/fd/{fd}")] == []
    rig.finish(client)


def _told(folder: Path, script: str) -> str:
    """What a process like the zygote says, with a crun of ours in its PATH."""
    program = f"import sys; sys.path[:0] = {sys.path!r}\nfrom wherry_task.monitor import sealed\n{script}"
    command = [PYTHON, "-c", program]
    done = subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_another_file_in_its_place_is_run_itself(tmp_path: Path) -> None:
    binary = tmp_path / "crun"
    shutil.copy("/bin/true", binary)
    script = f"""
import os
path = {str(binary)!r}
sealed.make()
said = [sealed.program(path), sealed.program("/bin/true")]
os.rename(path, path + ".old")
said.append(sealed.program(path))
os.link(path + ".old", path)
with open(path, "ab") as file:
    file.write(b"upgraded")
print(*said, sealed.program(path))
"""
    assert _told(tmp_path, script).split() == ["/proc/self/fd/21", "/bin/true", str(binary), str(binary)]


def test_a_script_is_not_copied(tmp_path: Path) -> None:
    script = tmp_path / "crun"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert _told(tmp_path, f"sealed.make(); print(sealed.program({str(script)!r}))") == str(script)


def test_what_nobody_runs_takes_no_memory_and_what_was_begun_is_begun_again(tmp_path: Path) -> None:
    for name in sealed.NUMBERS:
        shutil.copy("/bin/true", tmp_path / name)
    script = f"""
import os
sealed.make()
said = [os.fstat(number).st_size for number in sealed.NUMBERS.values()]
os.write(21, b"half of another")
said.append(sealed.program({str(tmp_path / "crun")!r}))
child = os.posix_spawn(said[-1], ["true"], {{}})
said.append(os.waitpid(child, 0)[1])
print(*said, os.fstat(22).st_size)
"""
    assert _told(tmp_path, script).split() == ["0", "0", "/proc/self/fd/21", "0", "0"]


def test_two_that_are_the_first_make_one_copy(tmp_path: Path) -> None:
    binary = tmp_path / "runc"
    shutil.copy("/bin/true", binary)
    script = f"""
import fcntl, os
path = {str(binary)!r}
sealed.make()
fcntl.lockf(22, fcntl.LOCK_EX)  # this process is at it
reader, writer = os.pipe()
child = os.fork()
if not child:
    os.write(writer, sealed.program(path).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(reader, 4096).decode(), sealed.program(path))
"""
    assert _told(tmp_path, script).split() == [str(binary), "/proc/self/fd/22"]

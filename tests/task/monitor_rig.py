"""A zygote of one's own, bundles around a static busybox, and a blocking client of the monitors' protocol."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wherry_task.monitor import zygote

CGROUPS = Path("/sys/fs/cgroup")
RUNTIMES = [name for name in ("crun", "runc") if shutil.which(name)]
# The bare interpreter under the virtual environment, as the service starts it.
PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
PATIENCE = 60.0


class Refused(Exception):
    """A reply that was an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Client:
    """One connection, used from one thread; notices that come meanwhile are kept in `notices`."""

    def __init__(self, folder: Path, name: str = "monitor.sock") -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        fd = os.open(folder, os.O_PATH)
        try:
            self.sock.connect(f"/proc/self/fd/{fd}/{name}")
        finally:
            os.close(fd)
        self.notices: list[dict[str, Any]] = []
        self._replies: dict[int, dict[str, Any]] = {}
        self._inbox = b""
        self._count = 0

    def send(self, op: str, **arguments: Any) -> int:
        self._count += 1
        body = json.dumps({"id": self._count, "op": op, **arguments}).encode()
        self.sock.sendall(len(body).to_bytes(4, "big") + body)
        return self._count

    def receive(self) -> dict[str, Any]:
        """The next frame; EOFError when the other side has hung up."""
        while len(self._inbox) < 4 or len(self._inbox) < 4 + int.from_bytes(self._inbox[:4], "big"):
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError
            self._inbox += data
        end = 4 + int.from_bytes(self._inbox[:4], "big")
        message, self._inbox = json.loads(self._inbox[4:end]), self._inbox[end:]
        return dict(message)

    def reply(self, number: int) -> dict[str, Any]:
        while number not in self._replies:
            message = self.receive()
            if "notice" in message:
                self.notices.append(message)
            else:
                self._replies[message["id"]] = message
        message = self._replies.pop(number)
        if "error" in message:
            raise Refused(message["error"]["code"], message["error"]["message"])
        return dict(message["ok"])

    def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        return self.reply(self.send(op, **arguments))

    def notice(self) -> dict[str, Any]:
        """The next notice that was not taken yet."""
        while not self.notices:
            message = self.receive()
            if "notice" in message:
                self.notices.append(message)
            else:
                self._replies[message["id"]] = message
        return self.notices.pop(0)

    def close(self) -> None:
        self.sock.close()


class Rig:
    """Everything of one test module below one directory and one cgroup prefix."""

    def __init__(self, base: Path) -> None:
        os.chmod(base, 0o700)
        self.base = base
        self.prefix = f"/wherry-test-{uuid.uuid4().hex[:10]}"
        self.image = base / "image"
        self._build_image()
        self.zygote_pid = 0
        self.start_zygote()

    def _build_image(self) -> None:
        for name in ("bin", "proc", "dev", "sys", "tmp"):
            (self.image / name).mkdir(parents=True)
        shutil.copy("/bin/busybox", self.image / "bin/busybox")
        for name in ("sh", "true", "sleep", "cat", "echo", "stty", "dd", "kill", "id", "ls", "seq", "yes", "head"):
            (self.image / "bin" / name).symlink_to("busybox")

    def start_zygote(self, name: str = "zygote.sock") -> int:
        command = [PYTHON, "-I", "-S", "-E", str(zygote.__file__), str(self.base / name)]
        done = subprocess.run(command, stderr=subprocess.PIPE, timeout=30)
        if done.returncode:
            raise RuntimeError(done.stderr.decode())
        pid = int(self.zygote(name).call("ping")["pid"])
        if name == "zygote.sock":
            self.zygote_pid = pid
        return pid

    def zygote(self, name: str = "zygote.sock") -> Client:
        return Client(self.base, name)

    def spec(self, container: str, args: list[str], terminal: bool = False) -> dict[str, Any]:
        spaces = [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]
        return {
            "ociVersion": "1.0.0",
            "process": {
                "terminal": terminal, "user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/",
                "capabilities": {key: ["CAP_KILL"] for key in ("bounding", "effective", "permitted")},
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance"]},
            ],
            "linux": {"cgroupsPath": f"{self.prefix}/{container}", "namespaces": spaces, "resources": {}},
        }  # fmt: skip

    def bundle(self, container: str, spec: dict[str, Any]) -> Path:
        path = self.base / "bundles" / container
        path.mkdir(parents=True, mode=0o700)
        os.chmod(path, 0o700)
        (path / "config.json").write_text(json.dumps(spec))
        return path

    def about(self, path: Path, runtime: str) -> dict[str, Any]:
        root = self.base / "runtimes" / Path(runtime).name
        root.mkdir(parents=True, exist_ok=True)
        return {"bundle": str(path), "container": path.name, "runtime": runtime, "root": str(root)}

    def mounts(self) -> list[dict[str, Any]]:
        return [{"type": "bind", "source": str(self.image), "options": ["rbind", "ro"]}]

    def spawn(self, path: Path, runtime: str) -> Client:
        client = self.zygote()
        client.call("spawn", **self.about(path, runtime))
        return client

    def run(
        self,
        runtime: str,
        args: list[str],
        *,
        change: Callable[[dict[str, Any]], Any] | None = None,
        start: bool = True,
        **stdio: Any,
    ) -> tuple[Client, Path]:
        """A watched container in its monitor."""
        container = f"c{uuid.uuid4().hex[:8]}"
        spec = self.spec(container, args, bool(stdio.get("terminal")))
        if change:
            change(spec)
        path = self.bundle(container, spec)
        client = self.spawn(path, runtime)
        client.call("watch")
        client.call("create", mounts=self.mounts(), **stdio)
        if start:
            client.call("start")
        return client, path

    def run_ready(self, runtime: str, script: str) -> tuple[Client, Path]:
        """A container whose shell script has come to its `echo ready`: only then are its traps set."""
        out = self.fifo()
        reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK)
        client, path = self.run(runtime, ["sh", "-c", script], stdout=str(out))
        self.wait_ready(reader)
        return client, path

    def wait_ready(self, reader: int) -> None:
        def ready() -> bool:
            try:
                return os.read(reader, 64) == b"ready\n"
            except BlockingIOError:
                return False

        eventually(ready)
        os.close(reader)

    def exec(self, client: Client, path: Path, exec_id: str, args: list[str], **stdio: Any) -> int:
        process = {"args": args, "env": ["PATH=/bin"], "cwd": "/", "terminal": bool(stdio.get("terminal"))}
        (path / f"p-{exec_id}.json").write_text(json.dumps(process))
        return int(client.call("exec", exec_id=exec_id, process=f"p-{exec_id}.json", **stdio)["pid"])

    def fifo(self, name: str = "") -> Path:
        path = self.base / (name or f"f{uuid.uuid4().hex[:8]}")
        os.mkfifo(path, 0o700)
        return path

    def finish(self, client: Client) -> dict[str, Any]:
        """Delete the container by force; the monitor goes with it."""
        gone = client.call("delete", force=True)
        with contextlib.suppress(EOFError):
            while True:
                client.receive()
        client.close()
        return gone

    def leftovers(self) -> list[str]:
        """Mounts and cgroups that are there and should not be."""
        found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.base) in line]
        for folder in self.cgroups():
            found += [str(each) for each in folder.iterdir() if each.is_dir()]
        return found

    def cgroups(self) -> Iterator[Path]:
        for hierarchy in [CGROUPS, *CGROUPS.iterdir()]:
            folder = Path(f"{hierarchy}{self.prefix}")
            if folder.is_dir():
                yield folder

    def close(self) -> None:
        """End whatever a failed test has left, then the zygote."""
        for path in (self.base / "bundles").glob("*"):
            about = json.loads((path / "monitor.json").read_text()) if (path / "monitor.json").exists() else None
            if about:
                with contextlib.suppress(OSError, Refused, EOFError):
                    self.finish(Client(path))
                with contextlib.suppress(OSError, Refused, EOFError):
                    self.zygote().call("cleanup", **{key: about[key] for key in self.about(path, "x")})
        with contextlib.suppress(OSError, Refused, EOFError):
            self.zygote().call("quit")
        eventually(lambda: not alive(self.zygote_pid))
        for folder in list(self.cgroups()):
            with contextlib.suppress(OSError):
                folder.rmdir()


def alive(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(true: Callable[[], Any]) -> Any:
    """Wait for it; AssertionError when it does not come."""
    deadline = time.monotonic() + PATIENCE
    while True:
        value = true()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def monitor_of(client: Client) -> int:
    return int(client.call("state")["monitor"])


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


def read_all(path: Path) -> bytes:
    """Everything until the end of a FIFO; blocks until there is a writer."""
    with path.open("rb") as file:
        return file.read()

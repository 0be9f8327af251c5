"""A whole node for tests: `wherry up` on directories of its own, driven and hurt from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WHERRY = str(Path(sys.executable).with_name("wherry"))
START_SECONDS = 60.0
STOP_SECONDS = 40.0
SERVICES = (
    "container", "content", "diff", "events", "image", "introspection", "lease", "namespace", "snapshot", "task",
)  # fmt: skip


class Node:
    """`with Node(tmp_path) as node:`; `node.run("ps")` runs the command line against it.

    settings: of services, as environment variables (`WHERRY_CONTENT_IDLE`).
    """

    def __init__(self, base: Path, *arguments: str, **settings: str) -> None:
        self.root = base / "root"
        self.state = base / "state"
        self._arguments = arguments
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None
        self.said: list[str] = []

    # ---- life

    def start(self) -> Node:
        command = [WHERRY, "up", "--root", str(self.root), "--state", str(self.state), *self._arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
            env={**clean_environment(), **self._settings}, process_group=0,
        )  # fmt: skip
        ready = threading.Event()
        threading.Thread(target=self._listen, args=(self._process, ready), daemon=True).start()
        if not ready.wait(START_SECONDS) or self._process.poll() is not None:
            self.stop()
            raise AssertionError("the node does not come up:\n" + "\n".join(self.said))
        return self

    def _listen(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.said.append(line.rstrip())
            if line.startswith("ready"):
                ready.set()
        ready.set()

    def stop(self, number: int = signal.SIGINT) -> int:
        """SIGINT takes containers down too; SIGTERM lets them live. Answers the exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError("the node does not stop:\n" + "\n".join(self.said)) from None

    def __enter__(self) -> Node:
        return self.start()

    def __exit__(self, failed: object, *exc: object) -> None:
        """Nothing is left; a node that was stopped within the block may have left its containers."""
        if self._process is not None or failed:
            self.stop()
            assert failed or not self.mounts(), self.mounts()

    # ---- use

    @property
    def environment(self) -> dict[str, str]:
        return {**clean_environment(), "WHERRY_STATE": str(self.state)}

    def run(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """`wherry ARGUMENTS`, its output captured."""
        options = {"capture_output": True, "text": True, "timeout": 60, "env": self.environment, **options}
        if "input" not in options and "stdin" not in options:
            options["stdin"] = subprocess.DEVNULL
        done = subprocess.run([WHERRY, *arguments], check=False, **options)
        if check and done.returncode:
            raise AssertionError(f"wherry {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def json(self, *arguments: str) -> Any:
        """The same with --format json, parsed."""
        return json.loads(self.run(*arguments, "--format", "json").stdout)

    # ---- look inside, and hurt

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def pids(self) -> dict[str, int]:
        """The processes under the supervisor by name: services, and nats-server."""
        found = {}
        for pid in children(self.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has just ended
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                found[name.removeprefix("wherry-")] = pid
        return found

    def service_pid(self, service: str) -> int:
        """Names are cut to 15 characters by the kernel."""
        return next(pid for name, pid in self.pids().items() if f"wherry-{service}"[:15] == f"wherry-{name}"[:15])

    def kill(self, service: str, number: int = signal.SIGKILL) -> int:
        pid = self.service_pid(service)
        os.kill(pid, number)
        return pid

    @contextlib.contextmanager
    def standing_still(self, service: str, then: int = signal.SIGCONT) -> Iterator[int]:
        """A service that hangs for the time of the block, and goes on; or what it has missed when it is killed `then`.

        Answers its pid.
        """
        pid = self.kill(service, signal.SIGSTOP)
        try:
            yield pid
        finally:
            os.kill(pid, then)

    def wait_restarted(self, service: str, old: int) -> None:
        """Until another process of the service answers on the bus."""

        def alive() -> bool:
            return any(s["name"] == service and s["pid"] not in (0, old) for s in self.services())

        eventually(alive, f"{service} is not restarted: {self.said[-5:]}")

    def services(self) -> list[dict[str, Any]]:
        done = self.run("info", "--format", "json", check=False)
        found: list[dict[str, Any]] = json.loads(done.stdout)["services"] if done.returncode == 0 else []
        return found

    def mounts(self) -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if str(self.root) in line or str(self.state) in line]


def clean_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("WHERRY_")}


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def eventually(condition: Callable[[], Any], failure: str, seconds: float = 60.0) -> Any:
    """What the condition gives as soon as it is true."""
    give_up = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > give_up:
            raise AssertionError(failure)
        time.sleep(0.05)


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """An ext4 of its own on a loop device, mounted at `path`; unmounted at the end."""
    image = path.with_suffix(".img")
    subprocess.run(["truncate", "-s", size, image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-N", "20000", image], check=True)
    path.mkdir()
    subprocess.run(["mount", "-o", "loop", image, path], check=True)
    try:
        yield path
    finally:
        # The last process that had it open may still be on its way out.
        eventually(lambda: subprocess.run(["umount", path], check=False).returncode == 0, f"{path} stays busy")
        shutil.rmtree(path, ignore_errors=True)
        image.unlink()

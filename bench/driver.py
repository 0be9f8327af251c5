"""A side's client: a process of its own that measures its own calls, steered by lines of JSON.

`python -m bench.driver wherry|containerd '{"place": ...}'` reads `[name, arguments]` from stdin and answers
`{"value": ...}` or `{"error": "..."}`, one line each. One process for a side's whole run: nothing that a measurement
does waits for an interpreter to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .accounting import Cgroup


class MeasureError(Exception):
    """A side did not do what was to be measured; the message says what it said."""


class Driver:
    """The parent's end."""

    def __init__(self, side: str, settings: dict[str, str], cgroup: Cgroup, log: Path) -> None:
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.driver", side, json.dumps(settings)],
                cwd=Path(__file__).resolve().parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                preexec_fn=cgroup.joining, process_group=0,
            )  # fmt: skip
        self._name = side
        self._log = log

    def call(self, method: str, timeout: float = 180.0, **arguments: Any) -> Any:
        """Let the client do something. MeasureError: it failed, or took longer than `timeout` seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([method, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise MeasureError(self._obituary()) from None
        answer: dict[str, Any] = json.loads(self._line(method, timeout))
        if "error" in answer:
            raise MeasureError(answer["error"])
        return answer["value"]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _line(self, method: str, timeout: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline, line = time.monotonic() + timeout, b""
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    raise MeasureError(f"{method} was not done after {timeout:.0f} s")
                chunk = os.read(fd, 1 << 16)
                if not chunk:
                    raise MeasureError(self._obituary())
                line += chunk
        return line

    def _obituary(self) -> str:
        self._process.wait()
        said = self._log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
        return f"the {self._name} client ended with status {self._process.returncode}: {said[0]}"

    def close(self) -> None:
        """End the client; killed where it does not end by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


async def _serve(side: str, settings: dict[str, str]) -> None:
    if side == "wherry":
        from .wherry_client import WherryClient

        client: Any = await WherryClient.connect(settings)
    else:
        from .containerd_client import ContainerdClient

        client = ContainerdClient(settings)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        method, arguments = json.loads(line)
        try:
            value = getattr(client, method)(**arguments)
            answer = {"value": await value if inspect.isawaitable(value) else value}
        except Exception as error:
            answer = {"error": _reason(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    closing = client.close()
    if inspect.isawaitable(closing):
        await closing


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:500]


def main() -> None:
    import uvloop

    uvloop.run(_serve(sys.argv[1], json.loads(sys.argv[2])))


if __name__ == "__main__":
    main()

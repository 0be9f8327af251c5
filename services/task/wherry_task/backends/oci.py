"""OCI runtimes (runc, crun, youki) by way of a monitor per container, forked off a zygote. monitor/README.md has the
protocol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wherry_shared.api.task import Stdio
from wherry_shared.errors import Internal, Unavailable, from_code
from wherry_shared.values import Mount

from wherry_task.monitor import zygote as zygote_program

from . import Bundle, Ended, OnNotice, OutOfMemory

log = logging.getLogger("wherry.task.oci")

SOCKET = "monitor.sock"
FRAME_MAX = 1 << 20
ZYGOTE_SECONDS = 10.0


class Channel:
    """A connection that speaks the monitor's protocol: requests by number, and notices in between."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._closing = False
        self.on_notice: Callable[[dict[str, Any]], None] = _ignore
        self.on_gone: Callable[[], None] = _nothing
        self._task = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def open(cls, directory: Path, name: str) -> Channel:
        """Connect to a socket by its directory (a long path would not fit into an address). Raises OSError."""
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{fd}/{name}")
        finally:
            os.close(fd)
        return cls(reader, writer)

    async def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One operation. Unavailable when the other end is gone; else what it refused with."""
        if self._task.done():
            raise Unavailable(f"the monitor is gone ({op})")
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        body = json.dumps({"id": number, "op": op, **arguments}, separators=(",", ":")).encode()
        self._writer.write(len(body).to_bytes(4, "big") + body)
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def _read(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                if size > FRAME_MAX:
                    raise Internal(f"a monitor sent a frame of {size} bytes")
                self._take(json.loads(await self._reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(Unavailable("the monitor is gone"))
            self._writer.close()
            if not self._closing:
                self.on_gone()

    def _take(self, message: dict[str, Any]) -> None:
        if "notice" in message:
            self.on_notice(message)
            return
        answer = self._waiting.get(message.get("id", 0))
        if answer is None or answer.done():
            return
        error = message.get("error")
        if error is not None:
            answer.set_exception(from_code(int(error["code"]), str(error["message"])))
        else:
            answer.set_result(message.get("ok") or {})

    async def ended(self, patience: float) -> None:
        """Return when the other end has hung up, or after `patience` seconds."""
        await asyncio.wait({self._task}, timeout=patience)

    async def close(self) -> None:
        """Hang up without telling `on_gone`."""
        self._closing = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _ignore(message: dict[str, Any]) -> None:
    return None


def _nothing() -> None:
    return None


class MonitorShim:
    """A Shim that is a monitor process."""

    def __init__(self, channel: Channel, cgroups: dict[str, str] | None = None) -> None:
        self._channel = channel
        self.cgroups: dict[str, str] = cgroups or {}

    async def create(self, mounts: list[Mount], stdio: Stdio, *, has_poststart: bool) -> int:
        answer = await self._channel.ask(
            "create", mounts=[m.model_dump() for m in mounts], poststart=has_poststart, **stdio.model_dump()
        )
        self.cgroups = answer["cgroups"]
        return int(answer["pid"])

    async def start(self) -> int:
        return int((await self._channel.ask("start"))["pid"])

    async def exec(self, exec_id: str, spec: str, stdio: Stdio) -> int:
        return int((await self._channel.ask("exec", exec_id=exec_id, process=spec, **stdio.model_dump()))["pid"])

    async def kill(self, signal: int, exec_id: str, *, all: bool) -> None:
        await self._channel.ask("kill", signal=signal, exec_id=exec_id, all=all)

    async def pause(self) -> None:
        await self._channel.ask("pause")

    async def resume(self) -> None:
        await self._channel.ask("resume")

    async def resize(self, width: int, height: int, exec_id: str) -> None:
        await self._channel.ask("resize", width=width, height=height, exec_id=exec_id)

    async def close_stdin(self, exec_id: str) -> None:
        await self._channel.ask("close_stdin", exec_id=exec_id)

    async def state(self) -> dict[str, Any]:
        return await self._channel.ask("state")

    async def delete(self, exec_id: str, *, force: bool) -> None:
        if not exec_id:
            self._channel.on_gone = _nothing  # its container deleted, a monitor ends by itself
        await self._channel.ask("delete", exec_id=exec_id, force=force)

    async def watch(self, on_notice: OnNotice, on_gone: Callable[[], None]) -> None:
        def tell(message: dict[str, Any]) -> None:
            on_notice(ended(message) if message["notice"] == "exit" else OutOfMemory())

        self._channel.on_notice, self._channel.on_gone = tell, on_gone
        await self._channel.ask("watch")

    async def close(self) -> None:
        await self._channel.close()


def ended(record: dict[str, Any]) -> Ended:
    """An end as the monitor tells it and as it stands in its records."""
    return Ended(
        exec_id=str(record["id"]), pid=int(record["pid"]), exit_status=int(record["exit_status"]),
        exited_ns=int(record["exited_at"]), oom=bool(record.get("oom")), shim_died=bool(record.get("shim_died")),
    )  # fmt: skip


class OciLauncher:
    """Makes monitors. The zygote is started when it is first needed, and again when it is gone."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._starting = asyncio.Lock()

    async def launch(self, bundle: Bundle) -> MonitorShim:
        channel = await self._zygote()
        try:
            await channel.ask("spawn", **_about(bundle))
        except BaseException:
            await channel.close()
            raise
        return MonitorShim(channel)

    async def adopt(self, bundle: Bundle) -> MonitorShim | None:
        try:
            channel = await Channel.open(bundle.path, SOCKET)
            state = await channel.ask("state")
        except (OSError, Unavailable):
            return None
        return MonitorShim(channel, state.get("cgroups"))

    async def clean(self, bundle: Bundle) -> list[Ended]:
        channel = await self._zygote()
        try:
            answer = await channel.ask("cleanup", **_about(bundle))
        finally:
            await channel.close()
        for warning in answer.get("warnings", []):
            log.warning("cleaning %s: %s", bundle.path, warning)
        return [ended(record) for record in answer.get("exits", [])]

    async def close(self, *, idle: bool) -> None:
        if not idle:
            return
        with contextlib.suppress(OSError, Unavailable):
            channel = await Channel.open(self._directory, "zygote.sock")
            await channel.ask("quit")
            await channel.ended(ZYGOTE_SECONDS)
            await channel.close()

    async def _zygote(self) -> Channel:
        async with self._starting:
            with contextlib.suppress(OSError):
                return await Channel.open(self._directory, "zygote.sock")
            await self._start_zygote()
            try:
                return await Channel.open(self._directory, "zygote.sock")
            except OSError as e:
                raise Unavailable(f"the zygote does not answer: {e.strerror}") from None

    async def _start_zygote(self) -> None:
        # The bare interpreter beneath the virtual environment: every page that it does not have is saved per monitor.
        interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        process = await asyncio.create_subprocess_exec(
            interpreter, "-I", "-S", "-E", str(zygote_program.__file__), str(self._directory / "zygote.sock"),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(ZYGOTE_SECONDS):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            raise Unavailable("the zygote does not start") from None
        if process.returncode:
            raise Unavailable(f"the zygote does not start: {said.decode(errors='replace').strip()}")


def _about(bundle: Bundle) -> dict[str, Any]:
    return {
        "bundle": str(bundle.path), "container": bundle.container, "runtime": bundle.binary, "root": str(bundle.root)
    }  # fmt: skip

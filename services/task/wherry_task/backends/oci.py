"""OCI runtimes (runc, crun, youki) by way of a monitor per container, forked off a zygote. monitor/README.md has the
protocol."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wherry_shared.api.task import CheckpointOptions, Stdio
from wherry_shared.errors import FailedPrecondition, Unavailable, Unknown, WherryError

from wherry_task.monitor import runtime

from . import Bundle, Creation, Ended, Metrics, OnNotice, OutOfMemory, Seen, criu, metrics
from .channel import LONG_PATIENCE, Channel
from .quickening import Hastening, Quickening

log = logging.getLogger("wherry.task.oci")

SOCKET = "monitor.sock"
ZYGOTE_SECONDS = 10.0
# Not imported here: it is the program of another interpreter, and brings all of a monitor's code.
_ZYGOTE = Path(runtime.__file__).with_name("zygote.py")
# What a monitor knows by heart it answers at once, or it hangs.
STATE_SECONDS = 2.0
# The fork of the next monitor waits so long: a container that was just made needs the processors to start and, if it is
# a short one, to end.
SPARE_SECONDS = 0.01


class MonitorShim:
    """A Shim that is a monitor process."""

    def __init__(self, channel: Channel, bundle: Bundle, made: dict[str, Any], *, watched: bool) -> None:
        self.channel = channel
        self._bundle = bundle
        self._cgroups: dict[str, str] = made.get("cgroups") or {}
        self._pid = int(made.get("pid") or 0)
        # Only a container that this process has created is known to have no poststart hooks.
        self._releases = False
        self._image = ""  # of CRIU, that it is restored from
        self._watched = watched

    @classmethod
    def created(cls, channel: Channel, bundle: Bundle, made: dict[str, Any], creation: Creation) -> MonitorShim:
        """After a `launch`, which watches too."""
        shim = cls(channel, bundle, made, watched=True)
        shim._releases = not creation.poststart and not creation.restore
        shim._image = creation.restore
        return shim

    async def start(self) -> int:
        if self._releases and await self._release():
            return self._pid  # the monitor needs no word of it: it looks at what the runtime left
        try:
            made = await self.channel.ask("start", patience=LONG_PATIENCE)
        except Unknown as e:
            if not self._pid:  # it was to be restored
                said = await asyncio.to_thread(criu.said_in, Path(self._image or ".") / "restore.log")
                await criu.explain(e, self._bundle, said)
            raise
        self._cgroups = made.get("cgroups") or self._cgroups
        self._pid = int(made["pid"])
        return self._pid

    async def _release(self) -> bool:
        """Let the init go on from here: neither a runtime nor a worker has to be started for it."""
        state = str(self._bundle.root / self._bundle.container)
        if Path(self._bundle.binary).name == "crun":
            return runtime.release(self._bundle.binary, state, self._pid)
        return await asyncio.to_thread(runtime.release, self._bundle.binary, state, self._pid)

    async def exec(self, exec_id: str, spec: str, stdio: Stdio) -> int:
        made = await self.channel.ask(
            "exec", patience=LONG_PATIENCE, exec_id=exec_id, process=spec, **stdio.model_dump()
        )
        return int(made["pid"])

    async def kill(self, signal: int, exec_id: str, *, all: bool, key: str = "") -> None:
        await self.channel.ask("kill", signal=signal, exec_id=exec_id, all=all, key=key)

    async def has_sent(self, exec_id: str, key: str) -> bool:
        try:
            await self.channel.ask("kill", signal=0, exec_id=exec_id, key=key)
        except WherryError:
            return False
        return True

    async def pause(self) -> None:
        await self.channel.ask("pause")

    async def resume(self) -> None:
        await self.channel.ask("resume")

    async def resize(self, width: int, height: int, exec_id: str) -> None:
        with contextlib.suppress(FailedPrecondition):  # it has no terminal, which is nothing to complain of
            await self.channel.ask("resize", width=width, height=height, exec_id=exec_id)

    async def close_stdin(self, exec_id: str) -> None:
        await self.channel.ask("close_stdin", exec_id=exec_id)

    async def update(self, resources: dict[str, Any], annotations: dict[str, str]) -> None:
        await self.channel.ask("update", resources=resources)

    async def checkpoint(self, options: CheckpointOptions) -> None:
        await criu.checkpoint(self.channel, self._bundle, options)

    async def pids(self) -> list[int]:
        return await asyncio.to_thread(metrics.members, self._cgroups)

    async def stats(self) -> Metrics | None:
        return await asyncio.to_thread(metrics.read, self._cgroups)

    async def state(self, execs: Sequence[str] = ()) -> Seen:
        told = await self.channel.ask("state", patience=STATE_SECONDS)
        pids = {exec_id: int(each["pid"]) for exec_id, each in told.get("execs", {}).items()}
        state = told["state"]
        return Seen(state not in ("created", "empty"), int(told["pid"]), pids, state == "paused")

    async def delete(self, exec_id: str, *, force: bool) -> None:
        if not exec_id:
            self.channel.forget_end()  # its container deleted, a monitor ends by itself
        await self.channel.ask("delete", patience=LONG_PATIENCE, exec_id=exec_id, force=force)

    def removed(self) -> bool:
        return runtime.removed(self._bundle.binary, str(self._bundle.root / self._bundle.container))

    async def watch(self, on_notice: OnNotice, on_gone: Callable[[], None], execs: Sequence[str] = ()) -> None:
        def tell(message: dict[str, Any]) -> None:
            on_notice(ended(message) if message["notice"] == "exit" else OutOfMemory())

        self.channel.follow(tell, on_gone)
        if not self._watched:
            self._watched = True
            await self.channel.ask("watch")

    async def close(self) -> None:
        await self.channel.close()


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
        # A monitor forked ahead: it waits for its first word, so that a creation need not wait for the fork.
        self._spare: Channel | None = None
        self._sparing: asyncio.Task[None] | None = None
        self._quickening = Quickening(Hastening(directory / "hastened"))

    async def launch(self, bundle: Bundle, creation: Creation) -> tuple[MonitorShim, int]:
        channel = await self._take_spare()
        try:
            made = await channel.ask("launch", patience=LONG_PATIENCE, **_about(bundle), **_creation(creation))
        except BaseException:
            await channel.close()
            raise
        finally:
            self._make_spare()
        return MonitorShim.created(channel, bundle, made, creation), int(made["pid"])

    async def adopt(self, bundle: Bundle) -> MonitorShim | None:
        try:
            channel = await Channel.open(bundle.path, SOCKET)
        except OSError:
            return None
        try:
            told = await channel.ask("state", patience=STATE_SECONDS)
        except Unavailable:
            silent = channel.alive
            await channel.close()
            if silent:
                raise
            return None
        return MonitorShim(channel, bundle, told, watched=False)

    async def clean(self, bundle: Bundle, *, kill: bool = False) -> list[Ended]:
        channel = await self._zygote()
        try:
            answer = await channel.ask("cleanup", patience=LONG_PATIENCE, kill=kill, **_about(bundle))
        finally:
            await channel.close()
        for warning in answer.get("warnings", []):
            log.warning("cleaning %s: %s", bundle.path, warning)
        return [ended(record) for record in answer.get("exits", [])]

    def quicken(self) -> None:
        self._quickening.expect()

    async def close(self, *, idle: bool) -> None:
        await self._quickening.close()
        if self._sparing is not None:
            self._sparing.cancel()
            await asyncio.wait([self._sparing])
        if self._spare is not None:
            await self._spare.close()
        if not idle:
            return
        with contextlib.suppress(OSError, Unavailable):
            channel = await Channel.open(self._directory, "zygote.sock")
            await channel.ask("quit")
            await channel.ended(ZYGOTE_SECONDS)
            await channel.close()

    # ---- the zygote

    async def _take_spare(self) -> Channel:
        spare, self._spare = self._spare, None
        if spare is not None and spare.alive:
            return spare
        return await self._zygote()

    def _make_spare(self) -> None:
        if self._spare is None and (self._sparing is None or self._sparing.done()):
            self._sparing = asyncio.get_running_loop().create_task(self._fork_ahead())

    async def _fork_ahead(self) -> None:
        await asyncio.sleep(SPARE_SECONDS)
        with contextlib.suppress(OSError, Unavailable):
            self._spare = await self._zygote()

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
            interpreter, "-I", "-S", "-E", str(_ZYGOTE), str(self._directory / "zygote.sock"),
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


def _creation(creation: Creation) -> dict[str, Any]:
    return {
        "mounts": [m.model_dump() for m in creation.mounts], "poststart": creation.poststart, "plain": creation.plain,
        **creation.stdio.model_dump(), **({"restore": {"image": creation.restore}} if creation.restore else {}),
    }  # fmt: skip

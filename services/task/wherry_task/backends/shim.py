"""Shim v2 binaries (containerd-shim-<name>-v2: runc's, kata, gVisor, wasm) over ttrpc, by containerd's runtime v2 ABI.

In the bundle lie, as a shim expects them: config.json, rootfs, log (a FIFO that it writes its log into), and ours:
bootstrap.json (where it listens) and shim.json (what kills a shim that hangs). Its socket lies where it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wherry_shared.api.task import CheckpointOptions, Stdio
from wherry_shared.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    Unavailable,
    Unimplemented,
    Unknown,
    WherryError,
)

from wherry_task.monitor import cgroups, mounts, operations
from wherry_task.stdio import logwriter, uris

from . import Bundle, Creation, Ended, Metrics, OnNotice, OutOfMemory, Seen, shimlog, shimstats, ttrpc
from .protobuf import any_of, decode, encode, integer, nanoseconds, nested, octets, text

log = logging.getLogger("wherry.task.shim")

PATIENCE, LONG_PATIENCE, LOOK_SECONDS, END_SECONDS, DYING_SECONDS = 10.0, 50.0, 2.0, 5.0, 1.0
SIGKILL = 9
RUNNING_STATES, PAUSED_STATE = (2, 4, 5), 4
ORDER_SECONDS = 2.0  # in which the execs of an init that has ended are reaped
ADDRESS_MAX = 107  # what a socket's address holds
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SPEC = "types.containerd.io/opencontainers/runtime-spec/1"
_EVENTS = "containerd.services.events.ttrpc.v1.Events"
# containerd.runc.v1.Options
_RUNC_OPTIONS = {
    "NoPivotRoot": 1, "NoNewKeyring": 2, "ShimCgroup": 3, "IoUid": 4, "IoGid": 5, "BinaryName": 6, "Root": 7,
    "SystemdCgroup": 9, "CriuImagePath": 10, "CriuWorkPath": 11,
}  # fmt: skip


class V2Shim:
    """A Shim that is a shim v2 process."""

    def __init__(self, client: ttrpc.Client, bundle: Bundle, version: int, reader: shimlog.Reader) -> None:
        self._client = client
        self._bundle = bundle
        self._service = f"containerd.task.v{version}.Task"
        self._log = reader
        self._on_notice: OnNotice | None = None
        self._waits: dict[str, asyncio.Task[None]] = {}
        self._pid = 0
        self._cgroups: dict[str, str] = {}
        self._oom_file = ""

    async def call(self, method: str, request: Mapping[int, Any], patience: float | None = PATIENCE) -> bytes:
        return await self._client.call(self._service, method, {1: self._bundle.container, **request}, patience=patience)

    # ---- life

    async def create(self, creation: Creation) -> int:
        """CreateTask; answers the init's pid, 0 when it is to be restored."""
        stdio = await asyncio.to_thread(_for_shims, creation.stdio)
        request = {
            2: str(self._bundle.path), 3: [_mount(m.type, m.source, m.target, m.options) for m in creation.mounts],
            4: stdio.terminal, 5: stdio.stdin, 6: stdio.stdout, 7: "" if stdio.terminal else stdio.stderr,
            8: creation.restore, 10: _options(self._bundle, creation.options),
        }  # fmt: skip
        self._place(integer(decode(await self.call("Create", request, LONG_PATIENCE)), 1))
        return self._pid

    def _place(self, pid: int) -> None:
        self._pid = pid
        if pid:
            self._cgroups = cgroups.of(pid)
            self._oom_file = cgroups.memory(self._cgroups)

    async def start(self) -> int:
        pid = integer(decode(await self.call("Start", {}, LONG_PATIENCE)), 1)
        if pid != self._pid:
            self._place(pid)
        return pid

    async def exec(self, exec_id: str, spec: str, stdio: Stdio) -> int:
        stdio = await asyncio.to_thread(_for_shims, stdio)
        process = await asyncio.to_thread((self._bundle.path / spec).read_bytes)
        await self.call("Exec", {
            2: exec_id, 3: stdio.terminal, 4: stdio.stdin, 5: stdio.stdout, 6: "" if stdio.terminal else stdio.stderr,
            7: any_of(f"{_SPEC}/Process", process),
        })  # fmt: skip
        try:
            pid = integer(decode(await self.call("Start", {2: exec_id}, LONG_PATIENCE)), 1)
        except WherryError:
            with contextlib.suppress(WherryError):
                await self.call("Delete", {2: exec_id})
            raise
        self._await_end(exec_id, pid)
        return pid

    async def kill(self, signal: int, exec_id: str, *, all: bool, key: str = "") -> None:
        # Its protocol has no room for the key: a signal may come twice where this service dies in between.
        await self.call("Kill", {2: exec_id, 3: signal, 4: all})

    async def has_sent(self, exec_id: str, key: str) -> bool:
        return False

    async def pause(self) -> None:
        await self.call("Pause", {})

    async def resume(self) -> None:
        await self.call("Resume", {})

    async def resize(self, width: int, height: int, exec_id: str) -> None:
        await self.call("ResizePty", {2: exec_id, 3: width, 4: height})

    async def close_stdin(self, exec_id: str) -> None:
        await self.call("CloseIO", {2: exec_id, 3: True})

    async def update(self, resources: dict[str, Any], annotations: dict[str, str]) -> None:
        body = any_of(f"{_SPEC}/LinuxResources", json.dumps(resources).encode())
        await self.call("Update", {2: body, 3: [{1: key, 2: value} for key, value in annotations.items()]})

    async def checkpoint(self, options: CheckpointOptions) -> None:
        flags = {
            1: options.exit, 2: options.open_tcp, 3: options.external_unix_sockets, 4: options.terminal,
            5: options.file_locks, 8: options.image, 9: options.work,
        }  # fmt: skip
        body = any_of("containerd.runc.v1.CheckpointOptions", encode(flags))
        try:
            await self.call("Checkpoint", {2: options.image, 3: body}, 590.0)
        except Unknown as e:
            from . import criu

            await criu.explain(e, self._bundle)
            raise

    async def pids(self) -> list[int]:
        processes = nested(decode(await self.call("Pids", {})), 1)
        return sorted(integer(decode(each), 1) for each in processes)

    async def stats(self) -> Metrics | None:
        try:
            found = decode(octets(decode(await self.call("Stats", {}, LOOK_SECONDS)), 1))
        except (NotFound, Unimplemented):
            return None
        return shimstats.metrics_of(text(found, 1), octets(found, 2))

    async def state(self, execs: Sequence[str] = ()) -> Seen:
        init = decode(await self.call("State", {}, LOOK_SECONDS))
        self._place(integer(init, 3))
        pids = {}
        for exec_id in execs:
            with contextlib.suppress(NotFound):
                pids[exec_id] = integer(decode(await self.call("State", {2: exec_id}, LOOK_SECONDS)), 3)
        status = integer(init, 4)
        known = {e: pid for e, pid in pids.items() if pid}
        return Seen(status in RUNNING_STATES or status == 3, self._pid, known, status == PAUSED_STATE)

    async def delete(self, exec_id: str, *, force: bool) -> None:
        if exec_id:
            await self.call("Delete", {2: exec_id}, LONG_PATIENCE)
            return
        if force:
            with contextlib.suppress(WherryError):
                await self.call("Kill", {3: SIGKILL, 4: True})
        self._client.on_end = None
        with contextlib.suppress(NotFound):
            await self.call("Delete", {}, LONG_PATIENCE)
        with contextlib.suppress(WherryError):
            await self.call("Shutdown", {}, END_SECONDS)
        if not await self._client.ended(END_SECONDS):
            log.warning("the shim of %s does not end by itself: it is killed", self._bundle.path)
            await asyncio.to_thread(kill_shim, self._bundle)
        await asyncio.to_thread(mounts.unmount_rootfs, str(self._bundle.path / "rootfs"))

    def removed(self) -> bool:
        return False  # it says nothing of that

    # ---- ends

    async def watch(self, on_notice: OnNotice, on_gone: Callable[[], None], execs: Sequence[str] = ()) -> None:
        self._on_notice = on_notice
        self._client.on_end = on_gone
        if not self._client.alive:
            on_gone()
            return
        for exec_id in ("", *execs):
            self._await_end(exec_id, 0)

    def _await_end(self, exec_id: str, pid: int) -> None:
        if exec_id not in self._waits or self._waits[exec_id].done():
            self._waits[exec_id] = asyncio.get_running_loop().create_task(self._wait(exec_id, pid))

    async def _wait(self, exec_id: str, pid: int) -> None:
        while True:
            try:
                answer = decode(await self.call("Wait", {2: exec_id}, None))
                break
            except NotFound:
                return  # deleted meanwhile
            except Unavailable:
                return  # its end is `on_gone`'s to tell of
            except WherryError as e:
                log.error("waiting for %s of %s: %s", exec_id or "the init", self._bundle.path, e)
                await asyncio.sleep(1.0)
        if not exec_id:  # the execs' ends come first; one that outlives the init in a shared pid namespace does not
            others = [task for name, task in self._waits.items() if name and not task.done()]
            if others:
                await asyncio.wait(others, timeout=ORDER_SECONDS)
        status, at = integer(answer, 1), nanoseconds(octets(answer, 2))
        killed = bool(not exec_id and self._oom_file and cgroups.oom_kills(self._oom_file))
        if self._on_notice is not None:
            self._on_notice(Ended(exec_id, pid, status, at, oom=killed and status == 128 + SIGKILL))

    def out_of_memory(self) -> None:
        """The shim said so."""
        if self._on_notice is not None:
            self._on_notice(OutOfMemory())

    async def close(self) -> None:
        for task in self._waits.values():
            task.cancel()
        self._log.close()
        await self._client.close()


class ShimLauncher:
    """Starts shims, one a container, and listens to their events."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._events = ttrpc.Server(self._event)
        self._listening: asyncio.Task[str] | None = None
        self._shims: dict[tuple[str, str], V2Shim] = {}

    async def launch(self, bundle: Bundle, creation: Creation) -> tuple[V2Shim, int]:
        (bundle.path / "work").mkdir(mode=0o700)  # containerd's, where runc's shim has CRIU work
        reader = shimlog.Reader.make(bundle.path)
        try:
            options = _options(bundle, creation.options)
            told = await self._run(bundle, "start", stdin=encode(options) if options else b"")
            _write(bundle.path / "bootstrap.json", json.dumps(_bootstrap(told)))
            shim = await self._connect(bundle, reader)
        except BaseException:
            reader.close()
            raise
        try:
            return shim, await shim.create(creation)
        except BaseException:
            await shim.close()
            raise

    async def adopt(self, bundle: Bundle) -> V2Shim | None:
        reader = shimlog.Reader.make(bundle.path)
        try:
            return await self._connect(bundle, reader)
        except (OSError, ValueError):
            reader.close()
            return None
        except Unavailable:
            reader.close()
            raise

    async def _connect(self, bundle: Bundle, reader: shimlog.Reader) -> V2Shim:
        """Unavailable: somebody listens there, and does not answer."""
        await self._listen()
        bootstrap = json.loads((bundle.path / "bootstrap.json").read_text())
        client = await ttrpc.Client.connect(str(bootstrap["address"]), bundle.namespace)
        shim = V2Shim(client, bundle, int(bootstrap["version"]), reader)
        try:
            told = decode(await shim.call("Connect", {}, LOOK_SECONDS))
        except Unavailable:
            silent = client.alive
            await client.close()
            if silent:
                raise
            raise ConnectionResetError("the shim hung up") from None
        pid = integer(told, 1)
        _write(bundle.path / "shim.json", json.dumps({"pid": pid, "start_time": operations.start_time(pid)}))
        self._shims[bundle.namespace, bundle.container] = shim
        return shim

    async def clean(self, bundle: Bundle, *, kill: bool = False) -> list[Ended]:
        if kill:
            await asyncio.to_thread(kill_shim, bundle)
        if not await asyncio.to_thread(_shim_ends, bundle):
            raise AlreadyExists(f"the shim of {bundle.path} is alive")
        ends = []
        if (bundle.path / "bootstrap.json").exists():
            try:
                told = decode(await self._run(bundle, "-bundle", str(bundle.path), "delete"))
                # What it answers for the status it cannot know either, unless its own record says so.
                at = nanoseconds(octets(told, 3))
                ends = [Ended("", integer(told, 1), integer(told, 2) or 128 + SIGKILL, at, shim_died=True)]
            except WherryError as e:
                log.warning("cleaning %s: %s", bundle.path, e)
        await asyncio.to_thread(mounts.unmount_rootfs, str(bundle.path / "rootfs"))
        await asyncio.to_thread(_remove_socket, bundle)
        self._shims.pop((bundle.namespace, bundle.container), None)
        return ends

    def quicken(self) -> None:
        return None

    async def close(self, *, idle: bool) -> None:
        await self._events.close()
        with contextlib.suppress(OSError):
            self._events_path.unlink()

    # ---- the binary

    async def _run(self, bundle: Bundle, *action: str, stdin: bytes = b"") -> bytes:
        """Run the binary for one of its short actions and answer what it printed. Unknown with its words."""
        address = await self._listen()
        command = [
            bundle.binary, "-namespace", bundle.namespace, "-address", str(self._directory), "-publish-binary",
            "/bin/true", "-id", bundle.container, *action,
        ]  # fmt: skip
        env = {
            "PATH": PATH, "TTRPC_ADDRESS": address, "GRPC_ADDRESS": str(self._directory),
            "NAMESPACE": bundle.namespace, "MAX_SHIM_VERSION": "2", "GOMAXPROCS": "2",
        }  # fmt: skip
        # Not the event loop's way: uvloop's children inherit the pipes once more, and the shim that one leaves behind
        # would hold them open for as long as it lives.
        try:
            done = await asyncio.to_thread(
                subprocess.run, command, cwd=bundle.path, input=stdin, capture_output=True, start_new_session=True,
                env=env, timeout=LONG_PATIENCE, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{bundle.binary} {action[-1]} does not end") from None
        if done.returncode:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise Unknown(f"{Path(bundle.binary).name} {action[-1]} failed: {said[-2000:]}")
        return done.stdout

    # ---- events

    @property
    def _events_path(self) -> Path:
        return self._directory / "events.sock"

    async def _listen(self) -> str:
        """Where shims send their events; "" where the path is too long for an address."""
        if self._listening is None:
            self._listening = asyncio.get_running_loop().create_task(self._start_listening())
        return await asyncio.shield(self._listening)

    async def _start_listening(self) -> str:
        path = str(self._events_path)
        if len(os.fsencode(path)) > ADDRESS_MAX:
            log.warning("%s is too long for a socket: shims cannot tell of out-of-memory kills", path)
            return ""
        self._events_path.unlink(missing_ok=True)
        await self._events.start(path)
        return path

    async def _event(self, service: str, method: str, payload: bytes) -> bytes:
        """Forward{envelope{timestamp, namespace, topic, event}}: only the lack of memory is news to us."""
        if (service, method) != (_EVENTS, "Forward"):
            return await ttrpc.refuse(service, method, payload)
        envelope = decode(octets(decode(payload), 1))
        if text(envelope, 3) == "/tasks/oom":
            event = decode(octets(decode(octets(envelope, 4)), 2))
            shim = self._shims.get((text(envelope, 2), text(event, 1)))
            if shim is not None:
                shim.out_of_memory()
        return b""


def kill_shim(bundle: Bundle) -> None:
    """By its pid and start time, if it is still that process."""
    known = _known(bundle)
    if known.get("pid") and operations.start_time(known["pid"]) == known.get("start_time"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(known["pid"], SIGKILL)


def _shim_ends(bundle: Bundle) -> bool:
    """Whether it has ended, or does so within a second: a killed one's connections end before it does."""
    known = _known(bundle)
    try:
        fd = os.pidfd_open(int(known.get("pid") or 0))
    except (OSError, ValueError):
        return True
    try:
        same = bool(known.get("start_time")) and operations.start_time(known["pid"]) == known["start_time"]
        end = select.poll()
        end.register(fd, select.POLLIN)
        return not same or bool(end.poll(DYING_SECONDS * 1000))
    finally:
        os.close(fd)


def _known(bundle: Bundle) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((bundle.path / "shim.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def _remove_socket(bundle: Bundle) -> None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        os.unlink(json.loads((bundle.path / "bootstrap.json").read_text())["address"])


def _bootstrap(told: bytes) -> dict[str, Any]:
    """What `start` printed: a BootstrapResult, JSON, or only an address. Unknown where it is none of them."""
    words = told.decode(errors="replace").strip()
    if words.startswith("{"):
        try:
            found = json.loads(words)
            version, address = int(found.get("version", 2)), str(found.get("address") or "")
            protocol = found.get("protocol", "ttrpc")
        except (ValueError, TypeError, AttributeError):
            raise Unknown(f"the shim started with {words[:200]!r}, which is no answer") from None
    elif words.startswith(("unix://", "/")):
        version, address, protocol = 2, words, "ttrpc"
    else:
        result = decode(told)
        version, address, protocol = integer(result, 1), text(result, 2), text(result, 3)
    if protocol != "ttrpc" or version not in (2, 3) or not address:
        raise Unknown(f"the shim speaks {protocol} of version {version} at {address!r}: ttrpc of 2 or 3 is served")
    return {"version": version, "address": address.removeprefix("unix://"), "protocol": protocol}


def _options(bundle: Bundle, options: Mapping[str, Any]) -> dict[int, Any]:
    """The runtime's options as an Any: runc's own message for its shim, the general one for all others."""
    if "-runc-" not in Path(bundle.binary).name:
        general = {1: options.get("type_url"), 2: options.get("config_path"), 3: options.get("config_body")}
        return any_of("runtimeoptions.v1.Options", encode(general)) if options else {}
    known = {"Root": str(bundle.root.parent), **options}
    fields = {number: known[name] for name, number in _RUNC_OPTIONS.items() if known.get(name)}
    return any_of("containerd.runc.v1.Options", encode(fields))


def _mount(kind: str, source: str, target: str, options: Sequence[str]) -> dict[int, Any]:
    return {1: kind, 2: source, 3: target, 4: list(options)}


def _for_shims(stdio: Stdio) -> Stdio:
    """In words that runc's shim understands.

    `file://` becomes the path of a plain file that is there: given the scheme, it puts both streams into one file. And
    it takes "" for all streams or for none.
    """
    plain = {name: _plain(getattr(stdio, name)) for name in ("stdin", "stdout", "stderr")}
    if plain["stdin"] and plain["stdout"].startswith("binary://") and not stdio.terminal:
        raise Unimplemented("runc's shim gives a process that has a logger, or logs, a stdin only with a terminal")
    if any(plain.values()) and not stdio.terminal:
        plain |= {name: plain[name] or os.devnull for name in ("stdout", "stderr")}
    return stdio.model_copy(update=plain)


def _plain(uri: str) -> str:
    scheme, separator, path = uri.partition("://")
    if not separator or scheme in ("binary", "fifo"):
        return uri
    if scheme == uris.LOG:
        found = uris.parse(uri)
        return logwriter.uri(found.path, *uris.log_limits(found.query))
    if scheme != "file":
        raise Unimplemented(f"stdio {scheme}:// is not for shims: FIFOs, file://, log:// and binary:// are")
    try:
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600))
    except OSError as e:
        raise FailedPrecondition(f"stdio {uri}: {e.strerror}") from None
    return path


def _write(path: Path, words: str) -> None:
    path.write_text(words)

"""Stream processors: programs that turn a layer of a foreign media type into one that is known (containerd's idea).

A processor accepts media types and returns one; processors are chained until the layer is of a type that `decompress`
knows. Each reads the layer on stdin and writes what it made of it to stdout; its exit status 0 says that all of it is
right. It finds the media type in STREAM_PROCESSOR_MEDIATYPE, and where the caller gave a payload for it, that on the
descriptor that STREAM_PROCESSOR_PIPE names, as the ones written for containerd expect.

The file of settings is TOML, a table for each processor under its id:

    [processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
    accepts = ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]
    returns = "application/vnd.oci.image.layer.v1.tar+gzip"
    path = "ctd-decoder"
    args = ["--decryption-keys-path", "/etc/wherry/keys"]
    env = ["OCICRYPT_KEYPROVIDER_CONFIG=/etc/wherry/ocicrypt.conf"]
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from wherry_shared.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, Unimplemented, Unknown

from .decompress import MEDIA_TYPES
from .names import show

CHAIN_MAX = 8
_STDERR_MAX = 4 << 10  # bytes of it that are kept
_PAYLOAD_MAX = 512 << 10
_PATIENCE = 10.0  # seconds for a processor to end after its output did
# How one ends, or a shell around it, whose output nobody reads any more: that is not what went wrong.
_NOBODY_READ = (-signal.SIGPIPE, 128 + signal.SIGPIPE)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Processor:
    """One processor of the settings."""

    id: str
    accepts: tuple[str, ...]
    returns: str
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


def load(path: Path) -> tuple[Processor, ...]:
    """The processors of a file of settings. FailedPrecondition: it cannot be read, or says what it should not."""
    try:
        tables = tomllib.loads(path.read_text()).get("processors", {})
        return tuple(_parse(id_, table) for id_, table in tables.items())
    except (OSError, ValueError, AttributeError) as e:
        raise FailedPrecondition(f"stream processors of {path}: {e}") from None


def _parse(id_: str, table: Mapping[str, object]) -> Processor:
    unknown = table.keys() - {"accepts", "returns", "path", "args", "env"}
    if unknown:
        raise ValueError(f"{id_}: unknown setting {sorted(unknown)[0]!r}")
    lists = {key: table.get(key, []) for key in ("accepts", "args", "env")}
    texts = {key: table.get(key) for key in ("returns", "path")}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{id_}: {key} is not a list of strings")
    for key, text in texts.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{id_}: {key} is missing")
    if not lists["accepts"]:
        raise ValueError(f"{id_}: accepts is missing")
    accepts, args, env = (tuple(cast(list[str], lists[key])) for key in ("accepts", "args", "env"))
    return Processor(id_, accepts, str(texts["returns"]), str(texts["path"]), args, env)


def chain(media_type: str, processors: Sequence[Processor]) -> list[Processor]:
    """The processors that a layer goes through, first to last; none for a type that is known.

    Unimplemented: no chain of at most CHAIN_MAX leads from this type to a known one.
    """
    found: list[Processor] = []
    at = media_type
    while at not in MEDIA_TYPES:
        nearest = next((p for p in processors if at in p.accepts), None)
        if nearest is None or len(found) >= CHAIN_MAX:
            raise Unimplemented(f"layers of the media type {media_type!r} cannot be applied")
        found.append(nearest)
        at = nearest.returns
    return found


@contextmanager
def processed(
    source: BinaryIO, media_type: str, steps: Sequence[Processor], payloads: Mapping[str, bytes], deadline: float
) -> Iterator[BinaryIO]:
    """What the last of `steps` makes of the layer in `source`, to be read to its end.

    At the end every processor has ended; what they say counts, however the block ended. Unknown: one failed (with the
    end of its stderr). FailedPrecondition: one cannot be started. DeadlineExceeded: `deadline` (unix time) passed.
    """
    running: list[_Running] = []
    timer = _Timer(deadline, running)
    try:
        at, kind = source, media_type
        for step in steps:
            running.append(_Running(step, at, kind, payloads.get(step.id)))
            if at is not source:
                at.close()  # the next one's alone now, or the one before would never see it go
            at, kind = running[-1].stdout, step.returns
        timer.start()
        try:
            yield at
        except Exception as error:
            at.close()
            _settle(running, timer, error)
            raise
        _settle(running, timer, None)
    finally:
        timer.stop()
        for each in running:
            each.end()


def _settle(running: Sequence[_Running], timer: _Timer, error: Exception | None) -> None:
    """Wait for all and raise for the first that failed, where that is not only due to who stopped reading from it."""
    give_up = time.monotonic() + _PATIENCE
    statuses = [each.wait(give_up) for each in running]
    if timer.fired:
        raise DeadlineExceeded("the stream processors were not done by the deadline") from error
    for each, status in zip(running, statuses, strict=True):
        if status and not (error is not None and status in _NOBODY_READ):
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise Unknown(f"the stream processor {each.name} ended with {how}: {each.said()}") from error


class _Timer:
    """Kills the processors when the deadline passes."""

    def __init__(self, deadline: float, running: list[_Running]) -> None:
        self.fired = False
        self._running = running
        self._timer = threading.Timer(max(0.0, deadline - time.time()), self._fire) if deadline else None

    def start(self) -> None:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self.fired = True
        for each in self._running:
            each.kill()


class _Running:
    """One processor at work, in a process group of its own."""

    def __init__(self, step: Processor, source: BinaryIO, media_type: str, payload: bytes | None) -> None:
        self.name = step.id
        environment = {"PATH": _PATH} | dict(item.partition("=")[::2] for item in step.env)
        environment["STREAM_PROCESSOR_MEDIATYPE"] = media_type
        kept: tuple[int, ...] = ()
        if payload is not None:
            kept = (_payload(payload, step.id),)
            environment["STREAM_PROCESSOR_PIPE"] = f"/proc/self/fd/{kept[0]}"
        try:
            self._process = subprocess.Popen(
                [step.path, *step.args], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
                pass_fds=kept, cwd="/", process_group=0, restore_signals=True, bufsize=0,
            )  # fmt: skip
        except OSError as e:
            raise FailedPrecondition(f"the stream processor {step.id}: {step.path}: {e.strerror}") from None
        finally:
            for fd in kept:
                os.close(fd)
        self.stdout = cast(BinaryIO, self._process.stdout)
        self._stderr = cast(BinaryIO, self._process.stderr)
        self._said = b""
        self._listener = threading.Thread(target=self._listen, name="wherry-processor", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        while piece := os.read(self._stderr.fileno(), 1 << 16):
            self._said = (self._said + piece)[-_STDERR_MAX:]

    def said(self) -> str:
        """The end of what it wrote to stderr, printable; it has ended."""
        self._listener.join(1.0)
        return show(self._said.strip())

    def wait(self, give_up: float) -> int:
        """Its exit status; one that does not end by `give_up` (monotonic) is killed."""
        try:
            return self._process.wait(max(0.0, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()

    def kill(self) -> None:
        """Kill it and what it started."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Leave nothing of it."""
        self.kill()
        self._process.wait()
        self.stdout.close()
        self._listener.join(1.0)
        if not self._listener.is_alive():
            self._stderr.close()


def _payload(payload: bytes, name: str) -> int:
    """A descriptor that the payload can be read from. InvalidArgument: it is too long."""
    if len(payload) > _PAYLOAD_MAX:
        raise InvalidArgument(f"the payload for {name} has {len(payload)} bytes, {_PAYLOAD_MAX} are allowed")
    fd = os.memfd_create("payload", 0)
    os.write(fd, payload)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd

"""What goes in and out of a container over the bus, through the task service's proxy, with real containers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from housebus import PATIENCE
from task_house import RUNTIMES, SH, SHIM, House, exec_of, gate, house_of
from wherry.stdio import Stdio as ClientStdio
from wherry.streaming import Streaming
from wherry_shared.api.task import Output, Stdio
from wherry_shared.bus import Bus
from wherry_shared.context import Identity
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented
from wherry_task import runtimes
from wherry_task.stdio import logfile, outlet, rights

BUS = Stdio(stdin="bus://", stdout="bus://", stderr="bus://")
OUT = Stdio(stdout="bus://", stderr="bus://")
LOG = Stdio(stdout="log://", stderr="log://")

pytestmark = pytest.mark.skipif(not runtimes.installed(), reason="no OCI runtime")


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    runtime = "crun" if shutil.which("crun", path=runtimes.PATH) else "runc"
    async with house_of(bus, tmp_path, runtime) as made:
        (made.rootfs / "bin/seq").symlink_to("busybox")
        (made.rootfs / "bin/head").symlink_to("busybox")
        (made.rootfs / "bin/tr").symlink_to("busybox")
        yield made


class Reading:
    """A reader of a process's output: what it got, and what it was told to have missed."""

    def __init__(self, house: House, id: str, exec_id: str = "", after: str = "start") -> None:
        self.house, self.id, self.exec_id, self.after = house, id, exec_id, after
        self.out, self.err, self.lost = b"", b"", 0

    async def once(self, patience: float = 5.0) -> Output:
        got = await self.house.tasks.output(self.id, self.exec_id, self.after, patience)
        self.after = got.next
        self.out += got.stdout
        self.err += got.stderr
        self.lost += got.lost_stdout + got.lost_stderr
        return got

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(PATIENCE):
            while text not in self.out:
                await self.once()

    async def to_the_end(self) -> Reading:
        async with asyncio.timeout(60):
            while not (await self.once()).ended:
                pass
        return self


async def test_output_comes_over_the_bus(house: House) -> None:
    id = await house.created(*SH, "echo out; echo err >&2; exit 3", stdio=OUT)
    assert (await house.tasks.get(id)).stdio == OUT
    reader = Reading(house, id)
    assert not (await reader.once(patience=0)).ended
    await house.tasks.start(id)
    await reader.to_the_end()
    assert (reader.out, reader.err, reader.lost) == (b"out\n", b"err\n", 0)
    assert await house.exit(id) == 3
    # Whoever asks once more for the same gets the same.
    again = Reading(house, id, after="start")
    assert (await again.to_the_end()).out == b"out\n"
    await house.tasks.delete(id)
    with pytest.raises(NotFound):
        await house.tasks.output(id)


async def test_input_is_taken_once(house: House) -> None:
    id = await house.running("/bin/cat", stdio=BUS)
    reader = Reading(house, id)
    assert (await house.tasks.input(id, "w", 0, b"hello ")).total == 6
    assert (await house.tasks.input(id, "w", 0, b"hello ")).total == 6
    assert (await house.tasks.input(id, "w", 3, b"lo world\n")).total == 12
    await reader.until(b"hello world\n")
    # Somebody else's bytes have offsets of their own; a hole is not filled.
    assert (await house.tasks.input(id, "other", 0, b"mine\n")).total == 5
    assert (await house.tasks.input(id, "w", 100, b"beyond")).total == 12
    assert (await house.tasks.input(id, "w", 12, b"", eof=True)).total == 12
    await reader.to_the_end()
    assert reader.out == b"hello world\nmine\n"
    assert await house.exit(id) == 0
    with pytest.raises(FailedPrecondition, match="stopped"):
        await house.tasks.input(id, "w", 12, b"late")


async def test_exec_over_the_bus(house: House) -> None:
    id = await house.running("/bin/sleep", "1000")
    await house.tasks.exec(id, "e", exec_of("cat"), BUS)
    with pytest.raises(FailedPrecondition, match="not running"):
        await house.tasks.input(id, "w", 0, b"early", "e")
    await house.tasks.start(id, "e")
    await house.tasks.input(id, "w", 0, b"text", "e", eof=True)
    assert (await Reading(house, id, "e").to_the_end()).out == b"text"
    assert await house.exit(id, "e") == 0
    await house.tasks.delete(id, "e")
    await house.tasks.exec(id, "never", exec_of("true"), OUT)
    assert (await house.tasks.output(id, "never", patience=0)).next
    await house.tasks.delete(id, "never")
    with pytest.raises(FailedPrecondition, match="nowhere"):
        await house.tasks.output(id)
    io = house.state / "tasks" / "default" / id / "io"
    assert list(io.iterdir()) == []


async def test_a_terminal(house: House) -> None:
    stdio = Stdio(stdin="bus://", stdout="bus://", terminal=True)
    id = await house.running("/bin/sleep", "1000")
    await house.tasks.exec(id, "t", exec_of("sh", terminal=True), stdio)
    await house.tasks.start(id, "t")
    await house.tasks.resize(id, 77, 33, "t")
    reader = Reading(house, id, "t")
    await house.tasks.input(id, "w", 0, b"echo a''b\n", "t")
    await reader.until(b"ab\r\n")
    await house.tasks.input(id, "w", 10, b"exit 4\n", "t")
    await reader.to_the_end()
    assert await house.exit(id, "t") == 4


async def test_several_read_at_once_and_a_late_one_from_now_on(house: House) -> None:
    id = await house.running("/bin/cat", stdio=BUS)
    first, second = Reading(house, id), Reading(house, id)
    await house.tasks.input(id, "w", 0, b"one\n")
    await asyncio.gather(first.until(b"one\n"), second.until(b"one\n"))
    late = Reading(house, id, after="")
    await late.once(patience=0)
    await house.tasks.input(id, "w", 4, b"two\n", eof=True)
    await asyncio.gather(first.to_the_end(), second.to_the_end(), late.to_the_end())
    assert first.out == second.out == b"one\ntwo\n" and late.out == b"two\n"


async def test_the_slowest_reader_holds_the_process_back(house: House) -> None:
    """No byte is lost to a reader that comes back in time, and the process waits for it."""
    id = await house.running(*SH, "head -c 8000000 /dev/zero | tr '\\0' x; echo done >&2", stdio=OUT)
    slow, quick = Reading(house, id), Reading(house, id)
    await asyncio.gather(slow.once(), quick.once())
    for _ in range(20):
        await quick.once(patience=0.05)
    assert len(quick.out) < 4_000_000
    assert house.supervisor.task("default", id).process("").row.status == "running"
    await asyncio.gather(slow.to_the_end(), quick.to_the_end())
    assert len(slow.out) == len(quick.out) == 8_000_000 and slow.lost == quick.lost == 0


async def test_who_stays_away_is_told_what_is_lost(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "READER_SECONDS", 0.3)
    monkeypatch.setattr("wherry_task.stdio.streams.PRUNE_SECONDS", 0.1)
    size = 8_000_000
    id = await house.running(*SH, f"echo begin; sleep 0.3; head -c {size} /dev/zero; sleep 1000", stdio=OUT)
    away = Reading(house, id)
    await away.until(b"begin\n")
    spool = house.state / "tasks" / "default" / id / "io" / "init" / "stdout.spool"
    async with asyncio.timeout(PATIENCE):
        while spool.stat().st_size < size + 6:
            await asyncio.sleep(0.05)
    async with asyncio.timeout(PATIENCE):
        while len(away.out) + away.lost < size + 6:
            await away.once()
    assert away.lost > 0 and len(away.out) < 2_000_000 and len(away.out) + away.lost == size + 6


async def test_where_bytes_are_missing_a_client_writes_how_many(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shows the output is stopped for longer than the process waits."""
    monkeypatch.setattr(outlet, "READER_SECONDS", 0.3)
    monkeypatch.setattr("wherry_task.stdio.streams.PRUNE_SECONDS", 0.1)
    size = 4_000_000
    id = await house.created(*SH, f"echo begin; sleep 0.3; head -c {size} /dev/zero; echo end", stdio=OUT)
    ours, theirs = os.pipe()
    client: Any = SimpleNamespace(tasks=house.tasks)
    streams = Streaming(client, id, "", ClientStdio(None, theirs, None))
    streams.begin()
    await house.tasks.start(id)
    streams.started()
    assert await house.exit(id) == 0  # although nobody takes what is in the pipe
    monkeypatch.setattr(outlet, "READER_SECONDS", 10.0 * PATIENCE)  # that one time is enough
    shown = asyncio.create_task(asyncio.to_thread(_all_of, ours))
    await streams.drained()
    streams.close()
    os.close(theirs)
    before, lost, after = re.split(rb"\[(\d+) bytes lost\]\r\n", await shown)
    assert before.startswith(b"begin\n") and after.endswith(b"end\n")
    assert len(before) + int(lost) + len(after) == size + 10


def _all_of(fd: int) -> bytes:
    with open(fd, "rb") as pipe:
        return pipe.read()


async def test_nobody_reads_and_little_is_kept(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "READER_SECONDS", 0.1)
    monkeypatch.setattr("wherry_task.stdio.streams.PRUNE_SECONDS", 0.1)
    id = await house.running(*SH, "head -c 30000000 /dev/zero", stdio=OUT)
    assert await house.exit(id) == 0
    spool = house.state / "tasks" / "default" / id / "io" / "init" / "stdout.spool"
    async with asyncio.timeout(PATIENCE):  # what was in the pipe as it ended is still on its way
        while (now := spool.stat()).st_size < 30_000_000 or now.st_blocks * 512 >= 1 << 20:
            await asyncio.sleep(0.05)
    assert now.st_size == 30_000_000


async def test_a_restart_of_the_service_loses_and_repeats_nothing(house: House) -> None:
    size = 6_000_000
    script = f"head -c {size} /dev/urandom > /tmp/x; cat /tmp/x; cat; echo; cat /tmp/x >&2"
    mounts = [{"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}]
    id = await house.container(*SH, script)
    record = await house.containers.get(id)
    assert record.spec is not None
    record.spec["mounts"] = [*record.spec["mounts"], *mounts]
    await house.containers.update(record, ["spec"])
    await house.tasks.create(id, house.mounts, BUS)
    await house.tasks.start(id)
    reader = Reading(house, id)
    while len(reader.out) < size // 3:
        await reader.once()
    await house.stop_tasks()
    await house.start_tasks()
    while len(reader.out) < size:
        await reader.once()
    assert (await house.tasks.input(id, "w", 0, b"in")).total == 2
    await house.stop_tasks()
    await house.start_tasks()
    assert (await house.tasks.input(id, "w", 0, b"in")).total == 2
    await house.tasks.input(id, "w", 2, b"put", eof=True)
    await reader.to_the_end()
    written = reader.out[:size]
    assert reader.out == written + b"input\n" and reader.lost == 0
    assert hashlib.sha256(reader.err).digest() == hashlib.sha256(written).digest()
    # It has ended, and a service that begins only now knows the end of its output, too.
    await house.exit(id)
    await house.stop_tasks()
    await house.start_tasks()
    late = await house.tasks.output(id, "", reader.after)
    assert late.ended and not late.stdout


async def test_what_is_not_read_survives_the_deletion(house: House) -> None:
    id = await house.running(*SH, "head -c 3000000 /dev/zero", stdio=OUT)
    reader = Reading(house, id)
    await reader.once()
    task = asyncio.create_task(house.tasks.delete(id, force=True))
    await task
    with contextlib.suppress(NotFound):
        await reader.to_the_end()
    assert reader.lost == 0
    with pytest.raises(NotFound):
        await house.tasks.output(id)


async def test_places_are_checked(house: House) -> None:
    id = await house.running("/bin/sleep", "1000", stdio=OUT)
    place = (await house.tasks.output(id, patience=0)).next
    epoch, name, *_ = place.split(".")
    mine = f"{epoch}.{name}"
    for wrong in ("x", f"{mine}.0", f"{mine}.0.x", f"{mine}.0.99", f"{mine}.-1.0", "." * 5):
        with pytest.raises(InvalidArgument):
            await house.tasks.output(id, "", wrong)
    with pytest.raises(NotFound, match="gone"):
        await house.tasks.output(id, "", f"00000000.{name}.0.0")
    with pytest.raises(InvalidArgument):
        await house.tasks.input(id, "w w", 0, b"x")
    with pytest.raises(FailedPrecondition, match="no stdin"):
        await house.tasks.input(id, "w", 0, b"x")


async def test_readers_that_vanish_leave_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlet, "READER_SECONDS", 0.2)
    monkeypatch.setattr("wherry_task.stdio.streams.PRUNE_SECONDS", 0.1)
    id = await house.running("/bin/sleep", "1000", stdio=OUT)
    carried = house.supervisor.streams.of(("default", id, ""))
    assert carried.outlet is not None
    async with asyncio.timeout(PATIENCE):
        while house.oci._spare is None:  # the next monitor is forked a moment after a creation
            await asyncio.sleep(0.01)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        polls = [asyncio.create_task(house.tasks.output(id, patience=0.1)) for _ in range(50)]
        await asyncio.sleep(0)
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
    async with asyncio.timeout(PATIENCE):
        while carried.outlet.readers or carried.outlet.waiting:
            await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= files


async def test_a_logger_of_the_nodes(house: House, tmp_path: Path) -> None:
    """`binary://`: both outputs, what it is told, and its end with the container's last word."""
    house.service._loggers = [str(tmp_path)]
    program = tmp_path / "logger"
    program.write_text(
        '#!/bin/sh\nexec 5>&-; echo "$CONTAINER_NAMESPACE/$CONTAINER_ID $1" >"$2.about"\n'
        'cat <&3 >"$2.out" & cat <&4 >"$2.err"; wait\n'
    )
    program.chmod(0o755)
    uri = f"binary://{program}?a%20b={tmp_path}/log"
    stdio = Stdio(stdin="bus://", stdout=uri, stderr=uri)
    id = await house.running(*SH, "echo out; cat; echo err >&2", stdio=stdio)
    await house.tasks.input(id, "w", 0, b"in\n", eof=True)
    assert await house.exit(id) == 0
    with pytest.raises(FailedPrecondition, match="nobody else can attach"):
        await house.tasks.output(id)
    await house.tasks.delete(id)
    assert (tmp_path / "log.about").read_text() == f"default/{id} a b\n"
    assert (tmp_path / "log.out").read_bytes() == b"out\nin\n"
    assert (tmp_path / "log.err").read_bytes() == b"err\n"
    outside = f"binary://{shutil.copy(program, tmp_path.parent / f'{tmp_path.name}-logger')}"
    for wrong in (outside, f"binary://{tmp_path}/../{tmp_path.name}/logger", f"binary://{tmp_path}/no/logger"):
        with pytest.raises(PermissionDenied, match="not in a directory"):
            await house.created("/bin/true", stdio=Stdio(stdout=wrong))
    (tmp_path / "link").symlink_to(outside.removeprefix("binary://"))
    with pytest.raises(PermissionDenied, match="not a program"):
        await house.created("/bin/true", stdio=Stdio(stdout=f"binary://{tmp_path}/link"))
    with pytest.raises(NotFound, match="nosuch"):
        await house.created("/bin/true", stdio=Stdio(stdout=f"binary://{tmp_path}/nosuch"))


TENANT = Identity("tenant-mine", "tenant", "mine")


@pytest.mark.parametrize(
    "uri",
    [
        "/run/node/fifo/theirs:c-1/stdout", "/run/node/fifo/stdout", "/run/node/fifo/mine:c-1/deeper/stdout",
        "/run/node/fifo/mine:c-1/../theirs:c-1/stdout", "/run/node/task/stdout", "/etc/passwd", "file:///etc/passwd",
        "file:///run/node/fifo/mine:c-1/stdout", "binary:///allowed/logger", "log:///var/log/x", "log://?max_size=0",
        "log://?max_files=1000",
    ],
)  # fmt: skip
def test_what_a_tenant_may_not_name(uri: str) -> None:
    with pytest.raises(PermissionDenied):
        rights.check(TENANT, "mine", Stdio(stdout=uri), Path("/run/node"), ["/allowed"])
    for fine in ("/run/node/fifo/mine:c-1/stdout", "log://?max_size=8192&max_files=2", "bus://", ""):
        rights.check(TENANT, "mine", Stdio(stdout=fine), Path("/run/node"), ["/allowed"])


@pytest.mark.parametrize(
    ("stdio", "error"),
    [
        (Stdio(stdin="log://"), InvalidArgument),
        (Stdio(stdout="bus://x"), InvalidArgument),
        (Stdio(stdout="bus://", stderr="log://"), InvalidArgument),
        (Stdio(stdout="log://?max_size=5000", stderr="log://"), InvalidArgument),
        (Stdio(stdout="log://?max_size=x"), InvalidArgument),
        (Stdio(stdout="log://?colour=red"), InvalidArgument),
        (Stdio(stdout="nosuch:///x"), Unimplemented),
        (Stdio(stdout="binary:///bin/sh"), PermissionDenied),
        (Stdio(stdout="relative"), PermissionDenied),
        (Stdio(stdout="file:///a/../b"), PermissionDenied),
    ],
)
async def test_streams_that_are_refused(house: House, stdio: Stdio, error: type[Exception]) -> None:
    id = await house.container("/bin/true")
    with pytest.raises(error):
        await house.tasks.create(id, house.mounts, stdio)
    with pytest.raises(NotFound):
        await house.tasks.get(id)


# ---- logs


def lines_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Stream and text of whole lines."""
    return [(line.split(b" ", 3)[1], line.split(b" ", 3)[3]) for line in data.splitlines()]


async def all_logs(house: House, id: str, **options: Any) -> bytes:
    after, found = "", b""
    while True:
        window = await house.tasks.logs(id, after, **options)
        found, after = found + window.lines, window.next
        if window.ended or not window.lines:
            return found


async def at_gates(house: House, id: str) -> None:
    """Open two, each when there is one more line in the log: the streams of a process have no order among them."""
    async with asyncio.timeout(PATIENCE):
        for number in (1, 2):
            while (await house.tasks.logs(id, patience=0.05)).lines.count(b"\n") < number:
                pass
            house.open_gate(number)


async def test_a_log(house: House) -> None:
    id = await house.running(*SH, f"echo one; {gate(1)}; echo two >&2; {gate(2)}; echo -n three", stdio=LOG)
    await at_gates(house, id)
    assert await house.exit(id) == 0
    wanted = [(b"stdout", b"one"), (b"stderr", b"two"), (b"stdout", b"three")]
    async with asyncio.timeout(PATIENCE):
        while (window := await house.tasks.logs(id, patience=5.0)).lines.count(b"\n") < 3:
            pass
    assert lines_of(window.lines) == wanted
    assert (await house.tasks.logs(id, window.next, patience=5.0)).ended
    assert lines_of(await all_logs(house, id, tail=1)) == wanted[2:]
    assert lines_of(await all_logs(house, id, tail=2)) == wanted[1:]
    assert lines_of(await all_logs(house, id, tail=0)) == []
    assert lines_of(await all_logs(house, id, tail=100)) == wanted
    # The log is the container's: it stays without the task, goes on with the next, and ends with the container.
    await house.tasks.delete(id)
    assert lines_of(await all_logs(house, id)) == wanted
    await house.tasks.create(id, house.mounts, LOG)
    await house.tasks.start(id)
    await house.exit(id)
    await house.tasks.delete(id)
    assert lines_of(await all_logs(house, id)) == wanted * 2
    record = await house.containers.get(id)
    await house.containers.delete(id)
    with pytest.raises(NotFound):
        await house.tasks.logs(id)
    await house.containers.create(record)
    with pytest.raises(FailedPrecondition, match="no log"):
        await house.tasks.logs(id)


async def test_others_have_their_turn_while_the_end_of_a_long_log_is_looked_for(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logs --tail 1000000` of a tenant's 5 GiB had the service answer nobody for half a minute."""
    monkeypatch.setattr(logfile, "_TURN", 10)
    id = await house.running(*SH, "seq 2000; exec sleep 1000", stdio=LOG)
    async with asyncio.timeout(PATIENCE):
        while not (await all_logs(house, id)).endswith(b" stdout F 2000\n"):
            await asyncio.sleep(0.01)
    streams, born, turns = house.supervisor.streams, (await house.containers.get(id)).created_at, 0
    look = asyncio.create_task(streams.logs("default", id, born, "", None, None, 1000, 0.0))
    while not look.done():
        turns += 1
        await asyncio.sleep(0)
    assert look.result().lines.startswith(b"20") and look.result().lines.count(b"\n") == 1000
    assert turns >= 100


async def test_a_log_is_followed_across_rotations(house: House) -> None:
    stdio = Stdio(stdout="log://?max_size=20000&max_files=20", stderr="log://?max_size=20000&max_files=20")
    id = await house.running(*SH, "for i in $(seq 1 200); do seq 1 20; sleep 0.005; done", stdio=stdio)
    after, found = "", b""
    async with asyncio.timeout(60):
        while not (window := await house.tasks.logs(id, after, patience=5.0)).ended:
            assert not window.gap
            found, after = found + window.lines, window.next
    numbers = [int(text) for _, text in lines_of(found)]
    assert numbers == list(range(1, 21)) * 200
    files = os.listdir(house.root / "logs" / "default" / id)
    assert len([name for name in files if name.startswith("log.")]) > 3
    # Since and until, on both sides of a rotation.
    times = [line.split(b" ")[0].decode() for line in found.splitlines()]
    for at in (0, 1000, 3999):
        moment = times[at][:26]
        when = datetime.fromisoformat(moment + "+00:00")
        assert (await all_logs(house, id, since=when)).count(b"\n") == sum(time >= moment + "000Z" for time in times)
        assert (await all_logs(house, id, until=when)).count(b"\n") == sum(time <= moment + "000Z" for time in times)
    assert lines_of(await all_logs(house, id, tail=1500)) == lines_of(found)[-1500:]


async def test_who_is_too_slow_for_a_log_is_told(house: House) -> None:
    stdio = Stdio(stdout="log://?max_size=4096&max_files=2", stderr="log://?max_size=4096&max_files=2")
    id = await house.running(*SH, "echo first; cat; seq 1 1000", stdio=stdio.model_copy(update={"stdin": "bus://"}))
    window = await house.tasks.logs(id, patience=5.0)
    assert b"first" in window.lines
    await house.tasks.input(id, "w", 0, b"", eof=True)
    await house.exit(id)
    async with asyncio.timeout(PATIENCE):
        while b" 1000\n" not in (await house.tasks.logs(id, tail=1)).lines:
            await asyncio.sleep(0.02)
    window = await house.tasks.logs(id, window.next)
    assert window.gap and window.lines
    assert lines_of(await all_logs(house, id, tail=3)) == [(b"stdout", str(n).encode()) for n in (998, 999, 1000)]


async def test_attaching_to_a_container_that_logs(house: House) -> None:
    """Its log is its output, byte by byte, also what has no line's end yet."""
    stdio = LOG.model_copy(update={"stdin": "bus://"})
    id = await house.running(*SH, "echo before; cat; echo -n end >&2", stdio=stdio)
    async with asyncio.timeout(PATIENCE):
        while b"before" not in (await house.tasks.logs(id, patience=5.0)).lines:
            pass
    reader, other = Reading(house, id, after=""), Reading(house, id, after="")
    await asyncio.gather(reader.once(0), other.once(0))
    await house.tasks.input(id, "w", 0, b"prompt> ")
    await asyncio.gather(reader.until(b"prompt> "), other.until(b"prompt> "))
    await house.tasks.input(id, "w", 8, b"more\n", eof=True)
    await asyncio.gather(reader.to_the_end(), other.to_the_end())
    assert reader.out == other.out == b"prompt> more\n" and reader.err == b"end"


@pytest.mark.skipif(SHIM not in RUNTIMES, reason="no shim v2 is installed")
async def test_the_log_of_a_shim_v2(bus: Bus, tmp_path: Path) -> None:
    """A log writer of its own writes it, as the monitor would."""
    async with house_of(bus, tmp_path, SHIM) as house:
        wanted = [(b"stdout", b"out"), (b"stderr", b"err"), (b"stdout", b"end")]
        script = f"echo out; {gate(1)}; echo err >&2; {gate(2)}; echo -n end"
        id = await house.running(*SH, script, stdio=LOG)
        await at_gates(house, id)
        assert await house.exit(id) == 0
        assert await followed(house, id) == wanted
        await house.tasks.delete(id)
        assert lines_of(await all_logs(house, id)) == wanted
        terminal = Stdio(stdin="bus://", stdout="log://", terminal=True)
        record = await house.containers.get(await house.container("/bin/cat"))
        assert record.spec is not None
        record.spec["process"]["terminal"] = True
        await house.containers.update(record, ["spec"])
        await house.tasks.create(record.id, house.mounts, terminal)
        await house.tasks.start(record.id)
        await house.tasks.input(record.id, "w", 0, b"in\n\x04")
        assert await house.exit(record.id) == 0
        assert await followed(house, record.id) == [(b"stdout", b"in")] * 2  # its echo, and it
        with pytest.raises(Unimplemented, match="only with a terminal"):
            await house.created("/bin/cat", stdio=LOG.model_copy(update={"stdin": "bus://"}))


async def followed(house: House, id: str) -> list[tuple[bytes, bytes]]:
    """What a log has, up to its end."""
    after, found = "", b""
    async with asyncio.timeout(PATIENCE):
        while not (window := await house.tasks.logs(id, after, patience=5.0)).ended:
            found, after = found + window.lines, window.next
    return lines_of(found)


async def test_a_follower_reads_on_when_the_container_is_removed(house: House) -> None:
    id = await house.running("/bin/echo", "last words", stdio=LOG)
    await house.exit(id)
    await house.tasks.delete(id)
    begin = f"{'0' * 30}@0"
    await house.containers.delete(id)
    assert b"last words" in (await house.tasks.logs(id, begin)).lines
    assert await house.service.sweep_logs() == 1
    with pytest.raises(FailedPrecondition):
        await house.tasks.logs(id, begin)


async def test_logs_of_containers_that_are_gone_are_swept(house: House) -> None:
    kept, gone = await house.running("/bin/echo", stdio=LOG), await house.running("/bin/echo", stdio=LOG)
    for id in (kept, gone):
        await house.exit(id)
        await house.tasks.delete(id)
    await house.containers.delete(gone)
    assert await house.service.sweep_logs() == 1
    assert os.listdir(house.root / "logs" / "default") == [kept]
    await house.containers.delete(kept)
    assert await house.service.sweep_logs() == 1
    assert os.listdir(house.root / "logs") == []


async def test_a_container_without_a_log(house: House) -> None:
    id = await house.running("/bin/sleep", "1000", stdio=OUT)
    with pytest.raises(FailedPrecondition, match="no log"):
        await house.tasks.logs(id)
    with pytest.raises(NotFound):
        await house.tasks.logs(f"nobody-{secrets.token_hex(3)}")
    with pytest.raises(InvalidArgument, match="place"):
        await house.tasks.logs(await house.running("/bin/true", stdio=LOG), "nonsense")
    await house.tasks.exec(id, "e", exec_of("true"), Stdio())
    with pytest.raises(InvalidArgument, match="first process"):
        await house.tasks.exec(id, "f", exec_of("true"), LOG)

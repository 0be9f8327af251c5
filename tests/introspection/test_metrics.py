"""What a service tells Prometheus, read by a client of the text format 0.0.4 that knows no more than its page says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from faults.half import Half
from housebus import PATIENCE
from wherry import Client
from wherry_shared.api.introspection import ServiceStatus
from wherry_shared.bus import Bus
from wherry_shared.contract import Contract, endpoint
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from wherry_shared.memory import MemoryTransport
from wherry_shared.metrics import CONTENT_TYPE, GUESTS_MAX, HEAD_MAX, Exporter
from wherry_shared.runtime import Settings, package_version

ABOUT = {"service": "image", "version": "0.1.0", "node": 'a "node"\\\n'}
LABELS = r'\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\}'
SAMPLE = re.compile(rf"([a-z_:][a-z0-9_:]*)(?:{LABELS})? (\S+)\Z")
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Counted(Contract, Protocol, service="image", version="1.0.0"):
    """Something to ask."""

    @endpoint(NotFound)
    async def look(self, name: str) -> str:
        """NotFound unless it is `there`."""
        ...

    @endpoint(waits=True)
    async def hold(self) -> None:
        """Wait until the test is over."""
        ...


class CountedService(Counted):
    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.held = 0

    async def look(self, name: str) -> str:
        if name != "there":
            raise NotFound(name)
        return name

    async def hold(self) -> None:
        self.held += 1
        await self.over.wait()


@pytest.fixture
async def bus() -> AsyncIterator[Bus]:
    made = Bus(MemoryTransport(), node="n1")
    yield made
    await made.close()


@pytest.fixture
async def exporter(bus: Bus) -> AsyncIterator[Exporter]:
    made = Exporter(bus, ABOUT)
    yield made
    await made.close()


async def ask(where: str, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n") -> tuple[int, Any, str]:
    """Status, headers, body."""
    if where.startswith("/"):
        reader, writer = await asyncio.open_unix_connection(where)
    else:
        host, _, port = where.removeprefix("http://").removesuffix("/metrics").rpartition(":")
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
    return int(first.split()[1]), headers, body.decode()


def parse(text: str) -> tuple[Samples, dict[str, str]]:
    """Samples by name and labels, and the type of each family; every sample belongs to the family above it."""
    samples: Samples = {}
    kinds: dict[str, str] = {}
    family = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert family not in kinds, "a family is told once"
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == family
            kinds[name] = kind
        else:
            match = SAMPLE.match(line)
            assert match, line
            assert match[1].removesuffix("_sum").removesuffix("_count") == family
            key = match[1], frozenset(LABEL.findall(match[2] or ""))
            assert key not in samples
            samples[key] = float(match[3])
    return samples, kinds


async def scrape(where: str) -> Samples:
    status, headers, body = await ask(where)
    assert status == 200
    assert headers["content-type"] == CONTENT_TYPE
    assert int(headers["content-length"]) == len(body.encode())
    return parse(body)[0]


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


async def test_requests_are_told_by_operation_and_code(bus: Bus, exporter: Exporter) -> None:
    service = CountedService()
    await bus.serve(service)
    where = await exporter.open("127.0.0.1:0")
    counted = bus.proxy(Counted, namespace="default")
    for name in ("there", "there", "away"):
        try:
            await counted.look(name)
        except NotFound:
            continue
    await bus.transport.request("wherry.rpc.v1.n1.default.image.nothing", b"", timeout=5.0)
    holding = asyncio.create_task(counted.hold())
    async with asyncio.timeout(PATIENCE):
        while not service.held:
            await asyncio.sleep(0.001)
    found = await scrape(where)
    total = "wherry_requests_total"
    assert value(found, total, service="image", operation="look", code="OK") == 2
    assert value(found, total, service="image", operation="look", code="NotFound") == 1
    assert value(found, total, service="image", operation="hold", code="OK") == 0
    assert value(found, "wherry_requests_refused_total", service="image", code="Unimplemented") == 1
    assert value(found, "wherry_requests_in_hand", service="image", state="waiting") == 1
    assert value(found, "wherry_requests_in_hand", service="image", state="running") == 0
    seconds = "wherry_request_duration_seconds"
    assert value(found, f"{seconds}_count", service="image", operation="look") == 3
    assert 0 < value(found, f"{seconds}_sum", service="image", operation="look") < 60
    service.over.set()
    await holding


async def test_the_process_is_told_by_the_standard_names(exporter: Exporter) -> None:
    where = await exporter.open("127.0.0.1:0")
    found = await scrape(where)
    rss = value(found, "process_resident_memory_bytes")
    assert 0 < value(found, "wherry_process_proportional_memory_bytes") <= rss
    assert rss < value(found, "process_virtual_memory_bytes")
    open_now = len(os.listdir("/proc/self/fd"))
    assert abs(value(found, "process_open_fds") - open_now) < 8
    assert value(found, "process_max_fds") >= value(found, "process_open_fds")
    elapsed = float(subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True).stdout)
    assert value(found, "process_start_time_seconds") == pytest.approx(time.time() - elapsed, abs=5)
    assert value(found, "process_cpu_seconds_total") > 0
    assert value(found, "wherry_bus_connected") == 1
    about = frozenset({"service": "image", "version": "0.1.0", "node": 'a \\"node\\"\\\\\\n'}.items())
    assert found["wherry_build_info", about] == 1


async def test_names_follow_the_conventions(bus: Bus, exporter: Exporter) -> None:
    await bus.serve(CountedService())
    _, _, text = await ask(await exporter.open("127.0.0.1:0"))
    for name, kind in parse(text)[1].items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"(?:milli|micro|nano)|_(?:ms|ns|kib|mib)\b", name), "base units"
        assert name.startswith(("wherry_", "process_"))


async def test_on_a_socket_that_is_ours_alone(exporter: Exporter, bus: Bus, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    assert await exporter.open(str(path)) == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert value(await scrape(str(path)), "wherry_bus_connected") == 1
    with pytest.raises(FailedPrecondition, match="in use"):
        await Exporter(bus, ABOUT).open(str(path))
    await exporter.close()
    assert not path.exists()


async def test_a_socket_that_a_killed_process_left_is_replaced(bus: Bus, tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    left = await asyncio.create_subprocess_exec(
        "python3", "-c", "import socket,sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])", str(path)
    )
    await left.wait()
    assert path.exists()
    exporter = Exporter(bus, ABOUT)
    await exporter.open(str(path))
    await scrape(str(path))
    await exporter.close()


async def test_a_file_is_not_replaced(exporter: Exporter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FailedPrecondition, match="something else than a socket"):
        await exporter.open(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(FailedPrecondition, match="No such file"):
        await exporter.open(str(tmp_path / "nowhere" / "metrics.sock"))


async def test_a_port_that_is_taken(exporter: Exporter, bus: Bus) -> None:
    where = await exporter.open("[::1]:0")
    await scrape(where)
    with pytest.raises(FailedPrecondition, match="in use"):
        await Exporter(bus, ABOUT).open(where.removeprefix("http://").removesuffix("/metrics"))


@pytest.mark.parametrize("where", ["0.0.0.0:0", "[::]:0", "10.0.0.1:9100", "9100", "127.0.0.1", "127.0.0.1:x", "a:1",
                                   "127.0.0.1:65536", "relative/path", ""])  # fmt: skip
async def test_only_the_loopback(exporter: Exporter, where: str) -> None:
    with pytest.raises(InvalidArgument, match="loopback"):
        await exporter.open(where)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200), (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404), (b"GET /metrics/ HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405), (b"GET /metrics\r\n\r\n", 400), (b"\r\n\r\n", 400),
        (b"\xff\x00 nonsense\r\n\r\n", 400), (b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 2 * HEAD_MAX, 400),
    ],
)  # fmt: skip
async def test_other_requests(exporter: Exporter, request_: bytes, status: int) -> None:
    where = await exporter.open("127.0.0.1:0")
    found, headers, body = await ask(where, request_)
    assert found == status
    assert ("allow" in headers) == (status == 405)
    assert bool(body) == (not request_.startswith(b"HEAD"))


async def test_who_does_not_ask_does_not_keep_others_out(exporter: Exporter) -> None:
    """Silent connections are bounded, and one that ends makes room."""
    where = await exporter.open("127.0.0.1:0")
    port = int(where.rpartition(":")[2].partition("/")[0])
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(GUESTS_MAX)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await reader.read() == b""
    writer.close()
    silent[0][1].close()
    async with asyncio.timeout(PATIENCE):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionError):  # it was not noticed yet that there is room
                if (await reader.read()).startswith(b"HTTP/1.1 200 "):
                    break
            writer.close()
    writer.close()
    for _, other in silent:
        other.close()


async def test_a_process_tells_where_it_is_scraped(tmp_path: Path) -> None:
    """Two services as they are deployed: one on a port, one on a socket, which introspection names."""
    path = tmp_path / "image.sock"
    half = Half(tmp_path, services=("image", "introspection"))
    half.settings = {"image": (f"metrics={path}",), "introspection": ("metrics=127.0.0.1:0",)}
    with half:
        async with half.client() as client:
            services = await _both(client)
            assert services["image"].metrics == str(path)
            assert services["introspection"].metrics.startswith("http://127.0.0.1:")
            for name, told in services.items():
                assert told.package == package_version(f"wherry-{name}")
                found = await scrape(told.metrics)
                labels = {"service": name, "version": told.package, "node": client.address.node, "instance": told.id}
                assert value(found, "wherry_build_info", **labels) == 1
                assert value(found, "process_resident_memory_bytes") == pytest.approx(told.rss, rel=0.3)
            plugins = await client.introspection.plugins(["id==image"])
            assert plugins[0].exports["metrics"] == str(path)
            asked = value(await scrape(services["introspection"].metrics), "wherry_requests_total",
                          service="introspection", operation="plugins", code="OK")  # fmt: skip
            assert asked == 1
        half.kill("image", signal.SIGTERM)
        assert not path.exists()


async def _both(client: Client) -> dict[str, ServiceStatus]:
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(Unavailable):
                found = {s.name: s for s in await client.introspection.services()}
                if len(found) == 2:
                    return found
            await asyncio.sleep(0.05)


def test_a_service_that_may_not_listen_there_says_so(tmp_path: Path) -> None:
    half = Half(tmp_path, services=("image",))
    half.settings = {"image": ("metrics=0.0.0.0:9100",)}
    with half:
        assert half.processes["image"].wait(PATIENCE) == 1


def test_one_setting_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.parse("image", []).metrics == ""
    monkeypatch.setenv("WHERRY_METRICS", "127.0.0.1:0")
    assert Settings.parse("image", []).metrics == "127.0.0.1:0"
    monkeypatch.setenv("WHERRY_IMAGE_METRICS", "/own.sock")
    assert Settings.parse("image", []).metrics == "/own.sock"
    assert Settings.parse("image", ["--set", "metrics="]).metrics == ""

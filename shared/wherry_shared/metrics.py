"""A service's numbers for Prometheus: its text format 0.0.4 over HTTP, on a loopback port or a unix socket.

Off unless the setting `metrics` says where. Names follow prometheus.io/docs/practices/naming; `process_*` are the
standard ones of every Prometheus client.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from . import process
from .bus import Bus, sockets
from .bus.serve import Server
from .errors import FailedPrecondition, InvalidArgument

log = logging.getLogger("wherry.metrics")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
HEAD_MAX: Final = 8 << 10
GUESTS_MAX: Final = 16
SECONDS: Final = 5.0  # for a scrape, from its connection to its last byte
_REASONS: Final = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed"}

Labels = Mapping[str, str]
Samples = list[tuple[Labels, float]]


class Exporter:
    """Answers `GET /metrics` for what a bus serves."""

    def __init__(self, bus: Bus, about: Labels) -> None:
        """about: the labels of `wherry_build_info`."""
        self._bus = bus
        self._about = about
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._guests = 0

    async def open(self, where: str) -> str:
        """Listen on `HOST:PORT` (0: any free one) or on the socket `/path`; answers where, as a URL or a path.

        InvalidArgument: it is neither, or not a loopback address: nobody is asked who he is here.
        FailedPrecondition: it is in use, or cannot be listened on.
        """
        try:
            if where.startswith("/"):
                return await self._open_socket(Path(where))
            return await self._open_port(*_loopback(where))
        except OSError as e:
            raise FailedPrecondition(f"metrics on {where}: {e.strerror or e}") from None

    async def _open_port(self, host: str, port: int) -> str:
        self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_MAX)
        port = self._server.sockets[0].getsockname()[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    async def _open_socket(self, path: Path) -> str:
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise FailedPrecondition(f"metrics on {path}: something else than a socket is there")
            with suppress(ConnectionRefusedError):  # left by one that was killed
                sockets.connect(path).close()
                raise FailedPrecondition(f"metrics on {path}: it is in use")
        listener = sockets.listen(path, GUESTS_MAX)
        self._server, self._path = await asyncio.start_unix_server(self._serve, sock=listener, limit=HEAD_MAX), path
        return str(path)

    async def close(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._guests += 1
        try:
            async with asyncio.timeout(SECONDS):
                if self._guests <= GUESTS_MAX:
                    writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        except asyncio.LimitOverrunError:
            writer.write(_response(400, f"a request has at most {HEAD_MAX} bytes\n"))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as e:
            log.debug("a scrape was not finished: %r", e)
        finally:
            self._guests -= 1
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        """RFC 9112; the connection ends behind the answer."""
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, protocol = rest.partition(b" ")
        if not protocol.startswith(b"HTTP/1."):
            return _response(400, "this speaks HTTP/1.1\n")
        if target.partition(b"?")[0] != b"/metrics":
            return _response(404, "there is /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response(405, "GET it\n")
        return _response(200, render(self._bus, self._about), CONTENT_TYPE, body=method == b"GET")


def _loopback(where: str) -> tuple[str, int]:
    host, _, port = where.rpartition(":")
    host = host.strip("[]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or not address.is_loopback or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InvalidArgument(f"metrics {where!r}: a loopback address with a port (127.0.0.1:0) or an absolute path is")
    return str(address), int(port)


def _response(status: int, text: str, content_type: str = "text/plain; charset=utf-8", *, body: bool = True) -> bytes:
    data = text.encode()
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Type: {content_type}", f"Content-Length: {len(data)}",
        "Connection: close", *(["Allow: GET, HEAD"] if status == 405 else []), "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + (data if body else b"")


# ---- the text


def render(bus: Bus, about: Labels) -> str:
    """All that there is to tell, in the text format."""
    families = (*_requests(bus.servers), *_process(), *_house(bus, about))
    return "".join(f"{line}\n" for family in families for line in family)


def _requests(servers: Sequence[Server]) -> Iterator[Iterator[str]]:
    answered: Samples = []
    seconds: Samples = []
    counts: Samples = []
    refused: Samples = []
    in_hand: Samples = []
    for server in servers:
        own = {"service": server.service}
        for operation, stats in server.stats.items():
            labels = {**own, "operation": operation}
            answered.append(({**labels, "code": "OK"}, stats.requests - stats.errors))
            answered += [({**labels, "code": code}, count) for code, count in stats.by_class.items()]
            seconds.append((labels, stats.nanoseconds / 1e9))
            counts.append((labels, stats.requests))
        refused += [({**own, "code": code}, count) for code, count in server.refused.by_class.items()]
        states = zip(("running", "waiting", "queued"), server.in_hand, strict=True)
        in_hand += [({**own, "state": state}, count) for state, count in states]
    yield _family(
        "wherry_requests_total", "counter", "Requests that were answered, by the class of the answer.", answered
    )
    yield _family(
        "wherry_requests_refused_total", "counter", "Requests that reached no operation, by the reason.", refused
    )
    yield _family("wherry_requests_in_hand", "gauge", "Requests that are not answered yet.", in_hand)
    name = "wherry_request_duration_seconds"
    yield _header(name, "summary", "Time from a request's start to its answer.")
    yield _samples(f"{name}_sum", seconds)
    yield _samples(f"{name}_count", counts)


def _process() -> Iterator[Iterator[str]]:
    taken = process.memory()
    is_open, limit = process.descriptors()
    for name, kind, text, value in (
        ("process_cpu_seconds_total", "counter", "User and system time.", process.cpu_seconds()),
        ("process_start_time_seconds", "gauge", "When it was started, unix time.", process.started_at()),
        ("process_virtual_memory_bytes", "gauge", "Virtual memory.", taken.virtual),
        ("process_resident_memory_bytes", "gauge", "Resident memory.", taken.rss),
        ("wherry_process_proportional_memory_bytes", "gauge", "Memory, shared pages divided (PSS).", taken.pss),
        ("process_open_fds", "gauge", "Descriptors that are open.", is_open),
        ("process_max_fds", "gauge", "Descriptors that may be open.", limit),
    ):
        yield _family(name, kind, text, [({}, value)])


def _house(bus: Bus, about: Labels) -> Iterator[Iterator[str]]:
    connected = float(bus.transport.connected)
    yield _family("wherry_bus_connected", "gauge", "Whether the bus is there.", [({}, connected)])
    yield _family("wherry_build_info", "gauge", "Which service this is.", [(about, 1)])


def _family(name: str, kind: str, text: str, samples: Samples) -> Iterator[str]:
    yield from _header(name, kind, text)
    yield from _samples(name, samples)


def _header(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _samples(name: str, samples: Samples) -> Iterator[str]:
    for labels, value in samples:
        listed = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        yield f"{name}{f'{{{listed}}}' if listed else ''} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

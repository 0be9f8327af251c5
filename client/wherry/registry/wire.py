"""One hop to one host: the address vetted, the answer's head in bounded time, failures as typed errors.

Nothing here knows of redirects, credentials or images. Messages name the host and the port only: paths and queries
may hold signatures, headers hold tokens.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from wherry_shared.errors import (
    DeadlineExceeded,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from wherry_shared.values import now

from . import http
from .hosts import HostRules, Kind, Origin, PinnedResolver, path_of

T = TypeVar("T")

USER_AGENT = "wherry/0.1.0"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the transport, in seconds and bytes."""

    tries: int = 3
    """Attempts of one request, and of a download without progress."""
    backoff: float = 0.5
    """Longest wait before the second try; it doubles, and each wait is random below it."""
    retry_after: float = 60.0
    """Cap on what a Retry-After header can ask for."""
    connect: float = 15.0
    head: float = 60.0
    """From sending a request to the end of its answer's headers."""
    idle: float = 30.0
    """Longest silence inside a body."""
    document: float = 120.0
    """One manifest, config or token, body included, all tries apart."""
    pace_window: float = 30.0
    pace_bytes: int = 1024
    """A download that brings fewer bytes than this in a window of waiting is given up."""
    redirects: int = 5
    progress: int = 64 << 10
    """Bytes that count as progress, so that a drip of one byte for each connection does not go on for ever."""


class Transient(Exception):
    """`error` may go away by itself: worth another try, after `delay` seconds if the host said so."""

    def __init__(self, error: WherryError, delay: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.delay = delay


class Pace:
    """Measures a body by the time spent waiting for it; the consumer's own time does not count."""

    def __init__(self, limits: Limits, host: str) -> None:
        self._limits = limits
        self._host = host
        self._waited = 0.0
        self._got = 0

    def note(self, seconds: float, size: int) -> None:
        """Count one read; DeadlineExceeded when a whole window brought too little."""
        self._waited += seconds
        self._got += size
        if self._waited >= self._limits.pace_window:
            if self._got < self._limits.pace_bytes:
                raise DeadlineExceeded(f"{self._host} sent {self._got} bytes in {self._waited:.0f} s: given up")
            self._waited, self._got = 0.0, 0


class Wire:
    """One pool of connections. The session and its connections live between `__aenter__` and `__aexit__`."""

    def __init__(
        self, rules: HostRules, limits: Limits, resolver: PinnedResolver, user_agent: str, tls: ssl.SSLContext | None
    ) -> None:
        self.rules = rules
        self.limits = limits
        self._resolver = resolver
        self._always = {"User-Agent": user_agent, "Accept-Encoding": "identity"}
        self._tls = tls
        self._tls_lock = asyncio.Lock()
        self._pool: http.Pool | None = None

    async def __aenter__(self) -> Self:
        timeouts = http.Timeouts(self.limits.connect, self.limits.head, self.limits.idle)
        self._pool = http.Pool(self._resolver.addresses, timeouts)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    async def admit(self, registry: Origin) -> frozenset[Kind]:
        """The kinds of addresses of the host that the user named: what it may point to later."""
        self.rules.check_scheme(registry)
        kinds = await self._pin(registry)
        if registry.scheme == "http" and not self.rules.is_insecure(registry) and kinds != {Kind.LOOPBACK}:
            raise PermissionDenied(f"{registry.authority} is not on this machine: plain http to it is refused")
        return kinds

    async def vet(self, target: Origin, trust: frozenset[Kind]) -> None:
        """PermissionDenied unless every address of `target` is public or of a kind in `trust`."""
        self.rules.check_scheme(target)
        for kind in await self._pin(target) - trust:
            if kind is not Kind.PUBLIC:
                raise PermissionDenied(f"{target.authority} has a {kind} address: the registry may not point there")

    async def _pin(self, target: Origin) -> frozenset[Kind]:
        try:
            async with asyncio.timeout(self.limits.connect):
                return await self._resolver.pin(target.host, target.port)
        except TimeoutError:
            raise Transient(DeadlineExceeded(f"{target.host}: the name was not resolved in time")) from None
        except (OSError, UnicodeError) as e:
            reason = (e.strerror if isinstance(e, OSError) else None) or "not a host name"
            raise Transient(Unavailable(f"{target.host} cannot be resolved: {reason}")) from None

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | http.Body | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> http.Response:  # fmt: skip
        """The head of the answer, of whatever status; redirects are not followed. The caller vetted the URL's host
        and closes the response. `tls`: the context for an https URL, the system's by default. Raises Transient for
        what another try may cure."""
        if self._pool is None:
            raise InvalidArgument("the registry client is closed: use it inside `async with`")
        origin = Origin.of(url)
        context = (tls or await self._system_tls()) if origin.scheme == "https" else None
        target = http.Target(origin.host, origin.port, context)
        fields = {"Host": origin.authority, **self._always, **headers}
        try:
            return await self._pool.request(method, target, url, path_of(url), fields, body)
        except (TimeoutError, http.HttpError, OSError, ValueError) as e:
            if isinstance(e, http.ConnectError):
                self._resolver.unpin(origin.host)
            raise failure(origin.authority, e) from None

    async def _system_tls(self) -> ssl.SSLContext:
        async with self._tls_lock:
            if self._tls is None:  # reading every authority's certificate takes a while
                self._tls = await asyncio.to_thread(ssl.create_default_context)
            return self._tls

    async def read(
        self,
        response: http.Response,
        host: str,
        bound: int,
        what: str,
        excess: type[WherryError] = ResourceExhausted,
    ) -> bytes:
        """The whole body, at most `bound` bytes; beyond, reading stops and `excess` is raised."""
        if response.content_length is not None and response.content_length > bound:
            raise excess(f"{what} from {host} is longer than {bound} bytes")
        parts, total = [], 0
        try:
            while chunk := await response.readany():
                total += len(chunk)
                if total > bound:
                    raise excess(f"{what} from {host} is longer than {bound} bytes")
                parts.append(chunk)
        except (TimeoutError, http.HttpError, OSError) as e:
            raise failure(host, e) from None
        return b"".join(parts)

    async def persist(self, attempt: Callable[[], Awaitable[T]], host: str) -> T:
        """`attempt` up to `tries` times while it raises Transient; each in at most `document` seconds."""
        failures = 0
        while True:
            try:
                async with asyncio.timeout(self.limits.document):
                    return await attempt()
            except TimeoutError:
                raise DeadlineExceeded(f"{host} took over {self.limits.document:g} s for one document") from None
            except Transient as e:
                failures += 1
                await self.back_off(e, failures)

    async def back_off(self, reason: Transient, failures: int) -> None:
        """Wait before the next try; raises the reason's error once `failures` used all of them up."""
        if failures >= self.limits.tries:
            raise reason.error from None
        delay = reason.delay
        if delay is None:
            delay = random.uniform(0, self.limits.backoff * 2 ** (failures - 1))  # noqa: S311 - jitter
        await asyncio.sleep(min(delay, self.limits.retry_after))


def failure(host: str, error: Exception) -> Exception:
    """What went wrong on the wire, as a typed error or as Transient."""
    if isinstance(error, TimeoutError):
        return Transient(DeadlineExceeded(f"{host} did not answer in time"))
    if isinstance(error, http.CertificateError):
        return PermissionDenied(f"{host}: its certificate is not trusted ({error})")
    if isinstance(error, http.TlsError):
        return Unavailable(f"{host} does not speak TLS as expected")
    if isinstance(error, http.ConnectError):
        return Transient(Unavailable(f"{host} cannot be reached: {error}"))
    if isinstance(error, http.ProtocolError):
        return Transient(Unavailable(f"{host} did not answer in valid HTTP"))
    if isinstance(error, http.Dropped | OSError):
        return Transient(Unavailable(f"{host} dropped the connection"))
    return InvalidArgument(f"{host} cannot be asked for this: the URL is not valid")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a Retry-After header asks for (a number or an HTTP date), None without a valid one."""
    from email.utils import parsedate_to_datetime

    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, (parsedate_to_datetime(value) - now()).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None

"""Which hosts may be talked to, and how: origins, plain http, kinds of addresses, names pinned to vetted addresses.

The rules answer server-side request forgery, DNS rebinding and downgrade: a registry that the user named may live
anywhere; what *it* points to (redirects, token realms, foreign layers) must be public or of the registry's own kind.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlsplit

from wherry_shared.errors import InvalidArgument, PermissionDenied

from .reference import DEFAULT_REGISTRY

DEFAULT_ENDPOINT = "registry-1.docker.io"
"""Where the default registry serves its API; its own name serves a web site."""

_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"[\x21-\x7e]{1,8192}")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""host, port -> numeric addresses; raises OSError."""


class Kind(StrEnum):
    """What an address can reach. Everything that is neither global nor one of the named kinds is `private`."""

    PUBLIC = "public"
    LOOPBACK = "loopback"
    LINK_LOCAL = "link-local"
    UNSPECIFIED = "unspecified"
    PRIVATE = "private"


def kind_of(text: str) -> Kind:
    """The kind of a numeric address; IPv4 carried inside IPv6 (mapped, 6to4, NAT64) counts as the IPv4 address."""
    address = _unwrap(ipaddress.ip_address(text.partition("%")[0]))
    if address.is_unspecified:
        return Kind.UNSPECIFIED
    if address.is_loopback:
        return Kind.LOOPBACK
    if address.is_link_local:
        return Kind.LINK_LOCAL
    return Kind.PUBLIC if address.is_global and not address.is_multicast else Kind.PRIVATE


def _unwrap(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def literal(host: str) -> str | None:
    """`host` without its zone if it is a numeric address, else None (a name, to be looked up)."""
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return None


def is_loopback_name(host: str) -> bool:
    """Whether `host` can only mean this machine: `localhost`, a name below it, or a loopback address."""
    address = literal(host)
    if address is not None:
        return kind_of(address) is Kind.LOOPBACK
    return host == "localhost" or host.endswith(".localhost")


@dataclass(frozen=True, slots=True)
class Origin:
    """The unit of trust: credentials issued for one origin are never sent to another."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of an absolute http(s) URL without user information; else PermissionDenied, without its text."""
        try:
            parts = urlsplit(url if _URL.fullmatch(url) else "")
            scheme, host, port = parts.scheme, parts.hostname or "", parts.port
        except ValueError:
            raise PermissionDenied("a URL that is not valid is not followed") from None
        if scheme not in _PORTS or not host or port == 0:
            raise PermissionDenied(f"only http and https URLs with a host are followed, not scheme {scheme[:16]!r}")
        if parts.username is not None or parts.password is not None:
            raise PermissionDenied("a URL that carries credentials is not followed")
        host = host.lower().rstrip(".")
        if not _HOST.fullmatch(host):
            raise PermissionDenied("a URL whose host is not valid is not followed")
        return cls(scheme, host, port or _PORTS[scheme])

    @property
    def authority(self) -> str:
        """`host` or `host:port`, as messages name it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def url(self, path: str) -> str:
        """The URL of an absolute path here."""
        return f"{self.scheme}://{self.authority}{path}"


def path_of(url: str) -> str:
    """Path and query of a URL, as they are written: a signed URL that is quoted again is another URL."""
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def split_authority(registry: str) -> tuple[str, int | None]:
    """`host[:port]`, brackets removed and lower-cased; InvalidArgument for a port outside 1..65535."""
    host, port = registry, ""
    if registry.startswith("["):
        host, _, port = registry[1:].partition("]")
        port = port.removeprefix(":")
    elif registry.count(":") == 1:
        host, _, port = registry.partition(":")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument(f"registry {registry!r} is not valid: its port is not 1..65535")
    return host.lower(), int(port) if port else None


class HostRules:
    """Which scheme a registry is spoken to with.

    Plain http: loopback hosts, and those listed in `insecure` as `host` (any port) or `host:port`. Loopback hosts
    listed in `secure`, or named with port 443, speak https. Everything else is https.
    """

    def __init__(self, insecure: Collection[str] = (), secure: Collection[str] = ()) -> None:
        self._insecure = frozenset(split_authority(entry) for entry in insecure)
        self._secure = frozenset(split_authority(entry) for entry in secure)
        self._allowed: set[Origin] = set()

    def allow(self, origins: Collection[Origin]) -> None:
        """Let origins be spoken to as they are written: the user's configuration names them with their scheme."""
        self._allowed |= set(origins)

    def endpoint(self, registry: str) -> Origin:
        """Where the API of `registry` is served."""
        host, port = split_authority(DEFAULT_ENDPOINT if registry == DEFAULT_REGISTRY else registry)
        plain = port != 443 and self._may_be_plain(host, port)
        if plain and not self._listed(self._insecure, host, port):
            plain = not self._listed(self._secure, host, port)
        scheme = "http" if plain else "https"
        return Origin(scheme, host, port or _PORTS[scheme])

    def check_scheme(self, target: Origin) -> None:
        """PermissionDenied if `target` is plain http on a host that may not be spoken to so."""
        plain = target in self._allowed or self._may_be_plain(target.host, target.port)
        if target.scheme == "http" and not plain:
            raise PermissionDenied(f"plain http to {target.authority} is refused: it is not listed as insecure")

    def is_insecure(self, origin: Origin) -> bool:
        """Whether the user listed this host as insecure (so that a plain name may resolve to anywhere)."""
        return origin in self._allowed or self._listed(self._insecure, origin.host, origin.port)

    def _may_be_plain(self, host: str, port: int | None) -> bool:
        return is_loopback_name(host) or self._listed(self._insecure, host, port)

    @staticmethod
    def _listed(entries: frozenset[tuple[str, int | None]], host: str, port: int | None) -> bool:
        return (host, None) in entries or (host, port or 80) in entries or (host, port) in entries


async def system_lookup(host: str, port: int) -> Sequence[str]:
    """The system's name service."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class PinnedResolver:
    """Names resolved by us before each hop; connections go to these addresses only, so what was vetted is reached.

    Invariant: `kinds(host)` covers every address that any connection of this session to `host` can have, including
    kept ones: addresses are added when a name is looked up again, and never forgotten.
    """

    def __init__(self, lookup: Lookup = system_lookup) -> None:
        self._lookup = lookup
        self._current: dict[str, Sequence[str]] = {}
        self._seen: dict[str, set[str]] = {}

    async def pin(self, host: str, port: int) -> frozenset[Kind]:
        """Look `host` up unless it is pinned already; the kinds of all its addresses. OSError if it has none."""
        address = literal(host)
        if address is not None:
            return frozenset((kind_of(address),))
        if host not in self._current:
            addresses = await self._lookup(host, port)
            if not addresses:
                raise OSError("no address for this name")
            self._current[host] = addresses
            self._seen.setdefault(host, set()).update(addresses)
        return frozenset(map(kind_of, self._seen[host]))

    def unpin(self, host: str) -> None:
        """Look the name up again next time: its addresses did not answer."""
        self._current.pop(host, None)

    def addresses(self, host: str) -> Sequence[str]:
        """The connection's side: the vetted addresses and no others, without a look-up."""
        address = literal(host)
        return (address,) if address is not None else self._current.get(host, ())

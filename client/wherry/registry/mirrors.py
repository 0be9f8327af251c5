"""Which hosts serve a registry, and how each is spoken to: containerd's `hosts.toml`.

`<directory>/<host>/hosts.toml`, else `<directory>/_default/hosts.toml`; a directory without that file may hold
`*.crt` (authorities), `*.cert` and `*.key` (client pairs). Hosts are asked in the file's order, the server last.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wherry_shared.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from wherry_shared.files import os_errors

from .hosts import DEFAULT_ENDPOINT, HostRules, Origin
from .reference import DEFAULT_REGISTRY

ENVIRONMENT = "WHERRY_CONFIG"
SYSTEM = "/etc/wherry/certs.d"
CAPABILITIES = frozenset({"pull", "resolve", "push"})
_FILE_MAX = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")
_VALUE = re.compile(r"[\t\x20-\x7e]{0,8192}")
_OWN = frozenset({"host", "content-length", "transfer-encoding", "connection", "expect", "upgrade"})
_PATH = re.compile(r"(?:/[A-Za-z0-9._~%-]+)*")


@dataclass(frozen=True, slots=True)
class Tls:
    """What a TLS connection takes beside the system's authorities. clients: certificate, key ("": the same file)."""

    authorities: tuple[str, ...] = ()
    clients: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False

    def context(self) -> ssl.SSLContext:
        """The context; FailedPrecondition names a file that does not serve."""
        made = ssl.create_default_context()
        for path in self.authorities:
            with _certificates(path):
                made.load_verify_locations(path)
        for certificate, key in self.clients:
            with _certificates(certificate):
                made.load_cert_chain(certificate, key or None, password=b"")  # and no question at the terminal
        if self.skip_verify:
            made.check_hostname = False
            made.verify_mode = ssl.CERT_NONE
        return made


@contextmanager
def _certificates(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:  # ssl's own errors are some, too
        reason = "not found" if isinstance(e, FileNotFoundError) else "it holds no usable certificate"
        raise FailedPrecondition(f"certificate {path}: {reason}") from None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One host of a registry. prefix: where its API lies. tls: None for the system's settings."""

    origin: Origin
    capabilities: frozenset[str] = CAPABILITIES
    prefix: str = "/v2"
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: Tls | None = None
    configured: bool = False


class Mirrors:
    """The hosts of each registry, by the files at the time of the first question."""

    def __init__(self, rules: HostRules, directories: Sequence[Path]) -> None:
        self._rules = rules
        self._directories = directories
        self._known: dict[str, list[Endpoint]] = {}
        self._contexts: dict[Tls, asyncio.Task[ssl.SSLContext]] = {}

    def endpoints(self, registry: str, capability: str) -> list[Endpoint]:
        """The hosts with that capability, in the order to ask them.

        FailedPrecondition: a file is not readable or not valid, or no host can do that.
        """
        if registry not in self._known:
            self._known[registry] = self._read(registry)
        found = [endpoint for endpoint in self._known[registry] if capability in endpoint.capabilities]
        if not found:
            raise FailedPrecondition(f"no host of {registry} is configured for {capability}")
        return found

    async def context(self, tls: Tls | None) -> ssl.SSLContext | None:
        """The TLS context of an endpoint, made once."""
        if tls is None:
            return None
        if tls not in self._contexts:
            self._contexts[tls] = asyncio.create_task(asyncio.to_thread(tls.context))
        return await asyncio.shield(self._contexts[tls])

    def _read(self, registry: str) -> list[Endpoint]:
        own = Endpoint(self._rules.endpoint(registry))
        for directory in self._directories:
            for name in _folders(registry):
                folder = directory / name
                file = folder / "hosts.toml"
                with os_errors(str(folder)):
                    there, configured = folder.is_dir(), file.is_file()
                if not there:
                    continue
                if not configured:
                    return [replace(own, tls=_loose(folder))]
                endpoints = _File(file, registry, own).endpoints()
                self._rules.allow([e.origin for e in endpoints if e.configured])
                return endpoints
        return [own]


def directories(given: str = "") -> list[Path]:
    """Where to look: `given`, else $WHERRY_CONFIG, else the user's directory and then the system's."""
    named = given or os.environ.get(ENVIRONMENT, "")
    if named:
        return [Path(named)]
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return [Path(home) / "wherry", Path(SYSTEM)]


def _folders(registry: str) -> list[str]:
    host, colon, port = registry.rpartition(":")
    plain = f"{host}_{port}_" if colon and port.isdigit() else registry
    return list(dict.fromkeys((plain, registry, "_default")))


def _loose(folder: Path) -> Tls | None:
    authorities = tuple(str(path) for path in sorted(folder.glob("*.crt")))
    clients = tuple((str(path), str(path.with_suffix(".key"))) for path in sorted(folder.glob("*.cert")))
    return Tls(authorities, clients) if authorities or clients else None


class _File:
    """One hosts.toml."""

    def __init__(self, path: Path, registry: str, own: Endpoint) -> None:
        self._path = path
        self._registry = registry
        self._own = own

    def endpoints(self) -> list[Endpoint]:
        document = self._load()
        hosts = document.get("host", {})
        if not isinstance(hosts, dict):
            raise self._wrong("host is not a table")
        found = [self._endpoint(self._table(key, value), key) for key, value in hosts.items()]
        server = document.get("server", "")
        if not isinstance(server, str):
            raise self._wrong("server is not a text")
        return [*found, self._endpoint(document, server)]

    def _load(self) -> dict[str, Any]:
        import tomllib  # most hosts have no file

        try:
            with self._path.open("rb") as file:
                raw = file.read(_FILE_MAX + 1)
            if len(raw) > _FILE_MAX:
                raise self._wrong(f"longer than {_FILE_MAX} bytes")
            return tomllib.loads(raw.decode())
        except OSError as e:
            raise FailedPrecondition(f"{self._path} cannot be read: {e.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError):
            raise self._wrong("not valid TOML") from None

    def _wrong(self, why: str) -> FailedPrecondition:
        return FailedPrecondition(f"{self._path}: {why}")

    def _table(self, key: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(f"host {key!r} is not a table")
        return value

    def _endpoint(self, table: Mapping[str, Any], url: str) -> Endpoint:
        origin, path = self._place(url)
        override = self._flag(table, "override_path")
        prefix = path if override else f"{path}/v2" if not path.endswith("/v2") else path
        return Endpoint(
            origin, self._capabilities(table), prefix, self._headers(table), self._tls(table), configured=bool(url)
        )

    def _place(self, url: str) -> tuple[Origin, str]:
        if not url:
            return self._own.origin, ""
        full = url if "://" in url else f"https://{url}"
        try:
            origin, parts = Origin.of(full), urlsplit(full)
        except (PermissionDenied, InvalidArgument) as e:
            raise self._wrong(f"a host: {e.message}") from None
        path = parts.path.rstrip("/")
        if parts.query or parts.fragment or not _PATH.fullmatch(path) or ".." in path.split("/"):
            raise self._wrong(f"host {origin.authority} is not given as scheme, host and path")
        if origin.host == DEFAULT_REGISTRY:
            origin = Origin(origin.scheme, DEFAULT_ENDPOINT, origin.port)
        return origin, path

    def _flag(self, table: Mapping[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(f"{key} is neither true nor false")
        return value

    def _capabilities(self, table: Mapping[str, Any]) -> frozenset[str]:
        if "capabilities" not in table:
            return CAPABILITIES
        named = table["capabilities"]
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise self._wrong("capabilities is not a list of names")
        if unknown := sorted(set(named) - CAPABILITIES - {"referrers"}):
            raise self._wrong(f"unknown capability {unknown[0][:64]!r}: pull, resolve and push are known")
        return frozenset(named) & CAPABILITIES

    def _headers(self, table: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        given = table.get("header", {})
        if not isinstance(given, dict):
            raise self._wrong("header is not a table")
        found = []
        for name, value in given.items():
            joined = ", ".join(str(part) for part in value) if isinstance(value, list) else value
            if not isinstance(joined, str) or not _VALUE.fullmatch(joined) or not _NAME.fullmatch(name):
                raise self._wrong(f"header {name[:64]!r} is not valid")
            if name.lower() in _OWN:
                raise self._wrong(f"header {name!r} is the client's own business")
            found.append((name, joined))
        return tuple(found)

    def _tls(self, table: Mapping[str, Any]) -> Tls | None:
        authorities = tuple(self._file(path) for path in self._list(table, "ca"))
        clients = []
        for pair in self._list(table, "client"):
            parts = [pair] if isinstance(pair, str) else pair
            if not isinstance(parts, list) or not 1 <= len(parts) <= 2:
                raise self._wrong("client is not a list of certificates, or of pairs of certificate and key")
            clients.append((self._file(parts[0]), self._file(parts[1]) if len(parts) == 2 else ""))
        tls = Tls(authorities, tuple(clients), self._flag(table, "skip_verify"))
        return tls if tls != Tls() else None

    def _list(self, table: Mapping[str, Any], key: str) -> list[Any]:
        value = table.get(key, [])
        return value if isinstance(value, list) else [value]

    def _file(self, path: object) -> str:
        if not isinstance(path, str) or not path or "\0" in path:
            raise self._wrong("a certificate's path is not a text")
        return str(self._path.parent / path)

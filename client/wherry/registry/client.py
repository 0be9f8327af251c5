"""The registry client: a name to a manifest, a descriptor to its bytes (OCI distribution specification, pull)."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, cast

from wherry_shared.errors import (
    DataLoss,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WherryError,
)
from wherry_shared.values import Descriptor, check_digest

from . import http
from .auth import Access, Authorizer
from .credentials import CredentialSource, DockerConfig
from .documents import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCUMENT_MAX,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_INDEX,
    OCI_MANIFEST,
    document_type,
    is_foreign,
    parse_index,
    refuse_foreign,
)
from .download import Download, Hasher, Piece, check_digest_of, hasher_for, make_hasher
from .hosts import DEFAULT_ENDPOINT, HostRules, Lookup, Origin, PinnedResolver, split_authority, system_lookup
from .mirrors import Endpoint, Mirrors, directories
from .reference import DEFAULT_REGISTRY, Reference
from .transport import Transport
from .wire import Limits, Transient, Wire

if TYPE_CHECKING:
    from .upload import Upload

T = TypeVar("T")

log = logging.getLogger("wherry.registry")

_ACCEPT = {"Accept": ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*;q=0.1"))}
_URLS_MAX = 8


class Registry:
    """All registries, through one pool of connections and one set of tokens; use it inside `async with`.

    `insecure`: hosts (`host` or `host:port`) that plain http is spoken to; loopback hosts need no mention unless
    they are in `secure`. `docker_config`: the docker command's config.json, or `credentials` in its place.
    `foreign_layers`: fetch layers of foreign types from the `urls` that manifests name (anonymously).
    `hosts_dir`: where mirrors and per-host settings are configured (see `mirrors.directories`).
    `lookup`: the name service; `tls`: the context for https, the system's by default.

    Every method raises Unauthenticated, PermissionDenied, NotFound, ResourceExhausted (429 to the end, or a bound
    passed), Unavailable, DeadlineExceeded, and DataLoss where bytes and descriptor differ. Messages name the host,
    never credentials, tokens or a URL's path. No proxy is used.
    """

    def __init__(
        self,
        *,
        docker_config: Path | None = None,
        credentials: CredentialSource | None = None,
        insecure: Collection[str] = (),
        secure: Collection[str] = (),
        foreign_layers: bool = False,
        hosts_dir: str = "",
        user_agent: str = "wherry/0.1.0",
        limits: Limits | None = None,
        lookup: Lookup = system_lookup,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        rules = HostRules(insecure, secure)
        self._mirrors = Mirrors(rules, directories(hosts_dir))
        self._wire = Wire(rules, limits or Limits(), PinnedResolver(lookup), user_agent, tls)
        source = credentials if credentials is not None else DockerConfig(docker_config)
        self._transport = Transport(self._wire, Authorizer(self._wire, source))
        self._foreign = foreign_layers
        self._down: set[Origin] = set()

    async def __aenter__(self) -> Self:
        await self._wire.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._wire.__aexit__(kind, error, trace)

    async def resolve(self, ref: Reference) -> tuple[Descriptor, bytes]:
        """What `ref` names now: the descriptor, computed from the bytes, and the bytes of the manifest or index.

        A digest in `ref` must match; a Docker-Content-Digest header must match as well, but decides nothing.
        """
        algorithm = (ref.digest or "sha256:").partition(":")[0]
        what = f"the manifest of {ref}"
        path = f"manifests/{ref.target}"

        async def ask(access: Access) -> tuple[Descriptor, bytes]:
            raw, headers = await self._document(access, path, DOCUMENT_MAX, what, ResourceExhausted)
            digest = f"{algorithm}:{_hex(raw, algorithm)}"
            host = access.origin.authority
            if ref.digest and digest != ref.digest:
                raise DataLoss(f"{host} sent other bytes than {ref.digest}")
            _compare_header(headers.get("Docker-Content-Digest"), raw, host)
            media_type = document_type(raw, headers.get("Content-Type", ""), what)
            return Descriptor(media_type=media_type, digest=digest, size=len(raw)), raw

        return await self._any_host(ref, "pull" if ref.digest else "resolve", ask)

    async def manifest(self, ref: Reference, descriptor: Descriptor) -> bytes:
        """The manifest or index that `descriptor` names: size and digest checked, at most DOCUMENT_MAX bytes.

        The bytes are not parsed: parse them with the descriptor's media type.
        """
        if descriptor.media_type not in INDEX_TYPES | MANIFEST_TYPES:
            raise Unimplemented(f"{descriptor.digest} is of type {descriptor.media_type[:100]!r}: not a manifest")
        self._check_small(descriptor)
        what = f"manifest {descriptor.digest}"
        return await self._whole(ref, f"manifests/{descriptor.digest}", descriptor, what)

    async def small(self, ref: Reference, descriptor: Descriptor) -> bytes:
        """A small blob whole, such as an image config: size and digest checked, at most DOCUMENT_MAX bytes."""
        if is_foreign(descriptor.media_type):
            return b"".join([chunk async for chunk in self.blob(ref, descriptor, verify=True)])
        self._check_small(descriptor)
        return await self._whole(ref, f"blobs/{descriptor.digest}", descriptor, f"blob {descriptor.digest}")

    async def referrers(self, ref: Reference, digest: str) -> list[Descriptor]:
        """What refers to a manifest (OCI distribution specification 1.1: the API, else the tag), [] for nothing."""
        what = f"what refers to {digest}"
        for path in (f"referrers/{digest}", f"manifests/{check_digest(digest).replace(':', '-')}"):

            async def ask(access: Access, path: str = path) -> list[Descriptor]:
                raw, headers = await self._document(access, path, DOCUMENT_MAX, what, ResourceExhausted)
                return list(parse_index(raw, headers.get("Content-Type", ""), what).manifests)

            try:
                return await self._any_host(ref, "pull", ask)
            except NotFound:
                continue
        return []

    def blob(
        self, ref: Reference, descriptor: Descriptor, *, offset: int = 0, verify: bool | Hasher = False
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of a blob from `offset` to its end, exactly `size - offset` of them, or an error.

        Dropped connections are resumed by themselves. `verify=True` also checks the digest (from offset 0); a
        hashlib object of the digest's algorithm that has seen the bytes before `offset` is fed and checked. With
        False the digest is the storer's business. Close the iterator (`aclosing`) when leaving early.
        """
        download = self._download(ref, descriptor, offset, verify, reuse=False)
        return cast("AsyncGenerator[bytes, None]", download.chunks())

    def pieces(self, ref: Reference, descriptor: Descriptor, *, offset: int = 0) -> AsyncGenerator[Piece, None]:
        """The same for large blobs: views of up to PIECE bytes, each good until the one after the next is asked for."""
        return self._download(ref, descriptor, offset, False, reuse=True).chunks()

    def _download(
        self, ref: Reference, descriptor: Descriptor, offset: int, verify: bool | Hasher, *, reuse: bool
    ) -> Download:
        check_digest(descriptor.digest)
        if is_foreign(descriptor.media_type) and not self._foreign:
            refuse_foreign(descriptor)
        hosts = _Hosts(self, ref)
        what = f"blob {descriptor.digest}"
        path = f"blobs/{descriptor.digest}"
        headers = {"Accept": "*/*"}

        async def open_(extra: Mapping[str, str]) -> http.Response:
            access = await hosts.access()
            if is_foreign(descriptor.media_type) and descriptor.urls:
                return await self._open_foreign(access, descriptor, {**headers, **extra})
            try:
                return await self._transport.get(access, path, {**headers, **extra}, what)
            except (Transient, WherryError) as e:
                if not hosts.next(e):
                    raise
            return await open_(extra)

        hasher = make_hasher(verify, descriptor.digest, offset)
        return Download(self._wire, open_, descriptor, lambda: hosts.name, offset, hasher, reuse=reuse)

    async def upload(self, ref: Reference) -> Upload:
        """What puts blobs and manifests into a reference's repository: the first host that may be pushed to."""
        from .upload import Upload

        endpoint = self._mirrors.endpoints(ref.registry, "push")[0]
        return Upload(self._wire, self._transport, await self._access(ref, endpoint, "pull,push"))

    async def _open_foreign(self, access: Access, descriptor: Descriptor, headers: Mapping[str, str]) -> http.Response:
        refusal: Exception = InvalidArgument(f"layer {descriptor.digest} names no URL")
        for url in descriptor.urls[:_URLS_MAX]:
            try:
                return await self._transport.get_foreign(access, url, headers, f"foreign layer {descriptor.digest}")
            except (Transient, WherryError) as e:
                refusal = e
        raise refusal

    async def _access(self, ref: Reference, endpoint: Endpoint, actions: str = "pull") -> Access:
        own = endpoint.origin.host == DEFAULT_ENDPOINT and ref.registry == DEFAULT_REGISTRY
        stands_for = "" if own or endpoint.origin.authority == _authority(ref.registry) else ref.registry
        return Access(
            ref.registry if not stands_for else endpoint.origin.authority, endpoint.origin, ref.repository, actions,
            endpoint.prefix, stands_for, endpoint.headers, await self._mirrors.context(endpoint.tls),
        )  # fmt: skip

    def _endpoints(self, ref: Reference, capability: str) -> list[Endpoint]:
        """The hosts to ask: those that were found to be away only if there is no other."""
        found = self._mirrors.endpoints(ref.registry, capability)
        return [e for e in found if e.origin not in self._down] or found[-1:]

    async def _any_host(self, ref: Reference, capability: str, ask: Callable[[Access], Awaitable[T]]) -> T:
        """The answer of the first host that has one; the last one's error when none has."""
        *mirrors, last = self._endpoints(ref, capability)
        for mirror in mirrors:
            try:
                return await ask(await self._access(ref, mirror))
            except WherryError as e:
                self._note(mirror, e)
        return await ask(await self._access(ref, last))

    def _note(self, endpoint: Endpoint, error: BaseException) -> None:
        cause = error.error if isinstance(error, Transient) else error
        log.info("%s does not serve: %s", endpoint.origin.authority, cause)
        if isinstance(cause, Unavailable | DeadlineExceeded):
            self._down.add(endpoint.origin)

    async def _document(
        self, access: Access, path: str, bound: int, what: str, excess: type[WherryError] = DataLoss
    ) -> tuple[bytes, Mapping[str, str]]:
        host = access.origin.authority

        async def attempt() -> tuple[bytes, Mapping[str, str]]:
            async with await self._transport.get(access, path, _ACCEPT, what) as response:
                return await self._wire.read(response, host, bound, what, excess), response.headers

        return await self._wire.persist(attempt, host)

    @staticmethod
    def _check_small(descriptor: Descriptor) -> None:
        check_digest(descriptor.digest)
        if descriptor.size > DOCUMENT_MAX:
            raise ResourceExhausted(
                f"{descriptor.digest} is said to have {descriptor.size} bytes: documents have at most {DOCUMENT_MAX}"
            )

    async def _whole(self, ref: Reference, path: str, descriptor: Descriptor, what: str) -> bytes:
        async def ask(access: Access) -> bytes:
            raw, _ = await self._document(access, path, descriptor.size, what)
            host = access.origin.authority
            if len(raw) != descriptor.size:
                raise DataLoss(f"{host} sent {len(raw)} of the {descriptor.size} bytes of {descriptor.digest}")
            hasher = hasher_for(descriptor.digest)
            hasher.update(raw)
            check_digest_of(hasher, descriptor.digest, host)
            return raw

        return await self._any_host(ref, "pull", ask)


class _Hosts:
    """The host that a download comes from: the next one when one does not have it, the last one in the end."""

    def __init__(self, registry: Registry, ref: Reference) -> None:
        self._registry = registry
        self._ref = ref
        self._left = registry._endpoints(ref, "pull")

    @property
    def name(self) -> str:
        return self._left[0].origin.authority

    async def access(self) -> Access:
        return await self._registry._access(self._ref, self._left[0])

    def next(self, error: BaseException) -> bool:
        if len(self._left) == 1:
            return False
        self._registry._note(self._left.pop(0), error)
        return True


def _authority(registry: str) -> str:
    host, port = split_authority(registry)
    name = f"[{host}]" if ":" in host else host
    return f"{name}:{port}" if port else name


def _hex(raw: bytes, algorithm: str) -> str:
    hasher = hasher_for(f"{algorithm}:")
    hasher.update(raw)
    return hasher.hexdigest()


def _compare_header(value: str | None, raw: bytes, host: str) -> None:
    if value is None:
        return
    try:
        check_digest(value)
    except InvalidArgument:
        raise DataLoss(f"{host} names a digest of its answer that is none") from None
    algorithm, _, hexadecimal = value.partition(":")
    if _hex(raw, algorithm) != hexadecimal:
        raise DataLoss(f"{host} names another digest than that of the bytes it sent")

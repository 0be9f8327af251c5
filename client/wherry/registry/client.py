"""The registry client: a name to a manifest, a descriptor to its bytes (OCI distribution specification, pull)."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from wherry_shared.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted, Unimplemented, WherryError
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
from .download import Download, Hasher, check_digest_of, hasher_for, make_hasher
from .hosts import HostRules, Lookup, PinnedResolver, system_lookup
from .reference import Reference
from .transport import Transport
from .wire import Limits, Transient, Wire

_ACCEPT = {"Accept": ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*;q=0.1"))}
_URLS_MAX = 8


class Registry:
    """All registries, through one pool of connections and one set of tokens; use it inside `async with`.

    `insecure`: hosts (`host` or `host:port`) that plain http is spoken to; loopback hosts need no mention unless
    they are in `secure`. `docker_config`: the docker command's config.json, or `credentials` in its place.
    `foreign_layers`: fetch layers of foreign types from the `urls` that manifests name (anonymously).
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
        self._rules = HostRules(insecure, secure)
        self._limits = limits or Limits()
        self._wire = Wire(self._rules, self._limits, PinnedResolver(lookup), user_agent, tls)
        source = credentials if credentials is not None else DockerConfig(docker_config)
        self._transport = Transport(self._wire, Authorizer(self._wire, source))
        self._foreign = foreign_layers

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
        raw, headers = await self._document(ref, f"manifests/{ref.target}", DOCUMENT_MAX, what, ResourceExhausted)
        digest = f"{algorithm}:{_hex(raw, algorithm)}"
        host = self._access(ref).origin.authority
        if ref.digest and digest != ref.digest:
            raise DataLoss(f"{host} sent other bytes than {ref.digest}")
        _compare_header(headers.get("Docker-Content-Digest"), raw, host)
        media_type = document_type(raw, headers.get("Content-Type", ""), what)
        return Descriptor(media_type=media_type, digest=digest, size=len(raw)), raw

    async def manifest(self, ref: Reference, descriptor: Descriptor) -> bytes:
        """The manifest or index that `descriptor` names: size and digest checked, at most DOCUMENT_MAX bytes.

        The bytes are not parsed: parse them with the descriptor's media type.
        """
        if descriptor.media_type not in INDEX_TYPES | MANIFEST_TYPES:
            raise Unimplemented(f"{descriptor.digest} is of type {descriptor.media_type[:100]!r}: not a manifest")
        self._check_small(descriptor)
        what = f"manifest {descriptor.digest}"
        raw, _ = await self._document(ref, f"manifests/{descriptor.digest}", descriptor.size, what)
        return self._whole(ref, descriptor, raw)

    async def small(self, ref: Reference, descriptor: Descriptor) -> bytes:
        """A small blob whole, such as an image config: size and digest checked, at most DOCUMENT_MAX bytes."""
        if is_foreign(descriptor.media_type):
            return b"".join([chunk async for chunk in self.blob(ref, descriptor, verify=True)])
        self._check_small(descriptor)
        raw, _ = await self._document(ref, f"blobs/{descriptor.digest}", descriptor.size, f"blob {descriptor.digest}")
        return self._whole(ref, descriptor, raw)

    async def referrers(self, ref: Reference, digest: str) -> list[Descriptor]:
        """What refers to a manifest (OCI distribution specification 1.1: the API, else the tag), [] for nothing."""
        what = f"what refers to {digest}"
        for path in (f"referrers/{digest}", f"manifests/{check_digest(digest).replace(':', '-')}"):
            try:
                raw, headers = await self._document(ref, path, DOCUMENT_MAX, what, ResourceExhausted)
            except NotFound:
                continue
            return list(parse_index(raw, headers.get("Content-Type", ""), what).manifests)
        return []

    def blob(
        self, ref: Reference, descriptor: Descriptor, *, offset: int = 0, verify: bool | Hasher = False
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of a blob from `offset` to its end, exactly `size - offset` of them, or an error.

        Dropped connections are resumed by themselves. `verify=True` also checks the digest (from offset 0); a
        hashlib object of the digest's algorithm that has seen the bytes before `offset` is fed and checked. With
        False the digest is the storer's business. Close the iterator (`aclosing`) when leaving early.
        """
        check_digest(descriptor.digest)
        if is_foreign(descriptor.media_type) and not self._foreign:
            refuse_foreign(descriptor)
        access = self._access(ref)
        what = f"blob {descriptor.digest}"
        path = f"blobs/{descriptor.digest}"
        headers = {"Accept": "*/*"}

        async def open_(extra: Mapping[str, str]) -> http.Response:
            if is_foreign(descriptor.media_type) and descriptor.urls:
                return await self._open_foreign(access, descriptor, {**headers, **extra})
            return await self._transport.get(access, path, {**headers, **extra}, what)

        hasher = make_hasher(verify, descriptor.digest, offset)
        return Download(self._wire, open_, descriptor, access.origin.authority, offset, hasher).chunks()

    async def _open_foreign(self, access: Access, descriptor: Descriptor, headers: Mapping[str, str]) -> http.Response:
        refusal: Exception = InvalidArgument(f"layer {descriptor.digest} names no URL")
        for url in descriptor.urls[:_URLS_MAX]:
            try:
                return await self._transport.get_foreign(access, url, headers, f"foreign layer {descriptor.digest}")
            except (Transient, WherryError) as e:
                refusal = e
        raise refusal

    def _access(self, ref: Reference) -> Access:
        return Access(ref.registry, self._rules.endpoint(ref.registry), ref.repository)

    async def _document(
        self, ref: Reference, path: str, bound: int, what: str, excess: type[WherryError] = DataLoss
    ) -> tuple[bytes, Mapping[str, str]]:
        access = self._access(ref)
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

    def _whole(self, ref: Reference, descriptor: Descriptor, raw: bytes) -> bytes:
        host = self._access(ref).origin.authority
        if len(raw) != descriptor.size:
            raise DataLoss(f"{host} sent {len(raw)} of the {descriptor.size} bytes of {descriptor.digest}")
        hasher = hasher_for(descriptor.digest)
        hasher.update(raw)
        check_digest_of(hasher, descriptor.digest, host)
        return raw


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

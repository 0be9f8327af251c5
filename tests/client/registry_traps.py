"""Servers on loopback whose behaviour a test writes, for the tests of the registry client."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from wherry.registry import Credentials, Limits, NoCredentials, Reference, Registry
from wherry.registry.documents import OCI_MANIFEST
from wherry_shared.values import Descriptor

WORD = "s3cret-word"
TOKEN = "s3cret-token"
DATA = os.urandom(400_000)
BLOB = Descriptor(
    media_type="application/octet-stream", digest="sha256:" + hashlib.sha256(DATA).hexdigest(), size=len(DATA)
)
FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
MANIFEST = json.dumps({
    "schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [],
    "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": BLOB.digest, "size": 2},
}).encode()  # fmt: skip
FAST = Limits(backoff=0.01, retry_after=0.05)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass
class Trap:
    """A server whose behaviour a test writes; it remembers every request."""

    handler: Handler
    requests: list[web.BaseRequest] = field(default_factory=list)
    address: str = ""
    url: str = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        return await self.handler(request)

    @property
    def authorizations(self) -> list[str]:
        return [r.headers["Authorization"] for r in self.requests if "Authorization" in r.headers]

    def ref(self, name: str = "team/app:v1") -> Reference:
        return Reference.parse(f"{self.address}/{name}")


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[Trap]:
    trap = Trap(handler)
    runner = web.ServerRunner(web.Server(trap.handle), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, host, 0, ssl_context=tls).start()
    trap.address = f"{host}:{runner.addresses[0][1]}"
    trap.url = f"http{'s' if tls else ''}://{trap.address}"
    try:
        yield trap
    finally:
        await runner.cleanup()


@dataclass
class Known:
    """Credentials for every registry that asks."""

    credentials: Credentials | None = field(default_factory=lambda: Credentials("alice", WORD))

    async def get(self, registry: str) -> Credentials | None:
        return self.credentials


def client(**options: Any) -> Registry:
    settings: dict[str, Any] = {"credentials": NoCredentials(), "limits": FAST} | options
    return Registry(**settings)


async def whole(registry: Registry, trap: Trap, *, blob: Descriptor = BLOB, **options: Any) -> bytes:
    """A blob, as pieces of memory that is used again where nothing is to be verified."""
    if "verify" not in options:
        return b"".join([bytes(piece) async for piece in registry.pieces(trap.ref(), blob, **options)])
    return b"".join([chunk async for chunk in registry.blob(trap.ref(), blob, **options)])


async def ranged(request: web.BaseRequest) -> web.StreamResponse:
    """An honest server of DATA and MANIFEST."""
    if "/manifests/" in request.path:
        return web.Response(body=MANIFEST, content_type=OCI_MANIFEST)
    asked = request.headers.get("Range")
    if asked is None:
        return web.Response(body=DATA)
    first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
    headers = {"Content-Range": f"bytes {first}-{last}/{len(DATA)}"}
    return web.Response(status=206, body=DATA[first : last + 1], headers=headers)


def cutting(after: int, then: Handler = ranged) -> Handler:
    """The first answer breaks off after so many bytes; `then` answers the rest."""
    first = True

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal first
        if not first:
            return await then(request)
        first = False
        return await break_off(request, DATA[:after])

    return handler


async def break_off(request: web.BaseRequest, part: bytes, **headers: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(DATA)), **headers})
    await response.prepare(request)
    await response.write(part)
    await asyncio.sleep(0.02)
    assert request.transport is not None
    request.transport.close()
    return response


async def chunked(request: web.BaseRequest, body: bytes, forever: bool = False) -> web.StreamResponse:
    response = web.StreamResponse()
    response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(body)
    while forever:
        await response.write(b"x" * 65536)
    await response.write_eof()
    return response


def answer(status: int = 200, body: bytes = b"", **headers: str) -> Handler:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return handler

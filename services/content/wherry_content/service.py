"""The edge of the content service: the request's namespace, and its lease."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from wherry_shared import context
from wherry_shared.api.content import CHUNK, Content, Info, Ingest, Located, Opened
from wherry_shared.api.lease import Leases, Resource
from wherry_shared.contract import immediate
from wherry_shared.errors import AlreadyExists, WherryError
from wherry_shared.keeping import Keeper
from wherry_shared.values import Page

from .store import Store

log = logging.getLogger("wherry.content")

BLOBS, INGESTS = "content", "ingests"


class ContentService(Content):
    """Content of the namespace in the context. What a call adds is on the caller's lease before anyone can see it."""

    def __init__(self, store: Store, leases: Leases) -> None:
        self._store = store
        self._leases = leases
        self._keeper = Keeper(leases)

    @immediate
    async def info(self, digest: str) -> Info:
        return self._store.info(context.namespace(), digest)

    async def update(self, digest: str, labels: dict[str, str], mask: Sequence[str] = ()) -> Info:
        return await self._store.update(context.namespace(), digest, labels, mask)

    async def walk(self, filters: Sequence[str] = (), after: str = "", limit: int = 1000) -> Page[Info]:
        return await self._store.walk(context.namespace(), filters, after, limit)

    async def delete(self, digest: str) -> None:
        await self._store.delete(context.namespace(), digest)
        await self._let_go(BLOBS, digest)

    async def read(self, digest: str, offset: int = 0, size: int = CHUNK) -> bytes:
        return await self._store.read(context.namespace(), digest, offset, size)

    async def locate(self, digest: str) -> Located:
        return await self._store.locate(context.namespace(), digest)

    async def verify(self, digest: str) -> None:
        await self._store.verify(context.namespace(), digest)

    async def open(self, ref: str, total: int = 0, expected: str = "", truncate: bool = False) -> Opened:
        namespace = context.namespace()
        if expected and await self._store.present(namespace, expected):
            await self._keep(BLOBS, expected)  # kept before the store looks (again), so it cannot go in between
        if not (expected and await self._store.present(namespace, expected)):
            await self._keep(INGESTS, ref)
        return await self._store.open(context.namespace(), ref, total, expected, truncate=truncate)

    async def write(self, ref: str, offset: int, data: bytes) -> int:
        return await self._store.write(context.namespace(), ref, offset, data)

    async def commit(self, ref: str, size: int = 0, expected: str = "", labels: dict[str, str] | None = None) -> Info:
        async def keep(digest: str) -> None:
            await self._keep(BLOBS, digest)

        try:
            info = await self._store.commit(context.namespace(), ref, size, expected, labels or {}, keep)
        except AlreadyExists:
            await self._let_go(INGESTS, ref)
            raise
        await self._let_go(INGESTS, ref)
        return info

    async def put(self, data: bytes, expected: str, labels: dict[str, str] | None = None) -> Info:
        async def keep(digest: str) -> None:
            await self._keep(BLOBS, digest)

        return await self._store.put(context.namespace(), data, expected, labels or {}, keep)

    async def close(self, ref: str) -> None:
        await self._store.close(context.namespace(), ref)

    async def status(self, ref: str) -> Ingest:
        return await self._store.status(context.namespace(), ref)

    async def statuses(self, filters: Sequence[str] = ()) -> list[Ingest]:
        return await self._store.statuses(context.namespace(), filters)

    async def abort(self, ref: str) -> None:
        await self._store.abort(context.namespace(), ref)
        await self._let_go(INGESTS, ref)

    async def _keep(self, type: str, id: str) -> None:
        """Put a thing on the caller's lease. NotFound: there is no such lease."""
        await self._keeper.keep(Resource(type=type, id=id))

    async def _let_go(self, type: str, id: str) -> None:
        """Take what is gone off the caller's lease. What it stood for is done already, so no failure of it counts."""
        lease = context.current().lease
        if not lease:
            return
        try:
            await self._leases.delete_resource(lease, Resource(type=type, id=id))
        except WherryError as e:
            log.info("lease %r still lists %s %r: %s", lease, type, id, e)

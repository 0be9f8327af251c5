"""The edge of the snapshot service: the request's namespace, its lease, and the snapshotter that it names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from wherry_shared import context
from wherry_shared.api.lease import Leases, Resource
from wherry_shared.api.snapshot import REF_LABEL, Info, Kind, Snapshots, Usage
from wherry_shared.errors import InvalidArgument, WherryError
from wherry_shared.keeping import Keeper
from wherry_shared.values import Mount, Page

from .metadata import is_unpacking
from .snapshotter import Snapshotter

log = logging.getLogger("wherry.snapshot")


class SnapshotService(Snapshots):
    """Snapshots of the namespace in the context. What a call makes is put on the caller's lease before it is there.

    broken: snapshotters that this host cannot have, by name, with the reason.
    """

    def __init__(
        self, snapshotters: Mapping[str, Snapshotter], leases: Leases, broken: Mapping[str, str] | None = None
    ) -> None:
        self._snapshotters = snapshotters
        self._leases = leases
        self._keeper = Keeper(leases)
        self._broken = broken or {}
        self._letting_go: set[asyncio.Task[None]] = set()

    async def prepare(
        self, snapshotter: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        return await self._make(snapshotter, key, parent, dict(labels or {}), "active")

    async def view(
        self, snapshotter: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> list[Mount]:
        return await self._make(snapshotter, key, parent, dict(labels or {}), "view")

    async def _make(self, snapshotter: str, key: str, parent: str, labels: dict[str, str], kind: Kind) -> list[Mount]:
        chosen = self._chosen(snapshotter)
        kept = [_resource(snapshotter, key)]
        if kind == "active" and labels.get(REF_LABEL):
            kept.append(_resource(snapshotter, labels[REF_LABEL]))  # a caller told that it exists goes on to use it
        await self._keeper.keep(*kept)
        return await chosen.prepare(context.namespace(), key, parent, labels, kind)

    async def mounts(self, snapshotter: str, key: str) -> list[Mount]:
        return self._chosen(snapshotter).mounts(context.namespace(), key)

    async def commit(
        self, snapshotter: str, name: str, key: str, parent: str = "", labels: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ) -> Info:  # fmt: skip
        chosen = self._chosen(snapshotter)
        await self._keeper.keep(_resource(snapshotter, name))
        info = await chosen.commit(context.namespace(), name, key, parent, dict(labels or {}), patience)
        self._keep_no_longer(snapshotter, key)
        return info

    async def remove(self, snapshotter: str, key: str) -> None:
        await self._chosen(snapshotter).remove(context.namespace(), key)
        self._keep_no_longer(snapshotter, key)

    async def stat(self, snapshotter: str, key: str) -> Info:
        return self._chosen(snapshotter).stat(context.namespace(), key)

    async def update(
        self, snapshotter: str, key: str, labels: Mapping[str, str], mask: list[str] | None = None
    ) -> Info:
        return await self._chosen(snapshotter).update(context.namespace(), key, dict(labels), mask or ())

    async def walk(
        self, snapshotter: str, filters: list[str] | None = None, after: str = "", limit: int = 1000
    ) -> Page[Info]:
        return await self._chosen(snapshotter).walk(context.namespace(), filters or (), after, limit)

    async def usage(self, snapshotter: str, key: str) -> Usage:
        return await self._chosen(snapshotter).usage(context.namespace(), key)

    async def snapshotters(self) -> list[str]:
        return sorted(self._snapshotters)

    async def cleanup(self, snapshotter: str) -> None:
        await self._chosen(snapshotter).cleanup()

    def _chosen(self, name: str) -> Snapshotter:
        found = self._snapshotters.get(name)
        if found is None:
            reason = self._broken.get(name, f"it is none of {', '.join(self._snapshotters)}")
            raise InvalidArgument(f"snapshotter {name[:76]!r}: {reason}")
        return found

    def _keep_no_longer(self, snapshotter: str, key: str) -> None:
        """Take a key that is no more off the lease; nobody waits for it, for a lease on nothing harms nobody.

        What a layer was unpacked into stays on it: such a key comes once, and its lease ends with the pull.
        """
        lease = context.current().lease
        if lease and not is_unpacking(key):
            task = asyncio.get_running_loop().create_task(self._let_go(lease, _resource(snapshotter, key)))
            self._letting_go.add(task)
            task.add_done_callback(self._letting_go.discard)

    async def _let_go(self, lease: str, resource: Resource) -> None:
        try:
            with context.use(key=""):
                await self._leases.delete_resource(lease, resource)
        except WherryError as e:
            log.info("lease %s keeps %s, which is no more: %s", lease, resource.id, e)


def _resource(snapshotter: str, key: str) -> Resource:
    return Resource(type=f"snapshots/{snapshotter}", id=key)

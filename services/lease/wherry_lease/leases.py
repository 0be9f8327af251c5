"""The rules of leases (containerd's): which there are, until when, and what they may keep."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial

from wherry_shared import context
from wherry_shared.api.lease import RESOURCES_MAX, Lease, Resource
from wherry_shared.catalog import LIMIT_MAX, PAGE_BYTES
from wherry_shared.errors import InvalidArgument, Unimplemented
from wherry_shared.references import expires_at
from wherry_shared.sqlite import Transaction
from wherry_shared.values import Page, check_digest, check_identifier, check_labels, now, stored_labels

from .metadata import Rows

ID_MAX = 256
SWEEP_BATCH = 256


class Registry:
    """The leases of every namespace. A lease whose time has passed is not there, whether it was swept yet or not."""

    def __init__(self, rows: Rows, clock: Callable[[], datetime] = now) -> None:
        self._rows = rows
        self._clock = clock

    def get(self, namespace: str, id: str) -> Lease:
        lease = self._rows.leases.get(namespace, id)
        if not self._valid(lease):
            raise self._rows.leases.missing(id)
        return lease

    async def walk(self, namespace: str, filters: Sequence[str], after: str, limit: int) -> Page[Lease]:
        return await self._rows.leases.page(namespace, filters, after, limit, keep=self._valid)

    async def create(self, namespace: str, id: str, labels: dict[str, str]) -> Lease:
        _check_id(id)
        labels = check_labels(stored_labels(labels))
        new = Lease(id=id or _made_id(), labels=labels, created_at=self._clock())

        def write(tx: Transaction) -> Lease:
            old = self._rows.leases.find(tx, namespace, new.id)
            if old is not None and not self._valid(old):
                self._rows.remove(tx, namespace, new.id)
            self._rows.insert(tx, namespace, new, expires_at(labels))
            return new

        return await self._rows.database.mutate(write)

    async def delete(self, namespace: str, id: str) -> None:
        def write(tx: Transaction) -> None:
            self._require(tx, namespace, id)
            self._rows.remove(tx, namespace, id)

        await self._rows.database.mutate(write, frees=True)

    async def add_resources(self, namespace: str, id: str, resources: Sequence[Resource]) -> None:
        if len(resources) > RESOURCES_MAX:
            raise InvalidArgument(f"{len(resources)} resources at once are more than {RESOURCES_MAX}")
        for resource in resources:
            check_resource(resource)

        def write(tx: Transaction) -> None:
            self._require(tx, namespace, id)
            for resource in resources:
                self._rows.add_resource(tx, namespace, id, resource)

        await self._rows.database.mutate(write)

    async def delete_resource(self, namespace: str, id: str, resource: Resource) -> None:
        check_resource(resource)
        by_service = context.current().identity.role == "service"

        def write(tx: Transaction) -> None:
            self._require(tx, namespace, id)
            self._rows.delete_resource(tx, namespace, id, resource)
            if not by_service:  # a service takes off what is gone anyway
                self._rows.deleted(tx)

        await self._rows.database.mutate(write, frees=True)

    def resources(self, namespace: str, id: str, after: str, limit: int) -> Page[Resource]:
        """`after`: type and id of the last, with a blank in between (no type has one)."""
        self.get(namespace, id)
        type, _, last = after.partition(" ")
        limit = min(max(limit, 1), LIMIT_MAX)
        found = self._rows.resources(namespace, id, (type, last), limit)
        items = list(_fitting(found))
        more = len(items) < len(found) or len(found) == limit
        return Page[Resource](items=items, next=f"{items[-1].type} {items[-1].id}" if more and items else "")

    async def sweep(self) -> int:
        """Remove the leases whose time has passed; answers how many."""
        removed = 0
        while expired := self._rows.expired(self._clock(), SWEEP_BATCH):
            purged = await self._rows.database.write(partial(self._purge, expired), frees=True)
            removed += purged
            if purged < len(expired):
                break
        return removed

    def _purge(self, expired: list[tuple[str, str]], tx: Transaction) -> int:
        """Remove those that are still there and still void: meanwhile one may have been made anew under its id."""
        purged = 0
        for namespace, id in expired:
            lease = self._rows.leases.find(tx, namespace, id)
            if lease is not None and not self._valid(lease):
                self._rows.remove(tx, namespace, id)
                purged += 1
        return purged

    def _require(self, tx: Transaction, namespace: str, id: str) -> None:
        if not self._valid(self._rows.leases.require(tx, namespace, id)):
            raise self._rows.leases.missing(id)

    def _valid(self, lease: Lease) -> bool:
        expires = expires_at(lease.labels)
        return expires is None or expires > self._clock()


def _fitting(found: Sequence[Resource]) -> Iterator[Resource]:
    """As many as fit into an answer, at least one."""
    size = 0
    for resource in found:
        size += 4 * len(resource.id) + 64
        if size > PAGE_BYTES and size > 4 * len(resource.id) + 64:
            return
        yield resource


def check_resource(resource: Resource) -> None:
    """Raise InvalidArgument when a resource is malformed, Unimplemented when its type is unknown."""
    kind, *rest = resource.type.split("/")
    if kind not in ("content", "ingests", "images", "snapshots"):
        raise Unimplemented(f"resource type {resource.type!r} is unknown")
    if kind == "snapshots" and (len(rest) != 1 or not rest[0]):
        raise InvalidArgument(f"resource type {resource.type!r}: snapshots/<snapshotter> is needed")
    if kind == "snapshots":
        check_identifier(rest[0], "snapshotter")
    if kind != "snapshots" and rest:
        raise InvalidArgument(f"resource type {resource.type!r}: {kind} has no parts")
    if not resource.id:
        raise InvalidArgument(f"a resource of type {resource.type!r} has an empty id")
    if kind == "content":
        check_digest(resource.id)


def _check_id(id: str) -> None:
    """An id travels in a header: a line of printable text without blanks around it."""
    if len(id) > ID_MAX or not id.isprintable() or id != id.strip():
        raise InvalidArgument(f"lease id {id[:ID_MAX]!r} is not valid: up to {ID_MAX} printable characters are")


def _made_id() -> str:
    return f"{time.time_ns()}-{secrets.token_urlsafe(3)}"

"""The rules of namespaces (containerd's): which are known, and when one may be forgotten."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

from wherry_shared.api.namespace import Namespace
from wherry_shared.catalog import Table, check_mask, raise_if_replayed
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry_shared.sqlite import Transaction
from wherry_shared.values import Page, check_identifier, check_labels, now, stored_labels, update_labels

RESERVED = "version"
"""The name that containerd's store takes for itself; `_`, the bus's, is no identifier to begin with."""
DELETED_MAX = 1024
"""How many deletions are remembered, so that an event from before, still on its way, does not revive the namespace."""

Leftovers = Callable[[str], Awaitable[list[str]]]
"""What is left of a namespace in other services ("images", ...). Unavailable when one of them does not answer."""


class Registry:
    """The namespaces of the node."""

    def __init__(self, namespaces: Table[Namespace], leftovers: Leftovers) -> None:
        self._namespaces = namespaces
        self._leftovers = leftovers
        self._known = set(namespaces.keys(""))
        self._deleted: dict[str, datetime] = {}

    def get(self, name: str) -> Namespace:
        """A namespace; one that is not known has no labels."""
        try:
            return self._namespaces.get("", name)
        except NotFound:
            return Namespace(name=name)

    async def walk(self, filters: Sequence[str], after: str, limit: int) -> Page[Namespace]:
        return await self._namespaces.page("", filters, after, limit)

    async def create(self, name: str, labels: dict[str, str]) -> Namespace:
        new = Namespace(name=_usable(name), labels=check_labels(stored_labels(labels)))

        def write(tx: Transaction) -> Namespace:
            self._namespaces.insert(tx, "", new)
            tx.publish("/namespaces/create", _event(new), namespace=name)
            return new

        created = await self._namespaces.database.mutate(write)
        self._known.add(name)
        return created

    async def update(self, name: str, labels: dict[str, str], mask: Sequence[str]) -> Namespace:
        check_mask(mask, (), ("labels",))

        def write(tx: Transaction) -> Namespace:
            old = self._namespaces.require(tx, "", name)
            new = Namespace(name=name, labels=update_labels(old.labels, labels, mask or ("labels",)))
            self._namespaces.replace(tx, "", new)
            tx.publish("/namespaces/update", _event(new), namespace=name)
            return new

        return await self._namespaces.database.mutate(write)

    async def delete(self, name: str) -> None:
        """Forget an empty namespace. FailedPrecondition names what is left; nothing locks it between look and deed."""
        raise_if_replayed(self._namespaces.database)
        left = await self._leftovers(name)
        if left:
            raise FailedPrecondition(f"namespace {name!r} must be empty, but it still has {', '.join(left)}")

        def write(tx: Transaction) -> None:
            self._namespaces.remove(tx, "", name)
            tx.publish("/namespaces/delete", {"name": name}, namespace=name)

        await self._namespaces.database.mutate(write, frees=True)
        self._known.discard(name)
        self._deleted[name] = now()
        if len(self._deleted) > DELETED_MAX:
            del self._deleted[next(iter(self._deleted))]

    def knows(self, name: str) -> bool:
        """Whether `seen` has nothing more to do for that namespace."""
        return name in self._known

    async def seen(self, name: str, at: datetime) -> None:
        """Something happened in `name` at that time: from now on it is known, unless it was deleted since."""
        deleted = self._deleted.get(name)
        if name in self._known or name == RESERVED or (deleted is not None and at <= deleted):
            return

        def write(tx: Transaction) -> None:
            new = Namespace(name=name)
            if self._namespaces.find(tx, "", name) is None:
                self._namespaces.insert(tx, "", new)
                tx.publish("/namespaces/create", _event(new), namespace=name)

        await self._namespaces.database.write(write)
        self._known.add(name)


def _usable(name: str) -> str:
    check_identifier(name, "namespace")
    if name == RESERVED:
        raise InvalidArgument(f"namespace {name!r} is reserved")
    return name


def _event(namespace: Namespace) -> dict[str, Any]:
    return {"name": namespace.name, "labels": namespace.labels}

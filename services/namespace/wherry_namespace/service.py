"""The edge of the namespace service. Its calls lie in no namespace themselves."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.api.namespace import Namespace, Namespaces
from wherry_shared.values import Page

from .registry import Registry


class NamespaceService(Namespaces):
    """The namespaces of the node."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def get(self, name: str) -> Namespace:
        return self._registry.get(name)

    async def walk(self, filters: Sequence[str] = (), after: str = "", limit: int = 1000) -> Page[Namespace]:
        return await self._registry.walk(filters, after, limit)

    async def create(self, name: str, labels: dict[str, str] | None = None) -> Namespace:
        return await self._registry.create(name, labels or {})

    async def update(self, name: str, labels: dict[str, str], mask: Sequence[str] = ()) -> Namespace:
        return await self._registry.update(name, labels, mask)

    async def delete(self, name: str) -> None:
        await self._registry.delete(name)

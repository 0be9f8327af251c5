"""The edge of the container service: the request's namespace."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared import context
from wherry_shared.api.container import Container, Containers
from wherry_shared.contract import immediate
from wherry_shared.values import Page

from .catalog import Catalog


class ContainerService(Containers):
    """Containers of the namespace in the context. They are roots of the collector and need no lease."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    @immediate
    async def get(self, id: str) -> Container:
        return self._catalog.get(context.namespace(), id)

    async def walk(
        self, filters: Sequence[str] = (), after: str = "", limit: int = 1000, spec: bool = True
    ) -> Page[Container]:
        return await self._catalog.walk(context.namespace(), filters, after, limit, spec=spec)

    async def create(self, container: Container) -> Container:
        return await self._catalog.create(context.namespace(), container, _tenant())

    async def update(self, container: Container, mask: Sequence[str] = ()) -> Container:
        return await self._catalog.update(context.namespace(), container, mask, _tenant())

    async def delete(self, id: str) -> None:
        await self._catalog.delete(context.namespace(), id)


def _tenant() -> str:
    """The name of who asks, if that is a tenant."""
    identity = context.current().identity
    return identity.name if identity.role == "tenant" else ""

"""The edge of the image service: the request's namespace, and its lease."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared import context
from wherry_shared.api.gc import Collections
from wherry_shared.api.image import Image, Images
from wherry_shared.api.lease import EXPIRE_LABEL, Leases, Resource
from wherry_shared.contract import immediate
from wherry_shared.values import Page

from .catalog import Catalog


class ImageService(Images):
    """Images of the namespace in the context. An image that expires is added to the caller's lease first."""

    def __init__(self, catalog: Catalog, leases: Leases, collections: Collections) -> None:
        self._catalog = catalog
        self._leases = leases
        self._collections = collections

    @immediate
    async def get(self, name: str) -> Image:
        return self._catalog.get(context.namespace(), name)

    async def walk(self, filters: Sequence[str] = (), after: str = "", limit: int = 1000) -> Page[Image]:
        return await self._catalog.walk(context.namespace(), filters, after, limit)

    async def create(self, image: Image) -> Image:
        if context.current().lease:
            await self._keep(self._catalog.created(image))
        return await self._catalog.create(context.namespace(), image)

    async def update(self, image: Image, mask: Sequence[str] = ()) -> Image:
        if context.current().lease:
            await self._keep(self._catalog.updated(context.namespace(), image, mask))
        return await self._catalog.update(context.namespace(), image, mask)

    async def delete(self, name: str, target: str = "", sync: bool = False) -> None:
        replayed: context.Replayed | None = None
        try:
            await self._catalog.delete(context.namespace(), name, target)
        except context.Replayed as e:  # it is gone already; whether it was collected then, nobody knows
            replayed = e
        if sync:
            with context.use(key=""):
                await self._collections.collect()
        if replayed is not None:
            raise replayed

    async def _keep(self, image: Image) -> None:
        """Put an image that expires on the caller's lease; its own key would clash with the request's."""
        if EXPIRE_LABEL not in image.labels:
            return
        with context.use(key=""):
            await self._leases.add_resource(context.current().lease, Resource(type="images", id=image.name))

"""The image service: names that point into content (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from ..contract import Contract, endpoint
from ..errors import AlreadyExists, NotFound
from ..records import Record, record
from ..values import Descriptor, Labels, Name, Page


@record
class Image(Record):
    """A name, the descriptor it points at, and labels. The target blob need not be there."""

    name: Name
    target: Descriptor
    labels: Labels = {}
    created_at: datetime | None = None
    updated_at: datetime | None = None


EVENTS = {
    "/images/create": "name labels",
    "/images/update": "name labels",
    "/images/delete": "name",
}


class Images(Contract, Protocol, service="image", version="1.0.0", events=EVENTS):
    """The images of one namespace: metadata only."""

    @endpoint(NotFound)
    async def get(self, name: Name) -> Image:
        """One image."""
        ...

    @endpoint()
    async def walk(self, filters: list[str] = [], after: str = "", limit: int = 1000) -> Page[Image]:
        """A window of the images that any filter matches, in order of their names."""
        ...

    @endpoint(AlreadyExists, mutates=True)
    async def create(self, image: Image) -> Image:
        """Record an image; its times are the service's."""
        ...

    @endpoint(NotFound, mutates=True)
    async def update(self, image: Image, mask: list[str] = []) -> Image:
        """Change an image. `mask`: `labels`, `labels.<key>`, `target`, `annotations`, `annotations.<key>` (of the
        target); empty replaces all but the creation time."""
        ...

    @endpoint(NotFound, mutates=True, timeout=60.0)
    async def delete(self, name: Name, target: str = "", sync: bool = False) -> None:
        """Forget an image. With `target`, only if it still points at that digest (NotFound otherwise).

        sync: wait until everything that only it kept is collected. Unavailable then: the image is gone, and the
        collection failed and is tried again later.
        """
        ...

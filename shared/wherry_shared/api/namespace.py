"""The namespace service (containerd's rules). Its calls belong to no namespace themselves."""

from __future__ import annotations

from typing import Protocol

from ..contract import Contract, endpoint
from ..errors import AlreadyExists, FailedPrecondition, NotFound
from ..records import Record, record
from ..values import Identifier, Labels, Page


@record
class Namespace(Record):
    """A namespace and its labels."""

    name: Identifier
    labels: Labels = {}


EVENTS = {
    "/namespaces/create": "name labels",
    "/namespaces/update": "name labels",
    "/namespaces/delete": "name",
}


class Namespaces(Contract, Protocol, service="namespace", version="1.0.0", events=EVENTS, namespaced=False):
    """The namespaces of a node. One need not be created first: what happens in it makes it known."""

    @endpoint()
    async def get(self, name: Identifier) -> Namespace:
        """One namespace; an unknown one is answered with no labels."""
        ...

    @endpoint()
    async def walk(self, filters: list[str] = [], after: str = "", limit: int = 1000) -> Page[Namespace]:
        """A window of the namespaces that any filter (name, labels.*) matches, in order of their names."""
        ...

    @endpoint(AlreadyExists, mutates=True)
    async def create(self, name: Identifier, labels: Labels = {}) -> Namespace:
        """Make a namespace known."""
        ...

    @endpoint(NotFound, mutates=True)
    async def update(self, name: Identifier, labels: Labels, mask: list[str] = []) -> Namespace:
        """Change labels. `mask`: `labels.<key>` only; empty replaces all."""
        ...

    @endpoint(NotFound, FailedPrecondition, mutates=True)
    async def delete(self, name: Identifier) -> None:
        """Forget a namespace. FailedPrecondition, naming what is left, unless it is empty in every service."""
        ...

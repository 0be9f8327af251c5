"""The rules of containers (containerd's): what may be recorded, what an update changes, what is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from wherry_shared.api.container import JOIN_LABEL, Container
from wherry_shared.api.task import LOG_LABEL
from wherry_shared.catalog import Table, check_mask, update_map
from wherry_shared.contract import without
from wherry_shared.errors import InvalidArgument
from wherry_shared.sqlite import Transaction
from wherry_shared.values import Page, check_identifier, check_labels, now, stored_labels, update_labels

MUTABLE = ("labels", "spec", "extensions", "image", "snapshot_key")
MAPS = ("labels", "extensions")
MADE_OF = ("spec", "image", "snapshot_key", "extensions")
# Labels that say what its next task is made of, too.
STEERING = (JOIN_LABEL, LOG_LABEL)
_without_spec = partial(without, field="spec")


class Catalog:
    """The containers of every namespace."""

    def __init__(self, containers: Table[Container]) -> None:
        self._containers = containers

    def get(self, namespace: str, id: str) -> Container:
        return self._containers.answer(namespace, id)

    async def walk(
        self, namespace: str, filters: Sequence[str], after: str, limit: int, *, spec: bool
    ) -> Page[Container]:
        shown = None if spec else _without_spec
        return await self._containers.page(namespace, filters, after, limit, shown=shown)

    async def create(self, namespace: str, container: Container, tenant: str = "") -> Container:
        """tenant: who asks, if that is one."""
        at = now()
        labels = check_labels(stored_labels(container.labels))
        new = container.model_copy(update={"labels": labels, "created_at": at, "updated_at": at, "tenant": tenant})
        _check(new)

        def write(tx: Transaction) -> Container:
            answer = self._containers.insert(tx, namespace, new)
            event = {"id": new.id, "image": new.image, "runtime": new.runtime.model_dump()}
            tx.publish("/containers/create", event, namespace=namespace)
            return answer

        return await self._containers.database.mutate(write)

    async def update(self, namespace: str, container: Container, mask: Sequence[str], tenant: str = "") -> Container:
        """Once a tenant has changed more than labels, or one that steers the task, it is the tenant's, whoever changes
        what is left of that later."""
        check_mask(mask, MUTABLE, MAPS)

        def write(tx: Transaction) -> Container:
            old = self._containers.require(tx, namespace, container.id)
            new = _changed(old, container, mask)
            if tenant and _made_of(new) != _made_of(old):
                new = new.model_copy(update={"tenant": tenant})
            answer = self._containers.replace(tx, namespace, new)
            event = {"id": new.id, "image": new.image, "labels": new.labels, "snapshot_key": new.snapshot_key}
            tx.publish("/containers/update", event, namespace=namespace)
            return answer

        return await self._containers.database.mutate(write)

    async def delete(self, namespace: str, id: str) -> None:
        def write(tx: Transaction) -> None:
            self._containers.remove(tx, namespace, id)
            tx.publish("/containers/delete", {"id": id}, namespace=namespace)

        await self._containers.database.mutate(write, frees=True)


def _made_of(container: Container) -> str:
    """As text: a runtime takes true for something else than 1, and Python does not."""
    steering = {key: value for key, value in container.labels.items() if key.startswith(STEERING)}
    return repr([*(getattr(container, name) for name in MADE_OF), steering])


def _changed(old: Container, new: Container, mask: Sequence[str]) -> Container:
    """`old` after an update. InvalidArgument when it would change what is fixed, or break a rule."""
    if not mask:
        if new.snapshotter != old.snapshotter:
            raise InvalidArgument(f"container {old.id!r}: snapshotter is immutable, it is {old.snapshotter!r}")
        if new.runtime.name != old.runtime.name:
            raise InvalidArgument(f"container {old.id!r}: runtime.name is immutable, it is {old.runtime.name!r}")
    paths = mask or MUTABLE
    changes: dict[str, Any] = {name: getattr(new, name) for name in ("spec", "image", "snapshot_key") if name in paths}
    changes["labels"] = update_labels(old.labels, new.labels, paths)
    changes["extensions"] = update_map(old.extensions, new.extensions, paths, "extensions")
    changed = old.model_copy(update={**changes, "updated_at": now()})
    _check(changed)
    return changed


def _check(container: Container) -> None:
    check_identifier(container.id, "container id")
    if not container.runtime.name:
        raise InvalidArgument(f"container {container.id!r}: runtime.name is empty")
    if container.snapshot_key and not container.snapshotter:
        raise InvalidArgument(f"container {container.id!r}: snapshot_key needs a snapshotter")
    if "" in container.extensions:
        raise InvalidArgument(f"container {container.id!r}: the key of an extension is empty")
    _check_json(container, "spec", container.spec)
    _check_json(container, "runtime.options", container.runtime.options)


def _check_json(container: Container, name: str, value: Any) -> None:
    """A spec ends as the runtime's config.json, options in an event: what JSON cannot say is refused here."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InvalidArgument(f"container {container.id!r}: {name} is no JSON: {e}") from None

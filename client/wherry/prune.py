"""Prune: which images and containers nobody needs, what removing them would free, and the removal.

Records are all that is deleted here; what only they kept, the collector removes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from wherry_shared.api.container import Container as ContainerRecord
from wherry_shared.api.image import Image as Record
from wherry_shared.api.lease import EXPIRE_LABEL
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry_shared.references import parse_duration, parse_time
from wherry_shared.values import now

from .census import Census, Garbage, census, snapshot_sizes
from .container import Container
from .paging import walk
from .registry.reference import Reference
from .usage import snapshotters

if TYPE_CHECKING:
    from .client import Client

_DAYS = re.compile(r"(\d+)d")


@dataclass(frozen=True)
class Wanted:
    """What may go.

    Images that no container uses and that are dangling: without a tag, or pointing at nothing that is here; with
    `all` every image that no container uses. As with Docker a container uses the name that it was made by: another
    name of the same target goes, and takes nothing along. containers: containers that do not run, too, and their
    snapshots. labels: `key`, `key=value` or, for its absence, `key!=value` / `!key`; all must hold. until: only what
    was made before that.
    """

    all: bool = False
    containers: bool = False
    labels: Sequence[str] = ()
    until: datetime | None = None

    def matches(self, labels: dict[str, str], created: datetime | None) -> bool:
        """Whether the filters let it go."""
        if self.until is not None and (created is None or created >= self.until):
            return False
        return all(_label(condition, labels) for condition in self.labels)


def _label(condition: str, labels: dict[str, str]) -> bool:
    if condition.startswith("!"):
        return condition[1:] not in labels
    key, unequal, value = condition.partition("!=")
    if unequal:
        return labels.get(key) != value
    key, equal, value = condition.partition("=")
    return labels.get(key) == value if equal else key in labels


def parse_filters(filters: Sequence[str]) -> tuple[tuple[str, ...], datetime | None]:
    """docker's `--filter` values (`label=x`, `label!=x`, `until=24h` or a time) as `labels` and `until` of Wanted."""
    labels: list[str] = []
    until: datetime | None = None
    for text in filters:
        if text.startswith("label!="):
            rest = text.removeprefix("label!=")
            labels.append(rest.replace("=", "!=", 1) if "=" in rest else f"!{rest}")
        elif text.startswith("label="):
            labels.append(text.removeprefix("label="))
        elif text.startswith("until="):
            until = parse_until(text.removeprefix("until="))
        else:
            raise InvalidArgument(f"filter {text[:80]!r} is not one: label=, label!= and until= are")
    return tuple(labels), until


def parse_until(text: str) -> datetime:
    """A point in the past: RFC 3339, or how long ago (`90m`, `24h`, `7d`)."""
    found = parse_time(text)
    if found is not None:
        return found
    days = _DAYS.fullmatch(text)
    seconds = int(days[1]) * 86400.0 if days and len(days[1]) < 6 else parse_duration(text)
    if seconds is None or not 0 <= seconds < 1e10:
        raise InvalidArgument(f"until {text[:80]!r} is neither a time (RFC 3339) nor a duration like 24h or 7d")
    return now() - timedelta(seconds=seconds)


@dataclass(frozen=True)
class Plan:
    """What a prune would remove, and what would go with it. Sizes are bytes."""

    images: list[Record]
    containers: list[ContainerRecord]
    garbage: Garbage
    snapshot_sizes: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.images or self.containers or self.garbage.blobs or self.garbage.snapshots)

    @property
    def size(self) -> int:
        """The bytes of all blobs and snapshots that would go."""
        return self.garbage.size + sum(self.snapshot_sizes.values())


async def plan(client: Client, wanted: Wanted) -> Plan:
    """Look, and remove nothing."""
    counted = await census(client, await snapshotters(client))
    idle = await _idle(client, counted, wanted) if wanted.containers else []
    gone = {container.id for container in idle}
    used = {container.image for container in counted.containers if container.id not in gone}
    images = [image for image in counted.images if _may_go(image, used, counted, wanted)]
    garbage = counted.garbage([image.name for image in images], gone)
    return Plan(images, idle, garbage, await snapshot_sizes(client, garbage.snapshots))


def _may_go(image: Record, used: set[str], counted: Census, wanted: Wanted) -> bool:
    if image.name in used or not wanted.matches(image.labels, image.created_at):
        return False
    return wanted.all or is_dangling(image.name) or image.target.digest not in counted.blobs


def is_dangling(name: str) -> bool:
    """Whether an image's name is none that people give: without a tag, or no reference at all."""
    try:
        return not Reference.parse(name).tag
    except InvalidArgument:
        return True


async def _idle(client: Client, counted: Census, wanted: Wanted) -> list[ContainerRecord]:
    running = {task.container_id for task in await walk(client.tasks.walk) if task.status != "stopped"}
    return [
        container for container in counted.containers
        if container.id not in running and wanted.matches(container.labels, container.created_at)
    ]  # fmt: skip


@dataclass(frozen=True)
class Pruned:
    """What went. freed: the bytes of content and snapshots that the collection removed, as the plan measured them."""

    images: list[str]
    containers: list[str]
    freed: int


async def carry_out(client: Client, made: Plan) -> Pruned:
    """Remove what a plan names, unless it changed since, and wait for the collection.

    A container that runs by now stays, and so does an image that points elsewhere by now, or that is used.
    """
    containers = [container.id for container in made.containers if await _remove(client, container.id)]
    used = {container.image for container in await walk(client.containers.walk, spec=False)}
    images = []
    for image in made.images:
        if image.name in used:
            continue
        with contextlib.suppress(NotFound):
            await client.images.delete(image.name, image.target.digest)
            images.append(image.name)
    await collect(client)
    return Pruned(images, containers, await _freed(client, made))


async def _remove(client: Client, id: str) -> bool:
    try:
        container = await client.container(id)
        with contextlib.suppress(NotFound):
            await client.tasks.delete(id, "", False)
        await Container(client, container.record).delete(snapshot=True)
    except (NotFound, FailedPrecondition):
        return False
    return True


async def collect(client: Client) -> None:
    """Have the node collect what nothing keeps, and wait for it."""
    expire = (now() + timedelta(hours=1)).isoformat(timespec="seconds")
    lease = await client.leases.create(labels={EXPIRE_LABEL: expire})
    await client.leases.delete(lease.id, sync=True)


async def _freed(client: Client, made: Plan) -> int:
    left = {blob.digest for blob in await walk(client.content.walk)}
    freed = sum(blob.size for blob in made.garbage.blobs if blob.digest not in left)
    still: set[tuple[str, str]] = set()
    for name in {snapshotter for snapshotter, _ in made.snapshot_sizes}:
        still |= {(name, snapshot.name) for snapshot in await walk(client.snapshots.walk, snapshotter=name)}
    return freed + sum(size for key, size in made.snapshot_sizes.items() if key not in still)

"""Commit: what a container changed as a layer, and an image of it on the image that the container was made from."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import shlex
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wherry_shared.api.diff import UNCOMPRESSED_LABEL, Change
from wherry_shared.api.image import Image as Record
from wherry_shared.api.task import HOLD_SECONDS, Tasks
from wherry_shared.bus.proxy import walk as pages
from wherry_shared.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry_shared.streams import write_blob
from wherry_shared.values import Descriptor, Mount, now

from .graph import manifest_labels
from .image import Image, Resolved, put_record, read_document
from .paging import walk
from .registry import documents
from .registry.reference import Reference
from .unpack import chain_ids

if TYPE_CHECKING:
    from .client import Client
    from .container import Container

log = logging.getLogger("wherry.commit")

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYERS = {"gzip": f"{_LAYER}+gzip", "zstd": f"{_LAYER}+zstd", "none": _LAYER}
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
# The same bytes under OCI's name for them: a manifest does not mix the two.
_TO_OCI = {_DOCKER_LAYER: _LAYER, f"{_DOCKER_LAYER}.gzip": f"{_LAYER}+gzip", f"{_DOCKER_LAYER}.zstd": f"{_LAYER}+zstd"}
_SHELL = ["/bin/sh", "-c"]
_VIEW_PREFIX = "wherry-view-"


@dataclass(frozen=True)
class Wish:
    """How to commit.

    pause: a running container stands still meanwhile, so that the layer is one moment's. changes: instructions as in
    a Dockerfile: CMD, ENTRYPOINT, ENV, WORKDIR, USER, LABEL, EXPOSE, VOLUME, STOPSIGNAL. compression: of the layer,
    `gzip`, `zstd` or `none`. unpack: make the image's snapshot too. source_date_epoch: seconds since 1970 that stand
    for now, and that no file of the layer is newer than: the same changes then give the same image.
    """

    author: str = ""
    message: str = ""
    changes: Sequence[str] = field(default_factory=tuple)
    compression: str = "gzip"
    pause: bool = True
    unpack: bool = False
    source_date_epoch: int | None = None

    def check(self) -> Wish:
        """Itself; InvalidArgument when it asks for what there is not."""
        if self.compression not in _LAYERS:
            raise InvalidArgument(f"compression {self.compression[:40]!r} is not one: gzip, zstd and none are")
        apply_changes({}, self.changes)
        return self


class Commit:
    """One commit of one container."""

    def __init__(self, container: Container, wish: Wish) -> None:
        self._container = container
        self._client: Client = container.client
        self._wish = wish.check()

    async def run(self, name: str) -> Image:
        """Make the layer, config and manifest and record them under `name`, which an older image may have had.

        FailedPrecondition: the container has no snapshot, or nothing knows any more what image it was made from.
        """
        client, record = self._client, self._container.record
        reference = str(Reference.parse(name).check_target(""))
        async with client.lease():
            parent = await parent_of(self._container)
            base = await self._base(parent)
            layer, diff_id = await self._layer(parent)
            raw = documents.parse_object(await read_document(client, base.manifest.config), "image config")
            config = self._config(raw, diff_id)
            target = await self._documents(base, config, layer)
            image = await put_record(client, Record(name=reference, target=target), ["target"])
            if self._wish.unpack:
                await image.unpack(record.snapshotter)
        return image

    # ---- the image it stands on

    async def _base(self, parent: str) -> Resolved:
        """The image whose topmost snapshot the container stands on: by its name, or, moved meanwhile, by looking."""
        client, name = self._client, self._container.record.image
        if not parent:
            raise FailedPrecondition(f"container {self._container.id} stands on no image")
        tried = [Image(client, await client.images.get(name))] if await self._has_image(name) else []
        for image in tried:
            if (found := await self._resolved(image, parent)) is not None:
                return found
        for other in await walk(client.images.walk):
            if (found := await self._resolved(Image(client, other), parent)) is not None:
                return found
        raise FailedPrecondition(
            f"container {self._container.id} was made from an image {name or ''!r} that is not here any more"
        )

    async def _has_image(self, name: str) -> bool:
        with suppress(NotFound):
            return bool(name and await self._client.images.get(name))
        return False

    async def _resolved(self, image: Image, parent: str) -> Resolved | None:
        with suppress(WherryError):  # it is for another platform, or not all here: not this one then
            resolved = await image.resolve(self._container.platform)
            if chain_ids(resolved.config.diff_ids)[-1:] == [parent]:
                return resolved
        return None

    # ---- its layer

    async def _layer(self, parent: str) -> tuple[Descriptor, str]:
        """The blob of the changes, and its diff id."""
        client, record = self._client, self._container.record
        media_type = _LAYERS[self._wish.compression]
        async with viewed(client, record.snapshotter, parent) as left, self._still():
            layer = await client.diff.compare(
                left, await self._container.mounts(), media_type, source_date_epoch=self._wish.source_date_epoch
            )
        if media_type == _LAYER:
            return layer, layer.digest
        info = await client.content.info(layer.digest)
        return layer, info.labels[UNCOMPRESSED_LABEL]

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """Nothing in the container runs inside, if that is wished and it runs at all. Aborted: it did, after all.

        It is held, and not just paused: whatever becomes of this process, the container goes on.
        """
        tasks, id = self._client.tasks, self._container.id
        running = False
        if self._wish.pause:
            with suppress(NotFound):
                running = (await tasks.get(id)).status == "running"
        if not running:
            yield
            return
        hold = Hold(tasks, id)
        try:
            await hold.begin()
            yield
        finally:
            await asyncio.shield(hold.end())
        if hold.broken:
            raise Aborted(f"container {id} went on while its files were read: somebody resumed it, or nobody held it")

    # ---- documents

    def _config(self, config: dict[str, Any], diff_id: str) -> dict[str, Any]:
        """The image config with the changes and the layer in it; unknown fields stay."""
        wish, epoch = self._wish, self._wish.source_date_epoch
        at = now() if epoch is None else datetime.fromtimestamp(epoch, UTC)
        created = at.isoformat(timespec="microseconds").replace("+00:00", "Z")
        config["created"] = created
        if wish.author:
            config["author"] = wish.author
        config["config"] = apply_changes(config.get("config") or {}, wish.changes)
        rootfs = config.setdefault("rootfs", {"type": "layers"})
        rootfs["diff_ids"] = [*(rootfs.get("diff_ids") or []), diff_id]
        entry = {"created": created, "created_by": "wherry commit", "author": wish.author, "comment": wish.message}
        config["history"] = [*(config.get("history") or []), {k: v for k, v in entry.items() if v}]
        return config

    async def _documents(self, base: Resolved, config: dict[str, Any], layer: Descriptor) -> Descriptor:
        """Write config and manifest with the labels that keep what they name; answers the manifest's descriptor."""
        layers = [_as_oci(each) for each in base.manifest.layers]
        made = await self._store(config, _CONFIG, {})
        manifest = documents.Manifest(documents.OCI_MANIFEST, made, (*layers, layer), {})
        document = {
            "schemaVersion": 2,
            "mediaType": documents.OCI_MANIFEST,
            "config": _plain(made),
            "layers": [_plain(each) for each in manifest.layers],
        }
        return await self._store(document, documents.OCI_MANIFEST, manifest_labels(manifest))

    async def _store(self, document: dict[str, Any], media_type: str, labels: dict[str, str]) -> Descriptor:
        data = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        content = self._client.content
        info = await write_blob(content, f"commit-{digest}", data, size=len(data), expected=digest, labels=labels)
        if not labels.items() <= info.labels.items():
            await content.update(digest, labels, [f"labels.{key}" for key in labels])
        return Descriptor(media_type=media_type, digest=digest, size=len(data))


class Hold:
    """A running container that stands still until the end, or until nobody asks for it any more (`Tasks.pause`)."""

    def __init__(self, tasks: Tasks, id: str) -> None:
        self._tasks, self._id = tasks, id
        self._name = secrets.token_hex(8)
        self._pausing: asyncio.Future[None] | None = None
        self._keeping: asyncio.Future[None] | None = None
        self.broken = False
        """Whether it went on before the end."""

    async def begin(self) -> None:
        """FailedPrecondition: it does not run (any more), or stands still already."""
        self._pausing = asyncio.ensure_future(self._tasks.pause(self._id, self._name))
        await asyncio.shield(self._pausing)
        self._keeping = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(HOLD_SECONDS / 6)
            try:
                await self._tasks.pause(self._id, self._name)
            except (NotFound, FailedPrecondition):
                return await self._look()
            except WherryError as e:
                log.info("holding %s: %s", self._id, e)

    async def _look(self) -> None:
        """It is not held. One that was killed meanwhile did not go on; nor did one of a service that knows no holds."""
        with suppress(WherryError):
            self.broken = self.broken or (await self._tasks.get(self._id)).status == "running"

    async def end(self) -> None:
        """Resume what was paused, also by a request whose answer nobody awaited."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        try:
            if self._pausing is not None:
                await self._pausing
        except (NotFound, FailedPrecondition):
            return  # it does not run, or somebody else has paused it
        except WherryError:
            pass  # nobody knows
        try:
            await self._tasks.resume(self._id, self._name)
        except (NotFound, FailedPrecondition):
            await self._look()


# ---- what differs


async def parent_of(container: Container) -> str:
    """The committed snapshot that a container's own stands on. FailedPrecondition: it has none of its own."""
    record = container.record
    if not record.snapshot_key:
        raise FailedPrecondition(f"container {container.id} has no snapshot")
    return (await container.client.snapshots.stat(record.snapshotter, record.snapshot_key)).parent


@asynccontextmanager
async def viewed(client: Client, snapshotter: str, parent: str) -> AsyncIterator[list[Mount]]:
    """The mounts of a committed snapshot ("": of an empty tree), through a view that is gone at the end."""
    if not parent:
        yield []
        return
    key = f"{_VIEW_PREFIX}{secrets.token_hex(8)}"
    try:
        yield await client.snapshots.view(snapshotter, key, parent)
    finally:
        with suppress(NotFound):
            await asyncio.shield(client.snapshots.remove(snapshotter, key))


async def changes(client: Client, left: list[Mount], right: list[Mount]) -> AsyncIterator[Change]:
    """What differs between two trees, in the order of names."""
    async for page in pages(client.diff.changes, left=left, right=right):
        for change in page.items:
            yield change


@asynccontextmanager
async def tree(client: Client, name: str, snapshotter: str) -> AsyncIterator[list[Mount]]:
    """The mounts of what a name stands for: a container, a snapshot, or an image (then unpacked). NotFound."""
    container, kind = None, ""
    with suppress(NotFound, InvalidArgument):
        container = await client.container(name)
    with suppress(NotFound):
        kind = (await client.snapshots.stat(snapshotter, name)).kind
    if container is not None:
        yield await container.mounts()
    elif kind in ("active", "view"):
        yield await client.snapshots.mounts(snapshotter, name)
    else:
        top = name if kind else await (await client.image(name)).unpack(snapshotter)
        async with viewed(client, snapshotter, top) as mounts:
            yield mounts


# ---- the changes to the config


def apply_changes(config: dict[str, Any], instructions: Sequence[str]) -> dict[str, Any]:
    """An image's `config` after Dockerfile instructions. InvalidArgument: one that is not understood.

    An ENTRYPOINT without a CMD takes the image's CMD away, which was for another entrypoint.
    """
    made = dict(config)
    commanded = False
    for instruction in instructions:
        word, _, rest = instruction.strip().partition(" ")
        change, rest = _INSTRUCTIONS.get(word.upper()), rest.strip()
        if change is None or not rest:
            raise InvalidArgument(f"the change {instruction[:100]!r} is none of {', '.join(sorted(_INSTRUCTIONS))}")
        change(made, rest)
        commanded = commanded or word.upper() == "CMD"
        if word.upper() == "ENTRYPOINT" and not commanded:
            made.pop("Cmd", None)
    return made


def _command(text: str) -> list[str]:
    """The exec form, a JSON list, as it is; anything else is for the shell."""
    if text.startswith("["):
        with suppress(ValueError):
            value = json.loads(text)
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return value
    return [*_SHELL, text]


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """`K=V K2="a b"`, or the old `K all the rest`."""
    key, blank, value = text.partition(" ")
    if "=" not in key:
        if not blank:
            raise InvalidArgument(f"{text[:100]!r} is not NAME=VALUE")
        yield key, value.strip()
        return
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise InvalidArgument(f"{text[:100]!r}: {e}") from None
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals):
            raise InvalidArgument(f"{word[:100]!r} is not NAME=VALUE")
        yield name, value


def _env(config: dict[str, Any], text: str) -> None:
    known = dict(item.partition("=")[::2] for item in config.get("Env") or [])
    known.update(_pairs(text))
    config["Env"] = [f"{name}={value}" for name, value in known.items()]


def _label(config: dict[str, Any], text: str) -> None:
    config["Labels"] = {**(config.get("Labels") or {}), **dict(_pairs(text))}


def _expose(config: dict[str, Any], text: str) -> None:
    ports = dict(config.get("ExposedPorts") or {})
    for word in text.split():
        port, _, protocol = word.partition("/")
        if not port.isdigit() or not 0 < int(port) < 65536 or protocol not in ("", "tcp", "udp", "sctp"):
            raise InvalidArgument(f"{word[:100]!r} is no port")
        ports[f"{port}/{protocol or 'tcp'}"] = {}
    config["ExposedPorts"] = ports


def _volume(config: dict[str, Any], text: str) -> None:
    paths = _command(text) if text.startswith("[") else text.split()
    config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in paths}}


def _set(key: str) -> Callable[[dict[str, Any], str], None]:
    def change(config: dict[str, Any], text: str) -> None:
        config[key] = text

    return change


def _set_command(key: str) -> Callable[[dict[str, Any], str], None]:
    def change(config: dict[str, Any], text: str) -> None:
        config[key] = _command(text)

    return change


_INSTRUCTIONS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "CMD": _set_command("Cmd"), "ENTRYPOINT": _set_command("Entrypoint"), "ENV": _env, "WORKDIR": _set("WorkingDir"),
    "USER": _set("User"), "LABEL": _label, "EXPOSE": _expose, "VOLUME": _volume, "STOPSIGNAL": _set("StopSignal"),
}  # fmt: skip


# ---- small things


def _as_oci(layer: Descriptor) -> Descriptor:
    return layer.model_copy(update={"media_type": _TO_OCI.get(layer.media_type, layer.media_type)})


def _plain(descriptor: Descriptor) -> dict[str, Any]:
    document: dict[str, Any] = {
        "mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size
    }  # fmt: skip
    if descriptor.urls:  # where a layer is that is not handed on
        document["urls"] = descriptor.urls
    if descriptor.annotations:
        document["annotations"] = descriptor.annotations
    return document

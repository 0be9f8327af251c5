"""The rules of images (containerd's): what may be recorded, what an update changes, what is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from wherry_shared.api.image import Image
from wherry_shared.catalog import Table, check_mask, raise_if_replayed, update_map
from wherry_shared.errors import InvalidArgument, NotFound
from wherry_shared.sqlite import Transaction
from wherry_shared.values import Descriptor, Page, check_digest, check_labels, now, stored_labels, update_labels

NAMES = ("labels", "target", "annotations")
MAPS = ("labels", "annotations")


class Catalog:
    """The images of every namespace."""

    def __init__(self, images: Table[Image]) -> None:
        self._images = images

    def get(self, namespace: str, name: str) -> Image:
        return self._images.answer(namespace, name)

    async def walk(self, namespace: str, filters: Sequence[str], after: str, limit: int) -> Page[Image]:
        return await self._images.page(namespace, filters, after, limit)

    def created(self, image: Image) -> Image:
        """What `create` would record. Replayed when the request in hand already did."""
        raise_if_replayed(self._images.database)
        return _created(image)

    async def create(self, namespace: str, image: Image) -> Image:
        new = _created(image)

        def write(tx: Transaction) -> Image:
            answer = self._images.insert(tx, namespace, new)
            tx.publish("/images/create", _event(new), namespace=namespace)
            return answer

        return await self._images.database.mutate(write)

    def updated(self, namespace: str, image: Image, mask: Sequence[str]) -> Image:
        """What `update` would make of the image as it stands. Replayed when the request in hand already did."""
        raise_if_replayed(self._images.database)
        return _changed(self._images.get(namespace, image.name), image, mask)

    async def update(self, namespace: str, image: Image, mask: Sequence[str]) -> Image:
        check_mask(mask, NAMES, MAPS)

        def write(tx: Transaction) -> Image:
            new = _changed(self._images.require(tx, namespace, image.name), image, mask)
            answer = self._images.replace(tx, namespace, new)
            tx.publish("/images/update", _event(new), namespace=namespace)
            return answer

        return await self._images.database.mutate(write)

    async def delete(self, namespace: str, name: str, target: str) -> None:
        if target:
            check_digest(target)

        def write(tx: Transaction) -> None:
            if target and (there := self._images.require(tx, namespace, name).target.digest) != target:
                raise NotFound(f"image {name!r} with target {target}: not found, it is at {there}")
            self._images.remove(tx, namespace, name)
            tx.publish("/images/delete", {"name": name}, namespace=namespace)

        await self._images.database.mutate(write, frees=True)


def _created(image: Image) -> Image:
    """The image as it is recorded. InvalidArgument when it may not be."""
    at = now()
    labels = check_labels(stored_labels(image.labels))
    return image.model_copy(
        update={"target": _checked(image.name, image.target), "labels": labels, "created_at": at, "updated_at": at}
    )


def _changed(old: Image, new: Image, mask: Sequence[str]) -> Image:
    """`old` after an update; a target is replaced as a unit, before its annotations."""
    check_mask(mask, NAMES, MAPS)
    paths = mask or ("labels", "target")
    target = new.target if "target" in paths else old.target
    annotations = update_map(target.annotations, new.target.annotations, paths, "annotations")
    return old.model_copy(
        update={
            "target": _checked(old.name, target.model_copy(update={"annotations": annotations})),
            "labels": update_labels(old.labels, new.labels, paths),
            "updated_at": now(),
        }
    )


def _checked(name: str, target: Descriptor) -> Descriptor:
    """A target as it is kept: annotations follow the rule of labels, an empty value is not there.

    A name that ends with a digest means that digest's image alone: whoever names one trusts what it finds.
    """
    _, at, digest = name.rpartition("@")
    if at and digest.startswith(("sha256:", "sha512:")) and digest != target.digest:
        raise InvalidArgument(f"image {name!r} cannot be {target.digest}: its name is another digest's")
    if target.size <= 0:
        raise InvalidArgument(f"target.size {target.size} is not a size: more than 0 is needed")
    if not target.media_type:
        raise InvalidArgument("target.media_type is empty")
    return target.model_copy(update={"annotations": stored_labels(target.annotations)})


def _event(image: Image) -> dict[str, Any]:
    return {"name": image.name, "labels": image.labels} if image.labels else {"name": image.name}

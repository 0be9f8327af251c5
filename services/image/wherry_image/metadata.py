"""The rows of the image service: one record per image."""

from __future__ import annotations

from wherry_shared.api.image import Image
from wherry_shared.catalog import SCHEMA, Table
from wherry_shared.collectable import migration
from wherry_shared.filters import Adaptor, fields
from wherry_shared.references import IMAGES
from wherry_shared.sqlite import Database

MIGRATIONS = (SCHEMA, migration(IMAGES))


def table(database: Database) -> Table[Image]:
    """The images of every namespace."""
    return Table(database, Image, noun="image", key=lambda image: image.name, adaptor=_fields)


def _fields(image: Image) -> Adaptor:
    target = image.target
    values = {"name": image.name, "target.digest": target.digest, "target.mediatype": target.media_type}
    return fields(values, labels=image.labels, annotations=target.annotations)

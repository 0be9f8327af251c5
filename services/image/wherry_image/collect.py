"""The image service's part in garbage collections."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from wherry_shared.api.gc import ImageCollection
from wherry_shared.collectable import Collection, Records, labels_of
from wherry_shared.contract import unpack
from wherry_shared.references import CONTENT, IMAGES, Node, expires_at
from wherry_shared.sqlite import Database, Transaction
from wherry_shared.values import now


class ImageCollector(Collection, ImageCollection):
    """An image keeps its target. One with `gc.expire` lives by itself up to then, and later if it is named."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = now) -> None:
        self._clock = clock
        super().__init__(database, [Records(IMAGES, self._describe, _removed)])

    def _describe(self, node: Node, document: bytes) -> None:
        record = unpack(document)
        labels = labels_of(record)
        expires = expires_at(labels)
        node.root = expires is None or expires > self._clock()
        node.until = expires.timestamp() if expires is not None and node.root else 0.0
        node.hard.append((CONTENT, record["target"]["digest"]))
        node.refer(labels)


def _removed(tx: Transaction, namespace: str, name: str) -> None:
    tx.publish("/images/delete", {"name": name}, namespace=namespace)

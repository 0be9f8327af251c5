"""The content service's part in garbage collections."""

from __future__ import annotations

from wherry_shared.api.gc import ContentCollection
from wherry_shared.collectable import Collection, Records
from wherry_shared.references import CONTENT, PREFIX, Node, some_fields
from wherry_shared.sqlite import Database

from .metadata import IngestRecords
from .store import Store

_MARK = PREFIX.encode()


class ContentCollector(Collection, ContentCollection):
    """A blob keeps what its labels name. An ingest keeps the blob that it is to be; without a lease it lives a day."""

    def __init__(self, database: Database, store: Store) -> None:
        super().__init__(database, [Records(CONTENT, _describe), IngestRecords()], store.reap)


def _describe(node: Node, document: bytes) -> None:
    if _MARK in document:
        node.refer(some_fields(document, ("labels",)).get("labels", {}), rootable=True)

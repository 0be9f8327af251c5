"""One table of records by (namespace, key): what the image, container, namespace and lease services keep.

A record is a model, kept as one msgpack document: a get is one indexed row and one decoding. Rules live in the
services; here is what is the same in each: rows, pages with filters, masks of an update.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from . import context
from .contract import Encoded, pack, pack_page, unpack
from .errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from .filters import Adaptor, Matcher, compile_filters
from .records import Record
from .sqlite import Database, Transaction
from .values import Page

M = TypeVar("M", bound=Record)
V = TypeVar("V")

SCHEMA = """
CREATE TABLE records (
    namespace TEXT NOT NULL, key TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (namespace, key))
"""
LIMIT_MAX = 1000
PAGE_BYTES = 448 * 1024
RECORD_BYTES = 768 * 1024
"""The most bytes of one record: it must fit into an answer of under 1 MiB."""
_CHUNK = 64  # rows read at once
_TURN = 0.002  # seconds of a walk before other requests have their turn


class Table(Generic[M]):
    """The records of one service's database, whose migrations begin with SCHEMA.

    noun: what errors call a record. key: the record's name in its namespace. adaptor: its fields for filters.
    """

    def __init__(
        self, database: Database, model: type[M], *, noun: str, key: Callable[[M], str], adaptor: Callable[[M], Adaptor]
    ) -> None:
        self.database = database
        self._model = model
        self._noun = noun
        self._key = key
        self._adaptor = adaptor

    def get(self, namespace: str, key: str) -> M:
        """One record. NotFound when it is not there."""
        row = self.database.one("SELECT record FROM records WHERE namespace = ? AND key = ?", (namespace, key))
        if row is None:
            raise self.missing(key)
        return self._model.model_validate(unpack(row[0]))

    def answer(self, namespace: str, key: str) -> M:
        """One record for an answer: as it is stored, which is how it travels (`contract.Encoded`). NotFound."""
        row = self.database.one("SELECT record FROM records WHERE namespace = ? AND key = ?", (namespace, key))
        if row is None:
            raise self.missing(key)
        return cast(M, Encoded(row[0]))

    async def page(
        self, namespace: str, filters: Sequence[str], after: str, limit: int, *,
        keep: Callable[[M], bool] | None = None, shown: Callable[[bytes], bytes] | None = None,
    ) -> Page[M]:  # fmt: skip
        """The records after the key `after`, in order of their keys (by code points), that the filters match: a page
        for an answer, as it travels (`contract.Encoded`).

        shown: what of an encoded record the answer has, all unless given. At most `limit` (clamped to 1..1000) of them
        and about 448 KiB. Other requests run every few milliseconds, so what is written meanwhile may or may not be
        seen.
        """
        matches = compile_filters(filters)
        limit = min(max(limit, 1), LIMIT_MAX)
        plain = matches.everything and keep is None
        documents: list[bytes] = []
        size = 0
        turn = time.monotonic() + _TURN
        while True:
            rows = self._rows(namespace, after, _CHUNK)
            for key, document in rows:
                if plain or self._fits(document, matches, keep):
                    document = shown(document) if shown else document
                    if documents and (len(documents) == limit or size + len(document) > PAGE_BYTES):
                        return cast(Page[M], pack_page(documents, after))
                    documents.append(document)
                    size += len(document)
                after = key
                if time.monotonic() > turn:
                    await asyncio.sleep(0)
                    turn = time.monotonic() + _TURN
            if len(rows) < _CHUNK:
                return cast(Page[M], pack_page(documents, ""))

    def _fits(self, document: bytes, matches: Matcher, keep: Callable[[M], bool] | None) -> bool:
        record = self._model.model_validate(unpack(document))
        return (matches.everything or matches(self._adaptor(record))) and (keep is None or keep(record))

    def keys(self, namespace: str) -> list[str]:
        """Every key of a namespace, in order."""
        rows = self.database.all("SELECT key FROM records WHERE namespace = ? ORDER BY key", (namespace,))
        return [row[0] for row in rows]

    def find(self, tx: Transaction, namespace: str, key: str) -> M | None:
        """One record as the transaction sees it, or None."""
        row = tx.one("SELECT record FROM records WHERE namespace = ? AND key = ?", (namespace, key))
        return None if row is None else self._model.model_validate(unpack(row[0]))

    def require(self, tx: Transaction, namespace: str, key: str) -> M:
        """One record as the transaction sees it. NotFound when it is not there."""
        record = self.find(tx, namespace, key)
        if record is None:
            raise self.missing(key)
        return record

    def insert(self, tx: Transaction, namespace: str, record: M) -> M:
        """Add a record; it is answered as it travels (`contract.Encoded`). AlreadyExists when its key is taken."""
        key, document = self._key(record), self._encode(record)
        done = tx.execute(
            "INSERT INTO records (namespace, key, record) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (namespace, key, document),
        )
        if not done.rowcount:
            raise AlreadyExists(f"{self._noun} {key!r}: already exists")
        return cast(M, Encoded(document))

    def replace(self, tx: Transaction, namespace: str, record: M) -> M:
        """Put a record in the place of the one with its key; it is answered as it travels. NotFound when there is
        none."""
        key, document = self._key(record), self._encode(record)
        done = tx.execute("UPDATE records SET record = ? WHERE namespace = ? AND key = ?", (document, namespace, key))
        if not done.rowcount:
            raise self.missing(key)
        return cast(M, Encoded(document))

    def remove(self, tx: Transaction, namespace: str, key: str) -> None:
        """Take a record out. NotFound when it is not there."""
        if not tx.execute("DELETE FROM records WHERE namespace = ? AND key = ?", (namespace, key)).rowcount:
            raise self.missing(key)

    def missing(self, key: str) -> NotFound:
        return NotFound(f"{self._noun} {key!r}: not found")

    def _rows(self, namespace: str, after: str, limit: int) -> list[tuple[str, bytes]]:
        return self.database.all(
            "SELECT key, record FROM records WHERE namespace = ? AND key > ? ORDER BY key LIMIT ?",
            (namespace, after, limit),
        )

    def _encode(self, record: M) -> bytes:
        document = pack(record.model_dump(exclude_defaults=True))
        if len(document) > RECORD_BYTES:
            raise ResourceExhausted(
                f"{self._noun} {self._key(record)!r} takes {len(document)} bytes, and at most {RECORD_BYTES} fit"
            )
        return document


def check_mask(mask: Iterable[str], names: Collection[str], maps: Collection[str]) -> None:
    """Raise InvalidArgument, naming the path, unless each is one of `names` or `<map>.<key>` of one of `maps`."""
    for path in mask:
        name, _, key = path.partition(".")
        if path not in names and not (name in maps and key):
            known = ", ".join([*names, *(f"{m}.<key>" for m in maps)])
            raise InvalidArgument(f"path {path!r} in the update mask is unknown or cannot be changed; known: {known}")


def update_map(old: Mapping[str, V], new: Mapping[str, V], mask: Iterable[str], name: str) -> dict[str, V]:
    """The map after an update with a mask: `<name>` replaces it, `<name>.<key>` one entry (or takes it out)."""
    result = dict(old)
    for path in mask:
        if path == name:
            result = dict(new)
        elif path.startswith(f"{name}."):
            key = path.removeprefix(f"{name}.")
            result.pop(key, None)
            if key in new:
                result[key] = new[key]
    return result


def raise_if_replayed(database: Database) -> None:
    """Raise Replayed when the request in hand took effect before: for services that do more than the one mutation."""
    key = context.current().key
    row: Any = database.one("SELECT reply FROM answers WHERE key = ?", (key,)) if key else None
    if row is not None:
        raise context.Replayed(row[0])

"""The databases of a node as the first schema of each service held them, with a row of everything.

Frozen: these are the scripts and the rows that a node wrote then, whatever the services say by now.
"""

from __future__ import annotations

import hashlib
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

import msgpack

BLOB = b"a blob of long ago"
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"
AT = "2026-01-02T03:04:05+00:00"
NAMESPACE = "default"
KEY = "a1" * 16

_BASE = """
CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, namespace TEXT NOT NULL, topic TEXT NOT NULL,
    at TEXT NOT NULL, event TEXT NOT NULL);
CREATE TABLE answers (key TEXT PRIMARY KEY, reply BLOB NOT NULL, at INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX answers_at ON answers (at);
"""
_RECORDS = """
CREATE TABLE records (
    namespace TEXT NOT NULL, key TEXT NOT NULL, record BLOB NOT NULL, PRIMARY KEY (namespace, key));
"""
_CONTENT = """
CREATE INDEX records_key ON records (key);
CREATE TABLE ingests (
    namespace TEXT NOT NULL, ref TEXT NOT NULL, key TEXT NOT NULL UNIQUE, total INTEGER NOT NULL,
    expected TEXT NOT NULL, started_at TEXT NOT NULL, PRIMARY KEY (namespace, ref)) WITHOUT ROWID;
"""
_LEASE = """
CREATE TABLE expiries (
    namespace TEXT NOT NULL, lease TEXT NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (namespace, lease)) WITHOUT ROWID;
CREATE INDEX expiries_at ON expiries (at);
CREATE TABLE resources (
    namespace TEXT NOT NULL, lease TEXT NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL,
    PRIMARY KEY (namespace, lease, type, id)) WITHOUT ROWID;
"""
_SNAPSHOT = """
CREATE TABLE snapshots (
    number INTEGER PRIMARY KEY, namespace TEXT NOT NULL, snapshotter TEXT NOT NULL, name TEXT NOT NULL,
    kind TEXT NOT NULL, parent INTEGER REFERENCES snapshots (number), labels TEXT NOT NULL,
    inherited TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
    size INTEGER NOT NULL DEFAULT 0, inodes INTEGER NOT NULL DEFAULT 0, UNIQUE (snapshotter, namespace, name));
CREATE INDEX snapshots_parent ON snapshots (parent);
CREATE TABLE numbers (next INTEGER NOT NULL);
INSERT INTO numbers VALUES (9);
INSERT INTO snapshots
    VALUES (1, 'default', 'native', 'base', 'committed', NULL, '{"a":"b"}', '{}', '{AT}', '{AT}', 5, 1);
INSERT INTO snapshots VALUES (2, 'default', 'native', 'top', 'active', 1, '{}', '{}', '{AT}', '{AT}', 0, 0);
""".replace("{AT}", AT)
_TASK = """
CREATE TABLE tasks (
    namespace TEXT NOT NULL, container TEXT NOT NULL, bundle TEXT NOT NULL, binary TEXT NOT NULL,
    boot TEXT NOT NULL, PRIMARY KEY (namespace, container)) WITHOUT ROWID;
CREATE TABLE processes (
    namespace TEXT NOT NULL, container TEXT NOT NULL, exec TEXT NOT NULL, pid INTEGER NOT NULL,
    status TEXT NOT NULL, spec TEXT NOT NULL, stdio TEXT NOT NULL, exit_status INTEGER, exited_ns INTEGER,
    PRIMARY KEY (namespace, container, exec)) WITHOUT ROWID;
INSERT INTO tasks VALUES ('default', 'c1', '/nowhere', '/usr/sbin/runc', 'boot');
INSERT INTO processes VALUES ('default', 'c1', '', 7, 'stopped', '', '{}', 42, 1700000000000000000);
"""


def timestamp() -> msgpack.Timestamp:
    return msgpack.Timestamp.from_datetime(datetime.fromisoformat(AT))


def _record(key: str, document: dict[str, Any]) -> tuple[str, str, bytes]:
    return NAMESPACE, key, msgpack.packb({**document, "labels": {"a": "b"}}, datetime=True)


_TIMES = {"created_at": timestamp(), "updated_at": timestamp()}
_TARGET = {"media_type": "m", "digest": DIGEST, "size": len(BLOB)}
RECORDS: dict[str, list[tuple[str, str, bytes]]] = {
    "content": [_record(DIGEST, {"digest": DIGEST, "size": len(BLOB), **_TIMES})],
    "image": [_record("img:1", {"name": "img:1", "target": _TARGET, **_TIMES})],
    "container": [_record("c1", {"id": "c1", "runtime": {"name": "runc"}, "spec": {"x": 1}, "snapshotter": "native",
                                 "snapshot_key": "top", **_TIMES})],
    "lease": [_record("l1", {"id": "l1", "created_at": timestamp()})],
    "namespace": [("", "old", msgpack.packb({"name": "old", "labels": {"a": "b"}}))],
}  # fmt: skip
SCRIPTS = {
    "content": _RECORDS + _CONTENT, "image": _RECORDS, "container": _RECORDS, "lease": _RECORDS + _LEASE,
    "namespace": _RECORDS, "snapshot": _SNAPSHOT, "task": _TASK,
}  # fmt: skip
ROWS = {
    "content": [("INSERT INTO ingests VALUES (?, ?, ?, ?, ?, ?)", (NAMESPACE, "half", KEY, 100, "", AT))],
    "lease": [("INSERT INTO resources VALUES (?, ?, ?, ?)", (NAMESPACE, "l1", "content", DIGEST))],
}


def make(root: Path) -> None:
    """Every service's database, and what its rows speak of on the disk."""
    for service, script in SCRIPTS.items():
        folder = root / service
        folder.mkdir(parents=True, mode=0o700)
        database = sqlite3.connect(folder / "metadata.db")
        database.execute("PRAGMA journal_mode=WAL")
        database.executescript(_BASE + script)
        for record in RECORDS.get(service, []):
            database.execute("INSERT INTO records VALUES (?, ?, ?)", record)
        for statement, values in ROWS.get(service, []):
            database.execute(statement, values)
        database.execute("PRAGMA user_version = 1")
        database.commit()
        database.close()
    blobs = root / "content/blobs/sha256"
    blobs.mkdir(parents=True, mode=0o700)
    (blobs / DIGEST.partition(":")[2]).write_bytes(BLOB)
    (root / "content/ingest" / KEY).mkdir(parents=True, mode=0o700)
    (root / "content/ingest" / KEY / "data").write_bytes(BLOB[:5])
    for number in (1, 2):
        (root / f"snapshot/native/snapshots/{number}").mkdir(parents=True, mode=0o755)

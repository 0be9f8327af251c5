"""A node's files: databases and their backups, what waits in them, who may read what, and the services' own sockets."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wherry_shared.backup import INTERVAL, backup_of, check_log
from wherry_shared.bus import DIRECT, sockets, subjects
from wherry_shared.bus.credentials import CALLS, IDENTITIES
from wherry_shared.contract import OWNERS
from wherry_shared.errors import DataLoss, NotFound, Unavailable

from ..paging import walk
from .afar import namespaces
from .findings import Check, Finding, Patient, Place, aside

DATABASE = "metadata.db"
RESTORE = "stop the service and start it once with --set restore=backup (WHERRY_{}_RESTORE=backup)"
BACKUP_SECONDS = 15 * INTERVAL
WAITING_SECONDS = 60.0
OVERDUE_SECONDS = 120.0
BUSY_SECONDS = 5.0


def _databases(place: Place) -> Iterator[tuple[str, Path]]:
    """Each service's database that is there."""
    for service in CALLS:
        path = place.root / service / DATABASE
        if path.exists():
            yield service, path


def _open(path: Path) -> sqlite3.Connection:
    """To read only, beside the service that has it open. Where nobody has, not even a log is made."""
    alone = "" if path.with_name(f"{DATABASE}-wal").exists() else "&immutable=1"
    address = f"{path.absolute().as_uri()}?mode=ro{alone}"
    return sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)


# ---- damage


async def _damage(patient: Patient) -> Iterable[Finding]:
    started = {name: min(map(_started, told)) for name, told in patient.answers.items() if told}
    return await asyncio.to_thread(lambda: list(_damaged(patient.here, started)))


def _started(answer: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(answer.get("started", ""))).timestamp()
    except ValueError:
        return 0.0


def _damaged(place: Place, started: Mapping[str, float]) -> Iterator[Finding]:
    for service in CALLS:
        path = place.root / service / DATABASE
        if path.exists():
            yield from _database(service, path)
            yield from backed_up(service, path, started.get(service, 0.0))
        elif backup_of(path).exists():
            yield Finding(
                "broken", "databases", f"the database of {service} is gone", f"{path} is not there, its backup is",
                RESTORE.format(service.upper()),
            )  # fmt: skip
        for aside_ in sorted(path.parent.glob(f"{DATABASE}.damaged-*")):
            if not aside_.name.endswith(("-wal", "-shm")):
                yield Finding(
                    "note", "databases", f"{aside_} was put aside", "a backup took its place",
                    "remove it when nothing of it is missed",
                )  # fmt: skip


def _database(service: str, path: Path) -> Iterator[Finding]:
    try:
        check_log(path)
        _quick_check(path)
    except (DataLoss, sqlite3.DatabaseError) as e:
        if isinstance(e, sqlite3.OperationalError) and "locked" in str(e):
            yield Finding("note", "databases", f"the database of {service} is not checked", str(e), "nothing")
        else:
            yield Finding(
                "broken", "databases", f"the database of {service} is damaged", f"{path}: {e}",
                RESTORE.format(service.upper()),
            )  # fmt: skip


def _quick_check(path: Path) -> None:
    with closing(_open(path)) as connection:
        found: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise sqlite3.DatabaseError(found.splitlines()[-1])


def backed_up(service: str, path: Path, started: float) -> Iterator[Finding]:
    """The log's time is that of the last change, and the copy's when it was last seen to be all.

    started: since when the service runs that would make it.
    """
    todo = "the service's log says why (a full disk?)"
    log = path.with_name(f"{DATABASE}-wal")
    try:
        changed = log.stat().st_mtime if log.stat().st_size else 0.0
    except FileNotFoundError:
        changed = 0.0
    try:
        made = backup_of(path).stat().st_mtime
    except FileNotFoundError:
        if time.time() - max(started, path.stat().st_mtime) > BACKUP_SECONDS:
            yield Finding("warning", "databases", f"{service} has no backup", f"{backup_of(path)} is not there", todo)
        return
    if min(changed, time.time()) - max(made, started) > BACKUP_SECONDS:
        when = datetime.fromtimestamp(made, UTC).isoformat(timespec="seconds")
        yield Finding("warning", "databases", f"the backup of {service} is old", f"it is of {when}", todo)


# ---- what waits


def _waiting(place: Place) -> Iterator[Finding]:
    for service, path in _databases(place):
        try:
            with closing(_open(path)) as connection:
                oldest = connection.execute("SELECT count(*), min(at) FROM outbox").fetchone()
        except sqlite3.DatabaseError:  # which `databases` tells of; the others are looked at all the same
            continue
        if oldest[0] and _age(oldest[1]) > WAITING_SECONDS:
            yield Finding(
                "broken", "outboxes", f"{oldest[0]} events of {service} wait to be told",
                f"the first is of {oldest[1]}", "the service has to run and the stream to take them: see their logs",
            )  # fmt: skip


def _age(at: str) -> float:
    return time.time() - datetime.fromisoformat(at).timestamp()


def _leases(place: Place) -> Iterator[Finding]:
    path = place.root / "lease" / DATABASE
    if not path.exists():
        return
    limit = int((time.time() - OVERDUE_SECONDS) * 1000)
    with closing(_open(path)) as connection:
        overdue = connection.execute("SELECT count(*) FROM expiries WHERE at < ?", (limit,)).fetchone()[0]
    if overdue:
        yield Finding(
            "broken", "leases", f"{overdue} leases have expired and are still there", "what only they keep stays",
            "the lease service has to run; `wherry gc` collects now",
        )  # fmt: skip


# ---- blobs


async def _blobs(patient: Patient) -> Iterable[Finding]:
    """Behind every record of a blob is a file of its size."""
    folder = patient.here.root / "content" / "blobs"
    known: dict[str, tuple[str, int]] = {}
    for namespace in await namespaces(patient.bus) if folder.is_dir() else ():
        found = await walk(patient.bus.within(namespace).content.walk)
        known |= {info.digest: (namespace, info.size) for info in found}
    short = await asyncio.to_thread(lambda: {d: _file(folder, d, size) for d, (_, size) in known.items()})
    return [
        Finding(
            "broken", "blobs", f"the file of blob {digest} is gone or short", why,
            f"pull its image again; until then it cannot be read (namespace {known[digest][0]})",
        )
        for digest, why in short.items() if why and await _is_known(patient, known[digest][0], digest)
    ]  # fmt: skip


def _file(folder: Path, digest: str, size: int) -> str:
    """What is wrong with a blob's file."""
    path = folder.joinpath(*digest.split(":"))
    try:
        found = path.stat().st_size
    except OSError as e:
        return f"{path}: {e.strerror}"
    return "" if found == size else f"{path}: it has {found} of {size} bytes"


async def _is_known(patient: Patient, namespace: str, digest: str) -> bool:
    try:
        await patient.bus.within(namespace).content.info(digest)
    except (NotFound, DataLoss) as e:
        return isinstance(e, DataLoss)
    return True


# ---- who may read and write


def _permissions(place: Place) -> Iterator[Finding]:
    for directory in (place.root, place.state):
        yield from _closed(directory, 0o066, {0, os.geteuid()})
        for name in ("nats", *CALLS):
            yield from _closed(directory / name, 0o066)
    for creds in {place.creds, place.state / "creds"}:
        if (creds / IDENTITIES).exists():  # else it is where a client keeps a seed of its own
            yield from _closed(creds, 0o066)
            yield from _closed(creds / IDENTITIES, 0o027)
            for seed in (*creds.glob("*.nk"), *creds.glob("*/*.nk")):
                yield from _closed(seed, 0o077)
    for _, path in _databases(place):
        yield from _closed(path, 0o077)
        yield from _closed(backup_of(path), 0o077)


def _closed(path: Path, forbidden: int, owners: Iterable[int] = ()) -> Iterator[Finding]:
    """Others may pass a directory at most: what lies in it is for services alone."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(found.st_mode)
    if mode & forbidden:
        how = "written" if mode & forbidden & 0o022 else "read"
        right = "go-rwx" if not stat.S_ISDIR(found.st_mode) else "go-rw"
        yield Finding(
            "broken", "permissions", f"{path} can be {how} by others", f"its mode is {mode:04o}",
            f"chmod {right} {path}, and take what was in it for known",
        )  # fmt: skip
    if owners and found.st_uid not in owners:
        yield Finding(
            "broken", "permissions", f"{path} belongs to another user", f"its owner is {found.st_uid}",
            f"chown root {path}",
        )  # fmt: skip


# ---- the direct path


async def _direct(patient: Patient) -> Iterable[Finding]:
    """Each process that serves here has a socket here, and is reached by it."""
    if patient.client is None:
        raise Unavailable("the bus cannot be reached")
    if os.environ.get(DIRECT) == "0":
        return [Finding("note", "direct path", "requests go by NATS alone", f"{DIRECT} is 0", "unset it, to save time")]
    found = []
    for service, answers in sorted(patient.answers.items()):
        for answer in answers:
            error = _unreachable(patient.here, service, str(answer.get("id", "")))
            if error:
                found.append(
                    Finding(
                        "warning", "direct path", f"{service} is reached by NATS alone", error,
                        "start it again; its directory below the state directory has to be its own, mode 0700",
                    )
                )  # fmt: skip
    return found


def _unreachable(place: Place, service: str, instance: str) -> str:
    node = subjects.encode_token(place.node, "node")
    folder = sockets.folder(place.state, OWNERS.get(service, service), node, service)
    try:
        sockets.check_folder(folder)
        sockets.connect(folder / f"{subjects.encode_token(instance, 'instance')}{sockets.SUFFIX}").close()
    except OSError as e:
        return str(e)
    return ""


# ---- what was put aside


def _rotten(place: Place) -> Iterator[Finding]:
    rotten = place.root / "content" / "rotten"
    count = len(list(rotten.iterdir())) if rotten.is_dir() else 0
    if count:
        yield Finding(
            "warning", "content", f"{count} blobs are put aside as rotten", f"their bytes had changed: {rotten}",
            "pull their images again, look after the disk, then remove them",
        )  # fmt: skip
    for lost in sorted(place.root.glob("snapshot/*/snapshots/lost-*")):
        yield Finding(
            "note", "content", f"{lost} is of no snapshot", "the snapshots' database was restored from a backup",
            "take out of it what you need, then remove it",
        )  # fmt: skip


CHECKS = (
    Check("databases", _damage, here=True),
    Check("outboxes", aside(_waiting), here=True),
    Check("leases", aside(_leases), here=True),
    Check("blobs", _blobs, ("namespace", "content"), here=True),
    Check("permissions", aside(_permissions), here=True),
    Check("direct path", _direct, here=True),
    Check("put aside", aside(_rotten), here=True),
)

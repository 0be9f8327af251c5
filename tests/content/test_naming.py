"""A blob that comes whole has its name before its row: whatever happens to the name in between, the blob is there."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from contentd import digest_of
from wherry_content.backends.durable import Directory
from wherry_content.backends.local import LocalBackend
from wherry_content.backends.local_ingest import LocalIngest
from wherry_shared.errors import Internal

DATA = b"whole"
DIGEST = digest_of(DATA)


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[LocalBackend]:
    made = LocalBackend(tmp_path)
    await made.start()
    yield made
    await made.close()


async def sealed(backend: LocalBackend, data: bytes = DATA, digest: str = DIGEST) -> LocalIngest:
    held = await backend.open(secrets.token_hex(32), "a blob")
    await held.append(0, data)
    await held.seal(digest)
    return held


async def settled(backend: LocalBackend, held: LocalIngest) -> bytes:
    held.settle(DIGEST, len(DATA))
    await held.release(keep=False)
    return await backend.read(DIGEST, 0, 100)


async def test_a_name_that_was_taken_away_is_given_again(backend: LocalBackend) -> None:
    held = await sealed(backend)
    assert backend.blobs() == [DIGEST]
    backend.remove(DIGEST)  # by another replica, that knows no row of it
    await backend.purge()
    assert await settled(backend, held) == DATA


async def test_two_at_a_time(backend: LocalBackend) -> None:
    first, second = await sealed(backend), await sealed(backend)
    assert await settled(backend, second) == DATA
    first.unsettle(DIGEST)  # its own failed: the name is the second one's now
    await first.release(keep=False)
    assert await backend.read(DIGEST, 0, 100) == DATA


async def test_a_name_is_taken_back(backend: LocalBackend) -> None:
    held = await sealed(backend)
    held.unsettle(DIGEST)
    assert backend.blobs() == []
    assert held.size() == len(DATA)
    await held.release(keep=False)


async def test_where_there_are_no_links(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    held = await sealed(backend)
    assert backend.blobs() == []
    assert await settled(backend, held) == DATA


def test_names_made_durable_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who come while an fsync is under way share the next one, and its failure."""
    directory = Directory(tmp_path)
    under_way, go_on, fail = threading.Semaphore(0), threading.Event(), [False]
    count = 0

    def slow(fd: int) -> None:
        nonlocal count
        count += 1
        under_way.release()
        go_on.wait(10)
        if fail[0] and count % 2 == 0:
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", slow)
    outcomes: list[int] = []

    def sync() -> None:
        try:
            directory.sync()
            outcomes.append(0)
        except OSError as e:
            outcomes.append(e.errno or -1)

    def crowd() -> None:
        go_on.clear()
        threads = [threading.Thread(target=sync) for _ in range(9)]
        threads[0].start()
        under_way.acquire()
        for thread in threads[1:]:
            thread.start()
        while directory._turn.locked() and sum(t.is_alive() for t in threads) < 9:
            pass
        go_on.set()
        for thread in threads:
            thread.join()

    crowd()
    assert count == 2
    assert outcomes == [0] * 9
    fail[0] = True
    outcomes.clear()
    crowd()
    assert count == 4
    assert sorted(outcomes) == [0] + [errno.EIO] * 8
    fail[0] = False
    directory.sync()  # later ones are later ones
    directory.close()


async def test_a_name_that_is_not_durable_is_no_blob(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Directory) -> None:
        raise OSError(errno.EIO, "lost")

    held = await backend.open(secrets.token_hex(32), "a blob")
    await held.append(0, DATA)
    monkeypatch.setattr(Directory, "sync", lost)
    with pytest.raises(Exception, match="lost") as caught:
        await held.seal(DIGEST)
    assert not isinstance(caught.value, Internal)
    held.unsettle(DIGEST)
    assert backend.blobs() == []
    await held.release(keep=False)

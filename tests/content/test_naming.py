"""A blob that comes whole has its name before its row: whatever happens to the name in between, the blob is there."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from contentd import digest_of
from wherry_content.backends import Whole
from wherry_content.backends.durable import Directory
from wherry_content.backends.local import LocalBackend
from wherry_content.backends.local_whole import LocalWhole
from wherry_shared.errors import Internal, ResourceExhausted

DATA = b"whole"
DIGEST = digest_of(DATA)


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[LocalBackend]:
    made = LocalBackend(tmp_path)
    await made.start()
    yield made
    await made.close()


async def sealed(backend: LocalBackend) -> LocalWhole:
    whole = backend.whole(DATA, DIGEST, "a blob")
    await whole.seal()
    assert isinstance(whole, LocalWhole)
    return whole


async def settled(backend: LocalBackend, whole: Whole) -> bytes:
    whole.settle(DIGEST, len(DATA))
    await whole.close()
    return await backend.read(DIGEST, 0, 100)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


async def test_it_has_no_other_name_and_is_for_reading_only(backend: LocalBackend, tmp_path: Path) -> None:
    whole = await sealed(backend)
    (file,) = files(tmp_path)
    assert backend.blobs() == [DIGEST]
    assert (tmp_path / file).stat().st_mode & 0o7777 == 0o444
    assert await settled(backend, whole) == DATA
    assert files(tmp_path) == [file]


async def test_one_that_is_given_up_leaves_nothing(
    backend: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    whole = backend.whole(DATA, DIGEST, "a blob")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceExhausted, match="a blob"):
        await whole.seal()
    whole.unsettle(DIGEST)
    await whole.close()
    assert files(tmp_path) == []


async def test_a_name_that_was_taken_away_is_given_again(backend: LocalBackend) -> None:
    whole = await sealed(backend)
    assert backend.blobs() == [DIGEST]
    backend.remove(DIGEST)  # by another replica, that knows no row of it
    await backend.purge()
    assert await settled(backend, whole) == DATA


async def test_two_at_a_time(backend: LocalBackend) -> None:
    first, second = await sealed(backend), await sealed(backend)
    assert await settled(backend, second) == DATA
    first.unsettle(DIGEST)  # its own failed: the name is the second one's now
    await first.close()
    assert await backend.read(DIGEST, 0, 100) == DATA
    await backend.purge()
    assert backend.blobs() == [DIGEST]


async def test_other_bytes_of_the_name_give_way(backend: LocalBackend, tmp_path: Path) -> None:
    """Those of a blob that the disk has cut short, say: a row stands for it, so that no start removed them."""
    path = tmp_path / "blobs" / DIGEST.replace(":", "/")
    path.write_bytes(DATA[:-1])
    whole = await sealed(backend)
    assert path.read_bytes() == DATA[:-1]
    assert await settled(backend, whole) == DATA


async def test_a_name_is_taken_back(backend: LocalBackend) -> None:
    for whole in (await sealed(backend), await sealed(backend)):
        whole.settle(DIGEST, len(DATA))
        whole.unsettle(DIGEST)
        assert backend.blobs() == []
        whole.unsettle(DIGEST)
        await whole.close()


@pytest.mark.parametrize("missing", ["links", "unnamed"])
async def test_where_the_filesystem_lacks(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def refuse(path: Any, flags: int = 0, *args: Any, **options: Any) -> int:
        if missing == "links" or flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return really(path, flags, *args, **options)

    monkeypatch.setattr(os, "link" if missing == "links" else "open", refuse)
    backend = LocalBackend(tmp_path)
    await backend.start()
    assert files(tmp_path) == []
    whole = backend.whole(DATA, DIGEST, "a blob")
    await whole.seal()
    assert backend.blobs() == []
    assert await settled(backend, whole) == DATA
    assert files(tmp_path) == [f"blobs/{DIGEST.replace(':', '/')}"]
    await backend.close()


class Turn:
    """A lock, and who came to it: a thread that runs may be a step before that still."""

    def __init__(self) -> None:
        self.came, self._lock = threading.Semaphore(0), threading.Lock()

    def __enter__(self) -> None:
        self.came.release()
        self._lock.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def test_names_made_durable_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who come while an fsync is under way share the next one, and its failure."""
    directory, turn = Directory(tmp_path), Turn()
    monkeypatch.setattr(directory, "_turn", turn)
    under_way, go_on, fail = threading.Semaphore(0), threading.Event(), [False]
    count = 0

    def slow(fd: int) -> None:
        nonlocal count
        count += 1
        under_way.release()
        go_on.wait(60)
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
        for _ in threads:
            turn.came.acquire()
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

    whole = backend.whole(DATA, DIGEST, "a blob")
    monkeypatch.setattr(Directory, "sync", lost)
    with pytest.raises(Exception, match="lost") as caught:
        await whole.seal()
    assert not isinstance(caught.value, Internal)
    whole.unsettle(DIGEST)
    assert backend.blobs() == []
    await whole.close()

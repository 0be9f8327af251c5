"""A damaged database: told with its path, put back from its backup when the operator says so, never silently empty."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from contentd import digest_of, ready
from natsd import NatsServer
from wherry_shared.api.content import Content
from wherry_shared.backup import backup_of
from wherry_shared.bus import Bus
from wherry_shared.streams import read_blob

DATA = os.urandom(200_000)
DIGEST = digest_of(DATA)

Spawn = Callable[..., "subprocess.Popen[bytes]"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path) -> None:
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // 4096):
            file.seek(page * 4096)
            file.write(b"\xa5" * 4096)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def copy_database(source: Path, target: Path) -> None:
    """A backup, as the service makes one by itself every minute."""
    with sqlite3.connect(source) as read, sqlite3.connect(target) as write:
        read.backup(write)
    read.close()
    write.close()


@pytest.mark.parametrize("harm", [cut, scribble, empty])
async def test_refused_with_a_hint_and_restored(
    spawn: Spawn, server: NatsServer, nats_bus: Bus, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    content = nats_bus.proxy(Content, namespace="default")
    process = spawn("one")
    await ready(content, "one")
    await content.put(DATA, DIGEST, {"a": "b"})
    process.terminate()
    process.wait()
    path = tmp_path / "root" / "content" / "metadata.db"
    copy_database(path, backup_of(path))
    for name in ("-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)
    harm(path)
    refused = subprocess.run(
        [sys.executable, "-m", "wherry_content", "--node", "n1", "--nats", server.url, "--root", str(tmp_path / "root"),
         "--state", str(tmp_path), "--creds", str(tmp_path / "creds")], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert refused.returncode == 1
    assert str(path) in refused.stderr and "restore=backup" in refused.stderr
    assert (tmp_path / "root" / "content" / "blobs" / DIGEST.replace(":", "/")).exists()
    spawn("two", "restore=backup")
    await ready(content, "two")
    assert (await content.info(DIGEST)).labels == {"a": "b"}
    assert b"".join([chunk async for chunk in read_blob(content, DIGEST, verify=True)]) == DATA

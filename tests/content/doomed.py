"""A content service's process that comes to a bad end: `doomed.py ROOT ACTION`. The test that started it says which.

write     write chunks of known bytes to the ingest "layer" for ever, telling each new end
hold      hold the ingest "layer" for ever, telling so
rename    commit, and die when the blob has its name, before its row is there
row       commit, and die when the row is there, before the ingest is gone
seal      commit, and die when the bytes are durable, before they are a blob
delete    commit, delete, and die when the row is gone, before the file is
put-seal  put the bytes whole, and die when they have the blob's name, before its row is there
put-row   put them, and die when the row is there, before the file is closed
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from wherry_content import metadata
from wherry_content.backends.local import LocalBackend
from wherry_content.backends.local_ingest import LocalIngest
from wherry_content.backends.local_whole import LocalWhole
from wherry_content.metadata import Metadata
from wherry_content.store import Store
from wherry_shared import context
from wherry_shared.sqlite import Database

CHUNK = 256 * 1024
BYTES = bytes(range(256)) * 1024
NAMESPACE, REF = "default", "layer"


def die(*args: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def no_lease(digest: str) -> None:
    return None


def set_trap(action: str) -> None:
    """Put death behind the step that the action names."""
    action = action.removeprefix("put-")
    if action == "rename":
        settle = LocalIngest.settle
        LocalIngest.settle = lambda *a: die(settle(*a))  # type: ignore[method-assign]
    elif action == "row":
        LocalIngest.release = LocalWhole.close = die  # type: ignore[method-assign,assignment]
    elif action == "seal":
        Metadata.commit = die  # type: ignore[method-assign,assignment]
    elif action == "delete":
        LocalBackend.remove = die  # type: ignore[method-assign]


async def main(root: Path, action: str) -> None:
    database = await Database.open(root / "metadata.db", metadata.MIGRATIONS)
    store = Store(Metadata(database), LocalBackend(root), instance="doomed")
    await store.start()
    if action.startswith("put-"):
        set_trap(action)
        await store.put(NAMESPACE, BYTES, f"sha256:{hashlib.sha256(BYTES).hexdigest()}", {}, no_lease)
    offset = (await store.open(NAMESPACE, REF, 0, "", truncate=False)).offset
    if action == "hold":
        print("held", flush=True)
        await asyncio.sleep(600)
    while action == "write":
        offset = await store.write(NAMESPACE, REF, offset, BYTES)
        print(offset, flush=True)
    set_trap(action)
    await store.write(NAMESPACE, REF, 0, BYTES)
    info = await store.commit(NAMESPACE, REF, 0, "", {}, no_lease)
    await store.delete(NAMESPACE, info.digest)


if __name__ == "__main__":
    with context.use(namespace=NAMESPACE):
        asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))

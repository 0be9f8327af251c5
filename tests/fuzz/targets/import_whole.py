"""A whole import, into the real content, image and lease services: an image, or a typed error and no image."""

from __future__ import annotations

import asyncio
import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from client.image_house import house, small
from wherry_shared.errors import Internal, Unavailable, Unknown, WherryError

from .. import archives
from ..archives import member, summed

FOLDER = Path(tempfile.mkdtemp(prefix="wherry-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
LOOP = asyncio.new_event_loop()
STACK = AsyncExitStack()
CLIENT: list[Any] = []
MAX_LEN = 16384
TOKENS = (*archives.TOKENS, b"index.json", b"oci-layout", b"manifest.json", b"blobs/sha256/", b"repositories",
          b'"manifests"', b'"layers"', b'"config"', b'"digest"')  # fmt: skip


def seeds() -> Iterator[bytes]:
    layout, target = small()
    layout.name(target, full="docker.io/library/a:1")
    yield layout.tar()
    saved = [{"Config": "c.json", "RepoTags": ["a:b"], "Layers": ["l/layer.tar"]}]
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}
    yield (
        member(b"l/layer.tar", body=bytes(1024)) + member(b"c.json", body=json.dumps(config).encode())
        + member(b"manifest.json", body=json.dumps(saved).encode()) + bytes(1024)
    )  # fmt: skip
    yield member(b"l", b"2", link=b"../x") + member(b"l/x", b"1", link=b"l") + member(b"manifest.json", body=b"[{}]")


def one(data: bytes) -> None:
    if not CLIENT:
        CLIENT.append(LOOP.run_until_complete(STACK.enter_async_context(house(FOLDER))))
    LOOP.run_until_complete(asyncio.wait_for(imported(CLIENT[0], summed(data)), 20))


async def imported(client: Any, data: bytes) -> None:
    before = {image.name for image in (await client.images.walk()).items}
    try:
        images = await client.import_images(io.BytesIO(data))
    except WherryError as error:
        assert not isinstance(error, Internal | Unknown | Unavailable), error
        assert {image.name for image in (await client.images.walk()).items} == before
    else:
        for image in images:
            await client.images.delete(image.name)
    assert not await client.content.statuses(), "an ingest is left"

"""Checkpoints as content: the files of a CRIU image in one tar, and the specification beside it, as containerd's."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import os
import secrets
import shutil
import tarfile
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, BinaryIO

from wherry_shared.api.content import Content
from wherry_shared.errors import InvalidArgument, ResourceExhausted, WherryError
from wherry_shared.streams import read_blob, write_blob
from wherry_shared.values import Descriptor

from .backends.protobuf import any_of, encode

log = logging.getLogger("wherry.task")

IMAGE = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
CONFIG = "application/vnd.containerd.container.checkpoint.config.v1+proto"
_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_CHUNK = 1 << 20
_FILES_MAX = 10_000


class Checkpoints:
    """In `directory`: `rooms`, which go with the process; `waiting`, the images of tasks that are to be restored;
    `saved`, what could not be put into content."""

    def __init__(self, directory: Path, content: Content) -> None:
        self._rooms, self._waiting, self._saved = (directory / name for name in ("rooms", "waiting", "saved"))
        self._content = content

    def room(self) -> Path:
        """A new directory: an image goes into `image` in it. ResourceExhausted."""
        try:
            self._rooms.mkdir(parents=True, exist_ok=True, mode=0o700)
            return Path(tempfile.mkdtemp(dir=self._rooms))
        except OSError as e:
            raise ResourceExhausted(f"checkpoint: {e.strerror}") from None

    async def leave(self, room: Path) -> None:
        """Nothing of it is needed any more."""
        await asyncio.to_thread(shutil.rmtree, room, True)

    async def keep(self, room: Path, spec: dict[str, Any]) -> list[Descriptor]:
        """Write an image to content; answers what containerd's Checkpoint answers. The caller's lease holds it.

        Where that fails the image stays, and the error says where: the container may have ended for it.
        """
        config = encode(any_of(_SPEC, json.dumps(spec).encode()))
        try:
            with tempfile.TemporaryFile(dir=room) as file:
                await asyncio.to_thread(_write_tar, file, room / "image")
                image = await self._put(IMAGE, file)
            made = [image, await self._put(CONFIG, io.BytesIO(config))]
        except WherryError as e:
            self._saved.mkdir(exist_ok=True, mode=0o700)
            os.rename(room / "image", saved := self._saved / room.name)
            raise type(e)(f"{e}; the checkpoint stays in {saved}") from None
        return made

    async def _put(self, media_type: str, file: BinaryIO) -> Descriptor:
        digest, size = await asyncio.to_thread(_measure, file)
        ref = f"checkpoint-{secrets.token_hex(8)}"
        await write_blob(self._content, ref, _chunks(file), size=size, expected=digest)
        return Descriptor(media_type=media_type, digest=digest, size=size)

    def place(self, namespace: str, container: str) -> Path:
        """Where the image lies that a task is to be restored from."""
        return self._waiting / namespace / container

    async def fetch(self, namespace: str, container: str, digest: str) -> Path:
        """Bring an image out of content. NotFound, DataLoss; InvalidArgument: it is no checkpoint."""
        place, room = self.place(namespace, container), self.room()
        try:
            with (room / "tar").open("wb") as file:
                async for chunk in read_blob(self._content, digest, verify=True):
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(_untar, room / "tar", room / "image")
            await asyncio.to_thread(shutil.rmtree, place, True)
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.rename(room / "image", place)
        except OSError as e:
            raise ResourceExhausted(f"checkpoint {digest}: {e.strerror}") from None
        finally:
            await self.leave(room)
        return place

    async def forget(self, namespace: str, container: str) -> None:
        """The task was restored, or is gone."""
        if (place := self.place(namespace, container)).exists():
            await asyncio.to_thread(shutil.rmtree, place, True)

    def sweep(self, waits: Callable[[str, str], bool]) -> None:
        """At a start: remove what a service that was killed has left; `waits` says which tasks need theirs still."""
        shutil.rmtree(self._rooms, ignore_errors=True)
        for place in self._waiting.glob("*/*"):
            if not waits(place.parent.name, place.name):
                log.info("removing %s: no task waits for it", place)
                shutil.rmtree(place, ignore_errors=True)


async def _chunks(file: BinaryIO) -> AsyncGenerator[bytes, None]:
    while chunk := await asyncio.to_thread(file.read, _CHUNK):
        yield chunk


def _measure(file: BinaryIO) -> tuple[str, int]:
    """Digest and size of what lies behind the file's place, which is left at its beginning."""
    file.seek(0)
    found, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        found.update(chunk)
        size += len(chunk)
    file.seek(0)
    return f"sha256:{found.hexdigest()}", size


def _write_tar(file: BinaryIO, directory: Path) -> None:
    try:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted(directory.iterdir()):
                if path.is_file() and not path.is_symlink():
                    tar.add(path, arcname=path.name, recursive=False)
    except OSError as e:
        raise ResourceExhausted(f"checkpoint: {e.strerror}") from None


def _untar(source: Path, directory: Path) -> None:
    """An image is regular files in one directory: nothing else is taken, so nothing can lead out of it."""
    directory.mkdir(mode=0o700)
    try:
        with tarfile.open(source, "r:") as tar:
            for number, member in enumerate(tar):
                name = member.name.removeprefix("./")
                if member.isdir() and name in ("", "."):
                    continue
                if not member.isreg() or "/" in name or name in ("", ".", "..") or number >= _FILES_MAX:
                    raise InvalidArgument(f"a checkpoint has only files in it, not {member.name[:200]!r}")
                opened = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                with open(opened, "wb") as file, tar.extractfile(member) as data:  # type: ignore[union-attr]
                    shutil.copyfileobj(data, file, _CHUNK)
    except tarfile.TarError as e:
        raise InvalidArgument(f"no checkpoint: {e}") from None

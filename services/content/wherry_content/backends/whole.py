"""A blob that comes whole by way of an ingest: for backends that have no shorter one."""

from __future__ import annotations

import secrets

from wherry_shared.errors import Unavailable

from . import Backend, Held

_TRIES = 3


class WholeIngest:
    """Bytes in an ingest whose key nobody else can know."""

    def __init__(self, backend: Backend, data: bytes, what: str) -> None:
        self._backend = backend
        self._data = data
        self._what = what
        self._held: Held | None = None

    async def seal(self) -> None:
        self._held = held = await self._open()
        await held.append(0, self._data)
        await held.seal()

    async def _open(self) -> Held:
        """A sweep may come upon the ingest between its making and its locking, and hold it for a moment."""
        for left in reversed(range(_TRIES)):
            try:
                return await self._backend.open(secrets.token_hex(32), self._what)
            except Unavailable:
                if not left:
                    raise
        raise AssertionError

    def settle(self, digest: str, size: int) -> None:
        assert self._held is not None  # noqa: S101 - sealed before
        self._held.settle(digest, size)

    def unsettle(self, digest: str) -> None:
        if self._held is not None:
            self._held.unsettle(digest)

    async def close(self) -> None:
        if self._held is not None:
            await self._held.release(keep=False)

"""Cancelled in the middle of making or removing something: nothing stays that nobody knows of."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from wherry.client import Address, Client
from wherry.undo import done, made
from wherry_shared import context
from wherry_shared.api.lease import Lease
from wherry_shared.bus import Bus
from wherry_shared.errors import Unavailable
from wherry_shared.memory import MemoryTransport
from wherry_shared.values import now


class Service:
    """Makes one thing a key, and answers late, or never: what was asked takes effect all the same."""

    def __init__(self) -> None:
        self.things: set[str] = set()
        self.asked = 0
        self.making, self.ending, self.answers = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def create(self, **_: Any) -> Lease:
        key = context.current().call_key
        self.things.add(key)
        self.asked += 1
        self.making.set()
        if self.asked == 1:
            await self.answers.wait()
        return Lease(id=key, created_at=now())

    async def delete(self, id: str) -> None:
        self.ending.set()
        await self.answers.wait()
        self.things.remove(id)


async def cancelled(service: Service, heard: asyncio.Event, work: Any) -> None:
    """Cancel it once the service has heard of it, which then answers."""
    working = asyncio.ensure_future(work)
    async with asyncio.timeout(20):
        await heard.wait()
        assert service.things
        working.cancel()
        await asyncio.sleep(0)
        assert not working.done()
        service.answers.set()
        with pytest.raises(asyncio.CancelledError):
            await working
    assert not service.things


async def test_what_nobody_is_told_of_is_not_made() -> None:
    service = Service()
    await cancelled(service, service.making, made(service.create, lambda lease: service.delete(lease.id)))
    assert service.asked == 2


async def test_what_is_not_known_to_be_made_is_not() -> None:
    service = Service()
    service.answers.set()

    async def lost() -> Lease:
        lease = await service.create()
        if service.asked == 1:
            raise Unavailable("gone")
        return lease

    with pytest.raises(Unavailable):
        await made(lost, lambda lease: service.delete(lease.id))
    assert not service.things


async def test_an_end_is_not_cut_off() -> None:
    service = Service()
    service.things.add("it")
    await cancelled(service, service.ending, done(service.delete("it")))


async def test_a_lease_goes_however_its_user_does(tmp_path: Any) -> None:
    client, service = (
        Client(Bus(MemoryTransport(), node="n"), "default", Address("", "n", tmp_path, tmp_path)),
        Service(),
    )
    client.leases = cast(Any, service)

    async def use() -> None:
        async with client.lease():
            pass

    await cancelled(service, service.making, use())
    service.answers.clear()
    service.ending.clear()
    await cancelled(service, service.ending, use())

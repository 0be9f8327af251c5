"""Whose pull a lease is of: an interrupted one's goes when the image has come, and nobody's that is under way."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import images
import pytest
from aiohttp import web
from wherry import pulling
from wherry.client import PULL_LABEL, Client, walk
from wherry_shared.errors import NotFound

from .image_house import small
from .registry_store import Store
from .registry_traps import Trap

_OTHER = "from wherry import pulling; print(pulling.begin(), flush=True); input()"


def test_what_is_known_of_a_pull() -> None:
    mark = pulling.begin()
    assert not pulling.is_given_up(mark)
    pulling.end(mark)
    assert pulling.is_given_up(mark)
    boot, rest = mark.split(" ", 1)
    assert not pulling.is_given_up(f"{boot[::-1]} {rest}"), "of another host nothing is known"
    for text in ("", "x", "a b c d e", " ".join(mark.split(" ")[:3])):
        assert not pulling.is_given_up(text)


def test_a_process_that_was_killed_has_given_up() -> None:
    with subprocess.Popen([sys.executable, "-c", _OTHER], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        mark = other.stdout.readline().strip()
        assert not pulling.is_given_up(mark)
        other.kill()
        other.wait()
    assert pulling.is_given_up(mark)


def holding(store: Store) -> tuple[asyncio.Event, asyncio.Event]:
    """The first layer that is asked for waits: told when it is, and until when it does."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
        if what == "GET blobs" and not asked.is_set():
            asked.set()
            await go_on.wait()
        return None

    store.hook = hold
    return asked, go_on


async def of_pulls(client: Client) -> list[str]:
    return [lease.labels[PULL_LABEL] for lease in await walk(client.leases.walk)]


async def test_what_was_interrupted_is_kept_until_the_image_is_here(client: Client, store: Store, trap: Trap) -> None:
    name, other = f"{trap.address}/team/app:v1", f"{trap.address}/team/app:v2"
    for tag in ("v1", "v2"):
        store.put(*small(images.architecture(), tag), tag=tag)
    asked, go_on = holding(store)
    first = asyncio.create_task(client.pull(name))
    await asked.wait()
    first.cancel()
    await asyncio.wait([first])
    go_on.set()
    assert await of_pulls(client) == [name]
    await client.pull(other)
    with pytest.raises(NotFound):
        await client.pull(f"{trap.address}/team/app:v3")
    assert await of_pulls(client) == [name]
    await client.pull(name)
    assert await of_pulls(client) == []


async def test_a_pull_under_way_keeps_its_lease(client: Client, store: Store, trap: Trap) -> None:
    name = f"{trap.address}/team/app:v1"
    layout, manifest = small(images.architecture())
    store.put(layout, manifest)
    asked, go_on = holding(store)
    slow = asyncio.create_task(client.pull(name))
    await asked.wait()
    await client.pull(name)
    assert await of_pulls(client) == [name]
    go_on.set()
    assert (await slow).target.digest == manifest["digest"]
    assert await of_pulls(client) == []

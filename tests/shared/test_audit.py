"""The audit: who was refused what, seen by the auditor and by nobody else, over a real nats-server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from housebus import HouseServer
from wherry_shared.api.image import Image, Images
from wherry_shared.bus import Bus, credentials
from wherry_shared.bus.audit import BURST, PER_SECOND
from wherry_shared.contract import pack
from wherry_shared.errors import NotFound, PermissionDenied, Unimplemented

RPC = "wherry.rpc.v1.n1"
SECRET = "a secret word"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HouseServer]:
    with HouseServer(tmp_path_factory.mktemp("house"), tenants=["a", "b.c"]) as server:
        yield server


@pytest.fixture
async def buses(house: HouseServer) -> AsyncIterator[dict[str, Bus]]:
    users = ("auditor", "image", "tenant-a", "tenant-b.c", "admin")
    made = {user: await house.connect(user) for user in users}
    yield made
    for bus in made.values():
        await bus.close()


@pytest.fixture
async def told(buses: dict[str, Bus]) -> list[tuple[str, dict[str, Any]]]:
    """What the auditor hears, of a service that refuses to get what is called `mine` and does not find the rest."""
    heard: list[tuple[str, dict[str, Any]]] = []
    await buses["auditor"].transport.subscribe(
        "wherry.audit.v1.>", lambda message: heard.append((message.subject, json.loads(message.data)))
    )
    await buses["auditor"].transport.flush()

    async def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Unimplemented("not in this test")

    async def get(self: Any, name: str) -> Image:
        raise PermissionDenied(f"{name}: {SECRET}") if name == "mine" else NotFound(SECRET)

    await buses["image"].serve(type("Serving", (Images,), {**dict.fromkeys(Images.endpoints, refuse), "get": get})())
    return heard


async def _heard(buses: dict[str, Bus]) -> None:
    for _ in range(2):  # it has got everything; what it told of that is on the server
        await buses["image"].transport.flush()
    await buses["auditor"].transport.flush()


async def test_a_refusal_is_told_and_nothing_of_what_was_sent(
    house: HouseServer, buses: dict[str, Bus], told: list[tuple[str, dict[str, Any]]]
) -> None:
    tenant = buses["tenant-b.c"].proxy(Images, namespace="b.c")
    with pytest.raises(PermissionDenied):
        await tenant.get("mine")
    with pytest.raises(NotFound):  # which is no refusal
        await tenant.get("other")
    # Somebody who can publish anything, in a tenant's name and in nobody's.
    operator = await house.operator()
    prefix = credentials.find(house.creds, "tenant-b.c").inbox_prefix
    for reply in (f"{prefix}.1", "_INBOX_stranger.1"):
        operator.publish(f"{RPC}.a.image.get", pack({"name": SECRET}), reply=reply)
    operator.publish(f"{RPC}.*.image.nonesuch", b"", reply="_INBOX_stranger.1")
    await operator.flush()
    await _heard(buses)
    await operator.close()
    fields = ("identity", "role", "namespace", "operation", "outcome")
    assert [(subject, *(record[field] for field in fields)) for subject, record in told] == [
        ("wherry.audit.v1.n1.b~c.image", "tenant-b.c", "tenant", "b.c", "get", "PermissionDenied"),
        ("wherry.audit.v1.n1.a.image", "tenant-b.c", "tenant", "a", "get", "PermissionDenied"),
        ("wherry.audit.v1.n1.a.image", "", "", "a", "get", "Unauthenticated"),
        ("wherry.audit.v1.n1._.image", "", "", "_", "nonesuch", "Unauthenticated"),
    ]
    assert SECRET not in str(told) and "_INBOX" not in str(told)


async def test_a_flood_of_refusals_is_counted(
    house: HouseServer, buses: dict[str, Bus], told: list[tuple[str, dict[str, Any]]]
) -> None:
    operator, started = await house.operator(), time.monotonic()
    for _ in range(5000):
        operator.publish(f"{RPC}.a.image.get", b"", reply="_INBOX_stranger.1")
    await operator.flush()
    await _heard(buses)
    assert BURST <= len(told) <= BURST + PER_SECOND * (time.monotonic() - started + 1)
    await asyncio.sleep(2 / PER_SECOND)  # there is room for one again, which tells of all that were left out before it
    operator.publish(f"{RPC}.a.image.get", b"", reply="_INBOX_stranger.1")
    await operator.flush()
    await _heard(buses)
    await operator.close()
    assert sum(record["left_out"] for _, record in told) + len(told) == 5001


async def test_an_auditor_hears_the_audit_and_does_nothing(buses: dict[str, Bus]) -> None:
    auditor = buses["auditor"].transport
    for subject in (
        f"{RPC}.a.image.get", "wherry.audit.v1.n1.a.image", "wherry.ev.v1.n1.a.images.create", "$JS.API.INFO",
        "$JS.API.STREAM.INFO.WHERRY-EV-n1", "$JS.API.DIRECT.GET.WHERRY-EV-n1", "$SRV.PING",
    ):  # fmt: skip
        with pytest.raises(PermissionDenied):
            await auditor.request(subject, b"", timeout=5)
    for subject in ("wherry.ev.>", "wherry.rpc.>", "wherry.io.>", ">", "_INBOX.>"):
        with pytest.raises(PermissionDenied):
            await auditor.subscribe(subject, lambda message: None)
    for other in ("tenant-a", "image", "admin"):
        with pytest.raises(PermissionDenied):
            await buses[other].transport.subscribe("wherry.audit.v1.>", lambda message: None)

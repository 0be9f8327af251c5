"""Every mutation of the storage half, delivered three times at once and again to the next process: one effect."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from client.image_house import LAYER, tar_of
from housebus import PATIENCE
from wherry.client import Client
from wherry_shared import context
from wherry_shared.api import contracts
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.content import Opened
from wherry_shared.api.events import Envelope
from wherry_shared.api.image import Image
from wherry_shared.api.lease import Resource
from wherry_shared.bus import subjects
from wherry_shared.bus.proxy import ERROR_CODE, KEY
from wherry_shared.contract import Endpoint
from wherry_shared.values import Descriptor

from .half import SERVICES, Half

NS = "default"
DATA, TAR = b"some bytes", tar_of({"file": b"of a layer"})
PUT = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
DIGEST = f"sha256:{hashlib.sha256(TAR).hexdigest()}"
ROOT = {"labels": {"containerd.io/gc.root": "1"}}  # the collector runs meanwhile
TARGET = Descriptor(media_type=LAYER, digest=DIGEST, size=len(TAR))
IMAGE = Image(name="img", target=TARGET)
BOX = Container(id="box", runtime=Runtime(name="runc"))
HELD = Resource(type="images", id="img")
ENVELOPE = Envelope(id="e1", timestamp=datetime(2026, 1, 1, tzinfo=UTC), namespace=NS, topic="/test/x", event={"n": 2})
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("namespace.create", {"name": "mine"}),
    ("namespace.update", {"name": "mine", "labels": {"a": "b"}, "mask": ["labels.a"]}),
    ("namespace.delete", {"name": "mine"}),
    ("lease.create", {"id": "held"}),
    ("lease.add_resource", {"id": "held", "resource": HELD}),
    ("lease.add_resources", {"id": "held", "resources": [HELD, HELD]}),
    ("lease.delete_resource", {"id": "held", "resource": HELD}),
    ("content.put", {"data": DATA, "expected": PUT, **ROOT}),
    ("content.open", {"ref": "closed"}),
    ("content.close", {"ref": "closed"}),
    ("content.abort", {"ref": "closed"}),
    ("content.open", {"ref": "layer", "total": len(TAR)}),
    ("content.write", {"ref": "layer", "offset": 0, "data": TAR}),
    ("content.commit", {"ref": "layer", "size": len(TAR), "expected": DIGEST, **ROOT}),
    ("content.update", {"digest": DIGEST, "labels": {"a": "b"}, "mask": ["labels.a"]}),
    ("content.delete", {"digest": PUT}),
    ("image.create", {"image": IMAGE}),
    ("image.update", {"image": IMAGE.model_copy(update={"labels": {"a": "b"}})}),
    ("image.delete", {"name": "img"}),
    ("container.create", {"container": BOX}),
    ("container.update", {"container": BOX.model_copy(update={"labels": {"a": "b"}}), "mask": ["labels.a"]}),
    ("container.delete", {"id": "box"}),
    ("snapshot.prepare", {"snapshotter": "native", "key": "work", **ROOT}),
    ("diff.apply", {"descriptor": TARGET, "mounts": "work"}),
    ("snapshot.prepare", {"snapshotter": "native", "key": "empty", **ROOT}),
    ("diff.compare", {"left": "empty", "right": "work", "source_date_epoch": 0, **ROOT}),
    ("snapshot.commit", {"snapshotter": "native", "name": "done", "key": "work", **ROOT}),
    ("snapshot.view", {"snapshotter": "native", "key": "seen", "parent": "done", **ROOT}),
    ("snapshot.update", {"snapshotter": "native", "key": "seen", "labels": {"a": "b"}, "mask": ["labels.a"]}),
    ("snapshot.remove", {"snapshotter": "native", "key": "seen"}),
    ("snapshot.cleanup", {"snapshotter": "native"}),
    ("events.publish", {"topic": "/test/made", "event": {"n": 1}}),
    ("events.forward", {"envelope": ENVELOPE}),
    ("lease.delete", {"id": "held"}),
]  # fmt: skip
AT_AN_INSTANCE = ("content.write", "content.commit", "content.close")
# What a service holds in memory alone is answered by the process that holds it; cleaning up twice is no harm.
NOT_BY_THE_NEXT = {*AT_AN_INSTANCE, "content.open", "diff.apply", "diff.compare", "snapshot.cleanup"}
# The stream has an event once by its id, and keeps no answers: the time in the next process's is its own.
OWN_ANSWER = {"events.publish"}
ENDPOINTS: dict[str, Endpoint] = {
    f"{contract.service}.{name}": endpoint for contract in contracts() for name, endpoint in contract.endpoints.items()
}


@pytest.fixture
def half(tmp_path: Path) -> Iterator[Half]:
    with Half(tmp_path) as made:
        yield made


def test_every_mutation_of_the_storage_half_is_here() -> None:
    mutating = {name for name, endpoint in ENDPOINTS.items() if endpoint.mutates and name.split(".")[0] in SERVICES}
    assert {name for name, _ in STEPS} == mutating


async def deliver(
    client: Client, name: str, arguments: dict[str, Any], key: str, instance: str, times: int
) -> list[tuple[bytes, str]]:
    """Bodies and error codes of that many deliveries at once, with one key."""
    endpoint = ENDPOINTS[name]
    namespace = subjects.namespace_of(endpoint.contract.namespaced, NS, name)
    subject = subjects.rpc(client.bus.node, namespace, *name.split("."), instance)
    body = endpoint.encode_request((), arguments)
    transport = client.bus.transport
    answers = await asyncio.gather(
        *(transport.request(subject, body, headers={KEY: key}, timeout=PATIENCE) for _ in range(times))
    )
    return [(answer.data, (answer.headers or {}).get(ERROR_CODE, "")) for answer in answers]


async def test_three_deliveries_and_one_to_the_next_process(half: Half) -> None:
    async with half.client() as client:
        with context.use(timeout=30):
            for service in (client.leases.walk, client.images.walk, client.containers.walk, client.content.walk):
                await service()
            await client.snapshots.snapshotters()
            await client.events.stream()
            await client.namespaces.walk()
        first: dict[str, tuple[str, dict[str, Any], tuple[bytes, str]]] = {}
        instance = ""
        for number, (name, given) in enumerate(STEPS):
            arguments = {**given}
            for side in {"mounts", "left", "right"} & arguments.keys():
                arguments[side] = await client.snapshots.mounts("native", arguments[side])
            at = instance if name in AT_AN_INSTANCE else ""
            answers = await deliver(client, name, arguments, f"key-{number}", at, 3)
            assert {code for _, code in answers} == {""}, (name, answers)
            assert len(set(answers)) == 1, f"{name} answered in several ways"
            first[f"key-{number}"] = name, arguments, answers[0]
            if name == "content.open":
                opened: Opened = ENDPOINTS[name].decode_reply(answers[0][0])
                instance = opened.instance
        async with asyncio.timeout(PATIENCE):
            while half.untold():  # events leave after the answer
                await asyncio.sleep(0.02)
        before = await state(client)
        for service in SERVICES:
            half.kill(service)
            half.start(service)
        with context.use(timeout=30):
            assert await state(client) == before
        for key, (name, arguments, answer) in first.items():
            if name not in NOT_BY_THE_NEXT:
                again = await deliver(client, name, arguments, key, "", 1)
                assert again == [answer] or name in OWN_ANSWER, name
        assert await state(client) == before


async def state(client: Client) -> object:
    """All that there is, and every event: none came twice."""
    window = await client.events.replay()
    said = Counter(json.dumps([e.topic, e.event], sort_keys=True) for e in window.events if "namespaces" not in e.topic)
    assert max(said.values()) == 1, said
    return (
        (await client.images.walk()).items, (await client.containers.walk()).items, (await client.leases.walk()).items,
        [blob.digest for blob in (await client.content.walk()).items], await client.content.statuses(),
        [(s.name, s.kind, s.labels) for s in (await client.snapshots.walk("native")).items], sorted(said),
    )  # fmt: skip

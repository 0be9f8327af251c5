"""What services can tell, from wherever the bus reaches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from wherry_shared import context
from wherry_shared.api import contracts
from wherry_shared.api.container import Container
from wherry_shared.api.events import Events, Gap
from wherry_shared.api.image import Image as Record
from wherry_shared.api.introspection import Plugin
from wherry_shared.bus import twins
from wherry_shared.errors import DeadlineExceeded, InvalidArgument, NotFound, OutOfRange, Unimplemented, WherryError
from wherry_shared.values import now

from ..client import Client
from ..graph import Survey
from ..paging import walk
from ..registry.platforms import is_attestation
from ..restarts import STATUS, policy_of
from ..together import each
from ..usage import SNAPSHOTTER_PLUGIN
from .findings import Check, Finding, Patient

# An answer of these says that something is wrong with the service or its files, not with the request.
ALARMING = ("Internal", "DataLoss")
SKEW_WARNING, SKEW_BROKEN, FAR_SECONDS = 2.0, 60.0, 86400.0
SERVICE_PLUGIN = "io.wherry.service.v1"
READ_SECONDS = 10.0
# Its windows are of what is looked at, not of what is sent.
NO_EVENT = 'topic=="/none"'
_NAMED_MAX = 5
LATE_SECONDS = 90.0


async def services(patient: Patient) -> Iterable[Finding]:
    """All that should answer do, speak the same, and tell of no bugs."""
    found: list[Finding] = []
    packages: dict[str, list[str]] = {}
    for contract in contracts():
        name, answers = contract.service, patient.answers.get(contract.service, [])
        if not answers:
            found.append(
                Finding(
                    "broken", "services", f"{name} does not answer", "no process of it is on the bus, or it hangs",
                    f"look at its log (journalctl -u wherry@{name}, or what `wherry up` prints) and start it again",
                )
            )  # fmt: skip
        for answer in answers:
            found += _service(name, contract.version, answer)
            packages.setdefault(str(answer["metadata"].get("package", "")), []).append(name)
    found += _twins(patient.answers)
    packages.pop("", None)
    if len(packages) > 1:
        listed = "; ".join(f"{version}: {', '.join(sorted(set(names)))}" for version, names in packages.items())
        found.append(
            Finding("warning", "services", "services of several versions run", listed, "restart those of the old one")
        )
    return found


def _service(name: str, version: str, answer: dict[str, Any]) -> Iterable[Finding]:
    theirs = str(answer.get("version", ""))
    if theirs.partition(".")[0] != version.partition(".")[0]:
        yield Finding(
            "broken", "services", f"{name} speaks {theirs}", f"this client speaks {version}",
            "install the same version on both sides",
        )  # fmt: skip
    errors: dict[str, int] = {}
    for endpoint in answer.get("endpoints", []):
        for code, count in endpoint.get("data", {}).get("errors", {}).items():
            errors[code] = errors.get(code, 0) + count
    alarming = {code: errors[code] for code in ALARMING if code in errors}
    if alarming:
        listed = ", ".join(f"{count} times {code}" for code, count in alarming.items())
        yield Finding(
            "warning", "services", f"{name} had errors of its own since it was started", listed,
            "its log has the reasons; `verify` of content finds rotten blobs",
        )  # fmt: skip


def _twins(answers: dict[str, list[dict[str, Any]]]) -> Iterable[Finding]:
    """Two nodes of one name: requests go now to the one, now to the other."""
    homes = {name: {home for home in map(twins.home, told) if home} for name, told in answers.items()}
    double = sorted(name for name, at in homes.items() if len(at) > 1)
    if not double:
        return
    ids = sorted({str(answer["metadata"].get(twins.SERVER, "")) for answer in answers.get("introspection", [])} - {""})
    yield Finding(
        "broken", "services", f"two nodes have this name: {', '.join(double)} are served from several places",
        f"the server ids: {', '.join(ids)}" if ids else "their introspection services do not answer",
        "stop one of them, or give it another name: WHERRY_NODE, or wherry up --node (and credentials of its own)",
    )  # fmt: skip


async def clock(patient: Patient) -> Iterable[Finding]:
    """Leases, deadlines and events go by the time."""
    before = now()
    # To a clock that is far ahead a request from here is late, unless its deadline is far off.
    far = context.enter(context.current()._replace(deadline=time.time() + FAR_SECONDS))
    try:
        async with asyncio.timeout(READ_SECONDS):
            told = (await patient.bus.introspection.server()).time
    except TimeoutError:
        raise DeadlineExceeded("introspection.server: no answer") from None
    finally:
        context.leave(far)
    after = now()
    if told is None:
        return []
    apart = abs((told - (before + (after - before) / 2)).total_seconds())
    if apart < SKEW_WARNING + (after - before).total_seconds():
        return []
    return [
        Finding(
            "broken" if apart > SKEW_BROKEN else "warning", "clock",
            f"the node's clock is {apart:.0f} s off this one's",
            "requests carry a time to be answered by, and leases end at a time", "keep both with NTP (chrony)",
        )
    ]  # fmt: skip


# ---- plugins


async def plugins(patient: Patient) -> Iterable[Finding]:
    """What did not come up. It is broken where a namespace or a container wants it."""
    client = patient.bus
    broken = [p for p in await client.introspection.plugins() if p.init_error and p.type != SERVICE_PLUGIN]
    if not broken:
        return []
    wanted = {await client.within(name).default_snapshotter() for name in await namespaces(client)}
    return [_plugin(plugin, plugin.type == SNAPSHOTTER_PLUGIN and plugin.id in wanted) for plugin in broken]


def _plugin(plugin: Plugin, wanted: bool) -> Finding:
    what = f"{plugin.type} {plugin.id} is not to be had"
    if wanted:
        return Finding(
            "broken", "plugins", what, plugin.init_error,
            "make the host fit for it, or label the namespaces containerd.io/defaults/snapshotter with another",
        )  # fmt: skip
    return Finding("note", "plugins", what, plugin.init_error, "nothing, unless you want to use it")


# ---- images and containers


async def images(patient: Patient) -> Iterable[Finding]:
    """Every image is whole: what its documents name is in content."""
    found: list[Finding] = []
    for namespace in await namespaces(patient.bus):
        client = patient.bus.within(namespace)
        records = await walk(client.images.walk)
        missing = await each(partial(_missing, Survey(client)), records, 8)
        for record, lacks in zip(records, missing, strict=True):
            # It may have been removed while it was looked at.
            if (
                lacks
                and (there := await _image(client, record.name))
                and (still := await _missing(Survey(client), there))
            ):
                found.append(_incomplete(namespace, there, still))
    return found


async def _image(client: Client, name: str) -> Record | None:
    try:
        return await client.images.get(name)
    except NotFound:
        return None


async def _missing(survey: Survey, record: Record) -> list[str]:
    """What an image lacks. Platforms of which nothing is here are none of it, if there is another; and artifacts that
    are no images are taken as they are."""
    try:
        graph = await survey.graph(record.target)
    except (InvalidArgument, Unimplemented):
        return []
    except WherryError as e:
        return [str(e)]
    children = {child.digest for listed in graph.children.values() for child in listed}
    absent = [p for p in graph.missing if p.kind in ("index", "manifest", "blob") and p.descriptor.digest in children]
    holes = [part for part in graph.missing if part not in absent]
    here = [descriptor for descriptor in graph.images if not is_attestation(descriptor)]
    return [f"{part.kind} {part.descriptor.digest}" for part in holes or ([] if here else absent)]


def _incomplete(namespace: str, record: Record, missing: list[str]) -> Finding:
    more = f" and {len(missing) - _NAMED_MAX} more" if len(missing) > _NAMED_MAX else ""
    return Finding(
        "broken", "images", f"image {record.name} of namespace {namespace} is incomplete",
        f"not in content: {', '.join(missing[:_NAMED_MAX])}{more}",
        f"wherry pull -n {namespace} {record.name}, or remove it: wherry images rm -n {namespace} {record.name}",
    )  # fmt: skip


async def containers(patient: Patient) -> Iterable[Finding]:
    """Every container has its snapshot, and every task its container."""
    found: list[Finding] = []
    for namespace in await namespaces(patient.bus):
        client = patient.bus.within(namespace)
        tasks = {process.container_id for process in await walk(client.tasks.walk)}
        records = await walk(client.containers.walk, spec=False)
        errors = await each(partial(_snapshot_error, client), records)
        found += [_without_snapshot(namespace, r.id, e) for r, e in zip(records, errors, strict=True) if e]
        orphans = sorted(tasks - {record.id for record in records})
        found += [_without_container(namespace, id) for id in orphans if await _is_orphan(client, id)]
    return found


def _without_snapshot(namespace: str, id: str, error: str) -> Finding:
    return Finding(
        "broken", "containers", f"container {id} of namespace {namespace} has no snapshot", error,
        f"its files are lost; wherry rm -f -n {namespace} {id}",
    )  # fmt: skip


def _without_container(namespace: str, id: str) -> Finding:
    return Finding(
        "broken", "containers", f"task {id} of namespace {namespace} has no container",
        "its container was deleted while it was there: nothing lists it any more",
        f"end it: `client.tasks.delete({id!r}, force=True)` of a client of that namespace",
    )  # fmt: skip


async def _snapshot_error(client: Client, record: Container) -> str:
    if not record.snapshot_key:
        return ""
    try:
        await client.snapshots.stat(record.snapshotter, record.snapshot_key)
    except (NotFound, InvalidArgument) as e:
        try:
            await client.containers.get(record.id)
        except NotFound:  # it went meanwhile, with its snapshot
            return ""
        return str(e)
    return ""


async def _is_orphan(client: Client, id: str) -> bool:
    """A container is there before its task is made, and goes after it."""
    try:
        await client.containers.get(id)
    except NotFound:
        try:
            await client.tasks.get(id)
        except NotFound:
            return False
        return True
    return False


async def restart_policies(patient: Patient) -> Iterable[Finding]:
    """What is to be started again is, by somebody: the keeper waits for a minute at most."""
    client = patient.bus
    up_since = now() - timedelta(seconds=min((s.uptime for s in await client.introspection.services()), default=0.0))
    late = now() - timedelta(seconds=LATE_SECONDS)
    found = []
    for namespace in await namespaces(client):
        within = client.within(namespace)
        for record in await walk(within.containers.walk, spec=False, filters=[f'labels."{STATUS}"']):
            since = await _stopped_since(within, record, up_since)
            if since is not None and since < late:
                found.append(_not_restarted(namespace, record, since))
    return found


async def _stopped_since(client: Client, record: Container, up_since: datetime) -> datetime | None:
    """Since when it waits for being started again; None when it does not."""
    policy, ended, status = policy_of(record.labels), max(record.updated_at or up_since, up_since), None
    with suppress(NotFound):
        task = await client.tasks.get(record.id)
        if task.status != "stopped":
            return None
        ended, status = max(task.exited_at or up_since, up_since), task.exit_status
    return ended if policy is not None and policy.wants(record.labels, status, boot=False) else None


def _not_restarted(namespace: str, record: Container, since: datetime) -> Finding:
    what = f"container {record.id} of namespace {namespace} is to run, and nobody starts it again"
    return Finding(
        "warning" if record.tenant else "broken", "restarts", what,  # a tenant may want what it is not let
        f"it does not run since {since.isoformat(timespec='seconds')}",
        "`wherry up` does that, or `wherry keep` (the unit wherry-keeper); its log says what keeps it from it",
    )  # fmt: skip


async def events(patient: Patient) -> Iterable[Finding]:
    """The stream of events is there, and has no holes; it is read through, for as long as READ_SECONDS."""
    source = patient.bus.bus.proxy(Events)
    token, more, until = "", True, time.monotonic() + READ_SECONDS
    gaps: list[Gap] = []
    try:
        while more:
            window = await source.replay(token=token, filters=[NO_EVENT])
            gaps += [window.gap] if window.gap is not None else []
            token, more = window.token, window.more
            if time.monotonic() > until:
                return [*_holes(gaps), _too_long(token)]
    except OutOfRange:  # what was read meanwhile expired
        return _holes(gaps)
    except WherryError as e:
        return [
            Finding(
                "broken", "events", "the stream of events cannot be read", str(e),
                "events wait in the services' outboxes meanwhile: look at nats-server's log and its disk",
            )
        ]  # fmt: skip
    return _holes(gaps)


def _holes(gaps: list[Gap]) -> list[Finding]:
    if not gaps:
        return []
    count = sum(gap.last - gap.first + 1 for gap in gaps)
    ranges = ", ".join(f"{gap.first} to {gap.last}" for gap in gaps[:_NAMED_MAX])
    return [
        Finding(
            "broken", "events", f"the stream of events has lost {count} events", f"their numbers: {ranges}",
            "look after the disk under nats-server; who follows events has to read the state again",
        )
    ]  # fmt: skip


def _too_long(token: str) -> Finding:
    return Finding(
        "note", "events", "the stream of events was not read to its end", f"it is long; it was read up to {token}",
        "a smaller max_bytes or max_age of the events service, if so many need not be kept",
    )  # fmt: skip


async def namespaces(client: Client) -> list[str]:
    known = {namespace.name for namespace in await walk(client.namespaces.walk)}
    return sorted({client.namespace, *known})


CHECKS = (
    Check("services", services),
    Check("clock", clock, ("introspection",)),
    Check("plugins", plugins, ("introspection", "namespace")),
    Check("images", images, ("namespace", "image", "content")),
    Check("containers", containers, ("namespace", "container", "task", "snapshot")),
    Check("restarts", restart_policies, ("introspection", "namespace", "container", "task")),
    Check("events", events, ("events",)),
)

"""Who may do what: the generated users and permissions, refused and let through by a real nats-server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from housebus import PATIENCE, HouseServer
from natsd import NatsServer, make_key
from wherry_shared.api import contracts
from wherry_shared.api.container import Containers
from wherry_shared.api.events import Events, Stream
from wherry_shared.api.image import Images
from wherry_shared.api.lease import Lease, Leases
from wherry_shared.api.namespace import Namespace, Namespaces
from wherry_shared.bus import Bus, credentials, discovery, subjects
from wherry_shared.bus.connection import Connection
from wherry_shared.bus.credentials import CALLS, Identities
from wherry_shared.bus.proxy import ERROR_CODE
from wherry_shared.bus.transport import Message
from wherry_shared.context import Identity
from wherry_shared.contract import pack
from wherry_shared.errors import (
    DeadlineExceeded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    WherryError,
)
from wherry_shared.values import now

Connect = Callable[..., Awaitable[Bus]]
RPC = subjects.RPC


def serving(contract: type[Any], **methods: Any) -> Any:
    """A service of which only some operations do anything."""

    async def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Unimplemented("not in this test")

    return type("Serving", (contract,), {**dict.fromkeys(contract.endpoints, refuse), **methods})()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HouseServer]:
    with HouseServer(tmp_path_factory.mktemp("house"), tenants=["a", "b.c"]) as server:
        yield server


@pytest.fixture
async def connect(house: HouseServer) -> AsyncIterator[Connect]:
    """`await connect(user)`: one user's Bus."""
    made: list[Bus] = []

    async def connect(user: str = "admin", server: HouseServer = house, **options: Any) -> Bus:
        made.append(await server.connect(user, **options))
        return made[-1]

    yield connect
    for bus in made:
        await bus.close()


@pytest.fixture
async def seen(house: HouseServer) -> AsyncIterator[list[str]]:
    """The subjects of everything on the bus under `wherry.`, by one who may see all."""
    watcher = await house.operator()
    subjects_seen: list[str] = []
    await watcher.subscribe("wherry.>", lambda message: subjects_seen.append(message.subject))
    yield subjects_seen
    await watcher.close()


async def refused_publish(bus: Bus, subject: str) -> None:
    """A publish that the server refuses. It says so by an error that only a request is told of."""
    with pytest.raises(PermissionDenied):
        await bus.transport.request(subject, b"", timeout=5)


async def allowed_publish(bus: Bus, subject: str) -> None:
    """One that it lets through, to nobody."""
    with pytest.raises(Unavailable, match="nobody listens"):
        await bus.transport.request(subject, b"", timeout=5)


async def refused_subscribe(bus: Bus, subject: str, queue: str = "") -> None:
    with pytest.raises(PermissionDenied):
        await bus.transport.subscribe(subject, lambda message: None, queue=queue)


async def refused_by_the_server(bus: Bus, subject: str, caplog: pytest.LogCaptureFixture) -> None:
    """A subscription that our own side would not let pass, sent by hand."""
    transport = bus.transport
    assert isinstance(transport, Connection)
    caplog.clear()
    await transport._link._send_command(f"SUB {subject} 4711\r\n".encode())
    await transport.flush()
    assert f'Permissions Violation for Subscription to "{subject}"' in caplog.text


# ---- who gets in


async def test_nobody_gets_in_without_credentials(house: HouseServer) -> None:
    stranger = make_key()
    for options in ({}, {"seed": stranger.seed}):
        with pytest.raises(Unauthenticated):
            await Connection.connect([house.nats.url], name="x", inbox_prefix="_INBOX_x", **options)  # type: ignore[arg-type]


async def test_everybody_issued_gets_in(house: HouseServer, connect: Connect) -> None:
    users = [*CALLS, "admin", "auditor", "observer", "tenant-a", "tenant-b.c"]
    assert sorted(users) == sorted(path.stem for path in house.creds.glob("*.nk"))
    for user in users:
        assert (await connect(user)).transport.connected


# ---- a tenant


OTHERS = [
    f"{RPC}.n1.b~c.image.get", f"{RPC}.n1.*.image.get", f"{RPC}.n1.>", f"{RPC}.>", f"{RPC}.n1._.namespace.create",
    f"{RPC}.n1._.introspection.server", f"{RPC}.n1._.events.replay", f"{RPC}.n1.a.namespace.create",
    f"{RPC}.n1.aa.image.get", f"{RPC}.n1.A.image.get", f"{RPC}.n1.a.gc.run", "$JS.API.INFO",
    "$JS.API.STREAM.INFO.WHERRY-EV-n1", "$JS.API.CONSUMER.CREATE.WHERRY-EV-n1", "$JS.API.DIRECT.GET.WHERRY-EV-n1",
    "$JS.API.STREAM.DELETE.WHERRY-EV-n1", "$JS.ACK.WHERRY-EV-n1.x.1.1.1.1.1", "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.USER.INFO", "wherry.ev.v1.n1.a.images.create", "wherry.ev.v1.n1.b~c.images.create",
    "wherry.io.v1.n1.b~c.c.e.stdin", "wherry.io.v1.n1.a.c.e.stdout", "wherry.audit.v1.n1.a.x", "$SRV.PING", "_INBOX.x",
    "anything",
]  # fmt: skip


@pytest.mark.parametrize("subject", OTHERS)
async def test_a_tenant_publishes_in_its_own_namespace_only(connect: Connect, subject: str, seen: list[str]) -> None:
    tenant = await connect("tenant-a")
    await refused_publish(tenant, subject)
    assert seen == []


async def test_what_a_tenant_may_publish(connect: Connect) -> None:
    a, b = await connect("tenant-a"), await connect("tenant-b.c")
    for bus, token in ((a, "a"), (b, "b~c")):
        for contract in contracts():
            if contract.namespaced is not False:
                await allowed_publish(bus, f"{RPC}.n1.{token}.{contract.service}.anything")
        await allowed_publish(bus, f"{RPC}.other.{token}.image.get")
        await allowed_publish(bus, f"wherry.io.v1.n1.{token}.c.e.stdin")


async def test_a_tenant_sees_its_own_namespace_only(
    house: HouseServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    tenant = await connect("tenant-a")
    others = credentials.find(house.creds, "tenant-b.c").inbox_prefix
    for subject in (
        ">", "*", "*.>", "_INBOX.>", f"{others}.>", f"{others}.*.*", "$JS.API.>", "$SYS.>",
        "$SYS.ACCOUNT.>", "$JS.EVENT.>", "wherry.>", f"{RPC}.>", f"{RPC}.n1.a.>", f"{RPC}.n1.a.image.*",
        "wherry.ev.>", "wherry.ev.v1.n1.>", "wherry.ev.v1.n1.*.>", "wherry.ev.v1.n1.b~c.>",
        "wherry.io.v1.n1.*.c.e.stdin", "wherry.io.v1.n1.b~c.>", "wherry.audit.>", "$SRV.>", "$SRV.PING",
    ):  # fmt: skip
        await refused_subscribe(tenant, subject)
        await refused_subscribe(tenant, subject, queue="image")
    for subject in ("_INBOX_*.>", "_INBOX_*.*"):
        await refused_by_the_server(tenant, subject, caplog)
    for subject in ("wherry.ev.v1.*.a.>", "wherry.ev.v1.n1.a.tasks.exit", "wherry.io.v1.n1.a.c.e.stdout"):
        await (await tenant.transport.subscribe(subject, lambda message: None)).unsubscribe()


async def test_a_tenants_events_are_those_of_its_namespace(house: HouseServer, connect: Connect) -> None:
    a, b = await connect("tenant-a"), await connect("tenant-b.c")
    image = await connect("image")
    got: dict[str, list[str]] = {"a": [], "b": []}
    for bus, name, token in ((a, "a", "a"), (b, "b", "b~c")):
        await bus.transport.subscribe(f"wherry.ev.v1.*.{token}.>", lambda m, n=name: got[n].append(m.subject))  # type: ignore[misc]
    for token in ("a", "b~c", "third"):
        image.transport.publish(f"wherry.ev.v1.n1.{token}.images.create", b"{}")
    await image.transport.flush()
    await a.transport.flush()
    await b.transport.flush()
    assert got == {"a": ["wherry.ev.v1.n1.a.images.create"], "b": ["wherry.ev.v1.n1.b~c.images.create"]}


async def test_wildcards_in_ones_own_prefix_are_refused_by_the_service(connect: Connect) -> None:
    """The server lets a literal `*` pass under a prefix that one may publish; it is no namespace and no operation."""
    service, tenant, admin = await connect("image"), await connect("tenant-a"), await connect("admin")
    done: list[str] = []

    async def delete(self: Any, name: str, target: str = "", sync: bool = False) -> None:
        done.append(name)

    await service.serve(serving(Images, delete=delete))
    body = pack({"name": "x"})
    for bus, subject, code in (
        (tenant, f"{RPC}.n1.a.image.*", "12"), (tenant, f"{RPC}.n1.a.image.>", "12"),
        (admin, f"{RPC}.n1.*.image.delete", "3"), (admin, f"{RPC}.n1.>.image.delete", "3"),
        (admin, f"{RPC}.n1._.image.delete", "3"),
    ):  # fmt: skip
        answer = await bus.transport.request(subject, body, timeout=5)
        assert (answer.headers or {})[ERROR_CODE] == code, subject
    await allowed_publish(tenant, f"{RPC}.*.a.image.delete")  # no node's name: nobody listens
    await tenant.proxy(Images, namespace="a").delete("mine")
    assert done == ["mine"]


# ---- who asks


async def test_a_caller_is_known_by_the_inbox_that_it_wants_the_answer_in(
    house: HouseServer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    service = await connect("lease")
    who: list[str] = []

    async def get(self: Any, id: str) -> Lease:
        from wherry_shared import context

        who.append(context.current().identity.name)
        return Lease(id=id, created_at=now())

    await service.serve(serving(Leases, get=get))
    for user in ("tenant-a", "admin", "image", "content"):
        await (await connect(user)).proxy(Leases, namespace="a").get("x")
    assert who == ["tenant-a", "admin", "image", "content"]

    operator = await house.operator()  # may publish anything, and is nobody to the services
    subject, body = f"{RPC}.n1.a.lease.get", pack({"id": "x"})
    with caplog.at_level(logging.WARNING), pytest.raises(DeadlineExceeded):
        await operator.request(subject, body, timeout=0.2)
    await operator.flush()  # also where its way there took longer than that
    await service.transport.flush()
    assert "dropped" in caplog.text and "_INBOX" not in caplog.text
    for reply in ("", "_INBOX.x", "_INBOX_.x", "x", f"{RPC}.n1.a.lease.delete", "wherry.io.v1.n1.a.c.e.stdin"):
        operator.publish(subject, body, reply=reply)
    await operator.flush()
    tenant = await connect("tenant-a")
    await tenant.proxy(Leases, namespace="a").get("x")
    assert len(who) == 5
    # The inbox of a tenant is no licence beyond its namespace, whoever found it out.
    prefix = credentials.find(house.creds, "tenant-b.c").inbox_prefix
    await operator.subscribe(f"{prefix}.*", lambda m: answers.append((m.headers or {}).get(ERROR_CODE)))
    answers: list[str | None] = []
    operator.publish(subject, body, reply=f"{prefix}.1")
    await tenant.proxy(Leases, namespace="a").get("x")
    await operator.flush()
    assert (answers, len(who)) == (["7"], 6)
    lines = [record.message for record in caplog.records if record.message.startswith("refused ")]
    assert all(f"identity= role= subject='{subject}' reason=" in line and "dropped" in line for line in lines[:-1])
    line = lines[-1]
    assert f"identity=tenant-b.c role=tenant subject='{subject}' reason=" in line and "_INBOX" not in line
    await operator.close()


async def test_inbox_prefixes_are_secrets_of_the_seeds(house: HouseServer, tmp_path: Path) -> None:
    credentials.issue(tmp_path, "n1", ["a"])
    prefixes = [credentials.find(d, u).inbox_prefix for d in (tmp_path, house.creds) for u in ("admin", "tenant-a")]
    assert len(set(prefixes)) == 4
    assert all(len(p) == len("_INBOX_") + 32 and "." not in p for p in prefixes)
    credentials.issue(tmp_path, "n1")
    assert credentials.find(tmp_path, "admin").inbox_prefix == prefixes[0]


# ---- the observer


async def test_an_observer_sees_events_and_does_nothing(connect: Connect, seen: list[str]) -> None:
    observer = await connect("observer")
    for subject in (
        "wherry.ev.v1.n1.a.images.create", f"{RPC}.n1.a.events.publish", f"{RPC}.n1.a.events.forward",
        f"{RPC}.n1.a.events.*", f"{RPC}.n1.a.image.get", f"{RPC}.n1._.introspection.server", f"{RPC}.n1.a.task.list",
        "wherry.io.v1.n1.a.c.e.stdin", "$JS.API.INFO", "$SRV.INFO2", "$SYS.REQ.SERVER.PING",
    ):  # fmt: skip
        await refused_publish(observer, subject)
    for subject in ("wherry.io.>", "wherry.io.v1.n1.a.c.e.stdin", f"{RPC}.>", ">", "_INBOX.>", "$SRV.PING"):
        await refused_subscribe(observer, subject)
    assert seen == []
    events = await connect("events")
    subscriber = await observer.subscribe()

    async def stream(self: Any) -> Stream:
        return Stream(epoch="e", first=1, last=2)

    await events.serve(serving(Events, stream=stream))
    assert (await observer.proxy(Events).stream()).last == 2
    assert (await observer.proxy(Events, namespace="a").stream()).last == 2
    assert [a["name"] for a in await discovery.ask_all(observer.transport, "INFO", wait=5, expect=1)] == ["events"]
    await subscriber.close()


# ---- the services


async def test_a_service_serves_its_own_subjects_only(connect: Connect) -> None:
    for service in CALLS:
        bus = await connect(service)
        for other in CALLS:
            if other == service:
                continue
            await refused_subscribe(bus, f"{RPC}.n1.*.{other}.*", queue=other)
            await refused_subscribe(bus, f"{RPC}.n1.a.{other}.get")
        for subject in (f"{RPC}.n1.*.*.*", f"{RPC}.n1.>", f"{RPC}.*.*.{service}.*", f"{RPC}.n2.*.{service}.*", ">"):
            await refused_subscribe(bus, subject)
            await refused_subscribe(bus, subject, queue=service)


async def test_serving_what_is_anothers_is_refused_and_leaves_nothing(connect: Connect) -> None:
    lease, admin = await connect("lease"), await connect("admin")
    with pytest.raises(PermissionDenied):
        await lease.serve(serving(Images))
    with pytest.raises(Unavailable, match="nobody listens"):
        await admin.transport.request("$SRV.PING", b"", timeout=5)
    with pytest.raises(PermissionDenied):
        await admin.serve(serving(Images))


async def test_a_service_publishes_its_own_topics_only(connect: Connect) -> None:
    first = {s: credentials.topics(s) for s in CALLS}
    for service in CALLS:
        bus = await connect(service)
        for other, topics in first.items():
            for topic in topics:
                subject = f"wherry.ev.v1.n1.a.{topic}.create"
                if service in (other, "events"):
                    await allowed_publish(bus, subject)
                else:
                    await refused_publish(bus, subject)
        await refused_publish(bus, "wherry.ev.v1.n2.a.images.create")
        if service != "events":
            await refused_publish(bus, "wherry.ev.v1.n1.a.foreign.topic")
            await refused_publish(bus, "$JS.API.STREAM.INFO.WHERRY-EV-n1")
        if service != "task":
            await refused_publish(bus, "wherry.io.v1.n1.a.c.e.stdout")
            await refused_subscribe(bus, "wherry.io.v1.n1.a.c.e.stdin")
        await refused_publish(bus, "$JS.API.STREAM.DELETE.WHERRY-EV-n1")
        await refused_publish(bus, "$JS.API.STREAM.CREATE.OTHER")


async def test_a_service_calls_those_it_needs_only(connect: Connect) -> None:
    for service, needed in CALLS.items():
        bus = await connect(service)
        for other in CALLS:
            subject = f"{RPC}.n1.a.{other}.walk"
            await (allowed_publish if other in needed else refused_publish)(bus, subject)


async def test_an_answer_goes_to_who_asked_and_once(house: HouseServer, connect: Connect) -> None:
    """A service may publish nothing into inboxes but the one answer to what it was asked."""
    service, tenant = await connect("lease"), await connect("tenant-a")
    replies: list[str] = []

    def answer_twice(message: Message) -> None:
        replies.append(message.reply)
        for _ in range(3):
            service.transport.publish(message.reply, b"answer")

    await service.transport.subscribe(f"{RPC}.n1.*.lease.*", answer_twice, queue="lease")
    got: list[bytes] = []
    await tenant.transport.subscribe(f"{tenant.transport.inbox_prefix}.mine", lambda m: got.append(m.data))
    tenant.transport.publish(f"{RPC}.n1.a.lease.get", b"", reply=f"{tenant.transport.inbox_prefix}.mine")
    await tenant.transport.flush()
    for _ in range(3):
        await service.transport.flush()
        await tenant.transport.flush()
    assert got == [b"answer"]
    service.transport.publish(f"{tenant.transport.inbox_prefix}.unasked", b"")
    await service.transport.flush()
    assert service.transport.connected


async def test_the_admin_calls_everything_and_serves_nothing(connect: Connect) -> None:
    admin = await connect("admin")
    for contract in contracts():
        await allowed_publish(admin, f"{RPC}.n1.a.{contract.service}.x")
        await refused_subscribe(admin, f"{RPC}.n1.*.{contract.service}.*", queue=contract.service)
    for subject in ("wherry.ev.v1.n1.a.images.create", "$JS.API.INFO", "$SYS.REQ.SERVER.PING", "_INBOX.x"):
        await refused_publish(admin, subject)
    for subject in (">", "_INBOX.>", f"{RPC}.>"):
        await refused_subscribe(admin, subject)


async def test_services_of_contracts_know_each_other(connect: Connect) -> None:
    """Real calls under the real permissions: a namespace service that asks the image service."""
    image, namespace, admin = await connect("image"), await connect("namespace"), await connect("admin")

    async def delete(self: Any, name: str, target: str = "", sync: bool = False) -> None: ...

    await image.serve(serving(Images, delete=delete))

    async def get(self: Any, name: str) -> Namespace:
        await namespace.proxy(Images, namespace=name).delete("x")
        with pytest.raises(PermissionDenied):
            await namespace.proxy(Leases, namespace=name).delete("x")
        return Namespace(name=name)

    await namespace.serve(serving(Namespaces, get=get))
    assert (await admin.proxy(Namespaces).get("a")).name == "a"
    with pytest.raises(Unavailable):
        from wherry_shared import context

        with context.use(timeout=0.5):
            await admin.proxy(Containers, namespace="a").delete("x")


# ---- the files


def test_everything_is_its_owners_alone(tmp_path: Path) -> None:
    os.umask(0o022)
    creds = tmp_path / "creds"
    credentials.issue(creds, "n1", ["a"])
    assert stat.S_IMODE(creds.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in creds.iterdir()} == {0o600}
    assert not list(creds.glob("*.new"))


def test_a_seed_that_others_can_read_is_refused(tmp_path: Path) -> None:
    credentials.issue(tmp_path, "n1")
    path = tmp_path / "admin.nk"
    for mode in (0o640, 0o604, 0o660, 0o644):
        path.chmod(mode)
        with pytest.raises(Unauthenticated, match=r"admin\.nk can be read by others: chmod 600 it"):
            credentials.load(path)
    path.chmod(0o400)
    assert credentials.load(path).name == "admin"


def test_what_is_no_seed_is_refused_without_its_text(tmp_path: Path) -> None:
    path = tmp_path / "x.nk"
    for text in (b"", b"SECRETSEED", b"SAAAA", b"\xff\xfe", b"SU" + b"1" * 56, b"SUA"):
        path.write_bytes(text)
        path.chmod(0o600)
        with pytest.raises(Unauthenticated) as caught:
            credentials.load(path)
        assert "SECRET" not in str(caught.value)
    with pytest.raises(Unauthenticated, match="No such file"):
        credentials.load(tmp_path / "missing.nk")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_a_seed_of_another_user_is_refused(tmp_path: Path) -> None:
    credentials.issue(tmp_path, "n1")
    os.chown(tmp_path / "admin.nk", 65534, 65534)
    with pytest.raises(Unauthenticated, match="belong to another user"):
        credentials.load(tmp_path / "admin.nk")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_files_that_were_given_to_a_services_user_stay_its(tmp_path: Path) -> None:
    """As the supervisor does it for services that need no root; issuing again keeps that."""
    credentials.issue(tmp_path, "n1")
    seed = (tmp_path / "image.nk").read_bytes()
    os.chown(tmp_path / "image.nk", 65534, 65534)
    table = tmp_path / credentials.IDENTITIES
    os.chown(table, 0, 65534)
    table.chmod(0o640)
    credentials.issue(tmp_path, "n1", ["new"])
    assert (tmp_path / "image.nk").read_bytes() == seed
    info = table.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, 65534, 0o640)
    assert "tenant-new" in table.read_text()


def test_tenants_stay_and_bad_names_are_refused(tmp_path: Path) -> None:
    credentials.issue(tmp_path, "n1", ["a", "k8s.io"])
    credentials.issue(tmp_path, "n1", ["b"])
    users = (tmp_path / credentials.NATS_USERS).read_text()
    for name in ("a", "k8s.io", "b"):
        assert credentials.find(tmp_path, credentials.tenant(name)).public_key in users
    for bad in ("a b", "*", ">", "", "../x", "a\nb", "n" * 77):
        with pytest.raises(WherryError):
            credentials.issue(tmp_path, "n1", [bad])
    assert (tmp_path / credentials.NATS_USERS).read_text() == users


# ---- tenants that come later


async def test_a_tenant_is_added_while_everybody_works(tmp_path: Path) -> None:
    with HouseServer(tmp_path) as house:
        service, admin = await house.connect("lease"), await house.connect("admin")
        state: list[bool] = []
        for bus in (service, admin):
            bus.transport.on_state.append(state.append)
        who: list[str] = []

        async def get(self: Any, id: str) -> Lease:
            from wherry_shared import context

            who.append(context.current().identity.name)
            return Lease(id=id, created_at=now())

        await service.serve(serving(Leases, get=get))
        await admin.proxy(Leases, namespace="late").get("x")
        house.issue("late")
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    tenant = await house.connect("tenant-late")
                    break
                except (Unauthenticated, Unavailable):
                    await asyncio.sleep(0.02)
        assert (await tenant.proxy(Leases, namespace="late").get("y")).id == "y"
        await refused_publish(tenant, f"{RPC}.n1.other.lease.get")
        await admin.proxy(Leases, namespace="late").get("z")
        assert (who, state) == (["admin", "tenant-late", "admin"], [])
        for bus in (service, admin, tenant):
            await bus.close()


def test_identities_are_read_again_when_they_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    credentials.issue(tmp_path, "n1")
    identities = Identities(tmp_path)
    admin = credentials.find(tmp_path, "admin").inbox_prefix
    found = identities(f"{admin}.abc.1")
    assert found is not None and found.is_admin
    assert identities("_INBOX_unknown.1") is None
    credentials.issue(tmp_path, "n1", ["a"])
    found = identities(f"{credentials.find(tmp_path, 'tenant-a').inbox_prefix}.x")
    assert found is not None and (found.role, found.namespace, found.is_admin) == ("tenant", "a", False)
    table = tmp_path / credentials.IDENTITIES
    for damage in ("{", json.dumps({"_INBOX_x": {"nonsense": 1}})):
        table.write_text(damage)
        os.utime(table, ns=(0, len(damage)))  # another time also where a file has one of some milliseconds
        assert identities("_INBOX_x.1") is None  # and who is known stays known
        assert identities(f"{admin}.1") == Identity("admin", "admin")
    assert caplog.text.count("stays unknown") == 2
    table.unlink()
    assert identities("_INBOX_y.1") is None


def test_the_table_is_one_that_the_server_takes(tmp_path: Path) -> None:
    """As it is included into a node's configuration."""
    credentials.issue(tmp_path / "creds", "n.1", ["a"])
    config = f'include "{os.path.relpath(tmp_path / "creds" / credentials.NATS_USERS, tmp_path / "nats")}"\n'
    with NatsServer(tmp_path / "nats", config=config) as server:
        assert server.process is not None
    text = (tmp_path / "creds" / credentials.NATS_USERS).read_text()
    assert "n~1" in text and "n.1" not in text
    assert "no_auth_user" not in text

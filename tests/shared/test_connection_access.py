"""Who may connect, publish and subscribe: refused by a real nats-server, and surfacing at once."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from natsd import Key, NatsServer, make_key
from wherry_shared.bus.connection import Connection
from wherry_shared.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)

Connect = Callable[..., Awaitable[Connection]]

USERS = """
authorization {{
  users = [
    {{ nkey: {service} }}
    {{ nkey: {tenant}
       permissions: {{
         publish: {{ allow: ["rpc.ok", "_INBOX.>"] }}
         subscribe: {{ allow: ["_INBOX.tenant.>", "ev.mine.>", "shared workers"] }}
       }} }}
  ]
}}
"""


@pytest.fixture(scope="module")
def service() -> Key:
    return make_key()


@pytest.fixture(scope="module")
def tenant() -> Key:
    return make_key()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, service: Key, tenant: Key) -> Iterator[NatsServer]:
    config = USERS.format(service=service.public, tenant=tenant.public)
    with NatsServer(tmp_path_factory.mktemp("guarded"), config=config) as server:
        yield server


async def test_what_is_allowed_works(guarded: NatsServer, connect: Connect, service: Key, tenant: Key) -> None:
    server = await connect(guarded, seed=service.seed)
    client = await connect(guarded, seed=tenant.seed + b"\n", inbox_prefix="_INBOX.tenant")
    await server.subscribe("rpc.ok", lambda message: server.publish(message.reply, b"fine"))
    assert (await client.request("rpc.ok", b"", timeout=10)).data == b"fine"
    await client.subscribe("ev.mine.>", lambda message: None)
    await client.subscribe("shared", lambda message: None, queue="workers")


async def test_a_refused_request_fails_at_once(
    guarded: NatsServer, connect: Connect, service: Key, tenant: Key
) -> None:
    server = await connect(guarded, seed=service.seed)
    client = await connect(guarded, seed=tenant.seed, inbox_prefix="_INBOX.tenant")
    reached: list[bytes] = []
    for subject in ("rpc.secret", 'rpc."quoted\\name"'):
        await server.subscribe(subject, lambda message: reached.append(message.data))
        with pytest.raises(PermissionDenied) as caught:
            await client.request(subject, b"", timeout=3600)
        assert str(caught.value) == f"this identity may not publish on {subject}"
    await server.flush()
    assert not reached
    assert client.connected


async def test_a_refusal_concerns_only_its_own_subject(
    guarded: NatsServer, connect: Connect, service: Key, tenant: Key
) -> None:
    server = await connect(guarded, seed=service.seed)
    client = await connect(guarded, seed=tenant.seed, inbox_prefix="_INBOX.tenant")
    await server.subscribe("rpc.ok", lambda message: server.publish(message.reply, message.data))
    results = await asyncio.gather(
        *(client.request("rpc.ok" if n % 2 else "rpc.secret", b"%d" % n, timeout=30) for n in range(40)),
        return_exceptions=True,
    )
    for n, result in enumerate(results):
        if n % 2:
            assert not isinstance(result, BaseException) and result.data == b"%d" % n
        else:
            assert isinstance(result, PermissionDenied)


async def test_a_refused_publish_is_logged(
    guarded: NatsServer, connect: Connect, tenant: Key, caplog: pytest.LogCaptureFixture
) -> None:
    client = await connect(guarded, seed=tenant.seed, inbox_prefix="_INBOX.tenant")
    client.publish("rpc.secret", b"")
    await client.flush()
    assert 'Permissions Violation for Publish to "rpc.secret"' in caplog.text


async def test_refused_subscriptions(guarded: NatsServer, connect: Connect, tenant: Key) -> None:
    client = await connect(guarded, seed=tenant.seed, inbox_prefix="_INBOX.tenant")
    before = dict(client._link._subs), dict(client._link.callbacks)
    for subject, queue in (("ev.>", ""), ("ev.other.x", ""), (">", ""), ("shared", "others"), ("_INBOX.service.>", "")):
        with pytest.raises(PermissionDenied, match="may not subscribe to"):
            await client.subscribe(subject, lambda message: None, queue=queue)
    assert (client._link._subs, client._link.callbacks) == before, "nothing refused is replayed after an outage"
    results = await asyncio.gather(
        *(client.subscribe(subject, lambda message: None) for subject in ("ev.mine.a", "ev.x", "ev.mine.b", "ev.x")),
        return_exceptions=True,
    )
    assert [isinstance(result, PermissionDenied) for result in results] == [False, True, False, True]


async def test_an_inbox_outside_of_ones_own_prefix(guarded: NatsServer, connect: Connect, tenant: Key) -> None:
    with pytest.raises(PermissionDenied, match=r"may not subscribe to _INBOX\.service"):
        await connect(guarded, seed=tenant.seed, inbox_prefix="_INBOX.service")


async def test_wrong_seed_and_no_seed(guarded: NatsServer, connect: Connect) -> None:
    with pytest.raises(Unauthenticated, match="Authorization Violation"):
        await connect(guarded, seed=make_key().seed, connect_timeout=60)
    with pytest.raises(Unauthenticated):
        await connect(guarded, connect_timeout=60)


@pytest.mark.parametrize(
    "seed", [b"", b"SU", b"not base32 !", b"\xff\xfe", make_key().public.encode()],
    ids=["empty", "short", "not base32", "bytes", "a public key"],
)  # fmt: skip
async def test_malformed_seeds_are_not_repeated_in_the_error(
    shared_server: NatsServer, connect: Connect, seed: bytes
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await connect(shared_server, seed=seed)
    assert str(caught.value) == "the seed is not the nkey seed of a user"


@pytest.mark.parametrize("prefix", ["", "a b", "a..b", "a.", "*", "a.>", "a\r\n"])
async def test_malformed_inbox_prefixes(shared_server: NatsServer, connect: Connect, prefix: str) -> None:
    with pytest.raises(InvalidArgument):
        await connect(shared_server, inbox_prefix=prefix)


@pytest.mark.parametrize("servers", [[], ["127.0.0.1:4222"], ["ws://127.0.0.1:4222"], ["nats://"], ["nats://a:x"]])
async def test_malformed_addresses(servers: list[str]) -> None:
    with pytest.raises(InvalidArgument):
        await Connection.connect(servers, name="test", inbox_prefix="_INBOX.test")


async def test_missing_credentials_file(shared_server: NatsServer, connect: Connect) -> None:
    with pytest.raises(Unauthenticated, match="/nowhere/user"):
        await connect(shared_server, user_credentials="/nowhere/user.creds")


async def test_rights_taken_away_and_given_back(tmp_path: Path, connect: Connect, service: Key, tenant: Key) -> None:
    """A reload that removes the user ends its connection; it keeps trying, and is back when the user is."""
    both = USERS.format(service=service.public, tenant=tenant.public)
    with NatsServer(tmp_path, config=both) as server:
        client = await connect(server, seed=tenant.seed, inbox_prefix="_INBOX.tenant")
        other = await connect(server, seed=service.seed)  # during a reload even known users are turned away
        seen: list[bytes] = []
        await client.subscribe("ev.mine.>", lambda message: seen.append(message.data))
        server.reload(USERS.format(service=service.public, tenant=make_key().public))
        async with asyncio.timeout(30):
            while client.connected:
                await asyncio.sleep(0.01)
        with pytest.raises(Unavailable):
            await client.request("rpc.ok", b"", timeout=60)
        server.reload(both)
        async with asyncio.timeout(30):
            while not seen:
                other.publish("ev.mine.x", b"back")
                await asyncio.sleep(0.02)
        assert client.connected


async def test_no_subscription_left(tmp_path: Path, connect: Connect) -> None:
    with NatsServer(tmp_path, config="max_subscriptions: 3\n") as server:
        client = await connect(server)
        await client.subscribe("a", lambda message: None)
        await client.subscribe("b", lambda message: None)
        with pytest.raises(ResourceExhausted, match="cannot subscribe to c"):
            await client.subscribe("c", lambda message: None)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    command += " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=root, check=True, capture_output=True)
    return root / "cert.pem", root / "key.pem"


async def test_tls_and_an_outage_of_it(tmp_path: Path, connect: Connect, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    context = ssl.create_default_context(cafile=str(cert))
    with NatsServer(tmp_path, config=f'tls {{ cert_file: "{cert}", key_file: "{key}" }}\n') as server:
        client = await connect(server, tls=context)
        await client.subscribe("echo", lambda message: client.publish(message.reply, message.data))
        for data in (b"small", bytes(range(256)) * 4096):
            assert (await client.request("echo", data, timeout=20)).data == data
        server.kill()
        with pytest.raises(Unavailable):
            await client.request("echo", b"", timeout=3600)
        server.start()
        async with asyncio.timeout(30):
            while not client.connected:
                await asyncio.sleep(0.01)
        assert (await client.request("echo", b"again", timeout=20)).data == b"again"
        for patience in (0.5, 5.0, 30.0):  # the handshake may take its time
            with pytest.raises(Unavailable) as caught:
                await connect(server, tls=ssl.create_default_context(), connect_timeout=patience)
            if "certificate" in caught.value.message:
                break
        assert "certificate" in caught.value.message


async def test_a_server_without_tls_is_refused_when_tls_is_asked_for(
    shared_server: NatsServer, connect: Connect
) -> None:
    with pytest.raises(FailedPrecondition, match="TLS"):
        await connect(shared_server, tls=ssl.create_default_context())
    with pytest.raises(FailedPrecondition, match="TLS"):
        await Connection.connect([shared_server.url.replace("nats:", "tls:")], name="test", inbox_prefix="_INBOX.test")

"""The registry client against servers that fish for credentials: tokens, realms, redirects, foreign layers, https."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from wherry.registry import Credentials, Reference
from wherry.registry.auth import Access
from wherry.registry.hosts import Origin
from wherry_shared.errors import (
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    WherryError,
)

from .registry_traps import (
    BLOB,
    DATA,
    FOREIGN,
    TOKEN,
    WORD,
    Handler,
    Known,
    Trap,
    answer,
    client,
    ranged,
    serving,
    whole,
)

# --- tokens --------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """A registry that wants bearer tokens, and the answers of its token service."""

    realm: str = ""
    valid: set[str] = field(default_factory=set)
    issued: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    scope: str = "repository:team/app:pull"

    async def registry(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") in self.valid:
            return await ranged(request)
        challenge = f'Bearer realm="{self.realm}",service="the registry",scope="{self.scope}"'
        body = b'{"errors": [{"code": "UNAUTHORIZED", "message": "no"}]}'
        return web.Response(status=401, body=body, headers={"WWW-Authenticate": challenge})

    async def service(self, request: web.BaseRequest) -> web.StreamResponse:
        self.issued += 1
        token = f"{TOKEN}-{self.issued}"
        self.valid.add(token)
        await asyncio.sleep(0.05)
        return web.json_response({"token": token} | self.extra)


@asynccontextmanager
async def with_tokens(tokens: Tokens) -> AsyncIterator[tuple[Trap, Trap]]:
    async with serving(tokens.registry) as registry, serving(tokens.service) as service:
        tokens.realm = f"{service.url}/token?account=x"
        yield registry, service


async def test_one_token_serves_a_whole_pull() -> None:
    tokens = Tokens()
    async with with_tokens(tokens) as (trap, service), client(credentials=Known()) as registry:
        await registry.resolve(trap.ref())
        assert await asyncio.gather(*(whole(registry, trap) for _ in range(8))) == [DATA] * 8
        assert tokens.issued == 1
        query = service.requests[0].query
        assert (query["scope"], query["service"], query["account"]) == (tokens.scope, "the registry", "x")
        assert service.authorizations == ["Basic " + base64.b64encode(f"alice:{WORD}".encode()).decode()]
        assert set(trap.authorizations) == {f"Bearer {TOKEN}-1"}


async def test_layers_that_are_refused_together_ask_for_one_token() -> None:
    tokens = Tokens()
    async with with_tokens(tokens) as (trap, _), client() as registry:
        assert await asyncio.gather(*(whole(registry, trap) for _ in range(8))) == [DATA] * 8
        assert tokens.issued == 1


async def test_tokens_are_kept_apart_by_repository_and_renewed_when_refused() -> None:
    tokens = Tokens()
    async with with_tokens(tokens) as (trap, service), client() as registry:
        await registry.resolve(trap.ref("team/app"))
        tokens.scope = "repository:other/app:pull"
        await registry.resolve(trap.ref("other/app"))
        assert [r.query["scope"] for r in service.requests] == ["repository:team/app:pull", "repository:other/app:pull"]
        tokens.valid.clear()
        await registry.resolve(trap.ref("team/app"))
        assert tokens.issued == 3
        assert service.authorizations == []


async def test_a_token_of_no_life_is_not_used_twice() -> None:
    tokens = Tokens(extra={"expires_in": 0.001})
    async with with_tokens(tokens) as (trap, _), client() as registry:
        for _ in range(2):
            await asyncio.sleep(0.01)
            await registry.resolve(trap.ref())
        assert tokens.issued == 2


async def test_an_identity_token_is_posted() -> None:
    forms: list[Any] = []
    tokens = Tokens()

    async def service(request: web.BaseRequest) -> web.StreamResponse:
        forms.append(dict(await request.post()))
        return await tokens.service(request)

    async with serving(tokens.registry) as trap, serving(service) as far:
        tokens.realm = f"{far.url}/token"
        async with client(credentials=Known(Credentials(identity_token="refresh"))) as registry:
            await registry.resolve(trap.ref())
        assert far.requests[0].method == "POST"
        assert forms[0]["refresh_token"] == "refresh" and forms[0]["grant_type"] == "refresh_token"


async def test_a_registry_that_refuses_every_token_is_asked_twice() -> None:
    tokens = Tokens()

    async def never(request: web.BaseRequest) -> web.StreamResponse:
        tokens.valid.clear()
        return await tokens.registry(request)

    async with serving(never) as trap, serving(tokens.service) as service:
        tokens.realm = service.url
        async with client(credentials=Known()) as registry:
            with pytest.raises(Unauthenticated, match=trap.address):
                await registry.resolve(trap.ref())
        assert (len(trap.requests), tokens.issued) == (2, 1)


@pytest.mark.parametrize(
    "handler",
    [
        answer(200, b"{}"), answer(200, b'{"token": 5}'), answer(200, b'{"token": ""}'),
        answer(200, b'{"token": "a b"}'),
        answer(200, b'{"token": "a\\r\\nX-Evil: 1"}'), answer(200, json.dumps({"token": "x" * 70_000}).encode()),
        answer(200, b"not json"), answer(401), answer(403), answer(404),
        answer(200, b'{"token": "' + b"x" * (2 << 20) + b'"}'),
    ],
)  # fmt: skip
async def test_a_token_service_that_gives_no_token(handler: Handler) -> None:
    tokens = Tokens()
    async with serving(tokens.registry) as trap, serving(handler) as service:
        tokens.realm = service.url
        async with client(credentials=Known()) as registry:
            with pytest.raises((Unauthenticated, InvalidArgument, ResourceExhausted)) as caught:
                await registry.resolve(trap.ref())
        assert WORD not in str(caught.value)
        assert (len(trap.requests), len(service.requests)) == (1, 1)


@pytest.mark.parametrize(
    "realm",
    [
        "http://169.254.169.254/token", "https://169.254.169.254/token", "https://10.0.0.1/token", "https://[::]/token",
        "https://0.0.0.0/token", "http://token.example/", "https://inside.example/token", "https://u:p@token.example/",
        "ftp://token.example/", "/token", "", "https://[", "https://[::ffff:169.254.169.254]/", "https://0xa9fea9fe/",
    ],
)  # fmt: skip
async def test_credentials_do_not_go_to_a_realm_that_is_not_acceptable(realm: str) -> None:
    async def lookup(host: str, port: int) -> list[str]:
        return {"inside.example": ["10.1.2.3"], "0xa9fea9fe": ["169.254.169.254"]}.get(host, ["127.0.0.1"])

    tokens = Tokens(realm=realm)
    async with serving(tokens.registry) as trap, client(credentials=Known(), lookup=lookup) as registry:
        with pytest.raises(PermissionDenied):
            await registry.resolve(trap.ref())
        assert trap.authorizations == []


async def test_a_realm_does_not_redirect_credentials() -> None:
    tokens = Tokens()
    async with serving(tokens.service) as far, serving(answer(307, Location=f"{far.url}/token")) as near:
        tokens.realm = f"{near.url}/token"
        async with serving(tokens.registry) as trap, client(credentials=Known()) as registry:
            with pytest.raises(PermissionDenied, match="redirect"):
                await registry.resolve(trap.ref())
        assert far.requests == []


@pytest.mark.parametrize("challenge", ["Negotiate", "", "Digest realm=x", "Basic"])
async def test_a_challenge_that_cannot_be_met(challenge: str) -> None:
    async with serving(answer(401, WWW_Authenticate=challenge)) as trap, client() as registry:
        with pytest.raises(Unauthenticated, match=trap.address):
            await registry.resolve(trap.ref())
        assert len(trap.requests) == 1


async def test_nothing_secret_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = Tokens()

    async def echo(request: web.BaseRequest, status: int) -> web.StreamResponse:
        if "Authorization" not in request.headers:
            return await tokens.registry(request)
        shown = request.headers["Authorization"]
        body = {"errors": [{"code": "DENIED", "message": shown}, {"code": shown, "message": "x"}]}
        return web.json_response(body, status=status, reason="No")

    for status in (400, 401, 403, 404, 429, 500):
        async with serving(lambda r, s=status: echo(r, s)) as trap, serving(tokens.service) as service:
            tokens.realm = service.url
            async with client(credentials=Known()) as registry:
                with pytest.raises(WherryError) as caught:
                    await registry.resolve(trap.ref())
            assert trap.address in str(caught.value)
            assert "s3cret" not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"
    assert "s3cret" not in caplog.text


# --- redirects -----------------------------------------------------------------------------------------------


async def test_authorization_does_not_follow_to_another_origin() -> None:
    tokens = Tokens()
    async with serving(ranged) as store, serving(tokens.service) as service:

        async def registry_handler(request: web.BaseRequest) -> web.StreamResponse:
            if request.headers.get("Authorization", "").removeprefix("Bearer ") not in tokens.valid:
                return await tokens.registry(request)
            raw = f"{store.url}/blob?sig=a%2Fb%3D&x=%20"
            return web.Response(status=307, headers={"Location": raw})

        tokens.realm = service.url
        async with serving(registry_handler) as trap, client(credentials=Known()) as registry:
            assert await whole(registry, trap, offset=10) == DATA[10:]
        assert store.authorizations == []
        assert store.requests[0].headers["Range"] == f"bytes=10-{len(DATA) - 1}"
        assert str(store.requests[0].rel_url.raw_query_string) == "sig=a%2Fb%3D&x=%20"  # signed: byte for byte
        assert trap.authorizations == [f"Bearer {TOKEN}-1"]


async def test_authorization_is_not_put_back_when_the_chain_returns() -> None:
    seen: list[tuple[str, str | None]] = []
    async with serving(lambda r: answer(307, Location=f"{trap.url}/back")(r)) as store:

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            seen.append((request.path, request.headers.get("Authorization")))
            if request.path == "/back":
                return await ranged(request)
            if "Authorization" not in request.headers:
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            return web.Response(status=302, headers={"Location": f"{store.url}/away"})

        async with serving(handler) as trap, client(credentials=Known()) as registry:
            assert await whole(registry, trap) == DATA
    assert [path for path, sent in seen if sent] == [seen[0][0]]
    assert ("/back", None) in seen


async def test_a_401_after_a_redirect_gets_no_credentials() -> None:
    async with serving(answer(401, WWW_Authenticate='Basic realm="give"')) as store:
        async with serving(answer(307, Location=store.url)) as trap, client(credentials=Known()) as registry:
            with pytest.raises(Unauthenticated, match=store.address):
                await whole(registry, trap)
        assert store.authorizations == [] and trap.authorizations == []
        assert len(store.requests) == 1


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data", "https://169.254.169.254/", "https://[::]/", "https://0.0.0.0/",
        "https://10.0.0.1/", "https://192.168.1.1/", "https://[fe80::1]/", "https://[::ffff:10.0.0.1]/",
        "https://inside.example/", "https://mixed.example/", "http://public.example/", "http://8.8.8.8/", "https://0xa9fea9fe/",
        "https://user:pass@public.example/", "ftp://public.example/", "file:///etc/passwd", "gopher://127.0.0.1/",
        "https://[", "", "https://public.example/ x", "https:///x", "https://public.example:99999/", "javascript:1",
    ],
)  # fmt: skip
async def test_a_redirect_that_is_not_acceptable_is_refused(location: str) -> None:
    async def lookup(host: str, port: int) -> list[str]:
        names = {
            "inside.example": ["10.1.2.3"],
            "mixed.example": ["8.8.8.8", "10.1.2.3"],
            "0xa9fea9fe": ["169.254.169.254"],
        }
        return names.get(host, ["8.8.8.8"])

    async with serving(answer(307, Location=location)) as trap, client(lookup=lookup) as registry:
        with pytest.raises(PermissionDenied):
            await whole(registry, trap)
        with pytest.raises(PermissionDenied):
            await registry.resolve(trap.ref())
        assert len(trap.requests) == 2


async def test_a_public_registry_may_not_point_to_this_machine() -> None:
    """The registry's own name is public by its look-up; the connection is refused before it is made."""
    async with serving(ranged) as victim:

        async def lookup(host: str, port: int) -> list[str]:
            return ["8.8.8.8"] if host == "public.example" else ["127.0.0.1"]

        access = Access("public.example", Origin("https", "public.example", 443), "team/app")
        async with client(lookup=lookup) as registry:
            for name in (victim.address, f"inside.example:{victim.address.rpartition(':')[2]}"):
                with pytest.raises(PermissionDenied, match="loopback"):
                    await registry._transport.get_foreign(access, f"https://{name}/", {}, "a layer")
        assert victim.requests == []


async def test_redirects_are_counted() -> None:
    async with serving(answer(302, Location="/v2/again")) as trap, client() as registry:
        with pytest.raises(PermissionDenied, match="more than 5"):
            await whole(registry, trap)
        assert len(trap.requests) == 6


async def test_a_name_is_looked_up_once_and_the_vetted_address_is_used() -> None:
    answers = [["127.0.0.1"], ["169.254.169.254"]]

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0)

    async with serving(ranged) as trap:
        ref = Reference.parse(f"rebind.example:{trap.address.rpartition(':')[2]}/team/app")
        async with client(lookup=rebinding, insecure=["rebind.example"]) as registry:
            for _ in range(3):
                await registry.resolve(ref)
    assert answers == [["169.254.169.254"]]


async def test_localhost_must_be_this_machine() -> None:
    async def lookup(host: str, port: int) -> list[str]:
        return ["10.0.0.1"]

    async with client(lookup=lookup) as registry:
        with pytest.raises(PermissionDenied, match="localhost"):
            await registry.resolve(Reference.parse("localhost:5000/a"))


# --- foreign layers ------------------------------------------------------------------------------------------


async def test_foreign_layers_are_off_and_anonymous_when_on() -> None:
    fishes = answer(401, WWW_Authenticate='Basic realm="give"')
    async with serving(ranged) as store, serving(fishes) as fishing, serving(answer(500)) as trap:
        layer = BLOB.model_copy(update={"media_type": FOREIGN, "urls": [f"{fishing.url}/x", f"{store.url}/y"]})
        async with client(credentials=Known()) as registry:
            with pytest.raises(Unimplemented, match="foreign"):
                await whole(registry, trap, blob=layer)
            with pytest.raises(Unavailable):  # an ordinary layer comes from the registry, whatever urls it has
                await whole(registry, trap, blob=BLOB.model_copy(update={"urls": layer.urls}))
        assert store.requests == [] and fishing.requests == []
        async with client(credentials=Known(), foreign_layers=True) as registry:
            assert await whole(registry, trap, blob=layer, verify=True) == DATA
            with pytest.raises(Unauthenticated):
                await whole(registry, trap, blob=layer.model_copy(update={"urls": [f"{fishing.url}/x"]}))
            for url in ("https://169.254.169.254/", "https://10.0.0.1/", "http://u:p@127.0.0.1/", "x"):
                with pytest.raises(PermissionDenied):
                    await whole(registry, trap, blob=layer.model_copy(update={"urls": [url]}))
        assert store.authorizations == fishing.authorizations == []


# --- https ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(server, client that trusts it) for 127.0.0.1."""
    where: Path = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=where, check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(where / "cert.pem", where / "key.pem")
    return server, ssl.create_default_context(cafile=str(where / "cert.pem"))


Certificate = tuple[ssl.SSLContext, ssl.SSLContext]


async def test_https_works_and_its_certificate_is_checked(certificate: Certificate) -> None:
    server, trusting = certificate
    async with serving(ranged, server) as trap:
        async with client(secure=[trap.address], tls=trusting) as registry:
            assert await whole(registry, trap, verify=True) == DATA
        async with client(secure=[trap.address]) as registry:
            with pytest.raises(PermissionDenied, match="certificate"):
                await registry.resolve(trap.ref())
        assert len(trap.requests) == 1


async def test_https_is_not_left_for_http(certificate: Certificate) -> None:
    server, trusting = certificate
    tokens = Tokens()
    async with serving(ranged) as plain, serving(tokens.service) as service:
        tokens.realm = service.url
        layer = BLOB.model_copy(update={"media_type": FOREIGN, "urls": [plain.url]})
        for handler, blob in ((answer(307, Location=plain.url), BLOB), (tokens.registry, BLOB), (ranged, layer)):
            async with serving(handler, server) as trap:
                options = {"secure": [trap.address], "tls": trusting, "credentials": Known(), "foreign_layers": True}
                async with client(**options) as registry:
                    with pytest.raises(PermissionDenied, match="http"):
                        await whole(registry, trap, blob=blob)
                assert trap.authorizations == []
        assert plain.requests == [] and service.requests == []

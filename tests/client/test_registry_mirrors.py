"""Hosts by configuration: mirrors in order, their certificates, headers and credentials, and what a file may say."""

from __future__ import annotations

import json
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from wherry.registry import Credentials, Reference, Registry
from wherry.registry.hosts import DEFAULT_ENDPOINT, HostRules, Origin
from wherry.registry.mirrors import Mirrors, directories
from wherry_shared.errors import FailedPrecondition, NotFound, PermissionDenied, Unauthenticated, Unavailable

from .registry_traps import BLOB, DATA, MANIFEST, Trap, answer, client, cutting, ranged, serving, whole

NAME = "registry.example/team/app:v1"
REF = Reference.parse(NAME)

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(text: str, host: str = "registry.example") -> Path:
        folder = tmp_path / "certs.d" / host
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts.toml").write_text(text)
        return tmp_path / "certs.d"

    return make


def host(trap: Trap, *lines: str) -> str:
    return "\n".join([f'[host."{trap.url}"]', *lines, ""])


def registry_with(directory: Path, **options: object) -> Registry:
    async def lookup(name: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    return client(hosts_dir=str(directory), lookup=lookup, **options)


async def bytes_of(registry: Registry) -> bytes:
    return b"".join([chunk async for chunk in registry.blob(REF, BLOB, verify=True)])


# ---- order


async def test_a_mirror_is_asked_first_and_told_for_whom(write: Write) -> None:
    async with serving(ranged) as mirror, serving(ranged) as server:
        directory = write(f'server = "{server.url}"\n' + host(mirror))
        async with registry_with(directory) as registry:
            assert (await registry.resolve(REF))[1] == MANIFEST
            assert await bytes_of(registry) == DATA
        assert server.requests == []
        assert [r.query["ns"] for r in mirror.requests] == ["registry.example"] * 2


async def test_what_mirrors_do_not_have_comes_from_the_next_host(write: Write) -> None:
    async with serving(answer(404)) as empty, serving(answer(500)) as broken, serving(ranged) as server:
        directory = write(f'server = "{server.url}"\n' + host(empty) + host(broken))
        async with registry_with(directory) as registry:
            assert (await registry.resolve(REF))[1] == MANIFEST
            asked = len(broken.requests)
            assert await bytes_of(registry) == DATA
            assert await registry.small(REF, BLOB) == DATA
        # One that is broken is not asked for everything again; one that lacks something may have something else.
        assert len(broken.requests) == asked and len(empty.requests) == 3
        assert "ns" not in server.requests[0].query or server.requests[0].query["ns"] == "registry.example"


async def test_a_mirror_that_is_gone_is_passed_over(write: Write) -> None:
    async with serving(ranged) as gone:
        pass
    async with serving(ranged) as server, registry_with(write(f'server = "{server.url}"\n' + host(gone))) as registry:
        assert await bytes_of(registry) == DATA
    async with registry_with(write(f'server = "{gone.url}"\n')) as registry:
        with pytest.raises(Unavailable, match=gone.address):
            await registry.resolve(REF)


async def test_a_mirror_that_breaks_off_is_taken_up_there(write: Write) -> None:
    async with serving(cutting(150_000)) as mirror, serving(ranged) as server:
        async with registry_with(write(f'server = "{server.url}"\n' + host(mirror))) as registry:
            assert await bytes_of(registry) == DATA
        assert [r.headers.get("Range") for r in mirror.requests] == [None, f"bytes=150000-{len(DATA) - 1}"]
        assert server.requests == []


async def test_a_mirror_that_may_only_pull_does_not_say_what_a_tag_means(write: Write) -> None:
    async with serving(ranged) as mirror, serving(ranged) as server:
        directory = write(f'server = "{server.url}"\n' + host(mirror, 'capabilities = ["pull"]'))
        async with registry_with(directory) as registry:
            await registry.resolve(REF)
            assert mirror.requests == []
            await bytes_of(registry)
            assert len(server.requests) == 1
            assert (await registry.upload(REF))._access.origin == Origin.of(server.url)


async def test_no_host_that_may_is_said(write: Write) -> None:
    async with registry_with(write('capabilities = ["pull", "resolve"]')) as registry:
        with pytest.raises(FailedPrecondition, match="push"):
            await registry.upload(REF)


async def test_a_mirror_with_wrong_bytes_does_not_pass(write: Write) -> None:
    async with serving(answer(200, DATA[::-1])) as mirror, serving(ranged) as server:
        async with registry_with(write(f'server = "{server.url}"\n' + host(mirror))) as registry:
            assert await registry.small(REF, BLOB) == DATA
        assert len(server.requests) == 1


# ---- what a host adds


async def test_a_path_and_headers_of_its_own(write: Write) -> None:
    async with serving(ranged) as far:

        async def moved(request: web.BaseRequest) -> web.StreamResponse:
            if request.path.startswith("/proxy/v2/hub/team/app/manifests"):
                return await ranged(request)
            return web.Response(status=307, headers={"Location": f"{far.url}/blob"})

        async with serving(moved) as near:
            text = f"""[host."{near.url}/proxy/v2/hub"]
            override_path = true
            [host."{near.url}/proxy/v2/hub".header]
            X-Key = "s3cret-key"
            X-Many = ["a", "b"]
            """
            async with registry_with(write(text)) as registry:
                await registry.resolve(REF)
                await bytes_of(registry)
            assert near.requests[0].path == "/proxy/v2/hub/team/app/manifests/v1"
            assert near.requests[0].headers["X-Key"] == "s3cret-key" and near.requests[0].headers["X-Many"] == "a, b"
            assert all("X-Key" not in request.headers for request in far.requests) and far.requests


async def test_a_path_before_the_apis_own(write: Write) -> None:
    async with serving(ranged) as mirror:
        async with registry_with(write(f'[host."{mirror.url}/prefix"]\n')) as registry:
            await registry.resolve(REF)
        assert mirror.requests[0].path == "/prefix/v2/team/app/manifests/v1"


async def test_credentials_are_the_hosts_own(write: Write) -> None:
    asked: list[str] = []

    class Source:
        async def get(self, registry: str) -> Credentials | None:
            asked.append(registry)
            return Credentials("alice", "s3cret-word") if registry == server.address else None

    async def locked(request: web.BaseRequest) -> web.StreamResponse:
        if "Authorization" in request.headers:
            return await ranged(request)
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})

    async with serving(locked) as mirror, serving(locked) as server:
        ref = Reference.parse(f"{server.address}/team/app:v1")
        folder = server.address.replace(":", "_") + "_"
        directory = write(f'server = "{server.url}"\n' + host(mirror), folder)
        async with registry_with(directory, credentials=Source()) as registry:
            await registry.resolve(ref)
        assert mirror.authorizations == [] and server.authorizations
        assert asked == [mirror.address, server.address]


async def test_plain_http_needs_the_configurations_word(write: Write) -> None:
    async with serving(ranged) as trap:
        port = trap.address.rpartition(":")[2]
        async with registry_with(write(f'server = "http://lan.example:{port}"\n')) as registry:
            assert (await registry.resolve(REF))[1] == MANIFEST
        async with registry_with(write(f'server = "https://lan.example:{port}"\n')) as registry:
            with pytest.raises((Unavailable, PermissionDenied)):
                await registry.resolve(REF)
        assert len(trap.requests) == 1


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a server's certificate and key, and a client's."""
    where: Path = tmp_path_factory.mktemp("tls")
    for name in ("server", "client"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.cert", "-subj", f"/CN={name}",
             "-addext", "subjectAltName=IP:127.0.0.1"],
            cwd=where, check=True, capture_output=True,
        )  # fmt: skip
    return where


def server_context(authority: Path, *, mutual: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.cert", authority / "server.key")
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority / "client.cert")
    return context


async def test_an_authority_and_a_client_certificate(write: Write, authority: Path) -> None:
    async with serving(ranged, server_context(authority, mutual=True)) as trap:
        ca, pair = (
            f'ca = "{authority}/server.cert"',
            f'client = [["{authority}/client.cert", "{authority}/client.key"]]',
        )
        async with registry_with(write(host(trap, ca, pair))) as registry:
            assert await bytes_of(registry) == DATA
        for lines in ((), (ca,), (pair,)):
            async with registry_with(write(f'server = "{trap.url}"\n' + "\n".join(lines))) as registry:
                with pytest.raises((PermissionDenied, Unavailable)):
                    await registry.resolve(REF)
        assert len(trap.requests) == 1


async def test_a_certificate_that_is_not_checked(write: Write, authority: Path) -> None:
    async with serving(ranged, server_context(authority)) as trap, serving(ranged, server_context(authority)) as other:
        async with registry_with(write(host(trap, "skip_verify = true"))) as registry:
            assert await bytes_of(registry) == DATA

        async def away(request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(status=307, headers={"Location": other.url})

        async with serving(away, server_context(authority)) as redirecting:
            directory = write(host(redirecting, "skip_verify = true"))
            async with registry_with(directory) as registry:
                with pytest.raises((PermissionDenied, Unavailable)):
                    await bytes_of(registry)
        assert other.requests == []  # the word was for one host


async def test_certificates_beside_no_file(tmp_path: Path, authority: Path) -> None:
    async with serving(ranged, server_context(authority, mutual=True)) as trap:
        folder = tmp_path / "certs.d" / trap.address
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes((authority / "server.cert").read_bytes())
        for name in ("client.cert", "client.key"):
            (folder / name).write_bytes((authority / name).read_bytes())
        async with client(hosts_dir=str(tmp_path / "certs.d"), secure=[trap.address]) as registry:
            assert await whole(registry, trap, verify=True) == DATA


# ---- files


def endpoints(directory: Path, registry: str, capability: str = "pull") -> list[str]:
    found = Mirrors(HostRules(), [directory]).endpoints(registry, capability)
    return [f"{e.origin.url(e.prefix)}" for e in found]


def test_a_folder_for_the_host_wins_over_the_default(write: Write) -> None:
    directory = write('[host."https://mirror.example"]\n', "_default")
    assert endpoints(directory, "a.example") == ["https://mirror.example/v2", "https://a.example/v2"]
    assert endpoints(directory, "docker.io") == ["https://mirror.example/v2", f"https://{DEFAULT_ENDPOINT}/v2"]
    write("", "a.example")
    assert endpoints(directory, "a.example") == ["https://a.example/v2"]
    for name in ("b.example_5000_", "c.example:5000"):
        write('server = "https://other.example"\n', name)
    assert endpoints(directory, "b.example:5000") == ["https://other.example/v2"]
    assert endpoints(directory, "c.example:5000") == ["https://other.example/v2"]
    assert endpoints(directory, "b.example:5001")[-1] == "https://b.example:5001/v2"
    write('server = "https://docker.io"\n', "docker.io")
    assert endpoints(directory, "docker.io") == [f"https://{DEFAULT_ENDPOINT}/v2"]


def test_where_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHERRY_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert directories() == [tmp_path / "wherry", Path("/etc/wherry/certs.d")]
    monkeypatch.setenv("WHERRY_CONFIG", "/somewhere")
    assert directories() == [Path("/somewhere")]
    assert directories("/else") == [Path("/else")]


@pytest.mark.parametrize(
    "text",
    [
        "server = 5", "not toml", 'server = "ftp://a.example"', 'server = "https://u:p4ssw0rd@a.example"', "host = 5",
        '[host]\n"https://a.example" = 5', '[host."https://a.example/x?y=1"]', '[host."https://a.example/../x"]',
        '[host."https://a.example"]\ncapabilities = ["fly"]', '[host."https://a.example"]\ncapabilities = "pull"',
        '[host."https://a.example"]\nskip_verify = "yes"', '[host."https://a.example"]\nca = 5',
        '[host."https://a.example"]\nclient = [["a", "b", "c"]]', '[host."https://a.example"]\nclient = [5]',
        '[host."https://a.example".header]\nHost = "x"', '[host."https://a.example".header]\nX-A = "a\\r\\nB: c"',
        '[host."https://a.example".header]\n"X A" = "a"', '[host."https://a.example"]\noverride_path = 1',
        '[host."https://"]', '[host."https://a b"]', "x = " + "[" * 3000,
    ],
)  # fmt: skip
def test_a_file_that_is_not_understood_is_refused_by_name(write: Write, text: str) -> None:
    directory = write(text)
    with pytest.raises(FailedPrecondition, match=r"hosts\.toml") as caught:
        endpoints(directory, "registry.example")
    assert "p4ssw0rd" not in str(caught.value)


async def test_a_certificate_that_is_missing_or_none_is_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for line in ('ca = "missing.pem"', f'ca = "{tmp_path}/empty.pem"', f'client = ["{tmp_path}/empty.pem"]'):
        async with registry_with(write(f'server = "https://127.0.0.1:9"\n{line}\n')) as registry:
            with pytest.raises(FailedPrecondition, match=r"\.pem"):
                await registry.resolve(REF)


async def test_a_name_that_is_nowhere_is_not_found(write: Write) -> None:
    async with serving(answer(404)) as mirror, serving(answer(404)) as server:
        directory = write(f'server = "{server.url}"\n' + host(mirror))
        async with registry_with(directory) as registry:
            with pytest.raises(NotFound, match=server.address):
                await registry.resolve(REF)
            assert await registry.referrers(REF, BLOB.digest) == []


async def test_a_token_of_one_host_is_not_sent_to_another(write: Write) -> None:
    async def guarded(request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Authorization") == "Bearer s3cret-token":
            return await ranged(request)
        realm = f"{service.url}/token"
        return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="{realm}",service="x"'})

    token = json.dumps({"token": "s3cret-token"}).encode()
    async with serving(answer(200, token)) as service, serving(guarded) as first, serving(answer(401)) as second:
        directory = write(f'server = "{second.url}"\n' + host(first))
        async with registry_with(directory) as registry:
            await registry.resolve(REF)
        directory = write(f'server = "{second.url}"\n' + host(first, 'capabilities = ["pull"]'))
        async with registry_with(directory) as registry:
            await bytes_of(registry)
            with pytest.raises(Unauthenticated):
                await registry.resolve(REF)
        assert second.requests and second.authorizations == []

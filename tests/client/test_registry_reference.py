"""Image references and host rules: docker's grammar, and which addresses count as what."""

from __future__ import annotations

import pytest
from wherry.registry import Reference
from wherry.registry.hosts import HostRules, Kind, Origin, PinnedResolver, kind_of
from wherry_shared.errors import InvalidArgument, PermissionDenied

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("redis", "docker.io/library/redis:latest"),
        ("redis:alpine", "docker.io/library/redis:alpine"),
        ("user/app", "docker.io/user/app:latest"),
        ("docker.io/redis", "docker.io/library/redis:latest"),
        ("index.docker.io/library/redis:7", "docker.io/library/redis:7"),
        ("localhost/a", "localhost/a:latest"),
        ("localhost:5000/a/b:v1", "localhost:5000/a/b:v1"),
        ("host:5000/a/b", "host:5000/a/b:latest"),
        (f"host:5000/a/b@sha256:{HEX}", f"host:5000/a/b@sha256:{HEX}"),
        (f"host.example/a:t@sha512:{HEX * 2}", f"host.example/a:t@sha512:{HEX * 2}"),
        ("example.com/a__b/c--d/e.f_g", "example.com/a__b/c--d/e.f_g:latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("Registry/a", "Registry/a:latest"),
        ("example.com", "docker.io/library/example.com:latest"),
        ("name:5000", "docker.io/library/name:5000"),
    ],
)
def test_a_reference_is_normalised_and_stays(text: str, normal: str) -> None:
    assert str(Reference.parse(text)) == normal
    assert Reference.parse(normal) == Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com/../x",
        "../x",
        "a/./b",
        "/a",
        "a/",
        "a//b",
        "Redis",
        "a b",
        "a\n",
        "redis\n",
        "a:tag\n",
        "redis:",
        "redis:-x",
        "redis:" + "t" * 129,
        "a@",
        f"a@sha1:{HEX[:40]}",
        f"a@sha256:{HEX[:63]}",
        f"a@sha256:{HEX.upper()}",
        f"a@sha256:{HEX}0",
        f"a@sha512:{HEX}",
        f"a@@sha256:{HEX}",
        HEX,
        "a_-b/c",
        "a...b",
        "-a",
        "a-",
        "ex_ample.com/a",
        "user:pass@host/a",
        "https://host/a",
        "host:port/a",
        "host:123456/a",
        "x/" * 200 + "x",
        "é/a",
        "a?b=c",
        "a#b",
        "localhost:5000",
        "host.example/library/%2e%2e/x",
        "a:b:c",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    if text == "localhost:5000":  # docker reads this as an image and its tag
        assert Reference.parse(text).repository == "library/localhost"
        return
    with pytest.raises(InvalidArgument):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", Kind.PUBLIC),
        ("2606:4700::1", Kind.PUBLIC),
        ("127.0.0.1", Kind.LOOPBACK),
        ("127.9.9.9", Kind.LOOPBACK),
        ("::1", Kind.LOOPBACK),
        ("::ffff:127.0.0.1", Kind.LOOPBACK),
        ("10.0.0.1", Kind.PRIVATE),
        ("100.64.0.1", Kind.PRIVATE),
        ("192.168.1.1", Kind.PRIVATE),
        ("fd00:ec2::254", Kind.PRIVATE),
        ("169.254.169.254", Kind.LINK_LOCAL),
        ("::ffff:169.254.169.254", Kind.LINK_LOCAL),
        ("fe80::1%eth0", Kind.LINK_LOCAL),
        ("64:ff9b::a9fe:a9fe", Kind.LINK_LOCAL),
        ("2002:7f00:1::", Kind.LOOPBACK),
        ("0.0.0.0", Kind.UNSPECIFIED),
        ("::", Kind.UNSPECIFIED),
        ("224.0.0.1", Kind.PRIVATE),
        ("ff02::1", Kind.PRIVATE),
        ("255.255.255.255", Kind.PRIVATE),
    ],
)
def test_kinds_of_addresses(address: str, kind: Kind) -> None:
    assert kind_of(address) is kind


def test_plain_http_is_for_loopback_and_listed_hosts() -> None:
    rules = HostRules(insecure=["old.example:5000", "lan"], secure=["localhost:5443"])
    schemes = {
        name: rules.endpoint(name).scheme
        for name in (
            "docker.io",
            "old.example:5000",
            "old.example",
            "old.example:5001",
            "lan",
            "lan:81",
            "localhost:5000",
            "127.0.0.1",
            "[::1]:5000",
            "localhost:443",
            "localhost:5443",
            "localhost.example",
            "128.0.0.1:80",
            "127.0.0.1.example:80",
        )
    }
    assert [name for name, scheme in schemes.items() if scheme == "http"] == [
        "old.example:5000",
        "lan",
        "lan:81",
        "localhost:5000",
        "127.0.0.1",
        "[::1]:5000",
    ]
    assert rules.endpoint("docker.io").host != "docker.io"
    rules.check_scheme(Origin("http", "lan", 80))
    with pytest.raises(PermissionDenied, match=r"old\.example:81"):
        rules.check_scheme(Origin("http", "old.example", 81))
    for bad in ("host:0", "host:65536", "host:99999"):
        with pytest.raises(InvalidArgument):
            rules.endpoint(bad)


def test_an_origin_is_scheme_host_and_port() -> None:
    assert Origin.of("https://A.example/x") == Origin.of("https://a.example:443/y")
    assert Origin.of("http://a.example:443/") != Origin.of("https://a.example/")
    assert Origin.of("https://[::1]:5000/").authority == "[::1]:5000"
    for bad in ("ftp://a/", "/only/a/path", "file:///etc/passwd", "https://u:p4ssw0rd@a.example/"):
        with pytest.raises(PermissionDenied) as caught:
            Origin.of(bad)
        assert "p4ssw0rd" not in str(caught.value)


async def test_connections_get_only_vetted_addresses() -> None:
    answers = [["8.8.8.8"], ["127.0.0.1"]]

    async def lookup(host: str, port: int) -> list[str]:
        return answers.pop(0)

    resolver = PinnedResolver(lookup)
    assert resolver.addresses("a.example") == ()
    assert await resolver.pin("a.example", 443) == {Kind.PUBLIC}
    assert await resolver.pin("a.example", 443) == {Kind.PUBLIC}
    assert resolver.addresses("a.example") == ["8.8.8.8"]
    resolver.unpin("a.example")
    # Both generations count: a kept connection may still lead to the first.
    assert await resolver.pin("a.example", 443) == {Kind.PUBLIC, Kind.LOOPBACK}

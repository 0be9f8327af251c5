"""What registries say of authentication and of other places: challenges, realms, redirects, Retry-After, ranges."""

from __future__ import annotations

import re
from collections.abc import Iterator

from wherry.registry.auth import Access, _with_query, narrow, parse_challenges
from wherry.registry.hosts import Origin, kind_of, literal, path_of
from wherry.registry.wire import retry_after
from wherry_shared.errors import PermissionDenied

from ..given import words

ACCESS = Access("r.example", Origin("https", "r.example", 443), "a/b")
TOKENS = (
    b"Bearer ", b"Basic ", b"realm=", b"service=", b"scope=", b'"', b'\\"', b"repository:a/b:pull,push", b"https://",
    b"http://", b"@", b"[::ffff:127.0.0.1]", b"169.254.169.254", b"0x7f.1", b"%", b"#", b"?", b"\xff",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    yield b'Bearer realm="https://a/t?x=1",service="s",scope="repository:a/b:pull"\xffhttps://a:1/b?c#d'
    yield b'Basic realm="x", Bearer realm=y, error="a\\"b"\xffhttp://[::1%eth0]:80/'
    yield b"120\xffhttp://user:pw@169.254.169.254/"
    yield b"Wed, 21 Oct 2099 07:28:00 GMT\xffhttp://0x7f000001/\xffhttps://[::ffff:10.0.0.1]/"


def one(data: bytes) -> None:
    for part in words(data):
        text = part.decode("latin-1")
        for challenge in parse_challenges([text]):
            assert challenge.scheme == challenge.scheme.lower() and challenge.scheme
            for scope in narrow(challenge.parameters.get("scope", ""), ACCESS).split():
                assert scope.startswith("repository:") and scope.endswith(":pull"), "more than was asked for"
            place(challenge.parameters.get("realm", ""))
        place(text)
        seconds = retry_after({"Retry-After": text})
        assert seconds is None or seconds >= 0


def place(url: str) -> None:
    """An origin is what a URL says, and no other client reads another host out of it."""
    try:
        origin = Origin.of(url)
    except PermissionDenied:
        return
    assert origin.scheme in ("http", "https") and 0 < origin.port < 65536
    assert re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", origin.host), origin
    assert Origin.of(origin.url("/")) == origin
    assert path_of(url).isascii()
    _with_query(url, [("scope", "a b")])
    if literal(origin.host) is not None:
        kind_of(origin.host)

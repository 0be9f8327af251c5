"""Credentials from docker's config.json and from helper programs, and challenges as they are met in the field."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from wherry.registry import Credentials, DockerConfig
from wherry.registry.auth import Access, Challenge, narrow, parse_challenges
from wherry.registry.hosts import Origin
from wherry_shared.errors import FailedPrecondition


def write(path: Path, document: Any) -> DockerConfig:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return DockerConfig(path)


def packed(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(name: str, script: str) -> None:
        program = tmp_path / f"docker-credential-{name}"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


async def test_auths_are_found_by_exact_host_and_port(tmp_path: Path) -> None:
    config = write(tmp_path / "config.json", {"auths": {
        "https://index.docker.io/v1/": {"auth": packed("hub:one")},
        "a.example": {"auth": packed("a:with:colons")},
        "https://b.example:5000/v2/": {"username": "b", "password": "three"},
        "c.example": {"identitytoken": "refresh"},
        "d.example": {"registrytoken": "ready"},
        "e.example": {},
    }})  # fmt: skip
    assert await config.get("docker.io") == Credentials("hub", "one")
    assert await config.get("a.example") == Credentials("a", "with:colons")
    assert await config.get("b.example:5000") == Credentials("b", "three")
    assert await config.get("c.example") == Credentials(identity_token="refresh")
    assert await config.get("d.example") == Credentials(registry_token="ready")
    for other in ("b.example", "a.example:443", "a.example.evil", "example", "e.example", "x.a.example"):
        assert await config.get(other) is None


async def test_a_missing_file_holds_nothing_and_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await DockerConfig(tmp_path / "none.json").get("a.example") is None
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    write(tmp_path / "config.json", {"auths": {"a.example": {"auth": packed("a:b")}}})
    assert await DockerConfig().get("a.example") == Credentials("a", "b")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"auths": {"a.example": {"auth": "no base64"}}}'])
async def test_a_broken_file_is_an_error_that_shows_nothing_of_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await write(tmp_path / "config.json", text).get("a.example")
    assert "config.json" in str(caught.value) and "no base64" not in str(caught.value)


async def test_a_fifo_in_place_of_the_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FailedPrecondition, match="regular file"):
        await DockerConfig(tmp_path / "config.json").get("a.example")


async def test_helpers_are_asked_by_host(tmp_path: Path, helper: Any) -> None:
    helper("one", """read server; printf '{"ServerURL":"%s","Username":"u-%s","Secret":"s"}' "$server" "$server" """)
    helper("two", """cat >/dev/null; echo '{"Username":"<token>","Secret":"refresh"}' """)
    helper("none", """cat >/dev/null; echo 'credentials not found in native keychain'; exit 1""")
    document = {
        "credHelpers": {"a.example": "one", "n.example": "none"}, "credsStore": "two",
        "auths": {"a.example": {"auth": packed("file:x")}, "n.example": {"auth": packed("file:y")}},
    }  # fmt: skip
    config = write(tmp_path / "config.json", document)
    assert await config.get("a.example") == Credentials("u-a.example", "s")
    assert await config.get("z.example") == Credentials(identity_token="refresh")
    assert await config.get("n.example") == Credentials("file", "y")
    config = write(tmp_path / "config.json", {"credsStore": "one"})
    found = await config.get("docker.io")
    assert found is not None and found.username == "u-https://index.docker.io/v1/"


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("bad", "echo s3cret >&2; echo s3cret; exit 3"),
        ("bad", "echo 's3cret not json'"),
        ("bad", """echo '{"Username": "s3cret"}'"""),
        ("bad", "head -c 200000 /dev/zero"),
        ("missing", ""),
        ("../bad", ""),
        ("bad; touch /tmp/x", ""),
        ("", "unused"),
    ],
)
async def test_a_helper_that_fails_is_an_error_without_its_words(
    tmp_path: Path, helper: Any, name: str, script: str
) -> None:
    if name == "bad":
        helper(name, script)
    config = write(tmp_path / "config.json", {"credHelpers": {"a.example": name}})
    if not name:
        assert await config.get("a.example") is None
        return
    with pytest.raises(FailedPrecondition) as caught:
        await config.get("a.example")
    assert "s3cret" not in str(caught.value)


def test_credentials_do_not_show_in_a_repr() -> None:
    shown = repr(Credentials("name", "s3cret", "s3cret", "s3cret"))
    assert "s3cret" not in shown and "name" in shown


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (['Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"'],
         [("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"})]),
        (['Basic realm="r", Bearer realm="https://a/t" , service=s'],
         [("basic", {"realm": "r"}), ("bearer", {"realm": "https://a/t", "service": "s"})]),
        (["Negotiate", 'BASIC realm="with \\"quotes\\", and commas"'],
         [("negotiate", {}), ("basic", {"realm": 'with "quotes", and commas'})]),
        (["Bearer"], [("bearer", {})]),
        ([""], []), (['"'], []), (["Bearer realm="], [("bearer", {}), ("realm", {})]), ([], []),
    ],
)  # fmt: skip
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(headers)[: len(expected)] == [Challenge(*e) for e in expected]


def test_a_hostile_challenge_is_read_in_bounded_time() -> None:
    assert len(parse_challenges(["a," * 100_000, '="' * 50_000, "x=" * 50_000])) < 20_000


def test_never_more_is_asked_for_than_was_meant() -> None:
    access = Access("a.example", Origin("https", "a.example", 443), "team/app")
    assert narrow("", access) == "repository:team/app:pull"
    assert narrow("repository:team/app:pull,push,delete", access) == "repository:team/app:pull"
    assert narrow("repository:proxy/team/app:pull", access) == "repository:proxy/team/app:pull"
    assert narrow("registry:catalog:*", access) == "repository:team/app:pull"
    assert narrow("repository:other:push", access) == "repository:team/app:pull"

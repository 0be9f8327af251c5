"""Credentials as the docker command keeps them: `config.json` (auths) and its external helper programs.

The helper protocol is docker-credential-helpers': `docker-credential-<name> get`, the server on stdin, one JSON
object on stdout. Programs are run directly, never through a shell, and nothing they write reaches a message.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from wherry_shared.errors import DeadlineExceeded, FailedPrecondition

from .reference import DEFAULT_REGISTRY

_CONFIG_MAX = 1 << 20
_HELPER_OUTPUT_MAX = 64 << 10
_HELPER_SECONDS = 30.0
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOT_FOUND = b"credentials not found"
_TOKEN_USER = "<token>"  # the helper protocol's marker for an identity token, not a secret  # noqa: S105

# The key that docker login writes for the default registry, and the other spellings met in files.
_DEFAULT_KEY = "https://index.docker.io/v1/"
_DEFAULT_NAMES = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one registry accepts: name and password, or an identity (refresh) token, or a ready bearer token."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of a basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


class CredentialSource(Protocol):
    """Where the client asks for credentials, once a registry has asked for them."""

    async def get(self, registry: str) -> Credentials | None:
        """The credentials for `registry` (`host[:port]`), None if there are none."""
        ...


class NoCredentials:
    """Every registry is used anonymously."""

    async def get(self, registry: str) -> Credentials | None:
        """None."""
        return None


@dataclass(frozen=True, slots=True)
class Given:
    """One set of credentials, for one registry (`host[:port]`)."""

    credentials: Credentials
    registry: str

    async def get(self, registry: str) -> Credentials | None:
        """The credentials, if they are for that registry."""
        return self.credentials if registry == self.registry else None


def default_config_path() -> Path:
    """`$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`."""
    directory = os.environ.get("DOCKER_CONFIG")
    return Path(directory) / "config.json" if directory else Path.home() / ".docker" / "config.json"


class DockerConfig:
    """Reads the file at each question, so that a `docker login` meanwhile counts; a missing file holds nothing.

    Order: the host's entry in `credHelpers`, `credsStore`, then `auths`. A helper that is named but cannot be run
    is FailedPrecondition: going on without it could ask another account's questions anonymously.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path

    async def get(self, registry: str) -> Credentials | None:
        """The credentials for exactly this host and port."""
        path = self._path or default_config_path()
        config = _load(path)
        names = _spellings(registry)
        helpers = _mapping(config.get("credHelpers"))
        helper = next((v for k, v in helpers.items() if _host_of(k) in names), None) or config.get("credsStore")
        if helper:
            server = _DEFAULT_KEY if registry == DEFAULT_REGISTRY else registry
            found = await _ask_helper(str(helper), server)
            if found is not None:
                return found
        auths = _mapping(config.get("auths"))
        for key in sorted(auths, key=lambda k: k != registry):
            if _host_of(key) in names:
                found = _decode(_mapping(auths[key]), path)
                if found is not None:
                    return found
        return None


def _load(path: Path) -> dict[str, Any]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise FailedPrecondition(f"{path} cannot be read: {e.strerror}") from None
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FailedPrecondition(f"{path} is not a regular file")
        raw = file.read(_CONFIG_MAX + 1)
    if len(raw) > _CONFIG_MAX:
        raise FailedPrecondition(f"{path} is longer than {_CONFIG_MAX} bytes")
    return _object(raw, str(path))


def _object(raw: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode()  # JSON can spell a lone surrogate, which nobody can be sent
    except (ValueError, RecursionError):
        raise FailedPrecondition(f"{what} is not valid JSON") from None
    if not isinstance(value, dict):
        raise FailedPrecondition(f"{what} is not a JSON object")
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _host_of(key: str) -> str:
    # Files carry `host`, `host:port` and URLs of old API versions; only the host and port identify the registry.
    return key.removeprefix("https://").removeprefix("http://").partition("/")[0].lower()


def _spellings(registry: str) -> frozenset[str]:
    return _DEFAULT_NAMES if registry == DEFAULT_REGISTRY else frozenset({registry.lower()})


def _decode(entry: Mapping[str, Any], path: Path) -> Credentials | None:
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    packed = entry.get("auth")
    if packed:
        try:
            username, _, password = base64.b64decode(str(packed), validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            raise FailedPrecondition(f"{path} holds an auth entry that is not base64 of name:password") from None
        password = password.rstrip("\0")
    found = Credentials(
        username, password, str(entry.get("identitytoken") or ""), str(entry.get("registrytoken") or "")
    )
    return found if found != Credentials(username) else None


async def _ask_helper(name: str, server: str) -> Credentials | None:
    if not _HELPER_NAME.fullmatch(name):
        raise FailedPrecondition(f"credential helper {name[:64]!r} is not a valid name")
    program = f"docker-credential-{name}"
    status, output = await _run(program, server)
    if status != 0:
        if _NOT_FOUND in output:
            return None
        raise FailedPrecondition(f"{program} failed with status {status} for {server}")
    answer = _object(output, f"the answer of {program}")
    username, secret = answer.get("Username"), answer.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise FailedPrecondition(f"the answer of {program} has no Username and Secret")
    return Credentials(identity_token=secret) if username == _TOKEN_USER else Credentials(username, secret)


async def _run(program: str, server: str) -> tuple[int, bytes]:
    try:
        process = await asyncio.create_subprocess_exec(
            program, "get", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as e:
        raise FailedPrecondition(f"{program} cannot be run: {e.strerror}") from None
    assert process.stdin is not None and process.stdout is not None  # noqa: S101 - both were asked for as pipes
    try:
        async with asyncio.timeout(_HELPER_SECONDS):
            process.stdin.write(server.encode())
            process.stdin.close()
            output = await _bounded(process.stdout, program)
            return await process.wait(), output
    except TimeoutError:
        raise DeadlineExceeded(f"{program} did not answer within {_HELPER_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _bounded(stream: asyncio.StreamReader, program: str) -> bytes:
    output = b""
    while chunk := await stream.read(_HELPER_OUTPUT_MAX):
        output += chunk
        if len(output) > _HELPER_OUTPUT_MAX:
            raise FailedPrecondition(f"{program} wrote more than {_HELPER_OUTPUT_MAX} bytes")
    return output

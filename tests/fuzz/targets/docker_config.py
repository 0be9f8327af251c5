"""docker's config.json: credentials, or a refusal that shows nothing of them."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

from wherry.registry.credentials import DockerConfig
from wherry_shared.errors import FailedPrecondition

FOLDER = Path(tempfile.mkdtemp(prefix="wherry-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
FILE = FOLDER / "config.json"
REGISTRIES = ("docker.io", "r.example", "r.example:5000")
SECRET = "s3cr3t-t0k3n"
TOKENS = (
    b'"auths"', b'"auth"', b'"credHelpers"', b'"credsStore"', b'"username"', b'"password"', b'"identitytoken"',
    b'"registrytoken"', b'"r.example"', b'"https://index.docker.io/v1/"', b"\\ud800", SECRET.encode(), b":", b"{}",
)  # fmt: skip
LOOP = asyncio.new_event_loop()
atexit.register(LOOP.close)


def seeds() -> Iterator[bytes]:
    packed = b64encode(f"user:{SECRET}".encode()).decode()
    for value in (
        {"auths": {"r.example": {"auth": packed}, "https://index.docker.io/v1/": {"identitytoken": SECRET}}},
        {"auths": {"https://r.example:5000/v2/": {"username": "a", "password": SECRET}}, "credsStore": "none"},
        {"credHelpers": {"r.example": "x"}, "auths": {"r.example": {"registrytoken": SECRET}}},
        {"auths": {"r.example": {"auth": SECRET}}},
    ):
        yield json.dumps(value).encode()


def one(data: bytes) -> None:
    FILE.write_bytes(data)
    path = os.environ["PATH"]
    os.environ["PATH"] = str(FOLDER)  # a helper's name may be anything, and is a program's
    try:
        ask()
    finally:
        os.environ["PATH"] = path


def ask() -> None:
    for registry in REGISTRIES:
        try:
            found = LOOP.run_until_complete(DockerConfig(FILE).get(registry))
        except FailedPrecondition as error:
            if "credential helper" not in str(error) and "docker-credential" not in str(error):
                assert SECRET not in str(error)
            continue
        if found is not None:
            assert SECRET not in repr(found) or SECRET in found.username
            header = found.basic
            assert header.isascii() and "\n" not in header

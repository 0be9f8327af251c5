"""Debian's docker-registry on loopback, and the few calls of its protocol that putting images there takes."""

from __future__ import annotations

import base64
import ctypes
import http.client
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from .layout import INDEX, MANIFEST, Descriptor, Image

_START_TIMEOUT = 20.0  # seconds


class RegistryError(Exception):
    """The registry did not start, or answered something else than the protocol promises."""


class RegistryClient:
    """Pushes to, and reads from, one registry over plain http. `address` is `host:port`."""

    def __init__(self, address: str, auth: tuple[str, str] | None = None) -> None:
        self.address = address
        self._auth = auth
        self._connection = http.client.HTTPConnection(address, timeout=60)

    def close(self) -> None:
        self._connection.close()

    def push(self, image: Image, repository: str, tag: str = "latest") -> str:
        """Put the whole image there; answers the digest under which the registry holds it."""
        for descriptor in image.blobs():
            self._push_blob(image, repository, descriptor)
        root = image.root
        if root["mediaType"] == INDEX:
            for manifest in image.manifests():
                self._push_manifest(image, repository, manifest["digest"], manifest)
        self._push_manifest(image, repository, tag, root)
        digest: str = root["digest"]
        return digest

    def manifest(self, repository: str, reference: str) -> tuple[str, bytes]:
        """The manifest or index behind a tag or digest: its media type and its bytes."""
        accept = {"Accept": f"{INDEX}, {MANIFEST}"}
        response, body = self._call("GET", f"/v2/{repository}/manifests/{reference}", (200,), headers=accept)
        return response.headers.get_content_type(), body

    def blob(self, repository: str, digest: str) -> bytes:
        return self._call("GET", f"/v2/{repository}/blobs/{digest}", (200,))[1]

    def _push_blob(self, image: Image, repository: str, descriptor: Descriptor) -> None:
        digest = descriptor["digest"]
        if self._call("HEAD", f"/v2/{repository}/blobs/{digest}", (200, 404))[0].status == 200:
            return
        opened, _ = self._call("POST", f"/v2/{repository}/blobs/uploads/", (202,))
        location = urlsplit(opened.headers["Location"])
        target = f"{location.path}?{location.query}{'&' if location.query else ''}digest={digest}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(descriptor["size"])}
        self._call("PUT", target, (201,), image.blob(digest), headers)

    def _push_manifest(self, image: Image, repository: str, reference: str, descriptor: Descriptor) -> None:
        headers = {"Content-Type": descriptor["mediaType"]}
        path = f"/v2/{repository}/manifests/{reference}"
        response, _ = self._call("PUT", path, (201,), image.blob(descriptor["digest"]), headers)
        if response.headers["Docker-Content-Digest"] != descriptor["digest"]:
            raise RegistryError(f"{path}: stored as {response.headers['Docker-Content-Digest']}")

    def _call(
        self, method: str, path: str, expected: tuple[int, ...], body: Path | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[http.client.HTTPResponse, bytes]:  # fmt: skip
        sent = dict(headers or {})
        if self._auth is not None:
            sent["Authorization"] = "Basic " + base64.b64encode(":".join(self._auth).encode()).decode()
        if body is None:
            self._connection.request(method, path, headers=sent)
        else:
            with body.open("rb") as file:
                sent["Content-Length"] = str(body.stat().st_size)
                self._connection.request(method, path, file, sent)
        response = self._connection.getresponse()
        answer = response.read()
        if response.status not in expected:
            raise RegistryError(f"{method} {path}: {response.status} {answer[:500].decode(errors='replace')}")
        return response, answer


def bcrypt(password: str) -> str:
    """The hash that the registry's htpasswd file holds, from the system's libcrypt (Python 3.13 has none)."""
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt_gensalt.restype = library.crypt.restype = ctypes.c_char_p
    salt = library.crypt_gensalt(b"$2b$", ctypes.c_ulong(4), secrets.token_bytes(16), 16)
    hashed: bytes = library.crypt(password.encode(), salt)
    return hashed.decode()


class Registry:
    """A registry of one's own for the length of a `with` block: free loopback port, private storage.

    With `auth=(user, password)` every request needs that pair. `address` is what image references start with.
    """

    def __init__(self, auth: tuple[str, str] | None = None) -> None:
        self._auth = auth
        self.address = ""

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="wherry-registry-"))
        self.log = self._directory / "log"
        try:
            self._process = self._start()
            self.address = self._listening()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._directory)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def storage(self) -> Path:
        """Where the registry keeps its files: for tests that damage them."""
        return self._directory / "storage"

    @contextmanager
    def client(self) -> Iterator[RegistryClient]:
        client = RegistryClient(self.address, self._auth)
        try:
            yield client
        finally:
            client.close()

    def push(self, image: Image, repository: str, tag: str = "latest") -> str:
        """Put the image there; answers the reference that a client pulls: `127.0.0.1:port/repository:tag`."""
        with self.client() as client:
            client.push(image, repository, tag)
        return f"{self.address}/{repository}:{tag}"

    def _settings(self) -> dict[str, object]:
        settings: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "cache": {"blobdescriptor": "inmemory"},
                "delete": {"enabled": True},
            },
            "http": {"addr": "127.0.0.1:0", "secret": secrets.token_hex(16)},
        }
        if self._auth is not None:
            users = self._directory / "htpasswd"
            users.write_text(f"{self._auth[0]}:{bcrypt(self._auth[1])}\n")
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(users)}}
        return settings

    def _start(self) -> subprocess.Popen[bytes]:
        program = shutil.which("docker-registry")
        if program is None:
            raise RegistryError("docker-registry is not installed: run deploy/bootstrap.sh")
        config = self._directory / "config.yml"
        config.write_text(json.dumps(self._settings()))  # JSON is YAML
        # a group of its own: a terminal's Ctrl-C must not stop the registry before those who use it
        clean = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
        with self.log.open("wb") as log:
            command = [program, "serve", str(config)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=clean, process_group=0)

    def _listening(self) -> str:
        deadline = time.monotonic() + _START_TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            if found := re.search(r"listening on (127\.0\.0\.1:\d+)", self.log.read_text(errors="replace")):
                return found[1]
            time.sleep(0.01)
        raise RegistryError(f"docker-registry did not start: {self.log.read_text(errors='replace')[-2000:]}")

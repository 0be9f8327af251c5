"""An honest registry in memory, whose every request a test can watch and replace."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from .image_house import INDEX, MANIFEST, Layout, digest_of, dump

Hook = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse | None]]
_PATH = re.compile(r"/v2/(?P<repo>[a-z0-9/-]+?)/(?P<kind>blobs/uploads|blobs|manifests|referrers)/(?P<rest>.*)")
EMPTY = "application/vnd.oci.empty.v1+json"


async def no_hook(request: web.BaseRequest, what: str) -> web.StreamResponse | None:
    return None


@dataclass
class Store:
    """Blobs and manifests by repository. `hook` may answer a request in its place; what it is is `METHOD kind`."""

    blobs: dict[str, dict[str, bytes]] = field(default_factory=dict)
    manifests: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    referrers: bool = True
    hook: Hook = no_hook
    log: list[str] = field(default_factory=list)
    received: int = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        match = _PATH.fullmatch(request.path)
        if match is None:
            return web.Response(status=404)
        what = f"{request.method} {match['kind'].rpartition('/')[2]}"
        self.log.append(what)
        answer = await self.hook(request, what)
        if answer is not None:
            return answer
        return await getattr(self, f"_{match['kind'].rpartition('/')[2]}")(request, match["repo"], match["rest"])

    def count(self, what: str) -> int:
        return self.log.count(what)

    # ---- what is there

    def put(self, layout: Layout, target: dict[str, Any], repo: str = "team/app", tag: str = "v1") -> None:
        """Everything of a layout, and a name for one of its documents."""
        for digest, data in layout.blobs.items():
            self.blobs.setdefault(repo, {})[digest] = data
        for digest, data in layout.blobs.items():
            if data.startswith(b'{"schemaVersion"'):
                self.manifests.setdefault(repo, {})[digest] = (json.loads(data)["mediaType"], data)
        self.manifests[repo][tag] = (target["mediaType"], layout.blobs[target["digest"]])

    def refer(self, subject: dict[str, Any], payload: bytes, repo: str = "team/app") -> dict[str, Any]:
        """Something that refers to a manifest; its descriptor."""
        layout = Layout()
        brief = {key: subject[key] for key in ("mediaType", "digest", "size")}
        made = {
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "text/plain", "subject": brief,
            "config": layout.blob(EMPTY, b"{}"), "layers": [layout.blob("text/plain", payload)],
        }  # fmt: skip
        manifest = layout.blob(MANIFEST, dump(made))
        self.put(layout, manifest, repo, f"art-{secrets.token_hex(4)}")
        return manifest

    def _referring(self, repo: str, digest: str) -> bytes:
        found = []
        for name, (media_type, data) in self.manifests.get(repo, {}).items():
            subject = json.loads(data).get("subject") or {}
            if name.startswith("sha256:") and subject.get("digest") == digest:
                found.append({"mediaType": media_type, "digest": name, "size": len(data)})
        return dump({"schemaVersion": 2, "mediaType": INDEX, "manifests": found})

    # ---- the API

    async def _blobs(self, request: web.BaseRequest, repo: str, digest: str) -> web.StreamResponse:
        data = self.blobs.get(repo, {}).get(digest)
        if data is None:
            return web.Response(status=404)
        headers = {"Docker-Content-Digest": digest}
        if request.method == "HEAD":
            return web.Response(headers={**headers, "Content-Length": str(len(data))})
        asked = request.headers.get("Range")
        if asked is None:
            return web.Response(body=data, headers=headers)
        first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return web.Response(status=206, body=data[first : last + 1], headers=headers)

    async def _manifests(self, request: web.BaseRequest, repo: str, name: str) -> web.StreamResponse:
        if request.method == "PUT":
            data = await request.read()
            entry = (request.headers["Content-Type"], data)
            self.manifests.setdefault(repo, {})[digest_of(data)] = entry
            self.manifests[repo][name] = entry
            return web.Response(status=201, headers={"Docker-Content-Digest": digest_of(data)})
        found = self.manifests.get(repo, {}).get(name)
        if found is None:
            return web.Response(status=404)
        headers = {"Content-Type": found[0], "Docker-Content-Digest": digest_of(found[1])}
        return web.Response(body=b"" if request.method == "HEAD" else found[1], headers=headers)

    async def _referrers(self, request: web.BaseRequest, repo: str, digest: str) -> web.StreamResponse:
        if not self.referrers:
            return web.Response(status=404)
        return web.Response(body=self._referring(repo, digest), headers={"Content-Type": INDEX})

    async def _uploads(self, request: web.BaseRequest, repo: str, session: str) -> web.StreamResponse:
        if request.method == "POST":
            return self._open(request, repo)
        if session not in self.uploads:
            return web.Response(status=404)
        where = {"Location": f"/v2/{repo}/blobs/uploads/{session}?state={len(self.uploads[session])}"}
        if request.method == "PATCH":
            return await self._part(request, session, where)
        if request.method == "PUT":
            return await self._finish(request, repo, session)
        return web.Response(status=204, headers={**where, "Range": self._range(session)})

    def _range(self, session: str) -> str:
        return f"0-{max(0, len(self.uploads[session]) - 1)}"

    def _open(self, request: web.BaseRequest, repo: str) -> web.StreamResponse:
        digest, source = request.query.get("mount", ""), request.query.get("from", "")
        if digest in self.blobs.get(source, {}):
            self.blobs.setdefault(repo, {})[digest] = self.blobs[source][digest]
            return web.Response(status=201, headers={"Location": "/x", "Docker-Content-Digest": digest})
        session = secrets.token_hex(8)
        self.uploads[session] = bytearray()
        return web.Response(status=202, headers={"Location": f"/v2/{repo}/blobs/uploads/{session}?state=0"})

    async def _part(self, request: web.BaseRequest, session: str, where: dict[str, str]) -> web.StreamResponse:
        first = int(request.headers.get("Content-Range", "0-").split("-")[0])
        if first != len(self.uploads[session]):
            return web.Response(status=416, headers={**where, "Range": self._range(session)})
        await self.take(request, session)
        return web.Response(status=202, headers={**where, "Range": self._range(session)})

    async def take(self, request: web.BaseRequest, session: str, most: int = 1 << 40) -> None:
        """Read a body into an upload; a connection that breaks leaves what came, and `most` bytes are enough."""
        while chunk := await request.content.readany():
            self.uploads[session] += chunk[:most]
            self.received += len(chunk)
            most -= len(chunk)
            if most <= 0:
                return

    async def _finish(self, request: web.BaseRequest, repo: str, session: str) -> web.StreamResponse:
        await self.take(request, session)
        data, digest = bytes(self.uploads.pop(session)), request.query["digest"]
        algorithm, _, encoded = digest.partition(":")
        if hashlib.new(algorithm, data).hexdigest() != encoded:
            return web.json_response({"errors": [{"code": "DIGEST_INVALID"}]}, status=400)
        self.blobs.setdefault(repo, {})[digest] = data
        return web.Response(status=201, headers={"Docker-Content-Digest": digest})

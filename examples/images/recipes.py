"""The images: what is in each, and why a test or a measurement wants it. Every function answers a cached image."""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from .cache import cache_directory, cached
from .layer import Entry, Layer, directory, hardlink, opaque, symlink, whiteout, write_layer
from .layout import Builder, Descriptor, Image
from .packages import contents, fetch, used_by_containers, version

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
REDIS_ID = 999
LAYERS = 20
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_DIRECTORIES = (
    "dev", "etc", "home", "proc", "run", "sys", "usr", "usr/bin", "usr/lib", "usr/lib64", "usr/local",
    "usr/local/bin", "usr/sbin", "var", "var/lib", "var/log",
)  # fmt: skip
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
_GROUP = "root:x:0:\nusers:x:100:\nnogroup:x:65534:\n"
_MANY = ("gcc", "git", "libboost-dev", "libpython3-stdlib", "linux-libc-dev", "perl", "tzdata", "vim-runtime")


def architecture() -> str:
    """This machine's architecture in OCI's words; also the only one whose images run here."""
    return _ARCHITECTURES.get(platform.machine(), platform.machine())


def _packages(*roots: str) -> list[Path]:
    return fetch(roots, cache_directory() / "packages")


def _applets(binary: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as aside:
        program = Path(aside) / "busybox"
        program.write_bytes(binary)
        program.chmod(0o700)
        return subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()


def _base() -> list[Entry]:
    """The smallest system that programs feel at home in: busybox's applets, users, the usual directories."""
    (deb,) = _packages("busybox-static")
    busybox = next(entry for entry in contents(deb) if entry.path in ("bin/busybox", "usr/bin/busybox"))
    applets = [f"usr/bin/{name}" for name in _applets(busybox.data) if name != "busybox"]
    return [
        *map(directory, _DIRECTORIES),
        *(directory(path, 0o1777) for path in ("tmp", "var/tmp")),
        directory("root", 0o700),
        *(symlink(name, f"usr/{name}") for name in ("bin", "lib", "lib64", "sbin")),
        Entry("etc/passwd", data=_PASSWD.encode()),
        Entry("etc/group", data=_GROUP.encode()),
        Entry("usr/bin/busybox", mode=0o755, data=busybox.data),
        *(hardlink(path, "usr/bin/busybox") for path in applets),
    ]


def busybox() -> Image:
    """One small layer (about 1 MB packed): every applet of Debian's busybox-static as a hard link."""

    def build(to: Builder) -> Descriptor:
        return to.manifest([to.layer(_base())], {"Env": [PATH], "Cmd": ["sh"]}, architecture())

    return cached("busybox", build)


_ENTRYPOINT = b"""#!/bin/sh
# Bare options and a configuration file are meant for the server; any other first word is a command of its own.
set -e
case "${1:-}" in
-* | *.conf) set -- redis-server "$@" ;;
esac
[ "$1" = redis-server ] || exec "$@"
shift
case "${1:-}" in
*.conf) file=$1; shift ;;
esac
exec redis-server ${file:+"$file"} --protected-mode no "$@"
"""


def _redis_settings(release: str) -> dict[str, Any]:
    return {
        "User": "redis",
        "Env": [PATH, f"REDIS_VERSION={release}"],
        "Entrypoint": ["docker-entrypoint.sh"],
        "Cmd": ["redis-server"],
        "WorkingDir": "/data",
        "ExposedPorts": {"6379/tcp": {}},
        "Volumes": {"/data": {}},
        "Labels": {"org.opencontainers.image.title": "redis", "org.opencontainers.image.version": release},
    }


def redis() -> Image:
    """Debian's redis-server and redis-cli in three layers: system, packages, configuration. Runs as user redis."""

    def build(to: Builder) -> Descriptor:
        debs = _packages("redis-server", "redis-tools")
        release = next(version(deb) for deb in debs if deb.name.startswith("redis-server_"))
        own = [
            directory("data", 0o755, REDIS_ID, REDIS_ID),
            Entry("etc/passwd", data=f"{_PASSWD}redis:x:{REDIS_ID}:{REDIS_ID}:redis:/data:/bin/sh\n".encode()),
            Entry("etc/group", data=f"{_GROUP}redis:x:{REDIS_ID}:\n".encode()),
            Entry("usr/local/bin/docker-entrypoint.sh", mode=0o755, data=_ENTRYPOINT),
        ]
        programs = [entry for deb in debs for entry in contents(deb, used_by_containers)]
        layers = [to.layer(entries) for entries in (_base(), programs, own)]
        return to.manifest(layers, _redis_settings(release), architecture())

    return cached("redis", build)


def many(encoding: str = "gzip") -> Image:
    """One layer of at least 20,000 entries and 400 MB unpacked (see `measure`), in `gzip` or `zstd`.

    Whole Debian packages with all their documentation: the mix of sizes and depths that real images have.
    """

    def build(to: Builder) -> Descriptor:
        debs = _packages(*_MANY)
        entries = itertools.chain(_base(), *(contents(deb) for deb in debs))
        (layer,) = write_layer(to.blobs, entries, (encoding,))
        return to.manifest([layer], {"Env": [PATH], "Cmd": ["sh"]}, architecture())

    return cached(f"many-{encoding}", build)


def _step(number: int) -> list[Entry]:
    """Layer `number` of `layers`: a file of its own, its number in `top`; one whiteout, one opaque directory."""
    own = [
        directory("layers"),
        directory(f"layers/{number:02}"),
        Entry(f"layers/{number:02}/name", data=f"layer {number}\n".encode()),
        Entry("top", data=f"{number}\n".encode()),
    ]
    if number == 10:
        own.append(whiteout("layers/05"))
    if number == 15:
        own += [directory("layers/07"), opaque("layers/07"), Entry("layers/07/new", data=b"instead\n")]
    return own


def layers() -> Image:
    """Twenty small layers over each other: busybox below, then one file each; `top` reads 19.

    `layers/05` is whited out by layer 10, and layer 15 makes `layers/07` opaque with `new` alone in it.
    """

    def build(to: Builder) -> Descriptor:
        stack = [to.layer(_base()), *(to.layer(_step(number)) for number in range(1, LAYERS))]
        return to.manifest(stack, {"Env": [PATH], "Cmd": ["cat", "/top"]}, architecture())

    return cached("layers", build)


def tiny() -> Image:
    """One layer of 1 MiB that does not compress: the cost of a pull without its bytes. There is nothing to run."""

    def build(to: Builder) -> Descriptor:
        noise = hashlib.shake_256(b"tiny").digest(1 << 20)
        return to.manifest([to.layer([Entry("payload", data=noise)])], {"Cmd": ["/payload"]}, architecture())

    return cached("tiny", build)


def _attestation(to: Builder, subject: Descriptor) -> Descriptor:
    """What build tools put beside each platform: a manifest of platform unknown/unknown that speaks of another."""
    statement = {"_type": "https://in-toto.io/Statement/v0.1", "subject": [{"digest": subject["digest"]}]}
    layer = Layer(to.store("application/vnd.in-toto+json", statement), subject["digest"])
    about = {"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": subject["digest"]}
    manifest = to.manifest([layer], {}, "unknown")
    return {**manifest, "platform": {"os": "unknown", "architecture": "unknown"}, "annotations": about}


def platforms() -> Image:
    """An index: linux/amd64 and linux/arm64 (v8) over the same busybox layer, each with an attestation."""

    def build(to: Builder) -> Descriptor:
        layer = to.layer(_base())
        amd, arm = (
            to.manifest([layer], {"Env": [PATH, f"BUILT_FOR={name}"], "Cmd": ["sh"]}, name)
            for name in ("amd64", "arm64")
        )
        arm["platform"]["variant"] = "v8"
        return to.index([amd, arm, _attestation(to, amd), _attestation(to, arm)])

    return cached("platforms", build)


RECIPES = {
    "redis": redis,
    "busybox": busybox,
    "many-gzip": lambda: many("gzip"),
    "many-zstd": lambda: many("zstd"),
    "layers": layers,
    "tiny": tiny,
    "platforms": platforms,
}


@dataclass(frozen=True)
class Size:
    """What an image's layers amount to; `unpacked` and `packed` in bytes."""

    entries: int
    unpacked: int
    packed: int


def _members(image: Image, layer: Descriptor) -> Iterator[tarfile.TarInfo]:
    zstd = layer["mediaType"].endswith("+zstd")
    with image.blob(layer["digest"]).open("rb") as blob:
        plain = zstandard.ZstdDecompressor().stream_reader(blob) if zstd else blob
        with tarfile.open(fileobj=plain, mode="r|" if zstd else "r|*") as archive:
            yield from archive


def measure(image: Image) -> Size:
    """Read all layers (of the first manifest) and count them; seconds for a large image."""
    entries = unpacked = packed = 0
    for layer in image.layers():
        packed += os.stat(image.blob(layer["digest"])).st_size
        for member in _members(image, layer):
            entries += 1
            unpacked += member.size
    return Size(entries, unpacked, packed)

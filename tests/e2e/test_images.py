"""The images that demo, tests and measurements use are real: they run, repeat byte for byte, and travel."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import images
import pytest
from images.layer import Entry, directory, ordered, write_layer
from images.layout import INDEX, MANIFEST

EXAMPLES = Path(images.__file__).parents[1]


def unpack(image: images.Image, into: Path) -> Path:
    """Lay the layers over each other with GNU tar; enough for images without whiteouts."""
    into.mkdir()
    for layer in image.layers():
        subprocess.run(["tar", "-xpzf", image.blob(layer["digest"]), "-C", into], check=True)
    return into


def inside(root: Path, *command: str) -> str:
    """Run a command of the image as its user redis, with nothing of the host's in reach."""
    path = {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin"}
    chroot = ["/usr/sbin/chroot", "--userspec=999:999", str(root), *command]
    return subprocess.run(chroot, env=path, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def redis_server(root: Path) -> Iterator[None]:
    """The image's own entrypoint, listening on a socket in its /data."""
    words = ["docker-entrypoint.sh", "--port", "0", "--unixsocket", "/data/socket", "--save", ""]
    command = ["/usr/sbin/chroot", "--userspec=999:999", str(root), *words]
    path = {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin"}
    server = subprocess.Popen(command, env=path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (root / "data/socket").exists():
            assert server.poll() is None, server.stdout and server.stdout.read()
            time.sleep(0.01)
        yield
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.fixture(scope="module")
def registry() -> Iterator[images.Registry]:
    with images.Registry() as running:
        yield running


def test_redis_programs_run_inside_the_unpacked_image(tmp_path: Path) -> None:
    image = images.redis()
    root = unpack(image, tmp_path / "root")
    version = next(v for v in image.config()["config"]["Env"] if v.startswith("REDIS_VERSION=")).partition("=")[2]
    assert inside(root, "redis-server", "--version").startswith(f"Redis server v={version} ")
    assert inside(root, "redis-cli", "--version") == f"redis-cli {version}"


def test_redis_serves_a_value_through_its_entrypoint(tmp_path: Path) -> None:
    root = unpack(images.redis(), tmp_path / "root")
    with redis_server(root):
        assert inside(root, "redis-cli", "-s", "/data/socket", "SET", "colour", "heather") == "OK"
        assert inside(root, "redis-cli", "-s", "/data/socket", "GET", "colour") == "heather"
        assert inside(root, "redis-cli", "-s", "/data/socket", "CONFIG", "GET", "protected-mode").endswith("\nno")


def test_redis_entrypoint_runs_other_commands_as_they_are(tmp_path: Path) -> None:
    root = unpack(images.redis(), tmp_path / "root")
    assert inside(root, "docker-entrypoint.sh", "id", "-un") == "redis"
    with pytest.raises(subprocess.CalledProcessError):
        inside(root, "docker-entrypoint.sh", "--no-such-option-of-redis")


def test_redis_is_small_and_says_how_to_run_it() -> None:
    image = images.redis()
    config = image.config()
    assert len(image.layers()) == len(config["rootfs"]["diff_ids"]) == 3
    assert images.measure(image).unpacked < 60_000_000
    assert (config["config"]["User"], config["config"]["Cmd"]) == ("redis", ["redis-server"])
    assert (config["os"], config["architecture"]) == ("linux", images.architecture())


def test_every_blob_is_what_its_descriptor_says() -> None:
    for name in ("redis", "busybox", "layers", "tiny", "platforms"):
        image = images.RECIPES[name]()
        for descriptor in (image.root, *image.manifests(), *image.blobs()):
            data = image.blob(descriptor["digest"]).read_bytes()
            assert descriptor["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
            assert descriptor["size"] == len(data)


def test_a_second_build_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = images.redis()
    (tmp_path / "packages").symlink_to(images.cache_directory() / "packages")
    monkeypatch.setenv("WHERRY_IMAGE_CACHE", str(tmp_path))
    second = images.redis()
    assert second.path != first.path
    assert second.root == first.root


def test_what_was_built_once_needs_neither_apt_nor_network() -> None:
    images.redis()
    nothing = {"PATH": "/nonexistent", "PYTHONPATH": str(EXAMPLES), **images_cache()}
    command = ["unshare", "--net", sys.executable, "-m", "images", "build", "redis"]
    done = subprocess.run(command, env=nothing, executable="/usr/bin/unshare", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(images.redis().path) in done.stdout


def images_cache() -> dict[str, str]:
    return {"WHERRY_IMAGE_CACHE": str(images.cache_directory())}


def test_a_failed_build_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(builder: images.Builder) -> images.Descriptor:
        builder.store("text/plain", b"half")
        raise images.AptError("no such package")

    monkeypatch.setenv("WHERRY_IMAGE_CACHE", str(tmp_path))
    with pytest.raises(images.AptError, match="no such package"):
        images.cached("broken", fails)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["broken.lock"]


def test_a_package_that_apt_does_not_know_is_named() -> None:
    from images.packages import closure

    with pytest.raises(images.AptError, match="wherry-no-such-package"):
        closure(["wherry-no-such-package"])


def test_busybox_applets_are_links_to_one_file(tmp_path: Path) -> None:
    root = unpack(images.busybox(), tmp_path / "root")
    assert (root / "bin/sh").stat().st_ino == (root / "usr/bin/busybox").stat().st_ino
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert inside(root, "sh", "-c", "echo $((6 * 7))") == "42"


def test_layers_are_twenty_and_cover_each_other(tmp_path: Path) -> None:
    image = images.layers()
    assert len(image.layers()) == 20
    root = unpack(image, tmp_path / "root")
    assert (root / "top").read_text() == "19\n"
    assert (root / "layers/.wh.05").exists() and (root / "layers/07/.wh..wh..opq").exists()


def test_tiny_is_one_incompressible_mebibyte() -> None:
    size = images.measure(images.tiny())
    assert (size.entries, size.unpacked) == (1, 1 << 20)
    assert 1 << 20 <= size.packed < (1 << 20) + 4096


@pytest.mark.timeout(900)  # the first time on a machine: 100 MB of packages
def test_many_is_as_large_as_it_claims() -> None:
    image = images.many()
    size = images.measure(image)
    assert len(image.layers()) == 1
    assert size.entries >= 20_000
    assert size.unpacked >= 400_000_000


def test_encodings_of_one_layer_share_its_diff_id(tmp_path: Path) -> None:
    entries = [directory("a"), Entry("a/b", data=b"heather" * 5000)]
    written = write_layer(tmp_path, ordered(entries), ("tar", "gzip", "zstd"))
    assert len({layer.diff_id for layer in written}) == 1
    assert written[0].descriptor["digest"] == written[0].diff_id
    for layer, program in zip(written[1:], ("gzip", "zstd"), strict=True):
        assert layer.descriptor["mediaType"].endswith(f"+{program}")
        assert layer.descriptor["size"] < written[0].descriptor["size"]


def test_the_registry_returns_what_was_pushed(registry: images.Registry) -> None:
    image = images.redis()
    reference = registry.push(image, "library/redis", "7")
    assert reference == f"{registry.address}/library/redis:7"
    with registry.client() as client:
        media_type, manifest = client.manifest("library/redis", "7")
        assert media_type == MANIFEST
        assert manifest == image.blob(image.root["digest"]).read_bytes()
        for layer in json.loads(manifest)["layers"]:
            data = client.blob("library/redis", layer["digest"])
            assert f"sha256:{hashlib.sha256(data).hexdigest()}" == layer["digest"]


def test_an_index_travels_with_all_its_platforms(registry: images.Registry) -> None:
    image = images.platforms()
    registry.push(image, "test/platforms")
    with registry.client() as client:
        media_type, index = client.manifest("test/platforms", "latest")
        assert media_type == INDEX
        children = json.loads(index)["manifests"]
        assert [child["platform"]["architecture"] for child in children] == ["amd64", "arm64", "unknown", "unknown"]
        for child in children:
            assert client.manifest("test/platforms", child["digest"])[0] == MANIFEST
        assert children[2]["annotations"]["vnd.docker.reference.digest"] == children[0]["digest"]


def test_a_registry_with_a_password_refuses_strangers() -> None:
    with images.Registry(auth=("heron", "reed")) as registry:
        registry.push(images.tiny(), "private/tiny")
        for auth in (None, ("heron", "wrong")):
            stranger = images.RegistryClient(registry.address, auth)
            with pytest.raises(images.RegistryError, match="401"):
                stranger.manifest("private/tiny", "latest")
            stranger.close()


def test_a_registry_leaves_nothing_behind() -> None:
    with images.Registry() as registry:
        registry.push(images.tiny(), "test/tiny")
        pid, place, address = registry.pid, registry.storage.parent, registry.address
    assert not place.exists()
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(address).request("GET", "/v2/")

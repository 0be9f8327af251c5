"""Images without a registry, through the command line on a real node; and to and from Debian's containerd."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import images
import pytest
from node import WHERRY, Node, eventually

ROOT = Path(__file__).resolve().parents[2]
NAME = "docker.io/library/busybox:1"

needs_containerd = pytest.mark.skipif(
    shutil.which("containerd") is None or os.geteuid() != 0, reason="needs root and Debian's containerd"
)


def pack(image: images.Image, target: Path) -> Path:
    """An image's layout directory as one archive, by GNU tar."""
    subprocess.run(["tar", "-C", image.path, "-cf", target, "."], check=True)
    return target


@pytest.fixture
def ns(namespace: str) -> list[str]:
    return ["-n", namespace]


@pytest.fixture
def busybox(node: Node, ns: list[str], tmp_path: Path) -> str:
    archive = pack(images.busybox(), tmp_path / "busybox.tar")
    node.run("import", *ns, "--index-name", "busybox:1", str(archive))
    return NAME


def test_from_an_archive_to_a_container_and_away_again(node: Node, ns: list[str], busybox: str, tmp_path: Path) -> None:
    (row,) = node.json("images", *ns)
    assert (row["name"], row["platforms"]) == (busybox, [f"linux/{images.architecture()}"])
    assert row["size"] > 500_000
    assert node.run("run", *ns, "--rm", "busybox:1", "echo", "hello").stdout == "hello\n"
    (checked,) = node.json("images", "check", *ns)
    assert (checked["status"], checked["missing"], checked["unpacked"]) == ("complete", [], ["overlay"])

    node.run("tag", *ns, "busybox:1", "quay.example/b:2", "third:3")
    assert node.run("images", "-q", *ns).stdout.split() == [busybox, "docker.io/library/third:3", "quay.example/b:2"]
    refused = node.run("tag", *ns, "busybox:1", "third:3", check=False)
    assert refused.returncode == 1 and "third:3" in refused.stderr
    node.run("images", "rm", *ns, "third:3")

    archive = tmp_path / "out.tar"
    node.run("export", *ns, str(archive), "busybox:1", "quay.example/b:2")
    streamed = node.run("export", *ns, "-", "busybox:1", "quay.example/b:2", text=False)
    assert streamed.stdout == archive.read_bytes()

    made = node.run("convert", *ns, "--compression", "zstd", "-q", "busybox:1", "zstd:1").stdout
    assert node.run("convert", *ns, "--compression", "zstd", "-q", "busybox:1", "zstd:2").stdout == made
    assert node.run("run", *ns, "--rm", "zstd:1", "echo", "zstd").stdout == "zstd\n"

    removed = node.run("images", "rm", *ns, "--sync", "busybox:1", "quay.example/b:2", "zstd:1", "zstd:2")
    assert len(removed.stdout.split()) == 4
    assert node.json("content", "ls", *ns) == [] and node.json("snapshot", "ls", *ns) == []

    with gzip.open(tmp_path / "out.tar.gz", "wb") as packed:
        packed.write(archive.read_bytes())
    with (tmp_path / "out.tar.gz").open("rb") as packed:
        again = node.run("import", *ns, "-q", stdin=packed)
    assert again.stdout.split() == [busybox, "quay.example/b:2"]
    assert node.run("run", *ns, "--rm", "quay.example/b:2", "echo", "again").stdout == "again\n"


def test_inspect_and_label(node: Node, ns: list[str], busybox: str) -> None:
    node.run("images", "label", *ns, "busybox:1", "team=web", "stage=x")
    node.run("images", "label", *ns, "busybox:1", "stage=")
    (told,) = json.loads(node.run("images", "inspect", *ns, "busybox:1").stdout)
    assert told["labels"] == {"team": "web"}
    (platform,) = told["platforms"]
    assert platform["unpacked"]["overlay"] is True and platform["config"]["cmd"] == ["sh"]
    assert told["usage"]["content"] == told["usage"]["unique"] > platform["size"] > 0
    assert told["usage"]["snapshots"]["overlay"] > 0
    assert busybox in node.run("images", "inspect", *ns, "--format", "table", "busybox:1").stdout
    assert [row["name"] for row in node.json("images", *ns, "labels.team==web")] == [busybox]
    assert node.json("images", *ns, "labels.team==db") == []


def test_what_is_missing_is_told(node: Node, ns: list[str], busybox: str) -> None:
    layer = images.busybox().layers()[0]["digest"]
    node.run("content", "rm", *ns, layer)
    done = node.run("images", "check", *ns, check=False)
    assert done.returncode == 1 and "incomplete" in done.stdout and layer in done.stdout
    for verb in (["export", *ns, "-", "busybox:1"], ["convert", *ns, "--compression", "zstd", "busybox:1", "z:1"]):
        refused = node.run(*verb, check=False)
        assert refused.returncode == 1 and layer in refused.stderr
    assert node.run("images", "rm", *ns, "nobody:1", "busybox:1", check=False).returncode == 1
    assert node.json("images", *ns) == []


def test_several_platforms(node: Node, ns: list[str], tmp_path: Path) -> None:
    archive = pack(images.platforms(), tmp_path / "platforms.tar")
    node.run("import", *ns, "--index-name", "both:1", "--all-platforms", str(archive))
    (row,) = node.json("images", *ns)
    assert set(row["platforms"]) == {"linux/amd64", "linux/arm64/v8"}
    node.run("convert", *ns, "--platform", "linux/arm64", "both:1", "arm:1")
    assert node.json("images", *ns, "name~=arm")[0]["platforms"] == ["linux/arm64/v8"]
    out = tmp_path / "arm.tar"
    node.run("export", *ns, "--platform", "linux/arm64", str(out), "both:1")
    other = ["-n", f"{ns[1]}-2"]
    node.run("import", *other, str(out))
    assert node.json("images", *other)[0]["platforms"] == ["linux/arm64/v8"]
    refused = node.run("export", *other, "--all-platforms", "-", "both:1", check=False)
    assert refused.returncode == 1 and "incomplete" in refused.stderr


@pytest.mark.parametrize("data", [b"", b"no tar at all", bytes(2048)])
def test_what_is_no_archive(node: Node, ns: list[str], data: bytes) -> None:
    refused = node.run("import", *ns, "-", text=False, input=data, check=False)
    assert refused.returncode == 1 and b"invalid argument" in refused.stderr
    assert node.json("images", *ns) == []


def test_a_terminal_is_no_archive(node: Node, ns: list[str]) -> None:
    leader, follower = pty.openpty()
    refused = node.run("import", *ns, stdin=follower, check=False)
    os.close(follower), os.close(leader)
    assert refused.returncode == 2 and "terminal" in refused.stderr


def test_an_interrupt_ends_an_import_that_waits(node: Node, ns: list[str]) -> None:
    process = subprocess.Popen(
        [WHERRY, "import", *ns], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=node.environment,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(bytes(100))
    process.stdin.flush()

    def leased() -> bool:
        return any(row["type"] == "leases" and row["count"] for row in node.json("df", *ns))

    eventually(leased, "the import does not begin")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = process.communicate()[0]
    assert b"Traceback" not in said, said
    assert not leased()


def test_a_reader_who_goes_away(node: Node, ns: list[str], busybox: str) -> None:
    process = subprocess.Popen(
        [WHERRY, "export", *ns, "-", "busybox:1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=node.environment
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(60) == 1 and "went away" in said and "Traceback" not in said


def test_df_and_prune(node: Node, ns: list[str], busybox: str) -> None:
    def taken(kind: str) -> dict[str, Any]:
        return next(row for row in node.json("df", *ns) if row["type"] == kind)

    assert taken("images")["count"] == 1 and taken("images")["size"] == taken("content")["size"] > 500_000
    assert taken("content")["garbage"] == 0 and taken("content")["prunable"] == taken("content")["size"]
    node.run("run", *ns, "-d", "--name", "web", "busybox:1", "sleep", "100")
    assert taken("content")["prunable"] == 0 and taken("containers")["count"] == 1
    assert "content" in node.run("df").stdout

    node.run("tag", *ns, "busybox:1", "spare:1")
    assert node.run("prune", *ns, "--dry-run").stdout.startswith("there is nothing to remove")
    preview = node.json("prune", *ns, "--all", "--containers", "--dry-run")[0]
    assert (preview["images"], preview["containers"]) == (["docker.io/library/spare:1"], [])
    refused = node.run("prune", *ns, "--all", check=False)
    assert refused.returncode == 1 and "--yes" in refused.stderr
    assert len(node.json("images", *ns)) == 2
    node.run("prune", *ns, "--all", "--yes", "--filter", "until=1h")
    node.run("prune", *ns, "--all", "--yes", "--filter", "label=team")
    assert len(node.json("images", *ns)) == 2
    node.run("prune", *ns, "--all", "--yes")
    assert [row["name"] for row in node.json("images", *ns)] == [busybox]
    assert node.run("exec", *ns, "web", "echo", "alive").stdout == "alive\n"

    node.run("kill", *ns, "-s", "KILL", "web")
    eventually(lambda: not node.json("ps", *ns), "it does not end")
    done = node.json("prune", *ns, "--all", "--containers", "--yes")[0]
    assert done["containers"] == ["web"] and done["images"] == [busybox] and done["freed"] > 500_000
    assert node.json("content", "ls", *ns) == [] and node.json("snapshot", "ls", *ns) == []
    assert node.json("ps", "-a", *ns) == []


def test_prune_asks_on_a_terminal(node: Node, ns: list[str], busybox: str) -> None:
    leader, follower = pty.openpty()
    for answer, left in ((b"n\n", 1), (b"y\n", 0)):
        process = subprocess.Popen(
            [WHERRY, "prune", *ns, "--all"], stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=node.environment,
        )  # fmt: skip
        os.write(leader, answer)
        said = process.communicate(timeout=60)[0]
        assert b"Remove all this?" in said, said
        assert len(node.json("images", *ns)) == left
    os.close(follower), os.close(leader)


def test_names_do_not_steer_the_terminal(node: Node, ns: list[str], busybox: str) -> None:
    script = (
        "import asyncio, wherry\n"
        "async def main():\n"
        f"    async with wherry.connect(namespace={ns[1]!r}) as client:\n"
        "        image = await client.image('busybox:1')\n"
        "        await client.images.create(image.record.model_copy(update={'name': 'evil\\x1b[31m'}))\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=node.environment)
    for verb in (["images"], ["images", "-q"], ["images", "check"], ["prune", "--all", "--dry-run"]):
        said = node.run(*verb, *ns).stdout
        assert "evil" in said and "\x1b" not in said


# ---- containerd


@pytest.fixture(scope="module")
def ctr(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Runs `ctr` against a containerd of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        made = importlib.import_module("bench.containerd").ContainerdNode(tmp_path_factory.mktemp("containerd"))
        with made as node:

            def run(*arguments: str) -> str:
                env = {**os.environ, **node.environment()}
                done = subprocess.run(["ctr", *arguments], env=env, capture_output=True, text=True, timeout=60)
                assert done.returncode == 0, done.stdout + done.stderr
                return done.stdout

            run.place = node.place  # type: ignore[attr-defined]
            yield run


@needs_containerd
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_to_containerd_and_back(
    node: Node, ns: list[str], busybox: str, ctr: Callable[..., str], tmp_path: Path, compression: str
) -> None:
    name = f"docker.io/library/{compression}:1"
    node.run("convert", *ns, "--compression", compression, "busybox:1", name)
    digest = node.json("images", *ns, f"name=={name}")[0]["digest"]
    node.run("export", *ns, str(tmp_path / "ours.tar"), name)
    assert name in ctr("images", "import", str(tmp_path / "ours.tar"))
    fifos = str(ctr.place / "fifo")  # type: ignore[attr-defined]
    assert ctr("run", "--rm", "--fifo-dir", fifos, name, f"run-{compression}", "echo", "theirs") == "theirs\n"
    ctr("images", "export", str(tmp_path / "theirs.tar"), name)
    other = ["-n", f"{ns[1]}-{compression}"]
    assert node.run("import", *other, str(tmp_path / "theirs.tar")).stdout.split() == [name, digest]
    assert node.run("run", *other, "--rm", name, "echo", "ours").stdout == "ours\n"


@needs_containerd
def test_docker_archives_mean_the_same_to_containerd(
    node: Node, ns: list[str], busybox: str, ctr: Callable[..., str], tmp_path: Path
) -> None:
    """Without its OCI half, the archive's manifest is made anew: the same, byte for byte, by both."""
    node.run("tag", *ns, "busybox:1", "dockers:1")
    node.run("export", *ns, str(tmp_path / "both.tar"), "dockers:1")
    docker = tmp_path / "docker.tar"
    with tarfile.open(tmp_path / "both.tar") as both, tarfile.open(docker, "w") as half:
        for member in both:
            if member.name not in ("index.json", "oci-layout"):
                half.addfile(member, both.extractfile(member))
    ctr("images", "import", str(docker))
    theirs = ctr("images", "ls", "name==docker.io/library/dockers:1").splitlines()[1].split()[2]
    other = ["-n", f"{ns[1]}-d"]
    assert node.run("import", *other, str(docker)).stdout.split() == ["docker.io/library/dockers:1", theirs]


LONG = "x" * 5000


@pytest.mark.parametrize(
    "words",
    [
        ["import", ".."], ["import", "/"], ["import", LONG], ["export", "/", "busybox:1"],
        ["export", LONG, "busybox:1"], ["import", "--label", "=x", "/dev/null"],
        ["import", "--label", LONG, "/dev/null"], ["create", "-l", "=x", "busybox:1"],
        ["create", "-l", LONG, "busybox:1"], ["content", "ingest", "/"], ["content", "ingest", LONG],
        ["content", "label", "sha256:" + "0" * 64, "=x"], ["content", "get", "-o", "/", "IMAGE"],
        ["pull", "--hosts-dir", LONG, "127.0.0.1:1/none:1"], ["lease", "create", "--hours", "nan"],
        ["lease", "create", "--hours", "inf"], ["lease", "create", "--hours", "-1"],
    ],
    ids=lambda words: "-".join(word[:12].replace("/", "root") for word in words),
)  # fmt: skip
def test_words_that_mean_nothing_are_refused_in_a_line(
    node: Node, namespace: str, ns: list[str], busybox: str, words: list[str]
) -> None:
    digest = node.json("images", *ns)[0]["digest"]
    where = {**node.environment, "WHERRY_NAMESPACE": namespace}
    done = node.run(*[digest if word == "IMAGE" else word for word in words], check=False, env=where)
    assert done.returncode in (1, 125) and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("wherry: ") and "internal" not in done.stderr, done.stderr

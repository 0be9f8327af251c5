"""`wherry content` from the first byte to the last, and a blob that rots and is healed."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from node import WHERRY, Node, eventually


@pytest.fixture
def ns(namespace: str) -> list[str]:
    return ["-n", namespace]


# From the beginning: another test's leases end at any time, and what nothing keeps is collected then.
KEPT = ["-l", "containerd.io/gc.root=1"]


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def bytes_of(node: Node, *arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [WHERRY, "content", *arguments], input=data, capture_output=True, env=node.environment, timeout=60, check=False
    )


def test_in_and_out(node: Node, ns: list[str], tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    path, other = tmp_path / "source", tmp_path / "copy"
    path.write_bytes(data)
    size = ["--size", str(len(data))]
    done = node.run("content", "ingest", *ns, str(path), *size, "--label", "a=b", "-l", "c=d", *KEPT)
    digest = done.stdout.strip()
    assert digest == digest_of(data)
    assert bytes_of(node, "get", *ns, digest).stdout == data
    node.run("content", "get", *ns, digest, "-o", str(other))
    assert other.read_bytes() == data
    (row,) = node.json("content", "ls", *ns)
    labels = {"a": "b", "c": "d", "containerd.io/gc.root": "1"}
    assert (row["digest"], row["size"], row["labels"]) == (digest, len(data), labels)
    assert node.run("content", "ls", "-q", *ns, "size==3000000", "size==1").stdout.split() == [digest]
    assert node.run("content", "ls", "-q", *ns, "labels.a==x").stdout == ""
    again = node.run("content", "ingest", *ns, str(path), "--digest", digest)
    assert again.stdout.strip() == digest
    node.run("content", "rm", *ns, digest)
    assert node.run("content", "info", *ns, digest, check=False).returncode == 1


def test_what_is_no_file_stays_what_it_is(node: Node, ns: list[str], tmp_path: Path) -> None:
    """As root `-o /dev/full` was the last of that device: a file took its name."""
    kept = ("-l", "containerd.io/gc.root=true")
    digest = node.run("content", "ingest", *ns, *kept, "-", input="hello").stdout.strip()
    full, fifo = tmp_path / "full", tmp_path / "fifo"
    os.mknod(full, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    os.mkfifo(fifo)
    with full.open("wb") as device:
        for options in ({"stdout": device, "stderr": subprocess.PIPE, "capture_output": False}, {}):
            to = [] if options else ["-o", str(full)]
            done = node.run("content", "get", *ns, digest, *to, check=False, **options)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "no space left" in done.stderr
    assert full.is_char_device()
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
        node.run("content", "get", *ns, digest, "-o", str(fifo))
        assert reader.stdout is not None and reader.stdout.read() == b"hello"
    assert fifo.is_fifo()


def test_stdin_and_what_must_be(node: Node, ns: list[str]) -> None:
    data = os.urandom(2_500_000)
    wrong, right = digest_of(b"x"), digest_of(data, "sha512")
    refused = bytes_of(node, "ingest", *ns, "--digest", wrong, "--ref", "r", data=data)
    assert refused.returncode == 1 and wrong.encode() in refused.stderr
    (kept,) = node.json("content", "ingests", *ns)
    assert (kept["ref"], kept["offset"], kept["durable"]) == ("r", len(data), len(data))
    assert node.json("content", "active", *ns, "ref==other") == []
    size = ["--size", str(len(data))]
    done = bytes_of(node, "ingest", *ns, *KEPT, "--digest", right, *size, "--ref", "r", data=data)
    assert (done.returncode, done.stdout.decode().strip()) == (0, right), done.stderr
    assert node.json("content", "ingests", *ns) == []
    assert bytes_of(node, "get", *ns, right).stdout == data
    short = bytes_of(node, "ingest", *ns, "--size", "7", "--ref", "s", data=b"12345")
    assert short.returncode == 1 and b"5 bytes" in short.stderr
    assert node.run("content", "abort", *ns, "s").stdout == "s\n"
    assert node.run("content", "abort", *ns, "s", check=False).returncode == 1


def test_what_nobody_can_go_on_with_is_not_kept(node: Node, ns: list[str]) -> None:
    data = os.urandom(100_000)
    short = bytes_of(node, "ingest", *ns, "--size", "7", data=data)
    assert short.returncode == 1 and node.json("content", "ingests", *ns) == []
    wrong = bytes_of(node, "ingest", *ns, "--digest", digest_of(data), data=data[:-1] + b"x")
    assert wrong.returncode == 1 and node.json("content", "ingests", *ns) == []
    done = bytes_of(node, "ingest", *ns, "--digest", digest_of(data), data=data)
    assert done.stdout.decode().strip() == digest_of(data), done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_silent_pipe_holds_nobody_up(node: Node, ns: list[str], number: signal.Signals) -> None:
    process = subprocess.Popen(
        [WHERRY, "content", "ingest", *ns], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=node.environment
    )
    assert process.stdin is not None
    process.stdin.write(b"x" * 100_000)
    process.stdin.flush()
    eventually(lambda: bool(node.json("content", "ingests", *ns)), "it does not begin")
    process.send_signal(number)
    assert process.wait(60) == (130 if number == signal.SIGINT else -number)
    assert process.communicate()[1] == b"" and node.json("content", "ingests", *ns) == []


def test_a_reader_that_stands_still_is_not_waited_for(node: Node, ns: list[str], busybox_ref: str) -> None:
    node.run("pull", *ns, "--no-unpack", "-q", busybox_ref)
    process = subprocess.Popen([WHERRY, "export", *ns, "-", busybox_ref], stdout=subprocess.PIPE, env=node.environment)
    assert process.stdout is not None
    process.stdout.read(100)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    process.stdout.close()


def test_labels(node: Node, ns: list[str]) -> None:
    digest = bytes_of(node, "ingest", *ns, "-l", "a=1", *KEPT, "-", data=b"data").stdout.decode().strip()
    node.run("content", "label", *ns, digest, "a=", "containerd.io/gc.root=true")
    assert node.json("content", "info", *ns, digest)["labels"] == {"containerd.io/gc.root": "true"}
    assert "containerd.io/gc.root" in node.run("content", "info", *ns, digest).stdout


def test_a_file_that_is_not_there(node: Node, ns: list[str], tmp_path: Path) -> None:
    done = node.run("content", "ingest", *ns, str(tmp_path / "none"), check=False)
    assert done.returncode == 1 and "none" in done.stderr
    assert node.json("content", "ingests", *ns) == []


def test_rot_is_found_and_a_pull_heals_it(node: Node, ns: list[str], busybox_ref: str) -> None:
    node.run("pull", *ns, busybox_ref)
    rows = node.json("content", "ls", *ns)
    layer = max(rows, key=lambda row: row["size"])["digest"]
    assert all(row["state"] == "ok" for row in node.json("content", "verify", *ns, "--all"))
    path = node.root / "content" / "blobs" / layer.replace(":", "/")
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    refused = bytes_of(node, "get", *ns, layer)
    assert refused.returncode == 1 and b"rotten" in refused.stderr
    found = node.run("content", "verify", *ns, "--all", check=False)
    assert found.returncode == 1 and "1 of" in found.stderr and layer in found.stdout
    assert node.run("content", "verify", *ns, layer, check=False).returncode == 1  # put aside, and told again
    node.run("pull", *ns, busybox_ref)
    assert node.run("content", "verify", *ns, "--all").returncode == 0
    assert len(bytes_of(node, "get", *ns, layer).stdout) == max(row["size"] for row in rows)


def test_verify_wants_to_know_what(node: Node, ns: list[str]) -> None:
    assert node.run("content", "verify", *ns, check=False).returncode == 2
    assert node.run("content", "verify", *ns, "--all", digest_of(b"x"), check=False).returncode == 2

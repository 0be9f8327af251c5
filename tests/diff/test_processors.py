"""Stream processors: real programs between the blob and the archive."""

from __future__ import annotations

import gzip
import os
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from descriptors import descriptors
from wherry_diff.apply import Application, Applied, run
from wherry_diff.processors import Processor, chain, load
from wherry_shared.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Unimplemented,
    Unknown,
    WherryError,
)
from wherry_shared.values import Mount

from .layers import FILE, TAR, archive, entry

ROT, TWICE, GZIP = "application/x-rot", "application/x-twice", TAR + "+gzip"
LAYER = archive(entry(b"f", FILE, b"data" * 50_000), entry(b"g", FILE, os.urandom(300_000)))


def shell(script: str, accepts: str = ROT, returns: str = GZIP, **more: tuple[str, ...]) -> Processor:
    return Processor(f"test.{accepts}", (accepts,), returns, "sh", ("-c", script), **more)


def rotated(data: bytes) -> bytes:
    return bytes((byte + 1) % 256 for byte in data)


UNROTATE = (
    "exec python3 -c 'import sys; sys.stdout.buffer.write(bytes((b - 1) % 256 for b in sys.stdin.buffer.read()))'"
)


def put(
    tmp_path: Path, data: bytes, media_type: str, steps: Sequence[Processor],
    payloads: Mapping[str, bytes] | None = None, deadline: float = 0.0,
) -> Applied:  # fmt: skip
    blob, root = tmp_path / "blob", tmp_path / "root"
    blob.write_bytes(data)
    root.mkdir()
    mounts = (Mount(type="bind", source=str(root), options=["rw", "rbind"]),)
    opened, children = descriptors(), _children()
    try:
        return run(
            Application(
                str(blob), media_type, mounts, str(tmp_path), processors=tuple(steps), payloads=payloads or {},
                deadline=deadline,
            )
        )  # fmt: skip
    finally:
        assert not descriptors() - opened
        assert _children() == children


def _children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_one_and_two_in_a_chain(tmp_path: Path) -> None:
    packed = gzip.compress(LAYER)
    for number, (data, media_type) in enumerate(((rotated(packed), ROT), (rotated(rotated(packed)), TWICE))):
        base = tmp_path / str(number)
        base.mkdir()
        applied = put(base, data, media_type, [shell(UNROTATE), shell(UNROTATE, TWICE, ROT)])
        assert applied.size == len(LAYER) and applied.entries == 2
        assert (base / "root/f").read_bytes() == b"data" * 50_000


def test_what_a_processor_finds(tmp_path: Path) -> None:
    script = (
        '[ "$STREAM_PROCESSOR_MEDIATYPE" = application/x-rot ] && [ "$KEY" = k ] && [ "$(pwd)" = / ] &&'
        ' [ "$(cat $STREAM_PROCESSOR_PIPE)" = secret ] && [ -z "$HOME" ] && exec cat'
    )
    applied = put(
        tmp_path, gzip.compress(LAYER), ROT, [shell(script, env=("KEY=k",))], {f"test.{ROT}": b"secret"}
    )  # fmt: skip
    assert applied.size == len(LAYER)


@pytest.mark.parametrize(
    ("script", "expected", "says"),
    [
        ("cat; echo 'no \033[2J key' >&2; exit 3", Unknown, "status 3.*key"),
        ("head -c 1000; echo cut >&2; exit 1", Unknown, "cut"),
        ("kill -9 $$", Unknown, "signal 9"),
        ("yes oops | head -c 10000000 >&2; exit 1", Unknown, "oops"),
        ("head -c 1000", DataLoss, "ends too early"),
        ("head -c 1000000 /dev/urandom", InvalidArgument, "checksum"),
    ],
)
def test_failures_are_named(tmp_path: Path, script: str, expected: type[WherryError], says: str) -> None:
    with pytest.raises(expected, match=says) as caught:
        put(tmp_path, gzip.compress(LAYER), ROT, [shell(script)])
    assert caught.value.message.isprintable() and len(caught.value.message) < 1000


def test_one_that_hangs_is_killed_at_the_deadline(tmp_path: Path) -> None:
    hang = shell("sleep 1000 & wait")
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        put(tmp_path, LAYER, ROT, [hang], deadline=time.time() + 0.5)
    assert time.monotonic() - started < 30


def test_what_there_is_no_processor_for(tmp_path: Path) -> None:
    with pytest.raises(Unimplemented, match="x-other"):
        chain("application/x-other", [shell("cat")])
    with pytest.raises(Unimplemented):
        chain(ROT, [shell("cat", ROT, ROT)])
    with pytest.raises(FailedPrecondition, match="nowhere"):
        put(tmp_path, LAYER, ROT, [Processor("p", (ROT,), TAR, "/nowhere")])
    assert chain(TAR, [shell("cat", TAR, ROT)]) == []


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "processors.toml"
    file.write_text('[processors."a.b"]\naccepts = ["x"]\nreturns = "y"\npath = "cat"\nargs = ["-u"]\n')
    assert load(file) == (Processor("a.b", ("x",), "y", "cat", ("-u",)),)
    for text in ("processors = 1", "[processors.a]\npath = 'x'", "[", '[processors.a]\naccepts = "x"\nreturns = "y"',
                 '[processors.a]\naccepts = ["x"]\nreturns = "y"\npath = "z"\nshell = true'):  # fmt: skip
        file.write_text(text)
        with pytest.raises(FailedPrecondition, match=r"processors\.toml"):
            load(file)
    with pytest.raises(FailedPrecondition):
        load(tmp_path / "none")


def test_synced_before_the_answer(tmp_path: Path) -> None:
    """That the call is made, on the right file system, is all that can be seen of it."""
    blob, root = tmp_path / "blob", tmp_path / "root"
    blob.write_bytes(LAYER)
    root.mkdir()
    mounts = (Mount(type="bind", source=str(root), options=["rw", "rbind"]),)
    run(Application(str(blob), TAR, mounts, str(tmp_path), sync=True))
    assert stat.S_ISREG((root / "f").stat().st_mode)

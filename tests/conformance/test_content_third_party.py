"""A third party's content backend: installed as a distribution of its own, found, and held to the suite by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCE = '''
"""Objects of a bucket that is far away: each call takes a while, an upload gets its name when it is whole."""
import asyncio
import itertools

from wherry_content.backends.memory import MemoryBackend, MemoryIngest


class Upload(MemoryIngest):
    numbers = itertools.count()

    async def append(self, offset, data):
        end = await super().append(offset, data)
        await asyncio.sleep(0.001)
        return end

    async def seal(self):
        self.check()
        await asyncio.sleep(0.001)
        self.name = f"upload-{next(self.numbers)}"
        self._backend.uploads[self.name] = bytes(self._data)

    def settle(self, digest, size):
        if len(self._backend.uploads[self.name]) != size:
            from wherry_shared.errors import FailedPrecondition
            raise FailedPrecondition("the upload has changed while it was committed")
        self._backend.stored[digest] = self._backend.uploads.pop(self.name)


class Bucket(MemoryBackend):
    def __init__(self, root):
        super().__init__()
        self.uploads = {}

    async def open(self, key, what):
        held = await super().open(key, what)
        held.__class__ = Upload
        await asyncio.sleep(0.001)
        return held

    async def read(self, digest, offset, size):
        await asyncio.sleep(0.001)
        return await super().read(digest, offset, size)


class Careless(Bucket):
    """Breaks a rule: lets two writers have one ingest."""

    async def open(self, key, what):
        self.held.pop(key, None)
        return await super().open(key, what)
'''
POINTS = """
[wherry.content.backends]
bucket = third_party_content:Bucket
careless = third_party_content:Careless
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory for sys.path with the distribution in it."""
    at = tmp_path / "site"
    info = at / "third_party_content-1.0.dist-info"
    info.mkdir(parents=True)
    (at / "third_party_content.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-content\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return at


def suite(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={site.parent / 'base'}", "-q",
        *(f"tests/conformance/test_content{part}.py" for part in ("", "_shared", "_put")), *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def test_the_whole_suite_runs_on_it(site: Path) -> None:
    done = suite(site, "--backend=content/bucket", "-k", "memory")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert " passed" in done.stdout and " failed" not in done.stdout


def test_it_finds_what_one_does_wrong(site: Path) -> None:
    done = suite(site, "--backend=content/careless", "-k", "memory and one_writer")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr
    assert "test_a_ref_has_one_writer" in done.stdout


def test_one_that_is_not_installed_is_told(site: Path) -> None:
    done = suite(site, "--backend=content/floppy")
    assert done.returncode != 0 and "bucket" in done.stderr + done.stdout

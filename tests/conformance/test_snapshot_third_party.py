"""A third party's snapshotter: installed as a distribution of its own, found, and held to the suite by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from snapshot_rig import needs_root

pytestmark = needs_root

ROOT = Path(__file__).parent.parent.parent
SOURCE = '''
"""A snapshotter in its smallest form: whole copies, by cp."""
import subprocess
from wherry_shared.values import Mount
from wherry_snapshot.backends.directories import Directories


class Copies(Directories):
    def __init__(self, root, settings):
        super().__init__(root)

    def create(self, snapshot, check):
        def fill(new):
            if snapshot.parents:
                subprocess.run(["cp", "-aT", self.tree(snapshot.parents[0]), new], check=True)

        self.make(snapshot.number, fill)

    def mounts(self, snapshot):
        access = "ro" if snapshot.kind == "view" else "rw"
        return [Mount(type="bind", source=self.tree(snapshot.number), options=[access, "rbind"])]


class Forgetful(Copies):
    """Breaks a rule: a child does not have its parent's files."""

    def create(self, snapshot, check):
        self.make(snapshot.number, lambda new: None)


def moonlit(root, settings):
    from wherry_shared.errors import FailedPrecondition
    raise FailedPrecondition("the moon is not full")
'''
POINTS = """
[wherry.snapshotters]
copies = third_party_snapshots:Copies
forgetful = third_party_snapshots:Forgetful
moonlit = third_party_snapshots:moonlit
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory for sys.path with the distribution in it."""
    at = tmp_path / "site"
    info = at / "third_party_snapshots-1.0.dist-info"
    info.mkdir(parents=True)
    (at / "third_party_snapshots.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-snapshots\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return at


def suite(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={site.parent / 'base'}",
        "tests/conformance/test_snapshot.py", "-k", "chain_shows or read_only or refused or unknown", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


def test_the_suite_runs_on_it_alone(site: Path) -> None:
    done = suite(site, "--backend=snapshot/copies", "-v")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "[memory-copies]" in done.stdout and "[nats-copies]" in done.stdout
    assert "overlay" not in done.stdout and "skipped" not in done.stdout


def test_the_suite_finds_a_rule_that_is_broken(site: Path) -> None:
    done = suite(site, "--backend=snapshot/forgetful")
    assert done.returncode == 1 and "test_a_chain_shows_what_its_layers_did" in done.stdout


def test_what_was_asked_for_and_cannot_be_had_is_an_error(site: Path) -> None:
    done = suite(site, "--backend=snapshot/moonlit")
    assert done.returncode == 1 and "the moon is not full" in done.stdout and "skipped" not in done.stdout
    done = suite(site, "--backend=snapshot/nothing")
    assert done.returncode == 4 and "copies, " in done.stderr and "overlay" in done.stderr
    done = suite(site, "--backend=nonsense/overlay")
    assert done.returncode == 4 and "KIND" in done.stderr


def test_without_the_option_it_is_one_of_all(site: Path) -> None:
    done = suite(site, "-v", "--collect-only")
    for name in ("copies", "moonlit", "overlay", "native"):
        assert f"memory-{name}]" in done.stdout

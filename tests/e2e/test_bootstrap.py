"""deploy/bootstrap.sh on a machine that has everything: it looks, and touches nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAMP = ROOT / ".venv" / "wherry-synced"


def bootstrap(*groups: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "deploy" / "bootstrap.sh"), *groups]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=100)


def test_a_second_run_changes_nothing_and_says_nothing() -> None:
    assert bootstrap("test").returncode == 0
    synced = STAMP.stat().st_mtime_ns
    again = bootstrap("demo", "test")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert STAMP.stat().st_mtime_ns == synced


def test_the_environment_is_the_interpreter_that_was_chosen() -> None:
    version = subprocess.run([ROOT / ".venv/bin/python", "-V"], capture_output=True, text=True, check=True).stdout
    assert tuple(map(int, version.split()[1].split(".")[:2])) >= (3, 11)


def test_an_unknown_group_is_refused_by_name() -> None:
    refused = bootstrap("everything")
    assert refused.returncode != 0
    assert "unknown group 'everything'" in refused.stderr

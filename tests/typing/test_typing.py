"""What users write is type-checked. Each wrong line in `cases` says which error it must be; one that is none fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parent.parent.parent


def test_mypy_sees_what_is_right_and_what_is_wrong() -> None:
    files = sorted(CASES.glob("*.py"))
    assert len(files) == 3
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "--no-error-summary", *map(str, files)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"\n{done.stdout}{done.stderr}"


def test_every_package_says_that_it_is_typed() -> None:
    """Without `py.typed` mypy would take all of it for Any, and see nothing wrong."""
    for package in [*ROOT.glob("services/*/wherry_*"), ROOT / "shared/wherry_shared", ROOT / "client/wherry"]:
        assert (package / "py.typed").is_file(), package

"""What the doctor says of backups: that they are old only where one should have been made since."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from wherry.doctor.files import backed_up

HOUR = 3600.0


@pytest.mark.parametrize(
    ("changed", "made", "started", "old"),
    [
        (0.0, 2 * HOUR, HOUR, True),  # hours after a change, and while more is changed
        (HOUR, 3 * HOUR, 4 * HOUR, True),
        (0.0, 60.0, 4 * HOUR, False),  # nothing was changed for long, and now something is
        (0.0, 9 * HOUR, 60.0, False),  # the node was away for a night: the first look is still to come
        (9 * HOUR, 9 * HOUR, 10 * HOUR, False),
    ],
)
def test_backups(tmp_path: Path, changed: float, made: float, started: float, old: bool) -> None:
    """All so many seconds ago."""
    path, now = tmp_path / "metadata.db", time.time()
    for name, ago in (("metadata.db", changed), ("metadata.db-wal", changed), ("metadata.db.backup", made)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (now - ago, now - ago))
    found = [finding.what for finding in backed_up("image", path, now - started)]
    assert found == (["the backup of image is old"] if old else [])


def test_none_at_all(tmp_path: Path) -> None:
    path, now = tmp_path / "metadata.db", time.time()
    path.touch()
    os.utime(path, (now - HOUR, now - HOUR))
    assert [finding.what for finding in backed_up("image", path, now - HOUR)] == ["image has no backup"]
    assert not list(backed_up("image", path, now - 60))

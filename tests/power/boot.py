"""`python -m power.boot FOLDER [MOMENT]`: start a node on what the power left, and check it; without a moment only log
what its recovery writes, for the next cut."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from node import Node

from .disk import logged

# It is ready before all is done: events go again, snapshots are looked for, and the collector looks at all.
RECOVERY_SECONDS = 3


def main(base: Path, moment: str) -> int:
    node = Node(base / "node").start()
    try:
        for path in node.root.glob("*/metadata.db"):
            found = sqlite3.connect(path).execute("PRAGMA integrity_check").fetchall()
            assert found == [("ok",)], (path, found)
        check = [sys.executable, "-m", "power.check", str(base / "notes"), moment]
        return subprocess.run(check, env=node.environment).returncode
    finally:
        node.stop()  # the mounts are this namespace's, and go with it


def recover(base: Path) -> int:
    """As `main` does, on the disk `cut` with a log, which is `recovery` after that."""
    with logged(base, base / "cut") as (_, log):
        node = Node(base / "node").start()
        try:
            time.sleep(RECOVERY_SECONDS)
            shutil.copy(log, base / "recovery")
        finally:
            node.stop()
    return 0


if __name__ == "__main__":
    folder, *moments = sys.argv[1:]
    sys.exit(main(Path(folder), *moments) if moments else recover(Path(folder)))

"""`python -m power.boot FOLDER MOMENT`: start a node on what the power left, and check it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

from node import Node


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


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))

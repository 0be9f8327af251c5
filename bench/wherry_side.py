"""A Wherry node on directories of its own, started as its user would: `wherry up`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .node import Node

WHERRY = str(Path(sys.executable).with_name("wherry"))


class WherryNode(Node):
    side = "wherry"
    stop_signal = signal.SIGINT  # takes its containers along

    @property
    def _state(self) -> Path:
        return self.place / "state"

    def command(self) -> Sequence[str]:
        return [
            WHERRY, "up", "--root", str(self.place / "root"), "--state", str(self._state), "--port", "0",
            "--node", f"bench-{os.getpid()}-{self.number}", "--scale", f"content={self.replicas}",
            *(["--together", "all"] if self.together else []),
        ]  # fmt: skip

    def ready(self) -> bool:
        return any(line == "ready" for line in self.log.read_text(errors="replace").splitlines())

    def settings(self) -> dict[str, str]:
        return {"state": str(self._state), "namespace": self.namespace}

    def environment(self) -> dict[str, str]:
        return {"WHERRY_STATE": str(self._state), "WHERRY_NAMESPACE": self.namespace}

    def run_true(self, image: str) -> Sequence[str]:
        return [WHERRY, "run", "--rm", image, "true"]


def version() -> str:
    """The installed version, and the commit where this is a checkout."""
    from wherry_shared.runtime import package_version

    where = Path(__file__).resolve().parents[1]
    found = subprocess.run(
        ["git", "-C", str(where), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip()
    return package_version("wherry") + (f" ({commit})" if commit else "")


def nats_version() -> str:
    """Of the nats-server that comes with it."""
    from wherry.node.server import find_binary

    said = subprocess.run([find_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[-1]

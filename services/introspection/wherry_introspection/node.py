"""The node's identity: an id made once and kept, and the kernel's own of this boot."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from wherry_shared.boot import boot_id
from wherry_shared.errors import DataLoss
from wherry_shared.files import write_atomic
from wherry_shared.values import now

PID_NAMESPACE = Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Node:
    """Who this node is, and which directories it has."""

    id: str
    name: str
    boot_id: str
    pid_namespace: int
    started_at: datetime
    root: Path
    state: Path

    @classmethod
    def open(cls, path: Path, name: str, root: Path = Path(), state: Path = Path()) -> Node:
        """Read the id, or make it. DataLoss when the file holds none: a node does not change who it is by itself."""
        if not path.exists():
            write_atomic(path, f"{uuid.uuid4()}\n".encode())
        try:
            known = str(uuid.UUID(path.read_text().strip()))
        except ValueError:
            raise DataLoss(f"{path} holds no uuid: restore it, or remove it to make a new one") from None
        return cls(known, name, boot_id(), PID_NAMESPACE.stat().st_ino, now(), root, state)

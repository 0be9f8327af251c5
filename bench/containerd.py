"""Debian's containerd on directories of its own, without the parts that Wherry has no counterpart of (CRI)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from .grpc import Connection, GrpcError
from .node import Node

# Fixed in its shims: where runc's state and their sockets lie, whatever containerd's own state directory is.
_SHIMS_STATE = Path("/run/containerd")
# It lies on a tmpfs, as the state directory does, and goes with the mount namespace in which containerd is started.
_WITH_SHIMS_STATE = f'mount -t tmpfs -o mode=0711 tmpfs {_SHIMS_STATE} && exec "$@"'
_OTHER_SNAPSHOTTERS = ("aufs", "btrfs", "devmapper", "zfs")


class ContainerdNode(Node):
    side = "containerd"
    _made = False
    _cli_id = f"cli-{os.getpid()}"

    @cached_property
    def socket(self) -> Path:
        """Where a path is short: containerd takes no more than 104 bytes."""
        return Path(tempfile.mkdtemp(prefix="wherry-bench-")) / "containerd.sock"

    def _config(self) -> str:
        disabled = ["io.containerd.grpc.v1.cri", *(f"io.containerd.snapshotter.v1.{n}" for n in _OTHER_SNAPSHOTTERS)]
        return "\n".join([
            "version = 2",
            f"root = {json.dumps(str(self.place / 'root'))}",
            f"state = {json.dumps(str(self.place / 'state'))}",
            f"disabled_plugins = {json.dumps(disabled)}",
            "[grpc]",
            f"address = {json.dumps(str(self.socket))}",
            '[plugins."io.containerd.internal.v1.opt"]',
            f"path = {json.dumps(str(self.place / 'opt'))}",
            "",
        ])  # fmt: skip

    def command(self) -> Sequence[str]:
        self._made = not _SHIMS_STATE.exists()
        _SHIMS_STATE.mkdir(mode=0o711, exist_ok=True)
        config = self.place / "config.toml"
        config.write_text(self._config())
        command = ["containerd", "--config", str(config), "--log-level", "warn"]
        return ["unshare", "--mount", "sh", "-c", _WITH_SHIMS_STATE, "sh", *command]

    def ready(self) -> bool:
        try:
            with Connection(str(self.socket), self.namespace, 5.0) as connection:
                connection.call("containerd.services.version.v1.Version/Version")
        except (OSError, GrpcError):
            return False
        return True

    def settings(self) -> dict[str, str]:
        return {"socket": str(self.socket), "namespace": self.namespace, "container_cgroup": f"/{self.namespace}"}

    def environment(self) -> dict[str, str]:
        return {"CONTAINERD_ADDRESS": str(self.socket), "CONTAINERD_NAMESPACE": self.namespace}

    def run_true(self, image: str) -> Sequence[str]:
        return ["ctr", "run", "--rm", "--fifo-dir", str(self.place / "fifo"), image, self._cli_id, "true"]

    def tidy(self) -> None:
        shutil.rmtree(self.socket.parent)
        if self._made:
            with contextlib.suppress(OSError):
                _SHIMS_STATE.rmdir()


def version() -> str:
    """`1.6.20~ds1`, as the program says it."""
    said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True).stdout.split()
    return said[2]

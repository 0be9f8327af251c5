"""Debian's containerd on directories of its own, without the parts that Wherry has no counterpart of (CRI)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from .grpc import Connection, GrpcError
from .node import Node

# Fixed in its shims: where runc's state and their sockets lie, whatever containerd's own state directory is.
_RUNC_STATE = Path("/run/containerd/runc")
_SHIM_SOCKETS = Path("/run/containerd/s")
_IDS = 5000  # more containers than any run makes on one node
_OTHER_SNAPSHOTTERS = ("aufs", "btrfs", "devmapper", "zfs")


class ContainerdNode(Node):
    side = "containerd"
    _absent_before: Sequence[Path] = ()
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
        shared = (_RUNC_STATE, _SHIM_SOCKETS, _RUNC_STATE.parent)
        self._absent_before = [directory for directory in shared if not directory.exists()]
        config = self.place / "config.toml"
        config.write_text(self._config())
        return ["containerd", "--config", str(config), "--log-level", "warn"]

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

    def _shim_sockets(self) -> Iterator[str]:
        """The names of our own shims' sockets, which one that is killed leaves: others' lie in the same directory."""
        for id in (self._cli_id, *(f"bench-{serial}" for serial in range(1, _IDS))):
            yield hashlib.sha256(f"{self.socket}/{self.namespace}/{id}".encode()).hexdigest()

    def tidy(self) -> None:
        shutil.rmtree(self.socket.parent)
        for name in self._shim_sockets():
            (_SHIM_SOCKETS / name).unlink(missing_ok=True)
        shutil.rmtree(_RUNC_STATE / self.namespace, ignore_errors=True)
        for directory in self._absent_before:
            with contextlib.suppress(OSError):
                directory.rmdir()


def version() -> str:
    """`1.6.20~ds1`, as the program says it."""
    said = subprocess.run(["containerd", "--version"], capture_output=True, text=True, check=True).stdout.split()
    return said[2]

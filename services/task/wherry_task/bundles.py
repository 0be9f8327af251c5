"""The bundle: a container's directory under the state directory, 0700, with the specification and the root's place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from wherry_shared.errors import FailedPrecondition, InvalidArgument, ResourceExhausted

log = logging.getLogger("wherry.task")

SPEC = "config.json"
BINARY = "shim-binary-path"  # containerd's name for it


class Bundles:
    """Makes and removes bundles under one state directory."""

    def __init__(self, state: Path) -> None:
        self._tasks = state / "tasks"
        self._runtimes = state / "runtimes"
        self.cgroup = _cgroup_of(state)

    def path(self, namespace: str, container: str) -> Path:
        """Where a container's bundle lies."""
        return self._tasks / namespace / container

    def runtime_root(self, namespace: str, binary: str) -> Path:
        """The runtime's own state directory for a namespace."""
        return self._runtimes / Path(binary).name / namespace

    def make(self, namespace: str, container: str, spec: dict[str, Any], binary: str) -> Path:
        """Write a new bundle. FailedPrecondition when one is there; ResourceExhausted on a full disk; InvalidArgument:
        the specification is none."""
        path = self.path(namespace, container)
        text = json.dumps(self._complete(spec, namespace, container))
        try:
            self.runtime_root(namespace, binary).mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.mkdir(mode=0o700)
            (path / "rootfs").mkdir(mode=0o755)
            (path / SPEC).write_text(text)
            (path / BINARY).write_text(binary)
            _let_through(path, self._tasks.parents[1], _mapped_root(spec))
        except FileExistsError:
            raise FailedPrecondition(f"{path} is left from another task") from None
        except FailedPrecondition:
            shutil.rmtree(path, ignore_errors=True)
            raise
        except OSError as e:
            shutil.rmtree(path, ignore_errors=True)
            raise ResourceExhausted(f"bundle of {container}: {e.strerror}") from None
        return path

    def _complete(self, spec: dict[str, Any], namespace: str, container: str) -> dict[str, Any]:
        """The client's specification with this node's place in the cgroup tree, where it names none."""
        full = dict(spec)  # what is below is only read
        if not isinstance(full.get("process"), dict) or not full.get("ociVersion"):
            raise InvalidArgument(f"container {container} has no runtime specification with a process")
        linux = full.get("linux", {})
        if not isinstance(linux, dict):
            raise InvalidArgument(f"container {container}: `linux` of its runtime specification is no object")
        full["linux"] = {**linux, "cgroupsPath": linux.get("cgroupsPath") or f"{self.cgroup}/{namespace}/{container}"}
        full.setdefault("root", {"path": "rootfs"})
        return full

    def binary_of(self, path: Path) -> str:
        """What a bundle was made for. Raises OSError where that was never written down."""
        return (path / BINARY).read_text()

    def remove(self, path: Path) -> None:
        """Remove a bundle that nothing uses any more; one whose root is still mounted stays, or the root would go."""
        try:
            os.rmdir(path / "rootfs")
        except FileNotFoundError:
            pass
        except OSError as e:
            log.error("%s stays: its rootfs: %s", path, e.strerror)
            return
        shutil.rmtree(path, ignore_errors=True)

    def all(self) -> list[tuple[str, str, Path]]:
        """Every bundle that is there: namespace, container, path."""
        return [
            (namespace.name, bundle.name, bundle)
            for namespace in (self._tasks.iterdir() if self._tasks.is_dir() else ())
            for bundle in namespace.iterdir()
        ]

    def remove_empty(self) -> None:
        """Remove the directories and cgroups that stand empty when the last container is gone."""
        shutil.rmtree(self._runtimes, ignore_errors=True)
        for root in ("/sys/fs/cgroup", *_v1_hierarchies()):
            base = Path(root + self.cgroup)
            if os.path.isdir(base):  # False too for what may not be looked at
                for directory, _, _ in os.walk(base, topdown=False):
                    _rmdir(directory)


def cgroup_of_bundle(path: Path) -> str:
    """The cgroup of the container whose bundle this is or was, where its specification named none."""
    return f"{_cgroup_of(path.parents[2])}/{path.parent.name}/{path.name}"


def _cgroup_of(state: Path) -> str:
    """Nodes with other directories on this host have other cgroups, each at the top: a parent of several would be
    removed by one while another makes its own in it."""
    return f"/wherry-{hashlib.sha256(str(state).encode()).hexdigest()[:12]}"


def _mapped_root(spec: dict[str, Any]) -> int:
    """Who the container's root is on the host, as a group; 0 where it is root there too."""
    for each in (spec.get("linux") or {}).get("gidMappings") or ():
        if each.get("containerID") == 0:
            return int(each.get("hostID") or 0)
    return 0


def _let_through(path: Path, top: Path, gid: int) -> None:
    """Let a root that is nobody on the host pass to its bundle, and nobody look around on the way (containerd's modes).

    top: the highest of our directories. FailedPrecondition: one above it is closed.
    """
    if not gid:
        return
    os.chown(path, -1, gid)
    path.chmod(0o710)
    for each in path.parents:
        if each == top or top in each.parents:
            each.chmod(0o711)
        elif not each.stat().st_mode & 0o001:
            raise FailedPrecondition(f"a container with mapped ids cannot reach its root: {each} lets nobody through")


def _rmdir(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        return  # something still runs in it


def _v1_hierarchies() -> list[str]:
    with os.scandir("/sys/fs/cgroup") as entries:
        return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]

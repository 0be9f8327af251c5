"""Id mappings of a snapshot's parents: the labels that ask for them, and whether a filesystem can have them.

The mounter does the mapping (mount_setattr(2), MOUNT_ATTR_IDMAP); here it is only written into the mount's options.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping as Labels
from dataclasses import dataclass
from pathlib import Path

from wherry_shared.api.snapshot import GID_LABEL, UID_LABEL
from wherry_shared.errors import InvalidArgument

_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})\Z")
_IDS = (1 << 32) - 1  # the last id means "none"
_RANGES_MAX = 340  # the kernel's bound for one map (user_namespaces(7))

_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442  # the same on every architecture
_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _MOUNT_ATTR_IDMAP = 1, 0x1000, 0x100000
_CLONE_NEWUSER = 0x10000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class Mapping:
    """Maps as `containerID:hostID:size[,...]`, and who root in the container is on the host (uid, gid)."""

    uids: str
    gids: str
    root: tuple[int, int]


def of(labels: Labels[str, str]) -> Mapping | None:
    """The mapping that a snapshot's labels ask for. InvalidArgument: one alone, malformed, or without root."""
    uids, gids = labels.get(UID_LABEL, ""), labels.get(GID_LABEL, "")
    if not uids and not gids:
        return None
    return Mapping(uids, gids, (_root_of(UID_LABEL, uids), _root_of(GID_LABEL, gids)))


def _root_of(label: str, text: str) -> int:
    ranges = text.split(",")
    if len(ranges) > _RANGES_MAX:
        raise InvalidArgument(f"label {label}: more than {_RANGES_MAX} ranges")
    root: int | None = None
    for each in ranges:
        match = _RANGE.match(each)
        inside, outside, size = map(int, match.groups()) if match else (0, 0, 0)
        if not size or max(inside, outside) + size > _IDS:
            raise InvalidArgument(f"label {label}: {each[:80]!r} is not containerID:hostID:size")
        if inside == 0:
            root = outside
    if root is None:
        raise InvalidArgument(f"label {label}: it does not say who root is")
    return root


def works_on(directory: Path) -> bool:
    """Whether the kernel maps ids of files in `directory`: tried on a copy of its mount that is attached nowhere."""
    try:
        namespace = _user_namespace()
    except OSError:
        return False
    try:
        return _maps(os.fsencode(directory), namespace)
    finally:
        os.close(namespace)


def _maps(directory: bytes, namespace: int) -> bool:
    tree: int = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE), ctypes.c_int(-100), directory, ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    )
    if tree < 0:
        return False
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_IDMAP, 0, 0, namespace)
    try:
        done: int = _libc.syscall(
            ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_int(tree), b"", ctypes.c_uint(_AT_EMPTY_PATH), attributes,
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        )  # fmt: skip
        return done == 0
    finally:
        os.close(tree)


def _user_namespace() -> int:
    """A descriptor of a user namespace that lives no longer than it; its child only waits and ends."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    ended, end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        done = _libc.unshare(_CLONE_NEWUSER) == 0
        os.close(end)
        os.write(tell, b"1" if done else b"0")
        os.read(ended, 1)
        os._exit(0)
    os.close(tell)
    os.close(ended)
    try:
        if os.read(told, 1) != b"1":
            raise OSError("there are no user namespaces")
        for map_ in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{map_}").write_text("0 100000 65536")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(told)
        os.close(end)
        os.waitpid(pid, 0)

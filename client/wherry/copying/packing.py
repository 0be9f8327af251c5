"""A tree as a tar stream, walked by descriptors: no path is looked up twice, and no device is ever opened."""

from __future__ import annotations

import ctypes
import os
import stat
import tarfile
from typing import BinaryIO

from wherry_shared.errors import Aborted

from .owners import PLAIN, Ids
from .roots import Found

DEPTH_MAX = 512
_libc = ctypes.CDLL(None, use_errno=True)
# What is no storage: proc, sysfs, devpts, cgroup (both), mqueue, debugfs, tracefs, securityfs, bpf.
_PSEUDO = frozenset((
    0x9FA0, 0x62656572, 0x1CD1, 0x27E0EB, 0x63677270, 0x19800202, 0x64626720, 0x74726163, 0x73636673, 0xCAFE4A11,
))  # fmt: skip


def pack(start: Found, name: str, stream: BinaryIO, ids: Ids = PLAIN) -> list[str]:
    """Write what `start` is, and all below it, as `name` and `name/...` (`.`: only what is below, if a directory).
    Owners are written as `ids` has them inside.

    Answers what was left out: sockets, and filesystems that are no storage. Aborted: a file changed its size.
    """
    left: list[str] = []
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, start.fd, start.info, name, left, ids, depth=0, device=-1)
    return left


def _add(
    tar: tarfile.TarFile, fd: int, info: os.stat_result, name: str, left: list[str], ids: Ids, *, depth: int,
    device: int,
) -> None:  # fmt: skip
    mode = info.st_mode
    member = tarfile.TarInfo(name)
    member.mode, member.mtime = stat.S_IMODE(mode), info.st_mtime
    member.uid, member.gid = ids.inside(info.st_uid, info.st_gid)
    if stat.S_ISREG(mode):
        _add_file(tar, fd, info, member)
        return
    if stat.S_ISDIR(mode):
        if depth > DEPTH_MAX or (info.st_dev != device and _type_of(fd) in _PSEUDO):
            left.append(name)
            return
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
        _add_children(tar, fd, info, name, left, ids, depth)
        return
    if stat.S_ISLNK(mode):
        member.type, member.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=fd)
    elif stat.S_ISFIFO(mode):
        member.type = tarfile.FIFOTYPE
    elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        member.type = tarfile.CHRTYPE if stat.S_ISCHR(mode) else tarfile.BLKTYPE
        member.devmajor, member.devminor = os.major(info.st_rdev), os.minor(info.st_rdev)
    else:
        left.append(name)
        return
    tar.addfile(member)


def _add_file(tar: tarfile.TarFile, fd: int, info: os.stat_result, member: tarfile.TarInfo) -> None:
    member.size = info.st_size
    with open(f"/proc/self/fd/{fd}", "rb") as file:  # known to be a regular one
        try:
            tar.addfile(member, file)
        except OSError as e:
            if e.errno is None:  # tarfile's own: the end came too soon
                raise Aborted(f"{member.name} changed while it was read") from None
            raise


def _add_children(
    tar: tarfile.TarFile, fd: int, info: os.stat_result, name: str, left: list[str], ids: Ids, depth: int
) -> None:  # fmt: skip
    directory = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for child in sorted(os.listdir(directory)):
            try:
                found = os.open(child, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            except FileNotFoundError:
                continue  # removed meanwhile
            try:
                path = child if name == "." else f"{name}/{child}"
                _add(tar, found, os.fstat(found), path, left, ids, depth=depth + 1, device=info.st_dev)
            finally:
                os.close(found)
    finally:
        os.close(directory)


def _type_of(fd: int) -> int:
    """The kind of filesystem (f_type of statfs(2))."""
    buffer = (ctypes.c_long * 32)()
    return int(buffer[0]) if _libc.fstatfs(fd, buffer) == 0 else 0

"""A tar stream into a directory: below it no link is ever followed, whoever makes one meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from wherry_shared.errors import DataLoss, FailedPrecondition, InvalidArgument
from wherry_shared.openat2 import BENEATH, NO_MAGICLINKS, NO_SYMLINKS, openat2

from .owners import PLAIN, Ids

_BELOW = BENEATH | NO_SYMLINKS | NO_MAGICLINKS
_DIRECTORY = os.O_PATH | os.O_DIRECTORY
_TRAILER_MAX = 1 << 20


@dataclass(frozen=True)
class Rules:
    """owner: who gets the files, None for the one in the tar. set_id: whether set-id bits stay. ids: what these
    numbers are on the host."""

    owner: tuple[int, int] | None
    set_id: bool
    ids: Ids = PLAIN

    def owner_of(self, member: tarfile.TarInfo) -> tuple[int, int]:
        """Whom a file belongs to, by the host's numbers."""
        return self.ids.on_host(*(self.owner or (member.uid, member.gid)))


def unpack(directory: int, stream: BinaryIO, rules: Rules) -> list[str]:
    """Unpack a tar (plain, or compressed as tarfile tells by itself) into the descriptor `directory`.

    Answers what was left out: devices, whose nodes would be the host's own. InvalidArgument: a name that leads out.
    FailedPrecondition: a directory would take the place of something else, or the other way round, or a file that of a
    device. DataLoss: the tar
    is cut off or broken.
    """
    left: list[str] = []
    later: list[tuple[list[str], tarfile.TarInfo]] = []
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                parts = _parts(member.name)
                if member.isdir():
                    _directory(directory, parts, rules)
                    later.append((parts, member))
                elif member.ischr() or member.isblk():
                    left.append(member.name)
                else:
                    _add(directory, parts, member, tar, rules)
        # An archive is filled up behind its end: whoever writes the other end of a pipe gets to its own end, too.
        stream.read(_TRAILER_MAX)
    except (tarfile.TarError, EOFError) as e:
        raise DataLoss(f"the tar stream is broken: {e}") from None
    except NotADirectoryError as e:
        raise FailedPrecondition(f"{e.filename}: not a directory, or a link to one") from None
    # Times and modes of directories come last: what is put into them would change the one and be stopped by the other.
    for parts, member in reversed(later):
        if parts:
            fd = openat2(directory, "/".join(parts), os.O_RDONLY | os.O_DIRECTORY, _BELOW)
            try:
                _attributes(fd, member, rules)
            finally:
                os.close(fd)
    return left


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise InvalidArgument(f"the tar has the name {name[:200]!r}, which leads out of it")
    return parts


def _directory(root: int, parts: list[str], rules: Rules) -> None:
    """Make a directory and those above it, where they are missing; they are root's."""
    for depth in range(1, len(parts) + 1):
        parent = openat2(root, "/".join(parts[: depth - 1]), _DIRECTORY, _BELOW)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parts[depth - 1], 0o755, dir_fd=parent)
                if rules.ids.mapped:
                    os.chown(parts[depth - 1], *rules.ids.on_host(0, 0), dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(parent)
    with _explained("/".join(parts)):
        os.close(openat2(root, "/".join(parts), _DIRECTORY, _BELOW))


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise NotADirectoryError(e.errno, e.strerror, path) from None


def _add(root: int, parts: list[str], member: tarfile.TarInfo, tar: tarfile.TarFile, rules: Rules) -> None:
    if not parts:
        raise InvalidArgument(f"the tar has a file of the name {member.name[:80]!r}")
    _directory(root, parts[:-1], rules)
    parent = openat2(root, "/".join(parts[:-1]), _DIRECTORY, _BELOW)
    try:
        if member.isreg():
            _file(parent, parts[-1], member, tar, rules)
            return
        _clear(parent, parts[-1])
        if member.issym():
            os.symlink(member.linkname, parts[-1], dir_fd=parent)
            _own(parent, parts[-1], member, rules)
        elif member.islnk():
            _hard_link(root, parent, parts[-1], member)
        elif member.isfifo():
            os.mkfifo(parts[-1], member.mode & 0o777, dir_fd=parent)
            _own(parent, parts[-1], member, rules)
    finally:
        os.close(parent)


def _clear(parent: int, name: str) -> None:
    """Remove what is in the way, if it is no directory, and no device: `cp c:/file /dev/null` takes that from all."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(name, dir_fd=parent).st_mode
        if stat.S_ISDIR(mode):
            raise FailedPrecondition(f"{name} is a directory and cannot be replaced by a file")
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise FailedPrecondition(f"{name} is no regular file but a device: it is not replaced")
        os.unlink(name, dir_fd=parent)


def _file(parent: int, name: str, member: tarfile.TarInfo, tar: tarfile.TarFile, rules: Rules) -> None:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        _clear(parent, name)
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=parent)
    except OSError as e:
        if e.errno != 16:  # EBUSY: a file is mounted there, and is written itself
            raise
        fd = _mounted_file(parent, name)
    with os.fdopen(fd, "wb") as file:
        source = tar.extractfile(member)
        if source is not None:
            shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        if file.tell() != member.size:
            raise DataLoss(f"{member.name} is cut off")
        _attributes(file.fileno(), member, rules)


def _mounted_file(parent: int, name: str) -> int:
    """A file that something is mounted on, to be written. FailedPrecondition: it is none; whoever has a user namespace
    mounts a device there, and outside of the container no rule forbids that one."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise FailedPrecondition(f"{name} is no regular file, and is mounted: it is not replaced")
        return os.open(f"/proc/self/fd/{found}", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    finally:
        os.close(found)


def _hard_link(root: int, parent: int, name: str, member: tarfile.TarInfo) -> None:
    target = _parts(member.linkname)
    if not target:
        raise InvalidArgument(f"the tar links {member.name[:80]!r} to nothing")
    beside = openat2(root, "/".join(target[:-1]), _DIRECTORY, _BELOW)
    try:
        os.link(target[-1], name, src_dir_fd=beside, dst_dir_fd=parent, follow_symlinks=False)
    finally:
        os.close(beside)


def _attributes(fd: int, member: tarfile.TarInfo, rules: Rules) -> None:
    os.fchown(fd, *rules.owner_of(member))
    os.fchmod(fd, member.mode & (0o7777 if rules.set_id else 0o1777))
    os.utime(fd, (member.mtime, member.mtime))


def _own(parent: int, name: str, member: tarfile.TarInfo, rules: Rules) -> None:
    uid, gid = rules.owner_of(member)
    os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)

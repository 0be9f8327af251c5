"""Changes as a layer: a PAX archive whose extraction onto the left tree gives the right one.

What an archive says, and where it differs from containerd's walking differ, which is what other tools meet:
* all attributes of `xattrs.py`, not `security.capability` alone;
* times in nanoseconds, unless there is a source date epoch, so that a tree made of the layer compares as equal. With
  the epoch times are whole seconds and none is later, and the same tree gives the same bytes wherever it lies;
* a file of several names is one body and links to it, and if one of the names changed, all of them are there;
* directories above a change come first; deletions are empty `.wh.` files of the time 0; no opaque markers;
* sockets, and devices 0:0, cannot be in a layer and are left out.
A file that grows while it is read has the size that it had when it was opened; one that shrinks ends the archive
(Aborted), and so does a directory moved under the walk: nothing is invented.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Iterator

from wherry_shared.errors import Aborted, FailedPrecondition, ResourceExhausted

from . import headers
from .changes import DELETED, SAME, Found, Level, Walk, mtime, open_file
from .headers import Headers, Meta
from .ids import Ids
from .limits import Limits
from .names import join, show

PIECE = 256 << 10
_WHITEOUT = b".wh."
_NANOSECONDS = 1_000_000_000
_KINDS = {
    stat.S_IFCHR: headers.CHAR, stat.S_IFBLK: headers.BLOCK_DEVICE, stat.S_IFIFO: headers.FIFO,
    stat.S_IFLNK: headers.SYMLINK,
}  # fmt: skip


class _Group:
    """The names of one file: the first of them written, or those that wait until one is."""

    __slots__ = ("waiting", "written")

    def __init__(self) -> None:
        self.written: bytes | None = None
        self.waiting: list[Found] = []


class Archive:
    """The archive of one walk, iterated once: pieces of some 256 KiB."""

    def __init__(self, walk: Walk, limits: Limits, epoch: int | None = None, ids: Ids | None = None) -> None:
        """epoch: seconds since 1970, the latest time that the archive may say, in whole seconds. ids: the owners'."""
        self._walk = walk
        self._limits = limits
        self._epoch = None if epoch is None else epoch * _NANOSECONDS
        self._ids = ids
        self._headers = Headers()
        self._groups: dict[tuple[int, int], _Group] = {}
        self._parts: list[bytes] = []
        self._ready = 0
        self._size = 0
        self._entries = 0

    def __iter__(self) -> Iterator[bytes]:
        """ResourceExhausted: more than a layer may be. FailedPrecondition: a name that no layer can hold. Aborted."""
        for found in self._walk:
            yield from self._entry(found)
            if self._ready >= PIECE:
                yield self._flushed()
        self._add(headers.END)
        yield self._flushed()

    # -- entries

    def _entry(self, found: Found) -> Iterator[bytes]:
        info = found.info
        if found.kind == DELETED:
            self._above(found.level)
            self._add_header(Meta(join(found.level.path, _WHITEOUT + found.base), headers.REGULAR))
        elif found.base.startswith(_WHITEOUT):
            raise FailedPrecondition(f"{show(found.path)}: in a layer this name would remove a file")
        elif stat.S_ISDIR(info.st_mode):
            if found.own is not None:
                self._above(found.own)
        elif info.st_nlink > 1:
            yield from self._linked(found, info)
        else:
            yield from self._body(found)

    def _linked(self, found: Found, info: os.stat_result) -> Iterator[bytes]:
        """One name of a file that has several."""
        group = self._groups.setdefault((info.st_dev, info.st_ino), _Group())
        if found.kind == SAME and group.written is None:
            group.waiting.append(found)
            return
        for each in (*group.waiting, found):
            if group.written is not None:
                self._link(each, group.written)
            elif (yield from self._body(each)):
                group.written = each.path
            self._walk.release(each.level)
        group.waiting.clear()

    def _link(self, found: Found, target: bytes) -> None:
        self._above(found.level)
        self._header(self._meta(found.path, headers.LINK, found.info, found)._replace(link=target))

    def _body(self, found: Found) -> Generator[bytes, None, bool]:
        """A file, link or device, with what is above it. Answers whether it is in the archive."""
        kind = stat.S_IFMT(found.info.st_mode)
        directory = self._walk.fd(found.level)
        if kind == stat.S_IFREG:
            return (yield from self._file(found, directory))
        meta = self._meta(found.path, _KINDS[kind], found.info, found)
        if kind == stat.S_IFLNK:
            try:
                meta = meta._replace(link=os.readlink(found.base, dir_fd=directory))
            except OSError:  # it went, or became something else
                return False
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            meta = meta._replace(device=found.info.st_rdev)
        self._above(found.level)
        self._header(meta)
        return True

    def _file(self, found: Found, directory: int) -> Generator[bytes, None, bool]:
        try:
            fd = open_file(found.base, directory)
        except OSError:  # it went, or became something else
            return False
        try:
            self._above(found.level)
            yield from self._bytes(fd, self._meta(found.path, headers.REGULAR, os.fstat(fd), found))
        finally:
            os.close(fd)
        return True

    def _bytes(self, fd: int, meta: Meta) -> Iterator[bytes]:
        size = meta.size
        if size <= PIECE:  # read first, so that the header says what came
            data = os.read(fd, size) if size else b""
            self._header(meta._replace(size=len(data)))
            self._add(data + headers.padding(len(data)))
            return
        self._header(meta)
        left = size
        while left:
            data = os.read(fd, min(left, PIECE))
            if not data:
                raise Aborted(f"{show(meta.name)} became shorter while it was read: pause the container, or try again")
            left -= len(data)
            self._add(data)
            if self._ready >= PIECE:
                yield self._flushed()
        self._add(headers.padding(size))

    def _above(self, level: Level) -> None:
        """Write the directories down to `level` that are not written yet."""
        missing = []
        at: Level | None = level
        while at is not None and not at.written:
            missing.append(at)
            at = at.above
        for each in reversed(missing):
            each.written = True
            meta = Meta(
                each.path + b"/", headers.DIRECTORY, stat.S_IMODE(each.info.st_mode), each.info.st_uid,
                each.info.st_gid, 0, self._time(each.info), b"", 0, each.xattrs,
            )  # fmt: skip
            self._header(meta)

    # -- bytes

    def _meta(self, path: bytes, kind: bytes, info: os.stat_result, found: Found) -> Meta:
        size = info.st_size if kind == headers.REGULAR else 0
        return Meta(
            path,
            kind,
            stat.S_IMODE(info.st_mode),
            info.st_uid,
            info.st_gid,
            size,
            self._time(info),
            b"",
            0,
            found.xattrs,
        )

    def _time(self, info: os.stat_result) -> int:
        time = mtime(info)
        if self._epoch is None:
            return time
        return min(time - time % _NANOSECONDS, self._epoch)

    def _header(self, meta: Meta) -> None:
        if self._ids is not None:
            uid, gid = self._ids.inside(meta.uid, meta.gid)
            meta = meta._replace(uid=uid, gid=gid)
        self._add_header(meta)

    def _add_header(self, meta: Meta) -> None:
        self._entries += 1
        limits = self._limits
        if self._entries > limits.max_entries:
            raise ResourceExhausted(f"more than {limits.max_entries} changes: no layer may have as many entries")
        if len(meta.name) > limits.max_path:
            raise ResourceExhausted(f"{show(meta.name)} is too long a path for a layer: {len(meta.name)} bytes")
        if self._size + meta.size > limits.max_bytes:
            raise ResourceExhausted(f"with {show(meta.name)} the layer has more than {limits.max_bytes} bytes")
        header = self._headers.make(meta)
        if len(header) > limits.max_header:
            raise ResourceExhausted(f"{show(meta.name)} has more extended attributes than a layer may hold")
        self._add(header)

    def _add(self, data: bytes) -> None:
        self._parts.append(data)
        self._ready += len(data)
        self._size += len(data)

    def _flushed(self) -> bytes:
        piece = b"".join(self._parts)
        self._parts.clear()
        self._ready = 0
        return piece


def changed(found: Found) -> bool:
    """Whether it is a change, and not only told for the sake of its links."""
    return found.kind != SAME


def kind_of(found: Found, walk: Walk) -> str:
    """A, C or D: what a list of changes says."""
    if found.kind == DELETED:
        return "D"
    return "C" if walk.existed(found) else "A"

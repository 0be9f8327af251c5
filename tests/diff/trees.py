"""Trees that change: what a container may do to its files, as data, and two trees to do it between.

A `Ground` has a left tree and a right one that began as the same. On `overlay` the right one is a real overlay mount;
on `plain` and `btrfs` it is a copy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from wherry_diff.apply import Applied, apply
from wherry_diff.compare import Compared, Comparison, Redo, changes, compare
from wherry_diff.extract import Target
from wherry_shared.values import Mount

from .layers import TAR, look

CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
NAMES = [b"a", b"b", b"c", b"d", b"e", b"n" * 120, b"\xff\n \\", b"wh.a"]
_PATHS = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(b"/".join)
_TIMES = st.sampled_from([0, 1, 1_500_000_000_000_000_000, 1_500_000_000_123_456_789, 1_700_000_000_000_000_001])
_BODIES = st.sampled_from([b"", b"x", b"y", b"body" * 200, b"z" * 300_000, b"w" * 300_000])

Op = tuple[Any, ...]
OPS = st.one_of(
    st.tuples(st.just("write"), _PATHS, _BODIES),
    st.tuples(st.just("mkdir"), _PATHS),
    st.tuples(st.just("remove"), _PATHS),
    st.tuples(st.just("symlink"), _PATHS, st.sampled_from([b"a", b"/etc/passwd", b"../" * 60, b"gone"])),
    st.tuples(st.just("link"), _PATHS, _PATHS),
    st.tuples(st.just("rename"), _PATHS, _PATHS),
    st.tuples(st.just("chmod"), _PATHS, st.sampled_from([0o644, 0o4755, 0o2755, 0o1777, 0])),
    st.tuples(st.just("chown"), _PATHS, st.sampled_from([0, 1000, 4_000_000]), st.sampled_from([0, 5, 3_000_000])),
    st.tuples(
        st.just("setxattr"), _PATHS, st.sampled_from(["user.a", "user.b", "trusted.t", "security.capability"]),
        st.sampled_from([b"", b"\0=\n", b"v" * 1000]),
    ),
    st.tuples(st.just("mknod"), _PATHS, st.sampled_from([(stat.S_IFCHR, 1, 3), (stat.S_IFBLK, 259, 70000),
                                                        (stat.S_IFIFO, 0, 0)])),
    st.tuples(st.just("utime"), _PATHS, _TIMES),
    st.tuples(st.just("rebuild"), _PATHS),
)  # fmt: skip


def play(top: Path | str, ops: Sequence[Op]) -> None:
    """Do what can be done; what the kernel refuses is left out."""
    for op in ops:
        with contextlib.suppress(OSError):
            _DO[op[0]](os.path.join(os.fsencode(top), op[1]), os.fsencode(top), *op[2:])


def _write(path: bytes, top: bytes, body: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.write(fd, body)
    finally:
        os.close(fd)


def _remove(path: bytes, top: bytes) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _rebuild(path: bytes, top: bytes) -> None:
    """A directory goes and comes back with something else in it: overlayfs makes it opaque."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):  # rmtree would open it, and wait at a fifo
        return
    shutil.rmtree(path)
    os.mkdir(path)
    os.mkdir(os.path.join(path, b"a"))


def _setxattr(path: bytes, top: bytes, name: str, value: bytes) -> None:
    os.setxattr(path, name, CAPABILITY if name == "security.capability" else value, follow_symlinks=False)


def _mknod(path: bytes, top: bytes, what: tuple[int, int, int]) -> None:
    os.mknod(path, what[0] | 0o640, os.makedev(what[1], what[2]))


def _chmod(path: bytes, top: bytes, mode: int) -> None:
    if not stat.S_ISLNK(os.lstat(path).st_mode):
        os.chmod(path, mode)


_DO: dict[str, Any] = {
    "write": _write,
    "mkdir": lambda path, top: os.makedirs(path),
    "remove": _remove,
    "symlink": lambda path, top, target: os.symlink(target, path),
    "link": lambda path, top, source: os.link(os.path.join(top, source), path, follow_symlinks=False),
    "rename": lambda path, top, other: os.rename(path, os.path.join(top, other)),
    "chmod": _chmod,
    "chown": lambda path, top, uid, gid: os.chown(path, uid, gid, follow_symlinks=False),
    "setxattr": _setxattr,
    "mknod": _mknod,
    "utime": lambda path, top, time: os.utime(path, ns=(time, time), follow_symlinks=False),
    "rebuild": _rebuild,
}


def bind(path: Path) -> tuple[Mount, ...]:
    return (Mount(type="bind", source=str(path), options=["ro", "rbind"]),)


def seen(top: Path) -> dict[bytes, tuple[object, ...]]:
    """All there is below `top`. A file whose other names are not in the tree counts as one of one name."""
    tree = look(top)
    tree.pop(b"")
    names = [what[7] for what in tree.values()]
    return {name: (*what[:7], what[7] if names.count(what[7]) > 1 else None) for name, what in tree.items()}


class Ground:
    """A left and a right tree under `base`; `with` it, since an overlay is mounted."""

    def __init__(self, base: Path, kind: str, first: Sequence[Op]) -> None:
        self.base, self.kind = base, kind
        self.left, self.right = base / "left", base / "right"
        base.mkdir()
        self.left.mkdir()
        play(self.left, first)
        self.right.mkdir()
        self.upper, self.work = base / "upper", base / "work"

    def __enter__(self) -> Ground:
        if self.kind == "overlay":
            self.upper.mkdir()
            self.work.mkdir()
            subprocess.run(["mount", "-t", "overlay", "-o", self._options(), "overlay", self.right], check=True)
        else:
            self.copy(self.left, self.right)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.kind == "overlay":
            subprocess.run(["umount", self.right], check=True)
        subprocess.run(["rm", "-rf", self.base], check=True)

    def _options(self, upper: str = "upper") -> str:
        return f"workdir={self.base}/work,upperdir={self.base}/{upper},lowerdir={self.left},index=off"

    @staticmethod
    def copy(source: Path, target: Path) -> None:
        subprocess.run(["cp", "-a", f"{source}/.", target], check=True)

    @property
    def mounts(self) -> tuple[tuple[Mount, ...], tuple[Mount, ...]]:
        """As a snapshotter would give them."""
        if self.kind != "overlay":
            return bind(self.left), bind(self.right)
        return bind(self.left), (Mount(type="overlay", source="overlay", options=self._options().split(",")),)

    def job(self, media_type: str = TAR, epoch: int | None = None) -> Comparison:
        left, right = self.mounts
        return Comparison(left, right, media_type, str(self.base), epoch)

    def layer(self, *, whole: bool, media_type: str = TAR, epoch: int | None = None) -> bytes:
        return made(self.job(media_type, epoch), whole=whole)[1]

    @contextlib.contextmanager
    def applied(self, layer: bytes, *, onto_overlay: bool) -> Iterator[Path]:
        """A copy of the left tree with the layer on it: in a directory, or as one more overlay over the left tree."""
        place = self.base / "applied"
        place.mkdir()
        if not onto_overlay:
            self.copy(self.left, place)
            apply([layer], TAR, Target(str(place), overlay=False))
            yield place
            subprocess.run(["rm", "-rf", place], check=True)
            return
        upper, work = self.base / "upper2", self.base / "work2"
        upper.mkdir()
        work.mkdir()
        apply([layer], TAR, Target(str(upper), overlay=True, parents=(str(self.left),)))
        options = f"workdir={work},upperdir={upper},lowerdir={self.left},index=off"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
            subprocess.run(["rm", "-rf", place, upper, work], check=True)


def made(job: Comparison, *, whole: bool = False) -> tuple[Compared, bytes]:
    """The layer of a comparison, with the whole trees looked at where the upper directory alone does not do."""
    out: list[bytes] = []
    answer = compare(job, out.append, whole=whole)
    if isinstance(answer, Redo):
        out.clear()
        answer = compare(job, out.append, whole=True)
    assert isinstance(answer, Compared)
    return answer, b"".join(out)


def listed(job: Comparison, limit: int = 1000) -> list[tuple[str, bytes]]:
    """All changes, page after page."""
    found: list[tuple[str, bytes]] = []
    after = b""
    while True:
        page, after = changes(job, after, limit)
        found += page
        if not after:
            return found


__all__ = ["OPS", "Applied", "Ground", "Op", "bind", "listed", "made", "play", "seen"]

"""Users by name: looked up in the image's own /etc/passwd and /etc/group, with bounds (GHSA-265r-hfxg-fhmg and kin).

The files are read out of the snapshot's layer directories, topmost first, without mounting anything and without ever
leaving a layer through a link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry_shared.openat2 import IN_ROOT, NO_MAGICLINKS, openat2
from wherry_shared.values import Mount

from .spec import ID_MAX, User

FILE_MAX = 10 << 20


def resolve(wish: str, mounts: Sequence[Mount], groups: Sequence[str] = ()) -> User:
    """The user that `name|uid[:group|gid]` means inside the filesystem of `mounts`.

    groups: further groups, by name or number. A user without a named group is in the groups of the image's
    /etc/group that list it; the primary one is always among the additional ones (GHSA-hmfx-3pcx-653p). Where root's
    cannot be looked up, it is in none. InvalidArgument: a number over 2^31-1, or nonsense. NotFound: no such user or
    group in the image. FailedPrecondition: the image cannot be read from here.
    """
    more = {_gid(group, mounts) for group in groups}
    if not wish or wish in ("0", "root"):
        return _root(mounts, more)
    name, colon, group = wish.partition(":")
    if not name or (colon and not group):
        raise InvalidArgument(f"user {wish!r} is not name|uid[:group|gid]")
    if _is_number(name) and _is_number(group):
        gid = _number(group, "group")
        return User(_number(name, "user"), gid, sorted({gid, *more}))
    uid, gid, login = _user(name, mounts)
    if group:
        gid = _gid(group, mounts)
        return User(uid, gid, sorted({gid, *more}))
    return User(uid, gid, sorted({gid, *_memberships(login, mounts), *more}) if login else sorted({gid, *more}))


def _root(mounts: Sequence[Mount], more: set[int]) -> User:
    try:
        gid = next((_number_in(f[3], "passwd") for f in _entries("etc/passwd", mounts, 4) if f[0] == "root"), 0)
        return User(0, gid, sorted({gid, *_memberships("root", mounts), *more}))
    except FailedPrecondition:
        return User(0, 0, sorted({0, *more}))


def _gid(group: str, mounts: Sequence[Mount]) -> int:
    return _number(group, "group") if _is_number(group) else _group(group, mounts)


def _is_number(text: str) -> bool:
    return text.isdigit() and text.isascii()


def _number(text: str, what: str) -> int:
    if len(text) > 10 or int(text) > ID_MAX:
        raise InvalidArgument(f"{what} {text[:20]} is larger than {ID_MAX}")
    return int(text)


def _user(name: str, mounts: Sequence[Mount]) -> tuple[int, int, str]:
    """uid, primary gid and login name of a user given by name or number."""
    numeric = _is_number(name)
    uid = _number(name, "user") if numeric else -1
    try:
        for fields in _entries("etc/passwd", mounts, 4):
            if fields[0] == name or (numeric and fields[2] == name):
                return _number_in(fields[2], "passwd"), _number_in(fields[3], "passwd"), fields[0]
    except FailedPrecondition:
        if not numeric:
            raise
    if numeric:
        return uid, 0, ""
    raise NotFound(f"no user {name!r} in the image's /etc/passwd")


def _group(name: str, mounts: Sequence[Mount]) -> int:
    for fields in _entries("etc/group", mounts, 3):
        if fields[0] == name:
            return _number_in(fields[2], "group")
    raise NotFound(f"no group {name!r} in the image's /etc/group")


def _memberships(login: str, mounts: Sequence[Mount]) -> set[int]:
    return {
        _number_in(fields[2], "group") for fields in _entries("etc/group", mounts, 4) if login in fields[3].split(",")
    }


def _number_in(text: str, file: str) -> int:
    if not _is_number(text):
        raise InvalidArgument(f"the image's /etc/{file} has an id {text[:20]!r}")
    return _number(text, f"the image's /etc/{file}: id")


def _entries(path: str, mounts: Sequence[Mount], at_least: int) -> Iterator[list[str]]:
    for line in _read(path, mounts).decode(errors="replace").splitlines():
        fields = line.split(":")
        if len(fields) >= at_least and not line.startswith("#"):
            yield fields


def layers(mounts: Sequence[Mount]) -> list[str]:
    """The directories that a snapshot's mounts lay over each other, topmost first."""
    if len(mounts) != 1:
        raise FailedPrecondition(f"{len(mounts)} mounts: a user's name can only be looked up in one; give its number")
    mount = mounts[0]
    if mount.type != "overlay":
        return [mount.source]
    options = dict(o.partition("=")[::2] for o in mount.options)
    upper = [options["upperdir"]] if "upperdir" in options else []
    return upper + [d for d in options.get("lowerdir", "").split(":") if d]


def _read(path: str, mounts: Sequence[Mount]) -> bytes:
    """A regular file of at most 10 MiB; b"" when there is none."""
    for layer in layers(mounts):
        try:
            found = _open_inside(layer, path)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise FailedPrecondition(
                f"/{path} of the image cannot be read here ({e.strerror}); give a number"
            ) from None
        try:
            return _content(found, path)
        finally:
            os.close(found)
    return b""


def _content(found: int, path: str) -> bytes:
    """The bytes of a file opened as a path only; no device of a hostile image is ever really opened."""
    info = os.fstat(found)
    if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
        return b""  # a whiteout: this layer deletes the file
    if not stat.S_ISREG(info.st_mode):
        raise InvalidArgument(f"/{path} of the image is no regular file")
    with open(f"/proc/self/fd/{found}", "rb") as f:
        data = f.read(FILE_MAX + 1)
    if len(data) > FILE_MAX:
        raise InvalidArgument(f"/{path} of the image is larger than {FILE_MAX} bytes")
    return data


def _open_inside(root: str, path: str) -> int:
    """A descriptor (O_PATH) of `path` under `root`; links never lead out of it."""
    try:
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FailedPrecondition(
            f"the snapshot's directory {root} is not on this host: only on the node has a user a name; give a number"
        ) from None
    try:
        return openat2(directory, path, os.O_PATH, IN_ROOT | NO_MAGICLINKS)
    finally:
        os.close(directory)

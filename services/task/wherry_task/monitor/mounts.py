"""The monitor's own mount namespace, and the container's root file system in it.

Why a namespace per monitor: the mounts made in it go with it, however it ends, so a dead monitor leaves none behind,
and no other container's namespace can keep them busy. It is taken from the host's at the moment of the spawn, never
from the zygote's start, so a volume mounted later on the host is seen. What follows from it:
* `<bundle>/rootfs` is empty when looked at from the host; look through /proc/PID/root;
* exec needs no rootfs mount, only the init's namespaces, and runs from the monitor anyhow;
* after a monitor's death nothing can go on with the container: it is killed (zygote.py) and cleaned (cleanup.py).
Mount events still travel both ways between the host and the monitor (so an `rshared` volume works), but for the mount
that holds the bundle, which becomes a slave so that the rootfs does not appear on the host, for /dev, where a null
device of the container's own covers the host's, and for /sys/fs/cgroup on hybrid hosts. A volume with `rshared` must
therefore not lie in the same mount as the state directory.
"""

from __future__ import annotations

import os
import stat

from wherry_task.monitor import idmapped, libc, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

CGROUP = "/sys/fs/cgroup"
_UNIFIED = CGROUP + "/unified"
_PAGE = 4096
_MAX_MOUNTS = 256
_NULL = "/dev/null"

_SET = {
    "ro": libc.MS_RDONLY, "nosuid": libc.MS_NOSUID, "nodev": libc.MS_NODEV, "noexec": libc.MS_NOEXEC,
    "sync": libc.MS_SYNCHRONOUS, "dirsync": libc.MS_DIRSYNC, "mand": libc.MS_MANDLOCK, "noatime": libc.MS_NOATIME,
    "nodiratime": libc.MS_NODIRATIME, "relatime": libc.MS_RELATIME, "strictatime": libc.MS_STRICTATIME,
    "bind": libc.MS_BIND, "rbind": libc.MS_BIND | libc.MS_REC, "remount": libc.MS_REMOUNT,
}  # fmt: skip
_CLEAR = {
    "rw": libc.MS_RDONLY, "suid": libc.MS_NOSUID, "dev": libc.MS_NODEV, "exec": libc.MS_NOEXEC,
    "async": libc.MS_SYNCHRONOUS, "nomand": libc.MS_MANDLOCK, "atime": libc.MS_NOATIME,
    "diratime": libc.MS_NODIRATIME, "norelatime": libc.MS_RELATIME, "nostrictatime": libc.MS_STRICTATIME,
    "defaults": 0,
}  # fmt: skip
_PROPAGATION = {
    "shared": libc.MS_SHARED, "slave": libc.MS_SLAVE, "private": libc.MS_PRIVATE, "unbindable": libc.MS_UNBINDABLE,
}  # fmt: skip
_PROPAGATION |= {f"r{name}": flag | libc.MS_REC for name, flag in _PROPAGATION.items()}


def enter_namespace(bundle: str) -> None:
    """Take a private copy of the mount namespace, fit for the mounts of this bundle and for every runtime."""
    libc.unshare_mounts()
    _enslave_mount_of(bundle)
    _cover_null(bundle)
    _hide_unified()


def _enslave_mount_of(path: str) -> None:
    while True:
        try:
            libc.mount(None, path, None, libc.MS_SLAVE)
        except OSError:  # EINVAL: not the root of a mount, so its parent is asked
            if path == "/":
                raise
            path = os.path.dirname(path)
        else:
            return


def _cover_null(bundle: str) -> None:
    """Put another null device over /dev/null. A runtime gives its owner away, to the container's user, where it is a
    standard stream; who has it as one, or at /dev/null in a user namespace, may change its mode: the host's, for all.
    """
    libc.mount("tmpfs", bundle, "tmpfs", libc.MS_NOSUID | libc.MS_NOEXEC, "size=4k,mode=0700")
    try:
        own = os.path.join(bundle, "null")
        os.mknod(own, stat.S_IFCHR, os.makedev(1, 3))
        os.chmod(own, 0o666)  # noqa: S103 - as every null device
        _enslave_mount_of("/dev")
        libc.mount(own, _NULL, None, libc.MS_BIND)
    except PermissionError:
        return  # we are in a user namespace ourselves: the host's is not ours to change, nor then the container's
    finally:
        libc.unmount(bundle, libc.MNT_DETACH)


def _hide_unified() -> None:
    """On a host with cgroup v1 cover the v2 mount beside it: crun refuses hybrids, and no limit lives there."""
    if not os.path.exists(_UNIFIED + "/cgroup.controllers"):
        return
    # First of all cut the propagation, or the host would lose the mount too.
    libc.mount(None, CGROUP, None, libc.MS_PRIVATE)
    # Covered, not unmounted: crun writes there in any case, and what it writes shall go with this namespace.
    libc.mount("tmpfs", _UNIFIED, "tmpfs", 0, "size=64k,mode=0700")


def mount_rootfs(mounts: Sequence[dict[str, Any]], target: str) -> None:
    """Mount a snapshot's mounts ({type, source, options}) one over the other. Raises Failure, and leaves none."""
    if len(mounts) > _MAX_MOUNTS:
        raise wire.Failure(wire.INVALID, f"{len(mounts)} mounts for one root file system")
    os.makedirs(target, 0o755, exist_ok=True)
    if not stat.S_ISDIR(os.lstat(target).st_mode):
        raise wire.Failure(wire.INVALID, f"{target} is not a directory")
    done: list[str] = []
    for each, place in _places(mounts, target):
        try:
            os.makedirs(place, 0o755, exist_ok=True)
            _mount(each, place)
            done.append(place)
        except OSError as error:
            for mounted in reversed(done):
                libc.unmount(mounted, libc.MNT_DETACH | libc.UMOUNT_NOFOLLOW)
            raise wire.failure_of(error, f"root file system ({each.get('type')} {each.get('source')})") from None


def _places(mounts: Sequence[dict[str, Any]], target: str) -> list[tuple[dict[str, Any], str]]:
    """Each mount and where it goes: all on `target`, unless the last one is made of those before it.

    That is told by its type `format/...`, and by `{{ overlay FIRST LAST }}` in its options, for the places of those
    mounts (containerd's form). They lie in a small tmpfs that the last mount covers, and go with it.
    """
    if not mounts or not mounts[-1]["type"].startswith("format/"):
        return [(each, target) for each in mounts]
    *first, last = mounts
    kind = last["type"].removeprefix("format/")
    options = [_joined(option, target) for option in last.get("options") or []]
    ground = {"type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "noexec", "mode=0700", "size=64k"]}
    below = [(each, f"{target}/{number}") for number, each in enumerate(first)]
    return [(ground, target), *below, ({**last, "type": kind, "options": options}, target)]


def _joined(option: str, target: str) -> str:
    before, found, rest = option.partition("{{ overlay ")
    numbers, _, after = rest.partition(" }}")
    if not found:
        return option
    first, last = numbers.split(" ")
    return before + ":".join(f"{target}/{number}" for number in range(int(first), int(last) + 1)) + after


def unmount_rootfs(target: str) -> None:
    """Undo mount_rootfs, and whatever else lies mounted there."""
    while True:
        try:
            libc.unmount(target, libc.MNT_DETACH | libc.UMOUNT_NOFOLLOW)
        except OSError:  # EINVAL: no mount is left
            return


def _mount(each: dict[str, Any], target: str) -> None:
    if each.get("target"):
        raise wire.Failure(wire.UNIMPLEMENTED, f"a mount below the root file system ({each['target']})")
    flags, propagation, data = parse_options(each.get("options") or [])
    kind, source = each["type"], each.get("source") or ""
    maps = idmapped.mapping(data) if kind == "overlay" else None
    if maps:
        idmapped.mounted(target, data, maps, lambda given: _mount_overlay(target, given, flags))
    elif kind == "overlay":
        _mount_overlay(target, data, flags)
    else:
        libc.mount(source or kind, target, kind, flags, ",".join(data))
    if flags & libc.MS_BIND and flags & ~(libc.MS_BIND | libc.MS_REC):
        # The first call binds and ignores every other flag; only a remount applies them.
        libc.mount(None, target, None, flags & ~libc.MS_REC | libc.MS_REMOUNT)
    for flag in propagation:
        libc.mount(None, target, None, flag)


def parse_options(options: Sequence[str]) -> tuple[int, list[int], list[str]]:
    """fstab's words as (mount flags, propagation changes, the file system's own options)."""
    flags, propagation, data = 0, [], []
    for option in options:
        if option in _SET:
            flags |= _SET[option]
        elif option in _CLEAR:
            flags &= ~_CLEAR[option]
        elif option in _PROPAGATION:
            propagation.append(_PROPAGATION[option])
        elif option == "loop":
            raise wire.Failure(wire.UNIMPLEMENTED, "loop mounts")
        else:
            data.append(option)
    return flags, propagation, data


def _mount_overlay(target: str, data: Sequence[str], flags: int) -> None:
    """mount(2) takes one page of options: name the layers from the directory they share, else use fsopen(2)."""
    words = ",".join(data)
    if len(words) < _PAGE - 1:
        libc.mount("overlay", target, "overlay", flags, words)
        return
    layers = next((option[9:].split(":") for option in data if option.startswith("lowerdir=")), [])
    base = os.path.commonpath(layers)
    short = [option for option in data if not option.startswith("lowerdir=")]
    short.append("lowerdir=" + ":".join(os.path.relpath(layer, base) for layer in layers))
    if len(",".join(short)) >= _PAGE - 1:
        libc.mount_overlay(target, _overlay_options(data), flags & 15)
        return
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.chdir(base)
        libc.mount("overlay", target, "overlay", flags, ",".join(short))
    finally:
        os.fchdir(here)
        os.close(here)


def _overlay_options(data: Sequence[str]) -> list[tuple[str, str | None]]:
    """One pair per option, one `lowerdir+` per layer: together they pass the page that mount(2) is bound to."""
    pairs: list[tuple[str, str | None]] = []
    for option in data:
        key, separator, value = option.partition("=")
        if key == "lowerdir":
            pairs += [("lowerdir+", layer) for layer in value.split(":")]
        else:
            pairs.append((key, value if separator else None))
    return pairs

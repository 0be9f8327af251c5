"""The system calls that `os` lacks, through ctypes; every failure is an OSError that names what was attempted."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x20000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME = 32, 64, 128, 1024, 2048
MS_BIND, MS_REC, MS_RELATIME, MS_STRICTATIME = 4096, 16384, 1 << 21, 1 << 24
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGTERM, SIGCHLD, SIGXFSZ = 1, 2, 9, 13, 15, 17, 25

_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 4, 15, 36
_SFD_FLAGS = 0o2004000  # SFD_NONBLOCK | SFD_CLOEXEC
_IN_FLAGS = 0o2004000
IN_MODIFY = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2). Paths may be relative to the working directory; `data` is bounded by the kernel to one page."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    result = _libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(data) if data else None)
    _checked(result, f"mount {kind or source or ''} on {target}")


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_libc.umount2(os.fsencode(target), flags), f"unmount {target}")


def unshare_mounts() -> None:
    """Give this process a copy of its mount namespace; propagation stays as it was."""
    _checked(_libc.unshare(CLONE_NEWNS), "unshare the mount namespace")


def become_subreaper() -> None:
    """Orphaned descendants become children of this process, not of init."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "become a subreaper")


def rename_process(name: str) -> None:
    """What ps and /proc/PID/comm show, 15 bytes at most."""
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def forbid_dumps() -> None:
    """No core file and no ptrace of this process by anyone without CAP_SYS_PTRACE, its own uid included."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def signal_descriptor(*signals: int) -> int:
    """Block the signals for good and return a non-blocking signalfd that becomes readable with them."""
    mask = (ctypes.c_ulong * 16)(sum(1 << (number - 1) for number in signals))
    _checked(_libc.sigprocmask(0, mask, None), "block signals")
    return _checked(_libc.signalfd(-1, mask, _SFD_FLAGS), "signalfd")


def watch_modifications(path: str) -> int:
    """A non-blocking inotify descriptor that becomes readable when the file changes."""
    fd = _checked(_libc.inotify_init1(_IN_FLAGS), "inotify")
    try:
        _checked(_libc.inotify_add_watch(fd, os.fsencode(path), IN_MODIFY), f"watch {path}")
    except OSError:
        os.close(fd)
        raise
    return fd


def kill(pid: int, signal: int) -> None:
    """kill(2) of a process that may be gone already."""
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        return


def _syscall(number: int, what: str, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words), what)


def mount_overlay(target: str, options: list[tuple[str, str | None]], attributes: int) -> None:
    """Mount an overlay through fsopen(2), one option at a time: no page limit (Linux 6.5 for `lowerdir+`).

    Raises OSError(ENOSYS or EINVAL) where the kernel is older. `attributes` are MOUNT_ATTR bits, which equal
    MS_RDONLY, MS_NOSUID, MS_NODEV and MS_NOEXEC for those four.
    """
    context = _syscall(430, "fsopen overlay", b"overlay", 1)
    try:
        for key, value in options:
            word = None if value is None else os.fsencode(value)
            _syscall(431, f"overlay option {key}={value}", context, 0 if word is None else 1, key.encode(), word, 0)
        _syscall(431, "create the overlay", context, 6, None, None, 0)
        tree = _syscall(432, "fsmount overlay", context, 1, attributes)
    finally:
        os.close(context)
    try:
        _syscall(429, f"move_mount to {target}", tree, b"", -100, os.fsencode(target), 4)
    finally:
        os.close(tree)

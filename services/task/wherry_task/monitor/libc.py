"""The system calls that `os` lacks, through ctypes; every failure is an OSError that names what was attempted.

The functions are looked up, and the buffers and constants made, at import: in a forked monitor each first use would
otherwise cost some 200 KiB of private pages.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x20000
_CLONE_NEWUSER = 0x10000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC, MS_NOATIME, MS_NODIRATIME = 32, 64, 128, 1024, 2048
MS_BIND, MS_REC, MS_RELATIME, MS_STRICTATIME = 4096, 16384, 1 << 21, 1 << 24
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

SIGKILL, SIGPIPE, SIGTERM, SIGCHLD, SIGXFSZ = 9, 13, 15, 17, 25

_PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 4, 15, 36
_NONBLOCK_CLOEXEC = 0o2004000  # for signalfd, inotify and accept4 alike
_AF_UNIX, _SOCK_SEQPACKET, _SOCK_CLOEXEC, _MSG_CMSG_CLOEXEC = 1, 5, 0o2000000, 0x40000000
_IN_MODIFY = 2
_EINVAL = 22
# SIGHUP, SIGINT, SIGTERM and SIGCHLD as a sigset_t
_MASK = sum(1 << (number - 1) for number in (1, 2, 15, 17)).to_bytes(128, "little")

MAX_PASSED = 30  # descriptors in one message
MAX_MESSAGE = 160 << 10  # below the default buffer of a SOCK_SEQPACKET socket


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Message(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32), ("iov", ctypes.c_void_p),
        ("iov_length", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]  # fmt: skip


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_prctl, _setns, _unshare, _kernel = _libc.prctl, _libc.setns, _libc.unshare, _libc.syscall
_sigprocmask, _signalfd, _accept4, _socketpair = _libc.sigprocmask, _libc.signalfd, _libc.accept4, _libc.socketpair
_recvmsg, _mount, _umount2 = _libc.recvmsg, _libc.mount, _libc.umount2
_get_errno = ctypes.get_errno
_poll, _fork = _libc.poll, ctypes.PyDLL(None, use_errno=True).fork

_pair = (ctypes.c_int * 2)()
_data = ctypes.create_string_buffer(MAX_MESSAGE)
_CONTROL_LENGTH = 16 + 4 * MAX_PASSED
_control = ctypes.create_string_buffer(_CONTROL_LENGTH)
_iovec = _Iovec(ctypes.addressof(_data), MAX_MESSAGE)
_message = _Message(None, 0, ctypes.addressof(_iovec), 1, ctypes.addressof(_control), _CONTROL_LENGTH, 0)
_message_pointer = ctypes.pointer(_message)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = _get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2). Paths may be relative to the working directory; `data` is bounded by the kernel to one page."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    result = _mount(*words, ctypes.c_ulong(flags), os.fsencode(data) if data else None)
    _checked(result, f"mount {kind or source or ''} on {target}")


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _checked(_umount2(os.fsencode(target), flags), f"unmount {target}")


def unshare_mounts() -> None:
    """Give this process a copy of its mount namespace; propagation stays as it was."""
    _checked(_unshare(CLONE_NEWNS), "unshare the mount namespace")


def enter_mounts(namespace: int) -> None:
    """setns(2) into a mount namespace; the working directory becomes its root."""
    _checked(_setns(namespace, CLONE_NEWNS), "enter a mount namespace")


def become_subreaper() -> None:
    """Orphaned descendants become children of this process, not of init."""
    _checked(_prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "become a subreaper")


def rename_process(name: bytes) -> None:
    """What ps and /proc/PID/comm show, 15 bytes at most."""
    _prctl(_PR_SET_NAME, name, 0, 0, 0)


def forbid_dumps() -> None:
    """No core file and no ptrace of this process by anyone without CAP_SYS_PTRACE, its own uid included."""
    _prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def signal_descriptor() -> int:
    """Block SIGHUP, SIGINT, SIGTERM and SIGCHLD for good; a non-blocking signalfd becomes readable with them."""
    _checked(_sigprocmask(0, _MASK, None), "block signals")
    return _checked(_signalfd(-1, _MASK, _NONBLOCK_CLOEXEC), "signalfd")


def watch_modifications(path: str) -> int:
    """A non-blocking inotify descriptor that becomes readable when the file changes."""
    fd = _checked(_libc.inotify_init1(_NONBLOCK_CLOEXEC), "inotify")
    try:
        _checked(_libc.inotify_add_watch(fd, os.fsencode(path), _IN_MODIFY), f"watch {path}")
    except OSError:
        os.close(fd)
        raise
    return fd


def accept(listener: int) -> int:
    """A non-blocking connection. Raises OSError, also when none waits on a non-blocking listener."""
    return _checked(_accept4(listener, None, None, _NONBLOCK_CLOEXEC), "accept")


def fork() -> int:
    """fork(2), without what the interpreter does for threads: there must be none. It writes a fifth of the pages."""
    return _checked(_fork(), "fork")


def awaited(fds: tuple[int, ...]) -> ctypes.Array[ctypes.c_uint64]:
    """For `wait`: each as a struct pollfd that asks for POLLIN."""
    return (ctypes.c_uint64 * len(fds))(*(fd | 1 << 32 for fd in fds))


def wait(fds: ctypes.Array[ctypes.c_uint64], count: int) -> None:
    """poll(2) for as long as it takes until one of the first `count` is readable or hung up."""
    _poll(fds, count, -1)


def message_pair() -> tuple[int, int]:
    """Two ends of a socket that keeps messages apart and passes descriptors."""
    _checked(_socketpair(_AF_UNIX, _SOCK_SEQPACKET | _SOCK_CLOEXEC, 0, _pair), "socketpair")
    return _pair[0], _pair[1]


def receive(fd: int) -> tuple[bytes, list[int]]:
    """One message of at most MAX_MESSAGE bytes and the descriptors with it; (b"", []) at the end."""
    return received(_checked(take(fd), "recvmsg"))


def take(fd: int) -> int:
    """The first half of `receive`: the length of what now lies in the one buffer; negative when that failed."""
    _message.control_length = _CONTROL_LENGTH
    return int(_recvmsg(fd, _message_pointer, _MSG_CMSG_CLOEXEC))


def first_byte(size: int) -> bytes:
    """Of a message of that length in the buffer; b"" when it is empty."""
    return _data[0] if size > 0 else b""


def received(size: int) -> tuple[bytes, list[int]]:
    """The second half of `receive`."""
    fds = []
    if _message.control_length > 16:
        raw = _control.raw
        for at in range(16, int.from_bytes(raw[:8], "little"), 4):
            fds.append(int.from_bytes(raw[at : at + 4], "little"))
    return ctypes.string_at(_data, size), fds


def kill(pid: int, signal: int) -> None:
    """kill(2) of a process that may be gone already."""
    try:
        os.kill(pid, signal)
    except ProcessLookupError:
        return


def _syscall(number: int, what: str, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    return _checked(_kernel(ctypes.c_long(number), *words), what)


def mount_overlay(target: str, options: list[tuple[str, str | None]], attributes: int) -> None:
    """Mount an overlay through fsopen(2), one option at a time: no page limit (`lowerdir+` is newer than Linux 6.1).

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


def mount_mapped(source: str, target: str, namespace: int) -> None:
    """Show the directory `source`, without what is mounted below it, on `target`, with ids as in a user namespace.

    Raises OSError(EINVAL) where the kernel or the file system cannot (Linux 5.12; most file systems since 6.0).
    """
    tree = _syscall(428, f"open_tree {source}", -100, os.fsencode(source), 1 | os.O_CLOEXEC)  # OPEN_TREE_CLONE
    try:
        attributes = b"".join(word.to_bytes(8, "little") for word in (0x100000, 0, 0, namespace))  # MOUNT_ATTR_IDMAP
        _syscall(442, f"map the ids of {source}", tree, b"", 0x1000, attributes, len(attributes))
        _syscall(429, f"move_mount to {target}", tree, b"", -100, os.fsencode(target), 4)
    finally:
        os.close(tree)


def user_namespace(uids: str, gids: str) -> int:
    """A descriptor of a new user namespace with these maps; its child only waits and ends."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    ended, end = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        done = _unshare(_CLONE_NEWUSER) == 0
        os.close(end)
        os.write(tell, b"1" if done else b"0")
        os.read(ended, 1)
        os._exit(0)
    os.close(tell)
    os.close(ended)
    try:
        if os.read(told, 1) != b"1":
            raise OSError(_EINVAL, "there are no user namespaces")
        for name, lines in (("uid_map", uids), ("gid_map", gids)):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY)
            try:
                os.write(fd, lines.encode())
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(told)
        os.close(end)
        os.waitpid(pid, 0)

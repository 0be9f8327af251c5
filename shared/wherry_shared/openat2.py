"""openat2(2), which the standard library does not have: open a path that cannot lead out of a directory."""

from __future__ import annotations

import ctypes
import errno
import os

NO_XDEV = 0x01
NO_MAGICLINKS = 0x02
NO_SYMLINKS = 0x04
BENEATH = 0x08
IN_ROOT = 0x10

_SYS_OPENAT2 = 437  # the same on every architecture: numbers above 423 are shared
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_SIZE = ctypes.c_size_t(ctypes.sizeof(_How))


def openat2(directory: int, path: str | bytes, flags: int, resolve: int) -> int:
    """A descriptor for `path` below the descriptor `directory`; the empty path is the directory itself.

    resolve: RESOLVE_* of linux/openat2.h (NO_XDEV stops at bind mounts too, which have the same device number).
    Raises `OSError`; `ENOSYS` on kernels before 5.6. EAGAIN, a rename elsewhere in the tree meanwhile, is tried again.
    """
    how = _How(flags | os.O_CLOEXEC, 0, resolve)
    name = os.fsencode(path)
    while True:
        fd: int = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(directory), name or b".", ctypes.byref(how), _SIZE
        )
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            raise OSError(code, os.strerror(code), path)

"""A runtime that copies itself before each verb, copied once: crun, started from a sealed memory file.

crun will not run from a file that a container could write through /proc/PID/exe (CVE-2019-5736): unless its own is
sealed, it copies itself into a sealed memory file and starts again from there, 2 ms on each create and exec. Started
from such a file it finds itself guarded already. The zygote makes one; all monitors inherit it.
"""

from __future__ import annotations

import fcntl
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

NUMBER: Final = 21  # its descriptor in the zygote and all that come of it: above what a rehearsal uses
PROGRAM = f"/proc/self/fd/{NUMBER}"
_NAME = "crun"
_EXECUTABLE = 0x10  # MFD_EXEC, Linux 6.3: asked for where a memory file may not be executed unless it says so
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# Where these rule, a program's rights come with its file, and a copy would run without them.
_LABELLED = ("/sys/fs/selinux/enforce", "/sys/fs/smackfs/load2")
_PROFILES = "/sys/kernel/security/apparmor/profiles"

_of: tuple[str, tuple[int, ...]] = ("", ())


def make(name: str = _NAME) -> None:
    """Make the copy, where that runtime is installed and a copy is as good. Without one, nothing else changes."""
    global _of
    path = next((p for d in os.environ.get("PATH", "").split(":") if os.access(p := f"{d}/{name}", os.X_OK)), "")
    if not path or any(map(os.path.exists, _LABELLED)) or _has_profile(name):
        return
    try:
        source = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        if os.pread(source, 4, 0) == b"\x7fELF":  # a script would be read by its interpreter, from a closed descriptor
            _copy(source, name)
            _of = path, _identity(os.fstat(source))
    except OSError:
        return  # memory files, or executing them, may be forbidden
    finally:
        os.close(source)


def _copy(source: int, name: str) -> None:
    try:
        copy = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _EXECUTABLE)
    except OSError:
        copy = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        while os.sendfile(copy, source, None, 1 << 30):
            pass
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        os.dup2(copy, NUMBER, inheritable=False)
    finally:
        os.close(copy)


def program(binary: str) -> str:
    """What to execute for this binary: the copy while it is one of the file as it is now, else the file."""
    path, identity = _of
    if binary != path:
        return binary
    try:
        return PROGRAM if _identity(os.stat(path)) == identity else binary
    except OSError:
        return binary


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Another one, or changed, is told by the time of change, which nobody can set."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _has_profile(name: str) -> bool:
    """Whether AppArmor knows the program by its path."""
    try:
        with open(_PROFILES) as file:
            return any(f"/{name}" in line or line.startswith(f"{name} ") for line in file)
    except OSError:
        return False

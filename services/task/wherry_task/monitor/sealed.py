"""A runtime that guards itself at the beginning of each verb, copied once: crun and runc, from sealed memory files.

They will not run from a file that a container could write through /proc/PID/exe (CVE-2019-5736): unless its own is
sealed, crun copies itself into a sealed memory file and runc mounts itself read-only, and each starts again from there,
1 to 2 ms on every create and exec. Started from such a file they find themselves guarded already. All monitors inherit
the memory files from the zygote; the first that needs one fills it.
"""

from __future__ import annotations

import fcntl
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# Their descriptors in the zygote and all that come of it: above what a rehearsal uses.
NUMBERS: Final = {"crun": 21, "runc": 22}
FIRST, LAST = min(NUMBERS.values()), max(NUMBERS.values())
_EXECUTABLE = 0x10  # MFD_EXEC, Linux 6.3: asked for where a memory file may not be executed unless it says so
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# Where these rule, a program's rights come with its file, and a copy would run without them.
_LABELLED = ("/sys/fs/selinux/enforce", "/sys/fs/smackfs/load2")
_PROFILES = "/sys/kernel/security/apparmor/profiles"

_numbers: dict[str, int] = {}


def make() -> None:
    """Make room for the copies, where a runtime is installed and a copy is as good. Without, nothing else changes."""
    for name, number in NUMBERS.items():
        path = next((p for d in os.environ.get("PATH", "").split(":") if os.access(p := f"{d}/{name}", os.X_OK)), "")
        if not path or any(map(os.path.exists, _LABELLED)) or _has_profile(name):
            continue
        try:
            _put(_memory_file(name), number)
        except OSError:
            continue  # memory files may be forbidden
        _numbers[path] = number


def _memory_file(name: str) -> int:
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _EXECUTABLE)
    except OSError:
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _put(fd: int, number: int) -> None:
    try:
        os.dup2(fd, number, inheritable=False)
    finally:
        os.close(fd)


def program(binary: str) -> str:
    """What to execute for this binary: the copy while it is one of the file as it is now, else the file.

    Whoever is the first to ask makes the copy: what nobody runs takes no memory.
    """
    number = _numbers.get(binary)
    if number is None:
        return binary
    try:
        of = _identity(os.stat(binary))
        if fcntl.fcntl(number, fcntl.F_GET_SEALS) != _SEALS and not _fill(number, binary):
            return binary
        end = os.fstat(number).st_size - len(of)
        return f"/proc/self/fd/{number}" if os.pread(number, len(of), end) == of else binary
    except OSError:
        return binary


def _fill(copy: int, binary: str) -> bool:
    """Copy the file, then what it was, and seal both. False where that is no program, or another process is at it."""
    source = os.open(binary, os.O_RDONLY)
    try:
        if os.pread(source, 4, 0) != b"\x7fELF":  # a script would be read by its interpreter, from a closed descriptor
            return False
        fcntl.lockf(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process's own, though all share the descriptor
        os.ftruncate(copy, 0)  # somebody may have died of it
        os.lseek(copy, 0, os.SEEK_SET)
        of = _identity(os.fstat(source))
        while os.sendfile(copy, source, None, 1 << 30):
            pass
        os.write(copy, of)
        if _identity(os.fstat(source)) != of:
            return False
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
        return True
    finally:
        os.close(source)


def _identity(status: os.stat_result) -> bytes:
    """Another one, or changed, is told by the time of change, which nobody can set."""
    return b"\n%d %d %d %d %d" % (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def _has_profile(name: str) -> bool:
    """Whether AppArmor knows the program by its path."""
    try:
        with open(_PROFILES) as file:
            return any(f"/{name}" in line or line.startswith(f"{name} ") for line in file)
    except OSError:
        return False

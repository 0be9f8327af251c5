"""The capabilities of a process: Docker's usual set, more or fewer of them; nothing is ever inheritable or ambient."""

from __future__ import annotations

from collections.abc import Sequence

from wherry_shared.errors import InvalidArgument

# Docker's usual set; nothing is inheritable (GHSA-c9cp-9c75-9v8c).
USUAL = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
]  # fmt: skip
# In the order of their numbers in linux/capability.h, up to Linux 5.9; there have been none since.
_NUMBERED = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
EVERY = [f"CAP_{name}" for name in _NUMBERED.split()]
ALL = "ALL"


def every() -> list[str]:
    """All that this host has to give: its kernel may know fewer, and its own root may have been left fewer."""
    with open("/proc/self/status") as status:
        bounds = next((line.split()[1] for line in status if line.startswith("CapBnd:")), "")
    held = int(bounds, 16) if bounds else -1
    return [name for number, name in enumerate(EVERY) if held >> number & 1]


def chosen(add: Sequence[str] = (), drop: Sequence[str] = ()) -> list[str]:
    """The usual set with some added and some dropped, by Docker's rules: names with or without `CAP_`, in any case;
    `ALL` is every one, and what is named beside it on the other side wins. InvalidArgument: no such capability."""
    more, fewer = [_name(n) for n in add], {_name(n) for n in drop}
    if ALL in more:
        return [name for name in every() if name not in fewer]
    base = [] if ALL in fewer else USUAL
    return [name for name in EVERY if (name in base and name not in fewer) or name in more]


def _name(text: str) -> str:
    name = text.upper()
    if name == ALL:
        return name
    name = name if name.startswith("CAP_") else f"CAP_{name}"
    if name not in EVERY:
        raise InvalidArgument(f"no capability {text[:40]!r}")
    return name

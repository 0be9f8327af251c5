"""The OCI runtime specification that the client writes from an image and a caller's wishes; safe by default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wherry_shared.errors import InvalidArgument

from .registry.documents import ImageConfig

# The lowest that what is used here needs; older runtimes refuse newer numbers.
OCI_VERSION = "1.0.2"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Docker's usual set; nothing is inheritable (GHSA-c9cp-9c75-9v8c).
CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
    "CAP_AUDIT_WRITE",
]  # fmt: skip
MASKED = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
    "/sys/devices/virtual/powercap",
]  # fmt: skip
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_NS = ["nosuid", "noexec", "nodev"]
MOUNTS: list[dict[str, Any]] = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": _NS},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
     "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
     "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*_NS, "mode=1777", "size=65536k"]},  # noqa: S108 - inside the container
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _NS},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_NS, "ro"]},
]  # fmt: skip


@dataclass(frozen=True)
class User:
    """A user inside the container, by numbers."""

    uid: int = 0
    gid: int = 0
    additional_gids: Sequence[int] = ()


@dataclass(frozen=True)
class Options:
    """What a caller wishes beyond the image. args and entrypoint replace the image's command and entrypoint."""

    args: Sequence[str] = ()
    entrypoint: Sequence[str] | None = None
    env: Sequence[str] = ()
    cwd: str = ""
    user: str = ""
    hostname: str = ""
    terminal: bool = False
    read_only: bool = False
    host_network: bool = False
    mounts: Sequence[dict[str, Any]] = ()
    annotations: dict[str, str] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)


def command(image: ImageConfig | None, options: Options) -> list[str]:
    """What runs: Docker's rules for entrypoint and command. InvalidArgument when nothing does."""
    entrypoint = list(options.entrypoint if options.entrypoint is not None else (image.entrypoint if image else ()))
    default = list(image.cmd) if image and options.entrypoint is None else []
    args = entrypoint + (list(options.args) or default)
    if not args:
        raise InvalidArgument("nothing to run: neither the image nor the caller names a command")
    return args


def environment(image: ImageConfig | None, extra: Sequence[str]) -> list[str]:
    """The image's environment with the caller's on top; `PATH` is always there."""
    merged = {"PATH": DEFAULT_PATH}
    for item in [*(image.env if image else ()), *extra]:
        name, separator, value = item.partition("=")
        if not name or "\0" in item:
            raise InvalidArgument(f"environment {item[:80]!r} is not NAME=VALUE")
        if separator:
            merged[name] = value
        else:
            merged.pop(name, None)
    return [f"{name}={value}" for name, value in merged.items()]


def working_directory(image: ImageConfig | None, wish: str) -> str:
    """Where the process starts. InvalidArgument for a path that is not absolute, or that leads through /proc/self
    (CVE-2024-21626)."""
    cwd = wish or (image.working_dir if image else "") or "/"
    parts = [p for p in cwd.split("/") if p not in ("", ".")]
    if not cwd.startswith("/") or ".." in parts:
        raise InvalidArgument(f"working directory {cwd!r} is not an absolute path without '..'")
    if parts[:1] == ["proc"] and len(parts) > 1:
        raise InvalidArgument(f"working directory {cwd!r} lies under /proc")
    return "/" + "/".join(parts)


def process(args: Sequence[str], *, env: Sequence[str], cwd: str, user: User, terminal: bool = False) -> dict[str, Any]:
    """An OCI `process`."""
    return {
        "terminal": terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)},
        "args": list(args),
        "env": list(env),
        "cwd": cwd,
        "capabilities": {
            "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    }  # fmt: skip


def make(container_id: str, image: ImageConfig | None, options: Options, user: User) -> dict[str, Any]:
    """The whole specification. The cgroup path is left to the task service, which knows its node's."""
    namespaces = ["pid", "ipc", "uts", "mount", *([] if options.host_network else ["network"])]
    return {
        "ociVersion": OCI_VERSION,
        "process": process(
            command(image, options),
            env=environment(image, [*(["TERM=xterm"] if options.terminal else []), *options.env]),
            cwd=working_directory(image, options.cwd),
            user=user,
            terminal=options.terminal,
        ),
        "root": {"path": "rootfs", "readonly": options.read_only},
        "hostname": options.hostname or container_id[:63],
        "mounts": [*MOUNTS, *options.mounts],
        "annotations": options.annotations,
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "resources": {"devices": [{"allow": False, "access": "rwm"}], **options.resources},
        },
    }

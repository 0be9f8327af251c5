"""The OCI runtime specification that the client writes from an image and a caller's wishes; safe by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wherry_shared.errors import InvalidArgument

from . import capabilities, cdi, limits, seccomp, volumes
from .devices import EVERYTHING, NOTHING, Device, all_of_host
from .registry.documents import ImageConfig
from .registry.platforms import default_platform, normalise

# The lowest that what is used here needs; older runtimes refuse newer numbers.
OCI_VERSION = "1.0.2"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES = capabilities.USUAL
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
# Kinds of namespaces that a caller may choose; `mount` is always the container's own.
INIT = "/dev/init"  # where a container has the init of the node's
KINDS = ("pid", "ipc", "uts", "network", "cgroup")
PRIVATE, HOST = "private", "host"
RLIMITS: Mapping[str, tuple[int, int]] = {"RLIMIT_NOFILE": (1024, 1024)}
ID_MAX = (1 << 31) - 1
"""The last id of a user or group (GHSA-265r-hfxg-fhmg)."""


@dataclass(frozen=True)
class User:
    """A user inside the container, by numbers."""

    uid: int = 0
    gid: int = 0
    additional_gids: Sequence[int] = ()


IdMap = Sequence[tuple[int, int, int]]
"""Ranges of ids: the first inside, the first on the host, how many."""


@dataclass(frozen=True)
class Options:
    """What a caller wishes beyond the image. args and entrypoint replace the image's command and entrypoint.

    env: NAME=VALUE; NAME alone takes one out. user: name|uid[:group|gid]; groups: further ones, by name or number.
    host_network: the same as namespaces["network"] = "host". namespaces: `private` (all of them, unless told
    otherwise), `host`, or a namespace's path on the node, by kind (KINDS). mounts: OCI mounts (`wherry.volumes` makes
    them). resources: an OCI LinuxResources (`wherry.limits` makes one). rlimits: (soft, hard) by `RLIMIT_NAME`.
    cap_add, cap_drop: as Docker's. seccomp: an OCI profile, "default", "compatible" (programs of older architectures
    too) or "unconfined". no_new_privileges: True, unless privileged. privileged: every capability and device of the
    node, nothing masked or filtered. uid_mappings, gid_mappings: a user namespace whose root is nobody on the host.
    cdi_devices: VENDOR/CLASS=NAME, looked up on this host. stop_signal: instead of the image's.
    init: a static program of the node that becomes process 1 (tini, say), reaps, and passes signals on.
    """

    args: Sequence[str] = ()
    entrypoint: Sequence[str] | None = None
    env: Sequence[str] = ()
    cwd: str = ""
    user: str = ""
    groups: Sequence[str] = ()
    hostname: str = ""
    domainname: str = ""
    terminal: bool = False
    read_only: bool = False
    host_network: bool = False
    namespaces: Mapping[str, str] = field(default_factory=dict)
    mounts: Sequence[dict[str, Any]] = ()
    devices: Sequence[Device] = ()
    device_rules: Sequence[dict[str, Any]] = ()
    cdi_devices: Sequence[str] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    rlimits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    sysctls: Mapping[str, str] = field(default_factory=dict)
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    seccomp: str | dict[str, Any] = seccomp.DEFAULT
    apparmor: str = ""
    no_new_privileges: bool | None = None
    masked: bool = True
    privileged: bool = False
    oom_score_adj: int | None = None
    cgroup: str = ""
    uid_mappings: IdMap = ()
    gid_mappings: IdMap = ()
    hooks: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    stop_signal: str = ""
    init: str = ""

    def namespace(self, kind: str) -> str:
        """`private`, `host` or a path."""
        usual = HOST if kind == "cgroup" or (kind == "network" and self.host_network) else PRIVATE
        return self.namespaces.get(kind) or usual

    def capabilities(self) -> list[str]:
        """What the process may be at most. InvalidArgument: an unknown one."""
        return capabilities.every() if self.privileged else capabilities.chosen(self.cap_add, self.cap_drop)


def command(image: ImageConfig | None, options: Options) -> list[str]:
    """What runs: Docker's rules for entrypoint and command. InvalidArgument when nothing does."""
    entrypoint = list(options.entrypoint if options.entrypoint is not None else (image.entrypoint if image else ()))
    default = list(image.cmd) if image and options.entrypoint is None else []
    args = entrypoint + (list(options.args) or default)
    if not args:
        raise InvalidArgument("nothing to run: neither the image nor the caller names a command")
    if any("\0" in arg for arg in args):
        raise InvalidArgument("an argument has a zero byte in it")
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
    """Where the process starts. InvalidArgument for a path that is not absolute, or that leads through /proc
    (CVE-2024-21626)."""
    cwd = wish or (image.working_dir if image else "") or "/"
    parts = [p for p in cwd.split("/") if p not in ("", ".")]
    if not cwd.startswith("/") or ".." in parts or "\0" in cwd:
        raise InvalidArgument(f"working directory {cwd!r} is not an absolute path without '..'")
    if parts[:1] == ["proc"] and len(parts) > 1:
        raise InvalidArgument(f"working directory {cwd!r} lies under /proc")
    return "/" + "/".join(parts)


def process(
    args: Sequence[str], *, env: Sequence[str], cwd: str, user: User, terminal: bool = False,
    allowed: Sequence[str] = CAPABILITIES, rlimits: Mapping[str, tuple[int, int]] = RLIMITS,
    no_new_privileges: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """An OCI `process`."""
    return {
        "terminal": terminal,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.additional_gids)},
        "args": list(args),
        "env": list(env),
        "cwd": cwd,
        "capabilities": {"bounding": list(allowed), "effective": list(allowed), "permitted": list(allowed)},
        "rlimits": [{"type": kind, "soft": soft, "hard": hard} for kind, (soft, hard) in rlimits.items()],
        "noNewPrivileges": no_new_privileges,
    }


def make(container_id: str, image: ImageConfig | None, options: Options, user: User) -> dict[str, Any]:
    """The whole specification. The cgroup path is left to the task service, which knows its node's, unless the caller
    names one. InvalidArgument: a wish that is malformed, or that another one rules out."""
    _check(options)
    made: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": _process(container_id, image, options, user),
        "root": {"path": "rootfs", "readonly": options.read_only},
        "mounts": _mounts(options),
        "annotations": dict(options.annotations),
        "linux": _linux(image, options),
    }
    if options.namespace("uts") == PRIVATE:
        made["hostname"] = options.hostname or container_id[:63]
        if options.domainname:
            made |= {"domainname": options.domainname, "ociVersion": "1.1.0"}
    if options.hooks:
        made["hooks"] = {kind: list(hooks) for kind, hooks in options.hooks.items()}
    if options.cdi_devices:
        cdi.apply(made, cdi.edits(options.cdi_devices))
    return made


def _check(options: Options) -> None:
    if unknown := set(options.namespaces) - set(KINDS):
        raise InvalidArgument(f"no namespace {', '.join(sorted(unknown))} can be chosen: {', '.join(KINDS)} can")
    for kind, where in options.namespaces.items():
        if where not in ("", PRIVATE, HOST) and not where.startswith("/"):
            raise InvalidArgument(f"{kind} namespace {where[:80]!r} is not private, host or a path")
    if (options.hostname or options.domainname) and options.namespace("uts") != PRIVATE:
        raise InvalidArgument("a host name needs a UTS namespace of the container's own")
    if options.init and options.namespace("pid") != PRIVATE:
        raise InvalidArgument("an init needs a PID namespace of the container's own, or it is not process 1")
    shared = [kind for kind in KINDS if options.namespace(kind) == HOST]
    for name, value in options.sysctls.items():
        limits.sysctl(name, value, shared)
    if bool(options.uid_mappings) != bool(options.gid_mappings):
        raise InvalidArgument("a user namespace needs mappings of user and of group ids")
    if options.uid_mappings and options.privileged:
        raise InvalidArgument("a privileged container cannot have a user namespace")
    if options.oom_score_adj is not None and not -1000 <= options.oom_score_adj <= 1000:
        raise InvalidArgument(f"oom-score-adj {options.oom_score_adj} is not between -1000 and 1000")


def _process(container_id: str, image: ImageConfig | None, options: Options, user: User) -> dict[str, Any]:
    own = [] if options.namespace("uts") != PRIVATE else [f"HOSTNAME={options.hostname or container_id[:63]}"]
    nothing_new = options.no_new_privileges
    made = process(
        [*((INIT, "--") if options.init else ()), *command(image, options)],
        env=environment(image, [*own, *(["TERM=xterm"] if options.terminal else []), *options.env]),
        cwd=working_directory(image, options.cwd),
        user=user,
        terminal=options.terminal,
        allowed=options.capabilities(),
        rlimits={**RLIMITS, **options.rlimits},
        no_new_privileges=not options.privileged if nothing_new is None else nothing_new,
    )
    if options.apparmor:
        made["apparmorProfile"] = options.apparmor
    if options.oom_score_adj is not None:
        made["oomScoreAdj"] = options.oom_score_adj
    return made


def _mounts(options: Options) -> list[dict[str, Any]]:
    defaults = MOUNTS
    if options.privileged:
        defaults = [_writable(m) if m["destination"] == "/sys" else m for m in MOUNTS]
    if options.uid_mappings and options.namespace("network") != PRIVATE:
        defaults = [_HOSTS_SYS if m["destination"] == _HOSTS_SYS["destination"] else m for m in defaults]
    if options.namespace("ipc") == HOST:
        defaults = [_HOSTS_SHM if m["destination"] == _HOSTS_SHM["destination"] else m for m in defaults]
    if options.namespace("cgroup") == PRIVATE:
        mode = "rw" if options.privileged else "ro"
        cgroup = {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": [*_NS, "relatime", mode],
        }
        defaults = [*defaults, cgroup]
    init = [volumes.bind(options.init, INIT, ["ro"])] if options.init else []
    return volumes.merged(defaults, [*options.mounts, *init])


# The host's own, asked for as such; /dev/mqueue shows the namespace's queues by itself.
_HOSTS_SHM: dict[str, Any] = {
    "destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", *_NS],  # noqa: S108
}  # fmt: skip

# A user namespace may mount sysfs for a network namespace of its own only.
_HOSTS_SYS: dict[str, Any] = {
    "destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", *_NS, "rro"],
}  # fmt: skip


def _writable(mount: dict[str, Any]) -> dict[str, Any]:
    return {**mount, "options": [option for option in mount["options"] if option != "ro"]}


def _linux(image: ImageConfig | None, options: Options) -> dict[str, Any]:
    rules = (
        [EVERYTHING] if options.privileged else [NOTHING, *(d.rule() for d in options.devices), *options.device_rules]
    )
    devices = [*(all_of_host() if options.privileged else ()), *options.devices]
    made: dict[str, Any] = {
        "namespaces": _namespaces(options),
        "maskedPaths": MASKED if options.masked and not options.privileged else [],
        "readonlyPaths": READ_ONLY if options.masked and not options.privileged else [],
        "resources": limits.merged({"devices": rules}, dict(options.resources)),
    }
    profile = _seccomp(image, options)
    optional = {
        "seccomp": profile,
        "devices": [device.node() for device in devices],
        "sysctl": dict(options.sysctls),
        "cgroupsPath": options.cgroup,
        "rootfsPropagation": volumes.root_propagation(options.mounts),
        "uidMappings": _id_map(options.uid_mappings),
        "gidMappings": _id_map(options.gid_mappings),
    }
    return made | {name: value for name, value in optional.items() if value}


def _namespaces(options: Options) -> list[dict[str, str]]:
    made = [{"type": "mount"}]
    for kind in KINDS:
        where = options.namespace(kind)
        if where != HOST:
            made.append({"type": kind} if where == PRIVATE else {"type": kind, "path": where})
    return [*made, {"type": "user"}] if options.uid_mappings else made


def _id_map(ranges: IdMap) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": size} for inside, outside, size in ranges]


def _seccomp(image: ImageConfig | None, options: Options) -> dict[str, Any] | None:
    if isinstance(options.seccomp, dict):
        return options.seccomp
    if options.privileged or options.seccomp == seccomp.UNCONFINED:
        return None
    if options.seccomp not in (seccomp.DEFAULT, seccomp.COMPATIBLE):
        raise InvalidArgument(f"seccomp {options.seccomp[:40]!r}: default, compatible, unconfined or a profile")
    compatible = options.seccomp == seccomp.COMPATIBLE
    return seccomp.default(architecture(image), options.capabilities(), compatible=compatible)


def architecture(image: ImageConfig | None) -> str:
    """The image's architecture in Go's words, this machine's where it names none that is known."""
    named = normalise(image.platform).architecture if image else ""
    return named if named in seccomp.ARCHITECTURES else default_platform().architecture

"""What a tenant's container may be. Whoever can mount the host or keep its namespaces is root on the node, so that is
for admins; a tenant's specification and mounts are held against this."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict
from wherry_shared.api.container import Container
from wherry_shared.context import Identity
from wherry_shared.errors import InvalidArgument, PermissionDenied
from wherry_shared.values import Mount, check_digest, explain

from .runtimes import PREFERRED

NAMESPACES = frozenset({"pid", "ipc", "uts", "mount", "network"})
FILESYSTEMS = frozenset({"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup"})
# What has the host's own knobs, and where alone it may lie: what is hidden and protected is that by these paths.
PLACES = {"proc": "/proc", "sysfs": "/sys", "cgroup": "/sys/fs/cgroup"}
# proc's are protected by READ_ONLY; of these nothing is to be written.
NOT_WRITTEN = frozenset({"sysfs", "cgroup"})
# `remount` would make another one's writable, `idmap` and `tmpcopyup` are more than a mount.
MOUNT_FLAGS = frozenset({
    "defaults", "ro", "rw", "rro", "nosuid", "nodev", "noexec", "exec", "noatime", "nodiratime", "relatime",
    "strictatime", "sync", "async", "private", "rprivate", "slave", "rslave", "newinstance",
})  # fmt: skip
MOUNT_VALUES = frozenset({"size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "ptmxmode", "max"})
# What a specification has to hide and to protect at least: the client's defaults.
MASKED = frozenset({
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
})  # fmt: skip
READ_ONLY = frozenset({"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"})
# Annotations by which a runtime is told to do more than the specification says.
# `org.criu.config` is a file of the host's by which CRIU, at a checkpoint, executes what it is told.
STEERING = (
    "run.oci.", "org.systemd.property.", "module.wasm.", "org.criu.", "io.katacontainers.", "dev.gvisor.",
)  # fmt: skip
# The client's usual set; more than that is a privilege.
CAPABILITIES = frozenset(
    f"CAP_{name}"
    for name in (
        "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
        "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
    )
)  # fmt: skip


# All that a specification may have: what a later runtime learns (host's network devices, say) is not let in unseen.
SPEC = frozenset({"ociVersion", "process", "root", "hostname", "domainname", "mounts", "annotations", "linux"})
LINUX = frozenset({"namespaces", "maskedPaths", "readonlyPaths", "resources", "seccomp"})
MOUNT = frozenset({"destination", "type", "source", "options"})
PROCESS = frozenset({
    "terminal", "consoleSize", "user", "args", "env", "cwd", "capabilities", "rlimits", "noNewPrivileges",
    "apparmorProfile", "oomScoreAdj",
})  # fmt: skip
RESOURCES = frozenset({
    "devices", "memory", "cpu", "pids", "blockIO", "hugepageLimits", "network", "rdma", "unified",
})  # fmt: skip
# Files of the container's own cgroup that bound it. `cgroup.procs` would fetch the host's processes into it.
_UNIFIED = re.compile(r"(?:memory|cpu|io|pids|hugetlb|rdma|misc)\.[A-Za-z0-9_.]+|cpuset\.(?:cpus|mems)")
# By these a process without privileges takes the processor from all others.
_RANKS = frozenset({"RLIMIT_RTPRIO", "RLIMIT_NICE"})


# Every name that is judged here. Runtimes in Go take a name in any case, and the last of several: one that is not
# spelled so could say the opposite of what is judged.
JUDGED = frozenset({
    "hooks", "root", "path", "linux", "devices", "sysctl", "cgroupsPath", "rootfsPropagation", "intelRdt", "mountLabel",
    "uidMappings", "gidMappings", "timeOffsets", "personality", "resources", "allow", "maskedPaths", "readonlyPaths",
    "annotations", "namespaces", "type", "mounts", "options", "process", "capabilities", "inheritable", "ambient",
    "bounding", "effective", "permitted", "noNewPrivileges", "destination", "rlimits", "oomScoreAdj", "seccomp",
    "listenerPath", "unified", "cpu", "realtimeRuntime", "realtimePeriod",
})  # fmt: skip
_SPELLED = {name.casefold(): name for name in JUDGED}


# And their types. crun passes over what is of another one: `"maskedPaths": {"/proc/kcore": 1}` would hide nothing, and
# `"noNewPrivileges": 1` forbid nothing. What may be null is as if it were not there.
class _Capabilities(TypedDict, total=False):
    bounding: list[str] | None
    effective: list[str] | None
    permitted: list[str] | None
    inheritable: list[str] | None
    ambient: list[str] | None


class _Rlimit(TypedDict, total=False):
    type: str


class _Process(TypedDict, total=False):
    capabilities: _Capabilities | None
    noNewPrivileges: bool
    rlimits: list[_Rlimit] | None
    oomScoreAdj: int | None


class _Rule(TypedDict, total=False):
    allow: bool


class _Resources(TypedDict, total=False):
    devices: list[_Rule] | None
    unified: dict[str, str] | None
    cpu: dict[str, Any] | None


class _Namespace(TypedDict, total=False):
    type: str
    path: str


class _Linux(TypedDict, total=False):
    namespaces: list[_Namespace] | None
    maskedPaths: list[str] | None
    readonlyPaths: list[str] | None
    resources: _Resources | None
    seccomp: dict[str, Any] | None


class _Mount(TypedDict, total=False):
    destination: str
    type: str
    options: list[str] | None


class _Root(TypedDict, total=False):
    path: str


class _Spec(TypedDict, total=False):
    root: _Root | None
    linux: _Linux | None
    mounts: list[_Mount] | None
    process: _Process | None
    annotations: dict[str, str] | None


_SPEC, _PROCESS, _RESOURCES = (TypeAdapter(shape) for shape in (_Spec, _Process, _Resources))


def judged(identity: Identity, container: Container) -> Identity:
    """Whose rights a container's task is held against: the caller's, or those of the tenant who made the container.

    Else a restart policy, which an admin's keeper follows, would run for a tenant what the tenant itself may not.
    """
    return Identity(container.tenant, "tenant") if identity.is_admin and container.tenant else identity


def check_spec(identity: Identity, spec: dict[str, Any]) -> None:
    """PermissionDenied, naming it, when a tenant's specification asks for what only an admin may have."""
    if identity.is_admin:
        return
    _check_spelling(identity, spec)
    _check_types(_SPEC, spec)
    linux = spec.get("linux") or {}
    _refuse(identity, "hooks", bool(spec.get("hooks")))
    _refuse(identity, "a root of its own", (spec.get("root") or {}).get("path", "rootfs") != "rootfs")
    _refuse_others(identity, "", spec, SPEC)
    _refuse_others(identity, "linux.", linux, LINUX)
    _refuse(identity, "a listener of seccomp", bool((linux.get("seccomp") or {}).get("listenerPath")))
    _check_resources(identity, linux.get("resources") or {})
    hidden = set(linux.get("maskedPaths") or ()) >= MASKED and set(linux.get("readonlyPaths") or ()) >= READ_ONLY
    _refuse(identity, "unmasked kernel files", not hidden)
    check_annotations(identity, spec.get("annotations") or {})
    namespaces = linux.get("namespaces") or []
    _refuse(identity, "a namespace of somebody else's", any(n.get("path") for n in namespaces))
    given = {n.get("type") for n in namespaces}
    _refuse(identity, "a namespace twice", len(given) != len(namespaces))
    _refuse(identity, f"the host's namespaces ({', '.join(sorted(NAMESPACES - given))})", not given >= NAMESPACES)
    for mount in spec.get("mounts") or ():
        _check_mount(identity, mount)
    check_process(identity, spec.get("process") or {})


def check_annotations(identity: Identity, annotations: Collection[str]) -> None:
    """The same for annotations, of a specification or of an update."""
    steering = [name[:80] for name in annotations if name.startswith(STEERING)]
    _refuse(identity, f"the annotations {', '.join(steering)}", bool(steering) and not identity.is_admin)


def check_process(identity: Identity, process: dict[str, Any]) -> None:
    """The same for one process."""
    if identity.is_admin:
        return
    _check_spelling(identity, process)
    _check_types(_PROCESS, process)
    asked = {name for names in (process.get("capabilities") or {}).values() for name in names or ()}
    extra = asked - CAPABILITIES
    _refuse(identity, f"capabilities {', '.join(sorted(extra))}", bool(extra))
    kept = [kind for kind in ("inheritable", "ambient") if (process.get("capabilities") or {}).get(kind)]
    _refuse(identity, f"{' and '.join(kept)} capabilities", bool(kept))
    _refuse(identity, "new privileges", not process.get("noNewPrivileges"))
    _refuse_others(identity, "process.", process, PROCESS)
    _refuse(identity, "a claim to memory before the host's processes", (process.get("oomScoreAdj") or 0) < 0)
    ranks = [limit.get("type") for limit in process.get("rlimits") or () if str(limit.get("type")).upper() in _RANKS]
    _refuse(identity, f"the limits {', '.join(map(str, ranks))}", bool(ranks))


def asks_more(process: dict[str, Any]) -> bool:
    """Whether a process is none that every tenant may have."""
    try:
        check_process(Identity("", "tenant"), process)
    except (PermissionDenied, InvalidArgument):
        return True
    return False


def check_options(identity: Identity, options: dict[str, Any], allowed: Collection[str]) -> None:
    """PermissionDenied: options of a runtime, which name programs and directories of the node, unless an admin runs
    the container; a program must be one that the node allows."""
    if options:
        _refuse(identity, "options of the runtime", not identity.is_admin)
    binary = options.get("BinaryName") or ""
    if binary and binary not in (*PREFERRED, *allowed):
        raise PermissionDenied(f"runtime {binary!r} is not among those that this node allows")


def check_resources(identity: Identity, resources: dict[str, Any]) -> None:
    """The same for limits that are to be changed."""
    if not identity.is_admin:
        _check_spelling(identity, resources)
        _check_types(_RESOURCES, resources)
        _check_resources(identity, resources)


def check_checkpoint(identity: Identity, *paths: str) -> None:
    """PermissionDenied: a path on the node, or an image to restore, for a tenant: it holds a process's whole memory
    and rights. InvalidArgument: neither a digest nor a path that is plain and absolute."""
    for path in filter(None, paths):
        _refuse(identity, f"the checkpoint {path!r}", not identity.is_admin)
        if path.startswith(("sha256:", "sha512:")):
            check_digest(path)
            continue
        if not path.startswith("/") or ".." in Path(path).parts or not path.isprintable():
            raise InvalidArgument(f"checkpoint {path!r} is not a plain absolute path")


def check_mounts(identity: Identity, asked: Sequence[Mount], own: Sequence[Mount]) -> None:
    """PermissionDenied when a tenant's root filesystem is not its own snapshot."""
    if not identity.is_admin:
        _refuse(identity, "a root filesystem other than the container's snapshot", list(asked) != list(own))


def _check_mount(identity: Identity, mount: dict[str, Any]) -> None:
    """One mount: nothing of the host's in it, and what the host has but once only where it is protected."""
    kind, options = mount.get("type", ""), mount.get("options") or []
    foreign = [each for each in options if each not in MOUNT_FLAGS and each.partition("=")[0] not in MOUNT_VALUES]
    bad = kind not in FILESYSTEMS or bool(foreign)
    bad = bad or mount.get("destination") != PLACES.get(kind, mount.get("destination"))
    bad = bad or (kind in NOT_WRITTEN and ("ro" not in options or "rw" in options))
    _refuse(identity, f"a mount of {mount.get('source')!r} ({kind} at {mount.get('destination')!r})", bad)
    _refuse_others(identity, "mounts.", mount, MOUNT)


def _check_resources(identity: Identity, resources: dict[str, Any]) -> None:
    _refuse_others(identity, "resources.", resources, RESOURCES)
    _refuse(identity, "devices", any(rule.get("allow") for rule in resources.get("devices") or ()))
    foreign = [name[:80] for name in resources.get("unified") or {} if not _UNIFIED.fullmatch(name)]
    _refuse(identity, f"the cgroup's {', '.join(map(repr, foreign))}", bool(foreign))
    cpu = resources.get("cpu") or {}
    _refuse(identity, "a real-time processor", bool(cpu.get("realtimeRuntime") or cpu.get("realtimePeriod")))


def _refuse_others(identity: Identity, where: str, given: dict[str, Any], known: Collection[str]) -> None:
    others = [f"{where}{str(name)[:80]}" for name, value in given.items() if value and name not in known]
    _refuse(identity, ", ".join(others), bool(others))


def _check_spelling(identity: Identity, value: Any) -> None:
    """Refuse names that a runtime may take for one that is judged here; those of annotations are the caller's own."""
    for each in value if isinstance(value, list) else ():
        if isinstance(each, list | dict):
            _check_spelling(identity, each)
    for name, each in value.items() if isinstance(value, dict) else ():
        judged = _SPELLED.get(str(name).casefold(), name)
        _refuse(identity, f"{str(name)[:80]!r} for {judged!r}", judged != name)
        if name != "annotations":
            _check_spelling(identity, each)


def _check_types(shape: TypeAdapter[Any], value: dict[str, Any]) -> None:
    """InvalidArgument, naming it, when what is judged is not of its type."""
    try:
        shape.validate_python(value, strict=True)
    except ValidationError as e:
        raise InvalidArgument(f"specification: {explain(e)}") from None


def _refuse(identity: Identity, what: str, condition: bool) -> None:
    if condition:
        raise PermissionDenied(f"{identity.name or 'the caller'} may not run a container with {what}")

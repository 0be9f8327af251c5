"""What a tenant's specification may not say: each refused by name, and the client's own default admitted."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wherry import spec, volumes
from wherry_shared import context
from wherry_shared.context import Identity
from wherry_shared.errors import InvalidArgument, PermissionDenied
from wherry_task import admission, service

TENANT = Identity("tenant-a", "tenant", "a")
ADMIN = Identity("admin", "admin")


def default() -> dict[str, Any]:
    return copy.deepcopy(spec.make("c", None, spec.Options(args=["true"]), spec.User()))


def test_the_default_is_admitted() -> None:
    admission.check_spec(TENANT, default())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"linux": {"maskedPaths": ["/x"]}}, "unmasked kernel files"),
        ({"linux": {"readonlyPaths": ["/x"]}}, "unmasked kernel files"),
        ({"linux": {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}}, "somebody else"),
        ({"linux": {"namespaces": [{"type": t} for t in (*sorted(admission.NAMESPACES), "pid")]}}, "twice"),
        ({"linux": {"uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}}, "uidMappings"),
        ({"annotations": {"run.oci.handler": "x"}}, "run.oci.handler"),
        ({"annotations": {"org.criu.config": "/var/lib/of/the/tenant"}}, "org.criu.config"),
        ({"process": {"capabilities": {"ambient": ["CAP_CHOWN"]}}}, "ambient"),
        ({"process": {"capabilities": {"inheritable": ["CAP_CHOWN"]}}}, "inheritable"),
        ({"mounts": [{"destination": "/x", "type": "tmpfs", "options": ["dev"]}]}, "a mount of"),
        ({"mounts": [{"destination": "/p", "type": "proc", "source": "proc"}]}, "a mount of 'proc'"),
        ({"mounts": [{"destination": "/proc/", "type": "proc", "source": "proc"}]}, "a mount of 'proc'"),
        ({"mounts": [{"destination": "/sys", "type": "sysfs", "source": "sysfs"}]}, "a mount of 'sysfs'"),
        ({"mounts": [{"destination": "/sys", "type": "sysfs", "options": ["ro", "rw"]}]}, "sysfs at '/sys'"),
        ({"mounts": [{"destination": "/sys", "type": "sysfs", "options": ["ro", "rrw"]}]}, "sysfs at '/sys'"),
        ({"mounts": [{"destination": "/s", "type": "sysfs", "options": ["ro"]}]}, "sysfs at '/s'"),
        ({"mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup"}]}, "cgroup at"),
        ({"mounts": [{"destination": "/sys", "type": "tmpfs", "options": ["remount"]}]}, "tmpfs at '/sys'"),
        ({"mounts": [{"destination": "/x", "type": "tmpfs", "uidMappings": [{"size": 1}]}]}, "mounts.uidMappings"),
        ({"linux": {"netDevices": {"eth0": {}}}}, "linux.netDevices"),
        ({"linux": {"seccomp": {"listenerPath": "/run/x"}}}, "a listener"),
        ({"linux": {"resources": {"unified": {"cgroup.procs": "1"}}}}, "cgroup.procs"),
        ({"linux": {"resources": {"unified": {"memory.max/../../x": "1"}}}}, "memory.max/"),
        ({"linux": {"resources": {"unified": {"cpuset.cpus.partition": "root"}}}}, "cpuset.cpus.partition"),
        ({"linux": {"resources": {"cpu": {"realtimeRuntime": 950000}}}}, "real-time"),
        ({"process": {"oomScoreAdj": -1000}}, "a claim to memory"),
        ({"process": {"scheduler": {"policy": "SCHED_FIFO", "priority": 99}}}, "process.scheduler"),
        ({"process": {"selinuxLabel": "system_u:system_r:init_t:s0"}}, "process.selinuxLabel"),
        ({"process": {"rlimits": [{"type": "RLIMIT_RTPRIO", "soft": 99, "hard": 99}]}}, "RLIMIT_RTPRIO"),
        ({"vm": {"hypervisor": {"path": "/bin/sh"}}}, "with vm"),
    ],
)
def test_what_is_refused_is_named(change: dict[str, Any], reason: str) -> None:
    asked = default()
    for key, value in change.items():
        asked[key] = {**asked[key], **value} if isinstance(value, dict) and isinstance(asked.get(key), dict) else value
    with pytest.raises(PermissionDenied, match=reason):
        admission.check_spec(TENANT, asked)
    admission.check_spec(ADMIN, asked)


@pytest.mark.parametrize(
    "change",
    [
        {"Hooks": {"createRuntime": [{"path": "/bin/sh"}]}},
        {"HOOK\u017f": {}},
        {"linux": {"Devices": [{"path": "/dev/sda"}]}},
        {"process": {"Capabilities": {"bounding": ["CAP_SYS_ADMIN"]}}},
        {"process": {"capabilities": {"Ambient": ["CAP_CHOWN"]}}},
        {"process": {"nonewprivileges": False}},
        {"mounts": [{"destination": "/x", "type": "tmpfs", "Type": "bind", "source": "/"}]},
    ],
)
def test_another_spelling_is_refused(change: dict[str, Any]) -> None:
    """runc decodes as Go does: a name in any case, with the long s for an s, too, and the last one counts."""
    asked = default()
    for key, value in change.items():
        asked[key] = asked[key] | value if isinstance(value, dict) and key in asked else value
    with pytest.raises(PermissionDenied, match=r"may not run a container with '.*' for '"):
        admission.check_spec(TENANT, asked)
    admission.check_spec(ADMIN, asked)
    if "process" in change:
        with pytest.raises(PermissionDenied, match=" for "):
            admission.check_process(TENANT, asked["process"])
    with pytest.raises(PermissionDenied, match=" for "):
        admission.check_resources(TENANT, {"Devices": [{"allow": True, "access": "rwm"}]})
    admission.check_spec(TENANT, default() | {"annotations": {"Type": "its own"}})


async def test_annotations_of_an_update_are_judged_too() -> None:
    """A shim hands them to its virtual machine as it does those of the specification."""
    made: Any = service.TaskService
    tasks = made(SimpleNamespace(once=lambda: None), None, None, Path(), None, None, ())
    token = context.enter(context.Context(namespace="a", identity=TENANT))
    try:
        with pytest.raises(PermissionDenied, match=r"io\.katacontainers\.config"):
            await tasks.update("c", {}, {"io.katacontainers.config.hypervisor.path": "/bin/sh"})
    finally:
        context.leave(token)


def test_what_the_clients_flags_make_is_admitted() -> None:
    asked = copy.deepcopy(
        spec.make("c", None, spec.Options(
            args=["true"], mounts=[volumes.tmpfs("/t:size=64m,mode=1777,exec"), volumes.shm("1m")], oom_score_adj=500,
            resources={"memory": {"limit": 1 << 26}, "unified": {"memory.high": "1000000", "cpuset.cpus": "0"}},
            rlimits={"RLIMIT_NOFILE": (10, 20)}, namespaces={"cgroup": spec.PRIVATE},
        ), spec.User()),
    )  # fmt: skip
    assert asked["linux"]["seccomp"] and any(mount["type"] == "cgroup" for mount in asked["mounts"])
    admission.check_spec(TENANT, asked)


def test_a_checkpoint_is_restored_for_admins_only() -> None:
    """Its image says with which rights the processes go on."""
    digest = f"sha256:{'0' * 64}"
    for asked in (digest, "/var/lib/image"):
        with pytest.raises(PermissionDenied, match="the checkpoint"):
            admission.check_checkpoint(TENANT, asked)
        admission.check_checkpoint(ADMIN, asked)
    admission.check_checkpoint(TENANT, "")  # its own goes into its own content
    for bad in ("sha256:x", "image", "/a/../b", "/a\nb"):
        with pytest.raises(InvalidArgument):
            admission.check_checkpoint(ADMIN, bad)


@pytest.mark.parametrize(
    "change",
    [
        {"linux": {"maskedPaths": dict.fromkeys(admission.MASKED, 1)}},
        {"linux": {"readonlyPaths": dict.fromkeys(admission.READ_ONLY, 1)}},
        {"linux": {"namespaces": {t: {} for t in admission.NAMESPACES}}},
        {"linux": {"resources": {"devices": [{"allow": 0}]}}},
        {"process": {"noNewPrivileges": 1}},
        {"process": {"noNewPrivileges": "false"}},
        {"process": {"capabilities": ["CAP_CHOWN"]}},
        {"process": {"capabilities": {"bounding": {"CAP_CHOWN": 1}}}},
        {"mounts": [{"destination": "/x", "type": "tmpfs", "options": {"nodev": 1}}]},
        {"mounts": {"a": {}}},
        {"root": "rootfs"},
        {"linux": []},
        {"process": ["true"]},
        {"annotations": ["a"]},
    ],
)
def test_what_is_judged_has_its_type(change: dict[str, Any]) -> None:
    """crun passes over what is of another type: it would not do what was judged."""
    asked = default()
    for key, value in change.items():
        asked[key] = asked[key] | value if isinstance(value, dict) and isinstance(asked.get(key), dict) else value
    with pytest.raises(InvalidArgument, match="specification: "):
        admission.check_spec(TENANT, asked)


def test_null_is_as_if_it_were_not_there() -> None:
    asked = default() | {"annotations": None, "hooks": None}
    asked["linux"] |= {"devices": None, "resources": {"devices": None}}
    asked["process"]["capabilities"]["ambient"] = None
    admission.check_spec(TENANT, asked)
    asked["linux"]["maskedPaths"] = None
    with pytest.raises(PermissionDenied, match="unmasked"):
        admission.check_spec(TENANT, asked)

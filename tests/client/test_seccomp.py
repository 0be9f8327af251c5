"""The default seccomp profile, and profiles from files."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
from wherry import capabilities, seccomp
from wherry_shared.errors import InvalidArgument, NotFound


def allowed(profile: dict[str, Any]) -> set[str]:
    return set(profile["syscalls"][0]["names"])


def test_what_is_allowed_and_what_is_not() -> None:
    names = allowed(seccomp.default("amd64", capabilities.USUAL))
    assert {"read", "openat2", "futex_time64", "chown32", "chroot", "ptrace", "arch_prctl", "statx"} <= names
    assert not names & {
        "mount", "unshare", "setns", "bpf", "keyctl", "add_key", "request_key", "kexec_load", "init_module", "reboot",
        "io_uring_setup", "userfaultfd", "swapon", "open_by_handle_at", "clone", "clone3", "socket", "personality",
        "perf_event_open", "move_mount", "iopl", "syslog", "acct", "nfsservctl", "vm86",
    }  # fmt: skip


def test_every_name_is_a_system_call() -> None:
    """By the table of this machine's libseccomp; newer calls than it knows are few."""
    library = ctypes.CDLL("libseccomp.so.2")
    names = allowed(seccomp.default("amd64", capabilities.EVERY))
    unknown = {name for name in names if library.seccomp_syscall_resolve_name(name.encode()) == -1}
    assert unknown <= {"mseal", "uretprobe", "fchmodat2", "riscv_hwprobe"} | {
        "getxattrat", "setxattrat", "listxattrat", "removexattrat", "futex_wait", "futex_wake", "futex_requeue",
    }  # fmt: skip


def test_a_capability_brings_its_calls() -> None:
    base = allowed(seccomp.default("amd64", []))
    assert "chroot" not in base
    assert allowed(seccomp.default("amd64", ["CAP_SYS_PACCT"])) - base == {"acct"}
    admin = seccomp.default("amd64", ["CAP_SYS_ADMIN"])
    assert {"mount", "clone", "clone3", "unshare"} <= allowed(admin)
    assert not [rule for rule in admin["syscalls"][1:] if rule["names"] in (["clone"], ["clone3"])]


@pytest.mark.parametrize(("architecture", "index"), [("amd64", 0), ("arm64", 0), ("s390x", 1)])
def test_rules_on_arguments(architecture: str, index: int) -> None:
    profile = seccomp.default(architecture, [])
    rules = {rule["names"][0]: rule for rule in profile["syscalls"][1:]}
    assert rules["clone"]["args"][0] == {"index": index, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    assert (rules["clone3"]["action"], rules["clone3"]["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert rules["socket"]["args"][0]["op"] == "SCMP_CMP_NE"
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 1)


def test_architectures() -> None:
    assert seccomp.default("amd64", [])["architectures"] == ["SCMP_ARCH_X86_64"]
    both = seccomp.default("amd64", [], compatible=True)["architectures"]
    assert both == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert "set_tls" in allowed(seccomp.default("arm64", [])) and "set_tls" not in allowed(seccomp.default("amd64", []))


def load(tmp_path: Path, value: Any, architecture: str = "amd64", caps: tuple[str, ...] = ()) -> dict[str, Any]:
    path = tmp_path / "profile.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return seccomp.load(path, architecture, caps)


def test_dockers_form_is_resolved(tmp_path: Path) -> None:
    given = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390x"]},
            },
            {"names": ["set_tls"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
        ],
    }
    assert [r["names"] for r in load(tmp_path, given)["syscalls"]] == [["read"], ["clone"]]
    assert load(tmp_path, given)["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert [r["names"] for r in load(tmp_path, given, caps=("CAP_SYS_ADMIN",))["syscalls"]] == [["read"], ["mount"]]
    assert [r["names"] for r in load(tmp_path, given, "arm64")["syscalls"]] == [["read"], ["clone"], ["set_tls"]]


@pytest.mark.parametrize(
    "given",
    [
        "", "[]", "{}", "null", '{"defaultAction": "SCMP_ACT_NOTHING"}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"]}]}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ALLOW"}]}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": ["read"]}',
        '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_LOG", '
        '"args": [{"index": 0, "op": "SCMP_CMP_X"}]}]}', "x" * (1 << 20) + "x",
    ],
)  # fmt: skip
def test_what_is_no_profile_is_refused(tmp_path: Path, given: str) -> None:
    with pytest.raises(InvalidArgument):
        load(tmp_path, given)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        seccomp.load(tmp_path / "nothing", "amd64", ())

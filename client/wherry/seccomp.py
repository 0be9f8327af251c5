"""The seccomp profile that containers run under: what is allowed is listed, everything else is EPERM.

The set is that of Docker's and containerd's default profiles; it is put together here by families of calls, because
32-bit kernels and 64-bit times give many calls a second or third name. What a name means on an architecture, the
runtime's libseccomp knows; names that it does not know, it leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from wherry_shared.errors import InvalidArgument, NotFound

Profile = dict[str, Any]
UNCONFINED, DEFAULT, COMPATIBLE = "unconfined", "default", "compatible"
PROFILE_MAX = 1 << 20
ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
EPERM, ENOSYS = 1, 38
ACTIONS = frozenset(
    f"SCMP_ACT_{name}"
    for name in ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO", "TRACE", "ALLOW", "LOG", "NOTIFY")
)
_OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
# Go's names of architectures (as images have them) -> libseccomp's, the machine's own first.
ARCHITECTURES = {
    "amd64": ("X86_64", "X86", "X32"), "386": ("X86",), "arm64": ("AARCH64", "ARM"), "arm": ("ARM",),
    "s390x": ("S390X", "S390"), "riscv64": ("RISCV64",), "ppc64le": ("PPC64LE",), "loong64": ("LOONGARCH64",),
}  # fmt: skip
# CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}: none of them without CAP_SYS_ADMIN.
_NEW_NAMESPACES = 0x7E020000
_AF_VSOCK = 40
# personality(2): PER_LINUX and PER_LINUX32, each also with UNAME26, and the question what it is.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)

_PLAIN = """
    access faccessat faccessat2 chdir fchdir getcwd chmod fchmod fchmodat fchmodat2 creat open openat openat2
    close close_range dup dup2 dup3 fallocate fcntl flock fsync fdatasync sync syncfs sync_file_range getdents
    link linkat symlink symlinkat readlink readlinkat mkdir mkdirat mknod mknodat rename renameat renameat2 rmdir
    unlink unlinkat umask utime utimes futimesat statx newfstatat fstatat64 lseek _llseek read pread64 readv preadv
    preadv2 write pwrite64 writev pwritev pwritev2 readahead copy_file_range splice tee vmsplice ioctl pipe pipe2
    fchownat fadvise64 fadvise64_64 cachestat name_to_handle_at fanotify_mark
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
    getxattr lgetxattr fgetxattr getxattrat setxattr lsetxattr fsetxattr setxattrat listxattr llistxattr flistxattr
    listxattrat removexattr lremovexattr fremovexattr removexattrat
    poll select _newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_wait epoll_wait_old epoll_pwait
    epoll_pwait2 eventfd eventfd2 signalfd signalfd4 io_setup io_destroy io_submit io_cancel io_getevents
    brk mmap mmap2 mprotect mremap munmap msync madvise mincore mlock mlock2 mlockall munlock munlockall
    remap_file_pages memfd_create memfd_secret membarrier pkey_alloc pkey_free pkey_mprotect map_shadow_stack mseal
    fork vfork execve execveat exit exit_group wait4 waitid waitpid kill tkill tgkill pause getpid getppid gettid
    getpgid getpgrp setpgid getsid setsid prctl seccomp capget capset getpriority setpriority ioprio_get ioprio_set
    getrlimit setrlimit ugetrlimit prlimit64 getrusage times sysinfo uname getcpu getrandom restart_syscall rseq
    set_tid_address get_robust_list set_robust_list get_thread_area set_thread_area pidfd_open pidfd_send_signal
    process_mrelease process_vm_readv process_vm_writev ptrace uretprobe
    landlock_create_ruleset landlock_add_rule landlock_restrict_self
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_tgsigqueueinfo
    sigaltstack sigprocmask sigreturn
    sched_getaffinity sched_setaffinity sched_getattr sched_setattr sched_getparam sched_setparam sched_yield
    sched_getscheduler sched_setscheduler sched_get_priority_min sched_get_priority_max
    alarm getitimer setitimer time gettimeofday nanosleep adjtimex timer_create timer_delete timer_getoverrun
    timerfd_create
    accept accept4 bind connect listen shutdown socketpair socketcall getsockname getpeername getsockopt setsockopt
    send sendto sendmsg sendmmsg recv recvfrom recvmsg
    ipc msgget msgsnd msgrcv msgctl semget semop semctl shmget shmat shmdt shmctl
    mq_open mq_unlink mq_notify mq_getsetattr futex_wait futex_wake futex_requeue futex_waitv
"""
# Calls that had 16-bit ids, 32-bit offsets or 32-bit times, with the suffix of the name that has not.
_WIDER = {
    "32": """chown fchown lchown getuid geteuid getgid getegid getgroups getresuid getresgid setuid setgid setgroups
        setreuid setregid setresuid setresgid setfsuid setfsgid""",
    "64": """stat lstat fstat statfs fstatfs fcntl truncate ftruncate getdents sendfile clock_gettime
        clock_adjtime timer_gettime timer_settime timerfd_gettime timerfd_settime""",
    "_time64": """clock_getres clock_nanosleep futex io_pgetevents mq_timedreceive mq_timedsend ppoll pselect6
        recvmmsg rt_sigtimedwait sched_rr_get_interval semtimedop utimensat""",
}
_BY_ARCHITECTURE = {
    "amd64": "arch_prctl modify_ldt", "386": "modify_ldt", "s390x": "s390_pci_mmio_read s390_pci_mmio_write "
    "s390_runtime_instr", "riscv64": "riscv_flush_icache riscv_hwprobe", "ppc64le": "sync_file_range2 swapcontext",
    **dict.fromkeys(
        ("arm", "arm64"), "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls"
    ),
}  # fmt: skip
_BY_CAPABILITY = {
    "CAP_SYS_ADMIN": """bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount
        mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog
        umount umount2 unshare""",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "init_module finit_module delete_module",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "iopl ioperm",
    "CAP_SYS_TIME": "settimeofday stime clock_settime clock_settime64",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYS_NICE": "get_mempolicy set_mempolicy set_mempolicy_home_node mbind",
    "CAP_SYSLOG": "syslog",
    "CAP_BPF": "bpf",
    "CAP_PERFMON": "perf_event_open",
}


def default(architecture: str, capabilities: Collection[str], *, compatible: bool = False) -> Profile:
    """The default profile as an OCI `linux.seccomp`, for an architecture in Go's words (amd64, arm64, ...).

    capabilities: the bounding set of the process; what needs one of them is allowed with it alone.
    compatible: also for programs of the machine's older architectures (i386 and x32 on amd64), which are killed
    otherwise. It is not the default because each architecture's filter costs every start milliseconds.
    """
    machines = ARCHITECTURES.get(architecture, ())
    names = {*_everywhere(), *_BY_ARCHITECTURE.get(architecture, "").split()}
    for capability in capabilities:
        names.update(_BY_CAPABILITY.get(capability, "").split())
    return {
        "defaultAction": ERRNO,
        "defaultErrnoRet": EPERM,
        "architectures": [f"SCMP_ARCH_{name}" for name in (machines if compatible else machines[:1])],
        "syscalls": [{"names": sorted(names), "action": ALLOW}, *_by_argument(architecture, capabilities)],
    }


@cache
def _everywhere() -> frozenset[str]:
    wider = (name for suffix, names in _WIDER.items() for base in names.split() for name in (base, base + suffix))
    return frozenset([*_PLAIN.split(), *wider])


def _by_argument(architecture: str, capabilities: Collection[str]) -> list[dict[str, Any]]:
    """Rules that look at an argument. `clone3` has its flags in memory, where no filter can look: without
    CAP_SYS_ADMIN it is not there (ENOSYS), and C libraries take `clone` then."""
    rules = [_allow("socket", 0, _AF_VSOCK, "NE")]
    rules += [_allow("personality", 0, value, "EQ") for value in _PERSONALITIES]
    if "CAP_SYS_ADMIN" not in capabilities:
        rules.append(_allow("clone", 1 if architecture == "s390x" else 0, _NEW_NAMESPACES, "MASKED_EQ"))
        rules.append({"names": ["clone3"], "action": ERRNO, "errnoRet": ENOSYS})
    return rules


def _allow(name: str, index: int, value: int, operator: str) -> dict[str, Any]:
    # MASKED_EQ: `argument & value == valueTwo`.
    argument = {"index": index, "value": value, "valueTwo": 0, "op": f"SCMP_CMP_{operator}"}
    return {"names": [name], "action": ALLOW, "args": [argument]}


def load(path: Path, architecture: str, capabilities: Collection[str]) -> Profile:
    """A profile from a file: an OCI `linux.seccomp`, or Docker's form with `archMap`, `includes` and `excludes`.

    NotFound: no such file. InvalidArgument: it is no such profile, or larger than 1 MiB.
    """
    try:
        with path.open("rb") as f:
            text = f.read(PROFILE_MAX + 1)
    except OSError as e:
        raise NotFound(f"seccomp profile {path}: {e.strerror}") from None
    if len(text) > PROFILE_MAX:
        raise InvalidArgument(f"seccomp profile {path} is larger than {PROFILE_MAX} bytes")
    try:
        given = json.loads(text)
        return _resolved(given, architecture, frozenset(capabilities))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise InvalidArgument(f"seccomp profile {path} is none: {e}") from None


def _resolved(given: dict[str, Any], architecture: str, capabilities: frozenset[str]) -> Profile:
    if not isinstance(given, dict) or given.get("defaultAction") not in ACTIONS:
        raise ValueError("its defaultAction is missing or unknown")
    made: Profile = {"defaultAction": given["defaultAction"]}
    if "defaultErrnoRet" in given:
        made["defaultErrnoRet"] = int(given["defaultErrnoRet"])
    made["architectures"] = list(given.get("architectures") or _architectures(given.get("archMap"), architecture))
    if given.get("flags"):
        made["flags"] = [str(flag) for flag in given["flags"]]
    rules = given.get("syscalls") or []
    made["syscalls"] = [_rule(rule) for rule in rules if _meant(rule, architecture, capabilities)]
    return made


def _architectures(mapping: Iterable[dict[str, Any]] | None, architecture: str) -> list[str]:
    own = [f"SCMP_ARCH_{name}" for name in ARCHITECTURES.get(architecture, ())]
    for each in mapping or ():
        if own and each["architecture"] == own[0]:
            return [own[0], *(each.get("subArchitectures") or ())]
    return own


def _rule(rule: dict[str, Any]) -> dict[str, Any]:
    names = [str(name) for name in rule.get("names") or [rule["name"]]]
    if rule.get("action") not in ACTIONS or not names:
        raise ValueError(f"the rule for {names[:3]} has no known action")
    made: dict[str, Any] = {"names": names, "action": rule["action"]}
    if rule.get("errnoRet") is not None:
        made["errnoRet"] = int(rule["errnoRet"])
    arguments = rule.get("args") or []
    if any(argument["op"] not in _OPERATORS for argument in arguments):
        raise ValueError(f"the rule for {names[:3]} compares with an unknown operator")
    if arguments:
        made["args"] = [
            {key: argument[key] for key in ("index", "value", "valueTwo", "op") if key in argument}
            for argument in arguments
        ]
    return made


def _meant(rule: dict[str, Any], architecture: str, capabilities: frozenset[str]) -> bool:
    """Docker's conditions; a minimal kernel is 5.6 here anyhow."""
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    wanted_caps, wanted_arches = includes.get("caps") or (), includes.get("arches") or ()
    if not capabilities.issuperset(wanted_caps) or (wanted_arches and architecture not in wanted_arches):
        return False
    return not capabilities.intersection(excludes.get("caps") or ()) and architecture not in (
        excludes.get("arches") or ()
    )

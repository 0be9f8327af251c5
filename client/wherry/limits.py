"""Sizes, resources, rlimits and sysctls in Docker's words, as the parts of an OCI specification that they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from wherry_shared.errors import InvalidArgument

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([bkmgtp]?)i?b?\Z", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
MEMORY_MIN = 6 << 20  # Docker's: less does not hold an init
PERIOD = 100_000
# No limit, as a number: crun writes -1 as it is, which the kernel takes for neither of them. No node has more.
PIDS_MAX = 1 << 22
CPUS_MAX = 8192
_NUMBER = re.compile(r"[0-9]{1,6}(?:\.[0-9]{1,9})?\Z")
_INT64_MAX = (1 << 63) - 1
_CPUS = re.compile(r"[0-9]{1,4}(?:-[0-9]{1,4})?(?:,[0-9]{1,4}(?:-[0-9]{1,4})?)*\Z")
RLIMITS = frozenset(
    ("as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio",
     "rttime", "sigpending", "stack")
)  # fmt: skip

# What a network, IPC or UTS namespace has of its own; everything else in /proc/sys is the whole machine's.
_OF_IPC = frozenset(
    f"kernel.{name}" for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)
_OF_UTS = frozenset(("kernel.domainname", "kernel.hostname"))
_SYSCTL_NAME = re.compile(r"[a-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+\Z")
# No `+`, `=`, line break or quote: a runtime's helper takes them for more sysctls (CVE-2022-0811).
_SYSCTL_VALUE = re.compile(r"-?[A-Za-z0-9_.:/,-]+(?:[ \t]+-?[A-Za-z0-9_.:/,-]+)*\Z")


def size(text: str, what: str = "size") -> int:
    """Bytes of `512m`, `1.5g`, `64KiB`, `1048576`; units are powers of 1024. InvalidArgument."""
    match = _SIZE.match(text.strip())
    number = _times(match[1], _UNITS[match[2].lower()]) if match and len(match[1]) < 24 else -1
    if not 0 <= number <= _INT64_MAX:
        raise InvalidArgument(f"{what} {text[:40]!r} is no size: 512m and 1g are")
    return number


def cpus(text: str) -> int:
    """CPUs (`1.5`) as a quota of microseconds in each PERIOD. InvalidArgument."""
    number = _times(text, PERIOD) if _NUMBER.match(text) else 0
    if not PERIOD // 100 <= number <= CPUS_MAX * PERIOD:
        raise InvalidArgument(f"cpus {text[:40]!r} is not a number from 0.01 to {CPUS_MAX}")
    return number


def _times(number: str, factor: int) -> int:
    """A decimal number of at most 24 digits times a factor, without a float's rounding, rounded down."""
    whole, _, fraction = number.partition(".")
    share: int = int(fraction or "0") * factor // 10 ** len(fraction)
    return int(whole) * factor + share


def resources(
    *, memory: str = "", memory_swap: str = "", memory_reservation: str = "", memory_swappiness: int | None = None,
    oom_kill_disable: bool = False, cpu: str = "", cpu_shares: int = 0, cpu_quota: int = 0, cpu_period: int = 0,
    cpuset_cpus: str = "", cpuset_mems: str = "", pids_limit: int = 0, blkio_weight: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Limits in Docker's words as an OCI LinuxResources; what is not given is not in it. InvalidArgument.

    memory_swap: memory and swap together, -1 for no limit. pids_limit: -1 for no limit.
    """
    made = {
        "memory": _memory(memory, memory_swap, memory_reservation, memory_swappiness, disable=oom_kill_disable),
        "cpu": _cpu(cpu, cpu_shares, cpu_quota, cpu_period, cpuset_cpus, cpuset_mems),
        "pids": {"limit": _pids(pids_limit)} if pids_limit else {},
        "blockIO": {"weight": _within("blkio-weight", blkio_weight, 10, 1000)} if blkio_weight else {},
    }
    return {name: value for name, value in made.items() if value}


def _memory(memory: str, swap: str, reservation: str, swappiness: int | None, *, disable: bool) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if memory:
        made["limit"] = size(memory, "memory")
        if made["limit"] < MEMORY_MIN:
            raise InvalidArgument(f"memory {memory!r} is less than {MEMORY_MIN >> 20}m, which no container lives on")
    if reservation:
        made["reservation"] = size(reservation, "memory-reservation")
        if memory and made["reservation"] > made["limit"]:
            raise InvalidArgument(f"memory-reservation {reservation!r} is more than memory {memory!r}")
    if swap:
        made["swap"] = -1 if swap == "-1" else size(swap, "memory-swap")
        if not memory:
            raise InvalidArgument("memory-swap counts memory too: give memory as well")
        if 0 <= made["swap"] < made["limit"]:
            raise InvalidArgument(f"memory-swap {swap!r} counts memory too and is less than memory {memory!r}")
    if swappiness is not None:
        made["swappiness"] = _within("memory-swappiness", swappiness, 0, 100)
    if disable:
        made["disableOOMKiller"] = True
    return made


def _cpu(cpu: str, shares: int, quota: int, period: int, cpuset_cpus: str, cpuset_mems: str) -> dict[str, Any]:
    if cpu and (quota or period):
        raise InvalidArgument("cpus is cpu-quota and cpu-period: give one or the other")
    made: dict[str, Any] = {}
    if shares:
        made["shares"] = _within("cpu-shares", shares, 2, 262144)
    if cpu:
        made |= {"quota": cpus(cpu), "period": PERIOD}
    if quota:
        unlimited = CPUS_MAX * (period or 1_000_000)
        made["quota"] = _within("cpu-quota", quota, 1000, _INT64_MAX) if quota != -1 else unlimited
    if period:
        made["period"] = _within("cpu-period", period, 1000, 1_000_000)
    for name, value in (("cpus", cpuset_cpus), ("mems", cpuset_mems)):
        if value and not _CPUS.match(value):
            raise InvalidArgument(f"cpuset-{name} {value[:40]!r} is not like 0-3,5")
        if value:
            made[name] = value
    return made


def _pids(limit: int) -> int:
    return _within("pids-limit", limit, -1, PIDS_MAX) if limit != -1 else PIDS_MAX


def _within(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise InvalidArgument(f"{name} {value} is not between {least} and {most}")
    return value


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Resources with others on top: objects are merged, the device rules of both kept in order."""
    made = {name: dict(value) if isinstance(value, dict) else value for name, value in base.items()}
    for name, value in more.items():
        if name == "devices":
            made[name] = [*made.get(name, ()), *value]
        else:
            made[name] = {**made[name], **value} if isinstance(made.get(name), dict) else value
    return made


def rlimit(text: str) -> tuple[str, tuple[int, int]]:
    """`nofile=1024:2048` as ("RLIMIT_NOFILE", (soft, hard)); -1 is no limit. InvalidArgument."""
    name, _, values = text.partition("=")
    soft, _, hard = values.partition(":")
    try:
        numbers = [-1 if v in ("-1", "unlimited") else int(v) for v in (soft, hard or soft)]
    except ValueError:
        numbers = [-2]
    unlimited = (1 << 64) - 1
    if name not in RLIMITS or min(numbers) < -1 or max(numbers) > _INT64_MAX:
        raise InvalidArgument(f"ulimit {text[:60]!r} is not like nofile=1024:2048")
    lower, upper = (unlimited if n == -1 else n for n in numbers)
    if lower > upper:
        raise InvalidArgument(f"ulimit {text[:60]!r}: the soft limit is above the hard one")
    return f"RLIMIT_{name.upper()}", (lower, upper)


def sysctl(name: str, value: str, shared: Sequence[str] = ()) -> None:
    """InvalidArgument unless a container may set it: only what its own namespaces hold, in plain words.

    shared: the kinds of namespaces that it has in common with others (`network`, `ipc`, `uts`).
    """
    if len(name) > 128 or not _SYSCTL_NAME.match(name):
        raise InvalidArgument(f"sysctl {name[:80]!r} is not like net.core.somaxconn")
    if len(value) > 256 or not _SYSCTL_VALUE.match(value):
        raise InvalidArgument(f"sysctl {name}: the value {value[:80]!r} is more than plain words")
    kind = _namespace_of(name)
    if not kind:
        raise InvalidArgument(f"sysctl {name!r} is the whole machine's: net.*, fs.mqueue.* and IPC's are a container's")
    if kind in shared:
        raise InvalidArgument(f"sysctl {name!r} belongs to the {kind} namespace, which is not the container's own")


def _namespace_of(name: str) -> str:
    if name.startswith("net."):
        return "network"
    if name in _OF_IPC or name.startswith("fs.mqueue."):
        return "ipc"
    return "uts" if name in _OF_UTS else ""

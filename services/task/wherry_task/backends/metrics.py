"""What cgroups count, read from their files into containerd's fields (cgroup v1, v2, and both at once)."""

from __future__ import annotations

import os
from collections.abc import Iterator

from wherry_shared.api.task import (
    Blkio,
    BlkioEntry,
    CpuUsage,
    CpuV1,
    CpuV2,
    Hugetlb,
    Io,
    IoEntry,
    MemoryEntry,
    MemoryEvents,
    MemoryV1,
    MemoryV2,
    MetricsV1,
    MetricsV2,
    OomControl,
    Pids,
    Rdma,
    RdmaEntry,
    Throttle,
)

from wherry_task.monitor import cgroups

UNLIMITED = (1 << 64) - 1
USER_HZ = os.sysconf("SC_CLK_TCK")
_BLKIO = {
    "io_service_bytes_recursive": "throttle.io_service_bytes_recursive",
    "io_serviced_recursive": "throttle.io_serviced_recursive",
}
_BFQ = {
    "io_service_bytes_recursive": "io_service_bytes_recursive", "io_serviced_recursive": "io_serviced_recursive",
    "io_queued_recursive": "io_queued_recursive", "io_service_time_recursive": "io_service_time_recursive",
    "io_wait_time_recursive": "io_wait_time_recursive", "io_merged_recursive": "io_merged_recursive",
    "io_time_recursive": "time_recursive", "sectors_recursive": "sectors_recursive",
}  # fmt: skip
# memory.stat of v1 says it in its own words.
_V1_WORDS = {
    "pgpgin": "pg_pg_in", "pgpgout": "pg_pg_out", "pgfault": "pg_fault", "pgmajfault": "pg_maj_fault",
    "hierarchical_memsw_limit": "hierarchical_swap_limit", "total_pgpgin": "total_pg_pg_in",
    "total_pgpgout": "total_pg_pg_out", "total_pgfault": "total_pg_fault", "total_pgmajfault": "total_pg_maj_fault",
}  # fmt: skip


def members(own: dict[str, str]) -> list[int]:
    """The pids in a container's cgroup and those below it."""
    for controllers, path in own.items():
        if path == "/":
            continue
        found: list[int] = []
        for directory, _, _ in os.walk(cgroups.folder(controllers, path)):
            found += [int(line) for line in _text(f"{directory}/cgroup.procs").split()]
        if found:
            return sorted(found)
    return []


def read(placed: dict[str, str]) -> MetricsV1 | MetricsV2 | None:
    """The metrics of the cgroups that /proc/PID/cgroup named; None when none of them is the container's own, or all
    are gone. A hybrid host's v2 hierarchy counts only where no v1 controller does."""
    own = cgroups.own(placed)
    folders = {
        name: folder
        for controllers, path in own.items()
        if controllers and os.path.isdir(folder := cgroups.folder(controllers, path))
        for name in controllers.split(",")
    }
    if folders:
        return read_v1(folders)
    unified = cgroups.folder("", own[""]) if own.get("") else ""
    return read_v2(unified) if unified and os.path.isdir(unified) else None


# ---- v1


def read_v1(folders: dict[str, str]) -> MetricsV1:
    """From the directories of the controllers (`cpu`, `cpuacct`, `memory`, ...); a missing one counts nothing."""
    memory = folders.get("memory", "")
    return MetricsV1(
        hugetlb=list(_hugetlb_v1(folders.get("hugetlb", ""))), pids=_pids(folders.get("pids", "")),
        cpu=_cpu_v1(folders.get("cpu", ""), folders.get("cpuacct", "")), memory=_memory_v1(memory),
        blkio=_blkio(folders.get("blkio", "")), rdma=_rdma(folders.get("rdma", "")),
        memory_oom_control=OomControl(**_known(OomControl, _pairs(f"{memory}/memory.oom_control"))),
    )  # fmt: skip


def _cpu_v1(cpu: str, cpuacct: str) -> CpuV1:
    stat = _pairs(f"{cpu}/cpu.stat")
    ticks = _pairs(f"{cpuacct}/cpuacct.stat")
    nanoseconds = 1_000_000_000 // USER_HZ
    usage = CpuUsage(
        total=_number(f"{cpuacct}/cpuacct.usage"), kernel=ticks.get("system", 0) * nanoseconds,
        user=ticks.get("user", 0) * nanoseconds,
        per_cpu=[int(word) for word in _text(f"{cpuacct}/cpuacct.usage_percpu").split()],
    )  # fmt: skip
    return CpuV1(usage=usage, throttling=Throttle(
        periods=stat.get("nr_periods", 0), throttled_periods=stat.get("nr_throttled", 0),
        throttled_time=stat.get("throttled_time", 0),
    ))  # fmt: skip


def _memory_v1(folder: str) -> MemoryV1:
    stat = {_V1_WORDS.get(key, key): value for key, value in _pairs(f"{folder}/memory.stat").items()}
    counters = {
        name: MemoryEntry(
            limit=_number(f"{folder}/memory.{infix}limit_in_bytes"),
            usage=_number(f"{folder}/memory.{infix}usage_in_bytes"),
            max=_number(f"{folder}/memory.{infix}max_usage_in_bytes"),
            failcnt=_number(f"{folder}/memory.{infix}failcnt"),
        )
        for name, infix in (("usage", ""), ("swap", "memsw."), ("kernel", "kmem."), ("kernel_tcp", "kmem.tcp."))
    }
    return MemoryV1(**{**_known(MemoryV1, stat), **counters})


def _hugetlb_v1(folder: str) -> Iterator[Hugetlb]:
    for size in _page_sizes(folder, ".usage_in_bytes"):
        stem = f"{folder}/hugetlb.{size}"
        yield Hugetlb(
            usage=_number(f"{stem}.usage_in_bytes"), max=_number(f"{stem}.max_usage_in_bytes"),
            failcnt=_number(f"{stem}.failcnt"), pagesize=size,
        )  # fmt: skip


def _blkio(folder: str) -> Blkio:
    """BFQ's counters where that scheduler is at work, the throttler's else, as containerd takes them."""
    kind = "bfq." if _text(f"{folder}/blkio.bfq.io_serviced_recursive").split()[:2] not in ([], ["Total", "0"]) else ""
    names = _BFQ if kind else _BLKIO
    return Blkio(**{field: list(_blkio_entries(f"{folder}/blkio.{kind}{name}")) for field, name in names.items()})


def _blkio_entries(path: str) -> Iterator[BlkioEntry]:
    for line in _text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) < 3 or not words[0].isdigit():
            continue  # the sum of all devices
        major, minor = int(words[0]), int(words[1])
        op = words[2] if len(words) > 3 else ""
        yield BlkioEntry(op=op, device=_device(major, minor), major=major, minor=minor, value=int(words[-1]))


def _device(major: int, minor: int) -> str:
    for line in _text(f"/sys/dev/block/{major}:{minor}/uevent").splitlines():
        if line.startswith("DEVNAME="):
            return f"/dev/{line[8:]}"
    return ""


# ---- v2


def read_v2(folder: str) -> MetricsV2:
    """From the container's directory."""
    stat = _pairs(f"{folder}/memory.stat")
    stat["slab"] = stat.get("slab", stat.get("slab_reclaimable", 0) + stat.get("slab_unreclaimable", 0))
    for field, file in (
        ("usage", "current"), ("usage_limit", "max"), ("swap_usage", "swap.current"), ("swap_limit", "swap.max"),
        ("max_usage", "peak"), ("swap_max_usage", "swap.peak"),
    ):  # fmt: skip
        stat[field] = _number(f"{folder}/memory.{file}")
    return MetricsV2(
        pids=_pids(folder), cpu=CpuV2(**_known(CpuV2, _pairs(f"{folder}/cpu.stat"))),
        memory=MemoryV2(**_known(MemoryV2, stat)), rdma=_rdma(folder), io=Io(usage=list(_io(folder))),
        hugetlb=list(_hugetlb_v2(folder)),
        memory_events=MemoryEvents(**_known(MemoryEvents, _pairs(f"{folder}/memory.events"))),
    )  # fmt: skip


def _io(folder: str) -> Iterator[IoEntry]:
    for line in _text(f"{folder}/io.stat").splitlines():
        device, *words = line.split()
        major, separator, minor = device.partition(":")
        if separator:
            counts = dict(word.split("=", 1) for word in words if "=" in word)
            numbers = {key: int(value) for key, value in counts.items() if value.isdigit()}
            yield IoEntry(major=int(major), minor=int(minor), **_known(IoEntry, numbers))


def _hugetlb_v2(folder: str) -> Iterator[Hugetlb]:
    for size in _page_sizes(folder, ".current"):
        stem = f"{folder}/hugetlb.{size}"
        failed = _pairs(f"{stem}.events").get("max", 0)
        yield Hugetlb(usage=_number(f"{stem}.current"), max=_number(f"{stem}.max"), failcnt=failed, pagesize=size)


# ---- both


def _pids(folder: str) -> Pids:
    limit = _number(f"{folder}/pids.max")
    return Pids(current=_number(f"{folder}/pids.current"), limit=0 if limit == UNLIMITED else limit)


def _rdma(folder: str) -> Rdma:
    return Rdma(current=list(_rdma_entries(f"{folder}/rdma.current")), limit=list(_rdma_entries(f"{folder}/rdma.max")))


def _rdma_entries(path: str) -> Iterator[RdmaEntry]:
    for line in _text(path).splitlines():
        device, *words = line.split()
        counts = dict(word.split("=", 1) for word in words if "=" in word)
        numbers = {key: (1 << 32) - 1 if value == "max" else int(value) for key, value in counts.items()}
        yield RdmaEntry(
            device=device, hca_handles=numbers.get("hca_handle", 0), hca_objects=numbers.get("hca_object", 0)
        )


def _page_sizes(folder: str, suffix: str) -> list[str]:
    try:
        names = os.listdir(folder) if folder else []
    except OSError:
        return []
    return sorted(
        name.removeprefix("hugetlb.").removesuffix(suffix)
        for name in names
        if name.startswith("hugetlb.") and name.endswith(suffix) and ".rsvd" not in name
    )


def _known(model: type, values: dict[str, int]) -> dict[str, int]:
    fields = model.model_fields  # type: ignore[attr-defined]
    return {key: value for key, value in values.items() if key in fields}


def _pairs(path: str) -> dict[str, int]:
    """Lines of a word and a number."""
    found = {}
    for line in _text(path).splitlines():
        key, _, value = line.partition(" ")
        if value.strip().isdigit():
            found[key] = int(value)
    return found


def _number(path: str) -> int:
    """The number in a file; `max` is 2^64-1, and what is not there is 0."""
    word = _text(path).strip()
    return UNLIMITED if word == "max" else int(word) if word.isdigit() else 0


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""  # the controller is not there, or the container has just gone

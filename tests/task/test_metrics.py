"""What cgroups count, from made-up directories of v1 and v2: every figure comes from its own file."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest
from wherry_shared.api.task import MetricsV1, MetricsV2
from wherry_task.backends import metrics, shimstats
from wherry_task.backends.protobuf import encode
from wherry_task.monitor import cgroups


def lay(base: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return base


V1 = {
    "cpu/cpu.stat": "nr_periods 10\nnr_throttled 3\nthrottled_time 4000\n",
    "cpuacct/cpuacct.usage": "123456789\n",
    "cpuacct/cpuacct.stat": "user 7\nsystem 5\n",
    "cpuacct/cpuacct.usage_percpu": "100 200 \n",
    "memory/memory.stat": "cache 1\nrss 2\npgpgin 3\npgmajfault 4\nhierarchical_memsw_limit 5\ntotal_pgfault 6\nx 7\n",
    "memory/memory.usage_in_bytes": "11\n",
    "memory/memory.limit_in_bytes": "12\n",
    "memory/memory.max_usage_in_bytes": "13\n",
    "memory/memory.failcnt": "14\n",
    "memory/memory.memsw.usage_in_bytes": "15\n",
    "memory/memory.kmem.limit_in_bytes": "16\n",
    "memory/memory.kmem.tcp.failcnt": "17\n",
    "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n",
    "pids/pids.current": "4\n",
    "pids/pids.max": "max\n",
    "blkio/blkio.throttle.io_service_bytes_recursive": "254:0 Read 4096\n254:0 Total 4096\nTotal 4096\n",
    "blkio/blkio.bfq.io_serviced_recursive": "Total 0\n",
    "hugetlb/hugetlb.2MB.usage_in_bytes": "2097152\n",
    "hugetlb/hugetlb.2MB.max_usage_in_bytes": "4194304\n",
    "hugetlb/hugetlb.2MB.failcnt": "1\n",
    "hugetlb/hugetlb.2MB.rsvd.usage_in_bytes": "9\n",
    "rdma/rdma.current": "mlx4_0 hca_handle=2 hca_object=2000\n",
    "rdma/rdma.max": "mlx4_0 hca_handle=max hca_object=3000\n",
}


def test_version_one(tmp_path: Path) -> None:
    lay(tmp_path, V1)
    found = metrics.read_v1({each.name: str(each) for each in tmp_path.iterdir()})
    tick = 10**9 // os.sysconf("SC_CLK_TCK")
    assert found.cpu.usage.model_dump() == {
        "total": 123456789, "kernel": 5 * tick, "user": 7 * tick, "per_cpu": [100, 200]
    }  # fmt: skip
    assert found.cpu.throttling.model_dump() == {"periods": 10, "throttled_periods": 3, "throttled_time": 4000}
    memory = found.memory
    assert (memory.cache, memory.rss, memory.pg_pg_in, memory.pg_maj_fault) == (1, 2, 3, 4)
    assert (memory.hierarchical_swap_limit, memory.total_pg_fault) == (5, 6)
    assert memory.usage.model_dump() == {"usage": 11, "limit": 12, "max": 13, "failcnt": 14}
    assert (memory.swap.usage, memory.kernel.limit, memory.kernel_tcp.failcnt) == (15, 16, 17)
    assert found.memory_oom_control.model_dump() == {"oom_kill_disable": 0, "under_oom": 1, "oom_kill": 2}
    assert (found.pids.current, found.pids.limit) == (4, 0)
    (read, total) = found.blkio.io_service_bytes_recursive
    assert (read.op, read.major, read.minor, read.value, total.op) == ("Read", 254, 0, 4096, "Total")
    assert [h.model_dump() for h in found.hugetlb] == [
        {"usage": 2097152, "max": 4194304, "failcnt": 1, "pagesize": "2MB"}
    ]
    assert [e.model_dump() for e in found.rdma.current] == [{"device": "mlx4_0", "hca_handles": 2, "hca_objects": 2000}]
    assert found.rdma.limit[0].hca_handles == (1 << 32) - 1


def test_bfq_counts_where_it_is_at_work(tmp_path: Path) -> None:
    busy = {"blkio.bfq.io_serviced_recursive": "8:0 Read 5\nTotal 5\n", "blkio.bfq.sectors_recursive": "8:0 16\n"}
    found = metrics.read_v1({"blkio": str(lay(tmp_path, busy))}).blkio
    assert [(e.op, e.value) for e in found.io_serviced_recursive] == [("Read", 5)]
    assert [(e.op, e.value) for e in found.sectors_recursive] == [("", 16)]


def test_version_two(tmp_path: Path) -> None:
    lay(tmp_path, {
        "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\n",
        "memory.stat": "anon 1\nfile 2\nslab_reclaimable 3\nslab_unreclaimable 4\nworkingset_refault_anon 5\n",
        "memory.current": "100\n", "memory.max": "max\n", "memory.swap.current": "6\n", "memory.swap.max": "7\n",
        "memory.events": "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\n", "pids.current": "2\n", "pids.max": "64\n",
        "io.stat": "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\nsomething else\n",
        "hugetlb.1GB.current": "0\n", "hugetlb.1GB.max": "max\n", "hugetlb.1GB.events": "max 3\n",
    })  # fmt: skip
    found = metrics.read_v2(str(tmp_path))
    assert found.cpu.model_dump() == {
        "usage_usec": 30, "user_usec": 20, "system_usec": 10, "nr_periods": 3, "nr_throttled": 2, "throttled_usec": 1
    }  # fmt: skip
    memory = found.memory
    assert (memory.anon, memory.file, memory.slab, memory.usage) == (1, 2, 7, 100)
    assert (memory.usage_limit, memory.swap_usage, memory.swap_limit) == (metrics.UNLIMITED, 6, 7)
    assert found.memory_events.model_dump() == {"low": 1, "high": 2, "max": 3, "oom": 4, "oom_kill": 5}
    assert (found.pids.current, found.pids.limit) == (2, 64)
    assert [e.model_dump() for e in found.io.usage] == [
        {"major": 254, "minor": 0, "rbytes": 1, "wbytes": 2, "rios": 3, "wios": 4}
    ]
    assert (found.hugetlb[0].pagesize, found.hugetlb[0].failcnt, found.hugetlb[0].max) == ("1GB", 3, metrics.UNLIMITED)


def test_nothing_there_counts_nothing(tmp_path: Path) -> None:
    assert metrics.read_v1({"memory": str(tmp_path / "gone")}) == MetricsV1()
    assert metrics.read_v2(str(tmp_path / "gone")) == MetricsV2()
    assert metrics.read({}) is None
    assert metrics.read({"memory": "/nobody/has/this", "": "/nor/this"}) is None
    assert metrics.read(cgroups.of("self")) is None  # no cgroup of its own


def test_what_a_shim_sends_is_read_into_the_same_fields() -> None:
    memory = {1: 5, 33: {1: 100, 2: 50}}
    v1 = {2: {1: 3, 2: 9}, 3: {1: {1: 77, 4: b"\x01\x96\x01"}}, 4: memory, 5: {1: [{1: "Read", 3: 8, 5: 4}]}, 9: {3: 2}}
    found = shimstats.metrics_of("io.containerd.cgroups.v1.Metrics", encode(v1))
    assert isinstance(found, MetricsV1)
    assert (found.pids.current, found.pids.limit, found.cpu.usage.total, found.cpu.usage.per_cpu) == (
        3,
        9,
        77,
        [1, 150],
    )
    assert (found.memory.cache, found.memory.usage.limit, found.memory.usage.usage) == (5, 100, 50)
    assert [(e.op, e.major, e.value) for e in found.blkio.io_service_bytes_recursive] == [("Read", 8, 4)]
    assert found.memory_oom_control.oom_kill == 2
    v2 = {2: {1: 30}, 4: {1: 9, 32: 40}, 6: {1: [{1: 254, 3: 7}]}, 7: [{1: 1, 3: "2MB", 4: 6}], 8: {5: 1}}
    other = shimstats.metrics_of("io.containerd.cgroups.v2.Metrics", encode(v2))
    assert isinstance(other, MetricsV2)
    assert (other.cpu.usage_usec, other.memory.anon, other.memory.usage, other.memory_events.oom_kill) == (30, 9, 40, 1)
    assert (other.hugetlb[0].pagesize, other.hugetlb[0].failcnt, other.io.usage[0].rbytes) == ("2MB", 6, 7)
    assert shimstats.metrics_of("something.else", b"") is None


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The monitor's idea of /sys/fs/cgroup is this directory."""
    monkeypatch.setattr(cgroups, "ROOT", str(tmp_path))
    return tmp_path


def test_the_file_that_counts_kills(placed: Path) -> None:
    lay(placed, {"a/memory.events": "oom_kill 0\n"})
    assert cgroups.memory({"": "/a"}) == f"{placed}/a/memory.events"
    lay(placed, {"memory/a/memory.oom_control": "oom_kill 0\n"})
    assert cgroups.memory({"": "/a", "memory": "/a"}) == f"{placed}/memory/a/memory.oom_control"
    assert cgroups.memory({"": "/b", "cpu": "/a"}) == ""


def test_kills_of_version_two_wake_the_watcher(placed: Path) -> None:
    file = lay(placed, {"a/memory.events": "low 0\noom 0\noom_kill 0\n"}) / "a/memory.events"
    fd = cgroups.watch_memory(str(file))
    watcher = select.poll()
    watcher.register(fd, select.POLLIN)
    assert not watcher.poll(0) and cgroups.oom_kills(str(file)) == 0
    file.write_text("low 0\noom 1\noom_kill 2\noom_group_kill 9\n")
    assert watcher.poll(5000) and cgroups.oom_kills(str(file)) == 2
    os.close(fd)
    file.unlink()
    assert cgroups.oom_kills(str(file)) == 0


def test_only_an_empty_cgroup_is_removed(tmp_path: Path) -> None:
    nested = tmp_path / "c/inner/most"
    nested.mkdir(parents=True)
    cgroups.remove(str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
    cgroups.remove(str(tmp_path / "c"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/held").touch()
    with pytest.raises(OSError):
        cgroups.remove(str(tmp_path / "d"))

"""The task service: running containers over any OCI runtime (containerd's rules)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, Protocol

from ..contract import Contract, endpoint
from ..errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unimplemented,
    Unknown,
)
from ..values import Descriptor, Identifier, Model, Mount, Page

Status = Literal["created", "running", "stopped", "paused", "pausing"]
REMOVE_LABEL = "wherry/remove"
"""Of a container: its next task, its snapshot and itself are removed when that task has ended.

`true`: at once. `later`: some seconds after that, where whoever waits for the end has not done it by then.
"""
REMOVE_VALUES = ("true", "later")
PROCESS_MAX = 16 << 20
"""The most bytes of a process's specification, as content and as the file that the runtime reads."""
KEPT_MAX = 3600
"""The most seconds that a process of exec is kept after its end for somebody who may come back, if not for ever."""
HOLD_SECONDS = 30.0
"""How long a task stands still for a hold (`pause`) that is not asked for again."""
LOG_LABEL = "wherry/log"
"""Of a container: the options of the log that it writes in the background (`max_size=BYTES&max_files=N`)."""


class Stdio(Model):
    """Where a process reads and writes; "" is /dev/null.

    A path is a FIFO of the caller's, on the node. `bus://` is carried by `output` and `input`. Outputs alone may be
    `log://?max_size=BYTES&max_files=N` (kept for `logs`, and for `output`), `file:///path` to append to, and for
    admins `log:///path?...` and `binary:///program?key=value`, a logger that the node allows, for both at once.
    """

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class Process(Model):
    """A process of a task: its init (exec_id "") or one that exec started. exit_status is 128+n after signal n."""

    container_id: str
    exec_id: str = ""
    pid: int
    status: Status
    stdio: Stdio = Stdio()
    exit_status: int | None = None
    exited_at: datetime | None = None


class ProcessInfo(Model):
    """One pid inside a container; exec_id of the process that exec started, if it is one."""

    pid: int
    exec_id: str = ""


class Exit(Model):
    """How a process ended."""

    exit_status: int
    exited_at: datetime
    pid: int = 0


class Output(Model):
    """What a process wrote behind a place, up to 512 KiB; `next` is the place behind it.

    lost_stdout, lost_stderr: bytes of each that came before these and that nobody has any more; -1: how many is not
    known. ended: nothing will come behind these.
    """

    stdout: bytes = b""
    stderr: bytes = b""
    lost_stdout: int = 0
    lost_stderr: int = 0
    next: str
    ended: bool = False


class Taken(Model):
    """How many bytes of a writer were taken. unsure: of so many before `total` nobody knows, for the service died."""

    total: int
    unsure: int = 0


class LogWindow(Model):
    """A piece of a log: whole lines of `TIME STREAM P|F TEXT`, P for a part that the next line of its stream continues.

    next: the place behind it. gap: lines between `after` and these were rotated away. ended: no more will come.
    """

    lines: bytes = b""
    next: str
    gap: bool = False
    ended: bool = False


# ---- what cgroups count: io.containerd.cgroups.v1.Metrics and v2.Metrics, each field in the place of its number


class Hugetlb(Model):
    """Huge pages of one size (v1: usage, max and failcnt in bytes; v2: max is the limit, failcnt the events)."""

    usage: int = 0
    max: int = 0
    failcnt: int = 0
    pagesize: str = ""


class Pids(Model):
    """Processes and threads; limit 0: none."""

    current: int = 0
    limit: int = 0


class RdmaEntry(Model):
    """What one RDMA device lends."""

    device: str = ""
    hca_handles: int = 0
    hca_objects: int = 0


class Rdma(Model):
    current: list[RdmaEntry] = []
    limit: list[RdmaEntry] = []


class CpuUsage(Model):
    """Nanoseconds."""

    total: int = 0
    kernel: int = 0
    user: int = 0
    per_cpu: list[int] = []


class Throttle(Model):
    """throttled_time: nanoseconds."""

    periods: int = 0
    throttled_periods: int = 0
    throttled_time: int = 0


class CpuV1(Model):
    usage: CpuUsage = CpuUsage()
    throttling: Throttle = Throttle()


class MemoryEntry(Model):
    """Bytes; failcnt: how often the limit was hit."""

    limit: int = 0
    usage: int = 0
    max: int = 0
    failcnt: int = 0


class MemoryV1(Model):
    """memory.stat of cgroup v1 and the four counters; bytes but for the pg_ fields."""

    cache: int = 0
    rss: int = 0
    rss_huge: int = 0
    mapped_file: int = 0
    dirty: int = 0
    writeback: int = 0
    pg_pg_in: int = 0
    pg_pg_out: int = 0
    pg_fault: int = 0
    pg_maj_fault: int = 0
    inactive_anon: int = 0
    active_anon: int = 0
    inactive_file: int = 0
    active_file: int = 0
    unevictable: int = 0
    hierarchical_memory_limit: int = 0
    hierarchical_swap_limit: int = 0
    total_cache: int = 0
    total_rss: int = 0
    total_rss_huge: int = 0
    total_mapped_file: int = 0
    total_dirty: int = 0
    total_writeback: int = 0
    total_pg_pg_in: int = 0
    total_pg_pg_out: int = 0
    total_pg_fault: int = 0
    total_pg_maj_fault: int = 0
    total_inactive_anon: int = 0
    total_active_anon: int = 0
    total_inactive_file: int = 0
    total_active_file: int = 0
    total_unevictable: int = 0
    usage: MemoryEntry = MemoryEntry()
    swap: MemoryEntry = MemoryEntry()
    kernel: MemoryEntry = MemoryEntry()
    kernel_tcp: MemoryEntry = MemoryEntry()


class BlkioEntry(Model):
    op: str = ""
    device: str = ""
    major: int = 0
    minor: int = 0
    value: int = 0


class Blkio(Model):
    io_service_bytes_recursive: list[BlkioEntry] = []
    io_serviced_recursive: list[BlkioEntry] = []
    io_queued_recursive: list[BlkioEntry] = []
    io_service_time_recursive: list[BlkioEntry] = []
    io_wait_time_recursive: list[BlkioEntry] = []
    io_merged_recursive: list[BlkioEntry] = []
    io_time_recursive: list[BlkioEntry] = []
    sectors_recursive: list[BlkioEntry] = []


class OomControl(Model):
    oom_kill_disable: int = 0
    under_oom: int = 0
    oom_kill: int = 0


class MetricsV1(Model):
    """What cgroup v1 counts of a container."""

    hugetlb: list[Hugetlb] = []
    pids: Pids = Pids()
    cpu: CpuV1 = CpuV1()
    memory: MemoryV1 = MemoryV1()
    blkio: Blkio = Blkio()
    rdma: Rdma = Rdma()
    memory_oom_control: OomControl = OomControl()


class CpuV2(Model):
    usage_usec: int = 0
    user_usec: int = 0
    system_usec: int = 0
    nr_periods: int = 0
    nr_throttled: int = 0
    throttled_usec: int = 0


class MemoryV2(Model):
    """memory.stat of cgroup v2, and usage and limits in bytes (2^64-1: no limit)."""

    anon: int = 0
    file: int = 0
    kernel_stack: int = 0
    slab: int = 0
    sock: int = 0
    shmem: int = 0
    file_mapped: int = 0
    file_dirty: int = 0
    file_writeback: int = 0
    anon_thp: int = 0
    inactive_anon: int = 0
    active_anon: int = 0
    inactive_file: int = 0
    active_file: int = 0
    unevictable: int = 0
    slab_reclaimable: int = 0
    slab_unreclaimable: int = 0
    pgfault: int = 0
    pgmajfault: int = 0
    workingset_refault: int = 0
    workingset_activate: int = 0
    workingset_nodereclaim: int = 0
    pgrefill: int = 0
    pgscan: int = 0
    pgsteal: int = 0
    pgactivate: int = 0
    pgdeactivate: int = 0
    pglazyfree: int = 0
    pglazyfreed: int = 0
    thp_fault_alloc: int = 0
    thp_collapse_alloc: int = 0
    usage: int = 0
    usage_limit: int = 0
    swap_usage: int = 0
    swap_limit: int = 0
    max_usage: int = 0
    swap_max_usage: int = 0


class MemoryEvents(Model):
    low: int = 0
    high: int = 0
    max: int = 0
    oom: int = 0
    oom_kill: int = 0


class IoEntry(Model):
    major: int = 0
    minor: int = 0
    rbytes: int = 0
    wbytes: int = 0
    rios: int = 0
    wios: int = 0


class Io(Model):
    usage: list[IoEntry] = []


class MetricsV2(Model):
    """What cgroup v2 counts of a container."""

    pids: Pids = Pids()
    cpu: CpuV2 = CpuV2()
    memory: MemoryV2 = MemoryV2()
    rdma: Rdma = Rdma()
    io: Io = Io()
    hugetlb: list[Hugetlb] = []
    memory_events: MemoryEvents = MemoryEvents()


class Stats(Model):
    """What a task has used: `v1` or `v2`, by the cgroups of its node; neither, but `error`, when it could not be asked.

    error: why, "" when all is well. The task goes on, and may be asked again.
    """

    container_id: str
    timestamp: datetime
    v1: MetricsV1 | None = None
    v2: MetricsV2 | None = None
    error: str = ""


class CheckpointOptions(Model):
    """How CRIU takes a checkpoint. image, work: directories of the node, for admins; image "" keeps it as content."""

    image: str = ""
    work: str = ""
    exit: bool = False
    open_tcp: bool = False
    external_unix_sockets: bool = False
    terminal: bool = False
    file_locks: bool = False


EVENTS = {
    "/tasks/create": "container_id bundle rootfs io{stdin stdout stderr terminal} checkpoint pid",
    "/tasks/start": "container_id pid",
    "/tasks/exit": "container_id id pid exit_status exited_at [oom] [shim_died]",
    "/tasks/delete": "container_id id pid exit_status exited_at",
    "/tasks/exec-added": "container_id exec_id",
    "/tasks/exec-started": "container_id exec_id pid",
    "/tasks/oom": "container_id",
    "/tasks/paused": "container_id",
    "/tasks/resumed": "container_id",
    "/tasks/checkpointed": "container_id checkpoint",
}


class Tasks(Contract, Protocol, service="task", version="1.1.0", events=EVENTS):
    """The tasks of one namespace: at most one per container."""

    @endpoint(
        NotFound, AlreadyExists, FailedPrecondition, PermissionDenied, Unimplemented, Unknown,
        mutates=True, timeout=60.0,
    )  # fmt: skip
    async def create(
        self, container_id: Identifier, mounts: list[Mount] = [], stdio: Stdio = Stdio(), runtime: str = "",
        checkpoint: str = "",
    ) -> int:  # fmt: skip
        """Make the task of a container from its spec, with `mounts` as its root filesystem; answers the init's pid.

        runtime: instead of the container's own. checkpoint: what `start` restores instead of beginning anew: the
        digest of a checkpoint in content, or for admins the path of a CRIU image; the pid is 0 until then.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True, timeout=60.0)
    async def start(self, container_id: Identifier, exec_id: str = "") -> int:
        """Start a created task, or a process that exec added; answers its pid."""
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True, timeout=60.0)
    async def delete(self, container_id: Identifier, exec_id: str = "", force: bool = False) -> Exit:
        """Remove a task that is stopped or was never started, or a process of exec; answers how it ended.

        force: kill it first.
        """
        ...

    @endpoint(NotFound)
    async def get(self, container_id: Identifier, exec_id: str = "") -> Process:
        """The state of a task's init, or of a process of exec."""
        ...

    @endpoint()
    async def walk(self, after: str = "", limit: int = 1000) -> Page[Process]:
        """A window of the namespace's tasks, in order of their containers' ids."""
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True)
    async def kill(self, container_id: Identifier, signal: int, exec_id: str = "", all: bool = False) -> None:
        """Send a signal (1..64) to the init, to a process of exec, or to `all` processes of the container.

        NotFound when the process has finished.
        """
        ...

    @endpoint(
        NotFound, AlreadyExists, FailedPrecondition, PermissionDenied, ResourceExhausted, DataLoss, mutates=True
    )  # fmt: skip
    async def exec(
        self, container_id: Identifier, exec_id: Identifier, process: dict[str, Any], stdio: Stdio = Stdio(),
        digest: str = "", kept: int = -1,
    ) -> None:  # fmt: skip
        """Add a process (an OCI `process`) to a running task; `start` starts it. The terminal flag of `stdio` wins.

        digest: of the process (msgpack, up to 16 MiB) in content, where it is too long for a request; `process` is
        empty then, and the blob is not needed any more once this is answered. kept: for how many seconds (KEPT_MAX at
        most) the process stays when it has ended and nobody waits for it or asks; then it is deleted. -1: it stays
        until somebody deletes it.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True)
    async def pause(self, container_id: Identifier, hold: str = "") -> None:
        """Freeze every process of a running task.

        hold: a name of the caller's own for which it stands still: no longer than HOLD_SECONDS after this was last
        asked for with the same one. "": until it is resumed.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, Unknown, mutates=True)
    async def resume(self, container_id: Identifier, hold: str = "") -> None:
        """Thaw a paused task. hold: only if it still stands still for that, else FailedPrecondition."""
        ...

    @endpoint(NotFound, FailedPrecondition)
    async def pids(self, container_id: Identifier) -> list[ProcessInfo]:
        """Every pid inside the container, as the host numbers them."""
        ...

    @endpoint(NotFound, FailedPrecondition, mutates=True)
    async def resize(self, container_id: Identifier, width: int, height: int, exec_id: str = "") -> None:
        """Set the size of a terminal, in characters; without a terminal nothing happens.

        FailedPrecondition: the process of exec has stopped.
        """
        ...

    @endpoint(NotFound, mutates=True)
    async def close_stdin(self, container_id: Identifier, exec_id: str = "") -> None:
        """Close the writer that keeps the process's stdin open; closing it twice is closing it once."""
        ...

    @endpoint(NotFound, FailedPrecondition, ResourceExhausted, waits=True, timeout=30.0)
    async def output(
        self, container_id: Identifier, exec_id: str = "", after: str = "", patience: float = 5.0
    ) -> Output:  # fmt: skip
        """What a process writes to `bus://` or `log://` behind a place, as soon as there is something.

        after: "" attaches from now on, "start" from its first byte, else the `next` of the answer before. Who asks
        again within 10 seconds holds the process back rather than lose a byte. Nothing within `patience` (at most 20)
        seconds: an empty answer. FailedPrecondition: its output goes elsewhere.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, ResourceExhausted, mutates=True, waits=True, timeout=30.0)
    async def input(
        self, container_id: Identifier, writer: Identifier, offset: int, data: bytes = b"", exec_id: str = "",
        eof: bool = False, patience: float = 5.0,
    ) -> Taken:  # fmt: skip
        """Give bytes to a `bus://` stdin; answers how many of this writer's were taken in all.

        writer: a name of the caller's own; offset: how many bytes came before `data`. What was taken before is not
        taken again; what does not fit within `patience` (at most 20) seconds is left for the next call. eof: behind
        `data` comes the end, for every writer. FailedPrecondition: the process is not running, or has no such stdin.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, waits=True, timeout=30.0)
    async def logs(
        self, container_id: Identifier, after: str = "", since: datetime | None = None,
        until: datetime | None = None, tail: int = -1, patience: float = 0.0,
    ) -> LogWindow:  # fmt: skip
        """A window of what a container's `log://` has kept: from the oldest, since a time, or of the last `tail` lines.

        after: the `next` of the window before (`since` and `tail` then do not matter); with `patience` (at most 20
        seconds) it waits there for more. Kept as long as the container is. FailedPrecondition: it keeps no log.
        """
        ...

    @endpoint(NotFound, waits=True, timeout=30.0)
    async def wait(self, container_id: Identifier, exec_id: str = "", patience: float = 5.0) -> Exit | None:
        """How a process ended, as soon as it has: None after `patience` (at most 20) seconds. Ask again then."""
        ...

    @endpoint(NotFound, FailedPrecondition, PermissionDenied, Unknown, mutates=True)
    async def update(
        self, container_id: Identifier, resources: dict[str, Any], annotations: dict[str, str] = {}
    ) -> None:
        """Change the limits of a task that has not stopped: `resources` is an OCI LinuxResources object."""
        ...

    @endpoint()
    async def stats(self, container_ids: list[Identifier] = [], after: str = "", limit: int = 1000) -> Page[Stats]:
        """What tasks use now, those named or all of the namespace, in order of their containers' ids.

        A task that has ended, or that has no cgroup of its own, is left out; one that does not answer within two
        seconds is there with an `error`.
        """
        ...

    @endpoint(NotFound, FailedPrecondition, PermissionDenied, Unimplemented, Unknown, mutates=True, timeout=600.0)
    async def checkpoint(
        self, container_id: Identifier, options: CheckpointOptions = CheckpointOptions()
    ) -> list[Descriptor]:
        """Write down the whole state of a running or paused task; answers what was stored as content: the image, which
        `create` takes, and the specification (containerd's media types). With `options.image` nothing is stored.

        Unimplemented: the runtime or this node's CRIU cannot, and why.
        """
        ...

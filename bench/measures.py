"""How each row is measured. A function measures the rows that it names; a run takes them in this file's order."""

from __future__ import annotations

import hashlib
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from . import collection
from .driver import MeasureError
from .lab import Lab, settle
from .node import Node

MIB = 1 << 20
GIB = 1 << 30
CALLERS, MANY, SUBSCRIBERS = 16, 50, 10
START_CALLERS = 10
LISTED = 10_000
ENDING = 10
READERS, REPLICAS, SHARED = 4, (1, 2, 4), 256 * MIB
REST = 0.2  # seconds: for so long a lock of the kernel's stays quick that a container's cgroups took
LATER = 100  # what is ingested a second time must not be there already


def requests(lab: Lab) -> None:
    """Latency and throughput of the smallest request, and of durable metadata."""
    name = "bench/requested"
    latency, rate = lab.seldom(1000, 500), lab.seldom(8000, 3000)
    created: set[Node] = set()

    def prepared(node: Node) -> Node:
        if node not in created:
            node.driver.call("create_image", name=name)
            created.add(node)
        return node

    def one_caller(node: Node) -> Mapping[str, float]:
        times = prepared(node).driver.call("request_times", name=name, count=latency)
        return {"request_p50": statistics.median(times) * 1e6}

    def many_callers(node: Node) -> Mapping[str, float]:
        found = prepared(node).driver.call("request_rate", name=name, count=rate, callers=CALLERS)
        return {"request_throughput_16": found}

    def durable(node: Node) -> Mapping[str, float]:
        count = lab.seldom(800, 320)
        return {"create_delete_16": node.driver.call("create_delete_rate", count=count, callers=CALLERS)}

    lab.alternate(["request_p50"], lab.runs, one_caller, warm_up=1)
    lab.alternate(["request_throughput_16"], lab.runs, many_callers, warm_up=1)
    settle()
    lab.alternate(["create_delete_16"], lab.runs, durable, warm_up=1)


def events(lab: Lab) -> None:
    """Fan-out to ten subscribers with a connection each."""

    def last(node: Node) -> Mapping[str, float]:
        times = node.driver.call("event_times", subscribers=SUBSCRIBERS, count=lab.seldom(300, 100))
        return {"event_last_of_10_p50": statistics.median(times) * 1e6}

    def deliveries(node: Node) -> Mapping[str, float]:
        count = lab.seldom(3000, 1500)
        return {
            "event_deliveries_10": node.driver.call("event_rate", subscribers=SUBSCRIBERS, count=count, callers=CALLERS)
        }

    lab.alternate(["event_last_of_10_p50"], lab.runs, last, warm_up=1)
    lab.alternate(["event_deliveries_10"], lab.runs, deliveries, warm_up=1)


def lives(lab: Lab) -> None:
    """The shortest life of a container: through the API, on the command line, and as an exec."""
    times = lab.seldom(20, 5)

    def life(row: str, runtime: str) -> Callable[[Node], Mapping[str, float]]:
        def measure(node: Node) -> Mapping[str, float]:
            image = lab.with_image(node, "busybox")
            took = node.driver.call("life_time", image=image.reference, top=image.top, runtime=runtime)
            return {row: took * 1e3}

        return measure

    def command_line(node: Node) -> Mapping[str, float]:
        return {"run_cli": node.run_cli(lab.with_image(node, "busybox").reference) * 1e3}

    def execs(row: str, runtime: str) -> None:
        busy: set[Node] = set()

        def measure(node: Node) -> Mapping[str, float]:
            if node not in busy:
                image = lab.with_image(node, "busybox")
                node.driver.call("run_busy", image=image.reference, top=image.top, runtime=runtime)
                busy.add(node)
            return {row: node.driver.call("exec_time") * 1e3}

        lab.alternate([row], times, measure, warm_up=1, rest=REST)
        for node in busy:
            if not lab.results.failed([row], node.side):
                node.driver.call("end_busy")

    lab.alternate(["life_runc"], times, life("life_runc", "runc"), warm_up=1, rest=REST)
    lab.alternate(["life_default"], times, life("life_default", ""), warm_up=1, rest=REST)
    # Longer: 200 ms after a command a node gets a process ready for the next one, beside which nobody is measured.
    lab.alternate(["run_cli"], lab.seldom(10, 3), command_line, warm_up=1, rest=2 * REST)
    execs("exec", "runc")
    execs("exec_default", "")


def fifty(lab: Lab) -> None:
    """Fifty containers at once: time up, memory, time down."""

    def measure(node: Node) -> Mapping[str, float]:
        before = node.pids()
        start = _start_fifty(lab, node, "runc")
        monitors = node.pss(node.pids() - before) / MANY
        whole = node.pss()
        stop = node.driver.call("stop_many", callers=START_CALLERS)
        return {
            "start_50": start, "stop_50": stop, "monitor_pss": monitors / MIB, "node_pss_50": whole / MIB,
        }  # fmt: skip

    def default(node: Node) -> Mapping[str, float]:
        start = _start_fifty(lab, node, "")
        return {"start_50_default": start, "stop_50_default": node.driver.call("stop_many", callers=START_CALLERS)}

    lab.alternate(["start_50", "stop_50", "monitor_pss", "node_pss_50"], lab.runs, measure)
    lab.alternate(["start_50_default", "stop_50_default"], lab.runs, default)


def _start_fifty(lab: Lab, node: Node, runtime: str) -> float:
    """Seconds until all are started; runtime "": the node's default."""
    image = lab.with_image(node, "busybox")
    took: float = node.driver.call(
        "start_many", image=image.reference, top=image.top, runtime=runtime, count=MANY, callers=START_CALLERS
    )
    return took


def fifty_together(lab: Lab) -> None:
    """The memory again, of a node whose services share a process."""
    row = "node_pss_50_together"

    def measure(side: str) -> Mapping[str, float]:
        node = lab.node(side, together=side == "wherry")
        _start_fifty(lab, node, "runc")
        whole = node.pss()
        node.driver.call("stop_many", callers=START_CALLERS)
        return {row: whole / MIB}

    lab.alternate_sides([row], lab.runs, measure)


def recovery(lab: Lab) -> None:
    """The task service dies, and some of many containers end before it is there again."""

    def measure(side: str) -> Mapping[str, float]:
        if side != "wherry":
            raise MeasureError("a shim of its own keeps each end: there is nothing to kill")
        with lab.fresh(side) as node:
            image = lab.with_image(node, "busybox")
            ending = node.driver.call(
                "start_gated", image=image.reference, top=image.top, count=MANY, ending=ENDING, callers=START_CALLERS
            )
            service = next(pid for pid in node.pids() if _name(pid) == "wherry-task")
            os.kill(service, signal.SIGSTOP)  # from here on nothing is told to it
            for pid in ending:
                Path(f"/proc/{pid}/root/gate").touch()
            while any(_runs(pid) for pid in ending):
                time.sleep(0.02)
            os.kill(service, signal.SIGKILL)
            return {"recovery": node.driver.call("told_right")}

    lab.alternate_sides(["recovery"], 1, measure)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listing(lab: Lab) -> None:
    """A list of many, on fresh directories."""
    with ExitStack() as stack:
        nodes: dict[str, Node] = {}

        def measure(side: str) -> Mapping[str, float]:
            if side not in nodes:
                nodes[side] = stack.enter_context(lab.fresh(side))
                nodes[side].driver.call("fill", count=LISTED, callers=CALLERS)
            return {"list_10k": nodes[side].driver.call("list_time", at_least=LISTED) * 1e3}

        lab.alternate_sides(["list_10k"], lab.runs, measure, warm_up=1)


def collecting(lab: Lab) -> None:
    """A garbage collection, on a node of its own, with something changed in each service all the time."""

    def measure(side: str) -> Mapping[str, float]:
        if side != "wherry":
            raise MeasureError("its store is one file under one lock: there is no like measure")
        objects = lab.seldom(collection.OBJECTS, collection.OBJECTS // 10)
        dead = objects * collection.DEAD // collection.OBJECTS
        with lab.fresh(side) as node:
            took = node.driver.call("collection_pause", timeout=900.0, objects=objects, dead=dead)
            return {"gc_pause": took * 1e3}

    lab.alternate_sides(["gc_pause"], 1, measure)


def _source(path: Path, number: int, size: int = GIB) -> str:
    """A file in the page cache, different for each number; answers its digest."""
    if not path.exists():
        block = os.urandom(16 * MIB)
        with path.open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
    with path.open("r+b") as file:
        file.write(number.to_bytes(16, "big"))
    settle()
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def content(lab: Lab) -> None:
    """A gigabyte in and out again."""
    path = lab.base / "gigabyte"
    runs: Counter[str] = Counter()
    digests: dict[int, str] = {}

    def measure(side: str) -> Mapping[str, float]:
        node = lab.node(side)
        runs[side] += 1
        number = runs[side]
        if number not in digests:
            digests[number] = _source(path, number)
        settle()
        took = node.driver.call("ingest_time", path=str(path), size=GIB, digest=digests[number])
        return {"ingest_1g": took, "read_1g": node.driver.call("read_time", size=GIB, digest=digests[number])}

    lab.alternate_sides(["ingest_1g", "read_1g"], lab.runs, measure)


def content_by_bus(lab: Lab) -> None:
    """The same for a client that sees no file of the node's."""
    path = lab.base / "gigabyte"
    runs: Counter[str] = Counter()
    digests: dict[int, str] = {}

    def measure(side: str) -> Mapping[str, float]:
        driver = lab.node(side).driver
        runs[side] += 1
        number = LATER + runs[side]
        if number not in digests:
            digests[number] = _source(path, number)
        settle()
        took = driver.call("write_time", path=str(path), size=GIB, digest=digests[number])
        read = driver.call("read_bus_rate", readers=1, size=GIB, digest=digests[number])
        return {"ingest_bus_1g": took, "read_bus_1g": GIB / read}

    lab.alternate_sides(["ingest_bus_1g", "read_bus_1g"], lab.runs, measure)


def replicas(lab: Lab) -> None:
    """Several readers at once, of one content service and of several on one root."""
    path = lab.base / "shared"
    filled: set[Node] = set()

    def reading(count: int) -> Callable[[str], Mapping[str, float]]:
        def measure(side: str) -> Mapping[str, float]:
            node = lab.node(side, replicas=count if side == "wherry" else 1)
            if node not in filled:
                node.driver.call("write_time", path=str(path), size=SHARED, digest=digest)
                filled.add(node)
            rate = node.driver.call("read_bus_rate", readers=READERS, size=SHARED, digest=digest)
            return {f"read_replicas_{count}": rate / MIB}

        return measure

    if lab.results.wanted_of([f"read_replicas_{count}" for count in REPLICAS]):
        digest = _source(path, 0, SHARED)
    for count in REPLICAS:
        lab.alternate_sides([f"read_replicas_{count}"], lab.runs, reading(count), warm_up=1)


def pulls(lab: Lab) -> None:
    """Pull and unpack, each time by services that were started for it on fresh directories."""

    def one(name: str, row: str, *, warm: bool = False) -> Callable[[str], Mapping[str, float]]:
        def measure(side: str) -> Mapping[str, float]:
            image = lab.image(name)
            with lab.fresh(side) as node:
                if warm:
                    lab.with_image(node, "busybox")
                settle()
                cpu = node.cgroup.cpu_seconds()
                wall = node.driver.call("pull", reference=image.reference)
                cpu = node.cgroup.cpu_seconds() - cpu
                node.driver.call("has_snapshot", chain_id=image.top)
            return {f"{row}_wall": wall, f"{row}_cpu": cpu}

        return measure

    large = lab.seldom(lab.runs, min(lab.runs, 1))
    for name in ("layers", "tiny"):
        lab.alternate_sides([f"pull_{name}_wall"], lab.runs, one(name, f"pull_{name}", warm=True))
    for encoding in ("gzip", "zstd"):
        row = f"pull_{encoding}"
        lab.alternate_sides([f"{row}_wall", f"{row}_cpu"], large, one(f"many-{encoding}", row))


# What fills the disk comes last.
ALL: tuple[Callable[[Lab], None], ...] = (
    requests,
    events,
    lives,
    fifty,
    fifty_together,
    recovery,
    listing,
    collecting,
    content,
    content_by_bus,
    replicas,
    pulls,
)

"""What is measured: one row per number, and what becomes of its samples."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SIDES = ("containerd", "wherry")


@dataclass(frozen=True)
class Row:
    """One row of the table. Its value is the median of its runs, its ratio Wherry / containerd, whatever is better."""

    id: str
    title: str
    unit: str
    better: Literal["lower", "higher"] = "lower"


_PULL = "many-file image (27,000 entries, 543 MB unpacked)"
ROWS = (
    Row("pull_gzip_wall", f"pull and unpack, {_PULL}, gzip; a running client / ctr", "s"),
    Row("pull_gzip_cpu", "the same: CPU time of services, client, monitors / containerd, shims, ctr", "s"),
    Row("pull_zstd_wall", f"pull and unpack, {_PULL}, zstd", "s"),
    Row("pull_zstd_cpu", "the same: CPU time of everything", "s"),
    Row("pull_layers_wall", "pull and unpack, 20 small layers; not the first pull of the node", "s"),
    Row("pull_tiny_wall", "pull and unpack, one layer of 1 MiB; not the first pull of the node", "s"),
    Row("life_runc", "life of a container through the API (prepare, create, start, exit, delete), runc on both", "ms"),
    Row("life_default", "life of a container, each side's default runtime (crun / runc)", "ms"),
    Row("run_cli", "`run --rm IMAGE true` on the command line, each side's default runtime", "ms"),
    Row("exec", "exec of `true` in a running container, through its deletion, runc on both", "ms"),
    Row("exec_default", "the same, each side's default runtime (crun / runc)", "ms"),
    Row("start_50", "50 containers created and started by 10 callers, runc on both", "s"),
    Row("stop_50", "the 50 killed, waited for and deleted by 10 callers", "s"),
    Row("start_50_default", "50 containers created and started, each side's default runtime (crun / runc)", "s"),
    Row("stop_50_default", "those 50 killed, waited for and deleted", "s"),
    Row("monitor_pss", "memory (PSS) of the monitor / shim of one container, among 50", "MiB"),
    Row("node_pss_50", "memory (PSS) of all services and monitors / containerd and shims with 50 containers", "MiB"),
    Row("node_pss_50_together", "the same, a Wherry node whose services share a process (`--together all`)", "MiB"),
    Row(
        "recovery",
        "50 containers run, the task service is killed, 10 of them end meanwhile: ends told once and right",
        "of 10",
        "higher",
    ),
    Row("request_p50", "image get, one caller; containerd by hand-written HTTP/2 frames, answer decoded", "us"),
    Row("request_throughput_16", "image get, 16 callers on one connection; containerd as above", "1/s", "higher"),
    Row("create_delete_16", "image create and delete, durable, 16 callers on one connection", "1/s", "higher"),
    Row("event_last_of_10_p50", "event: from publish to the last of 10 subscribers (Wherry's is durable)", "us"),
    Row("event_deliveries_10", "events delivered to 10 subscribers, 16 publish calls under way", "1/s", "higher"),
    Row("ingest_1g", "1 GiB into content, verified and durable; a client on the node", "s"),
    Row("read_1g", "1 GiB out of content; a client on the node", "s"),
    Row("ingest_bus_1g", "1 GiB into content, by a client that has the bus alone / containerd's gRPC", "s"),
    Row("read_bus_1g", "1 GiB out of content, by a client that has the bus alone / containerd's gRPC", "s"),
    Row("read_replicas_1", "4 readers that have the bus alone, 1 content service / containerd", "MiB/s", "higher"),
    Row("read_replicas_2", "the same, 2 content services on one root", "MiB/s", "higher"),
    Row("read_replicas_4", "the same, 4 content services on one root", "MiB/s", "higher"),
    Row("list_10k", "list 10,000 images", "ms"),
    Row("gc_pause", "longest wait of a mutation while 10,000 dead of 50,000 objects are collected", "ms"),
)
BY_ID = {row.id: row for row in ROWS}
NOT_ASKED = "not part of this run"


def select(words: Iterable[str]) -> list[str]:
    """The ids that words name: an id or its beginning (`pull`, `life_runc`); without words all. ValueError."""
    chosen: set[str] = set()
    for word in words:
        found = [id for id in BY_ID if id == word] or [id for id in BY_ID if id.startswith(word)]
        if not found:
            raise ValueError(f"no row is called {word!r}; there are: {' '.join(BY_ID)}")
        chosen.update(found)
    return [id for id in BY_ID if id in chosen] or list(BY_ID)


class Results:
    """The samples of every row and side, and why there are none."""

    def __init__(self, wanted: Collection[str], sides: Collection[str] = SIDES) -> None:
        self.wanted = frozenset(wanted)
        self.sides = tuple(side for side in SIDES if side in sides)
        self._samples: dict[tuple[str, str], list[float]] = {}
        self._failures: dict[tuple[str, str], str] = {}

    def wanted_of(self, rows: Sequence[str]) -> list[str]:
        return [id for id in rows if id in self.wanted]

    def add(self, row: str, side: str, value: float) -> None:
        if row in self.wanted:
            self._samples.setdefault((row, side), []).append(value)

    def fail(self, rows: Iterable[str], side: str, why: str) -> None:
        """Nothing of these rows counts for this side: a median over what happened to work would be no median."""
        for row in rows:
            self._failures.setdefault((row, side), why)

    def failed(self, rows: Iterable[str], side: str) -> bool:
        return any((row, side) in self._failures for row in rows)

    def rows(self) -> list[dict[str, Any]]:
        """The rows as the JSON holds them."""
        return [self._row(row) for row in ROWS]

    def _row(self, row: Row) -> dict[str, Any]:
        samples = {side: self._of(row.id, side) for side in SIDES}
        medians = {side: _rounded(statistics.median(own)) if own else None for side, own in samples.items()}
        ours, theirs = medians["wherry"], medians["containerd"]
        made: dict[str, Any] = {
            "id": row.id, "title": row.title, "unit": row.unit, "better": row.better, "wherry": ours,
            "containerd": theirs, "ratio": _rounded(ours / theirs) if ours is not None and theirs else None,
            "runs": max(len(own) for own in samples.values()),
            "samples": {side: [_rounded(value) for value in own] for side, own in samples.items()},
        }  # fmt: skip
        if row.id not in self.wanted:
            made["why"] = NOT_ASKED
        elif made["ratio"] is None:
            made["why"] = "; ".join(self._why(row.id, side) for side in SIDES if medians[side] is None)
        return made

    def _of(self, row: str, side: str) -> list[float]:
        return [] if (row, side) in self._failures else self._samples.get((row, side), [])

    def _why(self, row: str, side: str) -> str:
        why = self._failures.get((row, side)) or (
            "nothing was measured" if row in self.wanted and side in self.sides else NOT_ASKED
        )
        return f"{side}: {why}"


def _rounded(value: float) -> float:
    """Four significant digits: more is noise."""
    return float(f"{value:.4g}")

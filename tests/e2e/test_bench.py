"""The side-by-side measurement works, says what it could not do, and leaves nothing behind. No number is judged."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NAMES = (
    "pull_gzip_wall pull_gzip_cpu pull_zstd_wall pull_zstd_cpu pull_layers_wall pull_tiny_wall life_runc life_default"
    " run_cli exec exec_default start_50 stop_50 start_50_default stop_50_default monitor_pss node_pss_50"
    " node_pss_50_together recovery"
    " request_p50 request_throughput_16 create_delete_16 event_last_of_10_p50 event_deliveries_10"
    " ingest_1g read_1g ingest_bus_1g read_bus_1g"
    " read_replicas_1 read_replicas_2 read_replicas_4 list_10k gc_pause"
)
IDS = _NAMES.split()

needs_containerd = pytest.mark.skipif(
    shutil.which("containerd") is None or os.geteuid() != 0, reason="needs root and Debian's containerd"
)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module


def measure(out: Path, *arguments: str, **environment: str) -> tuple[dict[str, Any], str]:
    """The report of a quick run, and its table."""
    work = out / "work"
    command = [sys.executable, "-m", "bench", "--quick", "--out", str(out), "--work", str(work), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(work.iterdir())
    assert str(work) not in Path("/proc/self/mountinfo").read_text()
    report: dict[str, Any] = json.loads((out / "latest.json").read_text())
    return report, done.stdout


def by_id(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert sorted(row["id"] for row in report["rows"]) == sorted(IDS)
    for row in report["rows"]:
        assert {"id", "title", "unit", "wherry", "containerd", "ratio", "runs"} <= set(row)
        assert row["ratio"] is not None or row["why"]
    return {row["id"]: row for row in report["rows"]}


@needs_containerd
@pytest.mark.timeout(240)
def test_rows_are_measured_on_both_sides(tmp_path: Path) -> None:
    report, table = measure(tmp_path, "--rows", "request_p50,exec")
    rows = by_id(report)
    for id in ("request_p50", "exec"):
        row = rows[id]
        assert row["ratio"] is not None, row.get("why")
        assert row["ratio"] == pytest.approx(row["wherry"] / row["containerd"], rel=0.01)
        assert row["runs"] == len(row["samples"]["wherry"]) == len(row["samples"]["containerd"]) >= 2
        assert id in table
    assert (rows["life_runc"]["wherry"], rows["life_runc"]["why"]) == (None, "not part of this run")
    assert report["machine"]["cores"] and report["versions"]["containerd"].startswith("1.")
    words = "".join(ElementTree.parse(tmp_path / "latest.svg").getroot().itertext())
    assert all(id in words for id in IDS)


@needs_containerd
def test_a_side_that_fails_says_why_and_the_other_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    (path / "containerd").write_text("#!/bin/sh\necho no disk in this machine; exit 7\n")
    (path / "containerd").chmod(0o755)
    report, table = measure(tmp_path, "request_p50", PATH=f"{path}:{os.environ['PATH']}")
    row = by_id(report)["request_p50"]
    assert row["wherry"] is not None and row["containerd"] is None and row["ratio"] is None
    assert "status 7: no disk in this machine" in row["why"]
    assert row["why"] in table


@needs_containerd
def test_some_rows_measured_again_leave_the_others_as_they_were(tmp_path: Path) -> None:
    measure(tmp_path, "request_p50", "--only", "containerd")
    report, table = measure(tmp_path, "list_10k", "--only", "containerd")
    rows = by_id(report)
    assert rows["request_p50"]["containerd"] and rows["list_10k"]["containerd"]
    assert "request_p50" not in table


def test_an_unknown_row_is_refused_by_name() -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "bench", "life,lifes"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert refused.returncode != 0
    assert "'lifes'" in refused.stderr or "root" in refused.stderr


def test_rows_are_chosen_by_id_or_beginning(bench: Any) -> None:
    select = bench("bench.rows").select
    assert select(["pull_gzip", "exec"]) == ["pull_gzip_wall", "pull_gzip_cpu", "exec"]
    assert select([]) == IDS


def test_a_failure_voids_what_was_measured_before_it(bench: Any) -> None:
    results = bench("bench.rows").Results(["exec"])
    results.add("exec", "wherry", 2.0)
    results.add("exec", "containerd", 1.0)
    results.fail(["exec"], "wherry", "it broke")
    row = next(row for row in results.rows() if row["id"] == "exec")
    assert (row["wherry"], row["containerd"], row["ratio"], row["why"]) == (None, 1.0, None, "wherry: it broke")


def test_protobuf_messages_are_what_the_format_says(bench: Any) -> None:
    wire = bench("bench.protobuf")
    # The examples of protobuf's own encoding guide: 150, "testing", a nested message, and a negative number.
    assert wire.encode({1: 150}) == b"\x08\x96\x01"
    assert wire.encode({2: "testing"}) == b"\x12\x07testing"
    assert wire.encode({3: {1: 150}}) == b"\x1a\x03\x08\x96\x01"
    assert wire.encode({1: -2}) == b"\x08\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01"
    assert wire.decode(wire.encode({1: "a", 2: [b"x", b"y"], 3: 300})) == {1: [b"a"], 2: [b"x", b"y"], 3: [300]}


def test_grpc_errors_are_read_out_of_compressed_headers(bench: Any) -> None:
    # What containerd 1.6 sent for an image that was there already.
    block = bytes.fromhex(
        "880f108b1d75d0620d263d4c4d6564"
        "00889acac8b21234da8f0136"
        "00899acac8b5254207317f97352398aa7f23fffd1fffbfcdc50745851c9e942f932128"
    )
    assert bench("bench.headers").status([block]) == (6, 'image "a{b}": already exists')

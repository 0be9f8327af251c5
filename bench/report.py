"""What a run says: a table on the terminal, JSON to keep, and the machine it was measured on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import containerd, wherry_side
from .rows import NOT_ASKED

Report = dict[str, Any]


def machine(work: Path) -> dict[str, Any]:
    """What the numbers depend on. `load` tells of neighbours: busy ones make ratios worth more than values."""
    processor = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": processor[1] if processor else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if memory else None,
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "cgroup": "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1",
        "filesystem": _filesystem(work),
        "load": round(os.getloadavg()[0], 2),
    }


def _filesystem(path: Path) -> str:
    while not path.exists():
        path = path.parent
    found = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """Of everything that takes part; `-` for what is not there."""
    found = {"python": platform.python_version()}
    for name, ask in (
        ("wherry", wherry_side.version), ("nats-server", wherry_side.nats_version), ("containerd", containerd.version),
    ):  # fmt: skip
        found[name] = "-"
        with contextlib.suppress(Exception):  # whatever is wrong with it, its rows will say
            found[name] = ask()
    for name in ("runc", "crun", "docker-registry"):
        found[name] = _said(name)
    # containerd hands gzip to it where it is installed.
    found["unpigz"] = shutil.which("unpigz") or "-"
    return found


def _said(program: str) -> str:
    with contextlib.suppress(OSError):
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.split()
        return next((word for word in said if re.match(r"v?\d+\.\d", word)), "-")
    return "-"


def make(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any], versions: Mapping[str, str]) -> Report:
    """A report. Each measured row says when: rows of one file may be of several runs (`merge`)."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "machine": dict(machine),
        "versions": dict(versions),
        "rows": [{**row, "at": now} if asked(row) else dict(row) for row in rows],
    }


def asked(row: Mapping[str, Any]) -> bool:
    """Whether the row was part of its run, measured or not."""
    return row.get("why") != NOT_ASKED


def merge(new: Report, path: Path) -> Report:
    """The report, with the rows that were not asked for as an earlier run on this machine left them."""
    try:
        old: Report = json.loads(path.read_text())
    except (OSError, ValueError):
        return new
    if _identity(old) != _identity(new):
        return new
    before = {row["id"]: row for row in old["rows"]}
    return {**new, "rows": [row if asked(row) else before.get(row["id"], row) for row in new["rows"]]}


def _identity(report: Report) -> dict[str, Any]:
    return {key: value for key, value in report["machine"].items() if key != "load"}


def write(report: Report, directory: Path) -> Path:
    """`latest.json` and `latest.svg`."""
    from .picture import draw

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "latest.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".svg").write_text(draw(report))
    return path


def number(value: float | None) -> str:
    """At most four digits, no exponent."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(report: Report) -> str:
    """The rows that were asked for, with the spread of their runs."""
    lines = [f"{'':22}{'Wherry':>10}{'containerd':>12}{'':6}{'ratio':>7}  runs  spread (Wherry | containerd)"]
    for row in filter(asked, report["rows"]):
        ratio = number(row["ratio"])
        mark = "" if row["ratio"] is None else ("  " if better(row) else " !")
        lines.append(
            f"{row['id']:22}{number(row['wherry']):>10}{number(row['containerd']):>12} {row['unit']:5}"
            f"{ratio:>7}{mark:2}{row['runs']:>4}  {_spread(row, 'wherry')} | {_spread(row, 'containerd')}"
        )
        if row.get("why"):
            lines.append(f"{'':24}{row['why']}")
    lines.append("ratio: Wherry / containerd; ! where containerd is better (less, or more for 1/s)")
    return "\n".join(lines)


def better(row: Mapping[str, Any]) -> bool:
    """Whether Wherry is at least as good."""
    ratio: float = row["ratio"]
    return ratio <= 1 if row["better"] == "lower" else ratio >= 1


def _spread(row: Mapping[str, Any], side: str) -> str:
    samples = row["samples"][side]
    return f"{number(min(samples))}..{number(max(samples))}" if samples else "-"

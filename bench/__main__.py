"""`python -m bench [ROW...]`: Wherry and Debian's containerd side by side.

Starts both on fresh directories, measures them in turn, prints medians and ratios, and writes JSON and a picture.
Needs root. A row that cannot be measured is null and says why; it ends nothing else.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "bench" / "results"
ASIDE = CHECKOUT / ".cache" / "bench"
sys.path.insert(0, str(CHECKOUT / "examples"))

from . import measures, report  # noqa: E402 - the images are found through the path above
from .lab import FAILURES, Lab  # noqa: E402
from .rows import ROWS, SIDES, Results, select  # noqa: E402


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {row.id:22}{row.title} [{row.unit}]" for row in ROWS)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=f"rows:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("rows", nargs="*", metavar="ROW", help="a row's id or its beginning; commas do too")
    parser.add_argument("--rows", dest="more", default="", metavar="ROWS", help="the same, separated by commas")
    parser.add_argument("--runs", type=int, default=0, help="of each row and side (5; lives and execs 20)")
    parser.add_argument("--quick", action="store_true", help="few runs, to see that it works; nothing to publish")
    parser.add_argument("--only", choices=SIDES, help="one side alone")
    parser.add_argument("--out", type=Path, help=f"where latest.json goes ({RESULTS.relative_to(CHECKOUT)}; "
                        f"{ASIDE.relative_to(CHECKOUT)} when --quick or --only)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="a disk with 20 GB to spare (/var/tmp)")
    return parser.parse_args(arguments)


def say(words: str) -> None:
    print(f"==> {words}", file=sys.stderr, flush=True)


def _measure(lab: Lab) -> None:
    for measure in measures.ALL:
        try:
            measure(lab)
        except FAILURES as error:
            say(f"{measure.__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers 0, also where rows are null: they say why themselves."""
    asked = _arguments(arguments)
    if os.geteuid() != 0:
        sys.exit("both sides mount and make cgroups: run this as root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        wanted = select(word for part in [*asked.rows, asked.more] for word in part.split(",") if word)
    except ValueError as error:
        sys.exit(str(error))
    runs = asked.runs or (2 if asked.quick else 5)
    results = Results(wanted, [asked.only] if asked.only else SIDES)
    began, machine = time.monotonic(), report.machine(asked.work)
    with Lab(results, asked.work, runs, asked.quick, say) as lab:
        _measure(lab)
        made = report.make(results.rows(), machine, report.versions())
        print(report.table(made))
        out = asked.out or (ASIDE if asked.quick or asked.only else RESULTS)
        path = report.write(report.merge(made, out / "latest.json"), out)
    say(f"{path} and {path.with_suffix('.svg').name}, after {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

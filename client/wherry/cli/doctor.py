"""`wherry doctor`: what is broken on the node, why, and what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from .common import Format, FormatOption, clean, show_one

if TYPE_CHECKING:
    from wherry.doctor import Report


def command(format: FormatOption = Format.table) -> None:
    """Look, and change nothing. Exits 0 when nothing is broken, 1 otherwise."""
    import uvloop

    from wherry.doctor import examine

    report = uvloop.run(examine())
    if format is Format.json:
        show_one({"healthy": report.healthy, **asdict(report)}, format)
    else:
        _print(report)
    raise typer.Exit(0 if report.healthy else 1)


def _print(report: Report) -> None:
    for severity in ("broken", "warning", "note"):
        for finding in report.findings:
            if finding.severity == severity:
                print(clean(f"{severity.upper()}: {finding.what}"))
                print(clean(f"  why: {finding.why}"))
                print(clean(f"  do:  {finding.todo}"))
    for left in report.left_out:
        print(clean(f"not looked at: {left.part} ({left.why})"))
    broken = sum(finding.severity == "broken" for finding in report.findings)
    verdict = "nothing is broken" if report.healthy else f"{broken} broken"
    print(f"{verdict}; looked at {', '.join(report.looked_at) or 'nothing'}")

"""The picture of a report: how many times better or worse than containerd each row is, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from .report import better, number

_WIDTH, _LEFT, _ROW, _TOP = 1180, 200, 26, 64
_MIDDLE, _HALF = 560, 300  # where "equal" stands, and how long a bar can be
_DECADE = 10.0  # a bar of full length is this many times better or worse
_GOOD, _BAD, _GREY = "#2f7d4f", "#b5483a", "#777"


def draw(report: Mapping[str, Any]) -> str:
    """One bar per row: to the right, green, where Wherry is better; to the left, red, where containerd is."""
    rows = report["rows"]
    height = _TOP + _ROW * len(rows) + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif"'
        f' font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(16, 24, "Wherry and containerd side by side: medians of alternating runs", size=17),
        _text(16, 44, _subtitle(report), fill=_GREY, size=12),
        *_scale(height - 30),
    ]
    for index, row in enumerate(rows):
        parts += _bar(row, _TOP + index * _ROW)
    return "\n".join([*parts, "</svg>", ""])


def _subtitle(report: Mapping[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    return (
        f"Wherry {versions['wherry']}, containerd {versions['containerd']}, runc {versions['runc']}, "
        f"crun {versions['crun']}; {machine['cores']} cores, {machine['cpu']}, Linux {machine['kernel']}"
    )


def _scale(bottom: int) -> list[str]:
    parts = []
    for times in (1 / 10, 1 / 5, 1 / 2, 1, 2, 5, 10):
        x = _MIDDLE + _HALF * math.log(times, _DECADE)
        colour, width = (_GREY, 1.5) if times == 1 else ("#ddd", 1.0)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="{colour}" stroke-width="{width}"/>'
        )
        label = "equal" if times == 1 else f"{max(times, 1 / times):.0f}x {'better' if times > 1 else 'worse'}"
        parts.append(_text(x, bottom + 18, label, fill=_GREY, anchor="middle", size=11))
    return parts


def _bar(row: Mapping[str, Any], y: int) -> list[str]:
    parts = [f"<g><title>{escape(row['title'])}</title>", _text(16, y + 17, row["id"])]
    if row["ratio"] is None:
        why = row["why"] if len(row["why"]) < 110 else row["why"][:107] + "..."
        parts.append(_text(_LEFT, y + 17, f"not measured: {why}", fill=_GREY, size=11))
    else:
        good = better(row)
        gain = row["ratio"] if row["better"] == "higher" else 1 / row["ratio"]
        length = max(-1.0, min(1.0, math.log(gain, _DECADE))) * _HALF
        x = _MIDDLE + min(0.0, length)
        parts.append(
            f'<rect x="{x:.1f}" y="{y + 4}" width="{abs(length):.1f}" height="{_ROW - 8}"'
            f' fill="{_GOOD if good else _BAD}"/>'
        )
        words = f"{number(row['wherry'])} / {number(row['containerd'])} {row['unit']}  =  {number(row['ratio'])}"
        parts.append(_text(_WIDTH - 16, y + 17, words, anchor="end", fill=_GOOD if good else _BAD))
    return [*parts, "</g>"]


def _text(x: float, y: float, words: str, *, fill: str = "#222", anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" fill="{fill}" text-anchor="{anchor}" font-size="{size}" '
        f'xml:space="preserve">{escape(words)}</text>'
    )

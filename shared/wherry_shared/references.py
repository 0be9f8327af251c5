"""What a record's labels say to the garbage collector (containerd's rules), and how records travel to it.

A node is a record by its type, namespace and key; types are those of a lease's resources, `leases` and `containers`
besides. References never leave their namespace, so they are pairs of type and key.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgpack

PREFIX = "containerd.io/gc."
ROOT = f"{PREFIX}root"
EXPIRE = f"{PREFIX}expire"
FLAT = f"{PREFIX}flat"
CONTENT, INGESTS, IMAGES, CONTAINERS, LEASES, SNAPSHOTS = (
    "content", "ingests", "images", "containers", "leases", "snapshots/",
)  # fmt: skip

PAGE_BYTES = 448 << 10
Ref = tuple[str, str]
"""Type and key."""

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d([.,]\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)
_DURATION = re.compile(r"(\d++(?:\.\d*+)?|\.\d++)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_CONDITION = re.compile(r"usedat(<=|>=|<|>)(.*)", re.DOTALL)
_NAMED = {"content": CONTENT, "image": IMAGES, "container": CONTAINERS}


@dataclass(slots=True)
class Node:
    """One record as the collector sees it.

    root: it lives by itself; until: up to this unix time (0: for ever). gone: it is not there any more.
    hard: what it is made of (an image's target, a parent), kept under a flat lease too. soft: what its labels keep.
    back: what keeps it while it lives (back references). conditions: snapshots that it keeps while their use was so
    long ago (type, key, operator, seconds). used: when it was last used (unix time), for these.
    """

    type: str
    namespace: str
    key: str
    root: bool = False
    until: float = 0.0
    gone: bool = False
    flat: bool = False
    hard: list[Ref] = field(default_factory=list)
    soft: list[Ref] = field(default_factory=list)
    back: list[Ref] = field(default_factory=list)
    conditions: list[tuple[str, str, str, float]] = field(default_factory=list)
    used: list[float] = field(default_factory=list)

    def refer(self, labels: Mapping[str, str], *, rootable: bool = False) -> None:
        """Take over what labels say. rootable: `gc.root` counts here (content and snapshots)."""
        for label, value in labels.items():
            if not label.startswith(PREFIX):
                continue
            kind, _, rest = label.removeprefix(PREFIX).partition(".")
            if kind == "ref" and (found := _named(rest, ("content", "image"))):
                self.soft.append((found, value))
            elif kind == "bref" and (found := _named(rest, ("content", "image", "container"))):
                self.back.append((found, value))
            elif kind == "cond":
                self._condition(rest, value)
            elif label.startswith(ROOT) and rootable:
                self.root = True

    def _condition(self, name: str, value: str) -> None:
        if name.startswith("value-usedat"):
            if (at := parse_time(value)) is not None:
                self.used.append(at.timestamp())
        elif name.startswith("snapshot"):
            snapshotter = name.removeprefix("snapshot").lstrip("./").partition("/")[0]
            conditions, bar, key = value.partition("|")
            for condition in conditions.split(",") if bar else ():
                match = _CONDITION.fullmatch(condition)
                seconds = parse_duration(match[2]) if match else None
                if match and seconds is not None:
                    self.conditions.append((SNAPSHOTS + snapshotter, key, match[1], seconds))


def _named(rest: str, names: Iterable[str]) -> str:
    """The type that `content`, `content.x`, `content/x` or `snapshot.<snapshotter>[/x]` stands for; "" for none."""
    if rest.startswith("snapshot."):
        return SNAPSHOTS + rest.removeprefix("snapshot.").partition("/")[0]
    for name in names:
        if rest.startswith(name) and rest[len(name) : len(name) + 1] in ("", ".", "/"):
            return _NAMED[name]
    return ""


def parse_time(text: str) -> datetime | None:
    """An RFC 3339 time; None for what is none."""
    if not _RFC_3339.fullmatch(text):
        return None
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def expires_at(labels: Mapping[str, str]) -> datetime | None:
    """The time of `containerd.io/gc.expire`; None without it, or when it is no RFC 3339 time (then it is kept)."""
    return parse_time(labels.get(EXPIRE, ""))


def parse_duration(text: str) -> float | None:
    """Seconds of a duration as Go writes it (`1h30m`, `-1.5s`, `300ms`); None for what is none."""
    sign, body = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if body == "0":
        return 0.0
    seconds, at = 0.0, 0
    while part := _DURATION.match(body, at):  # never a search: that takes the square of the length
        seconds += float(part[1]) * _UNITS[part[2]]
        at = part.end()
    return sign * seconds if at and at == len(body) else None


def some_fields(document: bytes, names: Container[str]) -> dict[str, Any]:
    """The fields of a record's document that have these names; the others are not decoded."""
    unpacker = msgpack.Unpacker(timestamp=3, max_buffer_size=len(document))
    unpacker.feed(document)
    found: dict[str, Any] = {}
    for _ in range(unpacker.read_map_header()):
        if (name := unpacker.unpack()) in names:
            found[name] = unpacker.unpack()
        else:
            unpacker.skip()
    return found


# ---- how they travel


class Page:
    """Nodes on their way, grouped by type and namespace; a node of which nothing is to be told is its key alone."""

    def __init__(self) -> None:
        self._groups: list[tuple[str, str, list[Any]]] = []
        self._size = 0

    def add(self, node: Node) -> bool:
        """False when it has no room any more: the page is full."""
        row = _row(node)
        size = _length(node.key) + (_weight(row) if row is not node.key else 0)
        if self._size and self._size + size > PAGE_BYTES:
            return False
        self._size += size
        if not self._groups or self._groups[-1][:2] != (node.type, node.namespace):
            self._groups.append((node.type, node.namespace, []))
        self._groups[-1][2].append(row)
        return True

    def encode(self, *head: Any) -> bytes:
        """The document, with `head` before the nodes."""
        made: bytes = msgpack.packb([*head, self._groups])
        return made


def _row(node: Node) -> Any:
    if node.gone:
        return [node.key]
    refs = [[x for ref in group for x in ref] for group in (node.hard, node.soft, node.back, node.conditions)]
    row = [node.key, node.root, node.until, node.flat, *refs, node.used]
    return row if any(row[1:]) else node.key


def _weight(row: list[Any]) -> int:
    """About how many bytes the row's references take."""
    return 24 + sum(_length(x) for group in row[4:8] for x in group if isinstance(x, str)) if len(row) > 1 else 0


def _length(text: str) -> int:
    """At most so many bytes."""
    return (len(text) if text.isascii() else 4 * len(text)) + 5


def encode_dead(groups: list[tuple[str, str, list[str]]]) -> bytes:
    """What is to be swept: type, namespace and keys."""
    made: bytes = msgpack.packb(groups)
    return made


def decode(document: bytes) -> list[Any]:
    """A document's items: of a page its head, then its groups for `nodes`."""
    items: list[Any] = msgpack.unpackb(document, strict_map_key=True)
    return items


def nodes(groups: Iterable[tuple[str, str, list[Any]]]) -> Iterator[Node]:
    """The nodes of a page."""
    for type, namespace, rows in groups:
        for row in rows:
            if isinstance(row, str):
                yield Node(type, namespace, row)
            elif len(row) == 1:
                yield Node(type, namespace, row[0], gone=True)
            else:
                key, root, until, flat, hard, soft, back, conditions, used = row
                yield Node(
                    type, namespace, key, root, until, False, flat, _pairs(hard), _pairs(soft), _pairs(back),
                    list(zip(*(conditions[i::4] for i in range(4)), strict=True)), used,
                )  # fmt: skip


def _pairs(flat: list[str]) -> list[Ref]:
    return list(zip(flat[::2], flat[1::2], strict=True))

"""PAX extended headers (POSIX.1-2017, pax, "pax Extended Header"): records of `length keyword=value`."""

from __future__ import annotations

from wherry_shared.errors import InvalidArgument

from .names import show

Records = dict[bytes, bytes]

_XATTR = b"SCHILY.xattr."
_TEXT = frozenset({b"path", b"linkpath", b"GNU.sparse.name"})
_NANOSECONDS = 1_000_000_000
_DIGITS = 19  # of a number below 2**63; more are never converted


def parse(payload: bytes) -> Records:
    """The records of one header; of two with one keyword the later counts. Raises `InvalidArgument`.

    Sparse format 0.0 repeats two keywords for every segment: they are gathered under `GNU.sparse.map`, as 0.1 has them.
    """
    records: Records = {}
    segments: list[bytes] = []
    at = 0
    while at < len(payload):
        blank = payload.find(b" ", at, at + _DIGITS)
        digits = payload[at : max(at, blank)]
        stop = at + int(digits) if digits.isdigit() else -1  # behind the record's newline
        keyword, equals, value = payload[blank + 1 : stop - 1].partition(b"=")
        if stop <= blank + 1 or stop > len(payload) or payload[stop - 1] != 10 or not (keyword and equals):
            raise InvalidArgument(f"malformed PAX record at byte {at} of its header")
        if b"\0" in keyword or (keyword in _TEXT and b"\0" in value):
            raise InvalidArgument(f"NUL in the PAX record {show(keyword)}")
        if keyword == b"GNU.sparse.offset" or keyword == b"GNU.sparse.numbytes":
            if (len(segments) % 2 == 0) != (keyword == b"GNU.sparse.offset"):
                raise InvalidArgument("offsets and lengths of a sparse file do not alternate")
            segments.append(value)
        records[keyword] = value
        at = stop
    if segments:
        records[b"GNU.sparse.map"] = b",".join(segments)
    return records


def number(records: Records, keyword: bytes, otherwise: int) -> int:
    """A record that is a number from 0 to 2^63 - 1; absent or empty it leaves the header's value."""
    value = records.get(keyword)
    if not value:
        return otherwise
    return decimal(value, show(keyword))


def decimal(value: bytes, what: str) -> int:
    """A number from 0 to 2^63 - 1. Raises `InvalidArgument`, naming `what` it should have been."""
    if len(value) > _DIGITS or not value.isdigit() or (result := int(value)) >= 2**63:
        raise InvalidArgument(f"{show(value)} is no {what}")
    return result


def time(records: Records, keyword: bytes, otherwise: int) -> int:
    """A time in nanoseconds, possibly negative: seconds with any number of decimals, of which nine count."""
    value = records.get(keyword)
    if not value:
        return otherwise
    seconds, _, fraction = value.lstrip(b"-").partition(b".")
    if fraction and not fraction.isdigit():
        raise InvalidArgument(f"{show(value)} is no {show(keyword)}")
    result = decimal(seconds, show(keyword)) * _NANOSECONDS + int(fraction[:9].ljust(9, b"0") or b"0")
    return -result if value.startswith(b"-") else result


def text(records: Records, keyword: bytes, otherwise: bytes) -> bytes:
    """A record that is text; absent or empty it leaves the header's value."""
    return records.get(keyword) or otherwise


def xattrs(records: Records) -> list[tuple[bytes, bytes]]:
    """Extended attributes as (name, value), in the header's order, without those that encode overlayfs itself.

    `trusted.overlay.*` and `user.overlay.*` (redirect, metacopy, opaque) direct the file system that the layer will be
    mounted with: they are never a layer's to say, and tools that archive an upper directory leave them in by mistake.
    """
    found = []
    for keyword, value in records.items():
        if keyword.startswith(_XATTR):
            name = keyword[len(_XATTR) :]
            if not name.startswith((b"trusted.overlay.", b"user.overlay.")):
                found.append((name, value))
    return found

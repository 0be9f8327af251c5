"""The diff service's tar reader: headers with right checksums and anything in their fields.

However the stream is cut, it reads the same, and what it gives out keeps the promises of `Entry`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from wherry_diff import tar
from wherry_diff.limits import Limits
from wherry_diff.names import clean
from wherry_diff.tar import Entry, Reader, Stream
from wherry_shared.errors import InvalidArgument, ResourceExhausted

from .. import archives
from ..archives import summed

LIMITS = Limits(max_bytes=1 << 30, max_entries=300, max_name_bytes=1 << 16, max_header=1 << 14)
MAX_LEN = 8192
TOKENS = archives.TOKENS
seeds = archives.seeds


def one(data: bytes) -> None:
    data = summed(data)
    whole = list(read([data]))
    assert list(read(cut(data, 1 + data[0] if data else 1))) == whole
    for entry in whole:
        if isinstance(entry, Entry):
            promises(entry)


def cut(data: bytes, size: int) -> Iterable[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def read(chunks: Iterable[bytes]) -> Iterator[object]:
    """Entries and bodies, and at the end the error's class, if there is one."""
    reader = Reader(Stream(iter(chunks)), LIMITS)
    try:
        while (entry := reader.next()) is not None:
            yield entry
            if entry.kind == tar.REGULAR and len(entry.name) % 2:  # the others are gone past
                body = b""
                while reader.left:
                    body += reader.take(reader.left)
                yield body
    except (InvalidArgument, ResourceExhausted) as error:
        yield type(error)


def promises(entry: Entry) -> None:
    assert entry.name == clean(entry.name) and b"\0" not in entry.name and not entry.name.startswith(b"/")
    assert not {b"", b".", b".."} & set(entry.name.split(b"/")) or not entry.name
    assert 0 <= entry.mode <= 0o7777 and 0 <= entry.uid < 2**32 - 1 and 0 <= entry.gid < 2**32 - 1
    assert 0 <= entry.mtime < 2**63 and 0 <= entry.atime < 2**63 and 0 <= entry.size < 2**63
    for (start, length), (after, _) in zip(entry.segments or [], (entry.segments or [])[1:], strict=False):
        assert start + length <= after

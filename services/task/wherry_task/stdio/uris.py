"""What stands for a stream: "" (nothing), a path (a FIFO of the caller's), or `scheme://path?query`."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl

from wherry_shared.errors import InvalidArgument

BUS, LOG, FILE, BINARY, FIFO = "bus", "log", "file", "binary", "fifo"

LOG_SIZE, LOG_FILES = 16 << 20, 5
# What everybody may ask of a log; an admin may want one that is never rotated, too.
LOG_SIZE_MIN, LOG_SIZE_MAX, LOG_FILES_MAX = 4 << 10, 256 << 20, 20


@dataclass(frozen=True)
class Uri:
    """A stream's name, taken apart. scheme: "" for nothing, `fifo` for a path."""

    scheme: str
    path: str
    query: str


def parse(uri: str) -> Uri:
    """Any string; whether the scheme is known, and whose it is, is not looked at here."""
    if not uri:
        return Uri("", "", "")
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return Uri(FIFO, uri, "")
    path, _, query = rest.partition("?")
    return Uri(scheme, path, query)


def log_limits(query: str) -> tuple[int, int]:
    """The most bytes of one file of a log, 0 for no bound, and how many files. InvalidArgument."""
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = options.keys() - {"max_size", "max_files"}
    if unknown:
        raise InvalidArgument(f"log options {', '.join(sorted(unknown))}: there are max_size and max_files")
    try:
        size, files = int(options.get("max_size", LOG_SIZE)), int(options.get("max_files", LOG_FILES))
    except ValueError:
        raise InvalidArgument(f"log options {query!r}: not numbers") from None
    if size < 0 or not 1 <= files <= 1000:
        raise InvalidArgument(f"log options {query!r}: out of bounds")
    return size, files

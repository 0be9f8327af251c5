"""Applies a layer in one pass: decompress, hash and extract."""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO

from wherry_shared.errors import DeadlineExceeded, Unavailable
from wherry_shared.values import Mount

from . import processors, targets
from .ahead import Ahead
from .decompress import CHUNK, decompress
from .extract import Target, extract
from .limits import DEFAULT, Limits
from .processors import Processor
from .tar import Reader, Stream

_DROP_BYTES = 8 << 20  # of a blob that are dropped from the page cache at once
_AHEAD = 16  # pieces of 256 KiB that may wait between the two threads
_PLAIN = "application/vnd.oci.image.layer.v1.tar"
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Application:
    """What is asked: the layer in the file `path`, onto `mounts`.

    at: a directory to mount on, privately. payloads: for the stream processors, by their ids. sync: all that was
    written is on the disk before the answer. deadline: unix time in seconds, 0 for none.
    """

    path: str
    media_type: str
    mounts: tuple[Mount, ...]
    at: str
    standalone: bool = False
    sync: bool = False
    processors: tuple[Processor, ...] = ()
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    deadline: float = 0.0
    limits: Limits = DEFAULT


@dataclass(frozen=True, slots=True)
class Applied:
    """What came of a layer: the digest and size (bytes) of the whole uncompressed stream, and how many entries."""

    diff_id: str
    size: int
    entries: int


def run(job: Application) -> Applied:
    """Do what is asked; blocks. Raises what `apply`, `targets.opened` and `processors.processed` do."""
    steps = processors.chain(job.media_type, job.processors)
    with ExitStack() as stack:
        target = stack.enter_context(targets.opened(job.mounts, job.at, standalone=job.standalone))
        try:
            file: BinaryIO = stack.enter_context(open(job.path, "rb", buffering=0))
        except OSError as e:
            raise Unavailable(f"{job.path}: {e.strerror}") from e
        source: BinaryIO | Iterable[bytes] = _passing(file)
        media_type = job.media_type
        if steps:
            processed = processors.processed(file, media_type, steps, job.payloads, job.deadline)
            source, media_type = stack.enter_context(processed), steps[-1].returns
        applied = apply(source, media_type, target, job.limits, job.deadline)
        if job.sync:
            sync(target.root)
    return applied


def _passing(file: BinaryIO) -> Iterator[bytes]:
    """A blob's bytes. What was read leaves the page cache, and makes room there for what it unpacks to."""
    begin = end = 0
    while data := file.read(CHUNK):
        end += len(data)
        if end - begin >= _DROP_BYTES:
            os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)
            begin = end
        yield data


def apply(
    source: BinaryIO | Iterable[bytes], media_type: str, target: Target, limits: Limits = DEFAULT, deadline: float = 0.0
) -> Applied:
    """Extract the layer in `source` onto `target`; blocks, so call it in a thread or process of its own.

    `source` is read in another thread, by one `read` or `next` at a time, never after the return; it is not closed.
    A return, an error's too, waits for the read in hand. Raises `Unimplemented` (media type), `DataLoss` (cut off or
    corrupt), `Unavailable` (the source raised an `OSError`), `DeadlineExceeded` (unix time), and what `extract`
    raises; other errors of the source pass through as they are.
    """
    hashed = _Hashed(decompress(source, media_type, limits), deadline)
    with Ahead(hashed, _AHEAD) as pieces:
        entries = extract(Reader(Stream(pieces), limits), target, limits)
    return Applied(f"sha256:{hashed.sha256.hexdigest()}", hashed.size, entries)


class _Hashed:
    """Pieces as they pass, hashed and counted, until the deadline."""

    def __init__(self, pieces: Iterator[bytes], deadline: float) -> None:
        self._pieces = pieces
        self._deadline = deadline
        self.sha256 = hashlib.sha256()
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            if self._deadline and time.time() > self._deadline:
                raise DeadlineExceeded("the layer was not extracted by the deadline")
            self.sha256.update(piece)
            self.size += len(piece)
            yield piece


def sync(root: str) -> None:
    """Write everything of the file system that `root` lies on to the disk: syncfs(2). Raises OSError."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs: Callable[[int], int] = _libc.syncfs
        if syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), root)
    finally:
        os.close(fd)

"""A disk that logs its writes and flushes, and what a power cut at any moment of the log leaves of it."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

BYTES = 3 << 30
SECTOR = 512
# dm-log-writes' format, as QEMU writes it: sector, count, flags, bytes; the data follow in the next sector.
_HEADER = struct.Struct("<QQQQ")
_FLUSH, _DISCARD = 1, 4
# How much of what came after the last flush is on the disk: the device may write that in any order, or not at all.
KEPT = (0.0, 0.5, 0.5, 0.85, 1.0)


def blank(image: Path) -> Path:
    """An empty disk in that file."""
    with image.open("wb") as file:
        file.truncate(BYTES)
    return image


@contextmanager
def logged(base: Path, image: Path, mkfs: str = "") -> Iterator[tuple[Path, Path]]:
    """The filesystem of an image (a new one with `mkfs`), mounted, and the log of its disk."""
    log, export, mount = (base / name for name in ("log", "export", "mount"))
    log.write_bytes(b"")
    export.touch()
    mount.mkdir(exist_ok=True)
    daemon = subprocess.Popen([
        "qemu-storage-daemon", "--blockdev", f"file,node-name=image,filename={image},discard=unmap",
        "--blockdev", f"file,node-name=log,filename={log}",
        "--blockdev", f"blklogwrites,node-name=both,file=image,log=log,log-sector-size={SECTOR}",
        "--export", f"fuse,id=e,node-name=both,mountpoint={export},writable=on",
    ])  # fmt: skip
    try:
        while export.stat().st_size != BYTES:
            if daemon.poll() is not None:
                raise RuntimeError("qemu-storage-daemon does not start")
            time.sleep(0.05)
        if mkfs:
            subprocess.run([*mkfs.split(), export], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "loop", export, mount], check=True)
        try:
            yield mount, log
        finally:
            subprocess.run(["umount", mount], check=True)
    finally:
        daemon.terminate()
        daemon.wait()


class Entry(NamedTuple):
    """What the disk was told, and where in the log that stands."""

    at: int
    sector: int
    sectors: int
    flags: int


class Log:
    """The log of a disk, and images of it as it was before an entry. Entries have to be asked for in their order.

    whole: the disk as it was when the log began; it becomes what is durable.
    """

    def __init__(self, path: Path, whole: Path) -> None:
        self._file = path.open("rb")
        self.entries = list(self._read(path.stat().st_size))
        self._flushes = [number for number, entry in enumerate(self.entries) if entry.flags & _FLUSH]
        self._whole = whole
        self._applied = 0

    def _read(self, size: int) -> Iterator[Entry]:
        at = SECTOR  # behind the superblock
        while at + SECTOR <= size:
            self._file.seek(at)
            sector, sectors, flags, _ = _HEADER.unpack(self._file.read(_HEADER.size))
            yield Entry(at, sector, sectors, flags)
            at += SECTOR + (0 if flags & _DISCARD else sectors * SECTOR)

    def cut(self, number: int, image: Path) -> str:
        """Make the disk as the power leaves it before the entry of that number. Answers what was lost, for people."""
        flush = bisect_left(self._flushes, number) - 1
        durable = self._flushes[flush] + 1 if flush >= 0 else 0
        with self._whole.open("r+b") as file:
            for entry in self.entries[self._applied : durable]:
                self._apply(file, entry)
        self._applied = max(self._applied, durable)
        subprocess.run(["cp", "--sparse=always", self._whole, image], check=True)
        dice = random.Random(number)
        kept, lost = dice.choice(KEPT), 0
        with image.open("r+b") as file:
            for entry in self.entries[durable:number]:
                if dice.random() < kept:
                    torn = kept < 1 and entry.sectors > 8 and dice.random() < 0.2
                    self._apply(file, entry, dice.randrange(entry.sectors // 8) * 8 if torn else None)
                else:
                    lost += 1
        return f"{number - durable} writes after the last flush, {lost} lost"

    def _apply(self, file: BinaryIO, entry: Entry, sectors: int | None = None) -> None:
        if entry.flags & _DISCARD:
            file.flush()
            hole = ["-o", str(entry.sector * SECTOR), "-l", str(entry.sectors * SECTOR)]
            subprocess.run(["fallocate", "--punch-hole", *hole, str(file.name)], check=True)
        elif entry.sectors:
            file.seek(entry.sector * SECTOR)
            count = entry.sectors if sectors is None else sectors
            file.write(os.pread(self._file.fileno(), count * SECTOR, entry.at + SECTOR))

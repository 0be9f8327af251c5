"""`python -m power [--seconds N] [--cuts N] [--again N] [--seed N] [--mkfs COMMAND] [--keep]`: see the package. Takes
root, and Debian's qemu-system-common. Ends with what was lost, and non-zero then.

In a mount namespace of its own (`make power` does that), lest one that is made meanwhile holds the disk mounted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_left
from pathlib import Path

from node import Node

from .disk import Log, blank, logged

TESTS = Path(__file__).parent.parent
# In a mount namespace of its own another boot's id, an empty state directory, and the disk where it was.
BOOT = """
set -e
cd {base}
cat /proc/sys/kernel/random/uuid >boot_id
mount --bind boot_id /proc/sys/kernel/random/boot_id
mount -t tmpfs -o mode=700 tmpfs node/state
{mount}
exec {python} -m power.boot {base} {moment}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="power")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--again", type=int, default=0, help="so often in each cut's recovery, too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mkfs", default="mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0")
    parser.add_argument("--keep", action="store_true", help="the folder with the log and the notes")
    given = parser.parse_args()
    if not shutil.which("qemu-storage-daemon"):
        parser.error("it takes qemu-storage-daemon: apt-get install qemu-system-common")
    base = Path(tempfile.mkdtemp(prefix="wherry-power-", dir="/var/tmp"))
    try:
        _load(base, given.seconds, given.mkfs)
        return _cut(base, given.cuts, given.again, given.seed)
    finally:
        if given.keep:
            print(base)
        else:
            shutil.rmtree(base)


def _load(base: Path, seconds: float, mkfs: str) -> None:
    for name in ("bin", "proc", "dev", "sys"):
        (base / "rootfs" / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", base / "rootfs/bin")
    (base / "node/state").mkdir(parents=True)
    with logged(base, blank(base / "image"), mkfs) as (mount, log):
        (base / "node/root").symlink_to(mount)
        with Node(base / "node") as node:
            _python("power.load", str(log), str(base / "notes"), str(seconds), env=node.environment)
            shutil.copy(log, base / "taken")  # what the node's end writes is no part of it


def _cut(base: Path, cuts: int, again: int, seed: int) -> int:
    log = Log(base / "taken", blank(base / "durable"))
    notes = [json.loads(line) for line in (base / "notes").read_text().splitlines()]
    places = [entry.at for entry in log.entries]
    first = bisect_left(places, notes[0]["asked"])
    last = bisect_left(places, max(note.get("answered", 0) for note in notes))
    print(f"{len(notes) // 2} requests, {len(places)} writes and flushes", flush=True)
    failed = 0
    for number in sorted(random.Random(seed).sample(range(first, last), cuts)):
        print(f"-- {number}:", log.cut(number, base / "cut"), flush=True)
        failed += _again(base, places[number], again) if again else _boot(base, places[number])
    print(f"{cuts * max(again, 1)} cuts, {failed} with something lost")
    return min(failed, 1)


def _again(base: Path, moment: int, cuts: int) -> int:
    """Have a node recover on the disk `cut`, and cut its power meanwhile; answers how many cuts failed."""
    subprocess.run(["cp", "--sparse=always", base / "cut", base / "begun"], check=True)
    if _boot(base):
        return cuts
    log, failed = Log(base / "recovery", base / "begun"), 0
    for number in sorted(random.Random(moment).sample(range(len(log.entries)), cuts)):
        print(f"   {number} of {len(log.entries)}:", log.cut(number, base / "cut"), flush=True)
        failed += _boot(base, moment)
    return failed


def _boot(base: Path, moment: int | None = None) -> bool:
    """Start a node on the disk `cut` as after a boot, and check it; see power.boot. Answers whether that failed."""
    mount = "mount -o loop cut mount" if moment is not None else ""
    script = BOOT.format(base=base, python=sys.executable, mount=mount, moment="" if moment is None else moment)
    return subprocess.run(["unshare", "--mount", "sh", "-c", script], env=_environment()).returncode != 0


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS / 'client'}", **more}


def _python(module: str, *arguments: str, env: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], env=_environment(**env), check=True)


if __name__ == "__main__":
    sys.exit(main())

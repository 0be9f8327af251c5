"""`python -m fuzz [--seconds N] [--jobs N] [--engine atheris|hypothesis] [--found FOLDER] [TARGET[=INPUT]...]`

Every target for N seconds, each in a process of its own; ends with what failed, and non-zero then. TARGET=INPUT runs
one input that was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import ROOMS, TARGETS

GRACE = 90.0
"""Seconds that a process may take beside its fuzzing: to import, to run its seeds, to end."""
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where the processes have their files: a process that ends as fuzzers do cleans nothing up, and some write a lot."""
TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ran:
    """How it went. `count` inputs were run; `found`: the files of those that failed."""

    target: str
    failed: bool
    count: int
    said: str
    found: list[Path]


def engine() -> str:
    """atheris where it is installed."""
    return "atheris" if importlib.util.find_spec("atheris") else "hypothesis"


def run(
    target: str, seconds: float, found: Path, *, using: str = "", seed: int = 0, inputs: tuple[str, ...] = ()
) -> Ran:
    """Fuzz one target in a process of its own; what it finds is copied to `found`."""
    with tempfile.TemporaryDirectory(prefix="wherry-fuzz-", dir=MEMORY) as name:
        folder = Path(name)
        # Forked, and not only executed: libFuzzer goes by the process's peak, which would be that of whoever starts it.
        apart = [
            "unshare",
            "--fork",
            "--kill-child",
            *(["--mount", "--propagation", "private"] if target in ROOMS else []),
        ]
        command = [*apart, sys.executable, "-m", "fuzz.child", target, using or engine(), str(seconds), str(seed), name]
        path = ":".join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            done = subprocess.run(
                [*command, *inputs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds + GRACE,
                env={"PYTHONPATH": path, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": name}, cwd=name,
            )  # fmt: skip
            failed, said = done.returncode != 0, done.stdout.decode("utf-8", "replace")
        except subprocess.TimeoutExpired as late:
            failed, said = True, (late.stdout or b"").decode("utf-8", "replace") + "\nit does not end"
        artifacts = [*folder.glob("crash-*"), *folder.glob("timeout-*"), *folder.glob("oom-*")]
        kept = []
        for artifact in artifacts:
            found.mkdir(parents=True, exist_ok=True)
            kept.append(Path(shutil.copy(artifact, found / f"{target}-{artifact.name}")))
    count = re.search(r"number_of_executed_units:\s+(\d+)", said)
    return Ran(target, failed, int(count[1]) if count else 0, said, kept)


def show(ran: Ran) -> str:
    if not ran.failed:
        return f"{ran.target:18} {ran.count:9} inputs"
    lines = [line for line in ran.said.splitlines() if not line.startswith(("#", "INFO:", "stat::", "MS:"))]
    text = "\n    ".join(lines[-40:])
    where = "".join(f"\n    again: make fuzz ARGS={ran.target}={path}" for path in ran.found)
    return f"{ran.target:18} FAILED{where}\n    {text}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz the parsers.")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each target")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--engine", choices=("atheris", "hypothesis"), default=engine())
    parser.add_argument("--found", type=Path, default=Path(".cache/fuzz"), help="where inputs that fail are kept")
    parser.add_argument("targets", nargs="*", metavar="TARGET[=INPUT]", help=", ".join(TARGETS))
    options = parser.parse_args()
    wanted = [tuple(given.partition("=")[::2]) for given in options.targets or TARGETS]
    if unknown := [name for name, _ in wanted if name not in TARGETS]:
        parser.error(f"no target {', '.join(unknown)}: there are {', '.join(TARGETS)}")

    def one(wish: tuple[str, ...]) -> Ran:
        name, path = wish
        inputs = (str(Path(path).resolve()),) if path else ()
        ran = run(name, options.seconds, options.found.resolve(), using=options.engine, inputs=inputs)
        print(show(ran), flush=True)
        return ran

    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [ran.target for ran in pool.map(one, wanted) if ran.failed]
    print(
        f"{len(wanted)} targets by {options.engine}: " + (f"{', '.join(failed)} failed" if failed else "nothing found")
    )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()

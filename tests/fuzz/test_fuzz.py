"""A bounded run of the fuzzing, and what it has found before. `make fuzz` runs longer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fuzz import ROOMS, TARGETS, load
from fuzz.__main__ import Ran, engine, run, show
from fuzz.found import FOUND, OPEN

SECONDS = 1.0
SEED = 20
"""Always the same, so that what passed once does not fail by chance later."""


def needs_root(target: str) -> None:
    if target in ROOMS and os.geteuid() != 0:
        pytest.skip("a mount namespace needs root")


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Ran]]]:
    """All targets, two at a time."""
    found = tmp_path_factory.mktemp("found")
    wanted = [t for t in TARGETS if t not in ROOMS or os.geteuid() == 0]
    with ThreadPoolExecutor(2) as pool:
        yield {target: pool.submit(run, target, SECONDS, found, seed=SEED) for target in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_bounded_run(target: str, runs: dict[str, Future[Ran]]) -> None:
    needs_root(target)
    ran = runs[target].result()
    if ran.failed and target in OPEN:
        pytest.xfail(OPEN[target])
    assert not ran.failed, show(ran)
    assert ran.count > 1, ran.said  # more than the empty input, however busy the machine is


@pytest.mark.parametrize(("target", "what", "data"), FOUND, ids=[f"{target}: {what}" for target, what, _ in FOUND])
def test_what_was_found_stays_mended(target: str, what: str, data: bytes, tmp_path: Path) -> None:
    if target in OPEN:
        pytest.xfail(OPEN[target])
    load(target).one(data)


def test_without_atheris_hypothesis_runs_the_same_targets(tmp_path: Path) -> None:
    assert engine() in ("atheris", "hypothesis")
    ran = run("tokens", 0.5, tmp_path, using="hypothesis", seed=SEED)
    assert not ran.failed, show(ran)
    assert ran.count > 20


def test_what_fails_is_kept_and_can_be_run_again(tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(b"\x00" * 4)
    ran = run("no_such_target", 0.5, tmp_path)
    assert ran.failed and "no_such_target" in ran.said
    again = run("tokens", 0.5, tmp_path, inputs=(str(tmp_path / "input"),))
    assert not again.failed, show(again)


@pytest.mark.skipif(engine() != "atheris", reason="hypothesis has no bound on a process's peak")
def test_the_memory_of_who_starts_it_does_not_count(tmp_path: Path) -> None:
    """The kernel's peak of a process that is executed begins with that of the process before (getrusage(2))."""
    program = (
        "import sys; from pathlib import Path; from fuzz.__main__ import run, show; from fuzz.child import MEMORY\n"
        "bytearray(b'1') * (MEMORY + 64 << 20)\n"
        "ran = run('references', 0.5, Path(sys.argv[1])); sys.exit(show(ran) if ran.failed else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr

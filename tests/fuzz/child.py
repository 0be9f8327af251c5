"""One target in a process of its own: `python -m fuzz.child TARGET ENGINE SECONDS SEED FOLDER [INPUT...]`.

ENGINE is `atheris` or `hypothesis`; with inputs (files) only these are run. What fails is written to FOLDER. SEED 0
is another one each time.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

INSTRUMENTED = ["wherry", "wherry_shared", "wherry_diff"]
MEMORY = 1 << 10
"""MiB that a target may take, with everything that it imports."""
INPUT_SECONDS = 20
"""Far more than any input takes, also on a machine that does ten other things."""


def main() -> None:
    name, engine, seconds, seed, folder, *inputs = sys.argv[1:]
    from . import ROOMS

    if name in ROOMS:
        from . import room

        room.enter(Path(folder))
    if inputs:
        _replay(name, [Path(path).read_bytes() for path in inputs])
    elif engine == "atheris":
        _atheris(name, float(seconds), int(seed), Path(folder))
    else:
        _hypothesis(name, float(seconds), int(seed), Path(folder))


def _replay(name: str, inputs: Iterable[bytes]) -> None:
    from . import load

    target = load(name)
    for data in inputs:
        target.one(data)


def _atheris(name: str, seconds: float, seed: int, folder: Path) -> NoReturn:
    import atheris

    from . import MAX_LEN, load

    with atheris.instrument_imports(include=INSTRUMENTED):
        target = load(name)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed-{number:03}").write_bytes(data)
    words = folder / "words"
    quoted = ["".join(f"\\x{byte:02x}" for byte in token) for token in (b"\0", *_tokens(target))]
    words.write_text("".join(f'"{token}"\n' for token in quoted))
    atheris.Setup(
        [
            name, str(corpus), f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}", f"-dict={words}",
            f"-max_len={getattr(target, 'MAX_LEN', MAX_LEN)}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY}",
            f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1",
        ],
        target.one,
    )  # fmt: skip
    atheris.Fuzz()
    raise SystemExit(0)


def _tokens(target: object) -> list[bytes]:
    return [bytes(token)[:60] for token in getattr(target, "TOKENS", ())]


def _hypothesis(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Seeds, and seeds that are cut and put together anew, until the time is up."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from . import MAX_LEN, load

    target = load(name)
    resource.setrlimit(resource.RLIMIT_AS, (4 * MEMORY << 20, 4 * MEMORY << 20))
    known = [*target.seeds()]
    longest = getattr(target, "MAX_LEN", MAX_LEN)
    pieces = st.binary(max_size=64) | st.sampled_from(_tokens(target) or [b""])
    ends = time.monotonic() + seconds
    count = 0

    @st.composite
    def inputs(draw: st.DrawFn) -> bytes:
        data = draw(st.sampled_from(known))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(data)))
            data = data[:at] + draw(pieces) + data[at + draw(st.integers(0, 32)) :]
        return data[:longest]

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        began = time.monotonic()
        try:
            target.one(data)
            assert time.monotonic() - began < INPUT_SECONDS, "it takes too long"
        except BaseException:
            (folder / "crash-hypothesis").write_bytes(data)
            raise

    for data in known:
        one(data)
    turn = seed or time.time_ns()
    while True:  # once, however long the seeds took
        turn += 1
        run = given(inputs())(one)
        run = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))(run)
        seeded(turn)(run)()
        if time.monotonic() >= ends:
            break
    print(f"stat::number_of_executed_units: {count}", file=sys.stderr)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            main()
        except Exception:
            traceback.print_exc()
            raise SystemExit(77) from None

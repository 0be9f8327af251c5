"""The kernel's switch for expedited grace periods is on for a moment, and off again whatever happens."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wherry_shared.boot import boot_id
from wherry_task.backends.quickening import EXPEDITED, Hastening, Quickening


class Switch:
    """The kernel's two files, as plain ones."""

    def __init__(self, place: Path) -> None:
        self.expedited, self.normal, self.record = place / "expedited", place / "normal", place / "record"
        self.expedited.write_text("0\n")
        self.normal.write_text("0\n")

    def hastening(self) -> Hastening:
        return Hastening(self.record, self.expedited, self.normal)

    @property
    def on(self) -> bool:
        return self.expedited.read_text().startswith("1")


@pytest.fixture
def switch(tmp_path: Path) -> Switch:
    return Switch(tmp_path)


def test_it_is_on_inside_and_off_afterwards(switch: Switch) -> None:
    hastening = switch.hastening()
    with hastening.hastened():
        assert switch.on and switch.record.read_text() == boot_id()
    assert not switch.on and switch.record.read_bytes() == b""
    with pytest.raises(OSError), hastening.hastened():
        raise OSError("the migration failed")
    assert not switch.on
    hastening.close()
    assert not switch.record.exists()


def test_a_host_that_has_it_on_keeps_it(switch: Switch) -> None:
    switch.expedited.write_text("1\n")
    with switch.hastening().hastened():
        assert switch.record.read_bytes() == b""
    assert switch.on


def test_a_host_that_wants_none_gets_none(switch: Switch) -> None:
    switch.normal.write_text("1\n")
    with switch.hastening().hastened():
        assert not switch.on


def test_without_a_switch_nothing_is_hastened(switch: Switch, tmp_path: Path) -> None:
    hastening = Hastening(switch.record, tmp_path / "none", switch.normal)
    with hastening.hastened():
        pass
    hastening.close()


def test_who_is_killed_with_it_on_is_put_right_by_the_next(switch: Switch) -> None:
    code = "\n".join([
        "import sys, time",
        "from pathlib import Path",
        "from wherry_task.backends.quickening import Hastening",
        "with Hastening(*map(Path, sys.argv[1:])).hastened():",
        "    print('on', flush=True)",
        "    time.sleep(60)",
    ])  # fmt: skip
    command = [sys.executable, "-c", code, str(switch.record), str(switch.expedited), str(switch.normal)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGKILL)
    assert switch.on
    switch.hastening()
    assert not switch.on


def test_a_record_of_another_boot_says_nothing_of_this_one(switch: Switch) -> None:
    switch.record.write_text("00000000-0000-0000-0000-000000000000\n")
    switch.expedited.write_text("1\n")
    switch.hastening()
    assert switch.on


def is_on_for_good() -> bool:
    """The kernel's own switch: other nodes' tasks have it on for a tenth of a millisecond, if they get a processor."""
    for _ in range(400):
        if EXPEDITED.read_text().startswith("0"):
            return False
        time.sleep(0.005)
    return True


@pytest.mark.skipif(not os.access(EXPEDITED, os.W_OK), reason="takes root and the kernel's switch")
async def test_migrations_are_expected_for_a_moment_and_the_kernels_switch_is_as_it_was(tmp_path: Path) -> None:
    before = is_on_for_good()
    quickening = Quickening(Hastening(tmp_path / "record"))
    quickening.expect()
    await asyncio.sleep(0.02)
    quickening.expect()
    began = time.monotonic()
    await quickening.close()
    assert time.monotonic() - began < 5
    assert is_on_for_good() == before and not (tmp_path / "record").exists()

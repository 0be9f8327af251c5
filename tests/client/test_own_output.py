"""Our own ends of a process's streams."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
from wherry.stdio import Pipes, Stdio, Unwritten
from wherry.task import Process


async def test_what_could_not_be_written_is_known_when_all_has_come(tmp_path: Path) -> None:
    """A process that ended well before we were told so hid that its output was lost."""
    full = os.open("/dev/full", os.O_WRONLY)
    pipes = Pipes(Stdio(None, full, None), tmp_path, "ns", "c")
    try:
        pipes.start(lambda: None)
        writer = os.open(pipes.paths.stdout, os.O_WRONLY)
        pipes.started()
        process = Process(cast("Any", None), "c", "", pipes)
        process.check_output()
        os.write(writer, b"lost")
        os.close(writer)
        await pipes.drained(30.0)
        with pytest.raises(Unwritten, match="No space left"):
            process.check_output()
    finally:
        pipes.close()
        os.close(full)

"""The service's end of a connection to a monitor or the zygote."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from wherry_task.backends.channel import Channel


async def test_a_full_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred starts at once found the zygote's full, took it for gone, and its successor refused to start."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("zygote.sock")
        listener.listen(1)
        queued = []
        with pytest.raises(BlockingIOError):
            while True:
                queued.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                queued[-1].connect("zygote.sock")
        coming = asyncio.ensure_future(Channel.open(tmp_path, "zygote.sock"))
        await asyncio.wait([coming], timeout=0.1)
        assert not coming.done()
        accepted = [listener.accept()[0] for _ in queued[:-1]]
        channel = await asyncio.wait_for(coming, 30)
        assert channel.alive
        await channel.close()
        for each in (*queued, *accepted):
            each.close()

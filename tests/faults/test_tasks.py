"""The task service is killed while much runs: every end of meanwhile is told once, with its real status."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import wherry
from node import Node, eventually

RUNNING, ENDING = 20, 8


async def test_ends_while_the_task_service_is_dead(node: Node, busybox_ref: str, namespace: str) -> None:
    """threats 7: those that run go on and write on, and the others have ended as they did."""
    async with wherry.connect(state=str(node.state), namespace=namespace) as client:
        image = await client.pull(busybox_ref, unpack=True)
        tasks = {}
        for number in range(RUNNING):
            script = "while true; do sleep 0.1; done"
            if number < ENDING:
                script = f"while [ ! -e /gate/open ]; do sleep 0.1; done; exit {20 + number}"
            container = await client.new_container(f"c{number}", image, args=["sh", "-c", script])
            task = await container.new_task()
            await task.start()
            tasks[number] = task
        pids = {number: (await task.state()).pid for number, task in tasks.items()}
        old = node.kill("task", signal.SIGSTOP)  # stopped first: no end is told to it any more
        for number in range(ENDING):
            _open_gate(pids[number])
        eventually(lambda: not any(_alive(pids[n]) for n in range(ENDING)), "they do not end")
        os.kill(old, signal.SIGKILL)
        codes = [(await tasks[number].wait()).code for number in range(ENDING)]
        assert codes == [20 + number for number in range(ENDING)]
        node.wait_restarted("task", old)
        states = [(await tasks[number].state()).status for number in range(ENDING, RUNNING)]
        assert states == ["running"] * (RUNNING - ENDING)
        assert [(await tasks[n].state()).pid for n in range(RUNNING)] == [pids[n] for n in range(RUNNING)]
        await asyncio.sleep(1.0)  # for one told too often
        window = await client.events.replay(filters=['topic=="/tasks/exit"'])
        told = Counter((str(e.event["container_id"]), int(e.event["exit_status"])) for e in window.events)
        assert told == Counter({(f"c{number}", 20 + number): 1 for number in range(ENDING)})
        for number, task in tasks.items():
            await task.delete(force=True)
            await (await client.container(f"c{number}")).delete(snapshot=True)


def _open_gate(pid: int) -> None:
    folder = Path(f"/proc/{pid}/root/gate")
    folder.mkdir()
    (folder / "open").touch()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

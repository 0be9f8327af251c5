"""A second process of a service on the same root ends at once, and says why; the first one goes on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from housebus import NODE, PATIENCE
from node import clean_environment

from .half import Half

ALONE = ("namespace", "lease", "image", "container", "snapshot")
"""The content service has replicas on one root by design; diff and events keep nothing there."""


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Half]:
    with Half(tmp_path_factory.mktemp("half")) as made:
        yield made


@pytest.mark.parametrize("service", ALONE)
async def test_the_second_one_ends(half: Half, service: str, tmp_path: Path) -> None:
    async with half.client() as client:
        ask = {
            "namespace": client.namespaces.walk, "lease": client.leases.walk, "image": client.images.walk,
            "container": client.containers.walk, "snapshot": client.snapshots.snapshotters,
        }[service]  # fmt: skip
        await ask()  # the first one has it now
        second = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", f"wherry_{service}", "--node", NODE, "--nats", half.house.nats.url, "--root",
             str(half.root), "--state", str(tmp_path), "--creds", str(half.house.creds)],
            env=clean_environment(), capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"{half.root / service} is in use by another {service} service" in second.stderr
        assert "Traceback" not in second.stderr
        await ask()

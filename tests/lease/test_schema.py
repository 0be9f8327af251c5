"""The lease service's rows pass SQLite's own check, which every start makes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from wherry_lease import metadata
from wherry_lease.leases import Registry
from wherry_shared.api.lease import EXPIRE_LABEL
from wherry_shared.sqlite import Database
from wherry_shared.values import now


async def test_a_lease_with_an_expiry_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "metadata.db"
    database = await Database.open(path, metadata.MIGRATIONS)
    expire = (now() + timedelta(hours=1)).isoformat(timespec="seconds")
    await Registry(metadata.Rows(database)).create("ns", "one", {EXPIRE_LABEL: expire})
    await database.close()
    database = await Database.open(path, metadata.MIGRATIONS)
    assert Registry(metadata.Rows(database)).get("ns", "one").id == "one"
    await database.close()

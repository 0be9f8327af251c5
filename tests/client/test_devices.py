"""Devices of the host for a container."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from wherry import devices
from wherry_shared.errors import InvalidArgument, NotFound


def test_a_device_is_looked_up() -> None:
    (found,) = devices.parse("/dev/null")
    assert (found.path, found.type, found.major, found.minor, found.access) == ("/dev/null", "c", 1, 3, "rwm")
    assert found.rule() == {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
    assert found.node()["fileMode"] == stat.S_IMODE(os.stat("/dev/null").st_mode)
    assert devices.parse("/dev/null:/dev/nothing:r")[0].rule()["access"] == "r"
    assert devices.parse("/dev/null:rw")[0].path == "/dev/null"


@pytest.mark.parametrize(
    "text",
    ["dev/null", "/dev/../etc", "/dev/null:", "/dev/null:rx", "/dev/null:rr", "/dev/null:/x:r:w", "/etc/passwd", ""],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        devices.parse(text)


def test_what_is_not_there() -> None:
    with pytest.raises(NotFound):
        devices.parse("/dev/nothing-like-this")


def test_a_directory_is_all_that_is_in_it(tmp_path: Path) -> None:
    os.mknod(tmp_path / "a", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (tmp_path / "sub").mkdir()
    os.mknod(tmp_path / "sub/b", stat.S_IFBLK | 0o600, os.makedev(7, 9))
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "file").write_text("")
    found = devices.parse(f"{tmp_path}:/dev/mine:rw")
    assert [(d.path, d.type, d.access) for d in found] == [("/dev/mine/a", "c", "rw"), ("/dev/mine/sub/b", "b", "rw")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="no device"):
        devices.parse(f"{tmp_path}/empty")


def test_the_hosts_devices_are_without_what_each_container_has_itself() -> None:
    paths = {d.path for d in devices.all_of_host()}
    assert "/dev/null" in paths and not [p for p in paths if p.startswith(("/dev/pts/", "/dev/shm/"))]

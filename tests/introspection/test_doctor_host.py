"""What the doctor says of a host: programs that are missing or old, a disk that is full, a clock that went back."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from node import small_disk
from wherry.doctor import host
from wherry.doctor.findings import Check, Finding, Patient, Place

CHECKS = {check.part: check for check in host.CHECKS}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("root", "state"):
        (tmp_path / name).mkdir(mode=0o700)
    return Place("n1", tmp_path / "root", tmp_path / "state", tmp_path / "state" / "creds")


@pytest.fixture
def binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory in which programs are looked for; the system's are linked in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("crun", "runc", "mkfs.erofs", "criu"):
        found = shutil.which(name, path=host.PATH)
        if found:
            (folder / name).symlink_to(found)
    monkeypatch.setattr(host, "PATH", str(folder))
    return folder


def program(path: Path, says: str, code: int = 0) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{f'echo {says!r}' if says else ':'}\nexit {code}\n")
    path.chmod(0o755)


async def look(part: str, place: Place) -> list[Finding]:
    check: Check = CHECKS[part]
    assert check.here and not check.needs
    return list(await check.look(Patient(None, place)))


def told(findings: Iterable[Finding], severity: str = "broken") -> list[str]:
    return [finding.what for finding in findings if finding.severity == severity]


# ---- programs


async def test_this_host_has_what_it_takes(place: Place, binaries: Path) -> None:
    assert told(await look("programs", place)) == []
    assert told(await look("kernel", place)) == []


async def test_no_runtime(place: Place, binaries: Path) -> None:
    for name in host.RUNTIMES:
        (binaries / name).unlink(missing_ok=True)
    assert told(await look("programs", place)) == ["no OCI runtime is installed"]


async def test_a_runtime_that_does_not_run(place: Place, binaries: Path) -> None:
    """The one that is preferred is used; another is only in the way."""
    program(binaries / "crun", "cannot open shared object file", code=127)
    program(binaries / "runc", "")
    found = await look("programs", place)
    assert (told(found), told(found, "warning")) == (["crun does not run"], ["runc does not run"])


@pytest.mark.parametrize(
    ("version", "severity"),
    [
        ("1.1.11", "warning"),
        ("1.1.5+ds1", "note"),
        ("1.0.0-rc93", "warning"),
        ("1.1.7~bpo1", "note"),
        ("1.1.12", ""),
        ("1.3.0", ""),
        ("2.0", ""),
    ],
)
async def test_a_runtime_with_a_known_escape(place: Place, binaries: Path, version: str, severity: str) -> None:
    program(binaries / "runc", f"runc version {version}")
    found = [f for f in await look("programs", place) if f.what.startswith("runc ")]
    assert [f.severity for f in found] == ([severity] if severity else [])
    assert all("CVE-2024-21626" in f.why for f in found)


async def test_what_may_be_missing_is_a_note(place: Place, binaries: Path) -> None:
    (binaries / "mkfs.erofs").unlink(missing_ok=True)
    found = await look("programs", place)
    assert "mkfs.erofs is not installed" in told(found, "note")
    assert told(found) == []


@pytest.mark.parametrize(("said", "severity"), [("nats-server: v2.9.10", "broken"), ("nats-server: v2.14.0", "")])
async def test_an_old_nats_server(
    place: Place, binaries: Path, monkeypatch: pytest.MonkeyPatch, said: str, severity: str
) -> None:
    """It is broken where the node runs the server itself, and a note elsewhere."""
    program(binaries / "nats-server", said)
    monkeypatch.setattr(host, "find_binary", lambda: binaries / "nats-server")
    assert told(await look("programs", place), "note").count("nats-server is too old") == bool(severity)
    (place.state / "nats.conf").touch()
    assert told(await look("programs", place)) == ["nats-server is too old"] * bool(severity)


# ---- the kernel


def test_the_controllers_of_both_kinds_of_cgroups(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    v2 = f"30 25 0:26 / {tmp_path} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
    v1 = "31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    assert host.controllers(v2) == {"cpu", "io", "memory", "pids"}
    assert host.controllers(v1) == {"cpu"}
    assert host.controllers("33 1 0:1 / / rw - ext4 /dev/a rw") == set()


# ---- room and time


async def test_a_disk_that_is_full(tmp_path: Path, place: Place) -> None:
    with small_disk(tmp_path / "disk", "64M") as disk:
        small = Place("n1", disk, place.state, place.creds)
        assert told(await look("room", small)) == []
        free = os.statvfs(disk)
        with (disk / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - (1 << 20))
        assert told(await look("room", small)) == [f"the disk of {disk} is full"]
        (disk / "ballast").unlink()
        for number in range(os.statvfs(disk).f_favail - 10):
            (disk / f"{number}").touch()
        assert told(await look("room", small)) == [f"the disk of {disk} is out of inodes"]


async def test_a_disk_that_cannot_be_written(tmp_path: Path, place: Place) -> None:
    """As after an error, when the kernel lets nobody write any more; a service may have a disk of its own."""
    (place.root / "image").mkdir()
    with small_disk(tmp_path / "disk", "64M") as disk:
        for directory in (place.root / "image", place.state):
            subprocess.run(["mount", "--bind", disk, directory], check=True)
            try:
                before = sorted(directory.iterdir())
                assert told(await look("room", place)) == []
                assert sorted(directory.iterdir()) == before
                subprocess.run(["mount", "-o", "remount,ro,bind", directory], check=True)
                assert told(await look("room", place)) == [f"{directory} cannot be written"]
            finally:
                subprocess.run(["umount", directory], check=True)


async def test_a_clock_that_went_back(place: Place) -> None:
    database = place.root / "image" / "metadata.db"
    database.parent.mkdir()
    database.touch()
    assert told(await look("time", place)) == []
    os.utime(database, (time.time(), time.time() + 86400))
    (found,) = [f for f in await look("time", place) if f.severity == "broken"]
    assert found.what == "this host's clock went back"

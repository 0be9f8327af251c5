"""Durable files: whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from wherry_shared.errors import DataLoss, Internal, NotFound, PermissionDenied, ResourceExhausted
from wherry_shared.files import OwnedFd, atomic_file, make_directory, os_errors, write_atomic


def test_a_file_is_made_and_replaced_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    old_umask = os.umask(0o077)
    try:
        write_atomic(path, b"one", mode=0o644)
    finally:
        os.umask(old_umask)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"one", 0o644)
    write_atomic(path, b"two")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two", 0o600)
    assert os.listdir(tmp_path) == ["file"]


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError("no")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_symlink_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "file").symlink_to("victim")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert not (tmp_path / "file").is_symlink()


def test_directories(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b", mode=0o750)
    make_directory(tmp_path / "a" / "b", mode=0o700)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o750
    with pytest.raises(NotFound, match="nowhere"):
        write_atomic(tmp_path / "nowhere" / "file", b"")


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, ResourceExhausted),
        (errno.EDQUOT, ResourceExhausted),
        (errno.EIO, DataLoss),
        (errno.ENOENT, NotFound),
        (errno.EACCES, PermissionDenied),
        (errno.EBUSY, Internal),
    ],
)
def test_the_systems_refusals(number: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="thing"), os_errors("thing"):
        raise OSError(number, os.strerror(number))


def test_a_descriptor_closes_with_its_last_user(tmp_path: Path) -> None:
    file = OwnedFd(os.open(tmp_path, os.O_RDONLY))
    other, number = file, file.fd
    del file
    os.fstat(number)
    del other
    with pytest.raises(OSError):
        os.fstat(number)
    file = OwnedFd(os.open(tmp_path, os.O_RDONLY))
    file.close()
    file.close()
    assert file.fd == -1

"""Users by name and by number, in the layers of a snapshot, with the bounds that hostile images are held to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from wherry import users
from wherry.spec import User
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry_shared.values import Mount

PASSWD = "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/:/bin/sh\n100:x:7:8::/:/bin/sh\n"
GROUP = "root:x:0:\nadm:x:4:root,web\nweb:x:33:\nlogs:x:44:web,other\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


def mounts(root: Path) -> list[Mount]:
    return [Mount(type="bind", source=str(root), options=["rbind"])]


@pytest.mark.parametrize(
    ("wish", "user"),
    [
        ("", User(0, 0, [0, 4])), ("root", User(0, 0, [0, 4])), ("web", User(33, 33, [4, 33, 44])),
        ("33", User(33, 33, [4, 33, 44])), ("web:logs", User(33, 44, [44])), ("1000", User(1000, 0, [0])),
        ("1000:1001", User(1000, 1001, [1001])), ("0:5", User(0, 5, [5])), ("web:9", User(33, 9, [9])),
        ("2147483647:2147483647", User(2147483647, 2147483647, [2147483647])), ("100", User(7, 8, [8])),
    ],
)  # fmt: skip
def test_who_is_meant(root: Path, wish: str, user: User) -> None:
    assert users.resolve(wish, mounts(root)) == user


def test_groups_are_added(root: Path) -> None:
    assert users.resolve("1000:1001", mounts(root), ["logs", "7"]) == User(1000, 1001, [7, 44, 1001])
    with pytest.raises(NotFound):
        users.resolve("", mounts(root), ["nobody"])


@pytest.mark.parametrize(
    ("wish", "error"),
    [
        ("4294967296:0", InvalidArgument), ("2147483648", InvalidArgument), ("0:4294967296", InvalidArgument),
        ("99999999999999999999", InvalidArgument), (":5", InvalidArgument), ("web:", InvalidArgument),
        ("nobody", NotFound), ("web:nobody", NotFound), ("-1", NotFound), ("٣", NotFound),
    ],
)  # fmt: skip
def test_what_is_refused(root: Path, wish: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        users.resolve(wish, mounts(root))


@pytest.mark.parametrize(
    "line", ["evil:x:4294967296:0::/:", "evil:x:1:4294967296::/:", "evil:x:-1:0::/:", "evil:x::::/:"]
)
def test_an_image_cannot_name_ids_out_of_bounds(root: Path, line: str) -> None:
    (root / "etc/passwd").write_text(line + "\n")
    with pytest.raises(InvalidArgument):
        users.resolve("evil", mounts(root))


def test_a_passwd_of_2_gib_is_refused_unread(root: Path) -> None:
    os.truncate(root / "etc/passwd", 2 << 30)
    with pytest.raises(InvalidArgument, match="larger"):
        users.resolve("web", mounts(root))


def test_links_stay_in_the_image_and_devices_are_not_opened(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("../../../../../../etc/passwd")
    with pytest.raises((NotFound, FailedPrecondition)):
        users.resolve("daemon", mounts(root))
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    with pytest.raises(InvalidArgument, match="regular"):
        users.resolve("web", mounts(root))


def test_where_the_image_cannot_be_read_numbers_still_do(root: Path) -> None:
    for far in ([], [Mount(type="bind", source="/nowhere/at/all")]):
        assert users.resolve("", far) == User(0, 0, [0])
        assert users.resolve("5:6", far) == User(5, 6, [6])
        assert users.resolve("5", far) == User(5, 0, [0])
        with pytest.raises(FailedPrecondition):
            users.resolve("web", far)

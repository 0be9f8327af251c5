"""The node's id on disk."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from wherry_introspection.node import Node
from wherry_shared.errors import DataLoss


def test_an_id_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "uuid"
    first = Node.open(path, "n1")
    assert path.read_text() == f"{first.id}\n"
    assert Node.open(path, "n1").id == first.id
    assert Node.open(tmp_path / "other", "n1").id != first.id


def test_another_name_is_the_same_node(tmp_path: Path) -> None:
    first, second = Node.open(tmp_path / "uuid", "n1"), Node.open(tmp_path / "uuid", "n2")
    assert (second.id, second.name) == (first.id, "n2")


def test_an_id_that_was_given_is_taken(tmp_path: Path) -> None:
    given = uuid.uuid4()
    (tmp_path / "uuid").write_text(str(given))
    assert Node.open(tmp_path / "uuid", "n1").id == str(given)


@pytest.mark.parametrize("damaged", [b"", b"\n", b"no uuid", b"1234", b"\xff\xfe\x00\x80" * 9, b"0" * 31 + b"g"])
def test_a_damaged_id_is_told_and_left_alone(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "uuid"
    path.write_bytes(damaged)
    with pytest.raises(DataLoss, match=f"{path} holds no uuid"):
        Node.open(path, "n1")
    assert path.read_bytes() == damaged

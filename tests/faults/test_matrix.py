"""The list of what is shown names tests that exist, and nothing of it is forgotten."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from .matrix import ATTACKS, FAULTS, OPEN, RULES

TESTS = Path(__file__).parent.parent
ROWS = FAULTS | ATTACKS | {f"rule {name}": tests for name, tests in RULES.items()}
COVERED = {*range(1, 9), *range(10, 14), *range(15, 22), *range(23, 29), 30, 31, *range(32, 39), 40}
"""The faults that the list covers."""


@cache
def functions_of(path: str) -> frozenset[str]:
    """What pytest collects of a file: its test functions."""
    body = ast.parse((TESTS / path).read_text()).body
    return frozenset(
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    )


@pytest.mark.parametrize("row", ROWS)
def test_what_shows_it_exists(row: str) -> None:
    assert ROWS[row]
    for test in ROWS[row]:
        path, _, name = test.partition("::")
        assert (TESTS / path).is_file(), test
        assert name in functions_of(path), test


def test_no_fault_is_forgotten() -> None:
    assert {int(row.split()[0]) for row in FAULTS} == COVERED
    assert {int(row.split()[0]) for row in RULES} == set(range(1, 11))


def test_what_is_open_says_why() -> None:
    assert all(OPEN.values())
    shown = {name for row in ATTACKS for name in row.replace("tarfile: ", "").split(", ")}
    assert not shown & OPEN.keys(), "a test shows it: it is not open any more"

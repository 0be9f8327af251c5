"""A node and a registry for the fault tests; each module hurts a node of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from images import Registry, busybox
from node import Node


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.fixture(scope="session")
def busybox_ref(registry: Registry) -> str:
    return registry.push(busybox(), "library/busybox", "1")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node")) as made:
        yield made


@pytest.fixture
def namespace() -> str:
    return f"t-{secrets.token_hex(4)}"

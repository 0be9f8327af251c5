"""What the tests with a whole node share: a registry, an image in it, and a namespace of one's own."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from images import Registry, busybox


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.fixture(scope="session")
def busybox_ref(registry: Registry) -> str:
    return registry.push(busybox(), "library/busybox", "1")


@pytest.fixture
def namespace() -> str:
    return f"t-{secrets.token_hex(4)}"

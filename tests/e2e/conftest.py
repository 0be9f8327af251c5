"""One node for the end-to-end tests; each test has a namespace of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from node import Node


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node")) as made:
        yield made

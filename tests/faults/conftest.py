"""A node for the fault tests; each module hurts one of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from node import Node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("node")) as made:
        yield made

"""Who waits for the answer to a key."""

from __future__ import annotations

from typing import Any

from wherry_shared.bus.answers import DELIVERIES_MAX, Answers


def test_deliveries_of_one_key_fill_no_memory() -> None:
    """A tenant that sends one slow request again and again had a place in memory for each."""
    answers, way = Answers(), Any
    assert answers.first("k", (way, "0"))  # type: ignore[arg-type]
    for number in range(1, 10 * DELIVERIES_MAX):
        assert not answers.first("k", (way, str(number)))  # type: ignore[arg-type]
    waiting = [reply for _, reply in answers.settle("k", None)]
    assert waiting == [str(number) for number in range(9 * DELIVERIES_MAX, 10 * DELIVERIES_MAX)]

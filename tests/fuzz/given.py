"""Decisions out of bytes: how a target makes something structured of its input. What is not there counts as zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Given:
    """Reads one input from its beginning to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def bytes(self, size: int) -> bytes:
        """At most `size` bytes, fewer at the end."""
        piece = self._data[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def rest(self) -> bytes:
        return self.bytes(self.left)

    def number(self, bound: int) -> int:
        """From 0 to `bound` - 1; takes as many bytes as that needs."""
        size = max(1, ((bound - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.bytes(size).ljust(size, b"\0"), "big") % bound

    def flag(self) -> bool:
        return bool(self.number(2))

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.number(len(choices))]

    def some(self, most: int, make: Callable[[], T]) -> list[T]:
        """Up to `most` of what `make` makes."""
        return [make() for _ in range(self.number(most + 1))]

    def text(self, most: int = 16) -> str:
        return self.bytes(self.number(most + 1)).decode("utf-8", "replace")


def words(data: bytes, separator: bytes = b"\xff") -> list[bytes]:
    """The input in parts: the byte that is never in UTF-8 parts them."""
    return data.split(separator)

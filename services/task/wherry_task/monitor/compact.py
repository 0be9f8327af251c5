"""JSON by the C scanner and encoder alone: `json` itself would bring re and enum, a third of the zygote's memory."""

from __future__ import annotations

import _json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Rules:
    """What the scanner asks of its decoder: plain JSON, objects as dicts, no NaN or infinity."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(word: str) -> Any:
        raise ValueError(f"{word} is not JSON")


def _refuse(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is not JSON")


_scan = _json.make_scanner(_Rules)  # type: ignore[arg-type]
_encode = _json.make_encoder(None, _refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, False)


def dumps(value: Any) -> bytes:
    """The value in ASCII without white space. Raises TypeError or ValueError for what JSON cannot say."""
    return "".join(_encode(value, 0)).encode()


def loads(data: bytes | bytearray) -> Any:
    """The one value in the bytes. Raises ValueError, whatever is wrong."""
    text = data.decode().strip()
    try:
        value, end = _scan(text, 0)
    except (StopIteration, SystemError):
        # SystemError: where json.decoder is not imported the scanner fails without the exception that it would take.
        raise ValueError("not JSON") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end != len(text):
        raise ValueError("more than one value")
    return value

"""A process in content: InvalidArgument, or a map by names within the bounds, whose arguments can be counted."""

from __future__ import annotations

from collections.abc import Iterator

from wherry_shared.contract import pack
from wherry_shared.errors import InvalidArgument
from wherry_task.processes import check_arguments, decode

TOKENS = (
    b"\xa4args", b"\xa3env", b"\xa7rlimits", b"\xa4type", b"\xa4soft", b"\xacRLIMIT_STACK", b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xda\xff\xff", b"\xc7\xff", b"\xcb\x7f\xf8",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    limits = [{"type": "RLIMIT_STACK", "soft": 1 << 20, "hard": -1}, {"type": "RLIMIT_STACK"}, "RLIMIT_STACK"]
    yield pack({"args": ["/bin/true", "\u00e9" * 300], "env": ["A=b"], "rlimits": limits, "user": {"uid": 0}})
    yield pack({"args": "x", "env": {"A": 1}, "rlimits": {"type": 1}})
    yield pack({"args": ["x" * 200_000]})
    yield b"\x81\xa1a" * 200
    yield b"\x91" * 2000


def one(data: bytes) -> None:
    try:
        process = decode(data)
        check_arguments(process)
    except InvalidArgument as error:
        str(error).encode()
        return
    assert all(isinstance(name, str) for name in process)

"""Subjects, identifiers, digests, labels, topics and masks: what is accepted cannot mean something else on the bus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from wherry_shared import values
from wherry_shared.bus import subjects
from wherry_shared.errors import FailedPrecondition, InvalidArgument

from ..given import words

TOKENS = (b"\xff", b"*", b">", b".", b"~", b"_", b"..", b"\r\n", b"\0", b"sha256:", b"a" * 64, b"labels.", b"/tasks/")


def seeds() -> Iterator[bytes]:
    yield b"k8s.io\xffsha256:" + b"0" * 64 + b"\xff/tasks/exit\xfflabels.a.b"
    yield b"a.b\xff*\xff>\xff..\xffa b\xffa\r\nb\xff\xef\xbd\x81\xff" + b"a" * 77
    yield b"a\xffa\n\xffa\xc2\x85\xff_\xff~\xffa~b\xff\xd9\xa1"


def one(data: bytes) -> None:
    texts = [part.decode("utf-8", "surrogateescape") for part in words(data)][:8]
    for text in texts:
        identifier(text)
        digest = tried(lambda text=text: values.check_digest(text))
        assert digest is None or (digest.isascii() and len(digest) in (71, 135) and digest == digest.lower())
        for part in tried(lambda text=text: subjects.check_topic(text)) or ():
            assert not set(part) & set("/*> ~\r\n")
    labels = dict(zip(texts[::2], texts[1::2], strict=False))
    made = tried(lambda: values.update_labels(labels, dict(reversed(list(labels.items()))), texts), UnicodeEncodeError)
    assert made is None or all(made.values())
    for pattern in texts:
        for subject in texts:
            subjects.matches(pattern, subject)


def identifier(text: str) -> None:
    found = tried(lambda: values.check_identifier(text))
    token = tried(lambda: subjects.encode_token(text))
    back = tried(lambda: subjects.decode_token(text))
    subject = tried(lambda: subjects.rpc("n1", text, "content", "info"), FailedPrecondition)
    if found is None:
        assert token is None and (subject is None or text == "_")
        assert back is None or "~" in text
        return
    assert found == text and text.isascii() and 0 < len(text) <= values.IDENTIFIER_MAX
    assert not set(text) & set("/*> ~\r\n\0\\") and not text.startswith((".", "-", "_")) and ".." not in text
    assert subjects.decode_token(token) == text
    assert subject is not None and len(subject.split(".")) == 7 and subjects.matches("wherry.rpc.v1.*.*.*.*", subject)
    assert not subjects.matches("wherry.rpc.v1.*.other.*.*", subject) or text == "other"


def tried(check: Callable[[], Any], *more: type[Exception]) -> Any:
    try:
        return check()
    except (InvalidArgument, *more):
        return None

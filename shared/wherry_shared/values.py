"""The values that every service shares: identifiers, digests, descriptors, platforms, mounts, labels, pages.

Rules come from containerd (identifiers, labels) and the OCI image specification (digests, descriptors). What does
not validate is refused, never repaired.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Generic, LiteralString, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    StringConstraints,
    ValidationError,
)  # fmt: skip
from pydantic_core import ErrorDetails, PydanticUndefined, core_schema

from .errors import InvalidArgument
from .records import Record, record

T = TypeVar("T")

IDENTIFIER_MAX = 76
LABEL_MAX = 4096
_IDENTIFIER: Final = "[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*"
_DIGEST: Final = "(?:sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128})"
_is_identifier = re.compile(_IDENTIFIER).fullmatch
_is_digest = re.compile(_DIGEST).fullmatch


class Model(BaseModel):
    """Base of everything that crosses the wire: immutable; unknown fields are ignored so that versions can mix."""

    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # An empty default is made, and not deep-copied from the declaration: that took half of a record's decoding.
        for field in cls.model_fields.values():
            if type(field.default) in (dict, list) and not field.default:
                field.default_factory, field.default = type(field.default), PydanticUndefined


def check_identifier(value: str, what: str = "identifier") -> str:
    """`value` if it is an identifier by containerd's rule (1..76 characters), else InvalidArgument."""
    if len(value) > IDENTIFIER_MAX:
        raise InvalidArgument(f"{what} {value[:IDENTIFIER_MAX]!r}... is longer than {IDENTIFIER_MAX} characters")
    if not _is_identifier(value):
        raise InvalidArgument(
            f"{what} {value!r} is not valid: alphanumeric groups joined by a single '.', '_' or '-' are"
        )
    return value


def is_identifier(value: str) -> bool:
    """Whether it is one."""
    return len(value) <= IDENTIFIER_MAX and _is_identifier(value) is not None


def check_digest(value: str) -> str:
    """`value` if it is `sha256:` or `sha512:` with exact lower-case hex, else InvalidArgument."""
    if not _is_digest(value):
        raise InvalidArgument(f"digest {value[:160]!r} is not valid: sha256 or sha512 with lower-case hex is")
    return value


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """`labels` if each key and value together stay within 4096 bytes, else InvalidArgument."""
    for key, value in labels.items():
        if 4 * (len(key) + len(value)) > LABEL_MAX and len(key.encode()) + len(value.encode()) > LABEL_MAX:
            raise InvalidArgument(f"label {key[:64]!r}: key and value are longer than {LABEL_MAX} bytes together")
        if not key:
            raise InvalidArgument("a label's key is empty")
    return labels


def _valid_labels(labels: dict[str, str]) -> dict[str, str]:
    try:
        return check_labels(labels)
    except InvalidArgument as e:
        raise ValueError(e.message) from None


@dataclass(frozen=True)
class _Told:
    """Of a text whose rule pydantic checks by itself, which takes a tenth of what a call does: whoever explains why one
    is refused (`explain`) asks the check of this name."""

    check: LiteralString

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.custom_error_schema(
            handler(source), custom_error_type=self.check, custom_error_message="Input should be a valid string"
        )


Identifier = Annotated[
    str, StringConstraints(max_length=IDENTIFIER_MAX, pattern=f"^{_IDENTIFIER}$"), _Told("identifier")
]
Digest = Annotated[str, StringConstraints(pattern=f"^{_DIGEST}$"), _Told("digest")]
Labels = Annotated[dict[str, str], AfterValidator(_valid_labels)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
"""A key, ref, image name: any non-empty text up to 4096 characters; never part of a subject."""


@record
class Platform(Record):
    """An OCI platform."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: list[str] = []


@record
class Descriptor(Record):
    """An OCI descriptor: what a blob is, which one, how many bytes."""

    media_type: str
    digest: Digest
    size: int
    annotations: dict[str, str] = {}
    platform: Platform | None = None
    urls: list[str] = []


@record
class Mount(Record):
    """A mount for mount(2), as a snapshotter returns it; nobody has mounted it yet."""

    type: str
    source: str
    target: str = ""
    options: list[str] = []


class Page(Model, Generic[T]):
    """A window of a walk. `next` continues it (opaque; give it back as `after`), "" says that it is the last."""

    items: list[T]
    next: str = ""


def now() -> datetime:
    """The time, UTC."""
    return datetime.now(UTC)


def stored_labels(labels: dict[str, str]) -> dict[str, str]:
    """Labels as they are kept: an empty value means that the label is not there (containerd's rule)."""
    return {k: v for k, v in labels.items() if v}


def update_labels(old: dict[str, str], new: dict[str, str], paths: Iterable[str]) -> dict[str, str]:
    """The labels after an update with a mask: `labels` replaces all, `labels.<key>` one; dots in the key are kept."""
    result = dict(old)
    for path in paths:
        if path == "labels":
            result = dict(new)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            result[key] = new.get(key, "")
    return check_labels(stored_labels(result))


def explain(e: ValidationError) -> str:
    """A validation error in one line that names the field and the reason, without the value's class names."""
    first = e.errors(include_url=False)[0]
    where = ".".join(str(p) for p in first["loc"])
    return f"{where}: {_reason(first)}" if where else _reason(first)


_CHECKS: Final = {"identifier": check_identifier, "digest": check_digest}


def _reason(error: ErrorDetails) -> str:
    check, value = _CHECKS.get(error["type"]), error["input"]
    if check is not None and isinstance(value, str):
        try:
            check(value)
        except InvalidArgument as e:
            return e.message
    return error["msg"].removeprefix("Value error, ")

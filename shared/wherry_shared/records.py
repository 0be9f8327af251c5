"""What services keep and list by the thousand: models without a dict, a third of a `values.Model`'s memory and time
(docs/decisions/0022).

    @record
    class Lease(Record):
        id: Identifier
        labels: Labels = {}

A record is made, checked, copied and dumped as a Model is, and is immutable as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal, Self, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass, rebuild_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import SchemaSerializer, SchemaValidator

R = TypeVar("R", bound="Record")

_CONFIG = ConfigDict(extra="ignore", defer_build=True)


RECORDS: list[type[Record]] = []
"""All that there are."""


class Record:
    """Base of the classes that `record` decorates: what they have of pydantic's models."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]
    __pydantic_fields__: ClassVar[dict[str, FieldInfo]]
    __pydantic_validator__: ClassVar[SchemaValidator]
    __pydantic_serializer__: ClassVar[SchemaSerializer]

    @classmethod
    def model_validate(cls, value: Any) -> Self:
        """The record that a dict stands for. ValidationError."""
        made: Self = cls.__pydantic_validator__.validate_python(value)
        return made

    def model_dump(
        self, *, mode: Literal["python", "json"] = "python", exclude_defaults: bool = False
    ) -> dict[str, Any]:
        """A dict of it, and of what is in it."""
        dumped: dict[str, Any] = self.__pydantic_serializer__.to_python(
            self, mode=mode, exclude_defaults=exclude_defaults
        )
        return dumped

    def model_dump_json(self) -> str:
        """The same as JSON."""
        return self.__pydantic_serializer__.to_json(self).decode()

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """The same record with other values, which are not checked."""
        made = object.__new__(type(self))
        for name in self.__dataclass_fields__:
            object.__setattr__(made, name, update[name] if name in update else getattr(self, name))
        return made

    @classmethod
    def model_rebuild(cls) -> None:
        """Build the validator and the serializer now, and not when they are first used."""
        rebuild_dataclass(cls)  # type: ignore[arg-type]  # what `record` makes of it


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def record(cls: type[R]) -> type[R]:
    """The record that a class with annotations describes. An empty dict or list as a default is made each time."""
    for name in cls.__annotations__:
        default = vars(cls).get(name)
        if default in ({}, []):
            setattr(cls, name, field(default_factory=type(default)))
    made = cast(type[R], dataclass(cls, frozen=True, slots=True, kw_only=True, config=_CONFIG))
    RECORDS.append(made)
    return made

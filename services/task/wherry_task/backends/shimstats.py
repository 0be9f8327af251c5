"""io.containerd.cgroups.v1.Metrics and v2.Metrics as shims send them, into the contract's models."""

from __future__ import annotations

import typing
from functools import cache
from typing import Any

from wherry_shared.api.task import Hugetlb, MetricsV1, MetricsV2
from wherry_shared.values import Model

from .protobuf import Message, decode, integer, nested, numbers, text

# Where a field's number is not its place among the model's fields.
_V1 = {"hugetlb": 1, "pids": 2, "cpu": 3, "memory": 4, "blkio": 5, "rdma": 6, "memory_oom_control": 9}
_V2 = {"pids": 1, "cpu": 2, "memory": 4, "rdma": 5, "io": 6, "hugetlb": 7, "memory_events": 8}
_HUGETLB_V2 = {"usage": 1, "max": 2, "pagesize": 3, "failcnt": 4}


def metrics_of(kind: str, data: bytes) -> MetricsV1 | MetricsV2 | None:
    """None for metrics of another kind."""
    if kind.endswith("cgroups.v1.Metrics"):
        return MetricsV1(**_fields(MetricsV1, decode(data), _V1))
    if kind.endswith("cgroups.v2.Metrics"):
        message = decode(data)
        fields = _fields(MetricsV2, message, _V2)
        fields["hugetlb"] = [Hugetlb(**_fields(Hugetlb, decode(each), _HUGETLB_V2)) for each in nested(message, 7)]
        return MetricsV2(**fields)
    return None


def _fields(model: type[Model], message: Message, places: dict[str, int] | None = None) -> dict[str, Any]:
    places = places or {name: place for place, name in enumerate(model.model_fields, 1)}
    return {
        name: _value(kind, message, places[name]) for name, kind in _kinds(model).items() if places[name] in message
    }


@cache
def _kinds(model: type[Model]) -> dict[str, Any]:
    hints = typing.get_type_hints(model)
    return {name: hints[name] for name in model.model_fields}


def _value(kind: Any, message: Message, number: int) -> Any:
    if kind is int:
        return integer(message, number)
    if kind is str:
        return text(message, number)
    inner = typing.get_args(kind)
    if inner == (int,):
        return [n for each in message[number] for n in ([each] if isinstance(each, int) else numbers(each))]
    found = [(model := inner[0] if inner else kind)(**_fields(model, decode(each))) for each in nested(message, number)]
    return found if inner else found[-1]

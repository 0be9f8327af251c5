"""Everything that crosses the bus, as text: `python -m wherry_shared.wire > docs/wire.txt`.

Generated from the contracts; the tests hold docs/wire.txt against it, so that no change on the wire goes unseen.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel

from .api import contracts, second_contracts
from .bus import subjects
from .bus.audit import FIELDS
from .contract import Endpoint
from .records import Record
from .values import Digest, Identifier, Labels, Name

_NAMED: dict[Any, str] = {Digest: "Digest", Identifier: "Identifier", Labels: "Labels", Name: "Name", Any: "any"}


def text() -> str:
    """The whole wire."""
    models: dict[str, Any] = {}
    lines = [
        "Subjects, requests, replies, errors and events. Generated: python -m wherry_shared.wire > docs/wire.txt",
        "Bodies are msgpack maps of the parameters (bytes are answered raw); ! marks what an idempotency key protects.",
        "Every operation may also answer with InvalidArgument, Unavailable and DeadlineExceeded.",
    ]
    for contract in [*contracts(), *second_contracts()]:
        lines += ["", f"{contract.service} {contract.version}"]
        token = {True: "<ns>", False: "_", None: "<ns>|_"}[contract.namespaced]
        for endpoint in contract.endpoints.values():
            lines += list(_operation(endpoint, token, models))
        for topic, fields in contract.events.items():
            subject = f"{subjects.EV}.<node>.<ns>" + topic.replace("/", ".")
            lines.append(f"  event {subject} {{{fields}}}")
    lines += ["", "audit", f"  {subjects.AUDIT}.<node>.<ns>|_.<service> {{{' '.join(FIELDS)}}}", "", "models"]
    for name in sorted(models):
        lines += [f"  {name}"]
        lines += [f"    {field}: {_type(info.rebuild_annotation(), models)}" for field, info in _fields(models[name])]
    return "\n".join(lines) + "\n"


def _fields(model: type[BaseModel | Record]) -> list[tuple[str, Any]]:
    return list(model.__pydantic_fields__.items())


def _operation(endpoint: Endpoint, token: str, models: dict[str, Any]) -> Iterator[str]:
    hints = typing.get_type_hints(endpoint.function, include_extras=True)
    parameters = []
    for name, parameter in list(inspect.signature(endpoint.function).parameters.items())[1:]:
        optional = "" if parameter.default is parameter.empty else "?"
        parameters.append(f"{name}{optional}: {_type(hints[name], models)}")
    mark = "!" if endpoint.mutates else " "
    service = endpoint.contract.service
    yield f" {mark}{subjects.RPC}.<node>.{token}.{service}.{endpoint.name}"
    yield f"    ({', '.join(parameters)}) -> {_type(hints['return'], models)}"
    if endpoint.errors:
        yield f"    errors: {', '.join(e.__name__ for e in endpoint.errors)}"


def _type(hint: Any, models: dict[str, Any]) -> str:
    for known, name in _NAMED.items():
        if hint is known or hint == known:
            return name
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type(arguments[0], models)
    if origin is typing.Literal:
        return "|".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(a, models) for a in arguments)
    if origin is list:
        return f"[{_type(arguments[0], models)}]"
    if origin is dict:
        return f"{{{_type(arguments[0], models)}: {_type(arguments[1], models)}}}"
    return _plain(hint, models)


def _plain(hint: Any, models: dict[str, Any]) -> str:
    if isinstance(hint, type) and issubclass(hint, BaseModel | Record):
        # A page of things is written Page[Thing]; an equal name of two services is told apart by its module.
        name = hint.__name__
        if name.startswith("Page["):
            item = typing.get_args(hint.__pydantic_fields__["items"].annotation)[0]
            return f"Page[{_plain(item, models)}]"
        service = hint.__module__.rpartition(".")[2]
        name = name if service == "values" else f"{service}.{name}"
        if name not in models:
            models[name] = hint
            for _, info in _fields(hint):
                _type(info.rebuild_annotation(), models)
        return name
    if hint is None or hint is type(None):
        return "nothing"
    return "time" if hint is datetime else getattr(hint, "__name__", str(hint))


if __name__ == "__main__":
    print(text(), end="")  # noqa: T201

"""What the supervisor prepares before it forks is what a service would have made by itself."""

from __future__ import annotations

import json
import os

import pytest
from pydantic_core import SchemaSerializer, SchemaValidator
from wherry.node import preload
from wherry_shared import api
from wherry_shared.contract import Endpoint


def endpoints() -> list[Endpoint]:
    return [e for contract in (*api.contracts(), *api.second_contracts()) for e in contract.endpoints.values()]


def test_codecs() -> None:
    """A codec that is left for its first call is made once in each service, in memory of its own."""
    api.build()
    for endpoint in endpoints():
        for adapter in (endpoint._request, endpoint.reply):
            assert adapter.pydantic_complete, endpoint.name
            assert isinstance(adapter.validator, SchemaValidator), endpoint.name
            assert isinstance(adapter.serializer, SchemaSerializer), endpoint.name


def test_schemas() -> None:
    for endpoint in endpoints():
        vars(endpoint).pop("schema", None)
    preload.describe()
    for endpoint in endpoints():
        assert json.loads(vars(endpoint)["schema"]) == endpoint.request.model_json_schema()


def test_its_process_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in endpoints():
        vars(endpoint).pop("schema", None)
    monkeypatch.setattr(json, "dump", lambda *_: os._exit(1))
    preload.describe()
    assert not any("schema" in vars(endpoint) for endpoint in endpoints())
    assert all(json.loads(endpoint.schema)["type"] == "object" for endpoint in endpoints())

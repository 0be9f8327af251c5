"""What verbs of the command line have in common."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from wherry.cli.kill import on_each
from wherry_shared.errors import DeadlineExceeded, NotFound, WherryError

ERRORS: dict[str, WherryError] = {
    "hangs": DeadlineExceeded("task.kill: no answer within the deadline"),
    "gone": NotFound("no container gone"),
}


async def test_each_error_names_its_container(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def find(client: Any, name: str) -> str:
        return name

    async def work(name: Any) -> None:
        if name in ERRORS:
            raise ERRORS[name]

    monkeypatch.setattr("wherry.container.find", find)
    client: Any = None
    with pytest.raises(typer.Exit):
        await on_each(client, ["hangs", "well", "gone"], work)
    said = capsys.readouterr()
    assert said.out == "well\n"
    assert said.err == "wherry: hangs: task.kill: no answer within the deadline\nwherry: no container gone\n"

"""CDI devices: files of the host that say what a device needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wherry import cdi
from wherry.spec import Options, User, make
from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented, WherryError

DOCUMENT: dict[str, Any] = {
    "cdiVersion": "0.6.0",
    "kind": "vendor.com/gpu",
    "containerEdits": {"env": ["ALL=1"], "mounts": [{"hostPath": "/lib", "containerPath": "/vendor"}]},
    "devices": [
        {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}], "env": ["ONE=0"]}},
        {"name": "1", "containerEdits": {
            "deviceNodes": [{"path": "/dev/gpu1", "type": "c", "major": 99, "minor": 1, "permissions": "rw"}],
            "hooks": [{"hookName": "createContainer", "path": "/bin/hook", "args": ["hook", "x"]}],
            "additionalGids": [44],
        }},
    ],
}  # fmt: skip


def write(directory: Path, document: Any, name: str = "a.json") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return directory


def applied(names: list[str], *directories: Path) -> dict[str, Any]:
    made = make("c", None, Options(args=["x"]), User())
    cdi.apply(made, cdi.edits(names, directories))
    return made


def test_edits_are_applied(tmp_path: Path) -> None:
    made = applied(["vendor.com/gpu=0", "vendor.com/gpu=1"], write(tmp_path / "cdi", DOCUMENT))
    assert made["process"]["env"][-2:] == ["ALL=1", "ONE=0"]
    assert [d["path"] for d in made["linux"]["devices"]] == ["/dev/null", "/dev/gpu1"]
    assert made["linux"]["resources"]["devices"] == [
        {"allow": False, "access": "rwm"}, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": True, "type": "c", "major": 99, "minor": 1, "access": "rw"},
    ]  # fmt: skip
    assert [m["destination"] for m in made["mounts"]].count("/vendor") == 1, "what all devices want comes once"
    assert made["hooks"] == {"createContainer": [{"path": "/bin/hook", "args": ["hook", "x"]}]}
    assert made["process"]["user"]["additionalGids"] == [44]


def test_the_later_directory_wins_and_one_must_be_clear(tmp_path: Path) -> None:
    etc = write(tmp_path / "etc", DOCUMENT)
    other = {**DOCUMENT, "containerEdits": {"env": ["ALL=2"]}}
    run = write(tmp_path / "run", other)
    assert "ALL=2" in applied(["vendor.com/gpu=0"], etc, run)["process"]["env"]
    write(run, DOCUMENT, "b.json")
    with pytest.raises(FailedPrecondition, match="twice"):
        applied(["vendor.com/gpu=0"], etc, run)


def test_names(tmp_path: Path) -> None:
    directory = write(tmp_path / "cdi", DOCUMENT)
    with pytest.raises(NotFound):
        applied(["vendor.com/gpu=2"], directory)
    for bad in ("vendor.com=0", "/dev/null", "vendor.com/gpu=", "vendor.com/gpu=../x", "-/x=1"):
        assert not cdi.is_name(bad)
        with pytest.raises(InvalidArgument):
            applied([bad], directory)
    assert applied([], tmp_path / "nowhere")["linux"].get("devices") is None


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"cdiVersion": "9.0"}, FailedPrecondition), ({"kind": "x"}, FailedPrecondition),
        ({"devices": [{}]}, FailedPrecondition),
        ({"containerEdits": {"hooks": [{"hookName": "evil", "path": "/x"}]}}, FailedPrecondition),
        ({"containerEdits": {"mounts": [{"hostPath": "/x"}]}}, FailedPrecondition),
        ({"containerEdits": {"mounts": [{"hostPath": "/x", "containerPath": "/../etc"}]}}, InvalidArgument),
        ({"containerEdits": {"deviceNodes": [{"path": "/dev/not-there-at-all"}]}}, NotFound),
        ({"containerEdits": {"intelRdt": {"closID": "x"}}}, Unimplemented),
    ],
)  # fmt: skip
def test_broken_files_are_said(tmp_path: Path, change: dict[str, Any], error: type[WherryError]) -> None:
    with pytest.raises(error):
        applied(["vendor.com/gpu=0"], write(tmp_path / "cdi", {**DOCUMENT, **change}))


def test_a_file_that_is_no_json_is_said(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"a\.json"):
        applied(["vendor.com/gpu=0"], write(tmp_path / "cdi", "{"))

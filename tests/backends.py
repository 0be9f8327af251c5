"""Which backends of the ports the suites run on: `--backend=KIND/NAME`, repeatable, else all that are installed.

A suite writes

    @pytest.fixture(params=chosen_backends("snapshot"))
    def shelf(request: pytest.FixtureRequest) -> ...:
        backend: BackendName = request.param

(in a conftest: `metafunc.parametrize("shelf", chosen_backends("snapshot"), indirect=True)` in `pytest_generate_tests`)
and calls `backend.refuse(reason)` where the host cannot have it: that skips the test, and fails it when the backend
was asked for by name. With the option given, only tests that run on a chosen backend are run at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import NoReturn

import pytest

OPTION = "--backend"


class BackendName(str):
    """The name of a backend, of which kind it is, and whether it was asked for."""

    kind: str
    asked: bool

    def __new__(cls, kind: str, name: str, *, asked: bool) -> BackendName:
        made = super().__new__(cls, name)
        made.kind, made.asked = kind, asked
        return made

    def refuse(self, reason: str) -> NoReturn:
        """This host cannot have it: a skip, or a failure when it was asked for by name."""
        if self.asked:
            pytest.fail(f"{OPTION}={self.kind}/{self} cannot be had: {reason}", pytrace=False)
        pytest.skip(f"{self.kind} backend {self}: {reason}")


def _content() -> list[str]:
    from wherry_content.backends import BUILT_IN, GROUP

    return sorted({*BUILT_IN, *(e.name for e in entry_points(group=GROUP))})


def _snapshot() -> list[str]:
    from wherry_snapshot.backends import available

    return sorted(available())


INSTALLED: dict[str, Callable[[], list[str]]] = {"content": _content, "snapshot": _snapshot}
_asked: dict[str, list[str]] | None = None


def ask(options: Sequence[str]) -> None:
    """Take note of the command line. UsageError: no such kind, or no such backend is installed."""
    global _asked
    _asked = {}
    for option in options:
        kind, _, name = option.partition("/")
        if kind not in INSTALLED:
            raise pytest.UsageError(f"{OPTION}={option}: give KIND/NAME, where KIND is one of {', '.join(INSTALLED)}")
        installed = INSTALLED[kind]()
        if name not in installed:
            raise pytest.UsageError(f"{OPTION}={option}: installed are {', '.join(installed)}")
        if name not in _asked.setdefault(kind, []):
            _asked[kind].append(name)


def chosen_backends(kind: str) -> list[BackendName]:
    """The backends of a kind that its suite runs on: those asked for, else all that are installed."""
    assert _asked is not None, "the command line is not read yet: in a conftest, parametrize in pytest_generate_tests"
    if _asked:
        return [BackendName(kind, name, asked=True) for name in _asked.get(kind, [])]
    return [BackendName(kind, name, asked=False) for name in INSTALLED[kind]()]


def keep_chosen(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where backends were asked for, leave out every test that runs on none of them."""
    if not _asked:
        return
    kept, left_out = [], []
    for item in items:
        parameters = getattr(item, "callspec", None)
        on_one = parameters is not None and any(isinstance(v, BackendName) for v in parameters.params.values())
        (kept if on_one else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept

"""What the tests with a whole node share: a registry, an image in it, and a namespace of one's own.

And the option that says which backends the suites of the ports run on (backends.py).
"""

from __future__ import annotations

import secrets
import signal
from collections.abc import Iterator

import backends
import pytest
from hypothesis import HealthCheck, settings
from images import Registry, busybox


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        backends.OPTION, action="append", default=[], metavar="KIND/NAME",
        help="run the conformance suites on this backend alone (repeatable): snapshot/btrfs, content/local",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    backends.ask(config.getoption(backends.OPTION))
    # A shell starts what it puts into the background deaf to it, and children would be, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # And nohup to a hangup: a handler is none in what is executed, and ends nothing here.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    # What an example takes hangs on what else the machine does.
    settings.register_profile("wherry", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("wherry")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backends.keep_chosen(config, items)


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.fixture(scope="session")
def busybox_ref(registry: Registry) -> str:
    return registry.push(busybox(), "library/busybox", "1")


@pytest.fixture
def namespace() -> str:
    return f"t-{secrets.token_hex(4)}"

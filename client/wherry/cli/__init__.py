"""The command line: one verb, one file, loaded only when it is the one that was typed."""

from __future__ import annotations

import importlib
import sys
from typing import Any

# verb -> what it is for; the file is `<verb>.py`, its function `command` or its Typer `app`.
VERBS = {
    "up": "Run a node: nats-server and every service.",
    "pull": "Fetch an image from a registry and unpack it.",
    "images": "List images.",
    "run": "Run a container from an image.",
    "ps": "List containers.",
    "exec": "Run a command in a running container.",
    "kill": "Send a signal to a container.",
    "rm": "Remove containers.",
    "events": "Print what happens, and what happened.",
    "info": "Tell what runs on the node.",
    "content": "Look at the blobs.",
    "snapshot": "Look at the snapshots.",
    "ns": "Manage namespaces.",
    "auth": "Make credentials for the bus.",
    "version": "Print the version.",
}


def main() -> None:
    """The `wherry` command."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("version", "--version"):
        from .version import show

        show(arguments[1:])
        return
    from .app import run

    run(arguments)


def load(verb: str) -> Any:
    """The module of a verb."""
    return importlib.import_module(f".{verb}", __name__)


if __name__ == "__main__":
    main()

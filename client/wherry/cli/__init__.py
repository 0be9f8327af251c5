"""The command line: one verb, one file, loaded only when it is the one that was typed."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# verb -> what it is for; the file is `<verb>.py` (`<verb>_.py` for a word of Python's own), in it a function `command`
# or a Typer `app`.
VERBS = {
    "up": "Run a node: nats-server and every service.",
    "keep": "Start containers again by their restart policies, on a node without `up`.",
    "pull": "Fetch an image from a registry and unpack it.",
    "push": "Send an image to a registry.",
    "images": "Look at images, and change them.",
    "tag": "Give an image more names.",
    "import": "Read images from an archive.",
    "export": "Write images to an archive.",
    "convert": "Make an image of another shape from one.",
    "run": "Run a container from an image.",
    "create": "Make a container from an image.",
    "start": "Start containers.",
    "stop": "Ask containers to end.",
    "restart": "Stop containers and start them again.",
    "ps": "List containers.",
    "inspect": "Tell everything of a container or an image.",
    "exec": "Run a command in a running container.",
    "attach": "Join the streams of a running container.",
    "logs": "Print what a container wrote in the background.",
    "kill": "Send a signal to a container.",
    "pause": "Freeze containers.",
    "unpause": "Thaw containers.",
    "wait": "Wait for containers' ends.",
    "top": "List a container's processes.",
    "stats": "Tell what containers use.",
    "cp": "Copy files to and from a container.",
    "update": "Change containers' limits.",
    "rename": "Give a container a name.",
    "rm": "Remove containers.",
    "diff": "List what a container changed, or how two trees differ.",
    "commit": "Make an image of what a container changed.",
    "events": "Print what happens, and what happened.",
    "info": "Tell what runs on the node.",
    "doctor": "Find what is broken on the node, and say what to do.",
    "content": "Look at the blobs.",
    "snapshot": "Look at the snapshots.",
    "lease": "Manage leases.",
    "gc": "Collect garbage now.",
    "ns": "Manage namespaces.",
    "df": "Tell what takes how much space.",
    "prune": "Remove what nobody needs, after a look.",
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
    _open_all()
    from .warm import hand_over

    code = hand_over(arguments)
    if code is not None:
        os._exit(code)  # nothing was done here that would have to be undone
    from .app import run

    run(arguments)


def _open_all() -> None:
    """Have descriptors 0 to 2 be ours: where we were started without one, our own sockets would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.stat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) == number:  # the lowest that is free
                os.set_inheritable(number, True)
                setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


def load(verb: str) -> Any:
    """The module of a verb."""
    import importlib
    import keyword

    return importlib.import_module(f".{verb}_" if keyword.iskeyword(verb) else f".{verb}", __name__)


if __name__ == "__main__":
    main()

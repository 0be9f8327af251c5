"""`wherry completion`: the completion script of a shell."""

from __future__ import annotations

import enum

import typer


class Shell(enum.StrEnum):
    """The shells that have one."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def command(shell: Shell) -> None:
    """Print the script: `source <(wherry completion bash)`."""
    from click.shell_completion import get_completion_class

    from .app import make

    found = get_completion_class(shell.value)
    if found is None:
        raise typer.BadParameter(f"no completion for {shell.value}")
    print(found(make(), {}, "wherry", "_WHERRY_COMPLETE").source())

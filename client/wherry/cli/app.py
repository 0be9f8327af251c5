"""Builds the command line around the one verb that was typed, and turns errors into exit codes."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from . import VERBS, load


class Forwarding(TyperCommand):
    """A verb whose exit code is a process's: a flag that is none is Docker's 125, for 2 could be the process's own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except TyperException as e:
            e.exit_code = 125
            raise


class Verbs(TyperGroup):
    """Loads a verb's file when the verb is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = load(cmd_name)
        if hasattr(module, "app"):
            made = get_command(module.app)
        else:
            settings = getattr(module, "SETTINGS", {})
            if hasattr(module.command, "declare"):  # its flags depend on what was typed
                module.command.declare()
            single = typer.Typer(add_completion=False)
            kind = Forwarding if cmd_name in ("run", "create", "exec") else None
            single.command(cmd_name, cls=kind, help=VERBS[cmd_name], context_settings=settings)(module.command)
            made = get_command(single)
        made.name = cmd_name
        made.help = VERBS[cmd_name]
        _plain(made)
        return made


def _plain(command: Any) -> None:
    """Its help as plain text: in rich's tables, brackets are markup and long flags are cut off."""
    command.rich_markup_mode = None
    for below in getattr(command, "commands", {}).values():
        _plain(below)


def make() -> Any:
    """The whole `wherry` command."""
    app = typer.Typer(cls=Verbs, no_args_is_help=True, rich_markup_mode=None)

    @app.callback(help="A container runtime of services on a NATS bus.")
    def wherry() -> None: ...

    command = get_command(app)
    command.name = "wherry"
    return command


def run(arguments: list[str]) -> None:
    """Run a command line; never returns."""
    from wherry_shared.errors import WherryError

    try:
        make()(arguments, prog_name="wherry")
    except WherryError as e:
        from .common import clean_lines

        print(clean_lines(f"wherry: {_name(e)}: {e}"), file=sys.stderr)
        raise SystemExit(1) from None


def _name(e: Exception) -> str:
    """`NotFound` reads as `not found`."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in type(e).__name__).strip()

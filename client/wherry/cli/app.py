"""Builds the command line around the one verb that was typed, and turns errors into exit codes."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any, ClassVar

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

    built: ClassVar[dict[str, Any]] = {}
    """What `build_all` has made ahead."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.built.get(cmd_name) or (_build(cmd_name) if cmd_name in VERBS else None)


def build_all() -> None:
    """For a process that many command lines are forked from: each verb with every flag that it may have."""
    for verb in VERBS:
        Verbs.built[verb] = _build(verb, every=True)


def _build(verb: str, *, every: bool = False) -> Any:
    module = load(verb)
    if hasattr(module, "app"):
        made = get_command(module.app)
    else:
        settings = getattr(module, "SETTINGS", {})
        if hasattr(module.command, "declare"):
            module.command.declare(every=every)
        single = typer.Typer(add_completion=False)
        kind = Forwarding if verb in ("run", "create", "exec") else None
        single.command(verb, cls=kind, help=VERBS[verb], context_settings=settings)(module.command)
        made = get_command(single)
    made.name = verb
    made.help = VERBS[verb]
    _plain(made)
    return made


def _plain(command: Any) -> None:
    """Its help as plain text: in rich's tables, brackets are markup and long flags are cut off."""
    command.rich_markup_mode = None
    for below in getattr(command, "commands", {}).values():
        _plain(below)


@cache
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

"""`wherry cp`: files between a container and this host; `-` is a tar on stdin or stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .common import NamespaceOption, fail, with_client

if TYPE_CHECKING:
    from wherry import Client


def command(
    source: Annotated[str, typer.Argument(help="CONTAINER:PATH, PATH or -.")],
    target: Annotated[str, typer.Argument(help="CONTAINER:PATH, PATH or -.")],
    archive: Annotated[bool, typer.Option("--archive", "-a", help="Keep who owns the files.")] = False,
    follow: Annotated[bool, typer.Option("--follow-link", "-L", help="Copy what a link leads to.")] = False,
    namespace: NamespaceOption = "default",
) -> None:
    async def work(client: Client) -> None:
        from wherry_shared.errors import InvalidArgument

        from wherry import copying
        from wherry.container import find

        wish = copying.Wish(keep_owner=archive, follow=follow)
        (name, inside), (other, outside) = _split(source), _split(target)
        if bool(name) == bool(other):
            raise InvalidArgument("one of the two is CONTAINER:PATH, the other one is not")
        if name:
            to = sys.stdout.buffer if outside == "-" else outside
            left = await copying.copy_out(await find(client, name), inside, to, wish)
        else:
            given = sys.stdin.buffer if inside == "-" else inside
            left = await copying.copy_in(await find(client, other), given, outside, wish)
        for path in left:
            fail(f"{path} is left out: it is no file that can be copied", 0)

    with_client(namespace, work)


def _split(text: str) -> tuple[str, str]:
    """A container and a path in it, or "" and a path here: one with a `/` before its first `:` is no container's."""
    name, separator, path = text.partition(":")
    if not separator or "/" in name or name.startswith((".", "-")) or not name:
        return "", text
    return name, path or "/"

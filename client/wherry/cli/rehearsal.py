"""What the process that command lines are forked from goes through while nobody waits: lines, asking, a specification.

Nothing of it changes anything, here or on the node. Decision 0033.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import uvloop
from wherry_shared.api.container import Container, Runtime
from wherry_shared.errors import WherryError

import wherry
from wherry import flags, spec
from wherry.image import Image
from wherry.registry.documents import ImageConfig

from .app import make

ASKING_SECONDS = 0.5  # whoever comes meanwhile waits as long
LINES = (["run", "--rm", "image", "true"], ["exec", "container", "true"], ["ps"])


def play(state: Path) -> bool:
    """Go through it once; False when the node does not answer."""
    for line in LINES:
        with make().make_context("wherry", list(line)) as context:
            name, command, rest = context.command.resolve_command(context, list(line))
            command.make_context(name, list(rest), parent=context)
    with contextlib.suppress(WherryError, OSError, TimeoutError):
        uvloop.run(_ask(state))
        return True
    return False


async def _ask(state: Path) -> None:
    async with asyncio.timeout(ASKING_SECONDS), wherry.connect(state=str(state), namespace="default") as client:
        for record in (await client.images.walk(limit=1)).items:
            _specify((await Image(client, record).resolve()).config)


def _specify(config: ImageConfig) -> None:
    options = {name: value for name, value in flags.options({}).items() if name not in ("labels", "runtime")}
    made = spec.make("container", config, spec.Options(**options), spec.User())
    Container(id="container", runtime=Runtime(name="crun"), spec=made)

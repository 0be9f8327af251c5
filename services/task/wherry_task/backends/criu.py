"""Checkpoints of OCI runtimes, by way of CRIU where the runtime and the kernel have it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from wherry_shared.api.task import CheckpointOptions
from wherry_shared.errors import Unimplemented, Unknown

from . import Bundle
from .channel import Channel

PATIENCE = 590.0
CHECK_SECONDS = 10.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of a verb that it does not know a runtime says so on stderr and not in its log.
_SILENT = " ended with status "
_NO_SUCH_VERB = ("unknown command", "not supported", "without CRIU", "No help topic")


async def checkpoint(channel: Channel, bundle: Bundle, options: CheckpointOptions) -> None:
    """Write the image. Unimplemented where the runtime or CRIU cannot, Unknown with what went wrong else."""
    flags = {
        "--leave-running": not options.exit, "--tcp-established": options.open_tcp,
        "--ext-unix-sk": options.external_unix_sockets, "--shell-job": options.terminal,
        "--file-locks": options.file_locks,
    }  # fmt: skip
    work = options.work or await asyncio.to_thread(tempfile.mkdtemp, prefix="criu-", dir=bundle.path)
    await asyncio.to_thread(Path(options.image).mkdir, parents=True, exist_ok=True, mode=0o700)
    try:
        await channel.ask(
            "checkpoint", patience=PATIENCE, image=options.image, work=work,
            flags=[flag for flag, wanted in flags.items() if wanted],
        )  # fmt: skip
    except Unknown as e:
        await explain(e, bundle, await asyncio.to_thread(said_in, Path(work) / "dump.log"))
        raise
    finally:
        if not options.work:
            await asyncio.to_thread(shutil.rmtree, work, True)


async def explain(error: BaseException, bundle: Bundle, said: str = "") -> None:
    """Raise Unimplemented in place of `error` where checkpoints cannot work at all; return where they could."""
    if not isinstance(error, Unknown):
        return
    runtime = Path(bundle.binary).name
    if any(words in error.message for words in _NO_SUCH_VERB):
        raise Unimplemented(f"{runtime} on this node has no checkpoints: {error.message}") from None
    if _SILENT in error.message and (await _said(bundle.binary, "checkpoint", "--help"))[0] != 0:
        raise Unimplemented(f"{runtime} on this node has no checkpoints: it was built without CRIU") from None
    reason = await _check()
    if reason:
        raise Unimplemented(f"CRIU does not work on this node: {reason}") from None
    if said:
        raise Unknown(f"{error.message}: {said}") from None


async def _check() -> str:
    """Why CRIU cannot work here, by its own check; "" when it can."""
    binary = shutil.which("criu", path=PATH)
    if binary is None:
        return "it is not installed"
    status, said = await _said(binary, "check")
    return "" if status == 0 else _first_error(said) if said else "its check does not end"


async def _said(*command: str) -> tuple[int, str]:
    """The exit status and output of a program; -1 and nothing where it does not end soon."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        return -1, ""
    return process.returncode or 0, said.decode(errors="replace")


def _first_error(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if "Error" in line]
    about = [line for line in lines if "exited, status" not in line]
    return (about or lines or ["it does not say why"])[0]


def said_in(path: Path) -> str:
    """What CRIU's log says went wrong first: the rest, to "Dumping FAILED", follows from it."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return _first_error(text) if "Error" in text else ""

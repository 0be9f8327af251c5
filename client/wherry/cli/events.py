"""`wherry events`: what happens, and with --since what happened."""

from __future__ import annotations

import asyncio
import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from wherry_shared.errors import InvalidArgument

from .common import Format, FormatOption, NamespaceOption, clean, with_client

if TYPE_CHECKING:
    from wherry_shared.api.events import Envelope

    from wherry import Client, Watch

IDLE_SECONDS = 1.0


def command(
    since: Annotated[str, typer.Option(help="10m, 2h, 3d, or an RFC 3339 time.")] = "",
    until: Annotated[str, typer.Option(help="The same: no event from then on.")] = "",
    filters: Annotated[list[str], typer.Option("--filter", help='containerd filters: topic~="^/tasks/"')] = [],  # noqa: B006
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    follow: Annotated[bool, typer.Option(help="Go on with what happens.")] = True,
    place: Annotated[
        Path | None, typer.Option("--place-file", help="Go on after the last event printed; its place is kept here.")
    ] = None,
    namespace: NamespaceOption = "default",
    format: FormatOption = Format.table,
) -> None:
    start = parse_since(since) if since else None
    end = parse_since(until, "--until") if until else None
    kept = _Place(place)
    token = kept.read()

    async def work(client: Client) -> None:
        watch = client.watch(
            since=start, until=end, token=token, filters=filters, all_namespaces=all_namespaces, follow=follow
        )
        async with watch:
            await _print_all(watch, kept, format)

    with_client(namespace, work)


async def _print_all(watch: Watch, place: _Place, format: Format) -> None:
    from wherry import Gap

    while True:
        try:
            envelope = await _next(watch, place)
        except StopAsyncIteration:
            place.begin(watch.token)
            return
        except Gap as gap:
            print(
                json.dumps({"gap": gap.message}) if format is Format.json else f"-- gap: {gap.message} --", flush=True
            )
            continue
        _print(envelope, format)
        place.write(watch.token)


async def _next(watch: Watch, place: _Place) -> Envelope:
    """The next event. What happens between this run and the next is told, also where this one prints nothing."""
    coming = asyncio.ensure_future(anext(watch))
    try:
        while not (await asyncio.wait([coming], timeout=IDLE_SECONDS))[0]:
            place.begin(watch.token)
        return await coming
    finally:
        coming.cancel()


def _print(e: Envelope, format: Format) -> None:
    if format is Format.json:
        print(json.dumps(e.model_dump(mode="json"), separators=(",", ":")), flush=True)
    else:
        stamp = e.timestamp.isoformat(timespec="milliseconds")
        print(clean(f"{stamp} {e.namespace} {e.topic} {json.dumps(e.event)}"), flush=True)


class _Place:
    """The file that keeps the place, if one is wanted. InvalidArgument where it can be none."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._written = ""

    def read(self) -> str:
        """The token; "" when there is none yet."""
        if self._path is not None:
            if self._path.exists() and not self._path.is_file():  # another file takes its place: not that of /dev/null
                raise self._useless(OSError(0, "it is there, and no regular file"))
            try:
                self._written = self._path.read_text("ascii").strip()
            except FileNotFoundError:
                self._check()
            except (OSError, UnicodeDecodeError) as e:
                raise self._useless(e) from None
        return self._written

    def begin(self, token: str) -> None:
        """Keep a place where none is kept yet."""
        if not self._written:
            self.write(token)

    def write(self, token: str) -> None:
        """Whole or not at all: half a place would be none."""
        if self._path is None or token in ("", self._written):
            return
        new = self._path.with_name(self._path.name + ".new")
        try:
            new.write_text(token + "\n")
            os.replace(new, self._path)
        except OSError as e:
            raise self._useless(e) from None
        self._written = token

    def _check(self) -> None:
        """Before anything is printed that would be printed again."""
        parent = self._path.absolute().parent if self._path is not None else Path()
        if not os.access(parent, os.W_OK | os.X_OK):
            raise self._useless(OSError(0, f"{parent} is not there, or not to be written to"))

    def _useless(self, e: OSError | UnicodeDecodeError) -> InvalidArgument:
        return InvalidArgument(f"--place-file {self._path}: {getattr(e, 'strerror', None) or e}")


_SPAN = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,9})?(?:ms|[smhd]))+\Z")
_PART = re.compile(r"([0-9.]+)(ms|[smhd])")
_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_UNIX = re.compile(r"[0-9]{9,11}(?:\.[0-9]{1,9})?\Z")


def parse_since(text: str, option: str = "--since") -> datetime:
    """A time ago (`10m`, `1h30m`), a time, or one in seconds since 1970. InvalidArgument otherwise."""
    try:
        if _SPAN.match(text):
            seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
            return datetime.now(UTC) - timedelta(seconds=seconds)
        if _UNIX.match(text):
            return datetime.fromtimestamp(float(text), UTC)
        return datetime.fromisoformat(text).astimezone(UTC)  # a time without a zone is this host's
    except (ValueError, OverflowError):
        raise InvalidArgument(f"{option} {text!r} is neither like 10m nor an RFC 3339 time") from None

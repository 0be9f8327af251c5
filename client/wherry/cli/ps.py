"""`wherry ps`: containers, and what their tasks do."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Format, NamespaceOption, age, clean, show, with_client

if TYPE_CHECKING:
    from wherry_shared.api.container import Container

    from wherry import Client

COLUMNS = ["id", "image", "status", "pid", "age", "runtime"]


def command(
    all: Annotated[bool, typer.Option("--all", "-a", help="Also those that do not run.")] = False,
    filters: Annotated[
        list[str],
        typer.Option("--filter", "-f", help="status=, name=, label=, ancestor=, exited=; or containerd's: id==web."),
    ] = [],  # noqa: B006
    namespace: NamespaceOption = "default",
    format: Annotated[str, typer.Option("--format", help="table, json or a template: {{.ID}} {{.Status}}.")] = "table",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only.")] = False,
    latest: Annotated[bool, typer.Option("--latest", "-l", help="The youngest only, whatever it does.")] = False,
    no_trunc: Annotated[bool, typer.Option("--no-trunc", help="Docker's; nothing is cut off here.")] = False,
) -> None:
    async def work(client: Client) -> None:
        rows = await rows_of(client, filters, all=all or latest)
        if latest:
            rows = sorted(rows, key=lambda row: row["created_at"])[-1:]
        if quiet:
            for row in rows:
                print(row["id"])
            return
        named = any(row["name"] != row["id"] for row in rows)
        render(rows, ["name", *COLUMNS] if named else COLUMNS, format)

    with_client(namespace, work)


async def rows_of(client: Client, filters: Sequence[str], *, all: bool) -> list[dict[str, Any]]:
    """A row for each container that is wanted. InvalidArgument: a filter."""
    from wherry.client import walk
    from wherry.container import NAME_LABEL

    plain, wanted = split(filters)
    _check_states(wanted.get("status", ()))
    called = [_named(pattern) for pattern in wanted.pop("name", ())]
    tasks = {t.container_id: t for t in await walk(client.tasks.walk)}
    # Thousands of records that do not run are not carried here to be left out.
    alive_only = not (all or plain or wanted.get("status") or wanted.get("exited"))
    chosen = [id for id, task in tasks.items() if task.status != "stopped"]
    rows = []
    for container in await (_those(client, chosen) if alive_only else walk(client.containers.walk, plain, spec=False)):
        task = tasks.get(container.id)
        alive = task is not None and task.status != "stopped"
        row = {
            "id": container.id,
            "name": container.labels.get(NAME_LABEL) or container.id,
            "image": container.image,
            "status": _status(task.status, task.exit_status) if task else "no task",
            "state": task.status if task else "none",
            "exit_status": task.exit_status if task else None,
            "pid": task.pid if task and alive else "",
            "age": age(container.created_at),
            "created_at": container.created_at,
            "runtime": container.runtime.name,
            "labels": container.labels,
        }
        if not (alive or all or wanted.get("status") or wanted.get("exited")):
            continue
        if _fits(row, wanted) and (not called or any(fits(str(row["name"])) or fits(container.id) for fits in called)):
            rows.append(row)
    return rows


async def _those(client: Client, ids: Sequence[str]) -> list[Container]:
    """The containers of these ids that are still there."""
    import asyncio

    from wherry_shared.errors import NotFound

    found = await asyncio.gather(*(client.containers.get(id) for id in ids), return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, NotFound):
            raise each
    return [each for each in found if not isinstance(each, BaseException)]


def split(filters: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """containerd's filters, which the service applies, and Docker's `key=value`, by their keys."""
    plain: list[str] = []
    wanted: dict[str, list[str]] = {}
    for text in filters:
        match = re.match(r"(id|name|status|label|ancestor|exited)=(?!=)(.*)\Z", text)
        if match:
            wanted.setdefault(match[1], []).append(match[2])
        else:
            plain.append(text)
    return plain, wanted


# Docker's words for the states of a container, and ours; one that was made and not started has no task.
_STATES = {
    "created": ("created", "none"), "exited": ("stopped",), "dead": ("stopped",), "restarting": (), "removing": (),
    **{state: (state,) for state in ("running", "stopped", "paused", "pausing", "none")},
}  # fmt: skip


def _check_states(wanted: Sequence[str]) -> None:
    from wherry_shared.errors import InvalidArgument

    for state in wanted:
        if state not in _STATES:
            raise InvalidArgument(f"no container is ever {state[:40]!r}, but one of {', '.join(sorted(_STATES))}")


def _named(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches, as Docker has it: a regular expression, and a slash may stand before the name.
    InvalidArgument."""
    from wherry_shared.errors import InvalidArgument
    from wherry_shared.regexp import compile_regexp
    from wherry_shared.regexp_syntax import BadPattern, parse

    try:
        parse(pattern)
    except BadPattern as e:
        raise InvalidArgument(f"name {pattern[:60]!r} is no regular expression: {e}") from None
    found = compile_regexp(pattern)
    return lambda name: found(name) or found(f"/{name}")


def made_of(image: str, wanted: str) -> bool:
    """Whether an image is called so: by its whole name, or by its last components, with its tag or without."""
    from wherry_shared.errors import InvalidArgument

    from wherry.registry.reference import Reference

    name, _, digest = wanted.partition("@")
    folder, slash, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    try:
        made = Reference.parse(image)
    except InvalidArgument:
        return image == wanted
    try:
        same = Reference.parse(f"{folder}{slash}{last}").name == made.name
    except InvalidArgument:
        return False
    same = same or f"/{made.name}".endswith(f"/{folder}{slash}{last}")
    return same and tag in ("", made.tag) and digest in ("", made.digest)


def _fits(row: dict[str, Any], wanted: dict[str, list[str]]) -> bool:
    """Whether a row is wanted: of several values of a key one is enough, of labels all are needed."""
    checks: dict[str, Callable[[str], bool]] = {
        "id": lambda v: str(row["id"]).startswith(v),
        "status": lambda v: row["state"] in _STATES[v],
        "ancestor": lambda v: made_of(str(row["image"]), v),
        "exited": lambda v: str(row["exit_status"]) == v,
    }
    if not all(any(checks[key](value) for value in values) for key, values in wanted.items() if key != "label"):
        return False
    return all(_has_label(row["labels"], text) for text in wanted.get("label", ()))


def _has_label(labels: dict[str, str], text: str) -> bool:
    key, separator, value = text.partition("=")
    return labels.get(key) == value if separator else key in labels


def _status(status: str, code: int | None) -> str:
    return f"{status} ({code})" if code is not None else status


# ---- printing: a table, JSON, or Docker's templates as far as they name fields

_FIELD = re.compile(r"\{\{ *(json +)?(\.[A-Za-z0-9_.]*) *\}\}")
_ALIASES = {"names": "name", "containerid": "id", "container": "id", "createdat": "created_at", "runningfor": "age"}


def render(rows: Sequence[dict[str, Any]], columns: Sequence[str], format: str) -> None:
    """Print rows as `table`, `json`, or by a template of `{{.Field}}` and `{{json .Field}}`. InvalidArgument."""
    if format in ("", "table", "json"):
        show(rows, columns, Format(format or "table"))
        return
    template = format.removeprefix("table ").replace("\\t", "\t").replace("\\n", "\n")
    if format.startswith("table "):
        print(_FIELD.sub(lambda match: match[2].strip(".").upper(), template))
    for row in rows:
        print(fill(template, row))


def fill(template: str, row: dict[str, Any]) -> str:
    """A template with a row's fields. InvalidArgument: it asks for more than fields, or for one that is not there."""
    import json

    from wherry_shared.errors import InvalidArgument

    def one(match: re.Match[str]) -> str:
        found = field_of(row, match[2])
        return json.dumps(found, default=str) if match[1] or isinstance(found, dict | list) else clean(str(found))

    if "{{" in _FIELD.sub("", template):
        raise InvalidArgument(
            f"template {template[:80]!r}: only fields like {{{{.ID}}}} and {{{{json .labels}}}} are known"
        )
    return _FIELD.sub(one, template)


def field_of(row: Any, path: str) -> Any:
    """What `.a.b` names in nested objects, in any case and with or without `_`. InvalidArgument: nothing."""
    from wherry_shared.errors import InvalidArgument

    found = row
    for step in [part for part in path.split(".") if part]:
        plain = step.lower().replace("_", "")
        names = {key.lower().replace("_", ""): key for key in found} if isinstance(found, dict) else {}
        alias = _ALIASES.get(plain, plain).replace("_", "")
        key = names.get(plain) or names.get(alias)
        if key is None:
            raise InvalidArgument(f"no field {path!r}: there are {', '.join(sorted(map(str, names.values())))[:400]}")
        found = found[key]
    return found

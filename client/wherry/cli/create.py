"""`wherry create`: a container from an image, with Docker's flags; `run` takes them too. `start` starts it."""

from __future__ import annotations

import inspect
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import NamespaceOption, fail, with_client

if TYPE_CHECKING:
    from wherry_shared.values import Platform

    from wherry import Client, Container, Image

SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}
# Docker's: the node failed.
NODE_FAILED = 125


def flag(names: str, help: str, default: Any = "", kind: Any = None) -> inspect.Parameter:
    """A flag as a parameter of a verb; `names` begins with the long one, which also names the parameter."""
    declared = names.split()
    name = declared[0].removeprefix("--").replace("-", "_")
    wanted: Any = kind or type(default)
    annotation = Annotated[wanted, typer.Option(*declared, help=help)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def many(names: str, help: str) -> inspect.Parameter:
    """A flag that may be given several times."""
    return flag(names, help, [], list[str])


def switch(names: str, help: str) -> inspect.Parameter:
    """A flag without a value."""
    return flag(names, help, False)


def accepting(*parameters: inspect.Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb these parameters: so many that they stand in tables rather than in its signature.

    `declare(every=False)` says only those that were typed: each costs a command line's start half a millisecond, and
    there are fifty. What was not typed, or is typed as it would be anyway, is not among the verb's arguments:
    `given.get(...)`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        defaults = {each.name: each.default for each in parameters if each.name not in ALWAYS}

        @wraps(function)
        def verb(**given: Any) -> None:
            function(**{k: v for k, v in given.items() if k not in defaults or v != defaults[k]})

        def declare(*, every: bool) -> None:
            typed = sys.argv[1:]
            every = every or "--help" in typed or function.__module__.rpartition(".")[2] not in typed
            wanted = [each for each in parameters if every or each.name in ALWAYS or _is_typed(each, typed)]
            verb.__signature__ = inspect.Signature(sorted(wanted, key=lambda each: each.kind))  # type: ignore[attr-defined]

        verb.declare = declare  # type: ignore[attr-defined]
        return verb

    return decorate


ALWAYS = ("image", "args", "ids", "namespace")


def _is_typed(parameter: inspect.Parameter, typed: Sequence[str]) -> bool:
    """Whether a flag may be among the arguments; short ones come in bundles."""
    names = parameter.annotation.__metadata__[0]
    declared = [names.default, *(names.param_decls or ())]
    long = tuple(name for name in declared if name.startswith("--"))
    short = [name[1] for name in declared if not name.startswith("--")]
    return any(
        text.partition("=")[0] in long if text.startswith("--") else text[:1] == "-" and any(s in text for s in short)
        for text in typed
    )


def argument(name: str, help: str, kind: Any = str, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A positional argument of a verb."""
    annotation = Annotated[kind, typer.Argument(help=help)]
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation
    )  # fmt: skip


NAMESPACE = inspect.Parameter(
    "namespace", inspect.Parameter.KEYWORD_ONLY, default="default", annotation=NamespaceOption
)
IMAGE = argument("image", "The image; it is pulled when it is not there.")
ARGS = argument("args", "The command and its arguments.", list[str] | None, None)

LIMITS = [
    flag("--memory -m", "Memory at most: 512m."),
    flag("--memory-swap", "Memory and swap together at most; -1: no limit."),
    flag("--memory-reservation", "Memory that it is held to when memory is short."),
    flag("--memory-swappiness", "How eagerly it is swapped, 0 to 100.", None, int | None),
    switch("--oom-kill-disable", "Do not kill it for its memory (cgroup v1)."),
    flag("--cpus", "How many CPUs' time at most: 1.5."),
    flag("--cpu-shares -c", "Its weight beside others.", 0),
    flag("--cpu-quota", "Microseconds of CPU time in each period.", 0),
    flag("--cpu-period", "Microseconds of a period.", 0),
    flag("--cpuset-cpus", "The CPUs it may run on: 0-3,5."),
    flag("--cpuset-mems", "The memory nodes it may use."),
    flag("--pids-limit", "Processes and threads at most; -1: no limit.", 0),
    flag("--blkio-weight", "Its weight at the disks, 10 to 1000.", 0),
]
PROCESS = [
    switch("--tty -t", "Give it a terminal."),
    many("--env -e", "NAME=VALUE, or NAME for ours."),
    many("--env-file", "A file of NAME=VALUE lines."),
    flag("--user -u", "name|uid[:group|gid]."),
    many("--group-add", "A further group, by name or number."),
    flag("--workdir -w", "Where it starts."),
    flag("--entrypoint", 'Instead of the image\'s; "" for none.', None, str | None),
    switch("--init", "The node's tini or catatonit as process 1: reaps, and passes signals on."),
    many("--ulimit", "nofile=1024:2048."),
    flag("--stop-signal", "What `stop` sends."),
    flag("--oom-score-adj", "How soon it is killed for memory, -1000 to 1000.", None, int | None),
]
SECURITY = [
    many("--cap-add", "A capability more, or ALL."),
    many("--cap-drop", "A capability less, or ALL."),
    many("--security-opt", "seccomp=unconfined|compatible|FILE, no-new-privileges[=false], apparmor=NAME."),
    switch("--privileged", "Every capability and device, nothing masked (for admins)."),
    many("--device", "HOST[:CONTAINER][:rwm], or a CDI device's VENDOR/CLASS=NAME."),
    many("--sysctl", "NAME=VALUE of its own namespaces."),
    flag("--userns-remap", "UID[:GID[:SIZE]]: root in it is this user on the node."),
]
NAMESPACES = [
    flag("--network --net", "private, none, host, container:ID or a path."),
    switch("--net-host", "The host's network."),
    flag("--pid", "private, host, container:ID or a path."),
    flag("--ipc", "private, host, container:ID or a path."),
    flag("--uts", "private, host, container:ID or a path."),
    flag("--cgroupns", "private, host, container:ID or a path."),
    flag("--cgroup-parent", "The cgroup that its own lies in."),
    flag("--hostname -h", "The container's host name."),
    flag("--domainname", "The container's NIS domain name."),
]
STORAGE = [
    many("--volume -v", "SOURCE:TARGET[:ro|rw|rshared|...], a directory of the node."),
    many("--mount", "type=bind|tmpfs,source=...,target=...[,readonly]."),
    many("--tmpfs", "TARGET[:size=64m,mode=1777]."),
    flag("--shm-size", "The size of /dev/shm."),
    switch("--read-only", "A root filesystem that cannot be written."),
    flag("--snapshotter", "Which snapshotter holds its filesystem."),
]
ABOUT = [
    flag("--name", "The container's id."),
    many("--label -l", "KEY=VALUE."),
    many("--label-file", "A file of KEY=VALUE lines."),
    many("--annotation", "KEY=VALUE, for the runtime."),
    flag("--runtime", "crun, runc, or another OCI runtime."),
    flag("--restart", "no, always, unless-stopped or on-failure[:N]."),
    flag("--hooks-file", "OCI hooks, as JSON (for admins)."),
    many("--log-opt", "max-size=10m or max-file=3, of what it logs in the background."),
    flag("--cidfile", "Write the id into this new file."),
    flag("--pull", "missing, always or never.", "missing"),
    flag("--platform", "Which of the image's: os/architecture[/variant]; the node's unless given."),
]
FLAGS = [*ABOUT, *PROCESS, *LIMITS, *SECURITY, *NAMESPACES, *STORAGE]


@accepting(IMAGE, ARGS, NAMESPACE, *FLAGS)
def command(image: str, args: list[str] | None, namespace: str, **given: Any) -> None:
    async def work(client: Client) -> None:
        print((await make(client, image, args or [], given)).id)

    with_client(namespace, work)


def guarded(work: Callable[[], None], args: Iterable[str] = ()) -> None:
    """Turn an error into Docker's exit code: 125, or for the command 126 (cannot be run) and 127 (is not there)."""
    from wherry_shared.errors import WherryError

    try:
        work()
    except WherryError as e:
        raise fail(explain(e, list(args)), code_of(e)) from None


CANNOT_RUN, NOT_THERE = 126, 127


def code_of(e: Exception) -> int:
    """Docker's exit code for an error, by what the OCI runtimes say of a command that is not there or cannot be run."""
    text = str(e).lower()
    if "exec" not in text:
        return NODE_FAILED
    cannot = ("permission denied", "open executable: operation not permitted", "argument list too long")
    if any(words in text for words in cannot):  # the second is crun's, of a directory
        return CANNOT_RUN
    return NOT_THERE if "not found" in text or "no such file or directory" in text else NODE_FAILED


def explain(e: Exception, args: list[str]) -> str:
    """The error's text, with the command that it is about."""
    return f"{args[0]}: {e}" if args and code_of(e) != NODE_FAILED and args[0] not in str(e) else str(e)


async def make(client: Client, reference: str, args: list[str], given: dict[str, Any]) -> Container:
    """The container that the flags describe, from an image that is pulled when it is not there."""
    with _cidfile(given.get("cidfile", "")) as write:
        container = await _made(client, reference, args, given)
        write(container.id)
    return container


@contextmanager
def _cidfile(path: str) -> Iterator[Callable[[str], object]]:
    """What writes into a new file, which is there before the container and goes when that does not come to be."""
    from wherry_shared.errors import FailedPrecondition

    if not path:
        yield lambda _: None
        return
    try:
        file = open(path, "x")  # noqa: SIM115 - closed below
    except OSError as e:
        raise FailedPrecondition(f"cidfile {path}: {e.strerror}") from None
    with file:
        try:
            yield file.write
        except BaseException:
            os.unlink(path)
            raise


async def _made(client: Client, reference: str, args: list[str], given: dict[str, Any]) -> Container:
    from wherry import flags, nearby
    from wherry.registry.platforms import parse_platform

    id = given.get("name") or f"{_stem(reference)}-{secrets.token_hex(3)}"
    if given.get("device") or given.get("privileged"):
        nearby.require(client, "a container with devices of the node")
    if given.get("init"):
        nearby.require(client, "an init")
    options = flags.options(given)
    here = nearby.is_here(client)
    if here:
        flags.check_sources(options.get("mounts", ()))
    options["mounts"] = flags.host_names(options, here=here)
    if parent := given.get("cgroup_parent"):
        options["cgroup"] = f"{parent.rstrip('/')}/{id}"
    if given.get("name"):
        from wherry.container import check_free

        await check_free(client, id)
    platform = parse_platform(given["platform"]) if given.get("platform") else None
    pull = given.get("pull", "missing")
    image = await find_image(client, reference, options.get("snapshotter", ""), pull, platform)
    return await client.new_container(id, image, platform=platform, args=args, **options)


def _stem(image: str) -> str:
    name = image.partition("@")[0].rpartition("/")[2].partition(":")[0]
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in name).split()
    return "-".join(words)[:40].rstrip("-") or "container"


async def find_image(
    client: Client, reference: str, snapshotter: str, pull: str = "missing", platform: Platform | None = None
) -> Image:
    """The image, pulled when it is not there, or not for that platform. InvalidArgument: how to pull."""
    from wherry_shared.errors import InvalidArgument, NotFound

    from .pull import Bars

    if pull not in ("missing", "always", "never"):
        raise InvalidArgument(f"pull {pull[:40]!r} is not missing, always or never")
    try:
        if pull != "always":
            image = await client.image(reference)
            if platform is not None:
                await image.resolve(platform)
            return image
    except NotFound:
        if pull == "never":
            raise
    with Bars() as bars:
        return await client.pull(
            reference, unpack=True, snapshotter=snapshotter, platform=platform, on_progress=bars.on_progress
        )

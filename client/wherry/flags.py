"""Docker's everyday flags of `run` and `create` as the options of a new container."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wherry_shared.api.task import LOG_LABEL
from wherry_shared.errors import InvalidArgument, NotFound

from . import cdi, devices, limits, restarts, seccomp, spec, volumes

FILE_MAX = 1 << 20
# Statically linked, or they would not run on an image's libraries.
INITS = ("docker-init", "tini-static", "catatonit")
NAME_FILES = ("/etc/hosts", "/etc/resolv.conf")
Given = Mapping[str, Any]
"""What was typed, by the name of the flag with `_` for `-`; what was not, is absent or empty."""


def options(given: Given) -> dict[str, Any]:
    """The options of `client.new_container` that the flags mean. InvalidArgument, NotFound: a flag, and why."""
    named = {
        "env": environment(given.get("env_file", ()), given.get("env", ())),
        "cwd": given.get("workdir", ""), "groups": given.get("group_add", ()), "sysctls": pairs(given, "sysctl"),
        "annotations": pairs(given, "annotation"), "labels": labels(given), "resources": resources(given),
        "rlimits": dict(limits.rlimit(text) for text in given.get("ulimit", ())), "mounts": mounts(given),
        "terminal": given.get("tty", False), "oom_score_adj": given.get("oom_score_adj"),
    }  # fmt: skip
    for name in (
        "user", "hostname", "domainname", "read_only", "cap_add", "cap_drop", "privileged", "runtime", "snapshotter",
        "stop_signal",
    ):  # fmt: skip
        named[name] = given.get(name) or named.get(name, "")
    named["read_only"], named["privileged"] = bool(named["read_only"]), bool(named["privileged"])
    made = {key: value for key, value in named.items() if value not in ("", None, (), {}, [])}
    if given.get("entrypoint") is not None:
        made["entrypoint"] = [given["entrypoint"]] if given["entrypoint"] else []
    if given.get("init"):
        made["init"] = init_program()
    return made | _devices(given) | _security(given) | _namespaces(given) | _user_namespace(given) | _hooks(given)


def pairs(given: Given, name: str) -> dict[str, str]:
    """`KEY=VALUE` arguments. InvalidArgument: one without `=`."""
    made = {}
    for text in given.get(name, ()):
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InvalidArgument(f"{name} {text[:80]!r} is not NAME=VALUE")
        made[key] = value
    return made


def labels(given: Given) -> dict[str, str]:
    """The labels of `--label`, `--label-file` and `--restart`; one without a value has an empty one."""
    lines = [line for path in given.get("label_file", ()) for line in _settings(path)]
    made = dict(text.partition("=")[::2] for text in [*lines, *given.get("label", ())])
    if restart := given.get("restart", ""):
        made |= restarts.labels_for(restart)
    if log := log_options(given):
        made[LOG_LABEL] = log
    return made


def log_options(given: Given) -> str:
    """Docker's `--log-opt` as the options of a log; "" for none. InvalidArgument."""
    made = []
    for name, text in pairs(given, "log_opt").items():
        if name == "max-size":
            made.append(f"max_size={limits.size(text, 'log-opt max-size')}")
        elif name == "max-file" and text.isascii() and text.isdigit():
            made.append(f"max_files={int(text)}")
        else:
            raise InvalidArgument(f"log-opt {name}={text[:40]}: there are max-size=10m and max-file=3")
    return "&".join(made)


def environment(files: Sequence[str], items: Sequence[str]) -> list[str]:
    """NAME=VALUE of files and of arguments, in this order; NAME alone is this process's own, or taken out."""
    lines = [line for path in files for line in _settings(path)]
    made = []
    for item in [*lines, *items]:
        if "=" not in item and item in os.environ:
            item = f"{item}={os.environ[item]}"
        made.append(item)
    return made


def _settings(path: str) -> list[str]:
    """The lines of NAME or NAME=VALUE. InvalidArgument: a name with blanks, which Docker refuses, too."""
    lines = _lines(path)
    for name in (line.partition("=")[0] for line in lines):
        if not name or any(c.isspace() for c in name):
            raise InvalidArgument(f"{path}: {name[:80]!r} is no name")
    return lines


def _lines(path: str) -> list[str]:
    """A file's lines without comments and empty ones; blanks at an end are a value's, as Docker has it. NotFound;
    InvalidArgument: larger than 1 MiB, no UTF-8."""
    try:
        with open(path, "rb") as f:
            data = f.read(FILE_MAX + 1)
        text = data.decode("utf-8-sig")
    except OSError as e:
        raise NotFound(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} is not UTF-8") from None
    if len(data) > FILE_MAX:
        raise InvalidArgument(f"{path} is larger than {FILE_MAX} bytes")
    lines = (raw.removesuffix("\r").lstrip() for raw in text.split("\n"))  # not by what else Unicode parts lines with
    return [line for line in lines if line and not line.startswith("#")]


def resources(given: Given) -> dict[str, Any]:
    """The limits, as an OCI LinuxResources."""
    return limits.resources(
        memory=given.get("memory", ""), memory_swap=given.get("memory_swap", ""),
        memory_reservation=given.get("memory_reservation", ""), memory_swappiness=given.get("memory_swappiness"),
        oom_kill_disable=given.get("oom_kill_disable", False), cpu=given.get("cpus", ""),
        cpu_shares=given.get("cpu_shares", 0), cpu_quota=given.get("cpu_quota", 0),
        cpu_period=given.get("cpu_period", 0), cpuset_cpus=given.get("cpuset_cpus", ""),
        cpuset_mems=given.get("cpuset_mems", ""), pids_limit=given.get("pids_limit", 0),
        blkio_weight=given.get("blkio_weight", 0),
    )  # fmt: skip


def mounts(given: Given) -> list[dict[str, Any]]:
    """What `-v`, `--mount`, `--tmpfs` and `--shm-size` mount; a relative source is taken from where we are."""
    made = [volumes.volume(_absolute(text)) for text in given.get("volume", ())]
    made += [volumes.mount(text) for text in given.get("mount", ())]
    made += [volumes.tmpfs(text) for text in given.get("tmpfs", ())]
    return made + ([volumes.shm(given["shm_size"])] if given.get("shm_size") else [])


def _absolute(text: str) -> str:
    source, separator, rest = text.partition(":")
    return f"{os.path.abspath(source)}:{rest}" if separator and source.startswith(".") else text


def check_sources(mounts: Sequence[Mapping[str, Any]]) -> None:
    """NotFound: a bind mount's source is not on this host. It is never made, lest a typing error is."""
    for each in mounts:
        if each.get("type") == "bind" and not os.path.lexists(each["source"]):
            raise NotFound(f"mount source {each['source']}: there is no such file or directory on the node")


def init_program() -> str:
    """The path of this host's program for `--init`. NotFound: it has none."""
    found = next(filter(None, map(shutil.which, INITS)), None)
    if found is None:
        raise NotFound(f"init: the node has none of {', '.join(INITS)} on its PATH (Debian: apt install tini)")
    return os.path.realpath(found)


def host_names(options: Mapping[str, Any], *, here: bool) -> list[dict[str, Any]]:
    """The mounts of a container; with the node's network it looks up names as the node does, too.

    here: whether the node is this host: what it does not have is left out then. From afar it is taken to have both.
    """
    own = list(options.get("mounts", ()))
    if options.get("namespaces", {}).get("network") != spec.HOST:
        return own
    there = {each["destination"] for each in own}
    wanted = [path for path in NAME_FILES if path not in there and (not here or os.path.isfile(path))]
    return [*own, *(volumes.bind(path, path, ["ro"]) for path in wanted)]


def _devices(given: Given) -> dict[str, Any]:
    names = given.get("device", ())
    made = {
        "cdi_devices": [name for name in names if cdi.is_name(name)],
        "devices": [device for name in names if not cdi.is_name(name) for device in devices.parse(name)],
    }
    return {key: value for key, value in made.items() if value}


def _security(given: Given) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for text in given.get("security_opt", ()):
        name, _, value = text.replace(":", "=", 1).partition("=") if "=" not in text else text.partition("=")
        if name == "seccomp" and value:
            made["seccomp"] = _seccomp(value, given)
        elif name == "no-new-privileges" and value in ("", "true", "false"):
            made["no_new_privileges"] = value != "false"
        elif name == "systempaths" and value == "unconfined":
            made["masked"] = False
        elif name == "apparmor" and value:
            made["apparmor"] = value
        else:
            raise InvalidArgument(
                f"security-opt {text[:80]!r}: seccomp=PROFILE, no-new-privileges[=BOOL], apparmor=NAME and "
                "systempaths=unconfined are there"
            )
    return made


def _seccomp(value: str, given: Given) -> str | dict[str, Any]:
    if value in (seccomp.UNCONFINED, seccomp.DEFAULT, seccomp.COMPATIBLE):
        return value
    allowed = spec.Options(cap_add=given.get("cap_add", ()), cap_drop=given.get("cap_drop", ())).capabilities()
    return seccomp.load(Path(value), spec.architecture(None), allowed)


def _namespaces(given: Given) -> dict[str, Any]:
    """`host`, `private`, `container:ID` or a path, for each kind of namespace; a network may also be `none`."""
    chosen, join = {}, {}
    for kind, flag in (("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("network", "network"), ("cgroup", "cgroupns")):
        where = given.get(flag, "")
        if kind == "network":
            where = spec.HOST if given.get("net_host") else spec.PRIVATE if where == "none" else where
        if where.startswith("container:"):
            join[kind] = where.removeprefix("container:")
        elif where in (spec.HOST, spec.PRIVATE) or where.startswith("/"):
            chosen[kind] = where
        elif where:
            raise InvalidArgument(f"{flag} {where[:80]!r} is not private, host, container:ID or a namespace's path")
    return {key: value for key, value in (("namespaces", chosen), ("join", join)) if value}


def _user_namespace(given: Given) -> dict[str, Any]:
    """`--userns-remap UID[:GID[:SIZE]]`: root in the container is that user on the node, and so on for SIZE ids."""
    text = given.get("userns_remap", "")
    if not text:
        return {}
    try:
        first, *more = (int(part) for part in text.split(":"))
        gid, size = more[0] if more else first, more[1] if len(more) > 1 else 65536
    except ValueError:
        first, gid, size, more = 0, 0, 0, []
    if len(more) > 2 or min(first, gid, size) < 1 or max(first, gid) + size > spec.ID_MAX:
        raise InvalidArgument(f"userns-remap {text[:60]!r} is not UID[:GID[:SIZE]], from 1 on")
    return {"uid_mappings": [(0, first, size)], "gid_mappings": [(0, gid, size)]}


def _hooks(given: Given) -> dict[str, Any]:
    path = given.get("hooks_file", "")
    if not path:
        return {}
    try:
        made = json.loads("\n".join(_lines(path)))
        return {"hooks": {kind: list(hooks) for kind, hooks in made.items()}}
    except (ValueError, AttributeError, TypeError) as e:
        raise InvalidArgument(f"{path} is no OCI hooks: {e}") from None

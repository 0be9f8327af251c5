"""Mounts in Docker's words as OCI mounts. A bind mount's source is a path of the node."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from wherry_shared.errors import InvalidArgument, Unimplemented

from .limits import size

Mount = dict[str, Any]
_PROPAGATION = frozenset(("private", "rprivate", "shared", "rshared", "slave", "rslave"))
_BIND_OPTIONS = frozenset(
    ("ro", "rro", "rw", "nosuid", "nodev", "noexec", "suid", "dev", "exec", "noatime", "relatime")
)
_TMPFS_FLAGS = frozenset((
    "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "nodiratime", "relatime", "strictatime",
))  # fmt: skip
_TMPFS_VALUES = re.compile(
    r"(?:size=[0-9]+[kmgKMG%]?|nr_inodes=[0-9]+[kmg]?|mode=[0-7]{3,4}|uid=[0-9]{1,10}|gid=[0-9]{1,10})\Z"
)
_TMPFS = ["nosuid", "nodev", "noexec"]
_OPPOSITES = {"suid": "nosuid", "dev": "nodev", "exec": "noexec", "rw": "ro"}
_OPPOSITES |= {no: yes for yes, no in _OPPOSITES.items()}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z")


def target(path: str) -> str:
    """Where in a container something is mounted, in its shortest form.

    InvalidArgument: not absolute, with `..` (GHSA-crp2-qrr5-8pq7), the root itself, or /proc and below
    (CVE-2019-16884). Links on the way are the runtime's to resolve inside the root.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not path.startswith("/") or ".." in parts or "\0" in path or "\n" in path:
        raise InvalidArgument(f"mount target {path[:120]!r} is not an absolute path without '..'")
    if not parts or parts[0] == "proc":
        raise InvalidArgument(f"mount target {path[:120]!r}: nothing may be mounted over the root or /proc")
    return "/" + "/".join(parts)


@cache
def _makes_all_read_only() -> bool:
    """mount_setattr(2), since Linux 5.12: without it, what is mounted below a read-only directory stays writable."""
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (5, 12)


def bind(source: str, destination: str, options: Sequence[str] = ()) -> Mount:
    """A bind mount with everything mounted below it; options: ro, rw, a propagation, nosuid and their like."""
    if not source.startswith("/") or ".." in source.split("/") or "\0" in source:
        raise InvalidArgument(f"mount source {source[:120]!r} is not an absolute path without '..'")
    propagation = [option for option in options if option in _PROPAGATION]
    plain = [option for option in options if option not in _PROPAGATION]
    unknown = [option for option in plain if option not in _BIND_OPTIONS]
    if unknown or len(propagation) > 1:
        raise InvalidArgument(f"mount of {source}: options {','.join(unknown or propagation)!r} are not understood")
    chosen = ["rbind", *(propagation or ["rprivate"]), *plain]
    # crun takes it for directories alone; below a file there is nothing.
    if "ro" in plain and "rro" not in plain and _makes_all_read_only() and os.path.isdir(source):
        chosen.append("rro")
    return {"type": "bind", "source": source, "destination": target(destination), "options": chosen}


def volume(text: str) -> Mount:
    """`-v SOURCE:TARGET[:OPTIONS]`. Unimplemented: a volume by name, or without a source."""
    parts = text.split(":")
    if len(parts) == 1 or _NAME.match(parts[0]):
        raise Unimplemented(f"volume {text[:80]!r}: volumes have no names here; give a directory of the node")
    if len(parts) > 3:
        raise InvalidArgument(f"volume {text[:80]!r} is not SOURCE:TARGET[:OPTIONS]")
    options = [option for option in (parts[2].split(",") if len(parts) == 3 else ()) if option]
    if {"z", "Z"} & set(options):
        raise Unimplemented(f"volume {text[:80]!r}: what is on the node is never labelled anew")
    return bind(parts[0], parts[1], options)


def tmpfs(text: str) -> Mount:
    """`--tmpfs TARGET[:OPTIONS]`, with nosuid, nodev and noexec unless told otherwise."""
    destination, _, given = text.partition(":")
    options = list(_TMPFS)
    for option in filter(None, given.split(",")):
        if option not in _TMPFS_FLAGS and not _TMPFS_VALUES.match(option):
            raise InvalidArgument(f"tmpfs {destination}: the option {option[:60]!r} is not understood")
        # Taken out, not answered: crun keeps a flag that a later word takes back.
        options = [*(each for each in options if each != _OPPOSITES.get(option)), option]
    return {"type": "tmpfs", "source": "tmpfs", "destination": target(destination), "options": options}


def mount(text: str) -> Mount:
    """`--mount type=bind|tmpfs,source=...,target=...[,readonly][,bind-propagation=...][,tmpfs-size=...]`."""
    import csv

    fields: dict[str, str] = {}
    for item in next(csv.reader([text]), []):
        key, separator, value = item.partition("=")
        fields[_KEYS.get(key, key)] = value if separator else "true"
    kind = fields.pop("type", "volume")
    if kind not in ("bind", "tmpfs"):
        raise Unimplemented(f"mount of type {kind!r}: bind and tmpfs are there")
    destination = fields.pop("target", "")
    source = fields.pop("source", "")
    options = _options(fields)
    if fields:
        raise InvalidArgument(f"mount {text[:120]!r}: {', '.join(sorted(fields))} is not understood")
    if kind == "tmpfs":
        return tmpfs(f"{destination}:{','.join(options)}")
    return bind(source, destination, options)


# What could be read as either must not make writable what was to be read only.
_TRUE, _FALSE = frozenset(("true", "t", "1")), frozenset(("false", "f", "0"))
_KEYS = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}


def _options(fields: dict[str, str]) -> list[str]:
    """The mount options of `--mount`, taken out of its fields."""
    made = []
    wish = fields.pop("readonly", "false")
    if wish.lower() not in _TRUE | _FALSE:
        raise InvalidArgument(f"mount readonly={wish[:40]}: true or false")
    if wish.lower() in _TRUE:
        made.append("ro")
    if propagation := fields.pop("bind-propagation", ""):
        made.append(propagation)
    if amount := fields.pop("tmpfs-size", ""):
        made.append(f"size={size(amount, 'tmpfs-size')}")
    if mode := fields.pop("tmpfs-mode", ""):
        made.append(f"mode={mode}")
    return made


def shm(amount: str) -> Mount:
    """The shared memory of a container, in a size."""
    options = ["nosuid", "noexec", "nodev", "mode=1777", f"size={size(amount, 'shm-size')}"]
    return {"type": "tmpfs", "source": "shm", "destination": "/dev/shm", "options": options}  # noqa: S108


def merged(defaults: Iterable[Mount], own: Sequence[Mount]) -> list[Mount]:
    """The default mounts with a container's own on top: one of the same target takes a default's place, the others
    come behind, what lies deeper later. InvalidArgument: two for one target."""
    wanted = {}
    for each in own:
        if each["destination"] in wanted:
            raise InvalidArgument(f"two mounts for {each['destination']}")
        wanted[each["destination"]] = each
    kept = [each for each in defaults if each["destination"] not in wanted]
    return kept + sorted(own, key=lambda each: str(each["destination"]).count("/"))


def root_propagation(mounts: Iterable[Mount]) -> str:
    """What the root must be for the propagation that these mounts ask for: "shared", "slave" or ""."""
    asked = {option.removeprefix("r") for each in mounts for option in each.get("options", ())}
    return "shared" if "shared" in asked else "slave" if "slave" in asked else ""

"""Container Device Interface: named devices, whose files on the host say what a container needs to have them.

Files are JSON, in /etc/cdi and /var/run/cdi, where the later directory wins (CNCF's CDI specification).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented

from .devices import Device, look_up
from .volumes import target

DIRECTORIES = (Path("/etc/cdi"), Path("/var/run/cdi"))
FILE_MAX = 1 << 20
FILES_MAX = 256
_KIND = re.compile(r"[A-Za-z](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?\Z")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?\Z")
_HOOKS = frozenset(("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"))
Edits = Mapping[str, Any]


def is_name(text: str) -> bool:
    """Whether it is a qualified device: `vendor.com/class=name`."""
    kind, separator, name = text.partition("=")
    return bool(separator and _KIND.match(kind) and _NAME.match(name))


def edits(names: Sequence[str], directories: Sequence[Path] = DIRECTORIES) -> list[Edits]:
    """What the named devices ask for, in order; the edits that a file wants for all of its devices come once.

    InvalidArgument: a name. NotFound: no file has it. FailedPrecondition: a file is broken, or two of one directory
    have it.
    """
    known = _known(directories) if names else {}
    made: list[Edits] = []
    common: list[int] = []
    for name in names:
        if not is_name(name):
            raise InvalidArgument(f"device {name[:80]!r} is not VENDOR/CLASS=NAME")
        if name not in known:
            raise NotFound(f"CDI device {name!r} is in no JSON file of {', '.join(map(str, directories))}")
        own, shared = known[name]
        if id(shared) not in common:
            common.append(id(shared))
            made.append(shared)
        made.append(own)
    return made


def _known(directories: Sequence[Path]) -> dict[str, tuple[Edits, Edits]]:
    known: dict[str, tuple[Edits, Edits]] = {}
    for directory in directories:
        here: dict[str, tuple[Edits, Edits]] = {}
        for path in sorted(directory.glob("*.json"))[:FILES_MAX]:
            for name, found in _devices(path).items():
                if name in here:
                    raise FailedPrecondition(f"CDI device {name!r} is twice in {directory}")
                here[name] = found
        known |= here
    return known


def _devices(path: Path) -> dict[str, tuple[Edits, Edits]]:
    try:
        with path.open("rb") as f:
            text = f.read(FILE_MAX + 1)
        if len(text) > FILE_MAX:
            raise ValueError(f"it is larger than {FILE_MAX} bytes")
        document = json.loads(text)
        if not str(document["cdiVersion"]).startswith(("0.", "1.")) or not _KIND.match(document["kind"]):
            raise ValueError("its version or kind is not understood")
        shared = document.get("containerEdits") or {}
        return {
            f"{document['kind']}={device['name']}": (device.get("containerEdits") or {}, shared)
            for device in document["devices"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FailedPrecondition(f"CDI file {path} cannot be used: {e}") from None


def apply(spec: dict[str, Any], asked: Sequence[Edits]) -> None:
    """Change an OCI specification as the edits say. FailedPrecondition: an edit is malformed."""
    for each in asked:
        try:
            _apply(spec, each)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise FailedPrecondition(f"a CDI device's containerEdits are malformed: {e}") from None


def _apply(spec: dict[str, Any], asked: Edits) -> None:
    if asked.get("intelRdt") or asked.get("netDevices"):
        raise Unimplemented("a CDI device wants intelRdt or network devices")
    process, linux = spec["process"], spec["linux"]
    for item in asked.get("env") or ():
        name = item.partition("=")[0] + "="
        process["env"] = [*(e for e in process["env"] if not e.startswith(name)), item]
    for node in asked.get("deviceNodes") or ():
        device = _device(node)
        linux["devices"] = [d for d in linux.get("devices", ()) if d["path"] != device.path] + [device.node()]
        linux["resources"]["devices"] = [*linux["resources"].get("devices", ()), device.rule()]
    for each in asked.get("mounts") or ():
        spec["mounts"].append({
            "type": each.get("type") or "bind", "source": each["hostPath"],
            "destination": target(each["containerPath"]), "options": each.get("options") or ["rbind", "ro", "rprivate"],
        })  # fmt: skip
    for hook in asked.get("hooks") or ():
        if hook["hookName"] not in _HOOKS:
            raise ValueError(f"no hook {hook['hookName']!r}")
        entry = {key: hook[key] for key in ("path", "args", "env", "timeout") if hook.get(key)}
        spec.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(entry)
    for gid in asked.get("additionalGids") or ():
        process["user"]["additionalGids"] = sorted({*process["user"].get("additionalGids", ()), int(gid)})


def _device(node: Mapping[str, Any]) -> Device:
    """A device node of the edits; what it leaves out is the host's."""
    access = node.get("permissions") or "rwm"
    path = str(node["path"])
    if node.get("type") in ("b", "c") and node.get("major"):
        return Device(
            path, node["type"], int(node["major"]), int(node.get("minor") or 0), int(node.get("fileMode") or 0o660),
            int(node.get("uid") or 0), int(node.get("gid") or 0), access,
        )  # fmt: skip
    found = look_up(Path(node.get("hostPath") or path), path, access)
    return Device(
        path, found.type, found.major, found.minor, int(node.get("fileMode") or found.file_mode),
        int(node.get("uid") or found.uid), int(node.get("gid") or found.gid), access,
    )  # fmt: skip

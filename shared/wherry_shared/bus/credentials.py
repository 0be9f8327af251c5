"""Who may do what on the bus: the users, their nkeys, their inboxes, and nats-server's allow-lists.

One user per service and per role. Its seed lies in `<creds>/<user>.nk`, mode 0600, and is all that it needs: the
inbox prefix is derived from the seed, so it is a secret too, and the services know a caller by it. Permissions are
allow-lists only, generated from the contracts.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nkeys

from ..api import contracts, second_contracts
from ..context import Identity
from ..errors import FailedPrecondition, NotFound, Unauthenticated
from ..values import check_identifier
from . import subjects

log = logging.getLogger("wherry.credentials")

ADMIN, OBSERVER, AUDITOR = "admin", "observer", "auditor"
ROLES = (ADMIN, OBSERVER, AUDITOR)
IDENTITIES = "identities.json"
NATS_USERS = "nats-users.conf"

# Which contracts a service calls itself. Everything else is denied. Events are asked for what a power cut took of one's
# own (outbox.py).
CALLS: dict[str, tuple[str, ...]] = {
    "content": ("lease", "namespace", "events"),
    "snapshot": ("lease", "events"),
    "diff": ("content", "snapshot"),
    "image": ("lease", "gc", "events"),
    "container": ("events",),
    "task": ("container", "content", "snapshot", "events"),
    "events": (),
    "namespace": ("content", "snapshot", "image", "container", "events"),
    "lease": ("content-gc", "snapshot-gc", "image-gc", "container-gc"),
    "introspection": (),
}
# What makes work for the garbage collector, which lives with the leases.
DELETIONS = ("/content/delete", "/snapshot/remove", "/images/delete", "/containers/delete")
# By what comes first in a namespace it becomes known (containerd's rule: with the first object in it).
CREATIONS = ("/content/create", "/snapshot/prepare", "/images/create", "/containers/create")
STREAM, AUDIT_STREAM = "WHERRY-EV", "WHERRY-AUDIT"
_LEAF = "leaf-"


@dataclass(frozen=True)
class Credentials:
    """A user's seed and what follows from it."""

    name: str
    seed: bytes

    @property
    def public_key(self) -> str:
        key: bytes = nkeys.from_seed(bytearray(self.seed)).public_key
        return key.decode()

    @property
    def inbox_prefix(self) -> str:
        digest = hmac.new(self.seed, b"wherry inbox", hashlib.sha256).hexdigest()[:32]
        return f"_INBOX_{digest}"


def load(path: Path) -> Credentials:
    """Read a seed file. Unauthenticated when it is missing, not ours, or readable by others."""
    return _load(path, owners=(os.geteuid(), 0))


def _load(path: Path, owners: tuple[int, ...] = ()) -> Credentials:
    """Read a seed file. owners: whose it may be; none: anybody's, in a directory that is ours."""
    try:
        with path.open("rb") as f:
            info = os.fstat(f.fileno())
            seed = f.read(1024).strip()
    except OSError as e:
        raise Unauthenticated(f"credentials {path}: {e.strerror}") from None
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise Unauthenticated(f"credentials {path} can be read by others: chmod 600 it")
    if owners and info.st_uid not in owners:
        raise Unauthenticated(f"credentials {path} belong to another user")
    found = Credentials(path.stem, seed)
    try:
        user = seed.startswith(b"SU") and found.public_key.startswith("U")
    except (nkeys.NkeysError, ValueError):
        user = False
    if not user:
        raise Unauthenticated(f"credentials {path} hold no user nkey seed")
    return found


def ensure(directory: Path, name: str) -> Credentials:
    """A user's credentials, made when they are not there yet."""
    path = directory / f"{name}.nk"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
        temporary = path.with_suffix(".new")
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            f.write(seed + b"\n")
        os.replace(temporary, path)
    return _load(path)  # a service's seed may have been given to the user that it runs as


def tenant(namespace: str) -> str:
    """The user name of a namespace's tenant."""
    return f"tenant-{check_identifier(namespace, 'namespace')}"


def leaf(node: str) -> str:
    """The user name of a node's nats-server at the cluster that it is a leaf of."""
    return f"{_LEAF}{check_identifier(node, 'node')}"


def issue(directory: Path, node: str, tenants: Iterable[str] = (), leaves: Iterable[str] = ()) -> None:
    """Make every user of a node (services, roles, tenants) and write the server's and the services' tables.

    leaves: nodes whose nats-servers may join this one. Users that exist keep their seeds, tenants and leaves issued
    before stay. Writes `<directory>/*.nk`, `identities.json` (who owns which inbox) and `nats-users.conf` (nkeys and
    permissions, for nats-server to include). Who does that at the same moment waits.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _issue(directory, node, tenants, leaves)
    finally:
        os.close(lock)


def _issue(directory: Path, node: str, tenants: Iterable[str], leaves: Iterable[str]) -> None:
    known = {i["namespace"] for i in _read_identities(directory).values() if i["role"] == "tenant"}
    users: list[tuple[Identity, dict[str, Any]]] = [
        (Identity(name, "service"), service_permissions(name, node)) for name in CALLS
    ]
    users += [(Identity(ADMIN, ADMIN), admin_permissions()), (Identity(OBSERVER, OBSERVER), observer_permissions())]
    users.append((Identity(AUDITOR, AUDITOR), auditor_permissions(node)))
    users += [(Identity(tenant(ns), "tenant", ns), tenant_permissions(ns)) for ns in sorted({*known, *tenants})]
    identities: dict[str, Any] = {}
    lines = []
    for identity, permissions in users:
        credentials = ensure(directory, identity.name)
        permissions["subscribe"].append(f"{credentials.inbox_prefix}.>")
        identities[credentials.inbox_prefix] = asdict(identity)
        lines.append(_server_user(credentials, permissions))
    joined = {path.stem.removeprefix(_LEAF) for path in directory.glob(f"{_LEAF}*.nk")}
    callers = [prefix for prefix, identity in identities.items() if identity["role"] != "service"]
    for name in sorted({*joined, *leaves}):
        permissions = leaf_permissions(name, callers)
        lines.append(_server_user(ensure(directory, leaf(name)), permissions, ["LEAFNODE"]))
    _write_private(directory / IDENTITIES, json.dumps(identities, indent=1))
    _write_private(directory / NATS_USERS, "authorization {\n  users = [\n" + "".join(lines) + "  ]\n}\n")


def service_permissions(service: str, node: str) -> dict[str, Any]:
    """What a service may do: serve its own operations, call those it needs, publish its own events."""
    own = subjects.encode_token(node)
    publish = [f"{subjects.RPC}.{own}.*.{other}.>" for other in CALLS[service]]
    publish += [f"{subjects.EV}.{own}.*.{topic}.>" for topic in topics(service)]
    publish.append(f"{subjects.AUDIT}.{own}.>")
    publish += [f"$SRV.PING.{service}", "$SRV.PING.introspection"]  # who else is there: twins.py
    served = [service, *(c.service for c in second_contracts() if c.owner == service)]
    subscribe = [f"{subjects.RPC}.{own}.*.{contract}.>" for contract in served] + _discovery(service)
    heard = {"namespace": CREATIONS, "lease": DELETIONS}.get(service, ())
    subscribe += [f"{subjects.EV}.{own}.*{topic.replace('/', '.')}" for topic in heard]
    if service == "task":
        publish.append(f"{subjects.IO}.{own}.>")
        subscribe.append(f"{subjects.IO}.{own}.>")
    if service == "events":
        publish += [f"{subjects.EV}.{own}.>", *_stream_api(stream_name(node)), *_stream_api(audit_stream_name(node))]
    if service == "introspection":
        publish += ["$SRV.PING", "$SRV.INFO", "$SRV.STATS"]
    return {"publish": publish, "subscribe": subscribe, "respond": True}


def topics(service: str) -> list[str]:
    """The first components of the topics that a service publishes, by its contract."""
    contract = next(c for c in contracts() if c.service == service)
    return sorted({topic.split("/")[1] for topic in contract.events})


def _discovery(service: str) -> list[str]:
    verbs = ("PING", "INFO", "STATS")
    return [s for verb in verbs for s in (f"$SRV.{verb}", f"$SRV.{verb}.{service}", f"$SRV.{verb}.{service}.*")]


def stream_name(node: str) -> str:
    """The name of a node's stream of events."""
    return f"{STREAM}-{subjects.encode_token(node)}"


def audit_stream_name(node: str) -> str:
    """The name of the stream that keeps a node's audit, where one is wanted."""
    return f"{AUDIT_STREAM}-{subjects.encode_token(node)}"


def _stream_api(stream: str) -> list[str]:
    return [
        *(f"$JS.API.STREAM.{verb}.{stream}" for verb in ("CREATE", "UPDATE", "INFO")),
        f"$JS.API.STREAM.MSG.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
        f"$JS.API.CONSUMER.*.{stream}",
        f"$JS.API.CONSUMER.*.{stream}.>",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.>",
        f"$JS.ACK.{stream}.>",
        "$JS.API.INFO",
    ]


def admin_permissions() -> dict[str, Any]:
    """Every operation on every node, every event, every stdio."""
    return {
        "publish": [f"{subjects.RPC}.>", f"{subjects.IO}.>", "$SRV.>"],
        "subscribe": [f"{subjects.EV}.>", f"{subjects.IO}.>"],
        "respond": False,
    }


def observer_permissions() -> dict[str, Any]:
    """Events and their replay, discovery; nothing else."""
    return {
        "publish": [f"{subjects.RPC}.*.*.events.{m}" for m in ("replay", "stream")] + _srv(),
        "subscribe": [f"{subjects.EV}.>"],
        "respond": False,
    }


def auditor_permissions(node: str) -> dict[str, Any]:
    """The audit, as it comes and as this node's stream of it keeps it; nothing else."""
    stream = audit_stream_name(node)
    return {
        "publish": [f"$JS.API.STREAM.INFO.{stream}", f"$JS.API.DIRECT.GET.{stream}", f"$JS.API.DIRECT.GET.{stream}.>"],
        "subscribe": [f"{subjects.AUDIT}.>"],
        "respond": False,
    }


def _srv() -> list[str]:
    return [s for verb in ("PING", "INFO", "STATS") for s in (f"$SRV.{verb}", f"$SRV.{verb}.>")]


def tenant_permissions(namespace: str) -> dict[str, Any]:
    """Every operation, event and stdio in one namespace, on every node."""
    token = subjects.encode_token(namespace, "namespace")
    services = sorted(c.service for c in contracts() if c.namespaced is not False)
    return {
        "publish": [f"{subjects.RPC}.*.{token}.{service}.>" for service in services]
        + [f"{subjects.IO}.*.{token}.*.*.{stream}" for stream in ("stdin", "resize")],
        "subscribe": [f"{subjects.EV}.*.{token}.>", f"{subjects.IO}.*.{token}.>"],
        "respond": False,
    }


def leaf_permissions(node: str, inboxes: Iterable[str]) -> dict[str, Any]:
    """What passes between a node's nats-server and the cluster: its own events, stdio and audit and its answers to
    the callers there; requests to it and their stdin. It speaks for no other node and sees nothing of one."""
    own = subjects.encode_token(node)
    return {
        "publish": [f"{root}.{own}.>" for root in (subjects.EV, subjects.IO, subjects.AUDIT)]
        + [f"{i}.>" for i in inboxes],
        "subscribe": [f"{root}.{own}.>" for root in (subjects.RPC, subjects.IO)] + _srv(),
        "respond": False,
    }


def _server_user(credentials: Credentials, permissions: dict[str, Any], connections: Sequence[str] = ()) -> str:
    """A user's entry in nats-server's configuration. connections: the only kinds that it may make."""
    allow = {
        "publish": {"allow": permissions["publish"]} if permissions["publish"] else {"deny": [">"]},
        "subscribe": {"allow": permissions["subscribe"]},
    }
    if permissions["respond"]:
        allow["allow_responses"] = {"max": 1, "expires": "1h"}
    kinds = f", allowed_connection_types: {json.dumps(connections)}" if connections else ""
    return f"    {{ nkey: {credentials.public_key}, permissions: {json.dumps(allow)}{kinds} }}\n"


def _write_private(path: Path, text: str) -> None:
    """Replace a file that is its owner's alone, or stays that of whom it was given to."""
    temporary = path.with_name(path.name + ".new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
        f.write(text)
        with suppress(FileNotFoundError):
            given = path.stat()
            os.fchown(f.fileno(), given.st_uid, given.st_gid)
            os.fchmod(f.fileno(), stat.S_IMODE(given.st_mode) & 0o660)
    os.replace(temporary, path)


def _read_identities(directory: Path) -> dict[str, dict[str, str]]:
    try:
        table: dict[str, dict[str, str]] = json.loads((directory / IDENTITIES).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise FailedPrecondition(f"{directory / IDENTITIES} cannot be read: {e}") from None
    return table


class Identities:
    """Whose inbox a reply subject lies in. Reads the table again when it changed (a tenant was added)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stamp: tuple[int, int] = (0, 0)
        self._table: dict[str, Identity] = {}

    def __call__(self, reply: str) -> Identity | None:
        prefix = reply.partition(".")[0]
        found = self._table.get(prefix)
        if found is None and self._changed():
            found = self._table.get(prefix)
        return found

    def _changed(self) -> bool:
        try:
            info = (self._directory / IDENTITIES).stat()
        except OSError:
            return False
        stamp = (info.st_mtime_ns, info.st_ino)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self._table = {prefix: Identity(**i) for prefix, i in _read_identities(self._directory).items()}
        except (FailedPrecondition, TypeError) as e:
            log.error("who is new on the bus stays unknown: %s", e)
            return False
        return True


def find(directory: Path, name: str) -> Credentials:
    """A user's credentials. NotFound when there are none of that name."""
    path = directory / f"{name}.nk"
    if not path.exists():
        raise NotFound(f"no credentials for {name!r} in {directory}")
    return load(path)

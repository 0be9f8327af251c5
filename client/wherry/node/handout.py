"""A folder of credentials for each service, so that one started by itself sees its own seed and nobody else's."""

from __future__ import annotations

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from wherry_shared.bus import credentials
from wherry_shared.errors import NotFound

from .supervisor import PRIVILEGED

NATS = "nats"


@dataclass(frozen=True)
class Owner:
    """Whom a folder is for, by number."""

    uid: int
    gid: int

    @classmethod
    def find(cls, user: str) -> Owner:
        """A user's name, or `UID:GID` for one that only an image knows. NotFound: no such user here."""
        uid, separator, gid = user.partition(":")
        if separator and uid.isdigit() and gid.isdigit():
            return cls(int(uid), int(gid))
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            raise NotFound(f"no user {user!r} on this host") from None
        return cls(entry.pw_uid, entry.pw_gid)


ROOT = Owner(0, 0)


def hand_out(directory: Path, user: str, root: Path | None = None) -> None:
    """From the seeds in `directory` make `<service>/{<service>.nk,identities.json}` for each service and
    `nats/nats-users.conf`, each folder 0700 and its owner's: root's where the service needs root, else `user`'s.

    root: make `<root>/<service>` and `<root>/nats` too, for the same owners. A folder that is there stays the same
    one, so that who has it mounted sees what is new in it. NotFound: no such user.
    """
    other = Owner.find(user)
    directory.chmod(0o711)
    for name in (*credentials.CALLS, NATS):
        owner = ROOT if name in PRIVILEGED else other
        files = [credentials.NATS_USERS] if name == NATS else [f"{name}.nk", credentials.IDENTITIES]
        _own_folder(directory / name, owner)
        for file in files:
            _copy(directory / file, directory / name / file, owner)
        if root is not None:
            _own_folder(root / name, owner)


def _own_folder(path: Path, owner: Owner) -> None:
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, owner.uid, owner.gid)
    path.chmod(0o700)


def _copy(source: Path, target: Path, owner: Owner) -> None:
    """Replace the target in one step: its readers see the old file or the new one."""
    temporary = target.with_name(f".{target.name}.new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as made, open(source, "rb") as given:
        shutil.copyfileobj(given, made)
        os.fchown(fd, owner.uid, owner.gid)
    os.replace(temporary, target)

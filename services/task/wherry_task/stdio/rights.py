"""Which streams a caller may name: what is carried over the bus for everybody, what lies on the node for admins."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path

from wherry_shared.api.task import Stdio
from wherry_shared.context import Identity
from wherry_shared.errors import InvalidArgument, NotFound, PermissionDenied, Unimplemented

from . import uris
from .uris import Uri


def check(identity: Identity, namespace: str, stdio: Stdio, state: Path, loggers: Collection[str]) -> None:
    """Hold a process's streams against its maker's rights.

    state: the node's; a tenant's FIFOs lie in its `fifo/<namespace>:<name>/`. loggers: directories of programs that
    `binary://` may name.
    PermissionDenied: a path or program that is not for this caller. Unimplemented: an unknown scheme. InvalidArgument.
    NotFound: no such program.
    """
    stdin, stdout, stderr = (uris.parse(text) for text in (stdio.stdin, stdio.stdout, stdio.stderr))
    if stdin.scheme not in ("", uris.FIFO, uris.BUS):
        raise InvalidArgument(f"stdin {stdio.stdin!r} is neither a FIFO nor bus://")
    for uri, text in ((stdin, stdio.stdin), (stdout, stdio.stdout), (stderr, stdio.stderr)):
        if not text.isprintable():
            raise InvalidArgument(f"stdio {text!r} is no plain path")
        if uri.scheme in ("", uris.BUS):
            _plain_bus(uri, text)
        elif uri.scheme in (uris.FIFO, uris.FILE):
            _check_path(identity, uri, text, state / "fifo", namespace)
        elif uri.scheme == uris.LOG:
            _check_log(identity, uri, text)
        elif uri.scheme == uris.BINARY:
            _check_program(identity, uri, text, loggers)
        else:
            raise Unimplemented(f"stdio {uri.scheme}:// is not served")
    _check_pair(stdio, stdout, stderr)


def check_logs(identity: Identity, stdio: Stdio) -> None:
    """The same for logs alone: how large one grows may stand in a container's label, whoever starts it."""
    for text in (stdio.stdout, stdio.stderr):
        uri = uris.parse(text)
        if uri.scheme == uris.LOG:
            _check_log(identity, uri, text)


def _plain_bus(uri: Uri, text: str) -> None:
    if uri.path or uri.query:
        raise InvalidArgument(f"stdio {text!r}: bus:// has neither path nor options")


def _check_path(identity: Identity, uri: Uri, text: str, fifos: Path, namespace: str) -> None:
    path = Path(uri.path)
    if not path.is_absolute() or ".." in path.parts:
        raise PermissionDenied(f"stdio {text!r} is not an absolute path")
    if identity.is_admin:
        return
    if uri.scheme == uris.FILE:
        # Root would write it, without a bound, and its owner could not read it.
        raise PermissionDenied(
            f"{identity.name} may not use stdio {text!r}: file:// is for admins, log:// for everybody"
        )
    if path.parent.parent != fifos or not path.parent.name.startswith(f"{namespace}:"):
        raise PermissionDenied(f"{identity.name} may not use stdio {text!r}: only FIFOs in {fifos}/{namespace}:<name>")


def _check_log(identity: Identity, uri: Uri, text: str) -> None:
    size, files = uris.log_limits(uri.query)
    if identity.is_admin:
        if uri.path and (not Path(uri.path).is_absolute() or ".." in Path(uri.path).parts):
            raise PermissionDenied(f"stdio {text!r} is not an absolute path")
        return
    if uri.path:
        raise PermissionDenied(f"{identity.name} may not say where a log lies: log:// without a path")
    if not uris.LOG_SIZE_MIN <= size <= uris.LOG_SIZE_MAX or files > uris.LOG_FILES_MAX:
        raise PermissionDenied(
            f"{identity.name} may not have logs of {size} bytes in {files} files: {uris.LOG_SIZE_MIN} to "
            f"{uris.LOG_SIZE_MAX} bytes, and up to {uris.LOG_FILES_MAX} files"
        )


def _check_program(identity: Identity, uri: Uri, text: str, loggers: Collection[str]) -> None:
    """Whoever names a program runs it as root on the node."""
    if not identity.is_admin:
        raise PermissionDenied(f"{identity.name} may not use stdio {text!r}: loggers are for admins")
    if os.path.normpath(uri.path) != uri.path or os.path.dirname(uri.path) not in loggers:
        raise PermissionDenied(f"{uri.path!r} is not in a directory of loggers that this node allows")
    try:
        status = os.lstat(uri.path)
    except OSError as e:
        raise NotFound(f"logger {uri.path}: {e.strerror}") from None
    if not stat.S_ISREG(status.st_mode) or not os.access(uri.path, os.X_OK):
        raise PermissionDenied(f"logger {uri.path} is not a program")


def _check_pair(stdio: Stdio, stdout: Uri, stderr: Uri) -> None:
    """One reader's place is one for both outputs, and one logger has both."""
    if stdio.terminal or not (stdio.stdout and stdio.stderr):
        if stderr.scheme == uris.BINARY and not stdio.terminal:
            raise InvalidArgument("a logger of stderr is stdout's, too")
        return
    carried = (uris.BUS, uris.LOG, uris.BINARY)
    if stdout.scheme != stderr.scheme and (stdout.scheme in carried or stderr.scheme in carried):
        raise InvalidArgument(f"stdout {stdio.stdout!r} and stderr {stdio.stderr!r} do not go together")
    if stdout.scheme in (uris.LOG, uris.BINARY) and stdio.stdout != stdio.stderr:
        raise InvalidArgument(f"stdout {stdio.stdout!r} and stderr {stdio.stderr!r} have to be the same")

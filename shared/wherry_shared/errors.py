"""The closed tree of errors that cross the wire, and their codes.

The classes and numbers are gRPC's status codes, which containerd's clients test for. A service raises one of
these; the edge sends `Nats-Service-Error-Code` (the number) and `Nats-Service-Error` (the message); the proxy
raises the same class on the caller's side. Anything else that a service raises is a bug and travels as
`Internal` without its text.
"""

from __future__ import annotations


class WherryError(Exception):
    """Base of every error of Wherry. `code` is the gRPC status number, `message` says what and why."""

    code: int = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message or type(self).__name__


class Canceled(WherryError):
    """The caller went away or took the call back."""

    code = 1


class Unknown(WherryError):
    """The runtime underneath failed for a reason of its own; the message carries its words."""

    code = 2


class InvalidArgument(WherryError):
    """The request can never succeed as it stands: correct it."""

    code = 3


class DeadlineExceeded(WherryError):
    """The call's deadline passed first; a mutating call may or may not have taken effect: ask before repeating."""

    code = 4


class NotFound(WherryError):
    """The named thing is not there, or not visible in this namespace."""

    code = 5


class AlreadyExists(WherryError):
    """The name is taken."""

    code = 6


class PermissionDenied(WherryError):
    """This identity may not do that."""

    code = 7


class ResourceExhausted(WherryError):
    """A disk, a limit or a quota is full: make room and repeat."""

    code = 8


class FailedPrecondition(WherryError):
    """The thing is not in a state that allows it: change the state first."""

    code = 9


class Aborted(WherryError):
    """The operation was overtaken by another: start it again from the top."""

    code = 10


class OutOfRange(WherryError):
    """An offset or size lies past the end."""

    code = 11


class Unimplemented(WherryError):
    """This backend or version does not know how."""

    code = 12


class Internal(WherryError):
    """A bug or a broken invariant in the service; its log has the traceback."""

    code = 13


class Unavailable(WherryError):
    """The service or its lock is not to be had right now: the same call may succeed later."""

    code = 14


class DataLoss(WherryError):
    """Stored or received bytes are not what they should be."""

    code = 15


class Unauthenticated(WherryError):
    """The credentials are missing or wrong."""

    code = 16


ERRORS: dict[int, type[WherryError]] = {
    cls.code: cls
    for cls in (
        Canceled, Unknown, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists, PermissionDenied,
        ResourceExhausted, FailedPrecondition, Aborted, OutOfRange, Unimplemented, Internal, Unavailable,
        DataLoss, Unauthenticated,
    )
}  # fmt: skip


def from_code(code: int, message: str) -> WherryError:
    """The error that a wire code stands for; an unknown number becomes `Unknown`."""
    return ERRORS.get(code, Unknown)(message)

"""HTTP status codes of a registry as typed errors.

From the error body only the codes that the OCI distribution specification lists are repeated: free text of a host
could carry anything back, the token that it was sent included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from wherry_shared.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    WherryError,
)

from . import http
from .documents import parse_object
from .wire import Transient, retry_after

_BODY_MAX = 16 << 10
_BODY_SECONDS = 5.0
_CODES = frozenset({
    "BLOB_UNKNOWN", "BLOB_UPLOAD_INVALID", "BLOB_UPLOAD_UNKNOWN", "DENIED", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN",
    "MANIFEST_INVALID", "MANIFEST_UNKNOWN", "MANIFEST_UNVERIFIED", "NAME_INVALID", "NAME_UNKNOWN", "RANGE_INVALID",
    "SIZE_INVALID", "TAG_INVALID", "TOOMANYREQUESTS", "UNAUTHORIZED", "UNAVAILABLE", "UNKNOWN", "UNSUPPORTED",
})  # fmt: skip
_ERRORS: dict[int, type[WherryError]] = {
    400: InvalidArgument,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    410: NotFound,
    416: OutOfRange,
    451: PermissionDenied,
    501: Unimplemented,
}


async def check_status(response: http.Response, host: str, what: str, accept: Collection[int] = (200, 206)) -> None:
    """Nothing for what is accepted. Else the typed error; as Transient for 408, 429 and 5xx, with the host's delay."""
    status = response.status
    if status in accept:
        return
    codes = await _codes(response)
    message = f"{host} answered {status} for {what}" + (f" ({', '.join(codes)})" if codes else "")
    if status == 429:
        raise Transient(ResourceExhausted(f"{message}: too many requests"), retry_after(response.headers))
    if status == 408 or (status >= 500 and status != 501):
        raise Transient(Unavailable(message), retry_after(response.headers))
    raise _ERRORS.get(status, FailedPrecondition)(message)


async def _codes(response: http.Response) -> list[str]:
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            raw = (await response.readany())[: _BODY_MAX + 1]
        entries = parse_object(raw, "error body", _BODY_MAX).get("errors")
    except (TimeoutError, http.HttpError, OSError, WherryError):
        return []  # the status says enough
    if not isinstance(entries, list):
        return []
    codes = [e.get("code") for e in entries[:8] if isinstance(e, dict)]
    return [c for c in codes if isinstance(c, str) and c in _CODES]

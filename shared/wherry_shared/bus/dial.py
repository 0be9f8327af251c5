"""Making a Link and ending it: checked options, the first handshake within a time limit, the close that cannot hang."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import nkeys
from nats.errors import Error as NatsError

from ..errors import InvalidArgument, Unauthenticated, Unavailable
from .link import Link, sendable

log = logging.getLogger(__name__)

ATTEMPT_SECONDS: Final = 2.0  # one attempt to connect; the next one may reach another server
CLOSE_SECONDS: Final = 2.0  # for the last bytes to leave; then the socket is dropped
PING_SECONDS: Final = 10  # a third ping without an answer to the two before it is an outage


async def dial(
    servers: Sequence[str],
    *,
    name: str,
    inbox_prefix: str,
    seed: bytes | None,
    user_credentials: str | None,
    tls: ssl.SSLContext | None,
    timeout: float,
) -> Link:
    """A connected and authenticated Link. The arguments and errors are those of `Connection.connect`."""
    _check(servers, inbox_prefix, seed, user_credentials)
    encrypted = tls is not None or any(server.startswith("tls://") for server in servers)
    link = Link(asyncio.get_running_loop(), must_encrypt=encrypted)
    options: dict[str, Any] = {
        "name": name,
        "inbox_prefix": inbox_prefix,
        "nkeys_seed_str": None if seed is None else seed.decode(),
        "user_credentials": user_credentials,
        "tls": tls,
        "connect_timeout": min(timeout, ATTEMPT_SECONDS),
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0,  # Link waits between attempts itself
        "ping_interval": PING_SECONDS,
        "max_outstanding_pings": 2,
        "pending_size": -1,
        "error_cb": _failed(link),
        "reconnected_cb": _back(link),
    }
    try:
        async with asyncio.timeout(timeout):
            await link.connect(list(servers), **options)
    except BaseException as error:
        await discard(link)
        where = ", ".join(servers)
        if isinstance(error, TimeoutError):
            reason = f": {link._err}" if link._err else ""
            raise Unavailable(f"no NATS server answered at {where} within {timeout:g} s{reason}") from error
        if isinstance(error, NatsError):
            raise InvalidArgument(f"cannot connect to {where}: {error}") from error
        raise
    return link


async def discard(link: Link) -> None:
    """Close for good, after what was written has left; a peer that takes nothing any more is dropped."""
    link.send_now()
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await link.close()
    except TimeoutError:
        log.warning("nats-server does not take the last bytes; the connection is dropped")
    finally:
        link.drop()


def _check(servers: Sequence[str], inbox_prefix: str, seed: bytes | None, credentials: str | None) -> None:
    """Here, because nats-py reports a bad option in many ways, or retries it for ever."""
    if not servers or not all(server.startswith(("nats://", "tls://")) for server in servers):
        raise InvalidArgument(f"{list(servers)!r}: one or more addresses like nats://host:port are needed")
    if not sendable(inbox_prefix) or not all(inbox_prefix.split(".")) or set(inbox_prefix) & {"*", ">"}:
        raise InvalidArgument(f"{inbox_prefix!r} is no prefix for inboxes")
    if seed is not None and not _is_user_seed(seed):
        raise InvalidArgument("the seed is not the nkey seed of a user")  # and its text is nobody's business
    if credentials is not None and not Path(credentials).is_file():
        raise Unauthenticated(f"the credentials file {credentials} is not there")


def _is_user_seed(seed: bytes) -> bool:
    try:
        pair = nkeys.from_seed(bytearray(seed.strip()))
        is_user: bool = pair.public_key.startswith(b"U")
        pair.wipe()
    except (nkeys.NkeysError, ValueError):
        return False
    return is_user


def _failed(link: Link) -> Callable[[Exception], Awaitable[None]]:
    async def failed(error: Exception) -> None:
        link._err = error
        log.debug("connecting to NATS: %s", error)

    return failed


def _back(link: Link) -> Callable[[], Awaitable[None]]:
    async def back() -> None:
        link.state_changed(True)

    return back

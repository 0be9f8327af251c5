"""Requests to one registry: credentials where they belong, redirects by hand, every hop vetted."""

from __future__ import annotations

import re
from collections.abc import Mapping

import aiohttp
from wherry_shared.errors import PermissionDenied, Unauthenticated
from yarl import URL

from .auth import Access, Authorizer, parse_challenges
from .hosts import Kind, Origin
from .status import check_status
from .wire import Wire

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LOCATION_MAX = 8 << 10
_LOCATION = re.compile(r"[\x21-\x7e]+")


class Transport:
    """GET requests below the wire's pool. One call is one attempt; retries are the callers' (`Wire.persist`)."""

    def __init__(self, wire: Wire, authorizer: Authorizer) -> None:
        self._wire = wire
        self._authorizer = authorizer

    async def get(self, access: Access, path: str, headers: Mapping[str, str], what: str) -> aiohttp.ClientResponse:
        """The answer (200 or 206) to GET `path` at the registry; the caller closes it.

        A 401 is met once with new credentials. Raises the typed error of any other status, Transient where another
        try may help.
        """
        trust = await self._wire.admit(access.origin)
        url = access.origin.url.join(URL(path, encoded=True))
        held = self._authorizer.header(access)
        response, at_home = await self._follow(url, headers, held, trust)
        if response.status == 401 and at_home:
            challenges = parse_challenges(response.headers.getall("WWW-Authenticate", []))
            response.release()
            await self._authorizer.answer(access, trust, challenges, held)
            response, at_home = await self._follow(url, headers, self._authorizer.header(access), trust)
            if response.status == 401 and at_home:
                response.close()
                raise Unauthenticated(f"{access.origin.authority} refused the credentials for {what}")
        return await self._checked(response, what)

    async def get_foreign(
        self, access: Access, url: str, headers: Mapping[str, str], what: str
    ) -> aiohttp.ClientResponse:
        """The answer to GET `url`, which a manifest named: never with credentials, vetted like a redirect."""
        trust = await self._wire.admit(access.origin)
        target = _parse(url, access.origin)
        if access.origin.scheme == "https" and target.scheme == "http":
            raise PermissionDenied(f"{what}: a manifest of an https registry names plain http, not followed")
        await self._wire.vet(Origin.of(target), trust)
        response, _ = await self._follow(target, headers, None, trust)
        return await self._checked(response, what)

    async def _follow(
        self, url: URL, headers: Mapping[str, str], authorization: str | None, trust: frozenset[Kind]
    ) -> tuple[aiohttp.ClientResponse, bool]:
        """The first answer that is no redirect, and whether it came from the first origin without leaving it."""
        home = Origin.of(url)
        at_home = True
        for _ in range(self._wire.limits.redirects + 1):
            # Once the chain has left its origin the header stays off, even where it comes back.
            extra = {"Authorization": authorization} if authorization and at_home else {}
            response = await self._wire.send("GET", url, {**headers, **extra})
            if response.status not in _REDIRECTS:
                return response, at_home
            location = response.headers.get("Location", "")
            response.release()
            target = self._step(url, location)
            origin = Origin.of(target)
            await self._wire.vet(origin, trust)
            at_home = at_home and origin == home
            url = target
        raise PermissionDenied(f"{home.authority} redirects more than {self._wire.limits.redirects} times")

    def _step(self, url: URL, location: str) -> URL:
        origin = Origin.of(url)
        target = _parse(location, origin, base=url)
        if origin.scheme == "https" and target.scheme != "https":
            raise PermissionDenied(f"{origin.authority} redirects from https to {target.scheme[:16]}: not followed")
        return target

    async def _checked(self, response: aiohttp.ClientResponse, what: str) -> aiohttp.ClientResponse:
        try:
            await check_status(response, Origin.of(response.url).authority, what)
        except BaseException:
            response.close()
            raise
        return response


def _parse(text: str, named_by: Origin, base: URL | None = None) -> URL:
    # The exact bytes are kept (`encoded`): a signed URL that is quoted again is another URL.
    if len(text) > _LOCATION_MAX or not _LOCATION.fullmatch(text):
        raise PermissionDenied(f"{named_by.authority} points to something that is not a URL")
    try:
        url = URL(text, encoded=True)
        url = base.join(url) if base is not None else url
        Origin.of(url)
    except ValueError:
        raise PermissionDenied(f"{named_by.authority} points to a URL that is not valid") from None
    return url.with_fragment(None)

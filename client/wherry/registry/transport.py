"""Requests to one registry: credentials where they belong, redirects by hand, every hop vetted."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import urldefrag, urljoin, urlsplit

from wherry_shared.errors import PermissionDenied, Unauthenticated

from . import http
from .auth import Access, Authorizer, parse_challenges
from .hosts import Kind, Origin
from .status import check_status
from .wire import Wire

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SAME_METHOD = frozenset({307, 308})
_LOCATION_MAX = 8 << 10
_LOCATION = re.compile(r"[\x21-\x7e]+")
OK = (200, 206)


@dataclass(frozen=True, slots=True)
class Call:
    """One request: its method, its headers and its body; `accept` are the statuses that are no error."""

    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | http.Body | None = None
    accept: Collection[int] = OK


class Transport:
    """Requests below the wire's pool. One call is one attempt; retries are the callers' (`Wire.persist`)."""

    def __init__(self, wire: Wire, authorizer: Authorizer) -> None:
        self._wire = wire
        self._authorizer = authorizer

    async def get(self, access: Access, rest: str, headers: Mapping[str, str], what: str) -> http.Response:
        """The answer (200 or 206) to GET `rest` below the repository; the caller closes it."""
        return await self.call(access, access.url(rest), Call(headers=headers), what)

    async def call(self, access: Access, url: str, call: Call, what: str) -> http.Response:
        """The answer to a call of `url`, which is the access's own or was vetted by `locate`; the caller closes it.

        A 401 is met once with new credentials. Raises the typed error of a status that the call does not accept,
        Transient where another try may help.
        """
        trust = await self._wire.admit(access.origin)
        held = self._authorizer.header(access)
        response, at_home = await self._follow(access, url, call, held, trust)
        if response.status == 401 and at_home:
            challenges = parse_challenges(response.headers.all("WWW-Authenticate"))
            await response.release()
            await self._authorizer.answer(access, trust, challenges, held)
            response, at_home = await self._follow(access, url, call, self._authorizer.header(access), trust)
            if response.status == 401 and at_home:
                response.close()
                raise Unauthenticated(f"{access.origin.authority} refused the credentials for {what}")
        return await self._checked(response, call, what)

    async def get_foreign(self, access: Access, url: str, headers: Mapping[str, str], what: str) -> http.Response:
        """The answer to GET `url`, which a manifest named: never with credentials, vetted like a redirect."""
        trust = await self._wire.admit(access.origin)
        target = _parse(url, access.origin)
        origin = Origin.of(target)
        if access.origin.scheme == "https" and origin.scheme == "http":
            raise PermissionDenied(f"{what}: a manifest of an https registry names plain http, not followed")
        await self._wire.vet(origin, trust)
        anonymous = Access("", Origin("https", "nobody.invalid", 443), access.repository)
        call = Call(headers=headers)
        response, _ = await self._follow(anonymous, target, call, None, trust)
        return await self._checked(response, call, what)

    async def locate(self, access: Access, base: str, location: str) -> str:
        """Where an answer's Location points to, vetted like a redirect."""
        trust = await self._wire.admit(access.origin)
        url = self._step(base, location)
        await self._wire.vet(Origin.of(url), trust)
        return url

    async def _follow(
        self, access: Access, url: str, call: Call, authorization: str | None, trust: frozenset[Kind]
    ) -> tuple[http.Response, bool]:
        """The first answer that is no redirect, and whether it came from the access's origin without leaving it."""
        home = access.origin
        at_home = Origin.of(url) == home
        for _ in range(self._wire.limits.redirects + 1):
            # Once the chain has left its origin the headers stay off, even where it comes back.
            extra = dict(access.headers) if at_home else {}
            if authorization and at_home:
                extra["Authorization"] = authorization
            tls = access.tls if at_home else None
            response = await self._wire.send(call.method, url, {**call.headers, **extra}, call.body, tls)
            if response.status not in _REDIRECTS or response.status in call.accept:
                return response, at_home
            location = response.headers.get("Location", "")
            await response.release()
            if call.body is not None and response.status not in _SAME_METHOD:
                raise PermissionDenied(f"{home.authority} redirects an upload with status {response.status}")
            url = self._step(url, location)
            origin = Origin.of(url)
            await self._wire.vet(origin, trust)
            at_home = at_home and origin == home
        raise PermissionDenied(f"{home.authority} redirects more than {self._wire.limits.redirects} times")

    def _step(self, url: str, location: str) -> str:
        origin = Origin.of(url)
        target = _parse(location, origin, base=url)
        if origin.scheme == "https" and urlsplit(target).scheme != "https":
            raise PermissionDenied(f"{origin.authority} redirects from https to http: not followed")
        return target

    async def _checked(self, response: http.Response, call: Call, what: str) -> http.Response:
        try:
            await check_status(response, Origin.of(response.url).authority, what, call.accept)
        except BaseException:
            response.close()
            raise
        return response


def _parse(text: str, named_by: Origin, base: str = "") -> str:
    if len(text) > _LOCATION_MAX or not _LOCATION.fullmatch(text):
        raise PermissionDenied(f"{named_by.authority} points to something that is not a URL")
    try:
        # An absolute URL is kept as it is: a signed one that is written again is another one.
        url = text if urlsplit(text).scheme else urljoin(base, text)
        Origin.of(url)
    except ValueError:
        raise PermissionDenied(f"{named_by.authority} points to a URL that is not valid") from None
    return urldefrag(url).url if "#" in url else url

"""Bearer tokens and basic credentials, each bound to the origin it was issued for.

The token protocol is distribution's (`WWW-Authenticate: Bearer realm,service,scope`; GET with basic credentials, or
POST with a refresh token). A realm is vetted like a redirect, and no redirect of its own is followed.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, urldefrag, urlencode, urlsplit, urlunsplit

from wherry_shared.errors import NotFound, PermissionDenied, Unauthenticated

from . import http
from .credentials import Credentials, CredentialSource
from .documents import parse_object
from .hosts import Kind, Origin
from .status import check_status
from .wire import Wire

_HEADER_MAX = 8 << 10
_ANSWER_MAX = 1 << 20
_TOKEN_MAX = 64 << 10
_TOKEN = re.compile(r"[\x21-\x7e]+")
_DEFAULT_LIFE = 60.0  # seconds; distribution's rule for an answer without expires_in
_WORD = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_PARAMETER = re.compile(r"""([A-Za-z0-9!#$%&'*+.^_`|~-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*(?:,\s*|$)""")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate header: the scheme in lower case and its parameters."""

    scheme: str
    parameters: Mapping[str, str]


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """The challenges of an answer's WWW-Authenticate headers (RFC 9110 §11.6.1); what does not parse is left out."""
    found: list[Challenge] = []
    for value in values:
        rest = value[:_HEADER_MAX].strip()
        while rest:
            word = _WORD.match(rest)
            if word is None:
                break
            rest, parameters = rest[word.end() :].lstrip(), {}
            while pair := _PARAMETER.match(rest):
                quoted = pair[2]
                parameters[pair[1].lower()] = pair[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                rest = rest[pair.end() :]
            found.append(Challenge(word[0].lower(), parameters))
            rest = rest.lstrip(", ")
    return found


@dataclass(frozen=True, slots=True)
class Access:
    """What is asked of one host: `actions` ("pull", "pull,push") on one repository.

    registry: whose credentials are sent. prefix: where the API lies. namespace: the registry that a mirror stands
    for. headers, tls: what the host's configuration adds, for its own origin only. source: a repository that blobs
    are mounted from.
    """

    registry: str
    origin: Origin
    repository: str
    actions: str = "pull"
    prefix: str = "/v2"
    namespace: str = ""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    tls: ssl.SSLContext | None = field(default=None, compare=False, repr=False)
    source: str = ""

    @property
    def scope(self) -> str:
        """The token protocol's scope."""
        return f"repository:{self.repository}:{self.actions}"

    @property
    def scopes(self) -> str:
        """All scopes, separated by blanks."""
        return f"{self.scope} repository:{self.source}:pull" if self.source else self.scope

    def url(self, rest: str) -> str:
        """The URL of `rest` below the repository."""
        sign = "&" if "?" in rest else "?"
        ns = f"{sign}ns={quote(self.namespace, safe='')}" if self.namespace else ""
        return self.origin.url(f"{self.prefix}/{self.repository}/{rest}{ns}")


@dataclass(frozen=True, slots=True)
class _Held:
    header: str = field(repr=False)
    expires: float


def narrow(asked: str, access: Access) -> str:
    """The scopes to request: the challenge's repository names (proxies rename them), never more than our actions."""
    wanted = set(access.actions.split(","))
    kept = []
    for part in asked.split():
        kind, _, rest = part.partition(":")
        name, _, actions = rest.rpartition(":")
        if kind == "repository" and name and name != access.source and wanted & set(actions.split(",")):
            kept.append(f"repository:{name}:{access.actions}")
    own = " ".join(dict.fromkeys(kept)) or access.scope
    return f"{own} repository:{access.source}:pull" if access.source else own


class Authorizer:
    """Keeps the Authorization header for each (origin, scope); asks for one when a registry challenges."""

    def __init__(self, wire: Wire, credentials: CredentialSource) -> None:
        self._wire = wire
        self._credentials = credentials
        self._held: dict[tuple[Origin, str], _Held] = {}
        self._locks: dict[tuple[Origin, str], asyncio.Lock] = {}

    def header(self, access: Access) -> str | None:
        """The header to send, None while there is none or it has expired."""
        held = self._held.get((access.origin, access.scopes))
        return held.header if held is not None and time.monotonic() < held.expires else None

    async def answer(
        self, access: Access, trust: frozenset[Kind], challenges: list[Challenge], refused: str | None
    ) -> None:
        """Meet a 401: afterwards `header` holds another one than `refused`. Unauthenticated when that cannot be."""
        key = (access.origin, access.scopes)
        # One request for a token, however many layers met the 401 at once.
        async with self._locks.setdefault(key, asyncio.Lock()):
            if self.header(access) not in (None, refused):
                return
            self._held.pop(key, None)
            self._held[key] = await self._obtain(access, trust, challenges, refused)

    async def _obtain(
        self, access: Access, trust: frozenset[Kind], challenges: list[Challenge], refused: str | None
    ) -> _Held:
        host = access.origin.authority
        known = await self._credentials.get(access.registry)
        by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
        if "bearer" in by_scheme:
            if known is not None and known.registry_token:
                held = _Held(f"Bearer {_clean(known.registry_token, host)}", float("inf"))
            else:
                held = await self._token(access, trust, by_scheme["bearer"], known)
        elif "basic" in by_scheme:
            if known is None or not known.password:
                raise Unauthenticated(f"{host} asks for a name and a password, and none is known for it")
            held = _Held(known.basic, float("inf"))
        else:
            raise Unauthenticated(f"{host} refused the request and names no way to authenticate that is supported")
        if held.header == refused:
            raise Unauthenticated(f"{host} refused the credentials")
        return held

    async def _token(
        self, access: Access, trust: frozenset[Kind], challenge: Challenge, known: Credentials | None
    ) -> _Held:
        host = access.origin.authority
        realm = self._realm(access, challenge.parameters.get("realm", ""))
        query = {"service": challenge.parameters["service"]} if challenge.parameters.get("service") else {}
        scope = narrow(challenge.parameters.get("scope", ""), access)
        raw = await self._ask(realm, access, trust, query, scope, known)
        answer = parse_object(raw, f"the token answer for {host}", _ANSWER_MAX)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str):
            raise Unauthenticated(f"the token service of {host} answered without a token")
        life = answer.get("expires_in")
        seconds = float(life) if isinstance(life, int | float) and 0 < life < 1e9 else _DEFAULT_LIFE
        # A tenth early, so that a token does not expire between being sent and being read.
        return _Held(f"Bearer {_clean(token, host)}", time.monotonic() + seconds * 0.9)

    def _realm(self, access: Access, text: str) -> str:
        host = access.origin.authority
        try:
            origin = Origin.of(text)
        except PermissionDenied:
            raise PermissionDenied(f"{host} names a token service whose URL is not acceptable") from None
        if origin.scheme == "http" and access.origin.scheme != "http":
            raise PermissionDenied(f"{host} names a token service on plain http ({origin.authority})")
        return urldefrag(text).url

    async def _ask(
        self, realm: str, access: Access, trust: frozenset[Kind], query: dict[str, str], scope: str,
        known: Credentials | None,
    ) -> bytes:  # fmt: skip
        origin = Origin.of(realm)
        headers = {"Accept": "application/json"}
        method, body, url = "GET", None, _with_query(realm, [*query.items(), *(("scope", s) for s in scope.split())])
        if known is not None and known.identity_token:
            form = query | {
                "scope": scope, "grant_type": "refresh_token", "refresh_token": known.identity_token,
                "client_id": "wherry",
            }  # fmt: skip
            method, body, url = "POST", urlencode(form).encode(), realm
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        elif known is not None and known.password:
            headers["Authorization"] = known.basic
        tls = access.tls if origin == access.origin else None

        async def attempt() -> bytes:
            await self._wire.vet(origin, trust)
            async with await self._wire.send(method, url, headers, body, tls) as response:
                await self._check(response, origin, access.origin.authority)
                return await self._wire.read(response, origin.authority, _ANSWER_MAX, "the token answer")

        return await self._wire.persist(attempt, origin.authority)

    async def _check(self, response: http.Response, origin: Origin, registry: str) -> None:
        what = f"a token for {registry}"
        if 300 <= response.status < 400:
            raise PermissionDenied(f"{origin.authority} redirects the request of {what}: not followed")
        try:
            await check_status(response, origin.authority, what)
        except (NotFound, PermissionDenied) as e:
            raise Unauthenticated(e.message) from None


def _with_query(url: str, pairs: list[tuple[str, str]]) -> str:
    """The URL with these parameters in the place of its own of the same names."""
    parts = urlsplit(url)
    names = {name for name, _ in pairs}
    kept = [(name, value) for name, value in parse_qsl(parts.query, keep_blank_values=True) if name not in names]
    return urlunsplit(parts._replace(query=urlencode([*kept, *pairs])))


def _clean(token: str, host: str) -> str:
    if len(token) > _TOKEN_MAX or not _TOKEN.fullmatch(token):
        raise Unauthenticated(f"the token for {host} is not one: visible ASCII up to {_TOKEN_MAX} bytes is")
    return token

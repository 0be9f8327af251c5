"""Image references as people type them: `redis`, `host:5000/a/b:tag`, `name@sha256:...`.

The grammar and the defaults are the docker command's (distribution's `reference` package): a first component
without a dot, a port or an upper-case letter is a path of the default registry, single names there belong to
`library/`, and a reference without tag and digest means `latest`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wherry_shared.errors import InvalidArgument
from wherry_shared.values import check_digest

DEFAULT_REGISTRY = "docker.io"
_LEGACY_DEFAULT = "index.docker.io"
_OFFICIAL = "library/"

NAME_MAX = 255
"""Longest registry and repository together, in characters (distribution's NameTotalLengthMax)."""

_REFERENCE_MAX = NAME_MAX + 1 + 128 + 1 + 135
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_BARE_DIGEST = re.compile(r"[a-f0-9]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """One image in one registry; `str()` gives the full normalised form. `tag` and `digest` are "" when absent.

    A digest, where there is one, decides; the tag beside it is only a name.
    """

    registry: str
    repository: str
    tag: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """The reference that `text` means; InvalidArgument when it is none."""
        if not text or len(text) > _REFERENCE_MAX:
            raise InvalidArgument(f"image reference {text[:80]!r} is not valid: 1..{_REFERENCE_MAX} characters are")
        if _BARE_DIGEST.fullmatch(text):
            raise InvalidArgument(f"image reference {text!r} is not valid: it reads as a bare digest, not as a name")
        rest, at, digest = text.partition("@")
        if at:
            check_digest(digest)
        name, tag = _split_tag(rest)
        if tag is not None and not _TAG.fullmatch(tag):
            raise InvalidArgument(f"image reference {text!r} is not valid: tag {tag!r} is not")
        registry, repository = _split_registry(name)
        _check_name(text, registry, repository)
        return cls(registry, repository, tag or ("" if at else "latest"), digest)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def target(self) -> str:
        """What the registry is asked for: the digest if there is one, else the tag."""
        return self.digest or self.tag

    def check_target(self, digest: str) -> Reference:
        """Itself; InvalidArgument where it names another digest than its image's ("": that is still to be made)."""
        if self.digest and self.digest != digest:
            own = f"its image is {digest}" if digest else "its image is still to be made"
            raise InvalidArgument(f"image reference {str(self)!r} names a digest, and {own}")
        return self

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.name}{tag}@{self.digest}" if self.digest else f"{self.name}{tag}"


def _split_tag(text: str) -> tuple[str, str | None]:
    # A colon before the last slash belongs to the registry's port.
    head, colon, tag = text.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (text, None)


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    is_host = slash and (any(c in first for c in ".:") or first == "localhost" or first != first.lower())
    registry, repository = (first, rest) if is_host else (DEFAULT_REGISTRY, name)
    if registry == _LEGACY_DEFAULT:
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = _OFFICIAL + repository
    return registry, repository


def _check_name(text: str, registry: str, repository: str) -> None:
    if len(registry) + 1 + len(repository) > NAME_MAX:
        raise InvalidArgument(f"image reference {text[:80]!r}... is not valid: its name is over {NAME_MAX} characters")
    if not _REGISTRY.fullmatch(registry):
        raise InvalidArgument(f"image reference {text!r} is not valid: registry {registry!r} is not")
    for component in repository.split("/"):
        if not _COMPONENT.fullmatch(component):
            raise InvalidArgument(
                f"image reference {text!r} is not valid: path component {component!r} is not lower-case "
                "alphanumerics joined by '.', '_', '__' or '-'"
            )

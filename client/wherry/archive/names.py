"""What the images of an archive are called: annotations, tags, and the names made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from wherry_shared.errors import InvalidArgument
from wherry_shared.values import now

from ..registry.reference import DEFAULT_REGISTRY, Reference

NAME_ANNOTATION = "io.containerd.image.name"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"


def annotations_of(name: str) -> dict[str, str]:
    """The annotations by which others find an image's name in `index.json`: the whole, and its tag alone (OCI)."""
    try:
        reference = Reference.parse(name)
    except InvalidArgument:
        return {NAME_ANNOTATION: name, TAG_ANNOTATION: name}
    return {NAME_ANNOTATION: name, TAG_ANNOTATION: reference.tag or reference.digest}


def familiar(name: str) -> str:
    """A name as docker writes it, `redis:7`; "" for one without a tag, which docker cannot load."""
    try:
        reference = Reference.parse(name)
    except InvalidArgument:
        return ""
    if not reference.tag:
        return ""
    full = f"{reference.name}:{reference.tag}"
    short = full.removeprefix(f"{DEFAULT_REGISTRY}/")
    for given in (short.removeprefix("library/"), short):
        if _is(given, full):  # a repository may be called `library/a/b`, or like a registry
            return given
    return full


def _is(given: str, full: str) -> bool:
    """Whether `given` means `full`."""
    try:
        return str(Reference.parse(given)) == full
    except InvalidArgument:
        return False


@dataclass
class Namer:
    """Gives names to the images of one archive.

    base: the repository that bare tags belong to, and of all other names only those of it are taken; without it bare
    tags get `import-<date>`. digests: every image is also called `<base>@<digest>`.
    """

    base: str = ""
    digests: bool = False
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._base = Reference.parse(self.base or f"import-{now():%Y-%m-%d}").name

    def of_annotations(self, annotations: Mapping[str, str], digest: str) -> list[str]:
        """The names of an entry of `index.json`."""
        name = annotations.get(NAME_ANNOTATION, "")
        if not name:
            name = annotations.get(TAG_ANNOTATION, "")
            if name and not any(c in name for c in "/:@"):
                name = f"{self._base}:{name}"
        return self._names([name] if name else [], digest)

    def of_tags(self, tags: list[str], digest: str) -> list[str]:
        """The names of an entry of docker's `manifest.json`."""
        return self._names(tags, digest)

    def _names(self, given: list[str], digest: str) -> list[str]:
        names = []
        for name in given:
            full = Reference.parse(name).check_target(digest)
            if self.base and not _is_within(full.name, self._base):
                self.refused.append(str(full))
            else:
                names.append(str(full))
        return [*names, f"{self._base}@{digest}"] if self.digests else names


def _is_within(name: str, base: str) -> bool:
    return name == base or name.startswith(f"{base}/")

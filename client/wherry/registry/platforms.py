"""Platforms: names normalised, this host's own, and which image of an index runs where, in order of preference."""

from __future__ import annotations

import platform as host
import sys
from collections.abc import Iterable, Sequence

from wherry_shared.errors import InvalidArgument, NotFound
from wherry_shared.values import Descriptor, Platform

_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm", "armel": "arm",
    "i386": "386", "i486": "386", "i586": "386", "i686": "386",
}  # fmt: skip
_IMPLIED = {("arm", "armhf"): "v7", ("arm", "armel"): "v6"}
_DEFAULT_VARIANT = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
_OLDER: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("arm", "v8"): [("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
    ("arm", "v7"): [("arm", "v6"), ("arm", "v5")],
    ("arm", "v6"): [("arm", "v5")],
    ("arm64", "v8"): [("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
    ("arm64", "v9"): [("arm64", "v8"), ("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")],
    ("amd64", "v4"): [("amd64", "v3"), ("amd64", "v2"), ("amd64", "v1"), ("386", "")],
    ("amd64", "v3"): [("amd64", "v2"), ("amd64", "v1"), ("386", "")],
    ("amd64", "v2"): [("amd64", "v1"), ("386", "")],
    ("amd64", "v1"): [("386", "")],
}

_ATTESTATION = "vnd.docker.reference.type"


def normalise(value: Platform) -> Platform:
    """The same platform under OCI's names (GOOS, GOARCH), its architecture's default variant written out."""
    given = value.architecture.lower()
    architecture = _ARCHITECTURES.get(given, given)
    variant = value.variant.lower() or _IMPLIED.get((architecture, given), _DEFAULT_VARIANT.get(architecture, ""))
    if variant.isdigit():
        variant = f"v{variant}"
    return value.model_copy(update={"os": value.os.lower(), "architecture": architecture, "variant": variant})


def parse_platform(text: str) -> Platform:
    """`os/architecture[/variant]`, or an architecture alone for this host's os; InvalidArgument for anything else."""
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(p and p.replace("-", "").replace("_", "").isalnum() for p in parts):
        raise InvalidArgument(f"platform {text[:80]!r} is not valid: os/architecture[/variant] is")
    if len(parts) == 1:
        parts.insert(0, default_platform().os)
    return normalise(Platform(os=parts[0], architecture=parts[1], variant=parts[2] if len(parts) == 3 else ""))


def default_platform() -> Platform:
    """This host's."""
    machine = host.machine().lower()
    variant = {"armv7l": "v7", "armv8l": "v8", "armv6l": "v6", "armv5tel": "v5"}.get(machine, "")
    return normalise(Platform(os=sys.platform, architecture="arm" if variant else machine, variant=variant))


def acceptable(wanted: Platform) -> list[tuple[str, str]]:
    """(architecture, variant) pairs that run on `wanted`, the best first."""
    wanted = normalise(wanted)
    own = (wanted.architecture, wanted.variant)
    return [own, *_OLDER.get(own, [])]


def is_attestation(child: Descriptor) -> bool:
    """Whether an index's child is build metadata (`unknown/unknown`, or so annotated) and never an image to run."""
    unknown = child.platform is not None and "unknown" in (child.platform.os, child.platform.architecture)
    return unknown or _ATTESTATION in child.annotations


def rank(candidate: Platform, wanted: Platform) -> int | None:
    """How well `candidate` runs on `wanted`: 0 is best, None not at all.

    A wanted os_version must be met (of Windows' up to the build), and all features that the candidate needs.
    """
    candidate = normalise(candidate)
    if candidate.os != wanted.os.lower() or not _version_fits(candidate, wanted):
        return None
    if not set(candidate.os_features) <= set(wanted.os_features):
        return None
    order = acceptable(wanted)
    own = (candidate.architecture, candidate.variant)
    return order.index(own) if own in order else None


def require(own: Platform, wanted: Iterable[Platform], name: str) -> None:
    """NotFound unless an image of one platform, if it says which, runs on each of these."""
    for platform in wanted:
        if own.os and rank(own, platform) is None:
            raise NotFound(f"image {name} is for {describe(own)} and not for {describe(platform)}")


def _version_fits(candidate: Platform, wanted: Platform) -> bool:
    if not wanted.os_version or candidate.os_version == wanted.os_version:
        return True
    build = wanted.os_version.split(".")[:3]
    return candidate.os == "windows" and len(build) == 3 and candidate.os_version.split(".")[:3] == build


def choose(
    children: Sequence[Descriptor], wanted: Sequence[Platform] = (), *, missing_ok: bool = False
) -> list[tuple[Descriptor, tuple[Platform, ...]]]:
    """The children to run on each of the wanted platforms (none: this host's), each child once and with those that it
    is for: of an index among them no others are wanted.

    NotFound for one that has none, unless `missing_ok`.
    """
    found: dict[str, tuple[Descriptor, list[Platform]]] = {}
    for platform in wanted or (default_platform(),):
        try:
            best = pick(children, platform)
        except NotFound:
            if not missing_ok:
                raise
            continue
        found.setdefault(best.digest, (best, []))[1].append(platform)
    return [(child, tuple(own)) for child, own in found.values()]


def pick(children: Iterable[Descriptor], wanted: Platform | None = None) -> Descriptor:
    """The child of an index to run on `wanted` (this host's platform by default); the first of equals.

    Children without a platform come last: only their config would tell. NotFound names what there is instead.
    """
    target = wanted if wanted is not None else default_platform()
    images = [child for child in children if not is_attestation(child)]
    ranked = []
    for position, child in enumerate(images):
        place = len(acceptable(target)) if child.platform is None else rank(child.platform, target)
        if place is not None:
            ranked.append((place, position))
    if not ranked:
        offered = sorted({describe(c.platform) for c in images if c.platform is not None})
        raise NotFound(f"no image for {describe(target)}; there is: {', '.join(offered[:16]) or 'none'}")
    return images[min(ranked)[1]]


def describe(value: Platform) -> str:
    """`os/architecture[/variant]`, printable and short."""
    text = "/".join(p for p in (value.os, value.architecture, value.variant) if p)
    return "".join(c if c.isprintable() else "?" for c in text[:64])

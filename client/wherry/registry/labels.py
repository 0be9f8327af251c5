"""The labels that a pull and a push write on content: what keeps what, and where it came from (containerd's)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wherry_shared.values import LABEL_MAX, Descriptor

from .documents import CONFIG_TYPES, INDEX_TYPES, MANIFEST_TYPES

REF_LABEL = "containerd.io/gc.ref.content"
SOURCE_LABEL = "containerd.io/distribution.source"
_LAYERS = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")


def children(descriptors: Iterable[Descriptor], *, layers: bool = True) -> dict[str, str]:
    """The labels that keep a document's children: manifests `m.<i>`, `config`, layers `l.<i>`, others `<i>`.

    layers: False leaves those of layers out, which go then when nothing else keeps them.
    """
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for descriptor in descriptors:
        group = _group(descriptor.media_type)
        if group == "config":
            found[f"{REF_LABEL}.config"] = descriptor.digest
        elif layers or group != "l.":
            number = counts.get(group, 0)
            counts[group] = number + 1
            found[f"{REF_LABEL}.{group}{number}"] = descriptor.digest
    return found


def _group(media_type: str) -> str:
    if media_type in INDEX_TYPES | MANIFEST_TYPES:
        return "m."
    if media_type in CONFIG_TYPES:
        return "config"
    return "l." if media_type.startswith(_LAYERS) else ""


def referrers(descriptors: Iterable[Descriptor]) -> dict[str, str]:
    """The labels that keep what refers to a document."""
    found = {}
    for descriptor in descriptors:
        algorithm, _, encoded = descriptor.digest.partition(":")
        found[f"{REF_LABEL}.referrer.{algorithm}.{encoded[:12]}"] = descriptor.digest
    return found


def referring(known: Mapping[str, str]) -> list[str]:
    """The digests of what refers to a document, by its labels."""
    return [digest for label, digest in sorted(known.items()) if label.startswith(f"{REF_LABEL}.referrer.")]


def source_label(registry: str) -> str:
    """The label that lists the repositories of a registry in which a blob is."""
    return f"{SOURCE_LABEL}.{registry}"


def add_source(known: str, repository: str) -> str:
    """The label's value with one more repository; the oldest names go where there is no more room."""
    names = [name for name in known.split(",") if name and name != repository]
    names.append(repository)
    while len(names) > 1 and sum(len(name) + 1 for name in names) > LABEL_MAX - 512:
        names.pop(0)
    return ",".join(sorted(names))

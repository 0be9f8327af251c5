"""Manifests, indexes and image configs: bytes of strangers into typed values, or InvalidArgument.

Shapes from the OCI image specification 1.1 and docker's image manifest v2 schema 2. What could be read in two ways
(duplicate keys, `layers` beside `manifests`, a media type that differs from the header's) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from wherry_shared.errors import InvalidArgument, ResourceExhausted, Unimplemented
from wherry_shared.values import Descriptor, Platform, check_digest, explain

DOCUMENT_MAX = 4 << 20
"""Longest manifest, index or config, in bytes."""
DEPTH_MAX = 64
VALUES_MAX = 200_000
CHILDREN_MAX = 1000
LAYERS_MAX = 512
_SIZE_MAX = (1 << 63) - 1

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIG_TYPES = frozenset(
    {"application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"}
)  # fmt: skip
"""What the config of an image is, and not that of an artifact."""
_GENERIC = frozenset({"", "application/json", "application/octet-stream", "text/plain"})
_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+"
_FOREIGN = (
    "application/vnd.docker.image.rootfs.foreign.diff.",
    "application/vnd.oci.image.layer.nondistributable.",
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Index:
    """An image index (docker: manifest list)."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image: its config and its layers, the lowest first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image's config says. `diff_ids` are the digests of the uncompressed layers, the lowest first."""

    platform: Platform
    diff_ids: tuple[str, ...]
    created: str
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    user: str
    working_dir: str
    volumes: tuple[str, ...]
    exposed_ports: tuple[str, ...]
    labels: Mapping[str, str]
    stop_signal: str


def is_foreign(media_type: str) -> bool:
    """Whether a layer is of a type that registries do not hand on (its `urls` name where it is)."""
    return media_type.startswith(_FOREIGN)


def parse_object(raw: bytes, what: str, bound: int = DOCUMENT_MAX) -> dict[str, Any]:
    """A JSON object of at most `bound` bytes, DEPTH_MAX deep, VALUES_MAX values, without duplicate keys or NaN."""
    value = parse_value(raw, what, bound)
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is not a JSON object")
    return value


def parse_value(raw: bytes, what: str, bound: int = DOCUMENT_MAX) -> Any:
    """Any JSON value within the bounds of `parse_object`."""
    if len(raw) > bound:
        raise ResourceExhausted(f"{what} is longer than {bound} bytes")
    # Counted before parsing, commas inside strings included: a bound on memory, not a syntax check.
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > VALUES_MAX:
        raise ResourceExhausted(f"{what} holds more than {VALUES_MAX} values")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidArgument(f"{what} is nested deeper than {DEPTH_MAX}") from None
    except _DuplicateKey:
        raise InvalidArgument(f"{what} names a key twice") from None
    except ValueError:
        raise InvalidArgument(f"{what} is not valid JSON") from None
    _check_depth(value, what)
    return value


class _DuplicateKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _DuplicateKey
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _check_depth(value: object, what: str) -> None:
    level = [value]
    for _ in range(DEPTH_MAX):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise InvalidArgument(f"{what} is nested deeper than {DEPTH_MAX}")


def _children(item: object) -> list[object]:
    values = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []
    return [v for v in values if isinstance(v, dict | list)]


def document_type(raw: bytes, media_type: str = "", what: str = "document") -> str:
    """The media type of a manifest or index: `media_type` (a header's or a descriptor's) and the document agree.

    Unimplemented for types that are neither, docker's schema 1 among them.
    """
    return _typed(parse_object(raw, what), media_type, what)


def parse_index(raw: bytes, media_type: str = "", what: str = "index") -> Index:
    """The index in `raw`; at most CHILDREN_MAX children."""
    document = parse_object(raw, what)
    kind = _typed(document, media_type, what)
    if kind not in INDEX_TYPES:
        raise InvalidArgument(f"{what} is a {kind}, not an index")
    entries = _get(document, "manifests", list, what) or []
    if len(entries) > CHILDREN_MAX:
        raise ResourceExhausted(f"{what} has {len(entries)} children, {CHILDREN_MAX} are allowed")
    children = tuple(_descriptor(e, f"{what}: manifests[{i}]") for i, e in enumerate(entries))
    return Index(kind, children, _texts(document, "annotations", what))


def parse_manifest(raw: bytes, media_type: str = "", what: str = "manifest", *, foreign: bool = False) -> Manifest:
    """The manifest in `raw`; at most LAYERS_MAX layers. Foreign layers are refused unless `foreign`."""
    document = parse_object(raw, what)
    kind = _typed(document, media_type, what)
    if kind not in MANIFEST_TYPES:
        raise InvalidArgument(f"{what} is a {kind}, not a manifest")
    entries = _get(document, "layers", list, what) or []
    if len(entries) > LAYERS_MAX:
        raise ResourceExhausted(f"{what} has {len(entries)} layers, {LAYERS_MAX} are allowed")
    layers = tuple(_descriptor(e, f"{what}: layers[{i}]") for i, e in enumerate(entries))
    if not foreign:
        for layer in layers:
            refuse_foreign(layer)
    config = _descriptor(document.get("config"), f"{what}: config")
    return Manifest(kind, config, layers, _texts(document, "annotations", what))


def describe_referrer(descriptor: Descriptor, raw: bytes) -> dict[str, Any]:
    """What a list of referrers says of one (OCI distribution specification, "Listing Referrers")."""
    document = parse_object(raw, f"manifest {descriptor.digest}")
    made: dict[str, Any] = {
        "mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size
    }  # fmt: skip
    kind = document.get("artifactType") or (document.get("config") or {}).get("mediaType")
    return made | {
        key: value for key, value in (("artifactType", kind), ("annotations", document.get("annotations"))) if value
    }


def refuse_foreign(layer: Descriptor) -> None:
    """Unimplemented for a foreign layer: the switch that allows them is named."""
    if is_foreign(layer.media_type):
        raise Unimplemented(f"layer {layer.digest} is foreign ({layer.media_type}): foreign layers are switched off")


def parse_config(raw: bytes, what: str = "image config") -> ImageConfig:
    """The image config in `raw` (OCI, or docker's, which has the same fields); unknown fields are left out."""
    document = parse_object(raw, what)
    rootfs = _get(document, "rootfs", dict, what) or {}
    if rootfs.get("type", "layers") != "layers":
        raise InvalidArgument(f"{what}: rootfs.type is not layers")
    diff_ids = _strings(rootfs, "diff_ids", f"{what}: rootfs")
    if len(diff_ids) > LAYERS_MAX:
        raise ResourceExhausted(f"{what} has {len(diff_ids)} diff ids, {LAYERS_MAX} are allowed")
    run = _get(document, "config", dict, what) or {}
    inside = f"{what}: config"
    return ImageConfig(
        platform=_platform(document, what),
        diff_ids=tuple(check_digest(d) for d in diff_ids),
        created=_text(document, "created", what),
        env=_strings(run, "Env", inside),
        entrypoint=_strings(run, "Entrypoint", inside),
        cmd=_strings(run, "Cmd", inside),
        user=_text(run, "User", inside),
        working_dir=_text(run, "WorkingDir", inside),
        volumes=tuple(_get(run, "Volumes", dict, inside) or ()),
        exposed_ports=tuple(_get(run, "ExposedPorts", dict, inside) or ()),
        labels=_texts(run, "Labels", inside),
        stop_signal=_text(run, "StopSignal", inside),
    )


def _typed(document: dict[str, Any], media_type: str, what: str) -> str:
    given = media_type.partition(";")[0].strip().lower()
    version = document.get("schemaVersion")
    if given.startswith(_SCHEMA1) or (type(version) is int and version == 1):
        raise Unimplemented(f"{what} is a schema 1 manifest: those are not supported")
    own = _text(document, "mediaType", what)
    known = INDEX_TYPES | MANIFEST_TYPES
    for name in (given if given not in _GENERIC else "", own):
        if name and name not in known:
            raise Unimplemented(f"{what} is of type {name[:100]!r}: neither a manifest nor an index")
    kind = own or (given if given in known else OCI_INDEX if "manifests" in document else OCI_MANIFEST)
    if given in known and kind != given:
        raise InvalidArgument(f"{what} is ambiguous: it says {kind} where {given} was announced")
    _check_shape(document, kind, what)
    return kind


def _check_shape(document: dict[str, Any], kind: str, what: str) -> None:
    # One blob that two readers take for two different images is CVE-2021-41190.
    alien = ("layers", "config", "fsLayers") if kind in INDEX_TYPES else ("manifests", "fsLayers")
    for key in alien:
        if key in document:
            raise InvalidArgument(f"{what} is ambiguous: {key!r} in a {kind}")
    version = document.get("schemaVersion")
    if type(version) is not int or version != 2:
        raise InvalidArgument(f"{what}: schemaVersion is not 2")


def _descriptor(value: object, what: str) -> Descriptor:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{what} is not a descriptor")
    size = value.get("size")
    if type(size) is not int or not 0 <= size <= _SIZE_MAX:
        raise InvalidArgument(f"{what}: size is not a number of bytes")
    media_type = _text(value, "mediaType", what)
    if not media_type:
        raise InvalidArgument(f"{what}: mediaType is missing")
    platform = _get(value, "platform", dict, what)
    try:
        return Descriptor(
            media_type=media_type,
            digest=check_digest(_text(value, "digest", what)),
            size=size,
            annotations=dict(_texts(value, "annotations", what)),
            platform=None if platform is None else _platform(platform, f"{what}: platform"),
            urls=list(_strings(value, "urls", what)),
        )
    except InvalidArgument as e:
        raise InvalidArgument(f"{what}: {e.message}" if not e.message.startswith(what) else e.message) from None
    except ValidationError as e:
        raise InvalidArgument(f"{what}: {explain(e)}") from None


def _platform(value: Mapping[str, Any], what: str) -> Platform:
    return Platform(
        os=_text(value, "os", what),
        architecture=_text(value, "architecture", what),
        variant=_text(value, "variant", what),
        os_version=_text(value, "os.version", what),
        os_features=list(_strings(value, "os.features", what)),
    )


def _get(value: Mapping[str, Any], key: str, kind: type[T], what: str) -> T | None:
    """The field if it is there and not null; InvalidArgument if it is of another type."""
    found = value.get(key)
    if found is None:
        return None
    if not isinstance(found, kind):
        raise InvalidArgument(f"{what}: {key} is not a {_NAMES[kind]}")
    return found


_NAMES: dict[type, str] = {str: "string", list: "list", dict: "object"}


def _text(value: Mapping[str, Any], key: str, what: str) -> str:
    return _encodable(_get(value, key, str, what) or "", f"{what}: {key}")


def _texts(value: Mapping[str, Any], key: str, what: str) -> Mapping[str, str]:
    found: dict[Any, Any] = _get(value, key, dict, what) or {}
    for name, text in found.items():
        if not isinstance(text, str):
            raise InvalidArgument(f"{what}: {key} holds something else than strings")
        _encodable(name + text, f"{what}: {key}")
    return found


def _strings(value: Mapping[str, Any], key: str, what: str) -> tuple[str, ...]:
    found: list[Any] = _get(value, key, list, what) or []
    for text in found:
        if not isinstance(text, str):
            raise InvalidArgument(f"{what}: {key} holds something else than strings")
        _encodable(text, f"{what}: {key}")
    return tuple(found)


def _encodable(text: str, what: str) -> str:
    # JSON can spell a lone surrogate, which no later encoder accepts.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{what} is not valid Unicode") from None
    return text

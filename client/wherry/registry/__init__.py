"""Pulling from registries, independent of the bus: references, credentials, transport, documents, platforms.

Names are loaded when first used: whoever only parses a manifest does not wait for an HTTP client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Registry
    from .credentials import Credentials, CredentialSource, DockerConfig, NoCredentials
    from .documents import ImageConfig, Index, Manifest
    from .download import Hasher
    from .reference import Reference
    from .wire import Limits

_HOME = {
    ".client": ("Registry",),
    ".credentials": ("CredentialSource", "Credentials", "DockerConfig", "NoCredentials"),
    ".documents": (
        "ImageConfig", "Index", "Manifest", "document_type", "is_foreign", "parse_config", "parse_index",
        "parse_manifest", "parse_object",
    ),
    ".download": ("Hasher",),
    ".platforms": ("default_platform", "parse_platform", "pick"),
    ".reference": ("Reference",),
    ".wire": ("Limits",),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CredentialSource",
    "Credentials",
    "DockerConfig",
    "Hasher",
    "ImageConfig",
    "Index",
    "Limits",
    "Manifest",
    "NoCredentials",
    "Reference",
    "Registry",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)

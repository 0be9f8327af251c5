"""Pulling from registries, independent of the bus: references, credentials, transport, documents, platforms."""

from .client import Registry
from .credentials import Credentials, CredentialSource, DockerConfig, NoCredentials
from .documents import (
    ImageConfig,
    Index,
    Manifest,
    document_type,
    is_foreign,
    parse_config,
    parse_index,
    parse_manifest,
    parse_object,
)
from .download import Hasher
from .platforms import default_platform, parse_platform, pick
from .reference import Reference
from .wire import Limits

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
    "default_platform",
    "document_type",
    "is_foreign",
    "parse_config",
    "parse_index",
    "parse_manifest",
    "parse_object",
    "parse_platform",
    "pick",
]

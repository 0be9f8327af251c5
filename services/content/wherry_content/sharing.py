"""Who may have a blob without sending its bytes: containerd's sharing policies.

`isolated` (default): nobody, except from namespaces that their owner has labelled `shareable`. `shared`: whoever can
name the digest, so that to know one is to be able to read the blob.
"""

from __future__ import annotations

import logging
import time
from enum import StrEnum

from wherry_shared import context
from wherry_shared.api.namespace import Namespaces
from wherry_shared.errors import InvalidArgument, WherryError

from .metadata import Metadata

log = logging.getLogger("wherry.content")

SHAREABLE = "containerd.io/namespace.shareable"
CACHED_SECONDS = 5.0
PATIENCE = 2.0
"""Seconds that an answer of the namespace service counts, and seconds to wait for one: without it nothing is shared."""


class Policy(StrEnum):
    """The setting `sharing`."""

    isolated = "isolated"
    shared = "shared"

    @classmethod
    def parse(cls, text: str) -> Policy:
        """InvalidArgument names those that there are."""
        try:
            return cls(text)
        except ValueError:
            raise InvalidArgument(f"setting sharing={text!r} is not known: {' and '.join(cls)} are") from None


class Sharing:
    """Looks for blobs in other namespaces."""

    def __init__(self, metadata: Metadata, policy: Policy = Policy.isolated, namespaces: Namespaces | None = None):
        self._metadata = metadata
        self._policy = policy
        self._namespaces = namespaces
        self._known: dict[str, tuple[bool, float]] = {}

    async def size(self, digest: str, total: int) -> int:
        """How large the blob is that may be had for nothing; 0 where there is none, or not one of `total` bytes."""
        for namespace, size in self._metadata.owners(digest):
            if total in (0, size) and (self._policy is Policy.shared or await self._shareable(namespace)):
                return size
        return 0

    async def _shareable(self, namespace: str) -> bool:
        found, until = self._known.get(namespace, (False, 0.0))
        if until > time.monotonic() or self._namespaces is None:
            return found
        try:
            with context.use(timeout=PATIENCE, key=""):
                labels = (await self._namespaces.get(namespace)).labels
        except WherryError as e:
            log.info("whether namespace %s is shareable is unknown: %s", namespace, e)
            return False
        shareable = labels.get(SHAREABLE) == "true"
        self._known[namespace] = shareable, time.monotonic() + CACHED_SECONDS
        return shareable

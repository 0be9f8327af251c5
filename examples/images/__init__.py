"""Images made of Debian's packages, and a registry that serves them: for the demo, the tests and the measurements.

    from images import Registry, redis

    with Registry() as registry:
        reference = registry.push(redis(), "library/redis", "7")

Nothing to install: put `examples/` on the module path (`PYTHONPATH=examples python -m images`). The bytes of an
image repeat as long as apt's packages do; what was built once needs no network afterwards.
"""

from __future__ import annotations

from .cache import cache_directory, cached
from .layout import Builder, Descriptor, Image
from .packages import AptError
from .recipes import RECIPES, Size, architecture, busybox, layers, many, measure, platforms, redis, tiny
from .registry import Registry, RegistryClient, RegistryError

__all__ = [
    "RECIPES", "AptError", "Builder", "Descriptor", "Image", "Registry", "RegistryClient", "RegistryError", "Size",
    "architecture", "busybox", "cache_directory", "cached", "layers", "many", "measure", "platforms", "redis", "tiny",
]  # fmt: skip

"""Where package files and finished images stay: `.cache/` of the checkout, or WHERRY_IMAGE_CACHE."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .layout import Builder, Descriptor, Image

_HERE = Path(__file__).resolve().parent


def cache_directory() -> Path:
    return Path(os.environ.get("WHERRY_IMAGE_CACHE") or _HERE.parents[1] / ".cache")


@functools.cache
def _recipe_digest() -> str:
    """Changes with any line of this package, and with the release that packages come from."""
    digest = hashlib.sha256(platform.machine().encode())
    digest.update(platform.freedesktop_os_release().get("VERSION_CODENAME", "").encode())
    for path in sorted(_HERE.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cached(name: str, build: Callable[[Builder], Descriptor]) -> Image:
    """The image `name`, built by `build` where the cache lacks it; a half-built one is never seen.

    Of two processes that ask at once, one builds and the other waits. Builds of older recipes are removed.
    """
    images = cache_directory() / "images"
    images.mkdir(parents=True, exist_ok=True)
    final = images / f"{name}-{_recipe_digest()}"
    with _locked(images / f"{name}.lock"):
        if not final.exists():
            aside = Path(tempfile.mkdtemp(dir=images, prefix="unfinished-"))
            try:
                builder = Builder(aside / "layout")
                builder.finish(build(builder))
                for old in images.glob(f"{name}-????????????"):
                    shutil.rmtree(old)
                builder.path.rename(final)
            finally:
                shutil.rmtree(aside)
    return Image(final)

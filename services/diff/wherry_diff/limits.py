"""The bounds of one layer: what a hostile archive may cost at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one `apply`; a layer that passes one is refused with `ResourceExhausted`.

    Sizes are bytes. `max_bytes` counts the uncompressed stream and, apart from it, the apparent sizes of sparse
    files. `max_ratio` (output to input) counts once `ratio_after` bytes have come out of the decompressor.
    `max_name_bytes` is the sum of all names: directory names are remembered until the end of the layer, so it bounds
    memory. `max_path` and `max_component` are the kernel's own. `max_header` is one extended header.
    """

    max_bytes: int = 64 << 30
    max_ratio: int = 1000
    ratio_after: int = 64 << 20
    max_entries: int = 2_000_000
    max_name_bytes: int = 512 << 20
    max_path: int = 4095
    max_component: int = 255
    max_header: int = 1 << 20
    max_xattrs: int = 256
    max_xattr_value: int = 64 << 10
    max_links_walked: int = 255


DEFAULT = Limits()

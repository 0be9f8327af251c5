"""Names inside an archive: bytes, relative to the root of the tree."""

from __future__ import annotations


def show(name: bytes) -> str:
    """A name as it may stand in a message or a log: printable, whatever bytes it has, and not endless."""
    text = repr(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 300 else f"{text[:297]}...{text[0]}"


def clean(name: bytes) -> bytes:
    """The name without `.`, `..`, empty components and slashes at its ends; `..` does not climb over the root.

    Lexical, like Go's filepath.Clean on a rooted path. The root itself is the empty name.
    """
    if name[:2] == b"./":
        name = name[2:]
    if name[-1:] == b"/":
        name = name[:-1]
    if not name:
        return name
    # The common name passes here; a false alarm ("lib.") only costs the loop.
    if name[0] != 47 and name[-1] not in b"./" and b"//" not in name and b"./" not in name:
        return name
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part and part != b".":
            parts.append(part)
    return b"/".join(parts)


def join(directory: bytes, base: bytes) -> bytes:
    """`base` in `directory`, where the root is the empty name."""
    return directory + b"/" + base if directory else base

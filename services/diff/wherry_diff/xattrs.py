"""The extended attributes that belong to a layer.

containerd's walking differ carries `security.capability` alone, and so loses what else a container set. Here a layer
carries all that makes the tree what it is: `user.*`, `trusted.*`, POSIX ACLs and capabilities. Left out are overlayfs's
own (they direct the mount, not the file) and what the host's security module put there: SELinux's label, IMA's and
EVM's hashes are this machine's.
"""

from __future__ import annotations

import errno
import os

_CARRIED = ("user.", "trusted.", "security.capability", "system.posix_acl_")
_OVERLAY = ("trusted.overlay.", "user.overlay.")
# Shared by all who read: most files have none.
NONE: tuple[tuple[str, bytes], ...] = ()

Xattrs = tuple[tuple[str, bytes], ...]


def read(where: int | bytes) -> tuple[Xattrs, Xattrs]:
    """A layer's attributes, sorted by name, and overlayfs's own, of a descriptor or of a path that is not followed.

    What goes away meanwhile is left out; a file system without attributes has none.
    """
    follow = isinstance(where, int)
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return NONE, NONE
    if not names:
        return NONE, NONE
    carried: list[tuple[str, bytes]] = []
    own: list[tuple[str, bytes]] = []
    for name in sorted(names):
        into = own if name.startswith(_OVERLAY) else carried if name.startswith(_CARRIED) else None
        if into is None:
            continue
        try:
            into.append((name, os.getxattr(where, name, follow_symlinks=follow)))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
    return tuple(carried), tuple(own)

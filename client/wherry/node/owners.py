"""Folders that change hands: a node that was run by one user, and is by another."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def give(folder: Path, uid: int, gid: int) -> None:
    """Make a folder and all that is in it somebody's: an earlier start as another user may have made it.

    No link is followed, and a file with several names stays whose it is: one of them may lie elsewhere.
    """
    for _, _, files, fd in os.fwalk(folder, follow_symlinks=False):
        os.fchown(fd, uid, gid)
        for name in files:
            info = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and (info.st_uid, info.st_gid) != (uid, gid):
                os.chown(name, uid, gid, dir_fd=fd, follow_symlinks=False)

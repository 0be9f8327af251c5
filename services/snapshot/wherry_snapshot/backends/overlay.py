"""Snapshots as layers of an overlay, each a directory on the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from wherry_shared.api.snapshot import UPPERDIR_LABEL, Usage
from wherry_shared.values import Mount

from . import REMAP_IDS, Check, Snapshot, idmap, trees
from .layered import Layered, bind


class OverlayBackend(Layered):
    """Committed is what was `fs` when it was active.

    Setting `upperdir_label`: `true` to tell of each snapshot's `fs` in the label UPPERDIR_LABEL.
    """

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        super().__init__(root, settings)
        self._tell = settings.get("upperdir_label", "") == "true"
        if idmap.works_on(self.snapshots):
            self.capabilities = self.capabilities | {REMAP_IDS}

    def create(self, snapshot: Snapshot, check: Check) -> None:
        mapping = idmap.of(snapshot.inherited)
        owner = mapping.root if mapping else self._owner(snapshot)
        self.make(snapshot.number, lambda new: self.fill(new, snapshot, owner))

    def _owner(self, snapshot: Snapshot) -> tuple[int, int]:
        """Of the parent's root."""
        if not snapshot.parents:
            return 0, 0
        parent = os.lstat(self.tree(snapshot.parents[0]))
        return parent.st_uid, parent.st_gid

    def mounts(self, snapshot: Snapshot) -> list[Mount]:
        if snapshot.kind == "view":
            return [self._view(snapshot)]
        if self.is_plain(snapshot):
            return [bind(self.tree(snapshot.number), "rw")]
        lower = [self.tree(n) for n in snapshot.parents] or [str(self.empty)]
        return [self._overlay(snapshot, self.own_options(snapshot.number), lower)]

    def _view(self, snapshot: Snapshot) -> Mount:
        if len(snapshot.parents) > 1:
            return self._overlay(snapshot, [], [self.tree(n) for n in snapshot.parents])
        return bind(self.tree(snapshot.parents[0] if snapshot.parents else snapshot.number), "ro")

    def _overlay(self, snapshot: Snapshot, own: list[str], lower: list[str]) -> Mount:
        mapping = idmap.of(snapshot.inherited)
        ids = [] if mapping is None else [f"uidmap={mapping.uids}", f"gidmap={mapping.gids}"]
        options = [*ids, *own, "lowerdir=" + ":".join(lower), *self.options]
        return Mount(type="overlay", source="overlay", options=options)

    def seal(self, snapshot: Snapshot, rebase: bool, check: Check) -> Usage:
        if not rebase:
            return self.usage(snapshot, check)
        self.rebase(snapshot, self._owner(snapshot), check)
        own, marked = self.tree(snapshot.number), list[str]()
        usage = trees.measure(own, check, marked=marked)
        # The layer was extracted before anyone knew what it would stand on.
        if marked and trees.remove_idle_whiteouts(own, marked, [self.tree(n) for n in snapshot.parents]):
            return self.usage(snapshot, check)
        return usage

    def shown_labels(self, number: int) -> Mapping[str, str]:
        return {UPPERDIR_LABEL: self.tree(number)} if self._tell else {}

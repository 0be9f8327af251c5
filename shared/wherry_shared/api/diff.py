"""The diff service: layers onto mounts, and mounts into layers (containerd's rules)."""

from __future__ import annotations

from typing import Literal, Protocol

from ..contract import Contract, endpoint
from ..errors import (
    Aborted,
    DataLoss,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unimplemented,
    Unknown,
)
from ..records import Record, record
from ..values import Descriptor, Labels, Mount, Page

GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
UNCOMPRESSED_LABEL = "containerd.io/uncompressed"
"""On a compressed layer: the digest of the archive in it, its diff id."""


@record
class Change(Record):
    """One path that differs: A added, C changed, D deleted.

    path: absolute; bytes that are no UTF-8 stand as `\\xNN`.
    """

    kind: Literal["A", "C", "D"]
    path: str


class Diff(Contract, Protocol, service="diff", version="1.1.0"):
    """Applies layers to mounts, and makes layers of how mounts differ."""

    @endpoint(
        NotFound, Unimplemented, DataLoss, ResourceExhausted, FailedPrecondition, PermissionDenied, Unknown,
        mutates=True, timeout=900.0,
    )  # fmt: skip
    async def apply(
        self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False, payloads: dict[str, bytes] = {},
        sync_fs: bool = False,
    ) -> Descriptor:  # fmt: skip
        """Extract the layer that `descriptor` names onto what `mounts` name.

        Answers the descriptor of the uncompressed tar: its digest is the layer's diff id.
        standalone: the mounts have no parents though the layer may need them; FailedPrecondition when it does.
        payloads: what stream processors get, by their ids. sync_fs: the file system is synced before the answer.
        Unknown: a stream processor failed. PermissionDenied: the mounts are no active snapshot of the tenant's.
        """
        ...

    @endpoint(
        NotFound, Unimplemented, Aborted, ResourceExhausted, FailedPrecondition, PermissionDenied,
        mutates=True, timeout=900.0,
    )  # fmt: skip
    async def compare(
        self, left: list[Mount], right: list[Mount], media_type: str = GZIP_LAYER, ref: str = "", labels: Labels = {},
        source_date_epoch: int | None = None,
    ) -> Descriptor:  # fmt: skip
        """Make a layer that turns the left tree ([]: an empty one) into the right, and commit it to content.

        Answers the blob's descriptor; the blob has `labels`, and if it is compressed the label UNCOMPRESSED_LABEL, also
        when it was there before. Nothing else keeps it: have a lease, or give a gc label.
        ref: the ingest, started over when it is there; "": one of its own. source_date_epoch: seconds; no time in the
        layer is later, and the same tree gives the same bytes.
        Aborted: the tree changed under the comparison. FailedPrecondition: it has a name that no layer can hold.
        """
        ...

    @endpoint(NotFound, Unimplemented, Aborted, ResourceExhausted, PermissionDenied, timeout=120.0)
    async def changes(
        self, left: list[Mount], right: list[Mount], after: str = "", limit: int = 1000
    ) -> Page[Change]:  # fmt: skip
        """A window of what differs, in the order of names, a directory before what is in it."""
        ...

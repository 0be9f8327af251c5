"""The diff service: layers onto mounts (containerd's rules)."""

from __future__ import annotations

from typing import Protocol

from ..contract import Contract, endpoint
from ..errors import DataLoss, FailedPrecondition, NotFound, ResourceExhausted, Unimplemented
from ..values import Descriptor, Mount


class Diff(Contract, Protocol, service="diff", version="1.0.0"):
    """Applies layers to mounts."""

    @endpoint(NotFound, Unimplemented, DataLoss, ResourceExhausted, FailedPrecondition, mutates=True, timeout=900.0)
    async def apply(self, descriptor: Descriptor, mounts: list[Mount], standalone: bool = False) -> Descriptor:
        """Extract the layer that `descriptor` names onto what `mounts` name.

        Answers the descriptor of the uncompressed tar: its digest is the layer's diff id.
        standalone: the mounts have no parents though the layer may need them; FailedPrecondition when it does.
        """
        ...

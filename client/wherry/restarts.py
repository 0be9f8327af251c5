"""Restart policies as labels of containers (containerd's restart monitor's), and who acts on them.

A container with a policy is watched from its first start on (`status`), until it is stopped by somebody
(`explicitly-stopped`). The node's keeper (wherry.node.keeper) starts again what ends against its policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wherry_shared.errors import InvalidArgument

PREFIX = "containerd.io/restart."
STATUS, POLICY, COUNT, STOPPED = (PREFIX + name for name in ("status", "policy", "count", "explicitly-stopped"))


@dataclass(frozen=True)
class Policy:
    """always, unless-stopped or on-failure, that at most `most` times in a row (0: for ever)."""

    name: str
    most: int = 0

    @classmethod
    def parse(cls, text: str) -> Policy | None:
        """`no`, `always`, `unless-stopped`, `on-failure[:N]`; None for `no`. InvalidArgument."""
        name, _, count = text.partition(":")
        if name not in ("no", "always", "unless-stopped", "on-failure") or (count and name != "on-failure"):
            raise InvalidArgument(f"restart {text[:40]!r} is not no, always, unless-stopped or on-failure[:N]")
        if count and not (count.isdigit() and count.isascii() and len(count) < 7):
            raise InvalidArgument(f"restart {text[:40]!r}: how often is a number")
        return None if name == "no" else cls(name, int(count or 0))

    def wants(self, labels: Mapping[str, str], exit_status: int | None, *, boot: bool) -> bool:
        """Whether a container without a running task is to be started.

        exit_status: None when it has no task at all, as after its node was taken down. boot: the node has just come
        up; then `always` means always, also after a stop.
        """
        if labels.get(STOPPED):
            return boot and self.name == "always"
        if self.name != "on-failure":
            return True
        return bool(exit_status) and (not self.most or count_of(labels) < self.most)


def policy_of(labels: Mapping[str, str]) -> Policy | None:
    """What a container that was started is to have; None when it is to be left alone."""
    if not labels.get(STATUS):
        return None
    try:
        return Policy.parse(labels.get(POLICY) or "always")
    except InvalidArgument:
        return None  # somebody else's


def count_of(labels: Mapping[str, str]) -> int:
    """How often it was started again since somebody started it."""
    text = labels.get(COUNT, "")
    return int(text) if text.isdigit() and text.isascii() and len(text) < 10 else 0


def labels_for(policy: str) -> dict[str, str]:
    """The labels of a policy; `no` takes them out. InvalidArgument."""
    if Policy.parse(policy) is None:
        return {POLICY: "", STATUS: ""}
    return {POLICY: policy}


def on_start(labels: Mapping[str, str], again: int = 0) -> dict[str, str]:
    """What changes when somebody starts a container, or its policy does for the `again`th time."""
    if not labels.get(POLICY):
        return {}
    wanted = {STATUS: "running", STOPPED: "", COUNT: str(again) if again else ""}
    return {key: value for key, value in wanted.items() if labels.get(key, "") != value}


def on_stop(labels: Mapping[str, str]) -> dict[str, str]:
    """What changes when somebody stops it."""
    return {STOPPED: "true"} if labels.get(POLICY) and not labels.get(STOPPED) else {}

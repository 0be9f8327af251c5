"""What a prune would take: the filters, and the preview's rules of what keeps what."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from wherry.census import Census
from wherry.prune import Wanted, is_dangling, parse_filters, parse_until
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.content import Info as Blob
from wherry_shared.api.image import Image
from wherry_shared.api.lease import Lease, Resource
from wherry_shared.api.snapshot import Info as Snapshot
from wherry_shared.errors import InvalidArgument
from wherry_shared.values import Descriptor

NOW = datetime.now(UTC)
REF = "containerd.io/gc.ref"


def digest(letter: str) -> str:
    return f"sha256:{letter * 64}"


class Made(Census):
    """A namespace by hand: `a` is the digest of all a's."""

    def blob(self, letter: str, **labels: str) -> None:
        own = {key.replace("__", "."): value for key, value in labels.items()}
        info = Blob(digest=digest(letter), size=ord(letter), labels=own, created_at=NOW, updated_at=NOW)
        self.blobs[info.digest] = info

    def image(self, name: str, letter: str, **labels: str) -> None:
        target = Descriptor(media_type="x/y", digest=digest(letter), size=1)
        self.images.append(Image(name=name, target=target, labels=labels, created_at=NOW))

    def snapshot(self, name: str, parent: str = "", **labels: str) -> None:
        info = Snapshot(kind="committed", name=name, parent=parent, labels=labels, created_at=NOW, updated_at=NOW)
        self.snapshots["overlay", name] = info

    def lease(self, *resources: tuple[str, str], **labels: str) -> None:
        listed = [Resource(type=type, id=id) for type, id in resources]
        self.leases.append((Lease(id=f"l{len(self.leases)}", labels=labels, created_at=NOW), listed))

    def dead(self, *gone: str, containers: Any = ()) -> list[str]:
        garbage = self.garbage(gone, containers)
        return [blob.digest[7] for blob in garbage.blobs] + [key for _, key in garbage.snapshots]


@pytest.fixture
def made() -> Made:
    """image one -> a -> b (config) -> snapshot s2 -> s1; image two -> c -> b; d is nobody's."""
    census = Made()
    census.image("one", "a")
    census.image("two", "c")
    census.blob("a", **{f"{REF}.content.config": digest("b")})
    census.blob("b", **{f"{REF}.snapshot.overlay": "s2"})
    census.blob("c", **{f"{REF}.content/x": digest("b")})
    census.blob("d")
    census.snapshot("s1")
    census.snapshot("s2", "s1")
    return census


def test_what_nothing_keeps(made: Made) -> None:
    assert made.dead() == ["d"]
    assert made.dead("one") == ["a", "d"]
    assert made.dead("one", "two") == ["a", "b", "c", "d", "s1", "s2"]


def test_a_container_keeps_its_snapshot_and_what_is_under_it(made: Made) -> None:
    own = Container(id="web", runtime=Runtime(name="runc"), snapshotter="overlay", snapshot_key="s2", image="one")
    made.containers.append(own)
    assert made.dead("one", "two") == ["a", "b", "c", "d"]
    assert made.dead("one", "two", containers={"web"}) == ["a", "b", "c", "d", "s1", "s2"]


def test_leases(made: Made) -> None:
    made.lease(("content", digest("c")), ("snapshots/overlay", "s1"))
    assert made.dead("one", "two") == ["a", "d"]
    made.leases.clear()
    made.lease(("content", digest("c")), ("snapshots/overlay", "s2"), **{"containerd.io/gc.flat": "yes"})
    assert made.dead("one", "two") == ["a", "b", "d"]


def test_roots_expiry_and_back_references(made: Made) -> None:
    made.blob("e", **{"containerd.io/gc.root": "x"})
    made.blob("f", **{"containerd.io/gc.bref.content": digest("a")})
    made.blob("0", **{"containerd.io/gc.bref.content/x": digest("f")})
    assert made.dead() == ["d"]
    assert made.dead("one") == ["a", "d", "f", "0"]
    made.images.clear()
    made.image("past", "a", **{"containerd.io/gc.expire": "2020-01-01T00:00:00Z"})
    made.image("coming", "c", **{"containerd.io/gc.expire": "2999-01-01T00:00:00Z"})
    assert made.dead() == ["a", "d", "f", "0"]


@pytest.mark.parametrize(
    ("condition", "labels", "matches"),
    [
        ("label=team", {"team": "web"}, True), ("label=team", {}, False),
        ("label=team=web", {"team": "web"}, True), ("label=team=web", {"team": "db"}, False),
        ("label!=team", {}, True), ("label!=team", {"team": "web"}, False),
        ("label!=team=web", {"team": "db"}, True), ("label!=team=web", {"team": "web"}, False),
        ("until=1h", {}, False), ("until=0s", {}, True), ("until=2999-01-01T00:00:00Z", {}, True),
    ],
)  # fmt: skip
def test_filters(condition: str, labels: dict[str, str], matches: bool) -> None:
    own, until = parse_filters([condition])
    assert Wanted(labels=own, until=until).matches(labels, NOW - timedelta(minutes=1)) is matches


@pytest.mark.parametrize("bad", ["", "name=x", "until=", "until=x", "until=-1h", "until=99999999999d", "label"])
def test_filters_that_are_none(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_filters([bad])


def test_until() -> None:
    assert abs(parse_until("2d") - (datetime.now(UTC) - timedelta(days=2))) < timedelta(minutes=1)
    assert parse_until("2024-05-06T07:08:09+02:00") == datetime(2024, 5, 6, 5, 8, 9, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "dangling"),
    [("docker.io/library/a:1", False), (f"docker.io/library/a@{digest('a')}", True), ("<none>", True),
     (f"docker.io/library/a:1@{digest('a')}", False)],
)  # fmt: skip
def test_dangling(name: str, dangling: bool) -> None:
    assert is_dangling(name) is dangling

"""What every implementation of Images must do, through its proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import rebuilt
from rebuilt import told
from wherry_image import metadata
from wherry_image.catalog import Catalog
from wherry_image.service import ImageService
from wherry_lease import metadata as lease_metadata
from wherry_lease.leases import Registry
from wherry_lease.service import LeaseService
from wherry_shared import context
from wherry_shared.api.gc import Collections
from wherry_shared.api.image import Image, Images
from wherry_shared.api.lease import Leases, Resource
from wherry_shared.bus import Bus
from wherry_shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry_shared.outbox import Outbox
from wherry_shared.sqlite import Database
from wherry_shared.values import Descriptor

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EXPIRE = "containerd.io/gc.expire"
NAME = "docker.io/library/redis:7"


def digest(letter: str = "a") -> str:
    return f"sha256:{letter * 64}"


def image(name: str = NAME, *, letter: str = "a", **changes: Any) -> Image:
    target = Descriptor(media_type=MANIFEST, digest=digest(letter), size=528)
    return Image(**{"name": name, "target": target, **changes})


class House(rebuilt.House):
    """An image and a lease service on one bus, that can be stopped and built again on the same databases."""

    async def start(self) -> None:
        self.databases = [
            await Database.open(self.root / "image.db", metadata.MIGRATIONS),
            await Database.open(self.root / "lease.db", lease_metadata.MIGRATIONS),
        ]
        self.outbox = Outbox(self.databases[0], self.bus)
        self.outbox.start()
        await self.bus.serve(LeaseService(Registry(lease_metadata.Rows(self.databases[1]))))
        catalog = Catalog(metadata.table(self.databases[0]))
        await self.bus.serve(ImageService(catalog, self.bus.proxy(Leases), self.bus.proxy(Collections)))

    async def stop(self) -> None:
        await self.bus.drain()
        await self.outbox.stop()
        for database in self.databases:
            await database.close()


@pytest.fixture
async def house(bus: Bus, tmp_path: Path) -> AsyncIterator[House]:
    async with House(bus, tmp_path) as house:
        yield house


@pytest.fixture
def images(house: House) -> Images:
    return house.bus.proxy(Images, namespace="default")


@pytest.fixture
def leases(house: House) -> Leases:
    return house.bus.proxy(Leases, namespace="default")


async def test_what_is_created_can_be_got(images: Images) -> None:
    target = Descriptor(
        media_type=MANIFEST, digest=digest(), size=528, annotations={"a.b": "c", "gone": ""}, urls=["https://x/y"]
    )
    made = await images.create(Image(name=NAME, target=target, labels={"x": "y", "empty": ""}))
    assert made.created_at is not None
    assert made.created_at == made.updated_at
    assert made.labels == {"x": "y"}
    assert made.target.annotations == {"a.b": "c"}
    assert made.target.urls == ["https://x/y"]
    assert await images.get(NAME) == made


async def test_times_are_the_services(images: Images) -> None:
    old = await images.create(image())
    again = await images.create(image("other", created_at=old.created_at, updated_at=old.created_at))
    assert old.created_at is not None
    assert again.created_at is not None
    assert again.created_at > old.created_at


async def test_an_unknown_image_is_not_found(images: Images) -> None:
    for call in (images.get("nope"), images.delete("nope"), images.update(image("nope"))):
        with pytest.raises(NotFound, match="'nope': not found"):
            await call


async def test_a_name_is_taken_once_though_asked_for_twice_at_once(images: Images) -> None:
    outcomes = await asyncio.gather(*(images.create(image(letter=c)) for c in "ab"), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["AlreadyExists", "Image"]
    winner = next(o for o in outcomes if isinstance(o, Image))
    assert await images.get(NAME) == winner
    with pytest.raises(AlreadyExists, match="redis"):
        await images.create(image())


@pytest.mark.parametrize(
    ("change", "reason"), [({"size": 0}, "size"), ({"size": -1}, "size"), ({"media_type": ""}, "media_type")]
)
async def test_a_bad_target_is_refused(images: Images, change: dict[str, Any], reason: str) -> None:
    bad = image().target.model_copy(update=change)
    with pytest.raises(InvalidArgument, match=reason):
        await images.create(image(target=bad))
    good = await images.create(image())
    with pytest.raises(InvalidArgument, match=reason):
        await images.update(image(target=bad), ["target"])
    assert await images.get(NAME) == good


async def test_a_bad_digest_an_empty_name_and_a_long_label_are_refused(images: Images) -> None:
    for bad in ({"target": {"media_type": "m", "digest": "sha256:AB", "size": 1}}, {"name": ""}):
        with pytest.raises((InvalidArgument, ValueError)):
            await images.create(Image.model_validate({**image().model_dump(), **bad}))
    good = await images.create(image())
    with pytest.raises((InvalidArgument, ValueError)):
        await images.update(image(labels={"k": "v" * 4096}))
    assert await images.get(NAME) == good


async def test_a_name_with_a_digest_means_that_image_alone(images: Images) -> None:
    own = image().target.digest
    await images.create(image(f"redis@{own}"))
    await images.create(image("a@b"))
    for name in (f"redis@{digest('b')}", f"redis:7@{digest('b')}"):
        with pytest.raises(InvalidArgument, match="another digest"):
            await images.create(image(name))
    with pytest.raises(InvalidArgument, match="another digest"):
        await images.update(image(f"redis@{own}", letter="b"), ["target"])
    assert (await images.get(f"redis@{own}")).target.digest == own


async def test_without_a_mask_all_is_replaced_but_the_creation(images: Images) -> None:
    made = await images.create(image(labels={"a": "1", "b": "2"}))
    new = await images.update(image(letter="b", labels={"c": "3", "a": ""}))
    assert (new.labels, new.target.digest, new.created_at) == ({"c": "3"}, digest("b"), made.created_at)
    assert new.updated_at is not None
    assert made.updated_at is not None
    assert new.updated_at > made.updated_at
    assert await images.get(NAME) == new


async def test_a_mask_changes_what_it_names(images: Images) -> None:
    annotated = image().target.model_copy(update={"annotations": {"x.y": "1", "z": "2"}})
    await images.create(image(target=annotated, labels={"a.b/c": "1", "d": "2"}))
    new = image(letter="b", labels={"a.b/c": "9", "d": "", "e": "7"})
    assert (await images.update(new, ["labels.a.b/c"])).labels == {"a.b/c": "9", "d": "2"}
    assert (await images.update(new, ["labels.d"])).labels == {"a.b/c": "9"}
    one = await images.update(image(target=annotated.model_copy(update={"annotations": {}})), ["annotations.x.y"])
    assert one.target.annotations == {"z": "2"}
    assert (await images.update(new, ["annotations"])).target.annotations == {}
    assert (await images.get(NAME)).target.digest == digest("a")
    last = await images.update(new, ["target", "labels"])
    assert (last.target, last.labels) == (new.target, {"a.b/c": "9", "e": "7"})


@pytest.mark.parametrize("path", ["name", "created_at", "labels.", "target.size", "", "label.x"])
async def test_an_unknown_path_is_refused(images: Images, path: str) -> None:
    made = await images.create(image())
    with pytest.raises(InvalidArgument, match=f"path '{path}'"):
        await images.update(image(letter="b"), ["target", path])
    assert await images.get(NAME) == made


async def test_deleting(images: Images) -> None:
    await images.create(image())
    with pytest.raises(NotFound, match="target"):
        await images.delete(NAME, digest("b"))
    with pytest.raises(InvalidArgument, match="digest"):
        await images.delete(NAME, "sha256:b")
    await images.delete(NAME, digest("a"))
    with pytest.raises(NotFound):
        await images.get(NAME)


async def test_namespaces_do_not_see_each_other(house: House, images: Images) -> None:
    other = house.bus.proxy(Images, namespace="other")
    made = await images.create(image())
    with pytest.raises(NotFound):
        await other.get(NAME)
    await other.create(image(letter="b"))
    await other.delete(NAME)
    assert await images.get(NAME) == made
    assert (await other.walk()).items == []
    with pytest.raises(FailedPrecondition, match="namespace is required"):
        await house.bus.proxy(Images).get(NAME)


async def test_a_walk_has_pages_in_order_of_names(images: Images) -> None:
    names = sorted([f"reg.example/app:{i}" for i in range(25)] + ["ä", "Z", "a"])
    await asyncio.gather(*(images.create(image(name)) for name in reversed(names)))
    seen: list[str] = []
    after = ""
    for _ in range(4):
        page = await images.walk(after=after, limit=7)
        assert len(page.items) == 7
        seen += [i.name for i in page.items]
        after = page.next
    assert (seen, after) == (names, "")
    assert len((await images.walk(limit=0)).items) == 1
    assert len((await images.walk(limit=10**6)).items) == 28
    assert (await images.walk(after=names[-1])).items == []


async def test_a_page_stays_under_a_message(images: Images) -> None:
    labels = {f"k{i}": "v" * 4000 for i in range(20)}
    await asyncio.gather(*(images.create(image(f"i{n:02}", labels=labels)) for n in range(12)))
    seen: list[str] = []
    after, pages = "", 0
    while pages == 0 or after:
        page = await images.walk(after=after)
        assert page.items
        seen += [i.name for i in page.items]
        after, pages = page.next, pages + 1
    assert seen == [f"i{n:02}" for n in range(12)]
    assert pages > 1


async def test_a_walk_filters(images: Images) -> None:
    annotated = image().target.model_copy(update={"annotations": {"os": "linux"}})
    await images.create(image("one", labels={"tier": "web", "a.b/c": "x"}))
    await images.create(image("two", letter="b", target=annotated))
    await images.create(image("three", letter="c"))

    async def names(*filters: str) -> list[str]:
        return [i.name for i in (await images.walk(list(filters))).items]

    assert await names("name==one", "name==two") == ["one", "two"]
    assert await names("name~=|^t|,annotations.os==linux") == ["two"]
    assert await names('labels."a.b/c"==x') == ["one"]
    assert await names("labels.tier") == ["one"]
    assert await names("labels.tier!=web") == ["three", "two"]
    assert await names(f"target.digest=={digest('c')}") == ["three"]
    assert await names(f"target.mediatype=={MANIFEST}") == ["one", "three", "two"]
    assert await names("nothing") == []
    assert await names("name==one", "") == ["one", "three", "two"]
    with pytest.raises(InvalidArgument, match="position 4"):
        await names("name=one")


async def test_the_events_come_in_order_and_in_their_namespace(house: House, images: Images) -> None:
    async with await house.bus.subscribe() as events:
        await images.create(image(labels={"a": "b"}))
        with pytest.raises(AlreadyExists):
            await images.create(image())
        await images.update(image(), ["labels.a"])
        await house.bus.proxy(Images, namespace="other.one").create(image("x"))
        await images.delete(NAME)
        assert await told(events, 4) == [
            ("default", "/images/create", {"name": NAME, "labels": {"a": "b"}}),
            ("default", "/images/update", {"name": NAME}),
            ("other.one", "/images/create", {"name": "x"}),
            ("default", "/images/delete", {"name": NAME}),
        ]


async def test_all_is_there_after_a_restart(house: House, images: Images) -> None:
    made = await images.create(image(labels={"a": "b"}))
    await house.restart()
    assert await images.get(NAME) == made
    assert (await images.walk()).items == [made]


async def test_the_same_key_is_one_effect_and_one_answer(house: House, images: Images) -> None:
    async with await house.bus.subscribe() as events:
        with context.use(key="k1"):
            made = await images.create(image())
            assert await images.create(image()) == made
        with context.use(key="k2"):
            await images.delete(NAME)
        await house.restart()
        with context.use(key="k1"):
            assert await images.create(image()) == made
        with context.use(key="k2"):
            await images.delete(NAME)
        await images.create(image("last"))
        assert [t[1:] for t in await told(events, 3)] == [
            ("/images/create", {"name": NAME}),
            ("/images/delete", {"name": NAME}),
            ("/images/create", {"name": "last"}),
        ]
    assert [i.name for i in (await images.walk()).items] == ["last"]


async def test_an_image_that_expires_is_put_on_the_callers_lease(images: Images, leases: Leases) -> None:
    expiring = {EXPIRE: "2100-01-01T00:00:00Z"}
    await leases.create("pull")
    with context.use(lease="pull"):
        await images.create(image("plain"))
        await images.create(image("expiring", labels=expiring))
        await images.create(image("later"))
        await images.update(image("later", labels=expiring), [f"labels.{EXPIRE}"])
    await images.create(image("unleased", labels=expiring))
    kept = [Resource(type="images", id=name) for name in ("expiring", "later")]
    assert (await leases.resources("pull")).items == kept


async def test_an_unknown_lease_makes_no_image(images: Images) -> None:
    with context.use(lease="nope"):
        with pytest.raises(NotFound, match="lease 'nope'"):
            await images.create(image(labels={EXPIRE: "2100-01-01T00:00:00Z"}))
        with pytest.raises(NotFound, match="redis"):
            await images.get(NAME)
        await images.create(image())


async def test_a_leased_creation_is_answered_again_though_its_lease_is_gone(
    house: House, images: Images, leases: Leases
) -> None:
    await leases.create("pull")
    with context.use(lease="pull", key="k"):
        made = await images.create(image(labels={EXPIRE: "2100-01-01T00:00:00Z"}))
    await leases.delete("pull")
    await house.restart()
    with context.use(lease="pull", key="k"):
        assert await images.create(image(labels={EXPIRE: "2100-01-01T00:00:00Z"})) == made

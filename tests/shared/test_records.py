"""Records: what they share with models, what they do not carry along, and what is said of a value that is none."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from wherry_shared.api.container import Container, Runtime
from wherry_shared.api.image import Image, Images
from wherry_shared.contract import LARGE, pack, pack_page, unpack, without
from wherry_shared.errors import DataLoss
from wherry_shared.records import RECORDS
from wherry_shared.values import Descriptor, Digest, Page, Platform, explain, now

DIGEST = f"sha256:{'ab' * 32}"
PLATFORM = Platform(os="linux", architecture="amd64")
TARGET = Descriptor(media_type="application/octet-stream", digest=DIGEST, size=7, platform=PLATFORM)
IMAGE = Image(name="n", target=TARGET, created_at=now())


def test_a_record_is_one_object_and_does_not_change() -> None:
    for kind in RECORDS:
        assert "__dict__" not in dir(kind), kind
    with pytest.raises(FrozenInstanceError):
        IMAGE.name = "other"  # type: ignore[misc]


def test_defaults_are_made_each_time() -> None:
    first, second = (Image(name=name, target=TARGET) for name in "ab")
    first.labels["x"] = "1"
    assert second.labels == {}
    assert first.target.urls is not Descriptor(media_type="m", digest=DIGEST, size=1).urls


def test_it_travels_and_is_stored_without_its_defaults() -> None:
    stored = IMAGE.model_dump(exclude_defaults=True)
    assert set(stored) == {"name", "target", "created_at"}
    assert set(stored["target"]) == {"media_type", "digest", "size", "platform"}
    assert Image.model_validate(unpack(pack(stored))) == IMAGE
    assert TypeAdapter(Image).validate_json(IMAGE.model_dump_json()) == IMAGE
    assert Image.model_validate({**stored, "unknown": 1}) == IMAGE, "versions mix"


def test_a_copy_has_other_values_and_is_another() -> None:
    labelled = IMAGE.model_copy(update={"labels": {"a": "b"}})
    assert (labelled.labels, IMAGE.labels) == ({"a": "b"}, {})
    assert labelled != IMAGE and labelled.target is IMAGE.target
    assert copy.deepcopy(IMAGE) == IMAGE


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Descriptor(media_type="m", digest="sha256:ab", size=1), "digest: digest 'sha256:ab' is not valid"),
        (lambda: Descriptor(media_type="m", digest=DIGEST + "\n", size=1), "is not valid"),
        (lambda: Descriptor(media_type="m", digest=DIGEST.upper(), size=1), "is not valid"),
        (lambda: Descriptor(media_type="m", digest=f"sha512:{'0' * 64}", size=1), "is not valid"),
        (lambda: Descriptor(media_type="m", digest=7, size=1), "digest: Input should be a valid string"),  # type: ignore[arg-type]
        (lambda: Image(name="n", target={"media_type": "m", "size": 1}), "target.digest: Field required"),  # type: ignore[arg-type]
        (lambda: Container(id="a..b", runtime=Runtime(name="r")), "id: identifier 'a..b' is not valid"),
        (lambda: Container(id="a\n", runtime=Runtime(name="r")), "is not valid"),
        (lambda: Container(id="a" * 77, runtime=Runtime(name="r")), "is longer than 76 characters"),
        (lambda: Image(name="n", target=TARGET, labels={"k": "é" * 2048}), "longer than 4096 bytes"),
        (lambda: TypeAdapter(Digest).validate_python("x"), "digest 'x' is not valid"),
    ],
)
def test_what_is_refused_is_explained(make: Any, said: str) -> None:
    with pytest.raises(ValidationError) as e:
        make()
    assert said in explain(e.value)


def test_labels_may_have_4096_bytes() -> None:
    for value in ("x" * 4095, "é" * 2047 + "x"):
        assert Image(name="n", target=TARGET, labels={"k": value}).labels["k"] == value


def test_one_bad_record_spoils_a_page() -> None:
    walk = Images.endpoints["walk"]
    good, bad = IMAGE.model_dump(exclude_defaults=True), IMAGE.model_dump(exclude_defaults=True)
    bad["target"]["digest"] = "sha256:../../etc/passwd"
    documents = [pack(good)] * 1000
    page: Page[Image] = walk.decode_reply(pack_page(documents, "next"))
    assert (page.items, page.next) == ([IMAGE] * 1000, "next")
    answer = pack_page([*documents[:-1], pack(bad)], "")
    assert len(answer) > LARGE
    with pytest.raises(DataLoss, match=r"items\.999\.target\.digest"):
        walk.decode_reply(answer)


def test_a_field_is_left_out_of_what_is_encoded() -> None:
    spec = {"process": {"args": ["sh"], "env": ["spec=1"]}, "spec": {"spec": None}}
    box = Container(id="c", runtime=Runtime(name="r"), spec=spec, snapshotter="overlay", created_at=now())
    stored = pack(box.model_dump(exclude_defaults=True))
    assert Container.model_validate(unpack(without(stored, "spec"))) == box.model_copy(update={"spec": None})
    assert without(stored, "sandbox") == stored
    for damaged in (b"", b"\xc1", pack([1]), stored[:-9]):
        with pytest.raises(DataLoss):
            without(damaged, "labels")

"""The header parser: what it accepts, what it refuses, and that nothing else than our errors comes out of it."""

from __future__ import annotations

import contextlib
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wherry_diff import tar
from wherry_diff.limits import Limits
from wherry_diff.names import clean
from wherry_shared.errors import InvalidArgument, ResourceExhausted, WherryError

from .layers import (
    BLOCK,
    CHAR,
    DIR,
    FILE,
    GLOBAL,
    LINK,
    SYMLINK,
    TIME,
    archive,
    base256,
    entry,
    header,
    padded,
    pax,
    record,
)  # fmt: skip


def read(data: bytes, limits: Limits | None = None, chunk: int = 0) -> list[tuple[tar.Entry, bytes]]:
    pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)] if chunk else [data]
    limits = limits or Limits()
    reader = tar.Reader(tar.Stream(iter(pieces)), limits)
    found = []
    while (one := reader.next()) is not None:
        body = b""
        while reader.left:
            body += reader.take(reader.left)
        found.append((one, body))
    assert reader.next() is None
    return found


def only(data: bytes) -> tar.Entry:
    [(found, _)] = read(data)
    return found


@pytest.mark.parametrize("chunk", [0, 1, 7, 511, 512, 513, 1500])
def test_bodies_arrive_whole_however_the_stream_is_cut(chunk: int) -> None:
    bodies = [b"", b"a", b"b" * 511, b"c" * 512, b"d" * 513, b"e" * 5000]
    data = archive(*(entry(b"n%d" % at, data=body, pax={b"k": b"v"}) for at, body in enumerate(bodies)))
    assert [body for _, body in read(data, chunk=chunk)] == bodies


def test_a_body_that_is_not_read_is_passed() -> None:
    limits = Limits()
    reader = tar.Reader(tar.Stream(iter([archive(entry(b"a", data=b"x" * 1000), entry(b"b"))])), limits)
    assert [reader.next().name, reader.next().name, reader.next()] == [b"a", b"b", None]  # type: ignore[union-attr]


def test_numbers() -> None:
    found = only(archive(header(b"a", mode=b"  755 \0\0", uid=base256(3_000_000_000, 8), mtime=b"14000000000 ")))
    assert (found.mode, found.uid, found.mtime) == (0o755, 3_000_000_000, 0o14000000000 * 10**9)
    assert only(archive(header(b"a", mode=bytes(8)))).mode == 0
    assert only(archive(header(b"a", mode=b"0000644\0", mtime=b"644\0garbage!"))).mtime == 0o644 * 10**9
    assert only(archive(header(b"a", mode=0o107755))).mode == 0o7755


@pytest.mark.parametrize("mtime", [base256(-5, 12), base256(2**62, 12), base256(2**40, 12)])
def test_times_out_of_range_are_the_epoch(mtime: bytes) -> None:
    assert only(archive(header(b"a", mtime=mtime))).mtime == 0


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [(b"1.5", 1_500_000_000), (b"1600000000.123456789123", 1600000000123456789), (b"7", 7 * 10**9), (b"7.", 7 * 10**9),
     (b"-3.5", 0), (b"9" * 19, None), (b"99999999999", 0), (b"1e3", None), (b"", TIME * 10**9), (b"1.x", None),
     (b"--1", 0)],
)  # fmt: skip
def test_pax_times(value: bytes, nanoseconds: int | None) -> None:
    data = archive(entry(b"a", pax={b"mtime": value}))
    if nanoseconds is None:
        with pytest.raises(InvalidArgument):
            read(data)
    else:
        assert only(data).mtime == nanoseconds


def test_the_access_time_is_never_before_the_modification() -> None:
    assert only(archive(entry(b"a", pax={b"mtime": b"5", b"atime": b"3"}))).atime == 5 * 10**9
    assert only(archive(entry(b"a", pax={b"mtime": b"5", b"atime": b"8.25"}))).atime == 8_250_000_000


@pytest.mark.parametrize(
    "fields",
    [
        {"uid": base256(2**32 - 1, 8)}, {"gid": base256(2**32, 8)}, {"uid": base256(-1, 8)}, {"gid": base256(-2, 8)},
        {"size": base256(-1, 12)}, {"size": base256(2**63, 12)}, {"size": b"12345678901\xff"}, {"mode": b"00008\0\0\0"},
        {"mode": b"-000644\0"}, {"mode": b"+000644\0"}, {"mode": b"0o00644\0"}, {"uid": b"1_0\0\0\0\0\0"},
        {"mtime": b"12 34\0\0\0\0\0\0\0"}, {"pax": {b"uid": b"4294967295"}}, {"pax": {b"gid": b"-1"}},
        {"pax": {b"size": b"-1"}}, {"pax": {b"size": b"9223372036854775808"}}, {"pax": {b"size": b"9" * 5000}},
        {"pax": {b"uid": b"1_0"}}, {"pax": {b"path": b"a\0b"}}, {"pax": {b"linkpath": b"a\0b"}},
        {"checksum": b"0000000\0"}, {"checksum": b"nonsense"}, {"kind": b"7"}, {"kind": b"M"}, {"kind": b"\xff"},
        {"kind": b"s"}, {"kind": CHAR, "major": 4096}, {"kind": BLOCK, "minor": 1 << 20},
        {"kind": CHAR, "major": base256(-1, 8)}, {"kind": CHAR, "minor": base256(2**40, 8)},
    ],
)  # fmt: skip
def test_refused_headers(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        read(archive(entry(b"a", **fields)))


def test_a_checksum_of_signed_bytes_is_accepted() -> None:
    block = header(b"caf\xe9")
    signed = sum(struct.unpack("512b", block[:148] + b" " * 8 + block[156:]))
    assert only(archive(header(b"caf\xe9", checksum=b"%06o\0 " % signed))).name == b"caf\xe9"


def test_names() -> None:
    assert only(archive(header(b"n" * 100))).name == b"n" * 100
    assert only(archive(header(b"name", prefix=b"some/prefix"))).name == b"some/prefix/name"
    assert only(archive(header(b"name", prefix=b"ignored", magic=b"ustar  \0"))).name == b"name"
    star = header(b"name", prefix=b"p" * 131 + b"00000000001 00000000002 ", patch=lambda b: b[:508] + b"tar\0")
    assert only(archive(star)).name == b"p" * 131 + b"/name"
    assert only(archive(header(b"old", magic=b""))).name == b"old"


def test_gnu_long_names_win_over_pax_and_those_over_the_header() -> None:
    long, target = b"d/" * 100 + b"name", b"t" * 150
    meta = b"".join(
        header(b"././@LongLink", kind, len(text) + 1, magic=b"ustar  \0") + padded(text + b"\0")
        for kind, text in ((b"L", long), (b"K", target))
    )
    found = only(archive(meta, pax({b"path": b"pax", b"linkpath": b"paxlink"}), header(b"x", SYMLINK, link=b"y")))
    assert (found.name, found.link) == (long, target)
    found = only(archive(entry(b"x", SYMLINK, link=b"y", pax={b"path": b"pax", b"linkpath": b"paxlink"})))
    assert (found.name, found.link) == (b"pax", b"paxlink")
    assert only(archive(entry(b"x", pax={b"path": b""}))).name == b"x"


def test_extended_headers_hold_for_one_entry_and_global_ones_for_none() -> None:
    first, second = read(
        archive(pax({b"path": b"g", b"uid": b"9"}, GLOBAL), entry(b"a", pax={b"uid": b"7"}), entry(b"b"))
    )
    assert (first[0].name, first[0].uid, second[0].name, second[0].uid) == (b"a", 7, b"b", 0)


def test_links_and_directories_have_no_body_whatever_their_size_says() -> None:
    for kind in (LINK, SYMLINK, DIR, CHAR):
        assert [e.name for e, _ in read(archive(header(b"a", kind, 4096, link=b"t"), entry(b"b")))] == [b"a", b"b"]


def test_the_oldest_kind_of_directory() -> None:
    assert only(archive(header(b"d/", b"\0"))).kind == DIR
    assert only(archive(header(b"f", b"\0"))).kind == FILE


@pytest.mark.parametrize(
    "payload",
    [b"garbage", b"5 a=b", b"6 a=b\n7", b"99 a=b\n", b"6 =ab\n", b"6 abc\n", b"0 a=b\n", b"-6 a=b\n", b"3 a=b\n",
    b"6 a=bX",
     b"\n", b" a=b\n", b"9" * 30 + b" a=b\n", b"7 a\0=b\n", b"8 path=\0\n"],
)  # fmt: skip
def test_malformed_pax_records(payload: bytes) -> None:
    with pytest.raises(InvalidArgument):
        read(archive(header(b"p", b"x", len(payload)), padded(payload), entry(b"a")))


def test_xattrs_keep_every_byte_and_overlays_own_are_dropped() -> None:
    records = {
        b"SCHILY.xattr.user.a": b"1\n2=3\0\xff",
        b"SCHILY.xattr.trusted.overlay.redirect": b"/etc",
        b"SCHILY.xattr.user.overlay.opaque": b"y",
        b"SCHILY.xattr.security.capability": bytes(range(20)),
    }
    found = only(archive(entry(b"a", pax=records)))
    assert found.xattrs == [(b"user.a", b"1\n2=3\0\xff"), (b"security.capability", bytes(range(20)))]


@pytest.mark.parametrize("keep", [1, 100, 511, 513, 600, 1023])
def test_a_truncated_archive(keep: int) -> None:
    with pytest.raises(InvalidArgument, match="ends in the middle"):
        read(archive(entry(b"a", data=b"x" * 512))[:keep])


def test_an_archive_may_end_without_zeros_or_be_empty() -> None:
    whole = archive(entry(b"a", data=b"x" * 10))
    assert len(read(whole[:-1024])) == len(read(whole[:-512])) == 1
    assert read(b"") == read(bytes(512)) == read(bytes(1024)) == read(bytes(10240)) == []
    assert len(read(whole + b"trailing garbage")) == 1


def test_a_lone_block_of_zeros_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="zeros"):
        read(entry(b"a") + bytes(512) + archive(entry(b"b")))


def test_an_extended_header_before_the_end_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no entry"):
        read(archive(entry(b"a"), pax({b"path": b"b"})))


def test_bounds() -> None:
    def refused(data: bytes, **limits: int) -> None:
        with pytest.raises(ResourceExhausted):
            read(data, Limits(**limits))

    three = archive(entry(b"a"), entry(b"b"), entry(b"c"))
    assert len(read(three, Limits(max_entries=3))) == 3
    refused(three, max_entries=2)
    refused(three, max_name_bytes=2)
    refused(archive(*[pax({b"a": b"b"})] * 10, entry(b"a")), max_entries=2)
    refused(archive(*[pax({b"a": b"b"}, GLOBAL)] * 10, entry(b"a")), max_entries=2)
    refused(header(b"p", b"x", 1 << 30))
    refused(header(b"p", b"g", 1 << 30))
    refused(header(b"p", b"L", (1 << 20) + 1))
    refused(header(b"p", b"K", size=base256(1 << 60, 12)))
    refused(archive(entry(b"n" * 256)))
    refused(archive(entry(b"d/" * 2100 + b"n")))
    many = {b"SCHILY.xattr.user.%d" % at: b"" for at in range(300)}
    refused(archive(entry(b"a", pax=many)))
    refused(archive(entry(b"a", pax={b"SCHILY.xattr.user.a": bytes(65537)})))
    sparse = {b"GNU.sparse.major": b"0", b"GNU.sparse.minor": b"1", b"GNU.sparse.map": b"", b"GNU.sparse.size": b"9000"}
    assert only(archive(entry(b"a", pax=sparse))).size == 9000
    refused(archive(entry(b"a", pax=sparse), entry(b"b", pax=sparse)), max_bytes=10000)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(b"a", b"a"), (b"./a", b"a"), (b"a/", b"a"), (b"/a//b/", b"a/b"), (b"../../a", b"a"), (b"a/../../b", b"b"),
    (b".", b""),
     (b"/", b""), (b"./", b""), (b"", b""), (b"..", b""), (b"a/..", b""), (b"a/./b", b"a/b"), (b"a/.", b"a"),
     (b"lib.", b"lib."),
     (b"a./b", b"a./b"), (b"...", b"..."), (b"a/..b", b"a/..b"), (b".//", b""), (b"././a", b"a"), (b"./../a", b"a"),
     (b".//a", b"a"), (b"a//", b"a")],
)  # fmt: skip
def test_clean(raw: bytes, expected: bytes) -> None:
    assert clean(raw) == expected


@given(st.lists(st.sampled_from([b"a", b"bb", b"..", b".", b"", b"...", b"c."]), max_size=8))
def test_clean_names_are_clean(parts: list[bytes]) -> None:
    name = clean(b"/".join(parts))
    assert name == b"" or not {b"", b".", b".."} & set(name.split(b"/"))


@pytest.mark.parametrize(
    "how", [["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)
def test_sparse_files_as_gnu_tar_writes_them(tmp_path: Path, how: list[str]) -> None:
    holes = tmp_path / "holes"
    with holes.open("wb") as file:
        for at in range(60):
            file.seek(at * 65536)
            file.write(b"%d" % at * 100)
        file.truncate(8 << 20)
    (tmp_path / "after").write_bytes(b"after")
    data = subprocess.run(
        ["tar", "-C", tmp_path, "--sparse", *how, "-cf", "-", "holes", "after"], check=True, capture_output=True
    ).stdout
    (sparse, body), (after, text) = read(data)
    assert (sparse.name, sparse.size, after.name, text) == (b"holes", 8 << 20, b"after", b"after")
    assert sparse.segments and len(body) < 1 << 20
    content = bytearray(sparse.size)
    for offset, length in sparse.segments:
        content[offset : offset + length], body = body[:length], body[length:]
    assert bytes(content) == holes.read_bytes()


@pytest.mark.parametrize(
    "records",
    [
        {b"GNU.sparse.major": b"2", b"GNU.sparse.minor": b"0"},
        {b"GNU.sparse.size": b"5"},
        {b"GNU.sparse.map": b"0,5", b"GNU.sparse.size": b"5"},
        {b"GNU.sparse.map": b"0,4,4", b"GNU.sparse.size": b"5"},
        {b"GNU.sparse.map": b"0,4", b"GNU.sparse.size": b"3"},
        {b"GNU.sparse.map": b"2,2,0,2", b"GNU.sparse.size": b"9"},
        {b"GNU.sparse.map": b"0,3,2,1", b"GNU.sparse.size": b"9"},
        {b"GNU.sparse.map": b"-1,4", b"GNU.sparse.size": b"9"},
        {b"GNU.sparse.map": b"9223372036854775807,4", b"GNU.sparse.size": b"9"},
        {b"GNU.sparse.offset": b"0", b"GNU.sparse.size": b"9"},
        {b"GNU.sparse.numbytes": b"4", b"GNU.sparse.size": b"9"},
        {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"9"},
    ],
)
def test_contradictory_sparse_files(records: dict[bytes, bytes]) -> None:
    with pytest.raises(InvalidArgument):
        read(archive(entry(b"a", data=b"data", pax=records)))


@pytest.mark.parametrize("text", [b"9" * 600, b"1" * 512, b"99999\n0\n" + b"0\n" * 252, b"1\n0\n", b"x\n"])
def test_endless_sparse_maps(text: bytes) -> None:
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0", b"GNU.sparse.realsize": b"9"}
    with pytest.raises(InvalidArgument):
        read(archive(entry(b"a", data=padded(text), pax=records)))


fields = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(st.binary(min_size=width, max_size=width), st.integers(0, 8 ** (width - 1) - 1))
        for name, width in (
            ("mode", 8),
            ("uid", 8),
            ("gid", 8),
            ("size", 12),
            ("mtime", 12),
            ("major", 8),
            ("minor", 8),
        )
    },
)
records = st.dictionaries(
    st.sampled_from([b"path", b"size", b"mtime", b"atime", b"uid", b"linkpath", b"GNU.sparse.map", b"GNU.sparse.major",
                     b"GNU.sparse.minor", b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.offset",
                     b"SCHILY.xattr.user.x"]),
    st.one_of(st.binary(max_size=20), st.sampled_from([b"0", b"1", b"0,4", b"1,2,8,2", b"-1", b"9" * 18, b"1.5"])),
    max_size=4,
)  # fmt: skip
members = st.builds(
    lambda name, kind, data, fields, records: entry(name, kind, data, pax=records, **fields),
    st.binary(max_size=120), st.sampled_from(b"0 1 2 3 4 5 6 7 x g L K S \0".split(b" ")), st.binary(max_size=700),
    fields, records,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(members, max_size=4), st.data())
def test_whatever_the_bytes_only_our_errors_come_out(parts: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(archive(*parts))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        found = read(bytes(whole[:cut]), chunk=data.draw(st.sampled_from([0, 100, 512])))
    except WherryError as error:
        assert error.message.isprintable()
        return
    for one, _ in found:
        assert one.name == clean(one.name) and b"\0" not in one.name
        assert one.size >= 0 and 0 <= one.mtime < 2**63 and one.mode <= 0o7777 and max(one.uid, one.gid) < 2**32 - 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_noise(noise: bytes) -> None:
    with contextlib.suppress(WherryError):
        read(noise)


def test_the_record_writer_of_these_tests() -> None:
    assert record(b"path", b"x" * 90) == b"99 path=" + b"x" * 90 + b"\n"
    assert record(b"a", b"b") == b"6 a=b\n"

"""The registry client against servers on loopback that lie about bodies, stall, and fail."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os

import pytest
from aiohttp import web
from wherry.registry import Limits
from wherry.registry.documents import DOCUMENT_MAX, OCI_MANIFEST
from wherry.registry.download import PIECE
from wherry.registry.wire import retry_after
from wherry_shared.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WherryError,
)
from wherry_shared.values import Descriptor

from .registry_traps import (
    BLOB,
    DATA,
    MANIFEST,
    Handler,
    answer,
    break_off,
    chunked,
    client,
    cutting,
    ranged,
    serving,
    whole,
)

# --- bodies and ranges ---------------------------------------------------------------------------------------


async def test_a_broken_body_is_resumed_with_a_bounded_range() -> None:
    async with serving(cutting(150_000)) as trap, client() as registry:
        assert await whole(registry, trap, verify=True) == DATA
        assert [r.headers.get("Range") for r in trap.requests] == [None, f"bytes=150000-{len(DATA) - 1}"]


async def test_a_piece_is_good_for_one_more() -> None:
    """Whoever keeps the view of a piece is told, and reads no other's bytes."""
    large = os.urandom(3 * PIECE)
    blob = Descriptor(media_type=BLOB.media_type, digest=f"sha256:{hashlib.sha256(large).hexdigest()}", size=len(large))

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=large)

    async with serving(serve) as trap, client() as registry:
        kept = [piece async for piece in registry.pieces(trap.ref(), blob)]
        assert len(kept) >= 3
        assert bytes(kept[-1])
        with pytest.raises(ValueError, match="released"):
            bytes(kept[0])


async def test_a_range_may_be_answered_piecewise() -> None:
    async def piecewise(request: web.BaseRequest) -> web.StreamResponse:
        first = int(request.headers["Range"].removeprefix("bytes=").split("-")[0])
        part = DATA[first : first + 70_000]
        headers = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/*"}
        return web.Response(status=206, body=part, headers=headers)

    async with serving(piecewise) as trap, client() as registry:
        assert await whole(registry, trap, offset=1) == DATA[1:]


async def test_a_registry_without_ranges_is_discarded_to_the_offset_once() -> None:
    async def no_ranges(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=DATA)

    async with serving(cutting(150_000, no_ranges)) as trap, client() as registry:
        assert await whole(registry, trap, verify=True) == DATA
        assert await whole(registry, trap, offset=399_999) == DATA[399_999:]

    async def always_breaks(request: web.BaseRequest) -> web.StreamResponse:
        return await break_off(request, DATA[: 100_000 * len(trap.requests)])

    async with serving(always_breaks) as trap, client() as registry:
        with pytest.raises(Unavailable, match="ranges"):
            await whole(registry, trap)
        assert len(trap.requests) == 3


@pytest.mark.parametrize(
    "content_range",
    [
        None, "", "bytes 0-399999/400000", "bytes 150001-399999/400000", "bytes 0-249999/400000",
        "bytes 150000-400000/400001",
        "bytes 150000-399999/400001", "bytes 150000-149999/400000", "bytes */400000", "octets 150000-399999/400000",
        "bytes 150000-400000/400000", "bytes +150000-399999/400000",
    ],
)  # fmt: skip
async def test_a_lie_about_the_range_is_data_loss(content_range: str | None) -> None:
    headers = {} if content_range is None else {"Content_Range": content_range}
    lies = answer(206, DATA[150_000:], **headers)
    async with serving(cutting(150_000, lies)) as trap, client() as registry:
        with pytest.raises(DataLoss, match=trap.address):
            await whole(registry, trap)
        assert len(trap.requests) == 2


@pytest.mark.parametrize(
    "handler",
    [
        answer(206, DATA, Content_Range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}"),  # nobody asked for a part
        answer(200, DATA[:-1]),
        answer(200, DATA + b"x"),
        answer(200, b""),
        answer(200, DATA, Content_Encoding="gzip"),
    ],
)
async def test_a_wrong_length_is_data_loss_at_once(handler: Handler) -> None:
    async with serving(handler) as trap, client() as registry:
        with pytest.raises(DataLoss, match=trap.address):
            await whole(registry, trap)
        assert len(trap.requests) == 1


async def test_a_body_without_length_is_cut_at_size_plus_one() -> None:
    taken = 0
    for extra, forever in ((b"x", False), (b"", True)):
        async with serving(lambda r, e=extra, f=forever: chunked(r, DATA + e, f)) as trap, client() as registry:
            with pytest.raises(DataLoss, match="more than"):
                async for chunk in registry.blob(trap.ref(), BLOB):
                    taken += len(chunk)
            assert len(trap.requests) == 1
    assert taken <= 2 * len(DATA)
    async with serving(lambda r: chunked(r, DATA)) as trap, client() as registry:
        assert await whole(registry, trap, verify=True) == DATA


async def test_a_body_that_stays_short_is_data_loss() -> None:
    async def short(request: web.BaseRequest) -> web.StreamResponse:
        return await chunked(request, DATA[:1000] if "Range" not in request.headers else b"")

    async def nothing_more(request: web.BaseRequest) -> web.StreamResponse:
        if "Range" in request.headers:
            return web.Response(status=416)
        return await chunked(request, DATA[:1000])

    for handler, error in ((short, Unavailable), (nothing_more, DataLoss)):
        async with serving(handler) as trap, client() as registry:
            with pytest.raises(error, match=trap.address):
                await whole(registry, trap)
            assert len(trap.requests) <= 3


async def test_wrong_bytes_are_data_loss_when_verified() -> None:
    wrong = bytes([DATA[0] ^ 1]) + DATA[1:]
    async with serving(answer(200, wrong)) as trap, client() as registry:
        with pytest.raises(DataLoss, match=BLOB.digest):
            await whole(registry, trap, verify=True)
        sha512 = BLOB.model_copy(update={"digest": "sha512:" + hashlib.sha512(DATA).hexdigest()})
        with pytest.raises(DataLoss, match="sha512"):
            await whole(registry, trap, blob=sha512, verify=True)
    # A resumed download is hashed as a whole: the second half of another blob does not pass.
    async with serving(cutting(150_000, lambda r: ranged_of(r, wrong[::-1]))) as trap, client() as registry:
        with pytest.raises(DataLoss):
            await whole(registry, trap, verify=True)
    async with serving(answer(200, DATA)) as trap, client() as registry:
        assert await whole(registry, trap, blob=sha512, verify=True) == DATA


async def ranged_of(request: web.BaseRequest, data: bytes) -> web.StreamResponse:
    first = int(request.headers["Range"].removeprefix("bytes=").split("-")[0])
    headers = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
    return web.Response(status=206, body=data[first:], headers=headers)


async def test_a_drip_of_connections_ends() -> None:
    async def one_byte(request: web.BaseRequest) -> web.StreamResponse:
        first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        response = web.StreamResponse(status=206 if first else 200)
        response.headers["Content-Length"] = str(len(DATA) - first)
        if first:
            response.headers["Content-Range"] = f"bytes {first}-{len(DATA) - 1}/{len(DATA)}"
        await response.prepare(request)
        await response.write(DATA[first : first + 1])
        await asyncio.sleep(0.02)
        assert request.transport is not None
        request.transport.close()
        return response

    async with serving(one_byte) as trap, client() as registry:
        with pytest.raises(Unavailable):
            await whole(registry, trap)
        assert len(trap.requests) == 3


# --- manifests -----------------------------------------------------------------------------------------------


async def test_a_digest_header_is_compared_and_never_trusted() -> None:
    true = "sha256:" + hashlib.sha256(MANIFEST).hexdigest()
    true512 = "sha512:" + hashlib.sha512(MANIFEST).hexdigest()
    for value in (true, true512):
        async with serving(answer(200, MANIFEST, Docker_Content_Digest=value)) as trap, client() as registry:
            assert (await registry.resolve(trap.ref()))[0].digest == true
    for lie in (BLOB.digest, "sha256:x", "md5:" + "0" * 32, true.upper(), ""):
        async with serving(answer(200, MANIFEST, Docker_Content_Digest=lie)) as trap, client() as registry:
            with pytest.raises(DataLoss, match=trap.address):
                await registry.resolve(trap.ref())
    # The reference's digest decides, whatever the header says.
    async with serving(answer(200, MANIFEST, Docker_Content_Digest=BLOB.digest)) as trap, client() as registry:
        with pytest.raises(DataLoss, match=BLOB.digest):
            await registry.resolve(trap.ref(f"team/app@{BLOB.digest}"))
        assert trap.requests[0].path.endswith(BLOB.digest)
    async with serving(answer(200, MANIFEST)) as trap, client() as registry:
        assert (await registry.resolve(trap.ref(f"team/app@{true512}")))[0].digest == true512


async def test_an_oversized_manifest_is_not_read() -> None:
    async with serving(answer(200, b"x" * (DOCUMENT_MAX + 1))) as trap, client() as registry:
        with pytest.raises(ResourceExhausted):
            await registry.resolve(trap.ref())
    async with serving(lambda r: chunked(r, b"{", forever=True)) as trap, client() as registry:
        with pytest.raises(ResourceExhausted):
            await registry.resolve(trap.ref())
        with pytest.raises(DataLoss):
            await registry.manifest(trap.ref(), BLOB.model_copy(update={"media_type": OCI_MANIFEST}))
        before = len(trap.requests)
        with pytest.raises(ResourceExhausted):
            huge = BLOB.model_copy(update={"media_type": OCI_MANIFEST, "size": DOCUMENT_MAX + 1})
            await registry.manifest(trap.ref(), huge)
        with pytest.raises(Unimplemented):
            await registry.manifest(trap.ref(), BLOB)
        assert len(trap.requests) == before


async def test_a_manifest_of_other_bytes_is_data_loss() -> None:
    asked = BLOB.model_copy(update={"media_type": OCI_MANIFEST, "size": len(MANIFEST)})
    async with serving(answer(200, MANIFEST)) as trap, client() as registry:
        for fetch in (registry.manifest, registry.small):
            with pytest.raises(DataLoss, match=BLOB.digest):
                await fetch(trap.ref(), asked)


async def test_an_ambiguous_manifest_is_refused() -> None:
    both = json.dumps(json.loads(MANIFEST) | {"manifests": []}).encode()
    async with serving(answer(200, both, Content_Type=OCI_MANIFEST)) as trap, client() as registry:
        with pytest.raises(InvalidArgument, match="ambiguous"):
            await registry.resolve(trap.ref())
    async with serving(answer(200, b"<html>", Content_Type="text/html")) as trap, client() as registry:
        with pytest.raises(InvalidArgument):
            await registry.resolve(trap.ref())


# --- trouble and time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "error", "count"),
    [
        (answer(429, Retry_After="0"), ResourceExhausted, 3),
        (answer(429, Retry_After="999999"), ResourceExhausted, 3),
        (answer(429), ResourceExhausted, 3),
        (answer(500), Unavailable, 3),
        (answer(503, Retry_After="Wed, 21 Oct 2065 07:28:00 GMT"), Unavailable, 3),
        (answer(403), PermissionDenied, 1),
        (answer(404), NotFound, 1),
        (answer(400), InvalidArgument, 1),
        (answer(418), FailedPrecondition, 1),
        (answer(204), FailedPrecondition, 1),
    ],
)
async def test_statuses_are_errors_after_bounded_tries(handler: Handler, error: type[WherryError], count: int) -> None:
    async with serving(handler) as trap, client() as registry:
        with pytest.raises(error, match=trap.address):
            await registry.resolve(trap.ref())
        assert len(trap.requests) == count
        with pytest.raises(error, match=trap.address):
            await whole(registry, trap)
        assert len(trap.requests) == 2 * count


async def test_trouble_that_passes_is_not_noticed() -> None:
    for trouble in (answer(429, Retry_After="0"), answer(502), answer(408), lambda r: break_off(r, DATA[:1])):
        count = 0

        async def twice(request: web.BaseRequest, trouble: Handler = trouble) -> web.StreamResponse:
            nonlocal count
            count += 1
            return await (trouble(request) if count <= 2 else ranged(request))

        async with serving(twice) as trap, client() as registry:
            assert (await registry.resolve(trap.ref()))[1] == MANIFEST
            assert count == 3
            count = 0
            assert await whole(registry, trap, verify=True) == DATA


async def test_a_closed_port_is_unavailable() -> None:
    async with serving(ranged) as trap:
        pass
    async with client() as registry:
        with pytest.raises(Unavailable, match=trap.address):
            await registry.resolve(trap.ref())


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({"Retry-After": "17"}) == 17
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert (retry_after({"Retry-After": "Wed, 21 Oct 2065 07:28:00 GMT"}) or 0) > 3600
    for bad in ("", "-1", "soon", "1.5e3", "²", "Wed, 99 Oct 2015 07:28:00 -0000"):
        assert retry_after({"Retry-After": bad}) is None


async def drip(request: web.BaseRequest) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(DATA))})
    await response.prepare(request)
    for position in range(len(DATA)):
        await response.write(DATA[position : position + 1])
        await asyncio.sleep(0.02)
    return response


async def silent_body(request: web.BaseRequest) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(DATA))})
    await response.prepare(request)
    await asyncio.sleep(3600)
    return response


async def slow_head(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not request.transport.is_closing():
        request.transport.write(b"x")  # each byte would restart a mere idle timer
        await asyncio.sleep(0.02)
    return web.Response()


@pytest.mark.parametrize("handler", [drip, silent_body, slow_head])
async def test_a_slow_loris_is_given_up(handler: Handler) -> None:
    limits = Limits(tries=2, backoff=0.01, head=0.5, idle=0.3, document=0.6, pace_window=0.3)
    async with serving(handler) as trap, client(limits=limits) as registry:
        with pytest.raises(DeadlineExceeded, match=trap.address):
            await whole(registry, trap)
        with pytest.raises(DeadlineExceeded, match=trap.address):
            await registry.resolve(trap.ref())


async def test_a_slow_consumer_is_not_taken_for_a_slow_registry() -> None:
    limits = Limits(idle=1, pace_window=0.5)
    async with serving(ranged) as trap, client(limits=limits) as registry:
        got = b""
        async for chunk in registry.blob(trap.ref(), BLOB):
            if not got:
                await asyncio.sleep(1.2)
            got += chunk
        assert got == DATA

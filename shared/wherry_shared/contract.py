"""One declaration per operation: a contract gives the subject, the models, the errors, the docs, server and client.

    class Content(Contract, Protocol, service="content", version="1.0.0"):
        '''The committed blobs of one namespace.'''

        @endpoint(NotFound)
        async def info(self, digest: Digest) -> Info:
            '''Tell what is known of one blob.'''
            ...

A service inherits the contract and implements it; `bus.serve` serves it and `bus.proxy(Content)` calls it.
"""

from __future__ import annotations

import gc
import inspect
import json
import threading
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Protocol, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from .errors import DataLoss, InvalidArgument, WherryError
from .values import Model, explain

F = TypeVar("F", bound=Callable[..., Any])
_DECLARED = "__wherry_endpoint__"
IMMEDIATE = "__wherry_immediate__"
# Bounds of a decoded body: a body is under 1 MiB, so no text or bytes can be longer.
_LIMIT = 1 << 20
# How many lists and maps, and entries in one of them, a body may have.
CONTAINERS_MAX = 1 << 16
# A reply from here on is of many records.
LARGE = 32 << 10
# How deep lists and maps may be nested in a request: an OCI specification needs 8.
DEPTH_MAX = 64
# The bytes that begin no list or map in msgpack: where few others are, nothing can be nested deep.
_WITHIN = bytes([*range(0x80), *range(0xA0, 0xDC), *range(0xE0, 0x100)])

OWNERS: dict[str, str] = {}
"""The contracts that are known here by their services, and whose processes serve them."""


def endpoint(
    *errors: type[WherryError], mutates: bool = False, waits: bool = False, timeout: float = 10.0
) -> Callable[[F], F]:
    """Declare a contract's method as an operation on the wire.

    errors: the classes a caller has to expect, besides InvalidArgument, Unavailable and DeadlineExceeded.
    mutates: the call carries an idempotency key, and the same key has one effect and one answer.
    waits: the call mostly sleeps (it does not count against the service's bound of running requests).
    timeout: seconds until the deadline where the caller sets none.
    """

    def mark(function: F) -> F:
        setattr(function, _DECLARED, (errors, mutates, waits, timeout))
        return function

    return mark


def immediate(method: F) -> F:
    """Say of a service's operation that it never waits: it is answered where it is read, without a task or a timer.

    It may be awaited like any other; one that waits all the same is answered as Internal.
    """
    setattr(method, IMMEDIATE, True)
    return method


class Encoded(bytes):
    """A reply as it travels: what a store keeps encoded is not decoded only to be encoded again."""

    __slots__ = ()


class _Packer(threading.local):
    """One a thread: making one for each document takes longer than the packing."""

    def __init__(self) -> None:
        self.pack: Callable[[Any], bytes] = msgpack.Packer(datetime=True).pack


_packer = _Packer()
_NONE = b"\xc0"


def pack(value: Any) -> bytes:
    """msgpack, with aware datetimes as its timestamp extension."""
    return _packer.pack(value)


def unpack(data: bytes, *, bounded: bool = True, entries: int = 0) -> Any:
    """The value of one msgpack document.

    DataLoss when it is malformed, nested too deep or of foreign types, and, unless its sender is trusted (`bounded`
    is False), of more than 65536 lists and maps: each of them takes a hundred times its byte in memory.
    entries: of how many lists and maps and things in them it may be instead; it may be longer than a body then.
    """
    hook = _Counter(entries) if entries or (bounded and len(data) > CONTAINERS_MAX) else None
    longest, most = (len(data), entries) if entries else (_LIMIT, CONTAINERS_MAX)
    try:
        return msgpack.unpackb(
            data, timestamp=3, strict_map_key=True, ext_hook=_no_extension, max_str_len=longest, max_bin_len=longest,
            max_array_len=most, max_map_len=most, max_ext_len=16, list_hook=hook, object_hook=hook,
        )  # fmt: skip
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as e:
        reason = str(e) if type(e) is ValueError else type(e).__name__  # one of a bound has it in its words
        raise DataLoss(f"message body is not a valid msgpack document: {reason[:200]}") from None


def pack_page(documents: Sequence[bytes], next: str) -> Encoded:
    """A `values.Page` of items that are encoded already."""
    packer = msgpack.Packer()
    head = packer.pack_map_header(2) + packer.pack("items") + packer.pack_array_header(len(documents))
    return Encoded(head + b"".join(documents) + packer.pack("next") + packer.pack(next))


def without(document: bytes, field: str) -> bytes:
    """An encoded map whose `field`, if it has it, is nothing (None). What is in it is not decoded. DataLoss."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(document))
    unpacker.feed(document)
    with suppress(ValueError, TypeError, msgpack.UnpackException):
        for _ in range(unpacker.read_map_header()):
            found, at = unpacker.unpack() == field, unpacker.tell()
            unpacker.skip()
            if found:
                return document[:at] + _NONE + document[unpacker.tell() :]
        return document
    raise DataLoss("a stored record is no map")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Make thousands of records without a search for cycles among them, neither every few nor at the end: all of them
    are kept, and count as old at once."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not _holds_frozen():
                gc.freeze()  # these two only move lists
                gc.unfreeze()
            gc.enable()


@lru_cache(maxsize=1)
def _holds_frozen() -> bool:
    """Whether this process has frozen what it shares with others, as services have: that is to stay so."""
    return gc.get_freeze_count() > 0


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


class _Counter:
    """Counts the lists and maps of one document while it is decoded; with `entries` what is in them, too."""

    def __init__(self, entries: int = 0) -> None:
        self._left = entries or CONTAINERS_MAX
        self._all = entries > 0

    def __call__(self, value: Any) -> Any:
        self._left -= 1 + (len(value) if self._all else 0)
        if self._left < 0:
            raise ValueError("too many lists and maps")
        return value


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and maps are nested in each other more than `levels` times."""
    while isinstance(value, list | dict):
        children = [v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, list | dict)]
        if levels == 0:
            return True
        levels -= 1
        if len(children) != 1:
            return any(deeper_than(child, levels) for child in children)
        value = children[0]
    return False


class _Request(Model):
    model_config = ConfigDict(allow_inf_nan=False)


class Endpoint:
    """One operation of a contract: its name, bounds and errors, and the codecs of its request and reply."""

    def __init__(self, contract: type[Any], function: Callable[..., Any]) -> None:
        errors, mutates, waits, timeout = getattr(function, _DECLARED)
        self.contract = contract
        self.function = function
        self.name: str = function.__name__
        self.errors: tuple[type[WherryError], ...] = errors
        self.mutates: bool = mutates
        self.waits: bool = waits
        self.timeout: float = timeout
        self.doc = inspect.cleandoc(function.__doc__ or "")

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.function, include_extras=True)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.function).parameters)[1:]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.parameters)

    @cached_property
    def request(self) -> type[BaseModel]:
        """The request as a pydantic model: one field a parameter."""
        fields: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(self.function).parameters.items())[1:]:
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (self._hints[name], default)
        return create_model(f"{self.contract.__name__}_{self.name}", __base__=_Request, **fields)

    @cached_property
    def schema(self) -> str:
        """The request's JSON schema, for discovery."""
        return json.dumps(self.request.model_json_schema(), separators=(",", ":"))

    @cached_property
    def reply(self) -> TypeAdapter[Any]:
        return TypeAdapter(self._hints["return"])

    @cached_property
    def _opaque(self) -> bool:
        return self._hints["return"] is bytes

    def build(self) -> None:
        """Build the codecs now, and not at the first call."""
        for adapter in (self._request, self.reply):
            adapter.rebuild()
        assert self._names is not None and self._opaque is not None  # noqa: S101

    # The codecs below use the adapters' validator and serializer without the layers above them: half of their time.

    @cached_property
    def _request(self) -> TypeAdapter[BaseModel]:
        return TypeAdapter(self.request)

    def encode_request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """The request's body. InvalidArgument when an argument does not validate: nothing is sent then.

        TypeError for arguments that the operation does not have, as of any function.
        """
        arguments = dict(zip(self.parameters, args, strict=False))
        if kwargs:
            arguments.update(kwargs)
        if len(arguments) != len(args) + len(kwargs) or (kwargs and not kwargs.keys() <= self._names):
            inspect.signature(self.function).bind(None, *args, **kwargs)  # says what is wrong
        try:
            model = self._request.validator.validate_python(arguments)
            return pack(self._request.serializer.to_python(model, exclude_defaults=True))
        except ValidationError as e:
            raise InvalidArgument(f"{self.contract.service}.{self.name}: {explain(e)}") from None
        except (TypeError, ValueError, OverflowError) as e:  # in a field of any type: what msgpack cannot carry
            raise InvalidArgument(f"{self.contract.service}.{self.name}: an argument cannot be sent: {e}") from None

    def decode_request(self, data: bytes) -> dict[str, Any]:
        """The arguments of a request. InvalidArgument when they do not validate."""
        try:
            body = unpack(data) if data else {}
            if not isinstance(body, dict):
                raise InvalidArgument(f"{self.contract.service}.{self.name}: the body is not a map")
            if len(data.translate(None, _WITHIN)) > DEPTH_MAX and deeper_than(body, DEPTH_MAX):
                raise InvalidArgument(f"{self.contract.service}.{self.name}: nested deeper than {DEPTH_MAX} levels")
            arguments: dict[str, Any] = self._request.validator.validate_python(body).__dict__
            return arguments
        except ValidationError as e:
            raise InvalidArgument(f"{self.contract.service}.{self.name}: {explain(e)}") from None
        except (DataLoss, TypeError) as e:
            raise InvalidArgument(f"{self.contract.service}.{self.name}: {e}") from None

    def encode_reply(self, value: Any) -> bytes:
        if self._opaque or type(value) is Encoded:
            return value  # type: ignore[no-any-return]
        return pack(self.reply.serializer.to_python(value))

    def following(self, data: bytes) -> str:
        """What continues the walk whose page this reply is; "" behind its last. DataLoss when it is no page."""
        unpacker = msgpack.Unpacker(max_buffer_size=len(data))
        unpacker.feed(data)
        with suppress(ValueError, TypeError, msgpack.UnpackException):
            for _ in range(unpacker.read_map_header()):
                if unpacker.unpack() != "next":
                    unpacker.skip()  # the items, which take a hundred times longer to decode
                elif isinstance(following := unpacker.unpack(), str):
                    return following
        raise DataLoss(f"reply of {self.contract.service}.{self.name}: it is no page")

    def decode_reply(self, data: bytes) -> Any:
        """The reply's value. DataLoss when the service sent what its contract does not promise."""
        if self._opaque:
            return data
        try:
            if len(data) < LARGE:
                return self.reply.validator.validate_python(unpack(data, bounded=False))
            with _no_collection():
                return self.reply.validator.validate_python(unpack(data, bounded=False))
        except ValidationError as e:
            raise DataLoss(f"reply of {self.contract.service}.{self.name}: {explain(e)}") from None


class Contract(Protocol):
    """Base of all contracts. `service` and `version` come from the class statement, `endpoints` from the methods.

    namespaced: False for contracts that belong to no namespace (`_` stands in their subjects), None for either.
    owner: the service whose process serves it: itself, unless it is a second contract of that one.
    events: what its service publishes: each topic with the fields of its event.
    """

    service: ClassVar[str] = ""
    version: ClassVar[str] = ""
    owner: ClassVar[str] = ""
    namespaced: ClassVar[bool | None] = True
    endpoints: ClassVar[dict[str, Endpoint]] = {}
    events: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(
        cls, *, service: str = "", version: str = "", namespaced: bool | None = True,
        events: Mapping[str, str] | None = None, owner: str = "", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init_subclass__(**kwargs)
        if not service:
            return
        cls.service, cls.version, cls.namespaced = service, version, namespaced
        cls.owner = OWNERS[service] = owner or service
        cls.events = events or {}
        declared = {n: f for base in reversed(cls.__mro__) for n, f in vars(base).items() if hasattr(f, _DECLARED)}
        cls.endpoints = {name: Endpoint(cls, function) for name, function in declared.items()}

"""What is measured, done with containerd: its gRPC API through the thin client, its bytes and pulls through `ctr`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import spec
from .driver import MeasureError
from .grpc import Connection, Stream, wait_all
from .protobuf import decode, encode, entries, integer, nested, scan, text

_API = "containerd.services"
IMAGES, CONTAINERS = f"{_API}.images.v1.Images", f"{_API}.containers.v1.Containers"
TASKS, SNAPSHOTS = f"{_API}.tasks.v1.Tasks", f"{_API}.snapshots.v1.Snapshots"
EVENTS, CONTENT = f"{_API}.events.v1.Events", f"{_API}.content.v1.Content"
_OCI = "types.containerd.io/opencontainers/runtime-spec/1"
_SNAPSHOTTER = "overlayfs"
_RUNTIME = "io.containerd.runc.v2"
# No lease holds these snapshots between two calls; Wherry's side says the same.
KEEP = {"containerd.io/gc.root": "1"}


def _any(kind: str, value: dict[str, Any]) -> dict[int, Any]:
    return {1: f"{_OCI}/{kind}", 2: json.dumps(value).encode()}


class Container:
    """One container and its snapshot, step by step."""

    def __init__(self, connection: Connection, id: str, image: str, top: str, cgroup: str) -> None:
        self._connection = connection
        self._image, self._top, self._cgroup = image, top, cgroup
        self.id = id
        self._end: Any = None

    def create(self, args: Sequence[str]) -> None:
        call = self._connection.call
        made = call(f"{SNAPSHOTS}/Prepare", encode({1: _SNAPSHOTTER, 2: self.id, 3: self._top, 4: entries(KEEP)}))
        mounts = [decode(mount) for mount in nested(decode(made), 1)]
        container = {
            1: self.id, 3: self._image, 4: {1: _RUNTIME}, 5: _any("Spec", spec.make(self._cgroup, args)),
            6: _SNAPSHOTTER, 7: self.id,
        }  # fmt: skip
        call(f"{CONTAINERS}/Create", encode({1: container}))
        call(f"{TASKS}/Create", encode({1: self.id, 3: mounts}))

    def start(self) -> None:
        self._end = self._connection.start(f"{TASKS}/Wait", encode({1: self.id}))
        self._connection.call(f"{TASKS}/Start", encode({1: self.id}))

    def kill(self) -> None:
        self._connection.call(f"{TASKS}/Kill", encode({1: self.id, 3: 9}))

    def wait(self) -> int:
        return integer(decode(self._connection.answer(self._end)), 1)

    def delete(self) -> None:
        call = self._connection.call
        call(f"{TASKS}/Delete", encode({1: self.id}))
        call(f"{CONTAINERS}/Delete", encode({1: self.id}))
        call(f"{SNAPSHOTS}/Remove", encode({1: _SNAPSHOTTER, 2: self.id}))

    def exec(self, name: str, args: Sequence[str]) -> int:
        """Run a process in it to its end; answers its exit code."""
        call = self._connection.call
        call(f"{TASKS}/Exec", encode({1: self.id, 6: _any("Process", spec.process(args)), 7: name}))
        end = self._connection.start(f"{TASKS}/Wait", encode({1: self.id, 2: name}))
        call(f"{TASKS}/Start", encode({1: self.id, 2: name}))
        status = integer(decode(self._connection.answer(end)), 1)
        call(f"{TASKS}/DeleteProcess", encode({1: self.id, 2: name}))
        return status


class ContainerdClient:
    """The methods that bench.driver calls; times in seconds unless told otherwise."""

    def __init__(self, settings: dict[str, str]) -> None:
        self._socket, self._namespace = settings["socket"], settings["namespace"]
        self._cgroup = settings["container_cgroup"]
        self._connection = self._connect()
        self._busy: Container | None = None
        self._many: list[Container] = []
        self._serial = 0

    def _connect(self) -> Connection:
        return Connection(self._socket, self._namespace)

    def close(self) -> None:
        self._connection.close()

    def ping(self) -> None:
        self._connection.call("containerd.services.version.v1.Version/Version")

    def _ctr(self, *arguments: str, stdin: Any = subprocess.DEVNULL) -> float:
        """How long `ctr` with these arguments took."""
        named = {"CONTAINERD_ADDRESS": self._socket, "CONTAINERD_NAMESPACE": self._namespace}
        began = time.perf_counter()
        done = subprocess.run(
            ["ctr", *arguments], env={**os.environ, **named}, stdin=stdin, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        took = time.perf_counter() - began
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing said"]
            raise MeasureError(f"ctr {' '.join(arguments[:2])}: {said[-1]}")
        return took

    # ---- images

    def pull(self, reference: str) -> float:
        return self._ctr("images", "pull", "--plain-http", reference)

    def has_snapshot(self, chain_id: str) -> bool:
        self._connection.call(f"{SNAPSHOTS}/Stat", encode({1: _SNAPSHOTTER, 2: chain_id}))
        return True

    def _image(self, name: str) -> dict[int, Any]:
        target = {1: "application/vnd.oci.image.manifest.v1+json", 2: f"sha256:{'0' * 64}", 3: 1234}
        return {1: name, 3: target}

    def create_image(self, name: str) -> None:
        self._connection.call(f"{IMAGES}/Create", encode({1: self._image(name)}))

    def request_times(self, name: str, count: int) -> list[float]:
        """One caller: the time of each `get`."""
        call, body, method = self._connection.call, encode({1: name}), f"{IMAGES}/Get"
        times = []
        for _ in range(count):
            began = time.perf_counter()
            _image_of(call(method, body))
            times.append(time.perf_counter() - began)
        return times

    def request_rate(self, name: str, count: int, callers: int) -> float:
        """`get`s per second."""
        requests = [(f"{IMAGES}/Get", encode({1: name}))] * count
        began = time.perf_counter()
        self._connection.flood(callers, requests, _image_of)
        return count / (time.perf_counter() - began)

    def create_delete_rate(self, count: int, callers: int) -> float:
        """Creates and deletes per second, each caller deleting what it created."""
        self._serial += 1
        names = [f"r{self._serial}/n{number}" for number in range(count)]
        per_caller = [names[first::callers] for first in range(callers)]
        began = time.perf_counter()
        self._chains([
            [(f"{IMAGES}/{verb}", encode({1: self._image(name) if verb == "Create" else name}))
             for name in own for verb in ("Create", "Delete")]
            for own in per_caller
        ])  # fmt: skip
        return 2 * count / (time.perf_counter() - began)

    def _chains(self, chains: Sequence[Sequence[tuple[str, bytes]]]) -> None:
        """Each chain in its order, all of them side by side."""
        connection = self._connection
        waiting = [iter(chain) for chain in chains]
        underway = {index: connection.start(*next(chain)) for index, chain in enumerate(waiting)}
        while underway:
            connection.receive()
            for index, stream in list(underway.items()):
                if not stream.ended:
                    continue
                if not stream.messages:
                    raise stream.error()
                request = next(waiting[index], None)
                if request is None:
                    del underway[index]
                else:
                    underway[index] = connection.start(*request)

    def fill(self, count: int, callers: int) -> None:
        names = [f"list/image-{number:05}" for number in range(count)]
        self._connection.flood(callers, [(f"{IMAGES}/Create", encode({1: self._image(n)})) for n in names])

    def list_time(self, at_least: int) -> float:
        """All images, their names taken out of the answer."""
        began = time.perf_counter()
        answer = self._connection.call(f"{IMAGES}/List")
        names = [next(scan(image))[1] for _, image in scan(answer) if isinstance(image, bytes)]
        took = time.perf_counter() - began
        if len(names) < at_least:
            raise MeasureError(f"{len(names)} images were listed")
        return took

    # ---- containers

    def _container(self, image: str, top: str, connection: Connection | None = None) -> Container:
        self._serial += 1
        id = f"bench-{self._serial}"
        return Container(connection or self._connection, id, image, top, f"{self._cgroup}/{id}")

    def life_time(self, image: str, top: str, runtime: str) -> float:
        """Snapshot, container and task made, started, waited for and deleted. The runtime is always runc."""
        container = self._container(image, top)
        began = time.perf_counter()
        container.create(["true"])
        container.start()
        status = container.wait()
        container.delete()
        took = time.perf_counter() - began
        if status:
            raise MeasureError(f"`true` ended with status {status}")
        return took

    def run_busy(self, image: str, top: str, runtime: str) -> None:
        """A container that execs go into."""
        self._busy = self._container(image, top)
        self._busy.create(["sleep", "1000000"])
        self._busy.start()

    def exec_time(self) -> float:
        assert self._busy is not None
        self._serial += 1
        began = time.perf_counter()
        status = self._busy.exec(f"exec-{self._serial}", ["true"])
        took = time.perf_counter() - began
        if status:
            raise MeasureError(f"`true` ended with status {status}")
        return took

    def end_busy(self) -> None:
        assert self._busy is not None
        self._busy.kill()
        self._busy.wait()
        self._busy.delete()

    def start_many(self, image: str, top: str, runtime: str, count: int, callers: int) -> float:
        """Containers that sleep, made and started by so many callers at once."""
        self._many = [self._container(image, top, self._connect()) for _ in range(count)]

        def up(container: Container) -> None:
            container.create(["sleep", "1000000"])
            container.start()

        return _side_by_side(up, self._many, callers)

    def stop_many(self, callers: int) -> float:
        """All of them killed, waited for and deleted."""

        def down(container: Container) -> None:
            container.kill()
            container.wait()
            container.delete()
            container._connection.close()

        return _side_by_side(down, self._many, callers)

    # ---- events

    def event_times(self, subscribers: int, count: int) -> list[float]:
        """From the publish call until the last subscriber has it, for one event after the other."""
        connections = [self._connect() for _ in range(subscribers)]
        streams = [connection.start(f"{EVENTS}/Subscribe", b"") for connection in connections]
        everyone = [self._connection, *connections]
        self._await_subscriptions(everyone, streams)
        times = []
        for number in range(count):
            began = time.perf_counter()
            published = self._publish(number)
            got = [0] * subscribers

            def done(got: list[int] = got, number: int = number) -> bool:
                for index, stream in enumerate(streams):
                    got[index] += sum(_number_of(envelope) == number for envelope in stream.take())
                return all(got)

            wait_all(everyone, done)
            times.append(time.perf_counter() - began)
            self._connection.answer(published)
        for connection in connections:
            connection.close()
        return times

    def event_rate(self, subscribers: int, count: int, callers: int) -> float:
        """Deliveries per second, with so many publish calls under way at once."""
        connections = [self._connect() for _ in range(subscribers)]
        streams = [connection.start(f"{EVENTS}/Subscribe", b"") for connection in connections]
        everyone = [self._connection, *connections]
        self._await_subscriptions(everyone, streams)
        sent, got = 0, 0
        underway: list[Stream] = []

        def done() -> bool:
            nonlocal sent, underway, got
            underway = [stream for stream in underway if not stream.ended]
            while sent < count and len(underway) < callers:
                underway.append(self._publish(sent))
                sent += 1
            got += sum(_number_of(envelope) >= 0 for stream in streams for envelope in stream.take())
            return got >= count * subscribers

        began = time.perf_counter()
        wait_all(everyone, done)
        took = time.perf_counter() - began
        for connection in connections:
            connection.close()
        for stream in underway:
            self._connection.finish(stream)
        return count * subscribers / took

    def _await_subscriptions(self, everyone: Sequence[Connection], streams: Sequence[Any]) -> None:
        """Subscribing is answered by nothing: publish until each subscriber has heard of it."""
        heard: set[int] = set()

        def done() -> bool:
            heard.update(index for index, stream in enumerate(streams) if stream.take())
            return len(heard) == len(streams)

        while not done():
            self._connection.answer(self._publish(-1))
            with contextlib.suppress(TimeoutError):
                wait_all(everyone, done, 0.1)

    def _publish(self, number: int) -> Any:
        event = {1: "containerd.events.ImageCreate", 2: encode({1: f"bench-{number}", 2: entries(EVENT_LABELS)})}
        return self._connection.start(f"{EVENTS}/Publish", encode({1: "/bench/event", 2: event}))

    # ---- content

    def ingest_time(self, path: str, size: int, digest: str) -> float:
        with open(path, "rb") as source:
            return self._ctr(
                "content", "ingest", "--expected-size", str(size), "--expected-digest", digest, digest[7:23],
                stdin=source,
            )  # fmt: skip

    def read_time(self, size: int, digest: str) -> float:
        """The faster of what there is: the API's stream of 1 MiB messages (`ctr content get` asks per 32 KiB)."""
        began = time.perf_counter()
        got = 0
        with self._connect() as connection:
            for message in connection.read(f"{CONTENT}/Read", encode({1: digest})):
                got += len(message)
        took = time.perf_counter() - began
        if got < size:
            raise MeasureError(f"{got} of {size} bytes were read")
        return took

    def write_time(self, path: str, size: int, digest: str) -> float:
        """The API's Write stream, in messages of 1 MiB, none of which waits for the answer to the one before."""
        began = time.perf_counter()
        ref = f"bench-{digest[7:23]}"
        with open(path, "rb") as source, self._connect() as connection:
            stream = connection.open(f"{CONTENT}/Write")
            connection.send(stream, encode({1: _STAT, 2: ref, 3: size, 4: digest}))
            offset = 0
            while data := source.read(1 << 20):
                connection.send(stream, encode({1: _WRITE, 2: ref, 5: offset, 6: data}))
                offset += len(data)
            stream.take()
            connection.send(stream, encode({1: _COMMIT, 2: ref, 3: size, 4: digest, 5: offset, 7: entries(KEEP)}))
            connection.finish(stream)
        took = time.perf_counter() - began
        if digest.encode() not in b"".join(stream.take()):
            raise stream.error()
        return took

    def read_bus_rate(self, readers: int, size: int, digest: str) -> float:
        """Bytes per second of the API's stream, by so many readers with a connection each."""
        connections = [self._connect() for _ in range(readers)]
        got = 0
        began = time.perf_counter()
        streams = [connection.start(f"{CONTENT}/Read", encode({1: digest})) for connection in connections]

        def done() -> bool:
            nonlocal got
            got += sum(len(message) for stream in streams for message in stream.take())
            return all(stream.ended for stream in streams)

        wait_all(connections, done)
        took = time.perf_counter() - began
        for connection in connections:
            connection.close()
        if got < readers * size:
            raise MeasureError(f"{got} of {readers * size} bytes were read")
        return readers * size / took


_STAT, _WRITE, _COMMIT = 0, 1, 2  # containerd.services.content.v1.WriteAction


# An event of about 400 bytes, as a container's creation is.
EVENT_LABELS = {f"org.example.bench.label-{number}": "x" * 40 for number in range(5)}


def _image_of(answer: bytes) -> dict[str, Any]:
    """The image in an answer, decoded as any client does before it has one."""
    image = decode(nested(decode(answer), 1)[0])
    target = decode(nested(image, 3)[0])
    labels = [decode(entry) for entry in nested(image, 2)]
    times = [decode(stamp) for field in (7, 8) for stamp in nested(image, field)]
    return {
        "name": text(image, 1), "labels": {text(label, 1): text(label, 2) for label in labels},
        "target": (text(target, 1), text(target, 2), integer(target, 3)),
        "times": [integer(stamp, 1) + integer(stamp, 2) / 1e9 for stamp in times],
    }  # fmt: skip


def _number_of(envelope: bytes) -> int:
    """Which event it is: its envelope and its payload decoded, as every subscriber does; -1 for another's."""
    found = decode(envelope)
    if text(found, 3) != "/bench/event":
        return -1
    payload = nested(decode(nested(found, 4)[0]), 2)[0]
    return int(text(decode(payload), 1).removeprefix("bench-"))


def _side_by_side(work: Callable[[Container], None], containers: Sequence[Container], callers: int) -> float:
    """Each container by one of `callers` threads; how long all of it took."""
    waiting = iter(containers)
    lock = threading.Lock()
    errors: list[Exception] = []

    def caller() -> None:
        while not errors:
            with lock:
                container = next(waiting, None)
            if container is None:
                return
            try:
                work(container)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if errors:
        raise errors[0]
    return took

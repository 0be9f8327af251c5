"""What is put on leases side by side travels together, and nobody pays for what another one asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from housebus import PATIENCE
from wherry_shared import context
from wherry_shared.api.lease import Leases, Resource
from wherry_shared.errors import InvalidArgument, NotFound, Unavailable, Unimplemented
from wherry_shared.keeping import GROUP_MAX, Keeper


class Counted(Leases):
    """Leases of one id, with what they were asked: (namespace, lease, ids, deadline, whether together)."""

    def __init__(self, *, together: bool = True) -> None:
        self.together = together
        self.asked: list[tuple[str, str, list[str], float, bool]] = []
        self.kept: set[str] = set()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.failure: BaseException | None = None

    async def add_resource(self, id: str, resource: Resource) -> None:
        await self._add(id, [resource], together=False)

    async def add_resources(self, id: str, resources: Sequence[Resource]) -> None:
        if not self.together:
            raise Unimplemented("lease 1.0.0 has no operation 'add_resources'")
        await self._add(id, resources, together=True)

    async def _add(self, id: str, resources: Sequence[Resource], *, together: bool) -> None:
        now, ids = context.current(), [resource.id for resource in resources]
        assert (now.key, now.call_key) == ("", "") or not together
        self.asked.append((now.namespace, id, ids, now.deadline, together))
        await self.go_on.wait()
        if self.failure is not None:
            raise self.failure
        if id == "gone":
            raise NotFound("lease 'gone': not found")
        if "" in ids:
            raise InvalidArgument("a resource of type 'images' has an empty id")
        self.kept |= set(ids)


def image(name: str) -> Resource:
    return Resource(type="images", id=name)


async def keep(keeper: Keeper, *names: str, lease: str = "l", namespace: str = "default", key: str = "k") -> None:
    with context.use(namespace=namespace, lease=lease, key=key):
        await keeper.keep(*map(image, names))


async def test_those_who_come_together_ask_once() -> None:
    leases = Counted()
    keeper = Keeper(leases)
    await asyncio.gather(*(keep(keeper, f"{n}a", f"{n}b") for n in range(4)))
    assert [ids for _, _, ids, _, _ in leases.asked] == [[f"{n}{x}" for n in range(4) for x in "ab"]]
    await keep(keeper, "alone")
    assert leases.asked[-1][2] == ["alone"]
    assert not keeper._tasks and not keeper._groups


async def test_who_comes_while_one_is_asked_goes_with_the_next() -> None:
    leases = Counted()
    keeper = Keeper(leases)
    leases.go_on.clear()
    early = asyncio.create_task(keep(keeper, "early"))
    while not leases.asked:
        await asyncio.sleep(0)
    late = [asyncio.create_task(keep(keeper, f"{n}")) for n in range(3)]
    await asyncio.sleep(0.01)
    assert not early.done() and len(leases.asked) == 1
    leases.go_on.set()
    await asyncio.gather(early, *late)
    assert [ids for _, _, ids, _, _ in leases.asked] == [["early"], ["0", "1", "2"]]


async def test_nobody_is_answered_before_it_is_kept() -> None:
    leases = Counted()
    keeper = Keeper(leases)

    async def one(name: str) -> None:
        await keep(keeper, name)
        assert name in leases.kept

    await asyncio.gather(*(one(str(n)) for n in range(3 * GROUP_MAX)))
    assert max(len(ids) for _, _, ids, _, _ in leases.asked) == GROUP_MAX


async def test_leases_and_namespaces_are_not_mixed() -> None:
    leases = Counted()
    keeper = Keeper(leases)
    await asyncio.gather(
        keep(keeper, "1"), keep(keeper, "2", lease="m"), keep(keeper, "3", namespace="other"), keep(keeper, "4")
    )
    assert [asked[:3] for asked in leases.asked] == [
        ("default", "l", ["1", "4"]), ("default", "m", ["2"]), ("other", "l", ["3"])
    ]  # fmt: skip


async def test_without_a_lease_nobody_is_asked() -> None:
    leases = Counted()
    await keep(Keeper(leases), "x", lease="")
    assert leases.asked == []


async def test_one_that_is_refused_harms_no_other() -> None:
    leases = Counted()
    keeper = Keeper(leases)
    done = await asyncio.gather(*(keep(keeper, name) for name in ("a", "", "b")), return_exceptions=True)
    assert [type(each) for each in done] == [type(None), InvalidArgument, type(None)]
    assert leases.kept == {"a", "b"}


async def test_a_service_that_does_not_know_it_yet_is_asked_one_by_one() -> None:
    leases = Counted(together=False)
    keeper = Keeper(leases)
    await asyncio.gather(keep(keeper, "a", "b"), keep(keeper, "c"))
    assert leases.kept == {"a", "b", "c"}
    leases.together = True
    await keep(keeper, "d")
    assert leases.asked[-1][4]


async def test_a_lease_that_is_gone_is_told_to_all() -> None:
    keeper = Keeper(Counted())
    done = await asyncio.gather(*(keep(keeper, n, lease="gone") for n in "ab"), return_exceptions=True)
    assert [type(each) for each in done] == [NotFound, NotFound]
    assert done[0] is not done[1]


async def test_the_latest_deadline_counts_and_who_gives_up_stops_nobody() -> None:
    leases = Counted()
    keeper = Keeper(leases)
    leases.go_on.clear()

    async def by(deadline: float, name: str) -> None:
        context.enter(context.Context(namespace="default", lease="l", deadline=deadline))
        await keeper.keep(image(name))

    soon, later = time.time() + PATIENCE, time.time() + 2 * PATIENCE
    tasks = [asyncio.create_task(by(at, str(at))) for at in (soon, later)]
    while not leases.asked:
        await asyncio.sleep(0)
    tasks[0].cancel()
    tasks.append(asyncio.create_task(by(0.0, "whenever")))
    tasks.append(asyncio.create_task(by(later, "later")))
    await asyncio.sleep(0)
    leases.go_on.set()
    await asyncio.wait(tasks)
    assert tasks[0].cancelled() and not any(task.cancelled() or task.exception() for task in tasks[1:])
    assert [deadline for _, _, _, deadline, _ in leases.asked] == [later, 0.0]


async def test_a_bug_leaves_nobody_waiting() -> None:
    leases = Counted()
    keeper = Keeper(leases)
    leases.failure = RuntimeError("a bug")
    async with asyncio.timeout(PATIENCE):
        done = await asyncio.gather(keep(keeper, "a"), keep(keeper, "b"), return_exceptions=True)
        assert [type(each) for each in done] == [Unavailable, Unavailable]
        leases.failure = None
        await keep(keeper, "c")
    assert leases.kept == {"c"}

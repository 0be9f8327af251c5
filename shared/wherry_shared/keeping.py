"""What a service puts on its callers' leases before anyone can see it: what comes together travels together."""

from __future__ import annotations

import asyncio

from . import context
from .api.lease import Leases, Resource
from .errors import InvalidArgument, Unavailable, Unimplemented, WherryError

GROUP_MAX = 128
"""Resources in one request; those of the one that is the last to fit are not parted."""
_Name = tuple[str, str]


class _Group:
    """What waits to be put on one lease, and who waits. Futures: whether it was done."""

    def __init__(self) -> None:
        self.resources: list[Resource] = []
        self.waiting: list[asyncio.Future[bool]] = []
        self.deadlines: list[float] = []

    def deadline(self) -> float:
        """The latest of those who wait; 0 if one has none."""
        return max(self.deadlines) if all(self.deadlines) else 0.0

    def settle(self, done: bool = True, error: WherryError | None = None) -> None:
        for future in self.waiting:
            if future.done():
                continue
            if error is None:
                future.set_result(done)
            else:
                future.set_exception(type(error)(error.message))


class Keeper:
    """Puts resources on the lease of the request in hand: one request a lease is under way, and others gather."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._groups: dict[_Name, list[_Group]] = {}
        self._tasks: dict[_Name, asyncio.Task[None]] = {}

    async def keep(self, *resources: Resource) -> None:
        """Back when the caller's lease, if there is one, keeps them. NotFound: there is no such lease.

        Whoever gives up waiting may leave them on it.
        """
        now = context.current()
        if not now.lease:
            return
        loop = asyncio.get_running_loop()
        name, future = (now.namespace, now.lease), loop.create_future()
        group = self._group(name)
        group.resources += resources
        group.deadlines.append(now.deadline)
        group.waiting.append(future)
        if name not in self._tasks:
            # It begins after all that is ready now: what one read of a socket has brought goes along.
            self._tasks[name] = loop.create_task(self._ask(name))
        if not await future:
            for resource in resources:
                with context.use(key=""):  # the request's own key names its own effect
                    await self._leases.add_resource(now.lease, resource)

    def _group(self, name: _Name) -> _Group:
        groups = self._groups.setdefault(name, [])
        if not groups or len(groups[-1].resources) >= GROUP_MAX:
            groups.append(_Group())
        return groups[-1]

    async def _ask(self, name: _Name) -> None:
        try:
            while groups := self._groups[name]:
                await self._add(name, groups.pop(0))
        finally:
            del self._tasks[name]
            for group in self._groups.pop(name):
                group.settle(error=Unavailable("the service is stopping"))

    async def _add(self, name: _Name, group: _Group) -> None:
        """For all of a group. They ask one by one where one of them may be the reason, or the service is older."""
        namespace, lease = name
        context.enter(context.Context(namespace=namespace, lease=lease, deadline=group.deadline()))
        try:
            await self._leases.add_resources(lease, group.resources)
        except (InvalidArgument, Unimplemented):
            group.settle(done=False)
        except WherryError as e:
            group.settle(error=e)
        except BaseException:
            group.settle(error=Unavailable(f"lease {lease!r}: what is to be kept was not put on it"))
            raise
        else:
            group.settle()

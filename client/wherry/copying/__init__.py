"""Files into and out of containers, as tar streams: `cp` on the node itself.

The container's root is one descriptor (roots.py) and every path is resolved below it by the kernel (openat2), so a
link in the container, also one that is swapped meanwhile, leads nowhere else (CVE-2018-15664). Nothing of the
container is ever run or loaded (CVE-2019-14271).
"""

from __future__ import annotations

import asyncio
import os
import posixpath
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from wherry_shared.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, WherryError

from .packing import pack
from .roots import Tree, container_root
from .unpacking import Rules, unpack

if TYPE_CHECKING:
    from ..container import Container


@dataclass(frozen=True)
class Wish:
    """keep_owner: uid and gid go with the files; else they are root's in a container, and the caller's outside.
    follow: a link that is named is copied as what it leads to."""

    keep_owner: bool = False
    follow: bool = False


async def copy_out(container: Container, source: str, target: str | BinaryIO, wish: Wish = Wish()) -> list[str]:
    """Copy a path of a container to one of this host, or as a tar to a stream; answers what was left out (devices).

    Unimplemented: from afar. NotFound, FailedPrecondition: a path, as cp(1) says.
    """
    async with _rooted(container, writable=False) as inside:
        if not isinstance(target, str):
            return await asyncio.to_thread(_pack_to, inside, source, posixpath.basename(_plain(source)), target, wish)
        owner = None if wish.keep_owner else (os.geteuid(), os.getegid())
        rules = Rules(owner=owner, set_id=wish.keep_owner)
        with Tree.of_host() as outside:
            return await asyncio.to_thread(
                _through, inside, source, outside, os.path.abspath(target) + _end(target), wish, rules
            )


async def copy_in(container: Container, source: str | BinaryIO, target: str, wish: Wish = Wish()) -> list[str]:
    """Copy a path of this host, or the tar of a stream, to a path of a container; the errors of `copy_out`, and
    Unimplemented for one with mapped ids that does not run."""
    async with _rooted(container, writable=True) as inside:
        rules = Rules(owner=None if wish.keep_owner else (0, 0), set_id=True, ids=inside.ids)
        if not isinstance(source, str):
            return await asyncio.to_thread(_unpack_at, inside, target, source, rules)
        with Tree.of_host() as outside:
            return await asyncio.to_thread(
                _through, outside, os.path.abspath(source) + _end(source), inside, target, wish, rules
            )


@asynccontextmanager
async def _rooted(container: Container, *, writable: bool) -> AsyncIterator[Tree]:
    try:
        tree = await container_root(container, writable=writable)
        with tree:
            yield tree
    except PermissionError as e:
        raise PermissionDenied(f"container {container.id}: {e.strerror}: its files are its node's root's") from None
    except FileNotFoundError as e:
        raise NotFound(f"{e.filename or container.id}: {e.strerror}") from None
    except OSError as e:
        raise FailedPrecondition(f"{e.filename or container.id}: {e.strerror}") from None


def _plain(path: str) -> str:
    return path.rstrip("/") if not path.endswith("/.") else path[:-2].rstrip("/")


def _end(path: str) -> str:
    """`/.` and `/` at a path's end mean something, and normalizing takes them away."""
    return "/." if path.endswith("/.") else "/" if path.endswith("/") else ""


def _pack_to(tree: Tree, source: str, name: str, stream: BinaryIO, wish: Wish) -> list[str]:
    with tree.open(_plain(source) or "/", follow=wish.follow) as start:
        return pack(start, name or ".", stream, tree.ids)


def _unpack_at(tree: Tree, target: str, stream: BinaryIO, rules: Rules) -> list[str]:
    with tree.open(target, follow=True) as directory:
        if not directory.is_directory:
            raise FailedPrecondition(f"{target} is not a directory")
        return unpack(directory.fd, stream, rules)


def _through(source: Tree, path: str, target: Tree, where: str, wish: Wish, rules: Rules) -> list[str]:
    """Copy between two trees by a pipe: one thread packs what another unpacks."""
    with source.open(_plain(path) or "/", follow=wish.follow or path.endswith("/")) as start:
        directory, name = _goal(target, where, path, is_directory=start.is_directory)
        with target.open(directory, follow=True) as into:
            reader, writer = os.pipe()
            said: list[str] = []
            failed: list[BaseException] = []

            def work() -> None:
                try:
                    with os.fdopen(writer, "wb") as stream:
                        said.extend(pack(start, name, stream, source.ids))
                except BaseException as e:  # told below, in the thread that waits
                    failed.append(e)

            packer = threading.Thread(target=work)
            packer.start()
            try:
                with os.fdopen(reader, "rb") as stream:
                    said += unpack(into.fd, stream, rules)
            except WherryError:
                packer.join()
                if failed and not isinstance(failed[0], BrokenPipeError):
                    raise failed[0] from None  # a tar that is cut off is its consequence
                raise
            finally:
                packer.join()  # it ends at the latest when it finds the pipe closed; the descriptors are its, too
            if failed:
                raise failed[0]
            return said


def _goal(tree: Tree, where: str, path: str, *, is_directory: bool) -> tuple[str, str]:
    """The directory to unpack in, and the name of what is copied there; by cp(1)'s rules."""
    base = posixpath.basename(_plain(path))
    kind = tree.kind(where)
    if kind == "directory":
        return where, "." if path.endswith("/.") or not base else base
    if kind and (is_directory or where.endswith("/")):
        raise FailedPrecondition(f"{where} is not a directory")
    if not kind and where.endswith("/") and not is_directory:
        raise NotFound(f"{where}: there is no such directory")
    parent, name = posixpath.split(_plain(where))
    if name in ("", ".", ".."):
        raise InvalidArgument(f"{where!r} is not a path to copy to")
    if tree.kind(parent or "/") != "directory":
        raise NotFound(f"{parent or '/'}: there is no such directory")
    return parent or "/", name

"""`python -m power.check NOTES MOMENT`: hold a node after a power cut against what had been answered by that moment."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from wherry.client import Client, connect, walk
from wherry.image import Image
from wherry_shared.api.events import Events
from wherry_shared.errors import WherryError
from wherry_shared.values import Mount

from .load import FILES, ROOT, text_of

Note = dict[str, Any]
TOPICS = {"image": "images", "content": "content", "container": "containers", "namespace": "namespaces"}
TOPICS |= {"snapshot": "snapshot", "task": "tasks", "event": "load"}
WORDS = {"publish": "test", "end": "exit"}
KEYS = ("key", "name", "digest", "container_id", "id")
PATIENCE = 60


class Check:
    """What had been answered (`done`) by a moment, what only asked, and what is wrong for it."""

    def __init__(self, client: Client, notes: Path, moment: int) -> None:
        self.client = client
        self.wrong: list[str] = []
        self.seen: Counter[str] = Counter()
        self.notes: dict[int, Note] = {}
        for line in notes.read_text().splitlines():
            note = json.loads(line)
            if note.get("asked", moment + 1) <= moment:
                self.notes[note["number"]] = {**note, "done": False}
            elif note.get("answered", moment + 1) <= moment:
                self.notes[note["number"]] |= {"done": True, "value": note["value"]}
        self._ended = {note["key"] for note in self.notes.values() if note["verb"] == "end" and note["done"]}

    def say(self, *words: object) -> None:
        self.wrong.append(" ".join(map(str, words)))

    async def run(self) -> None:
        have = await self._listed()
        story: defaultdict[tuple[str, str], list[Note]] = defaultdict(list)
        for note in self.notes.values():
            story[note["kind"], note["key"]].append(note)
            if note["verb"] == "commit":  # its active snapshot is no more
                story[note["kind"], f"{note['key']}-active"].append({**note, "verb": "delete"})
        taken_back = []
        for (kind, key), notes in story.items():
            if kind == "event":
                continue
            record = have[kind].get(key)
            may = {notes[-1]["verb"] != "delete"} if notes[-1]["done"] else {True, notes[-1]["verb"] != "delete"}
            if not any(note["done"] for note in notes) or (kind == "task" and key not in self._ended):
                may = {True, False}  # a task's records need not survive before its end is told
            self.seen[f"{kind}s" if record else f"no {kind}s"] += 1
            if kind == "snapshot" and record is None and may == {True}:
                taken_back.append(key)  # docs/decisions/0007, with an event
            elif (record is not None) not in may:
                self.say(kind, key, "is" if record else "is not", "there:", notes)
            elif record is not None:
                await self._look(kind, key, record, notes)
        await self._told(taken_back)

    async def _listed(self) -> dict[str, dict[str, Any]]:
        client = self.client
        lists = {
            "image": (client.images.walk, "name"), "content": (client.content.walk, "digest"),
            "container": (client.containers.walk, "id"), "namespace": (client.namespaces.walk, "name"),
            "lease": (client.leases.walk, "id"), "task": (client.tasks.walk, "container_id"),
        }  # fmt: skip
        have = {kind: {getattr(e, key): e for e in await walk(call)} for kind, (call, key) in lists.items()}
        snapshots = await walk(client.snapshots.walk, snapshotter="overlay")
        return {**have, "snapshot": {each.name: each for each in snapshots}}

    async def _look(self, kind: str, key: str, record: Any, notes: list[Note]) -> None:
        """Whether what is there is whole, and says what it was told last."""
        if kind == "content":
            try:
                await self.client.content.verify(key)
            except WherryError as e:
                self.say(e)
        elif kind == "task":
            ends = [note["value"] for note in notes if note["verb"] == "end" and note["done"]]
            if record.status != "stopped" or (ends and record.exit_status != ends[0]):
                self.say("task", key, record, ends)
        elif kind == "snapshot" and record.kind == "active":
            await self._tree(key, await self.client.snapshots.mounts("overlay", key), None)
        elif kind == "snapshot":
            await self._view(key, key, [f"{key}-{number}" for number in range(FILES)])
        elif key.startswith("docker.io/"):
            image = Image(self.client, record)
            if (await image.state()).complete:
                await self._view(
                    key, await image.unpack("overlay"), [name for names in notes[0]["value"] for name in names]
                )
            else:
                self.say("image", key, "is incomplete")
        elif record.labels.get("v") not in {note["value"] for note in _last(notes)}:
            self.say(kind, key, record.labels, notes)

    async def _view(self, key: str, name: str, files: list[str]) -> None:
        await self._tree(key, await self.client.snapshots.view("overlay", f"look {key}", name, ROOT), files)
        await self.client.snapshots.remove("overlay", f"look {key}")

    async def _tree(self, key: str, mounts: list[Mount], files: list[str] | None) -> None:
        options = dict(option.partition("=")[::2] for option in mounts[0].options)
        folders = options.get("lowerdir", options.get("upperdir", mounts[0].source)).split(":")
        try:
            found = {path.name: path.read_bytes() for folder in folders for path in Path(folder).iterdir()}
        except OSError as e:
            self.say("snapshot", key, e)
            return
        self.seen["trees"] += 1
        if files is not None and found != {name: text_of(name) for name in files}:
            self.say("snapshot", key, "is not what was put into it")

    async def _told(self, taken_back: list[str]) -> None:
        """Each event of what was answered is in the stream, and none twice."""
        due = {("snapshot", "remove", key) for key in taken_back}
        for note in self.notes.values():
            if note["done"] and note["kind"] != "lease" and (note["kind"] != "task" or note["key"] in self._ended):
                due.add((TOPICS[note["kind"]], WORDS.get(note["verb"], note["verb"]), note["key"]))
        due = {(topic, "prepare" if (topic, word) == ("snapshot", "create") else word, key) for topic, word, key in due}
        for _ in range(PATIENCE):
            told = Counter([each async for each in self._events()])
            if not (missing := due - set(told)):
                break
            await asyncio.sleep(1)
        for each in missing:
            self.say("no event", *each)
        for each, count in told.items():
            # Blobs, snapshots and layers may come again after they went.
            if count > 1 and each[0] not in ("content", "snapshot", "leases"):
                self.say(count, "events", *each)
        self.seen["events"] = told.total()

    async def _events(self) -> Any:
        source, token = self.client.bus.proxy(Events), ""
        since = datetime.now(UTC) - timedelta(hours=2)
        while True:
            window = await source.replay(since=None if token else since, token=token)
            for each in window.events:
                topic, word = each.topic.strip("/").split("/")[:2]
                name = each.event["name"] if each.topic == "/snapshot/commit" else None
                yield topic, word, name or next((str(each.event[k]) for k in KEYS if k in each.event), "")
            token = window.token
            if not window.more:
                return


def _last(notes: list[Note]) -> Iterator[Note]:
    """The last answer, and what was asked since."""
    for note in reversed(notes):
        yield note
        if note["done"]:
            return


async def main(notes: str, moment: str) -> int:
    async with connect() as client:
        check = Check(client, Path(notes), int(moment))
        await check.run()
    print(", ".join(f"{count} {what}" for what, count in sorted(check.seen.items())))
    for words in check.wrong:
        print("WRONG:", words)
    return len(check.wrong)


if __name__ == "__main__":
    sys.exit(min(asyncio.run(main(*sys.argv[1:])), 1))

"""Two nodes of one name on one bus: the second is refused, and nobody who belongs to the first."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

from node import WHERRY, Node, clean_environment, eventually
from wherry.doctor.afar import services
from wherry.doctor.findings import Patient
from wherry_shared.api import contracts


def url_of(node: Node) -> str:
    return str(json.loads((node.state / "node.json").read_text())["nats"])


def settings(node: Node, root: Path, state: Path) -> dict[str, str]:
    """Of a service that is started by itself."""
    return {
        **clean_environment(), "WHERRY_NATS": url_of(node), "WHERRY_NODE": node.json("info")["node"],
        "WHERRY_ROOT": str(root), "WHERRY_STATE": str(state), "WHERRY_CREDS": str(node.state / "creds"),
    }  # fmt: skip


def test_another_node_of_the_name_is_refused(node: Node, tmp_path: Path) -> None:
    server = node.json("info")
    (tmp_path / "state").mkdir()
    shutil.copytree(node.state / "creds", tmp_path / "state/creds")
    # Its own root, and one that was copied with all that is in it.
    shutil.copytree(node.root / "introspection", tmp_path / "copied/introspection")
    for root in (tmp_path / "root", tmp_path / "copied"):
        up = [WHERRY, "up", "--root", root, "--state", tmp_path / "state", "--node", server["node"]]
        done = subprocess.run(
            [*up, "--nats", url_of(node)], capture_output=True, text=True, timeout=60, check=False,
            env=clean_environment(),
        )  # fmt: skip
        assert done.returncode == 1, done
        assert "another node of the name" in done.stderr and f"server id {server['id']}" in done.stderr
        assert "Traceback" not in done.stderr
        for service in ("image", "content", "introspection", "diff"):
            program = Path(WHERRY).with_name(f"wherry-{service}")
            done = subprocess.run(
                [program], capture_output=True, text=True, timeout=60, check=False,
                env=settings(node, root, tmp_path / "state"),
            )  # fmt: skip
            assert done.returncode == 1, done
            assert f"server id {server['id']}, {service} with pid" in done.stderr and "Traceback" not in done.stderr
    assert len(node.services()) == 10


def test_what_belongs_to_the_node_is_not(node: Node) -> None:
    """A service that is started again, and one more of content on the same root."""
    more = subprocess.Popen(
        [Path(WHERRY).with_name("wherry-content")], env=settings(node, node.root, node.state), stdin=subprocess.DEVNULL
    )
    try:
        eventually(lambda: [s["name"] for s in node.services()].count("content") == 2, "it is not there")
        for service in ("image", "content"):
            old = node.kill(service)
            eventually(
                lambda old=old: len(found := node.services()) == 11 and old not in {s["pid"] for s in found},
                f"{service} is not started again",
            )
    finally:
        more.send_signal(signal.SIGTERM)
        assert more.wait(30) == 0


async def test_doctor_finds_two() -> None:
    """As where both were started at once, or meet at a cluster that both are leaves of."""

    def answer(name: str, home: str, server: str = "") -> dict[str, object]:
        metadata = {"node": "n", "home": home} | ({"server": server} if server else {})
        return {"name": name, "version": versions[name], "metadata": metadata}

    versions = {contract.service: contract.version for contract in contracts()}
    answers = {name: [answer(name, f"one:{name}")] for name in versions}
    answers["content"].append(answer("content", "one:content"))
    assert list(await services(Patient(None, None, answers))) == []
    answers["image"].append(answer("image", "two:image"))
    answers["introspection"] = [answer("introspection", f"{who}:x", f"id-{who}") for who in ("one", "two")]
    (found,) = await services(Patient(None, None, answers))
    assert found.severity == "broken" and found.what.endswith(": image, introspection are served from several places")
    assert found.why == "the server ids: id-one, id-two"

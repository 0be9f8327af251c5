"""threats 30: whoever has no seed comes to the port and the sockets, gets nothing, and keeps nobody from theirs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from node import Node, eventually

CONNECT = b'CONNECT {"verbose":false,"user":"admin","pass":"admin"}\r\nPING\r\n'
NOBODY = 65534
KNOCKS = 400


def port_of(node: Node) -> int:
    return int(json.loads((node.state / "node.json").read_text())["nats"].rpartition(":")[2])


def test_a_container_on_the_hosts_network(node: Node, busybox_ref: str) -> None:
    """CVE-2020-15257's class: uid 0, every port of this machine, and no seed."""
    script = f"printf '{CONNECT.decode()}' | nc -w 5 127.0.0.1 {port_of(node)}; cat /proc/net/unix"
    done = node.run("run", "--rm", "--net", "host", busybox_ref, "sh", "-c", script.replace("\r\n", "\\r\\n"))
    assert "Authorization Violation" in done.stdout and "PONG" not in done.stdout
    ours = [line for line in done.stdout.splitlines() if "@" in line and ("wherry" in line or str(node.state) in line)]
    assert ours == [], "an abstract socket is in reach of everybody on the host's network"


def test_another_user_of_the_machine(node: Node) -> None:
    """Neither seeds, sockets nor data are to be had, and the port answers a stranger with a refusal."""
    paths = [path for top in (node.root, node.state) for path in (top, *top.rglob("*")) if not path.is_symlink()]
    sockets = [path for path in paths if path.is_socket()]
    assert sockets
    code = f"""
import json, os, socket, sys
paths, sockets, port = json.loads(sys.argv[1])
got = []
for path in paths:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        got.append(path)
    except OSError:
        pass
for path in sockets:
    try:
        s = socket.socket(socket.AF_UNIX); s.connect(path); got.append(path)
    except OSError:
        pass
s = socket.create_connection(("127.0.0.1", port), 5); s.settimeout(5)
s.sendall({CONNECT!r})
said = b""
while chunk := s.recv(65536):
    said += chunk
print(json.dumps([got, said.decode()]))
"""
    # From a directory that everybody may enter: what protects the node is its own modes.
    base = node.state.parent
    base.chmod(0o711)
    given = json.dumps([*([str(p.relative_to(base)) for p in some] for some in (paths, sockets)), port_of(node)])
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    done = subprocess.run(
        [interpreter, "-I", "-c", code, given], user=NOBODY, group=NOBODY, extra_groups=[], cwd=base,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    got, said = json.loads(done.stdout)
    assert got == []
    assert "Authorization Violation" in said and "PONG" not in said


def test_a_flood_of_strangers(node: Node, busybox_ref: str) -> None:
    port, held = port_of(node), []
    try:
        for number in range(KNOCKS):
            knock = socket.create_connection(("127.0.0.1", port), 10)
            if number % 2:
                knock.sendall(CONNECT)
            held.append(knock)  # the others say nothing at all
            if number % 100 == 50:
                assert node.run("run", "--rm", busybox_ref, "echo", "served", env=_by_bus(node)).stdout == "served\n"
    finally:
        for knock in held:
            knock.close()
    eventually(lambda: len(node.services()) >= 10, "not all services are on the bus")


def _by_bus(node: Node) -> dict[str, str]:
    """Not by the sockets that no stranger comes near."""
    return {**node.environment, "WHERRY_DIRECT": "0"}

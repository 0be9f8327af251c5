"""hosts.toml: read, or refused by name."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wherry.registry.hosts import HostRules
from wherry.registry.mirrors import Mirrors
from wherry_shared.errors import FailedPrecondition

FOLDER = Path(tempfile.mkdtemp(prefix="wherry-fuzz-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
FILE = FOLDER / "_default" / "hosts.toml"
FILE.parent.mkdir()
TOKENS = (
    b"server = ", b"[host.", b'["https://', b"capabilities = ", b'"pull"', b'"push"', b'"resolve"', b"ca = ",
    b"client = ", b"skip_verify = true", b"override_path = true", b"[header]\n", b'"""', b"'''", b"[[", b"]]", b"\\u",
    b"\\x00", b"1979-05-27T07:32:00Z", b"nan", b"0x", b"x.y.z = 1\n",
)  # fmt: skip


def seeds() -> Iterator[bytes]:
    yield b'server = "https://r.example"\n[host."https://m.example/v2/x"]\ncapabilities = ["pull", "resolve"]\n'
    yield b'[host."http://m:5000"]\nskip_verify = true\nca = "a.crt"\nclient = [["a.cert", "a.key"]]\n'
    yield b'[host."https://m/v2/deep"]\noverride_path = true\n'
    yield b'[host."m"]\n[host."m".header]\nA = ["b", "c"]\nB = "d"\n'
    yield b"a = " + b"[" * 900 + b"]" * 900


def one(data: bytes) -> None:
    FILE.write_bytes(data)
    mirrors = Mirrors(HostRules(), [FOLDER])
    try:
        found = mirrors.endpoints("r.example:5000", "pull")
    except FailedPrecondition as error:
        str(error).encode()
        return
    for endpoint in found:
        assert endpoint.prefix[:1] in ("", "/") and ".." not in endpoint.prefix.split("/")
        for name, value in endpoint.headers:
            assert name.isascii() and "\r" not in name + value and "\n" not in name + value
        for path in endpoint.tls.authorities if endpoint.tls else ():
            path.encode()

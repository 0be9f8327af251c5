"""Mounts in Docker's words."""

from __future__ import annotations

from pathlib import Path

import pytest
from wherry import volumes
from wherry.spec import MOUNTS, Options, User, make
from wherry_shared.errors import InvalidArgument, Unimplemented


def test_binds(tmp_path: Path) -> None:
    def options(text: str) -> list[str]:
        found: list[str] = volumes.volume(text)["options"]
        return found

    assert volumes.volume("/a:/b/./c/") == {
        "type": "bind", "source": "/a", "destination": "/b/c", "options": ["rbind", "rprivate"]
    }  # fmt: skip
    assert options(f"{tmp_path}:/b:ro,rshared") == ["rbind", "rshared", "ro", "rro"], "and what is mounted below it"
    file = tmp_path / "file"
    file.write_text("")
    assert options(f"{file}:/b:ro") == ["rbind", "rprivate", "ro"]
    bind = f"type=bind,src={file},dst=/b,readonly,bind-propagation=rslave"
    assert volumes.mount(bind)["options"] == ["rbind", "rslave", "ro"]
    assert volumes.mount('type=bind,"source=/a,b",target=/c')["source"] == "/a,b"


def test_tmpfs() -> None:
    assert volumes.tmpfs("/t")["options"] == ["nosuid", "nodev", "noexec"]
    assert volumes.tmpfs("/t:size=1m,exec,mode=1777")["options"] == ["nosuid", "nodev", "size=1m", "exec", "mode=1777"]
    assert volumes.tmpfs("/t:suid,dev,ro,rw")["options"] == ["noexec", "suid", "dev", "rw"]
    assert volumes.mount("type=tmpfs,target=/t,tmpfs-size=1m")["options"][-1] == f"size={1 << 20}"
    assert "size=2097152" in volumes.shm("2m")["options"]


@pytest.mark.parametrize(
    "text",
    [
        "/a:b", "/a:/../etc", "/a:/x/../../etc", "/a:/", "/a:/.", "/a:/proc", "/a:/proc/sys",
        "/a://proc//sys", "a/b:/c",
        "/a/../b:/c", "/a:/b:ro,what", "/a:/b:shared,slave", "/a:/b:ro:rw", "/a\0:/b", "/a:/b\n", "",
    ],
)  # fmt: skip
def test_a_volume_that_leads_out_or_is_nonsense_is_refused(text: str) -> None:
    with pytest.raises((InvalidArgument, Unimplemented)):
        volumes.volume(text)


@pytest.mark.parametrize(
    "text", ["/t:size=x", "/t:uid=x", "/t:bind", "/t:mode=9", "t", "/proc/x", "/t:size=1m;x", "/t:context=a"]
)
def test_a_tmpfs_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        volumes.tmpfs(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("type=volume,src=x,dst=/y", Unimplemented), ("dst=/y", Unimplemented), ("type=bind,src=/a", InvalidArgument),
        ("type=bind,src=/a,dst=/b,what=1", InvalidArgument),
        ("type=tmpfs,dst=/b,bind-propagation=shared", InvalidArgument),
        ("type=bind,src=/a,dst=/b,readonly=yes", InvalidArgument),
    ],
)  # fmt: skip
def test_a_mount_that_is_not_understood_is_refused(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        volumes.mount(text)


@pytest.mark.parametrize("wish", ["readonly", "ro", "readonly=True", "ro=1", "readonly=TRUE", "ro=t"])
def test_a_mount_that_is_to_be_read_only_is(wish: str) -> None:
    assert "ro" in volumes.mount(f"type=bind,src=/a,dst=/b,{wish}")["options"]


@pytest.mark.parametrize("option", ["z", "Z"])
def test_nothing_of_the_host_is_labelled_anew(option: str) -> None:
    with pytest.raises(Unimplemented, match="labelled"):
        volumes.volume(f"/etc/hosts:/etc/hosts:{option}")


def test_what_is_deeper_comes_later_and_defaults_can_be_replaced() -> None:
    own = [volumes.volume("/a:/x/y"), volumes.volume("/b:/x"), volumes.shm("1m")]
    made = volumes.merged(MOUNTS, own)
    assert [m["destination"] for m in made][-3:] == ["/x", "/x/y", "/dev/shm"] or made[-1]["destination"] in (
        "/x/y",
        "/dev/shm",
    )
    assert [m["destination"] for m in made].index("/x") < [m["destination"] for m in made].index("/x/y")
    assert len([m for m in made if m["destination"] == "/dev/shm"]) == 1
    with pytest.raises(InvalidArgument, match="two mounts"):
        volumes.merged([], [volumes.tmpfs("/t"), volumes.tmpfs("/t/")])


def test_propagation_reaches_the_root() -> None:
    for option, expected in (("rshared", "shared"), ("slave", "slave"), ("private", None)):
        spec = make("c", None, Options(args=["x"], mounts=[volumes.volume(f"/a:/b:{option}")]), User())
        assert spec["linux"].get("rootfsPropagation") == expected

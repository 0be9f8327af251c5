"""The specification that a container gets: what is refused, what is accepted, and what it then says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from wherry import capabilities, flags, limits, spec
from wherry.container import image_labels
from wherry.registry.documents import ImageConfig
from wherry.registry.platforms import default_platform
from wherry.spec import Options, User
from wherry_shared.errors import InvalidArgument, Unimplemented
from wherry_shared.values import Platform


def image(**changes: Any) -> ImageConfig:
    usual: dict[str, Any] = {
        "platform": Platform(os="linux", architecture="amd64"), "diff_ids": (), "created": "",
        "env": ("A=1", "PATH=/x"),
        "entrypoint": ("/entry",), "cmd": ("cmd",), "user": "", "working_dir": "/srv", "volumes": (),
        "exposed_ports": (), "labels": {}, "stop_signal": "",
    }  # fmt: skip
    return ImageConfig(**{**usual, **changes})


def made(options: Options | None = None, config: ImageConfig | None = None) -> dict[str, Any]:
    return spec.make("web", config or image(), options or Options(), User())


def test_the_default_is_confined() -> None:
    found = made()
    process, linux = found["process"], found["linux"]
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted"}, "nothing inheritable or ambient"
    assert process["noNewPrivileges"] is True
    assert {n["type"] for n in linux["namespaces"]} == {"pid", "ipc", "uts", "mount", "network"}
    assert all("path" not in n for n in linux["namespaces"])
    assert "/proc/kcore" in linux["maskedPaths"] and "/proc/sys" in linux["readonlyPaths"]
    assert linux["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    assert found["ociVersion"] == "1.0.2" and "hooks" not in found and "cgroupsPath" not in linux


@pytest.mark.parametrize("architecture", ["", "x86_64", "AMD64", "unknown"])
def test_an_image_that_names_its_architecture_in_other_words_may_call_what_this_machine_has(architecture: str) -> None:
    found = made(config=image(platform=Platform(os="linux", architecture=architecture)))["linux"]["seccomp"]
    own = "amd64" if architecture in ("x86_64", "AMD64") else default_platform().architecture
    assert found == made(config=image(platform=Platform(os="linux", architecture=own)))["linux"]["seccomp"]
    assert found["architectures"]


def test_image_and_caller_make_the_command() -> None:
    assert made()["process"]["args"] == ["/entry", "cmd"]
    assert made(Options(args=["x"]))["process"]["args"] == ["/entry", "x"]
    assert made(Options(args=["x"], entrypoint=["y"]))["process"]["args"] == ["y", "x"]
    assert made(Options(entrypoint=["y"]))["process"]["args"] == ["y"]
    with pytest.raises(InvalidArgument, match="nothing to run"):
        made(Options(entrypoint=[]))
    with pytest.raises(InvalidArgument, match="zero byte"):
        made(Options(args=["a\0b"]))


def test_environment() -> None:
    env = made(Options(env=["A=2", "B=", "PATH"]))["process"]["env"]
    assert "A=2" in env and "B=" in env and not [e for e in env if e.startswith("PATH=")]
    for bad in ("=x", "A=\0", ""):
        with pytest.raises(InvalidArgument):
            made(Options(env=[bad]))


@pytest.mark.parametrize(
    "cwd",
    ["/proc/self/fd/8", "/proc/thread-self/cwd", "//proc/./self", "relative", "/a/../../b", "/proc/1/root", "/a\0"],
)
def test_a_working_directory_that_leads_out_is_refused(cwd: str) -> None:
    with pytest.raises(InvalidArgument):
        made(Options(cwd=cwd))
    with pytest.raises(InvalidArgument):
        made(config=image(working_dir=cwd))


@pytest.mark.parametrize(
    ("cwd", "clean"), [("/", "/"), ("/a//b/.", "/a/b"), ("/proc", "/proc"), ("/process", "/process")]
)
def test_a_working_directory_that_does_not_is_taken(cwd: str, clean: str) -> None:
    assert made(Options(cwd=cwd))["process"]["cwd"] == clean


def test_capabilities_by_dockers_rules() -> None:
    assert capabilities.chosen() == sorted(capabilities.USUAL, key=capabilities.EVERY.index)
    assert capabilities.chosen(["net_admin"], ["CAP_CHOWN"]).count("CAP_NET_ADMIN") == 1
    assert "CAP_CHOWN" not in capabilities.chosen([], ["chown"])
    assert capabilities.chosen(["KILL"], ["ALL"]) == ["CAP_KILL"]
    assert capabilities.chosen(["ALL"], ["MKNOD"]) == [c for c in capabilities.every() if c != "CAP_MKNOD"]
    with pytest.raises(InvalidArgument, match="no capability"):
        capabilities.chosen(["CAP_EVERYTHING"])


def test_privileged_is_everything() -> None:
    found = made(Options(privileged=True))
    linux = found["linux"]
    assert found["process"]["capabilities"]["bounding"] == capabilities.every()
    assert found["process"]["noNewPrivileges"] is False
    assert (linux["maskedPaths"], linux["readonlyPaths"], "seccomp" in linux) == ([], [], False)
    assert linux["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert {"/dev/null", "/dev/zero"} <= {d["path"] for d in linux["devices"]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel.core_pattern", "x"), ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/bin/sh"),
        ("net.core.somaxconn", "1\nkernel.core_pattern=x"), ("net.core.somaxconn", "1=2"), ("net.core.somaxconn", ""),
        ("net/core/somaxconn", "1"), ("net..core", "1"), ("../net.core", "1"), ("net", "1"), ("vm.swappiness", "1"),
        ("fs.file-max", "1"), ("kernel.panic", "1"), ("net.core.somaxconn", "`id`"), ("net.core.x", "y" * 300),
    ],
)  # fmt: skip
def test_a_sysctl_of_the_machine_or_with_more_than_words_is_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument):
        made(Options(sysctls={name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("net.core.somaxconn", "1024"), ("net.ipv4.ip_local_port_range", "1024 65535"),
        ("kernel.sem", "250\t32000 32 128"),
        ("net.ipv4.conf.eth0.rp_filter", "-1"), ("fs.mqueue.msg_max", "10"), ("kernel.domainname", "example.org"),
    ],
)  # fmt: skip
def test_a_sysctl_of_its_own_namespaces_is_set(name: str, value: str) -> None:
    assert made(Options(sysctls={name: value}))["linux"]["sysctl"] == {name: value}


def test_a_sysctl_of_a_shared_namespace_is_refused() -> None:
    for kind, name in (("network", "net.core.somaxconn"), ("ipc", "kernel.msgmax"), ("uts", "kernel.domainname")):
        with pytest.raises(InvalidArgument, match=f"the {kind} namespace"):
            made(Options(sysctls={name: "1"}, namespaces={kind: "host"}))


def test_namespaces() -> None:
    found = made(
        Options(namespaces={"pid": "host", "network": "/proc/1/ns/net", "cgroup": "private"}, host_network=True)
    )
    assert found["linux"]["namespaces"] == [
        {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network", "path": "/proc/1/ns/net"},
        {"type": "cgroup"},
    ]  # fmt: skip
    assert "hostname" not in made(Options(namespaces={"uts": "host"}))
    for bad in ({"mount": "host"}, {"pid": "other"}, {"user": "host"}):
        with pytest.raises(InvalidArgument):
            made(Options(namespaces=bad))
    with pytest.raises(InvalidArgument, match="host name"):
        made(Options(namespaces={"uts": "host"}, hostname="x"))


def test_a_user_namespace() -> None:
    linux = made(Options(**flags.options({"userns_remap": "100000:200000:1000"})))["linux"]
    assert {"type": "user"} in linux["namespaces"]
    assert linux["uidMappings"] == [{"containerID": 0, "hostID": 100000, "size": 1000}]
    assert linux["gidMappings"] == [{"containerID": 0, "hostID": 200000, "size": 1000}]
    # sysfs belongs to a network namespace: another one's is shown, and nothing in it may be written.
    own = {"userns_remap": "100000"}
    for given, kind in ((own, "sysfs"), (own | {"net_host": True}, "bind")):
        (sys,) = (m for m in made(Options(**flags.options(given)))["mounts"] if m["destination"] == "/sys")
        assert sys["type"] == kind and ("rro" in sys["options"]) is (kind == "bind")
    for bad in ("0", "1:2:3:4", "root", "4294967295", "2147483647:1:2"):
        with pytest.raises(InvalidArgument):
            flags.options({"userns_remap": bad})
    with pytest.raises(InvalidArgument):
        made(Options(uid_mappings=[(0, 1, 1)]))


def test_the_version_is_the_lowest_that_does() -> None:
    assert made(Options(domainname="example.org"))["ociVersion"] == "1.1.0"


def test_limits() -> None:
    found = flags.resources(
        {"memory": "64m", "memory_swap": "1g", "cpus": "1.5", "pids_limit": 10, "cpuset_cpus": "0-3,5"}
    )
    assert found == {
        "memory": {"limit": 64 << 20, "swap": 1 << 30}, "cpu": {"quota": 150_000, "period": 100_000, "cpus": "0-3,5"},
        "pids": {"limit": 10},
    }  # fmt: skip
    assert flags.resources({}) == {}
    # crun writes a -1 as it is.
    assert flags.resources({"pids_limit": -1, "cpu_quota": -1, "cpu_period": 5000}) == {
        "pids": {"limit": 1 << 22}, "cpu": {"quota": 8192 * 5000, "period": 5000},
    }  # fmt: skip
    linux = made(Options(resources=found))["linux"]
    assert linux["resources"]["devices"] and linux["resources"]["memory"]["limit"] == 64 << 20


@pytest.mark.parametrize(
    "given",
    [
        {"memory": "1k"}, {"memory": "-1"}, {"memory": "9999999999p"}, {"memory": "1e9"}, {"memory_swap": "1g"},
        {"memory": "1g", "memory_swap": "1m"}, {"memory": "8m", "memory_reservation": "9m"}, {"cpus": "0"},
        {"cpus": "nan"},
        {"cpus": "1", "cpu_quota": 1}, {"cpuset_cpus": "0; rm"}, {"pids_limit": -2}, {"blkio_weight": 1},
        {"memory_swappiness": 101}, {"cpu_shares": 1},
    ],
)  # fmt: skip
def test_a_limit_that_is_none_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        flags.resources(given)


def test_sizes_and_rlimits() -> None:
    assert [limits.size(t) for t in ("1", "1k", "1.5m", "2GiB", "1 kB")] == [1, 1024, 3 << 19, 2 << 30, 1024]
    assert limits.rlimit("nofile=10:20") == ("RLIMIT_NOFILE", (10, 20))
    assert limits.rlimit("core=-1") == ("RLIMIT_CORE", ((1 << 64) - 1, (1 << 64) - 1))
    for bad in ("nofile", "nofile=", "files=1", "nofile=2:1", "nofile=x", "nofile=-5"):
        with pytest.raises(InvalidArgument):
            limits.rlimit(bad)


def test_what_an_image_may_not_say_is_dropped_and_told(caplog: pytest.LogCaptureFixture) -> None:
    reserved = {
        "containerd.io/restart.loguri": "binary:///bin/sh?-c", "io.containerd.image.name": "x",
        "io.cri-containerd.kind": "x", "wherry/join.pid": "host", "long": "x" * 5000,
    }  # fmt: skip
    assert image_labels({**reserved, "maintainer": "me"}) == {"maintainer": "me"}
    assert all(key[:20] in caplog.text for key in reserved)


def test_an_images_volumes_take_nothing_from_the_node() -> None:
    """CVE-2022-23648: they are neither mounted nor filled, wherever they point."""
    usual = made()
    assert made(config=image(volumes=("/../../../etc", "/data", "/proc"))) == usual
    assert all(mount["type"] != "bind" for mount in usual["mounts"])


@pytest.mark.parametrize(
    "text", ["seccomp", "seccomp=/nowhere", "label=type:x", "no-new-privileges=maybe", "systempaths=x", ""]
)
def test_a_security_option_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises((InvalidArgument, flags.NotFound)):
        flags.options({"security_opt": [text]})


def test_flags_to_options() -> None:
    given = {
        "env": ["A=1"], "label": ["a=b", "c"], "restart": "on-failure:3", "network": "none", "pid": "container:x",
        "security_opt": ["no-new-privileges:false", "seccomp=unconfined"], "entrypoint": "", "ulimit": ["nofile=5"],
    }  # fmt: skip
    found = flags.options(given)
    assert found["labels"] == {"a": "b", "c": "", "containerd.io/restart.policy": "on-failure:3"}
    assert (found["namespaces"], found["join"]) == ({"network": "private"}, {"pid": "x"})
    assert (found["no_new_privileges"], found["seccomp"], found["entrypoint"]) == (False, "unconfined", [])
    assert Options(**{k: v for k, v in found.items() if k not in ("labels", "join")}).rlimits == {
        "RLIMIT_NOFILE": (5, 5)
    }
    for bad in ({"restart": "sometimes"}, {"restart": "always:3"}, {"restart": "on-failure:x"}, {"ipc": "shareable?"}):
        with pytest.raises(InvalidArgument):
            flags.options(bad)


def test_volumes_have_no_names() -> None:
    for text in ("data:/x", "/x"):
        with pytest.raises(Unimplemented):
            flags.options({"volume": [text]})


def test_files_of_names_and_values(tmp_path: Path) -> None:
    """As Docker reads them: a value keeps its blanks, and lines end where they end and nowhere else."""
    given = tmp_path / "env"
    given.write_bytes("\ufeffA=x  \n  B= 1\r\n# C=2\n\n\tD=\u2028y\x0cz\x85\r\n".encode())
    assert flags.environment([str(given)], ["E=3"]) == ["A=x  ", "B= 1", "D=\u2028y\x0cz\x85", "E=3"]
    for bad in ("A B=1", "A =1", "=1"):
        given.write_text(bad)
        with pytest.raises(InvalidArgument):
            flags.environment([str(given)], [])

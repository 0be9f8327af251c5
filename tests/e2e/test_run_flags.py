"""`wherry run` and its kin with Docker's everyday flags, seen from inside the container."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import images
import pytest
from node import Node, eventually

Run = subprocess.CompletedProcess[str]


@pytest.fixture
def ns(namespace: str) -> list[str]:
    return ["-n", namespace]


@pytest.fixture
def pulled(node: Node, ns: list[str], busybox_ref: str) -> str:
    node.run("pull", *ns, busybox_ref)
    return busybox_ref


def inside(node: Node, ns: list[str], image: str, *flags: str, script: str) -> str:
    return node.run("run", *ns, "--rm", *flags, image, "sh", "-c", script).stdout.strip()


def test_a_container_is_confined_unless_told_otherwise(node: Node, ns: list[str], pulled: str) -> None:
    script = "grep -E '^(Seccomp|NoNewPrivs|CapInh|CapAmb|CapBnd):' /proc/self/status; ls /proc/kcore -l | cut -c1"
    said = inside(node, ns, pulled, script=script).split()
    fields = dict(zip(said[0::2], said[1::2], strict=False))
    assert (fields["Seccomp:"], fields["NoNewPrivs:"]) == ("2", "1")
    assert int(fields["CapInh:"], 16) == int(fields["CapAmb:"], 16) == 0
    assert int(fields["CapBnd:"], 16) == 0xA80425FB
    assert inside(node, ns, pulled, script="unshare -U true; echo $?") != "0"
    assert inside(node, ns, pulled, script="mount -t tmpfs none /tmp 2>&1; echo $?").endswith("1")


def test_security_is_loosened_by_name(node: Node, ns: list[str], pulled: str, tmp_path: Path) -> None:
    status = "grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/self/status | tr -s '\\t\\n' ' '"
    loose = inside(
        node, ns, pulled, "--security-opt", "seccomp=unconfined", "--security-opt", "no-new-privileges=false",
        "--cap-drop", "ALL", "--cap-add", "net_admin", script=status,
    )  # fmt: skip
    assert loose.split() == ["CapEff:", f"{1 << 12:016x}", "NoNewPrivs:", "0", "Seccomp:", "0"]
    profile = tmp_path / "profile.json"
    rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}))
    said = inside(node, ns, pulled, "--security-opt", f"seccomp={profile}", script="mkdir /tmp/x 2>&1; true")
    assert "not supported" in said


def test_a_privileged_one_has_it_all(node: Node, ns: list[str], pulled: str) -> None:
    script = "grep CapEff /proc/self/status | cut -f2; ls /dev | wc -l; mount -t tmpfs none /tmp && echo mounted"
    caps, devices, mounted = inside(node, ns, pulled, "--privileged", script=script).split()
    assert int(caps, 16) > 0xA80425FB and int(devices) > 20 and mounted == "mounted"


def test_who_runs_and_where(node: Node, ns: list[str], pulled: str, tmp_path: Path) -> None:
    env = tmp_path / "env"
    env.write_text("# a comment\nONE=1\nTWO=2\n")
    said = inside(
        node, ns, pulled, "-u", "12:34", "--group-add", "56", "-w", "/tmp", "--env-file", str(env), "-e", "TWO=3",
        "-h", "web", "--ulimit", "nofile=64:128", "--entrypoint", "",
        script="id -u; id -g; id -G; pwd; echo $ONE$TWO$HOSTNAME; hostname; ulimit -Sn; ulimit -Hn",
    )  # fmt: skip
    assert said.splitlines() == ["12", "34", "34 56", "/tmp", "13web", "web", "64", "128"]


def test_mounts(node: Node, ns: list[str], pulled: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello\n")
    flags = [
        "-v", f"{tmp_path}:/data:ro", "-v", f"{tmp_path}:/rw", "--tmpfs", "/scratch:size=1m",
        "--mount", f"type=bind,source={tmp_path}/file,target=/one,readonly", "--shm-size", "2m", "--read-only",
    ]  # fmt: skip
    script = (
        "cat /data/file /one; touch /data/x 2>/dev/null || echo ro; echo made > /rw/made; touch /x 2>/dev/null || "
        "echo rootro; df -k /scratch /dev/shm | awk 'NR>1{print $2}'"
    )
    assert inside(node, ns, pulled, *flags, script=script).split() == ["hello", "hello", "ro", "rootro", "1024", "2048"]
    assert (tmp_path / "made").read_text() == "made\n"


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_read_only_is_so_all_the_way_down(
    node: Node, ns: list[str], pulled: str, tmp_path: Path, runtime: str
) -> None:  # fmt: skip
    (tmp_path / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "sub"], check=True)
    try:
        script = "touch /data/sub/x 2>/dev/null || echo no"
        flags = ["--runtime", runtime, "-v", f"{tmp_path}:/data:ro"]
        assert inside(node, ns, pulled, *flags, script=script) == "no"
    finally:
        subprocess.run(["umount", tmp_path / "sub"], check=True)


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_a_device_is_as_much_as_was_given(node: Node, ns: list[str], pulled: str, runtime: str) -> None:
    flags = ["--runtime", runtime, "--device", "/dev/fuse:/dev/messages:r"]
    script = "(: < /dev/messages) && echo read; (: > /dev/messages) 2>&1 | grep -o 'not permitted'; ls /dev"
    said = inside(node, ns, pulled, *flags, script=script).split()
    assert said[:3] == ["read", "not", "permitted"] and "messages" in said and "fuse" not in said


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["-v", "/nowhere/at/all:/x"], "no such file"),
        (["-v", "name:/x"], "no names"),
        (["-v", "/tmp:/proc/sys"], "/proc"),
        (["-v", "/tmp:/../etc"], "'..'"),
        (["--sysctl", "kernel.core_pattern=|/bin/sh"], "plain words"),
        (["--sysctl", "kernel.core_pattern=x"], "whole machine"),
        (["--sysctl", "net.core.somaxconn=1+kernel.core_pattern=x"], "plain words"),
        (["--cap-add", "everything"], "capability"),
        (["--device", "/etc/passwd"], "not a device"),
        (["--memory", "1m"], "less than"),
        (["--rm", "-d", "--restart", "always"], "--rm with --restart"),
        (["--userns-remap", "100000"], "lets nobody through"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    node: Node, ns: list[str], pulled: str, flags: list[str], reason: str
) -> None:
    done = node.run("run", *ns, *flags, pulled, "true", check=False)
    assert done.returncode == 125 and reason in done.stderr, done.stderr
    assert node.json("ps", *ns, "-a") == [] and node.json("snapshot", "ls", *ns, "kind==active") == []


def test_namespaces_and_sysctls(node: Node, ns: list[str], pulled: str) -> None:
    own = inside(node, ns, pulled, "--sysctl", "net.ipv4.ip_unprivileged_port_start=80", script=(
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; readlink /proc/self/ns/net; echo $$"
    )).split()  # fmt: skip
    assert own[0] == "80" and own[1] != os.readlink("/proc/self/ns/net") and own[2] == "1"
    script = "for kind in net pid ipc uts; do readlink /proc/self/ns/$kind; done"
    flags = ["--net", "host", "--pid", "host", "--ipc", "host", "--uts", "host"]
    shared = inside(node, ns, pulled, *flags, script=script).split()
    assert shared == [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "pid", "ipc", "uts")]


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_an_init_reaps_and_passes_signals_on(node: Node, ns: list[str], pulled: str, runtime: str) -> None:
    flags = ["--init", "--runtime", runtime, "--read-only", "-u", "nobody"]
    said = inside(node, ns, pulled, *flags, script="cat /proc/1/comm; echo $$ $PPID; exit 0").split()
    assert said[0] in ("tini-static", "docker-init", "catatonit", "init") and said[1] != "1" == said[2]
    assert node.run("run", *ns, "--rm", *flags, pulled, "sh", "-c", "exit 7", check=False).returncode == 7
    node.run("run", *ns, "-d", "--name", "asleep", *flags, pulled, "sleep", "1000")  # as process 1 it takes no notice
    node.run("kill", *ns, "-s", "TERM", "asleep")
    assert node.run("wait", *ns, "asleep").stdout.strip() == "143"
    node.run("rm", *ns, "asleep")
    refused = node.run("run", *ns, "--rm", "--init", "--pid", "host", pulled, "true", check=False)
    assert refused.returncode == 125 and "PID namespace" in refused.stderr


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_names_are_looked_up_as_on_the_host_whose_network_it_has(
    node: Node, ns: list[str], pulled: str, tmp_path: Path, runtime: str
) -> None:
    flags = ["--net", "host", "--runtime", runtime, "--read-only"]
    wanted = Path("/etc/hosts").read_text() + Path("/etc/resolv.conf").read_text()
    script = "cat /etc/hosts /etc/resolv.conf; echo x 2>/dev/null >> /etc/hosts && echo written"
    assert inside(node, ns, pulled, *flags, script=f"{script} || true") == wanted.strip()
    (tmp_path / "hosts").write_text("127.0.0.9 own\n")
    own = ["-v", f"{tmp_path}/hosts:/etc/hosts"]
    assert inside(node, ns, pulled, *flags, *own, script="cat /etc/hosts") == "127.0.0.9 own"
    assert inside(node, ns, pulled, "--net", "none", script="ls /etc/hosts /etc/resolv.conf 2>/dev/null || true") == ""


def test_one_container_in_anothers_namespaces_also_after_a_restart(node: Node, ns: list[str], pulled: str) -> None:
    node.run("run", *ns, "-d", "--name", "main", pulled, "sleep", "1000")
    script = "readlink /proc/self/ns/net; readlink /proc/self/ns/pid"
    flags = ["--net", "container:main", "--pid", "container:main"]
    node.run("create", *ns, "--name", "side", *flags, pulled, "sh", "-c", script)

    def of_main() -> list[str]:
        pid = next(p["pid"] for p in node.json("ps", *ns) if p["id"] == "main")
        return [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "pid")]

    first = of_main()
    assert node.run("start", *ns, "-a", "side").stdout.split() == first
    node.run("restart", *ns, "-t", "0", "main")
    again = of_main()  # may be other namespaces of the same number
    assert node.run("start", *ns, "-a", "side").stdout.split() == again
    node.run("rm", *ns, "-f", "main")
    orphan = node.run("start", *ns, "-a", "side", check=False)
    assert orphan.returncode == 125 and "not found" in orphan.stderr
    node.run("rm", *ns, "side")


def test_limits_and_their_change(node: Node, ns: list[str], pulled: str) -> None:
    flags = ["-m", "64m", "--cpus", "0.5", "--pids-limit", "50", "--cpu-shares", "512"]
    node.run("run", *ns, "-d", "--name", "small", *flags, pulled, "sleep", "1000")
    pid = next(p["pid"] for p in node.json("ps", *ns) if p["id"] == "small")
    assert limit_of(pid, "memory") == 64 << 20
    stats = json.loads(node.run("stats", *ns, "--no-stream", "--interval", "0.2", "--format", "json", "small").stdout)
    assert stats[0]["id"] == "small" and stats[0]["limit_bytes"] == 64 << 20 and stats[0]["pids"] == 1
    node.run("update", *ns, "-m", "96m", "small")
    assert limit_of(pid, "memory") == 96 << 20
    node.run("update", *ns, "--pids-limit", "-1", "--cpu-quota", "-1", "small")
    node.run("restart", *ns, "-t", "0", "small")
    pid = next(p["pid"] for p in node.json("ps", *ns) if p["id"] == "small")
    assert limit_of(pid, "memory") == 96 << 20
    node.run("rm", *ns, "-f", "small")
    node.run("run", *ns, "--rm", "--pids-limit", "-1", "--cpu-quota", "-1", pulled, "true")


def limit_of(pid: int, controller: str) -> int:
    """The memory limit of a process's cgroup, v1 or v2."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return int(Path(f"/sys/fs/cgroup/{controller}{path}/{controller}.limit_in_bytes").read_text())
    return int(Path(f"/sys/fs/cgroup{path}/{controller}.max").read_text())


def test_a_life_in_verbs(node: Node, ns: list[str], pulled: str) -> None:
    assert node.run("create", *ns, "--name", "web", "-l", "tier=front", pulled, "sleep", "1000").stdout == "web\n"
    assert node.json("ps", *ns) == []
    node.run("start", *ns, "web")
    node.run("exec", *ns, "web", "sh", "-c", "echo kept > /kept")
    node.run("rename", *ns, "web", "shop")
    assert node.run("exec", *ns, "shop", "cat", "/kept").stdout == "kept\n"
    node.run("pause", *ns, "shop")
    assert [p["status"] for p in node.json("ps", *ns, "-f", "status=paused")] == ["paused"]
    done = node.run("start", *ns, "shop", check=False)
    assert done.returncode == 1 and "unpause web" in done.stderr
    node.run("unpause", *ns, "shop")
    assert "sleep 1000" in node.run("top", *ns, "shop").stdout
    assert node.run("ps", *ns, "-q", "--filter", "label=tier=front").stdout == "web\n"
    assert node.run("ps", *ns, "-q", "--filter", "label=tier=back").stdout == ""
    assert node.run("ps", *ns, "--format", "{{.ID}} {{.Names}} {{.Status}}").stdout == "web shop running\n"
    node.run("stop", *ns, "-t", "0", "web")
    done = node.run("wait", *ns, "web", "nobody", "shop", check=False)
    assert (done.returncode, done.stdout) == (1, "137\n137\n")
    assert done.stderr == "wherry: container 'nobody': not found\n"
    assert [p["status"] for p in node.json("ps", *ns, "-a")] == ["stopped (137)"]
    node.run("start", *ns, "web")
    assert node.run("exec", *ns, "web", "cat", "/kept").stdout == "kept\n"
    known = json.loads(node.run("inspect", *ns, "shop").stdout)[0]
    assert (known["id"], known["name"], known["task"]["status"]) == ("web", "shop", "running")
    assert node.run("ps", *ns, "--filter", "name=^/shop$", "-lq", "--no-trunc").stdout == "web\n"
    done = node.run("inspect", *ns, "-f", "{{.Task.Status}}", "nobody", "web", check=False)
    assert (done.returncode, done.stdout) == (1, "running\n") and "'nobody'" in done.stderr
    assert node.run("rm", *ns, "web", check=False).returncode == 1
    node.run("rm", *ns, "-f", "web")
    assert node.json("ps", *ns, "-a") == []
    done = node.run("rm", *ns, "nobody", check=False)
    assert done.returncode == 1 and "not found" in done.stderr


def test_stop_sends_the_containers_own_signal(node: Node, ns: list[str], pulled: str) -> None:
    script = "trap 'exit 7' USR1; echo up; while :; do sleep 0.05; done"
    node.run("run", *ns, "-d", "--name", "polite", "--stop-signal", "SIGUSR1", pulled, "sh", "-c", script)
    node.run("stop", *ns, "-t", "20", "polite")
    assert node.run("wait", *ns, "polite").stdout == "7\n"
    node.run("rm", *ns, "polite")


def test_exec_is_no_more_than_its_container(node: Node, ns: list[str], pulled: str) -> None:
    node.run("run", *ns, "-d", "--name", "bare", "--cap-drop", "ALL", "-u", "12:34", pulled, "sleep", "1000")
    script = "grep -E '^Cap(Bnd|Eff)' /proc/self/status | cut -f2; id -u"
    assert node.run("exec", *ns, "bare", "sh", "-c", script).stdout.split() == ["0" * 16, "0" * 16, "12"]
    more = node.run("exec", *ns, "-u", "0", "--privileged", "-w", "/tmp", "bare", "sh", "-c", script + "; pwd").stdout
    assert int(more.split()[0], 16) > 0xA80425FB and more.split()[2:] == ["0", "/tmp"]
    assert node.run("exec", *ns, "-d", "bare", "touch", "/tmp/done").stdout == ""
    assert node.run("exec", *ns, "bare", "/nonexistent", check=False).returncode == 127
    assert node.run("exec", *ns, "-w", "/proc/self/fd/8", "bare", "true", check=False).returncode == 125
    node.run("rm", *ns, "-f", "bare")


def test_a_detached_terminal(node: Node, ns: list[str], pulled: str) -> None:
    node.run("run", *ns, "-d", "-t", "--name", "term", pulled, "sh", "-c", "tty > /where; sleep 1000")
    eventually(
        lambda: "/dev/" in node.run("exec", *ns, "term", "cat", "/where", check=False).stdout, "it has no terminal"
    )
    node.run("rm", *ns, "-f", "term")


def test_a_shim_v2_runs_and_ends(node: Node, ns: list[str], pulled: str) -> None:
    """In a service as it is run: what its event loop hands to children must not keep the shim's caller waiting."""
    if shutil.which("containerd-shim-runc-v2") is None:
        pytest.skip("containerd-shim-runc-v2 is not installed")
    flags = ["--runtime", "io.containerd.runc.v2"]
    assert inside(node, ns, pulled, *flags, script="echo by a shim") == "by a shim"
    assert node.json("ps", *ns, "-a") == []


def test_a_platform_by_name(node: Node, ns: list[str], registry: images.Registry) -> None:
    """It is pulled where it is not here, and what is made of it is of that platform, too."""
    image = f"{registry.address}/test/platforms:latest"
    registry.push(images.platforms(), "test/platforms")
    other = next(name for name in ("amd64", "arm64") if name != images.architecture())
    say = "echo $BUILT_FOR"  # both have this host's busybox
    assert inside(node, ns, image, script=say) == images.architecture()
    far = ["--platform", other, "--security-opt", "seccomp=unconfined"]
    assert node.run("run", *ns, "--rm", *far, "--pull", "never", image, "true", check=False).returncode == 125
    assert inside(node, ns, image, *far, script=say) == other
    assert inside(node, ns, image, script=say) == images.architecture()

    node.run("run", *ns, *far, "--name", "far", image, "touch", "/new")
    node.run("commit", *ns, "far", "made:1")
    (told,) = node.json("images", "inspect", *ns, "made:1")
    assert [own["platform"].partition("/v")[0] for own in told["platforms"]] == [f"linux/{other}"]
    node.run("rm", *ns, "far")

    for reference, platform, why in (
        (image, "s390x", "s390x"), (image, "a/b/c/d", "not valid"), ("made:1", "s390x", "and not for linux/s390x"),
    ):  # fmt: skip
        refused = node.run("create", *ns, "--platform", platform, "--pull", "never", reference, check=False)
        assert refused.returncode == 1 and why in refused.stderr, refused.stderr

"""A tenant on a real node: everything in its own namespace, nothing outside it, and no way up to the host."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import wherry
from node import WHERRY, Node, eventually
from wherry.spec import MOUNTS, Options, User, make
from wherry_shared.errors import FailedPrecondition, InvalidArgument, PermissionDenied, WherryError
from wherry_shared.values import Descriptor, Mount


@pytest.fixture
def creds(node: Node, namespace: str) -> Path:
    return Path(node.run("auth", "tenant", namespace, "--state", str(node.state)).stdout.strip())


@pytest.fixture
async def tenant(node: Node, namespace: str, creds: Path) -> AsyncIterator[wherry.Client]:
    for _ in range(600):
        try:
            client = await wherry.connect(state=str(node.state), namespace=namespace, creds=str(creds))
        except wherry.Unauthenticated:  # nats-server is reading its users again
            await asyncio.sleep(0.1)
        else:
            break
    async with client:
        yield client


async def test_a_tenant_runs_a_container(tenant: wherry.Client, node: Node, namespace: str, busybox_ref: str) -> None:
    image = await tenant.pull(busybox_ref, unpack=True)
    container = await tenant.new_container("mine", image, args=["sleep", "100"])
    async with container.new_task() as task:
        await task.start()
        assert (await task.run(["echo", "hi"])).stdout == b"hi\n"
    await container.delete(snapshot=True)
    # What happens in a namespace makes it known, without a right to create one.
    assert namespace in [row["name"] for row in node.json("ns", "ls")]


async def test_another_namespace_is_closed(tenant: wherry.Client) -> None:
    for namespace in ("default", "k8s.io"):
        other = wherry.Client(tenant.bus, namespace, tenant.address)
        with pytest.raises(PermissionDenied):
            await other.images.walk()
        with pytest.raises(PermissionDenied):
            await other.tasks.kill("steady", 9)
        with pytest.raises(PermissionDenied):
            await tenant.bus.subscribe(namespace=namespace)
    with pytest.raises(PermissionDenied):
        await tenant.namespaces.create("mine-too")


@pytest.mark.parametrize(
    "change",
    [
        {"mounts": [*MOUNTS, {"destination": "/host", "type": "bind", "source": "/", "options": ["rbind"]}]},
        {"hooks": {"prestart": [{"path": "/bin/sh"}]}},
        {"linux": {"namespaces": [{"type": "mount"}], "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"]}},
        {"root": {"path": "/"}},
        {"Hooks": {"createRuntime": [{"path": "/bin/sh"}]}},
    ],
    ids=["host mount", "hooks", "host namespaces", "host root", "hooks by another name"],
)
async def test_no_way_to_the_host(tenant: wherry.Client, busybox_ref: str, change: dict[str, object]) -> None:
    image = await tenant.pull(busybox_ref, unpack=True)
    resolved = await image.resolve()
    spec = make("bad", resolved.config, Options(args=["true"]), User()) | change
    container = await tenant.new_container("bad", image, spec=spec)
    with pytest.raises(PermissionDenied):
        await container.new_task()
    await container.delete(snapshot=True)


@pytest.mark.parametrize(
    ("kind", "place", "path"),
    [("proc", "/p", "/p/sys/kernel/core_pattern"), ("sysfs", "/sys", "/sys/kernel/profiling")],
)
async def test_no_way_to_the_kernels_settings(
    tenant: wherry.Client, node: Node, busybox_ref: str, kind: str, place: str, path: str
) -> None:
    """A second proc has no path that is masked: its core_pattern is a program that the kernel runs as the host's root,
    and a writable sysfs is the host's."""
    image = await tenant.pull(busybox_ref, unpack=True)
    spec = make("bad", (await image.resolve()).config, Options(args=["sleep", "1000"]), User())
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != place]
    spec["mounts"].append({"destination": place, "type": kind, "source": kind, "options": ["nosuid"]})
    container = await tenant.new_container("bad", image, spec=spec)
    with pytest.raises(PermissionDenied, match=f"{kind} at '{place}'"):
        async with container.new_task() as task:
            await task.start()
            wrote = await task.run(["sh", "-c", f"was=$(cat {path}) && echo $was > {path}"])  # what it was
            assert wrote.code, f"{path} is the host's, and was written"
    await container.delete(snapshot=True)


@pytest.mark.parametrize("snapshotter", ["native", "overlay"])
async def test_no_two_containers_write_to_one_root_filesystem(
    tenant: wherry.Client, node: Node, busybox_ref: str, snapshotter: str
) -> None:
    """While a runtime makes the second one's mounts, the first one moved its /proc to where nothing is protected: its
    core_pattern is a program that the kernel runs as the host's root."""
    image = await tenant.pull(busybox_ref, unpack=True, snapshotter=snapshotter)
    first = await tenant.new_container("first", image, args=["sleep", "1000"], snapshotter=snapshotter)
    second = await tenant.containers.create(first.record.model_copy(update={"id": "second"}))
    async with first.new_task() as task:
        await task.start()
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match="in use: task first"):
                await tenant.tasks.create("second", await first.mounts())
            node.wait_restarted("task", node.kill("task"))
        await task.kill(9)
        await task.wait()
        assert await tenant.tasks.create("second", await first.mounts()), "what has ended writes no more"
        await tenant.tasks.delete("second")
    await tenant.containers.delete(second.id)
    await first.delete(snapshot=True)


async def test_foreign_directories_are_no_mounts_for_a_tenant(
    tenant: wherry.Client, busybox_ref: str, tmp_path: Path
) -> None:
    image = await tenant.pull(busybox_ref, unpack=True)
    layer = (await image.resolve()).manifest.layers[0]
    stolen = [Mount(type="bind", source=str(tmp_path), options=["rw", "rbind"])]
    with pytest.raises(PermissionDenied):
        await tenant.diff.apply(layer, stolen)
    assert list(tmp_path.iterdir()) == []
    container = await tenant.new_container("root", image, args=["true"])
    with pytest.raises(PermissionDenied):
        await container.new_task(mounts=stolen)
    with pytest.raises(PermissionDenied):
        await container.new_task(runtime="/bin/sh")
    await container.delete(snapshot=True)


async def test_stdio_stays_in_the_nodes_own_directory(tenant: wherry.Client, busybox_ref: str, tmp_path: Path) -> None:
    from wherry_shared.api.task import Stdio

    image = await tenant.pull(busybox_ref, unpack=True)
    container = await tenant.new_container("out", image, args=["echo", "x"])
    mounts = await container.mounts()
    for path in (f"file://{tmp_path}/out", "file:///etc/passwd", "/etc/passwd", "binary:///bin/sh", "relative"):
        with pytest.raises(WherryError) as refused:
            await tenant.tasks.create("out", mounts, Stdio(stdout=path))
        assert type(refused.value) in (PermissionDenied, wherry.Unimplemented, InvalidArgument)
    assert list(tmp_path.iterdir()) == []
    await container.delete(snapshot=True)


async def test_content_is_not_shared_between_namespaces(tenant: wherry.Client, node: Node, busybox_ref: str) -> None:
    """Who knows a digest cannot read the blob with it (policy `isolated`)."""
    node.run("pull", busybox_ref)
    digest = node.json("images")[0]["digest"]
    with pytest.raises(wherry.NotFound):
        await tenant.content.read(digest)
    with pytest.raises(wherry.NotFound):
        await tenant.content.locate(digest)
    # On a node where others delete, what nothing keeps is collected at once.
    mounts = await tenant.snapshots.prepare("overlay", "spy", labels={"containerd.io/gc.root": "true"})
    layer = Descriptor(media_type="application/vnd.oci.image.layer.v1.tar", digest=digest, size=1)
    with pytest.raises(wherry.NotFound):
        await tenant.diff.apply(layer, mounts)
    await tenant.snapshots.remove("overlay", "spy")


async def test_no_way_to_the_host_by_a_restart_policy(
    tenant: wherry.Client, node: Node, namespace: str, creds: Path, busybox_ref: str, tmp_path: Path
) -> None:
    """The keeper is an admin, and so is who types `wherry start`: what they run for a tenant is the tenant's."""
    own = {**node.environment, "WHERRY_CREDS": str(creds)}
    node.run("pull", "-n", namespace, busybox_ref, env=own)
    script = "touch /host/escaped; sleep 1000"
    node.run("create", "-n", namespace, "--restart", "always", "--name", "a", busybox_ref, "sh", "-c", script, env=own)
    record = await tenant.containers.get("a")
    assert record.tenant == f"tenant-{namespace}" and record.spec is not None
    record.spec["mounts"].append({
        "destination": "/host", "type": "bind", "source": str(tmp_path), "options": ["rbind", "rw"],
    })  # fmt: skip
    labels = {**record.labels, "containerd.io/restart.status": "running"}
    await tenant.containers.update(record.model_copy(update={"labels": labels, "tenant": ""}))
    await tenant.events.publish("/tasks/exit", {"id": "a", "container_id": "a"})
    eventually(lambda: any("may not run a container with a mount" in line for line in node.said), "it is not tried")
    refused = node.run("start", "-n", namespace, "a", check=False)
    assert refused.returncode and f"tenant-{namespace} may not run a container with a mount" in refused.stderr
    assert not list(tmp_path.iterdir())
    # The mount stays, or the keeper, which has read the record before, may start it with the log that it had then.
    unbounded = record.model_copy(update={"labels": {**labels, "wherry/log": "max_size=0"}})
    await tenant.containers.update(unbounded)
    refused = node.run("start", "-n", namespace, "a", check=False)
    assert refused.returncode and "may not have logs of 0 bytes" in refused.stderr
    node.run("rm", "-f", "-n", namespace, "a")
    node.run(
        "create", "-n", namespace, "--name", "b", "-v", f"{tmp_path}:/host", busybox_ref, "touch", "/host/by-admin"
    )
    assert (await tenant.containers.get("b")).tenant == ""
    await tenant.containers.update(
        (await tenant.containers.get("b")).model_copy(update={"labels": {"a": "b"}}), ["labels"]
    )
    assert (await tenant.containers.get("b")).tenant == ""
    node.run("start", "-n", namespace, "b")
    eventually(lambda: (tmp_path / "by-admin").exists(), "an admin may")
    changed = await tenant.containers.get("b")
    assert changed.spec is not None
    changed.spec["process"]["args"] = ["touch", "/host/by-tenant"]
    assert (await tenant.containers.update(changed, ["spec"])).tenant == f"tenant-{namespace}"
    assert node.run("start", "-n", namespace, "b", check=False).returncode
    node.run("rm", "-f", "-n", namespace, "b")
    assert not (tmp_path / "by-tenant").exists()


async def test_no_way_to_the_host_by_an_admins_exec(
    tenant: wherry.Client, node: Node, namespace: str, creds: Path, busybox_ref: str
) -> None:
    """`exec` takes the rights of a process from the record, which the tenant may write while its container runs."""
    own = {**node.environment, "WHERRY_CREDS": str(creds)}
    node.run("run", "-d", "-n", namespace, "--name", "a", busybox_ref, "sleep", "1000", env=own)
    effective = ["exec", "-n", namespace, "a", "grep", "CapEff", "/proc/self/status"]
    assert "a80425fb" in node.run(*effective).stdout
    record = await tenant.containers.get("a")
    assert record.spec is not None
    every = ["CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_SYS_PTRACE"]
    record.spec["process"]["capabilities"] = {"bounding": every, "effective": every, "permitted": every}
    record.spec["process"]["noNewPrivileges"] = False
    await tenant.containers.update(record, ["spec"])
    for command in (effective, ["exec", "--privileged", *effective[1:]]):
        refused = node.run(*command, check=False)
        assert refused.returncode and f"tenant-{namespace} may not run" in refused.stderr, refused.stdout
    node.run("rm", "-f", "-n", namespace, "a")


async def test_whose_namespaces_an_admins_container_shares_is_not_the_tenants_to_say(
    tenant: wherry.Client, node: Node, namespace: str, busybox_ref: str
) -> None:
    """In the mount namespace of another container an admin's runs that one's programs, with the admin's rights."""
    node.run("run", "-d", "-n", namespace, "--name", "trap", busybox_ref, "sleep", "1000")
    node.run("create", "-n", namespace, "--privileged", "--name", "b", busybox_ref, "sleep", "1000")
    record = await tenant.containers.get("b")
    joined = record.model_copy(update={"labels": {"wherry/join.mount": "trap"}})
    assert (await tenant.containers.update(joined, ["labels.wherry/join.mount"])).tenant == f"tenant-{namespace}"
    refused = node.run("start", "-n", namespace, "b", check=False)
    assert refused.returncode and f"tenant-{namespace} may not run" in refused.stderr
    node.run("rm", "-f", "-n", namespace, "trap", "b")


async def test_what_is_refused_does_not_fill_the_state_directory(tenant: wherry.Client, node: Node) -> None:
    """nats-server writes a line for each refusal, with the subject in it; /run lies in memory."""
    bus = tenant.bus.transport
    for _ in range(100):
        for _ in range(100):
            bus.publish(f"wherry.{'z' * 3000}", b"")
        await bus.flush()
    logs = [path.stat().st_size for path in node.state.glob("nats-server.log*")]
    assert 1 << 20 < sum(logs) < 16 << 20


def test_tenants_that_are_made_at_the_same_moment(node: Node, namespace: str) -> None:
    names = [f"{namespace}-{n}" for n in range(6)]
    making = [
        subprocess.Popen([WHERRY, "auth", "tenant", name], env=node.environment, stdout=subprocess.PIPE)
        for name in names
    ]
    assert [process.wait(60) for process in making] == [0] * len(names)
    for name in names:
        own = {**node.environment, "WHERRY_CREDS": str(node.state / "creds" / f"tenant-{name}.nk")}
        ps = ("ps", "-n", name)
        eventually(
            lambda own=own, ps=ps: not node.run(*ps, env=own, check=False).returncode, f"{name} is not let in", 5
        )


def test_a_tenant_of_a_node_that_is_down(tmp_path: Path) -> None:
    """A process that has got the number of its nats-server since then is not hung up on."""
    with subprocess.Popen(["sleep", "60"]) as other:
        for pid in (other.pid, 1 << 22):
            (tmp_path / "node.json").write_text(json.dumps({"node": "n1", "nats": "", "nats_pid": pid}))
            done = subprocess.run(
                [WHERRY, "auth", "tenant", "somebody", "--state", tmp_path], capture_output=True, text=True, check=False
            )
            assert done.returncode == 1 and "will know 'somebody' when it is started" in done.stderr
        assert other.poll() is None
        other.kill()
    assert (tmp_path / "creds" / "tenant-somebody.nk").exists()

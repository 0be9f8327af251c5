"""deploy/ and docker-compose.yml: accepted by the programs that they are for, and a node comes up as they say."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import deployed
import pytest
from deployed import DEPLOY, ROOT, UNITS, WHERRY
from natsd import BINARY, free_port
from wherry.node.supervisor import PRIVILEGED
from wherry_shared.api.image import Image, Images
from wherry_shared.api.lease import Leases
from wherry_shared.bus import Bus, connect, credentials, discovery
from wherry_shared.values import Descriptor

SERVICES = frozenset(credentials.CALLS)
UNPRIVILEGED = SERVICES - PRIVILEGED
PLACES = {"WHERRY_ROOT": "/srv/root", "WHERRY_STATE": "/srv/state", "WHERRY_CREDS": "/srv/creds"}
NOBODY = 65532
READY_SECONDS = 60.0


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    services: dict[str, Any] = deployed.compose(PLACES)["services"]
    return services


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can pass through, which pytest's own are not."""
    made = Path(tempfile.mkdtemp(prefix="wherry-deploy-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


# ---- docker-compose.yml


def test_every_service_is_composed_once_and_content_three_times(composed: dict[str, Any]) -> None:
    assert set(composed) == {*SERVICES, "auth", "keeper", "nats"}
    assert {name: s["deploy"]["replicas"] for name, s in composed.items() if "deploy" in s} == {"content": 3}
    for name in SERVICES:
        assert composed[name]["build"]["args"]["SERVICE"] == name
        assert composed[name]["restart"] == "unless-stopped"
        assert composed[name]["depends_on"]["nats"]["condition"] == "service_healthy"
    assert composed["nats"]["depends_on"]["auth"]["condition"] == "service_completed_successfully"


def test_only_task_is_privileged_and_only_three_are_root(composed: dict[str, Any]) -> None:
    for name, service in composed.items():
        assert bool(service.get("privileged")) == (name == "task")
        if name != "task":
            assert service["cap_drop"] == ["ALL"] and service["read_only"] is True
            assert "no-new-privileges:true" in service["security_opt"]
    assert {name for name in SERVICES if "user" not in composed[name]} == PRIVILEGED
    for name in [*UNPRIVILEGED, "nats"]:
        assert composed[name]["user"] == f"{NOBODY}:{NOBODY}" and not composed[name].get("cap_add")


def test_each_container_sees_its_own_seed_and_its_own_files(composed: dict[str, Any]) -> None:
    for name in SERVICES:
        folders = deployed.mounts(composed[name])
        assert folders.pop("/creds") == (f"/srv/creds/{name}", "ro")
        assert not any(source.startswith("/srv/creds") for source, _ in folders.values())
        if name in UNPRIVILEGED:
            assert folders == {f"/srv/root/{name}": (f"/srv/root/{name}", "rw")}
        # Paths are handed from service to service: they mean the same everywhere.
        assert all(source == target for target, (source, _) in folders.items())
    task = deployed.mounts(composed["task"])
    assert task["/srv/root"][1] == task["/srv/state"][1] == "rshared"


def test_the_bus_is_published_on_the_loopback_alone(composed: dict[str, Any]) -> None:
    assert [name for name, service in composed.items() if service.get("ports")] == ["nats"]
    (port,) = composed["nats"]["ports"]
    assert port == "127.0.0.1:4222:4222/tcp" or (port["host_ip"], str(port["published"])) == ("127.0.0.1", "4222")


def test_the_dockerfile_has_what_the_composition_builds(composed: dict[str, Any]) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    assert {service["build"].get("target", "service") for service in composed.values()} <= stages
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert "[" in source or (ROOT / source).exists(), source


# ---- the credentials


def test_each_service_gets_a_folder_of_its_own(place: Path) -> None:
    creds, root = place / "creds", place / "root"
    _auth_init(creds, "--user", f"{NOBODY}:{NOBODY}", "--root", str(root), "--tenant", "team")
    for name in SERVICES:
        owner = 0 if name in PRIVILEGED else NOBODY
        assert {f.name for f in (creds / name).iterdir()} == {f"{name}.nk", credentials.IDENTITIES}
        for path in (creds / name, *(creds / name).iterdir(), root / name):
            assert path.stat().st_uid == owner and not stat.S_IMODE(path.stat().st_mode) & 0o077, path
        assert (creds / name / f"{name}.nk").read_bytes() == (creds / f"{name}.nk").read_bytes()
    assert {f.name for f in (creds / "nats").iterdir()} == {credentials.NATS_USERS}


def test_a_tenant_made_later_is_seen_in_folders_that_are_in_use(place: Path) -> None:
    creds = place / "creds"
    _auth_init(creds, "--user", f"{NOBODY}:{NOBODY}")
    folder = os.open(creds / "image", os.O_RDONLY | os.O_DIRECTORY)  # as a mount holds it
    seed = (creds / "image" / "image.nk").read_bytes()
    _auth_init(creds, "--user", f"{NOBODY}:{NOBODY}", "--tenant", "team")
    with open(os.open("identities.json", os.O_RDONLY, dir_fd=folder)) as f:
        assert "tenant-team" in {identity["name"] for identity in json.load(f).values()}
    os.close(folder)
    assert (creds / "image" / "image.nk").read_bytes() == seed


def _auth_init(creds: Path, *arguments: str, node: str = "n1") -> None:
    command = [WHERRY, "auth", "init", str(creds), *arguments]
    subprocess.run(command, env={**deployed.outside(), "WHERRY_NODE": node}, check=True, capture_output=True)


# ---- units


needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
NAMES = [
    "wherry.target",
    "wherry-auth.service",
    "wherry-nats.service",
    "wherry-keeper.service",
    *(f"wherry@{n}.service" for n in sorted(SERVICES)),
]


def test_each_service_that_needs_no_root_has_a_user_and_a_sandbox() -> None:
    for name in SERVICES:
        settings = deployed.unit("wherry@.service", name)
        assert settings.get("User") == (["wherry"] if name in UNPRIVILEGED else None)
        assert ("NoNewPrivileges" in settings) == (name != "task")
        if name in UNPRIVILEGED:
            assert settings["BindReadOnlyPaths"] == [f"/etc/wherry/creds/{name}"]
    assert f"wherry@{'.service wherry@'.join(sorted(SERVICES))}.service".split() == sorted(
        word for line in deployed.unit("wherry.target")["Wants"] for word in line.split() if "@" in word
    )


def test_a_restart_of_task_ends_the_service_alone() -> None:
    task = deployed.unit("wherry@.service", "task")
    assert task["KillMode"] == ["process"] and task["Delegate"] == ["yes"]
    assert task["RuntimeDirectoryPreserve"] == ["yes"]
    # Any of these gives it a mount namespace of its own, which what it leaves behind would not share.
    assert not {key for key in task if key.startswith(("Private", "Protect", "Bind", "TemporaryFile"))}
    for name in SERVICES:
        assert "Requires" not in deployed.unit("wherry@.service", name)


@needs_systemd
def test_systemd_accepts_the_units() -> None:
    script = (
        'mount -t tmpfs none /opt && mkdir -p /opt/wherry && ln -s "$1" /opt/wherry/bin && shift && '
        'exec systemd-analyze verify --man=no "$@"'
    )
    command = ["unshare", "--mount", "sh", "-ec", script, "sh", str(Path(sys.executable).parent), *NAMES]
    said = subprocess.run(command, env=_unit_path(), capture_output=True, text=True)
    complaints = [line for line in said.stderr.splitlines() if "wherry" in line]
    assert (said.returncode, complaints) == (0, []), said.stderr


@needs_systemd
@pytest.mark.parametrize("name", ["wherry-nats.service", *(f"wherry@{n}.service" for n in sorted(UNPRIVILEGED))])
def test_systemd_finds_little_that_an_unprivileged_service_is_exposed_to(name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", name]
    said = subprocess.run(command, env=_unit_path(), capture_output=True, text=True)
    assert said.returncode == 0, said.stdout[-300:] + said.stderr


def _unit_path() -> dict[str, str]:
    return {**os.environ, "SYSTEMD_UNIT_PATH": f"{UNITS}:"}


def test_the_user_and_the_directories_are_declared(tmp_path: Path) -> None:
    if not shutil.which("systemd-sysusers"):
        pytest.skip("systemd-sysusers is not installed")
    (tmp_path / "etc").mkdir()
    for kind in ("sysusers", "tmpfiles"):
        (tmp_path / "usr/lib" / f"{kind}.d").mkdir(parents=True)
        shutil.copy(UNITS / f"wherry.{kind}", tmp_path / f"usr/lib/{kind}.d/wherry.conf")
    subprocess.run(["systemd-sysusers", f"--root={tmp_path}", "wherry.conf"], check=True, capture_output=True)
    assert "\nwherry:" in "\n" + (tmp_path / "etc/passwd").read_text()
    subprocess.run(["systemd-tmpfiles", "--create", f"--root={tmp_path}", "wherry.conf"], check=True)
    for path in ("var/lib/wherry", "run/wherry"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o711
    assert (tmp_path / "etc/wherry/nats/users").is_dir()


# ---- a node of separately started processes


def test_a_node_comes_up_as_composed(place: Path) -> None:
    settings = {
        "WHERRY_ROOT": str(place / "root"),
        "WHERRY_STATE": str(place / "state"),
        "WHERRY_CREDS": str(place / "creds"),
    }
    services = deployed.compose({**settings, "WHERRY_NODE": "composed"})["services"]
    auth = services["auth"]
    command = [_outside(word, deployed.mounts(auth)) for word in auth["command"]]
    subprocess.run(
        [WHERRY, *command], env={**deployed.outside(), **auth["environment"]}, check=True, capture_output=True
    )
    port = free_port()
    bus = {
        **_image_settings(),
        **services["nats"]["environment"],
        "WHERRY_NATS_HOST": "127.0.0.1",
        "WHERRY_NATS_PORT": str(port),
    }
    bus["WHERRY_NATS_STORE"] = _outside(bus["WHERRY_NATS_STORE"], deployed.mounts(services["nats"]))
    config = deployed.install_nats(place / "nats", place / "creds" / "nats") / "node.conf"
    with ExitStack() as stack:
        stack.enter_context(deployed.nats(config, bus, port, place / "nats.log"))
        expected = {}
        for name in sorted(UNPRIVILEGED):
            environment = {**services[name]["environment"], "WHERRY_NATS": f"nats://127.0.0.1:{port}"}
            environment["WHERRY_CREDS"] = _outside("/creds", deployed.mounts(services[name]))
            expected[name] = services[name].get("deploy", {}).get("replicas", 1)
            for _ in range(expected[name]):
                _start(stack, name, environment, place, services[name]["user"])
        asyncio.run(_check(f"nats://127.0.0.1:{port}", "composed", place, expected))


def test_a_node_comes_up_as_the_units_say(place: Path) -> None:
    _auth_init(place / "etc/wherry/creds", "--user", f"{NOBODY}:{NOBODY}", "--root", str(place / "var/lib/wherry"))
    port = free_port()
    moved = {"/etc/wherry": str(place / "etc/wherry"), "/var/lib/wherry": str(place / "var/lib/wherry")}
    settings = {k: _moved(v, moved) for k, v in deployed.unit_environment(deployed.unit("wherry-nats.service")).items()}
    settings |= {"WHERRY_NATS_PORT": str(port), "WHERRY_NATS_NAME": "'12345'"}
    deployed.install_nats(place / "etc/wherry/nats", place / "etc/wherry/creds/nats")
    with ExitStack() as stack:
        config = Path(settings["WHERRY_NATS_CONFIG"])
        stack.enter_context(deployed.nats(config, settings, port, place / "nats.log"))
        for name in ("image", "lease"):
            unit = deployed.unit("wherry@.service", name)
            assert unit["ExecStart"] == [f"/opt/wherry/bin/wherry-{name}"]
            environment = {k: _moved(v, moved) for k, v in deployed.unit_environment(unit).items()}
            environment |= {"WHERRY_NATS": f"nats://127.0.0.1:{port}", "WHERRY_NODE": "n1"}
            _start(stack, name, environment, place, f"{NOBODY}:{NOBODY}")
        asyncio.run(_check(f"nats://127.0.0.1:{port}", "n1", place / "etc/wherry", {"image": 1, "lease": 1}))


def _image_settings() -> dict[str, str]:
    """What the image of the bus sets itself."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ENV (GOMAXPROCS=.*)$", text, re.MULTILINE)
    return dict(word.partition("=")[::2] for word in line.split())


def _outside(path: str, mounts: Mapping[str, tuple[str, str]]) -> str:
    """A container's path as the host's."""
    for target, (source, _) in mounts.items():
        if path == target or path.startswith(f"{target}/"):
            return source + path.removeprefix(target)
    return path


def _moved(text: str, moved: Mapping[str, str]) -> str:
    for old, new in moved.items():
        text = text.replace(old, new)
    return text


def _start(stack: ExitStack, name: str, environment: Mapping[str, str], place: Path, user: str) -> None:
    """Another user runs it where another user can read the checkout."""
    readable = all(p.stat().st_mode & 0o005 == 0o005 for p in (Path(sys.executable).parent, ROOT, *ROOT.parents))
    uid = int(user.partition(":")[0]) if readable else None
    if uid is None:
        for folder in (place / "creds" / name, place / "etc/wherry/creds" / name):
            for path in (folder, *folder.glob("*")) if folder.exists() else ():
                os.chown(path, 0, 0)
    command = [sys.executable, "-m", f"wherry_{name}"]
    stack.enter_context(deployed.running(command, environment, user=uid, log=place / f"{name}.log"))


async def _check(url: str, node: str, place: Path, expected: Mapping[str, int]) -> None:
    """Everybody answers on the bus, as often as it was started, and a call goes through."""
    admin = credentials.find(place / "creds", "admin")
    bus = await connect([url], node=node, name="test", seed=admin.seed, inbox_prefix=admin.inbox_prefix)
    try:
        counted: dict[str, int] = {}
        deadline = time.monotonic() + READY_SECONDS
        while counted != expected and time.monotonic() < deadline:
            counted = await _count(bus, node, sum(expected.values()))
        logs = "".join(path.read_text()[-500:] for path in place.parent.glob(f"{place.name}/*.log"))
        assert counted == expected, logs
        images = bus.proxy(Images, namespace="default")
        await images.create(Image(name="redis", target=Descriptor(media_type="m", digest=f"sha256:{'a' * 64}", size=1)))
        assert (await images.get("redis")).name == "redis"
        assert (await bus.proxy(Leases, namespace="default").create("l1")).id == "l1"
    finally:
        await bus.close()


async def _count(bus: Bus, node: str, expect: int) -> dict[str, int]:
    answers = await discovery.ask_all(bus.transport, "PING", wait=1.0, expect=expect)
    names = [answer["name"] for answer in answers if answer["metadata"]["node"] == node]
    return {name: names.count(name) for name in names}


# ---- a service's own environment

OURS = {*(f"wherry_{name}" for name in SERVICES), "wherry"}
CLIENTS = {"h11", "typer", "rich", "nats_server"}
REPORT = """
import importlib, importlib.util, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps([name for name in sys.argv[2:] if importlib.util.find_spec(name)]))
"""


def test_a_service_installs_alone(tmp_path: Path) -> None:
    """`uv sync --package wherry-X --no-dev --no-editable`, as the Dockerfile does it, for each X: all that it imports
    is there, and no other service, no client, nothing of the client's. Needs the package index, or uv's cache of it."""
    uv = shutil.which("uv", path=f"{ROOT / '.tools/bin'}:{os.environ['PATH']}")
    assert uv, "uv is not installed: deploy/bootstrap.sh does that"
    source, environment = _copy_workspace(tmp_path / "source"), tmp_path / "venv"
    for name in sorted(SERVICES):
        _sync(uv, source, environment, f"wherry-{name}")
        program = subprocess.run([environment / f"bin/wherry-{name}", "--help"], capture_output=True, text=True)
        assert program.returncode == 0 and f"Wherry's {name} service" in program.stdout, program.stderr
        command = [environment / "bin/python", "-I", "-c", REPORT, f"wherry_{name}.__main__", *sorted(OURS | CLIENTS)]
        report = subprocess.run(command, capture_output=True, text=True)
        assert report.returncode == 0, report.stderr
        assert json.loads(report.stdout) == [f"wherry_{name}"]


def _copy_workspace(target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("shared", "client", "services"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("pyproject.toml", "uv.lock"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    return target


def _sync(uv: str, source: Path, environment: Path, package: str) -> None:
    command = [uv, "sync", "--quiet", "--package", package, "--no-dev", "--no-editable"]
    settings = {
        **{k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}, "UV_PROJECT_ENVIRONMENT": str(environment),
        "UV_PYTHON_DOWNLOADS": "never", "UV_PYTHON": os.path.realpath(getattr(sys, "_base_executable", sys.executable)),
    }  # fmt: skip
    said = subprocess.run(command, cwd=source, env=settings, capture_output=True, text=True)
    if said.returncode and re.search(r"error sending request|dns error|Failed to fetch", said.stderr):
        pytest.skip(f"the package index cannot be reached: {said.stderr.strip().splitlines()[-1]}")
    assert said.returncode == 0, said.stderr


# ---- nats-server


def test_nats_server_accepts_a_nodes_configuration_and_no_anonymous_one(place: Path) -> None:
    _auth_init(place / "creds", "--user", f"{NOBODY}:{NOBODY}")
    config = deployed.install_nats(place / "nats", place / "creds" / "nats") / "node.conf"
    unit = deployed.unit_environment(deployed.unit("wherry-nats.service"))
    for settings in (_image_settings(), {**unit, "WHERRY_NATS_NAME": "'12345'"}):
        said = subprocess.run(
            [BINARY, "-t", "--config", config], env={**os.environ, **settings}, capture_output=True, text=True
        )
        assert said.returncode == 0 and "is valid" in said.stderr + said.stdout, said.stderr
    assert "no_auth_user" not in config.read_text() and "http" not in config.read_text()
    (place / "nats" / "users").unlink()
    refused = subprocess.run(
        [BINARY, "-t", "--config", config], env={**os.environ, **_image_settings()}, capture_output=True
    )
    assert refused.returncode != 0

"""The shape of the house: the map rule, the rooms of a service, and the pages that must say what the code does.

Which file may import which is import-linter's (pyproject.toml); the rest of the rules is held here.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.metadata
import inspect
import ipaddress
import keyword
import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from wherry.cli import VERBS
from wherry_shared import wire
from wherry_shared.api import contracts

ROOT = Path(__file__).parent.parent
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if path.is_dir())
DISTRIBUTIONS = {
    "shared": ROOT / "shared", "client": ROOT / "client", **{name: ROOT / "services" / name for name in SERVICES}
}  # fmt: skip
FOLDERS = ("shared", "services", "client", "examples", "bench", "deploy", "docs", "tests", ".ci")

FILE_LINES, FILE_LINES_MAX = 400, 600
FUNCTION_LINES, FUNCTION_LINES_MAX = 20, 60
# `<file>:<function>` -> why it is longer than FUNCTION_LINES_MAX.
LONG_FUNCTIONS: dict[str, str] = {}

# A name that says nothing of what is inside becomes a place for everything.
NO_NAMES = {"common", "core", "helper", "helpers", "lib", "misc", "models", "shared", "tools", "types", "util", "utils"}
# Files of the command line that are no verbs.
CLI_SUPPORT = {"__init__", "app", "common", "rehearsal", "runner", "spares", "terminal", "warm"}
# Topics that a service puts together: the pattern, and the words that stand in the braces.
FORMATTED_TOPICS = {
    ("snapshot", "/snapshot/{}"): {"prepare", "commit", "remove"},
    ("task", "/tasks/{}"): {"paused", "resumed"},
}
MACHINE = "/wo" + "rk/"  # where this is developed; written so that this file does not contain it
PUBLIC_HOSTS = {"docker.io", "github.com", "in-toto.io", "index.docker.io", "www.w3.org"}


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders or FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__pycache__" not in path.parts:
                yield path


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def package(folder: str) -> str:
    return "wherry" if folder == "client" else f"wherry_{folder}"


def package_path(folder: str) -> Path:
    return DISTRIBUTIONS[folder] / package(folder)


def contract_of(service: str) -> Any:
    return next(contract for contract in contracts() if contract.service == service)


# ---- the map


def test_the_services_are_those_that_have_a_contract() -> None:
    assert sorted(contract.service for contract in contracts()) == SERVICES
    files = {p.stem for p in (ROOT / "shared/wherry_shared/api").glob("*.py")} - {"__init__", "gc"}
    assert sorted(files) == SERVICES


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_folder_distribution_and_import_have_one_name(folder: str) -> None:
    data = project(DISTRIBUTIONS[folder])
    assert data["project"]["name"] == package(folder).replace("_", "-")
    build = data["tool"]["uv"]["build-backend"]
    assert (build["module-name"], build["module-root"]) == (package(folder), "")
    assert (package_path(folder) / "__init__.py").is_file()
    assert (package_path(folder) / "py.typed").is_file()
    importable = [p.parent.name for p in DISTRIBUTIONS[folder].glob("*/__init__.py")]
    assert importable == [package(folder)], "a second import name, or a generic one, would shadow somebody's folder"
    assert not (DISTRIBUTIONS[folder] / "src").exists()
    assert Path(importlib.import_module(package(folder)).__file__ or "").parent == package_path(folder)


def test_the_workspace_has_every_distribution_and_no_other() -> None:
    data = project(ROOT)
    assert "project" not in data, "the root is virtual"
    members = {path for pattern in data["tool"]["uv"]["workspace"]["members"] for path in ROOT.glob(pattern)}
    assert members == set(DISTRIBUTIONS.values())
    with_project = {path.parent for path in ROOT.glob("*/pyproject.toml")} | {ROOT / "shared", ROOT / "client"}
    assert with_project | {ROOT / "services" / name for name in SERVICES} == members


def test_the_lists_of_services_are_complete() -> None:
    linter = project(ROOT)["tool"]["importlinter"]
    packages = {package(folder) for folder in DISTRIBUTIONS}
    assert set(linter["root_packages"]) == packages
    by_name = {contract["name"]: contract for contract in linter["contracts"]}
    assert set(by_name["Services never import each other"]["modules"]) == packages - {"wherry", "wherry_shared"}
    layered = {c for contract in linter["contracts"] for c in contract.get("containers", [])}
    assert packages <= layered, "each package has layers of its own, and they are exhaustive"
    assert all(c.get("exhaustive") for c in linter["contracts"] if "containers" in c)
    extra = project(ROOT / "client")["project"]["optional-dependencies"]["node"]
    assert {d for d in extra if d.startswith("wherry-")} == {f"wherry-{service}" for service in SERVICES}


def test_one_version() -> None:
    versions = {folder: project(path)["project"]["version"] for folder, path in DISTRIBUTIONS.items()}
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest, "CHANGELOG.md has no version"
    assert set(versions.values()) == {latest[1]}, f"CHANGELOG.md is at {latest[1]}, the packages at {versions}"


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_starts_in_each_way(service: str) -> None:
    target = f"wherry_{service}.__main__:main"
    data = project(DISTRIBUTIONS[service])["project"]
    assert data["scripts"] == {f"wherry-{service}": target}
    assert data["entry-points"]["wherry.services"] == {service: target}
    entry = importlib.metadata.entry_points(group="wherry.services", name=service)
    assert [e.value for e in entry] == [target], "installed is something else than pyproject.toml says: `uv sync`"
    main = next(iter(entry)).load()
    assert list(inspect.signature(main).parameters) == ["arguments"]
    last = tree(package_path(service) / "__main__.py").body[-1]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    main()", f"python -m wherry_{service} does nothing"


# ---- the rooms


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_its_rooms(service: str) -> None:
    home = package_path(service)
    for room in ("__main__.py", "service.py"):
        assert (home / room).is_file(), room
    assert (home.parent / "README.md").is_file(), "subjects, what lies where on disk, settings"
    contract = contract_of(service)
    bases = [
        ast.unparse(base) for node in tree(home / "service.py").body if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]  # fmt: skip
    assert contract.__name__ in bases, f"no class in service.py implements {contract.__name__}"
    assert {"build", "main"} <= definitions(home / "__main__.py")


@pytest.mark.parametrize("path", [*python_files("shared", "services")], ids=name_of)
def test_a_file_has_a_name_that_says_something(path: Path) -> None:
    inside = path.relative_to(ROOT).parts[1:]
    assert not NO_NAMES & {Path(part).stem for part in inside if part not in SERVICES}


@pytest.mark.parametrize("service", SERVICES)
def test_the_edge_has_no_bytes_and_sql_is_state(service: str) -> None:
    home = package_path(service)
    touched = {name.partition(".")[0] for name in imports(home / "service.py")}
    assert not touched & {"aiofiles", "shutil", "sqlite3", "subprocess"}
    assert "wherry_shared.sqlite" not in imports(home / "service.py")
    for path in python_files(f"services/{service}"):
        if path.name != "metadata.py":
            found = [c for c in strings(path) if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE) [A-Z]* ?\w", c)]
            assert not found, f"{name_of(path)} has SQL, which belongs into metadata.py: {found}"


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_sizes() -> None:
    """Beyond the soft numbers a warning: cut where the idea cuts. Beyond the hard ones a reason is owed."""
    too_long: list[str] = []
    for path in python_files():
        lines = len(path.read_text().splitlines())
        if lines > FILE_LINES_MAX:
            too_long.append(f"{name_of(path)}: {lines} lines")
        elif lines > FILE_LINES:
            warnings.warn(f"{name_of(path)} has {lines} lines", stacklevel=1)
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                place = f"{name_of(path)}:{node.name}"
                if lines > FUNCTION_LINES_MAX and place not in LONG_FUNCTIONS:
                    too_long.append(f"{place}: {lines} lines")
    assert not too_long, "cut where the idea cuts, or give a reason in LONG_FUNCTIONS"


def test_most_functions_are_short() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in python_files("shared", "services", "client") for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )  # fmt: skip
    ninth = lengths[len(lengths) * 9 // 10]
    if ninth > FUNCTION_LINES:
        warnings.warn(f"one function in ten has more than {ninth} lines", stacklevel=1)
    assert ninth <= FUNCTION_LINES_MAX // 2


# ---- what is installed is what is used


def imports(path: Path) -> set[str]:
    """The absolute imports of a file, also those inside of functions."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module}
    return found


@cache
def providers() -> dict[str, list[str]]:
    """Import name -> distributions."""
    return {k: [plain(d) for d in v] for k, v in importlib.metadata.packages_distributions().items()}


def plain(requirement: str) -> str:
    """The name of a requirement: `nats-py>=2.11` -> `nats-py`."""
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.mark.parametrize("folder", DISTRIBUTIONS)
def test_dependencies_are_what_is_imported(folder: str) -> None:
    declared = project(DISTRIBUTIONS[folder])["project"]
    required = {plain(d) for d in declared["dependencies"]}
    extras = {plain(d) for group in declared.get("optional-dependencies", {}).values() for d in group}
    modules = {name.partition(".")[0] for path in python_files(name_of(package_path(folder))) for name in imports(path)}
    modules -= {*sys.stdlib_module_names, package(folder)}
    used = {providers()[m][0] if m in providers() else m.replace("_", "-") for m in modules}
    used -= extras
    assert used == required, "imported but not declared, or declared but not imported"


# ---- what is told to the outside


def test_the_wire_is_as_written() -> None:
    written, real = (ROOT / "docs/wire.txt").read_text(), wire.text()
    if written != real:
        difference = difflib.unified_diff(
            written.splitlines(), real.splitlines(), "docs/wire.txt", "the contracts", lineterm="", n=2
        )
        pytest.fail(
            "the wire changed. If that is meant, and other versions can live with it:\n"
            "    python -m wherry_shared.wire > docs/wire.txt\n\n" + "\n".join(difference),
            pytrace=False,
        )


@pytest.mark.parametrize("service", SERVICES)
def test_events_are_those_of_the_contract(service: str) -> None:
    """Each topic that a service publishes is declared, and each that is declared is published."""
    published: set[str] = set()
    for path in python_files(f"services/{service}"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tx.publish":
                published |= topics(service, path, node)
    assert published == set(contract_of(service).events)


def topics(service: str, path: Path, call: ast.Call) -> set[str]:
    topic = call.args[0]
    where = f"{name_of(path)}:{call.lineno}"
    if isinstance(topic, ast.Constant):
        return {str(topic.value)}
    assert isinstance(topic, ast.JoinedStr), f"{where}: the topic is neither a literal nor an f-string"
    pattern = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in topic.values)
    words = FORMATTED_TOPICS.get((service, pattern))
    assert words, f"{where}: say in FORMATTED_TOPICS which topics {pattern} stands for"
    missing = words - set(strings(path))
    assert not missing, f"{where}: {missing} stand nowhere in this file"
    return {pattern.format(word) for word in words}


def test_formatted_topics_are_still_there() -> None:
    for service, pattern in FORMATTED_TOPICS:
        prefix = pattern.partition("{")[0]
        assert any(f'f"{prefix}{{' in path.read_text() for path in python_files(f"services/{service}")), pattern


# ---- pages


def test_one_request_names_what_exists() -> None:
    """Each file exists, and each `function()` is defined in a file that its section names."""
    page = (ROOT / "docs/one-request.md").read_text()
    named = 0
    for section in re.split(r"^#+ ", page, flags=re.MULTILINE):
        paths = [ROOT / name for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|txt|conf|json))`", section)]
        for path in paths:
            assert path.is_file(), f"docs/one-request.md names {name_of(path)}, which is not there"
        defined = {name for path in paths if path.suffix == ".py" for name in definitions(path)}
        for name in re.findall(r"`([\w.]+)\(\)`", section):
            assert name.rpartition(".")[2] in defined, f"docs/one-request.md: no {name}() in the files of its section"
            named += 1
    assert named > 20


def definitions(path: Path) -> set[str]:
    return {
        node.name for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *map(name_of, (ROOT / "deploy").glob("*.md"))])
def test_commands_in_the_pages_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    code = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL)
    verbs = {v for fence, span in code for v in re.findall(r"(?<![\w./@-])wherry ([a-z][\w-]*)", fence or span)}
    assert verbs <= {*VERBS, "import"}, f"{page} names verbs that the command line does not have"
    if page == "README.md":
        assert len(verbs) > 5


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_and_targets_in_the_pages_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), f"{page} links to {link}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} says `make {target}`"


def test_one_verb_one_file() -> None:
    files = {path.stem for path in (ROOT / "client/wherry/cli").glob("*.py")}
    files = {stem[:-1] if keyword.iskeyword(stem[:-1]) else stem for stem in files}
    assert files - CLI_SUPPORT == set(VERBS), "a verb without its file, or a file that is neither verb nor support"
    assert files >= CLI_SUPPORT


def test_decisions_are_numbered_without_gaps() -> None:
    pages = sorted((ROOT / "docs/decisions").iterdir())
    for number, path in enumerate(pages, 1):
        assert re.fullmatch(rf"{number:04}-[a-z0-9-]+\.md", path.name), f"{path.name} is not {number:04}-<title>.md"
        assert path.read_text().startswith(f"# {number:04} "), path.name


def texts() -> Iterator[tuple[Path, str]]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.iterdir() if path.name not in (".git", "uv.lock")]
    for path in files:
        if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts:
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                continue


def test_the_project_speaks_of_itself_alone() -> None:
    """No host but public ones, those of examples and addresses; no path of somebody's machine."""
    for path, text in texts():
        assert MACHINE not in text, f"{name_of(path)} names a path below {MACHINE}"
        for host in re.findall(r"https?://(?:[^\s/@'\"]*@)?([\w.-]+)", text):
            assert is_no_ones(host), f"{name_of(path)} names the host {host}"


def is_no_ones(host: str) -> bool:
    host = host.rstrip(".").lower()
    if host in PUBLIC_HOSTS or "." not in host or re.search(r"\.(example|invalid|test|localhost)$", host):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True

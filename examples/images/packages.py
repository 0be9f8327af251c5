"""Debian packages as material for layers: which ones are needed, where apt gets them, what is inside.

Needs apt and dpkg-deb, no rights beyond a readable package list. What was fetched once stays in the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .layer import Entry

# What maintainer scripts call at installation and a container never does.
INSTALLATION_ONLY = frozenset({
    "adduser", "debconf", "dpkg", "init-system-helpers", "install-info", "lsb-base", "passwd", "perl", "perl-base",
    "procps", "sysvinit-utils", "tar", "usr-is-merged", "usrmerge", "gcc-12-base", "gcc-14-base",
})  # fmt: skip
_UNUSED = re.compile(
    r"usr/share/(?!doc/[^/]+/copyright$)(doc|man|info|locale|lintian|bug|doc-base|bash-completion|apport)/"
    r"|usr/lib/[^/]+/(gconv|perl-base)/|usr/lib/(systemd|tmpfiles\.d|sysusers\.d)/"
    r"|etc/(init\.d|default|logrotate\.d|cron\.daily|apparmor\.d|ufw)/"
)
_MERGED = re.compile(r"(bin|sbin|lib|lib32|lib64|libx32)(/|$)")


class AptError(Exception):
    """apt does not know a package, or cannot fetch it; the message carries apt's own words."""


@dataclass(frozen=True)
class Package:
    """apt's candidate of one package. `depends` holds the alternatives of each dependency, in their order."""

    name: str
    version: str
    sha256: str
    depends: tuple[tuple[str, ...], ...]


def _run(*command: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AptError(f"{' '.join(command[:2])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _alternatives(field: str) -> tuple[tuple[str, ...], ...]:
    groups = (group.split("|") for group in field.split(",") if group.strip())
    return tuple(tuple(re.split(r"[\s(:]", name.strip(), maxsplit=1)[0] for name in group) for group in groups)


def _candidates(names: Iterable[str]) -> dict[str, Package]:
    """What apt's lists say of these names; virtual and unknown ones are missing from the answer."""
    known: dict[str, Package] = {}
    try:
        text = _run("apt-cache", "show", "--no-all-versions", *sorted(names))
    except AptError:
        return known  # none of the names is a package
    for stanza in text.strip().split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", stanza, re.MULTILINE))
        if "SHA256" in fields:  # an installed package that no list offers has none
            depends = _alternatives(fields.get("Pre-Depends", "")) + _alternatives(fields.get("Depends", ""))
            known[fields["Package"]] = Package(fields["Package"], fields["Version"], fields["SHA256"], depends)
    return known


def closure(roots: Sequence[str], without: frozenset[str] = INSTALLATION_ONLY) -> list[Package]:
    """The packages `roots` and all that they depend on, sorted by name, less `without` and what only those need.

    Of alternatives the first that is a real package is taken. Raises AptError for a root that apt does not know.
    """
    found: dict[str, Package] = {}
    level: list[tuple[str, ...]] = [(name,) for name in roots]
    while level:
        known = _candidates({name for group in level for name in group})
        following: list[tuple[str, ...]] = []
        for group in level:
            choice = next((known[name] for name in group if name in known), None)
            if choice is None and group[0] in roots:
                raise AptError(f"apt knows no package {group[0]}")
            if choice is not None and choice.name not in found:
                found[choice.name] = choice
                following += choice.depends
        level = [group for group in following if not (without | found.keys()).intersection(group)]
    return [found[name] for name in sorted(found)]


def _stored(package: Package, cache: Path) -> Path:
    return cache / f"{package.name}_{package.sha256[:16]}.deb"


def download(packages: Sequence[Package], cache: Path) -> list[Path]:
    """The package files, fetched by apt where the cache lacks them and held against the lists' sha256."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = {package.sha256: package for package in packages if not _stored(package, cache).exists()}
    if missing:
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as aside:
            wanted = [f"{package.name}={package.version}" for package in missing.values()]
            _run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *wanted, cwd=Path(aside))
            for path in Path(aside).glob("*.deb"):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest in missing:
                    path.rename(_stored(missing.pop(digest), cache))
    if missing:
        raise AptError(f"not the files that the lists promise: {', '.join(p.name for p in missing.values())}")
    return [_stored(package, cache) for package in packages]


def fetch(roots: Sequence[str], cache: Path, without: frozenset[str] = INSTALLATION_ONLY) -> list[Path]:
    """The files of the closure of `roots`; lists that are absent or out of date are renewed once (as root)."""
    try:
        return download(closure(roots, without), cache)
    except AptError:
        _run("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "update")
        return download(closure(roots, without), cache)


def version(deb: Path) -> str:
    """The upstream version: without epoch and Debian revision."""
    return re.sub(r"^\d+:|-[^-]*$", "", _run("dpkg-deb", "--field", str(deb), "Version").strip())


def used_by_containers(path: str) -> bool:
    """False for documentation (licences stay), translations, character sets, and the host's service files."""
    return _UNUSED.match(path + "/") is None and _UNUSED.match(path) is None


def merged(path: str) -> str:
    """Where a path lies on a system whose /bin, /sbin and /lib are links into /usr, as Debian 12's are."""
    return f"usr/{path}" if _MERGED.match(path) else path


def contents(deb: Path, keep: Callable[[str], bool] = lambda path: True) -> Iterator[Entry]:
    """The package's files in its own order, owned by root, on merged paths; devices and FIFOs are left out."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                path = merged(member.name.removeprefix("./").strip("/"))
                if path in ("", ".") or not keep(path) or member.isdev():
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                target = merged(member.linkname.removeprefix("./")) if member.islnk() else member.linkname
                kind = tarfile.REGTYPE if member.isreg() else member.type
                yield Entry(path, kind, member.mode & 0o7777, file.read() if file else b"", target)
        process.stdout.read()  # the padding behind the archive's end: dpkg-deb fails on a pipe closed early
    if process.returncode:
        raise AptError(f"dpkg-deb cannot read {deb.name}: status {process.returncode}")

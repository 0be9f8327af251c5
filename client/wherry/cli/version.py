"""`wherry version`: loads nothing but what reads a version."""

from __future__ import annotations


def show(arguments: list[str]) -> None:
    """Print the client's version; with `--format json` as an object."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("wherry")
    except PackageNotFoundError:
        found = "0"
    if arguments[:2] == ["--format", "json"] or arguments[:1] == ["--format=json"]:
        print(f'{{"version": "{found}"}}')
    else:
        print(f"wherry {found}")


def command() -> None:
    """Print the version."""
    show([])

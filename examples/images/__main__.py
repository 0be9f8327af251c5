"""`python -m images`: build images, and put them into a registry or a directory."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from . import RECIPES, RegistryClient, measure


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m images", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="build what the cache lacks, and tell what it amounts to")
    build.add_argument("names", nargs="+", choices=sorted(RECIPES))
    push = verbs.add_parser("push", help="push into a registry that speaks plain http")
    push.add_argument("name", choices=sorted(RECIPES))
    push.add_argument("reference", help="host:port/repository:tag")
    layout = verbs.add_parser("layout", help="write an OCI layout directory")
    layout.add_argument("name", choices=sorted(RECIPES))
    layout.add_argument("directory", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.verb == "build":
        for name in arguments.names:
            image = RECIPES[name]()
            size = measure(image)
            print(f"{name}: {size.entries} entries, {size.unpacked} bytes ({size.packed} packed) in {image.path}")
        return
    image = RECIPES[arguments.name]()
    if arguments.verb == "layout":
        shutil.copytree(image.path, arguments.directory)
        return
    address, _, rest = arguments.reference.partition("/")
    repository, _, tag = rest.partition(":")
    print(RegistryClient(address).push(image, repository, tag or "latest"))


if __name__ == "__main__":
    main()

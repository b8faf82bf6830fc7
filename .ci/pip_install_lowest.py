"""`pip install` with every dependency that pyproject.toml gives a lower bound held at that very version.

tox's `lowest` environment calls it in place of pip. pip has no such switch of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def lowest() -> list[str]:
    """One `name==version` for each requirement with a lower bound, the extras' included."""
    requirements = map(Requirement, sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]))
    return [
        f"{requirement.name}=={bound.version}"
        for requirement in requirements
        for bound in requirement.specifier
        if bound.operator == ">="
    ]


with tempfile.TemporaryDirectory() as directory:
    constraints = Path(directory) / "lowest.txt"
    constraints.write_text("\n".join(sorted(set(lowest()))))
    print(constraints.read_text())
    sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "-c", str(constraints), *sys.argv[1:]]))  # noqa: S603  tox is the caller

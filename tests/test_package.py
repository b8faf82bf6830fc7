"""The package as a whole: what importing it costs, and what it says of itself."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import broadcastable

ROOT = Path(__file__).parent.parent


def test_everything_in_all_is_there() -> None:
    assert sorted(set(broadcastable.__all__)) == sorted(broadcastable.__all__)
    for name in broadcastable.__all__:
        assert getattr(broadcastable, name) is not None, name


def test_importing_it_imports_no_extra() -> None:
    """Neither the extras' modules nor our own that need them: those are imported where they are used."""
    code = (
        "import sys, broadcastable\n"
        "from broadcastable import *\n"
        "import broadcastable.aio, broadcastable.actors, broadcastable.outbox.database\n"
        "print(*sorted(m for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    extras = {"typer", "rich", "rakaia", "uvicorn", "starlette", "fastapi", "flask", "prometheus_client", "pytest"}
    assert not {name for name in loaded if name.partition(".")[0] in extras - {"rich"}}
    assert not {name for name in loaded if re.match(r"broadcastable\.(cli|server|testing)\b", name)}


def test_importing_the_actors_touches_no_broker() -> None:
    code = "import broadcastable.actors, dramatiq.broker as b; print(b.global_broker)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_the_version_is_written_once() -> None:
    assert importlib.metadata.version("broadcastable") == broadcastable.__version__
    assert broadcastable.__version__ not in (ROOT / "pyproject.toml").read_text().partition("dependencies")[0]


def test_the_project_speaks_of_itself_alone() -> None:
    """No machine's paths and no registry's host names anywhere in what is released."""
    forbidden = re.compile(r"/root/|/work/|registry\.npmjs|pypi\.org/simple|files\.pythonhosted|deb\.debian\.org")
    files = [path for path in released_files() if path.suffix not in {".png", ".jpg", ".ico", ".woff2"}]
    assert ROOT / "src" / "broadcastable" / "__init__.py" in files
    for path in files:
        if path != Path(__file__):
            assert not forbidden.search(path.read_text(errors="replace")), path


def test_the_source_distribution_has_all_that_its_tests_need() -> None:
    """tox runs in an unpacked one, where there is no repository."""
    included = sdist_includes()
    assert all((ROOT / name).exists() for name in included)
    named = set(re.findall(r"(?<![\w/])(\.ci|tests|docs|examples|benchmarks|src)\b", (ROOT / "tox.ini").read_text()))
    assert {".ci", "tests"} <= named <= set(included)


def sdist_includes() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included: list[str] = settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    return included


def released_files() -> Iterator[Path]:
    """What a source distribution holds, found without git."""
    made = {"__pycache__", "node_modules", "_build", "dist"}
    for name in (*sdist_includes(), "README.md", "LICENSE", "pyproject.toml"):
        path = ROOT / name
        if path.is_file():
            yield path
        for folder, folders, files in os.walk(path):
            folders[:] = [each for each in folders if each not in made and not each.startswith(".")]
            yield from (Path(folder, each) for each in files if not each.startswith(".") and not each.endswith(".pyc"))

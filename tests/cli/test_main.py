"""The entry point: what happens before any command runs, and to the errors of all of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import broadcastable


def test_version(run: Callable[..., Any]) -> None:
    assert run("--version").stdout.strip() == broadcastable.__version__


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_sentence_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from broadcastable.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'broadcastable[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_missing_module_is_not_taken_for_the_extra() -> None:
    code = "import sys; sys.modules['tomllib'] = None; from broadcastable.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: import of tomllib" in done.stderr


@pytest.mark.parametrize(
    ("app", "says"),
    [
        ("nowhere.to_be_found", "There is no module 'nowhere'"),
        ("shop:streams", "has no 'streams'"),
        ("shop:count", "is no DurableStreams but a int"),
    ],
)
def test_an_application_that_is_not_there_is_said_in_one_sentence(
    here: Path, run: Callable[..., Any], app: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "shop.py").write_text("count = 1\n")
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    result = run("outbox", "list", "--app", app)
    assert result.exit_code == 1
    assert says in result.stderr


def test_an_error_inside_the_application_keeps_its_traceback(
    here: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect is not an operator's mistake."""
    (here / "broken.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(here)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        run("status", "--app", "broken")


def test_used_wrongly_exits_two(run: Callable[..., Any]) -> None:
    assert run("tail").exit_code == 2
    assert run("status", "--no-such-option").exit_code == 2

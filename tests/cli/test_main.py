"""The entry point: what happens before any command runs, and to the errors of all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import broadcastable
from broadcastable.durable_streams import DurableStreams
from broadcastable.server.embedded import EmbeddedServer


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
        ("", "names no module"),
        (":streams", "names no module"),
        (".shop", "names no module"),
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


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_a_terminal_cannot_show_is_spelt_out(
    start: Callable[..., Any], stream_server: EmbeddedServer, tmp_path: Path, encoding: str
) -> None:
    """A check mark is no reason to fail; and JSON stays JSON."""
    signing_key = stream_server.settings.signing_key
    with DurableStreams(stream_server.settings) as durable_streams:
        durable_streams.broadcast_to(f"main/{encoding}", says="né ✓")
    environment = {
        "PYTHONIOENCODING": encoding,
        "BROADCASTABLE_SERVER_URL": stream_server.url,
        "BROADCASTABLE_SIGNING_KEY": signing_key,
    }
    code, out, err = start("keys", "generate", "--directory", str(tmp_path), **environment).end()
    assert code == 0, err
    assert "\\u2713 " in out
    code, out, err = start("tail", f"main/{encoding}", "--offset", "-1", "--no-follow", "--json", **environment).end()
    assert code == 0, err
    assert json.loads(out)["event"] == {"says": "né ✓"}

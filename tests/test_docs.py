"""Every Python sample of the documentation runs, page by page, against the embedded stream server."""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from typer.core import TyperGroup
from typer.main import get_command

import broadcastable
from broadcastable import Settings, durable_streams, errors, metrics, settings, testing
from broadcastable.cli.app import app
from broadcastable.durable_streams import discard
from broadcastable.outbox.memory import MemoryOutbox
from broadcastable.server.embedded import EmbeddedServer, embedded_server

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))

NOT_RUN = {
    "api.md": "made from the docstrings",
    "architecture.md": "the design; its declarations are illustrations that the other pages run in full",
    "benchmarks.md": "commands, no Python",
    "changelog.md": "no samples",
    "cli.md": "commands, no Python; tests/cli/test_help.py compares them with the command line",
    "comparison.md": "a table of libraries",
    "delivery.md": "tables of what a crash does; tests/outbox and tests/chaos cause them",
    "migration.md": "tables of what maps to what",
    "servers.md": "a table of what was measured",
    "testing.md": "one suite, run as such by tests/testing/test_page.py",
}
"""Pages without a sample that runs, and why that is all right."""


def samples_of(page: Path) -> list[object]:
    sybil = Sybil([PythonCodeBlockParser(), SkipParser()], path=str(page.parent), pattern=page.name)
    return list(sybil.parse(page).examples())


def test_every_page_runs_or_says_why_not():
    """A page with samples is run; a page without is listed with the reason, and only such a page."""
    assert [page.name for page in PAGES if page.name not in NOT_RUN and not samples_of(page)] == []
    assert set(NOT_RUN) <= {page.name for page in PAGES}


def test_the_operations_page_has_every_metric_and_no_other():
    """An operator finds each exported name on the page, and an alert on the page finds its metric."""
    page = (DOCS / "operations.md").read_text()
    counted = {f"broadcastable_{name}_total" for name in metrics.COUNTS}
    timed = {f"broadcastable_{name}_seconds" for name in metrics.DURATIONS}
    gauges = {gauge.name for gauge in metrics.PendingCollector(MemoryOutbox.from_settings(Settings())).collect()}

    named = set(re.findall(r"broadcastable_[a-z_]+", page))

    assert named == counted | timed | gauges


def test_the_scale_page_has_the_figures_that_were_measured():
    """Of both outboxes and every load, so that no row is left out that looks worse than the others."""
    figures = json.loads((DOCS.parent / "benchmarks" / "figures.json").read_text())
    page = (DOCS / "scale.md").read_text()
    demanded, delivered = table_of(page, "| outbox | for |"), table_of(page, "| outbox | commits/s asked for |")
    parts = ("application", "database", "redis", "worker", "server")

    for found in figures["demands"]["rows"]:
        for name in ("plain commit", "commit", "frame", "event"):
            outbox, _, *cells = demanded.pop(0)
            assert outbox == found["outbox"]
            assert all(
                same(cell.replace("–", "0"), found[name].get(part, 0)) for part, cell in zip(parts, cells, strict=True)
            )
        for point in found["points"]:
            outbox, _, rate, _, p50, _, p99, _ = delivered.pop(0)
            assert outbox == found["outbox"]
            assert same(rate, point["commits_per_second"])
            assert same(p50, point["p50_ms"])
            assert same(p99, point["p99_ms"])
    assert demanded == delivered == []


def table_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table that begins with *heading*."""
    _, _, rows = page[page.index(heading) :].partition("\n")
    rows = rows.partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[1:]]


def same(cell: str, value: float) -> bool:
    """Whether *cell* is *value*, to the digits that it has."""
    return cell.replace(",", "") == f"{value:.{len(cell.partition('.')[2])}f}"


def test_every_picture_is_shown_on_a_page():
    pages = "".join(page.read_text() for page in PAGES)

    assert [each.name for each in (DOCS / "images").iterdir() if f"images/{each.name}" not in pages] == []


def test_the_architecture_page_says_how_much_is_random_by_day_and_by_night():
    """By day as the tests say, by night as tox.ini says."""
    page = (DOCS / "architecture.md").read_text()
    tox, sources = (DOCS.parent / "tox.ini").read_text(), sorted((DOCS.parent / "tests").rglob("test_*.py"))
    nightly = tox.partition("[testenv:nightly]")[2].partition("[testenv:")[0]
    by_night = dict(re.findall(r"\{env:(\w+):(\d+)\}", nightly))
    by_day = dict(re.findall(r'environ.get\("(\w+)", "(\d+)"\)', "".join(each.read_text() for each in sources)))

    said = {variable.strip("`"): (day, night) for _, variable, day, night in table_of(page, "| | variable |")}

    assert said == {name: (f"{int(by_day[name]):,}", f"{int(night):,}") for name, night in by_night.items()}


def test_the_reference_has_every_public_name():
    """What the front door and the testing kit export; the errors are there as a module."""
    page = (DOCS / "api.md").read_text()
    named = set(re.findall(r"^\.\. auto(?:class|function|data):: (\S+?)(?:\(\))?$", page, re.MULTILINE))
    public = {f"broadcastable.{name}" for name in broadcastable.__all__ if not hasattr(errors, name)}

    assert public - named == set()
    assert {f"broadcastable.testing.{name}" for name in testing.__all__} - named == set()


def test_every_command_that_the_docs_name_exists():
    """`broadcastable status`, but also `broadcastable outbox retry Room/1/messages`."""
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    named = {
        words
        for page in PAGES
        for words in re.findall(r"(?:^\$ |`|bin/)broadcastable ([a-z]+)", page.read_text(), re.MULTILINE)
    }

    assert named
    assert named <= set(commands.commands)


@pytest.fixture
def server(signing_key: str) -> Iterator[EmbeddedServer]:
    """The stream server of one page: its stream names are those of every other page."""
    with embedded_server() as server:
        yield server


@pytest.fixture
def surroundings(server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a reader has who follows a page: `chat.py` beside the samples, a stream server, and nothing from before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS / "samples"))
    # As if the environment said so: a page may say otherwise with configure().
    monkeypatch.setattr(settings, "_default", server.settings)
    yield
    for each in list(durable_streams._instances.values()):  # a page may change the settings on its way
        discard(each)
    chat = sys.modules.pop("chat", None)
    if chat is not None:
        chat.engine.dispose()
        chat.Base.registry.dispose()
    gc.collect()


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in NOT_RUN], ids=lambda page: page.stem)
def test_the_samples_of_a_page_run(page: Path):
    """The samples of a page run in order, each with what the ones before it have left."""
    for example in samples_of(page):
        example.evaluate()

"""The README keeps its word: its samples run as they stand."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
SAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_first_sample_is_short_and_prints_the_event_with_txid_and_offset(tmp_path: Path) -> None:
    sample = SAMPLES[0]
    assert len([line for line in sample.splitlines() if line.strip()]) <= 25
    script = tmp_path / "sample.py"
    script.write_text(sample)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert "'value': {'id': '1', 'room_id': '1', 'body': 'Hello'}" in done.stdout
    assert re.search(rf"'txid': '{uuid}'", done.stdout)
    assert re.search(r"next_offset='[0-9]{16}_[0-9]{16}'", done.stdout)
    assert done.stderr == ""


def test_what_the_first_sample_needs_is_said_above_it() -> None:
    """The client that reads in it comes with one extra only."""
    extras = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    above = README.read_text().partition("```python")[0]

    assert "from durable_streams import" in SAMPLES[0]
    assert [extra for extra, needs in extras.items() if any(each.startswith("durable-streams") for each in needs)] == [
        "demo"
    ]
    assert 'pip install ".[demo]"' in above


def test_the_configuration_sample_names_settings_that_there_are() -> None:
    from broadcastable import Settings

    (call,) = [node for node in ast.walk(ast.parse(SAMPLES[1])) if isinstance(node, ast.Call) and node.keywords]
    assert {each.arg for each in call.keywords} <= set(Settings.__dataclass_fields__)


def test_the_testing_sample_passes(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("""
        import pytest
        import sqlalchemy as sa
        from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
        from broadcastable import Broadcastable, streams_to

        class Base(DeclarativeBase): ...

        class Room(Base):
            __tablename__ = "rooms"
            id: Mapped[int] = mapped_column(primary_key=True)

        class Message(Base, Broadcastable):
            __tablename__ = "messages"
            __streams__ = streams_to("room", "messages")
            id: Mapped[int] = mapped_column(primary_key=True)
            room_id: Mapped[int] = mapped_column(sa.ForeignKey("rooms.id"))
            room: Mapped[Room] = relationship()
            body: Mapped[str]

        @pytest.fixture
        def session():
            engine = sa.create_engine("sqlite://")
            Base.metadata.create_all(engine)
            with Session(engine) as session:
                yield session
            engine.dispose()

        @pytest.fixture
        def room(session):
            room = Room()
            session.add(room)
            session.commit()
            return room
    """)
    pytester.makepyfile("from conftest import Message\n" + SAMPLES[2])
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_the_commands_are_those_that_the_checks_run() -> None:
    commands = re.findall(r"^\$ (.*?)\s*#", README.read_text(), re.MULTILINE)
    assert commands == ['pip install ".[demo]" && broadcastable demo', "pip install tox && tox"]
    assert "pip install tox" in (README.parent / ".ci" / "run").read_text()


def test_the_line_about_tox_claims_no_more_than_tox_runs() -> None:
    """What has an environment of its own is said to be elsewhere."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(README.parent / "tox.ini")
    claim = re.search(r"^\$ pip install tox && tox\s+# (.*)$", README.read_text(), re.MULTILINE)
    runs = (README.parent / ".ci" / "run").read_text()

    assert claim is not None
    assert claim[1].startswith("all that needs Python alone")
    others = {name.removeprefix("testenv:") for name in tox.sections() if name.startswith("testenv:")}
    others -= {*tox["tox"]["env_list"].split(", "), "nightly"}
    assert others == {name for name in others if name in runs}
    assert "`.ci/run`" in README.read_text()
    assert "`tox -e nightly`" in README.read_text()

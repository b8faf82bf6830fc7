"""Every sample in a docstring runs, with what stands around it in an application or in a test."""

from __future__ import annotations

import ast
import gc
import inspect
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from fastapi import Depends, FastAPI
from flask import Flask
from sqlalchemy import orm
from sybil.document import PythonDocStringDocument
from sybil.parsers.rest import DocTestParser
from sybil.python import import_path

import broadcastable
from broadcastable import testing
from tests.services import open_engine
from tests.testing.chat import Base, Message, Room

SOURCE = Path(broadcastable.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(module: Path) -> str:
    return str(module.relative_to(SOURCE))


def is_code(paragraph: str) -> bool:
    """Prose rarely parses, and never calls or assigns."""
    try:
        tree = ast.parse(textwrap.dedent(paragraph))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Assign | ast.With | ast.ClassDef) for node in ast.walk(tree))


SAMPLES = [module for module in MODULES if ">>>" in module.read_text("utf-8")]


def test_code_in_a_docstring_is_a_sample_that_runs() -> None:
    """A paragraph that is Python, and has no prompt, would be run by nobody."""
    found = [
        (name_of(module), paragraph)
        for module in MODULES
        for _, _, text in PythonDocStringDocument.extract_docstrings(module.read_text("utf-8"))
        for paragraph in inspect.cleandoc(text).split("\n\n")
        if is_code(paragraph)
    ]
    assert found == []


@pytest.fixture
def surroundings(tmp_path: Path, signing_key: str) -> Iterator[Any]:
    """What the samples take for granted: a base class of models, a session, a room, a key."""

    class NewBase(orm.DeclarativeBase):
        pass

    engine = open_engine(f"sqlite:///{tmp_path / 'chat.db'}")
    Base.metadata.create_all(engine)
    memory = testing.MemoryStreams()
    with (
        broadcastable.DurableStreams(
            server_url=memory.url, signing_key=signing_key, transport=memory
        ) as durable_streams,
        orm.Session(engine, info={"durable_streams": durable_streams}) as session,
    ):
        session.add(room := Room(name="Lobby"))
        session.commit()
        durable_streams.drain()
        yield {
            **{name: getattr(orm, name) for name in ("Mapped", "mapped_column", "relationship")},
            **{name: getattr(testing, name) for name in testing.__all__},
            "Annotated": Annotated,
            "Base": NewBase,
            "Depends": Depends,
            "DurableStreams": broadcastable.DurableStreams,
            "FastAPI": FastAPI,
            "Flask": Flask,
            "ForeignKey": sa.ForeignKey,
            "Message": Message,
            "UTC": UTC,
            "datetime": datetime,
            "key": signing_key,
            "may_follow": lambda *asked: None,
            "room": room,
            "session": session,
        }
    engine.dispose()
    NewBase.registry.dispose()
    gc.collect()


@pytest.mark.parametrize("module", SAMPLES, ids=name_of)
def test_the_samples_of_a_module_run(module: Path, surroundings: dict[str, Any]) -> None:
    """In order, each with what the ones before it have left."""
    document = PythonDocStringDocument.parse(str(module), DocTestParser())
    # The names of the module, but not its __future__: samples are written without.
    document.pop_evaluator(document.import_document)
    document.namespace.update(surroundings, **vars(import_path(module)))
    del document.namespace["annotations"]
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()

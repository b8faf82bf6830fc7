"""The pytest plugin: fixtures for tests of applications that broadcast. See `broadcastable.testing`.

Beside the package rather than in it, because pytest imports it at every start: nothing of broadcastable, SQLAlchemy or
httpx is loaded before a test asks for a fixture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from broadcastable import DurableStreams
    from broadcastable.server import EmbeddedServer
    from broadcastable.testing import BroadcastAssertion, MemoryStreams, Recording


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail a test that made an assertion and had nobody check it: it could not fail."""
    with _keeping() as made:
        result = yield
    unused = [each for each in made if not each.used]
    if unused:
        for each in unused:
            each.used = True  # told of here, so not by a warning
        pytest.fail("\n".join(each.in_vain() for each in unused), pytrace=False)
    return result


_kept: dict[int, list[BroadcastAssertion]] = {}  # by identity, not by equality


def keep(assertion: BroadcastAssertion) -> None:
    """Called by every assertion that is made: one that is thrown away at once would leave no trace."""
    for made in list(_kept.values()):
        made.append(assertion)


@contextmanager
def _keeping() -> Iterator[list[BroadcastAssertion]]:
    """The assertions made until the end of the block, in any thread."""
    made: list[BroadcastAssertion] = []
    _kept[id(made)] = made
    try:
        yield made
    finally:
        del _kept[id(made)]


@pytest.fixture
def memory_streams() -> MemoryStreams:
    """The streams of `durable_streams`, to read back what was delivered: `memory_streams.events(room, "messages")`."""
    from broadcastable.testing import MemoryStreams

    return MemoryStreams()


@pytest.fixture
def durable_streams_settings() -> dict[str, Any]:
    """Settings that `durable_streams` changes; override this fixture to have some."""
    return {}


@pytest.fixture
def durable_streams(
    memory_streams: MemoryStreams, durable_streams_settings: dict[str, Any]
) -> Iterator[DurableStreams]:
    """An instance of this test's own, in memory and with keys, that is the default in all threads while it runs.

    What is deferred waits for `drain()`. Have the fixtures that store rows ask for this one.
    """
    from broadcastable.testing import isolated_durable_streams

    with isolated_durable_streams(memory_streams, **durable_streams_settings) as isolated:
        yield isolated


@pytest.fixture
def broadcasts(durable_streams: DurableStreams) -> Iterator[Recording]:
    """Everything that the test broadcasts, from any thread. Nothing goes out to a server."""
    from broadcastable.testing import recording

    with recording() as recorded:
        yield recorded


@pytest.fixture
def drain(durable_streams: DurableStreams) -> Callable[..., None]:
    """Call it to have everything broadcast so far delivered, so that it can be read: `drain()`.

    Raises:
        AssertionError: Something stays behind; the message says what, and why.
    """

    from broadcastable.testing import drain

    return functools.partial(drain, durable_streams)


@pytest.fixture(scope="session")
def stream_server() -> Iterator[EmbeddedServer]:
    """A real stream server, one for all tests: use other stream names in each. Needs the extra `server`.

    Its `settings` make a `DurableStreams` that reaches it; `url` is where it is.
    """
    from broadcastable.server import embedded_server

    with embedded_server() as server:
        yield server

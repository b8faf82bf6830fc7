from __future__ import annotations

from collections.abc import Iterator

import pytest

from broadcastable.settings import Settings
from tests.core.origin import Origin


@pytest.fixture
def settings(signing_key: str) -> Settings:
    return Settings(server_url="http://streams.test/v1/streams", signing_key=signing_key, request_timeout=2.0)


@pytest.fixture
def origin() -> Iterator[Origin]:
    return Origin()

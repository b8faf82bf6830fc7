"""`doctor`: every part looked at, each fault with its fix, and nothing left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from broadcastable.cli.doctor import _probe_names
from broadcastable.durable_streams import current
from broadcastable.names import shard_of
from broadcastable.server.embedded import EmbeddedServer, embedded_server
from broadcastable.settings import Settings, override
from broadcastable.tokens import generate_key_pair
from tests.services import free_port

Run = Callable[..., Any]


def findings(run: Run, *options: str) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in run("doctor", "--json", *options).stdout.splitlines()]
    return {line["check"]: line for line in lines}


def test_all_is_well(stream_server: EmbeddedServer, run: Run) -> None:
    with override(server_url=stream_server.url, signing_key=stream_server.settings.signing_key):
        result = run("doctor")
        found = findings(run)
    assert result.exit_code == 0, result.stdout
    assert list(found) == ["settings", "keys", "clock", "stream server", "worker"]
    assert all(each["ok"] for each in found.values())


def test_the_database_outbox_without_its_tables(stream_server: EmbeddedServer, sqlite_url: str, run: Run) -> None:
    with override(
        server_url=stream_server.url,
        signing_key=stream_server.settings.signing_key,
        outbox="database",
        database_url=sqlite_url,
    ):
        found = findings(run, "--patience", "0.5")
        shown = run("doctor", "--patience", "0.5").stdout
        current().close()
    says = found["outbox tables"]["says"]
    assert not found["outbox tables"]["ok"]
    assert "no such table: broadcastable_outbox. " in says
    assert "have the migrations run?" in says
    assert "broadcastable install" in says
    assert "SELECT" not in says
    assert "worker" not in found, "it would say the same again"
    assert len(shown.splitlines()) == len(found), "a line each"


def test_redis_is_looked_at(stream_server: EmbeddedServer, valkey_url: str, run: Run) -> None:
    with override(server_url=stream_server.url, signing_key=stream_server.settings.signing_key, redis_url=valkey_url):
        assert findings(run)["redis"]["ok"]
        client = redis.Redis.from_url(valkey_url)
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            assert "noeviction" in findings(run)["redis"]["says"]
        finally:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")
            client.close()


def test_nobody_delivers(stream_server: EmbeddedServer, valkey_url: str, run: Run) -> None:
    """With the redis outbox a worker process delivers, and here none runs."""
    with override(
        server_url=stream_server.url,
        signing_key=stream_server.settings.signing_key,
        redis_url=valkey_url,
        outbox="redis",
    ):
        found = findings(run, "--patience", "0.3")
        assert found["stream server"]["ok"]
        assert not found["worker"]["ok"]
        assert "dramatiq broadcastable.worker" in found["worker"]["says"]
        assert current().outbox.pending() == []
        current().close()


@pytest.mark.parametrize(
    ("changes", "check", "says"),
    [
        ({"signing_key": None}, "keys", "keys generate"),
        ({"signing_key": "nowhere.pem"}, "keys", "neither PEM text nor a readable file"),
        ({"redis_url": "redis://127.0.0.1:1/0"}, "redis", "BROADCASTABLE_REDIS_URL"),
        ({"redis_url": "redis://127.0.0.1:1/0", "outbox": "redis"}, "redis", "Is it running"),
        ({"outbox": "database", "database_url": "sqlite:////nowhere/to/be.db"}, "outbox tables", "Is database_url"),
        ({"outbox": "database"}, "outbox tables", "BROADCASTABLE_DATABASE_URL"),
        ({"server_url": "http://127.0.0.1:1/v1/streams"}, "clock", "is server_url (BROADCASTABLE_SERVER_URL) right?"),
        ({"server_url": "http://127.0.0.1:1/v1/streams"}, "stream server", "is server_url right?"),
    ],
)
def test_each_fault_comes_with_its_fix(
    stream_server: EmbeddedServer, run: Run, changes: dict[str, Any], check: str, says: str
) -> None:
    well = {"server_url": stream_server.url, "signing_key": stream_server.settings.signing_key}
    with override(**{**well, **changes}):
        found = findings(run, "--patience", "0.3")
        assert run("doctor", "--patience", "0.3").exit_code == 1
        current().close()
    assert not found[check]["ok"]
    assert says in found[check]["says"]
    for each in found.values():
        assert "\n" not in each["says"]
        # What begins with the name of an exception is one that nobody has put into words.
        assert each["ok"] or not re.match(r"\w+Error: ", each["says"])


def test_a_server_that_knows_other_keys(stream_server: EmbeddedServer, run: Run) -> None:
    with override(server_url=stream_server.url, signing_key=generate_key_pair().private_pem):
        found = findings(run)
        current().close()
    assert not found["stream server"]["ok"]
    assert "worker" not in found


def test_each_of_several_servers_is_looked_at(stream_server: EmbeddedServer, run: Run) -> None:
    """The clock and a probe of its own for each, so a dead one shows whatever its number."""
    key = stream_server.settings.signing_key
    with embedded_server(settings=Settings(signing_key=key)) as second:
        with override(server_url=[stream_server.url, second.url], signing_key=key):
            found = findings(run)
            current().close()
        names = ["settings", "keys", "clock 1", "stream server 1", "clock 2", "stream server 2", "worker"]
        assert list(found) == names
        assert all(each["ok"] for each in found.values())
        assert [
            server in found[f"stream server {n}"]["says"] for n, server in ((1, stream_server.url), (2, second.url))
        ]
    with override(server_url=[stream_server.url, second.url], signing_key=key):
        found = findings(run)
        current().close()
    assert [name for name, each in found.items() if not each["ok"]] == ["clock 2", "stream server 2"]
    assert "worker" not in found


def test_a_probe_belongs_to_its_server() -> None:
    assert [shard_of(name, 5) for name in _probe_names(5)] == list(range(5))


def test_settings_that_make_no_sense(start: Callable[..., Any], tmp_path: Path) -> None:
    code, out, _ = start(
        "doctor", BROADCASTABLE_OUTBOX="paper", BROADCASTABLE_REDIS_URL=f"redis://127.0.0.1:{free_port()}"
    ).end()
    assert code == 1
    assert "outbox is one of" in out

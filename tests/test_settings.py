"""Settings: read in one place, checked whole, and switched for a while without a trace."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pytest

from broadcastable import settings
from broadcastable.errors import ConfigurationError
from broadcastable.settings import (
    ENV_PREFIX,
    OutboxKind,
    Settings,
    configure,
    current_settings,
    override,
    read_pem,
    seconds,
)


@pytest.fixture(autouse=True)
def _the_process_default_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_default", None)


# One value


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().outbox = "redis"  # type: ignore[misc]


def test_a_repr_shows_no_secret() -> None:
    secret = Settings(signing_key="-----BEGIN hush", redis_url="redis://:hush@r", database_url="sqlite:///hush")
    assert "hush" not in repr(secret)


def test_a_copy_has_the_changes_and_the_original_has_not() -> None:
    before = Settings(gid_app="chat")
    after = before.replace(outbox="database")
    assert (after.gid_app, after.outbox, before.outbox) == ("chat", "database", "memory")


@pytest.mark.parametrize("duration", [90, 90.0, timedelta(seconds=90), timedelta(minutes=1.5)])
def test_a_duration_is_seconds_or_a_timedelta(duration: timedelta | float) -> None:
    assert seconds(Settings(request_timeout=duration).request_timeout) == 90.0


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("http://a/v1/streams", ("http://a/v1/streams",)),
        ("https://a:4437/v1/streams//", ("https://a:4437/v1/streams",)),
        (["http://a", "http://b/"], ("http://a", "http://b")),
        (("http://a", "http://[::1]:80"), ("http://a", "http://[::1]:80")),
    ],
)
def test_servers_are_one_url_or_several(given: Any, urls: tuple[str, ...]) -> None:
    made = Settings(server_url=given)
    assert made.server_urls == made.client_urls == urls
    hash(made)


def test_clients_may_reach_the_same_servers_elsewhere() -> None:
    made = Settings(server_url=("http://a", "http://b"), client_url=("https://x/a", "https://x/b/"))
    assert made.client_urls == ("https://x/a", "https://x/b")


@pytest.mark.parametrize("given", [("one",), ["one"], "one"])
def test_one_verifying_key_need_not_be_in_a_tuple(given: Any) -> None:
    assert Settings(verify_keys=given).verify_keys == ("one",)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"server_url": "localhost:4437"}, "server_url"),
        ({"server_url": "ftp://a"}, "server_url"),
        ({"server_url": "http://"}, "server_url"),
        ({"server_url": "http:///v1/streams"}, "server_url"),
        ({"server_url": "http://a/?x=1"}, "server_url"),
        ({"server_url": "http://a/#x"}, "server_url"),
        ({"server_url": "http://a /x"}, "server_url"),
        ({"server_url": "http://[::1"}, "server_url"),
        ({"server_url": "http://localhost:abc/x"}, "server_url"),
        ({"server_url": "http://localhost:99999"}, "server_url"),
        ({"server_url": "http://local..host/"}, "server_url"),
        ({"server_url": ()}, "server_url"),
        ({"server_url": ""}, "server_url"),
        ({"client_url": "a"}, "client_url"),
        ({"client_url": ("http://a", "http://b")}, "client_url"),
        ({"client_url": ()}, "client_url"),
        ({"outbox": "kafka"}, "memory, redis, database"),
        ({"txid_from": "clock"}, "uuid, postgres"),
        ({"outbox": "redis"}, "BROADCASTABLE_REDIS_URL"),
        ({"redis_url": "localhost:6379"}, "redis_url"),
        ({"redis_url": "redis://:hush@localhost:abc"}, "redis_url"),
        ({"database_url": "chat.db"}, "database_url"),
        ({"database_url": "postgresql://ann:hush@localhost:abc/chat"}, "database_url"),
        ({"signing_key": b"-----BEGIN PRIVATE KEY-----"}, "signing_key is PEM text or a path; got bytes"),
        ({"verify_keys": [None]}, "verify_keys is PEM text or a path; got NoneType"),
        ({"token_expiry": 0}, "token_expiry"),
        ({"token_expiry": 90_000}, "max_token_life"),
        ({"signed_stream_url_expires_in": timedelta(-1)}, "signed_stream_url_expires_in"),
        ({"signed_stream_url_expires_in": timedelta(days=2)}, "max_token_life"),
        ({"max_token_life": float("inf")}, "max_token_life"),
        ({"provisioned_for": -1.0}, "provisioned_for"),
        ({"request_timeout": float("nan")}, "request_timeout"),
        ({"request_timeout": float("inf")}, "request_timeout"),
        ({"stream_ttl": 0}, "stream_ttl"),
        ({"stream_ttl": timedelta(milliseconds=1)}, "stream_ttl"),
        ({"max_frame_bytes": 0}, "max_frame_bytes"),
        ({"max_frame_bytes": (1 << 30) + 1}, "max_frame_bytes"),
        ({"max_frame_events": 100_001}, "max_frame_events"),
        ({"memory_outbox_bytes": -1}, "memory_outbox_bytes"),
        ({"gid_app": ""}, "gid_app"),
        ({"namespace": ""}, "namespace"),
        ({"colour": "red"}, "No such setting: colour"),
    ],
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named) as raised:
        Settings().replace(**wrong)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize("outbox", get_args(OutboxKind))
def test_every_outbox_can_be_chosen(outbox: OutboxKind) -> None:
    assert Settings(outbox=outbox, redis_url="redis://localhost").outbox == outbox


# The environment

IN_THE_ENVIRONMENT = {
    "server_url": ("http://a, http://b/", ("http://a", "http://b/")),
    "client_url": ("https://a,https://b", ("https://a", "https://b")),
    "signing_key": ("/run/secrets/key.pem", "/run/secrets/key.pem"),
    "signing_kid": ("2025-01", "2025-01"),
    "verify_keys": ("old.pem, older=older.pem,", ("old.pem", "older=older.pem")),
    "token_issuer": ("chat", "chat"),
    "token_audience": ("streams", "streams"),
    "token_expiry": ("60", 60.0),
    "signed_stream_url_expires_in": ("0.5", 0.5),
    "max_token_life": ("3600", 3600.0),
    "gid_app": ("chat", "chat"),
    "redis_url": ("redis://localhost/1", "redis://localhost/1"),
    "database_url": ("sqlite:///chat.db", "sqlite:///chat.db"),
    "outbox": ("database", "database"),
    "namespace": ("chat", "chat"),
    "keys_as_strings": ("off", False),
    "txid_from": ("postgres", "postgres"),
    "stream_ttl": ("86400", 86400.0),
    "provisioned_for": ("60", 60.0),
    "request_timeout": ("2.5", 2.5),
    "max_frame_bytes": ("65536", 65536),
    "max_frame_events": ("10", 10),
    "memory_outbox_bytes": ("1024", 1024),
}


def test_every_field_is_read_from_the_environment() -> None:
    assert set(IN_THE_ENVIRONMENT) == {field.name for field in dataclasses.fields(Settings)}
    environ = {ENV_PREFIX + name.upper(): text for name, (text, _) in IN_THE_ENVIRONMENT.items()}
    read = Settings.from_env(environ)
    assert {name: getattr(read, name) for name in IN_THE_ENVIRONMENT} == {
        name: value for name, (_, value) in IN_THE_ENVIRONMENT.items()
    }


def test_an_empty_or_foreign_variable_sets_nothing() -> None:
    assert Settings.from_env({"BROADCASTABLE_OUTBOX": "", "BROADCASTABLE_COLOUR": "red", "OUTBOX": "x"}) == Settings()


@pytest.mark.parametrize("text", ["1", "true", "YES", "On"])
def test_a_switch_is_on_in_many_words(text: str) -> None:
    assert Settings.from_env({"BROADCASTABLE_KEYS_AS_STRINGS": text}).keys_as_strings is True


@pytest.mark.parametrize(
    ("name", "text"),
    [("KEYS_AS_STRINGS", "maybe"), ("REQUEST_TIMEOUT", "5s"), ("MAX_FRAME_EVENTS", "1.5"), ("STREAM_TTL", "day")],
)
def test_a_variable_that_does_not_parse_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"BROADCASTABLE_{name}"):
        Settings.from_env({f"BROADCASTABLE_{name}": text})


@pytest.mark.parametrize("text", [",", " , "])
def test_a_variable_of_commas_names_no_server(text: str) -> None:
    with pytest.raises(ConfigurationError, match="server_url"):
        Settings.from_env({"BROADCASTABLE_SERVER_URL": text})


# Which settings are in force


def test_nothing_is_read_before_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADCASTABLE_GID_APP", "chat")
    assert current_settings().gid_app == "chat"
    monkeypatch.setenv("BROADCASTABLE_GID_APP", "shop")
    assert current_settings().gid_app == "chat"


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROADCASTABLE_GID_APP", "chat")
    monkeypatch.setenv("BROADCASTABLE_NAMESPACE", "chat")
    configured = configure(gid_app="shop")
    assert (configured.gid_app, configured.namespace) == ("shop", "chat")
    assert current_settings() is configured


def test_a_configuration_that_is_refused_leaves_the_old_one() -> None:
    before = configure(gid_app="chat")
    with pytest.raises(ConfigurationError):
        configure(outbox="kafka")
    with pytest.raises(ConfigurationError):
        configure(colour="red")
    assert current_settings() is before


def test_an_override_wins_over_the_configuration_and_builds_on_it() -> None:
    configure(gid_app="chat", namespace="chat")
    with override(gid_app="shop") as inside:
        assert current_settings() is inside
        assert (inside.gid_app, inside.namespace) == ("shop", "chat")
    assert current_settings().gid_app == "chat"


def test_an_override_gives_back_the_previous_one_also_after_an_error() -> None:
    with override(gid_app="one") as one:
        with pytest.raises(ZeroDivisionError), override(gid_app="two"):
            assert current_settings().gid_app == "two"
            raise ZeroDivisionError
        assert current_settings() is one
        with pytest.raises(ConfigurationError), override(outbox="kafka"):
            raise AssertionError("not reached")
        assert current_settings() is one


def test_configuring_inside_an_override_shows_after_it() -> None:
    with override(gid_app="one"):
        configure(gid_app="two")
        assert current_settings().gid_app == "one"
    assert current_settings().gid_app == "two"


def test_an_override_is_not_seen_by_other_threads() -> None:
    seen: list[str] = []
    with override(gid_app="one"):
        thread = threading.Thread(target=lambda: seen.append(current_settings().gid_app))
        thread.start()
        thread.join()
    assert seen == ["app"]


def test_tasks_have_overrides_of_their_own_and_inherit_the_one_around_them() -> None:
    async def named(name: str, entered: asyncio.Barrier) -> tuple[str, str]:
        inherited = current_settings().gid_app
        with override(gid_app=name):
            await entered.wait()  # all are inside now
            return inherited, current_settings().gid_app

    async def together() -> list[tuple[str, str]]:
        entered = asyncio.Barrier(3)
        return await asyncio.gather(*(named(name, entered) for name in "abc"))

    with override(gid_app="outer"):
        assert asyncio.run(together()) == [("outer", "a"), ("outer", "b"), ("outer", "c")]


def test_many_threads_make_one_default() -> None:
    at_once = threading.Barrier(16)
    made: list[Settings] = []

    def first_use() -> None:
        at_once.wait()
        made.append(current_settings())

    threads = [threading.Thread(target=first_use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in made}) == 1


# Keys

PEM = "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"


def test_pem_text_is_taken_as_it_is() -> None:
    assert read_pem(PEM, "signing_key") == PEM.encode()


def test_pem_text_with_written_line_ends_is_mended() -> None:
    """As many secret stores put it into an environment variable."""
    assert read_pem(PEM.replace("\n", "\\n"), "signing_key") == PEM.encode()


def test_a_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text(PEM)
    assert read_pem(str(path), "signing_key") == PEM.encode()


@pytest.mark.parametrize("key", ["no/such/file.pem", ".", "MFkwHUSH", "HUSH" * 2_000, "HUSH\x00"])
def test_what_is_neither_pem_nor_a_file_says_how_to_make_a_key_and_shows_nothing(key: str) -> None:
    with pytest.raises(ConfigurationError, match=r"verify_keys .*broadcastable keys generate") as caught:
        read_pem(key, "verify_keys")
    assert "HUSH" not in str(caught.value)
    assert caught.value.__cause__ is None

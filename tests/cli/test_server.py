"""`server` and `caddyfile`, and the file that both read."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from broadcastable.durable_streams import DurableStreams
from broadcastable.settings import Settings, override

from .conftest import Command
from .golden_files import check

Run = Callable[..., Any]
Start = Callable[..., Command]

# A published key (RFC 7515, appendix A.3), so that the file is the same every time; it opens nothing.
PUBLIC_KEY = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEf83OJ3D2xF1Bg8vub9tLe1gHMzV7
6e8Tus9uPHvRVEXH8UTNG72bfocs3+257rn0s2ldbqkLJK2KRiMohYjlrQ==
-----END PUBLIC KEY-----
"""
THUMBPRINT = "oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U"


def listening(command: Command) -> str:
    said = []
    while line := command.line(of="stderr"):
        said.append(line)
        if found := re.search(r"http://\S+/v1/streams", line):
            return found[0]
    raise AssertionError("\n".join(said))


def test_it_serves_what_the_application_signs(start: Start, signing_key: str, tmp_path: Path) -> None:
    """Kept in --data-dir, it has everything again after a restart; Ctrl+C ends it without a traceback."""
    for kept in (0, 1):
        server = start("server", "--port", "0", "--data-dir", str(tmp_path), BROADCASTABLE_SIGNING_KEY=signing_key)
        url = listening(server)
        with DurableStreams(Settings(signing_key=signing_key, server_url=url)) as durable_streams:
            assert (durable_streams.ensure_stream_exists("room"), len(durable_streams.client.read("room").events)) == (
                "room",
                kept,
            )
            durable_streams.broadcast_to("room", number=kept)
        assert httpx.get(f"{url}/room").status_code == 401
        server.process.send_signal(signal.SIGINT)
        _, out, err = server.end()
        assert "Traceback" not in out + err


def test_without_a_key_it_says_how_to_make_one(start: Start) -> None:
    code, _, err = start("server", "--port", "0").end()
    assert code == 1
    assert "keys generate" in err
    assert "Traceback" not in err


def test_a_port_in_use_is_one_sentence(start: Start, signing_key: str) -> None:
    first = start("server", "--port", "0", BROADCASTABLE_SIGNING_KEY=signing_key)
    port = listening(first).split(":")[2].split("/")[0]
    code, _, err = start("server", "--port", port, BROADCASTABLE_SIGNING_KEY=signing_key).end()
    assert code == 1
    assert f"Port {port} on 127.0.0.1 is in use" in err
    assert "Traceback" not in err


def test_the_table_for_development_is_read_and_options_win(start: Start, here: Path, signing_key: str) -> None:
    (here / "broadcastable.toml").write_text(
        '[development]\nport = 1\ndata_dir = "kept"\norigins = ["http://a.example"]\n'
    )
    url = listening(start("server", "--port", "0", BROADCASTABLE_SIGNING_KEY=signing_key))
    preflight = {"Origin": "http://a.example", "Access-Control-Request-Method": "GET"}
    assert httpx.options(f"{url}/room", headers=preflight).status_code == 204
    assert (here / "kept").is_dir()


@pytest.fixture
def production(here: Path) -> Path:
    (here / "public.pem").write_text(PUBLIC_KEY)
    return here / "broadcastable.toml"


def test_the_caddyfile_of_a_public_server(production: Path, run: Run) -> None:
    production.write_text("""
[production]
domain = "streams.example.com"
data_dir = "/var/lib/broadcastable/streams"
keys = ["public.pem"]
audience = "browsers"
origins = ["https://example.com", "https://www.example.com"]
""")
    result = run("caddyfile")
    assert result.exit_code == 0
    check("Caddyfile.public", result.stdout)


def test_the_caddyfile_of_a_server_behind_a_proxy(production: Path, run: Run) -> None:
    production.write_text("""
[staging]
port = 8787
keys = ["public.pem"]
issuer = "staging"
""")
    result = run("caddyfile", "--environment", "staging")
    assert "kept in memory" in result.stderr
    check("Caddyfile.plain", result.stdout)


@pytest.mark.parametrize(
    ("keys", "kids"),
    [
        ('["public.pem"]', {THUMBPRINT}),
        ('["main=public.pem"]', {"main"}),
        ('["verify-*.pem"]', {"old", THUMBPRINT}),
        ('["public.pem", "nothing-*.pem"]', {THUMBPRINT}),
    ],
)
def test_keys_are_known_by_the_names_that_tokens_carry(here: Path, run: Run, keys: str, kids: set[str]) -> None:
    """Paths and patterns begin at the file, `kid=` before one names the key, and so does the file of a rotation."""
    (here / "etc").mkdir()
    for name in ("public.pem", "verify-old.pem"):
        (here / "etc" / name).write_text(PUBLIC_KEY)
    (here / "etc/servers.toml").write_text(f"[production]\ndomain = 'x'\nkeys = {keys}\n")
    result = run("caddyfile", "--config", "etc/servers.toml")
    assert set(re.findall(r'"kid":"([^"]+)"', result.stdout)) == kids


def test_the_application_s_own_key_serves_where_the_table_names_none(
    production: Path, run: Run, signing_key: str
) -> None:
    production.write_text('[production]\ndomain = "streams.example.com"\n')
    with override(signing_key=signing_key):
        result = run("caddyfile")
    assert result.exit_code == 0
    assert "PRIVATE" not in result.stdout
    assert '"d"' not in result.stdout


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no table [production]"),
        ("[production", "broadcastable.toml:"),
        ("[production]\ndomian = 'x'", "domian is unknown"),
        ("[production]\nport = 'x'", "port cannot be 'x'"),
        ("[production]\nport = true", "port cannot be True"),
        ("[production]\nport = -1", "[production]: port is between 0 and 65535; got -1"),
        ("[production]\nkeys = 'public.pem'", "keys is a list of file names"),
        ("[production]\ndomain = 'x'\nkeys = ['kid=nowhere.pem']", "not there: kid=nowhere.pem"),
        (f"[production]\ndomain = 'x'\nkeys = ['{'MIGHAgEAMB=' * 40}']", "not there: its entry 1"),
        ("[production]\norigins = [1]", "origins cannot be [1]"),
        ("[production]\nkeys = ['public.pem']", "needs a domain"),
        ("[production]\nport = 1\ntls = ['a']\nkeys = ['public.pem']", "tls names two files"),
        ("[production]\ndomain = 'x {'\nkeys = ['public.pem']", "domain is a host name"),
        ("[production]\ndomain = 'x'\ntls = 'maybe'\nkeys = ['public.pem']", "tls is"),
        ("[production]\ndomain = 'x'\nissuer = 'a\"b'\nkeys = ['public.pem']", "cannot stand in a Caddyfile"),
        ("[production]\ndomain = 'x'\norigins = ['https://a/b']\nkeys = ['public.pem']", "an origin is"),
        (
            "[production]\ndomain = 'x'\nkeys = ['nowhere.pem']",
            "broadcastable.toml, [production]: keys names a file that is not there: nowhere.pem",
        ),
        ("[production]\ndomain = 'x'\nkeys = ['verify-*.pem']", "no file fits verify-*.pem"),
        ("[production]\ndomain = 'x'", "There is no key"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(production: Path, run: Run, text: str, says: str) -> None:
    production.write_text(text)
    result = run("caddyfile")
    assert result.exit_code == 1
    assert says in result.stderr.replace("\n", " ")
    assert result.stdout == ""


def test_no_file_at_all_names_the_command_that_makes_one(here: Path, run: Run) -> None:
    result = run("caddyfile")
    assert result.exit_code == 1
    assert "broadcastable install" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--config", "typo.toml"), "typo.toml: No such file"),
        (("-e", "nope"), "broadcastable.toml: No such file"),
        (("-e", "development"), "broadcastable.toml: No such file"),
        (("--config", "there.toml", "-e", "nope"), "there.toml has no table [nope]"),
    ],
)
def test_a_file_or_table_that_was_asked_for_must_be_there(
    here: Path, start: Start, signing_key: str, options: tuple[str, ...], says: str
) -> None:
    """Without being asked for, the file may be missing: see `test_it_serves_what_the_application_signs`."""
    (here / "there.toml").write_text("[development]\n")
    command = start("server", "--port", "0", *options, BROADCASTABLE_SIGNING_KEY=signing_key)
    assert says in command.line(of="stderr")
    assert command.end()[0] == 1

"""The generated Caddyfile under a real Caddy, the two third-party directives put in place by stand-ins.

`jwtauth` becomes what it leaves behind, the claims of a verified token as placeholders: the test verifies the token and
sends the claims along. `durable_streams` becomes an answer. Everything else is read and done by Caddy itself.
"""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broadcastable.errors import TokenError
from broadcastable.server.caddyfile import CaddySite, caddyfile
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper, KeyPair, generate_key_pair
from tests.server.attacks import MOUNT, STREAM, Attack, attacks, token
from tests.services import free_port

LET_IN = "https://example.com"
# Only a holder of our signing key can make these: the plugin gives every claim as text.
NOT_ALIKE = {"server as a text", "permissions as a text"}
KEYS = generate_key_pair()
ATTACKS = [attack for attack in attacks(KEYS) if attack.name not in NOT_ALIKE]


def stand_ins(text: str) -> str:
    """*text* without the directives of modules that the stock binary lacks."""
    claims = """
        @unverified not header X-Verified yes
        respond @unverified 401
        map {header.X-Verified} {http.auth.user.stream} {http.auth.user.permissions} {http.auth.user.server} {
            default {header.X-Stream} {header.X-Permissions} {header.X-Server}
        }"""
    text, jwtauth = re.subn(r"jwtauth \{[^}]*\}", lambda _: claims, text)
    text, streams = re.subn(r"durable_streams \{[^}]*\}", 'respond "let in" 200', text)
    assert (jwtauth, streams) == (1, 1)
    return text


class Caddy:
    """A Caddy on a port of the loopback interface."""

    def __init__(self, directory: Path, text: str, port: int) -> None:
        self.port = port
        config = directory / "Caddyfile"
        config.write_text(text)
        self._log = (directory / "log").open("wb")
        self._process = subprocess.Popen(
            ["caddy", "run", "--config", str(config), "--adapter", "caddyfile"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={"HOME": str(directory), "PATH": "/usr/bin:/bin"},
        )
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise AssertionError((directory / "log").read_text()) from None
                time.sleep(0.02)

    def status(self, attack: Attack, verified: dict[str, str]) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(attack.method, attack.target)
            for name, value in [*attack.all_headers, *verified.items()]:
                connection.putheader(name, value)
            connection.endheaders()
            return connection.getresponse().status
        finally:
            connection.close()

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._log.close()


@pytest.fixture(scope="module")
def caddy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caddy]:
    assert shutil.which("caddy"), "Debian's package caddy is not installed"
    port, jwks_port = free_port(), free_port()
    site = CaddySite(port=port, jwks_port=jwks_port, origins=[LET_IN])
    caddy = Caddy(tmp_path_factory.mktemp("caddy"), stand_ins(caddyfile(site, jwks_of(KEYS))), port)
    yield caddy
    caddy.stop()


def jwks_of(keys: KeyPair) -> dict[str, object]:
    return Gatekeeper(Settings(signing_key=keys.private_pem)).jwks()


def verified(attack: Attack) -> dict[str, str]:
    """What `jwtauth` would leave behind for the token of *attack*."""
    tokens = [value.removeprefix("Bearer ") for name, value in attack.all_headers if value.startswith("Bearer ")]
    tokens += re.findall(r"(?:^|&)token=([^&]*)", attack.query)
    for each in tokens:
        try:
            claims = Gatekeeper(Settings(signing_key=KEYS.private_pem)).decode(each)
        except TokenError:
            continue
        permissions = claims.get("permissions", [])
        return {
            "X-Verified": "yes",
            "X-Stream": str(claims.get("stream", "")) if not isinstance(claims.get("stream"), list) else "",
            "X-Permissions": ",".join(permissions) if isinstance(permissions, list) else str(permissions),
            "X-Server": {True: "true"}.get(claims.get("server", False), "") if claims.get("server") is True else "",
        }
    return {}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_caddyfile_refuses_what_the_middleware_refuses(caddy: Caddy, attack: Attack) -> None:
    """The same table, the same answers; 4xx of Caddy's own for requests that it does not even read."""
    assert caddy.status(attack, verified(attack)) == attack.status


@pytest.mark.parametrize(
    ("method", "permissions", "headers"),
    [
        ("GET", ["read"], ()),
        ("HEAD", ["read", "write"], ()),
        ("POST", ["write"], ()),
        ("GET", ["read"], (("Origin", LET_IN),)),
    ],
)
def test_it_lets_in_whom_the_token_lets_in(
    caddy: Caddy, method: str, permissions: list[str], headers: tuple[tuple[str, str], ...]
) -> None:
    good = Attack("good", 200, token(KEYS, permissions=permissions), method, headers=headers)
    assert caddy.status(good, verified(good)) == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST", "HEAD"])
def test_it_lets_the_server_do_everything(caddy: Caddy, method: str) -> None:
    server = Attack("server", 200, token(KEYS, stream=None, permissions=None, server=True), method)
    assert caddy.status(server, verified(server)) == 200


def test_a_page_that_is_let_in_gets_its_preflight(caddy: Caddy) -> None:
    preflight = Attack(
        "preflight",
        204,
        method="OPTIONS",
        headers=(("Origin", LET_IN), ("Access-Control-Request-Method", "GET")),
    )
    assert caddy.status(preflight, {}) == 204


@pytest.mark.parametrize(
    "site",
    [
        CaddySite(domain="streams.example.com", data_dir="/var/lib/streams", audience="browsers", origins=["*"]),
        CaddySite(domain="streams.example.com", tls="internal", port=8443),
        CaddySite(domain="streams.example.com", tls="off"),
        CaddySite(domain="streams.example.com", tls=("cert.pem", "key.pem"), origins=[LET_IN, "https://a.example"]),
        CaddySite(port=4437),
    ],
    ids=["public", "internal", "behind a proxy", "own certificate", "plain"],
)
def test_caddy_adapts_every_form(tmp_path: Path, site: CaddySite) -> None:
    """`caddy adapt` parses the whole file, matchers and expressions included."""
    config = tmp_path / "Caddyfile"
    config.write_text(stand_ins(caddyfile(site, jwks_of(KEYS))))
    adapted = subprocess.run(
        ["caddy", "adapt", "--config", str(config), "--adapter", "caddyfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert adapted.returncode == 0, adapted.stderr
    assert MOUNT in adapted.stdout
    assert STREAM not in adapted.stdout

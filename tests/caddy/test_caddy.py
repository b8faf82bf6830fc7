"""The generated Caddyfile under a real Caddy, the two third-party directives put in place by stand-ins.

`jwtauth` becomes what it leaves behind, the claims of a verified token as placeholders: the test verifies the token as
the module does and sends the claims along. `durable_streams` becomes an answer with the headers that it gives.
Everything else is read and done by Caddy itself.
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
from typing import Any
from urllib.parse import parse_qs

import jwt
import pytest

from broadcastable.server.caddyfile import CaddySite, caddyfile
from broadcastable.server.gatekeeper import MAX_BODY
from broadcastable.server.origins import EXPOSED, PREFLIGHT_SECONDS, REQUEST_HEADERS
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper, KeyPair, generate_key_pair
from tests.server.attacks import ISSUER, MOUNT, STREAM, Attack, attacks, attacks_by_token, token
from tests.services import free_port

LET_IN = "https://example.com"
KEYS = generate_key_pair()
NOT_ALIKE = {
    "no expiry": "jwtauth compares `exp` where there is one, and does not ask for it",
    "life of a year": "jwtauth does not bound what a token claims",
    "other audience": "jwtauth looks at `aud` only where the site has an audience",
    "server as a text": "jwtauth gives every claim as text",
    "permissions as a text": "jwtauth gives every claim as text",
    "list of streams": "jwtauth joins a list by commas, so a list of one is that one",
}
"""Rows that the gatekeeper refuses and Caddy lets in. Nobody but a holder of our signing key can make such a token."""

# Not applicable: these are refused by jwtauth itself, which is not here, so they would only be a test of its stand-in.
BY_TOKEN = {attack.name for attack in attacks_by_token(KEYS)} - {"no token"}
ATTACKS = [attack for attack in attacks(KEYS) if attack.name not in BY_TOKEN | set(NOT_ALIKE)]
GIVEN = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE, HEAD, OPTIONS",
    "Access-Control-Allow-Headers": "Content-Type, Stream-Seq",
    "Access-Control-Expose-Headers": "Stream-Next-Offset",
    "Cache-Control": "public, max-age=60, stale-while-revalidate=300",
    "Stream-Next-Offset": "00_07",
}
"""Headers of `durable_streams`, as its handler sets them on each response and, `Cache-Control`, on catch-up reads."""


def stand_ins(text: str) -> str:
    """*text* without the directives of modules that the stock binary lacks."""
    claims = """
        @unverified not header X-Verified yes
        error @unverified 401
        map {header.X-Verified} {http.auth.user.stream} {http.auth.user.permissions} {http.auth.user.server} {
            default {header.X-Stream} {header.X-Permissions} {header.X-Server}
        }"""
    answer = [*(f'header {name} "{value}"' for name, value in GIVEN.items()), 'respond "{http.request.body}" 200']
    text, jwtauth = re.subn(r"jwtauth \{[^}]*\}", lambda _: claims, text)
    text, streams = re.subn(r"durable_streams \{[^}]*\}", lambda _: "\n".join(answer), text)
    assert (jwtauth, streams) == (1, 1)
    return text


class Caddy:
    """A Caddy on a port of the loopback interface."""

    def __init__(self, directory: Path, text: str, port: int) -> None:
        self.port = port
        config = directory / "Caddyfile"
        config.write_text(text)
        self.log = directory / "log"
        self._log = self.log.open("wb")
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
                    raise AssertionError(self.log.read_text()) from None
                time.sleep(0.02)

    def answer(
        self, attack: Attack, verified: dict[str, str], body: bytes | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.putrequest(attack.method, attack.target)
            for name, value in [*attack.all_headers, *verified.items()]:
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def status(self, attack: Attack, verified: dict[str, str]) -> int:
        return self.answer(attack, verified)[0].status

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._log.close()


def running(directory: Path, origins: list[str]) -> Iterator[Caddy]:
    assert shutil.which("caddy"), "Debian's package caddy is not installed"
    port, jwks_port = free_port(), free_port()
    site = CaddySite(port=port, jwks_port=jwks_port, origins=origins)
    caddy = Caddy(directory, stand_ins(caddyfile(site, jwks_of(KEYS))), port)
    yield caddy
    caddy.stop()


@pytest.fixture(scope="module")
def caddy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caddy]:
    yield from running(tmp_path_factory.mktemp("caddy"), [LET_IN])


@pytest.fixture(scope="module")
def caddy_without_origins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caddy]:
    yield from running(tmp_path_factory.mktemp("caddy"), [])


@pytest.fixture(scope="module")
def caddy_for_everyone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caddy]:
    yield from running(tmp_path_factory.mktemp("caddy"), ["*"])


def jwks_of(keys: KeyPair) -> dict[str, Any]:
    return Gatekeeper(Settings(signing_key=keys.private_pem)).jwks()


def verified(attack: Attack) -> dict[str, str]:
    """What `jwtauth` would leave behind for the token of *attack*: by its source, not by our gatekeeper."""
    tokens = parse_qs(attack.query).get("token", [])[:1]
    tokens += [value for name, value in attack.all_headers if name == "Authorization"][:1]
    for each in tokens:
        text = each[len("bearer ") :] if each.lower().startswith("bearer ") else each
        try:
            claims = claims_of(text.strip())
        except (jwt.PyJWTError, KeyError):
            continue
        return {"X-Verified": "yes", **{f"X-{name}": stringified(claims.get(name.lower())) for name in CLAIMS}}
    return {}


CLAIMS = ("Stream", "Permissions", "Server")


def claims_of(text: str) -> dict[str, Any]:
    """`exp`, `nbf` and `iat` are compared where there are any, to the second; `aud` is not looked at."""
    keys = {str(key["kid"]): jwt.PyJWK(key) for key in jwks_of(KEYS)["keys"]}
    claims: dict[str, Any] = jwt.decode(
        text,
        keys[jwt.get_unverified_header(text)["kid"]],
        algorithms=["ES256"],
        issuer=ISSUER,
        options={"verify_aud": False},
    )
    return claims


def stringified(claim: object) -> str:
    """A claim as the module makes a placeholder of it; a number has no text there."""
    if isinstance(claim, bool):
        return str(claim).lower()
    if isinstance(claim, list):
        return ",".join(map(stringified, claim))
    return claim if isinstance(claim, str) else ""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_caddyfile_refuses_what_the_middleware_refuses(caddy: Caddy, attack: Attack) -> None:
    """The same table, the same answers; 4xx of Caddy's own for requests that it does not even read."""
    assert caddy.status(attack, verified(attack)) == attack.status


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_what_caddy_lets_in_and_the_gatekeeper_does_not_is_known(caddy: Caddy, name: str) -> None:
    """Each exception is one: were it refused, it would belong to the table above, and out of the documentation."""
    (attack,) = [each for each in attacks(KEYS) if each.name == name]
    assert caddy.status(attack, verified(attack)) == 200


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
    response, _ = caddy.answer(preflight, {})
    assert response.status == 204
    assert cors(response) == {
        "access-control-allow-origin": LET_IN,
        "access-control-expose-headers": EXPOSED,
        "access-control-allow-methods": "GET, HEAD, POST",
        "access-control-allow-headers": REQUEST_HEADERS,
        "access-control-max-age": PREFLIGHT_SECONDS,
    }


def read(*headers: tuple[str, str], by: str | None = None) -> Attack:
    return Attack("read", 200, by or token(KEYS), headers=headers)


def cors(response: http.client.HTTPResponse) -> dict[str, str]:
    """What the response tells a browser about pages; each header once."""
    told = [(name.lower(), value) for name, value in response.getheaders() if name.lower().startswith("access-control")]
    assert len(dict(told)) == len(told)
    return dict(told)


def test_no_page_is_let_in_where_no_origin_is_named(caddy_without_origins: Caddy) -> None:
    """`durable_streams` lets in every page by itself; that must not get out."""
    for attack in (read(), read(("Origin", LET_IN)), read(("Origin", LET_IN), by="bad")):
        response, _ = caddy_without_origins.answer(attack, verified(attack))
        assert cors(response) == {}


def test_only_the_pages_that_are_named_are_let_in(caddy: Caddy) -> None:
    good, evil = read(("Origin", LET_IN)), read(("Origin", "https://evil.example"))
    let_in = {"access-control-allow-origin": LET_IN, "access-control-expose-headers": EXPOSED}
    for attack, expected in ((good, let_in), (evil, {}), (read(), {})):
        response, _ = caddy.answer(attack, verified(attack))
        assert (response.status, cors(response)) == (200, expected)
        assert response.headers["Vary"] == "Origin"


def test_a_page_that_is_let_in_is_told_why_it_is_refused(caddy: Caddy) -> None:
    """Without these headers the page could not tell a 401, which a new token mends, from a lost connection."""
    for attack, status in (
        (read(("Origin", LET_IN), by="bad"), 401),
        (read(("Origin", LET_IN), by=token(KEYS, permissions=["write"])), 403),
    ):
        response, _ = caddy.answer(attack, verified(attack))
        assert response.status == status
        assert cors(response)["access-control-allow-origin"] == LET_IN


def test_every_page_is_let_in_where_a_star_says_so(caddy_for_everyone: Caddy) -> None:
    attack = read(("Origin", "https://any.example"))
    response, _ = caddy_for_everyone.answer(attack, verified(attack))
    assert cors(response) == {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED}


def test_caches_that_are_shared_keep_nothing(caddy: Caddy) -> None:
    """As by the gatekeeper: a catch-up read may be kept by the reader's own cache alone."""
    response, _ = caddy.answer(read(), verified(read()))
    assert response.headers["Cache-Control"] == "private, max-age=60, stale-while-revalidate=300"
    assert response.headers["Stream-Next-Offset"] == "00_07"


def test_a_body_ends_at_the_limit(caddy: Caddy) -> None:
    """The stand-in answers with what it can read of the body; `durable_streams` stores nothing of one that fails."""
    post = Attack("append", 200, token(KEYS), "POST")
    assert len(caddy.answer(post, verified(post), bytes(MAX_BODY))[1]) == MAX_BODY
    assert len(caddy.answer(post, verified(post), bytes(MAX_BODY + 1))[1]) == MAX_BODY


def test_no_token_is_in_the_log(caddy: Caddy) -> None:
    good, bad = token(KEYS), token(generate_key_pair())
    for text in (good, bad):
        for attack in (read(by=text), Attack("read", 200, query=f"offset=logged&token={text}")):
            caddy.answer(attack, verified(attack))
    log = caddy.log.read_text()
    assert log.count("offset=logged") == 2
    assert not [text for text in (good, bad) if text.split(".")[1] in log]


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

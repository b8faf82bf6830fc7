"""The nginx configuration of the deployment page, as it stands there, under a real nginx before the embedded server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broadcastable.server.embedded import EmbeddedServer, embedded_server
from broadcastable.settings import Settings
from broadcastable.tokens import generate_key_pair
from tests.server.attacks import STREAM, Attack, attacks, token
from tests.services import free_port, wait_until

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
NGINX = shutil.which("nginx", path=os.pathsep.join((os.defpath, "/usr/sbin", "/usr/local/sbin"))) or "nginx"
KEYS = generate_key_pair()
EVENT = b'[{"n":1}]'
REFUSED_BY_NGINX = {
    f"{who} on {method}": status
    for who in ("client token", "no token")
    for method, status in (("TRACE", 405), ("get", 400), ("Post", 400))
} | {"outside: the mount itself": 301}


def configuration(directory: Path, port: int, upstream: int) -> str:
    """The page's server block, with ports, certificate and logs of the test's own."""
    (text,) = re.findall(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for there, here in (
        ("listen 443 ssl http2;", f"listen 127.0.0.1:{port} ssl http2;"),
        ("http://127.0.0.1:4437;", f"http://127.0.0.1:{upstream};"),
        ("/etc/ssl/private/streams.example.org.pem", str(directory / "key.pem")),
        ("/etc/ssl/streams.example.org.pem", str(directory / "certificate.pem")),
        ("/var/log/nginx/", f"{directory}/"),
    ):
        assert there in text
        text = text.replace(there, here)
    temporary = "".join(
        f"    {name}_temp_path {directory / name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"daemon off;\npid {directory}/pid;\nevents {{}}\nhttp {{\n{temporary}{text}}}\n"


def write_certificate(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (directory / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


class Nginx:
    """An nginx on a port of the loopback interface, before the server on port *upstream*."""

    def __init__(self, directory: Path, upstream: int) -> None:
        self.directory = directory
        self.port = free_port()
        write_certificate(directory)
        (directory / "nginx.conf").write_text(configuration(directory, self.port, upstream))
        self.trust = ssl.create_default_context(cafile=str(directory / "certificate.pem"))
        self.trust.set_alpn_protocols(["h2", "http/1.1"])
        self._output = (directory / "output").open("wb")
        self._process = subprocess.Popen(
            [NGINX, "-e", str(directory / "start.log"), "-p", str(directory), "-c", str(directory / "nginx.conf")],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        wait_until(self._listens, within=20, what="the start of nginx")

    def _listens(self) -> bool:
        assert self._process.poll() is None, (self.directory / "output").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def connect(self, protocol: str = "http/1.1") -> ssl.SSLSocket:
        trust = ssl.create_default_context(cafile=str(self.directory / "certificate.pem"))
        trust.set_alpn_protocols([protocol])
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        return trust.wrap_socket(plain, server_hostname="localhost")

    def say(self, request: bytes) -> bytes:
        """The whole answer to *request*, sent as it is: an HTTP client would tidy the path up."""
        with self.connect() as connection:
            connection.sendall(request)
            answer = b""
            while piece := connection.recv(65_536):
                answer += piece
            return answer

    def written(self) -> str:
        """All that its logs hold."""
        return "".join(log.read_text() for log in (*self.directory.glob("*.log"), self.directory / "output"))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._output.close()


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with embedded_server(settings=Settings(signing_key=KEYS.private_pem), allowed_origins=()) as server:
        with httpx.Client(headers=bearer(server)) as owner:
            owner.put(f"{server.url}/{STREAM}").raise_for_status()
            owner.post(f"{server.url}/{STREAM}", content=EVENT).raise_for_status()
        yield server


def bearer(server: EmbeddedServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.gatekeeper.server_token()}", "Content-Type": "application/json"}


@pytest.fixture(scope="module")
def nginx(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    nginx = Nginx(tmp_path_factory.mktemp("nginx"), urlsplit(server.url).port or 0)
    yield nginx
    nginx.stop()


def request_of(attack: Attack) -> bytes:
    lines = [f"{attack.method} {attack.target} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in attack.all_headers]
    lines += ["Content-Type: application/json", "Content-Length: 3", "", "[1]"]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in attacks(KEYS)])
def test_no_attack_gets_through(nginx: Nginx, server: EmbeddedServer, attack: Attack) -> None:
    """The same answers as without it, but for methods that it does not know itself and its redirect to the mount."""
    status = int(nginx.say(request_of(attack)).split(b" ", 2)[1])
    assert status == REFUSED_BY_NGINX.get(attack.name, attack.status)
    with httpx.Client(headers=bearer(server)) as owner:
        assert owner.get(f"{server.url}/{STREAM}").content == EVENT


def test_a_stream_is_read_by_its_name(nginx: Nginx) -> None:
    """The double slash of its gid arrives, and so does its percent sign."""
    reader = Attack("reader", 200, token(KEYS))
    head, _, body = nginx.say(request_of(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert EVENT in body
    encoded = Attack("encoded", 200, token(KEYS), path=reader.path.replace("Room", "%52oom"))
    assert nginx.say(request_of(encoded)).startswith(b"HTTP/1.1 200")


def test_events_arrive_one_by_one(nginx: Nginx, server: EmbeddedServer) -> None:
    """Each while the response goes on, and before there is another."""
    name = "one/by/one"
    good = server.gatekeeper.encode({"stream": name, "permissions": ["read"]})
    url = f"https://localhost:{nginx.port}/v1/streams/{name}"
    with (
        httpx.Client(headers=bearer(server)) as owner,
        httpx.Client(verify=nginx.trust, timeout=10) as reader,
    ):
        owner.put(f"{server.url}/{name}").raise_for_status()
        params = {"offset": "-1", "live": "sse", "token": good}
        with reader.stream("GET", url, params=params) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            for number in range(3):
                owner.post(f"{server.url}/{name}", content=f"[{number}]").raise_for_status()
                assert next(line for line in lines if line.startswith("data:[")) == f"data:[{number}]"


def test_a_reader_that_leaves_is_let_go(nginx: Nginx, server: EmbeddedServer) -> None:
    good = server.gatekeeper.encode({"stream": STREAM, "permissions": ["read"]})
    wait_until(lambda: server.middleware.live_reads == 0, what="the end of all other reads")
    connection = nginx.connect()
    connection.sendall(
        f"GET /v1/streams/{STREAM}?offset=now&live=sse&token={good} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    )
    assert connection.recv(12) == b"HTTP/1.1 200"
    assert server.middleware.live_reads == 1
    connection.close()
    wait_until(lambda: server.middleware.live_reads == 0, what="the end of the read")


def test_browsers_get_http_2(nginx: Nginx) -> None:
    with nginx.connect("h2") as connection:
        assert connection.selected_alpn_protocol() == "h2"


def test_no_log_has_a_token(tmp_path: Path) -> None:
    """Nor when the server behind is away, which is when nginx quotes requests in its log of errors."""
    nginx = Nginx(tmp_path, free_port())
    good = token(KEYS)
    try:
        for query in (f"token={good}", f"offset=-1&live=sse&token={good}"):
            answer = nginx.say(request_of(Attack("away", 502, query=query)))
            assert answer.startswith(b"HTTP/1.1 502")
    finally:
        nginx.stop()
    assert nginx.written().count(f'"GET /v1/streams/{STREAM}" 502') == 2
    assert "eyJ" not in nginx.written()
    assert "token" not in nginx.written()

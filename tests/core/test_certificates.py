"""A stream server whose certificate a private authority signed, as `tls = "internal"` of Caddy makes them."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broadcastable.client import AsyncStreamClient, StreamClient
from broadcastable.errors import StreamUnavailable
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper, generate_key_pair


class _Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Stream-Next-Offset", "00_07")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing: the tests ask for no log."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "streams of the tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now.replace(year=2100))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    directory = tmp_path_factory.mktemp("authority")
    (directory / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return directory / "ca.pem", directory / "key.pem"


@pytest.fixture(scope="module")
def settings(certificate: tuple[Path, Path]) -> Iterator[Settings]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Settings(
        server_url=f"https://127.0.0.1:{server.server_port}/v1/streams", signing_key=generate_key_pair().private_pem
    )
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_authority_that_the_environment_names_is_trusted(
    settings: Settings, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    # And nothing else of the environment counts.
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    client = StreamClient(settings, Gatekeeper(settings))
    assert client.head("room") == "00_07"
    client.close()

    async def main() -> str:
        client = AsyncStreamClient(settings, Gatekeeper(settings))
        try:
            return await client.head("room")
        finally:
            await client.close()

    assert asyncio.run(main()) == "00_07"


def test_without_it_nobody_is_trusted_that_certifi_does_not_know(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    client = StreamClient(settings, Gatekeeper(settings))
    with pytest.raises(StreamUnavailable, match="SSL_CERT_FILE"):
        client.head("room")
    client.close()

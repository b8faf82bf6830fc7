"""Tokens: what is signed, what is accepted, and that nothing else is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import pickle
import threading
import time
import traceback
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from broadcastable import tokens
from broadcastable.errors import ConfigurationError, ExpiredToken, InvalidToken, UsageError
from broadcastable.settings import Settings
from broadcastable.tokens import Gatekeeper, KeyPair, generate_key_pair

STREAM = "gid://app/Room/1/messages"
CLAIMS = {"stream": STREAM, "permissions": ["read"]}


@pytest.fixture(scope="module")
def keys() -> KeyPair:
    return generate_key_pair()


@pytest.fixture
def gatekeeper(keys: KeyPair) -> Gatekeeper:
    return Gatekeeper(Settings(signing_key=keys.private_pem))


def signed(keys: KeyPair, *, kid: str | None = None, key: Any = None, alg: str = "ES256", **changes: Any) -> str:
    """A token by PyJWT itself, with any claim changed, or left out when None."""
    now = int(time.time())
    claims = {"iss": "broadcastable", "iat": now, "exp": now + 60, **CLAIMS, **changes}
    headers = {"kid": keys.kid if kid is None else kid}
    kept = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(kept, key or keys.private_pem, alg, headers=headers)


def test_a_token_carries_the_claims_back(gatekeeper: Gatekeeper) -> None:
    claims = gatekeeper.decode(gatekeeper.encode({**CLAIMS, "identity": "ada"}, 60))
    assert claims["stream"] == STREAM
    assert claims["permissions"] == ["read"]
    assert claims["identity"] == "ada"
    assert claims["iss"] == "broadcastable"
    assert claims["exp"] - claims["iat"] == 60


def test_the_header_pins_the_algorithm_and_names_the_key(gatekeeper: Gatekeeper, keys: KeyPair) -> None:
    assert jwt.get_unverified_header(gatekeeper.encode(CLAIMS)) == {"alg": "ES256", "typ": "JWT", "kid": keys.kid}


def test_any_jwt_library_verifies_a_token_with_the_published_key(gatekeeper: Gatekeeper) -> None:
    token = gatekeeper.encode(CLAIMS)
    published = jwt.PyJWKSet.from_dict(gatekeeper.jwks())
    key = published[jwt.get_unverified_header(token)["kid"]]
    assert jwt.decode(token, key, algorithms=["ES256"], issuer="broadcastable")["stream"] == STREAM


def test_the_kid_is_the_thumbprint_of_rfc_7638(keys: KeyPair, gatekeeper: Gatekeeper) -> None:
    jwk = gatekeeper.jwks()["keys"][0]
    canonical = f'{{"crv":"P-256","kty":"EC","x":"{jwk["x"]}","y":"{jwk["y"]}"}}'
    digest = hashlib.sha256(canonical.encode()).digest()
    assert keys.kid == jwk["kid"] == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def test_the_key_set_holds_no_private_half(gatekeeper: Gatekeeper) -> None:
    assert set(gatekeeper.jwks()["keys"][0]) == {"kty", "crv", "x", "y", "kid", "use", "alg"}


@pytest.mark.parametrize("life", [0, -1, 86_401, float("nan")])
def test_a_life_out_of_range_is_refused(gatekeeper: Gatekeeper, life: float) -> None:
    with pytest.raises(UsageError, match="max_token_life"):
        gatekeeper.encode(CLAIMS, life)


def test_a_fraction_of_a_second_of_life_is_rounded_up(gatekeeper: Gatekeeper) -> None:
    claims = gatekeeper.decode(gatekeeper.encode(CLAIMS, 0.1))
    assert claims["exp"] - claims["iat"] == 1


def test_the_longest_life_allowed_is_accepted_back(keys: KeyPair) -> None:
    gatekeeper = Gatekeeper(
        Settings(
            signing_key=keys.private_pem, max_token_life=10.5, token_expiry=10.5, signed_stream_url_expires_in=10.5
        )
    )
    assert gatekeeper.decode(gatekeeper.encode(CLAIMS))["stream"] == STREAM


@pytest.mark.parametrize("claim", ["iss", "aud", "iat", "exp"])
def test_claims_cannot_bring_what_the_gatekeeper_sets(gatekeeper: Gatekeeper, claim: str) -> None:
    with pytest.raises(UsageError, match=claim):
        gatekeeper.encode({**CLAIMS, claim: 1})


def test_a_setting_longer_than_the_maximum_life_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="signed_stream_url_expires_in"):
        Settings(signed_stream_url_expires_in=100_000)


def refused_tokens(keys: KeyPair) -> dict[str, str]:
    """Every token that must not be accepted, by what is wrong with it."""
    now = int(time.time())
    other = generate_key_pair()
    good = signed(keys)
    head, body, signature = good.split(".")
    forged_body = jwt.utils.base64url_encode(
        json.dumps({"iss": "broadcastable", "iat": now, "exp": now + 60, "server": True}).encode()
    ).decode()
    none_head = jwt.utils.base64url_encode(json.dumps({"alg": "none", "kid": keys.kid}).encode()).decode()
    hs_head = jwt.utils.base64url_encode(json.dumps({"alg": "HS256", "kid": keys.kid}).encode()).decode()
    hs_signature = jwt.utils.base64url_encode(
        hmac.new(keys.public_pem.encode(), f"{hs_head}.{body}".encode(), hashlib.sha256).digest()
    ).decode()
    p384 = ec.generate_private_key(ec.SECP384R1())
    return {
        "not yet valid": signed(keys, nbf=now + 60),
        "issued in the future": signed(keys, iat=now + 60, exp=now + 120),
        "other issuer": signed(keys, iss="someone"),
        "no issuer": signed(keys, iss=None),
        "audience where none is configured": signed(keys, aud="others"),
        "no expiry": signed(keys, exp=None),
        "no issue time": signed(keys, iat=None),
        "lives too long": signed(keys, exp=now + 86_400 + 60),
        "expiry as text": signed(keys, exp=str(now + 60)),
        "issue time as true": signed(keys, iat=True),
        "infinite expiry": signed(keys, exp=float("inf")),
        "expiry that is not a number": signed(keys, exp=float("nan")),
        "key of someone else": signed(other),
        "our kid on a foreign key": signed(other, kid=keys.kid),
        "no kid": jwt.encode({"iss": "broadcastable", "iat": now, "exp": now + 60}, keys.private_pem, "ES256"),
        "alg none": f"{none_head}.{body}.",
        "alg none with our signature": f"{none_head}.{body}.{signature}",
        "HS256 with the public key": f"{hs_head}.{body}.{hs_signature}",
        "ES384": jwt.encode({**CLAIMS, "iat": now, "exp": now + 60}, p384, "ES384", headers={"kid": keys.kid}),
        "tampered payload": f"{head}.{forged_body}.{signature}",
        "no signature": f"{head}.{body}.",
        "two segments": f"{head}.{body}",
        "empty": "",
        "not base64": "a.b.c",
        "null bytes": "\x00" * 40,
        "not ASCII": "ключ.ключ.ключ",
        "lone surrogate": "\ud800.a.b",
        "64 KiB": good + "A" * 65_536,
        "longer than is read, and good": signed(keys, identity="x" * 8_192),
        "payload that is no object": jwt.PyJWS().encode(b"[]", keys.private_pem, "ES256", headers={"kid": keys.kid}),
        "unencoded payload": jwt.PyJWS().encode(
            b"{}", keys.private_pem, "ES256", headers={"kid": keys.kid}, is_payload_detached=True
        ),
    }


@pytest.mark.parametrize("fault", refused_tokens(generate_key_pair()))
def test_everything_else_is_refused_without_showing_the_token(
    gatekeeper: Gatekeeper, keys: KeyPair, fault: str
) -> None:
    token = refused_tokens(keys)[fault]
    with pytest.raises(InvalidToken) as caught:
        gatekeeper.decode(token)
    assert caught.value.__context__ is None
    for segment in token.split("."):
        assert len(segment) < 8 or segment not in "".join(traceback.format_exception_only(caught.value))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("claim", ["iss", "iat", "exp"])
def test_a_token_that_lacks_a_claim_says_so(gatekeeper: Gatekeeper, keys: KeyPair, claim: str) -> None:
    with pytest.raises(InvalidToken, match="lacks a claim"):
        gatekeeper.decode(signed(keys, **{claim: None}))


def test_an_expired_token_says_so(gatekeeper: Gatekeeper, keys: KeyPair) -> None:
    now = int(time.time())
    with pytest.raises(ExpiredToken) as caught:
        gatekeeper.decode(signed(keys, iat=now - 60, exp=now - 11))
    assert caught.value.__context__ is None


def test_clocks_may_differ_by_the_leeway(gatekeeper: Gatekeeper, keys: KeyPair) -> None:
    now = int(time.time())
    assert gatekeeper.decode(signed(keys, iat=now - 60, exp=now - 5))
    assert gatekeeper.decode(signed(keys, iat=now + 5, nbf=now + 5))


def test_the_audience_is_written_and_required_when_configured(keys: KeyPair) -> None:
    ours = Gatekeeper(Settings(signing_key=keys.private_pem, token_audience="rooms"))
    assert ours.decode(ours.encode(CLAIMS))["aud"] == "rooms"
    for foreign in (signed(keys), signed(keys, aud="others")):
        with pytest.raises(InvalidToken, match="token_audience"):
            ours.decode(foreign)


@given(st.text(max_size=200))
def test_no_text_is_a_token(text: str) -> None:
    with pytest.raises(InvalidToken):
        _FUZZED.decode(text)


_FUZZED = Gatekeeper(Settings(signing_key=generate_key_pair().private_pem))


class TestRotation:
    """Sign with one key, verify with several; each step leaves the tokens of the step before valid."""

    @pytest.fixture
    def new(self) -> KeyPair:
        return generate_key_pair()

    def test_the_old_key_verifies_while_the_new_one_signs(self, keys: KeyPair, new: KeyPair) -> None:
        rotated = Gatekeeper(Settings(signing_key=new.private_pem, verify_keys=(keys.public_pem,)))
        assert rotated.decode(signed(keys))["stream"] == STREAM
        assert jwt.get_unverified_header(rotated.encode(CLAIMS))["kid"] == new.kid
        assert [key["kid"] for key in rotated.jwks()["keys"]] == [new.kid, keys.kid]

    def test_the_new_key_may_be_announced_before_it_signs(self, keys: KeyPair, new: KeyPair) -> None:
        announced = Gatekeeper(Settings(signing_key=keys.private_pem, verify_keys=(new.public_pem,)))
        assert announced.decode(signed(new))["stream"] == STREAM

    def test_a_key_that_was_dropped_verifies_no_more(self, keys: KeyPair, new: KeyPair) -> None:
        with pytest.raises(InvalidToken, match="verify_keys"):
            Gatekeeper(Settings(signing_key=new.private_pem)).decode(signed(keys))

    def test_a_key_with_a_name_of_its_own_keeps_it(self, keys: KeyPair, new: KeyPair, tmp_path: Any) -> None:
        file = tmp_path / "old.pem"
        file.write_text(keys.public_pem)
        for entry in (f"spring={keys.public_pem}", f"spring={file}"):
            rotated = Gatekeeper(Settings(signing_key=new.private_pem, verify_keys=(entry,)))
            assert rotated.decode(signed(keys, kid="spring"))["stream"] == STREAM

    def test_naming_a_key_leaves_its_earlier_tokens_valid(self, keys: KeyPair) -> None:
        named = Gatekeeper(Settings(signing_key=keys.private_pem, signing_kid="spring"))
        assert jwt.get_unverified_header(named.encode(CLAIMS))["kid"] == "spring"
        assert named.decode(signed(keys))["stream"] == STREAM

    def test_a_private_key_among_the_verify_keys_serves_by_its_public_half(self, keys: KeyPair, new: KeyPair) -> None:
        rotated = Gatekeeper(Settings(signing_key=new.private_pem, verify_keys=(keys.private_pem,)))
        assert rotated.decode(signed(keys))["stream"] == STREAM
        assert "d" not in rotated.jwks()["keys"][1]

    def test_two_keys_of_one_name_are_refused(self, keys: KeyPair, new: KeyPair) -> None:
        settings = Settings(signing_key=new.private_pem, signing_kid="k", verify_keys=(f"k={keys.public_pem}",))
        with pytest.raises(ConfigurationError, match="'k'"):
            Gatekeeper(settings).decode("")

    def test_verify_keys_alone_verify_and_do_not_sign(self, keys: KeyPair) -> None:
        gate = Gatekeeper(Settings(verify_keys=(keys.public_pem,)))
        assert gate.decode(signed(keys))["stream"] == STREAM
        with pytest.raises(ConfigurationError, match="signing_key"):
            gate.encode(CLAIMS)


def pem(key: Any, form: Any = serialization.PrivateFormat.PKCS8, cipher: Any = None) -> str:
    cipher = cipher or serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, cipher).decode()


P256 = ec.generate_private_key(ec.SECP256R1())
TRADITIONAL = serialization.PrivateFormat.TraditionalOpenSSL
PASSPHRASE = serialization.BestAvailableEncryption(b"open")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(pem(P256), id="PKCS 8"),
        pytest.param(pem(P256, TRADITIONAL), id="SEC 1"),
        pytest.param("\n".join("    " + line for line in pem(P256).splitlines()), id="indented"),
        pytest.param(pem(P256).replace("\n", "\r\n"), id="Windows line ends"),
        pytest.param(pem(P256).replace("\n", "\\n"), id="escaped line ends"),
        pytest.param(pem(P256).replace("\n", " "), id="one line"),
        pytest.param("Bag Attributes\n  name: x\n" + pem(P256), id="text before it"),
        pytest.param(
            "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n" + pem(P256, TRADITIONAL),
            id="as openssl ecparam writes it",
        ),
    ],
)
def test_a_key_is_read_however_its_pem_was_carried(text: str, tmp_path: Any) -> None:
    file = tmp_path / "key.pem"
    file.write_text(text.replace("\\n", "\n"))
    for source in (text, str(file)):
        gatekeeper = Gatekeeper(Settings(signing_key=source))
        assert gatekeeper.decode(gatekeeper.encode(CLAIMS))["stream"] == STREAM


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (pem(rsa.generate_private_key(65_537, 2048)), "no readable EC key"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "secp384r1"),
        (pem(P256, cipher=PASSPHRASE), "encrypted"),
        (pem(P256, TRADITIONAL, PASSPHRASE), "encrypted"),
        (generate_key_pair().public_pem, "public key"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "no readable EC key"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "no readable EC key"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA", "no PEM block"),
        ("/no/such/file.pem", "neither PEM text nor a readable file"),
        (None, "not set"),
    ],
    # Named, for the keys are new in every process and xdist compares the names.
    ids=[
        "RSA",
        "another curve",
        "encrypted",
        "encrypted the old way",
        "public",
        "empty",
        "certificate",
        "cut off",
        "no file",
        "none",
    ],
)
def test_a_key_that_cannot_sign_names_the_setting_and_the_command(text: str | None, reason: str) -> None:
    gatekeeper = Gatekeeper(Settings(signing_key=text))
    with pytest.raises(ConfigurationError, match=reason) as caught:
        gatekeeper.encode(CLAIMS)
    message = str(caught.value)
    assert "signing_key" in message
    assert "broadcastable keys generate" in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for line in (text or "").splitlines():
        assert "-----" in line or len(line) < 5 or line not in message or line.startswith("/")


def test_without_any_key_verifying_says_which_settings_are_missing() -> None:
    with pytest.raises(ConfigurationError, match=r"signing_key .* verify_keys .*broadcastable keys generate"):
        Gatekeeper(Settings()).decode("a.b.c")


def test_a_wrong_verify_key_names_its_setting() -> None:
    with pytest.raises(ConfigurationError, match="verify_keys"):
        Gatekeeper(Settings(verify_keys=("/no/such/file.pem",))).jwks()


def test_reprs_keep_the_private_key_to_themselves(keys: KeyPair) -> None:
    assert "PRIVATE" not in repr(keys)
    assert "PRIVATE" not in repr(Settings(signing_key=keys.private_pem))


class TestServerToken:
    def test_it_is_one_token_until_half_of_its_life(
        self, gatekeeper: Gatekeeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = time.time()
        first = gatekeeper.server_token()
        assert gatekeeper.decode(first)["server"] is True
        monkeypatch.setattr("broadcastable.tokens.time", SimpleNamespace(time=lambda: start + 59))
        assert gatekeeper.server_token() == first
        monkeypatch.setattr("broadcastable.tokens.time", SimpleNamespace(time=lambda: start + 61))
        second = gatekeeper.server_token()
        assert second != first
        assert jwt.decode(second, options={"verify_signature": False})["exp"] >= int(start) + 61 + 120 - 1

    def test_a_clock_that_was_set_back_makes_a_new_one(
        self, gatekeeper: Gatekeeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = gatekeeper.server_token()
        earlier = time.time() - 3_600
        monkeypatch.setattr("broadcastable.tokens.time", SimpleNamespace(time=lambda: earlier))
        assert gatekeeper.server_token() != first

    def test_threads_share_it(self, gatekeeper: Gatekeeper) -> None:
        barrier = threading.Barrier(16)
        seen: list[str] = []

        def ask() -> None:
            barrier.wait()
            seen.append(gatekeeper.server_token())

        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 16
        assert len(set(seen)) == 1


def test_keys_are_parsed_once(keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    load = tokens._load_key
    monkeypatch.setattr(tokens, "_load_key", lambda key, setting: parsed.append(setting) or load(key, setting))
    gatekeeper = Gatekeeper(Settings(signing_key=keys.private_pem, verify_keys=(generate_key_pair().public_pem,)))
    for _ in range(3):
        gatekeeper.decode(gatekeeper.encode(CLAIMS))
        gatekeeper.jwks()
    assert sorted(parsed) == ["signing_key", "verify_keys"]

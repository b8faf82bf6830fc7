"""Key files: made once, readable by their owner alone, changed without locking anybody out."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broadcastable.errors import InvalidToken
from broadcastable.settings import Settings, override
from broadcastable.tokens import Gatekeeper

Run = Callable[..., Any]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_generate_makes_a_pair_that_signs_and_verifies(here: Path, run: Run) -> None:
    result = run("keys", "generate", "--directory", "config/keys")
    assert result.exit_code == 0
    signing, public = here / "config/keys/signing_key.pem", here / "config/keys/signing_key.pub.pem"
    assert mode(signing) == 0o600
    assert mode(public) == 0o644
    token = Gatekeeper(Settings(signing_key=str(signing))).encode({"stream": "room"})
    assert Gatekeeper(Settings(verify_keys=(str(public),))).decode(token)["stream"] == "room"
    assert "PRIVATE" not in result.stdout
    assert sorted(each.name for each in signing.parent.iterdir()) == ["signing_key.pem", "signing_key.pub.pem"]


def test_generate_overwrites_only_by_force(here: Path, run: Run) -> None:
    run("keys", "generate")
    before = (here / "signing_key.pem").read_text()
    refused = run("keys", "generate")
    assert refused.exit_code == 1
    assert "keys rotate" in refused.stderr
    assert (here / "signing_key.pem").read_text() == before
    assert run("keys", "generate", "--force").exit_code == 0
    assert (here / "signing_key.pem").read_text() != before


def test_rotate_keeps_tokens_of_the_old_key_good(here: Path, run: Run) -> None:
    """The old public key stays as verify-<kid>.pem; two rotations keep two."""
    run("keys", "generate")
    old = [Gatekeeper(Settings(signing_key="signing_key.pem")).encode({"stream": "room"})]
    for kept in (1, 2):
        result = run("keys", "rotate")
        assert result.exit_code == 0
        verify = sorted(str(path) for path in here.glob("verify-*.pem"))
        assert len(verify) == kept
        assert ",".join(verify) in result.stdout.replace("\n", "")
        assert mode(here / "signing_key.pem") == 0o600
        gatekeeper = Gatekeeper(Settings(signing_key="signing_key.pem", verify_keys=tuple(verify)))
        for token in old:
            assert gatekeeper.decode(token)["stream"] == "room"
        with pytest.raises(InvalidToken):
            Gatekeeper(Settings(signing_key="signing_key.pem")).decode(old[-1])
        old.append(gatekeeper.encode({"stream": "room"}))


def test_rotate_without_a_key_says_how_to_make_one(here: Path, run: Run) -> None:
    result = run("keys", "rotate")
    assert result.exit_code == 1
    assert "keys generate" in result.stderr


def test_show_and_jwks_tell_public_keys_only(here: Path, run: Run) -> None:
    run("keys", "generate")
    with override(signing_key="signing_key.pem"):
        shown = json.loads(run("keys", "show", "--json").stdout)
        told = json.loads(run("keys", "jwks").stdout)
    assert shown["use"] == "signs and verifies"
    assert [key["kid"] for key in told["keys"]] == [shown["kid"]]
    assert set(told["keys"][0]) == {"kty", "crv", "x", "y", "kid", "use", "alg"}


def test_no_key_at_all_is_one_sentence(run: Run) -> None:
    result = run("keys", "show")
    assert result.exit_code == 1
    assert "keys generate" in result.stderr


def test_a_directory_that_cannot_be_written_is_one_sentence(here: Path, run: Run) -> None:
    (here / "file").write_text("")
    result = run("keys", "generate", "--directory", "file/keys")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr

"""Key files: made once, readable by their owner alone, changed without locking anybody out."""

from __future__ import annotations

import base64
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broadcastable.errors import InvalidToken
from broadcastable.settings import Settings, override
from broadcastable.tokens import Gatekeeper, generate_key_pair

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


def printed_settings(stdout: str) -> dict[str, str]:
    """What a person sets who does as *stdout* says, as `Settings.from_env` takes it."""
    return dict(re.findall(r"(BROADCASTABLE_\w+)=(.*)$", stdout, re.MULTILINE))


def test_rotation_refuses_no_token_in_any_phase(here: Path, run: Run) -> None:
    """Whoever signs, before and after each step, every gate that did the steps before it knows the key."""
    run("keys", "generate")
    signer = Gatekeeper(Settings(signing_key="signing_key.pem"))
    old = signer.encode({"stream": "room"})

    first = run("keys", "rotate")
    assert first.exit_code == 0
    assert mode(here / "next_signing_key.pem") == 0o600
    assert Gatekeeper(Settings(signing_key="signing_key.pem")).jwks() == signer.jwks()
    gates = Gatekeeper(Settings.from_env(printed_settings(first.stdout)))
    assert gates.decode(old)["stream"] == "room"

    second = run("keys", "rotate", "--activate")
    assert second.exit_code == 0
    assert not (here / "next_signing_key.pem").exists()
    assert mode(here / "signing_key.pem") == 0o600
    new = Gatekeeper(Settings(signing_key="signing_key.pem")).encode({"stream": "room"})
    assert gates.decode(new)["stream"] == "room"
    assert Gatekeeper(Settings(verify_keys=("signing_key.pub.pem",))).decode(new)["stream"] == "room"
    assert "PRIVATE" not in first.stdout + second.stdout

    kid = signer.jwks()["keys"][0]["kid"]
    assert f"delete {here / f'verify-{kid}.pem'}".replace(f"{here}/", "") in second.stdout
    (here / f"verify-{kid}.pem").unlink()
    after = Gatekeeper(Settings(verify_keys=tuple(map(str, here.glob("verify-*.pem")))))
    assert after.decode(new)["stream"] == "room"
    with pytest.raises(InvalidToken):
        after.decode(old)


def test_two_rotations_keep_the_tokens_of_three_keys_good(here: Path, run: Run) -> None:
    run("keys", "generate")
    tokens = []
    for _ in range(3):
        tokens.append(Gatekeeper(Settings(signing_key="signing_key.pem")).encode({"stream": "room"}))
        settings = printed_settings(run("keys", "rotate").stdout)
        run("keys", "rotate", "--activate")
    gates = Gatekeeper(Settings.from_env(settings))
    assert [gates.decode(token)["stream"] for token in tokens] == ["room"] * 3


def test_rotate_is_where_the_settings_have_the_key(here: Path, run: Run) -> None:
    """Also by another name than ours; keys that the settings verify and that are kept elsewhere stay verified."""
    pair, elsewhere = generate_key_pair(), generate_key_pair()
    (here / "etc").mkdir()
    (here / "etc/chat.pem").write_text(pair.private_pem)
    (here / "other.pem").write_text(elsewhere.public_pem)
    with override(signing_key="etc/chat.pem", verify_keys=("other.pem", f"named={elsewhere.public_pem}")):
        first = run("keys", "rotate")
        settings = Settings.from_env(printed_settings(first.stdout))
        with override(verify_keys=settings.verify_keys):
            assert printed_settings(run("keys", "rotate").stdout) == printed_settings(first.stdout)
            assert run("keys", "rotate", "--activate").exit_code == 0
    assert {path.name for path in (here / "etc").iterdir()} == {
        "chat.pem",
        "chat.pub.pem",
        *(path.name for path in (here / "etc").glob("verify-*.pem")),
    }
    kids = {key["kid"] for key in Gatekeeper(settings).jwks()["keys"]}
    new = Gatekeeper(Settings(signing_key="etc/chat.pem")).jwks()["keys"][0]["kid"]
    assert kids == {pair.kid, elsewhere.kid, "named", new}


def test_rotate_under_a_name_of_the_key_s_own(here: Path, run: Run) -> None:
    """With `signing_kid` the old key keeps its name, and the new one is not taken for it."""
    run("keys", "generate")
    before = Settings(signing_key="signing_key.pem", signing_kid="main")
    old = Gatekeeper(before).encode({"stream": "room"})
    with override(signing_key="signing_key.pem", signing_kid="main"):
        settings = printed_settings(run("keys", "rotate").stdout)
        assert Gatekeeper(Settings.from_env(settings)).decode(old)["stream"] == "room"
        settings |= printed_settings(run("keys", "rotate", "--activate").stdout)
    after = Settings.from_env({**settings, "BROADCASTABLE_SIGNING_KEY": "signing_key.pem"})
    assert after.signing_kid not in {None, "main"}
    assert Gatekeeper(after).decode(old)["stream"] == "room"
    new = Gatekeeper(after).encode({"stream": "room"})
    assert Gatekeeper(after.replace(signing_key=None, signing_kid=None)).decode(new)["stream"] == "room"


def test_rotate_says_which_table_does_not_have_the_next_key(here: Path, run: Run) -> None:
    run("keys", "generate")
    (here / "broadcastable.toml").write_text("""
[development]
[staging]
keys = ["verify-*.pem"]
[production]
keys = ["signing_key.pub.pem"]
""")
    said = run("keys", "rotate").stdout
    assert "[production], keys lacks it" in said
    assert said.count("keys lacks it") == 1


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({}, ("--activate",), "keys rotate"),
        ({"signing_key": generate_key_pair().private_pem}, (), "--directory"),
        ({"signing_key": "nowhere.pem"}, (), "keys generate"),
        ({"signing_key": "signing_key.pem", "signing_kid": "a/b"}, (), "by hand"),
        ({"signing_key": "broken.pem"}, (), "broken.pem is not a key"),
    ],
)
def test_what_cannot_be_rotated_is_one_sentence(
    here: Path, run: Run, settings: dict[str, str], options: tuple[str, ...], says: str
) -> None:
    run("keys", "generate")
    (here / "broken.pem").write_text("a key, once")
    before = sorted(here.iterdir())
    with override(**settings):
        result = run("keys", "rotate", *options)
    assert result.exit_code == 1
    assert says in result.stderr
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("form", ["the lines of Base64", "Base64 of the file", "a key among verify_keys"])
def test_rotate_never_prints_a_private_key(here: Path, run: Run, form: str) -> None:
    """A key whose first line was lost in the environment is not PEM text, and no path; it stays a secret."""
    pair = generate_key_pair()
    secret = pair.private_pem.splitlines()[1]
    if form == "a key among verify_keys":
        run("keys", "generate")
        with override(signing_key="signing_key.pem", verify_keys=(pair.private_pem,)):
            result = run("keys", "rotate")
        assert result.exit_code == 0
        gates = Gatekeeper(Settings.from_env(printed_settings(result.stdout)))
        assert pair.kid in {key["kid"] for key in gates.jwks()["keys"]}
    else:
        secret = "".join(pair.private_pem.splitlines()[1:-1])
        if form == "Base64 of the file":
            secret = base64.b64encode(pair.private_pem.encode()).decode()
        with override(signing_key=secret):
            result = run("keys", "rotate")
        assert result.exit_code == 1
        assert "names no file that is here" in result.stderr
    assert secret[:20] not in result.stdout + result.stderr


def test_a_linked_key_stays_linked(here: Path, run: Run) -> None:
    (here / "kept").mkdir()
    (here / "signing_key.pem").symlink_to("kept/key.pem")
    assert run("keys", "generate").exit_code == 0
    assert (here / "signing_key.pem").is_symlink()
    assert mode(here / "kept/key.pem") == 0o600


def test_the_next_key_is_not_let_to_sign_while_no_gate_can_know_it(here: Path, run: Run) -> None:
    run("keys", "generate")
    run("keys", "rotate")
    for path in here.glob("verify-*.pem"):
        path.unlink()
    result = run("keys", "rotate", "--activate")
    assert result.exit_code == 1
    assert "no gate can know" in result.stderr
    assert (here / "next_signing_key.pem").exists()


def test_a_name_that_the_first_phase_did_not_see_is_no_reason_to_lose_tokens(here: Path, run: Run) -> None:
    """Such as when it ran without the application's settings."""
    run("keys", "generate")
    run("keys", "rotate")
    with override(signing_key="signing_key.pem", signing_kid="main"):
        refused = run("keys", "rotate", "--activate")
        assert refused.exit_code == 1
        assert "verify-main.pem" in refused.stderr
        assert "main=" in run("keys", "rotate").stdout
        assert run("keys", "rotate", "--activate").exit_code == 0


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

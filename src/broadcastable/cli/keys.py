"""The commands `keys ...`: make, change and show the keys that sign and verify tokens.

The private key is `signing_key.pem`, readable by its owner alone. Public keys of earlier ones, whose tokens are still
about, are `verify-<kid>.pem` beside it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from broadcastable.errors import ConfigurationError
from broadcastable.settings import current_settings, seconds
from broadcastable.tokens import Gatekeeper, generate_key_pair

from .application import App, Json, load
from .console import fail, out, print_json

SIGNING_KEY = "signing_key.pem"
PUBLIC_KEY = "signing_key.pub.pem"

keys = typer.Typer(help="Make, change and show the keys of tokens.", no_args_is_help=True)

Directory = Annotated[Path, typer.Option("--directory", "-d", file_okay=False, help="Where the key files are.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there: its tokens are worth nothing then.")]


@keys.command()
def generate(directory: Directory = Path(), force: Force = False) -> None:
    """Make a key pair: signing_key.pem for the application, signing_key.pub.pem for whoever else verifies."""
    there = [name for name in (SIGNING_KEY, PUBLIC_KEY) if (directory / name).exists()]
    if there and not force:
        fail(f"{directory / there[0]} exists. To change keys without locking anybody out: broadcastable keys rotate")
    kid = write_pair(directory)
    out.print(f"[green]✓[/] {directory / SIGNING_KEY}  private, for the application only; its kid is {kid}")
    out.print(f"[green]✓[/] {directory / PUBLIC_KEY}  public")
    out.print(f"\nSet BROADCASTABLE_SIGNING_KEY={(directory / SIGNING_KEY).resolve()}")


@keys.command()
def rotate(directory: Directory = Path()) -> None:
    """Make a new signing key and keep the old public one, so that tokens signed before stay good."""
    signing, public = directory / SIGNING_KEY, directory / PUBLIC_KEY
    if not signing.exists():
        fail(f"There is no {signing} to take the place of. Make one: broadcastable keys generate")
    old = Gatekeeper(current_settings().replace(signing_key=str(signing), signing_kid=None, verify_keys=()))
    old_kid = str(old.jwks()["keys"][0]["kid"])
    kept = directory / f"verify-{old_kid}.pem"
    write_file(kept, _public_pem(signing), mode=0o644)
    kid = write_pair(directory)
    verify = ",".join(str(path.resolve()) for path in sorted(directory.glob("verify-*.pem")))
    life = seconds(current_settings().max_token_life)
    out.print(f"[green]✓[/] {signing}  new; its kid is {kid}")
    out.print(f"[green]✓[/] {public}  new")
    out.print(f"[green]✓[/] {kept}  the old public key")
    out.print(f"\n1. Set BROADCASTABLE_VERIFY_KEYS={verify}")
    out.print("2. Restart the stream server, so that it takes tokens of both keys; make its Caddyfile again first.")
    out.print("3. Restart the application and its workers: they sign with the new key from then on.")
    out.print(
        f"4. After {life / 3600:g} hours, the longest life of a token, delete {kept.name} and unset the variable."
    )


@keys.command()
def show(app: App = None, json: Json = False) -> None:
    """Show the public keys in use, the signing one first. Never a private one."""
    for number, key in enumerate(_gatekeeper(app).jwks()["keys"]):
        use = "signs and verifies" if number == 0 and current_settings().signing_key else "verifies"
        if json:
            print_json({"kid": key["kid"], "use": use})
        else:
            out.print(f"{key['kid']}  {use}")


@keys.command()
def jwks(app: App = None) -> None:
    """Print the public keys as a JWK Set, as /.well-known/jwks.json gives them."""
    print_json(_gatekeeper(app).jwks())


def write_pair(directory: Path) -> str:
    """Write a new key pair into *directory*, in place of what is there; its kid."""
    pair = generate_key_pair()
    write_file(directory / PUBLIC_KEY, pair.public_pem, mode=0o644)
    write_file(directory / SIGNING_KEY, pair.private_pem, mode=0o600)
    return pair.kid


def write_file(path: Path, text: str, *, mode: int) -> None:
    """Write *text* whole or not at all, with *mode* from the first byte on.

    Raises:
        ConfigurationError: It cannot be written there.
    """
    unfinished = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
        unfinished.chmod(mode)
        unfinished.replace(path)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


def _public_pem(private: Path) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    key = load_pem_private_key(private.read_bytes(), password=None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _gatekeeper(app: str | None) -> Gatekeeper:
    if app is not None:
        load(app)
    return Gatekeeper(current_settings())

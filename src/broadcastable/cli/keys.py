"""The commands `keys ...`: make, change and show the keys that sign and verify tokens.

The private key is `signing_key.pem`, readable by its owner alone. A change of keys has two phases, so that at no moment
somebody signs with a key that a gate does not know: `rotate` makes the next key, `rotate --activate` lets it sign. The
public half of each key that took part in one is `verify-<kid>.pem` beside it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from broadcastable.errors import ConfigurationError
from broadcastable.settings import Settings, current_settings, existing_file, seconds
from broadcastable.tokens import Gatekeeper, generate_key_pair

from . import configuration
from .application import App, Json, load
from .console import fail, out, print_json
from .files import write_file

SIGNING_KEY = "signing_key.pem"
PUBLIC_KEY = "signing_key.pub.pem"
INSTALLED = Path("config/broadcastable")
"""Where `install` puts the keys, relative to the application's root."""

_IN_A_FILE_NAME = re.compile(r"[A-Za-z0-9_.:-]+")

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
def rotate(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            "-d",
            file_okay=False,
            help="Where the key files are.",
            show_default="where signing_key is, as the settings say",
        ),
    ] = None,
    activate: Annotated[bool, typer.Option("--activate", help="Sign with the next key; the second phase.")] = False,
    app: App = None,
) -> None:
    """Change the signing key in two phases, so that no token is refused on the way.

    The first makes the next key; give its public half to every gate. The second, with --activate, puts it in the place
    of the signing key. Each prints what is to be done before the next step.
    """
    if app is not None:
        load(app)
    settings = current_settings()
    files = _KeyFiles(_signing_key_file(directory, settings))
    if not files.signing.exists():
        fail(f"There is no {files.signing} to take the place of. Make one: broadcastable keys generate")
    if activate:
        _activate(files, settings)
    else:
        _make_next(files, settings)


@dataclass(frozen=True)
class _KeyFiles:
    """The files of one signing key, all in one directory."""

    signing: Path

    @property
    def public(self) -> Path:
        return public_file(self.signing)

    @property
    def next(self) -> Path:
        return self.signing.with_name(f"next_{self.signing.name}")

    def verify(self, kid: str) -> Path:
        return self.signing.with_name(f"verify-{kid}.pem")

    def verify_entries(self, settings: Settings) -> str:
        """BROADCASTABLE_VERIFY_KEYS with all keys of here, and those of the settings that are kept elsewhere."""
        here = {path.resolve() for path in self.signing.parent.glob("verify-*.pem")}
        entries = [_entry(path) for path in sorted(here)]
        for entry in settings.verify_keys:
            file = existing_file(entry) or existing_file(entry.partition("=")[2])
            shown = entry if file else _public_entry(entry)
            if shown not in entries and (file is None or file.resolve() not in here):
                entries.append(shown)
        return ",".join(entries)


def _make_next(files: _KeyFiles, settings: Settings) -> None:
    old_kid = _kid_in_use(files, settings)
    made = not files.next.exists()
    if made:
        write_file(files.next, generate_key_pair().private_pem, mode=0o600)
    kid = kid_of(files.next)
    write_file(files.verify(old_kid), public_pem(files.signing), mode=0o644)
    write_file(files.verify(kid), public_pem(files.next), mode=0o644)
    out.print(f"[green]✓[/] {files.next}  the next private key{'' if made else ', made before'}; its kid is {kid}")
    out.print(f"[green]✓[/] {files.verify(kid)}  its public half")
    out.print(f"[green]✓[/] {files.verify(old_kid)}  the public half of the key that signs now")
    out.print("\nNothing signs with it yet. Let every gate know it first, and the application too:")
    out.print(f"1. Set BROADCASTABLE_VERIFY_KEYS={files.verify_entries(settings)}")
    for environment in _tables_without(files.verify(kid)):
        out.print(
            f"   In {configuration.FILE}, \\[{environment}], keys lacks it: "
            f'add "{(files.signing.parent / "verify-*.pem").as_posix()}".'
        )
    out.print("2. Restart the stream servers; where that is Caddy, make its Caddyfile again first.")
    again = "" if settings.signing_key else f" --directory {files.signing.parent}"
    out.print(f"3. broadcastable keys rotate --activate{again}")


def _activate(files: _KeyFiles, settings: Settings) -> None:
    if not files.next.exists():
        fail(f"There is no {files.next}. Make it and let the gates know it: broadcastable keys rotate")
    old_kid = _kid_in_use(files, settings)
    kid = kid_of(files.next)
    for name in (old_kid, kid):  # the old one's too: without these settings, rotate may have given it another name
        if not files.verify(name).exists():
            fail(f"There is no {files.verify(name)}, so no gate can know that key. First: broadcastable keys rotate")
    write_file(files.public, public_pem(files.next), mode=0o644)
    files.next.replace(files.signing)
    life = seconds(settings.max_token_life)
    out.print(f"[green]✓[/] {files.signing}  the new key; its kid is {kid}")
    out.print(f"[green]✓[/] {files.public}  its public half")
    step = 1
    if settings.signing_kid:
        out.print(f"\n{step}. {old_kid} stays the old key's name; set BROADCASTABLE_SIGNING_KID={kid}")
        step += 1
    else:
        out.print()
    out.print(f"{step}. Restart the application and its workers: they sign with the new key from then on.")
    out.print(
        f"{step + 1}. {life / 3600:g} hours later, the longest life of a token, delete {files.verify(old_kid)},\n"
        "   take it out of BROADCASTABLE_VERIFY_KEYS, make the Caddyfile again, and restart the stream servers."
    )


def _signing_key_file(directory: Path | None, settings: Settings) -> Path:
    if directory is not None:
        return directory / SIGNING_KEY
    if settings.signing_key is None:
        return (INSTALLED if (INSTALLED / SIGNING_KEY).exists() else Path()) / SIGNING_KEY
    if "-----BEGIN" in settings.signing_key:
        fail(
            "signing_key (BROADCASTABLE_SIGNING_KEY) is the key itself, not the path of a file. "
            "Give the directory of the file that it was taken from: --directory"
        )
    found = existing_file(settings.signing_key)
    if found is None:  # what it says stays unsaid: it may be a key that lacks its first line
        fail(
            "signing_key (BROADCASTABLE_SIGNING_KEY) names no file that is here. Make a key pair: "
            "broadcastable keys generate. Or give the directory of the key's file: --directory"
        )
    return found


def _kid_in_use(files: _KeyFiles, settings: Settings) -> str:
    """By which name gates know the key that signs now."""
    kid = settings.signing_kid or kid_of(files.signing)
    if not _IN_A_FILE_NAME.fullmatch(kid):
        fail(
            f"The signing_kid {kid!r} cannot be part of a file's name, so change the key by hand: docs/tokens, Rotation"
        )
    return kid


def _entry(public: Path) -> str:
    """*public*, a `verify-<kid>.pem`, as `Settings.verify_keys` takes it."""
    kid = public.stem.removeprefix("verify-")
    return str(public) if kid == kid_of(public) else f"{kid}={public}"


def _public_entry(key: str) -> str:
    """*key*, PEM text among `Settings.verify_keys` that may be a private one, with its public half alone."""
    jwk = Gatekeeper(Settings(verify_keys=(key,))).jwks()["keys"][0]
    return f"{jwk['kid']}={_pem(jwk)}".replace("\n", "\\n")


def _tables_without(public: Path) -> list[str]:
    if not configuration.FILE.exists():
        return []
    return configuration.environments_without(configuration.FILE, public)


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


def public_file(private: Path) -> Path:
    """Where the public half of the key in *private* is: `signing_key.pub.pem` beside `signing_key.pem`."""
    return private.with_name(f"{private.stem}.pub.pem")


def public_pem(key: Path) -> str:
    """The public half of the key in the file *key*.

    Raises:
        ConfigurationError: It holds no ES256 key.
    """
    return _pem(_jwk_of(key))


def kid_of(key: Path) -> str:
    """The thumbprint of the key, private or public, in the file *key*.

    Raises:
        ConfigurationError: It holds no ES256 key.
    """
    return _jwk_of(key)["kid"]


def _jwk_of(key: Path) -> dict[str, str]:
    try:
        jwk: dict[str, str] = Gatekeeper(Settings(verify_keys=(str(key),))).jwks()["keys"][0]
    except ConfigurationError as error:
        raise ConfigurationError(f"{key} is not a key that could be changed: {error}") from error
    return jwk


def _pem(jwk: Mapping[str, str]) -> str:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicNumbers
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    x, y = (int.from_bytes(base64.urlsafe_b64decode(f"{jwk[name]}=")) for name in ("x", "y"))
    public = EllipticCurvePublicNumbers(x, y, SECP256R1()).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _gatekeeper(app: str | None) -> Gatekeeper:
    if app is not None:
        load(app)
    return Gatekeeper(current_settings())

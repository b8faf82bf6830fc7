"""`broadcastable.toml`: how the stream server runs in each environment, for `server` and `caddyfile`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from broadcastable.errors import ConfigurationError
from broadcastable.settings import Settings, existing_file

FILE = Path("broadcastable.toml")


@dataclass(frozen=True, kw_only=True)
class ServerConfiguration:
    """One table of the file; relative paths are relative to the file.

    Attributes:
        domain: The public host name; None for a port alone.
        port: See `domain`.
        tls: "auto", "internal", "off", or two paths.
        data_dir: Where the streams are kept; None for in memory.
        keys: PEM files whose tokens are taken, private or public; `kid=path` for tokens that carry a `signing_kid`, and
            a pattern, such as `verify-*.pem`, for all files that it fits now. The settings' own keys when empty.
        issuer, audience: As in the settings; the settings' own when None.
        origins: Origins of pages that may call.
    """

    domain: str | None = None
    port: int | None = None
    tls: str | list[str] = "auto"
    data_dir: str | None = None
    keys: list[str] | None = None
    issuer: str | None = None
    audience: str | None = None
    origins: list[str] | None = None

    def settings(self, base: Settings) -> Settings:
        """*base* with what this table says about tokens."""
        changes: dict[str, Any] = {}
        if self.keys:
            changes |= {"signing_key": None, "signing_kid": None, "verify_keys": tuple(self.keys)}
        if self.issuer is not None:
            changes["token_issuer"] = self.issuer
        if self.audience is not None:
            changes["token_audience"] = self.audience
        return base.replace(**changes)


def read(path: Path, environment: str) -> ServerConfiguration:
    """The table *environment* of the file at *path*.

    Raises:
        ConfigurationError: No such file or table, an entry that is unknown or of the wrong type, or a key that is not
            there.
    """
    table = _table(path, environment)
    checked = _checked(table, path, environment)
    for number, name in enumerate(table.get("keys", []), 1):
        if "*" not in name and not _file_named(path, name):
            # Neither PEM text nor Base64 has a dot, so what is shown is the name of a file and no key.
            shown = name if "." in name else f"its entry {number}"
            raise ConfigurationError(f"{path}, [{environment}]: keys names a file that is not there: {shown}")
    return checked


def _table(path: Path, environment: str) -> dict[str, Any]:
    tables = _tables(path)
    table = tables.get(environment)
    if not isinstance(table, dict):
        known = ", ".join(tables) or "none"
        raise ConfigurationError(f"{path} has no table [{environment}]; it has {known}")
    return table


def _checked(table: Mapping[str, Any], path: Path, environment: str) -> ServerConfiguration:
    kinds = get_type_hints(ServerConfiguration)
    for name, value in table.items():
        if name not in kinds:
            raise ConfigurationError(f"{path}, [{environment}]: {name} is unknown. Known are {', '.join(kinds)}")
        allowed = tuple(list if kind == list[str] else kind for kind in get_args(kinds[name]))
        items = value if isinstance(value, list) else []
        if (
            isinstance(value, bool)
            or not isinstance(value, allowed)
            or not all(isinstance(each, str) for each in items)
        ):
            # Of keys nothing is shown: one may be a key.
            wrong = "is a list of file names" if name == "keys" else f"cannot be {value!r}"
            raise ConfigurationError(f"{path}, [{environment}]: {name} {wrong}")
    if not 0 <= table.get("port", 0) <= 65_535:
        raise ConfigurationError(f"{path}, [{environment}]: port is between 0 and 65535; got {table['port']}")
    values = dict(table)
    values["keys"] = [entry for each in table.get("keys", []) for entry in _key_entries(path, each)]
    if table.get("keys") and not values["keys"]:
        raise ConfigurationError(f"{path}, [{environment}]: no file fits {', '.join(table['keys'])} of keys")
    if "data_dir" in table:
        values["data_dir"] = str(_beside(path, table["data_dir"]))
    if isinstance(table.get("tls"), list):
        if len(table["tls"]) != 2:
            raise ConfigurationError(f"{path}, [{environment}]: tls names two files, a certificate and its key")
        values["tls"] = [str(_beside(path, each)) for each in table["tls"]]
    return ServerConfiguration(**values)


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}. Make one: broadcastable install") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def environments_without(path: Path, public: Path) -> list[str]:
    """The tables of the file at *path* whose `keys` do not lead to the file *public*."""
    without = []
    for environment in _tables(path):
        keys = _checked(_table(path, environment), path, environment).keys
        if keys and public.resolve() not in {Path(each).resolve() for each in keys}:
            without.append(environment)
    return without


def _key_entries(path: Path, name: str) -> list[str]:
    """*name* of `keys` as entries of `Settings.verify_keys`."""
    if "*" in name:
        found = sorted(_beside(path, name).parent.glob(Path(name).name))
        return [entry for each in found for entry in _under_both_names(each)]
    kid, equals, rest = name.partition("=")
    if equals and not existing_file(str(_beside(path, name))):
        return [f"{kid}={_beside(path, rest)}"]
    return [str(_beside(path, name))]


def _file_named(path: Path, name: str) -> Path | None:
    _, equals, rest = name.partition("=")
    return existing_file(str(_beside(path, name))) or (existing_file(str(_beside(path, rest))) if equals else None)


def _under_both_names(found: Path) -> list[str]:
    """A key is known by its thumbprint; one that `keys rotate` put aside also by the kid in the name of its file."""
    kid = found.stem.removeprefix("verify-")
    return [str(found)] if kid == found.stem else [str(found), f"{kid}={found}"]


def _beside(path: Path, name: str) -> Path:
    return Path(name) if Path(name).is_absolute() else (path.parent / name)

"""Files as the commands read and write them: whole, in their own line ends, and with one sentence where it fails."""

from __future__ import annotations

import os
from pathlib import Path

from broadcastable.errors import ConfigurationError


def read_file(path: Path) -> str | None:
    """The text of the file at *path*, its line ends as they are; None when there is no such file.

    Raises:
        ConfigurationError: It cannot be read, or is no UTF-8.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text. Save it as UTF-8 and run this again") from error


def write_file(path: Path, text: str, *, mode: int) -> None:
    """Write *text* whole or not at all, with *mode* from the first byte on. A symbolic link stays one.

    Raises:
        ConfigurationError: It cannot be written there.
    """
    target = Path(os.path.realpath(path))
    unfinished = target.with_name(f".{target.name}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        unfinished.chmod(mode)
        unfinished.replace(target)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error

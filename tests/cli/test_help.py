"""What each command says of itself. How it is drawn is typer's business, so the words are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from broadcastable.cli.app import app

from .golden_files import check


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for each in sorted(getattr(command, "commands", {})):
        yield from commands(command.commands[each], f"{name} {each}")


COMMANDS = dict(commands(typer.main.get_command(app), "broadcastable"))


def words(name: str, command: Any) -> str:
    lines = [name, "", *(line.rstrip() for line in (command.help or "").strip().splitlines()), ""]
    for parameter in command.params:
        if parameter.name in {"install_completion", "show_completion"}:
            continue
        options = [*parameter.opts, *parameter.secondary_opts]
        lines.append(f"{' '.join(options)}  {getattr(parameter, 'help', None) or ''}".rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    check(f"help-{name.replace(' ', '-')}.txt", words(name, COMMANDS[name]))


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_is_explained(name: str) -> None:
    """Each command has a first sentence, and each option a help text."""
    command = COMMANDS[name]
    assert command.help
    unexplained = [
        parameter.name
        for parameter in command.params
        if parameter.param_type_name == "option" and not getattr(parameter, "help", None)
    ]
    assert unexplained == []

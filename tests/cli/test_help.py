"""What each command says of itself. How it is drawn is typer's business, so the words are compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

from broadcastable.cli.app import app
from broadcastable.cli.configuration import ServerConfiguration

from .golden_files import check


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for each in sorted(getattr(command, "commands", {})):
        yield from commands(command.commands[each], f"{name} {each}")


COMMANDS = dict(commands(typer.main.get_command(app), "broadcastable"))


PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SHARED = {"--app", "--json"}


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


def test_every_command_has_a_section_in_the_documentation() -> None:
    single = {f"`{name}`" for name, command in COMMANDS.items() if not getattr(command, "commands", {})}
    assert {title for title in SECTIONS if title.startswith("`broadcastable ")} == single


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not getattr(command, "commands", {})])
def test_every_option_is_in_the_documentation_and_no_other(name: str) -> None:
    """The section of a command names its options; those that many have are described once, before them."""
    options = {
        option
        for parameter in COMMANDS[name].params
        if parameter.param_type_name == "option"
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", SECTIONS[f"`{name}`"]))
    assert all(f"`{option}" in SECTIONS["What the commands share"] for option in SHARED)
    assert options - SHARED - named == set()
    assert {option for option in named - options if not is_another_s(option, name)} == set()


def is_another_s(option: str, name: str) -> bool:
    """Whether the section of *name* speaks of another command that has *option*: `broadcastable check --repair`."""
    return re.search(rf"`broadcastable [a-z ]+ {option}`", SECTIONS[f"`{name}`"]) is not None


def test_every_entry_of_the_configuration_is_in_the_documentation() -> None:
    rows = re.findall(r"^\| (`.+?`) \|", SECTIONS["`broadcastable.toml`"], re.MULTILINE)
    assert {entry.strip("`") for row in rows for entry in row.split(", ")} == {
        field.name for field in fields(ServerConfiguration)
    }

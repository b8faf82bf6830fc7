"""What a RedisBroker would send, to be sent in a pipeline of ours: its own script, with its own keys and arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

from dramatiq.brokers.redis import RedisBroker

Command: TypeAlias = tuple[Any, ...]
"""A command of Redis with its arguments."""


def commands_of(broker: RedisBroker, act: Callable[[RedisBroker], object]) -> list[Command]:
    """The commands with which *broker* would do what *act* asks of it. Its middleware is told, and nothing is sent.

    A server that was started again answers `NoScriptError`; the broker's own way loads the script.

    Raises:
        AttributeError, KeyError, TypeError: The broker is unlike the one that this was written for.
    """
    commands: list[Command] = []
    sha = broker.scripts["dispatch"].sha

    def note(*, keys: list[Any], args: list[Any]) -> None:
        commands.append(("EVALSHA", sha, len(keys), *keys, *args))

    noting = copy.copy(broker)
    noting.scripts = {**broker.scripts, "dispatch": note}
    act(noting)
    return commands

"""The application that a command is about: its settings, its models, its `DurableStreams`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broadcastable.errors import ConfigurationError, UsageError

if TYPE_CHECKING:
    from broadcastable.durable_streams import DurableStreams

App = Annotated[
    str | None,
    typer.Option(
        "--app",
        envvar="BROADCASTABLE_APP",
        metavar="MODULE",
        help="Import this first, for its configure() and its models; MODULE:NAME also names its DurableStreams.",
        show_default="settings from the environment",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For scripts: JSON, one value a line.")]


def load(reference: str) -> Any:
    """The module MODULE, or the attribute of MODULE:NAME, looked up from the current directory too.

    Raises:
        ConfigurationError: There is no such module or attribute.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or module_name.startswith("."):
        raise ConfigurationError(f"{reference!r} names no module. Write it in full, such as shop.models")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(
            f"There is no module {error.name!r} here. Run this where the application runs"
        ) from error
    for name in attribute.split(".") if attribute else ():
        try:
            found = getattr(found, name)
        except AttributeError:
            raise ConfigurationError(f"The module {module_name!r} has no {attribute!r}") from None
    return found


def durable_streams_of(app: str | None) -> DurableStreams:
    """What *app* names, or the default after *app* was imported, or the environment's."""
    from broadcastable.durable_streams import DurableStreams, current

    if app is None:
        return current()
    found = load(app)
    if ":" not in app:
        return current()
    if not isinstance(found, DurableStreams):
        raise ConfigurationError(f"{app} is no DurableStreams but a {type(found).__name__}")
    return found


def stream_named(text: str, durable_streams: DurableStreams) -> str:
    """The stream that a person means: a name as it is, or MODEL/ID and names under it (`Room/1/messages`).

    A first part with a capital letter is a model; write the gid in full where it is not.

    Raises:
        UsageError: Nothing that a stream can be called.
    """
    first, _, rest = text.partition("/")
    if rest and first[:1].isupper():
        text = f"gid://{durable_streams.settings.gid_app}/{text}"
    name = durable_streams.stream_name_from(text)
    if not name:
        raise UsageError("Name a stream, such as Room/1/messages or a plain name")
    return name

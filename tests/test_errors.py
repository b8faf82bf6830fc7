"""The tree of exceptions: as drawn, exported whole, and able to cross process borders."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest

from broadcastable import errors

EXAMPLES: dict[type[errors.BroadcastableError], tuple[tuple[Any, ...], dict[str, Any]]] = {
    errors.MissingExtraError: (("The demo", "demo"), {}),
    errors.ProducerFenced: (("newer",), {"epoch": 7, "stream": "rooms"}),
    errors.ProducerGap: (("gap",), {"expected": 3, "stream": "rooms"}),
    errors.StreamUnavailable: (("busy",), {"stream": "rooms", "status": 503, "retry_after": 1.5}),
    errors.StreamTimeout: (("slow",), {"stream": "rooms", "retry_after": None}),
}


def every_error() -> list[type[errors.BroadcastableError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.BroadcastableError)
    ]


def example(cls: type[errors.BroadcastableError]) -> errors.BroadcastableError:
    arguments, keywords = EXAMPLES.get(cls, (("what failed",), {}))
    if issubclass(cls, errors.StreamError) and cls not in EXAMPLES:
        keywords = {"stream": "rooms", "status": 400}
    return cls(*arguments, **keywords)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│ ]*)(?:[├└]── )?([A-Z]\w+)", line)
        if match is None:
            continue
        depth = 0 if "──" not in line else len(match[1]) // 4 + 1
        path[depth:] = [match[2]]
        drawn[match[2]] = path[depth - 1] if depth else "Exception"

    def parent(cls: type) -> str:
        (one,) = [base for base in cls.__bases__ if issubclass(base, errors.BroadcastableError) or base is Exception]
        return one.__name__

    assert drawn == {cls.__name__: parent(cls) for cls in every_error()}


@pytest.mark.parametrize("cls", every_error())
def test_every_error_comes_back_from_a_pickle_with_its_attributes(cls: type[errors.BroadcastableError]) -> None:
    error = example(cls)
    error.add_note("seen in the worker")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(error, protocol))
        assert type(back) is cls
        assert str(back) == str(error) != ""
        assert back.args == error.args
        assert vars(back) == vars(error)


@pytest.mark.parametrize("cls", every_error())
def test_every_error_can_be_copied(cls: type[errors.BroadcastableError]) -> None:
    error = example(cls)
    for other in (copy.copy(error), copy.deepcopy(error)):
        assert type(other) is cls
        assert (other.args, vars(other)) == (error.args, vars(error))


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.MissingExtraError, ImportError),
        (errors.UsageError, ValueError),
        (errors.UnencodableValue, TypeError),
        (errors.UnknownModelError, LookupError),
        (errors.TokenError, PermissionError),
        (errors.StreamNotFound, LookupError),
        (errors.StreamForbidden, PermissionError),
        (errors.StreamUnavailable, ConnectionError),
        (errors.StreamTimeout, TimeoutError),
    ],
)
def test_the_builtin_that_people_already_catch_catches_it(
    cls: type[errors.BroadcastableError], builtin: type[Exception]
) -> None:
    assert issubclass(cls, builtin)


def test_only_what_may_succeed_unchanged_is_retryable() -> None:
    retryable = {cls for cls in every_error() if issubclass(cls, errors.StreamError) and cls.retryable}
    assert retryable == {errors.StreamUnavailable, errors.StreamTimeout}


def test_a_missing_extra_says_how_to_install_it() -> None:
    assert "pip install 'broadcastable[demo]'" in str(errors.MissingExtraError("The demo", "demo"))


@pytest.mark.parametrize("cls", every_error())
def test_every_error_has_a_docstring_of_its_own(cls: type[errors.BroadcastableError]) -> None:
    assert cls.__dict__.get("__doc__")

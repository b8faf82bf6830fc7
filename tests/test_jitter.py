"""Pauses of our threads, beside an application that seeds its generator."""

from __future__ import annotations

import random
import re
from pathlib import Path

import broadcastable
from broadcastable import jitter


def test_a_pause_is_within_its_bounds_and_no_other_twice() -> None:
    pauses = [jitter.between(0.5, 1.0) for _ in range(100)]
    assert all(0.5 <= pause <= 1.0 for pause in pauses)
    assert len(set(pauses)) == 100


def test_an_application_that_seeds_its_generator_gets_the_numbers_it_expects() -> None:
    """A thread of ours that drew from it would change them now and then."""
    random.seed(1)
    before = random.getstate()
    jitter.between(0.5, 1.0)
    assert random.getstate() == before
    package = Path(broadcastable.__file__).parent
    draws = re.compile(r"\brandom\.(?!SystemRandom)\w+\(")
    assert [path.name for path in package.rglob("*.py") if draws.search(path.read_text())] == []

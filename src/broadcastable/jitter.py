"""Pauses that differ a little, so that processes do not march in step.

Not by the generator of the module `random`: applications seed that one, and expect nobody else to draw from it.
"""

from __future__ import annotations

import random

_chance = random.SystemRandom()  # has no state that a forked child would share


def between(low: float, high: float) -> float:
    """A number between *low* and *high*, each as likely as the other."""
    return _chance.uniform(low, high)

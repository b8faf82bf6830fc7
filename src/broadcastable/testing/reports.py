"""What a failed assertion says: what was expected, what was seen there and nearby, what was not sent, and why."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from broadcastable.unsent import Unsent

from .broadcasts import Broadcast
from .expectations import Target, Wanted

SHOWN_EVENTS = 10
SHOWN_STREAMS = 5
SHOWN_CHARACTERS = 160
"""Of one event. What is longer is cut in the middle, so that its end can be seen too."""

FAILURES = {
    "events_failed": (
        "1 event that could not be made: see the log",
        "{} events that could not be made: see the log",
    ),
    "transactions_lost": (
        "the events of 1 transaction that could not be handed over: see the log",
        "the events of {} transactions that could not be handed over: see the log",
    ),
}
"""By the counter's name, what to say of one and of several."""


def report(
    target: Target,
    wanted: Wanted,
    count: int | None,
    seen: Sequence[Broadcast],
    unsent: Iterable[Unsent],
    counted: Mapping[str, int],
) -> str:
    """Why *seen*, everything that was broadcast, does not hold *count* events (None: at least one) as *wanted*.

    Args:
        counted: What the package has counted meanwhile; on which stream is not known.
    """
    there = [each for each in seen if target.covers(each.stream)]
    matching = [each for each in there if wanted.matches(each)]
    lines = [f"Expected {_expected(count)} on {target}{wanted}, but there {_was(len(matching))}."]
    if matching:
        lines += ["Seen:", *_events(matching, target)]
    others = [each for each in there if not wanted.matches(each)]
    if others and (count is None or len(matching) < count):
        lines += [f"{_broadcasts(len(others))} there {'does' if len(others) == 1 else 'do'} not match:"]
        lines += _events(others, target, wanted)
    if count is None or len(matching) < count:
        lines += _elsewhere(target, seen)
        lines += _not_sent(target, unsent, counted)
    return "\n".join(lines)


def _expected(count: int | None) -> str:
    if count is None:
        return "at least 1 broadcast"
    return f"exactly {_broadcasts(count)}" if count else "no broadcast"


def _was(count: int) -> str:
    return {0: "was none", 1: "was 1"}.get(count, f"were {count}")


def _broadcasts(count: int) -> str:
    return f"{count} broadcast{'' if count == 1 else 's'}"


def _events(broadcasts: Sequence[Broadcast], target: Target, wanted: Wanted | None = None) -> Iterator[str]:
    for number, each in enumerate(broadcasts[:SHOWN_EVENTS], 1):
        stream = "" if each.stream == target.name else f"on {each.stream} "
        yield f"  {number}. {stream}{_pretty(each)}"
        if wanted is not None:
            yield from (f"     {difference}" for difference in wanted.differences(each))
    if len(broadcasts) > SHOWN_EVENTS:
        yield f"  ... and {len(broadcasts) - SHOWN_EVENTS} more"


def _pretty(broadcast: Broadcast) -> str:
    if not broadcast.is_change:
        return _trimmed(json.dumps(broadcast.payload, ensure_ascii=False))
    head = f"{broadcast.operation} {broadcast.type} {broadcast.key}"
    if "value" not in broadcast.payload:
        return head
    return f"{head} {_trimmed(json.dumps(broadcast.value, ensure_ascii=False))}"


def _trimmed(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = (SHOWN_CHARACTERS - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _elsewhere(target: Target, seen: Iterable[Broadcast]) -> Iterator[str]:
    if target.name is None:
        return
    counts = Counter(each.stream for each in seen if not target.covers(each.stream))
    if not counts:
        yield "Nothing was broadcast on any other stream."
        return
    yield "Elsewhere, the nearest first:"
    nearest = sorted(counts, key=lambda stream: (-_nearness(stream, target.name or ""), stream))
    for stream in nearest[:SHOWN_STREAMS]:
        yield f"  {_broadcasts(counts[stream])} on {stream}"
    if len(nearest) > SHOWN_STREAMS:
        left = nearest[SHOWN_STREAMS:]
        yield f"  {_broadcasts(sum(counts[stream] for stream in left))} on {len(left)} more streams"


def _nearness(stream: str, name: str) -> float:
    return difflib.SequenceMatcher(None, stream, name, autojunk=False).ratio()


def _not_sent(target: Target, unsent: Iterable[Unsent], counted: Mapping[str, int]) -> Iterator[str]:
    counts = Counter(each for each in unsent if each.stream is None or target.covers(each.stream))
    lines = [each.described(count) for each, count in counts.items()]
    for name, (one, several) in FAILURES.items():
        if count := counted.get(name, 0):
            lines.append((one if count == 1 else several).format(count))
    if lines:
        yield "Not sent:"
        yield from (f"  {line}" for line in lines)

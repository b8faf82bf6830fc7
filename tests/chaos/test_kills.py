"""Processes are killed with SIGKILL, everywhere and at every step; readers must not be able to tell.

`CHAOS_KILLS` sets how many random kills there are.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.stack import Owed, Part, Stack, Verdict, judge

KILLS = int(os.environ.get("CHAOS_KILLS", "12"))
CALLS = ("claim", "anchor", "create", "append", "advance", "finish")
STEPS = tuple(f"{when} {call}" for call in CALLS for when in ("before", "after"))
COMMIT_STEPS = [
    *(("redis", f"{when} {step}") for step in ("reserve", "commit", "put") for when in ("before", "after")),
    *(("database", f"{when} {step}") for step in ("stage", "commit", "staged") for when in ("before", "after")),
]
PASSES = (0, 2, 7)
"""How often a step is passed before the process dies at it, one death after the other."""

ONCE_A_STREAM = ("anchor", "create")
SEED = int(os.environ.get("CHAOS_SEED", "1"))


def spotless(verdict: Verdict) -> bool:
    return verdict == Verdict(events=verdict.events)


def run_through_kills(stack: Stack, kills: int, victims: tuple[str, ...]) -> None:
    chance = random.Random(SEED)
    for _ in range(kills):
        time.sleep(chance.uniform(0.2, 1.5))
        match chance.choice(victims):
            case "application":
                stack.restart(chance.choice(stack.applications))
            case "worker":
                stack.restart(chance.choice(stack.workers))
            case "server":
                stack.restart(stack.server)
            case "redis":
                stack.restart_valkey()
        stack.start_what_died()


def test_the_database_outbox_loses_doubles_and_reorders_nothing(tmp_path: Path, postgres_url: str) -> None:
    """Application, worker, Redis and stream server, killed at random under eight worker threads."""
    with Stack(tmp_path, postgres_url, outbox="database", rooms=100, workers=2, applications=2) as stack:
        run_through_kills(stack, KILLS, ("application", "worker", "worker", "server", "redis"))
        stack.settle(within=90, commits=100)
        verdict, _ = judge(stack)
    print(f"\n{KILLS} kills: {verdict}")
    assert verdict.events >= 100
    assert spotless(verdict), verdict


def test_the_redis_outbox_loses_doubles_and_reorders_nothing_while_applications_and_redis_live(
    tmp_path: Path, postgres_url: str
) -> None:
    """Two applications write to the same rows, so the order is that of commits in two processes."""
    with Stack(tmp_path, postgres_url, outbox="redis", rooms=30, workers=2, applications=2) as stack:
        run_through_kills(stack, KILLS, ("worker", "worker", "server"))
        stack.settle(within=90, commits=80)
        verdict, _ = judge(stack)
    print(f"\n{KILLS} kills: {verdict}")
    assert verdict.events >= 50
    assert spotless(verdict), verdict


def test_the_redis_outbox_loses_doubles_and_reorders_nothing_while_the_application_lives(
    tmp_path: Path, postgres_url: str
) -> None:
    """Redis too: what cannot be pushed waits in the application, in its order. Two could not agree on one meanwhile."""
    with Stack(tmp_path, postgres_url, outbox="redis", rooms=30, workers=2, applications=1) as stack:
        run_through_kills(stack, KILLS, ("worker", "server", "redis", "redis"))
        stack.settle(within=90, commits=80)
        verdict, _ = judge(stack)
    print(f"\n{KILLS} kills: {verdict}")
    assert verdict.events >= 50
    assert spotless(verdict), verdict


def test_a_killed_application_takes_with_it_what_it_had_not_yet_pushed_to_redis_and_nothing_else(
    tmp_path: Path, postgres_url: str
) -> None:
    """The one loss that is admitted: committed by a process that was killed, and not handed over at that moment.

    Redis lives, so that is one transaction for each of the four writers at most, the last of each.
    """
    writers = 4
    with Stack(tmp_path, postgres_url, outbox="redis", rooms=30, workers=2, applications=2, writers=writers) as stack:
        run_through_kills(stack, KILLS, ("application", "application", "worker", "server"))
        stack.settle(within=90, commits=80)
        killed = {process for application in stack.applications for process in application.killed}
        lost: Counter[int] = Counter()

        def admitted(owed: Owed) -> bool:
            lost[owed.process] += 1
            return owed.process in killed

        verdict, forgiven = judge(stack, admitted=admitted)
    print(f"\n{KILLS} kills, {len(killed)} of applications: {forgiven} batches lost as admitted, {verdict}")
    assert verdict.events >= 50
    assert spotless(verdict), verdict
    # A transaction that moves a message has a batch for two streams.
    assert max(lost.values(), default=0) <= 2 * writers, lost


@pytest.mark.parametrize("outbox", ["database", "redis"])
@pytest.mark.parametrize("step", STEPS)
def test_a_worker_that_dies_at_this_step_leaves_no_trace(
    tmp_path: Path, postgres_url: str, step: str, outbox: str
) -> None:
    with Stack(tmp_path, postgres_url, outbox=outbox, rooms=6, workers=1, on_files=False) as stack:
        deaths = die_at(stack, stack.workers[0], step, meanwhile=stack.wake_for_nothing)
        stack.settle(within=60, commits=6)
        verdict, _ = judge(stack)
    print(f"\n{outbox}, {step}: {deaths} deaths, {verdict}")
    assert deaths > 0  # each stream is created and anchored once, so these steps may come less often than asked for
    assert verdict.events > 5
    assert spotless(verdict), verdict


@pytest.mark.parametrize(("outbox", "step"), COMMIT_STEPS)
def test_an_application_that_dies_at_this_step_of_a_commit_leaves_no_trace_or_an_admitted_one(
    tmp_path: Path, postgres_url: str, step: str, outbox: str
) -> None:
    """Another application writes to the same rows. The places that the dead one had reserved hold it up for a while.

    Admitted is what the dead one had committed, and not yet pushed to Redis.
    """
    writers = 2
    options = {"outbox": outbox, "rooms": 6, "workers": 1, "applications": 2, "writers": writers}
    with Stack(tmp_path, postgres_url, **options, on_files=False) as stack:
        deaths = die_at(stack, stack.applications[0], step)
        stack.settle(within=60, commits=6)
        verdict, forgiven = judge(stack, admitted=lambda owed: outbox == "redis")
    print(f"\n{outbox}, {step}: {deaths} deaths, {forgiven} batches lost as admitted, {verdict}")
    assert deaths == len(PASSES)
    assert verdict.events > 5
    assert spotless(verdict), verdict
    # A transaction that moves a message has a batch for two streams.
    assert forgiven <= 2 * writers * deaths
    if step in ("before commit", "before reserve", "after reserve", "after put"):
        # Its other writers may have been between their commit and their push.
        assert forgiven <= 2 * (writers - 1) * deaths


def die_at(stack: Stack, part: Part, step: str, *, meanwhile: Callable[[], None] = lambda: None) -> int:
    """Let *part* die at *step*, and start it in order again; how many times it did.

    Args:
        meanwhile: Called every now and then. Only a wake-up for nothing leads to the step `finish`.
    """
    deaths = 0
    for passes in PASSES[:2] if step.endswith(ONCE_A_STREAM) else PASSES:
        stack.restart(part, CHAOS_KILL_AT=f"{step}:{passes}")
        deadline = time.monotonic() + 20
        while part.is_running and time.monotonic() < deadline:
            meanwhile()
            time.sleep(0.02)
        deaths += not part.is_running
    stack.restart(part)
    return deaths

"""The npm reference server on files, killed with SIGKILL under load: nothing lost and nothing doubled.

By itself it doubles what was repeated after an unanswered request, for it forgets its producers (docs/servers.md).
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.chaos.stack import Stack, Verdict, judge
from tests.interop.node import HERE, node

KILLS = 12


def test_the_reference_server_killed_under_load_loses_and_doubles_nothing(tmp_path: Path, postgres_url: str) -> None:
    def serve(port: int, data: str) -> list[str]:
        return [node(), str(HERE / "serve.mjs"), str(port), data]

    chance = random.Random(5)
    with Stack(tmp_path, postgres_url, outbox="database", rooms=8, workers=2, pause=0.01, server=serve) as stack:
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.3, 1.2))
            stack.restart(stack.server)
        stack.settle(within=90, commits=100)
        verdict, _ = judge(stack)
    print(f"\n{KILLS} kills of the npm server: {verdict}")
    assert verdict.events >= 100
    assert verdict == Verdict(events=verdict.events), verdict

"""Print what ran, from tox's result files and pytest's reports, and end with the plain count.

    report.py RESULTS 1=lint,py 2=interop

RESULTS holds 1.json and so on, as `tox --result-json` writes them; after the equals sign are the environments that
must be in it. An environment counts its tests, or itself when it runs none; one that is missing, or failed with no
failing test to show for it (a broken installation, no test at all), counts as one failure.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple


class Suite(NamedTuple):
    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def suite(name: str, ran: dict[str, list[dict[str, float]]]) -> Suite:
    commands = ran.get("setup", []) + ran.get("test", [])
    seconds = sum(command["elapsed"] for command in commands)
    succeeded = bool(ran.get("test")) and not any(command["retcode"] for command in commands)
    report = Path(".tox") / name / "junit.xml"
    if not report.exists():
        return Suite(name, int(succeeded), int(not succeeded), 0, seconds)
    tests = failed = skipped = 0
    for element in ElementTree.parse(report).getroot().iter("testsuite"):  # noqa: S314  pytest has just written it
        tests += int(element.get("tests", 0))
        failed += int(element.get("failures", 0)) + int(element.get("errors", 0))
        skipped += int(element.get("skipped", 0))
    if not succeeded or not tests:
        failed = max(failed, 1)
    return Suite(name, max(tests - failed - skipped, 0), failed, skipped, seconds)


def main(results: Path, *expected: str) -> int:
    suites: list[Suite] = []
    for group in expected:
        number, _, names = group.partition("=")
        file = results / f"{number}.json"
        ran = json.loads(file.read_text())["testenvs"] if file.exists() else {}
        suites += [suite(name, ran.get(name, {})) for name in names.split(",")]
    print(f"\n{'suite':<12}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for each in suites:
        print(f"{each.name:<12}{each.passed:>8}{each.failed:>8}{each.skipped:>9}{each.seconds:>9.0f}")
    passed, failed, skipped = (sum(column) for column in zip(*(each[1:4] for each in suites), strict=True))
    print(f"\n{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))

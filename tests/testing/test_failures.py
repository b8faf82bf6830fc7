"""What a failed assertion says, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent / "failures"


def test_a_failure_says_what_is_in_the_text_file_of_its_name(pytester: pytest.Pytester) -> None:
    """The failing tests of `failures/scenarios.py`, all in one run. Read the text when it changes, then store it."""
    run = pytester.inline_run("--import-mode=importlib", "-p", "no:cacheprovider", str(HERE / "scenarios.py"))
    passed, skipped, failed = run.listoutcomes()
    assert passed == skipped == []
    assert {failure.when for failure in failed} == {"call"}
    said = {
        failure.nodeid.rpartition("::test_")[2]: failure.longrepr.reprcrash.message  # type: ignore[union-attr]
        for failure in failed
    }
    assert said == {path.stem: path.read_text().rstrip("\n") for path in HERE.glob("*.txt")}

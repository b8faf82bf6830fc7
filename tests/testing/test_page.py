"""The suite that docs/testing.md is."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SAMPLE = re.compile(r"^```python\n(?:# (\w+\.py)\n)?(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_suite_on_the_page_runs(pytester: pytest.Pytester) -> None:
    """Each sample in the file that its first line names, or else in one module; lines are numbered as on the page."""
    page = (DOCS / "testing.md").read_text()
    files: dict[str, str] = defaultdict(str)
    for sample in SAMPLE.finditer(page):
        name = sample[1] or "test_page.py"
        line = page.count("\n", 0, sample.start(2))
        files[name] += "\n" * (line - files[name].count("\n")) + sample[2]
    for name, source in files.items():
        (pytester.path / name).write_text(source)
    written = len(re.findall(r"^ *def test_", "".join(files.values()), re.MULTILINE))
    pytester.makeini(f"[pytest]\npythonpath = {DOCS / 'samples'}\nfilterwarnings = error\n")
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=written)

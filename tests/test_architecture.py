"""The architecture page's table of layers is what the code does."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "broadcastable"
FRONT_DOOR = "broadcastable"


def layers() -> dict[str, int]:
    """The row of each module in the table; the first is 0."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = page[page.index("| module | its idea |") :].partition("\n\n")[0].splitlines()[2:]
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def module_of(path: Path) -> str:
    """As the table names it: a package counts as one module, and `__init__` is the front door."""
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return FRONT_DOOR if top == "__init__" else top


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that importing the file at *path* imports, as the table names them."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
    for node in run_at_import(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == PACKAGE.name:
                known = len(name) > 1 and ((PACKAGE / name[1]).is_dir() or (PACKAGE / f"{name[1]}.py").is_file())
                yield name[1] if known else FRONT_DOOR


def run_at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports in *body*, without those in functions, and those for type checkers alone."""
    for statement in body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from run_at_import(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "finalbody"):
                yield from run_at_import(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from run_at_import(handler.body)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_a_row_and_every_row_a_module():
    assert set(layers()) == {module_of(path) for path in SOURCES}


def test_no_module_imports_what_is_below_it():
    row = layers()
    below = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in SOURCES
        for other in imported(path)
        if row[other] > row[module_of(path)]
    ]

    assert below == []


def test_nothing_imports_the_test_kit_or_the_command_line_and_only_the_latter_imports_the_server():
    importers = {
        (module_of(path), other)
        for path in SOURCES
        for other in imported(path)
        if other in ("testing", "cli", "server") and other != module_of(path)
    }

    assert importers == {("cli", "server")}

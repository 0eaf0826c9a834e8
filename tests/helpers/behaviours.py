"""Which tests show which numbered behaviour, read from the files, so that tests that are skipped here count too."""

from __future__ import annotations

import ast
import collections
from collections.abc import Iterator, Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MARK = "behaviour"
OURS = {"B": 36, "C": 8}  # numbers go from 1 to these: B what a cuDNN backend does, C what convplan does beyond

Table = Mapping[str, list[str]]


def numbers() -> list[str]:
    """Every number there is, in order."""
    return [f"{letter}{number}" for letter, last in OURS.items() for number in range(1, last + 1)]


def table(folder: Path = TESTS) -> Table:
    """The tests of each number, as `file::name`. A parametrized test counts once."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for path in sorted(folder.rglob("test_*.py")):
        for name, shown in marked(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
            for number in shown:
                found[number].append(f"{path.relative_to(folder)}::{name}")
    return found


def marked(module: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Each test of a file, with the numbers that are written over it, over its class and over its file."""
    yield from _marked(module.body, _assigned(module.body), "")


def _marked(body: list[ast.stmt], around: list[str], prefix: str) -> Iterator[tuple[str, list[str]]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            inside = [*around, *_said(*node.decorator_list), *_assigned(node.body)]
            yield from _marked(node.body, inside, f"{prefix}{node.name}::")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
            yield f"{prefix}{node.name}", list(dict.fromkeys([*around, *_said(*node.decorator_list)]))


def _assigned(body: list[ast.stmt]) -> list[str]:
    """What `pytestmark = …` in a file or a class says."""
    values = [
        node.value
        for node in body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)
    ]
    return _said(*values)


def _said(*expressions: ast.expr) -> list[str]:
    """The arguments of every `….behaviour(…)` in some expressions, also inside `pytest.param(marks=…)`."""
    return [
        str(ast.literal_eval(argument))
        for expression in expressions
        for node in ast.walk(expression)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == MARK
        for argument in node.args
    ]


def lines(found: Table, per_line: int = 10) -> list[str]:
    """The number of tests of each behaviour, ten to a line."""
    rows = []
    for letter, last in OURS.items():
        for first in range(1, last + 1, per_line):
            shown = [f"{letter}{n}" for n in range(first, min(first + per_line, last + 1))]
            rows.append("  ".join(f"{number:>3} {len(found.get(number, ())):>2}" for number in shown))
    return rows

"""Every numbered behaviour has a test that carries its number. The table is printed at the end of each run."""

from __future__ import annotations

import ast

import pytest
from helpers import behaviours


def test_every_behaviour_has_a_test() -> None:
    found = behaviours.table()
    assert [number for number in behaviours.numbers() if not found.get(number)] == []


def test_no_test_carries_a_number_that_does_not_exist() -> None:
    found = behaviours.table()
    strange = {number: tests for number, tests in found.items() if number not in behaviours.numbers()}
    assert strange == {}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def test_a(): pass", {"test_a": []}),
        ("@pytest.mark.behaviour('B1')\ndef test_a(): pass\ndef test_b(): pass", {"test_a": ["B1"], "test_b": []}),
        (
            "@pytest.mark.behaviour('B1', 'B2')\n@mark.behaviour('B3')\ndef test_a(): pass",
            {"test_a": ["B1", "B2", "B3"]},
        ),
        (
            "pytestmark = [mark.slow, mark.behaviour('B1')]\ndef helper(): 0\n@mark.behaviour('B1')\ndef test_a(): 0",
            {"test_a": ["B1"]},
        ),
        (
            "@mark.behaviour('B1')\nclass TestA:\n  pytestmark = mark.behaviour('B2')\n  def test_b(self): pass",
            {"TestA::test_b": ["B1", "B2"]},
        ),
        ("@mark.parametrize('x', [param(1, marks=mark.behaviour('B4'))])\ndef test_a(x): pass", {"test_a": ["B4"]}),
        ("def outer():\n  @mark.behaviour('B1')\n  def test_inner(): pass", {}),
    ],
    ids=["none", "function", "several", "file", "class", "parameter", "inside"],
)
def test_marks_are_read_wherever_they_may_stand(code: str, expected: dict[str, list[str]]) -> None:
    assert dict(behaviours.marked(ast.parse(code))) == expected


def test_the_printed_table_has_every_number_once() -> None:
    printed = behaviours.lines({"B2": ["one", "two"]})
    words = " ".join(printed).split()
    assert words[::2] == behaviours.numbers()
    assert dict(zip(words[::2], words[1::2], strict=True))["B2"] == "2"
    assert len(printed) == 5

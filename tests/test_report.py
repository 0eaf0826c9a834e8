"""Explaining a record: everything that planning stored is there, readable, on lines of its own, and never cut."""

from __future__ import annotations

import subprocess
import sys

import pytest

from convplan._environment import Environment
from convplan._plan import Evidence, PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem
from convplan.engines.base import EngineConfig, Notes
from convplan.report import explain_record, human_bytes, human_s, human_us, one_line, table

LONG_REASON = "over the workspace limit " + "x" * 5_000


def record(**changes: object) -> PlanRecord:
    fields: dict[str, object] = {
        "problem": Problem.dense("fprop", (8, 64, 56, 56), (64, 64, 3, 3), padding=1),
        "policy": Policy(deterministic=False, allow_tf32=True),
        "environment": Environment("cpu", (("cpu", "Some [bold]CPU[/bold]"), ("threads", "2"))),
        "effort": "measure",
        "ranking": (
            Evidence(
                config=EngineConfig.of("fft", block=4096, tiles=2),
                notes=Notes(("FFT",)),
                median_us=41.23,
                spread_us=1.15,
                workspace_bytes=1_048_576,
                error=0.0213,
                verified="sample",
            ),
            Evidence(config=EngineConfig("aten"), source="fallback", median_us=1044.9, verified="full", error=1e-7),
        ),
        "rejected": (
            Evidence(
                config=EngineConfig.of("matmul", method=3),
                workspace_bytes=96 * 2**20,
                rejected="filter",
                reason=LONG_REASON,
            ),
        ),
        "planning_s": 1.5,
        "created": "2026-01-01T00:00:00+00:00",
        "version": "0.1.0",
    }
    return PlanRecord(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_question_comes_first_one_line_each() -> None:
    lines = explain_record(record()).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines[: lines.index("")])
    assert facts == {
        "problem": str(record().problem),
        "policy": "Policy(deterministic=False, allow_tf32=True)",
        "environment": "cpu: cpu Some [bold]CPU[/bold], threads 2",
        "effort": "measure",
        "planning": "1.50 s, 2026-01-01T00:00:00+00:00 by convplan 0.1.0",
        "key": record().key,
    }


def test_candidates_follow_best_first_with_their_evidence() -> None:
    lines = explain_record(record()).splitlines()
    heading, first, second, rejected = lines[lines.index("") + 1 :]
    assert " ".join(heading.split()) == "rank engine config median us spread us workspace error note"
    assert " ".join(first.split()) == "1 fft block=4096 tiles=2 41.2 1.1 1.0 MiB 0.021 chosen, verified: sample, FFT"
    assert " ".join(second.split()) == "2 aten - 1044.9 - - 1e-07 last resort"
    assert " ".join(rejected.split()) == f"- matmul method=3 - - 96.0 MiB - rejected in filter: {LONG_REASON}"


def test_columns_are_aligned_and_nothing_is_cut() -> None:
    lines = explain_record(record()).splitlines()
    heading, *rows = lines[lines.index("") + 1 :]
    for name in ("engine", "config", "note"):
        assert all(row[heading.index(name) - 2 : heading.index(name)] == "  " for row in rows)
        assert all(row[heading.index(name)] != " " for row in rows)
    end = heading.index("median us") + len("median us")
    assert [row[:end].split()[-1] for row in rows] == ["41.2", "1044.9", "-"], "numbers end where their heading ends"
    assert rows[-1].endswith("x" * 5_000)


def test_an_untimed_record_has_dashes() -> None:
    found = explain_record(record(effort="instant", ranking=(Evidence(config=EngineConfig("aten")),), rejected=()))
    assert " ".join(found.splitlines()[-1].split()) == "1 aten - - - - - chosen, not verified"


def test_text_from_elsewhere_cannot_steer_a_terminal() -> None:
    hostile = Evidence(config=EngineConfig("aten"), rejected="build", reason="red \x1b[31m\nand\ttwo \x07lines")
    text = explain_record(record(rejected=(hostile,)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.splitlines()[-1].endswith("rejected in build: red [31m and two lines")


def test_a_table_keeps_brackets_wide_characters_and_emptiness() -> None:
    text = table({"name": "left", "n": "right"}, [("[red]x[/red]", "1"), ("", ""), ("漢字", "22")])
    assert [line.split() for line in text.splitlines()] == [["name", "n"], ["[red]x[/red]", "1"], [], ["漢字", "22"]]
    assert table({"name": "left"}, []) == "name"


def test_one_line_collapses_whatever_is_not_printable() -> None:
    assert one_line(" a\r\n\tb\x1b  c ") == "a b c"


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(None, "-"), (0, "0.00 us"), (0.25, "0.25 us"), (41.23, "41.2 us"), (3_400, "3.4 ms"), (1_254_000, "1.25 s")],
)
def test_times_are_readable(microseconds: float | None, text: str) -> None:
    assert human_us(microseconds) == text
    assert human_s(None if microseconds is None else microseconds / 1e6) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (1_023, "1023 B"), (1_024, "1.0 KiB"), (3 * 2**40, "3.0 TiB")]
)
def test_sizes_are_readable(count: int | None, text: str) -> None:
    assert human_bytes(count) == text


def test_explaining_needs_no_torch() -> None:
    code = "import sys, convplan.report, convplan._plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

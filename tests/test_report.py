"""Explaining a record: everything that planning stored is there, readable, on lines of its own, and never cut."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convplan._environment import Environment
from convplan._limits import Peaks
from convplan._plan import Evidence, PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem
from convplan.engines import registry
from convplan.engines.base import EngineConfig, Notes
from convplan.engines.cudnn.errata import Errata
from convplan.report import explain_record, group_rejected, human_bytes, human_count, human_s, human_us, one_line, table

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


def facts(found: PlanRecord) -> dict[str, str]:
    lines = explain_record(found).splitlines()
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines[: lines.index("")])


def test_the_question_comes_first_one_line_each() -> None:
    assert facts(record()) == {
        "problem": str(record().problem),
        "policy": "Policy(deterministic=False, allow_tf32=True)",
        "environment": "cpu: cpu Some [bold]CPU[/bold], threads 2",
        "effort": "measure",
        "planning": "1.50 s, 2026-01-01T00:00:00+00:00 by convplan 0.1.0",
        "key": record().key,
        "stock torch": "not known: torch's own way was not proposed, or the plan is older than its mark",
        "hardware limit": "not known: the plan holds no peak rates of its machine",
    }


def test_candidates_follow_best_first_with_their_evidence() -> None:
    lines = explain_record(record()).splitlines()
    heading, first, second, gap, count, rejected = lines[lines.index("") + 1 :]
    assert " ".join(heading.split()) == "rank engine config median us spread us workspace error note"
    assert " ".join(first.split()) == "1 fft block=4096 tiles=2 41.2 1.1 1.0 MiB 0.021 chosen, verified: sample, FFT"
    assert " ".join(second.split()) == "2 aten - 1044.9 - - 1e-07 last resort"
    assert (gap, count) == ("", "rejected (1)")
    assert rejected == f"  filter: {LONG_REASON} (1): matmul[method=3]"


def test_columns_are_aligned_and_nothing_is_cut() -> None:
    lines = explain_record(record()).splitlines()
    begin = lines.index("") + 1
    heading, *rows = lines[begin : lines.index("", begin)]
    for name in ("engine", "config", "note"):
        assert all(row[heading.index(name) - 2 : heading.index(name)] == "  " for row in rows)
        assert all(row[heading.index(name)] != " " for row in rows)
    end = heading.index("median us") + len("median us")
    assert [row[:end].split()[-1] for row in rows] == ["41.2", "1044.9"], "numbers end where their heading ends"
    assert "x" * 5_000 in lines[-1]


def test_an_untimed_record_has_dashes() -> None:
    found = explain_record(record(effort="instant", ranking=(Evidence(config=EngineConfig("aten")),), rejected=()))
    assert " ".join(found.splitlines()[-1].split()) == "1 aten - - - - - chosen, not verified"


def choice(**changes: object) -> Evidence:
    values: dict[str, object] = {"config": EngineConfig("fft"), "median_us": 35.0, "spread_us": 0.1, **changes}
    return Evidence(**values)  # type: ignore[arg-type]


def stock(call: str = "convolution", **changes: object) -> Evidence:
    return choice(**{"config": EngineConfig("aten"), "median_us": 41.3, "spread_us": 0.2, "stock": call, **changes})


def test_stock_torch_is_compared_with_the_choice() -> None:
    found = record(ranking=(choice(), stock()))
    assert facts(found)["stock torch"] == "aten: 41.3 us ± 0.20 us, the choice is 1.18 x as fast (convolution)"
    assert facts(record(ranking=(stock(), choice())))["stock torch"].startswith(
        "aten: 41.3 us ± 0.20 us, it is the choice"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param(
            {"rejected": (stock(median_us=None, spread_us=None, rejected="filter", reason="workspace is over"),)},
            "aten: not timed: rejected in filter: workspace is over (convolution)",
            id="rejected",
        ),
        pytest.param(
            {"effort": "instant", "ranking": (choice(median_us=None), stock(median_us=None))},
            "aten: not timed: effort instant (convolution)",
            id="instant",
        ),
        pytest.param(
            {"policy": Policy(deterministic=False, allow_tf32=True, engines=("fft", "matmul"))},
            "did not take part (policy engines=fft,matmul)",
            id="left-out",
        ),
        pytest.param(
            {"rejected": (Evidence(config=EngineConfig("aten"), rejected="enumerate", reason="no kernel for int8"),)},
            "not timed: aten is rejected in enumerate: no kernel for int8",
            id="refuses",
        ),
    ],
)
def test_stock_torch_without_a_time_says_why(changes: dict[str, object], words: str) -> None:
    assert facts(record(**{"ranking": (choice(),), **changes}))["stock torch"] == words


def test_a_dgrad_is_two_things_to_stock_torch() -> None:
    ways = (stock("transposed convolution", median_us=70.0), stock("gradient for the input", median_us=52.5))
    problem = Problem.dense("dgrad", (8, 64, 56, 56), (64, 64, 3, 3), padding=1)
    lines = explain_record(record(problem=problem, ranking=(choice(), *ways))).splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("stock torch"))
    assert lines[place].endswith("the choice is 1.50 x as fast (gradient for the input)")
    assert lines[place + 1].endswith("the choice is 2.00 x as fast (transposed convolution)")
    assert lines[place + 1].startswith(" " * len("stock torch"))


def test_on_a_gpu_the_flags_are_said_that_stock_torch_ran_with() -> None:
    """Torch picks by its flags there: what was timed is one of its choices."""
    problem = Problem.dense("fprop", (8, 64, 56, 56), (64, 64, 3, 3), padding=1, device="cuda")
    proposed = [one for one in registry.get("aten").configs(problem, "measure") if one.stock]
    assert [one.stock for one in proposed] == ["convolution, cudnn.benchmark=False"]
    assert proposed[0].config == EngineConfig.of("aten", layout=0, path=0, compute=0)
    found = record(problem=problem, environment=Environment("cuda", ()), ranking=(choice(), stock(proposed[0].stock)))
    text = explain_record(found)
    assert "the choice is 1.18 x as fast (convolution, cudnn.benchmark=False)\n" in text
    assert "with deterministic=False, allow_tf32=True as planned; benchmark=True lets torch time" in text


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("padding", [1, ((1, 0), (0, 1))], ids=["even", "uneven"])
def test_what_is_marked_as_stock_turns_no_knob(op: str, padding: object) -> None:
    problem = Problem.dense(op, (2, 8, 12, 12), (8, 8, 3, 3), padding=padding)  # type: ignore[arg-type]
    marked = [one for one in registry.get("aten").configs(problem, "measure") if one.stock]
    assert len(marked) == (2 if op == "dgrad" else 1)
    for one in marked:
        assert [one.config.knob(name) for name in ("layout", "path", "compute")] == [0, 0, 0]
        assert one.config.knob("via") in (0, 1)
        assert ("uneven padding done apart" in one.stock) == (padding != 1)


PEAKS = Peaks(kind="theoretical", flops_per_us=989e6, bytes_per_us=4.8e6)


def test_the_hardware_limit_names_its_bound_its_rate_and_the_distance() -> None:
    found = record(peaks=PEAKS, ranking=(choice(median_us=8.0),))
    # float32: 8 x 64 x 56 x 56 numbers read and written, and the filter, are 13.0 MB: 2.70 us; 1.85 GFLOP take 1.87 us
    assert facts(found)["hardware limit"] == (
        "2.7 us (memory: 13.0 MB at 4.80 TB/s theoretical peak); the choice takes 3.0 x that"
    )
    slow = record(
        peaks=Peaks(kind="measured", flops_per_us=98e3, bytes_per_us=4.8e6), ranking=(choice(median_us=9437.0),)
    )
    assert facts(slow)["hardware limit"] == (
        "18.9 ms (arithmetic: 1.85 GFLOP at 98.0 GFLOP/s measured peak); the choice takes 0.50 x that"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranking": (choice(median_us=None),), "peaks": PEAKS}, "; the choice was not timed"),
        (
            {"ranking": (choice(median_us=1.35),), "peaks": PEAKS},
            "the choice takes 0.50 x that, with data that a cache holds",
        ),
        (
            {
                "ranking": (choice(median_us=1e4, notes=Notes(("FFT",))),),
                "peaks": Peaks(kind="measured", flops_per_us=98e3, bytes_per_us=4.8e6),
            },
            "the choice takes 0.53 x that, with fewer operations than the direct method counted here",
        ),
        ({"peaks": Peaks(kind="theoretical", missing="no rate is known for X")}, "not known: no rate is known for X"),
        ({"peaks": Peaks(kind="theoretical", flops_per_us=5.0)}, "not known: a peak rate is missing"),
    ],
)
def test_the_hardware_limit_is_shown_for_what_it_is(changes: dict[str, object], words: str) -> None:
    assert facts(record(**changes))["hardware limit"].endswith(words)


def test_the_curve_of_a_search_stands_between_the_candidates_and_the_rejected() -> None:
    lines = explain_record(record(curve=((0.5, 60.0), (2.0, 41.23)))).splitlines()
    begin = lines.index("") + 1
    middle = lines[lines.index("", begin) + 1 : lines.index("rejected (1)") - 1]
    assert any("41.2 us" in line for line in middle)
    assert len(lines) == len(explain_record(record()).splitlines()) + len(middle) + 1


def dropped(stage: str, reason: str, count: int, engine: str = "cudnn") -> tuple[Evidence, ...]:
    configs = (EngineConfig.of(engine, engine=number) for number in range(count))
    return tuple(Evidence(config=config, rejected=stage, reason=reason, workspace_bytes=1024) for config in configs)


TENSOR_CORE = "carries TENSOR_CORE and the policy does not allow TF32"


def test_what_one_rule_drops_takes_one_line() -> None:
    rejected = (*dropped("filter", TENSOR_CORE, 12), *dropped("build", TENSOR_CORE, 1), *dropped("filter", "other", 3))
    lines = explain_record(record(rejected=rejected)).splitlines()
    assert lines[lines.index("rejected (16)") + 1 :] == [
        f"  filter: {TENSOR_CORE} (12): cudnn[engine=0], cudnn[engine=1], and 10 more",
        f"  build: {TENSOR_CORE} (1): cudnn[engine=0]",
        "  filter: other (3): cudnn[engine=0], cudnn[engine=1], cudnn[engine=2]",
    ]


def test_every_rejection_can_be_listed_with_what_is_its_own() -> None:
    rejected = (
        *dropped("filter", "workspace 2048 bytes is over the limit of 1024 bytes", 1),
        *dropped("filter", "workspace 4096 bytes is over the limit of 1024 bytes", 1, engine="fft"),
    )
    short, full = (explain_record(record(rejected=rejected), every_rejection=every).splitlines() for every in (0, 1))
    common = "  filter: workspace … bytes is over the limit of 1024 bytes (2)"
    assert short[-1] == f"{common}: cudnn[engine=0], fft[engine=0]"
    assert full[-3:] == [
        common,
        "    cudnn[engine=0]; workspace 1.0 KiB; workspace 2048 bytes is over the limit of 1024 bytes",
        "    fft[engine=0]; workspace 1.0 KiB; workspace 4096 bytes is over the limit of 1024 bytes",
    ]
    assert record(rejected=rejected).explain(every_rejection=True).splitlines() == full


def test_only_times_and_sizes_are_left_out_of_a_common_reason() -> None:
    reasons = ["cut off: 877.6 us, 5.6 x the best", "cut off: 15 us, 9 x the best", "status 3000", "status 3001"]
    rejected = tuple(one for reason in reasons for one in dropped("measure", reason, 1))
    assert [group.reason for group, _ in group_rejected(rejected)] == [
        "cut off: … us, … x the best",
        "status 3000",
        "status 3001",
    ]


def test_errata_are_told_apart_by_their_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = [{"id": f"no-engine-{number}", "engines": [number]} for number in (12, 13)]
    rules = [{**one, "reason": "hangs", "source": "https://example.org/1"} for one in conditions]
    (tmp_path / "mine.json").write_text(json.dumps({"schema": 1, "rules": rules}))
    monkeypatch.setenv("CONVPLAN_ERRATA", str(tmp_path / "mine.json"))
    problem = Problem.dense("fprop", (8, 64, 56, 56), (64, 64, 3, 3), padding=1, device="cuda")
    verdicts = [
        Errata.load().verdict(problem, number, {}, cudnn_version=91900, compute_capability="9.0") for number in (12, 13)
    ]
    rejected = tuple(one for verdict in verdicts for one in dropped("filter", verdict, 2))
    lines = explain_record(record(rejected=rejected)).splitlines()
    assert lines[-2:] == [
        f"  filter: errata rule no-engine-{number}: hangs (2): cudnn[engine=0], cudnn[engine=1]" for number in (12, 13)
    ]


def test_text_from_elsewhere_cannot_steer_a_terminal() -> None:
    hostile = Evidence(config=EngineConfig("aten"), rejected="build", reason="red \x1b[31m\nand\ttwo \x07lines")
    text = explain_record(record(rejected=(hostile,)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert text.splitlines()[-1].endswith("build: red [31m and two lines (1): aten")


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


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 "), (512, "512 "), (80_300_000, "80.3 M"), (4.8e12, "4.80 T"), (989e12, "989 T")]
)
def test_counts_are_readable(count: float, text: str) -> None:
    assert human_count(count) == text


def test_explaining_needs_no_torch() -> None:
    code = "import sys, convplan.report, convplan._plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

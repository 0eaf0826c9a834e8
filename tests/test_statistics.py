"""Statistics of a convolution's channels, as part of its plan: written, judged, kept, refused where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import convplan
from convplan import Epilogue, Policy, Problem, SpecError, WrongResult
from convplan._guards import Bench
from convplan._inputs import integer_inputs, random_inputs
from convplan._problem_text import parse_problem
from convplan._verify import Verifier
from convplan.engines import composed
from convplan.engines.base import EngineConfig, Notes
from convplan.torch_ops.statistics import convolution_with_statistics

STATISTICS = Epilogue(statistics=True)
CPU = torch.device("cpu")
CONFIG = EngineConfig("someone")


def small(dtype: str = "float16", **changes: Any) -> Problem:
    settings = {"padding": 1, "layout": "channels_last", **changes}
    return Problem.dense("fprop", (3, 8, 9, 7), (12, 8, 3, 3), dtype=dtype, epilogue=STATISTICS, **settings)


def sums_of(y: torch.Tensor) -> torch.Tensor:
    wide = y.double()
    over = [0, *range(2, y.dim())]
    return torch.stack([wide.sum(over), wide.square().sum(over)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_plan_writes_the_output_and_its_sums(dtype: str, layout: str, tmp_path: Path) -> None:
    problem = small(dtype, layout=layout, stride=2)
    record = convplan.plan(problem, Policy(budget_s=0.2))
    assert {evidence.config.engine for evidence in record.ranking} == {"composed"}
    inputs = random_inputs(problem, CPU)
    sums = torch.full((2, 12), torch.nan)
    y = record.build().run(inputs.first, inputs.second, sums=sums)
    exact = torch.conv2d(inputs.first.double(), inputs.second.double(), stride=2, padding=1)
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(sums.double(), sums_of(y), rtol=1e-4, atol=1e-3)


def test_the_text_and_the_files_hold_it(tmp_path: Path) -> None:
    problem = small()
    assert str(problem).startswith("fprop+statistics float16")
    assert parse_problem(str(problem)) == problem
    assert Epilogue() != STATISTICS
    record = convplan.plan(problem, Policy(budget_s=0.2))
    assert record.key != convplan.plan(problem.core, Policy(budget_s=0.2)).key
    path = tmp_path / "plans.json"
    convplan.export_plans(path)
    convplan.clear_plans()
    assert convplan.import_plans(path).added == 2
    again = convplan.plan(problem, Policy(mode="replay", budget_s=0.2))
    assert (again.problem, again.ranking[0].config) == (problem, record.ranking[0].config)


@pytest.mark.parametrize("row", [0, 1])
def test_wrong_sums_are_found(row: int) -> None:
    problem = small()
    verifier = Verifier(problem, CPU)
    inputs = verifier.random
    assert inputs.sums is not None
    y = torch.conv2d(inputs.first, inputs.second, padding=1)
    inputs.sums.copy_(sums_of(y))
    assert verifier.check(CONFIG, Notes(), y) <= 1
    inputs.sums[row, 5] += 0.01 * sums_of(y.abs())[row, 5].float()
    with pytest.raises(WrongResult, match=r"(sum|sum of squares) of channel 5 is"):
        verifier.check(CONFIG, Notes(), y)


def test_a_sum_that_nobody_writes_is_found() -> None:
    verifier = Verifier(small(), CPU)

    def run(first: Any, second: Any, bias: Any, out: Any, residual: Any, scale: Any, sums: Any) -> torch.Tensor:
        return torch.conv2d(first, second, padding=1)

    with pytest.raises(WrongResult, match="sum of channel 0 is nan"):
        verifier.check_exactly(CONFIG, run)


def test_sums_of_integers_must_be_exact() -> None:
    problem = small()
    inputs = integer_inputs(problem, CPU)
    verifier = Verifier(problem, CPU)
    exact = sums_of(torch.conv2d(inputs.first.double(), inputs.second.double(), padding=1))
    assert exact[1].max() < 2**24

    def run(first: Any, second: Any, bias: Any, out: Any, residual: Any, scale: Any, sums: Any) -> torch.Tensor:
        y = torch.conv2d(first, second, padding=1)
        sums.copy_(sums_of(y))
        sums[1, 3] += wrong_by
        return y

    wrong_by = 0
    assert verifier.check_exactly(CONFIG, run)
    wrong_by = 1
    with pytest.raises(WrongResult, match="sum of squares of channel 3"):
        verifier.check_exactly(CONFIG, run)


def test_planning_takes_no_plan_with_wrong_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    right = composed.column_sums

    def wrong(y: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return right(y[:-1], out)

    monkeypatch.setattr(composed, "column_sums", wrong)
    with pytest.raises(convplan.NoPlan, match="sum of"):
        convplan.plan(small("bfloat16", padding=0), Policy(budget_s=0.2))


def test_what_is_written_past_the_sums_is_seen() -> None:
    problem = small()
    bench = Bench(problem, random_inputs(problem, CPU), CPU)
    bench.fresh_output()
    sums = bench.inputs.sums
    assert sums is not None
    assert sums.isnan().all()
    assert not bench.trouble()
    sums.as_strided((25,), (1,), sums.storage_offset())[24] = 1.0
    assert "past the end of its statistics" in bench.trouble()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Epilogue(statistics=True, bias=True), r"found bias.*\+statistics.*expected statistics alone"),
        (lambda: Epilogue(statistics=True, activation="relu"), "expected statistics alone"),
        (
            lambda: small("float32"),
            "dtypes are x float32, y float32 with statistics, expected one of bfloat16, float16",
        ),
        (
            lambda: Problem.dense("dgrad", (2, 4, 6, 6), (8, 4, 3, 3), dtype="float16", epilogue=STATISTICS),
            "op is dgrad with statistics, expected fprop",
        ),
        (lambda: parse_problem(str(small()).replace("+statistics", "+statistics@4")), "'statistics@4' in an epilogue"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()


@pytest.mark.parametrize(
    ("sums", "words"),
    [
        (None, r"sums is missing, the problem says Epilogue\(statistics=True\)"),
        (torch.empty(2, 11), r"sums is \(2, 11\) float32 contiguous, expected \(2, 12\)"),
        (torch.empty(2, 12, dtype=torch.float64), r"sums is \(2, 12\) float64"),
        (torch.empty(12, 2).t(), r"with strides \(1, 2\)"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(sums: torch.Tensor | None, words: str) -> None:
    problem = small()
    plan = convplan.plan(problem, Policy(effort="instant")).build()
    inputs = random_inputs(problem, CPU)
    with pytest.raises(SpecError, match=words):
        plan.run(inputs.first, inputs.second, sums=sums)


def test_sums_for_a_problem_without_statistics_are_refused() -> None:
    problem = small().core
    inputs = random_inputs(problem, CPU)
    plan = convplan.plan(problem, Policy(effort="instant")).build()
    with pytest.raises(SpecError, match="sums is given"):
        plan.run(inputs.first, inputs.second, sums=torch.empty(2, 12))


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_convolution_with_statistics_for_a_layer(spatial: int) -> None:
    dims = (3, 8, *(6, 7, 5)[:spatial])
    x = torch.randn(dims).bfloat16().movedim(1, -1).contiguous().movedim(-1, 1)
    w = torch.randn(12, 4, *[3] * spatial).bfloat16()
    policy = Policy(effort="instant")
    for _ in range(2):  # the second call finds what the first one made
        found = convolution_with_statistics(x, w, 1, 1, 1, 2, policy)
        if spatial == 1:  # torch has no layout of that name for it
            assert found is None or found[0].shape == (3, 12, 6)
            continue
        assert found is not None
        y, sums = found
        right = getattr(torch, f"conv{spatial}d")(x.double(), w.double(), padding=1, groups=2)
        torch.testing.assert_close(y.double(), right, rtol=2e-2, atol=5e-2)
        torch.testing.assert_close(sums.double(), sums_of(y), rtol=1e-4, atol=1e-3)


def test_where_it_is_not_offered() -> None:
    x, w = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    assert convolution_with_statistics(x, w, 1, 1, 1, 1) is None  # float32
    assert convolution_with_statistics(x.half(), w.half(), 1, 1, 1, 1) is None  # not channels-last
    assert convolution_with_statistics(x.half()[:0].to(memory_format=torch.channels_last), w.half(), 1, 1, 1, 1) is None


def test_without_a_plan_torch_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4, 6, 6).half().to(memory_format=torch.channels_last)
    w = torch.randn(8, 4, 3, 3).half()
    monkeypatch.setattr("convplan.torch_ops.statistics.planned_runner", lambda *given: None)
    found = convolution_with_statistics(x, w, 1, 0, 1, 1, Policy(effort="measure", budget_s=0.111))
    assert found is not None
    torch.testing.assert_close(found[1].double(), sums_of(found[0]), rtol=1e-4, atol=1e-3)

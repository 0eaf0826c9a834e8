"""The benchmark harness: both sides compute the same thing, the samples are fair, and the totals are right.

No test here looks at a time.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import msgspec
import pytest
import torch
from helpers.fresh import fresh_process

import convplan
from convplan import _bench, _bench_calls
from convplan._bench import BenchReport, Comparison, Timing, bench_report, compare, compare_record, geometric_mean
from convplan._problem_files import NamedProblem, parse_problems

POLICY = convplan.Policy(engines=("aten",), budget_s=0.01)
ENTRY: dict[str, Any] = {
    "name": "layer",
    "op": "fprop",
    "n": 2,
    "c": 4,
    "k": 6,
    "spatial": [9, 8],
    "filter": [3, 2],
    "padding": [1, 1],
    "stride": [2, 1],
    "dilation": [1, 1],
    "groups": 2,
    "dtype": "float32",
}
LINE = {"spatial": [12], "filter": [3], "padding": [1], "stride": [2], "dilation": [1]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels-last": {"layout": "channels_last"},
    "1-D": LINE,
    "3-D": {key: [value[0]] * 3 for key, value in LINE.items()} | {"spatial": [5, 6, 7]},
    "float64-channels-last": {"layout": "channels_last", "dtype": "float64"},
    "unaligned": {"input": {"alignment_bytes": 4}},
    "asymmetric": {"padding": [[0, 1], [2, 1]]},
    "transposed": {"transposed": True, "output_padding": [1, 0]},
    "transposed-asymmetric": {"transposed": True, "padding": [[2, 0], [1, 1]]},
    "transposed-late-output-padding": {
        "transposed": True,
        "stride": [1, 2],
        "dilation": [3, 3],
        "padding": [3, [0, 2]],
        "output_padding": [2, 1],
    },
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


def named(**changes: Any) -> NamedProblem:
    (found,) = parse_problems(json.dumps({"problems": [{**ENTRY, **changes}]}).encode())
    return found


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("case", CASES)
def test_both_sides_compute_the_same(case: str, op: str) -> None:
    problem = named(op=op, **CASES[case])
    with torch.no_grad():
        stock, ours, record = _bench_calls.contenders(problem, POLICY)
        expected = stock.call()
        with ours.active():
            found = ours.call()
        assert record is not None
        if case != "unaligned":  # what torch allocates for the result is aligned, whatever the file says of it
            assert record.problem == problem.problem, "a plan made from the file is the one that the call finds"
        assert _bench_calls.runs_a_ready_plan(ours)
    assert isinstance(expected, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    assert tuple(found.shape) == problem.problem.output.dims
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_bias_is_added_on_both_sides(transposed: bool) -> None:
    with torch.no_grad():
        stock, ours, record = _bench_calls.contenders(named(bias=True, transposed=transposed), POLICY)
        with ours.active():
            torch.testing.assert_close(ours.call(), stock.call())
    assert record is not None
    assert record.problem.epilogue.bias


def test_stock_torch_is_called_as_its_user_would() -> None:
    calls = {case: _bench_calls.contenders(named(**CASES[case]), POLICY)[0].wording for case in CASES}
    assert calls == {
        "plain": "F.conv2d",
        "channels-last": "F.conv2d",
        "1-D": "F.conv1d",
        "3-D": "F.conv3d",
        "float64-channels-last": "F.conv2d",
        "unaligned": "F.conv2d",
        "asymmetric": "F.pad, F.conv2d",
        "transposed": "F.conv_transpose2d",
        "transposed-asymmetric": "F.conv_transpose2d, slice",
        "transposed-late-output-padding": "F.conv_transpose2d, slice",
    }


def test_a_comparison_holds_both_sides_samples_and_the_plan() -> None:
    found = compare(named(), POLICY, rounds=3)
    assert (found.name, found.op, found.from_plan) == ("layer", "fprop", True)
    assert found.chosen.startswith("aten[")
    assert convplan.plan(named().problem, POLICY).key == found.key
    assert len(found.stock.samples_us) == len(found.convplan.samples_us) == 3
    assert found.stock.median_us == sorted(found.stock.samples_us)[1]
    assert found.ratio == found.stock.median_us / found.convplan.median_us
    assert 1 <= found.repeats <= _bench.MAX_REPEATS


def test_a_budget_of_nothing_still_takes_the_least_number_of_rounds() -> None:
    assert len(compare(named(), POLICY, seconds=0).stock.samples_us) == _bench.MIN_ROUNDS


@pytest.mark.behaviour("B7")
def test_an_empty_problem_is_compared_without_a_plan() -> None:
    found = compare(named(n=0), POLICY, rounds=1)
    assert (found.key, found.chosen, found.from_plan) == ("", "", False)


def test_a_planned_record_can_be_compared() -> None:
    stock_us, convplan_us = compare_record(convplan.plan(named(op="dgrad").problem, POLICY), seconds=0)
    assert stock_us > 0
    assert convplan_us > 0


def test_each_round_samples_both_sides_with_the_collector_off(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def side(name: str) -> _bench_calls.Side:
        def call() -> None:
            assert not gc.isenabled()
            order.append(name)

        return _bench_calls.Side(name, call, nullcontext)

    race = _bench._Race(side("stock"), side("ours"), "cpu", seed=0)
    race.run(seconds=0, rounds=8)
    assert gc.isenabled()
    calls = _bench.SETTLING_CALLS + 1  # untimed ones before each sample of one call
    rounds = [tuple(order[i : i + 2 * calls : calls]) for i in range(0, len(order), 2 * calls)]
    assert len(rounds) == 8
    assert set(rounds) == {("stock", "ours"), ("ours", "stock")}, "shuffled, so that drift hits both"
    assert [len(timing.samples_us) for timing in race.timings()] == [8, 8]


def comparison(name: str, ratio: float, suite: str = "", **known: Any) -> Comparison:
    ours = known.pop("ours", [100.0, 100.0])
    stock = known.pop("stock", [100 * ratio] * len(ours))
    return _bench.comparison(
        named(name=name, suite=suite),
        Timing.of("F.conv2d", stock),
        Timing.of("F.conv2d", ours),
        repeats=1,
        problem="fprop float32",
        **{"from_plan": True, **known},
    )


def test_the_report_names_losses_and_the_machine_and_reads_back() -> None:
    report = bench_report([comparison("a", 2.0), comparison("b", 0.5), comparison("c", 0.98)], POLICY)
    assert report.losses == ("b",)
    assert report.geometric_mean == pytest.approx(0.98 ** (1 / 3))
    assert report.environments[0].startswith("cpu: ")
    assert f"torch {torch.__version__}" in report.environments[0]
    assert "aten" in report.policy
    assert msgspec.json.decode(msgspec.json.encode(report), type=BenchReport) == report


def test_totals_are_those_of_each_suite_and_of_all() -> None:
    compiled = Timing.of("torch.compile", [200.0])
    report = bench_report(
        [
            comparison("a", 0.975, "dense"),
            comparison("b", 4.0, "dense", compiled=compiled),
            comparison("c", 0.5, "weak"),
        ]
    )
    found = {one.suite: (one.problems, one.worst, one.below_0_98, one.below_0_97) for one in report.totals}
    assert found == {"dense": (2, 0.975, 1, 0), "weak": (1, 0.5, 1, 1), "all": (3, 0.5, 2, 1)}
    assert report.totals[0].geometric_mean == pytest.approx(math.sqrt(0.975 * 4))
    assert [one.geometric_mean_compiled for one in report.totals] == [2.0, None, 2.0]


NOISY = {"stock": [95.0, 70.0, 130.0, 95.0, 80.0], "ours": [100.0, 110.0, 90.0, 100.0, 100.0]}
SLOWER = {"stock": [90.0, 91.0, 92.0, 90.0], "ours": [100.0, 101.0, 102.0, 100.0]}


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        pytest.param({"stock": [101.0], "ours": [100.0]}, "", id="not-slower"),
        pytest.param({**SLOWER, "from_plan": False}, "not run by a plan", id="no-plan"),
        pytest.param({**SLOWER, "stock_as_is": True}, "same kernel on both sides", id="stock-as-is"),
        pytest.param(NOISY, "spread larger than the difference", id="noise"),
        pytest.param(SLOWER, "really slower", id="slower"),
    ],
)
def test_a_loss_comes_with_its_reason(known: dict[str, Any], reason: str) -> None:
    found = comparison("layer", 1.0, **known)
    assert found.reason.startswith(reason) if reason else found.reason == ""


def test_kernels_of_the_same_names_are_a_reason_and_others_are_not() -> None:
    found = comparison("layer", 1.0, **SLOWER)

    def with_kernels(stock: str, ours: str) -> str:
        return msgspec.structs.replace(
            found,
            stock=msgspec.structs.replace(found.stock, kernels=(stock,)),
            convplan=msgspec.structs.replace(found.convplan, kernels=(ours,)),
        ).reason

    assert with_kernels("gemm", "gemm") == "same kernel on both sides"
    assert with_kernels("gemm", "fft") == "really slower"


def test_ratios_of_neighbours_in_time_are_free_of_drift() -> None:
    drifting = [100.0, 200.0, 400.0, 800.0, 1600.0]
    found = comparison("layer", 1.0, stock=[1.5 * one for one in drifting], ours=drifting)
    assert (found.paired_ratio, found.paired_spread) == (1.5, 0.0)


def test_the_geometric_mean_of_a_factor_and_its_inverse_is_one() -> None:
    assert math.isclose(geometric_mean([4.0, 0.25]), 1.0)
    assert geometric_mean([]) == 1.0

"""A process for each side: what they are told, how they take turns, and what the loss of one costs. No test looks at a
time that was measured.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from helpers.fresh import fresh_process

import convplan
from convplan import _bench_child
from convplan._bench_child import Failed, Kernels, LookAtKernels, MeasureRegret, Prepare, Program, Ready, Sample, Take
from convplan._bench_processes import Bench, BenchOptions, run_bench
from convplan._problem_files import NamedProblem, parse_problems
from convplan._torch_state import adopt_torch_state, torch_state

SCRIPTED = "helpers.scripted_side"
QUICK = convplan.Policy(engines=("aten",), budget_s=0.01)
ENTRY: dict[str, Any] = {
    "name": "layer",
    "op": "fprop",
    "n": 1,
    "c": 4,
    "k": 4,
    "spatial": [8, 8],
    "filter": [3, 3],
    "padding": [1, 1],
    "stride": [1, 1],
    "dilation": [1, 1],
    "groups": 1,
    "dtype": "float32",
}


def named(name: str = "layer", **changes: Any) -> NamedProblem:
    (found,) = parse_problems(json.dumps({"problems": [{**ENTRY, "name": name, **changes}]}).encode())
    return found


def prepare(problem: NamedProblem, **changes: Any) -> Prepare:
    return Prepare(named=problem, policy=QUICK, threads=torch.get_num_threads(), **changes)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Programs that are run here, and not in a process of their own, set torch's flags and leave them."""
    cudnn, before = torch.backends.cudnn, torch_state()
    benchmark, limit = cudnn.benchmark, cudnn.benchmark_limit
    with fresh_process():
        yield
    cudnn.benchmark, cudnn.benchmark_limit = benchmark, limit
    adopt_torch_state(before)
    assert torch_state() == before


# ---- the processes


def test_each_side_runs_in_a_process_of_its_own() -> None:
    problems = [named(), named("gradient", op="wgrad", suite="weak")]
    seen: list[tuple[int, int, str]] = []
    report = run_bench(
        problems,
        QUICK,
        BenchOptions(rounds=3, regret=2, seconds=0.01),
        progress=lambda done, total, name: seen.append((done, total, name)),
    )
    assert report.failures == ()
    assert [one.name for one in report.comparisons] == ["layer", "gradient"]
    for one, problem in zip(report.comparisons, problems, strict=True):
        assert one.from_plan
        assert one.chosen.startswith("aten[")
        assert len(one.stock.samples_us) == len(one.convplan.samples_us) == 3
        assert one.ratio == one.stock.median_us / one.convplan.median_us
        assert one.regret is not None
        assert len(one.regret.regrets) == 2
        assert convplan.plan(problem.problem, QUICK).key == one.key, "planned there, found here in the store"
    assert convplan.stats()["from_store"] == 2
    assert f"threads {torch.get_num_threads()}" in report.environments[0], "as many as this process has"
    assert seen[-1] == (2, 2, "gradient")


def run_scripted(problems: list[NamedProblem], **options: Any) -> tuple[list[Any], list[Any]]:
    comparisons, failures = [], []
    with Bench(QUICK, BenchOptions(rounds=2, **options), module=SCRIPTED) as bench:
        for problem in problems:
            one, failed = bench.compare(problem)
            comparisons.append(one)
            failures += failed
    return comparisons, failures


def process_numbers(comparison: Any) -> list[str]:
    return re.findall(r"\d+", comparison.stock.call + comparison.convplan.call)


@pytest.mark.parametrize("side", ["stock", "convplan"])
@pytest.mark.parametrize(
    ("how", "reason", "is_kept"),
    [
        pytest.param("dies", "exit status 3; it said: the script says that it ends here", False, id="dies"),
        pytest.param("late", "SIGSEGV", False, id="dies-while-sampled"),
        pytest.param("hangs", "no answer within 1", False, id="hangs"),
        pytest.param("oom", "OutOfMemoryError: no room for 9 TiB", True, id="out-of-memory"),
        pytest.param("illegal", "AcceleratorError: an illegal memory access", False, id="broken-context"),
    ],
)
def test_a_lost_side_costs_its_problem_and_the_run_goes_on(side: str, how: str, reason: str, is_kept: bool) -> None:
    policy = QUICK.replace(budget_s=1e-6)
    options = BenchOptions(rounds=2, prepare_s=30.0)
    comparisons, failures = [], []
    with Bench(policy, options, module=SCRIPTED) as bench:
        for name in ("before", f"{how}-{side}", "after"):
            if how == "hangs":
                bench.options = msgspec.structs.replace(options, prepare_s=1.0 if name.startswith("hangs") else 30.0)
            one, failed = bench.compare(named(name))
            comparisons.append(one)
            failures += failed
    assert [one is not None for one in comparisons] == [True, False, True]
    assert [(one.name, one.side) for one in failures] == [(f"{how}-{side}", side)]
    assert reason in failures[0].error
    lost = 0 if side == "stock" else 1
    before, after = process_numbers(comparisons[0]), process_numbers(comparisons[2])
    assert (before[lost] == after[lost]) is is_kept, "a process is started again unless it is as good as before"
    assert before[1 - lost] == after[1 - lost], "the other side goes on"
    assert comparisons[2].ratio == 2.0


def test_a_third_side_is_compared_where_it_applies_and_never_costs_the_others() -> None:
    problems = [named("layer"), named("gradient", op="wgrad"), named("dies-compile")]
    comparisons, failures = run_scripted(problems, compile=True)
    assert [one.compiled is not None for one in comparisons] == [True, False, False]
    assert comparisons[0].compiled.median_us == 150.0
    assert [(one.name, one.side) for one in failures] == [("dies-compile", "compile")]


def test_an_answer_that_is_none_costs_the_problem() -> None:
    comparisons, failures = run_scripted([named("mumbles-stock"), named("after")])
    assert [one is not None for one in comparisons] == [False, True]
    assert "answered what is no answer" in failures[0].error


def test_nothing_is_left_running() -> None:
    with Bench(QUICK, BenchOptions(rounds=1), module=SCRIPTED) as bench:
        bench.compare(named())
        children = list(bench._children.values())
        assert len(children) == 2
    assert all(child._process.poll() is not None for child in children)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "benchmark on from the first call, torch's default limit"),
        ({"benchmark_limit": 0}, "benchmark on from the first call, no limit"),
        ({"benchmark": False}, "benchmark off"),
    ],
)
def test_the_report_says_how_stock_torch_was_set(options: dict[str, Any], words: str) -> None:
    assert run_bench([], options=BenchOptions(**options)).stock == words


# ---- one side's program


@pytest.mark.parametrize("side", ["stock", "convplan"])
def test_a_side_makes_ready_and_gives_samples(side: Any) -> None:
    program = Program(side)
    ready = program.answer(prepare(named()))
    assert isinstance(ready, Ready)
    assert ready.call == "F.conv2d"
    assert ready.from_plan == bool(ready.plan) == (side == "convplan")
    sample = program.answer(Take(2))
    assert isinstance(sample, Sample)
    assert sample.us > 0
    assert program.answer(LookAtKernels()) == Kernels(()), "there is no GPU to ask"


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is imported
def test_torch_compile_is_a_side() -> None:
    program = Program("compile")
    ready = program.answer(prepare(named(padding=[[0, 1], [1, 1]])))
    assert isinstance(ready, Ready), ready
    assert ready.call == "torch.compile(F.pad, F.conv2d)"
    assert not ready.from_plan
    assert isinstance(program.answer(Take(2)), Sample)
    assert not any(convplan.stats().values())


def test_stock_torch_is_never_run_by_convplan() -> None:
    program = Program("stock")
    for op in ("fprop", "dgrad", "wgrad"):
        assert isinstance(program.answer(prepare(named(op=op))), Ready)
        program.answer(Take(3))
    assert not any(convplan.stats().values())


def test_convplan_side_is_switched_off_between_problems() -> None:
    from convplan import _choices

    program = Program("convplan")
    program.answer(prepare(named()))
    assert _choices.state.enabled
    refused = program.answer(prepare(named(dtype="float16", device="cuda")))
    assert isinstance(refused, Failed)
    assert not _choices.state.enabled


def test_both_sides_compute_with_the_same_numbers() -> None:
    results = []
    for side in ("stock", "convplan"):
        program = Program(side)  # type: ignore[arg-type]
        program.answer(prepare(named()))
        assert program._prepared is not None
        results.append(program._prepared.side.call())
        program._forget()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param(Take(1), "no problem is prepared", id="sample"),
        pytest.param(LookAtKernels(), "no problem is prepared", id="kernels"),
        pytest.param(MeasureRegret(1, 0.1), "no problem is prepared", id="regret"),
    ],
)
def test_what_is_asked_too_early_is_answered_in_words(asked: Any, message: str) -> None:
    found = Program("convplan").answer(asked)
    assert isinstance(found, Failed)
    assert message in found.message


def test_a_problem_that_cannot_be_planned_leaves_the_process_usable() -> None:
    request = msgspec.structs.replace(prepare(named()), policy=QUICK.replace(engines=("cudnn",)))
    found = Program("convplan").answer(request)
    assert isinstance(found, Failed)
    assert (found.kind, found.usable) == ("NoPlan", True)


def test_effort_is_the_policys() -> None:
    request = msgspec.structs.replace(prepare(named()), policy=QUICK.replace(effort="instant"))
    ready = Program("convplan").answer(request)
    assert isinstance(ready, Ready)
    assert ready.plan["effort"] == "instant"
    assert ready.from_plan


def test_messages_survive_the_way_between_processes() -> None:
    requests = [prepare(named(op="dgrad", suite="dense"), benchmark_limit=0), Take(3), MeasureRegret(2, 1.0)]
    for request in requests:
        assert msgspec.json.decode(msgspec.json.encode(request), type=_bench_child.Request) == request

"""A gate behind the input's gradient, as part of its plan: ReLU's backward pass; judged, kept, refused elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import convplan
from convplan import Epilogue, Policy, Problem, SpecError, WrongResult
from convplan._bench_calls import contenders
from convplan._guards import Bench
from convplan._inputs import Inputs, random_inputs
from convplan._problem_files import with_name
from convplan._problem_text import parse_problem
from convplan._verify import Verifier
from convplan.engines import composed
from convplan.engines.base import EngineConfig, Notes

GATE = Epilogue(gate=True)
CPU = torch.device("cpu")
CONFIG = EngineConfig("someone")
TOLERANCES = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 1e-4}


def small(dtype: str = "float16", **changes: Any) -> Problem:
    settings = {"padding": 1, "layout": "channels_last", **changes}
    return Problem.dense("dgrad", (3, 8, 9, 7), (12, 8, 3, 3), dtype=dtype, epilogue=GATE, **settings)


def ungated(inputs: Inputs, stride: int = 1) -> torch.Tensor:
    """The gradient in float64."""
    dims = (3, 8, 9, 7)
    return torch.nn.grad.conv2d_input(dims, inputs.second.double(), inputs.first.double(), stride=stride, padding=1)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("into", [False, True], ids=["new", "out"])
def test_a_plan_closes_the_gate(dtype: str, layout: str, into: bool) -> None:
    problem = small(dtype, layout=layout, stride=2)
    record = convplan.plan(problem, Policy(budget_s=0.2))
    assert {evidence.config.engine for evidence in record.ranking} == {"composed"}
    inputs = random_inputs(problem, CPU)
    gate = inputs.gate
    assert gate is not None
    out = torch.full_like(gate, torch.nan) if into else None
    x = record.build().run(inputs.first, inputs.second, gate=gate, out=out)
    assert out is None or x is out
    exact = torch.where(gate > 0, ungated(inputs, 2), 0.0)
    torch.testing.assert_close(x.double(), exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert not x[gate <= 0].any()


def test_the_gate_itself_may_be_written_to() -> None:
    problem = small("float32")
    inputs = random_inputs(problem, CPU)
    assert inputs.gate is not None
    gate = inputs.gate.clone()
    convplan.plan(problem, Policy(effort="instant")).build().run(inputs.first, inputs.second, gate=gate, out=gate)
    exact = torch.where(inputs.gate > 0, ungated(inputs), 0.0)
    torch.testing.assert_close(gate.double(), exact, rtol=1e-4, atol=1e-4)


def test_made_up_gates_have_both_signs_and_zeros() -> None:
    for inputs in (random_inputs(small(), CPU), Verifier(small(), CPU).random):
        gate = inputs.gate
        assert gate is not None
        assert all(int(kind.sum()) > gate.numel() // 10 for kind in (gate > 0, gate < 0, gate == 0))
        copied = inputs.copy()
        assert copied.gate is not None
        assert copied.gate.data_ptr() != gate.data_ptr()
        assert torch.equal(copied.gate, gate)


def test_the_text_and_the_files_hold_it(tmp_path: Path) -> None:
    problem = small()
    assert str(problem).startswith("dgrad+gate float16")
    assert parse_problem(str(problem)) == problem
    assert not GATE.is_plain
    assert Epilogue() != GATE
    record = convplan.plan(problem, Policy(budget_s=0.2))
    assert record.key != convplan.plan(problem.core, Policy(budget_s=0.2)).key
    path = tmp_path / "plans.json"
    convplan.export_plans(path)
    convplan.clear_plans()
    assert convplan.import_plans(path).added == 2
    again = convplan.plan(problem, Policy(mode="replay", budget_s=0.2))
    assert (again.problem, again.ranking[0].config) == (problem, record.ranking[0].config)


def test_keys_of_problems_without_a_gate_are_what_they_were() -> None:
    from convplan._key import problem_items

    for epilogue in (Epilogue(), Epilogue(activation="relu")):
        problem = Problem.dense("fprop", (3, 8, 9, 7), (12, 8, 3, 3), epilogue=epilogue)
        assert not any("gate" in name for name, _ in problem_items(problem))
    assert ("epilogue.gate", True) in problem_items(small())


WRONG: dict[str, Any] = {
    "left open": lambda x, gate: x,
    "the other way": lambda x, gate: torch.where(gate < 0, x, 0),
    "open at zero": lambda x, gate: torch.where(gate >= 0, x, 0),
    "shifted by one": lambda x, gate: torch.where(gate.roll(1, 3) > 0, x, 0),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("notes", [Notes(), Notes(numerical=("WINOGRAD",))], ids=["direct", "transform"])
def test_wrong_gates_are_found(wrong: str, notes: Notes) -> None:
    problem = small()
    verifier = Verifier(problem, CPU)
    inputs = verifier.random
    assert inputs.gate is not None
    x = ungated(inputs).half().contiguous(memory_format=torch.channels_last)
    assert verifier.check(CONFIG, notes, torch.where(inputs.gate > 0, x, 0)) <= 1
    with pytest.raises(WrongResult, match="output"):
        verifier.check(CONFIG, notes, WRONG[wrong](x, inputs.gate))


def test_a_closed_gate_lets_nothing_through() -> None:
    verifier = Verifier(small(), CPU)
    gate = verifier.random.gate
    assert gate is not None
    x = torch.where(gate > 0, ungated(verifier.random), 0.0).half().contiguous(memory_format=torch.channels_last)
    n, c, h, w = map(int, (gate <= 0).nonzero()[5])
    x[n, c, h, w] = 1e-4  # far less than rounding allows where it is open
    with pytest.raises(WrongResult, match="the reference 0"):
        verifier.check(CONFIG, Notes(), x)


def test_a_gate_that_is_written_to_is_found() -> None:
    verifier = Verifier(small(), CPU)
    gate = verifier.random.gate
    assert gate is not None
    x = torch.where(gate > 0, ungated(verifier.random), 0.0).half().contiguous(memory_format=torch.channels_last)
    gate[0, 0, 0, 0] += 1
    with pytest.raises(WrongResult, match="wrote to its inputs"):
        verifier.check(CONFIG, Notes(), x)


def test_planning_takes_no_plan_with_a_wrong_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    run = composed._run

    def wrong(problem: Problem, core: Problem, run_core: Any) -> Any:
        right = run(problem, core, run_core)

        def upside_down(*given: Any) -> torch.Tensor:
            return right(*given[:6], -given[6])

        return upside_down

    monkeypatch.setattr(composed, "_run", wrong)
    with pytest.raises(convplan.NoPlan, match="output"):
        convplan.plan(small("bfloat16"), Policy(budget_s=0.2))


def test_a_bench_holds_the_gate_between_guards() -> None:
    problem = small()
    numbers = random_inputs(problem, CPU)
    bench = Bench(problem, numbers, CPU)
    gate = bench.inputs.gate
    assert gate is not None
    assert numbers.gate is not None
    assert gate.stride() == numbers.gate.stride()
    assert torch.equal(gate, numbers.gate)
    assert not bench.trouble()
    gate.as_strided((gate.numel() + 1,), (1,), gate.storage_offset())[-1] = 1.0
    assert "past the end of its gate" in bench.trouble()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Epilogue(gate=True, bias=True), r"found bias.*\+gate.*expected gate alone"),
        (lambda: Epilogue(gate=True, activation="relu"), "expected gate alone"),
        (lambda: Epilogue(gate=True, statistics=True), "expected statistics alone"),
        (lambda: small("float64"), "dtypes are x float64, y float64 with a gate, expected one of float32, bfloat16"),
        (lambda: small(output_dtype="float32"), "x float32, y float16 with a gate"),
        (
            lambda: Problem.dense("fprop", (2, 4, 6, 6), (8, 4, 3, 3), epilogue=GATE),
            "op is fprop with a gate, expected dgrad",
        ),
        (lambda: Problem.dense("wgrad", (2, 4, 6, 6), (8, 4, 3, 3), epilogue=GATE), "a wgrad has no epilogue"),
        (lambda: parse_problem(str(small()).replace("+gate", "+gate@4")), "'gate@4' in an epilogue"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (None, r"gate is missing, the problem says Epilogue\(gate=True\)"),
        (torch.empty(3, 8, 9, 6).half(), r"gate is \(3, 8, 9, 6\) float16, expected \(3, 8, 9, 7\) float16"),
        (torch.empty(3, 8, 9, 7), r"gate is \(3, 8, 9, 7\) float32"),
        (torch.empty(3, 8, 9, 7).half(), r"gate has strides \(504, 63, 7, 1\), expected"),
    ],
)
def test_a_gate_that_does_not_fit_is_refused(gate: torch.Tensor | None, words: str) -> None:
    problem = small()
    plan = convplan.plan(problem, Policy(effort="instant")).build()
    inputs = random_inputs(problem, CPU)
    with pytest.raises(SpecError, match=words):
        plan.run(inputs.first, inputs.second, gate=gate)


def test_a_gate_for_a_problem_without_one_is_refused() -> None:
    inputs = random_inputs(small(), CPU)
    plan = convplan.plan(small().core, Policy(effort="instant")).build()
    with pytest.raises(SpecError, match="gate is given"):
        plan.run(inputs.first, inputs.second, gate=inputs.gate)


def test_a_benchmark_times_both_ways() -> None:
    stock, ours, record = contenders(with_name(small("float32"), 0), Policy(effort="instant"))
    assert stock.wording.endswith("threshold_backward")
    assert record is not None
    with ours.active():
        torch.testing.assert_close(ours.call(), stock.call(), rtol=1e-4, atol=1e-4)


def test_where_torch_sees_nan() -> None:
    """What the page on differences says of stock torch: a NaN in the gate lets the gradient through."""
    nan = torch.tensor([torch.nan])
    assert torch.ops.aten.threshold_backward(torch.ones(1), nan, 0).item() == 1
    assert torch.ops.aten.threshold_backward(nan, torch.zeros(1), 0).item() == 0

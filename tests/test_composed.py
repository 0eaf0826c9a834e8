"""Problems with an epilogue, planned and run: engine `composed`, verification, and what remembers them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import convplan
from convplan import Epilogue, Plan, Policy, Problem, SpecError, WrongResult, _runtime
from convplan._epilogue import ACTIVATIONS
from convplan._inputs import Inputs, random_inputs
from convplan._verify import Verifier
from convplan.engines import registry
from convplan.engines.base import EngineConfig, Notes
from convplan.engines.composed import composed_config, unfused_config

POLICY = Policy(budget_s=0.01)
INSTANT = Policy(effort="instant")
NUMBERS = {"leaky_relu": (0.2,), "clamp": (-0.5, 2.0), "elu": (0.7,), "softplus": (2.0, 20.0)}
FUNCTIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "clamp": lambda x: F.hardtanh(x, -0.5, 2.0),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "elu": lambda x: F.elu(x, 0.7),
    "softplus": lambda x: F.softplus(x, 2.0),
}
PARTS = [
    {"bias": True},
    {"residual": True, "alpha": 0.5},
    {"scale": True, "bias": True},
    {"scale": True, "residual": True, "bias": True},
]


def problem_with(op: Any = "fprop", dtype: str = "float32", layout: str = "contiguous", **epilogue: Any) -> Problem:
    name = epilogue.get("activation", "none")
    return Problem.dense(
        op,
        (2, 6, 7, 9),
        (8, 3, 3, 3),
        dtype=dtype,
        layout=layout,
        padding=1,
        stride=(2, 1),
        groups=2,
        epilogue=Epilogue(parameters=NUMBERS.get(name, ()), **epilogue),
    )


def expected(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """By torch's own functions, in float64."""
    first, second = inputs.first.double(), inputs.second.double()
    stride, padding = problem.stride, [before for before, _ in problem.padding]
    if problem.op == "fprop":
        y = F.conv2d(first, second, None, stride, padding, problem.dilation, problem.groups)
    else:
        y = F.conv_transpose2d(first, second, None, stride, padding, _outer(problem), problem.groups, problem.dilation)
    if inputs.scale is not None:
        y = y * inputs.scale.double().view(-1, 1, 1)
    if inputs.residual is not None:
        y = y + problem.epilogue.alpha * inputs.residual.double()
    if inputs.bias is not None:
        y = y + inputs.bias.double().view(-1, 1, 1)
    return FUNCTIONS[problem.epilogue.activation](y)


def _outer(problem: Problem) -> list[int]:
    zipped = zip(problem.x.dims[2:], problem.y.dims[2:], problem.w.dims[2:], problem.stride, strict=True)
    return [size - ((out - 1) * step - 2 + taps) for size, out, taps, step in zipped]


def run(plan: Plan, inputs: Inputs, out: torch.Tensor | None = None) -> torch.Tensor:
    return plan.run(inputs.first, inputs.second, inputs.bias, residual=inputs.residual, scale=inputs.scale, out=out)


CASES = [
    (op, activation, parts, dtype, layout)
    for number, (op, activation, parts, dtype, layout) in enumerate(
        itertools.product(
            ("fprop", "dgrad"),
            sorted(ACTIVATIONS),
            range(len(PARTS)),
            ("float32", "float64", "bfloat16", "float16"),
            ("contiguous", "channels_last"),
        )
    )
    if number % 7 == 0 and (activation, parts) != ("none", 0)  # all pairs many times over
]


@pytest.mark.behaviour("B31")
@pytest.mark.parametrize(("op", "activation", "parts", "dtype", "layout"), CASES)
def test_composed_plans_compute_the_epilogue(op: str, activation: str, parts: int, dtype: str, layout: str) -> None:
    problem = problem_with(op, dtype, layout, activation=activation, **PARTS[parts])
    record = convplan.plan(problem, INSTANT)
    inputs = random_inputs(problem, torch.device("cpu"), seed=3)
    rank = next(place for place, one in enumerate(record.ranking) if one.config.engine == "composed")
    found, wanted = run(record.build(rank), inputs), expected(problem, inputs)
    torch.testing.assert_close(found.double(), wanted, **tolerance(dtype))
    assert found.stride() == problem.output.strides


def tolerance(dtype: str) -> dict[str, float]:
    return {
        "float64": {"rtol": 1e-12, "atol": 1e-12},
        "float32": {"rtol": 1e-5, "atol": 1e-4},
        "bfloat16": {"rtol": 0.03, "atol": 0.3},
        "float16": {"rtol": 0.004, "atol": 0.04},
    }[dtype]


@pytest.mark.behaviour("C3")
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_verifier_accepts_the_right_result_and_no_other(activation: str, dtype: str) -> None:
    problem = problem_with(activation=activation, dtype=dtype, **PARTS[3])
    verifier = Verifier(problem, torch.device("cpu"))
    right = expected(problem, verifier.random).to(verifier.random.first.dtype).contiguous()
    config = EngineConfig("one")
    assert verifier.check(config, Notes(), right) <= 1
    for name in ("bias", "residual", "scale"):
        changed = verifier.random._replace(**{name: getattr(verifier.random, name) * 1.5 + 0.25})
        if activation in ("sigmoid", "tanh", "clamp") and dtype == "float16" and name == "scale":
            continue  # most of it is at the ends
        wrong = expected(problem, changed).to(right.dtype).contiguous()
        with pytest.raises(WrongResult):
            verifier.check(config, Notes(), wrong)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_activation_that_is_left_out_is_seen(activation: str) -> None:
    problem = problem_with(activation=activation, bias=True)
    verifier = Verifier(problem, torch.device("cpu"))
    plain = problem_with(bias=True)
    with pytest.raises(WrongResult):
        verifier.check(EngineConfig("one"), Notes(), expected(plain, verifier.random).float())


def test_engines_that_do_not_fuse_are_not_asked() -> None:
    problem = problem_with(activation="relu")
    record = convplan.plan(problem, INSTANT)
    reasons = {evidence.config.engine: evidence.reason for evidence in record.rejected}
    assert "it fuses nothing with a convolution, and the problem has +relu" in reasons["matmul"]


@pytest.mark.behaviour("C1")
def test_a_second_process_finds_fused_and_unfused_plans_in_the_store() -> None:
    problem = problem_with(activation="relu", bias=True, residual=True)
    convplan.plan(problem, POLICY)
    _runtime.forget()
    before = convplan.stats()
    convplan.plan(problem, POLICY)
    convplan.plan(problem.core, POLICY)
    after = convplan.stats()
    assert after["tuned"] == before["tuned"]
    assert after["from_store"] == before["from_store"] + 2


@pytest.mark.behaviour("B15")
def test_tuning_races_composed_plans_like_any_other() -> None:
    problem = problem_with(activation="silu", bias=True)
    record = convplan.plan(problem, POLICY)
    composed = [one for one in record.ranking if one.config.engine == "composed"]
    assert composed
    assert all(one.median_us is not None and one.verified == "full" for one in composed)
    core = convplan.plan(problem.core, POLICY)
    assert unfused_config(composed[0].config) in [one.config for one in core.ranking]


def test_policies_that_name_engines_hold_for_those_behind() -> None:
    problem = problem_with(activation="relu")
    record = convplan.plan(problem, Policy(engines=("matmul",), effort="instant"))
    assert {name for name, _ in record.config.knobs if name.startswith("by_")} == {"by_matmul"}


@pytest.mark.parametrize("knobs", [{}, {"by_aten": 1, "by_fft": 1}, {"by_composed": 1}, {"by_nobody": 1}])
def test_a_composed_configuration_of_nobody_is_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(convplan.PlanRejected):
        registry.get("composed").build(problem_with(activation="relu"), EngineConfig.of("composed", **knobs), INSTANT)


def test_the_other_engines_configuration_is_kept() -> None:
    config = EngineConfig.of("aten", layout=1, path=0)
    assert unfused_config(composed_config(config)) == config


@pytest.mark.parametrize("name", ["bias", "residual", "scale"])
def test_a_plan_wants_what_its_epilogue_reads(name: str) -> None:
    problem = problem_with(activation="relu", **PARTS[3])
    plan = convplan.plan(problem, INSTANT).build()
    inputs = random_inputs(problem, torch.device("cpu"))
    with pytest.raises(SpecError, match=rf"{name} is missing, the problem says Epilogue\({name}=True\)"):
        run(plan, inputs._replace(**{name: None}))
    with pytest.raises(SpecError, match=rf"{name} is \("):
        run(plan, inputs._replace(**{name: getattr(inputs, name)[:1]}))


@pytest.mark.behaviour("B35")
def test_out_may_be_the_residual() -> None:
    problem = problem_with(activation="relu", bias=True, residual=True)
    plan = convplan.plan(problem, INSTANT).build()
    inputs = random_inputs(problem, torch.device("cpu"))
    wanted = run(plan, inputs)
    found = run(plan, inputs, out=inputs.residual)
    assert found is inputs.residual
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("dtype", "output"), [("float16", "float32"), ("bfloat16", "float32")])
def test_the_output_may_be_wider(dtype: str, output: str) -> None:
    problem = Problem.dense(
        "fprop", (2, 6, 7, 9), (8, 6, 3, 3), dtype=dtype, output_dtype=output, padding=1,
        epilogue=Epilogue(bias=True, residual=True, activation="relu"),
    )  # fmt: skip
    inputs = random_inputs(problem, torch.device("cpu"))
    found = run(convplan.plan(problem, POLICY).build(), inputs)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected(problem, inputs), rtol=1e-5, atol=1e-4)

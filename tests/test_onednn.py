"""Engine `onednn`: every epilogue that it supports comes out right and in the promised form; what it refuses, and why.

Answers are judged by `helpers.oracle`'s loop over taps in float64, and activations written from their definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import oracle

import convplan
from convplan._epilogue import ACTIVATIONS, Epilogue
from convplan._errors import PlanRejected
from convplan._policy import Policy
from convplan._problem import Op, Problem, normalize_strides
from convplan.engines.base import EngineConfig
from convplan.engines.onednn import POST_OPS, Layout, OnednnEngine

ENGINE = OnednnEngine()
POLICY = Policy()
INSTANT = Policy(effort="instant")
NUMBERS = {"leaky_relu": (0.2,), "clamp": (-0.5, 2.0), "elu": (0.7,), "softplus": (2.0, 20.0)}
DEFINITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "clamp": lambda x: torch.where(x < -0.5, -0.5, torch.where(x > 2, 2.0, x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "hardswish": lambda x: x * torch.where(x < -3, 0.0, torch.where(x > 3, 1.0, (x + 3) / 6)),
    "elu": lambda x: torch.where(x > 0, x, 0.7 * torch.expm1(x)),
    "softplus": lambda x: torch.log1p(torch.exp(2 * x)) / 2,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "2d": {"x_dims": (2, 6, 7, 9), "w_dims": (8, 6, 3, 3), "padding": 1, "stride": (2, 1)},
    "1x1": {"x_dims": (2, 6, 5, 4), "w_dims": (8, 6, 1, 1)},
    "groups": {"x_dims": (2, 6, 7, 8), "w_dims": (8, 3, 3, 2), "padding": 1, "groups": 2, "dilation": (1, 2)},
    "depthwise": {"x_dims": (2, 8, 7, 8), "w_dims": (8, 1, 3, 3), "padding": 1, "groups": 8},
    "uneven-padding": {"x_dims": (2, 6, 7, 8), "w_dims": (8, 6, 3, 4), "padding": ((1, 0), (2, 3)), "stride": 2},
    "1d": {"x_dims": (2, 6, 13), "w_dims": (8, 6, 3), "padding": 1, "stride": 2},
    "3d": {"x_dims": (1, 3, 4, 5, 6), "w_dims": (4, 3, 3, 1, 2), "padding": (1, 0, 1), "stride": (1, 2, 1)},
    "one-channel-one-pixel": {"x_dims": (3, 1, 3, 3), "w_dims": (2, 1, 3, 3)},
}
EPILOGUES: dict[str, dict[str, Any]] = {
    **{name: {"bias": True, "activation": name} for name in ACTIVATIONS},
    "relu-alone": {"activation": "relu"},
    "scale": {"scale": True, "bias": True},
    "scale-elu": {"scale": True, "activation": "elu"},
    "residual": {"residual": True},
    "residual-bias-relu": {"residual": True, "bias": True, "activation": "relu"},
    "residual-times-relu": {"residual": True, "alpha": -0.5, "bias": True, "activation": "relu"},
    "residual-gelu": {"residual": True, "bias": True, "activation": "gelu"},
    "residual-times-elu": {"residual": True, "alpha": 2.0, "activation": "elu"},
    "everything": {"residual": True, "bias": True, "scale": True, "alpha": 0.5, "activation": "leaky_relu"},
}


def problem_with(geometry: str, epilogue: str, op: Op = "fprop", **more: Any) -> Problem:
    fields = EPILOGUES[epilogue]
    numbers = NUMBERS.get(fields.get("activation", "none"), ())
    return Problem.dense(op, **GEOMETRIES[geometry], epilogue=Epilogue(**fields, parameters=numbers), **more)


class Case:
    """A problem's made-up inputs, its right answer and how far off it may be."""

    def __init__(self, problem: Problem, seed: int = 7) -> None:
        self.problem, epilogue = problem, problem.epilogue
        generator = torch.Generator().manual_seed(seed)

        def make(spec: Any, dtype: str) -> torch.Tensor:
            numbers = torch.randn(spec.dims, generator=generator).to(getattr(torch, dtype))
            return torch.empty_strided(spec.dims, spec.strides, dtype=numbers.dtype).copy_(numbers)

        def vector(dtype: str) -> torch.Tensor:
            return torch.randn(problem.output.dims[1], generator=generator).to(getattr(torch, dtype))

        first, second = (make(spec, spec.dtype) for spec in problem.inputs)
        bias = vector(problem.bias_dtype) if epilogue.bias else None
        residual = make(problem.output, problem.output_dtype) if epilogue.residual else None
        scale = vector(problem.scale_dtype) if epilogue.scale else None
        self.arguments = (first, second, bias, residual, scale)
        self.right, self.bound = self._answer()

    def _answer(self) -> tuple[torch.Tensor, torch.Tensor]:
        problem, epilogue = self.problem, self.problem.epilogue
        first, second, bias, residual, scale = (t if t is None else t.double() for t in self.arguments)
        assert first is not None
        assert second is not None
        sums = oracle.convolve(problem, first, second)
        magnitudes = oracle.convolve(problem, first.abs(), second.abs())
        channels = (-1, *[1] * problem.spatial_rank)
        if scale is not None:
            sums, magnitudes = sums * scale.view(channels), magnitudes * scale.view(channels).abs()
        if residual is not None:
            sums, magnitudes = sums + epilogue.alpha * residual, magnitudes + abs(epilogue.alpha) * residual.abs()
        if bias is not None:
            sums, magnitudes = sums + bias.view(channels), magnitudes + bias.view(channels).abs()
        right = DEFINITIONS[epilogue.activation](sums)
        # Torch's kernel behind oneDNN reads what was rounded to the output's type, and so does an addition.
        rounded = torch.finfo(getattr(torch, problem.output_dtype)).eps
        steps = right.abs() + 1.5 * (sums.abs() + (0 if residual is None else abs(epilogue.alpha) * residual.abs()))
        summed = torch.finfo(torch.float32).eps * (math.sqrt(problem.n_terms) * magnitudes + 4)
        return right, rounded * steps + 1.5 * summed

    def given_to(self, run: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        first, second, bias, residual, scale = self.arguments
        result: torch.Tensor = run(first, second, bias, out, residual, scale)
        return result

    def assert_right(self, result: torch.Tensor, label: str) -> None:
        spec = self.problem.output
        assert tuple(result.shape) == spec.dims, label
        assert str(result.dtype) == f"torch.{spec.dtype}", label
        worst = float(((result.double() - self.right).abs() / self.bound).nan_to_num(nan=math.inf).max())
        assert worst <= 1, f"{label} is {worst:.2f} times as far off as it may be"


def every_config(problem: Problem) -> Iterator[tuple[str, Any]]:
    configs = ENGINE.configs(problem, "measure")
    assert configs, f"{problem} is supported, and nothing proposed"
    for candidate in configs:
        yield str(candidate.config), ENGINE.build(problem, candidate.config, POLICY).run


def check(problem: Problem) -> None:
    case = Case(problem)
    before = [None if tensor is None else tensor.clone() for tensor in case.arguments]
    for label, run in every_config(problem):
        result = case.given_to(run)
        case.assert_right(result, label)
        assert normalize_strides(problem.output.dims, result.stride()) == problem.output.strides, label
        wide = torch.full((*problem.output.dims[::-1], 2), torch.nan, dtype=result.dtype)
        out = wide[..., 0].permute(*range(len(problem.output.dims))[::-1])
        assert case.given_to(run, out) is out
        case.assert_right(out, f"{label} into out")
        assert all(a is None or torch.equal(a, b) for a, b in zip(before, case.arguments, strict=True)), label


SUPPORTED = [
    (op, geometry, epilogue)
    for op in ("fprop", "dgrad")
    for geometry in GEOMETRIES
    for epilogue in EPILOGUES
    if ENGINE.supports(problem_with(geometry, epilogue, op)).ok  # type: ignore[arg-type]
]


@pytest.mark.behaviour("B31")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("op", "geometry", "epilogue"), SUPPORTED)
def test_what_it_supports_is_right(op: Op, geometry: str, epilogue: str, dtype: str, layout: str) -> None:
    check(problem_with(geometry, epilogue, op, dtype=dtype, layout=layout))


def test_most_combinations_are_supported() -> None:
    assert len(SUPPORTED) > 150
    assert {epilogue for _, _, epilogue in SUPPORTED} == EPILOGUES.keys() - {"none", "elu", "softplus"}
    assert {geometry for _, geometry, _ in SUPPORTED} == GEOMETRIES.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("epilogue", ["gelu", "residual-bias-relu", "everything"])
def test_16_bit_inputs_may_be_written_in_float32(epilogue: str, dtype: str) -> None:
    check(problem_with("2d", epilogue, dtype=dtype, output_dtype="float32"))


@pytest.mark.parametrize("epilogue", ["relu", "residual", "residual-bias-relu", "scale"])
@pytest.mark.parametrize("geometry", ["2d", "groups", "1d", "3d"])
def test_small_integers_come_out_exactly(geometry: str, epilogue: str) -> None:
    problem = problem_with(geometry, epilogue)
    if not ENGINE.supports(problem).ok:
        pytest.skip("refused, as the table of refusals says")
    case = Case(problem)
    case.arguments = tuple(t if t is None else t.round() for t in case.arguments)  # type: ignore[assignment]
    exact, _ = case._answer()
    for label, run in every_config(problem):
        assert torch.equal(case.given_to(run).double(), exact), label


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "geometry", "epilogue"), SUPPORTED[::3])
def test_no_convolution_goes_by_the_dispatcher(op: Op, geometry: str, epilogue: str, dtype: str) -> None:
    """Where torch fuses nothing its calls do that, and would come back to convplan."""
    problem = problem_with(geometry, epilogue, op, dtype=dtype)
    case = Case(problem)
    for label, run in every_config(problem):
        with convplan.enabled(INSTANT), convplan.capture() as seen, torch.no_grad():
            case.given_to(run)
        assert not seen.calls, label


@pytest.mark.behaviour("B31")
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_its_plans_are_planned_and_run(op: Op) -> None:
    problem = problem_with("2d", "gelu", op, dtype="bfloat16", layout="channels_last")
    record = convplan.plan(problem, Policy(budget_s=0.01, engines=("onednn", "aten")))
    assert {one.config.engine for one in record.ranking} == {"onednn", "composed"}
    case = Case(problem)
    first, second, bias, *_ = case.arguments
    for rank, one in enumerate(record.ranking):
        case.assert_right(record.build(rank).run(first, second, bias), str(one.config))


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_composed_adds_and_ends_in_one_pass_rightly(groups: int, alpha: float) -> None:
    ending = Epilogue(residual=True, bias=True, alpha=alpha, activation="relu")
    problem = Problem.dense("fprop", (2, 6, 7, 9), (8, 6 // groups, 3, 3), groups=groups, epilogue=ending)
    record = convplan.plan(problem, INSTANT)
    rank = next(place for place, one in enumerate(record.ranking) if one.config.engine == "composed")
    case = Case(problem)
    first, second, bias, residual, _ = case.arguments
    assert residual is not None
    before = residual.clone()
    case.assert_right(record.build(rank).run(first, second, bias, residual=residual), "composed")
    assert torch.equal(residual, before)


REFUSED = {
    "on a GPU": (problem_with("2d", "relu", device="cuda"), "supported: cpu"),
    "plain": (problem_with("2d", "none"), "a bias alone"),
    "float64": (problem_with("2d", "relu", dtype="float64"), "supported: float32"),
    "int8": (problem_with("2d", "relu", dtype="int8"), "supported: float32"),
    "unknown to oneDNN": (problem_with("2d", "elu"), "no elu"),
    "transposed with residual": (problem_with("2d", "residual", "dgrad"), "adds no residual"),
    "groups with residual": (problem_with("groups", "residual-gelu"), "with groups"),
    "empty": (
        Problem.dense("fprop", (0, 6, 7, 9), (8, 6, 3, 3), epilogue=Epilogue(activation="relu")),
        "empty",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refusal_says_why(what: str) -> None:
    problem, reason = REFUSED[what]
    support = ENGINE.supports(problem)
    assert not support.ok
    assert reason in support.reason
    assert not ENGINE.configs(problem, "measure")
    with pytest.raises(PlanRejected, match=reason):
        ENGINE.build(problem, EngineConfig.of("onednn", layout=0, compute=0), POLICY)


def test_onednn_switched_off_is_a_reason() -> None:
    problem = problem_with("2d", "relu")
    assert ENGINE.supports(problem).ok
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        assert "switched off" in ENGINE.supports(problem).reason
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [({"layout": 3, "compute": 0}, "3 is not a valid"), ({"layout": 0, "compute": 1}, "computed in OWN")],
)
def test_unknown_knobs_are_rejected(knobs: dict[str, int], reason: str) -> None:
    with pytest.raises(PlanRejected, match=reason):
        ENGINE.build(problem_with("2d", "relu"), EngineConfig.of("onednn", **knobs), POLICY)


def test_a_configuration_that_would_fuse_nothing_is_rejected() -> None:
    problem = problem_with("2d", "residual-gelu")
    assert {c.config.knob("layout") for c in ENGINE.configs(problem, "measure")} == {Layout.CHANNELS_LAST}
    with pytest.raises(PlanRejected, match="channels-last only"):
        ENGINE.build(problem, EngineConfig.of("onednn", layout=0, compute=0), POLICY)


@pytest.mark.parametrize("name", sorted(POST_OPS.keys() - {"none"}))
def test_what_becomes_of_nan_is_noted(name: str) -> None:
    problem = problem_with("2d", name)
    case = Case(problem)
    case.arguments[0][...] = torch.nan
    for candidate in ENGINE.configs(problem, "measure"):
        result = case.given_to(ENGINE.build(problem, candidate.config, POLICY).run)
        assert bool(result.isnan().any()) == ("DROPS_NAN" not in candidate.notes.numerical)

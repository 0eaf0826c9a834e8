"""Plans that compute the epilogue in the convolution's own graph: run, and compared with the float64 reference.

Compiling takes 0.3 to 3 s a plan, so each activation and operation is compiled once in float16, and each engine, dtype
and form with a few of them. Ready-made plans are fast, and more of them run.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from convplan import EngineConfig, Epilogue, Policy, Problem
from convplan._inputs import Inputs
from convplan._verify import Verifier, _raw
from convplan.engines._epilogues import activate
from convplan.engines._support import TORCH_DTYPES
from convplan.engines.base import Candidate
from convplan.engines.cudnn.engine import COMPILED, GENERAL, SPECIALISED, CudnnEngine
from convplan.engines.cudnn.fusion import is_specialised

ACTIVATIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "none": ("none", ()),
    "relu": ("relu", ()),
    "leaky_relu": ("leaky_relu", (0.1,)),
    "relu6": ("clamp", (0.0, 6.0)),
    "clamp": ("clamp", (-0.3, 0.7)),
    "gelu": ("gelu", ()),
    "gelu_tanh": ("gelu_tanh", ()),
    "silu": ("silu", ()),
    "sigmoid": ("sigmoid", ()),
    "tanh": ("tanh", ()),
    "hardswish": ("hardswish", ()),
    "elu": ("elu", (0.5,)),
    "softplus": ("softplus", (0.7, 20.0)),
}
READY_OF_EACH_ENGINE = 2  # plans that run of each engine that is not compiled
CUDA = torch.device("cuda")
FLOATS = ("float16", "bfloat16", "float32")


def small(op: str, dtype: str, layout: str, epilogue: Epilogue, output: str | None = None, **changes: Any) -> Problem:
    settings = {"padding": 1, "stride": 1, **changes}
    return Problem.dense(
        op, (3, 32, 14, 14), (48, 32, 3, 3), dtype=dtype, output_dtype=output, layout=layout, epilogue=epilogue,
        device="cuda", **settings,
    )  # fmt: skip


def some(problem: Problem, form: int, *, every_engine: bool = False) -> list[Candidate]:
    """Plans of a form: a few of each ready-made engine, and the first compiled one, or the first of each engine."""
    chosen: list[Candidate] = []
    seen: dict[int, int] = {}
    compiled_engines: set[int] = set()
    for one in CudnnEngine().configs(problem, "exhaustive"):
        if one.config.knob("fused") != form or one.refused or "DOWN_CONVERT_INPUTS" in one.notes.numerical:
            continue
        engine = one.config.knob("engine")
        if COMPILED in one.notes.behavior:
            if engine in compiled_engines or (compiled_engines and not every_engine):
                continue
            compiled_engines.add(engine)
        elif seen.setdefault(engine, 0) >= READY_OF_EACH_ENGINE:
            continue
        seen[engine] = seen.get(engine, 0) + 1
        chosen.append(one)
    return chosen


def check(problem: Problem, candidates: list[Candidate]) -> dict[str, float]:
    """Build and run each, in the general way and bound, and compare with the reference.

    Returns:
        What each was off by, as a share of what it may be.
    """
    assert candidates, f"cuDNN has nothing for {problem}"
    verifier, found, wrong = Verifier(problem, CUDA, tf32=True), {}, {}
    for one in candidates:
        try:
            built = CudnnEngine().build(problem, one.config, Policy())
            assert built.bind is not None
            first, bound = verifier.random.given_to(built.run), verifier.random.given_to(built.bind())
            found[str(one.config)] = verifier.check(one.config, one.notes, first)
            if one.notes.deterministic:
                assert torch.equal(_raw(first), _raw(bound)), "bound, it gives something else"
            if one.notes.direct:
                verifier.check_exactly(one.config, built.run)
        except Exception as exc:  # listed by name
            wrong[str(one.config)] = f"{type(exc).__name__}: {exc}"
    assert wrong == {}, f"{problem}"
    return found


def with_all(name: str) -> Epilogue:
    activation, parameters = ACTIVATIONS[name]
    return Epilogue(True, True, 0.5, True, activation, parameters)


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_computed_behind_scale_residual_and_bias(
    name: str, op: str, findings: dict[str, Any]
) -> None:
    problem = small(op, "float16", "channels_last", with_all(name))
    findings[f"fused-{name}-{op}"] = check(problem, some(problem, GENERAL))


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize(("dtype", "layout"), [*itertools.product(FLOATS, ("channels_last", "contiguous"))])
def test_ready_made_engines_compute_what_they_are_offered_for(
    dtype: str, layout: str, findings: dict[str, Any]
) -> None:
    for name, (activation, parameters) in ACTIVATIONS.items():
        for residual, bias in [(True, True), (True, False), (False, True)][: 3 if name == "relu" else 1]:
            epilogue = Epilogue(bias, residual, 0.5, False, activation, parameters)
            problem = small("fprop", dtype, layout, epilogue)
            if is_specialised(problem):
                ready = [one for one in some(problem, SPECIALISED) if COMPILED not in one.notes.behavior]
                findings[f"fused-ready-{name}-{dtype}-{layout}-{residual}-{bias}"] = check(problem, ready)


@pytest.mark.parametrize("op", ["fprop", "dgrad"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_compiled_engine_is_right(dtype: str, op: str, findings: dict[str, Any]) -> None:
    problem = small(op, dtype, "channels_last", Epilogue(bias=True, residual=True, activation="silu"))
    findings[f"fused-engines-{op}-{dtype}"] = check(problem, some(problem, GENERAL, every_engine=True))


@pytest.mark.parametrize(
    ("dtype", "output"),
    [("float16", "float32"), ("int8", "int8"), ("int8", "float32"), ("float8_e4m3fn", "float8_e4m3fn"),
     ("float8_e4m3fn", "bfloat16")],
)  # fmt: skip
def test_other_types_may_be_written_than_read(dtype: str, output: str, findings: dict[str, Any]) -> None:
    epilogue = Epilogue(bias=True, scale=True, activation="relu")
    problem = small("fprop", dtype, "channels_last", epilogue, output)
    findings[f"fused-{dtype}-{output}"] = check(problem, some(problem, GENERAL))


@pytest.mark.parametrize(
    ("op", "changes"), [("fprop", {"stride": 2}), ("dgrad", {"stride": 2}), ("fprop", {"padding": ((2, 0), (0, 1))})]
)
def test_windows_are_those_of_the_convolution_alone(op: str, changes: dict[str, Any]) -> None:
    problem = small(op, "float16", "channels_last", Epilogue(bias=True, residual=True, activation="relu"), **changes)
    check(problem, some(problem, SPECIALISED)[:4] if op == "fprop" else some(problem, GENERAL))


def one_plan(problem: Problem, form: int) -> tuple[EngineConfig, Any]:
    config = some(problem, form)[0].config
    return config, CudnnEngine().build(problem, config, Policy())


@pytest.mark.parametrize(
    "name", ["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "elu", "softplus", "hardswish"]
)
def test_large_numbers_before_the_activation_stay_finite(name: str) -> None:
    """The convolution of zeros is zero, so what is left is the activation of the bias."""
    activation, parameters = ACTIVATIONS[name]
    problem = small(
        "fprop", "float16", "channels_last", Epilogue(bias=True, activation=activation, parameters=parameters)
    )
    _, built = one_plan(problem, GENERAL)
    inputs = Verifier(problem, CUDA).random
    bias = torch.linspace(-300, 300, 48, device=CUDA).half()
    found = Inputs(inputs.first.zero_(), inputs.second, bias, plain=False).given_to(built.run)
    expected = activate(bias.double(), problem.epilogue).view(1, -1, 1, 1).expand(found.shape)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_what_is_not_a_number_is_told(findings: dict[str, Any]) -> None:
    """Torch's modules pass NaN on. Whether cuDNN does is written down; infinity must be what it is."""
    for name, form in (("relu", SPECIALISED), ("relu", GENERAL), ("relu6", GENERAL), ("silu", GENERAL)):
        activation, parameters = ACTIVATIONS[name]
        epilogue = Epilogue(bias=True, activation=activation, parameters=parameters)
        problem = small("fprop", "float16", "channels_last", epilogue)
        config, built = one_plan(problem, form)
        inputs = Verifier(problem, CUDA).random
        bias = torch.zeros(48, device=CUDA, dtype=torch.float16)
        bias[0], bias[1] = float("nan"), float("inf")
        found = Inputs(inputs.first.zero_(), inputs.second, bias, plain=False).given_to(built.run)
        findings[f"fused-nan-{name}-{form}"] = {"config": str(config), "nan gives": float(found[0, 0, 0, 0])}
        assert float(found[0, 1, 0, 0]) == (6.0 if name == "relu6" else float("inf"))


@pytest.mark.behaviour("B35")
@pytest.mark.behaviour("B29")
def test_the_callers_output_is_written_also_where_it_is_the_residual() -> None:
    problem = small("fprop", "float16", "channels_last", Epilogue(bias=True, residual=True, activation="relu"))
    _, built = one_plan(problem, SPECIALISED)
    inputs = Verifier(problem, CUDA).random
    expected = inputs.given_to(built.run)
    for run in (built.run, built.bind()):
        out = torch.empty_like(expected)
        assert inputs.given_to(run, out) is out
        assert torch.equal(out, expected)
        assert inputs.residual is not None
        in_place = inputs.residual.clone(memory_format=torch.preserve_format)
        given = inputs._replace(residual=in_place)
        assert given.given_to(run, in_place) is in_place
        assert torch.equal(in_place, expected)
        other = torch.empty(expected.shape, dtype=TORCH_DTYPES["float16"], device=CUDA)  # another layout
        assert torch.equal(inputs.given_to(run, other), expected)


@pytest.mark.behaviour("B30")
def test_a_bias_of_zeros_stands_in_on_every_stream_and_in_a_graph() -> None:
    """A specialised graph has a bias also where the problem has none."""
    problem = small("fprop", "float16", "channels_last", Epilogue(residual=True, activation="relu"))
    config, built = one_plan(problem, SPECIALISED)
    inputs = Verifier(problem, CUDA).random
    expected = inputs.given_to(built.run)
    assert Verifier(problem, CUDA).check(config, some(problem, SPECIALISED)[0].notes, expected) <= 1
    fresh = CudnnEngine().build(problem, config, Policy())  # its first run is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = inputs.given_to(fresh.run)
    graph.replay()
    assert torch.equal(captured, expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = inputs.given_to(fresh.bind())
    side.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize("form", [SPECIALISED, GENERAL])
def test_a_restored_plan_gives_the_same_bits(form: int) -> None:
    problem = small(
        "fprop", "float16", "channels_last", Epilogue(bias=True, residual=True, alpha=0.5, activation="relu")
    )
    config, built = one_plan(problem, form)
    inputs = Verifier(problem, CUDA).random
    again = CudnnEngine().restore(problem, config, Policy(), built.serialize())
    assert torch.equal(inputs.given_to(again.run), inputs.given_to(built.run))


@pytest.mark.parametrize(("dtype", "layout"), [*itertools.product(FLOATS, ("channels_last", "contiguous"))])
def test_a_bias_alone_is_added_in_the_same_kernel(dtype: str, layout: str, findings: dict[str, Any]) -> None:
    problem = small("fprop", dtype, layout, Epilogue(bias=True))
    ready = [one for one in some(problem, SPECIALISED) if COMPILED not in one.notes.behavior]
    findings[f"fused-bias-{dtype}-{layout}"] = check(problem, ready)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_what_is_added_may_lie_anywhere(layout: str) -> None:
    """At addresses that only the elements' size divides."""
    aligned = {"bias_alignment_bytes": 2, "residual_alignment_bytes": 2}
    problem = small("fprop", "float16", layout, Epilogue(bias=True, residual=True, activation="relu", **aligned))
    check(problem, some(problem, SPECIALISED) + (some(problem, GENERAL)[:1] if layout == "channels_last" else []))


def test_a_bias_alone_may_lie_anywhere() -> None:
    """With gaps, or at an address that only its own size divides, as a view of a flat parameter does."""
    problem = small("fprop", "float16", "channels_last", Epilogue(bias=True))
    verifier = Verifier(problem, CUDA)
    first, second, bias = verifier.random[:3]
    assert bias is not None
    apart = torch.empty(2 * len(bias), dtype=bias.dtype, device=CUDA)[::2].copy_(bias)
    shifted = torch.empty(len(bias) + 1, dtype=bias.dtype, device=CUDA)[1:].copy_(bias)
    for one in some(problem, SPECIALISED)[:6]:
        if COMPILED in one.notes.behavior:
            continue
        built = CudnnEngine().build(problem, one.config, Policy())
        assert built.bind is not None
        for run in (built.run, built.bind()):
            right = run(first, second, bias, None)
            for other in (apart, shifted):
                assert torch.equal(run(first, second, other, None), right)

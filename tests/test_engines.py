"""Every registered engine on every named case: right, in the promised form, and refusing only what the table says.

The matrix is over the live registry, so registering an engine tests it, and `helpers.support` is the one place that
says what an engine may refuse. Answers are judged by `helpers.oracle`, which shares no code with any engine.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import pytest
import torch
from helpers import oracle
from helpers.cases import CASES, DTYPE_NAMES, GROUPED, Case, case, with_ops
from helpers.support import REFUSALS, refusal

from convplan._errors import PlanRejected
from convplan._policy import Policy
from convplan._problem import Op, Problem, TensorSpec, normalize_strides
from convplan.engines import registry
from convplan.engines.base import Built, Candidate, EngineConfig

POLICY = Policy(deterministic=False, allow_tf32=False)
SEED = 20

pytestmark = pytest.mark.filterwarnings("error")

# What `composed` runs is an engine's plan of another problem: tests/test_composed.py.
every_engine = pytest.mark.parametrize("name", [name for name in registry.names() if name != "composed"])
every_dtype = pytest.mark.parametrize("dtype", DTYPE_NAMES)
every_case = pytest.mark.parametrize(
    ("shape", "op"), [pytest.param(shape, op, id=f"{shape.id}-{op}") for shape, op in with_ops()]
)


@functools.lru_cache(maxsize=4096)
def random_case(problem: Problem) -> tuple[oracle.Inputs, oracle.Answer]:
    """Inputs and right answer, worked out once and shared by all engines (the inputs are never written to)."""
    inputs = oracle.make_inputs(problem, SEED)
    return inputs, oracle.answer(problem, inputs)


@functools.lru_cache(maxsize=4096)
def integer_case(problem: Problem) -> tuple[oracle.Inputs, oracle.Answer]:
    """The same for small integers."""
    inputs = oracle.small_integers(problem, SEED)
    return inputs, oracle.answer(problem, inputs)


def candidates(name: str, problem: Problem) -> Iterator[tuple[Candidate, Built]]:
    """What an engine proposes, built; nothing where the table says that it refuses."""
    engine = registry.get(name)
    if refusal(name, problem) is not None:
        return
    for candidate in engine.configs(problem, "measure"):
        yield candidate, engine.build(problem, candidate.config, POLICY)


def odd_out(spec: TensorSpec) -> torch.Tensor:
    """A tensor of the output's dims, full of NaN, whose strides are no layout's."""
    wide = torch.full((*spec.dims[::-1], 2), torch.nan, dtype=getattr(torch, spec.dtype))
    return wide[..., 0].permute(*range(len(spec.dims))[::-1])


def has_form(result: torch.Tensor, spec: TensorSpec) -> bool:
    strides = normalize_strides(spec.dims, result.stride())
    return tuple(result.shape) == spec.dims and strides == spec.strides and f"torch.{spec.dtype}" == str(result.dtype)


# --- the matrix -------------------------------------------------------------------------------------------------------


@every_dtype
@every_case
@every_engine
def test_every_config_is_right(name: str, shape: Case, op: Op, dtype: str) -> None:
    """One test for all that holds of a candidate: building it again for each claim would take most of the time."""
    problem = shape.problem(op, dtype)
    engine = registry.get(name)
    support, expected = engine.supports(problem), refusal(name, problem)
    assert support.ok == (expected is None), f"{name} says {support.reason!r}, the table says {expected!r}"
    if expected is not None:
        assert expected in support.reason
        return
    assert engine.configs(problem, "measure"), f"{name} supports the problem and proposes nothing"
    inputs, right = random_case(problem)
    integers, exact = integer_case(problem)
    before = [None if tensor is None else tensor.clone() for tensor in inputs]
    for candidate, built in candidates(name, problem):
        label = str(candidate.config)
        result = built.run(*inputs, None)
        assert has_form(result, problem.output), f"{label}: {tuple(result.shape)} {result.stride()} {result.dtype}"
        assert oracle.worst(result, right, oracle.bound_for(problem, right, candidate.notes)) <= 1, label
        assert all(b is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True)), (
            f"{label}: input changed"
        )

        out = odd_out(problem.output)
        assert built.run(*integers, out) is out, f"{label} returns another tensor than out"
        if candidate.notes.direct:
            assert torch.equal(out, exact.reference.to(out.dtype)), f"{label}: small integers are not exact"
        else:
            assert oracle.worst(out, exact, oracle.bound_for(problem, exact, candidate.notes)) <= 1, f"{label} into out"


# --- behaviour, on a few cases ----------------------------------------------------------------------------------------

TYPICAL = [case("2d-k3"), case("stem-7x7"), case("depthwise"), case("1d-dilated"), case("1x1-channels-last")]
typical = pytest.mark.parametrize(
    ("shape", "op"), [pytest.param(shape, op, id=f"{shape.id}-{op}") for shape, op in with_ops(tuple(TYPICAL))]
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@typical
@every_engine
def test_two_threads_at_once_get_the_same_bits(name: str, shape: Case, op: Op, dtype: str) -> None:
    problem = shape.problem(op, dtype)
    inputs, _ = random_case(problem)
    for candidate, built in candidates(name, problem):
        if not candidate.notes.deterministic:
            continue
        alone = built.run(*inputs, None)
        start = threading.Barrier(2)
        found: list[torch.Tensor] = []

        def work(run=built.run, start=start, found=found) -> None:  # type: ignore[no-untyped-def]
            start.wait()
            found.extend(run(*inputs, None) for _ in range(3))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        assert all(torch.equal(alone, other) for other in found), str(candidate.config)


@typical
@every_engine
def test_out_with_the_outputs_own_strides_is_filled(name: str, shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    inputs, right = random_case(problem)
    spec = problem.output
    for candidate, built in candidates(name, problem):
        out = torch.full((spec.numel,), torch.nan).as_strided(spec.dims, spec.strides)
        assert built.run(*inputs, out) is out
        assert oracle.worst(out, right, oracle.bound_for(problem, right, candidate.notes)) <= 1


@typical
@every_engine
def test_instant_proposes_some_of_what_measure_proposes(name: str, shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    engine = registry.get(name)
    instant = {c.config for c in engine.configs(problem, "instant")}
    measure = [c.config for c in engine.configs(problem, "measure")]
    assert instant <= set(measure)
    assert len(measure) == len(set(measure)), "a configuration is proposed twice"
    assert instant or refusal(name, problem) is not None


@typical
@every_engine
def test_proposing_and_building_agree_on_workspace(name: str, shape: Case, op: Op) -> None:
    for candidate, built in candidates(name, shape.problem(op, "float32")):
        assert built.workspace_bytes >= 0
        assert candidate.workspace_bytes in (None, built.workspace_bytes)


@every_engine
def test_an_empty_problem_is_refused_with_a_reason(name: str) -> None:
    problem = Problem.dense("fprop", (0, 3, 6, 6), (4, 3, 3, 3))
    support = registry.get(name).supports(problem)
    assert not support.ok
    assert support.reason


# --- matmul's own knobs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({}, "knob missing"),
        ({"method": 99}, "99 is not a valid Method"),
        ({"method": 1, "layout": 7}, "7 is not a valid Layout"),
        ({"method": 1, "chunk": -1}, "chunk is -1"),
        ({"method": 1, "speed": 1}, "unknown knobs.*speed"),
        ({"method": 1, "compute": 1}, "expected OWN for float32"),
    ],
)
def test_matmul_rejects_knobs_without_meaning(knobs: dict[str, int], reason: str) -> None:
    problem = case("2d-k3").problem("fprop", "float32")
    with pytest.raises(PlanRejected, match=reason):
        registry.get("matmul").build(problem, EngineConfig.of("matmul", **knobs), POLICY)


@pytest.mark.parametrize(
    ("shape", "op", "dtype", "knobs", "reason"),
    [
        ("2d-k3", "wgrad", "float32", {"method": 3}, "scatter does fprop and dgrad"),
        ("groups", "fprop", "float32", {"method": 1, "layout": 1}, "need groups = 1"),
        ("2d-k3", "fprop", "bfloat16", {"method": 2}, "expected compute = FLOAT32"),
    ],
)
def test_matmul_says_which_methods_do_not_combine(
    shape: str, op: Op, dtype: str, knobs: dict[str, int], reason: str
) -> None:
    with pytest.raises(PlanRejected, match=reason):
        registry.get("matmul").build(case(shape).problem(op, dtype), EngineConfig.of("matmul", **knobs), POLICY)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("method", [1, 2, 3, 4])
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_matmul_gives_the_same_sums_in_any_number_of_pieces(op: Op, method: int, layout: int, chunk: int) -> None:
    problem = case("stem-7x7", x=(5, 3, 11, 10)).problem(op, "float64")
    inputs, right = random_case(problem)
    if (op, method) == ("wgrad", 3):
        return
    config = EngineConfig.of("matmul", method=method, layout=layout, chunk=chunk)
    result = registry.get("matmul").build(problem, config, POLICY).run(*inputs, None)
    assert oracle.worst(result, right, right.bound) <= 1


def test_matmul_needs_less_workspace_in_smaller_pieces() -> None:
    problem = case("stem-7x7", x=(8, 3, 32, 32)).problem("fprop", "float32")
    build = registry.get("matmul").build
    sizes = [
        build(problem, EngineConfig.of("matmul", method=1, chunk=chunk), POLICY).workspace_bytes for chunk in (1, 2, 0)
    ]
    assert sizes == sorted(set(sizes))


# --- the judges are judged --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_the_oracle_rejects_a_dropped_tap(op: Op) -> None:
    problem = case("2d-k3").problem(op, "float32")
    inputs, right = random_case(problem)
    complete = right.reference.float()
    assert oracle.worst(complete, right, right.bound) <= 1
    if op == "wgrad":
        dropped = complete.clone()
        dropped[..., 0, 2] = 0
    else:
        second = inputs.second.double().clone()
        second[..., 0, 2] = 0
        dropped = oracle.convolve(problem, inputs.first.double(), second).float()
    assert oracle.worst(dropped, right, right.bound) > 1000


def test_the_oracle_rejects_what_is_not_a_number() -> None:
    problem = case("2d-k3").problem("fprop", "float32")
    _, right = random_case(problem)
    result = right.reference.float()
    result[0, 0, 0, 0] = torch.nan
    assert oracle.worst(result, right, right.bound) == float("inf")


def test_the_oracle_knows_a_convolution_done_by_hand() -> None:
    problem = Problem.dense("fprop", (1, 1, 5), (1, 1, 2), dtype="float64", padding=((1, 0),), stride=2)
    x, w = torch.tensor([[[1.0, 2, 3, 4, 5]]]).double(), torch.tensor([[[10.0, 1]]]).double()
    assert oracle.convolve(problem, x, w).tolist() == [[[1.0, 23.0, 45.0]]]
    gradient = Problem.dense("dgrad", (1, 1, 5), (1, 1, 2), dtype="float64", padding=((1, 0),), stride=2)
    assert oracle.convolve(gradient, torch.ones(1, 1, 3).double(), w).tolist() == [[[1.0, 10.0, 1.0, 10.0, 1.0]]]
    weight = Problem.dense("wgrad", (1, 1, 5), (1, 1, 2), dtype="float64", padding=((1, 0),), stride=2)
    assert oracle.convolve(weight, x, torch.ones(1, 1, 3).double()).tolist() == [[[6.0, 9.0]]]


def test_inputs_have_the_problems_form() -> None:
    for shape in GROUPED["layout"]:
        for op in shape.ops:
            problem = shape.problem(op, "float32")
            made = oracle.make_inputs(problem, SEED)
            for tensor, spec in zip(made[:2], problem.inputs, strict=True):
                assert has_form(tensor, spec)
                assert tensor.data_ptr() % spec.alignment_bytes == 0
                assert spec.alignment_bytes == 32 or tensor.data_ptr() % (2 * spec.alignment_bytes)


def test_case_ids_are_unique_and_every_refusal_refuses_something() -> None:
    ids = [shape.id for shape in CASES]
    assert len(ids) == len(set(ids))
    for row in REFUSALS:
        assert row.engine in registry.names()
        assert any(row.when(shape.problem(op, "float32")) for shape, op in with_ops())

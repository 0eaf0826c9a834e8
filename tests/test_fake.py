"""The `fake` engine: right answers, scripted time and scripted failures, each as its table says."""

from __future__ import annotations

import time

import pytest
import torch
from helpers import oracle

from convplan._epilogue import Epilogue
from convplan._errors import EngineUnavailable, PlanRejected, SpecError
from convplan._policy import Policy
from convplan._problem import OPS, Op, Problem, normalize_strides
from convplan.engines import registry
from convplan.engines.base import Engine, EngineConfig, Notes, Run
from convplan.engines.fake import DANGEROUS, FAILURES, SLOW, Failure, FakeCandidate, FakeEngine, VirtualClock, remade

POLICY = Policy()
PROBLEM = Problem.dense("fprop", (2, 3, 7, 6), (4, 3, 3, 3), padding=1, layout="channels_last")
INPUTS = oracle.make_inputs(PROBLEM, seed=3)
RIGHT = oracle.answer(PROBLEM, INPUTS)


def scripted(*script: FakeCandidate, clock: VirtualClock | None = None) -> FakeEngine:
    return FakeEngine(script, clock=clock or VirtualClock())


def built(engine: FakeEngine, index: int = 0) -> Run:
    return engine.build(PROBLEM, EngineConfig.of(engine.name, index=index), POLICY).run


def is_right(result: torch.Tensor) -> bool:
    return oracle.worst(result, RIGHT, RIGHT.bound) <= 1


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_answers_are_right_and_exact_on_integers(op: Op, dtype: str) -> None:
    problem = Problem.dense(
        op,
        (2, 4, 9, 8),
        (6, 2, 3, 2),
        dtype=dtype,
        padding=[(2, 0), (0, 1)],
        stride=(2, 1),
        dilation=(1, 2),
        groups=2,
        epilogue=Epilogue(bias=op != "wgrad"),
    )
    inputs = oracle.small_integers(problem, seed=1)
    run = scripted(FakeCandidate()).build(problem, EngineConfig.of("fake", index=0), POLICY).run
    result = run(*inputs, None)
    assert torch.equal(result, oracle.answer(problem, inputs).reference.to(result.dtype))
    assert normalize_strides(problem.output.dims, result.stride()) == problem.output.strides


def test_out_is_written_and_returned() -> None:
    out = torch.full((*PROBLEM.output.dims, 2), torch.nan)[..., 1]
    assert built(scripted(FakeCandidate()))(*INPUTS, out) is out
    assert is_right(out)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [name for name in FAILURES if name not in DANGEROUS])
def test_every_failure_is_the_one_its_name_says(fails: Failure) -> None:
    engine = scripted(FakeCandidate(fails=fails, good_runs=1))
    if fails in ("unavailable", "build"):
        with pytest.raises(EngineUnavailable if fails == "unavailable" else PlanRejected, match="fake"):
            built(engine)
        assert (engine.builds, engine.runs) == ([1], [0])
        return
    run = built(engine)
    first, second, bias = (None if tensor is None else tensor.clone() for tensor in INPUTS)
    assert first is not None
    assert second is not None
    if fails in ("run", "memory"):
        with pytest.raises(torch.OutOfMemoryError if fails == "memory" else RuntimeError, match="the script says"):
            run(first, second, bias, None)
        return
    result = run(first, second, bias, None)
    has_form = result.shape == RIGHT.reference.shape and (
        normalize_strides(PROBLEM.output.dims, result.stride()) == PROBLEM.output.strides
    )
    assert has_form == (fails not in ("shape", "strides"))
    if fails != "shape":
        assert is_right(result) == (fails in ("", "late", "strides", "slow"))
    assert bool(result.isnan().any()) == (fails == "nan")
    assert torch.equal(first, INPUTS.first) == (fails != "writes_input")
    if fails == "late":
        with pytest.raises(RuntimeError, match="the script says"):
            run(first, second, bias, None)


@pytest.mark.parametrize("fails", DANGEROUS)
def test_dangerous_failures_refuse_to_happen_outside_of_a_worker(fails: Failure) -> None:
    with pytest.raises(RuntimeError, match=f"'{fails}' .* for a worker process only"):
        built(scripted(FakeCandidate(fails=fails)))(*INPUTS, None)


def test_slow_takes_that_many_times_as_long() -> None:
    clock = VirtualClock()
    built(scripted(FakeCandidate(time_us=10, fails="slow"), clock=clock))(*INPUTS, None)
    assert clock() == 10 * SLOW * 1_000


def test_a_remade_engine_has_the_same_name_script_and_refusal() -> None:
    engine = FakeEngine([FakeCandidate(time_us=3, fails="nan")], name="other", refuses="no")
    maker, payload = engine.remake()
    assert maker == "convplan.engines.fake:remade"
    again = remade(payload)
    assert (again.name, again.script, again.refuses) == (engine.name, engine.script, engine.refuses)


def test_the_space_holds_what_is_not_proposed() -> None:
    engine = scripted(FakeCandidate(), FakeCandidate(proposed=False, workspace_bytes=7))
    assert [one.config.knob("index") for one in engine.configs(PROBLEM, "measure")] == [0]
    (space,) = engine.spaces(PROBLEM)
    assert space.free == (("index", (0, 1)),)
    assert engine.candidate(PROBLEM, EngineConfig.of("fake", index=1)).workspace_bytes == 7
    with pytest.raises(PlanRejected, match="index is 2, the script has 2"):
        engine.candidate(PROBLEM, EngineConfig.of("fake", index=2))


def test_a_failure_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(SpecError, match="fails is 'sometimes', expected one of '', 'unavailable', 'build'"):
        FakeCandidate(fails="sometimes")  # type: ignore[arg-type]


def test_an_index_beyond_the_script_is_rejected() -> None:
    with pytest.raises(PlanRejected, match=r"fake\[index=2\]: index is 2, the script has 1"):
        built(scripted(FakeCandidate()), index=2)


def test_problems_can_be_refused() -> None:
    assert FakeEngine(refuses="not on a Sunday").supports(PROBLEM).reason == "not on a Sunday"
    assert FakeEngine().supports(PROBLEM).ok
    assert not FakeEngine().supports(Problem.dense("fprop", (0, 1, 5), (1, 1, 3))).ok


# --- time and counts --------------------------------------------------------------------------------------------------


def test_virtual_time_follows_the_script() -> None:
    clock = VirtualClock()
    run = built(scripted(FakeCandidate(time_us=100, jitter_us=7, first_us=500), clock=clock))
    seen_us = []
    for _ in range(7):
        before = clock()
        run(*INPUTS, None)
        seen_us.append((clock() - before) / 1e3)
    assert seen_us == [600, 107, 93, 100, 107, 93, 100]


def test_a_virtual_clock_moves_only_when_told() -> None:
    clock = VirtualClock()
    assert clock() == clock() == 0
    clock.advance(1.5)
    assert clock() == 1500


def test_without_a_clock_time_really_passes() -> None:
    run = built(FakeEngine([FakeCandidate(time_us=30_000)]))
    begin = time.perf_counter()
    run(*INPUTS, None)
    assert time.perf_counter() - begin >= 0.03


def test_builds_and_runs_are_counted_for_each_entry() -> None:
    engine = scripted(FakeCandidate(), FakeCandidate(fails="build"), FakeCandidate())
    for index, runs in ((0, 2), (2, 3)):
        run = built(engine, index)
        for _ in range(runs):
            run(*INPUTS, None)
    with pytest.raises(PlanRejected):
        built(engine, 1)
    assert engine.builds == [1, 1, 1]
    assert engine.runs == [2, 0, 3]


# --- as an engine -----------------------------------------------------------------------------------------------------


def test_candidates_say_what_the_script_says() -> None:
    notes = Notes(numerical=("NONDETERMINISTIC",))
    engine = FakeEngine(
        [
            FakeCandidate(notes=notes, workspace_bytes=None, built_workspace_bytes=64, flops=10.0, source="fallback"),
            FakeCandidate(workspace_bytes=32),
        ],
        name="mine",
    )
    first, second = engine.configs(PROBLEM, "measure")
    assert [str(first.config), str(second.config)] == ["mine[index=0]", "mine[index=1]"]
    assert (first.notes, first.workspace_bytes, first.flops, first.source) == (notes, None, 10.0, "fallback")
    assert engine.build(PROBLEM, first.config, POLICY).workspace_bytes == 64
    assert engine.build(PROBLEM, second.config, POLICY).workspace_bytes == 32


def test_it_is_registered_and_takes_part_only_when_named() -> None:
    engine = registry.get("fake")
    assert isinstance(engine, Engine)
    assert len(engine.configs(PROBLEM, "measure")) == 2
    assert engine not in registry.allowed(None)
    assert registry.allowed(("fake",)) == [engine]

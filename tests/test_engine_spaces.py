"""Every engine that can be walked: its space holds what it proposes, and it describes both alike."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.cases import CASES, with_ops

from convplan import EngineConfig, PlanRejected, Policy, Problem
from convplan._problem import OPS
from convplan.engines import registry
from convplan.engines.base import Searchable

WALKED = [name for name in registry.names() if isinstance(registry.get(name), Searchable)]
SOME = CASES[::3]
LONG = Problem.dense("fprop", (1, 2, 5_000), (2, 2, 100))


def test_those_with_knobs_can_be_walked() -> None:
    assert set(WALKED) == {"cudnn", "matmul", "fft", "fake"}


@pytest.mark.behaviour("C4")
@pytest.mark.parametrize("name", ["matmul", "fft", "fake"])
@pytest.mark.parametrize("op", OPS)
def test_proposals_lie_inside_the_space_and_are_described_alike(name: str, op: Any) -> None:
    engine, seen = registry.get(name), 0
    assert isinstance(engine, Searchable)
    for case, its in with_ops(SOME):
        if its != op:
            continue
        problem = case.problem(op, "float32")
        spaces = engine.spaces(problem) if engine.supports(problem).ok else ()
        for candidate in engine.configs(problem, "measure"):
            inside = [space for space in spaces if not space.fixed]
            assert len(inside) == 1
            free = dict(inside[0].free)
            assert set(free) == {knob for knob, _ in candidate.config.knobs}, case.id
            assert all(value in free[knob] for knob, value in candidate.config.knobs), (case.id, str(candidate.config))
            assert engine.candidate(problem, candidate.config) == candidate
            seen += 1
    assert seen


@pytest.mark.parametrize("name", ["matmul", "fft"])
def test_what_a_space_holds_builds_or_is_refused_as_a_candidate_already(name: str) -> None:
    """No configuration passes `candidate` and then fails to build."""
    engine = registry.get(name)
    assert isinstance(engine, Searchable)
    built = 0
    for problem in (LONG, *(case.problem("fprop", "float32") for case in SOME[:6])):
        for space in engine.spaces(problem):
            for knob, values in space.free:
                others = {other: rest[0] for other, rest in space.free if other != knob}
                for value in values:
                    config = EngineConfig.of(name, **{**others, knob: value})
                    try:
                        candidate = engine.candidate(problem, config)
                    except PlanRejected:
                        continue
                    assert engine.build(problem, config, Policy()).workspace_bytes == candidate.workspace_bytes
                    built += 1
    assert built > 10


@pytest.mark.parametrize(
    "config",
    [EngineConfig.of("fft", block=1), EngineConfig.of("fft"), EngineConfig.of("fft", block=64, other=1)],
    ids=str,
)
def test_what_fft_cannot_be_set_to_is_no_candidate(config: EngineConfig) -> None:
    engine = registry.get("fft")
    assert isinstance(engine, Searchable)
    with pytest.raises(PlanRejected):
        engine.candidate(SOME[0].problem("fprop", "float32"), config)

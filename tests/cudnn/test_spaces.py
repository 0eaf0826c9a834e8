"""What cuDNN's engines can be set to: the ranges it tells are the ranges it takes, and hold all that it proposes."""

from __future__ import annotations

from typing import Any

import pytest

from convplan import EngineConfig, PlanRejected, Policy, Problem, TensorSpec
from convplan.engines.base import Searchable, Space
from convplan.engines.cudnn.engine import COMPILED, CudnnEngine
from convplan.engines.cudnn.errata import Errata

POLICY = Policy()


def problem(op: str = "fprop", x: Any = (2, 32, 12, 12), w: Any = (32, 32, 3, 3), **changes: Any) -> Problem:
    settings = {"dtype": "float16", "layout": "channels_last", "padding": 1, "device": "cuda", **changes}
    return Problem.dense(op, x, w, **settings)


PROBLEMS = {
    "fprop-f16": problem(),
    "dgrad-bf16": problem("dgrad", dtype="bfloat16"),
    "wgrad-f32": problem("wgrad", dtype="float32", layout="contiguous"),
    "grouped": problem(x=(2, 64, 9, 9), w=(64, 16, 3, 3), groups=4),
    "3d": problem(x=(1, 16, 6, 6, 6), w=(32, 16, 3, 3, 3)),
    "int8": problem(dtype="int8", output_dtype="int32"),
    "strided-input": Problem(
        op="fprop",
        x=TensorSpec((2, 32, 12, 12), (2 * 32 * 144, 144, 12, 1), "float16"),
        w=TensorSpec.dense((32, 32, 3, 3), "float16"),
        y=TensorSpec.dense((2, 32, 10, 10), "float16"),
        padding=((0, 0), (0, 0)),
        stride=(1, 1),
        dilation=(1, 1),
        device="cuda",
    ),
}


def holds(space: Space, config: EngineConfig) -> bool:
    knobs = dict(config.knobs)
    if any(knobs.pop(name, None) != value for name, value in space.fixed):
        return False
    free = dict(space.free)
    return set(knobs) <= set(free) and all(value in free[name] for name, value in knobs.items())


def test_the_engine_says_that_its_knobs_can_be_walked(cudnn: CudnnEngine) -> None:
    assert isinstance(cudnn, Searchable)


@pytest.mark.behaviour("C4")
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_proposal_lies_inside_one_space_and_is_described_alike(cudnn: CudnnEngine, name: str) -> None:
    asked = PROBLEMS[name]
    spaces = cudnn.spaces(asked)
    proposals = cudnn.configs(asked, "measure")
    assert proposals
    assert [str(one.config) for one in proposals if sum(holds(space, one.config) for space in spaces) != 1] == []
    for one in proposals:
        found = cudnn.candidate(asked, one.config)
        assert (found.config, found.notes, found.refused) == (one.config, one.notes, one.refused)
        assert found.workspace_bytes in (one.workspace_bytes, None)


@pytest.mark.parametrize("name", ["fprop-f16", "wgrad-f32", "grouped"])
def test_no_value_above_a_range_is_taken_and_refusals_within_are_cudnns_own(cudnn: CudnnEngine, name: str) -> None:
    """One knob at a time, the others as a proposal has them. -1, below every range, leaves a knob to its engine."""
    asked = PROBLEMS[name]
    proposals = {one.config.knob("engine"): one.config for one in cudnn.configs(asked, "measure")}
    taken, refused, above = 0, set(), 0
    for space in cudnn.spaces(asked):
        config = proposals.get(dict(space.fixed)["engine"])
        if config is None or not holds(space, config):
            continue
        for knob, values in space.free:
            for value in (values[0], values[-1]):
                try:
                    assert cudnn.candidate(asked, changed(config, knob, value)).config.knob(knob) == value
                    taken += 1
                except PlanRejected as exc:
                    refused.add(exc.reason)
            with pytest.raises(PlanRejected, match="cudnnBackend"):
                cudnn.candidate(asked, changed(config, knob, values[-1] + 1))
            above += 1
    assert taken >= 10
    assert above >= 10
    assert all("cudnnBackend" in reason for reason in refused)


def changed(config: EngineConfig, knob: str, value: int) -> EngineConfig:
    return EngineConfig.of(config.engine, **{**dict(config.knobs), knob: value})


def test_building_at_the_ends_works_or_is_refused_in_cudnns_words(cudnn: CudnnEngine) -> None:
    """With engines that need no compiler, whose refusals and builds take milliseconds."""
    asked = PROBLEMS["fprop-f16"]
    built, refused = 0, set()
    for space in cudnn.spaces(asked):
        for end in (0, -1):
            config = EngineConfig.of("cudnn", **dict(space.fixed), **{name: values[end] for name, values in space.free})
            try:
                if COMPILED in cudnn.candidate(asked, config).notes.behavior:
                    continue
                cudnn.build(asked, config, POLICY)
                built += 1
            except PlanRejected as exc:
                refused.add(exc.reason)
    assert built >= 3
    assert refused
    assert all("returned " in reason for reason in refused)


def test_the_same_problem_has_the_same_spaces(cudnn: CudnnEngine) -> None:
    asked = PROBLEMS["dgrad-bf16"]
    assert cudnn.spaces(asked) == cudnn.spaces(asked)
    assert len(cudnn.spaces(asked)) > 5


def test_other_devices_have_none(cudnn: CudnnEngine) -> None:
    assert list(cudnn.spaces(problem(device="cpu", layout="contiguous"))) == []


def test_an_erratum_holds_for_what_nobody_proposed(cudnn: CudnnEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = PROBLEMS["fprop-f16"]
    monkeypatch.setattr(Errata, "verdict", lambda *_, **__: "errata rule mine: it is bad")
    config = cudnn.configs(asked, "instant")[0].config
    assert cudnn.candidate(asked, config).refused == "errata rule mine: it is bad"


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"engine": 9999}, "returned "),
        ({}, "returned "),
        ({"engine": 0, "unheard_of": 1}, "unknown knob"),
        ({"engine": 0, "dense": 1}, "no variant"),
    ],
)
def test_what_is_no_configuration_is_refused(cudnn: CudnnEngine, knobs: dict[str, int], reason: str) -> None:
    with pytest.raises(PlanRejected, match=reason):
        cudnn.candidate(PROBLEMS["fprop-f16"], EngineConfig.of("cudnn", **knobs))


@pytest.mark.usefixtures("target", "no_descriptor_left")
def test_no_descriptor_is_left_behind(cudnn: CudnnEngine) -> None:
    asked = PROBLEMS["fprop-f16"]
    for one in cudnn.configs(asked, "instant")[:3]:
        cudnn.candidate(asked, one.config)
    assert cudnn.spaces(asked)

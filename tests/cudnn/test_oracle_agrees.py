"""convplan proposes what NVIDIA's own front end proposes for the same convolution: the same configurations, in order.

Both ask the same library, so what is compared is the question: dims, strides, dtypes, alignment, window, compute type.

One difference is meant. A filter with one channel can be written with two strides of that channel, and cuDNN answers
them differently although they describe the same memory. convplan gives sizes of 1 the layout of the other tensors (B2),
so it asks for the `*-depthwise-contiguous-filter` cases what it asks for the `*-depthwise` ones, and is compared with
the front end's answer for those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import oracle
import pytest
from oracle_cases import CASES, Case

from convplan import EngineConfig, Problem, TensorSpec
from convplan.engines.cudnn.configs import heuristic_configurations
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.graph import operation_graph
from convplan.engines.cudnn.target import Target

pytestmark = pytest.mark.usefixtures("target")  # brings the driver's stand-in

SOURCES = {"A": "mode_a", "B": "mode_b", "FALLBACK": "fallback"}
BY_NAME = {case.name: case for case in CASES}
MEANT = "-contiguous-filter"  # of a depthwise convolution: its twin without this ending is what convplan asks for

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def problem(case: Case) -> Problem:
    spec = case.spec()
    tensors = {
        name: TensorSpec(tuple(dims), tuple(spec["strides"][name]), spec["dtypes"][name], oracle.ALIGNMENT_BYTES)
        for name, dims in spec["dims"].items()
    }
    window = {name: tuple(spec[name]) for name in ("padding", "stride", "dilation")}  # type: ignore[literal-required]
    return Problem(op=case.op, **tensors, **window, groups=case.groups, device="cuda")


@functools.cache
def of_the_front_end(name: str, mode: oracle.Mode) -> list[tuple[int, dict[str, int]]]:
    """What the front end proposes for a case; for those above, for its twin."""
    return oracle.frontend_configs(BY_NAME[name.removesuffix(MEANT)].spec(), mode)


@pytest.mark.behaviour("B13")
@by_case
@pytest.mark.parametrize("mode", oracle.MODES)
def test_each_list_equals_the_front_ends(
    case: Case, mode: oracle.Mode, target: Target, record_property: Callable[[str, object], None]
) -> None:
    graph = operation_graph(target, problem(case))
    found = [(one.engine, dict(one.knobs)) for one in heuristic_configurations(graph, target, SOURCES[mode])]
    expected = of_the_front_end(case.name, mode)
    for place, (mine, theirs) in enumerate(zip(found, expected, strict=False)):
        assert mine == theirs, f"configuration {place} of {len(found)}"
    assert len(found) == len(expected)
    assert bool(found) is case.proposes
    record_property("oracle", len(expected))


@pytest.mark.behaviour("B13")
@by_case
def test_the_engine_proposes_the_three_lists_in_order_and_each_configuration_once(
    case: Case, cudnn: CudnnEngine
) -> None:
    expected: dict[EngineConfig, str] = {}
    for mode in oracle.MODES:
        for engine, knobs in of_the_front_end(case.name, mode):
            expected.setdefault(EngineConfig.of("cudnn", engine=engine, **knobs), SOURCES[mode])
    found = [(candidate.config, candidate.source) for candidate in cudnn.configs(problem(case), "measure")]
    assert found == list(expected.items())


@pytest.mark.behaviour("B2")
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_a_filters_only_channel_is_given_the_layout_of_the_other_tensors(op: str) -> None:
    """The one difference from the front end, and that it is one: asked literally, it answers something else."""
    contiguous, twin = BY_NAME[f"{op}-depthwise{MEANT}"], BY_NAME[f"{op}-depthwise"]
    assert problem(contiguous) == problem(twin), "equal problems have equal keys"
    literal = [oracle.frontend_configs(contiguous.spec(), mode) for mode in oracle.MODES]
    assert literal != [of_the_front_end(twin.name, mode) for mode in oracle.MODES]

"""Statistics with a convolution on a GPU: every plan against float64, restored, in a CUDA graph, for a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import convplan
from convplan import Epilogue, Policy, Problem
from convplan._verify import Verifier
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.torch_ops.statistics import convolution_with_statistics

CUDA = torch.device("cuda")
MOST_OF_EACH = 6  # plans of each of cuDNN's engines
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((8, 64, 28, 28), (64, 64, 3, 3), {"padding": 1}),
    "1x1": ((8, 64, 28, 28), (256, 64, 1, 1), {}),
    "strided": ((8, 128, 28, 28), (64, 128, 3, 3), {"padding": 1, "stride": 2}),
    "odd": ((5, 24, 15, 13), (40, 24, 3, 3), {"padding": 1}),
    "30-filters": ((5, 24, 15, 13), (30, 24, 3, 3), {"padding": 1}),
    "grouped": ((4, 64, 14, 14), (64, 16, 3, 3), {"padding": 1, "groups": 4}),
    "3-D": ((2, 32, 8, 12, 12), (32, 32, 3, 3, 3), {"padding": 1}),
}


def layer(name: str, dtype: str) -> Problem:
    x, w, settings = LAYERS[name]
    return Problem.dense(
        "fprop",
        x,
        w,
        dtype=dtype,
        layout="channels_last",
        epilogue=Epilogue(statistics=True),
        device="cuda",
        **settings,
    )


def sums_of(y: torch.Tensor) -> torch.Tensor:
    wide, over = y.double(), [0, *range(2, y.dim())]
    return torch.stack([wide.sum(over), wide.square().sum(over)])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_plan_is_right_and_restored(name: str, dtype: str) -> None:
    problem, engine, tried = layer(name, dtype), CudnnEngine(), dict[int, int]()
    verifier = Verifier(problem, CUDA)
    for candidate in engine.configs(problem, "measure"):
        number = candidate.config.knob("engine")
        if candidate.refused or tried.setdefault(number, 0) >= MOST_OF_EACH:
            continue
        try:
            built = engine.build(problem, candidate.config, Policy())
        except convplan.PlanRejected:
            continue
        tried[number] += 1
        for run in (built.run, built.bind() if built.bind else built.run):
            verifier.random.forget_sums()
            assert verifier.check(candidate.config, candidate.notes, verifier.random.given_to(run)) <= 1
        if candidate.notes.direct:
            verifier.check_exactly(candidate.config, built.run)
        if tried[number] == 1 and built.serialize is not None:
            restored = engine.restore(problem, candidate.config, Policy(), built.serialize())
            verifier.random.forget_sums()
            assert verifier.check(candidate.config, candidate.notes, verifier.random.given_to(restored.run)) <= 1
    assert sum(tried.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_with_statistics_in_a_graph(dtype: torch.dtype) -> None:
    x = torch.randn(8, 64, 28, 28, device=CUDA, dtype=dtype).to(memory_format=torch.channels_last)
    w = (torch.randn(64, 64, 3, 3, device=CUDA, dtype=dtype) / 24).to(memory_format=torch.channels_last)
    policy = Policy(budget_s=0.5)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        found = convolution_with_statistics(x, w, 1, 1, 1, 1, policy)
        assert found is not None
        return found

    y, sums = call()
    torch.testing.assert_close(y.double(), torch.conv2d(x.double(), w.double(), padding=1), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(sums.double(), sums_of(y), rtol=1e-3, atol=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_sums = call()
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured, 2 * y)
    torch.testing.assert_close(captured_sums[1], 4 * sums[1], rtol=1e-3, atol=1.0)


def test_planning_races_them_with_a_pass_behind_the_convolution() -> None:
    record = convplan.plan(layer("3x3", "float16"), Policy(budget_s=0.5))
    assert {"cudnn", "composed"} <= {evidence.config.engine for evidence in record.ranking}

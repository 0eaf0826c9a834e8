"""A gate as cuDNN's graph: which engines an H200 is offered, and their plans, built and restored without one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from convplan import EngineConfig, Epilogue, PlanRejected, Problem
from convplan._problem import READS, WRITES
from convplan.engines.cudnn.engine import COMPILED, CudnnEngine
from convplan.engines.cudnn.running import Form
from convplan.engines.cudnn.serialized import graph_json

GATE = Epilogue(gate=True)


def layer(dtype: str = "float16", layout: str = "channels_last", filters: int = 128, **changes: Any) -> Problem:
    settings = {"padding": 1, **changes}
    return Problem.dense(
        "dgrad", (8, 64, 28, 28), (filters, 64 // settings.get("groups", 1), 3, 3), dtype=dtype, layout=layout,
        epilogue=GATE, device="cuda", **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "offered"),
    [
        (layer(), True),
        (layer("bfloat16"), True),
        (layer("float32"), True),
        (layer(stride=2), True),
        (layer(groups=4), True),
        (layer(layout="contiguous"), False),
    ],
    ids=["float16", "bfloat16", "float32", "strided", "grouped", "contiguous"],
)
def test_what_is_offered(problem: Problem, offered: bool, cudnn: CudnnEngine) -> None:
    found = [candidate for candidate in cudnn.configs(problem, "measure") if not candidate.refused]
    assert bool(found) == offered
    assert all(COMPILED in candidate.notes.behavior for candidate in found)


@pytest.mark.behaviour("B27")
def test_the_gate_has_its_address() -> None:
    problem = layer()
    form = Form.of(problem, problem, False)
    assert form.epilogue is not None
    gate = torch.empty(4)
    assert form.epilogue.addresses(None, None, None, gate) == (gate.data_ptr(),)
    assert form.uids == tuple(map(ord, READS["dgrad"] + WRITES["dgrad"] + "g"))


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_was_built_is_restored_as_it_was(dtype: str, cudnn: CudnnEngine) -> None:
    problem = layer(dtype)
    config = next(one.config for one in cudnn.configs(problem, "measure") if not one.refused)
    data = cudnn.build_execution_plan(problem, config).serialize()
    graph = json.loads(data)["operationGraph"]
    mine = json.loads(json.dumps(graph_json(problem)))
    assert graph == mine
    assert [list(node) for node in graph["nodes"]] == [list(node) for node in mine["nodes"]]  # in the same order
    assert cudnn.restore_execution_plan(problem, config, data).serialize() == data
    for other in (problem.core, layer(dtype, filters=64)):
        knobs = {name: value for name, value in config.knobs if name != "fused" or not other.epilogue.is_plain}
        with pytest.raises(PlanRejected, match="operationGraph is not that of the problem"):
            cudnn.restore_execution_plan(other, EngineConfig.of("cudnn", **knobs), data)


def test_a_plan_whose_gate_is_another_tensor_is_refused(cudnn: CudnnEngine) -> None:
    problem = layer()
    config = next(one.config for one in cudnn.configs(problem, "measure") if not one.refused)
    text = cudnn.build_execution_plan(problem, config).serialize().decode()
    swapped = text.replace('"X":"103","dX":"120"', '"X":"121","dX":"120"')
    assert swapped != text
    with pytest.raises(PlanRejected, match="operationGraph"):
        cudnn.restore_execution_plan(problem, config, swapped.encode())

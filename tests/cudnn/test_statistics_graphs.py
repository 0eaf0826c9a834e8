"""Statistics as cuDNN's graph: which engines an H200 is offered, and their plans, built and restored without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convplan import EngineConfig, Epilogue, PlanRejected, Problem
from convplan._problem import READS, WRITES
from convplan.engines.cudnn.engine import COMPILED, CudnnEngine
from convplan.engines.cudnn.fusion import SUMS, fusion_of
from convplan.engines.cudnn.running import Form
from convplan.engines.cudnn.serialized import graph_json

STATISTICS = Epilogue(statistics=True)


def layer(dtype: str = "float16", layout: str = "channels_last", filters: int = 128, **changes: Any) -> Problem:
    settings = {"padding": 1, **changes}
    return Problem.dense(
        "fprop", (8, 64, 28, 28), (filters, 64 // settings.get("groups", 1), 3, 3), dtype=dtype, layout=layout,
        epilogue=STATISTICS, device="cuda", **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "ready_made", "compiled"),
    [
        (layer(), True, True),
        (layer(stride=2), True, True),
        (layer(dilation=2), True, True),
        (layer(groups=4), False, True),
        (layer("bfloat16"), False, True),
        (layer(filters=30), False, True),
        (layer(layout="contiguous"), False, False),
        (Problem.dense("fprop", (2, 64, 8, 8, 8), (64, 64, 3, 3, 3), dtype="float16", layout="channels_last",
                       epilogue=STATISTICS, device="cuda"), False, True),
        (Problem.dense("fprop", (2, 64, 99), (64, 64, 3), dtype="float16", layout="channels_last",
                       epilogue=STATISTICS, device="cuda"), True, True),
    ],
    ids=["dense", "strided", "dilated", "grouped", "bfloat16", "30-filters", "contiguous", "3-D", "1-D"],
)  # fmt: skip
def test_what_is_offered(problem: Problem, ready_made: bool, compiled: bool, cudnn: CudnnEngine) -> None:
    kinds = [COMPILED in candidate.notes.behavior for candidate in cudnn.configs(problem, "measure")]
    assert (False in kinds, True in kinds) == (ready_made, compiled)


@pytest.mark.behaviour("B27")
def test_both_rows_have_their_address() -> None:
    problem = layer(filters=24)
    form = Form.of(problem, problem, False)
    assert form.epilogue is not None
    sums = torch.empty(2, 24)
    read = form.epilogue.addresses(None, None, None, sums)
    assert read == (sums[0].data_ptr(), sums[1].data_ptr())
    letters = READS["fprop"] + WRITES["fprop"] + "".join(SUMS)
    assert form.uids == tuple(map(ord, letters))


@pytest.mark.parametrize(("filters", "alignment_bytes"), [(64, 16), (30, 8), (33, 4)])
def test_the_second_row_is_as_aligned_as_the_first_one_is_long(filters: int, alignment_bytes: int) -> None:
    specs = fusion_of(layer(filters=filters), False).given.values()
    assert {spec.alignment_bytes for spec in specs} == {alignment_bytes}


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize("kind", [False, True], ids=["ready-made", "compiled"])
def test_what_was_built_is_restored_as_it_was(kind: bool, cudnn: CudnnEngine) -> None:
    problem = layer()
    candidates = cudnn.configs(problem, "measure")
    config = next(one.config for one in candidates if (COMPILED in one.notes.behavior) == kind)
    data = cudnn.build_execution_plan(problem, config).serialize()
    assert json.loads(data)["operationGraph"] == json.loads(json.dumps(graph_json(problem)))
    assert cudnn.restore_execution_plan(problem, config, data).serialize() == data
    for other in (problem.core, layer(filters=64)):
        knobs = {name: value for name, value in config.knobs if name != "fused" or not other.epilogue.is_plain}
        with pytest.raises(PlanRejected, match="operationGraph is not that of the problem"):
            cudnn.restore_execution_plan(other, EngineConfig.of("cudnn", **knobs), data)


def test_a_plan_that_writes_its_sums_elsewhere_is_refused(cudnn: CudnnEngine) -> None:
    problem = layer()
    compiled = next(one.config for one in cudnn.configs(problem, "measure") if COMPILED in one.notes.behavior)
    text = cudnn.build_execution_plan(problem, compiled).serialize().decode()
    swapped = text.replace('"Sum":"109","SqSum":"113"', '"Sum":"113","SqSum":"109"')
    assert swapped != text
    with pytest.raises(PlanRejected, match="operationGraph"):
        cudnn.restore_execution_plan(problem, compiled, swapped.encode())


@pytest.mark.parametrize(("graph", "dropped"), [("general", False), ("statistics", True)])
def test_errata_of_other_graphs_leave_them_alone(
    graph: str, dropped: bool, cudnn: CudnnEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine 2 is a ready-made one here, and a compiled one of the general form."""
    rule = {"id": "two", "reason": "not it", "source": "https://example.com/two", "engines": [2], "graphs": [graph]}
    path = tmp_path / "errata.json"
    path.write_text(json.dumps({"schema": 1, "rules": [rule]}), encoding="utf-8")
    monkeypatch.setenv("CONVPLAN_ERRATA", str(path))
    candidates = [one for one in cudnn.configs(layer(), "measure") if one.config.knob("engine") == 2]
    assert candidates
    assert {bool(one.refused) for one in candidates} == {dropped}

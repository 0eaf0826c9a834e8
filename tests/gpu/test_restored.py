"""Serialized plans on the GPU: restored and built ones compute the same bits, for every case and dtype (C1)."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from gpu_cases import RUNS, GpuCase

from convplan import EngineConfig, PlanRejected, Policy, _environment
from convplan._environment import Environment
from convplan._inputs import random_inputs
from convplan._problem import Op, Problem
from convplan.engines import registry
from convplan.engines.cudnn.device import Device
from convplan.engines.cudnn.engine import COMPILED
from convplan.engines.cudnn.serialized import pattern_of
from convplan.engines.cudnn.target import present

POLICY = Policy()


def engine() -> Any:
    return registry.get("cudnn")


def leading(problem: Problem) -> list[EngineConfig]:
    """The first plans that are not compiled, and the first that is."""
    found = [one for one in engine().configs(problem, "measure") if one.notes.deterministic and not one.refused]
    plain = [one.config for one in found if COMPILED not in one.notes.behavior][:2]
    return plain + [one.config for one in found if COMPILED in one.notes.behavior][:1]


@pytest.mark.behaviour("C1")
@pytest.mark.parametrize(("case", "op"), RUNS, ids=[f"{case.id}-{op}" for case, op in RUNS])
def test_a_restored_plan_computes_the_same_bits(case: GpuCase, op: Op, findings: dict[str, Any]) -> None:
    problem = case.problem(op)
    first, second = random_inputs(problem, torch.device("cuda"))[:2]
    compared = 0
    for config in leading(problem):
        try:
            built = engine().build(problem, config, POLICY)
        except PlanRejected:
            continue
        data = built.serialize()
        began = time.perf_counter()
        restored = engine().restore(problem, config, POLICY, data)
        findings.setdefault("restored_ms", []).append((len(data), round(1e3 * (time.perf_counter() - began), 3)))
        assert restored.workspace_bytes == built.workspace_bytes
        expected = built.run(first, second, None, None).double()
        assert torch.equal(restored.run(first, second, None, None).double(), expected)
        assert restored.bind is not None
        assert torch.equal(restored.bind()(first, second, None, None).double(), expected)
        compared += 1
    assert compared


@pytest.mark.behaviour("C7")
def test_this_gpu_is_spelled_alike_by_torch_and_by_cudnn() -> None:
    device = Device.current(torch.cuda.current_device())
    described = Environment.ahead_of(
        gpu=device.name,
        capability=device.compute_capability,
        multiprocessors=device.multiprocessors or 0,
        cudnn=device.cudnn_version or 0,
    )
    assert described == _environment.ahead_of_time(_environment.current("cuda"))


def test_plans_hold_the_properties_that_describe_this_gpu() -> None:
    """So that plans built elsewhere, from those properties, are plans for this GPU."""
    index = torch.cuda.current_device()
    told, found = pattern_of(present(index)).profile, Device.current(index)
    assert Device(told).to_json() == Device(dict(found._properties)).to_json()

"""ReLU's backward pass behind dgrad on a GPU: every plan against float64, and training steps beside stock torch's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import convplan
from convplan import Epilogue, Policy, Problem, _runtime
from convplan._inputs import random_inputs
from convplan._verify import Verifier
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.torch_ops.gated import Gated, Masked, _GateCaller

CUDA = torch.device("cuda")
MOST_OF_EACH = 4  # plans of each of cuDNN's engines
QUICK = Policy(effort="instant")
Tensor = torch.Tensor
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((8, 64, 28, 28), (64, 64, 3, 3), {"padding": 1}),
    "1x1": ((8, 64, 28, 28), (256, 64, 1, 1), {}),
    "strided": ((8, 128, 28, 28), (64, 128, 3, 3), {"padding": 1, "stride": 2}),
    "odd": ((5, 24, 15, 13), (40, 24, 3, 3), {"padding": 1}),
    "grouped": ((4, 64, 14, 14), (64, 16, 3, 3), {"padding": 1, "groups": 4}),
    "3-D": ((2, 32, 8, 12, 12), (32, 32, 3, 3, 3), {"padding": 1}),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _runtime.forget()
    convplan.stats(reset=True)
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each gradient that went through a gate, whether it was taken as it is."""
    seen: list[bool] = []
    is_still = Masked.is_still

    def noted(self: Masked, grad: Tensor) -> bool:
        seen.append(is_still(self, grad))
        return seen[-1]

    monkeypatch.setattr(Masked, "is_still", noted)
    return seen


@pytest.fixture
def by_two_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate is used even where its best plan is a pass behind dgrad."""

    def call(self: Any, grad: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        found: Tensor = self._runner(grad, weight, None, None, None, None, gate)
        return found

    monkeypatch.setattr(_GateCaller, "__call__", call)


def layer(name: str, dtype: str) -> Problem:
    x, w, settings = LAYERS[name]
    return Problem.dense(
        "dgrad", x, w, dtype=dtype, layout="channels_last", epilogue=Epilogue(gate=True), device="cuda", **settings
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_plan_is_right_and_restored(name: str, dtype: str, findings: dict[str, Any]) -> None:
    problem, engine, tried = layer(name, dtype), CudnnEngine(), dict[int, int]()
    verifier = Verifier(problem, CUDA, tf32=True)
    for candidate in engine.configs(problem, "measure"):
        number = candidate.config.knob("engine")
        if candidate.refused or tried.setdefault(number, 0) >= MOST_OF_EACH:
            continue
        try:
            built = engine.build(problem, candidate.config, Policy(allow_tf32=True))
        except convplan.PlanRejected:
            continue
        tried[number] += 1
        for run in (built.run, built.bind() if built.bind else built.run):
            assert verifier.check(candidate.config, candidate.notes, verifier.random.given_to(run)) <= 1
        if candidate.notes.direct:
            verifier.check_exactly(candidate.config, built.run)
        if tried[number] == 1 and built.serialize is not None:
            restored = engine.restore(problem, candidate.config, Policy(allow_tf32=True), built.serialize())
            assert verifier.check(candidate.config, candidate.notes, verifier.random.given_to(restored.run)) <= 1
    findings[f"gate {name} {dtype}"] = tried


def test_planning_races_them_with_a_pass_behind_dgrad() -> None:
    problem = layer("3x3", "float16")
    record = convplan.plan(problem, Policy(budget_s=0.5))
    assert {"cudnn", "composed"} <= {evidence.config.engine for evidence in record.ranking}
    inputs = random_inputs(problem, CUDA)
    assert inputs.gate is not None
    for rank in range(min(len(record.ranking), 3)):
        x = record.build(rank).run(inputs.first, inputs.second, gate=inputs.gate)
        assert not x[inputs.gate <= 0].any()
        assert x[inputs.gate > 0].any()


def test_what_becomes_of_nan(findings: dict[str, Any]) -> None:
    """NaN in the gate is left open; a NaN that comes in stays out where the gate is closed."""
    problem = layer("1x1", "float16")
    inputs = random_inputs(problem, CUDA)
    gate = inputs.gate
    assert gate is not None
    broken = torch.full_like(inputs.first, torch.nan)
    told = {}
    record = convplan.plan(problem, Policy(budget_s=0.5))
    for rank, evidence in enumerate(record.ranking[:4]):
        x = record.build(rank).run(broken, inputs.second, gate=gate)
        assert x[gate > 0].isnan().all()
        through = record.build(rank).run(inputs.first, inputs.second, gate=torch.full_like(gate, torch.nan))
        told[str(evidence.config)] = {
            "closed and NaN comes in": str(x[gate <= 0].unique()[:2].tolist()),
            "gate is NaN": f"{float((through != 0).half().mean()):.2f} let through",
        }
    findings["gate NaN"] = told


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(inplace=True), nn.Conv2d(64, 64, 1, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(64, 32, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def step(model: nn.Module, x: Tensor, dtype: torch.dtype | None, scale: float = 1.0) -> dict[str, Tensor]:
    """Output and gradients of one step, the parameters' as one long vector."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
        y = model(x)
    wanted = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    ((y * wanted).sum() * scale).backward()
    assert x.grad is not None
    long = torch.cat([one.grad.flatten().double() for one in model.parameters() if one.grad is not None])
    return {"output": y.detach().double(), "input": x.grad.double() / scale, "gradients": long / scale}


def built() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 48, 48, device="cuda").to(memory_format=torch.channels_last)
    return vgg().cuda().to(memory_format=torch.channels_last), x


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_step_is_as_right_as_stock_torchs(
    dtype: torch.dtype | None, masks: list[bool], by_two_calls_too: None, findings: dict[str, Any]
) -> None:
    model, x = built()
    exact, stock = copy.deepcopy(model).double(), copy.deepcopy(model)
    fused = convplan.fuse_training(model, policy=QUICK)
    assert fused.fusion_report.counts == {"relu backward": 3}
    scale = 64.0 if dtype == torch.float16 else 1.0
    right = step(exact, x.double(), None)
    mine, other = step(fused, x, dtype, scale), step(stock, x, dtype, scale)
    assert masks == [True] * 3
    assert convplan.stats()["failed"] == 0
    findings[f"gates {dtype}"] = compared(mine, other, right)


def compared(mine: dict[str, Tensor], other: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, str]:
    """How far a step is from the exact one, which is not much further than stock torch's."""
    told = {}
    for key, value in right.items():
        size, off, allowed = (float(one.norm()) for one in (value, mine[key] - value, other[key] - value))
        told[key] = f"off by {off / size:.3g}, stock torch {allowed / size:.3g}"
        assert off <= 1.5 * allowed + 1e-3 * size, told
    return told


def test_a_gate_that_is_not_worth_it_is_left_out(masks: list[bool]) -> None:
    """Whatever won: gradients are those of the model."""
    model, x = built()
    exact, stock = copy.deepcopy(model).double(), copy.deepcopy(model)
    fused = convplan.fuse_training(model, policy=QUICK)
    for _ in range(2):
        mine = step(fused, x, torch.bfloat16)
    compared(mine, step(stock, x, torch.bfloat16), step(exact, x.double(), None))
    assert all(masks)


def test_a_step_in_a_cuda_graph_is_the_eager_one(masks: list[bool]) -> None:
    model, x = built()
    fused = convplan.fuse_training(model.half(), policy=QUICK)
    x = x.half()

    def once() -> Tensor:
        for one in fused.parameters():
            one.grad = None
        y = fused(x)
        y.float().square().sum().backward()
        return y.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    right = once().clone()
    gradients = [one.grad.clone() for one in fused.parameters()]
    graph = torch.cuda.CUDAGraph()
    for one in fused.parameters():
        one.grad = None
    with torch.cuda.graph(graph):
        y = once()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, right, rtol=1e-2, atol=1e-3)
    for one, other in zip(fused.parameters(), gradients, strict=True):
        assert float((one.grad.double() - other.double()).norm()) <= 1e-2 * float(other.double().norm())


def test_other_layouts_and_dtypes_are_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any) -> None:
        raise AssertionError("the operation ran")

    monkeypatch.setattr(Gated, "forward", staticmethod(never))
    model, x = built()
    exact = convplan.fuse_training(copy.deepcopy(model).double(), policy=QUICK)
    exact(x.double()).sum().backward()
    model = model.to(memory_format=torch.contiguous_format)
    convplan.fuse_training(model, policy=QUICK)(x.contiguous()).sum().backward()

"""`fuse_training` on a GPU: one training step against the same one in float64, beside stock torch's distance from it.

Networks of torchvision are skipped by name where it is not installed. Nothing is tuned, and the larger networks run
their convolutions by torch's kernels, as what is new here is the same for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import convplan
from convplan import Policy, _runtime
from convplan.torch_ops.normalized import Normalized

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' own warnings

QUICK, QUICKER = Policy(effort="instant"), Policy(effort="instant", engines=("aten",))
Tensor = torch.Tensor

# Name, policy, and what at least is fused and runs as the operation.
MODELS: tuple[tuple[str, Policy, dict[str, int], int], ...] = (
    ("bottlenecks", QUICK, {"convolution": 8, "relu": 6, "add": 2}, 8),
    ("resnet18", QUICK, {"convolution": 20, "relu": 17, "add": 8}, 20),
    ("resnet50", QUICKER, {"convolution": 53, "relu": 49, "add": 16}, 53),
    ("mobilenet_v3_large", QUICKER, {"convolution": 46, "hardswish": 20, "add": 10}, 46),
    ("densenet121", QUICKER, {"convolution": 59, "relu": 120}, 120),
    ("regnet_y_400mf", QUICKER, {"convolution": 53, "relu": 49, "add": 16}, 53),
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _runtime.forget()
    convplan.stats(reset=True)
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each run of the operation ends with."""
    seen: list[str] = []
    forward = Normalized.forward

    def noted(ctx: Any, step: Any, *rest: Any) -> Tensor:
        seen.append(step.activation.name)
        return forward(ctx, step, *rest)

    monkeypatch.setattr(Normalized, "forward", staticmethod(noted))
    return seen


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.conv1, self.bn1 = nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


def bottlenecks() -> nn.Module:
    return nn.Sequential(Bottleneck(64, 32, 1), Bottleneck(128, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms' numbers all matter, and a batch, channels last."""
    torch.manual_seed(0)
    if name == "bottlenecks":
        model, dims = bottlenecks(), (16, 64, 28, 28)
    else:
        models: Any = pytest.importorskip("torchvision").models
        model, dims = models.get_model(name, weights=None, num_classes=16), (16, 3, 96, 96)
    for one in model.modules():
        if isinstance(one, nn.Dropout):
            one.p = 0.0
        if isinstance(one, nn.BatchNorm2d):
            nn.init.uniform_(one.weight, 0.5, 1.5)
            nn.init.uniform_(one.bias, -0.2, 0.2)
    x = torch.randn(dims, device="cuda").to(memory_format=torch.channels_last)
    return model.cuda().to(memory_format=torch.channels_last).train(), x


def step(model: nn.Module, x: Tensor, cast: AbstractContextManager[Any], scale: float = 1.0) -> dict[str, Tensor]:
    """Outputs, all gradients and all statistics of one step, each as one long vector."""
    model.zero_grad()
    with cast:
        y = model(x)
    wanted = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    ((y * wanted).sum() * scale).backward()

    def long(values: Iterator[Tensor | None]) -> Tensor:
        return torch.cat([one.detach().flatten().double() for one in values if one is not None])

    gradients = long(one.grad for one in model.parameters()) / scale
    return {"output": long(iter([y])), "gradients": gradients, "statistics": long(model.buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "policy", "least", "calls"), MODELS, ids=[one[0] for one in MODELS])
def test_a_step_is_as_right_as_stock_torchs(
    name: str, policy: Policy, least: dict[str, int], calls: int, dtype: torch.dtype, runs: list[str],
    findings: dict[str, Any],
) -> None:  # fmt: skip
    model, x = build(name)
    exact, stock = copy.deepcopy(model).double(), copy.deepcopy(model)
    fused = convplan.fuse_training(model, policy=policy)
    counts = fused.fusion_report.counts
    assert {part: counts.get(part, 0) for part in least if counts.get(part, 0) < least[part]} == {}
    scale = 64.0 if dtype == torch.float16 else 1.0

    def cast() -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32)

    right = step(exact, x.double(), torch.autocast("cuda", enabled=False))
    mine, other = step(fused, x, cast(), scale), step(stock, x, cast(), scale)
    assert len(runs) >= calls
    assert convplan.stats()["failed"] == 0
    told = {}
    for key, value in right.items():
        size, off, allowed = (float(one.norm()) for one in (value, mine[key] - value, other[key] - value))
        told[key] = f"off by {off / size:.3g}, stock torch {allowed / size:.3g}"
        assert off <= 1.5 * allowed + 1e-3 * size, told
    findings[f"fuse_training {name} {dtype}"] = {"counts": counts, **told}


def test_a_step_in_a_cuda_graph_is_the_eager_one() -> None:
    model, x = build("bottlenecks")
    model.half()
    x = x.half()
    fused = convplan.fuse_training(model, policy=QUICK)
    start = copy.deepcopy(fused.state_dict())

    def once() -> Tensor:
        for one in fused.parameters():
            one.grad = None
        y = fused(x)
        y.float().square().mean().backward()
        return y.detach()  # what is kept of a graph keeps the stream that its gradients were asked for on

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    fused.load_state_dict(start)
    right = once().clone()
    gradients, statistics = [one.grad.clone() for one in fused.parameters()], [one.clone() for one in fused.buffers()]
    graph = torch.cuda.CUDAGraph()
    for one in fused.parameters():
        one.grad = None
    with torch.cuda.graph(graph):
        y = once()
    fused.load_state_dict(start)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, right, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close([one.grad for one in fused.parameters()], gradients, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(list(fused.buffers()), statistics, rtol=1e-3, atol=1e-3)


def test_graphed_callables_train() -> None:
    model, x = build("bottlenecks")
    stock = copy.deepcopy(model)
    fused = convplan.fuse_training(model, policy=QUICKER)
    state = copy.deepcopy(fused.state_dict())
    graphed: Callable[[Tensor], Tensor] = torch.cuda.make_graphed_callables(fused, (x.clone().requires_grad_(),))
    fused.load_state_dict(state)
    given, other = (x.clone().requires_grad_() for _ in range(2))
    y, expected = graphed(given), stock(other)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    y.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(given.grad, other.grad, rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(list(fused.buffers()), list(stock.buffers()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_batches_are_counted_wherever_the_count_is(device: str, dtype: torch.dtype, runs: list[str]) -> None:
    model, x = build("bottlenecks")
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    for place, one in enumerate(norms):
        one.num_batches_tracked = torch.tensor(place, device=device, dtype=dtype)
    fused = convplan.fuse_training(model, policy=QUICKER)
    for _ in range(3):
        fused(x)
    assert runs
    assert [one.num_batches_tracked.item() for one in norms] == [place + 3 for place in range(len(norms))]


def test_two_steps_are_the_same_to_the_bit() -> None:
    model, x = build("bottlenecks")
    fused = convplan.fuse_training(model.bfloat16(), policy=Policy(effort="instant", deterministic=True))
    state = copy.deepcopy(fused.state_dict())
    found = []
    for _ in range(2):
        fused.load_state_dict(state)
        found.append(step(fused, x.bfloat16(), torch.autocast("cuda", enabled=False)))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("activation", [None, "relu", "tanh", ("leaky_relu", 0.2)])
def test_gradients_of_a_bias_and_an_activation_are_one_pass(activation: Any) -> None:
    x = torch.randn(8, 32, 14, 14, device="cuda").half().to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(48, 32, 3, 3, device="cuda").mul_(0.1).half().to(memory_format=torch.channels_last).requires_grad_()
    b = torch.randn(48, device="cuda").half().requires_grad_()
    y = convplan.conv2d(x, w, b, padding=1, activation=activation, policy=QUICK)
    wanted = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, w, b), wanted)
    given = [one.detach().double().requires_grad_() for one in (x, w, b)]
    right = nn.functional.conv2d(*given, padding=1)
    if activation is not None:
        name, *numbers = (activation,) if isinstance(activation, str) else activation
        right = getattr(nn.functional, name)(right, *numbers)
    exact = torch.autograd.grad(right, given, wanted.double())
    for one, other in zip(found, exact, strict=True):
        assert float((one.double() - other).norm()) <= 5e-3 * float(other.norm())


def test_other_layouts_and_dtypes_are_computed_apart(runs: list[str]) -> None:
    model, x = build("bottlenecks")
    fused = convplan.fuse_training(model.to(memory_format=torch.contiguous_format), policy=QUICKER)
    stock = copy.deepcopy(model)
    x = x.contiguous()
    torch.testing.assert_close(fused(x), stock(x), rtol=1e-2, atol=1e-2)
    exact = convplan.fuse_training(copy.deepcopy(model).double(), policy=QUICKER)
    exact(x.double().to(memory_format=torch.channels_last))
    assert runs == []

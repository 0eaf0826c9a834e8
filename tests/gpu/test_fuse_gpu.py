"""`fuse` on networks of torchvision and timm on a GPU: float16, channels-last, against the network unfused.

What is not installed is skipped by name. Nothing is tuned; once most of a minute is over, the rest of the networks run
by torch's kernels, since cuDNN compiles some of its plans.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.fusing import calibrated, ready
from torch import nn

import convplan
from convplan import Policy, _runtime
from convplan.torch_ops.fused_modules import FusedCall

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' own warnings

QUICK, QUICKER = Policy(effort="instant"), Policy(effort="instant", engines=("aten",))
MOST_S = 40
_started: list[float] = []

# Package, name, size of the image, and what at least is taken in.
MODELS: tuple[tuple[str, str, int, dict[str, int]], ...] = (
    ("torchvision", "resnet18", 96, {"batch norm": 20, "relu": 17, "add": 8}),
    ("torchvision", "resnet50", 96, {"batch norm": 53, "relu": 49, "add": 16}),
    ("torchvision", "resnext50_32x4d", 96, {"batch norm": 53, "relu": 49, "add": 16}),
    ("torchvision", "wide_resnet50_2", 96, {"batch norm": 53, "relu": 49, "add": 16}),
    ("torchvision", "vgg11_bn", 64, {"batch norm": 8, "relu": 8}),
    ("torchvision", "densenet121", 64, {"batch norm": 59, "relu": 59}),
    ("torchvision", "mobilenet_v3_large", 96, {"batch norm": 46, "hardswish": 20, "add": 10}),
    ("torchvision", "mobilenet_v2", 96, {"batch norm": 52, "hardtanh": 35, "add": 10}),
    ("torchvision", "efficientnet_b0", 96, {"batch norm": 49, "silu": 49, "sigmoid": 16}),
    ("torchvision", "regnet_y_400mf", 96, {"batch norm": 53, "relu": 65, "add": 16}),
    ("torchvision", "convnext_tiny", 64, {"bias": 22}),
    ("torchvision", "googlenet", 96, {"batch norm": 57, "relu": 57}),
    ("torchvision", "inception_v3", 96, {"batch norm": 94, "relu": 94}),
    ("torchvision", "shufflenet_v2_x1_0", 96, {"batch norm": 56, "relu": 37}),
    ("torchvision", "deeplabv3_resnet50", 64, {"batch norm": 59, "relu": 55, "add": 16}),
    ("timm", "resnet26d", 96, {"batch norm": 31, "relu": 27, "add": 8}),
    ("timm", "darknet53", 96, {"batch norm": 52, "leaky_relu": 52}),
    ("timm", "repvgg_a0", 96, {"batch norm": 44, "add": 22}),
    ("timm", "cspresnet50", 96, {"batch norm": 55, "leaky_relu": 51}),
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _runtime.forget()
    convplan.stats(reset=True)
    yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def build(package: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    if package == "timm":
        timm: Any = pytest.importorskip("timm")
        if name not in timm.list_models():
            pytest.skip(f"timm {timm.__version__} has no {name}")
        return ready(timm.create_model(name, pretrained=False, num_classes=10))
    models: Any = pytest.importorskip("torchvision").models
    arguments: dict[str, Any] = {"weights": None}
    if name.startswith("deeplab"):
        arguments |= {"weights_backbone": None, "num_classes": 4}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": False, "aux_logits": True}
    return ready(models.get_model(name, **arguments))


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(x)
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
    return [one for one in values if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize(("package", "name", "size", "least"), MODELS, ids=[name for _, name, _, _ in MODELS])
def test_a_network_computes_the_same_when_it_is_fused(
    package: str, name: str, size: int, least: dict[str, int], findings: dict[str, Any]
) -> None:
    model = build(package, name).cuda().half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, size, size, device="cuda").half().to(memory_format=torch.channels_last)
    calibrated(model, x)
    _started.append(time.monotonic())
    policy = QUICK if time.monotonic() - _started[0] < MOST_S else QUICKER
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = convplan.fuse(model, policy=policy)
    stock, mine = outputs(model, x), outputs(fused, x)
    stats = convplan.stats()
    right = outputs(copy.deepcopy(model).double(), x.double())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert stats["failed"] == 0
    assert stats["fell_back"] == 0 or policy is QUICKER  # which asks for nothing but torch's kernels
    assert not [path for path, one in fused.named_modules() if isinstance(one, FusedCall) and one.sums_apart] or (
        name == "cspresnet50"  # adds slices of tensors, which are no dense layout
    )
    counts = fused.fusion_report.counts
    assert {part: counts.get(part, 0) for part in least if counts.get(part, 0) < least[part]} == {}
    assert len(mine) == len(stock) == len(right)
    told = []
    for one, other, exact in zip(mine, stock, right, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        size_of = float(exact.abs().max())
        off, allowed = float((one - exact).abs().max()), float((other - exact).abs().max())
        told.append(f"off by {off / size_of:.3g}, unfused {allowed / size_of:.3g}")
        assert off <= 2 * allowed + 5e-3 * size_of, told
    findings[f"fuse {name}"] = {"counts": counts, "outputs": told, "engines": policy.engines}


def test_a_fused_network_runs_in_a_cuda_graph() -> None:
    model = build("torchvision", "resnet18").cuda().half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 96, 96, device="cuda").half().to(memory_format=torch.channels_last)
    fused = convplan.fuse(model, policy=QUICK)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            expected = fused(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = fused(x)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_what_stands_between_convolutions_is_torchs_to_the_bit() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(16, 64, 3, padding=1), nn.ConvTranspose2d(64, 64, 2, stride=2)
            self.pool = nn.MaxPool2d(3, 2, padding=1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            pooled = self.pool(y)
            return y, pooled, torch.cat([self.up(pooled), y], 1)

    model = ready(Between()).cuda().bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(8, 16, 64, 64, device="cuda").bfloat16().to(memory_format=torch.channels_last)
    fused = convplan.fuse(model, policy=QUICKER)
    assert len(fused.fusion_report.passes) == 2
    with torch.no_grad():
        fused(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y, pooled, joined = fused(x)
            torch.cuda.synchronize()
        launched = [event.name for event in profile.events() if event.name in ("max_pool", "place")]
        assert launched == ["max_pool", "place", "place"]
        assert torch.equal(pooled, nn.functional.max_pool2d(y, 3, 2, 1))
        up = fused.up(pooled)
        assert torch.equal(joined, torch.cat([up, y], 1))
        assert joined.stride() == torch.cat([up, y], 1).stride()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, _, captured = fused(x)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, joined)


def test_a_model_compiled_with_fusing_computes_the_same() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
            self.beside = nn.Conv2d(16, 32, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.two(torch.relu(self.one(x))) + self.beside(x))

    model = Block().cuda().half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 20, 20, device="cuda").half().to(memory_format=torch.channels_last)
    run = torch.compile(model, options=convplan.compile_options(QUICK, fuse=True))
    with torch.no_grad(), convplan.capture() as seen:
        found = run(x)
    epilogues = sorted(str(problem.epilogue) for problem in seen)
    assert len(epilogues) == 3
    assert sum("relu" in one for one in epilogues) == 2
    assert sum("residual" in one for one in epilogues) == 1
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=2e-2, atol=2e-2)


def test_a_fused_network_that_is_compiled_computes_the_same_by_the_same_plans() -> None:
    model = build("torchvision", "resnet18").cuda().half().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 96, 96, device="cuda").half().to(memory_format=torch.channels_last)
    fused = convplan.fuse(model, policy=QUICK)
    with torch.no_grad():
        with convplan.capture() as eager:
            expected = fused(x)
        run = torch.compile(fused, options=convplan.compile_options(fuse=True))
        with convplan.capture() as compiled:
            found = run(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert {str(problem) for problem in compiled} == {str(problem) for problem in eager}

"""Whole models train under `enable()` with cuDNN plans alone, and their losses follow stock torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import convplan
from convplan import Policy

STEPS = 20
# Autocast's dtype (None: no autocast), TF32 allowed, and how far apart two trainings may drift, as a share of the first
# loss: rounding grows from step to step.
PRECISIONS: dict[str, tuple[torch.dtype | None, bool, float]] = {
    "float32": (None, False, 0.01),
    "tf32": (None, True, 0.03),
    "float16": (torch.float16, True, 0.04),
    "bfloat16": (torch.bfloat16, True, 0.08),
}


class UNet3d(nn.Module):
    """A 3-D U-Net of three levels: strided convolutions down, transposed ones up, instance norm, skip connections."""

    def __init__(self, base: int = 16, classes: int = 4) -> None:
        super().__init__()
        widths = [base, 2 * base, 4 * base]
        self.enter = self._block(1, widths[0], 1)
        self.down = nn.ModuleList(self._block(a, b, 2) for a, b in itertools.pairwise(widths))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.merge = nn.ModuleList(self._block(2 * a, a, 1) for a in widths[-2::-1])
        self.leave = nn.Conv3d(widths[0], classes, 1)

    @staticmethod
    def _block(channels: int, filters: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv3d(channels, filters, 3, stride=stride, padding=1, bias=False),
            nn.InstanceNorm3d(filters, affine=True),
            nn.LeakyReLU(0.01),
            nn.Conv3d(filters, filters, 3, padding=1, bias=False),
            nn.InstanceNorm3d(filters, affine=True),
            nn.LeakyReLU(0.01),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.enter(x)]
        for block in self.down:
            skips.append(block(skips[-1]))
        y = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            y = merge(torch.cat([up(y), skips.pop()], dim=1))
        return self.leave(y)


def resnet() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10))
    images = torch.randn(16, 3, 128, 128).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    return model, images, torch.arange(16) % 10


def unet() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    volume = torch.randn(2, 1, 32, 32, 32)
    labels = (volume[:, 0].clamp(-1, 1) * 1.5 + 1.5).long().clamp(0, 3)
    return UNet3d(), volume, labels


MODELS = {"resnet-50": resnet, "unet-3d": unet}
LEARNING_RATES = {resnet: 0.001, unet: 0.1}  # at which they learn steadily: otherwise rounding alone tears runs apart


def train(make: Callable[[], tuple[nn.Module, torch.Tensor, torch.Tensor]], dtype: torch.dtype | None) -> list[float]:
    """Losses of some steps on one batch, from the same start every time."""
    torch.manual_seed(0)
    model, inputs, targets = make()
    model.cuda().train()
    inputs, targets = inputs.cuda(), targets.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES[make], momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        with nullcontext() if dtype is None else torch.autocast("cuda", dtype):
            outputs = model(inputs)
            logits = getattr(outputs, "logits", outputs)
            loss = nn.functional.cross_entropy(logits.float(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_follow_stock_torch_with_cudnn_plans_alone(name: str, precision: str, findings: dict[str, Any]) -> None:
    dtype, tf32, allowed = PRECISIONS[precision]
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=tf32):
        stock = train(MODELS[name], dtype)
        convplan.stats(reset=True)
        with convplan.enabled(Policy(engines=("cudnn",), effort="instant")):
            mine = train(MODELS[name], dtype)
        stats = convplan.stats()
        # Stock torch against itself, with other algorithms: how far rounding alone carries two trainings apart.
        torch.backends.cudnn.deterministic = True
        other = train(MODELS[name], dtype)
        torch.backends.cudnn.benchmark = True
        third = train(MODELS[name], dtype)

    def apart(one: list[float], two: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(one, two, strict=True))

    drift, natural = apart(mine, stock), max(apart(other, stock), apart(third, stock))
    findings[f"training {name} {precision}"] = {
        "stock": stock,
        "convplan": mine,
        "drift": drift,
        "natural": natural,
        "stats": stats,
    }
    assert (stats["fell_back"], stats["failed"]) == (0, 0)
    assert stats["planned"] > 10
    assert stats["hits"] > 5 * stats["misses"]
    assert drift <= max(allowed * stock[0], 2 * natural)
    assert stock[0] - min(stock) > 2 * allowed * stock[0]  # it learns more than that


def test_the_default_policy_tunes_on_the_way_and_still_follows() -> None:
    stock = train(unet, torch.float16)
    convplan.stats(reset=True)
    with convplan.enabled(Policy(budget_s=0.05)):
        mine = train(unet, torch.float16)
    stats = convplan.stats()
    assert max(abs(a - b) for a, b in zip(mine, stock, strict=True)) <= 0.04 * stock[0]
    assert stats["tuned"] > 10
    assert stats["failed"] == 0

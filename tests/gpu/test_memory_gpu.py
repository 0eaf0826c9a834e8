"""Device memory under `enable()`: a training step's peak is at most stock torch's and the workspace limit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import convplan
from convplan import Policy

CUBLAS_BYTES = 2 * 32 * 2**20  # torch keeps a workspace for each stream: the program's, and that of the timing
ROUNDING_BYTES = 2**20  # the allocator's, over the blocks of one step
MIB = 2**20


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    from convplan import _runtime

    _runtime.forget()
    convplan.stats(reset=True)
    yield
    convplan.disable()
    gc.collect()
    torch.cuda.empty_cache()


def plain() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 128, 7, padding=3, groups=128),
        nn.Conv2d(128, 256, 1),
    )
    return model.to(memory_format=torch.channels_last), torch.randn(16, 3, 96, 96)


def volume() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv3d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose3d(32, 16, 2, stride=2),
        nn.Conv3d(16, 4, 1),
    )
    return model, torch.randn(2, 1, 32, 32, 32)


def step_bytes(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> int:
    """The most that a training step holds beside model and images, after three that plan whatever there is to plan."""
    before = 0
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cast = nullcontext() if dtype is None else torch.autocast("cuda", dtype=dtype)
        with cast:
            loss = model(images).float().square().mean()
        loss.backward()
        del loss
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.behaviour("B12")
@pytest.mark.behaviour("B26")
@pytest.mark.parametrize(
    ("make", "dtype", "limit", "effort"),
    [
        *(
            pytest.param(make, dtype, limit, "instant", id=f"{name}-{dtype or 'float32'}-{limit}-instant")
            for name, make in (("2d", plain), ("3d", volume))
            for dtype in (None, torch.float16)
            for limit in (0, 64 * MIB)
        ),
        pytest.param(plain, torch.float16, 64 * MIB, "measure", id="2d-float16-measure"),
    ],
)
def test_a_training_steps_peak_is_at_most_stock_torchs_and_the_limit(
    make: Callable[[], tuple[nn.Module, torch.Tensor]], dtype: torch.dtype | None, limit: int, effort: Any
) -> None:
    torch.manual_seed(0)
    model, images = (one.cuda() for one in make())
    stock = step_bytes(model, images, dtype)
    with convplan.enabled(Policy(workspace_limit_bytes=limit, budget_s=0.02, effort=effort)):
        found = step_bytes(model, images, dtype)
    stats = convplan.stats()
    assert stats["planned"] > 0
    assert (stats["tuned"] > 0) == (effort == "measure")
    assert found <= stock + limit + ROUNDING_BYTES, f"{(found - stock) / MIB:.1f} MiB more than stock torch"


def test_planning_gives_back_what_it_took() -> None:
    torch.manual_seed(0)
    model, images = (one.cuda() for one in plain())
    step_bytes(model, images, None)
    model.zero_grad(set_to_none=True)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with convplan.enabled(Policy(budget_s=0.02)):
        step_bytes(model, images, None)
        model.zero_grad(set_to_none=True)
        gc.collect()
        assert torch.cuda.memory_allocated() <= before + CUBLAS_BYTES + ROUNDING_BYTES

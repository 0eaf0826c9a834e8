"""Models made ready for `fuse`: in eval mode, with batch norms whose numbers all matter."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def ready(model: M, seed: int = 1) -> M:
    """The model itself, after its batch norms' numbers were made such that leaving one out changes the result."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: torch.Tensor | None, low: float, high: float) -> None:
        if tensor is not None:
            values = torch.rand(tensor.shape, generator=generator) * (high - low) + low
            tensor.data.copy_(values)

    for one in model.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm):
            fill(one.running_mean, -0.2, 0.2)
            fill(one.running_var, 0.6, 1.5)
            fill(one.weight, 0.6, 1.4)
            fill(one.bias, -0.2, 0.2)
    return model.eval()

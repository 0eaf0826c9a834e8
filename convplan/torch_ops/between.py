"""The modules that `fuse` puts in the place of concatenations and max pools: one pass over memory on a GPU.

Both do what torch does, to the bit. Torch's own move a third of what a GPU's memory can in channels-last tensors, and
max pooling writes eight bytes for each result that nobody asked for, where it was. What kernels cannot take is torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from convplan import kernels

Tensor = torch.Tensor
Ints = tuple[int, ...]

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
_transform = torch._C._functorch.maybe_current_level
_POOLS: dict[int, Callable[..., Any]] = {2: F.max_pool2d, 3: F.max_pool3d}


def _are_ours(tensors: Sequence[Any]) -> bool:
    """Whether tensors are some that a kernel may be given: plain, on a GPU, asked for no gradients, and not traced."""
    if _is_compiling() or _is_tracing() is not None or _transform() is not None:
        return False
    graded = torch.is_grad_enabled()
    return all(type(x) is Tensor and x.is_cuda and not (graded and x.requires_grad) for x in tensors)


class Joined(nn.Module):
    """`torch.cat(tensors, dim)`.

    Args:
        dim: a number; that of the channels is what kernels know.
    """

    writes_nothing = True  # into its inputs

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.training = False

    def forward(self, *tensors: Tensor) -> Tensor:
        """The tensors side by side."""
        made = None
        if _are_ours(tensors) and self.dim in (1, 1 - tensors[0].dim()):
            made = kernels.concatenate(tensors)
        return torch.cat(tensors, self.dim) if made is None else made

    def extra_repr(self) -> str:
        """What one line of a printed model says."""
        return f"dim={self.dim}"


class Windows(NamedTuple):
    """What a max pool is told: numbers for each dimension.

    Args:
        kernel, stride, padding, dilation, ceil_mode: as of `torch.nn.MaxPool2d`.
    """

    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    ceil_mode: bool


class Pooled(nn.Module):
    """`max_pool2d` or `max_pool3d`, without indices.

    Args:
        windows: of two or three dimensions.
    """

    writes_nothing = True

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self.windows = windows
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """The largest number of each window."""
        if _are_ours((x,)) and x.dim() == len(self.windows.kernel) + 2:
            made = kernels.max_pool(x, *self.windows)
            if made is not None:
                return made
        pooled: Tensor = _POOLS[len(self.windows.kernel)](x, *self.windows)
        return pooled

    def extra_repr(self) -> str:
        """What one line of a printed model says."""
        return ", ".join(f"{name}={value}" for name, value in self.windows._asdict().items())

"""Padding and ranks as torch's own kernels take them: one number a side, and two dimensions where one is not enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convplan._problem import Problem, TensorSpec


class SplitPadding:
    """Splits padding into the symmetric part that torch's kernels take, and the rest on one side that they don't.

    The rest is done by padding x beforehand, or by cropping it afterwards where x is the output.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.symmetric = [min(pair) for pair in pairs]
        extra = [(before - low, after - low) for (before, after), low in zip(pairs, self.symmetric, strict=True)]
        self.is_symmetric = not any(map(any, extra))
        # F.pad wants the last dimension first.
        self.extra = [side for pair in reversed(extra) for side in pair]
        self._pairs = extra

    def grow(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.is_symmetric else torch.nn.functional.pad(x, self.extra)

    def grown_dims(self, dims: Sequence[int]) -> tuple[int, ...]:
        grown = [size + before + after for size, (before, after) in zip(dims[2:], self._pairs, strict=True)]
        return (*dims[:2], *grown)

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        for dim, (before, after) in enumerate(self._pairs, start=2):
            if before or after:
                x = x.narrow(dim, before, x.shape[dim] - before - after)
        return x


def output_padding(problem: Problem, x_dims: Sequence[int], padding: Sequence[int]) -> list[int]:
    """What a transposed convolution must add behind to give an x of these dims."""
    sizes = zip(x_dims[2:], problem.y.dims[2:], problem.w.dims[2:], strict=True)
    window = zip(padding, problem.stride, problem.dilation, strict=True)
    return [
        size - ((out - 1) * step - 2 * pad + dil * (taps - 1) + 1)
        for (size, out, taps), (pad, step, dil) in zip(sizes, window, strict=True)
    ]


def lift(problem: Problem) -> Problem:
    """The same 1-D problem with a unit dimension before the last, channels-last (B5)."""

    def lifted(spec: TensorSpec) -> TensorSpec:
        return TensorSpec.dense((*spec.dims[:2], 1, spec.dims[2]), spec.dtype, "channels_last")

    return Problem(
        op=problem.op,
        x=lifted(problem.x),
        w=lifted(problem.w),
        y=lifted(problem.y),
        padding=((0, 0), *problem.padding),
        stride=(1, *problem.stride),
        dilation=(1, *problem.dilation),
        groups=problem.groups,
        epilogue=problem.epilogue,
        device=problem.device,
    )

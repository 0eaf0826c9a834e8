"""A whole call of `F.conv*` or `F.conv_transpose*` from its definition, in float64, and how far rounding may lead.

Unlike `oracle`, which answers for a `Problem`, this takes a call's own arguments, so it also judges how they are turned
into problems. It adds up one slice for each filter tap. Autograd differentiates it to any order without meeting a
convolution, so gradients of convolutions have the same reference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor

# Any engine may have run the call, and a transform's error does not shrink with the output it lands on: so the largest
# magnitude of the output counts for all of it, with the factor that `oracle` grants an FFT.
FACTOR = 8.0


def defined(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[Any] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
) -> Tensor:
    """The result of the call, in float64. `padding` entries may be (before, after) pairs, or `same` and `valid`."""
    spatial = w.dim() - 2
    if x.dim() == spatial + 1:
        arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        arguments |= {"transposed": transposed, "output_padding": output_padding}
        return defined(x.unsqueeze(0), w, bias, **arguments).squeeze(0)  # type: ignore[arg-type]
    steps, dilations, extra = (_each(v, spatial) for v in (stride, dilation, output_padding))
    reach = [dil * (taps - 1) for dil, taps in zip(dilations, w.shape[2:], strict=True)]
    if padding == "same":
        pads = [(far // 2, far - far // 2) for far in reach]
    else:
        given = _each(0 if padding == "valid" else padding, spatial)
        pads = [(one, one) if isinstance(one, int) else tuple(one) for one in given]
    x, w = x.double(), w.double().unflatten(0, (groups, -1))
    x = x.unflatten(1, (groups, -1))
    y = (_scattered if transposed else _gathered)(x, w, steps, pads, dilations, extra)
    return y if bias is None else y + bias.double().reshape(-1, *[1] * spatial)


def _each(value: Any, spatial: int) -> list[Any]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


def _taps(sizes: Sequence[int]) -> Any:
    return itertools.product(*map(range, sizes))


def _gathered(x: Tensor, w: Tensor, steps: Any, pads: Any, dilations: Any, extra: Any) -> Tensor:
    """x (N, G, C/G, in), w (G, K/G, C/G, taps): every output gathers what its window covers."""
    sizes = [
        (size + before + after - dil * (taps - 1) - 1) // step + 1
        for size, taps, step, (before, after), dil in zip(x.shape[3:], w.shape[3:], steps, pads, dilations, strict=True)
    ]
    padded = torch.nn.functional.pad(x, [side for pair in reversed(pads) for side in pair])
    y = x.new_zeros((x.shape[0], w.shape[0], w.shape[1], *sizes))
    for tap in _taps(w.shape[3:]):
        window = _window(tap, sizes, steps, dilations)
        y = y + torch.einsum("ngc...,gkc->ngk...", padded[window], w[(..., *tap)])
    return y.flatten(1, 2)


def _scattered(x: Tensor, w: Tensor, steps: Any, pads: Any, dilations: Any, extra: Any) -> Tensor:
    """x (N, G, C/G, in), w (G, C/G, K/G, taps): every input is scattered over the window it stands for."""
    sizes = [
        (size - 1) * step + dil * (taps - 1) + 1 + more
        for size, taps, step, dil, more in zip(x.shape[3:], w.shape[3:], steps, dilations, extra, strict=True)
    ]
    y = x.new_zeros((x.shape[0], w.shape[0], w.shape[2], *sizes))
    for tap in _taps(w.shape[3:]):
        places = torch.zeros_like(y)
        places[_window(tap, x.shape[3:], steps, dilations)] = torch.einsum("ngc...,gck->ngk...", x, w[(..., *tap)])
        y = y + places
    inside = (slice(before, size - after) for size, (before, after) in zip(sizes, pads, strict=True))
    return y[(..., *inside)].flatten(1, 2)


def _window(tap: Any, sizes: Any, steps: Any, dilations: Any) -> Any:
    slices = (
        slice(at * dil, at * dil + (size - 1) * step + 1, step)
        for at, size, step, dil in zip(tap, sizes, steps, dilations, strict=True)
    )
    return (..., *slices)


class Right(NamedTuple):
    """A call's result, and for a given incoming gradient those of x, w and bias."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor | None


def differentiated(x: Tensor, w: Tensor, bias: Tensor | None, dy: Tensor, **arguments: Any) -> Right:
    """The right result and gradients, in float64."""
    given = [t.detach().double().requires_grad_() for t in (x, w, bias) if t is not None]
    y = defined(*given, **arguments)
    grads = torch.autograd.grad(y, given, dy.detach().double())
    return Right(y.detach(), grads[0], grads[1], grads[2] if bias is not None else None)


def limits(x: Tensor, w: Tensor, bias: Tensor | None, dy: Tensor, **arguments: Any) -> Right:
    """How far each number of `differentiated` may be off in the dtype of `x`, n being the most products in one sum:

    eps(dtype) * |right|  +  FACTOR * sqrt(n) * eps(accumulate) * the largest sum of magnitudes
    """
    right = differentiated(x, w, bias, dy, **arguments)
    absolute = [None if t is None else t.detach().abs() for t in (x, w, bias)]
    magnitudes = differentiated(*absolute, dy.abs(), **arguments)  # type: ignore[arg-type]
    rounded = torch.finfo(x.dtype).eps
    summed = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    n_terms = max(x.numel(), w.numel(), dy.numel(), 1)  # no sum has more products than a tensor has elements

    def limit(value: Tensor | None, magnitude: Tensor | None) -> Tensor | None:
        if value is None or magnitude is None or not value.numel():
            return value
        return rounded * value.abs() + FACTOR * math.sqrt(n_terms) * summed * magnitude.max()

    return Right(*(limit(*pair) for pair in zip(right, magnitudes, strict=True)))  # type: ignore[arg-type]


def worst(found: Tensor, right: Tensor, limit: Tensor) -> float:
    """The largest error over its limit: 1 is allowed. NaN and infinity count as infinitely wrong."""
    assert found.shape == right.shape, f"shape is {tuple(found.shape)}, expected {tuple(right.shape)}"
    off = (found.detach().double() - right).abs()
    ratio = torch.where(off == 0, 0.0, off / limit)
    return float(torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf).max()) if ratio.numel() else 0.0

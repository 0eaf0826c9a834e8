"""The same by torch's operations, for every device, dtype and layout: what runs where Triton's kernels do not.

Batch normalization itself is torch's own kernel, so that half is read and written as half; sum and activation follow,
each rounded. For float64 everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from convplan._activations import Resolved

if TYPE_CHECKING:
    from convplan.kernels import Norm

Tensor = torch.Tensor
Parameters = tuple[float, ...]

_aten = torch.ops.aten

# From the activation's argument. Each takes what comes in, the argument, and the parameters.
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "none": lambda dy, x: dy,
    "relu": lambda dy, x: _aten.threshold_backward(dy, x, 0),
    "leaky_relu": lambda dy, x, slope: _aten.leaky_relu_backward(dy, x, slope, False),
    "clamp": lambda dy, x, low, high: torch.where((x >= low) & (x <= high), dy, 0),
    "hardtanh": lambda dy, x, low, high: _aten.hardtanh_backward(dy, x, low, high),
    "gelu": lambda dy, x: _aten.gelu_backward(dy, x),
    "gelu_tanh": lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    "silu": lambda dy, x: _aten.silu_backward(dy, x),
    "sigmoid": lambda dy, x: _aten.sigmoid_backward(dy, torch.sigmoid(x)),
    "tanh": lambda dy, x: _aten.tanh_backward(dy, torch.tanh(x)),
    "hardswish": lambda dy, x: _aten.hardswish_backward(dy, x),
    "elu": lambda dy, x, alpha: _aten.elu_backward(dy, alpha, 1, 1, False, x),
    "softplus": lambda dy, x, beta, threshold: _aten.softplus_backward(dy, x, beta, threshold),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and statistics of a dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def column_sums(y: Tensor, out: Tensor | None) -> Tensor:
    """Sums and sums of squares of each channel, (2, K)."""
    values = y.to(wide(y.dtype))
    others = [place for place in range(y.dim()) if place != 1]
    target = values.new_empty((2, y.shape[1])) if out is None else out
    target[0] = values.sum(others)
    target[1] = values.square().sum(others)
    return target


@torch.no_grad()
def normalize(
    y: Tensor, sums: Tensor | None, norm: Norm, residual: Tensor | None, activation: str, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """The output, and mean and inverse standard deviation of each channel."""
    weight, bias = _affine(y, norm)
    if norm.batches is not None:
        norm.batches.add_(1)
    if sums is None:
        out, mean, invstd = _native(y, norm, weight, bias)
    else:
        rows = y.numel() // y.shape[1]
        mean = sums[0] / rows
        var = (sums[1] / rows - mean.square()).clamp_min(0)
        for running, new in ((norm.running_mean, mean), (norm.running_var, var * (rows / (rows - 1)))):
            if running is not None:
                running.copy_((1 - norm.momentum) * running.to(new.dtype) + norm.momentum * new)
        out = _aten.native_batch_norm(y, weight, bias, mean, var, False, 0.0, norm.eps)[0]
        invstd = (var + norm.eps).rsqrt()
    if residual is not None:
        out = out.add_(residual)
    out = Resolved(activation, parameters).of(out)
    return _as(out, y), torch.stack((mean, invstd)).to(wide(y.dtype))


def _native(y: Tensor, norm: Norm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own, which wants the running statistics in the dtype of its parameters, and both or neither."""
    running = [norm.running_mean, norm.running_var]
    kept = [one if one is None or one.dtype == weight.dtype else one.to(weight.dtype) for one in running]
    if sum(one is None for one in kept) == 1:
        kept = [torch.zeros_like(weight) if one is None else one for one in kept]
    out, mean, invstd = _aten.native_batch_norm(y, weight, bias, *kept, True, norm.momentum, norm.eps)
    for one, updated in zip(running, kept, strict=True):
        if one is not None and updated is not None and updated is not one:
            one.copy_(updated)
    return out, mean, invstd


@torch.no_grad()
def normalize_backward(
    grad: Tensor,
    y: Tensor,
    other: Tensor | None,
    from_output: bool,
    saved: Tensor,
    norm: Norm,
    activation: str,
    parameters: Parameters,
    wants_y: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of y, of what was added behind the normalization, and (2, K) the sums for bias and weight."""
    weight, bias = _affine(y, norm)
    mean, invstd = saved[0], saved[1]
    behind = grad
    if activation != "none":
        if from_output:
            assert other is not None  # the package's front asked for it
            behind = Resolved(activation, parameters).gradient(grad, other)
        else:
            z = _aten.native_batch_norm(y, weight, bias, mean, invstd.square().reciprocal(), False, 0.0, 0.0)[0]
            behind = _BACKWARD[activation](grad, z if other is None else z.add_(other), *parameters)
    grad_y, grad_weight, grad_bias = _aten.native_batch_norm_backward(
        behind, y, weight, None, None, mean, invstd, True, norm.eps, [wants_y, True, True]
    )
    return None if grad_y is None else _as(grad_y, y), _as(behind, y), torch.stack((grad_bias, grad_weight))


@torch.no_grad()
def activation_backward(
    grad: Tensor, other: Tensor | None, activation: str, parameters: Parameters, from_output: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """What comes in behind the activation, and its sums over all but the channels."""
    if activation == "none":
        g = grad
    elif from_output:
        assert other is not None  # the package's front asked for it
        g = Resolved(activation, parameters).gradient(grad, other)
    else:
        g = _BACKWARD[activation](grad, other, *parameters)
    others = [place for place in range(grad.dim()) if place != 1]
    return g, g.sum(others, dtype=wide(grad.dtype)) if bias else None


def _as(result: Tensor, y: Tensor) -> Tensor:
    """In y's strides, which some of torch's kernels do not keep."""
    return result if result.stride() == y.stride() else torch.empty_like(y).copy_(result)


def _affine(y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias in the dtype of the statistics; ones and zeros for those that are absent."""
    dtype, columns = wide(y.dtype), y.shape[1]
    weight = y.new_ones(columns, dtype=dtype) if norm.weight is None else norm.weight.to(dtype)
    return weight, y.new_zeros(columns, dtype=dtype) if norm.bias is None else norm.bias.to(dtype)

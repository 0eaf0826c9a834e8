"""Epilogues by torch's elementwise kernels: what stands behind a convolution that no engine fuses it with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from convplan._epilogue import Epilogue

Tensor = torch.Tensor

# In place where torch can; each takes the parameters of `ACTIVATIONS` in order.
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu_,
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope, inplace=True),
    "clamp": lambda x, low, high: x.clamp_(low, high),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "elu": lambda x, alpha: F.elu(x, alpha, inplace=True),
    "softplus": F.softplus,
}


def activate(x: Tensor, epilogue: Epilogue) -> Tensor:
    """The epilogue's activation of `x`, which it may overwrite."""
    return _ACTIVATIONS[epilogue.activation](x, *epilogue.parameters)


def apply_epilogue(
    result: Tensor, epilogue: Epilogue, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None
) -> Tensor:
    """`activation(scale * result + alpha * residual + bias)`, in the dtype of `result`, which is overwritten.

    Args:
        result: (N, K, spatial…), of a floating-point type.
        epilogue: says alpha and the activation.
        bias, scale: (K,), or None where there is nothing to add or to multiply with.
        residual: of the shape of `result`, or None.
    """
    channels = (-1, *[1] * (result.dim() - 2))
    if scale is not None:
        result.mul_(scale.view(channels))
    if residual is not None:
        # Torch adds no 8-bit numbers to others in place.
        result.add_(residual.to(result.dtype) if residual.itemsize == 1 else residual, alpha=epilogue.alpha)
    if bias is not None:
        result.add_(bias.view(channels))
    return activate(result, epilogue)

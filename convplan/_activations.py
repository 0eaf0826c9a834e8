"""What may follow a convolution, as torch computes and differentiates it: `activation=`, and an epilogue composed.

Two families. The derivative of some activations can be had from their output alone, so that what a fused plan writes is
enough for the backward pass (`FROM_OUTPUT`). The others need what went in, which a fused plan never writes: with
gradients they are computed by torch, behind a plan that fuses the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from convplan._epilogue import ACTIVATIONS, ALIASES, Epilogue
from convplan._errors import SpecError

Tensor = torch.Tensor
Activation = str | Sequence[str | float] | None
"""A name of `ACTIVATIONS` or `ALIASES`, or (name, *numbers), or None. `hardtanh` takes bounds here, low and high."""

_aten = torch.ops.aten

# Both as `hardtanh`, whose derivative torch takes to be 0 on the bounds. `clamp`'s is 1 there, which no output tells.
_HARDTANH = ("relu6", "hardtanh")

# Each takes what comes in for the output, the output, and the parameters. Those of pieces that are straight lines have
# no second derivative, so that there the output is cut off from its history.
_FROM_OUTPUT: dict[str, Callable[..., Tensor]] = {
    "none": lambda dy, y: dy,
    "relu": lambda dy, y: _aten.threshold_backward.default(dy, y.detach(), 0),
    "leaky_relu": lambda dy, y, slope: _aten.leaky_relu_backward.default(dy, y.detach(), slope, True),
    "hardtanh": lambda dy, y, low, high: _aten.hardtanh_backward.default(dy, y.detach(), low, high),
    "sigmoid": lambda dy, y: _aten.sigmoid_backward.default(dy, y),
    "tanh": lambda dy, y: _aten.tanh_backward.default(dy, y),
    "elu": lambda dy, y, alpha: _aten.elu_backward.default(dy, alpha, 1, 1, True, y),
}

# None of them writes to what it is given.
_FORWARD: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "clamp": torch.clamp,
    "hardtanh": F.hardtanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "softplus": F.softplus,
}


class Resolved(NamedTuple):
    """An activation in one form.

    Args:
        name: as torch differentiates it: a key of `ACTIVATIONS`, or `hardtanh`.
        parameters: all of them.
    """

    name: str = "none"
    parameters: tuple[float, ...] = ()

    @property
    def fused_name(self) -> str:
        """What an `Epilogue` calls it."""
        return "clamp" if self.name == "hardtanh" else self.name

    @property
    def from_output(self) -> bool:
        """Its derivative can be had from its output."""
        if self.name in ("leaky_relu", "elu"):  # below 0 its output does not say which side it is from
            return self.parameters[0] >= 0
        return self.name in _FROM_OUTPUT

    def of(self, x: Tensor) -> Tensor:
        """Its value, as an ordinary operation of torch's."""
        return _FORWARD[self.name](x, *self.parameters)

    def gradient(self, dy: Tensor, y: Tensor) -> Tensor:
        """What comes in for its argument, from what comes in for its output `y`. Only `from_output`."""
        return _FROM_OUTPUT[self.name](dy, y, *self.parameters)


NONE = Resolved()


def resolve(activation: Activation) -> Resolved:
    """An activation as a user writes it, in one form.

    Raises:
        SpecError: it is unknown (the known are listed), or its numbers are none that it takes.
    """
    if activation is None:
        return NONE
    given = (activation,) if isinstance(activation, str) else activation
    if not isinstance(given, (tuple, list)) or not given or not isinstance(given[0], str):
        known = ", ".join((*ACTIVATIONS, *ALIASES))
        raise SpecError(f"activation is {activation!r}, expected a name or (name, *numbers); names are {known}")
    name, *numbers = given
    if name == "hardtanh" and numbers:  # an alias of a clamp's default has no numbers of its own
        name, hard = "clamp", True
    else:
        hard = name in _HARDTANH
    as_fused = Epilogue(activation=name, parameters=tuple(numbers))
    return Resolved("hardtanh" if hard else as_fused.activation, as_fused.parameters)


def follow(
    result: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: Resolved,
) -> Tensor:
    """`activation(scale * result + alpha * residual + bias)` by torch's elementwise operations, each differentiable.

    Each step is rounded to the dtype of `result`, as torch's own modules do one after the other.
    """
    channels = (-1, *[1] * (result.dim() - 2))
    if scale is not None:
        result = scale_channels(result, scale)
    if residual is not None:
        result = torch.add(result, residual, alpha=alpha)
    if bias is not None:
        result = result + bias.view(channels)
    return activation.of(result)


def scale_channels(values: Tensor, scale: Tensor) -> Tensor:
    """`values` (N, K, spatial…) times one factor for each channel, in their dtype."""
    return (values * scale.view(-1, *[1] * (values.dim() - 2))).to(values.dtype)


def times(grad: Tensor, alpha: float) -> Tensor:
    """`alpha * grad`; itself for 1."""
    return grad if alpha == 1 else grad * alpha

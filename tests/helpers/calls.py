"""Named calls of torch's functional convolutions, as a user writes them: small, each with its own arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from helpers.definition import Right, differentiated, limits

Tensor = torch.Tensor


@dataclass(frozen=True)
class Call:
    """One call of `conv{1,2,3}d` or `conv_transpose{1,2,3}d`.

    Args:
        id: what the test id shows.
        x, w: dims of input and weight; an input one dimension short of the weight's rank has no batch.
        arguments: keywords of the call. `output_padding` is the only one that torch's two functions do not share.
        planned: False where no `Problem` describes it, so that under `enable()` stock torch runs it.
    """

    id: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    transposed: bool = False
    planned: bool = True

    @property
    def function(self) -> str:
        """Name of the function, in `torch.nn.functional` and in `convplan`."""
        return f"conv{'_transpose' if self.transposed else ''}{len(self.w) - 2}d"

    @property
    def filters(self) -> int:
        """Output channels."""
        return self.w[1] * int(self.arguments.get("groups", 1)) if self.transposed else self.w[0]

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random input, weight, and bias where there is one."""
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(dims, generator=generator).to(dtype) for dims in (self.x, self.w))
        bias = torch.randn(self.filters, generator=generator).to(dtype) if self.bias else None
        return x, w, bias

    def run(self, home: Any, x: Tensor, w: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        """Call the function of this name in `home`."""
        result: Tensor = getattr(home, self.function)(x, w, bias, **self.arguments, **more)
        return result

    def differentiate(
        self, home: Any, x: Tensor, w: Tensor, bias: Tensor | None, incoming: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The result, and the gradients of input, weight and bias; `incoming` makes the gradient that comes in."""
        leaves = [t.detach().requires_grad_() for t in (x, w, bias) if t is not None]
        y = self.run(home, *leaves, *([] if bias is not None else [None]))
        return y, list(torch.autograd.grad(y, leaves, incoming(y)))

    def right(self, x: Tensor, w: Tensor, bias: Tensor | None, dy: Tensor) -> Right:
        """What `differentiate` must give, in float64."""
        return differentiated(x, w, bias, dy, transposed=self.transposed, **self.arguments)

    def limits(self, x: Tensor, w: Tensor, bias: Tensor | None, dy: Tensor) -> Right:
        """How far each number of `right` may be off."""
        return limits(x, w, bias, dy, transposed=self.transposed, **self.arguments)


def turned(*args: Any, **changes: Any) -> Call:
    """A transposed call."""
    return Call(*args, transposed=True, **changes)


CALLS: tuple[Call, ...] = (
    Call("1d", (2, 3, 20), (4, 3, 5), {"padding": 2}),
    Call("1d-stride-dilation-groups", (2, 4, 21), (6, 2, 3), {"stride": 2, "padding": 1, "dilation": 3, "groups": 2}),
    Call("1d-long-filter", (1, 2, 90), (2, 2, 41), {"padding": 20}, bias=False),
    Call("1d-no-batch", (3, 15), (4, 3, 3)),
    Call("1d-same-even", (2, 3, 14), (2, 3, 4), {"padding": "same"}),
    Call("2d", (2, 3, 8, 7), (4, 3, 3, 3), {"padding": 1}),
    Call("2d-1x1", (2, 4, 5, 6), (5, 4, 1, 1)),
    Call("2d-1x1-padded-stride", (2, 3, 6, 5), (4, 3, 1, 1), {"stride": 2, "padding": 1}, bias=False),
    Call("2d-depthwise", (2, 4, 9, 8), (8, 1, 3, 3), {"padding": 1, "groups": 4}),
    Call("2d-each-its-own", (2, 4, 11, 10), (6, 2, 2, 3), {
        "stride": (2, 1), "padding": (0, 2), "dilation": (1, 3), "groups": 2,
    }),
    Call("2d-leftover-rows", (1, 2, 10, 11), (3, 2, 3, 3), {"stride": 4}),
    Call("2d-no-batch", (3, 7, 6), (2, 3, 3, 2), {"padding": 1}),
    Call("2d-whole-input", (2, 3, 5, 4), (4, 3, 5, 4)),
    Call("2d-wide-padding", (1, 2, 4, 4), (3, 2, 2, 2), {"padding": 3}),
    Call("2d-one-channel", (2, 1, 6, 6), (1, 1, 3, 3)),
    Call("2d-one-pixel", (2, 3, 1, 1), (4, 3, 3, 3), {"padding": 1}),
    Call("2d-same-even", (2, 2, 7, 6), (3, 2, 4, 2), {"padding": "same", "dilation": (1, 3)}),
    Call("2d-valid", (2, 2, 7, 6), (3, 2, 3, 2), {"padding": "valid"}, bias=False),
    Call("3d", (1, 2, 4, 5, 6), (3, 2, 2, 3, 3), {"padding": (0, 1, 1)}),
    Call("3d-stride-groups", (2, 4, 5, 4, 6), (4, 2, 2, 2, 3), {"stride": (2, 1, 2), "groups": 2}, bias=False),
    Call("3d-no-batch-same", (2, 3, 4, 5), (3, 2, 2, 3, 2), {"padding": "same"}),
    turned("t1d", (2, 3, 10), (3, 4, 4), {"stride": 2, "padding": 1}),
    turned("t1d-no-batch", (3, 7), (3, 2, 3), {"stride": 3, "output_padding": 2}, bias=False),
    turned("t2d", (2, 3, 5, 6), (3, 4, 3, 3), {"padding": 1}),
    turned("t2d-stride-output-padding", (2, 3, 5, 4), (3, 4, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    turned("t2d-groups-dilation", (2, 4, 5, 6), (4, 3, 2, 3), {"stride": (1, 2), "dilation": 2, "groups": 2}),
    turned("t2d-output-padding-above-stride", (1, 2, 4, 5), (2, 3, 2, 2), {
        "stride": 2, "padding": 3, "output_padding": (2, 1), "dilation": 3,
    }),
    turned("t2d-output-padding-above-stride-bare", (1, 2, 4, 5), (2, 3, 2, 2), {
        "stride": (1, 2), "output_padding": 2, "dilation": 3,
    }, planned=False),
    turned("t2d-whole-cropped", (2, 3, 4, 4), (3, 2, 3, 3), {"padding": 2}, bias=False),
    turned("t3d", (1, 2, 3, 3, 4), (2, 3, 2, 3, 2), {"stride": (2, 1, 2), "output_padding": (1, 0, 0)}),
    turned("t3d-groups", (2, 4, 2, 3, 3), (4, 1, 2, 2, 2), {"padding": 1, "groups": 2}, bias=False),
)  # fmt: skip
"""The last group of arguments of a row is what it stresses; its id says so in words."""


def call(name: str) -> Call:
    """One call by its id."""
    return next(one for one in CALLS if one.id == name)

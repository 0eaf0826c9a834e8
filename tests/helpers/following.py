"""What may follow a convolution, by its definition in float64, how far rounding may lead, and cases for both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from helpers.calls import Call, call
from helpers.definition import FACTOR, defined

Tensor = torch.Tensor
Activation = Any

# From the formulas in the documentation of torch.nn, in float64, with the derivative's largest magnitude.
ACTIVATIONS: dict[str, tuple[Activation, Callable[[Tensor], Tensor], float]] = {
    "none": (None, lambda t: t, 1.0),
    "relu": ("relu", lambda t: t.clamp(min=0), 1.0),
    "leaky-relu": ("leaky_relu", lambda t: torch.where(t > 0, t, 0.01 * t), 1.0),
    "leaky-relu-steep": (("leaky_relu", 1.5), lambda t: torch.where(t > 0, t, 1.5 * t), 1.5),
    "leaky-relu-turned": (("leaky_relu", -0.5), lambda t: torch.where(t > 0, t, -0.5 * t), 1.0),
    "clamp": (("clamp", -1, 2.5), lambda t: t.clamp(-1, 2.5), 1.0),
    "relu6": ("relu6", lambda t: t.clamp(0, 6), 1.0),
    "hardtanh": ("hardtanh", lambda t: t.clamp(-1, 1), 1.0),
    "hardtanh-wide": (("hardtanh", -0.5, 2), lambda t: t.clamp(-0.5, 2), 1.0),
    "gelu": ("gelu", lambda t: t * (1 + torch.erf(t / math.sqrt(2))) / 2, 1.13),
    "gelu-tanh": (
        "gelu_tanh", lambda t: t * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))) / 2, 1.13,
    ),
    "silu": ("silu", lambda t: t / (1 + torch.exp(-t)), 1.1),
    "swish": ("swish", lambda t: t / (1 + torch.exp(-t)), 1.1),
    "sigmoid": ("sigmoid", lambda t: 1 / (1 + torch.exp(-t)), 0.25),
    "tanh": ("tanh", lambda t: 1 - 2 / (1 + torch.exp(2 * t)), 1.0),
    "hardswish": ("hardswish", lambda t: t * (t + 3).clamp(0, 6) / 6, 1.5),
    "elu": ("elu", lambda t: torch.where(t > 0, t, torch.expm1(t.clamp(max=0))), 1.0),
    "elu-turned": (("elu", -0.7), lambda t: torch.where(t > 0, t, -0.7 * torch.expm1(t.clamp(max=0))), 1.0),
    "softplus": ("softplus", lambda t: torch.log1p(torch.exp(-t.abs())) + t.clamp(min=0), 1.0),
    "softplus-sharp": (
        ("softplus", 2.0, 3.0),
        lambda t: torch.where(2 * t > 3, t, torch.log1p(torch.exp((2 * t).clamp(max=3))) / 2),
        1.0,
    ),
}  # fmt: skip
JUMPS = {"softplus-sharp": 0.03}  # at its threshold, which rounding may reach from either side

PARTS = ("bias", "residual", "scale")
SUBSETS = [parts for count in range(4) for parts in itertools.combinations(PARTS, count)]
CALLED = (
    "1d", "2d", "2d-depthwise", "2d-each-its-own", "2d-no-batch", "2d-same-even", "3d", "3d-no-batch-same",
    "t1d", "t1d-no-batch", "t2d-stride-output-padding", "t2d-groups-dilation", "t3d",
)  # fmt: skip
LAYOUTS = ("contiguous", "channels_last")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """One activation behind one call, with some of bias, residual and scale."""

    activation: str
    parts: tuple[str, ...]
    called: str
    dtype: torch.dtype
    layout: str

    @property
    def id(self) -> str:
        parts = "+".join(self.parts) or "alone"
        return f"{self.activation}-{parts}-{self.called}-{str(self.dtype).removeprefix('torch.')}-{self.layout}"


def cases(dtypes: Iterable[torch.dtype] = DTYPES) -> list[Case]:
    """Every activation in every dtype, each time with others of the parts, calls and layouts, in turns that never meet
    in the same order twice."""
    turns = itertools.count(), itertools.count()
    return [
        Case(activation, SUBSETS[(5 * i + j) % 8], CALLED[(7 * i + j) % 13], dtype, LAYOUTS[(i + i // 2) % 2])
        for activation in ACTIVATIONS
        for dtype in dtypes
        for i, j in [(next(turns[0]), next(turns[1]) // 8)]
    ]


class Built(NamedTuple):
    """The tensors of a case, its keywords, and what must come out, with how far each number may be off."""

    call: Call
    x: Tensor
    w: Tensor
    keywords: dict[str, Any]
    right: Tensor
    limit: Tensor

    def run(self, home: Any, **more: Any) -> Tensor:
        """The function of this name in `home`."""
        found: Tensor = getattr(home, self.call.function)(self.x, self.w, **self.keywords, **more)
        return found


ALPHA = 0.75


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A tensor with a batch in one of `LAYOUTS`; 1-D ones have no such name."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = layout == "channels_last" and tensor.dim() in formats
    return tensor.contiguous(memory_format=formats[tensor.dim()]) if last else tensor.contiguous()


def built(case: Case, device: str = "cpu", seed: int = 0) -> Built:
    """The case with random numbers of that seed."""
    one = call(case.called)
    x, w, _ = one.tensors(case.dtype, seed)
    w = laid_out(w, case.layout)
    x = laid_out(x, case.layout) if x.dim() == w.dim() else laid_out(x.unsqueeze(0), case.layout).squeeze(0)
    conv = defined(x, w, transposed=one.transposed, **one.arguments)
    magnitude = defined(x.abs(), w.abs(), transposed=one.transposed, **one.arguments)
    generator = torch.Generator().manual_seed(seed + 1)
    wide = torch.promote_types(case.dtype, torch.float32)
    given: dict[str, Tensor] = {}
    if "bias" in case.parts:
        given["bias"] = torch.randn(one.filters, generator=generator).to(case.dtype)
    if "residual" in case.parts:
        plain = one.run(F, x.to(device), w.to(device), None)  # torch's choice of a layout, which depends on the device
        values = torch.randn(conv.shape, generator=generator).to(case.dtype)
        given["residual"] = torch.empty_like(plain, device="cpu").copy_(values)
    if "scale" in case.parts:
        given["scale"] = (torch.rand(one.filters, generator=generator) + 0.5).to(wide)
    keyword, function, slope = ACTIVATIONS[case.activation]
    channels = (-1, *[1] * (w.dim() - 2))
    scale = given["scale"].double().view(channels) if "scale" in given else torch.ones(()).double()
    terms = [scale * conv]
    if "residual" in given:
        terms.append(ALPHA * given["residual"].double())
    if "bias" in given:
        terms.append(given["bias"].double().view(channels))
    total = torch.stack([term.expand(conv.shape) for term in terms]).sum(0)
    right = function(total)
    rounded, summed = torch.finfo(case.dtype).eps, torch.finfo(wide).eps
    sizes = torch.stack([term.expand(conv.shape).abs() for term in terms]).sum(0)
    n_terms = max(x.numel(), w.numel())
    off = 2 * rounded * sizes + FACTOR * math.sqrt(n_terms) * summed * (scale * magnitude).max()
    limit = slope * off + 2 * rounded * (right.abs() + 0.5) + JUMPS.get(case.activation, 0.0)
    keywords = {**one.arguments, **{name: tensor.to(device) for name, tensor in given.items()}, "activation": keyword}
    if "residual" in given:
        keywords["alpha"] = ALPHA
    return Built(one, x.to(device), w.to(device), keywords, right.to(device), limit.to(device))

"""The modules that `fuse` puts in the place of a convolution and what follows it.

What is decided here is what can be known only when a tensor is there: whether the residual has the result's shape,
dtype and layout, without which the sum is computed apart, as the model had it. What is fused is decided in `fuse`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from convplan._activations import Resolved
from convplan._choices import state
from convplan._errors import SpecError
from convplan._policy import Policy
from convplan._problem import normalize_strides
from convplan._runtime import Callers, local
from convplan.torch_ops import functional, fused
from convplan.torch_ops.adapter import DTYPE_NAMES, ConvArgs, output_strides
from convplan.torch_ops.arguments import Padding, arguments
from convplan.torch_ops.library import bare_of, result_dims
from convplan.torch_ops.seen import Alike, live_flags

Tensor = torch.Tensor

_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_PLAIN = (Tensor, nn.Parameter)
_WORKED_OUT = ("_function", "_named", "_fused", "_fits", "_seen")

MOST_SHAPES = 256  # remembered by one module; inputs may come in shapes without end


class Sum(NamedTuple):
    """How the model adds something to a convolution's result.

    Args:
        alpha: what the other tensor is multiplied with.
        convolution_first: of the two operands.
        in_place: written into the first.
    """

    alpha: float = 1.0
    convolution_first: bool = True
    in_place: bool = False

    def of(self, result: Tensor, residual: Any) -> Tensor:
        """The sum as the model computes it."""
        first, second = (result, residual) if self.convolution_first else (residual, result)
        if self.alpha != 1:
            return first.add_(second, alpha=self.alpha) if self.in_place else torch.add(first, second, alpha=self.alpha)
        if self.in_place:
            first += second
            return first
        return first + second


class Geometry(NamedTuple):
    """What a convolution is told beside tensors, as torch's functions take it.

    Args:
        spatial: 1, 2 or 3.
        stride, padding, dilation, transposed, output_padding, groups: as of the modules; padding may be a name.
    """

    spatial: int
    stride: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def args(self, weight: Tensor) -> ConvArgs:
        """The same with padding as numbers.

        Raises:
            SpecError: numbers that have no meaning.
        """
        _, stride, padding, dilation, transposed, outer, groups = self
        return arguments(self.spatial, weight, stride, padding, dilation, transposed, outer, groups)


class _Known(NamedTuple):
    """A call that was made before.

    Args:
        home: the thread's table that keeps what ran it.
        alike: its tensors.
        run: what ran it.
        whole: that takes a residual and a scale as well.
    """

    home: weakref.ref[Callers]
    alike: Alike
    run: Callable[..., Tensor]
    whole: bool


class FusedCall(nn.Module):
    """A convolution whose weight is computed elsewhere, with a sum and an activation: one plan where there is one.

    Args:
        geometry: of the convolution.
        sum: how something is added to its result; None: nothing is.
        activation: computed last; None: none.
        policy: as of `convplan.conv2d`.
    """

    writes_nothing = True  # into its inputs, which `fuse` asks of modules that it does not know

    def __init__(
        self,
        geometry: Geometry,
        sum: Sum | None = None,
        activation: Resolved | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__()
        self.geometry, self.sum, self.activation, self.policy = geometry, sum, activation, policy
        self.training = False
        self._ready()

    def _ready(self) -> None:
        spatial, stride, padding, dilation, transposed, outer, groups = self.geometry
        name = f"conv{'_transpose' if transposed else ''}{spatial}d"
        self._function: Callable[..., Tensor] = getattr(functional, name)
        self._named: dict[str, Any] = {
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "policy": self.policy,
        }  # fmt: skip
        if transposed:
            self._named["output_padding"] = outer
        self._fused: dict[str, Any] = dict(self._named)
        if self.activation is not None:
            name, parameters = self.activation
            self._fused["activation"] = (name, *parameters) if parameters else name
        self._fits: dict[tuple[Any, ...], bool] = {}
        # By thread, input shape, whether it was inference mode, in which tensors are others, and whether the input is
        # the residual as well, since torch's guards take every tensor once.
        self._seen: dict[tuple[int, torch.Size, bool, bool], _Known] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is worked out from the rest."""
        return {k: v for k, v in self.__dict__.items() if k not in _WORKED_OUT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._ready()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The convolution of x with a weight, and all that follows it here.

        A call without gradients that is like one of those before is known by comparing what could differ, which costs
        half of making a key of it.
        """
        if _is_compiling() or _any_autocast() or _is_grad_enabled() or _is_tracing() is not None:
            return self._called(x, weight, bias, residual)
        home = local.callers
        if self.sum is None:
            residual = None
        try:
            lows = (
                x.data_ptr() & 31, weight.data_ptr() & 31, 0 if bias is None else bias.data_ptr() & 31,
                0 if residual is None else residual.data_ptr() & 31,
            )  # fmt: skip
            twice = residual is x
            known = self._seen.get((id(home), x.shape, _is_inference(), twice))
        except (AttributeError, RuntimeError):  # no tensors, or without memory of their own
            return self._called(x, weight, bias, residual)
        if (
            known is not None
            and known.alike.is_like(lows, (x, weight) if twice or residual is None else (x, weight, residual), bias)
            and known.home() is home
            and not home.crowded
        ):
            home.hits[0] += 1
            return known.run(x, weight, bias, None, residual, None) if known.whole else known.run(x, weight, bias, None)
        return self._looked_up(home, lows, x, weight, bias, residual)

    def _called(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """By the function that users call."""
        if _is_tracing() is not None:  # by torch.jit, whose traces hold torch's own operators
            return self._traced(x, weight, bias, residual)
        if _any_autocast() and not self._keeps_dtype(x):
            return self._apart(x, weight, bias, residual)
        if self.sum is None:
            return self._function(x, weight, bias, **self._fused)
        if residual is None or not self._takes(x, weight, residual):
            return self._apart(x, weight, bias, residual)
        return self._function(x, weight, bias, residual=residual, alpha=self.sum.alpha, **self._fused)

    def _looked_up(
        self, home: Callers, lows: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """What a call without gradients does, which is remembered where the thread's table keeps it."""
        tensors = (x, weight, *(one for one in (bias, residual) if one is not None))
        plain = all(type(one) in _PLAIN for one in tensors) and (bias is None or bias.is_contiguous())
        alpha = 1.0 if self.sum is None else self.sum.alpha
        takes = self.sum is None or (residual is not None and self._takes(x, weight, residual))
        if not plain or not takes or type(alpha) not in (int, float):
            return self._called(x, weight, bias, residual)
        spatial, stride, padding, dilation, transposed, outer, groups = self.geometry
        raw = (stride, padding, dilation, transposed, outer, groups)
        whole, ends = self.sum is not None or self.activation is not None, self._fused.get("activation")
        if whole:
            caller, kept = fused.found(
                spatial, x, weight, bias, raw, self.policy, None, residual, float(alpha), ends, None
            )
        else:
            caller, kept = functional.found(spatial, x, weight, bias, raw, self.policy, None)
        if kept:
            if len(self._seen) >= MOST_SHAPES:
                self._seen.clear()
            inputs = (x, weight) if residual is None or residual is x else (x, weight, residual)
            alike = Alike(state.token, inputs, bias, lows, live_flags(x.get_device(), x.dtype))
            known = _Known(weakref.ref(home), alike, bare_of(caller), whole)
            self._seen[id(home), x.shape, _is_inference(), residual is x] = known
        return caller(x, weight, bias, None, residual, None) if whole else caller(x, weight, bias, None)

    def _keeps_dtype(self, x: Tensor) -> bool:
        """Whether what follows is computed in the convolution's dtype under autocast, which casts for softplus."""
        return self.activation is None or self.activation.name != "softplus" or not _autocasts(x)

    def _apart(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """As the model computed it: a convolution, a sum, an activation."""
        result = self._function(x, weight, bias, **self._named)
        if self.sum is not None:
            result = self.sum.of(result, residual)
        return result if self.activation is None else self.activation.of(result)

    def _traced(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The same by torch alone."""
        spatial, stride, padding, dilation, transposed, outer, groups = self.geometry
        name = f"conv{'_transpose' if transposed else ''}{spatial}d"
        rest = (outer, groups, dilation) if transposed else (dilation, groups)
        result: Tensor = getattr(torch.nn.functional, name)(x, weight, bias, stride, padding, *rest)
        if self.sum is not None:
            result = self.sum.of(result, residual)
        return result if self.activation is None else self.activation.of(result)

    def _takes(self, x: Tensor, weight: Tensor, residual: Tensor) -> bool:
        """Whether the residual is what a plan can add: the result's shape, dtype, device and layout.

        To a compiler that is not known, and it fuses sums by itself.
        """
        if _is_compiling() or not isinstance(residual, Tensor):
            return False
        try:
            key = (
                x.shape, x.stride(), x.dtype, weight.shape, weight.stride(), residual.shape, residual.stride(),
                residual.dtype, residual.get_device(), _autocasts(x),
            )  # fmt: skip
        except RuntimeError:  # a layout of torch's own, or no memory of its own
            return False
        found = self._fits.get(key)
        if found is None:
            if len(self._fits) >= MOST_SHAPES:
                self._fits.clear()
            found = self._fits[key] = self._matches(x, weight, residual)
        return found

    def _matches(self, x: Tensor, weight: Tensor, residual: Tensor) -> bool:
        computed = torch.get_autocast_dtype(x.device.type) if _autocasts(x) else x.dtype
        if x.dim() != self.geometry.spatial + 2 or residual.dtype != computed or residual.device != x.device:
            return False
        try:
            args = self.geometry.args(weight)
            x, weight = x.to(computed), weight.to(computed)
            if x.dtype not in DTYPE_NAMES or residual.layout != torch.strided:
                return False
            dims = result_dims(x, weight, args)
            strides = output_strides(dims, x, weight, args)
        except SpecError:  # the convolution's own call says what is wrong
            return False
        own = normalize_strides(dims, residual.stride()) if tuple(residual.shape) == dims else None
        return own == normalize_strides(dims, strides)

    @property
    def sums_apart(self) -> bool:
        """Whether a residual came that no plan could add."""
        return False in self._fits.values()

    def extra_repr(self) -> str:
        """What one line of a printed model says."""
        given = [f"stride={self.geometry.stride}", f"padding={self.geometry.padding!r}"]
        given += [f"dilation={self.geometry.dilation}"] if set(self.geometry.dilation) != {1} else []
        given += [f"groups={self.geometry.groups}"] if self.geometry.groups != 1 else []
        given += [f"transposed={True}"] if self.geometry.transposed else []
        given += ["residual" if self.sum.alpha == 1 else f"{self.sum.alpha:g} * residual"] if self.sum else []
        given += [self.activation.name] if self.activation else []
        return ", ".join(given)


class FusedConv(FusedCall):
    """A convolution with its own weight and bias, and what follows it; parameters have the names they had.

    Args:
        conv: whose weight, bias and numbers it takes over.
        weight, bias: parameters.
        sum, activation, policy: as of `FusedCall`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        conv: nn.Module,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        sum: Sum | None = None,
        activation: Resolved | None = None,
        policy: Policy | None = None,
    ) -> None:
        super().__init__(geometry_of(conv), sum, activation, policy)
        self.weight = weight
        self.register_parameter("bias", bias)
        # Models look these up: `self.proj.out_channels`.
        for name in _LOOKED_UP:
            setattr(self, name, getattr(conv, name))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The convolution of x, and all that follows it here."""
        own = self._parameters
        if "weight" not in own or "bias" not in own:  # computed by a parametrization
            return super().forward(x, self.weight, self.bias, residual)
        return FusedCall.forward(self, x, own["weight"], own["bias"], residual)  # type: ignore[arg-type]


_LOOKED_UP = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding",
    "groups", "padding_mode",
)  # fmt: skip


def geometry_of(conv: Any) -> Geometry:
    """What one of torch's convolution modules is told beside tensors."""
    return Geometry(
        spatial=len(conv.kernel_size), stride=tuple(conv.stride),
        padding=cast(Padding, conv.padding), dilation=tuple(conv.dilation),
        transposed=conv.transposed, output_padding=tuple(conv.output_padding), groups=conv.groups,
    )  # fmt: skip


def _autocasts(x: Tensor) -> bool:
    """Whether a convolution of x is cast, as torch casts all floating point but float64."""
    kind = x.device.type
    return _any_autocast() and torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64


# --- folding


class Norm(NamedTuple):
    """What a batch norm is in eval mode: `(x - mean) / sqrt(var + eps) * weight + bias`, per channel."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def folded(conv: Any, norm: Norm) -> tuple[nn.Parameter, nn.Parameter] | None:
    """Weight and bias of a convolution that does what the convolution and the norm behind it do.

    Computed in float64, where the device has it, and rounded once. The originals are only read.

    Args:
        conv: one of torch's modules.
        norm: of as many channels as the convolution has outputs.

    Returns:
        New parameters in the convolution's dtype and layout; None where a number is too large for that dtype.
    """
    wide = torch.float64 if conv.weight.device.type in ("cpu", "cuda", "meta") else torch.float32
    with torch.no_grad():
        scale = (norm.var.to(wide) + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.to(wide)
        offset = -norm.mean.to(wide) if conv.bias is None else conv.bias.to(wide) - norm.mean.to(wide)
        bias = offset * scale if norm.bias is None else offset * scale + norm.bias.to(wide)
        weight = conv.weight.to(wide)
        if conv.transposed:  # (C, K/groups, …): output channels lie in dimension 1, group after group
            parts = weight.unflatten(0, (conv.groups, -1))
            column = scale.view(conv.groups, 1, -1, *[1] * (weight.dim() - 2))
            made = (parts * column).flatten(0, 1)
        else:
            made = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        new = torch.empty_like(conv.weight)  # in its layout
        new.copy_(made)
        new_bias = bias.to(conv.weight.dtype)
        if new.device.type != "meta" and not (new.isfinite().all() and new_bias.isfinite().all()):
            return None
    return nn.Parameter(new, requires_grad=False), nn.Parameter(new_bias, requires_grad=False)

"""The call that `fuse_training` puts in the place of a batch norm, what is before it and what follows it.

The modules stay where they are in the model, and are looked up there in every call. What is decided here is what can be
known only then: whether `normalized` computes it all, or each part is computed by itself, as the model had it.

    training, on a GPU, channels last      `normalized`
    eval mode, no gradients                one plan of `convplan.conv2d` and the like, with scale, bias and activation
    other devices and layouts, float64,    the convolution by its plan, the norm, the sum and the activation by torch
    gradients in eval mode
    compiling, vmap and other transforms,  the modules themselves
    tracing, tensors of other classes,
    hooks, modules that were exchanged
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convplan._activations import NONE, Resolved
from convplan._errors import SpecError
from convplan._policy import Policy
from convplan._problem import Problem, normalize_strides
from convplan.torch_ops import functional
from convplan.torch_ops.adapter import forward_problem
from convplan.torch_ops.arguments import cast_for_autocast
from convplan.torch_ops.fused_modules import MOST_SHAPES, Sum, geometry_of
from convplan.torch_ops.normalized import Step, apply_normalized

Tensor = torch.Tensor

_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
_transform = torch._C._functorch.maybe_current_level
_alive = torch._C._functorch.unwrap_if_dead
_PLAIN = (Tensor, nn.Parameter)
_RANKS = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}

# Where the kernels are faster than torch's own batch norm, and for which dtypes.
TAKEN: dict[str, tuple[torch.dtype, ...]] = {"cuda": (torch.float16, torch.bfloat16, torch.float32)}
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Place:
    """Where in a model a module stands: it may be exchanged there later.

    Args:
        owner: the module that it is part of.
        name: in that.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._modules, self._name = owner._modules, name
        self.kind = type(self())

    def __call__(self) -> Any:
        """The module that stands there now."""
        return self._modules[self._name]


class NormalizedCall:
    """[convolution ->] batch norm [-> + other] [-> activation] of a model, called with the input [and the other].

    Args:
        name: an identifier, for the code that calls it.
        conv, norm: where the modules are; conv may be None.
        sum: how something is added to the norm's result; None: nothing is.
        activation: computed last; None: none.
        policy: as of `convplan.conv2d`.

    Concurrency: as of torch's modules.
    """

    writes_nothing = True  # into its inputs, which `fuse_patterns` asks of what it does not know

    def __init__(
        self, name: str, conv: Place | None, norm: Place, sum: Sum | None, activation: Resolved | None,
        policy: Policy | None,
    ) -> None:  # fmt: skip
        self.__name__ = name
        self._conv, self._norm, self._sum, self._policy = conv, norm, sum, policy
        self._activation = activation or NONE
        self._forget()

    def _forget(self) -> None:
        self._steps: dict[Any, Step | None] = {}
        self._refused: set[Any] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is worked out from the rest."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_steps", "_refused")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, x: Tensor, residual: Any = None) -> Tensor:
        """What the modules compute."""
        norm, conv = self._norm(), None if self._conv is None else self._conv()
        if (
            _is_compiling()
            or type(x) not in _PLAIN
            or _transform() is not None
            or _is_tracing() is not None
            or type(norm) is not self._norm.kind
            or is_listened(norm)
            or (conv is not None and (type(conv) is not self._conv.kind or is_listened(conv)))  # type: ignore[union-attr]
        ):
            return self._behind(norm(x if conv is None else conv(x)), residual)
        if norm.training or norm.running_mean is None:
            if norm.momentum is None and norm.training and norm.track_running_stats:
                return self._apart(conv, norm, x, residual)
            return self._trained(conv, norm, x, residual)
        if conv is None or torch.is_grad_enabled():
            return self._apart(conv, norm, x, residual)
        return self._evaluated(conv, norm, x, residual)

    def _behind(self, result: Tensor, residual: Any) -> Tensor:
        """What follows the norm, as the model computed it."""
        if self._sum is not None:
            result = self._sum.of(result, residual)
        return self._activation.of(result)

    def _apart(self, conv: Any, norm: Any, x: Tensor, residual: Any) -> Tensor:
        """Part by part: the convolution by its plan."""
        if conv is not None:
            x = self._convolution(conv, x, conv.weight, conv.bias)
        return self._behind(norm(x), residual)

    def _convolution(self, conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Tensor:
        geometry = geometry_of(conv)
        if geometry.transposed:
            more["output_padding"] = geometry.output_padding
        function = getattr(functional, f"conv{'_transpose' if geometry.transposed else ''}{geometry.spatial}d")
        result: Tensor = function(
            x, weight, bias, stride=geometry.stride, padding=geometry.padding, dilation=geometry.dilation,
            groups=geometry.groups, policy=self._policy, **more,
        )  # fmt: skip
        return result

    # --- training

    def _trained(self, conv: Any, norm: Any, x: Tensor, residual: Any) -> Tensor:
        given, kind = x, x.device.type
        weight = bias = dtype = None
        if conv is not None:
            weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        autocast = _any_autocast() and torch.is_autocast_enabled(kind)
        if autocast and weight is not None:
            dtype = torch.get_autocast_dtype(kind)
            if x.dtype is not dtype:
                x = cast_for_autocast(x)[0]
        scale, offset = norm._parameters["weight"], norm._parameters["bias"]
        try:
            key = (
                x.shape, x.stride(), x.dtype, x.get_device(),
                None if weight is None else (weight.shape, weight.stride(), weight.dtype),
                None if residual is None else _kind_of(residual), None if scale is None else scale.dtype, autocast,
            )  # fmt: skip
        except (AttributeError, RuntimeError):  # no tensor, or one without memory of its own
            return self._apart(conv, norm, given, residual)
        found = self._steps.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            if len(self._steps) >= MOST_SHAPES:
                self._steps.clear()
            found = self._steps[key] = self._new_step(conv, norm, x, weight, residual, dtype, autocast)
        if found is None:
            return self._apart(conv, norm, given, residual)
        mean = var = count = None
        if norm.training and norm.track_running_stats:
            buffers = norm._buffers
            mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
            if count is not None and count.get_device() != x.get_device():
                count.add_(1)
                count = None
        if autocast:
            torch.set_autocast_enabled(kind, False)
        try:
            result = apply_normalized(
                found, _alive(x), weight, bias, _alive(residual) if found.adds else None, scale, offset, mean, var,
                norm.momentum or 0.0, norm.eps, count,
            )  # fmt: skip
        finally:
            if autocast:
                torch.set_autocast_enabled(kind, True)
        if found.adds or self._sum is None:
            return result if found.activation is self._activation else self._activation.of(result)
        return self._behind(result, residual)

    def _new_step(
        self, conv: Any, norm: Any, x: Tensor, weight: Tensor | None, residual: Any, dtype: torch.dtype | None,
        autocast: bool,
    ) -> Step | None:  # fmt: skip
        """What a call with such tensors does; None: each part by itself, where errors are torch's own.

        Args:
            x: as autocast casts it.
            dtype: what autocast casts to, None where it does not.
        """
        if x.dtype not in TAKEN.get(x.device.type, ()) or x.dim() != _RANKS[type(norm)]:
            return None
        args = problem = casts = None
        dims, strides = tuple(x.shape), x.stride()
        if weight is not None:
            if type(weight) not in _PLAIN:
                return None
            used = weight if dtype is None else cast_for_autocast(weight)[0]
            casts = None if used is weight else dtype
            try:
                args = geometry_of(conv).args(used)
                problem = forward_problem(x, used, None, args)
            except SpecError:
                return None
            dims, strides = problem.output.dims, problem.output.strides
        if not _is_normalized(norm, x, dims) or not _is_worth_it(x, problem):
            return None
        adds = self._sum is not None and self._sum.alpha == 1 and type(residual) in _PLAIN and (
            (residual.dtype, residual.device, tuple(residual.shape)) == (x.dtype, x.device, dims)
            and normalize_strides(dims, residual.stride()) == normalize_strides(dims, strides)
        )  # fmt: skip
        apart = (self._sum is not None and not adds) or _widens(self._activation, autocast)
        return Step(problem, args, self._policy, NONE if apart else self._activation, adds, casts)

    # --- eval mode

    def _evaluated(self, conv: Any, norm: Any, x: Tensor, residual: Any) -> Tensor:
        autocast = _any_autocast() and torch.is_autocast_enabled(x.device.type)
        key = (x.shape, x.stride(), x.dtype, autocast, _kind_of(residual) if isinstance(residual, Tensor) else None)
        inside = not _widens(self._activation, autocast)
        if key in self._refused or not inside or not self._is_simple(residual):
            return self._apart(conv, norm, x, residual)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = (norm.running_var.to(wide) + norm.eps).rsqrt_()
        if norm.weight is not None:
            scale.mul_(norm.weight)
        mean = norm.running_mean.to(wide)
        offset = mean.neg() if conv.bias is None else conv.bias.to(wide) - mean
        offset = offset * scale if norm.bias is None else torch.addcmul(norm.bias.to(wide), offset, scale)
        name, parameters = self._activation
        more = {} if self._sum is None else {"residual": residual, "alpha": self._sum.alpha}
        try:
            return self._convolution(
                conv, x, conv.weight, offset.to(x.dtype), scale=scale, activation=(name, *parameters), **more
            )
        except SpecError:  # a residual of another kind, or a norm that switches channels off
            if len(self._refused) >= MOST_SHAPES:
                self._refused.clear()
            self._refused.add(key)
            return self._apart(conv, norm, x, residual)

    def _is_simple(self, residual: Any) -> bool:
        return residual is None if self._sum is None else type(residual) in _PLAIN


_UNKNOWN: Any = object()


def _kind_of(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device()


def is_listened(module: Any) -> bool:
    """Somebody has hooked on to a module since it was fused, or computes its weight."""
    return is_hooked(module) or "weight" not in module._parameters


def is_hooked(module: Any) -> bool:
    """Somebody listens to a module's calls, or has replaced what they do."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_normalized(norm: Any, x: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether a norm's numbers and its input fit together, and there is more than one value for each channel."""
    values = 1
    for size in (dims[0], *dims[2:]):
        values *= size
    kinds = (x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32)
    own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return (
        values > 1
        and dims[1] == norm.num_features > 0
        and all(one is None or (type(one) in _PLAIN and one.dtype in kinds and one.device == x.device) for one in own)
    )


def _is_worth_it(x: Tensor, problem: Problem | None) -> bool:
    """On a GPU the kernels are for channels-last tensors; torch's own batch norm is the faster one for others."""
    if not x.is_cuda:
        return True
    if problem is not None:
        return problem.output.layout == "channels_last"
    return x.dim() in _LAYOUTS and x.is_contiguous(memory_format=_LAYOUTS[x.dim()])


def _widens(activation: Resolved, autocast: bool) -> bool:
    """Whether autocast has an activation computed in float32, as it does softplus alone."""
    return autocast and activation.name == "softplus"

"""The call that `fuse_training` puts in the place of convolutions that follow each other with a ReLU between them.

As in `normalized_call` the modules stay where they are, and what is decided here is what can be known only in a call:

    gradients are recorded, on a GPU, channels last    `gated`, which may differentiate the ReLU before it with dgrad
    everything else                                    the modules themselves
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from convplan._activations import NONE
from convplan._errors import SpecError
from convplan._policy import Policy
from convplan.torch_ops.adapter import NotExpressible
from convplan.torch_ops.arguments import cast_for_autocast
from convplan.torch_ops.fused_modules import MOST_SHAPES, geometry_of
from convplan.torch_ops.fused_plan import Given, dense, fused_problem
from convplan.torch_ops.gated import RELU, Gated, Step
from convplan.torch_ops.normalized_call import Place, is_hooked, is_listened

Tensor = torch.Tensor

_any_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
_transform = torch._C._functorch.maybe_current_level
_PLAIN = (Tensor, nn.Parameter)
_UNKNOWN: Any = object()

# Where cuDNN has graphs with a gate, and for which dtypes.
TAKEN: dict[str, tuple[torch.dtype, ...]] = {"cuda": (torch.float16, torch.bfloat16, torch.float32)}


class GatedCall:
    """convolution [-> ReLU] of a model, called with the input.

    Args:
        name: an identifier, for the code that calls it.
        conv: where the convolution is.
        ends: a ReLU is computed behind it.
        relu: where that is, if it is a module.
        gated: the input is the result of another such call with a ReLU, and nobody else is given it.
        policy: as of `convplan.conv2d`.

    Concurrency: as of torch's modules.
    """

    writes_nothing = True  # into its inputs, which `fuse_patterns` asks of what it does not know

    def __init__(
        self, name: str, conv: Place, ends: bool, relu: Place | None, gated: bool, policy: Policy | None
    ) -> None:
        self.__name__ = name
        self._conv, self._relu, self._ends, self._gated, self._policy = conv, relu, ends, gated, policy
        self._steps: dict[Any, Step | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is worked out from the rest."""
        return {**self.__dict__, "_steps": {}}

    def __call__(self, x: Tensor) -> Tensor:
        """What the modules compute."""
        conv, relu = self._conv(), None if self._relu is None else self._relu()
        if (
            _is_compiling()
            or type(x) not in _PLAIN
            or not torch.is_grad_enabled()
            or _transform() is not None
            or _is_tracing() is not None
            or forward_ad._current_level >= 0
            or type(conv) is not self._conv.kind
            or is_listened(conv)
            or (relu is not None and (type(relu) is not nn.ReLU or is_hooked(relu)))
        ):
            return self._plainly(conv, relu, x)
        given, kind = x, x.device.type
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        if type(weight) not in _PLAIN or not (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return self._plainly(conv, relu, x)
        autocast = _any_autocast() and torch.is_autocast_enabled(kind)
        if autocast:
            x, weight, bias = cast_for_autocast(x, weight, bias)
        bias = dense(bias)
        step = self._step(conv, x, weight, bias)
        if step is None:
            return self._plainly(conv, relu, given)
        # The node of what made the input, if that takes a gradient which went through the gate.
        before = x.grad_fn if self._gated and getattr(x.grad_fn, "takes_masked", False) else None
        if autocast:
            torch.set_autocast_enabled(kind, False)
        try:
            result: Tensor = Gated.apply(step, before, x, weight, bias)  # type: ignore[no-untyped-call]
        finally:
            if autocast:
                torch.set_autocast_enabled(kind, True)
        return result

    def _plainly(self, conv: Any, relu: Any, x: Tensor) -> Tensor:
        result: Tensor = conv(x)
        if not self._ends:
            return result
        return torch.relu(result) if relu is None else relu(result)

    def _step(self, conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Step | None:
        try:
            key = (
                x.shape, x.stride(), x.dtype, x.get_device(), weight.shape, weight.stride(), weight.dtype,
                None if bias is None else (type(bias), bias.shape, bias.dtype, bias.get_device()),
            )  # fmt: skip
            x.data_ptr()
        except RuntimeError:  # no memory of its own
            return None
        found = self._steps.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            if len(self._steps) >= MOST_SHAPES:
                self._steps.clear()
            found = self._steps[key] = self._new_step(conv, x, weight, bias)
        step: Step | None = found
        return step

    def _new_step(self, conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Step | None:
        """What a call with such tensors does; None: the modules, where errors are torch's own."""
        geometry = geometry_of(conv)
        if x.dtype not in TAKEN.get(x.device.type, ()) or x.dim() != geometry.spatial + 2:
            return None
        if bias is not None and type(bias) not in _PLAIN:
            return None
        activation = RELU if self._ends else NONE
        try:
            args = geometry.args(weight)
            problem = fused_problem(Given(x, weight, bias, None, None), args, 1.0, activation)
        except (SpecError, NotExpressible):
            return None
        if problem.is_empty or (x.is_cuda and problem.output.layout != "channels_last"):
            return None
        return Step(problem, args, self._policy, activation)

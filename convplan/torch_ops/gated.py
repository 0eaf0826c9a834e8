"""A convolution [-> ReLU] while training, whose input's gradient may be that of the ReLU before it too.

`Gated` is the operation. Between two of them, the ReLU of the earlier one is differentiated once: by the later one's
dgrad, whose plan has a gate (`Epilogue.gate`), or by the earlier one in a pass of its own. Which of the two is settled
while gradients are computed, by the tensor itself:

    the later one    has put the gate behind dgrad: it leaves what it returns with the earlier one, and keeps it alive
    the earlier one  is given this very tensor, unchanged: nobody has added to it, and it is not masked again
                     is given anything else: it is masked

So a gradient may be masked twice, which changes nothing, and is never left as it is: not where others use the same
result, nor where one of the two is computed in another way. Which calls come here is decided in `gated_call`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import torch

from convplan._activations import NONE, Resolved
from convplan._choices import state
from convplan._epilogue import MAX_ALIGNMENT_BYTES, Epilogue
from convplan._errors import ConvPlanError
from convplan._policy import Policy
from convplan._problem import GATE_DTYPES, Problem, normalize_strides
from convplan._runtime import local
from convplan.engines import composed
from convplan.engines._support import TORCH_DTYPES
from convplan.torch_ops.adapter import ALIGNMENT_BYTES, ConvArgs
from convplan.torch_ops.fused import gradient_behind
from convplan.torch_ops.fused_plan import FusedCaller, Given, alignment_of, fused_problem
from convplan.torch_ops.linear import Geometry, bias_gradient, gradients, last_resort, layer_of, planned_runner
from convplan.torch_ops.override import note_fallback
from convplan.torch_ops.seen import live_flags

Tensor = torch.Tensor

RELU = Resolved("relu")
_DTYPES = tuple(TORCH_DTYPES[name] for name in GATE_DTYPES)


class Masked(NamedTuple):
    """A gradient that went through a gate, as it was then."""

    grad: Tensor
    version: int

    def is_still(self, grad: Tensor) -> bool:
        """Whether `grad` is that very tensor, and nobody has written to it."""
        return grad is self.grad and grad._version == self.version


class Step:
    """What one call is beside tensors.

    Args:
        problem: of the convolution, with what follows it.
        args: of the convolution.
        policy: as of `convplan.conv2d`.
        activation: none or ReLU.
    """

    def __init__(self, problem: Problem, args: ConvArgs, policy: Policy | None, activation: Resolved) -> None:
        self.activation, self._args, self._policy = activation, args, policy
        self.geometry = Geometry(problem, args, policy)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool]) -> Tensor:
        """The result, by one plan."""
        device, token = x.get_device(), state.token
        key = (
            "before a gate", token, self.activation, x.shape, x.stride(), x.dtype, weight.shape, weight.stride(),
            weight.dtype, bias is None, self._args, self._policy, needs, device, ALIGNMENT_BYTES[x.data_ptr() & 31],
            ALIGNMENT_BYTES[weight.data_ptr() & 31], alignment_of(bias), live_flags(device),
        )  # fmt: skip
        caller = local.callers.used(key)
        if caller is None:
            problem = fused_problem(Given(x, weight, bias, None, None), self._args, 1.0, self.activation)
            caller = FusedCaller(problem, self._policy, weight, needs)
            local.remember(key, token, caller, device)
        result: Tensor = caller(x, weight, bias, None, None, None)
        return result

    def gated_gradient(self, grad: Tensor, weight: Tensor, gate: Tensor) -> Tensor | None:
        """The input's gradient where `gate`, the input, is above 0, and 0 elsewhere.

        None where that is not offered, or where a pass behind dgrad is the best that there is: the pass of whoever made
        the input computes the gradient of its bias along.
        """
        if gate.dtype not in _DTYPES or not grad.dtype == weight.dtype == gate.dtype:
            return None
        device, token, geometry = grad.get_device(), state.token, self.geometry
        key = (
            "gate", token, geometry.dims["dgrad"], self._args, self._policy, grad.shape, grad.stride(), grad.dtype,
            weight.shape, weight.stride(), gate.stride(), device, ALIGNMENT_BYTES[grad.data_ptr() & 31],
            ALIGNMENT_BYTES[weight.data_ptr() & 31], ALIGNMENT_BYTES[gate.data_ptr() & 31], live_flags(device),
        )  # fmt: skip
        caller = local.callers.used(key)
        if caller is None:
            problem = _gated_problem(geometry, grad, weight, gate)
            caller = _not_offered if problem is None else _GateCaller(problem, self._policy, weight)
            local.remember(key, token, caller, device)
        found: Tensor | None = caller(grad, weight, gate)
        return found


def _not_offered(grad: Tensor, weight: Tensor, gate: Tensor) -> None:
    return None


def _gated_problem(geometry: Geometry, grad: Tensor, weight: Tensor, gate: Tensor) -> Problem | None:
    problem = geometry.problem("dgrad", grad, weight)
    if problem.is_empty or gate.data_ptr() % MAX_ALIGNMENT_BYTES:
        return None
    if normalize_strides(problem.x.dims, gate.stride()) != problem.x.strides:
        return None
    return msgspec.structs.replace(problem, epilogue=Epilogue(gate=True))


class _GateCaller:
    """Runs one gated dgrad whatever happens, unless its plan is no better than two calls."""

    def __init__(self, problem: Problem, policy: Policy | None, weight: Tensor) -> None:
        self._problem = problem
        self._runner = planned_runner(problem, policy, weight.get_device(), weight)

    def __call__(self, grad: Tensor, weight: Tensor, gate: Tensor) -> Tensor | None:
        runner = self._runner
        if runner is not None:
            if not runner.settled:
                runner.layer = layer_of("dgrad", weight)
            elif grad.is_cuda and runner.plan.config.engine == composed.NAME:
                return None
            try:
                return runner(grad, weight, None, None, None, None, gate)
            except ConvPlanError as exc:
                note_fallback(exc)
        result = last_resort(self._problem.core)(grad, weight, None, None)
        closed: Tensor = torch.ops.aten.threshold_backward.grad_input(result, gate, 0, grad_input=result)
        return closed


class Gated(torch.autograd.Function):
    """The operation, `Gated.apply(step, before, input, weight, bias)`. Gradients of every order.

    `before` is the node of another one, with a ReLU, whose result the input is and whose result nobody else is given;
    or None.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, before: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One plan."""
        y = step.convolve(input, weight, bias, ctx.needs_input_grad[2:4])
        ctx.step, ctx.before, ctx.masked = step, before, None
        ctx.takes_masked = step.activation == RELU
        ctx.save_for_backward(input, weight, None if step.activation == NONE else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """ReLU's derivative, unless that is done; dgrad, with the gate where the input is such a result; wgrad."""
        step: Step = ctx.step
        input, weight, y = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[2:5]
        masked: Masked | None = ctx.masked
        ctx.masked = None
        grad, to_bias = grads[0], None
        if masked is not None and masked.is_still(grad) and not torch.is_grad_enabled():
            to_bias = bias_gradient(grad) if need_bias else None
        else:
            grad, to_bias = gradient_behind(step.activation, grad, y, need_bias)
        to_input: Tensor | None = None
        if need_input and ctx.before is not None and not torch.is_grad_enabled() and not _is_watched(input):
            to_input = step.gated_gradient(grad, weight, input)
            if to_input is not None:
                ctx.before.masked = Masked(to_input, to_input._version)
        needed = (need_input and to_input is None, need_weight)
        ungated, to_weight = gradients("fprop", input, weight, grad, step.geometry, needed)
        return None, None, to_input if ungated is None else ungated, to_weight, to_bias


def _is_watched(tensor: Tensor) -> bool:
    """Somebody asks for this tensor's own gradient, which no gate has been through."""
    return bool(tensor.retains_grad or tensor._backward_hooks)

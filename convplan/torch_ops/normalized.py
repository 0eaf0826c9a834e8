"""[convolution ->] batch norm [-> + residual] [-> activation] while training: two passes forward, two backward.

`Normalized` is the operation with its gradients, `Step` what it needs to know beside tensors. The convolution and both
of its gradients run by their plans (`linear`), the one forward, where that is offered, with the statistics written
along (`statistics`); all else is `kernels`. Which calls come here is decided in `normalized_call`.

A convolution's bias does not change what comes out, for the mean is taken off again: it is added to the running mean
alone, and its gradient is zero, of which torch computes the rounding errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F

from convplan._activations import NONE, Resolved
from convplan._choices import state
from convplan._policy import Policy
from convplan._problem import Op, Problem
from convplan._runtime import local
from convplan.kernels import Norm, backward_needs, normalize, normalize_backward
from convplan.torch_ops.adapter import ConvArgs
from convplan.torch_ops.linear import Geometry, Linear, bias_gradient
from convplan.torch_ops.override import NO_GRADIENTS
from convplan.torch_ops.seen import live_flags
from convplan.torch_ops.statistics import statistics_caller

Tensor = torch.Tensor

MOST_KEPT = 64  # of one step: operations, times threads


class Step:
    """What one call is beside tensors.

    Args:
        problem: of the convolution, without its bias; None: there is none.
        args: of the convolution.
        policy: as of `convplan.conv2d`.
        activation: computed last.
        adds: a residual, before that.
        casts: what the convolution's weight is cast to, as autocast does it; None: it stays as it is.
    """

    def __init__(
        self, problem: Problem | None, args: ConvArgs | None, policy: Policy | None, activation: Resolved, adds: bool,
        casts: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.activation, self.adds, self.casts = activation, adds, casts
        self.keeps = backward_needs(activation.name, activation.parameters, adds)
        self._policy, self._args = policy, args
        self._asks = problem is not None and problem.op == "fprop"
        self.op = "fprop" if problem is None else problem.op
        self.geometry = None if problem is None or args is None else Geometry(problem, args, policy)
        self._kept: dict[tuple[str, int], tuple[Any, Any, Any, Any]] = {}

    def convolve(self, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor | None]:
        """The convolution's result, and its sums where a plan writes them along."""
        if self._asks:
            found: tuple[Tensor, Tensor] | None = self._run("statistics", x, weight, needs)
            if found is not None:
                return found
        return self._run(self.op, x, weight, needs), None

    def convolution_gradients(
        self, x: Tensor, weight: Tensor, grad: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of x and weight, by their plans; nothing is recorded."""
        run, forward = self._run, self.op == "fprop"
        to_x = run("dgrad" if forward else "fprop", grad, weight) if needs[0] else None
        to_weight = (run("wgrad", x, grad) if forward else run("wgrad", grad, x)) if needs[1] else None
        return to_x, to_weight

    def _run(self, what: str, first: Tensor, second: Tensor, needs: tuple[bool, bool] = NO_GRADIENTS) -> Any:
        """One of the convolution's three operations, or it with statistics.

        All calls of a step have tensors of the same sizes, strides, dtypes and device. What else decides what runs
        them is compared here with the last call, which costs less than making a key.
        """
        home, given = local.callers, (state.token, first.data_ptr() & 31, second.data_ptr() & 31, *first.stride())
        flags = live_flags(first.get_device(), first.dtype)
        kept = self._kept.get((what, id(home)))
        if kept is not None and kept[0] is home and kept[1] == given and kept[2] == flags and not home.crowded:
            home.hits[0] += 1
            caller = kept[3]
        else:
            caller, remains = self._caller(what, first, second, needs)
            if remains:
                if len(self._kept) >= MOST_KEPT:
                    self._kept.clear()
                self._kept[what, id(home)] = (home, given, flags, caller)
        return caller(first, second) if what == "statistics" else caller(first, second, None, None)

    def _caller(self, what: str, first: Tensor, second: Tensor, needs: tuple[bool, bool]) -> tuple[Any, bool]:
        if what == "statistics":
            stride, padding, dilation, _, _, groups = cast(ConvArgs, self._args)
            return statistics_caller(first, second, stride, padding, dilation, groups, self._policy, needs)
        return cast(Geometry, self.geometry).caller(cast(Op, what), first, second, None, needs)


class Normalized(torch.autograd.Function):
    """The operation. Gradients of higher orders are composed of torch's own operations and planned convolutions.

    `Normalized.apply(step, input, weight, bias, residual, norm_weight, norm_bias, running_mean, running_var,
    momentum, eps, batches)`: weight and bias are the convolution's, None without one; batches is counted up.

    A weight that autocast casts is cast in here: its gradient comes out in the dtype of the cast, and autograd turns it
    back, which spares a step of the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: Step,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        batches: Tensor | None,
    ) -> Tensor:
        """The output; running statistics are updated."""
        y, sums, ctx.cast = input, None, None
        if weight is not None:
            if step.casts is not None:
                ctx.cast = weight, None if weight.is_inference() else weight._version
                weight = weight.to(step.casts)
            y, sums = step.convolve(input, weight, ctx.needs_input_grad[1:3])
        norm = Norm(norm_weight, norm_bias, running_mean, running_var, momentum, eps, batches)
        out, saved = normalize(y, sums, norm, residual, step.activation.name, step.activation.parameters)
        if bias is not None and running_mean is not None:
            running_mean.add_(bias, alpha=momentum)
        kept = out if step.keeps == "out" else residual if step.keeps == "residual" else None
        ctx.step, ctx.eps, ctx.bias = step, eps, None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(input, weight, None if weight is None else y, kept, saved, norm_weight, norm_bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The norm's gradients in two passes, then dgrad and wgrad."""
        if torch.is_grad_enabled():
            return _recorded(ctx, grads[0])
        step: Step = ctx.step
        input, weight, y, kept, saved, norm_weight, norm_bias = ctx.saved_tensors
        _, need_input, need_weight, _, need_residual, *need_norm = ctx.needs_input_grad[:7]
        grad_y, to_residual, to_norm_weight, to_norm_bias = normalize_backward(
            grads[0], input if weight is None else y, kept, saved, Norm(norm_weight, norm_bias, eps=ctx.eps),
            step.activation.name, step.activation.parameters,
            (need_input or need_weight, need_residual, need_norm[0], need_norm[1]),
        )  # fmt: skip
        to_input, to_weight = grad_y, None
        if weight is not None and grad_y is not None:
            to_input, to_weight = step.convolution_gradients(input, weight, grad_y, (need_input, need_weight))
        to_bias = _bias_gradient(ctx, grads[0])
        nothing = (None,) * 5
        return None, to_input, to_weight, to_bias, to_residual, to_norm_weight, to_norm_bias, *nothing


# `Normalized.apply` without its look at all arguments for transforms of `torch.func`, which take half its time.
apply_normalized: Callable[..., Tensor] = super(torch.autograd.Function, Normalized).apply


def _as_given(ctx: Any, weight: Tensor | None) -> Tensor | None:
    """The convolution's weight as it was given, where a cast of it was saved.

    Raises:
        RuntimeError: it is not what it was, as torch says it of what it saved itself.
    """
    if ctx.cast is None:
        return weight
    given, version = ctx.cast
    if given._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: the "
            f"weight of a convolution, {tuple(given.shape)}, is at version {given._version}; expected version "
            f"{version} instead"
        )
    return cast(Tensor, given)


def _bias_gradient(ctx: Any, grad: Tensor) -> Tensor | None:
    if ctx.bias is None or not ctx.needs_input_grad[3]:
        return None
    shape, dtype = ctx.bias
    return torch.zeros(shape, dtype=dtype, device=grad.device)


def _recorded(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients with a graph of their own: those of the operation composed once more.

    Every input is looked at through an alias, so that the gradients of one which is given twice stay apart.
    """
    step: Step = ctx.step
    first, second, _, kept, *_ = ctx.saved_tensors
    input, weight, norm_weight, norm_bias, residual = (
        None if one is None else one.view_as(one)
        for one in (first, _as_given(ctx, second), *ctx.saved_tensors[5:], kept if step.keeps == "residual" else None)
    )
    y = input
    if weight is not None:
        used = weight if step.casts is None else weight.to(step.casts)
        y = Linear.apply(step.op, input, used, None, step.geometry)  # type: ignore[no-untyped-call]
    result = F.batch_norm(cast(Tensor, y), None, None, norm_weight, norm_bias, True, 0.0, ctx.eps)
    if step.keeps == "out":
        grad = step.activation.gradient(grad, kept)
    elif step.activation != NONE:
        result = step.activation.of(result if residual is None else result + residual)
    needs = ctx.needs_input_grad
    given = {1: input, 2: weight, 4: residual, 5: norm_weight, 6: norm_bias}
    wanted = [place for place, one in given.items() if one is not None and needs[place]]
    found = torch.autograd.grad(
        result, [cast(Tensor, given[place]) for place in wanted], grad, create_graph=True, allow_unused=True
    ) if wanted else ()  # fmt: skip
    gradients: list[Tensor | None] = [None] * 12
    for place, one in zip(wanted, found, strict=True):
        gradients[place] = one
    if needs[3] and ctx.bias is not None:
        gradients[3] = bias_gradient(grad * 0).to(ctx.bias[1])  # with a history, as all others
    if needs[4] and residual is None:  # nothing is between it and what comes in, or it is in `grad` by now
        gradients[4] = grad
    return tuple(gradients)

"""The functions of `functional` with `residual=`, `activation=` or `scale=`: one plan, and gradients of every order.

    y = activation(scale * convolution + alpha * residual + bias)

What is fused, and what is not:

    no gradient asked for    all of it, one plan
    gradients                all of it, where the activation's derivative can be had from y: none, relu, leaky_relu and
                             elu with numbers >= 0, relu6, hardtanh, sigmoid, tanh. For the others (clamp, gelu,
                             gelu_tanh, silu, hardswish, softplus) one plan for all but the activation, which torch runs
    scale asks for one       the convolution alone, by its plan; torch's elementwise operations do the rest
    backward                 dgrad and wgrad by their plans; before them the activation's derivative and the sums for
                             bias, in one pass on a GPU, and the scale and the residual's by torch

Tensors without memory of their own (inside `torch.vmap`), other devices than CPU and CUDA, and the few transposed
convolutions that no `Problem` describes: torch's own convolution and elementwise operations.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from convplan._activations import NONE, Activation, Resolved, follow, resolve, scale_channels, times
from convplan._choices import state
from convplan._counts import counts
from convplan._epilogue import Epilogue
from convplan._errors import SpecError
from convplan._plan import shares_memory
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._runtime import in_graph_capture, local
from convplan.kernels import activation_backward
from convplan.torch_ops.adapter import ALIGNMENT_BYTES, ConvArgs, NotExpressible
from convplan.torch_ops.arguments import (
    Arguments,
    arguments,
    cast_for_autocast,
    check_out,
    check_ranks,
    hashable,
    refuse_out,
    through_torch,
)
from convplan.torch_ops.fused_plan import (
    FusedCaller,
    Given,
    Run,
    aligned,
    alignment_of,
    check_following,
    check_scale_values,
    dense,
    fused_problem,
)
from convplan.torch_ops.library import bare_of, result_dims
from convplan.torch_ops.linear import Geometry, Linear, bias_gradient, gradients, has_kernels
from convplan.torch_ops.seen import live_flags
from convplan.torch_ops.traced import traced_fused

_is_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled
_NUMBERS_AND_NAMES = frozenset((str, int, float))

Tensor = torch.Tensor


def fused(
    spatial: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    raw: Arguments,
    policy: Policy | None,
    out: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    activation: Activation,
    scale: Tensor | None,
) -> Tensor:
    """The hot path: a key of the arguments as they came, a look-up and a call."""
    if _is_compiling():
        args = arguments(spatial, weight, *raw)
        return traced_fused(input, weight, bias, residual, scale, args, alpha, activation, policy, out)
    if type(alpha) is not float:
        alpha = 1.0 if type(alpha) is int and alpha == 1 else _number(alpha)
    if activation is not None and type(activation) is not str:
        activation = _activation_key(activation)
    try:
        if _any_autocast() and torch.is_autocast_enabled(input.device.type):
            input, weight, bias, residual = cast_for_autocast(input, weight, bias, residual)
        bias, scale = dense(bias), aligned(scale)
    except AttributeError as exc:
        raise _no_tensors(input, weight, bias, residual, scale) from exc
    except RuntimeError:  # a scale without memory of its own: inside vmap or another transform
        return _composed(spatial, raw, alpha, resolve(activation))(input, weight, bias, out, residual, scale)
    caller, _ = found(spatial, input, weight, bias, raw, policy, out, residual, alpha, activation, scale)
    return caller(input, weight, bias, out, residual, scale)


def found(
    spatial: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    raw: Arguments,
    policy: Policy | None,
    out: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    activation: Activation,
    scale: Tensor | None,
) -> tuple[Run, bool]:
    """What runs such a call, and whether it is kept for the next one.

    Args: as `fused` has made them: cast, bias and scale dense, alpha a float, the activation hashable.
    """
    try:
        graded, learned = _asked_for(input, weight, bias, residual, scale, out)
        token, device = state.token, input.get_device()
        stride, padding, dilation, transposed, output_padding, groups = raw
        key = (
            "fused", token, spatial, transposed, input.shape, input.stride(), input.dtype,
            weight.shape, weight.stride(), weight.dtype,
            None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
            None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.get_device()),
            None if scale is None else (scale.shape, scale.dtype, scale.get_device()), alpha, activation,
            stride if type(stride) is int else hashable(stride),
            padding if type(padding) is int else hashable(padding),
            dilation if type(dilation) is int else hashable(dilation),
            output_padding if type(output_padding) is int else hashable(output_padding),
            groups, policy, graded, learned, device, weight.get_device(),
            ALIGNMENT_BYTES[input.data_ptr() & 31], ALIGNMENT_BYTES[weight.data_ptr() & 31],
            alignment_of(bias), alignment_of(residual), live_flags(device),
        )  # fmt: skip
    except AttributeError as exc:
        raise _no_tensors(input, weight, bias, residual, scale) from exc
    except RuntimeError:  # no memory of its own: inside vmap or another transform, or a layout of torch's own
        return _composed(spatial, raw, alpha, resolve(activation)), False
    caller = local.callers.used(key)
    if caller is not None:
        return caller, True
    given = Given(input, weight, bias, residual, scale)
    caller = _new_caller(spatial, given, raw, alpha, resolve(activation), policy, graded, learned)
    local.remember(key, token, caller, device)
    return caller, False


def _no_tensors(*given: object) -> TypeError:
    names = [type(one).__name__ for one in given if one is not None]
    wanted = "input, weight, bias, residual and scale"
    return TypeError(f"found {', '.join(names)}, expected tensors for {wanted}")


def _number(alpha: object) -> float:
    """Raises SpecError: it is no finite number."""
    try:
        return Epilogue(residual=True, alpha=alpha).alpha  # type: ignore[arg-type]
    except OverflowError as exc:
        raise SpecError(f"alpha is {alpha!r:.40}…, expected a finite number") from exc


def _activation_key(activation: Activation) -> Any:
    """The activation as part of a key. One that is no name followed by plain numbers is judged at once."""
    found = hashable(activation)
    if type(found) is not tuple or not {type(value) for value in found} <= _NUMBERS_AND_NAMES:
        name, numbers = resolve(activation)
        found = (name, *numbers)
    return found


def _asked_for(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
) -> tuple[bool, bool]:
    """Whether any gradient may be asked for later, and whether that of the scale may."""
    if not torch.is_grad_enabled():
        return False, False
    learned = scale is not None and scale.requires_grad
    graded = (
        learned
        or input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
        or (out is not None and out.requires_grad)
    )
    return graded, learned


def _new_caller(
    spatial: int,
    given: Given,
    raw: Arguments,
    alpha: float,
    activation: Resolved,
    policy: Policy | None,
    graded: bool,
    learned: bool,
) -> Run:
    """Work out what a call with these arguments does from now on."""
    input, weight, bias, residual, scale = given
    _number(alpha)
    batched = check_ranks(spatial, input, weight)
    args = arguments(spatial, weight, *raw)
    if not batched:
        given = Given(input.unsqueeze(0), weight, bias, None if residual is None else residual.unsqueeze(0), scale)
    device = input.device.type
    try:
        problem = fused_problem(given, args, alpha, activation, batched)
    except NotExpressible:
        counts.add("left_to_torch")
        return _composed(spatial, raw, alpha, activation)
    if device not in ("cpu", "cuda"):
        counts.add("left_to_torch")
        return _composed(spatial, raw, alpha, activation)
    if scale is not None and not in_graph_capture(input.get_device()):
        check_scale_values(scale)
    if learned:
        run = _learned(problem, args, policy, alpha, activation)
    elif graded:
        run = _differentiable(problem, given, args, policy, alpha, activation)
    else:
        run = _checked(FusedCaller(problem, policy, weight), problem, input.device)
    run = _without_autocast(run, device, looks=device == "cpu" and scale is not None)
    return run if batched else _without_batch(run)


# --- what a call does


def _checked(caller: Run, problem: Problem, device: torch.device) -> Run:
    """Look at `out`, which is no part of the key, before anything is written. It may be the residual itself."""

    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if out is None:
            return caller(input, weight, bias, None, residual, scale)
        check_out(out, problem.output, device)
        if shares_memory(out, (input, weight, bias, residual, scale)):
            return out.copy_(caller(input, weight, bias, None, residual, scale))
        return caller(input, weight, bias, out, residual, scale)

    run.bare = caller  # type: ignore[attr-defined]
    return run


def _differentiable(
    problem: Problem, given: Given, args: ConvArgs, policy: Policy | None, alpha: float, activation: Resolved
) -> Run:
    """All of it by one plan, but for an activation whose derivative needs what goes into it."""
    inside, behind = (activation, NONE) if activation.from_output else (NONE, activation)
    if behind is not NONE:
        problem = fused_problem(given, args, alpha, inside)
    wanted = (given.input.requires_grad, given.weight.requires_grad)
    step = _Step(FusedCaller(problem, policy, given.weight, wanted), problem, args, policy, alpha, inside)

    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        refuse_out(out)
        result: Tensor = Fused.apply(step, input, weight, bias, residual, scale)  # type: ignore[no-untyped-call]
        return behind.of(result)

    return run


def _learned(problem: Problem, args: ConvArgs, policy: Policy | None, alpha: float, activation: Resolved) -> Run:
    """The gradient of a scale needs the convolution's result, which no fused plan writes."""
    geometry, op = Geometry(problem, args, policy), problem.op

    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        refuse_out(out)
        result: Tensor = Linear.apply(op, input, weight, None, geometry)  # type: ignore[no-untyped-call]
        return follow(result, bias, residual, scale, alpha, activation)

    return run


def _composed(spatial: int, raw: Arguments, alpha: float, activation: Resolved) -> Run:
    """Torch's own convolution and elementwise operations, for tensors and arguments that convplan does not plan."""
    convolution = through_torch(spatial, raw)

    def run(
        input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        args, batched = arguments(spatial, weight, *raw), check_ranks(spatial, input, weight)
        if not batched:
            input, residual = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
        check_following(result_dims(input, weight, args), input, bias, residual, scale)
        _number(alpha)
        device, in_core = input.device.type, scale is None
        with torch.autocast(device, enabled=False) if device in ("cpu", "cuda") and _any_autocast() else nullcontext():
            result = convolution(input, weight, bias if in_core else None, None)
            result = follow(result, None if in_core else bias, residual, scale, alpha, activation)
        result = result if batched else result.squeeze(0)
        if out is None:
            return result
        if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
            refuse_out(out)
        if out.shape != result.shape or out.dtype != result.dtype:
            raise SpecError(f"out is {tuple(out.shape)} {out.dtype}, expected {tuple(result.shape)} {result.dtype}")
        return out.copy_(result)

    return run


def _without_autocast(run: Run, device: str, looks: bool) -> Run:
    """Casting is done by now, and what engines compute in is theirs to say.

    Args:
        looks: at the scale's numbers, each time. On a GPU that would wait for it, so they are looked at once, when a
            caller is made for the first such tensor; inside a CUDA graph's capture they are not.
    """

    def run_plainly(
        input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if looks and scale is not None:
            check_scale_values(scale)
        if not _any_autocast():
            return run(input, weight, bias, out, residual, scale)
        with torch.autocast(device, enabled=False):
            return run(input, weight, bias, out, residual, scale)

    if not looks:
        run_plainly.bare = bare_of(run)  # type: ignore[attr-defined]
    return run_plainly


def _without_batch(run: Run) -> Run:
    def run_one(
        input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None, residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        one = None if residual is None else residual.unsqueeze(0)
        result = run(input.unsqueeze(0), weight, bias, None if out is None else out.unsqueeze(0), one, scale)
        return result.squeeze(0) if out is None else out

    return run_one


# --- gradients


class _Step:
    """What `Fused` needs to know of one call, besides tensors."""

    def __init__(
        self,
        run: Run,
        problem: Problem,
        args: ConvArgs,
        policy: Policy | None,
        alpha: float,
        activation: Resolved,
    ) -> None:
        self.run, self.op, self.alpha, self.activation = run, problem.op, alpha, activation
        self.geometry = Geometry(problem, args, policy)


class Fused(torch.autograd.Function):
    """A convolution with what follows it, whose activation's derivative can be had from the result.

    `Fused.apply(step, input, weight, bias, residual, scale)`; the scale is a constant. Gradients of every order, made
    of `Linear` and torch's own operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: _Step,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        """One plan."""
        y = step.run(input, weight, bias, None, residual, scale)
        ctx.step = step
        ctx.save_for_backward(input, weight, scale, None if step.activation == NONE else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The activation's derivative, and before dgrad and wgrad the scale."""
        step: _Step = ctx.step
        input, weight, scale, y = ctx.saved_tensors
        need_input, need_weight, need_bias, need_residual = ctx.needs_input_grad[1:5]
        grad, to_bias = gradient_behind(step.activation, grads[0], y, need_bias)
        scaled = grad if scale is None else scale_channels(grad, scale)
        to_input, to_weight = gradients(step.op, input, weight, scaled, step.geometry, (need_input, need_weight))
        to_residual = times(grad, step.alpha) if need_residual else None
        return None, to_input, to_weight, to_bias, to_residual, None


def gradient_behind(activation: Resolved, grad: Tensor, y: Tensor | None, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient behind an activation, and a bias's: in one pass over memory where there is a kernel for it."""
    if y is not None and has_kernels(grad) and y.stride() == grad.stride():
        grad, sums = activation_backward(grad, y, activation.name, activation.parameters, from_output=True, bias=bias)
        return grad, None if sums is None else sums.to(grad.dtype)
    grad = grad if y is None else activation.gradient(grad, y)
    return grad, bias_gradient(grad) if bias else None

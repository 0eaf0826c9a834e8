"""`conv1d` … `conv_transpose3d`: torch's functional convolutions, planned, with a policy, `out=`, asymmetric padding,
and what follows the convolution (residual, scale, activation), which is `fused`'s business.

They need no `enable()`. Gradients of every order go through convplan too: fprop, dgrad and wgrad are each linear in
both inputs, and the gradient of each is made of the other two (`Linear`).
"""

from __future__ import annotations

import torch

from convplan._activations import Activation
from convplan._choices import state
from convplan._counts import counts
from convplan._plan import shares_memory
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._runtime import local
from convplan.engines.base import Run
from convplan.torch_ops.adapter import ALIGNMENT_BYTES, ConvArgs, NotExpressible, forward_problem
from convplan.torch_ops.arguments import (
    Arguments,
    Ints,
    Padding,
    arguments,
    cast_for_autocast,
    check_out,
    check_ranks,
    hashable,
    refuse_out,
    through_torch,
    without_autocast,
)
from convplan.torch_ops.fused import fused
from convplan.torch_ops.linear import Caller, Geometry, Linear
from convplan.torch_ops.seen import live_flags
from convplan.torch_ops.traced import traced
from convplan.torch_ops.undisturbed import undisturbed

_is_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled

Tensor = torch.Tensor


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    alpha: float = 1,
    activation: Activation = None,
    scale: Tensor | None = None,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """1-D convolution: input (N, C, L), weight (K, C/groups, R), result (N, K, P). All else as in `conv2d`."""
    return _convolution(
        1, input, weight, bias, stride, padding, dilation, False, 0, groups, policy, out,
        residual, alpha, activation, scale,
    )  # fmt: skip


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    alpha: float = 1,
    activation: Activation = None,
    scale: Tensor | None = None,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """2-D convolution as `torch.nn.functional.conv2d` computes it, run by the plan that convplan chose.

    Args:
        input: (N, C, H, W), or (C, H, W).
        weight: (K, C/groups, R, S).
        bias: (K,), or None.
        stride, dilation: a number, or one for each spatial dimension.
        padding: a number, `"same"`, `"valid"`, or one entry for each spatial dimension, each a number or a
            (before, after) pair. Pairs cost no copy where the engine takes them.
        groups: divides C and K.
        residual: added to the convolution, times `alpha`. It has the result's shape, dtype, device and layout.
        alpha: a finite number; without a residual it multiplies nothing.
        activation: what comes last: `"relu"`, `"leaky_relu"`, `"clamp"`, `"relu6"`, `"hardtanh"`, `"gelu"`,
            `"gelu_tanh"`, `"silu"`, `"sigmoid"`, `"tanh"`, `"hardswish"`, `"elu"`, `"softplus"`, `"none"`; or a name
            and its numbers, `("leaky_relu", 0.2)`, in the order of torch's own functions.
        scale: (K,), float32 (float64 for float64 tensors, under autocast too); finite and not 0. Multiplies the
            convolution, before anything is added. Its numbers are looked at in each call on a CPU, and on a GPU once
            for each kind of call, because that waits for the GPU.
        policy: the rules for this call; None: those of `enable()`, else the defaults.
        out: a tensor of the result's shape and dtype to write into, with any strides; not together with gradients. It
            may be the residual itself.

    Returns:
        `activation(scale * convolution + alpha * residual + bias)`, (N, K, P, Q), channels-last when input or weight
        suggests it, as in torch; `out` itself when given.

    Raises:
        SpecError: arguments that do not fit together, or an activation that is not known.
        ReplayMiss: the policy says `mode="replay"` and the store lacks the problem.
        PolicyError: the policy names an engine that is not registered.
    """
    return _convolution(
        2, input, weight, bias, stride, padding, dilation, False, 0, groups, policy, out,
        residual, alpha, activation, scale,
    )  # fmt: skip


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    alpha: float = 1,
    activation: Activation = None,
    scale: Tensor | None = None,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """3-D convolution: input (N, C, D, H, W), weight (K, C/groups, T, R, S), result (N, K, O, P, Q). See `conv2d`."""
    return _convolution(
        3, input, weight, bias, stride, padding, dilation, False, 0, groups, policy, out,
        residual, alpha, activation, scale,
    )  # fmt: skip


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    residual: Tensor | None = None,
    alpha: float = 1,
    activation: Activation = None,
    scale: Tensor | None = None,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """1-D transposed convolution: input (N, C, L), weight (C, K/groups, R). All else as in `conv_transpose2d`."""
    return _convolution(
        1, input, weight, bias, stride, padding, dilation, True, output_padding, groups, policy, out,
        residual, alpha, activation, scale,
    )  # fmt: skip


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    residual: Tensor | None = None,
    alpha: float = 1,
    activation: Activation = None,
    scale: Tensor | None = None,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """2-D transposed convolution as `torch.nn.functional.conv_transpose2d` computes it, planned as a dgrad.

    Args:
        input: (N, C, H, W), or (C, H, W).
        weight: (C, K/groups, R, S).
        bias: (K,), or None.
        stride, dilation: a number, or one for each spatial dimension.
        padding: a number, or one entry for each spatial dimension, each a number or a (before, after) pair: how much
            is cut off the result on each side.
        output_padding: rows added behind, less than the stride or the dilation.
        groups, residual, alpha, activation, scale, policy, out: as in `conv2d`.

    Returns:
        (N, K, P, Q) with P = (H - 1) * stride - before - after + dilation * (R - 1) + output_padding + 1.

    Raises:
        SpecError, ReplayMiss, PolicyError: as `conv2d`.
    """
    return _convolution(
        2, input, weight, bias, stride, padding, dilation, True, output_padding, groups, policy, out,
        residual, alpha, activation, scale,
    )  # fmt: skip


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    residual: Tensor | None = None,
    alpha: float = 1,
    activation: Activation = None,
    scale: Tensor | None = None,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """3-D transposed convolution: input (N, C, D, H, W), weight (C, K/groups, T, R, S). See `conv_transpose2d`."""
    return _convolution(
        3, input, weight, bias, stride, padding, dilation, True, output_padding, groups, policy, out,
        residual, alpha, activation, scale,
    )  # fmt: skip


@undisturbed
def _convolution(
    spatial: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    policy: Policy | None,
    out: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    activation: Activation,
    scale: Tensor | None,
) -> Tensor:
    """The hot path of these functions: a key of the arguments as they came, a look-up and a call.

    What has to be worked out from the arguments is worked out once, in `_new_caller`.
    """
    raw = (stride, padding, dilation, transposed, output_padding, groups)
    if not (residual is None and activation is None and scale is None and alpha == 1):
        return fused(spatial, input, weight, bias, raw, policy, out, residual, alpha, activation, scale)
    if _is_compiling():
        return traced(input, weight, bias, arguments(spatial, weight, *raw), policy, out)
    try:
        if _any_autocast() and torch.is_autocast_enabled(input.device.type):
            input, weight, bias = cast_for_autocast(input, weight, bias)
    except AttributeError as exc:
        raise _no_tensors(input, weight, bias) from exc
    caller, _ = found(spatial, input, weight, bias, raw, policy, out)
    return caller(input, weight, bias, out)


def found(
    spatial: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    raw: Arguments,
    policy: Policy | None,
    out: Tensor | None,
) -> tuple[Run, bool]:
    """What runs a call without an epilogue, cast for autocast, and whether it is kept for the next one."""
    try:
        token = state.token
        graded = torch.is_grad_enabled() and (
            input.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (out is not None and out.requires_grad)
        )
        stride, padding, dilation, transposed, output_padding, groups = raw
        aligned = ALIGNMENT_BYTES[input.data_ptr() & 31], ALIGNMENT_BYTES[weight.data_ptr() & 31]
        key = (
            token, spatial, transposed, input.shape, input.stride(), input.dtype,
            weight.shape, weight.stride(), weight.dtype,
            None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
            stride if type(stride) is int else hashable(stride),
            padding if type(padding) is int else hashable(padding),
            dilation if type(dilation) is int else hashable(dilation),
            output_padding if type(output_padding) is int else hashable(output_padding),
            groups, policy, graded, input.get_device(), weight.get_device(), aligned,
            live_flags(input.get_device()),
        )  # fmt: skip
    except AttributeError as exc:
        raise _no_tensors(input, weight, bias) from exc
    except RuntimeError:  # no memory of its own: inside vmap or another transform, or a layout of torch's own
        return through_torch(spatial, raw), False
    caller = local.callers.used(key)
    if caller is not None:
        return caller, True
    caller = _new_caller(spatial, input, weight, bias, raw, policy, graded)
    local.remember(key, token, caller, input.get_device())
    return caller, False


def _no_tensors(*given: object) -> TypeError:
    names = [type(one).__name__ for one in given if one is not None]
    return TypeError(f"found {', '.join(names)}, expected tensors for input, weight and bias")


def _new_caller(
    spatial: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    raw: Arguments,
    policy: Policy | None,
    graded: bool,
) -> Run:
    """Work out what a call with these arguments does from now on."""
    unbatched = not check_ranks(spatial, input, weight)
    args = arguments(spatial, weight, *raw)
    x = input.unsqueeze(0) if unbatched else input
    try:
        problem = forward_problem(x, weight, bias, args)
    except NotExpressible:
        counts.add("left_to_torch")
        return through_torch(spatial, raw)
    if x.device.type not in ("cpu", "cuda"):
        counts.add("left_to_torch")
        return through_torch(spatial, raw)
    if graded:
        run = _differentiable(problem, args, policy)
    else:
        run = _checked(Caller.of(problem, policy, x.get_device(), weight), problem, x.device)
    run = without_autocast(run, x.device.type)
    return _without_batch(run) if unbatched else run


def _without_batch(run: Run) -> Run:
    def run_one(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        result = run(input.unsqueeze(0), weight, bias, None if out is None else out.unsqueeze(0))
        return result.squeeze(0) if out is None else out

    return run_one


def _checked(caller: Caller, problem: Problem, device: torch.device) -> Run:
    """Look at `out`, which is no part of the key, before anything is written."""

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if out is None:
            return caller(input, weight, bias, None)
        check_out(out, problem.output, device)
        if shares_memory(out, (input, weight, bias)):
            return out.copy_(caller(input, weight, bias, None))
        return caller(input, weight, bias, out)

    run.bare = caller  # type: ignore[attr-defined]
    return run


def _differentiable(problem: Problem, args: ConvArgs, policy: Policy | None) -> Run:
    geometry, op = Geometry(problem, args, policy), problem.op

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        refuse_out(out)
        result: Tensor = Linear.apply(op, input, weight, bias, geometry)  # type: ignore[no-untyped-call]
        return result

    return run

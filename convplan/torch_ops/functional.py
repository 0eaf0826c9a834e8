"""`conv1d` … `conv_transpose3d`: torch's functional convolutions, planned, with a policy, `out=` and asymmetric padding.

They need no `enable()`. Gradients of every order go through convplan too: fprop, dgrad and wgrad are each linear in both
inputs, and the gradient of each is made of the other two (`_Linear`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from convplan import _runtime
from convplan._errors import ConvPlanError, ReplayMiss, SpecError
from convplan._policy import Policy
from convplan._problem import Op, Problem, padding_pairs, per_dim
from convplan._runtime import Runner, counts, local, state, warn_once
from convplan.torch_ops.adapter import (
    ALIGNMENT_BYTES,
    DTYPE_NAMES,
    ConvArgs,
    check_same_place,
    forward_problem,
    output_spec,
    spec_of,
)
from convplan.torch_ops.override import NO_GRADIENTS, live_flags

Tensor = torch.Tensor
Ints = int | Sequence[int]
Padding = int | Literal["same", "valid"] | Sequence[int | Sequence[int]]

_SHARED = """
    Args:
        input: (N, {in_c}, {spatial}), or without N.
        weight: {weight}.
        bias: ({out_c},), or None.
        stride{outer}, dilation: a number, or one for each spatial dimension.
        padding: {padding}
        groups: divides the channels of input and output.
        policy: the rules for this call; None: those of `enable()`, else the defaults.
        out: a tensor of the result's shape and dtype to write into, with any strides; no gradient is recorded then.

    Returns:
        (N, {out_c}, {out}), channels-last when input or weight suggests it, as in torch.

    Raises:
        SpecError: arguments that do not fit together.
        ReplayMiss: the policy says `mode="replay"` and the store lacks the problem.
"""
_PADDING = """a number, `"same"`, `"valid"`, or one entry for each spatial dimension, each a number or a
            (before, after) pair; pairs cost no copy where the engine takes them."""
_PADDING_TRANSPOSED = """a number, or one entry for each spatial dimension, each a number or a (before, after) pair:
            how much is cut off the result."""


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _convolution(1, input, weight, bias, stride, padding, dilation, False, 0, groups, policy, out)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _convolution(2, input, weight, bias, stride, padding, dilation, False, 0, groups, policy, out)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _convolution(3, input, weight, bias, stride, padding, dilation, False, 0, groups, policy, out)


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
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _convolution(1, input, weight, bias, stride, padding, dilation, True, output_padding, groups, policy, out)


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
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _convolution(2, input, weight, bias, stride, padding, dilation, True, output_padding, groups, policy, out)


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
    policy: Policy | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _convolution(3, input, weight, bias, stride, padding, dilation, True, output_padding, groups, policy, out)


for _rank, _spatial, _filter, _out in ((1, "L", "R", "P"), (2, "H, W", "R, S", "P, Q"), (3, "D, H, W", "T, R, S", "O, P, Q")):
    globals()[f"conv{_rank}d"].__doc__ = (
        f"{_rank}-D convolution, as `torch.nn.functional.conv{_rank}d`, run by the plan convplan chose.\n"
        + _SHARED.format(
            in_c="C", out_c="K", spatial=_spatial, out=_out, weight=f"(K, C/groups, {_filter})", outer="", padding=_PADDING
        )
    )
    globals()[f"conv_transpose{_rank}d"].__doc__ = (
        f"{_rank}-D transposed convolution, as `torch.nn.functional.conv_transpose{_rank}d`, planned as a dgrad.\n"
        + _SHARED.format(
            in_c="K",
            out_c="C",
            spatial=_out,
            out=_spatial,
            weight=f"(K, C/groups, {_filter})",
            outer=", output_padding",
            padding=_PADDING_TRANSPOSED,
        )
    )


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
) -> Tensor:
    unbatched = input.dim() == spatial + 1
    if input.dim() not in (spatial + 1, spatial + 2) or weight.dim() != spatial + 2:
        raise SpecError(
            f"input has {input.dim()} dimensions and weight {weight.dim()}, expected {spatial + 2} each "
            f"(or {spatial + 1} for an input without batch): input {tuple(input.shape)}, weight {tuple(weight.shape)}"
        )
    x = input.unsqueeze(0) if unbatched else input
    args = _arguments(spatial, weight, stride, padding, dilation, transposed, output_padding, groups)
    if out is not None and unbatched:
        _run(x, weight, bias, args, policy, out.unsqueeze(0))
        return out
    result = _run(x, weight, bias, args, policy, out)
    return result.squeeze(0) if unbatched else result


def _arguments(
    spatial: int,
    weight: Tensor,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> ConvArgs:
    steps, dilations = per_dim("stride", stride, spatial), per_dim("dilation", dilation, spatial)
    outer = per_dim("output_padding", output_padding, spatial)
    for name, values in (("stride", steps), ("dilation", dilations)):
        if min(values) < 1:
            raise SpecError(f"{name} is {values}, expected values >= 1")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise SpecError(f"groups is {groups!r}, expected an integer >= 1")
    for extra, step, dil in zip(outer, steps, dilations, strict=True):
        if not 0 <= extra < max(step, dil) and transposed:
            raise SpecError(f"output_padding is {outer}, expected 0 <= value < max(stride, dilation) = {max(step, dil)}")
    pads = _pads(padding, weight.shape[2:], steps, dilations, transposed)
    return ConvArgs(steps, pads, dilations, transposed, outer, groups)


def _pads(
    padding: Padding, taps: Sequence[int], stride: Sequence[int], dilation: Sequence[int], transposed: bool
) -> tuple[tuple[int, int], ...]:
    if not isinstance(padding, str):
        return padding_pairs(padding, len(taps))
    if padding == "valid" and not transposed:
        return ((0, 0),) * len(taps)
    if padding != "same" or transposed:
        raise SpecError(
            f"padding is {padding!r}, expected numbers or pairs" + ("" if transposed else ", 'same' or 'valid'")
        )
    if max(stride) > 1:
        raise SpecError(f"padding is 'same' and stride {tuple(stride)}, expected stride 1 in every dimension")
    total = [dil * (size - 1) for dil, size in zip(dilation, taps, strict=True)]
    return tuple((both // 2, both - both // 2) for both in total)


def _run(
    x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, policy: Policy | None, out: Tensor | None
) -> Tensor:
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w, bias))
    if out is None and wants_gradient:
        return _differentiable(x, w, bias, args, policy)
    if out is not None and wants_gradient:
        raise SpecError("out= is given and a tensor requires a gradient; expected out=None, or torch.no_grad()")
    with torch.no_grad():
        return _forward(x, w, bias, args, policy, out)


def _forward(
    x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, policy: Policy | None, out: Tensor | None
) -> Tensor:
    """Without gradient: the hot path of these functions."""
    token = state.token
    key = (
        token, "functional", x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype,
        None if bias is None else (bias.shape, bias.dtype), args, policy, x.get_device(), w.get_device(),
        ALIGNMENT_BYTES[x.data_ptr() & 31], ALIGNMENT_BYTES[w.data_ptr() & 31], live_flags(),
    )  # fmt: skip
    caller = local.callers.get(key)
    if caller is None:
        caller = _new_caller(forward_problem(x, w, bias, args), policy)
        local.remember(key, token, caller)
    else:
        local.callers.move_to_end(key)
        local.hits[0] += 1
    if out is not None:
        caller.check_out(out, x)
    return caller(x, w, bias, out)


class _Caller:
    """Runs one problem whatever happens: by its plan, or by stock torch where there is none, or as nothing at all."""

    def __init__(self, problem: Problem, runner: Runner | None) -> None:
        self._problem = problem
        self._runner = runner

    def check_out(self, out: Tensor, like: Tensor) -> None:
        spec = self._problem.output
        if tuple(out.shape) != spec.dims or DTYPE_NAMES.get(out.dtype) != spec.dtype or out.device != like.device:
            raise SpecError(
                f"out is {tuple(out.shape)} {out.dtype} on {out.device}, "
                f"expected {spec.dims} torch.{spec.dtype} on {like.device}"
            )

    def __call__(self, first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if self._runner is not None:
            try:
                return self._runner(first, second, bias, out)
            except ReplayMiss:
                raise
            except ConvPlanError as exc:
                counts.add("fell_back")
                warn_once(f"stock torch runs this convolution: {exc}")
        return self._without_plan(first, second, bias, out)

    def _without_plan(self, first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        from convplan.engines._support import deliver, empty

        problem = self._problem
        if not problem.is_empty:
            return last_resort(problem)(first, second, bias, out)
        result = empty(problem.output, first.device).zero_()
        if bias is not None:
            result += bias.view(-1, *[1] * problem.spatial_rank)
        return deliver(result, problem.output, out)


def last_resort(problem: Problem) -> Any:
    """Stock torch's kernel for a problem, as a function like a built candidate's."""
    from convplan.engines.aten import AtenEngine
    from convplan.engines.base import EngineConfig

    return AtenEngine().build(problem, EngineConfig("aten"), Policy().resolve()).run


def _new_caller(problem: Problem, policy: Policy | None, gradients: tuple[bool, bool] = NO_GRADIENTS) -> _Caller:
    counts.add("misses")
    wanted = _runtime.check_policy(state.policy if policy is None else policy)
    if problem.is_empty:
        return _Caller(problem, None)
    for observe in state.captures:
        observe(problem, gradients)
    try:
        return _Caller(problem, Runner(problem, wanted))
    except ReplayMiss:
        raise
    except ConvPlanError as exc:
        counts.add("fell_back")
        warn_once(f"stock torch runs this convolution: {exc}")
        return _Caller(problem, None)


class _Geometry:
    """What fprop, dgrad and wgrad of one convolution share, besides tensors: the arguments and all three shapes."""

    def __init__(self, problem: Problem, args: ConvArgs, policy: Policy | None) -> None:
        self.dims = {"fprop": problem.y.dims, "dgrad": problem.x.dims, "wgrad": problem.w.dims}
        self.padding, self.args, self.policy = problem.padding, args, policy

    def run(
        self,
        op: Op,
        first: Tensor,
        second: Tensor,
        bias: Tensor | None = None,
        gradients: tuple[bool, bool] = NO_GRADIENTS,
    ) -> Tensor:
        """One of the three on (x, w), (dy, w) or (x, dy), planned under the geometry's policy."""
        token = state.token
        key = (
            token, op, self.dims[op], self.args, self.policy, first.shape, first.stride(), first.dtype, second.shape,
            second.stride(), bias is None, first.get_device(), ALIGNMENT_BYTES[first.data_ptr() & 31],
            ALIGNMENT_BYTES[second.data_ptr() & 31], live_flags(),
        )  # fmt: skip
        caller = local.callers.get(key)
        if caller is None:
            caller = _new_caller(self._problem(op, first, second, bias), self.policy, gradients)
            local.remember(key, token, caller)
        else:
            local.callers.move_to_end(key)
            local.hits[0] += 1
        return caller(first, second, bias, None)  # type: ignore[no-any-return]

    def _problem(self, op: Op, first: Tensor, second: Tensor, bias: Tensor | None) -> Problem:
        from convplan._problem import Epilogue

        check_same_place(first, second, bias)
        given = {"fprop": ("x", "w"), "dgrad": ("y", "w"), "wgrad": ("x", "y")}[op]
        written = {"fprop": "y", "dgrad": "x", "wgrad": "w"}[op]
        specs = {
            given[0]: spec_of(first),
            given[1]: spec_of(second),
            written: output_spec(self.dims[op], first, second),
        }
        return Problem(
            op=op,
            x=specs["x"],
            w=specs["w"],
            y=specs["y"],
            padding=self.padding,
            stride=self.args.stride,
            dilation=self.args.dilation,
            groups=self.args.groups,
            epilogue=Epilogue(bias=bias is not None),
            device=first.device.type,
        )


class _Linear(torch.autograd.Function):
    """One of the three operations, with gradients made of the other two, to any order."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, op: Op, first: Tensor, second: Tensor, bias: Tensor | None, geometry: _Geometry
    ) -> Tensor:
        ctx.save_for_backward(first, second)
        ctx.op, ctx.geometry, ctx.has_bias = op, geometry, bias is not None
        # Only the user's own call is a forward whose gradients may follow; wgrad never is.
        gradients = NO_GRADIENTS if op == "wgrad" else (first.requires_grad, second.requires_grad)
        return geometry.run(op, first, second, bias, gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None, None]:
        grad = grads[0]
        first, second = ctx.saved_tensors
        geometry = ctx.geometry
        need_first, need_second, need_bias = ctx.needs_input_grad[1:4]

        def linear(op: Op, left: Tensor, right: Tensor) -> Tensor:
            result: Tensor = _Linear.apply(op, left, right, None, geometry)  # type: ignore[no-untyped-call]
            return result

        to_first: Tensor | None = None
        to_second: Tensor | None = None
        if ctx.op == "fprop":  # first is x, second is w, grad is dy
            to_first = linear("dgrad", grad, second) if need_first else None
            to_second = linear("wgrad", first, grad) if need_second else None
        elif ctx.op == "dgrad":  # first is y, second is w, grad stands where x does
            to_first = linear("fprop", grad, second) if need_first else None
            to_second = linear("wgrad", grad, first) if need_second else None
        else:  # first is x, second is y, grad stands where w does
            to_first = linear("dgrad", second, grad) if need_first else None
            to_second = linear("fprop", first, grad) if need_second else None
        over = [0, *range(2, grad.dim())]
        return None, to_first, to_second, grad.sum(over) if ctx.has_bias and need_bias else None, None


def _differentiable(x: Tensor, w: Tensor, bias: Tensor | None, args: ConvArgs, policy: Policy | None) -> Tensor:
    problem = forward_problem(x, w, bias, args)
    geometry = _Geometry(problem, args, policy)
    result: Tensor = _Linear.apply(problem.op, x, w, bias, geometry)  # type: ignore[no-untyped-call]
    return result


"""`conv1d` … `conv_transpose3d`: torch's functional convolutions, planned, with a policy, `out=` and asymmetric
padding.

They need no `enable()`. Gradients of every order go through convplan too: fprop, dgrad and wgrad are each linear in
both inputs, and the gradient of each is made of the other two (`_Linear`).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch

from convplan._choices import Layer, state
from convplan._counts import counts
from convplan._epilogue import Epilogue
from convplan._errors import ConvPlanError, SpecError
from convplan._plan import check_distinct, shares_memory
from convplan._policy import Policy, torch_flags
from convplan._problem import Op, Problem, TensorSpec, padding_pairs, per_dim
from convplan._runtime import Runner, check_policy, local
from convplan.engines._support import deliver, empty
from convplan.engines.aten import AtenEngine
from convplan.engines.base import EngineConfig, Run
from convplan.torch_ops.adapter import (
    ALIGNMENT_BYTES,
    DTYPE_NAMES,
    ConvArgs,
    NotExpressible,
    check_same_place,
    forward_problem,
    output_spec,
    spec_of,
)
from convplan.torch_ops.override import NO_GRADIENTS, note_fallback
from convplan.torch_ops.seen import live_flags
from convplan.torch_ops.traced import traced
from convplan.torch_ops.undisturbed import undisturbed

_is_compiling = torch.compiler.is_compiling
_any_autocast = torch._C._is_any_autocast_enabled

Tensor = torch.Tensor
Ints = int | Sequence[int]
Padding = int | Literal["same", "valid"] | Sequence[int | Sequence[int]]


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
    """1-D convolution: input (N, C, L), weight (K, C/groups, R), result (N, K, P). All else as in `conv2d`."""
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
    """2-D convolution as `torch.nn.functional.conv2d` computes it, run by the plan that convplan chose.

    Args:
        input: (N, C, H, W), or (C, H, W).
        weight: (K, C/groups, R, S).
        bias: (K,), or None.
        stride, dilation: a number, or one for each spatial dimension.
        padding: a number, `"same"`, `"valid"`, or one entry for each spatial dimension, each a number or a
            (before, after) pair. Pairs cost no copy where the engine takes them.
        groups: divides C and K.
        policy: the rules for this call; None: those of `enable()`, else the defaults.
        out: a tensor of the result's shape and dtype to write into, with any strides; not together with gradients.

    Returns:
        (N, K, P, Q), channels-last when input or weight suggests it, as in torch; `out` itself when given.

    Raises:
        SpecError: arguments that do not fit together.
        ReplayMiss: the policy says `mode="replay"` and the store lacks the problem.
        PolicyError: the policy names an engine that is not registered.
    """
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
    """3-D convolution: input (N, C, D, H, W), weight (K, C/groups, T, R, S), result (N, K, O, P, Q). See `conv2d`."""
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
    """1-D transposed convolution: input (N, C, L), weight (C, K/groups, R). All else as in `conv_transpose2d`."""
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
    """2-D transposed convolution as `torch.nn.functional.conv_transpose2d` computes it, planned as a dgrad.

    Args:
        input: (N, C, H, W), or (C, H, W).
        weight: (C, K/groups, R, S).
        bias: (K,), or None.
        stride, dilation: a number, or one for each spatial dimension.
        padding: a number, or one entry for each spatial dimension, each a number or a (before, after) pair: how much
            is cut off the result on each side.
        output_padding: rows added behind, less than the stride or the dilation.
        groups, policy, out: as in `conv2d`.

    Returns:
        (N, K, P, Q) with P = (H - 1) * stride - before - after + dilation * (R - 1) + output_padding + 1.

    Raises:
        SpecError, ReplayMiss, PolicyError: as `conv2d`.
    """
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
    """3-D transposed convolution: input (N, C, D, H, W), weight (C, K/groups, T, R, S). See `conv_transpose2d`."""
    return _convolution(3, input, weight, bias, stride, padding, dilation, True, output_padding, groups, policy, out)


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
) -> Tensor:
    """The hot path of these functions: a key of the arguments as they came, a look-up and a call.

    What has to be worked out from the arguments is worked out once, in `_new_caller`.
    """
    raw = (stride, padding, dilation, transposed, output_padding, groups)
    if _is_compiling():
        return traced(input, weight, bias, _arguments(spatial, weight, *raw), policy, out)
    try:
        if _any_autocast() and torch.is_autocast_enabled(input.device.type):
            input, weight, bias = _autocast(input, weight, bias)
        token = state.token
        graded = torch.is_grad_enabled() and (
            input.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (out is not None and out.requires_grad)
        )
        aligned = ALIGNMENT_BYTES[input.data_ptr() & 31], ALIGNMENT_BYTES[weight.data_ptr() & 31]
        key = (
            token, spatial, transposed, input.shape, input.stride(), input.dtype,
            weight.shape, weight.stride(), weight.dtype,
            None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
            stride if type(stride) is int else _hashable(stride),
            padding if type(padding) is int else _hashable(padding),
            dilation if type(dilation) is int else _hashable(dilation),
            output_padding if type(output_padding) is int else _hashable(output_padding),
            groups, policy, graded, input.get_device(), weight.get_device(), aligned,
            live_flags(input.get_device()),
        )  # fmt: skip
    except AttributeError as exc:
        names = [type(given).__name__ for given in (input, weight, bias) if given is not None]
        raise TypeError(f"found {', '.join(names)}, expected tensors for input, weight and bias") from exc
    except RuntimeError:  # no memory of its own: inside vmap or another transform, or a layout of torch's own
        return _through_torch(spatial, raw)(input, weight, bias, out)
    callers = local.callers
    caller = callers.get(key)
    if caller is not None:
        callers.hits[0] += 1
        if callers.crowded:
            callers.move_to_end(key)
    else:
        caller = _new_caller(spatial, input, weight, bias, raw, policy, graded)
        local.remember(key, token, caller, input.get_device())
    return caller(input, weight, bias, out)


def _autocast(*tensors: Tensor | None) -> Any:
    """Cast as torch's convolutions do under autocast: everything floating to its dtype, float64 left alone."""
    assert tensors[0] is not None
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _hashable(value: object) -> object:
    """Lists inside lists as tuples; anything else as it is, for `_arguments` to judge."""
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


Arguments = tuple[Ints, Padding, Ints, bool, Ints, int]


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
    unbatched = input.dim() == spatial + 1
    if input.dim() not in (spatial + 1, spatial + 2) or weight.dim() != spatial + 2:
        raise SpecError(
            f"input has {input.dim()} dimensions and weight {weight.dim()}, expected {spatial + 2} each "
            f"(or {spatial + 1} for an input without batch): input {tuple(input.shape)}, weight {tuple(weight.shape)}"
        )
    args = _arguments(spatial, weight, *raw)
    x = input.unsqueeze(0) if unbatched else input
    try:
        problem = forward_problem(x, weight, bias, args)
    except NotExpressible:
        counts.add("left_to_torch")
        return _through_torch(spatial, raw)
    if x.device.type not in ("cpu", "cuda"):
        counts.add("left_to_torch")
        return _through_torch(spatial, raw)
    if graded:
        run = _differentiable(problem, args, policy)
    else:
        run = _checked(_Caller.of(problem, policy, x.get_device(), weight), problem, x.device)
    run = _without_autocast(run, x.device.type)
    return _without_batch(run) if unbatched else run


def _through_torch(spatial: int, raw: Arguments) -> Run:
    """Torch's own convolution, for tensors and arguments that convplan does not plan; padded beforehand if need be."""
    stride, padding, dilation, transposed, output_padding, groups = raw

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        args = _arguments(spatial, weight, stride, padding, dilation, transposed, output_padding, groups)
        pads = [before for before, _ in args.padding]
        if not args.is_symmetric:
            if transposed:
                raise SpecError(f"padding is {args.padding}, expected the same before and after for these tensors")
            flat = [side for pair in reversed(args.padding) for side in pair]
            input, pads = torch.nn.functional.pad(input, flat), [0] * spatial
        x = input.unsqueeze(0) if input.dim() == spatial + 1 else input
        result = torch.convolution(
            x, weight, bias, list(args.stride), pads, list(args.dilation), transposed, list(args.output_padding), groups
        )
        result = result if x is input else result.squeeze(0)
        return result if out is None else out.copy_(result)

    return run


def _without_autocast(run: Run, device: str) -> Run:
    """Casting is done by now, and what engines compute in is theirs to say."""

    def run_plainly(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if not _any_autocast():
            return run(input, weight, bias, out)
        with torch.autocast(device, enabled=False):
            return run(input, weight, bias, out)

    return run_plainly


def _without_batch(run: Run) -> Run:
    def run_one(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        result = run(input.unsqueeze(0), weight, bias, None if out is None else out.unsqueeze(0))
        return result.squeeze(0) if out is None else out

    return run_one


def _checked(caller: _Caller, problem: Problem, device: torch.device) -> Run:
    """Look at `out`, which is no part of the key, before anything is written."""

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if out is None:
            return caller(input, weight, bias, None)
        _check_out(out, problem.output, device)
        if shares_memory(out, (input, weight, bias)):
            return out.copy_(caller(input, weight, bias, None))
        return caller(input, weight, bias, out)

    return run


def _check_out(out: Tensor, spec: TensorSpec, device: torch.device) -> None:
    check_distinct(out)
    if tuple(out.shape) != spec.dims or DTYPE_NAMES.get(out.dtype) != spec.dtype or out.device != device:
        found, expected = (
            f"{tuple(out.shape)} {out.dtype} on {out.device}",
            f"{spec.dims} torch.{spec.dtype} on {device}",
        )
        raise SpecError(f"out is {found}, expected {expected}")


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
            limit = max(step, dil)
            raise SpecError(f"output_padding is {outer}, expected 0 <= value < max(stride, dilation) = {limit}")
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


class _Caller:
    """Runs one problem whatever happens: by its plan, or by stock torch where there is none, or as nothing at all."""

    def __init__(self, problem: Problem, runner: Runner | None) -> None:
        self._problem = problem
        self._runner = runner

    @classmethod
    def of(
        cls,
        problem: Problem,
        policy: Policy | None,
        device: int,
        second: Tensor,
        gradients: tuple[bool, bool] = NO_GRADIENTS,
    ) -> _Caller:
        """Plan the problem, at the sight of its second input.

        A miss in replay mode is raised; any other failure to plan leaves it to stock torch.
        """
        counts.add("misses")
        wanted = check_policy(state.policy if policy is None else policy)
        if problem.is_empty:
            return cls(problem, None)
        for observe in state.captures:
            observe(problem, gradients)
        try:
            return cls(problem, Runner(problem, wanted, device, _layer(problem.op, second)))
        except ConvPlanError as exc:
            note_fallback(exc, wanted)
            return cls(problem, None)

    def __call__(self, first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if self._runner is not None:
            if not self._runner.settled:
                self._runner.layer = _layer(self._problem.op, second)
            try:
                return self._runner(first, second, bias, out)
            except ConvPlanError as exc:
                note_fallback(exc)
        return self._without_plan(first, second, bias, out)

    def _without_plan(self, first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        problem = self._problem
        if not problem.is_empty:
            return last_resort(problem)(first, second, bias, out)
        result = empty(problem.output, first.device).zero_()
        if bias is not None:
            result += bias.view(-1, *[1] * problem.spatial_rank)
        return deliver(result, problem.output, out)


def _layer(op: Op, second: Tensor) -> Layer | None:
    """Whose call this is, by its weight; there is none among the inputs of a weight's gradient."""
    return None if op == "wgrad" else weakref.ref(second)


def last_resort(problem: Problem) -> Run:
    """Stock torch's kernel for a problem, as a function like a built candidate's."""
    policy = Policy(deterministic=torch.are_deterministic_algorithms_enabled(), allow_tf32=torch_flags().allow_tf32)
    return AtenEngine().build(problem, EngineConfig("aten"), policy).run


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
            ALIGNMENT_BYTES[second.data_ptr() & 31], live_flags(first.get_device()),
        )  # fmt: skip
        callers = local.callers
        caller = callers.get(key)
        if caller is not None:
            callers.hits[0] += 1
            if callers.crowded:
                callers.move_to_end(key)
        else:
            device = first.get_device()
            caller = _Caller.of(self._problem(op, first, second, bias), self.policy, device, second, gradients)
            local.remember(key, token, caller, device)
        return caller(first, second, bias, None)

    def _problem(self, op: Op, first: Tensor, second: Tensor, bias: Tensor | None) -> Problem:
        check_same_place(first, second, bias)
        given = {"fprop": ("x", "w"), "dgrad": ("y", "w"), "wgrad": ("x", "y")}[op]
        written = {"fprop": "y", "dgrad": "x", "wgrad": "w"}[op]
        specs = {
            given[0]: spec_of(first),
            given[1]: spec_of(second),
            written: output_spec(self.dims[op], first, second, self.args),
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
    def forward(ctx: Any, op: Op, first: Tensor, second: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
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


def _differentiable(problem: Problem, args: ConvArgs, policy: Policy | None) -> Run:
    geometry, op = _Geometry(problem, args, policy), problem.op

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if out is not None:
            raise SpecError("out= is given and a tensor requires a gradient; expected out=None, or torch.no_grad()")
        result: Tensor = _Linear.apply(op, input, weight, bias, geometry)  # type: ignore[no-untyped-call]
        return result

    return run

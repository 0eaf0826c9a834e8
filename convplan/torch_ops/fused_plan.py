"""A convolution with what follows it, as a problem and as something that runs: checks, planning, and what stands in.

What a user's call looks like is `fused`'s business, what a compiler sees is `fused_library`'s; both end here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import msgspec
import torch

from convplan._activations import Resolved
from convplan._epilogue import Epilogue
from convplan._errors import ConvPlanError, SpecError
from convplan._policy import Policy
from convplan._problem import Problem, TensorSpec, normalize_strides
from convplan.engines._epilogues import apply_epilogue
from convplan.engines._support import deliver, empty
from convplan.torch_ops.adapter import ALIGNMENT_BYTES, ConvArgs, alignment_bytes, forward_problem
from convplan.torch_ops.linear import last_resort, layer_of, planned_runner
from convplan.torch_ops.override import NO_GRADIENTS, note_fallback

Tensor = torch.Tensor
Run = Callable[..., Tensor]
"""`run(input, weight, bias, out, residual, scale)`."""


class Given(NamedTuple):
    """The tensors of a call, with a batch."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    scale: Tensor | None


def dense(vector: Tensor | None) -> Tensor | None:
    """One number for each channel as engines take them: one after the other."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def aligned(scale: Tensor | None) -> Tensor | None:
    """A scale as engines take it; its alignment is no part of a problem, so it always has the best."""
    if scale is None or (scale.is_contiguous() and not scale.data_ptr() & 31):
        return scale
    return scale.clone(memory_format=torch.contiguous_format)


# --- what does not fit


def check_following(
    dims: Sequence[int],
    like: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Look at shapes, dtypes and devices of what follows, before anything runs; they may lack memory.

    Args:
        dims: of the result, with a batch.
        like: the input, whose dtype and device the result has.

    Raises:
        SpecError: one does not fit.
    """
    channels = dims[1]
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != channels):
            raise SpecError(
                f"{name}.shape is {tuple(vector.shape)}, expected ({channels},), one number for each output channel"
            )
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    for name, tensor, dtype, why in (
        ("bias", bias, like.dtype, "the input's dtype"),
        ("residual", residual, like.dtype, "the result's dtype"),
        ("scale", scale, wide, f"in which a scale of {like.dtype} results is"),
    ):
        if tensor is not None and tensor.dtype != dtype:
            raise SpecError(f"{name} is {tensor.dtype}, expected {dtype}, {why}; convert it with .to({dtype})")
        if tensor is not None and tensor.device != like.device:
            raise SpecError(f"{name} is on {tensor.device}, expected {like.device}; move it with .to('{like.device}')")
    if residual is None:
        return
    if residual.layout != torch.strided:
        raise SpecError(f"residual has layout {residual.layout}, expected torch.strided; use .to_dense()")
    if residual.dim() != len(dims) or any(have != want for have, want in zip(residual.shape, dims, strict=True)):
        raise SpecError(
            f"residual.shape is {tuple(residual.shape)}, expected {tuple(dims)}, the result's; make it so with "
            f".expand() and .contiguous(), or .reshape()"
        )


def _check_layout(residual: Tensor, spec: TensorSpec, batched: bool) -> None:
    if normalize_strides(spec.dims, residual.stride()) == spec.strides:
        return
    if spec.layout == "contiguous":
        kind, fix = "contiguous", ".contiguous()"
    elif len(spec.dims) == 3:
        kind, fix = "channels-last", ".transpose(-2, -1).contiguous().transpose(-2, -1)"
    else:
        kind = "channels-last"
        name = "channels_last" if len(spec.dims) == 4 else "channels_last_3d"
        fix = f".contiguous(memory_format=torch.{name})"
        fix = fix if batched else f".unsqueeze(0){fix}.squeeze(0)"
    found, expected = (residual.stride(), spec.strides) if batched else (residual.stride()[1:], spec.strides[1:])
    raise SpecError(
        f"residual has strides {tuple(found)}, expected {tuple(expected)}: the result is {kind} here, and a residual "
        f"has its layout; use residual{fix}"
    )


def check_scale_values(scale: Tensor) -> None:
    """Look at the numbers of a scale; on a GPU this waits for it.

    Raises:
        SpecError: zero, NaN or infinity is among them.
    """
    if not scale.numel():
        return
    low, high = torch.aminmax(scale.detach().abs())
    if low.item() > 0 and high.item() < math.inf:
        return
    wrong = ~scale.isfinite() | (scale == 0)
    first = int(wrong.nonzero()[0])
    raise SpecError(
        f"scale[{first}] is {scale[first].item()}, expected finite numbers other than 0 ({int(wrong.sum())} of "
        f"{scale.numel()} are not); fold a channel that is switched off into the weight instead"
    )


# --- what runs


def fused_problem(given: Given, args: ConvArgs, alpha: float, activation: Resolved, batched: bool = True) -> Problem:
    """The problem of a call.

    Args:
        given: tensors with a batch.
        batched: they had one as the user gave them, which errors tell.

    Raises:
        NotExpressible: torch can do this convolution, a problem cannot describe it.
        SpecError: arguments or tensors that do not fit together.
    """
    x, w, bias, residual, scale = given
    core = forward_problem(x, w, bias, args)
    check_following(core.output.dims, x, bias, residual, scale)
    if residual is not None:
        _check_layout(residual, core.output, batched)
    epilogue = Epilogue(
        bias=bias is not None,
        residual=residual is not None,
        alpha=alpha,
        scale=scale is not None,
        activation=activation.fused_name,
        parameters=activation.parameters,
        bias_alignment_bytes=32 if bias is None else alignment_bytes(bias),
        residual_alignment_bytes=32 if residual is None else alignment_bytes(residual),
    )
    return msgspec.structs.replace(core, epilogue=epilogue)


def alignment_of(tensor: Tensor | None) -> int:
    """What a key holds of a tensor's address."""
    return 0 if tensor is None else ALIGNMENT_BYTES[tensor.data_ptr() & 31]


class FusedCaller:
    """Runs a problem with its epilogue whatever happens: by its plan, or by stock torch's kernels one after the other.

    Called as `caller(first, second, bias, out, residual, scale)`; the thread and device are those it was made for.
    """

    def __init__(
        self,
        problem: Problem,
        policy: Policy | None,
        second: Tensor,
        gradients: tuple[bool, bool] = NO_GRADIENTS,
    ) -> None:
        self._problem = problem
        self._plain = problem.epilogue.is_plain
        self._runner = planned_runner(problem, policy, second.get_device(), second, gradients)
        self._bare: Run | None = None  # the plan itself, once the runner has nothing more to say

    def __call__(
        self,
        first: Tensor,
        second: Tensor,
        bias: Tensor | None,
        out: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        """The result; in `out`, which shares no memory with the others, where that is given."""
        runner = self._runner
        if runner is not None:
            more = () if self._plain else (residual, scale)
            try:
                if self._bare is not None:
                    try:
                        return self._bare(first, second, bias, out, *more)
                    except Exception as exc:  # whatever an engine raises: the runner knows the plans behind it
                        self._bare = None
                        return runner.recover(exc, first, second, bias, out, *more)
                if not runner.settled:
                    runner.layer = layer_of(self._problem.op, second)
                result = runner(first, second, bias, out, *more)
                self._bare = runner.unwatched
                return result
            except ConvPlanError as exc:
                note_fallback(exc)
        return self._without_plan(first, second, bias, out, residual, scale)

    def _without_plan(
        self,
        first: Tensor,
        second: Tensor,
        bias: Tensor | None,
        out: Tensor | None,
        residual: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        problem, core = self._problem, self._problem.core
        if problem.is_empty:
            result = empty(problem.output, first.device).zero_()
        else:
            in_core = core.epilogue.bias
            result = last_resort(core)(first, second, bias if in_core else None, None)
            bias = None if in_core else bias
        return deliver(apply_epilogue(result, problem.epilogue, bias, residual, scale), problem.output, out)


def as_run(caller: object) -> Run:
    """For type checkers."""
    return cast(Run, caller)

"""A convolution and the statistics of its result, by one plan: what comes before a batch normalization in training.

No gradients are recorded here: `normalized` calls this inside an autograd function of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from convplan._choices import state
from convplan._epilogue import Epilogue
from convplan._errors import ConvPlanError
from convplan._policy import Policy
from convplan._problem import STATISTICS_DTYPES, Problem
from convplan._runtime import local
from convplan.engines._support import TORCH_DTYPES
from convplan.kernels import column_sums, empty_sums
from convplan.torch_ops.adapter import ALIGNMENT_BYTES, NotExpressible, forward_problem
from convplan.torch_ops.arguments import Ints, Padding, arguments
from convplan.torch_ops.linear import last_resort, layer_of, planned_runner
from convplan.torch_ops.override import NO_GRADIENTS, note_fallback
from convplan.torch_ops.seen import live_flags

Tensor = torch.Tensor

_DTYPES = tuple(TORCH_DTYPES[name] for name in STATISTICS_DTYPES)


def convolution_with_statistics(
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    policy: Policy | None = None,
    gradients: tuple[bool, bool] = NO_GRADIENTS,
) -> tuple[Tensor, Tensor] | None:
    """The convolution without a bias, and sums for each of its channels.

    Args:
        input: (N, C, spatial...).
        weight: (K, C/groups, window...), of the input's dtype.
        stride, padding, dilation, groups: hashable, as of `convplan.conv2d`.
        policy: the rules; None: those of `enable()`, else the defaults.
        gradients: whether those of input and weight will be asked for, which `capture` hands on.

    Returns:
        The result (N, K, spatial...), and float32 (2, K): sums, and sums of squares. None where that is not offered:
        for other dtypes than float16 and bfloat16, and where the result is not channels-last.
    """
    found: tuple[Tensor, Tensor] | None = statistics_caller(
        input, weight, stride, padding, dilation, groups, policy, gradients
    )[0](input, weight)
    return found


Run = Callable[..., Tensor]
Caller = Callable[[Tensor, Tensor], tuple[Tensor, Tensor] | None]


def statistics_caller(
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    groups: int,
    policy: Policy | None,
    gradients: tuple[bool, bool],
) -> tuple[Caller, bool]:
    """What computes `convolution_with_statistics` of such tensors, and whether it is kept for the next call."""
    if input.dtype not in _DTYPES or weight.dtype != input.dtype:
        return _not_offered, False
    device, token = input.get_device(), state.token
    key = (
        "statistics", token, input.shape, input.stride(), input.dtype, weight.shape, weight.stride(), stride, padding,
        dilation, groups, policy, gradients, device, weight.get_device(), ALIGNMENT_BYTES[input.data_ptr() & 31],
        ALIGNMENT_BYTES[weight.data_ptr() & 31], live_flags(device),
    )  # fmt: skip
    caller = local.callers.used(key)
    if caller is not None:
        return caller, True
    problem = _problem(input, weight, stride, padding, dilation, groups)
    caller = _not_offered if problem is None else _Caller(problem, policy, weight, gradients)
    local.remember(key, token, caller, device)
    return caller, False


def _not_offered(input: Tensor, weight: Tensor) -> None:
    return None


def _problem(
    input: Tensor, weight: Tensor, stride: Ints, padding: Padding, dilation: Ints, groups: int
) -> Problem | None:
    spatial = input.dim() - 2
    args = arguments(spatial, weight, stride, padding, dilation, False, 0, groups)
    try:
        problem = forward_problem(input, weight, None, args)
    except NotExpressible:
        return None
    if problem.is_empty or problem.device not in ("cpu", "cuda") or problem.output.layout != "channels_last":
        return None
    return msgspec.structs.replace(problem, epilogue=Epilogue(statistics=True))


class _Caller:
    """Runs one problem whatever happens: by its plan, or by stock torch and a pass over its result."""

    def __init__(self, problem: Problem, policy: Policy | None, weight: Tensor, gradients: tuple[bool, bool]) -> None:
        self._problem = problem
        self._channels = problem.output.dims[1]
        self._runner = planned_runner(problem, policy, weight.get_device(), weight, gradients)
        self._bare: Run | None = None  # the plan itself, once the runner has nothing more to say

    def __call__(self, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        sums = empty_sums(input, self._channels)
        runner = self._runner
        if runner is not None:
            given = (input, weight, None, None, None, None, sums)
            try:
                if self._bare is not None:
                    try:
                        return self._bare(*given), sums
                    except Exception as exc:  # whatever an engine raises: the runner knows the plans behind it
                        self._bare = None
                        return runner.recover(exc, *given), sums
                if not runner.settled:
                    runner.layer = layer_of("fprop", weight)
                result = runner(*given)
                self._bare = runner.unwatched
                return result, sums
            except ConvPlanError as exc:
                note_fallback(exc)
        result = last_resort(self._problem.core)(input, weight, None, None)
        return result, column_sums(result, sums)

"""`enable()` and `disable()`: putting convplan behind torch's own convolutions, in code nobody changed.

Torch's dispatcher entries of `aten::convolution` and `aten::convolution_backward` are replaced for the CPU and CUDA
keys. Autograd, autocast and functorch stay torch's own, above these entries. What convplan does not plan for (other
dtypes, empty tensors, arguments with an error in them) goes to the kernel that was there before, with its errors.

The hot path is `_forward` and `_backward` up to the look-up: a key, a look-up and a call.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from convplan import _runtime
from convplan._errors import CaptureMiss, ConvPlanError, ReplayMiss, SpecError
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._runtime import Observe, Runner, counts, local, state, warn_once
from convplan.engines.aten import stock_backward, stock_forward
from convplan.engines.base import Run
from convplan.torch_ops.adapter import (
    ALIGNMENT_BYTES,
    ConvArgs,
    conv_args,
    forward_problem,
    gradient_problem,
    output_strides,
)

log = logging.getLogger("convplan.override")

Tensor = torch.Tensor
Forward = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
Backward = Callable[[Tensor, Tensor, Tensor], Gradients]

NO_GRADIENTS = (False, False)

_lock = threading.RLock()
_library: torch.library.Library | None = None

# After a large convolution the processor's caches hold nothing of Python's, and every function called and every object
# made costs about 3 us then, ten times its usual cost. So the C functions are bound once, and few are called.
_num_threads = torch.get_num_threads
_matmul_precision = torch._C._get_float32_matmul_precision
_algorithms_deterministic = torch._C._get_deterministic_algorithms
_cudnn_deterministic = torch._C._get_cudnn_deterministic
_fp32_precision: Callable[[str, str], str] = getattr(
    torch._C, "_get_fp32_precision_getter", lambda backend, op: str(torch._C._get_cudnn_allow_tf32())
)
_onednn_enabled = torch._C._get_mkldnn_enabled


def live_flags(device: int) -> tuple[object, ...]:
    """Torch's settings that a choice depends on, as they are now, for a device index (-1: the CPU)."""
    flags = (
        _num_threads(),
        _onednn_enabled(),
        _matmul_precision(),
        _algorithms_deterministic(),
        _cudnn_deterministic(),
    )
    return flags if device < 0 else (*flags, _fp32_precision("cuda", "conv"))


def _forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`aten::convolution`."""
    token, device = state.token, x.get_device()
    key = (
        token, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype,
        None if bias is None else (bias.shape, bias.dtype),
        (*stride, *padding, *dilation, transposed, *output_padding, groups),
        device, ALIGNMENT_BYTES[x.data_ptr() & 31], ALIGNMENT_BYTES[w.data_ptr() & 31], live_flags(device),
    )  # fmt: skip
    callers = local.callers
    caller = callers.get(key)
    if caller is not None:
        callers.hits[0] += 1
        if callers.crowded:
            callers.move_to_end(key)
    else:
        args = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
        caller = _new_forward(x, w, bias, args)
        local.remember(key, token, caller, device)
    return caller(x, w, bias)


def _backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Gradients:
    """`aten::convolution_backward`."""
    token, device = state.token, x.get_device()
    key = (
        token, dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype,
        (*stride, *padding, *dilation, transposed, *output_padding, groups, *output_mask),
        None if bias_sizes is None else tuple(bias_sizes), device,
        ALIGNMENT_BYTES[dy.data_ptr() & 31], ALIGNMENT_BYTES[x.data_ptr() & 31], ALIGNMENT_BYTES[w.data_ptr() & 31],
        live_flags(device),
    )  # fmt: skip
    callers = local.callers
    caller = callers.get(key)
    if caller is not None:
        callers.hits[0] += 1
        if callers.crowded:
            callers.move_to_end(key)
    else:
        args = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
        caller = _new_backward(dy, x, w, bias_sizes, args, list(output_mask))
        local.remember(key, token, caller, device)
    return caller(dy, x, w)


RawArgs = tuple[list[int], list[int], list[int], bool, list[int], int]


def _new_forward(x: Tensor, w: Tensor, bias: Tensor | None, raw: RawArgs) -> Forward:
    """What a call with these arguments runs from now on."""
    counts.add("misses")
    kernel, keyset = stock_forward(x.device.type)

    def stock(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = kernel.call_boxed(keyset, x, w, bias, *raw)
        return result

    with_gradients = torch.is_grad_enabled() and (x.requires_grad, w.requires_grad)
    runner = _planned(
        lambda args: (forward_problem(x, w, bias, args), x, w), raw, x.dim() - 2, with_gradients or NO_GRADIENTS
    )
    if runner is None:
        return stock

    def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        try:
            return runner.run(x, w, bias, None)
        except Exception as exc:  # whatever an engine raises, the convolution must still be computed
            try:
                return runner.recover(exc, x, w, bias)
            except ConvPlanError as last:
                note_fallback(last)
                return stock(x, w, bias)

    return forward


def _new_backward(
    dy: Tensor, x: Tensor, w: Tensor, bias_sizes: Sequence[int] | None, raw: RawArgs, mask: list[bool]
) -> Backward:
    counts.add("misses")
    kernel, keyset = stock_backward(x.device.type)
    sizes = None if bias_sizes is None else list(bias_sizes)

    def stock(dy: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> Gradients:
        result: Gradients = kernel.call_boxed(keyset, dy, x, w, sizes, *raw, wanted)
        return result

    spatial = x.dim() - 2
    swapped = False

    def input_problem(args: ConvArgs) -> Asked:
        return gradient_problem("input", dy, x, w, args)[0], x, w

    def weight_problem(args: ConvArgs) -> Asked:
        nonlocal swapped
        problem, swapped = gradient_problem("weight", dy, x, w, args)
        return problem, x, w

    for_input = _planned(input_problem, raw, spatial) if mask[0] else None
    for_weight = _planned(weight_problem, raw, spatial) if mask[1] else None
    planned = [one for one in (for_input, for_weight) if one is not None]
    if not planned or (not raw[3] and all(one.settled_as == "convolution_backward" for one in planned)):
        # One call computes all of it, the bias's gradient too, as it does in stock torch.
        return lambda dy, x, w: stock(dy, x, w, mask)
    over = [0, *range(2, x.dim())]
    bias_too = mask[2]
    left = [mask[0] and for_input is None, mask[1] and for_weight is None, False]

    def backward(dy: Tensor, x: Tensor, w: Tensor) -> Gradients:
        try:
            dx = None if for_input is None else for_input(dy, w, None)
            dw = None
            if for_weight is not None:
                dw = for_weight(dy, x, None) if swapped else for_weight(x, dy, None)
        except ConvPlanError as exc:
            note_fallback(exc)
            return stock(dy, x, w, mask)
        if left[0] or left[1]:
            rest = stock(dy, x, w, left)
            dx, dw = rest[0] if left[0] else dx, rest[1] if left[1] else dw
        return dx, dw, dy.sum(over) if bias_too else None

    return backward


Asked = tuple[Problem, Tensor, Tensor]
"""A problem, and the input and weight whose layouts decide the output's."""


def _planned(
    make: Callable[[ConvArgs], Asked], raw: RawArgs, spatial: int, gradients: tuple[bool, bool] = NO_GRADIENTS
) -> _Planned | None:
    """What runs the problem, or None where stock torch is to do it: not planned for, empty, or nothing found."""
    try:
        args = conv_args(*raw, spatial)
        problem, x, w = make(args)
    except SpecError as exc:
        log.debug("left to torch: %s", exc)
        return None
    if problem.is_empty:
        return None
    for observe in state.captures:
        observe(problem, gradients)
    if not state.enabled:
        return None
    try:
        runner = Runner(problem, state.policy, x.get_device())
        return _Planned(runner, problem.output.dims, output_strides(problem.output.dims, x, w, args))
    except ConvPlanError as exc:
        note_fallback(exc, state.policy)
    except Exception as exc:  # a bug of convplan's must not take the user's convolution down with it
        log.exception("planning failed for %s", problem)
        counts.add("fell_back")
        warn_once(f"stock torch runs this convolution, planning it raised {type(exc).__name__}: {exc} ({problem})")
    return None


class _Planned:
    """A runner whose results have torch's strides, and the shortest way to call it."""

    def __init__(self, runner: Runner, dims: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self._runner = runner
        # Strides of size-1 dimensions choose the layout of what is computed from the result.
        self._strides = strides if 1 in dims else None
        self.run: Run = self._restrided(runner.unwatched or runner)
        self.settled_as = runner.settled_as

    def _restrided(self, run: Run) -> Run:
        strides = self._strides
        if strides is None:
            return run

        def run_and_restride(first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
            result = run(first, second, bias, out)
            return result if result.stride() == strides else result.as_strided(result.shape, strides)

        return run_and_restride

    def recover(self, exc: Exception, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        """After `run` raised: the runner has tried the other plans already if the error is convplan's own."""
        if isinstance(exc, ConvPlanError):
            raise exc
        self.run = self._restrided(self._runner)  # which knows the plan that works, and later ones
        recovered = self._restrided(lambda first, second, bias, out: self._runner.recover(exc, first, second, bias))
        return recovered(first, second, bias, None)

    def __call__(self, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        try:
            return self.run(first, second, bias, None)
        except Exception as exc:  # whatever an engine raises, the convolution must still be computed
            return self.recover(exc, first, second, bias)


def note_fallback(exc: ConvPlanError, policy: Policy | None = None) -> None:
    """Say once that stock torch steps in; but a miss that the policy makes an error of is raised."""
    if isinstance(exc, ReplayMiss) or (
        isinstance(exc, CaptureMiss) and policy is not None and policy.capture_miss == "error"
    ):
        raise exc
    counts.add("fell_back")
    warn_once(f"stock torch runs this convolution: {exc}")


def _install() -> None:
    global _library
    with _lock:
        if _library is not None:
            return
        devices = ["CPU"] + (["CUDA"] if torch.version.cuda else [])
        for device in devices:
            # Taken before anything is replaced: these are torch's own.
            stock_forward(device.lower()), stock_backward(device.lower())
        library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                # Some versions of torch tell every program once that an operator is overridden, which is what is meant.
                warnings.filterwarnings("ignore", message="Warning only once for all operators")
                for device in devices:
                    library.impl("convolution", _forward, device)
                    library.impl("convolution_backward", _backward, device)
        except BaseException:
            library._destroy()  # half of it must not stay behind
            raise
        _library = library


def _remove() -> None:
    global _library
    with _lock:
        if _library is not None:
            _library._destroy()
            _library = None


def _settle() -> None:
    """Have the entries replaced exactly while someone needs them."""
    with _lock:
        state.touch()
        if state.enabled or state.captures:
            _install()
        else:
            _remove()


def enable(policy: Policy | None = None) -> None:
    """Send every convolution of this process, and its gradients, through convplan.

    Covers `torch.nn.functional.conv*`, `torch.nn.Conv*` and `ConvTranspose*` on the CPU and on CUDA, in all threads.
    Calling it again exchanges the policy.

    Args:
        policy: the rules; None: the defaults, with determinism and TF32 following torch's own flags.

    Raises:
        PolicyError: the policy names an engine that is not registered.
    """
    wanted = _runtime.check_policy(Policy() if policy is None else policy)
    with _lock:
        state.policy, state.enabled = wanted, True
        _settle()


def disable() -> None:
    """Give every convolution back to stock torch, exactly as it was before `enable()`."""
    with _lock:
        state.enabled, state.policy = False, Policy()
        _settle()


@contextmanager
def enabled(policy: Policy | None = None) -> Iterator[None]:
    """`enable(policy)` for the length of a block; what held before holds again after it. Counts for all threads."""
    before = (state.enabled, state.policy)
    enable(policy)
    try:
        yield
    finally:
        with _lock:
            state.enabled, state.policy = before
            _settle()


@contextmanager
def capturing(observe: Observe) -> Iterator[None]:
    """Call `observe` with the problem of every convolution that runs in the block, enabled or not, in all threads.

    Its second argument says whether autograd may later ask for the gradients of the input and of the weight.
    """
    with _lock:
        state.captures = (*state.captures, observe)
        _settle()
    try:
        yield
    finally:
        with _lock:
            state.captures = tuple(one for one in state.captures if one is not observe)
            _settle()

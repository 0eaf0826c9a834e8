"""`enable()` and `disable()`: putting convplan behind torch's own convolutions, in code nobody changed.

Torch's dispatcher entries of `aten::convolution` and `aten::convolution_backward` are replaced for the CPU and CUDA
keys. Autograd, autocast and functorch stay torch's own, above these entries. What convplan does not plan for (other
dtypes, empty tensors, arguments with an error in them) goes to the kernel that was there before, with its errors.

The hot path is `_forward` and `_backward` up to the look-up: a comparison with the last call of the same weight, or a
key and a look-up, and a call.
"""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

from convplan._choices import Observe, state
from convplan._counts import counts, warn_once
from convplan._errors import CaptureMiss, ConvPlanError, ReplayMiss, SpecError
from convplan._plan import Plan
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._ranges import ranged
from convplan._runtime import Runner, check_policy, drop_tensors, local
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
from convplan.torch_ops.seen import (
    Seen,
    algorithms_deterministic,
    cudnn_deterministic,
    cudnn_enabled,
    live_flags,
)
from convplan.torch_ops.undisturbed import undisturbed

log = logging.getLogger("convplan.override")

Tensor = torch.Tensor
Forward = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
Backward = Callable[[Tensor, Tensor, Tensor], Gradients]
Result = TypeVar("Result")

NO_GRADIENTS = (False, False)

_lock = threading.RLock()
_library: torch.library.Library | None = None


@undisturbed
def _forward(x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """`aten::convolution`; the rest: stride, padding, dilation, transposed, output_padding, groups."""
    address = w.data_ptr()
    seen = local.forwards.get(address)
    while seen is not None:
        if (
            seen.token == state.token
            and (seen.same(x, w) if bias is None else seen.same_biased(x, w, bias))
            and address & 31 == seen.w_low
            and x.data_ptr() & 31 == seen.x_low
            and rest == seen.rest
            and (
                algorithms_deterministic() is seen.algorithms_deterministic
                and cudnn_deterministic() is seen.cudnn_deterministic
                and cudnn_enabled() is seen.cudnn_enabled
                if seen.few_flags
                else live_flags(seen.device, seen.dtype) == seen.flags
            )
        ):
            seen.hits[0] += 1
            try:  # the plan itself: one frame less than its caller
                found: Tensor = seen.run(x, w, bias, None)
            except Exception as exc:  # whatever an engine raises, the convolution must still be computed
                found = seen.failed(exc, x, w, bias)
            return found
        seen = seen.other
    sizes = x.shape, w.shape
    for moved in local.forward_sizes.get(sizes, ()):
        if rest == moved.rest and moved.is_like((x.data_ptr() & 31, address & 31), (x, w), bias):
            local.keep_seen(local.forwards, address, moved)
            moved.hits[0] += 1
            try:
                found = moved.run(x, w, bias, None)
            except Exception as exc:
                found = moved.failed(exc, x, w, bias)
            return found
    stride, padding, dilation, transposed, output_padding, groups = rest
    token, device = state.token, x.get_device()
    flags = live_flags(device, x.dtype)
    key = (
        token, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype,
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
        (*stride, *padding, *dilation, transposed, *output_padding, groups),
        device, w.get_device(), ALIGNMENT_BYTES[x.data_ptr() & 31], ALIGNMENT_BYTES[w.data_ptr() & 31], flags,
    )  # fmt: skip
    callers = local.callers
    caller = callers.get(key)
    if caller is not None:
        callers.hits[0] += 1
        if callers.crowded:
            callers.move_to_end(key)
        elif type(caller) is not _Watching:
            run, failed = getattr(caller, "bare", None) or (_with_out(caller), _raised)
            parts = {"run": run, "failed": failed, "x_low": x.data_ptr() & 31, "w_low": address & 31}
            seen = Seen(token, (x, w), bias, rest, flags, **parts)
            seen.keep(local.forwards, address)
            local.keep_by_size(local.forward_sizes, sizes, seen)
    else:
        args = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
        caller = _new_forward(x, w, bias, args)
        local.remember(key, token, caller, device)
    result: Tensor = caller(x, w, bias)
    if type(caller) is _Watching:
        _replace_settled(key, caller)
    return result


@undisturbed
def _backward(dy: Tensor, x: Tensor, w: Tensor, *rest: Any) -> Gradients:
    """`aten::convolution_backward`; the rest: the bias's sizes, what `_forward` has, and which gradients are wanted."""
    address = w.data_ptr()
    seen = local.backwards.get(address)
    while seen is not None:
        if (
            seen.token == state.token
            and seen.same(dy, x, w)
            and address & 31 == seen.w_low
            and dy.data_ptr() & 31 == seen.dy_low
            and x.data_ptr() & 31 == seen.x_low
            and rest == seen.rest
            and (
                algorithms_deterministic() is seen.algorithms_deterministic
                and cudnn_deterministic() is seen.cudnn_deterministic
                and cudnn_enabled() is seen.cudnn_enabled
                if seen.few_flags
                else live_flags(seen.device, seen.dtype) == seen.flags
            )
        ):
            seen.hits[0] += 1
            found: Gradients = seen.caller(dy, x, w)
            return found
        seen = seen.other
    sizes = x.shape, w.shape
    for moved in local.backward_sizes.get(sizes, ()):
        lows = dy.data_ptr() & 31, x.data_ptr() & 31, address & 31
        if rest == moved.rest and moved.is_like(lows, (dy, x, w), None):
            local.keep_seen(local.backwards, address, moved)
            moved.hits[0] += 1
            return cast(Gradients, moved.caller(dy, x, w))
    bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask = rest
    token, device = state.token, x.get_device()
    flags = live_flags(device, x.dtype)
    key = (
        token, dy.shape, dy.stride(), dy.dtype, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype,
        (*stride, *padding, *dilation, transposed, *output_padding, groups, *output_mask),
        None if bias_sizes is None else tuple(bias_sizes), device, w.get_device(), dy.get_device(),
        ALIGNMENT_BYTES[dy.data_ptr() & 31], ALIGNMENT_BYTES[x.data_ptr() & 31], ALIGNMENT_BYTES[w.data_ptr() & 31],
        flags,
    )  # fmt: skip
    callers = local.callers
    caller = callers.get(key)
    if caller is not None:
        callers.hits[0] += 1
        if callers.crowded:
            callers.move_to_end(key)
        elif type(caller) is not _Watching:
            parts = {"dy_low": dy.data_ptr() & 31, "x_low": x.data_ptr() & 31, "w_low": address & 31}
            seen = Seen(token, (dy, x, w), None, rest, flags, caller=caller, **parts)
            seen.keep(local.backwards, address)
            local.keep_by_size(local.backward_sizes, sizes, seen)
    else:
        args = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
        caller = _new_backward(dy, x, w, bias_sizes, args, list(output_mask))
        local.remember(key, token, caller, device)
    result: Gradients = caller(dy, x, w)
    if type(caller) is _Watching:
        _replace_settled(key, caller)
    return result


class _StockOnly:
    """Stands in for a thread's table of calls, and for its cache of callers: every call is stock torch's."""

    crowded = True  # so that nobody keeps the caller

    def __init__(self, caller: Forward | None) -> None:
        self._caller = caller
        self.hits = [0]

    def get(self, key: Hashable) -> Forward | None:
        return self._caller

    def move_to_end(self, key: Hashable) -> None:
        pass


def _traced(keyset: torch._C.DispatchKeySet, x: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """`aten::convolution` while `torch.jit.trace` records: the trace must hold torch's convolution, not our inside.

    Sizes are tensors then, and looking at them would be recorded too. Only `_forward` of this thread runs below, and it
    finds stock torch's kernel, by a way that costs nothing while nobody traces.
    """

    def stock(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        kernel, stock_keyset = stock_forward(x.device.type)
        result: Tensor = kernel.call_boxed(stock_keyset, x, w, bias, *rest)
        return result

    before: Any = local.forwards, local.forward_sizes, local.callers
    table, sizes, cache = cast(Any, _StockOnly(None)), dict[Any, list[Any]](), cast(Any, _StockOnly(stock))
    local.forwards, local.forward_sizes, local.callers = table, sizes, cache
    try:
        below = keyset.remove(torch._C._dispatch_key_parse("Tracer"))
        found: Tensor = torch.ops.aten.convolution.default.redispatch(below, x, w, bias, *rest)
        return found
    finally:
        local.forwards, local.forward_sizes, local.callers = before


def _replace_settled(key: Hashable, caller: _Watching) -> None:
    """Exchange a caller in the cache once its choices are settled."""
    settled = caller.settled()
    if settled is not None and key in local.callers:
        local.callers[key] = settled


def _with_out(caller: Forward) -> Run:
    """A caller as plans are called, with an `out` that is never given."""
    return lambda x, w, bias, out: caller(x, w, bias)


def _raised(exc: Exception, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    raise exc


RawArgs = tuple[list[int], list[int], list[int], bool, list[int], int]


class _Watching:
    """A caller whose choices may still change. Each call counts as a sighting; `settled` says what takes its place.

    Args:
        call: what to call now.
        planned: the plans it runs.
        make: makes the caller anew, for when none of them can change any more.
        weight: position of the weight among the tensors of a call.
    """

    __slots__ = ("_call", "_make", "_planned", "_weight")

    def __init__(
        self, call: Callable[..., Any], planned: list[_Planned], make: Callable[[], Callable[..., Any]], weight: int
    ) -> None:
        self._call, self._planned, self._make, self._weight = call, planned, make, weight

    def __call__(self, *tensors: Tensor | None) -> Any:
        for one in self._planned:
            one.sighted_by(tensors[self._weight])
        return self._call(*tensors)

    def settled(self) -> Callable[..., Any] | None:
        """The caller from now on; None while a choice may still change."""
        return self._make() if all(one.settle() for one in self._planned) else None


def _new_forward(x: Tensor, w: Tensor, bias: Tensor | None, raw: RawArgs) -> Forward | _Watching:
    """What a call with these arguments runs from now on."""
    counts.add("misses")
    kernel, keyset = stock_forward(x.device.type)

    def stock(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = kernel.call_boxed(keyset, x, w, bias, *raw)
        return result

    with_gradients = torch.is_grad_enabled() and (x.requires_grad, w.requires_grad)
    planned = _planned(
        lambda args: (forward_problem(x, w, bias, args), x, w), raw, x.dim() - 2, with_gradients or NO_GRADIENTS
    )
    if planned is None:
        return stock

    def make() -> Forward:
        run = planned.run

        def failed(exc: Exception, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            try:
                return planned.recover(exc, x, w, bias)
            except ConvPlanError as last:
                return instead(last, lambda: stock(x, w, bias))

        def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            try:
                return run(x, w, bias, None)
            except Exception as exc:  # whatever an engine raises, the convolution must still be computed
                return failed(exc, x, w, bias)

        forward.bare = run, failed  # type: ignore[attr-defined]  # for those who call them without this frame
        return forward

    return make() if planned.settled else _Watching(make(), [planned], make, 1)


def _new_backward(
    dy: Tensor, x: Tensor, w: Tensor, bias_sizes: Sequence[int] | None, raw: RawArgs, mask: list[bool]
) -> Backward | _Watching:
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
    if not planned:
        return lambda dy, x, w: stock(dy, x, w, mask)
    over = [0, *range(2, x.dim())]
    bias_too = mask[2]
    left = [mask[0] and for_input is None, mask[1] and for_weight is None, False]

    def carefully(dy: Tensor, x: Tensor, w: Tensor) -> Gradients:
        try:
            dx = None if for_input is None else for_input(dy, w, None)
            dw = None
            if for_weight is not None:
                dw = for_weight(dy, x, None) if swapped else for_weight(x, dy, None)
        except ConvPlanError as exc:
            return instead(exc, lambda: stock(dy, x, w, mask))
        if left[0] or left[1]:
            rest = stock(dy, x, w, left)
            dx, dw = rest[0] if left[0] else dx, rest[1] if left[1] else dw
        return dx, dw, dy.sum(over) if bias_too else None

    def make() -> Backward:
        if not raw[3] and all(one.settled_as == "convolution_backward" for one in planned):
            # One call computes all of it, the bias's gradient too, as it does in stock torch.
            return ranged(lambda dy, x, w: stock(dy, x, w, mask), *(one.plan for one in planned))
        if left[0] or left[1] or not all(one.settled for one in planned):
            return carefully
        run_input = None if for_input is None else for_input.run
        run_weight = None if for_weight is None else for_weight.run

        def backward(dy: Tensor, x: Tensor, w: Tensor) -> Gradients:
            try:
                dx = None if run_input is None else run_input(dy, w, None, None)
                dw = None
                if run_weight is not None:
                    dw = run_weight(dy, x, None, None) if swapped else run_weight(x, dy, None, None)
                return dx, dw, dy.sum(over) if bias_too else None
            except Exception as exc:  # the other way knows what to do about it
                drop_tensors(exc)
            return carefully(dy, x, w)

        return backward

    return make() if all(one.settled for one in planned) else _Watching(make(), planned, make, 2)


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
        counts.add("left_to_torch")
        return None
    if problem.is_empty:
        return None
    for observe in state.captures:
        observe(problem, gradients)
    if not state.enabled:
        return None
    try:
        runner = Runner(problem, state.policy, x.get_device(), weakref.ref(w))
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
        self.settled, self.settled_as = False, ""
        self.run: Run = self._restrided(runner)
        self.settle()

    def sighted_by(self, weight: Tensor | None) -> None:
        """Whose call comes next, while calls count."""
        self._runner.layer = None if weight is None else weakref.ref(weight)

    @property
    def plan(self) -> Plan:
        """What runs the problem now."""
        return self._runner.plan

    def settle(self) -> bool:
        """Take over the bare plan once nothing but a new token can change the choice; whether that is so."""
        bare = self._runner.unwatched
        if bare is not None and not self.settled:
            self.run = bare if self._is_exact(self._runner.plan) else self._restrided(bare)
            self.settled, self.settled_as = True, self._runner.settled_as
        return self.settled

    def _is_exact(self, plan: Plan) -> bool:
        """Whether a plan's results have torch's strides as they come."""
        return plan.exact_strides and plan.problem.output.strides == self._strides

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


def instead(exc: ConvPlanError, stock: Callable[[], Result]) -> Result:
    """What stock torch computes where no plan could; if it cannot either, its error and not a word of convplan's.

    Raises:
        ReplayMiss: it was the reason.
    """
    if isinstance(exc, ReplayMiss):
        raise exc
    drop_tensors(exc)
    result = stock()
    note_fallback(exc)
    return result


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
                library.impl("convolution", _traced, "Tracer", with_keyset=True)
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
    wanted = check_policy(Policy() if policy is None else policy)
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

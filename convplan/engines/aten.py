"""Engine `aten`: torch's own convolution kernels, with the choices torch makes for you turned into knobs.

Runs on every device torch has a convolution for, and is the last resort everywhere. Knobs:

    layout    run on the tensors as given, or converted (conversion included in its time)
    path      torch's own choice (oneDNN on the CPU where it can), or its native im2col kernels, called by name
    via       which operation computes a dgrad: the backward kernel, a transposed convolution, or (stride 1) a forward
              convolution with the flipped filter
    compute   in the tensors' dtype, or in float32 for 16-bit ones

Stock kernels are reached below the dispatcher entries that `torch_ops.override` replaces, so nothing here recurses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch

from convplan._environment import onednn_computes, onednn_enabled
from convplan._errors import PlanRejected
from convplan._policy import Effort, Policy, torch_flags
from convplan._problem import DTYPES, Problem, TensorSpec
from convplan.engines._padding import SplitPadding, lift, output_padding
from convplan.engines._support import deliver, dtype_refusal, onednn_misreads
from convplan.engines.base import FALLBACK, LAST_RESORT, YES, Built, Candidate, EngineConfig, Run, Support, no


class Layout(IntEnum):
    """Knob `layout`: the memory format the kernel runs in."""

    AS_GIVEN = 0
    CONTIGUOUS = 1
    CHANNELS_LAST = 2


class Path(IntEnum):
    """Knob `path`: which of torch's CPU implementations."""

    STOCK = 0
    NATIVE = 1


class Via(IntEnum):
    """Knob `via`: which operation computes a dgrad."""

    BACKWARD = 0
    TRANSPOSED = 1
    FLIPPED = 2


class Compute(IntEnum):
    """Knob `compute`: the dtype the kernel runs in."""

    OWN = 0
    FLOAT32 = 1


_DEVICES = ("cpu", "cuda")
_NATIVE_MOST_FLOPS = 5e9  # the native path trails oneDNN by 1.5x and more on large problems: not worth the tuning time


class AtenEngine:
    """Torch's own kernels; see the module's text for the knobs."""

    name = "aten"
    by_default = True

    def supports(self, problem: Problem) -> Support:
        """Any problem on a device and of a dtype that torch has convolutions for."""
        if problem.device not in _DEVICES:
            return no(f"device is {problem.device!r}, supported: {', '.join(_DEVICES)}")
        if reason := dtype_refusal(problem):
            return no(reason)
        return no("the problem is empty") if problem.is_empty else YES

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """Torch's own choice first, then each knob turned."""
        if dtype_refusal(problem):
            return ()
        found = [
            self._candidate(problem, layout, Path.STOCK, via, compute)
            for compute in _computes(problem)
            for layout in _layouts(problem)
            for via in _vias(problem)
            if layout is Layout.AS_GIVEN or via is not Via.FLIPPED
        ]
        worth_it = problem.flops <= _NATIVE_MOST_FLOPS and onednn_enabled()  # else torch's own choice is this path
        native = _native_vias(problem) if worth_it else ()
        return found + [self._candidate(problem, Layout.AS_GIVEN, Path.NATIVE, via, Compute.OWN) for via in native]

    def _candidate(self, problem: Problem, layout: Layout, path: Path, via: Via, compute: Compute) -> Candidate:
        knobs = {"layout": layout, "path": path, "compute": compute}
        if problem.op == "dgrad":
            knobs["via"] = via
        return Candidate(
            config=EngineConfig.of(self.name, **{name: int(value) for name, value in knobs.items()}),
            workspace_bytes=_workspace_bytes(problem, layout, path, via, compute),
            flops=float(problem.flops),
            source=LAST_RESORT if problem.device == "cuda" else FALLBACK if path is Path.NATIVE else "heuristic",
            stock=_stock_call(problem, layout, path, via, compute),
        )

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Build one configuration.

        Raises:
            PlanRejected: a knob's value is unknown, or means nothing for this problem.
        """
        if reason := dtype_refusal(problem):
            raise PlanRejected(engine=self.name, config=str(config), reason=reason)
        try:
            layout, path = Layout(config.knob("layout")), Path(config.knob("path"))
            via = Via(config.knob("via", _vias(problem)[0]))
            compute = Compute(config.knob("compute"))
        except ValueError as exc:
            raise PlanRejected(engine=self.name, config=str(config), reason=str(exc)) from exc
        possible = _native_vias(problem) if path is Path.NATIVE else _vias(problem)
        if via not in possible or (path is Path.NATIVE and layout is not Layout.AS_GIVEN):
            raise PlanRejected(engine=self.name, config=str(config), reason="these knobs do not go together here")
        core = _native(problem, via) if path is Path.NATIVE else _CORES[problem.op](problem, policy, via)
        if layout is not Layout.AS_GIVEN or compute is not Compute.OWN:
            core = _converted(core, problem, policy, layout, via, compute)
        workspace = _workspace_bytes(problem, layout, path, via, compute)
        run = _delivered(core, problem.output)
        plain = layout is Layout.AS_GIVEN and path is Path.STOCK and compute is Compute.OWN
        as_torch = ""
        if plain and SplitPadding(problem.padding).is_symmetric:
            if problem.op == "fprop":
                run, as_torch = _fprop_in_one_frame(problem, policy, run), "convolution"
            elif via is Via.BACKWARD and problem.device == "cpu":  # elsewhere the policy's flags go with the call
                as_torch = "convolution_backward"
        exact = as_torch == "convolution"
        return Built(run=run, workspace_bytes=workspace, as_torch=as_torch, exact_strides=exact)


Core = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def _stock_call(problem: Problem, layout: Layout, path: Path, via: Via, compute: Compute) -> str:
    """What torch runs like this by itself, with the flags that `build` gives it; empty where a knob is turned."""
    if (layout, path, compute) != (Layout.AS_GIVEN, Path.STOCK, Compute.OWN) or via is Via.FLIPPED:
        return ""
    call = {"fprop": "convolution", "wgrad": "gradient for the weight"}.get(problem.op)
    if call is None:  # a dgrad is either of two things to torch
        call = "transposed convolution" if via is Via.TRANSPOSED else "gradient for the input"
    if not SplitPadding(problem.padding).is_symmetric:
        call += ", uneven padding done apart"
    return call + (", cudnn.benchmark=False" if problem.device == "cuda" else "")


def _layouts(problem: Problem) -> list[Layout]:
    """As given, then the dense layouts that at least one input is not in already."""
    given = {spec.layout for spec in problem.inputs}
    others = [Layout.CHANNELS_LAST, Layout.CONTIGUOUS]
    names = {Layout.CONTIGUOUS: "contiguous", Layout.CHANNELS_LAST: "channels_last"}
    return [Layout.AS_GIVEN] + [layout for layout in others if given != {names[layout]}]


def _computes(problem: Problem) -> tuple[Compute, ...]:
    """Float32 as well for 16-bit types on the CPU, and float32 alone where oneDNN lacks the type, or is wrong.

    Where it lacks it torch's own kernels take over, which round sums to 16 bits in between and are far slower (10 to 40
    times).
    """
    if problem.device != "cpu" or DTYPES[problem.dtype].itemsize_bytes > 2:
        return (Compute.OWN,)
    own = onednn_computes(problem.dtype) and not (problem.op == "fprop" and onednn_misreads(problem))
    return (Compute.OWN, Compute.FLOAT32) if own else (Compute.FLOAT32,)


def _vias(problem: Problem) -> tuple[Via, ...]:
    if problem.op != "dgrad":
        return (Via.BACKWARD,)
    reach = [dil * (taps - 1) for dil, taps in zip(problem.dilation, problem.w.dims[2:], strict=True)]
    fits = all(max(pair) <= far for pair, far in zip(problem.padding, reach, strict=True))
    flipped = (Via.FLIPPED,) if set(problem.stride) == {1} and fits and not onednn_misreads(problem) else ()
    if problem.epilogue.bias:  # the backward kernel adds none, and adding it afterwards rounds twice
        return (Via.TRANSPOSED, *flipped)
    return (Via.BACKWARD, Via.TRANSPOSED, *flipped)


def _native_vias(problem: Problem) -> tuple[Via, ...]:
    """The ways to torch's native CPU kernels for float32: those that can be called without turning oneDNN off.

    Turning it off is a global switch, and would change what other threads compute. Float64 takes these kernels anyway,
    and for 16-bit types they are hopeless.
    """
    symmetric = all(before == after for before, after in problem.padding)
    if (problem.device, problem.dtype, problem.groups, symmetric) != ("cpu", "float32", 1, True):
        return ()
    # The backward kernels misread inputs that are not contiguous: wrong numbers for a wgrad of spaced-out ones.
    dense = all(spec.layout == "contiguous" for spec in problem.inputs)
    plain = set(problem.dilation) == {1} and problem.spatial_rank < 3 and dense
    if problem.op == "dgrad":
        return (Via.TRANSPOSED, Via.BACKWARD) if plain and not problem.epilogue.bias else (Via.TRANSPOSED,)
    return (Via.BACKWARD,) if problem.op == "fprop" or plain else ()


def _workspace_bytes(problem: Problem, layout: Layout, path: Path, via: Via, compute: Compute) -> int:
    tensors = (*problem.inputs, problem.output)
    total = 0
    if layout is not Layout.AS_GIVEN:
        total += sum(spec.nbytes for spec in tensors)
    if compute is Compute.FLOAT32:
        total += sum(4 * spec.numel for spec in tensors)
    if path is Path.NATIVE:
        columns = problem.y.dims[0] * math.prod(problem.y.dims[2:]) * problem.x.dims[1] * math.prod(problem.w.dims[2:])
        total += columns * DTYPES[problem.dtype].itemsize_bytes
    if via is Via.FLIPPED:
        total += problem.w.nbytes
    if any(before != after for before, after in problem.padding):
        total += 2 * problem.x.nbytes
    return total


def _fprop_in_one_frame(problem: Problem, policy: Policy, run_and_deliver: Run) -> Run:
    """The commonest plan without the frames in between: right after a large convolution each costs microseconds."""
    stride, dilation, groups = list(problem.stride), list(problem.dilation), problem.groups
    padding, zeros, wanted = [before for before, _ in problem.padding], [0] * len(stride), problem.output.strides
    deterministic, tf32 = bool(policy.deterministic), bool(policy.allow_tf32)
    convolution, cudnn, dims = torch._convolution, torch.backends.cudnn.enabled, problem.output.dims

    def run(
        first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        if out is not None:
            return run_and_deliver(first, second, bias, out)
        result = convolution(
            first, second, bias, stride, padding, dilation, False, zeros, groups, False, deterministic, cudnn, tf32
        )
        if result.stride() == wanted:
            return result
        return deliver(result, problem.output, None).as_strided(dims, wanted)  # for dimensions of size 1

    return run


def _delivered(run: Core, spec: TensorSpec) -> Run:
    strides = spec.strides

    def run_and_deliver(
        first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        result = run(first, second, bias)
        if out is None and result.stride() == strides:
            return result
        return deliver(result, spec, out)

    return run_and_deliver


def _native(problem: Problem, via: Via) -> Core:
    """Torch's im2col kernels by name; 1-D problems with a unit dimension before the last, as torch does it."""
    if problem.spatial_rank == 1:
        lifted = _native(lift(problem), via)

        def run(first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return lifted(first.unsqueeze(2), second.unsqueeze(2), bias).squeeze(2)

        return run
    taps, stride, dilation = list(problem.w.dims[2:]), list(problem.stride), list(problem.dilation)
    padding, rank = [before for before, _ in problem.padding], problem.spatial_rank
    native: Any = torch._C._nn
    if problem.op == "fprop" and set(dilation) == {1}:
        plain = native.thnn_conv2d if rank == 2 else native.slow_conv3d
        return lambda x, w, bias: plain(x, w, taps, bias, stride, padding)
    if problem.op == "fprop":
        dilated = native.slow_conv_dilated2d if rank == 2 else native.slow_conv_dilated3d
        return lambda x, w, bias: dilated(x, w, taps, bias, stride, padding, dilation)
    if via is Via.TRANSPOSED:
        transposed = native.slow_conv_transpose2d if rank == 2 else native.slow_conv_transpose3d
        outer = output_padding(problem, problem.x.dims, padding)
        return lambda y, w, bias: transposed(y, w, taps, bias, stride, padding, outer, dilation)
    backward = torch.ops.aten._slow_conv2d_backward.output_mask
    if problem.op == "wgrad":
        like = problem.w
        return lambda x, y, bias: backward(
            y, x, torch.empty(like.dims, dtype=x.dtype, device=x.device), taps, stride, padding, [False, True, False]
        )[1]
    dims = problem.x.dims

    def run_backward(y: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = torch.empty(dims, dtype=y.dtype, device=y.device)  # only its sizes are read
        result: torch.Tensor = backward(y, x, w, taps, stride, padding, [True, False, False])[0]
        return result

    return run_backward


def _converted(core: Core, problem: Problem, policy: Policy, layout: Layout, via: Via, compute: Compute) -> Core:
    """Run in another layout or dtype; 1-D problems get a unit dimension where torch has no channels-last for them."""
    dtype = torch.float32 if compute is Compute.FLOAT32 else None
    if layout is Layout.CHANNELS_LAST and problem.spatial_rank == 1:
        return _as_two_dimensional(problem, policy, via, dtype)
    wanted = {
        Layout.AS_GIVEN: torch.preserve_format,
        Layout.CONTIGUOUS: torch.contiguous_format,
        Layout.CHANNELS_LAST: torch.channels_last if problem.spatial_rank == 2 else torch.channels_last_3d,
    }[layout]

    def run(first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = core(
            first.to(dtype=dtype or first.dtype, memory_format=wanted),
            second.to(dtype=dtype or second.dtype, memory_format=wanted),
            bias if bias is None or dtype is None else bias.to(dtype),
        )
        return result if dtype is None else result.to(first.dtype)

    return run


def _as_two_dimensional(problem: Problem, policy: Policy, via: Via, dtype: torch.dtype | None) -> Core:
    core = _CORES[problem.op](lift(problem), policy, via)

    def run(first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = core(
            first.unsqueeze(2).to(dtype=dtype or first.dtype, memory_format=torch.channels_last),
            second.unsqueeze(2).to(dtype=dtype or second.dtype, memory_format=torch.channels_last),
            bias if bias is None or dtype is None else bias.to(dtype),
        )
        return result.squeeze(2) if dtype is None else result.squeeze(2).to(first.dtype)

    return run


def _convolve(
    problem: Problem,
    policy: Policy,
    padding: list[int],
    *,
    transposed: bool = False,
    output_padding: list[int] | None = None,
) -> Core:
    """`aten::_convolution` below the entry that convplan replaces, with the policy as its flags."""
    stride, dilation, groups = list(problem.stride), list(problem.dilation), problem.groups
    outer = output_padding or [0] * len(stride)
    deterministic, tf32 = bool(policy.deterministic), bool(policy.allow_tf32)
    convolution, cudnn = torch._convolution, torch.backends.cudnn.enabled

    def run(first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return convolution(
            first, second, bias, stride, padding, dilation, transposed, outer, groups,
            False, deterministic, cudnn, tf32,
        )  # fmt: skip

    return run


def _fprop(problem: Problem, policy: Policy, via: Via) -> Core:
    padding = SplitPadding(problem.padding)
    convolve = _convolve(problem, policy, padding.symmetric)
    if padding.is_symmetric:
        return convolve
    return lambda x, w, bias: convolve(padding.grow(x), w, bias)


def _dgrad(problem: Problem, policy: Policy, via: Via) -> Core:
    if via is Via.FLIPPED:
        return _dgrad_flipped(problem, policy)
    padding = SplitPadding(problem.padding)
    grown = padding.grown_dims(problem.x.dims)
    if via is Via.TRANSPOSED:
        outer = output_padding(problem, grown, padding.symmetric)
        convolve = _convolve(problem, policy, padding.symmetric, transposed=True, output_padding=outer)
        return lambda y, w, bias: padding.crop(convolve(y, w, bias))
    backward = _backward(problem, policy, padding.symmetric, [True, False, False])
    layout = "channels_last" if problem.x.layout == "channels_last" else "contiguous"
    like = TensorSpec.dense(grown, problem.dtype, layout)

    def run(y: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # The kernel reads the input's sizes and layout only: memory that is reserved and never touched.
        x = torch.empty_strided(like.dims, like.strides, dtype=y.dtype, device=y.device)
        return padding.crop(backward(y, x, w)[0])

    return run


def _dgrad_flipped(problem: Problem, policy: Policy) -> Core:
    """dgrad of stride 1 as the correlation of dy with the filter flipped in space and exchanged in channels."""
    reach = [dil * (taps - 1) for dil, taps in zip(problem.dilation, problem.w.dims[2:], strict=True)]
    padding = SplitPadding([(far - b, far - a) for far, (b, a) in zip(reach, problem.padding, strict=True)])
    convolve = _convolve(problem, policy, padding.symmetric)
    groups, spatial = problem.groups, list(range(2, 2 + problem.spatial_rank))
    filters, channels = problem.w.dims[0] // groups, problem.w.dims[1]
    taps = problem.w.dims[2:]

    def run(y: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flipped = w.flip(spatial).reshape(groups, filters, channels, *taps).transpose(1, 2)
        return convolve(padding.grow(y), flipped.reshape(groups * channels, filters, *taps), bias)

    return run


def _wgrad(problem: Problem, policy: Policy, via: Via) -> Core:
    padding = SplitPadding(problem.padding)
    backward = _backward(problem, policy, padding.symmetric, [False, True, False])
    like = problem.w

    def run(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        w = torch.empty_strided(like.dims, like.strides, dtype=x.dtype, device=x.device)
        return backward(y, padding.grow(x), w)[1]

    return run


_CORES: dict[str, Callable[[Problem, Policy, Via], Core]] = {"fprop": _fprop, "dgrad": _dgrad, "wgrad": _wgrad}

Backward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]


def _backward(problem: Problem, policy: Policy, padding: list[int], mask: list[bool]) -> Backward:
    """`aten::convolution_backward(dy, x, w)` as torch registered it, whatever convplan has put in its place since."""
    stride, dilation, groups = list(problem.stride), list(problem.dilation), problem.groups
    zeros = [0] * len(stride)
    kernel, keyset = stock_backward(problem.device)
    call = kernel.call_boxed

    def run(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> Sequence[torch.Tensor]:
        result: Sequence[torch.Tensor] = call(
            keyset, y, x, w, None, stride, padding, dilation, False, zeros, groups, mask
        )
        return result

    if problem.device != "cuda":
        return run
    deterministic, tf32 = bool(policy.deterministic), bool(policy.allow_tf32)
    cudnn = torch.backends.cudnn.enabled

    def run_with_flags(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> Sequence[torch.Tensor]:
        # Unlike the forward, torch's backward reads its flags from global state.
        with _cudnn_flags(cudnn, deterministic, tf32):
            return run(y, x, w)

    return run_with_flags


@contextmanager
def _cudnn_flags(enabled: bool, deterministic: bool, tf32: bool) -> Iterator[None]:
    """Torch's flags as given, and no benchmark, inside the block.

    Not torch's own scope where the precision need not change: it reads the old spelling, which torch refuses once the
    new one was used.
    """
    if torch_flags().allow_tf32 != tf32:
        flags = torch.backends.cudnn.flags
        with flags(enabled=enabled, benchmark=False, deterministic=deterministic, allow_tf32=tf32):
            yield
        return
    torch_c = torch._C
    before = torch_c._get_cudnn_enabled(), torch_c._get_cudnn_benchmark(), torch_c._get_cudnn_deterministic()
    _set_cudnn_flags(enabled, False, deterministic)
    try:
        yield
    finally:
        _set_cudnn_flags(*before)


def _set_cudnn_flags(enabled: bool, benchmark: bool, deterministic: bool) -> None:
    torch._C._set_cudnn_enabled(enabled)
    torch._C._set_cudnn_benchmark(benchmark)
    torch._C._set_cudnn_deterministic(deterministic)


@functools.lru_cache(maxsize=8)
def stock_forward(device: str) -> tuple[torch._C._SafeKernelFunction, torch._C.DispatchKeySet]:
    """Torch's own `aten::convolution` for a device, and the key set to call it with.

    Must first be called while nothing is overridden, which `torch_ops.override` sees to.
    """
    return _stock("aten::convolution", device)


@functools.lru_cache(maxsize=8)
def stock_backward(device: str) -> tuple[torch._C._SafeKernelFunction, torch._C.DispatchKeySet]:
    """The same for `aten::convolution_backward`."""
    return _stock("aten::convolution_backward", device)


def _stock(name: str, device: str) -> tuple[torch._C._SafeKernelFunction, torch._C.DispatchKeySet]:
    key = torch._C._parse_dispatch_key(device.upper())
    if key is None:
        raise AssertionError(f"convplan bug: torch has no dispatch key for device {device!r}")
    return torch.library.get_kernel(name, device.upper()), torch._C.DispatchKeySet(key)

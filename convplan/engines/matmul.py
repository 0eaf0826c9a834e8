"""The `matmul` engine: convolution as matrix products, written in plain torch, for every device torch runs on.

Here: the knobs, which of their combinations are worth a try for a problem, and the path of one call: open the output,
fill it, add the bias, hand it over. The four methods themselves are in `_products`; the windows and slices they move
over are in `_windows`.

It wins where a vendor's convolution has no tuned kernel: 16-bit types on CPUs without 16-bit arithmetic (computed in
float32 here), gradients of strided layers and of patch embeddings, 1-D layers, gradients of depthwise filters.

Every method is direct: an output is a plain sum of products, in float32 or wider, rounded once to the output's type.
Results are the same bits from run to run. On CUDA, whether float32 products use TensorFloat-32 is torch's own setting.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from convplan._errors import PlanRejected
from convplan._policy import Effort, Policy
from convplan._problem import Problem, TensorSpec
from convplan.engines import _products
from convplan.engines._support import TORCH_DTYPES, deliver, dtype_refusal, empty, may_use_tf32
from convplan.engines._windows import count_phases
from convplan.engines.base import YES, Built, Candidate, EngineConfig, Notes, Space, Support, no


class Method(IntEnum):
    """Knob `method`; the values are stored, so they never change their meaning."""

    GATHER = 1  # columns of the input (none for 1x1), one product
    SHIFT = 2  # columns along all but the first spatial dimension, one product for each of its taps
    SCATTER = 3  # one product with the input, every tap's share added where it belongs; fprop and dgrad
    TAPS = 4  # a multiply-add for each tap; for depthwise filters and few channels


class Layout(IntEnum):
    """Knob `layout`: the order of dimensions inside, whatever the tensors' own is."""

    CHANNELS_FIRST = 0
    CHANNELS_LAST = 1


class Compute(IntEnum):
    """Knob `compute`: the type of products and sums."""

    OWN = 0  # the problem's; for 16-bit types only where torch sums one product in float32 and rounds once
    FLOAT32 = 1  # 16-bit types only: converted on the way in and out


NARROW = ("float16", "bfloat16")  # types whose sums need a wider one
MAX_CANDIDATES = 6  # of one problem: the methods differ by factors, so more would only cost tuning time
PIECE_BYTES = 8 * 2**20  # columns of one piece: larger ones leave the caches, and fresh pages cost faults
MAX_PHASES = 16  # phases of a strided dgrad for which gathering is proposed: each is a small problem of its own
MAX_STEPS = 512  # multiply-adds or scatters for which the methods that loop over them are proposed
MAX_ELEMENTWISE_CHANNELS = 4  # channels of a group, at most, for which multiply-adds can keep up with products


@dataclass(frozen=True)
class _Knobs:
    """One configuration's knobs, decoded."""

    method: Method
    layout: Layout
    compute: Compute
    chunk: int  # samples a piece; 0: all at once

    def config(self) -> EngineConfig:
        return EngineConfig.of(
            MatmulEngine.name, method=self.method, layout=self.layout, compute=self.compute, chunk=self.chunk
        )


class MatmulEngine:
    """Convolution as matrix products; see the module."""

    name = "matmul"
    by_default = True

    def supports(self, problem: Problem) -> Support:
        """All problems with something to compute, in a floating-point type of 16 bits or more."""
        if problem.is_empty:
            return no("nothing to compute: a tensor has no elements")
        refusal = dtype_refusal(problem)
        return no(refusal) if refusal else YES

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """At most `MAX_CANDIDATES`, the likeliest first; with effort `instant`, that one alone."""
        if not self.supports(problem).ok:
            return []
        possible = (knobs for knobs in _proposals(problem) if not _refusal(problem, knobs))
        chosen = itertools.islice(dict.fromkeys(possible), 1 if effort == "instant" else MAX_CANDIDATES)
        return [_candidate(problem, knobs) for knobs in chosen]

    def spaces(self, problem: Problem) -> Sequence[Space]:
        """Every method, layout and type, and pieces of a few sizes around the one that is proposed."""
        if not self.supports(problem).ok:
            return ()
        samples = problem.x.dims[0]
        sizes = {_chunk(problem, method) for method in Method}
        near = {int(size * share) for size in sizes for share in (0.25, 0.5, 1, 2, 4)}
        chunks = sorted({0, *(size for size in near if 0 < size < samples)})
        free = (("chunk", chunks), ("compute", Compute), ("layout", Layout), ("method", Method))
        return [Space(free=tuple((name, tuple(int(value) for value in values)) for name, values in free))]

    def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
        """Any configuration.

        Raises:
            PlanRejected: an unknown knob or value, or a method that does not do this operation, layout or type.
        """
        return _candidate(problem, self._checked(problem, config))

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Work out windows and slices, and return a function that runs them.

        Raises:
            PlanRejected: an unknown knob or value, or a method that does not do this operation, layout or type.
        """
        return _build(problem, self._checked(problem, config))

    def _checked(self, problem: Problem, config: EngineConfig) -> _Knobs:
        knobs = _decode(problem, config)
        support = self.supports(problem)
        reason = support.reason or _refusal(problem, knobs)
        if reason:
            raise PlanRejected(engine=self.name, config=str(config), reason=reason)
        return knobs


def _decode(problem: Problem, config: EngineConfig) -> _Knobs:
    found = dict(config.knobs)
    try:
        knobs = _Knobs(
            Method(found.pop("method")),
            Layout(found.pop("layout", 0)),
            Compute(found.pop("compute", 0)),
            found.pop("chunk", 0),
        )
    except (KeyError, ValueError) as exc:
        raise PlanRejected(engine="matmul", config=str(config), reason=f"knob missing or out of range: {exc}") from exc
    if found or knobs.chunk < 0:
        reason = f"unknown knobs {sorted(found)}" if found else f"chunk is {knobs.chunk}, expected 0 or more samples"
        raise PlanRejected(engine="matmul", config=str(config), reason=reason)
    return knobs


def _refusal(problem: Problem, knobs: _Knobs) -> str:
    """Why these knobs cannot run this problem; empty if they can."""
    if knobs.layout == Layout.CHANNELS_LAST and problem.groups > 1 and knobs.method != Method.TAPS:
        return "products with channels last need groups = 1"
    if knobs.method == Method.SCATTER and problem.op == "wgrad":
        return "scatter does fprop and dgrad"
    narrow = problem.dtype in NARROW
    if knobs.compute == Compute.FLOAT32 and not narrow:
        return f"compute is FLOAT32, expected OWN for {problem.dtype}"
    if knobs.compute == Compute.OWN and narrow and not _rounds_once(problem, knobs):
        return f"sums of several products would be rounded to {problem.dtype} on the way, expected compute = FLOAT32"
    return ""


def _rounds_once(problem: Problem, knobs: _Knobs) -> bool:
    """Every output comes from one product and no sum of rounded parts."""
    if knobs.method != Method.GATHER or problem.epilogue.bias:
        return False
    if problem.op != "wgrad":
        return True
    samples = problem.x.dims[0]
    return samples == 1 or (knobs.layout == Layout.CHANNELS_LAST and not 0 < knobs.chunk < samples)


# --- proposals --------------------------------------------------------------------------------------------------------


def _proposals(problem: Problem) -> Iterator[_Knobs]:
    """Knobs worth a try, the likeliest first; the first input's layout before the other."""
    narrow = problem.dtype in NARROW
    compute = Compute.FLOAT32 if narrow else Compute.OWN
    wanted = Layout.CHANNELS_LAST if problem.inputs[0].layout == "channels_last" else Layout.CHANNELS_FIRST
    layouts = (wanted, Layout(1 - wanted))
    methods = _methods(problem)
    if narrow and _own_type_is_fast(problem) and Method.GATHER in methods:
        yield from (_Knobs(Method.GATHER, layout, Compute.OWN, 0) for layout in layouts)
    for layout in layouts:
        for method in methods:
            yield _Knobs(method, layout, compute, _chunk(problem, method))


def _own_type_is_fast(problem: Problem) -> bool:
    """Whether torch multiplies matrices of this 16-bit type at full speed, summing in float32."""
    return problem.device != "cpu" or problem.dtype == "bfloat16"


def _methods(problem: Problem) -> list[Method]:
    """Methods worth a try, the likeliest first."""
    taps = math.prod(problem.w.dims[2:])
    filters, channels = problem.w.dims[0] // problem.groups, problem.w.dims[1]
    shift = [Method.SHIFT] if 1 < problem.w.dims[2] <= MAX_STEPS else []
    if taps == 1 and max(filters, channels) > MAX_ELEMENTWISE_CHANNELS:
        return [Method.GATHER]
    if max(filters, channels) <= MAX_ELEMENTWISE_CHANNELS:
        steps = taps * (filters if problem.op == "dgrad" else channels)
        return [*([Method.TAPS] if steps <= MAX_STEPS else []), *(shift or [Method.GATHER])]
    scatter = [Method.SCATTER] if taps <= MAX_STEPS else []
    if problem.op == "wgrad":
        return [Method.GATHER, *shift]
    if problem.op == "fprop":
        # Scattering moves taps * K numbers for each position, gathering taps * C.
        return [*(scatter if 4 * filters <= channels else []), Method.GATHER, *shift]
    if max(problem.stride) > 1 or 4 * channels <= filters:
        few = count_phases(problem) <= MAX_PHASES
        return [*scatter, *([Method.GATHER, *shift] if few or not scatter else [])]
    return [*shift, Method.GATHER, *scatter]


def _chunk(problem: Problem, method: Method) -> int:
    """Samples a piece, so that its columns take about `PIECE_BYTES`; 0 when that is all of them."""
    taps = 1 if method == Method.TAPS else math.prod(problem.w.dims[2:])
    itemsize = TORCH_DTYPES[problem.dtype].itemsize if problem.dtype == "float64" else 4
    positions = math.prod(problem.y.dims[2:])
    per_sample = max(1, problem.x.dims[1] * taps * positions * itemsize)
    chunk = max(1, PIECE_BYTES // per_sample)
    return 0 if chunk >= problem.x.dims[0] else chunk


def _candidate(problem: Problem, knobs: _Knobs) -> Candidate:
    numerical = []
    if knobs.compute == Compute.OWN and problem.dtype in NARROW and problem.device != "cpu":
        numerical = ["TENSOR_CORE", "REDUCED_PRECISION_REDUCTION"]  # torch lets cuBLAS reduce split sums in 16 bits
    elif may_use_tf32(problem):
        numerical = ["TENSOR_CORE"]
    columns = _method(problem, knobs)[1]
    return Candidate(
        config=knobs.config(),
        notes=Notes(numerical=tuple(numerical)),
        workspace_bytes=columns + _Output(problem, knobs).workspace_bytes,
        flops=float(problem.flops),
        moved_bytes=2 * columns,  # written and read
    )


# --- building ---------------------------------------------------------------------------------------------------------

_MAKERS: dict[tuple[Method, str], Callable[[_products.Setting], _products.Method]] = {
    (Method.GATHER, "fprop"): lambda setting: _products.correlate_fprop(setting, "gather"),
    (Method.GATHER, "dgrad"): lambda setting: _products.correlate_dgrad(setting, "gather"),
    (Method.GATHER, "wgrad"): _products.gather_wgrad,
    (Method.SHIFT, "fprop"): lambda setting: _products.correlate_fprop(setting, "shift"),
    (Method.SHIFT, "dgrad"): lambda setting: _products.correlate_dgrad(setting, "shift"),
    (Method.SHIFT, "wgrad"): _products.shift_wgrad,
    (Method.SCATTER, "fprop"): _products.scatter,
    (Method.SCATTER, "dgrad"): _products.scatter,
    (Method.TAPS, "fprop"): _products.taps,
    (Method.TAPS, "dgrad"): _products.taps,
    (Method.TAPS, "wgrad"): _products.taps_wgrad,
}


def _method(problem: Problem, knobs: _Knobs) -> _products.Method:
    samples = problem.x.dims[0]
    setting = _products.Setting(
        problem=problem,
        channels_last=knobs.layout == Layout.CHANNELS_LAST,
        dtype=torch.float32 if knobs.compute == Compute.FLOAT32 else TORCH_DTYPES[problem.dtype],
        chunk=min(knobs.chunk or samples, samples),
    )
    method = _MAKERS[knobs.method, problem.op](setting)
    if knobs.compute == Compute.OWN and problem.dtype in NARROW:
        # Torch's 16-bit products copy operands that are not as they like them.
        return _products.Method(method.fill, 2 * method.workspace_bytes)
    return method


class _Output:
    """Where a method writes: the output itself where its layout and type allow, otherwise a tensor to convert."""

    def __init__(self, problem: Problem, knobs: _Knobs) -> None:
        self.spec: TensorSpec = problem.output
        self.last = knobs.layout == Layout.CHANNELS_LAST
        self._dtype = torch.float32 if knobs.compute == Compute.FLOAT32 else TORCH_DTYPES[problem.dtype]
        natural = TensorSpec.dense(self.spec.dims, self.spec.dtype, "channels_last" if self.last else "contiguous")
        self._natural = natural
        self.direct = self._dtype == TORCH_DTYPES[self.spec.dtype] and natural.strides == self.spec.strides
        self.workspace_bytes = 0 if self.direct else self.spec.numel * self._dtype.itemsize

    def open(self, out: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """A tensor with the output's dims, dense in layout order, contents undefined."""
        if not self.direct:
            return torch.empty_strided(self._natural.dims, self._natural.strides, dtype=self._dtype, device=device)
        if out is not None and out.stride() == self.spec.strides:
            return out
        return empty(self.spec, device)

    def close(self, result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Hand the filled tensor over in the output's type and strides, or in `out`."""
        if out is not None:
            return out if result is out else out.copy_(result)
        return result if self.direct else deliver(result, self.spec, None)


def _build(problem: Problem, knobs: _Knobs) -> Built:
    output, method = _Output(problem, knobs), _method(problem, knobs)
    fill = method.fill
    bias_dims = (1, -1) + (1,) * problem.spatial_rank

    def run(
        first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        result = output.open(out, first.device)
        fill(first, second, result.movedim(1, -1) if output.last else result)
        if bias is not None:
            result.add_(bias.view(bias_dims))
        return output.close(result, out)

    return Built(run, method.workspace_bytes + output.workspace_bytes)

"""Engine `onednn`: convolutions whose epilogue oneDNN computes before it writes, as torch exposes them on the CPU.

Torch has three such calls, made for its compiler: a convolution or a transposed convolution with an activation behind
it, and a convolution that adds a tensor and may end in a ReLU. What they do not take is brought into a form that they
do: a per-channel scale is folded into the weight, a residual with a factor becomes the tensor that oneDNN adds its sums
to, and an activation that oneDNN lacks there is one of torch's kernels behind it. Where nothing would be left to fuse,
the problem is refused: engine `composed` does the same then. Knobs:

    layout    run on the tensors as given, or converted (conversion included in its time)
    compute   in the tensors' dtype, or in float32 for 16-bit ones

oneDNN's ReLU and clamp make a number of NaN, unlike torch's: such candidates carry DROPS_NAN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, cast

import torch

from convplan._environment import onednn_computes, onednn_enabled
from convplan._errors import PlanRejected
from convplan._policy import Effort, Policy
from convplan._problem import DTYPES, Problem
from convplan.engines._epilogues import activate
from convplan.engines._padding import SplitPadding, lift, output_padding
from convplan.engines._support import TORCH_DTYPES, deliver, onednn_misreads
from convplan.engines.base import YES, Built, Candidate, EngineConfig, Notes, Run, Support, no


class Layout(IntEnum):
    """Knob `layout`: the memory format that oneDNN is handed."""

    AS_GIVEN = 0
    CONTIGUOUS = 1
    CHANNELS_LAST = 2


class Compute(IntEnum):
    """Knob `compute`: the dtype that oneDNN is handed."""

    OWN = 0
    FLOAT32 = 1


class PostOp(NamedTuple):
    """One row of `POST_OPS`: how torch names an activation, and which variant of it."""

    name: str
    variant: str | None = None


POST_OPS: dict[str, PostOp] = {  # the parameters of those that have some are the same, in the same order
    "none": PostOp("none"),
    "relu": PostOp("relu"),
    "leaky_relu": PostOp("leaky_relu"),
    "clamp": PostOp("hardtanh"),
    "gelu": PostOp("gelu", "none"),
    "gelu_tanh": PostOp("gelu", "tanh"),
    "silu": PostOp("swish"),
    "sigmoid": PostOp("sigmoid"),
    "tanh": PostOp("tanh"),
    "hardswish": PostOp("hardswish"),
}
DTYPE_NAMES = ("float32", "bfloat16", "float16")
_DROPS_NAN = ("relu", "clamp")


class OnednnEngine:
    """oneDNN's fused convolutions; see the module's text for the knobs."""

    name = "onednn"
    by_default = True
    fuses = True

    def supports(self, problem: Problem) -> Support:
        """Problems on the CPU of whose epilogue oneDNN computes a part together with the convolution."""
        reason = _refusal(problem)
        return no(reason) if reason else YES

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """In the tensors' dtype before float32, as given before converted."""
        if _refusal(problem):
            return ()
        return [
            self._candidate(problem, layout, compute)
            for compute in _computes(problem)
            for layout in _layouts(problem)
            if _fuses(problem, layout)
        ]

    def _candidate(self, problem: Problem, layout: Layout, compute: Compute) -> Candidate:
        drops = problem.epilogue.activation in _DROPS_NAN
        return Candidate(
            config=EngineConfig.of(self.name, layout=int(layout), compute=int(compute)),
            notes=Notes(numerical=("DROPS_NAN",) if drops else ()),
            workspace_bytes=_workspace_bytes(problem, layout, compute),
            flops=float(problem.flops),
        )

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Build one configuration.

        Raises:
            PlanRejected: a knob's value is unknown, or nothing is fused with it.
        """
        reason = _refusal(problem)
        try:
            layout, compute = Layout(config.knob("layout")), Compute(config.knob("compute"))
        except ValueError as exc:
            raise PlanRejected(engine=self.name, config=str(config), reason=str(exc)) from exc
        if not reason and compute not in _computes(problem):
            reason = f"{problem.dtype} is computed in {' or '.join(one.name for one in _computes(problem))}"
        if not reason and not _fuses(problem, layout):
            reason = "oneDNN adds a residual channels-last only"
        if reason:
            raise PlanRejected(engine=self.name, config=str(config), reason=reason)
        run = _run(problem, layout, compute)
        return Built(run=run, workspace_bytes=_workspace_bytes(problem, layout, compute))


def _refusal(problem: Problem) -> str:
    """Why no part of the epilogue can be fused; empty when one can."""
    epilogue = problem.epilogue
    if problem.device != "cpu":
        return f"device is {problem.device!r}, supported: cpu"
    if epilogue.is_plain:
        return "nothing follows the convolution, or a bias alone"
    if epilogue.statistics:
        return "oneDNN writes no statistics"
    if epilogue.gate:
        return "oneDNN has no gate behind a convolution"
    if problem.is_empty:
        return "the problem is empty"
    if problem.dtype not in DTYPE_NAMES or problem.output_dtype not in DTYPE_NAMES:
        return f"dtypes are {problem.dtype} to {problem.output_dtype}, supported: {', '.join(DTYPE_NAMES)}"
    if not onednn_enabled():
        return "oneDNN is not part of this torch, or switched off (torch.backends.mkldnn)"
    if problem.op == "dgrad" and epilogue.residual:
        return "oneDNN's transposed convolution adds no residual"
    if epilogue.residual:
        if problem.groups > 1:
            return "torch has oneDNN add no residual to a convolution with groups"
    elif epilogue.activation not in POST_OPS and not epilogue.scale:
        return f"oneDNN has no {epilogue.activation} behind a convolution: {', '.join(POST_OPS)}"
    return ""


def activation_is_fused(problem: Problem) -> bool:
    """Whether oneDNN ends with a supported problem's activation, rather than one of torch's kernels behind it."""
    ends = ("none", "relu") if problem.epilogue.residual else POST_OPS
    return problem.epilogue.activation in ends


def _fuses(problem: Problem, layout: Layout) -> bool:
    """Whether a configuration fuses anything: torch has oneDNN add a residual only where it works channels-last.

    Elsewhere it calls its own convolution by the dispatcher, which may be convplan's, and adds afterwards.
    """
    last = layout is Layout.CHANNELS_LAST or (layout is Layout.AS_GIVEN and problem.x.layout == "channels_last")
    return last or not problem.epilogue.residual


def _computed_in(problem: Problem, compute: Compute) -> str:
    return "float32" if compute is Compute.FLOAT32 else problem.dtype


def _layouts(problem: Problem) -> list[Layout]:
    """As given, then the dense layouts that at least one input is not in already."""
    given = {spec.layout for spec in problem.inputs}
    others = {Layout.CHANNELS_LAST: {"channels_last"}, Layout.CONTIGUOUS: {"contiguous"}}
    return [Layout.AS_GIVEN, *(layout for layout, all_in in others.items() if given != all_in)]


def _computes(problem: Problem) -> tuple[Compute, ...]:
    """The tensors' dtype where oneDNN has it and is right, and float32 for 16-bit types.

    A weight with a scale folded in is rounded once more, which 16-bit types have no room for.
    """
    if problem.dtype == "float32":
        return (Compute.OWN,)
    own = onednn_computes(problem.dtype) and problem.output_dtype == problem.dtype and not problem.epilogue.scale
    own = own and not (problem.op == "fprop" and onednn_misreads(problem))
    return (Compute.OWN, Compute.FLOAT32) if own else (Compute.FLOAT32,)


def _workspace_bytes(problem: Problem, layout: Layout, compute: Compute) -> int:
    epilogue = problem.epilogue
    read, written = problem.inputs, problem.output
    itemsize = DTYPES[_computed_in(problem, compute)].itemsize_bytes
    passed = sum(spec.numel for spec in read) + written.numel * (1 + epilogue.residual)
    total = 0
    if layout is not Layout.AS_GIVEN:
        total += passed * itemsize
    if compute is Compute.FLOAT32:
        total += passed * itemsize
    if epilogue.scale:
        total += problem.w.numel * itemsize
    if epilogue.residual and epilogue.alpha != 1:
        total += written.numel * itemsize
    if any(before != after for before, after in problem.padding):
        total += 2 * problem.x.nbytes
    return total


Core = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor | None", "torch.Tensor | None"], "torch.Tensor"]
"""First, second, bias and residual, in oneDNN's dtype and layout, to the result before it is cropped."""


def _run(problem: Problem, layout: Layout, compute: Compute) -> Run:
    """The whole: into dtype and layout, oneDNN, what it leaves of the activation, and out again."""
    flat, whole = problem.spatial_rank == 1, problem
    problem = lift(problem) if flat else problem
    padding = SplitPadding(problem.padding)
    core, behind = _core(problem, padding), not activation_is_fused(problem)
    last = torch.channels_last if problem.spatial_rank == 2 else torch.channels_last_3d
    wanted = {
        Layout.AS_GIVEN: torch.preserve_format,
        Layout.CONTIGUOUS: torch.contiguous_format,
        Layout.CHANNELS_LAST: last,
    }[layout]
    # Where channels-last is counted on, strides of dimensions of size 1 must not hide it from torch.
    first_wanted = last if whole.epilogue.residual else wanted
    dtype, spec, epilogue = TORCH_DTYPES[_computed_in(problem, compute)], whole.output, whole.epilogue
    fold, grows, crops = _folding(problem), problem.op == "fprop", problem.op == "dgrad"
    strides, out_dtype = spec.strides, TORCH_DTYPES[spec.dtype]

    def run(
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        residual: torch.Tensor | None,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        if flat:
            first, second = first.unsqueeze(2), second.unsqueeze(2)
            residual = residual if residual is None else residual.unsqueeze(2)
        first = (padding.grow(first) if grows else first).to(dtype=dtype, memory_format=first_wanted)
        second = second.to(dtype=dtype, memory_format=wanted)
        if scale is not None:
            second = fold(second, scale)
        if residual is not None:
            residual = residual.to(dtype=dtype, memory_format=wanted)
        result = core(first, second, bias if bias is None else bias.to(dtype), residual)
        if behind:
            result = activate(result, epilogue)
        if crops:
            result = padding.crop(result)
        if flat:
            result = result.squeeze(2)
        if out is None and result.stride() == strides and result.dtype == out_dtype:
            return result
        return deliver(result, spec, out)

    return cast(Run, run)


def _core(problem: Problem, padding: SplitPadding) -> Core:
    """The call that is made."""
    epilogue, symmetric = problem.epilogue, padding.symmetric
    fused = epilogue.activation if activation_is_fused(problem) else "none"
    if epilogue.residual:
        return _adding(problem, symmetric, None if fused == "none" else fused)
    name, variant = POST_OPS[fused]
    numbers = list(epilogue.parameters) if fused == epilogue.activation else []
    stride, dilation, groups = list(problem.stride), list(problem.dilation), problem.groups
    if problem.op == "fprop":
        forward = torch.ops.mkldnn._convolution_pointwise.default
        return lambda x, w, bias, _: forward(x, w, bias, symmetric, stride, dilation, groups, name, numbers, variant)
    outer = output_padding(problem, padding.grown_dims(problem.x.dims), symmetric)
    transposed = torch.ops.mkldnn._convolution_transpose_pointwise.default
    return lambda y, w, bias, _: transposed(
        y, w, bias, symmetric, outer, stride, dilation, groups, name, numbers, variant
    )


def _adding(problem: Problem, padding: list[int], ending: str | None) -> Core:
    """Convolution, residual and an ending: read where it is, or, with a factor, copied into what becomes the result."""
    stride, dilation, groups = list(problem.stride), list(problem.dilation), problem.groups
    alpha = problem.epilogue.alpha
    add = torch.ops.mkldnn._convolution_pointwise.binary
    add_to = torch.ops.mkldnn._convolution_pointwise_.binary

    def run(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
        assert residual is not None
        if alpha == 1:
            result = add(x, residual, w, bias, padding, stride, dilation, groups, "add", None, ending, [], None)
        else:
            sums = residual * alpha
            result = add_to(sums, x, w, bias, padding, stride, dilation, groups, "add", None, ending, [], None)
        return cast(torch.Tensor, result)

    return run


def _folding(problem: Problem) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What multiplies a weight with the scale of the channels that it leads to."""
    taps, groups = [1] * problem.spatial_rank, problem.groups
    if problem.op == "fprop":
        return lambda w, scale: w * scale.view(-1, 1, *taps)
    return lambda w, scale: (w.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *taps)).flatten(0, 1)

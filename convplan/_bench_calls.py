"""The calls that a benchmark times, as a user would write them: stock torch's, and the same under convplan.

Made from a problem of a file, with tensors of the same numbers wherever they are made. Timing them is elsewhere:
`_bench` within one process, `_bench_child` with a process for each side.

The call itself (`F.conv2d`, `F.conv_transpose2d` …), or `aten::convolution_backward` asked for one gradient, in stock
torch and then the very same call while `convplan.enabled()` is active. Torch has no asymmetric padding, so there stock
torch pads or crops on its own and convplan computes the problem as it is:

    fprop             F.pad, then the call         against  convplan's function, with pairs
    dgrad             the gradient, then cropped   against  the plan
    wgrad             the gradient, from an input that the forward pass has padded already, against  the plan
    transposed fprop  the call, then a view of the middle  against  convplan's function, with pairs
    its gradients     the incoming gradient is padded first  against  the plan

What follows a convolution (its problem's epilogue) are torch's elementwise functions, in place as a careful user writes
them, against convplan's function, which takes it all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from convplan._policy import Policy
from convplan._problem_files import NamedProblem, leftover

if TYPE_CHECKING:
    import torch

    from convplan._plan import PlanRecord

Call = Callable[[], object]


class Side(NamedTuple):
    """One way to compute the problem: the call in words, the call, and what is active around it."""

    wording: str
    call: Call
    active: Callable[[], AbstractContextManager[object]]


def contenders(named: NamedProblem, policy: Policy) -> tuple[Side, Side, PlanRecord | None]:
    """Stock torch, convplan, and the record that convplan's calls run by (None for a problem that is not planned)."""
    tensors = make_tensors(named)
    return stock_side(named, tensors), *our_side(named, policy, tensors)


def stock_side(named: NamedProblem, tensors: Tensors) -> Side:
    """Stock torch's call."""
    return Side(*_stock_call(named, _arguments(named), tensors), nullcontext)


def our_side(named: NamedProblem, policy: Policy, tensors: Tensors) -> tuple[Side, PlanRecord | None]:
    """convplan's call, planned by the store or now with the policy's effort, and the record it runs by."""
    import convplan

    arguments = _arguments(named)
    epilogue = named.problem.epilogue
    if (arguments.pads and named.op != "fprop") or epilogue.statistics or epilogue.gate:
        record = convplan.plan(named.problem, policy)
        run = functools.partial(record.build().run, *_plan_arguments(named, tensors), gate=tensors.gate)
        if epilogue.statistics:
            run = functools.partial(run, sums=new_sums(tensors.target))
        return Side("Plan.run", run, nullcontext), record
    if arguments.pads or not named.problem.epilogue.is_plain:
        wording, call = _own_call(named, arguments, tensors, policy)
    else:
        wording, call = _stock_call(named, arguments, tensors)
    ours = Side(wording, call, functools.partial(convplan.enabled, policy))
    # Planned is what the call really asks for, not the file's problem: torch has the last word on layouts.
    with convplan.capture() as asked:
        call()
    records = [convplan.plan(problem, policy) for problem in asked if not problem.is_empty]
    return ours, records[0] if records else None


def runs_a_ready_plan(side: Side) -> bool:
    """Whether the side's calls, after the first, run a remembered plan and do nothing else."""
    if side.active is nullcontext:
        return True
    import convplan

    with side.active():
        side.call()
        before = convplan.stats()
        side.call()
        after = convplan.stats()
    unchanged = ("misses", "planned", "fell_back", "failed")
    return after["hits"] > before["hits"] and all(after[name] == before[name] for name in unchanged)


class Tensors(NamedTuple):
    """The tensors of the call as its user sees them; the output stands for the gradient that comes in."""

    source: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    gate: torch.Tensor | None = None


def make_tensors(named: NamedProblem) -> Tensors:
    """The call's tensors; their numbers are the same in every process."""
    import torch

    from convplan._inputs import random_inputs
    from convplan.engines._support import empty

    problem, device = named.problem, torch.device(named.problem.device)
    inputs = random_inputs(problem, device)
    first, second, *more = (*inputs[:5], inputs.gate)
    written = empty(problem.output, device).zero_()
    x, w, y = {
        "fprop": (first, second, written),
        "dgrad": (written, second, first),
        "wgrad": (first, written, second),
    }[problem.op]
    return Tensors(y, w, x, *more) if named.transposed else Tensors(x, w, y, *more)


def _plan_arguments(named: NamedProblem, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The two tensors that `Plan.run` takes."""
    x, y = (tensors.target, tensors.source) if named.transposed else (tensors.source, tensors.target)
    return {"fprop": (x, tensors.weight), "dgrad": (y, tensors.weight), "wgrad": (x, y)}[named.problem.op]


class _Arguments(NamedTuple):
    """The arguments of torch's call, and in `pads` what they cannot express.

    `pads` is for `F.pad`, around the problem's x (which is the output of a transposed call), and replaces any padding
    in the call itself; empty where torch's own padding does.
    """

    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    pads: tuple[int, ...]


def _arguments(named: NamedProblem) -> _Arguments:
    problem = named.problem
    none = (0,) * problem.spatial_rank
    befores = tuple(before for before, _ in problem.padding)
    if not named.transposed:
        if all(before == after for before, after in problem.padding):
            return _Arguments(befores, none, ())
        return _Arguments(none, none, _flat(problem.padding))

    # The output of a transposed call without padding, and what it lacks or has too much with the same padding on both
    # sides: output_padding can add a little, and the rest is cut off.
    sizes = problem.x.dims[2:]
    whole = [
        (size - 1) * step + dilation * (taps - 1) + 1
        for size, step, dilation, taps in zip(
            problem.y.dims[2:], problem.stride, problem.dilation, problem.w.dims[2:], strict=True
        )
    ]
    lacking = tuple(size + 2 * before - all_ for size, before, all_ in zip(sizes, befores, whole, strict=True))
    limits = map(max, problem.stride, problem.dilation)
    if all(0 <= more < limit for more, limit in zip(lacking, limits, strict=True)):
        return _Arguments(befores, lacking, ())
    added = tuple(max(size + before - all_, 0) for size, before, all_ in zip(sizes, befores, whole, strict=True))
    cut = [
        (before, all_ + more - size - before)
        for before, all_, more, size in zip(befores, whole, added, sizes, strict=True)
    ]
    return _Arguments(none, added, _flat(cut))


def _flat(pairs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Padding as `F.pad` takes it: the last dimension first."""
    return tuple(side for pair in reversed(pairs) for side in pair)


def _stock_call(named: NamedProblem, arguments: _Arguments, tensors: Tensors) -> tuple[str, Callable[[], Any]]:
    """What a user of stock torch writes for this problem, in words and ready to be called."""
    import torch
    import torch.nn.functional as F

    from convplan.engines._epilogues import apply_epilogue
    from convplan.engines._support import TORCH_DTYPES

    aten = torch.ops.aten
    name = _function_name(named)
    source, weight, target, bias, residual, scale, gate = tensors
    pads = list(arguments.pads)
    epilogue = named.problem.epilogue
    if not epilogue.is_plain:
        plain = msgspec.structs.replace(named, problem=named.problem.core)
        dtype = TORCH_DTYPES[plain.problem.output_dtype]
        added = None if plain.problem.epilogue.bias else bias
        words, core = _stock_call(plain, arguments, Tensors(source, weight, target, None if added is bias else bias))
        if epilogue.statistics:
            return f"{words}, torch.var_mean", lambda: _with_statistics(core())
        if epilogue.gate:
            return f"{words}, threshold_backward", lambda: aten.threshold_backward.default(core(), gate, 0)
        return f"{words} {epilogue}", lambda: apply_epilogue(core().to(dtype), epilogue, added, residual, scale)
    if named.op == "fprop":
        forward = functools.partial(getattr(F, name), weight=weight, bias=bias, **_keywords(named, arguments))
        if not pads:
            return f"F.{name}", functools.partial(forward, source)
        if not named.transposed:
            return f"F.pad, F.{name}", lambda: forward(F.pad(source, pads))
        middle = [slice(pads[2 * i], pads[2 * i] + size) for i, size in enumerate(reversed(target.shape[2:]))][::-1]
        return f"F.{name}, slice", lambda: forward(source)[(..., *middle)]

    words = f"{'input' if named.op == 'dgrad' else 'weight'} gradient of {name}"
    gradient = _gradient(named, arguments)
    if not pads:
        return words, functools.partial(gradient, source, weight, target)
    if named.transposed:
        return f"F.pad, {words}", lambda: gradient(source, weight, F.pad(target, pads))
    padded = F.pad(source, pads)
    if named.op == "wgrad":
        return f"{words} from padded input", functools.partial(gradient, padded, weight, target)
    crop = [-pad for pad in pads]
    return f"{words}, F.pad", lambda: F.pad(gradient(padded, weight, target), crop)


def new_sums(target: torch.Tensor) -> torch.Tensor:
    """A place for the statistics of an output."""
    import torch

    return torch.empty((2, target.shape[1]), dtype=torch.float32, device=target.device)


def _with_statistics(result: torch.Tensor) -> torch.Tensor:
    import torch

    torch.var_mean(result, [0, *range(2, result.dim())])
    return result


def _gradient(
    named: NamedProblem, arguments: _Arguments
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """One gradient from (input, weight, gradient of the output), by the operator that autograd calls."""
    import torch

    problem = named.problem
    index = 0 if named.op == "dgrad" else 1
    backward = torch.ops.aten.convolution_backward.default
    fixed = (
        None,  # bias sizes: its gradient is not asked for
        problem.stride,
        arguments.padding,
        problem.dilation,
        named.transposed,
        arguments.output_padding,
        problem.groups,
        [index == 0, index == 1, False],
    )

    def gradient(source: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = backward(target, source, weight, *fixed)[index]
        return found

    return gradient


def _own_call(named: NamedProblem, arguments: _Arguments, tensors: Tensors, policy: Policy) -> tuple[str, Call]:
    """convplan's own function, whose padding may be pairs, and which takes what follows the convolution."""
    import convplan

    name = _function_name(named)
    call = functools.partial(
        getattr(convplan, name),
        tensors.source,
        tensors.weight,
        tensors.bias,
        **_keywords(named, None if arguments.pads else arguments),
        **_epilogue_keywords(named, tensors),
        policy=policy,
    )
    return f"convplan.{name}", call


def _epilogue_keywords(named: NamedProblem, tensors: Tensors) -> dict[str, Any]:
    epilogue = named.problem.epilogue
    if epilogue.is_plain:
        return {}
    return {
        "residual": tensors.residual,
        "alpha": epilogue.alpha,
        "scale": tensors.scale,
        "activation": (epilogue.activation, *epilogue.parameters),
    }


def _function_name(named: NamedProblem) -> str:
    return f"conv{'_transpose' if named.transposed else ''}{named.problem.spatial_rank}d"


def _keywords(named: NamedProblem, arguments: _Arguments | None) -> dict[str, Any]:
    """Keyword arguments of a forward call, alike in torch and convplan; None: the problem's padding, as pairs."""
    problem = named.problem
    keywords: dict[str, Any] = {
        "stride": problem.stride,
        "padding": problem.padding if arguments is None else arguments.padding,
        "dilation": problem.dilation,
        "groups": problem.groups,
    }
    if named.transposed:
        keywords["output_padding"] = leftover(problem) if arguments is None else arguments.output_padding
    return keywords

"""Convplan against stock torch, one problem at a time, both calls as a user would write them.

Used by `convplan bench` and by benchmark scripts; nothing here prints. Racing the candidates of one problem against
each other is planning, and lives in `_measure`.

What is timed: the call itself (`F.conv2d`, `F.conv_transpose2d` …), or `aten::convolution_backward` asked for one
gradient, in stock torch and then the very same call while `convplan.enabled()` is active. Torch has no asymmetric
padding, so there stock torch pads or crops on its own and convplan computes the problem as it is:

    fprop             F.pad, then the call         against  convplan's function, with pairs
    dgrad             the gradient, then cropped   against  the plan
    wgrad             the gradient, from an input that the forward pass has padded already, against  the plan
    transposed fprop  the call, then a view of the middle  against  convplan's function, with pairs
    its gradients     the incoming gradient is padded first  against  the plan

Rounds are shuffled: in each, both sides are sampled once, in random order, so that a drifting clock hits both. A sample
is the mean of as many calls as make it long against the clock's resolution. Entering and leaving `enabled()` and one
call after it stay outside. Garbage is collected before, not during.
"""

from __future__ import annotations

import datetime
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from convplan import __version__, _environment
from convplan._measure import half_interquartile_range
from convplan._policy import Policy
from convplan._problem_files import NamedProblem, leftover

if TYPE_CHECKING:
    import torch

    from convplan._plan import PlanRecord

LOSS = 0.97  # stock / convplan below this is a loss: more than what two equal calls differ by
MIN_ROUNDS = 5
SLOW_US = 500_000.0  # a call this long needs no untimed one before it, and gets fewer rounds
SLOW_ROUNDS = 2
MAX_ROUNDS = 1_000
MIN_SAMPLE_US = 15_000.0  # shorter calls are repeated inside one sample, so that what switching sides costs fades
SETTLING_CALLS = 2  # untimed: switching sides empties caches, ours and the processor's
MAX_REPEATS = 1_000
REPORT_SCHEMA = 1

Call = Callable[[], object]


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One side: the call in words, its samples in microseconds per call, their median and half interquartile range."""

    call: str
    median_us: float
    spread_us: float
    samples_us: tuple[float, ...]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One problem, timed on both sides.

    Args:
        name, model, suite: as the problem file has them.
        op: the operation as the file's author sees it.
        problem: what was computed, in words.
        key: of the plan, empty when none was made.
        chosen: engine and knobs of the plan.
        from_plan: the calls that were timed ran that plan. False: something else served them, such as stock torch for
            a problem that convplan does not plan.
        stock, convplan: the two sides.
        repeats: calls in one sample.
        ratio: stock's median over convplan's; above 1 convplan is faster.
    """

    name: str
    model: str
    suite: str
    op: str
    problem: str
    key: str
    chosen: str
    from_plan: bool
    stock: Timing
    convplan: Timing
    repeats: int
    ratio: float

    @property
    def is_loss(self) -> bool:
        """Slower than stock torch by more than two equal calls differ."""
        return self.ratio < LOSS


class BenchReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that one benchmark run found, with the machine it ran on; the content of its raw file."""

    schema: int
    created: str
    version: str
    environments: tuple[str, ...]
    policy: str
    geometric_mean: float
    losses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]


def compare(
    named: NamedProblem, policy: Policy | None = None, *, seconds: float = 2.0, rounds: int | None = None, seed: int = 0
) -> Comparison:
    """Plan one problem, unless the store holds its plan, then time it against stock torch.

    Args:
        named: what to compare.
        policy: None: the default one.
        seconds: rounds go on until they have taken that long, and for at least `MIN_ROUNDS`.
        rounds: exactly that many, whatever they take.
        seed: of the order inside the rounds.

    Raises:
        NoPlan: nothing runs the problem within the policy.
    """
    import torch

    with torch.no_grad(), _torch_flags(named):
        stock, ours, record = _contenders(named, named.policy(policy or Policy()))
        race = _Race(stock, ours, named.problem.device, seed)
        race.warm_up()
        from_plan = record is not None and _runs_a_ready_plan(ours)
        race.run(seconds, rounds)
    stock_timing, our_timing = race.timings()
    return Comparison(
        name=named.name,
        model=named.model,
        suite=named.suite,
        op=named.op,
        problem=str(named.problem if record is None else record.problem),
        key="" if record is None else record.key,
        chosen="" if record is None else str(record.config),
        from_plan=from_plan,
        stock=stock_timing,
        convplan=our_timing,
        repeats=race.repeats,
        ratio=stock_timing.median_us / our_timing.median_us,
    )


def compare_record(record: PlanRecord, *, seconds: float = 0.5) -> tuple[float, float]:
    """Median microseconds of stock torch and of convplan for a problem that is planned already."""
    named = NamedProblem(
        name=record.key,
        problem=record.problem,
        transposed=record.problem.op == "dgrad" and record.problem.epilogue.bias,
        allow_tf32=bool(record.policy.allow_tf32),
    )
    found = compare(named, record.policy, seconds=seconds)
    return found.stock.median_us, found.convplan.median_us


def bench_report(
    comparisons: Sequence[Comparison], policy: Policy | None = None, *, devices: Iterable[str] = ("cpu",)
) -> BenchReport:
    """Comparisons with what is needed to read them later: machine, versions, policy and the totals."""
    return BenchReport(
        schema=REPORT_SCHEMA,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        version=__version__,
        environments=tuple(str(_environment.current(device)) for device in sorted(set(devices))),
        policy=str(policy or Policy()),
        geometric_mean=geometric_mean(comparison.ratio for comparison in comparisons),
        losses=tuple(comparison.name for comparison in comparisons if comparison.is_loss),
        comparisons=tuple(comparisons),
    )


def geometric_mean(ratios: Iterable[float]) -> float:
    """The factor by which a typical problem is faster; 1 when there is none."""
    values = tuple(ratios)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else 1.0


# ---- the race


class _Side(NamedTuple):
    """One way to compute the problem: the call in words, the call, and what is active around it."""

    wording: str
    call: Call
    active: Callable[[], AbstractContextManager[object]]


class _Race:
    """Samples of both sides in shuffled rounds."""

    def __init__(self, stock: _Side, ours: _Side, device: str, seed: int) -> None:
        self.repeats = 1
        self._slow = False
        self._sides = (stock, ours)
        self._samples: tuple[list[float], list[float]] = ([], [])
        self._order = [0, 1]
        self._random = random.Random(seed)
        self._synchronize = _synchronizer(device)

    def warm_up(self) -> None:
        """Run each side a few times, and settle by the faster one how many calls make a sample."""
        first_us = [self._sample(side) for side in self._sides]
        self._slow = max(first_us) > SLOW_US
        again_us = first_us if self._slow else [self._sample(side) for side in self._sides]
        fastest_us = min(*first_us, *again_us)
        if self._slow:
            return
        self.repeats = min(max(math.ceil(MIN_SAMPLE_US / max(fastest_us, 1e-3)), 1), MAX_REPEATS)

    def run(self, seconds: float, rounds: int | None) -> None:
        """`rounds` of them, or as many as fit into `seconds`."""
        end = time.perf_counter() + seconds
        least = SLOW_ROUNDS if self._slow else MIN_ROUNDS
        with _garbage_collection_off():
            for done in range(MAX_ROUNDS if rounds is None else rounds):
                if rounds is None and done >= least and time.perf_counter() >= end:
                    break
                self._random.shuffle(self._order)
                for index in self._order:
                    self._samples[index].append(self._sample(self._sides[index]))

    def timings(self) -> list[Timing]:
        """Both sides' times, stock torch first."""
        return [
            Timing(side.wording, statistics.median(samples), half_interquartile_range(samples), tuple(samples))
            for side, samples in zip(self._sides, self._samples, strict=True)
        ]

    def _sample(self, side: _Side) -> float:
        """Microseconds per call. A few calls go untimed before, unless they are slow."""
        call = side.call
        with side.active():
            for _ in range(0 if self._slow else SETTLING_CALLS):
                call()
            self._synchronize()
            begin = time.perf_counter_ns()
            for _ in range(self.repeats):
                call()
            self._synchronize()
            return (time.perf_counter_ns() - begin) / 1e3 / self.repeats


def _runs_a_ready_plan(side: _Side) -> bool:
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


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _synchronizer(device: str) -> Call:
    if device != "cuda":
        return lambda: None
    import torch

    return torch.cuda.synchronize


@contextmanager
def _torch_flags(named: NamedProblem) -> Iterator[None]:
    """Torch's flags on a GPU: TF32 as the problem says, and torch's own search. Scoped, since they can be frozen."""
    import torch

    if named.problem.device != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=named.allow_tf32):
        yield


# ---- the calls


def _contenders(named: NamedProblem, policy: Policy) -> tuple[_Side, _Side, PlanRecord | None]:
    """Stock torch, convplan, and the record that convplan's calls run by (None for a problem that is not planned)."""
    import convplan

    tensors = _tensors(named)
    arguments = _arguments(named)
    stock = _Side(*_stock_call(named, arguments, tensors), nullcontext)
    if arguments.pads and named.op != "fprop":
        record = convplan.tune([named.problem], policy=policy)[0]
        run = functools.partial(record.build().run, *_plan_arguments(named, tensors))
        return stock, _Side("Plan.run", run, nullcontext), record
    wording, call = _paired_call(named, tensors, policy) if arguments.pads else (stock.wording, stock.call)
    ours = _Side(wording, call, functools.partial(convplan.enabled, policy))
    # Planned is what the call really asks for, not the file's problem: torch has the last word on layouts.
    with convplan.capture() as asked:
        call()
    wanted = [problem for problem in asked if not problem.is_empty]
    records = convplan.tune(wanted, policy=policy)
    return stock, ours, records[0] if records else None


class _Tensors(NamedTuple):
    """The tensors of the call as its user sees them; the output stands for the gradient that comes in."""

    source: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    bias: torch.Tensor | None


def _tensors(named: NamedProblem) -> _Tensors:
    import torch

    from convplan._inputs import random_inputs
    from convplan.engines._support import empty

    problem, device = named.problem, torch.device(named.problem.device)
    first, second, bias = random_inputs(problem, device)
    written = empty(problem.output, device).zero_()
    x, w, y = {
        "fprop": (first, second, written),
        "dgrad": (written, second, first),
        "wgrad": (first, written, second),
    }[problem.op]
    return _Tensors(y, w, x, bias) if named.transposed else _Tensors(x, w, y, bias)


def _plan_arguments(named: NamedProblem, tensors: _Tensors) -> tuple[torch.Tensor, torch.Tensor]:
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


def _stock_call(named: NamedProblem, arguments: _Arguments, tensors: _Tensors) -> tuple[str, Call]:
    """What a user of stock torch writes for this problem, in words and ready to be called."""
    import torch.nn.functional as F

    name = _function_name(named)
    source, weight, target, bias = tensors
    pads = list(arguments.pads)
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


def _paired_call(named: NamedProblem, tensors: _Tensors, policy: Policy) -> tuple[str, Call]:
    """convplan's own function, whose padding may be pairs."""
    import convplan

    name = _function_name(named)
    call = functools.partial(
        getattr(convplan, name),
        tensors.source,
        tensors.weight,
        tensors.bias,
        **_keywords(named, None),
        policy=policy,
    )
    return f"convplan.{name}", call


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

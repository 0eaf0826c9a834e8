"""What a benchmark run found: comparisons, why a loss is one, and the totals; and a comparison within this process.

`convplan bench` gives each side a process of its own (`_bench_processes`), which is the only fair way to time stock
torch on a GPU. `compare` here is for scripts on the CPU, for problems that are planned already, and for the demo. The
calls themselves are made in `_bench_calls`. Nothing here prints. Racing the candidates of one problem against each
other is planning, and lives in `_measure`.

Rounds are shuffled: in each, every side is sampled once, in random order, so that a drifting clock hits all. A sample
is the mean of as many calls as make it long against the clock's resolution. Entering and leaving `enabled()` and one
call after it stay outside. Garbage is collected before, not during.
"""

from __future__ import annotations

import datetime
import gc
import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from convplan import __version__, _environment
from convplan._bench_calls import Call, Side, contenders, runs_a_ready_plan
from convplan._epilogue import Epilogue
from convplan._measure import half_interquartile_range
from convplan._policy import Policy
from convplan._problem_files import NamedProblem
from convplan._regret import Regret

if TYPE_CHECKING:
    from convplan._plan import PlanRecord

LOSS = 0.98  # stock / convplan below this is a loss
CLEAR_LOSS = 0.97  # below this it is more than what two equal calls on a busy CPU differ by
MIN_ROUNDS = 5
SLOW_US = 500_000.0  # a call this long needs no untimed one before it, and gets fewer rounds
SLOW_ROUNDS = 2
MAX_ROUNDS = 1_000
MIN_SAMPLE_US = 15_000.0  # shorter calls are repeated inside one sample, so that what switching sides costs fades
SETTLING_CALLS = 2  # untimed: switching sides empties caches, ours and the processor's
MAX_REPEATS = 1_000
RESOLUTION_US = 1e-3  # of the clocks; shorter times are taken for that
REPORT_SCHEMA = 2
HOST_CLOCK, GRAPH, EVENTS = "host clock", "CUDA graph", "events around launches"  # how a side can be timed


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One side, in microseconds per call.

    Args:
        call: in words.
        median_us, spread_us: middle and half the interquartile range of the samples.
        samples_us: one for each round.
        how: what timed it, `host clock`, `CUDA graph` or `events around launches`.
        kernels: what the call ran on the GPU, in order; looked up for losses only.
    """

    call: str
    median_us: float
    spread_us: float
    samples_us: tuple[float, ...]
    how: str = HOST_CLOCK
    kernels: tuple[str, ...] = ()

    @classmethod
    def of(cls, call: str, samples_us: Sequence[float], how: str = HOST_CLOCK, kernels: Sequence[str] = ()) -> Timing:
        """A timing of at least one sample."""
        middle, spread = statistics.median(samples_us), half_interquartile_range(samples_us)
        return cls(call, middle, spread, tuple(samples_us), how, tuple(kernels))


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One problem, timed on both sides.

    Args:
        name, model, suite: as the problem file has them.
        op: the operation as the file's author sees it.
        problem: what was computed, in words.
        key: of the plan, empty when none was made.
        chosen: engine and knobs of the plan.
        effort: that found the plan.
        planning_s: seconds that finding it took, when that was; None without a plan.
        from_plan: the calls that were timed ran that plan. False: something else served them, such as stock torch for
            a problem that convplan does not plan.
        stock_as_is: the plan is nothing but stock torch's own call.
        stock, convplan: the two sides.
        compiled: torch.compile, where it was asked for and applies.
        repeats: calls in one sample, or on a GPU replays of a graph.
        ratio: stock's median over convplan's; above 1 convplan is faster.
        paired_ratio, paired_spread: median and half interquartile range of the same ratio taken inside each round,
            between neighbours in time.
        regret: how much better convplan could have chosen, where that was asked for.
    """

    name: str
    model: str
    suite: str
    op: str
    problem: str
    key: str = ""
    chosen: str = ""
    effort: str = ""
    planning_s: float | None = None
    from_plan: bool
    stock_as_is: bool = False
    stock: Timing
    convplan: Timing
    compiled: Timing | None = None
    repeats: int
    ratio: float
    paired_ratio: float
    paired_spread: float
    regret: Regret | None = None

    @property
    def is_loss(self) -> bool:
        """Slower than stock torch."""
        return self.ratio < LOSS

    @property
    def reason(self) -> str:
        """Why convplan was slower, as far as the data tells; empty when it was not."""
        if self.ratio >= 1:
            return ""
        if not self.from_plan:
            return "not run by a plan"
        if self.stock_as_is:
            return "same kernel on both sides: the plan is stock torch's own call"
        if self.stock.kernels and self.stock.kernels == self.convplan.kernels:
            return "same kernel on both sides"
        if 1 - self.paired_ratio <= self.paired_spread:
            return "spread larger than the difference"
        if self.stock.how != self.convplan.how:
            return f"timed differently: stock torch by {self.stock.how}, convplan by {self.convplan.how}"
        return "really slower"


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A problem that could not be compared: which side failed (`stock`, `convplan` or `compile`), and how.

    When that was `compile`, the other two were compared all the same.
    """

    name: str
    suite: str
    side: str
    error: str


class Total(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all problems of one suite come to; suite `all` is every problem."""

    suite: str
    problems: int
    geometric_mean: float
    worst: float
    below_0_98: int
    below_0_97: int
    geometric_mean_compiled: float | None = None  # torch.compile over convplan, where both ran


class BenchReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that one benchmark run found, with the machine it ran on; the content of its raw file."""

    schema: int
    created: str
    version: str
    environments: tuple[str, ...]
    policy: str
    stock: str = ""  # how stock torch was set
    geometric_mean: float
    losses: tuple[str, ...]
    totals: tuple[Total, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...] = ()


def comparison(
    named: NamedProblem, stock: Timing, ours: Timing, *, repeats: int, problem: str, from_plan: bool, **known: Any
) -> Comparison:
    """Both sides' timings of one problem, whose samples are of the same rounds, with their ratios."""
    pairs = [_ratio(one, other) for one, other in zip(stock.samples_us, ours.samples_us, strict=True)]
    return Comparison(
        name=named.name,
        model=named.model,
        suite=named.suite,
        op=named.op,
        problem=problem,
        from_plan=from_plan,
        stock=stock,
        convplan=ours,
        repeats=repeats,
        ratio=_ratio(stock.median_us, ours.median_us),
        paired_ratio=statistics.median(pairs),
        paired_spread=half_interquartile_range(pairs),
        **known,
    )


def _ratio(stock_us: float, convplan_us: float) -> float:
    """Above 1 convplan is faster. What an empty problem runs on a GPU can take no time at all."""
    return max(stock_us, RESOLUTION_US) / max(convplan_us, RESOLUTION_US)


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
        stock, ours, record = contenders(named, named.policy(policy or Policy()))
        race = _Race(stock, ours, named.problem.device, seed)
        race.warm_up()
        from_plan = record is not None and runs_a_ready_plan(ours)
        race.run(seconds, rounds)
    stock_timing, our_timing = race.timings()
    known = {} if record is None else plan_facts(record)
    return comparison(
        named,
        stock_timing,
        our_timing,
        repeats=race.repeats,
        problem=str(named.problem if record is None else record.problem),
        from_plan=from_plan,
        **known,
    )


def plan_facts(record: PlanRecord) -> dict[str, Any]:
    """What a comparison says of a plan."""
    return {
        "key": record.key,
        "chosen": str(record.config),
        "effort": record.effort,
        "planning_s": record.planning_s,
        "stock_as_is": bool(record.build().as_torch),
    }


def compare_record(record: PlanRecord, *, seconds: float = 0.5) -> tuple[float, float]:
    """Median microseconds of stock torch and of convplan for a problem that is planned already."""
    named = NamedProblem(
        name=record.key,
        problem=record.problem,
        transposed=record.problem.op == "dgrad" and record.problem.epilogue != Epilogue(),
        allow_tf32=bool(record.policy.allow_tf32),
    )
    found = compare(named, record.policy, seconds=seconds)
    return found.stock.median_us, found.convplan.median_us


def bench_report(
    comparisons: Sequence[Comparison],
    policy: Policy | None = None,
    *,
    failures: Sequence[Failure] = (),
    environments: Iterable[str] | None = None,
    stock: str = "",
) -> BenchReport:
    """Comparisons with what is needed to read them later: machine, versions, policy and the totals.

    Args:
        comparisons: of one run.
        policy: that they were planned by. None: the default one.
        failures: what could not be compared.
        environments: of the processes that ran them, in words. None: this one's, on the CPU.
        stock: how stock torch was set, in words.
    """
    suites = sorted({one.suite for one in comparisons})
    totals = [_total(suite, [one for one in comparisons if one.suite == suite]) for suite in suites if len(suites) > 1]
    return BenchReport(
        schema=REPORT_SCHEMA,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        version=__version__,
        environments=(str(_environment.current("cpu")),) if environments is None else tuple(sorted(set(environments))),
        policy=str(policy or Policy()),
        stock=stock,
        geometric_mean=geometric_mean(one.ratio for one in comparisons),
        losses=tuple(one.name for one in comparisons if one.is_loss),
        totals=(*totals, _total("all", comparisons)),
        comparisons=tuple(comparisons),
        failures=tuple(failures),
    )


def _total(suite: str, comparisons: Sequence[Comparison]) -> Total:
    ratios = [one.ratio for one in comparisons]
    compiled = [
        _ratio(one.compiled.median_us, one.convplan.median_us) for one in comparisons if one.compiled is not None
    ]
    return Total(
        suite=suite,
        problems=len(ratios),
        geometric_mean=geometric_mean(ratios),
        worst=min(ratios, default=1.0),
        below_0_98=sum(ratio < LOSS for ratio in ratios),
        below_0_97=sum(ratio < CLEAR_LOSS for ratio in ratios),
        geometric_mean_compiled=geometric_mean(compiled) if compiled else None,
    )


def geometric_mean(ratios: Iterable[float]) -> float:
    """The factor by which a typical problem is faster; 1 when there is none."""
    values = tuple(ratios)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else 1.0


# ---- the race


class _Race:
    """Samples of both sides in shuffled rounds."""

    def __init__(self, stock: Side, ours: Side, device: str, seed: int) -> None:
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
        pairs = zip(self._sides, self._samples, strict=True)
        return [Timing.of(side.wording, samples) for side, samples in pairs]

    def _sample(self, side: Side) -> float:
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

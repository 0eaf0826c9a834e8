"""How good is the choice? A problem is tuned several times anew, and every choice is raced against the best there is.

Regret is a choice's time over that of the best candidate found by anyone: 1.00 is a perfect choice. It is measured in
one long race of all distinct choices and the candidates that any of the tunings ranked high, in which nobody is cut off
or rests, because the times themselves are the answer. Nothing here reads or writes the store, or changes what the
process remembers. Choosing is planning's business; this only looks at what it chose.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from convplan._errors import ConvPlanError, PlanRejected, SpecError
from convplan._measure import Clock, half_interquartile_range
from convplan._plan import PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem
from convplan.engines.base import EngineConfig

if TYPE_CHECKING:
    from convplan._measure_cuda import GraphTimer

Call = Callable[[], object]

REPEATS = 8  # tunings
RACED = 8  # candidates in the long race beside the choices
MIN_ROUNDS, MAX_ROUNDS = 12, 1_000
MIN_SAMPLE_US = 1_000.0  # on the host's clock; a GPU's timer knows for itself


class Raced(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One candidate of the long race.

    Args:
        config: engine and knobs.
        chosen: by how many of the tunings.
        median_us, spread_us, samples_us: middle, half the interquartile range, and all of its samples.
        over_best: its median over the smallest.
    """

    config: EngineConfig
    chosen: int
    median_us: float
    spread_us: float
    samples_us: tuple[float, ...]
    over_best: float


class Regret(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What several tunings of one problem chose, and what that cost.

    Args:
        problem: in words.
        regrets: of each tuning's choice, in the order of the tunings; 1 is the best.
        median, worst: of those.
        planning_s: seconds of each tuning.
        race: the long race, fastest first.
    """

    problem: str
    regrets: tuple[float, ...]
    median: float
    worst: float
    planning_s: tuple[float, ...]
    race: tuple[Raced, ...]


def measure_regret(
    problem: Problem, policy: Policy | None = None, *, repeats: int = REPEATS, seconds: float = 2.0, raced: int = RACED
) -> Regret:
    """Tune a problem anew several times and say how good each choice was.

    Args:
        problem: what to compute; not empty.
        policy: the rules and the effort; flags that are None follow torch's.
        repeats: tunings.
        seconds: the long race; at least `MIN_ROUNDS` rounds are run.
        raced: candidates of the race beside the choices, the best-ranked of all tunings.

    Raises:
        NoPlan: nothing runs the problem within the policy. SpecError: `repeats` is below 1.
    """
    import torch

    with torch.no_grad():
        records = tunings(problem, policy or Policy(), repeats)
        return regret_of(records, seconds=seconds, raced=raced)


def tunings(
    problem: Problem, policy: Policy, repeats: int = REPEATS, *, clock: Clock = time.perf_counter_ns
) -> list[PlanRecord]:
    """The records of so many plannings in a row, none of which knows of another.

    Raises:
        NoPlan: nothing runs the problem. SpecError: `repeats` is below 1.
    """
    from convplan import _environment
    from convplan._planner import plan_problem

    if repeats < 1:
        raise SpecError(f"repeats is {repeats}, expected at least 1 tuning")
    resolved, environment = policy.resolve(), _environment.current(problem.device)
    return [plan_problem(problem, resolved, environment, clock=clock) for _ in range(repeats)]


def regret_of(
    records: Sequence[PlanRecord],
    *,
    seconds: float = 2.0,
    raced: int = RACED,
    clock: Clock = time.perf_counter_ns,
    seed: int = 0,
) -> Regret:
    """Race what these tunings of one problem chose, and what they ranked high, against each other.

    Args:
        records: of one problem and policy, on this machine.
        seconds, raced: as in `measure_regret`.
        clock: nanoseconds; a virtual one in tests. GPUs are timed by their own.
        seed: of the order inside the rounds.

    Raises:
        PlanRejected: a choice does not build any more.
    """
    import torch

    from convplan._inputs import random_inputs

    first = records[0]
    problem, chosen = first.problem, [record.config for record in records]
    with torch.no_grad():
        inputs = random_inputs(problem, torch.device(problem.device))
        calls = _calls(records, _contestants(records, raced), lambda run: lambda: inputs.given_to(run))
        timer = _timer(problem, clock)
        samples = _race(calls, timer, seconds, seed)
    medians = {config: statistics.median(times) for config, times in samples.items()}
    best_us = min(medians.values())
    regrets = [medians[config] / best_us for config in chosen]
    return Regret(
        problem=str(problem),
        regrets=tuple(regrets),
        median=statistics.median(regrets),
        worst=max(regrets),
        planning_s=tuple(record.planning_s for record in records),
        race=tuple(
            Raced(
                config=config,
                chosen=chosen.count(config),
                median_us=medians[config],
                spread_us=half_interquartile_range(samples[config]),
                samples_us=tuple(samples[config]),
                over_best=medians[config] / best_us,
            )
            for config in sorted(medians, key=lambda config: medians[config])
        ),
    )


def _contestants(records: Sequence[PlanRecord], raced: int) -> list[EngineConfig]:
    """Every distinct choice, and the best-ranked others by the smallest time that any tuning gave them."""
    choices = dict.fromkeys(record.config for record in records)
    times: dict[EngineConfig, float] = {}
    for record in records:
        for evidence in record.ranking:
            if evidence.median_us is not None:
                times[evidence.config] = min(evidence.median_us, times.get(evidence.config, math.inf))
    others = [config for config in sorted(times, key=lambda config: times[config]) if config not in choices]
    return [*choices, *others[: max(raced, 0)]]


def _calls(
    records: Sequence[PlanRecord], configs: Sequence[EngineConfig], bind: Callable[..., Call]
) -> dict[EngineConfig, Call]:
    """Each contestant ready to be called; one that nobody chose and that does not build any more stays out."""
    choices = {record.config for record in records}
    ranks = {e.config: (record, rank) for record in records for rank, e in enumerate(record.ranking)}
    calls = {}
    for config in configs:
        record, rank = ranks[config]
        try:
            call = bind(record.build(rank).unchecked_run)
            call()  # one-time work
        except (ConvPlanError, RuntimeError) as exc:
            if config in choices:
                raise PlanRejected(engine=config.engine, config=str(config), reason=f"it ran before: {exc}") from exc
            continue
        calls[config] = call
    return calls


def _race(
    calls: Mapping[EngineConfig, Call], timer: _HostTimer | GraphTimer, seconds: float, seed: int
) -> dict[EngineConfig, list[float]]:
    order, shuffle = list(calls), random.Random(seed).shuffle
    samples: dict[EngineConfig, list[float]] = {config: [] for config in order}
    repeats = {config: timer.repeats(timer.sample_us(call, 1)) for config, call in _probes(calls).items()}
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        end = timer.clock() + seconds * 1e9
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and timer.clock() >= end:
                break
            shuffle(order)
            found = timer.round_us([(calls[config], repeats[config]) for config in order])
            for config, sample in zip(order, found, strict=True):
                if isinstance(sample, Exception):
                    raise sample
                samples[config].append(sample)
    finally:
        if was_on:
            gc.enable()
    return samples


def _probes(calls: Mapping[EngineConfig, Call]) -> dict[EngineConfig, Call]:
    """Calls of their own for a first look: a GPU's timer keeps the number of launches that a call began with."""
    return {config: lambda call=call: call() for config, call in calls.items()}  # type: ignore[misc]


class _HostTimer:
    """Samples by the host's clock, for calls that return when the work is done."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def repeats(self, first_us: float) -> int:
        return max(1, math.ceil(MIN_SAMPLE_US / max(first_us, 1.0)))

    def round_us(self, calls: Sequence[tuple[Call, int]]) -> list[float | Exception]:
        return [self.sample_us(call, repeats) for call, repeats in calls]

    def sample_us(self, call: Call, repeats: int) -> float:
        begin = self.clock()
        for _ in range(repeats):
            call()
        return (self.clock() - begin) / 1e3 / repeats


def _timer(problem: Problem, clock: Clock) -> _HostTimer | GraphTimer:
    if problem.device != "cuda":
        return _HostTimer(clock)
    import torch

    from convplan._measure_cuda import GraphTimer

    return GraphTimer(torch.device("cuda", torch.cuda.current_device()))

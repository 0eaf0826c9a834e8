"""How long does each candidate take, and which is fastest? A race in shuffled rounds. Knows nothing of convolutions.

Shuffled inside every round: timing A A A B B B lets clock drift look like a difference between A and B. Differences are
taken inside a round, between runs that were neighbours in time, so drift cancels. A candidate leaves the race once it
is surely slower than the leader; the race ends when the leader is alone, or the budget or the most useful number of
rounds is spent.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from convplan._errors import PlanRejected
from convplan.engines.base import EngineConfig

Clock = Callable[[], int]
"""Nanoseconds on a clock that only goes forward."""

CUTOFF = 3.0  # times the best so far: no candidate that slow wins by luck
MIN_ROUNDS = 8  # before anything is concluded
MAX_ROUNDS = 60
MIN_SAMPLE_US = 100.0  # shorter runs are repeated inside one sample, so that the clock's own cost disappears
SURE = 4.0  # standard errors between two candidates that count as separated
UNKNOWN_SPREAD = 0.05  # share of the leader's time that samples are taken to scatter by when they are few
TIE = 0.01  # share of the best time within which candidates are equal, however precisely they were timed


class Contestant(NamedTuple):
    """One candidate at the start line: what to call, and one earlier run's time in microseconds."""

    config: EngineConfig
    call: Callable[[], object]
    first_us: float


class Measurement(NamedTuple):
    """Times of one candidate in microseconds: every sample, their median, and half their interquartile range."""

    config: EngineConfig
    median_us: float
    spread_us: float
    samples_us: tuple[float, ...]
    behind_us: float  # median of its differences from the leader inside each round; 0 for the leader
    behind_error_us: float  # standard error of that median

    def ties_with_leader(self, leader_us: float) -> bool:
        """Not surely slower than the leader, or by less than is worth telling apart."""
        return self.behind_us <= max(SURE * self.behind_error_us, TIE * leader_us)


class Slower(NamedTuple):
    """A candidate that was cut off before the race, or failed in it."""

    config: EngineConfig
    reason: str


def race(
    contestants: Sequence[Contestant],
    *,
    budget_s: float,
    clock: Clock = time.perf_counter_ns,
    seed: int = 0,
    synchronize: Callable[[], object] | None = None,
    timer: Timer | None = None,
) -> tuple[list[Measurement], list[Slower]]:
    """Time the contestants against each other.

    Args:
        contestants: in the engines' order, each already run once.
        budget_s: seconds the race may take; at least one round is always finished.
        clock: nanoseconds; a virtual one in tests.
        seed: of the shuffles.
        synchronize: waits for the device to finish; None where calls return when the work is done.
        timer: takes the samples instead, with a clock of its own; None: the host's clock.

    Returns:
        Measurements, fastest first, and those that were cut off or raised while timed, with the reason.
    """
    with _garbage_collection_off():
        return _Race(contestants, timer or _HostTimer(clock, synchronize), budget_s, seed).run()


class Timer(Protocol):
    """Takes samples: how many calls make one, and microseconds a call."""

    clock: Clock

    def repeats(self, first_us: float) -> int:
        """Calls in one sample, from one earlier call's time."""

    def sample_us(self, call: Callable[[], object], repeats: int) -> float:
        """Mean microseconds of so many calls."""


class _HostTimer:
    def __init__(self, clock: Clock, synchronize: Callable[[], object] | None) -> None:
        self.clock = clock
        self._synchronize = synchronize

    def repeats(self, first_us: float) -> int:
        return max(1, math.ceil(MIN_SAMPLE_US / max(first_us, 1.0)))

    def sample_us(self, call: Callable[[], object], repeats: int) -> float:
        if self._synchronize is not None:
            self._synchronize()
        begin = self.clock()
        for _ in range(repeats):
            call()
        if self._synchronize is not None:
            self._synchronize()
        return (self.clock() - begin) / 1e3 / repeats


class _Race:
    def __init__(self, contestants: Sequence[Contestant], timer: Timer, budget_s: float, seed: int) -> None:
        self._all = list(contestants)
        self._timer = timer
        self._budget_us = budget_s * 1e6
        self._random = random.Random(seed)
        self._samples: dict[EngineConfig, dict[int, float]] = {}
        self._slower: list[Slower] = []

    def run(self) -> tuple[list[Measurement], list[Slower]]:
        running = self._cut_off(self._all)
        begin = self._timer.clock()
        repeats = {c.config: self._timer.repeats(c.first_us) for c in running}
        for round_number in range(MAX_ROUNDS):
            self._random.shuffle(running)
            for contestant in tuple(running):
                sample = self._sample(contestant, repeats[contestant.config])
                if sample is None:
                    running.remove(contestant)
                else:
                    self._samples.setdefault(contestant.config, {})[round_number] = sample
            if not running:
                break
            if round_number == 0:
                running = self._cut_off_again(running)
            elif round_number + 1 >= MIN_ROUNDS:
                running = self._drop_the_beaten(running)
            if len(running) <= 1 and round_number + 1 >= MIN_ROUNDS:
                break
            if (self._timer.clock() - begin) / 1e3 >= self._budget_us:
                break
        return self._ranked(), self._slower

    def _sample(self, contestant: Contestant, repeats: int) -> float | None:
        try:
            return self._timer.sample_us(contestant.call, repeats)
        except Exception as exc:  # one candidate's failure must not end the race of the others
            self._samples.pop(contestant.config, None)
            reason = exc.reason if isinstance(exc, PlanRejected) else f"{type(exc).__name__}: {first_line(exc)}"
            self._slower.append(Slower(contestant.config, f"failed while timed: {reason}"))
            return None

    def _cut_off(self, contestants: Sequence[Contestant]) -> list[Contestant]:
        """Leave out what one run showed to be hopeless."""
        best = min((c.first_us for c in contestants), default=0.0)
        return self._split(contestants, {c.config: c.first_us for c in contestants}, best)

    def _cut_off_again(self, running: Sequence[Contestant]) -> list[Contestant]:
        """The same after the first round, whose times hold no first-call work."""
        times = {c.config: self._samples[c.config][0] for c in running}
        kept = self._split(running, times, min(times.values(), default=0.0))
        for contestant in running:
            if contestant not in kept:
                del self._samples[contestant.config]
        return kept

    def _split(
        self, contestants: Sequence[Contestant], times_us: dict[EngineConfig, float], best_us: float
    ) -> list[Contestant]:
        kept = []
        for contestant in contestants:
            time_us = times_us[contestant.config]
            if time_us <= CUTOFF * best_us:
                kept.append(contestant)
            else:
                times = f", {time_us / best_us:.1f} x the best" if best_us > 0 else ""
                reason = f"cut off: {time_us:.1f} us{times}"
                self._slower.append(Slower(contestant.config, reason))
        return kept

    def _drop_the_beaten(self, running: list[Contestant]) -> list[Contestant]:
        """Those surely slower than the leader by more than a tie rest; what they ran so far is kept."""
        leader, leader_us = self._leader()
        kept = []
        for contestant in running:
            measured = self._measurement(contestant.config, leader)
            if contestant.config == leader or self._undecided(measured, leader_us):
                kept.append(contestant)
        return kept

    def _undecided(self, measured: Measurement, leader_us: float) -> bool:
        error = SURE * measured.behind_error_us
        if measured.behind_us + error < TIE * leader_us:
            return len(measured.samples_us) < 2 * MIN_ROUNDS  # surely a tie: more rounds cannot change the choice
        return measured.behind_us - error < TIE * leader_us

    def _leader(self) -> tuple[EngineConfig, float]:
        medians = {config: statistics.median(times.values()) for config, times in self._samples.items()}
        leader = min(medians, key=lambda config: medians[config])
        return leader, medians[leader]

    def _measurement(self, config: EngineConfig, leader: EngineConfig) -> Measurement:
        times, reference = self._samples[config], self._samples[leader]
        behind = [times[i] - reference[i] for i in times if i in reference]
        spread = half_interquartile_range(behind)
        if len(behind) < MIN_ROUNDS:  # too few to know their own spread
            spread = max(spread, UNKNOWN_SPREAD * statistics.median(reference.values()))
        # The median of n normal samples has 1.25 times the mean's standard error; half the IQR is 0.674 sigma.
        error = 1.25 * (spread / 0.674) / math.sqrt(len(behind)) if behind else math.inf
        return Measurement(
            config=config,
            median_us=statistics.median(times.values()),
            spread_us=half_interquartile_range(list(times.values())),
            samples_us=tuple(round(value, 3) for value in times.values()),
            behind_us=statistics.median(behind) if behind else math.inf,
            behind_error_us=error,
        )

    def _ranked(self) -> list[Measurement]:
        if not self._samples:
            return []
        leader, _ = self._leader()
        return sorted((self._measurement(config, leader) for config in self._samples), key=lambda m: m.median_us)


def half_interquartile_range(samples: Sequence[float]) -> float:
    """Half the distance between the first and the third quartile; 0 for fewer than two samples."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2


def first_line(exc: BaseException) -> str:
    """The first line of an exception's text, short enough for a table."""
    lines = str(exc).strip().splitlines()
    return lines[0][:300] if lines else "no message"


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

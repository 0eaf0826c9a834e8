"""How long does each candidate take, and which is fastest? A race in shuffled rounds. Knows nothing of convolutions.

Shuffled inside every round: timing A A A B B B lets clock drift look like a difference between A and B. Differences are
taken inside a round, between runs that were neighbours in time, so drift cancels. A candidate leaves the race once it
is surely slower than the leader; the race ends when the leader is alone, or the budget or the most useful number of
rounds is spent.

Where clocks are not ours to keep (a GPU's), the first run of a round is taken once more at its end, and a round in
which the two differ is repeated. Long runs there load the card until its power limit lowers the clocks, which does not
hit all candidates alike; so those near the front meet once more in a final, after enough of that load, which decides.
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
DRIFT = 0.03  # share by which a run may differ from the same one at the end of its round
MOST_REPEATED = 8  # rounds of one race; a clock that never rests must not make it endless
FINAL_FROM_US = 80.0  # runs this long load a GPU to its limits
NEAR = 0.05  # share of the leader's time within which candidates reach the final
FINALISTS = 6
LOAD_S = 0.25  # of running before the final counts
FINAL_ROUNDS = 24
FAR = 1.15  # times the leader after a few rounds: who is that far behind on a device that is timed precisely, stays so
FEW_ROUNDS = 3
PRECISE_TIE = 0.005  # as `TIE`, where samples scatter by less than that
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
    in_final: bool = False  # timed in the final, under load; its time is not to be compared with that of others
    precise: bool = False  # by a device's own clock

    def ties_with_leader(self, leader_us: float) -> bool:
        """Not surely slower than the leader, or by less than is worth telling apart."""
        if math.isinf(self.behind_us):  # they never met in one round
            return False
        if self.precise:
            return self.behind_us <= PRECISE_TIE * leader_us
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
        Measurements, fastest first (those of a final before all others), and those that were cut off or raised while
        timed, with the reason.
    """
    with _garbage_collection_off():
        return _Race(contestants, timer or _HostTimer(clock, synchronize), budget_s, seed).run()


class Timer(Protocol):
    """Takes samples: how many calls make one, and microseconds a call.

    Attributes:
        clock: nanoseconds, for the budget.
        drifts: samples depend on clocks that change under load.
    """

    clock: Clock
    drifts: bool

    def repeats(self, first_us: float) -> int:
        """Calls in one sample, from one earlier call's time."""

    def round_us(self, calls: Sequence[tuple[Callable[[], object], int]]) -> list[float | Exception]:
        """For each (call, repeats) in turn the mean microseconds of so many calls, or what it raised."""


class _HostTimer:
    drifts = False

    def __init__(self, clock: Clock, synchronize: Callable[[], object] | None) -> None:
        self.clock = clock
        self._synchronize = synchronize

    def repeats(self, first_us: float) -> int:
        return max(1, math.ceil(MIN_SAMPLE_US / max(first_us, 1.0)))

    def round_us(self, calls: Sequence[tuple[Callable[[], object], int]]) -> list[float | Exception]:
        return [self._sampled(*one) for one in calls]

    def _sampled(self, call: Callable[[], object], repeats: int) -> float | Exception:
        try:
            return self._sample_us(call, repeats)
        except Exception as exc:  # the others go on
            return exc

    def _sample_us(self, call: Callable[[], object], repeats: int) -> float:
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
        self._repeats: dict[EngineConfig, int] = {}
        self._repeated = 0  # rounds
        self._finalists: set[EngineConfig] = set()

    def run(self) -> tuple[list[Measurement], list[Slower]]:
        running = self._cut_off(self._all)
        begin = self._timer.clock()
        self._repeats = {c.config: self._timer.repeats(c.first_us) for c in running}
        for round_number in range(MAX_ROUNDS):
            self._random.shuffle(running)
            running = self._round(running, round_number)
            if not running:
                break
            if round_number == 0:
                running = self._cut_off_again(running)
            elif self._timer.drifts and round_number + 1 == FEW_ROUNDS:
                running = self._drop_the_far(running)
            elif round_number + 1 >= MIN_ROUNDS:
                running = self._drop_the_beaten(running)
            if round_number + 1 >= MIN_ROUNDS and (len(running) <= 1 or len(self._near()) > 1):
                break
            if self._spent_us(begin) >= self._budget_us:
                break
        self._final(begin)
        return self._ranked(), self._slower

    def _spent_us(self, begin: int) -> float:
        return (self._timer.clock() - begin) / 1e3

    def _round(self, running: Sequence[Contestant], number: int) -> list[Contestant]:
        """One sample of each contestant; those that are still in."""
        while True:
            again = self._timer.drifts and number > 0 and len(running) > 1 and self._repeated < MOST_REPEATED
            order = [*running, running[0]] if again else list(running)
            found = self._timer.round_us([(c.call, self._repeats[c.config]) for c in order])
            if again and self._drifted(found[0], found[-1]):
                self._repeated += 1
                continue
            break
        kept = []
        for contestant, sample in zip(running, found, strict=False):
            if isinstance(sample, Exception):
                self._fail(contestant, sample)
            else:
                self._samples.setdefault(contestant.config, {})[number] = sample
                kept.append(contestant)
        return kept

    @staticmethod
    def _drifted(before: float | Exception, after: float | Exception) -> bool:
        if isinstance(before, Exception) or isinstance(after, Exception):
            return False
        return abs(after - before) > DRIFT * min(before, after)

    def _fail(self, contestant: Contestant, exc: Exception) -> None:
        """One candidate's failure must not end the race of the others."""
        self._samples.pop(contestant.config, None)
        reason = exc.reason if isinstance(exc, PlanRejected) else f"{type(exc).__name__}: {first_line(exc)}"
        self._slower.append(Slower(contestant.config, f"failed while timed: {reason}"))

    def _final(self, begin: int) -> None:
        """Those near the leader once more, under load, where runs are long."""
        near = self._near()
        if len(near) < 2 or self._spent_us(begin) >= self._budget_us:
            return
        running = [c for c in self._all if c.config in near[:FINALISTS]]
        loaded_from, calls = self._timer.clock(), [(c.call, self._repeats[c.config]) for c in running]
        while self._spent_us(loaded_from) < min(LOAD_S * 1e6, self._budget_us / 3):
            if all(isinstance(sample, Exception) for sample in self._timer.round_us(calls)):
                break
        short = {c.config: self._samples.pop(c.config) for c in running}
        for number in range(MAX_ROUNDS, MAX_ROUNDS + FINAL_ROUNDS):
            self._random.shuffle(running)
            running = self._round(running, number)
            if not running or (number - MAX_ROUNDS >= MIN_ROUNDS and self._spent_us(begin) >= self._budget_us):
                break
        self._finalists = {config for config in short if config in self._samples}

    def _near(self) -> list[EngineConfig]:
        """Whom the final is between, fastest first; nobody where there is none to come."""
        if not self._timer.drifts or not self._samples:
            return []
        _, leader_us = self._leader()
        medians = {config: statistics.median(times.values()) for config, times in self._samples.items()}
        if leader_us < FINAL_FROM_US:
            return []
        return sorted((c for c in medians if medians[c] <= (1 + NEAR) * leader_us), key=lambda c: medians[c])

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

    def _drop_the_far(self, running: list[Contestant]) -> list[Contestant]:
        """Those far behind rest early, so that the rounds to come are short."""
        _, leader_us = self._leader()
        return [c for c in running if min(self._samples[c.config].values()) <= FAR * leader_us]

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
        eligible = self._finalists or self._samples
        medians = {config: statistics.median(self._samples[config].values()) for config in eligible}
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
            in_final=config in self._finalists,
            precise=self._timer.drifts,
        )

    def _ranked(self) -> list[Measurement]:
        if not self._samples:
            return []
        leader, _ = self._leader()
        found = [self._measurement(config, leader) for config in self._samples]
        return sorted(found, key=lambda m: (bool(self._finalists) and not m.in_final, m.median_us))


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

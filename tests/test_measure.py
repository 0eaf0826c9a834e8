"""The race: order, cut-offs, ending, ties and statistics, on a clock that only the runners move.

Nothing here waits and nothing depends on the machine: a runner takes the time its script says.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convplan._errors import PlanRejected
from convplan._measure import (
    CUTOFF,
    MAX_ROUNDS,
    MIN_ROUNDS,
    MIN_SAMPLE_US,
    TIE,
    Contestant,
    Measurement,
    Slower,
    first_line,
    half_interquartile_range,
    race,
)
from convplan.engines.base import EngineConfig

FOREVER_S = 1e6


class Track:
    """A clock in nanoseconds, and runners that move it and leave their names behind."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.ran: list[str] = []
        self.speed = lambda: 1.0  # how much longer everything takes now

    def clock(self) -> int:
        return self.now_ns

    def runner(
        self, name: str, times_us: float | Iterator[float], first_us: float | None = None, fails_at: int | None = None
    ) -> Contestant:
        """One that takes `times_us` per call, and raises in call number `fails_at`, counted from 1."""
        script = itertools.repeat(times_us) if isinstance(times_us, (int, float)) else times_us
        calls = itertools.count(1)

        def run() -> None:
            self.ran.append(name)
            if next(calls) == fails_at:
                raise RuntimeError(f"{name} stumbled\nand fell")
            self.now_ns += round(next(script) * 1e3 * self.speed())

        if first_us is None:
            assert isinstance(times_us, (int, float))
            first_us = times_us
        return Contestant(EngineConfig(name), run, first_us)

    def race(self, *runners: Contestant, budget_s: float = FOREVER_S, seed: int = 0) -> Result:
        return Result(*race(runners, budget_s=budget_s, clock=self.clock, seed=seed))


class Result:
    """What a race returned, by name."""

    def __init__(self, measured: Sequence[Measurement], slower: Sequence[Slower]) -> None:
        self.order = [m.config.engine for m in measured]
        self.measured = {m.config.engine: m for m in measured}
        self.slower = {s.config.engine: s.reason for s in slower}
        assert len(self.slower) == len(slower)
        assert not set(self.measured) & set(self.slower)

    def rounds(self, name: str) -> int:
        return len(self.measured[name].samples_us)


@pytest.fixture
def track() -> Track:
    return Track()


def noisy(middle_us: float, seed: int, share: float = 0.05) -> Iterator[float]:
    """Times that scatter around a middle."""
    numbers = random.Random(seed)
    while True:
        yield middle_us * (1 + share * numbers.uniform(-1, 1))


# Who takes part


def test_the_fastest_comes_first_with_its_own_times(track: Track) -> None:
    found = track.race(track.runner("b", 300.0), track.runner("a", 200.0), track.runner("c", 250.0))
    assert found.order == ["a", "c", "b"]
    assert {name: m.median_us for name, m in found.measured.items()} == {"a": 200.0, "c": 250.0, "b": 300.0}
    assert {name: m.behind_us for name, m in found.measured.items()} == {"a": 0.0, "c": 50.0, "b": 100.0}
    assert not found.slower


def test_one_slower_than_three_times_the_best_is_cut_off_unrun(track: Track) -> None:
    edge = CUTOFF * 200.0
    found = track.race(track.runner("a", 200.0), track.runner("edge", edge), track.runner("slow", edge + 1))
    assert CUTOFF == 3.0
    assert "slow" not in track.ran
    assert found.slower == {"slow": "cut off: 601.0 us, 3.0 x the best"}
    assert set(found.measured) == {"a", "edge"}


def test_the_first_round_cuts_off_those_whose_one_earlier_run_flattered_them(track: Track) -> None:
    late = track.runner("late", 900.0, first_us=250.0)
    found = track.race(track.runner("a", 200.0), late)
    assert found.slower == {"late": "cut off: 900.0 us, 4.5 x the best"}
    assert track.ran.count("late") == 1


def test_a_first_run_that_was_slow_by_chance_does_not_decide(track: Track) -> None:
    warmed_up = track.runner("warmed up", 100.0, first_us=550.0)
    found = track.race(track.runner("a", 200.0), warmed_up)
    assert found.order[0] == "warmed up"


def test_nobody_and_one(track: Track) -> None:
    assert track.race().order == []
    found = track.race(track.runner("alone", 500.0))
    assert found.order == ["alone"]
    assert found.measured["alone"].median_us == 500.0
    assert found.rounds("alone") == MIN_ROUNDS  # nobody to be told apart from
    assert found.measured["alone"].ties_with_leader(500.0)


# Rounds


def test_every_round_runs_each_once_in_an_order_of_its_own(track: Track) -> None:
    names = "abcdef"
    found = track.race(*(track.runner(name, noisy(200.0, seed), first_us=200.0) for seed, name in enumerate(names)))
    rounds = max(map(found.rounds, names))
    whole = [track.ran[at : at + len(names)] for at in range(0, MIN_ROUNDS * len(names), len(names))]
    assert all(sorted(one) == list(names) for one in whole)
    assert len({tuple(one) for one in whole}) == MIN_ROUNDS
    assert Counter(track.ran) == {name: found.rounds(name) for name in names}
    assert rounds <= MAX_ROUNDS


def test_orders_repeat_with_the_seed_and_change_with_it() -> None:
    def order(seed: int) -> list[str]:
        track = Track()
        track.race(*(track.runner(name, 200.0) for name in "abcde"), seed=seed)
        return track.ran

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_the_callers_list_is_left_in_its_order(track: Track) -> None:
    runners = [track.runner(name, 200.0) for name in "abcdefgh"]
    before = list(runners)
    race(runners, budget_s=FOREVER_S, clock=track.clock)
    assert runners == before


@pytest.mark.parametrize(("call_us", "repeats"), [(1.0, 100), (30.0, 4), (99.0, 2), (100.0, 1), (5000.0, 1)])
def test_short_calls_are_repeated_inside_one_sample(track: Track, call_us: float, repeats: int) -> None:
    found = track.race(track.runner("a", call_us))
    assert repeats * call_us >= MIN_SAMPLE_US
    assert track.ran.count("a") == repeats * found.rounds("a")
    assert found.measured["a"].samples_us == (call_us,) * found.rounds("a")  # still microseconds of one call


def test_a_call_too_short_to_see_is_not_repeated_without_end(track: Track) -> None:
    track.race(track.runner("a", 0.0))
    assert len(track.ran) <= MIN_SAMPLE_US * MAX_ROUNDS


def test_the_device_is_waited_for_on_both_sides_of_a_sample(track: Track) -> None:
    """Calls that only queue work take no time themselves; what is queued is done when it is waited for."""
    queued_us = {"a": 200.0, "b": 300.0}
    pending: list[float] = [10_000.0]  # somebody else's work must not count

    def synchronize() -> None:
        track.now_ns += round(sum(pending) * 1e3)
        pending.clear()

    runners = [
        Contestant(EngineConfig(name), lambda time_us=time_us: pending.append(time_us), time_us)
        for name, time_us in queued_us.items()
    ]
    measured, _ = race(runners, budget_s=FOREVER_S, clock=track.clock, synchronize=synchronize)
    assert {m.config.engine: m.median_us for m in measured} == queued_us


# The end


def test_a_leader_that_is_surely_alone_ends_the_race_early(track: Track) -> None:
    found = track.race(
        track.runner("a", noisy(200.0, 1), first_us=200.0), track.runner("b", noisy(400.0, 2), first_us=400.0)
    )
    assert found.order == ["a", "b"]
    assert found.rounds("a") == MIN_ROUNDS


def test_one_that_is_surely_beaten_rests_while_close_ones_race_on(track: Track) -> None:
    found = track.race(
        track.runner("a", noisy(200.0, 1, 0.1), first_us=200.0),
        track.runner("close", noisy(203.0, 2, 0.1), first_us=203.0),
        track.runner("far", noisy(400.0, 3), first_us=400.0),
    )
    assert found.rounds("far") == MIN_ROUNDS
    assert found.rounds("a") == found.rounds("close") > MIN_ROUNDS
    assert "far" in found.measured  # it keeps its place in the ranking
    assert found.order[-1] == "far"


def test_closer_ones_take_more_rounds(track: Track) -> None:
    def rounds(second_us: float) -> int:
        track = Track()
        runners = (
            track.runner("a", noisy(200.0, 1), first_us=200.0),
            track.runner("b", noisy(second_us, 2), first_us=200.0),
        )
        return track.race(*runners).rounds("a")

    assert rounds(400.0) <= rounds(220.0) <= rounds(206.0) <= MAX_ROUNDS
    assert rounds(400.0) < rounds(206.0)


def test_a_sure_tie_ends_without_running_all_rounds(track: Track) -> None:
    found = track.race(track.runner("a", 200.0), track.runner("b", 200.1))
    assert MIN_ROUNDS < found.rounds("a") <= 2 * MIN_ROUNDS


def test_rounds_have_an_end_when_nothing_is_decided(track: Track) -> None:
    found = track.race(
        track.runner("a", noisy(200.0, 1, 0.5), first_us=200.0), track.runner("b", noisy(200.0, 2, 0.5), first_us=200.0)
    )
    assert found.rounds("a") == found.rounds("b") <= MAX_ROUNDS


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_the_budget_ends_the_race(track: Track, rounds: int) -> None:
    names, time_us = "abcd", 10_000.0
    runners = [track.runner(name, noisy(time_us, seed, 0.4), first_us=time_us) for seed, name in enumerate(names)]
    found = track.race(*runners, budget_s=rounds * len(names) * time_us / 1e6 * 0.99)
    assert all(abs(found.rounds(name) - rounds) <= 1 for name in names)


def test_one_round_is_finished_whatever_the_budget(track: Track) -> None:
    found = track.race(*(track.runner(name, 50_000.0) for name in "abc"), budget_s=1e-9)
    assert Counter(track.ran) == {"a": 1, "b": 1, "c": 1}
    assert set(found.measured) == set("abc")


# Drift and ties


@pytest.mark.behaviour("C5")
@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_slows_down_does_not_separate_equal_candidates(seed: int) -> None:
    track = Track()
    track.speed = lambda: 1 + len(track.ran) / 200  # half a percent with every call, and more than a tie every round
    found = track.race(*(track.runner(name, 200.0) for name in "abcd"), seed=seed)
    leader_us = found.measured[found.order[0]].median_us
    assert all(m.ties_with_leader(leader_us) for m in found.measured.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_slows_down_does_not_hide_a_difference(seed: int) -> None:
    track = Track()
    track.speed = lambda: 1 + len(track.ran) / 50  # the drift of two calls is as large as the difference
    found = track.race(track.runner("slow", 208.0), track.runner("fast", 200.0), seed=seed)
    assert found.order == ["fast", "slow"]
    assert not found.measured["slow"].ties_with_leader(found.measured["fast"].median_us)


@pytest.mark.behaviour("C5")
@pytest.mark.parametrize(("second_us", "tie"), [(200.0, True), (201.0, True), (210.0, False), (300.0, False)])
def test_equal_within_a_percent_is_a_tie_and_more_is_not(track: Track, second_us: float, tie: bool) -> None:
    found = track.race(track.runner("a", 200.0), track.runner("b", second_us))
    assert TIE == 0.01
    assert found.measured["a"].ties_with_leader(200.0)
    assert found.measured["b"].ties_with_leader(200.0) is tie


@pytest.mark.behaviour("C5")
def test_few_rounds_separate_nothing_that_is_close(track: Track) -> None:
    found = track.race(track.runner("a", 200.0), track.runner("b", 220.0), budget_s=1e-9)
    assert found.measured["b"].ties_with_leader(200.0)  # one look at a 10 % difference is no proof
    far = track.race(track.runner("c", 200.0), track.runner("d", 500.0), budget_s=1e-9)
    assert not far.measured["d"].ties_with_leader(200.0)


@pytest.mark.parametrize("seed", range(8))
def test_noise_alone_rarely_separates_equals_and_never_hides_a_clear_difference(seed: int) -> None:
    track = Track()
    runners = [
        track.runner(name, noisy(middle, 100 * seed + number), first_us=middle)
        for number, (name, middle) in enumerate([("a", 200.0), ("same", 200.0), ("slower", 230.0)])
    ]
    found = track.race(*runners)
    leader_us = found.measured[found.order[0]].median_us
    assert found.measured["same"].ties_with_leader(leader_us)
    assert found.measured["a"].ties_with_leader(leader_us)
    assert not found.measured["slower"].ties_with_leader(leader_us)


# One that fails


@pytest.mark.behaviour("B18")
@pytest.mark.parametrize("call", [1, 2, 4, 7])
def test_one_that_raises_while_timed_is_reported_and_the_others_race_on(track: Track, call: int) -> None:
    runners = (
        track.runner("a", noisy(200.0, 1, 0.2), first_us=200.0),
        track.runner("falls", noisy(200.0, 2, 0.2), first_us=200.0, fails_at=call),
        track.runner("b", noisy(200.0, 3, 0.2), first_us=200.0),
    )
    found = track.race(*runners)
    assert found.slower == {"falls": "failed while timed: RuntimeError: falls stumbled"}
    assert track.ran.count("falls") == call
    assert set(found.measured) == {"a", "b"}
    assert found.rounds("a") == found.rounds("b") >= MIN_ROUNDS


def test_a_rejection_is_reported_by_its_reason(track: Track) -> None:
    def refuse() -> None:
        raise PlanRejected(engine="b", config="b[tile=4]", reason="no tile fits")

    found = track.race(track.runner("a", 200.0), Contestant(EngineConfig("b"), refuse, 200.0))
    assert found.slower == {"b": "failed while timed: no tile fits"}


@pytest.mark.parametrize("call", [1, 3, MIN_ROUNDS, MIN_ROUNDS + 1])
def test_all_of_them_may_fail(track: Track, call: int) -> None:
    found = track.race(*(track.runner(name, 200.0, fails_at=call) for name in "ab"))
    assert found.order == []
    assert set(found.slower) == {"a", "b"}


@pytest.mark.parametrize("call", [1, 3, MIN_ROUNDS])
def test_the_only_one_may_fail(track: Track, call: int) -> None:
    found = track.race(track.runner("alone", 200.0, fails_at=call))
    assert found.order == []
    assert found.slower == {"alone": "failed while timed: RuntimeError: alone stumbled"}


def test_a_leader_that_fails_leaves_its_place_to_the_next(track: Track) -> None:
    found = track.race(track.runner("leader", 150.0, fails_at=3), track.runner("b", 200.0), track.runner("c", 300.0))
    assert found.order == ["b", "c"]
    assert found.measured["b"].behind_us == 0.0


def test_a_run_that_took_no_time_at_all_is_no_division_by_zero(track: Track) -> None:
    found = track.race(track.runner("instant", 0.0), track.runner("a", 200.0))
    assert found.order == ["instant"]
    assert list(found.slower) == ["a"]


# Garbage collection


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_collection_rests_during_the_race_only(track: Track, was_on: bool) -> None:
    seen = []
    try:
        gc.enable() if was_on else gc.disable()
        track.race(Contestant(EngineConfig("a"), lambda: seen.append(gc.isenabled()), 200.0))
        after = gc.isenabled()
    finally:
        gc.enable()
    assert set(seen) == {False}
    assert after is was_on


def test_garbage_collection_is_restored_after_an_error(track: Track) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        track.race(Contestant(EngineConfig("a"), interrupted, 200.0))
    assert gc.isenabled()


# Statistics


def test_median_and_spread_are_those_of_the_samples(track: Track) -> None:
    found = track.race(
        *(track.runner(name, noisy(200.0, seed, 0.3), first_us=200.0) for seed, name in enumerate("abc"))
    )
    for measured in found.measured.values():
        assert measured.median_us == pytest.approx(statistics.median(measured.samples_us), abs=1e-3)
        low, high = np.percentile(measured.samples_us, [25, 75])
        assert measured.spread_us == pytest.approx((high - low) / 2, abs=1e-3)
    leader = found.measured[found.order[0]]
    for measured in found.measured.values():
        if len(measured.samples_us) == len(leader.samples_us):
            behind = np.subtract(measured.samples_us, leader.samples_us)
            assert measured.behind_us == pytest.approx(float(np.median(behind)), abs=2e-3)


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=40))
@settings(deadline=None, max_examples=50)
def test_half_interquartile_range_is_numpys(samples: list[float]) -> None:
    low, high = np.percentile(samples, [25, 75])
    assert half_interquartile_range(samples) == pytest.approx((high - low) / 2, rel=1e-9, abs=1e-6)


def test_too_few_samples_have_no_spread() -> None:
    assert half_interquartile_range([]) == half_interquartile_range([3.0]) == 0.0


@pytest.mark.parametrize(
    ("exc", "line"),
    [
        (RuntimeError("first\nsecond"), "first"),
        (RuntimeError("\n\n  indented \nnext"), "indented "),
        (MemoryError(), "no message"),
        (ValueError("x" * 1000), "x" * 300),
    ],
)
def test_first_line_of_an_error(exc: Exception, line: str) -> None:
    assert first_line(exc).strip() == line.strip()


def test_the_real_clock_goes_forward(tmp_path: object) -> None:
    """The default clock on real calls: positive times, and a call that does 20 times the work is not the faster."""

    def work(times: int) -> Callable[[], object]:
        return lambda: sum(range(2_000 * times))

    measured, slower = race(
        [Contestant(EngineConfig("much"), work(20), 0.0 + 500.0), Contestant(EngineConfig("little"), work(1), 500.0)],
        budget_s=0.05,
    )
    assert measured[0].config.engine == "little"
    assert all(m.median_us > 0 for m in measured)
    assert len(measured) + len(slower) == 2

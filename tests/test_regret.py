"""Regret: a measurement that can be trusted chooses the best every time, and one that cannot is found out.

Times are scripted and pass on a clock that only moves when told to.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from helpers.fresh import fresh_process, registered

import convplan
from convplan import PlanRejected, _regret
from convplan._regret import measure_regret, regret_of, tunings
from convplan.engines.fake import FakeCandidate, FakeEngine, VirtualClock

PROBLEM = convplan.Problem.dense("fprop", (1, 2, 5, 5), (2, 2, 3, 3))
POLICY = convplan.Policy(engines=("scripted",), budget_s=0.002)
TIMES_US = (80.0, 50.0, 56.0, 62.0, 60.0, 140.0)


class NoisyClock:
    """Another clock, on which some time that nobody worked for passes with each look at it."""

    def __init__(self, clock: VirtualClock, noise_us: float, seed: int) -> None:
        self._clock = clock
        self._noise_us = noise_us
        self._random = random.Random(seed)
        self._lost_ns = 0

    def __call__(self) -> int:
        self._lost_ns += round(self._random.expovariate(1 / self._noise_us) * 1e3)
        return self._clock() + self._lost_ns


@pytest.fixture
def clock() -> Iterator[VirtualClock]:
    clock = VirtualClock()
    engine = FakeEngine([FakeCandidate(time_us=time) for time in TIMES_US], name="scripted", clock=clock)
    with fresh_process(), registered(engine):
        yield clock


@pytest.mark.behaviour("C5")
def test_a_good_measurement_has_no_regret(clock: VirtualClock) -> None:
    found = regret_of(tunings(PROBLEM, POLICY, 8, clock=clock), seconds=0.001, clock=clock)
    assert found.regrets == (1.0,) * 8
    assert (found.median, found.worst) == (1.0, 1.0)
    best = found.race[0]
    assert (best.config.knob("index"), best.chosen, best.median_us, best.over_best) == (1, 8, 50.0, 1.0)


def test_a_noisy_measurement_is_found_out(clock: VirtualClock) -> None:
    records = tunings(PROBLEM, POLICY, 8, clock=NoisyClock(clock, noise_us=100.0, seed=1))
    assert len({record.config for record in records}) > 1, "noise this large chooses at random"
    found = regret_of(records, seconds=0.001, clock=clock)
    assert found.worst > 1.0
    for record, regret in zip(records, found.regrets, strict=True):
        assert regret == pytest.approx(TIMES_US[record.config.knob("index")] / min(TIMES_US))
    assert found.worst == max(found.regrets)
    assert sum(one.chosen for one in found.race) == 8


def test_candidates_that_nobody_chose_take_part(clock: VirtualClock) -> None:
    """A search that always misses the best would look perfect if only its own choices were compared."""
    records = tunings(PROBLEM, POLICY, 2, clock=clock)
    worse = [_with_first(record, index=3) for record in records]
    found = regret_of(worse, seconds=0.001, clock=clock)
    assert found.regrets == pytest.approx((62 / 50, 62 / 50))
    assert found.race[0].chosen == 0


def _with_first(record: convplan.PlanRecord, index: int) -> convplan.PlanRecord:
    import msgspec

    ranking = sorted(record.ranking, key=lambda evidence: evidence.config.knob("index") != index)
    return msgspec.structs.replace(record, ranking=tuple(ranking))


@pytest.mark.parametrize(("raced", "expected"), [(0, 1), (2, 3), (100, 5)])
def test_so_many_take_part(clock: VirtualClock, raced: int, expected: int) -> None:
    """The slowest is cut off before any race, so it is not ranked."""
    found = regret_of(tunings(PROBLEM, POLICY, 1, clock=clock), seconds=0.0, raced=raced, clock=clock)
    assert len(found.race) in (expected, expected + (raced == 100))
    assert [one.median_us for one in found.race] == sorted(one.median_us for one in found.race)
    assert all(len(one.samples_us) == _regret.MIN_ROUNDS for one in found.race)


@pytest.mark.parametrize("repeats", [0, -1])
def test_no_tuning_has_no_regret(clock: VirtualClock, repeats: int) -> None:
    with pytest.raises(convplan.SpecError, match=f"repeats is {repeats}, expected at least 1"):
        tunings(PROBLEM, POLICY, repeats, clock=clock)


def test_a_choice_that_does_not_build_any_more_is_an_error(clock: VirtualClock) -> None:
    records = tunings(PROBLEM, POLICY, 1, clock=clock)
    with (
        registered(FakeEngine([FakeCandidate(fails="build")] * 6, name="other")),
        pytest.raises(PlanRejected, match="it ran before"),
    ):
        regret_of([_renamed(record, "other") for record in records], clock=clock)


def _renamed(record: convplan.PlanRecord, name: str) -> convplan.PlanRecord:
    import msgspec

    ranking = [
        msgspec.structs.replace(evidence, config=msgspec.structs.replace(evidence.config, engine=name))
        for evidence in record.ranking
    ]
    return msgspec.structs.replace(record, ranking=tuple(ranking))


def test_the_store_and_what_the_process_remembers_stay_as_they_are(clock: VirtualClock) -> None:
    measure_regret(PROBLEM, POLICY, repeats=2, seconds=0.0)
    assert not any(convplan.stats().values())
    with pytest.raises(convplan.ReplayMiss):
        convplan.plan(PROBLEM, POLICY.replace(mode="replay"))

"""The race on a device whose clocks are not ours: drift inside a round, and load that does not hit all alike.

The device is a model: each run takes its time at full clock, or its time under load once the device has been busy for
long enough; nothing waits, and only runs and rests move its clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from convplan._measure import DRIFT, FINAL_FROM_US, LOAD_S, MOST_REPEATED, Contestant, Measurement, race
from convplan.engines.base import EngineConfig

FOREVER_S = 1e6


class Card:
    """A timer: samples are the model's, and the clock is the work done."""

    drifts = True

    def __init__(self, heats_after_s: float = float("inf"), speed: Callable[[int], float] = lambda sample: 1.0) -> None:
        self.now_us = 0.0
        self.samples = 0
        self.rounds: list[list[str]] = []
        self._heats_after_us = heats_after_s * 1e6
        self._speed = speed
        self.loaded_us: dict[str, float] = {}
        self.fails_from_round: dict[str, int] = {}

    def clock(self) -> int:
        return round(self.now_us * 1e3)

    def repeats(self, first_us: float) -> int:
        return 10

    def runner(self, name: str, time_us: float, loaded_us: float | None = None) -> Contestant:
        self.loaded_us[name] = time_us if loaded_us is None else loaded_us

        def run() -> tuple[str, float]:
            return name, time_us

        return Contestant(EngineConfig(name), run, time_us)

    def round_us(self, calls: Sequence[tuple[Callable[[], object], int]]) -> list[float | Exception]:
        found: list[float | Exception] = []
        self.rounds.append([])
        for call, repeats in calls:
            name, time_us = call()  # type: ignore[misc]
            self.rounds[-1].append(name)
            if self.fails_from_round.get(name, len(self.rounds)) < len(self.rounds):
                found.append(RuntimeError(f"{name} is gone"))
                continue
            hot = self.now_us > self._heats_after_us
            took = (self.loaded_us[name] if hot else time_us) * self._speed(self.samples)
            self.samples += 1
            self.now_us += took * repeats
            found.append(took)
        return found

    def race(self, *runners: Contestant, budget_s: float = FOREVER_S) -> dict[str, Measurement]:
        measured, slower = race(runners, budget_s=budget_s, timer=self)
        assert {one.config.engine for one in slower} <= set(self.fails_from_round)
        return {one.config.engine: one for one in measured}


def test_a_round_in_which_the_clock_changed_is_run_again() -> None:
    card = Card(speed=lambda sample: 1.2 if 21 <= sample < 23 else 1.0)
    found = card.race(card.runner("one", 10.0), card.runner("two", 10.2))
    assert {sample for one in found.values() for sample in one.samples_us} == {10.0, 10.2}
    assert [len(names) for names in card.rounds[:2]] == [2, 3], "the first of each round is run again at its end"
    assert all(names[0] == names[-1] for names in card.rounds[1:])


def test_small_changes_are_no_drift() -> None:
    card = Card(speed=lambda sample: 1 + 0.5 * DRIFT * (sample % 2))
    found = card.race(card.runner("one", 10.0), card.runner("two", 12.0))
    assert len(card.rounds) == len(found["one"].samples_us)


def test_a_clock_that_never_rests_does_not_make_the_race_endless() -> None:
    card = Card(speed=lambda sample: 1 + sample % 7)
    found = card.race(card.runner("one", 10.0), card.runner("two", 10.0))
    rounds = max(len(one.samples_us) for one in found.values())
    assert len(card.rounds) <= rounds + MOST_REPEATED


@pytest.mark.behaviour("C5")
def test_long_runs_are_judged_under_load() -> None:
    """The one that is faster on a card at rest is slower on one that has reached its limit."""
    card = Card(heats_after_s=0.5 * LOAD_S)
    found = card.race(card.runner("sprinter", 400.0, 430.0), card.runner("stayer", 408.0, 412.0))
    assert list(found) == ["stayer", "sprinter"]
    assert set(found["stayer"].samples_us) == {412.0}, "what was timed before the load does not count"
    assert found["stayer"].in_final
    assert found["sprinter"].behind_us == pytest.approx(18.0)


def test_those_out_of_the_final_come_after_it_whatever_their_time_at_rest() -> None:
    card = Card(heats_after_s=0.5 * LOAD_S)
    runners = [card.runner("one", 400.0, 480.0), card.runner("two", 404.0, 482.0), card.runner("three", 440.0, 520.0)]
    found = card.race(*runners)
    assert list(found) == ["one", "two", "three"]
    assert found["three"].median_us == 440.0
    assert not found["three"].in_final
    assert not found["three"].ties_with_leader(480.0)


def test_short_runs_have_no_final() -> None:
    card = Card()
    found = card.race(card.runner("one", FINAL_FROM_US / 2), card.runner("two", FINAL_FROM_US / 2 * 1.01))
    assert not any(one.in_final for one in found.values())


def test_one_alone_at_the_front_has_no_final() -> None:
    card = Card()
    found = card.race(card.runner("one", 400.0), card.runner("two", 500.0))
    assert not any(one.in_final for one in found.values())


def test_a_spent_budget_leaves_no_final() -> None:
    card = Card()
    found = card.race(card.runner("one", 400.0), card.runner("two", 401.0), budget_s=0.01)
    assert not any(one.in_final for one in found.values())


def test_one_that_fails_in_the_final_is_out() -> None:
    card = Card()
    runners = [card.runner("one", 400.0), card.runner("two", 404.0), card.runner("three", 408.0)]
    card.fails_from_round["one"] = 30
    found = card.race(*runners)
    assert list(found) == ["two", "three"]


def test_all_may_fail_in_the_final() -> None:
    card = Card()
    runners = [card.runner("one", 400.0), card.runner("two", 404.0), card.runner("far", 480.0)]
    card.fails_from_round |= {"one": 30, "two": 30}
    assert list(card.race(*runners)) == ["far"]

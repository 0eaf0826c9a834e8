"""Where exhaustive search looks next: on made-up engines, with nothing built and nothing timed."""

from __future__ import annotations

import itertools
import statistics

import pytest
from helpers.landscapes import SHAPES, Landscape, RandomSearch, regret_after, tries_until

from convplan import EngineConfig
from convplan._walk import BARREN, Walk
from convplan.engines.base import Space

SEEDS = 20


@pytest.mark.behaviour("C4")
@pytest.mark.parametrize("shape", ["two-engines", "three-engines"])
def test_it_finds_a_configuration_within_two_percent_of_the_best_sooner_than_chance(shape: str) -> None:
    lands = [Landscape(shape, seed) for seed in range(SEEDS)]
    walked = [tries_until(Walk, land, seed, at_most=400) for seed, land in enumerate(lands)]
    drawn = [tries_until(RandomSearch, land, seed) for seed, land in enumerate(lands)]
    assert statistics.median(walked) <= statistics.median(drawn)
    assert statistics.median(walked) < 100  # chance needs several hundred
    assert max(walked) < 400  # every time, not only in the middle


def test_random_search_finds_the_best_when_it_tries_everything() -> None:
    land = Landscape("two-engines", 0)
    assert regret_after(RandomSearch, land, 0, 2_000) == 1.0


def test_the_same_seed_looks_at_the_same_places() -> None:
    land = Landscape("many-engines", 1)

    def path() -> list[EngineConfig | None]:
        walk = Walk(land.spaces, seed=7)
        found = []
        for config in land.proposals:
            walk.learn(config, land.time_us(config), 0.1)
        for _ in range(20):
            found.append(walk.propose())
            assert found[-1] is not None
            walk.learn(found[-1], land.time_us(found[-1]), 0.1)
        return found

    assert path() == path()


def space(**knobs: int) -> Space:
    return Space(free=tuple((name, tuple(range(count))) for name, count in knobs.items()))


def proposals(walk: Walk, time_us: float | None = 50.0, at_most: int = 1_000) -> list[EngineConfig]:
    found = []
    while len(found) < at_most and (config := walk.propose()) is not None:
        found.append(config)
        walk.learn(config, time_us, 0.1)
    return found


def test_everything_is_proposed_once_and_then_nothing() -> None:
    found = proposals(Walk([("one", space(a=4, b=3)), ("two", Space(fixed=(("c", 9),)))]))
    expected = {EngineConfig.of("one", a=a, b=b) for a, b in itertools.product(range(4), range(3))}
    assert sorted(found) == sorted(expected | {EngineConfig.of("two", c=9)})


def test_what_was_learned_is_not_proposed() -> None:
    walk = Walk([("one", space(a=3))])
    walk.learn(EngineConfig.of("one", a=1), 10.0, 0.1)
    assert sorted(proposals(walk)) == [EngineConfig.of("one", a=0), EngineConfig.of("one", a=2)]


def test_an_engine_of_which_nothing_works_is_left_alone() -> None:
    assert len(proposals(Walk([("one", space(a=100, b=100))]), time_us=None)) == BARREN


def test_nothing_to_walk_is_nothing_to_propose() -> None:
    assert Walk([]).propose() is None
    assert Walk([("one", Space(free=(("a", ()),)))]).propose() is None


def test_a_knob_that_was_left_out_is_a_value_of_its_own() -> None:
    walk = Walk([("one", space(a=2, b=2))])
    walk.learn(EngineConfig.of("one", b=1), 10.0, 0.1)  # as engines do that choose for themselves
    found = proposals(walk)
    assert {config.knobs for config in found} >= {(("a", a), ("b", b)) for a in range(2) for b in range(2)}
    assert len(found) == len(set(found))


def test_configurations_of_other_engines_and_spaces_are_no_points() -> None:
    walk = Walk([("one", Space(fixed=(("engine", 3),), free=(("a", (1, 2)),)))])
    for config in (
        EngineConfig.of("two", engine=3, a=1),
        EngineConfig.of("one", engine=4, a=1),
        EngineConfig.of("one", engine=3, a=1, z=0),
        EngineConfig.of("one", engine=3, a=7),
    ):
        walk.learn(config, 10.0, 0.1)
    assert sorted(config.knob("a") for config in proposals(walk)) == [1, 2]


def test_values_that_never_build_are_avoided() -> None:
    """Of two values of one knob, only one builds: the other is soon left alone."""
    walk = Walk([("one", space(a=2, b=400))], seed=1)
    found = []
    for _ in range(40):
        config = walk.propose()
        assert config is not None
        found.append(config)
        works = config.knob("a") == 0
        walk.learn(config, 50.0 + config.knob("b") * 37 % 101 / 10 if works else None, 0.1)
    assert sum(config.knob("a") for config in found[20:]) <= 5


def test_an_engine_that_takes_long_to_build_must_promise_more() -> None:
    """Two engines that are alike but for the seconds that a try takes."""
    walk = Walk([("quick", space(a=30)), ("long", space(a=30))], seed=2)
    found = []
    for _ in range(24):
        config = walk.propose()
        assert config is not None
        found.append(config.engine)
        walk.learn(config, 50.0 + config.knob("a"), 0.1 if config.engine == "quick" else 10.0)
    assert found.count("quick") > found.count("long")


@pytest.mark.parametrize("values", [(0, 2048), (1, 4096)])
def test_knobs_of_thousands_of_values_are_no_trouble(values: tuple[int, int]) -> None:
    wide = Space(free=(("split", tuple(range(*values))), ("tile", tuple(range(24)))))
    walk = Walk([("one", wide)])
    walk.learn(EngineConfig.of("one", split=values[0] + 1, tile=5), 50.0, 0.1)
    assert len(set(proposals(walk, at_most=15))) == 15


def test_every_shape_of_landscape_can_be_made() -> None:
    for shape in SHAPES:
        land = Landscape(shape, 0)
        assert land.proposals
        assert all(land.time_us(config) for config in land.proposals)

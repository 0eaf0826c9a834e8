"""Made-up engines for comparing ways to search: how long every configuration takes, and which do not build at all.

Time is a product of what each knob's value does, of what some pairs of values do together, and of a little that belongs
to a configuration alone. Where two knobs together ask for too much, nothing builds. As with real engines, a few
proposals of middling quality are known beforehand.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

from convplan._walk import Walk
from convplan.engines.base import EngineConfig, Space

ENGINE = "made"
SHAPES = {  # knobs of each space: how many values
    "two-engines": ((8, 6, 5, 4), (12, 8)),
    "three-engines": ((24, 6), (7, 16), (8, 6, 5)),
    "one-wide": ((24, 4, 8, 2, 5),),
    "many-engines": ((24, 6, 8), (6, 6), (12, 2, 5), (42, 6), (7, 16), (4, 4, 4)),
}


class Landscape:
    """One set of spaces with its times.

    Attributes:
        spaces: as `Walk` takes them.
        proposals: what heuristics would say.
        best_us: of all configurations.
    """

    def __init__(self, shape: str, seed: int) -> None:
        chance = random.Random(f"{shape}-{seed}")
        self.spaces: list[tuple[str, Space]] = []
        self._times: dict[EngineConfig, float | None] = {}
        for number, sizes in enumerate(SHAPES[shape]):
            free = tuple((f"k{place}", tuple(range(size))) for place, size in enumerate(sizes))
            self.spaces.append((ENGINE, Space(fixed=(("engine", number),), free=free)))
            self._fill(number, sizes, chance)
        times = [time for time in self._times.values() if time is not None]
        self.best_us = min(times)
        middling = sorted(times)[len(times) // 10 : len(times) // 2]
        self.proposals = [
            config for config, time in self._times.items() if time is not None and middling[0] <= time <= middling[-1]
        ]
        self.proposals = chance.sample(self.proposals, 12)

    def _fill(self, number: int, sizes: Sequence[int], chance: random.Random) -> None:
        alone = [_bowl(chance, size) for size in sizes]
        pairs = [pair for pair in itertools.combinations(range(len(sizes)), 2) if chance.random() < 0.5]
        together = {
            pair: [[chance.gauss(0, 0.08) for _ in range(sizes[pair[1]])] for _ in range(sizes[pair[0]])]
            for pair in pairs
        }
        level, room = chance.gauss(0, 0.3), 1.0 + 0.4 * chance.random()
        for point in itertools.product(*map(range, sizes)):
            config = EngineConfig.of(ENGINE, engine=number, **{f"k{place}": value for place, value in enumerate(point)})
            asked = sum(value / max(size - 1, 1) for value, size in list(zip(point, sizes, strict=True))[:2])
            if asked > room or chance.random() < 0.05:
                self._times[config] = None
                continue
            log_time = level + sum(effects[value] for effects, value in zip(alone, point, strict=True))
            log_time += sum(table[point[one]][point[two]] for (one, two), table in together.items())
            self._times[config] = 100 * math.exp(log_time + chance.gauss(0, 0.01))

    def time_us(self, config: EngineConfig) -> float | None:
        """None: it does not build."""
        return self._times[config]


def _bowl(chance: random.Random, size: int) -> list[float]:
    """What each value does by itself: best somewhere inside, rising to either side, not quite smoothly."""
    middle = 0.25 + 0.5 * chance.random()
    return [2 * (place / size - middle) ** 2 + chance.gauss(0, 0.12) for place in range(size)]


class RandomSearch:
    """Any configuration that was not tried yet, whatever is known."""

    def __init__(self, spaces: Sequence[tuple[str, Space]], seed: int = 0) -> None:
        self._left = [
            EngineConfig.of(engine, **dict(space.fixed), **dict(zip(names, values, strict=True)))
            for engine, space in spaces
            for names in [[name for name, _ in space.free]]
            for values in itertools.product(*(values for _, values in space.free))
        ]
        random.Random(seed).shuffle(self._left)
        self._known: set[EngineConfig] = set()

    def learn(self, config: EngineConfig, time_us: float | None, cost_s: float) -> None:
        """Only that it need not be tried again."""
        self._known.add(config)

    def propose(self) -> EngineConfig | None:
        """The next."""
        while self._left:
            config = self._left.pop()
            if config not in self._known:
                return config
        return None


Search = Callable[[Sequence[tuple[str, Space]], int], "Walk | RandomSearch"]


def tries_until(search: Search, land: Landscape, seed: int, *, within: float = 1.02, at_most: int = 2_000) -> int:
    """How many configurations it takes to find one within that many times the best; `at_most` where it does not."""
    looking = search(land.spaces, seed)
    for config in land.proposals:
        looking.learn(config, land.time_us(config), 0.1)
    for count in range(1, at_most + 1):
        config = looking.propose()
        if config is None:
            break
        time_us = land.time_us(config)
        if time_us is not None and time_us <= within * land.best_us:
            return count
        looking.learn(config, time_us, 0.1)
    return at_most


def regret_after(search: Search, land: Landscape, seed: int, tries: int) -> float:
    """The best that was found in so many tries, over the best there is."""
    looking = search(land.spaces, seed)
    found = [land.time_us(config) or math.inf for config in land.proposals]
    for config, time_us in zip(land.proposals, found, strict=True):
        looking.learn(config, time_us, 0.1)
    for _ in range(tries):
        config = looking.propose()
        if config is None:
            break
        time_us = land.time_us(config)
        looking.learn(config, time_us, 0.1)
        found.append(time_us or math.inf)
    return min(found) / land.best_us

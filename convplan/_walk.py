"""Where to look next: which configuration of which engine is worth building, given all that were tried so far.

What one configuration took says something about those that share knob values with it. For each space of an engine that
becomes a Gaussian process over its points: two points are alike in as far as they agree knob by knob (an additive
part: what a value does by itself) and in as far as they differ in few (a part for what values do together); numbers
next to each other are more alike than numbers far apart. From it comes the gain that a point promises over the best so
far, in expectation. The same is asked for whether a point builds at all, since whole regions do not. Gain times chance
over seconds decides; a share of the tries goes where nothing is known instead.

Pure arithmetic on configurations: it builds nothing, times nothing, and knows no engine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

import torch

from convplan.engines.base import EngineConfig, Space

Point = tuple[int, ...]
"""Positions in the free knobs' values, -1 for a knob that a configuration leaves out."""

EXPLORED = 0.1  # share of the tries that go to the space that was tried least
ADDITIVE = 0.5  # share of the likeness that is what knobs do by themselves
DIFFERENT = 0.5  # likeness left in the product for each knob in which two points differ
NEARBY = 0.6  # likeness of neighbouring values of one knob; that of far ones goes to 0
NOISE = 1e-3  # share of the variance: first samples scatter
LEAST_SPREAD = 0.1  # of log time: a tenth is worth looking for even where all was alike so far
SLOWEST = math.log(4.0)  # beyond that many times the best, how slow makes no difference
POINTS = 256  # that one space's process remembers: the fastest, and the newest
PARENTS = 6  # points whose neighbours are looked at
NEIGHBOURS = 12  # values of one knob that are looked at around a point
RANDOM_POINTS = 40
BARREN = 64  # tries of a space without one success, after which it is left alone
ENUMERATED = 4096  # spaces up to that size are counted out at their end
CHANCE = (1.0, 2.0)  # of building, before anything was tried: so many of so many did
LEAST_CHANCE = 0.02
FINE_POSITIONS = 300  # knobs with more values are counted in powers of two


class Walk:
    """One search.

    Args:
        spaces: (engine, space) pairs.
        seed: of what is left to chance.
    """

    def __init__(self, spaces: Iterable[tuple[str, Space]], seed: int = 0) -> None:
        self._spaces = [_Region(engine, space) for engine, space in spaces]
        self._random = random.Random(seed)
        self._logs: list[float] = []
        self._seconds, self._tries = 1.0, 1

    def learn(self, config: EngineConfig, time_us: float | None, cost_s: float) -> None:
        """What came of a configuration: its time, None when it did not work, and what finding out took."""
        self._seconds, self._tries = self._seconds + cost_s, self._tries + 1
        if time_us is not None:
            self._logs.append(math.log(time_us))
        for region in self._spaces:
            point = region.point(config)
            if point is not None:
                region.learn(point, None if time_us is None else math.log(time_us), cost_s)

    def propose(self) -> EngineConfig | None:
        """The configuration to try next; None when there is none left. What was proposed is not proposed again."""
        while True:
            live = [region for region in self._spaces if region.open]
            if not live:
                return None
            explore = self._random.random() < EXPLORED
            region = min(live, key=lambda one: one.tries) if explore else max(live, key=self._promise)
            point = region.anywhere(self._random) if explore else region.best_point
            if point is None:
                region.open = False
                continue
            region.propose(point)
            return region.config(point)

    def _promise(self, region: _Region) -> float:
        """Expected gain in log time for each second, of the region's best point."""
        best = min(self._logs, default=0.0)
        mean = sorted(self._logs)[len(self._logs) // 2] if self._logs else 0.0
        region.prepare(self._random, best, mean, self._seconds / self._tries)
        return region.promise(best)


class _Region:
    """One space of one engine, what is known of it, and the points that are considered."""

    def __init__(self, engine: str, space: Space) -> None:
        self.engine, self._fixed = engine, space.fixed
        self._names = tuple(name for name, _ in space.free)
        self._values = tuple(values for _, values in space.free)
        self._positions = [{value: place for place, value in enumerate(values)} for values in self._values]
        self.size = math.prod(len(values) for values in self._values)
        self.open = self.size > 0
        self.tries = 0
        self.best_point: Point | None = None
        self._tried: dict[Point, float | None] = {}
        self._proposed: set[Point] = set()
        self._cost_s = 0.0
        self._alike = [_likeness_table(len(values)) for values in self._values]
        self._fresh = False
        self._pool: list[Point] = []
        self._mean = self._spread = self._chance = torch.zeros(0)
        self._each_s = 1.0

    def point(self, config: EngineConfig) -> Point | None:
        """Where a configuration lies; None when it is not of this space."""
        knobs = dict(config.knobs)
        if config.engine != self.engine or any(knobs.pop(name, None) != value for name, value in self._fixed):
            return None
        if set(knobs) - set(self._names):
            return None
        places = []
        for name, positions in zip(self._names, self._positions, strict=True):
            place = positions.get(knobs[name]) if name in knobs else -1
            if place is None:
                return None
            places.append(place)
        return tuple(places)

    def config(self, point: Point) -> EngineConfig:
        """The configuration at a point."""
        free = zip(self._names, self._values, point, strict=True)
        knobs = (*self._fixed, *((name, values[place]) for name, values, place in free if place >= 0))
        return EngineConfig(self.engine, tuple(sorted(knobs)))

    def learn(self, point: Point, log_time: float | None, cost_s: float) -> None:
        self._tried[point] = log_time
        self._proposed.add(point)
        self._cost_s += cost_s
        self.tries += 1
        self._fresh = False
        if self.tries >= BARREN and all(time is None for time in self._tried.values()):
            self.open = False

    def propose(self, point: Point) -> None:
        self._proposed.add(point)
        self._fresh = False

    # --- points -------------------------------------------------------------------------------------------------------

    def anywhere(self, chance: random.Random) -> Point | None:
        """A point that was never proposed; None when there is none left."""
        for _ in range(32):
            point = tuple(chance.randrange(len(values)) for values in self._values)
            if point not in self._proposed:
                return point
        if self.size > ENUMERATED:
            return None  # most of so large a space was proposed: time to leave it
        left = [point for point in _all_points(self._values) if point not in self._proposed]
        return chance.choice(left) if left else None

    def _neighbours(self, point: Point, chance: random.Random) -> Iterable[Point]:
        """Points that differ in one knob: the next values on either side, twice and half, and some others."""
        for knob, values in enumerate(self._values):
            count, place = len(values), point[knob]
            if count <= NEIGHBOURS:
                places = set(range(count))
            else:
                near = {place - 2, place - 1, place + 1, place + 2, 2 * place + 1, (place - 1) // 2}
                places = {one for one in near if 0 <= one < count}
                places |= {chance.randrange(count) for _ in range(NEIGHBOURS - len(places))}
            for other in places - {place}:
                yield (*point[:knob], other, *point[knob + 1 :])

    def prepare(self, chance: random.Random, best: float, mean: float, each_s: float) -> None:
        """Draw up points to consider, with what is expected of each."""
        if self._fresh:
            return
        self._fresh = True
        timed = sorted((time, point) for point, time in self._tried.items() if time is not None)
        pool = dict.fromkeys(near for _, point in timed[:PARENTS] for near in self._neighbours(point, chance))
        for _ in range(RANDOM_POINTS if self.size > len(self._proposed) else 0):
            drawn = self.anywhere(chance)
            if drawn is None:
                break
            pool[drawn] = None
        self._pool = [point for point in pool if point not in self._proposed]
        self._each_s = (self._cost_s + 2 * each_s) / (self.tries + 2)
        if self._pool:
            self._expect(timed, best, mean)

    # --- what to expect -----------------------------------------------------------------------------------------------

    def _expect(self, timed: Sequence[tuple[float, Point]], best: float, mean: float) -> None:
        """Mean and standard deviation of log time, and the chance of building, for each point of the pool."""
        newest = [(time, point) for point, time in list(self._tried.items())[-POINTS // 2 :] if time is not None]
        known = list(dict.fromkeys([*timed[: POINTS // 2], *newest]))
        pool = _matrix(self._pool)
        count = len(self._pool)
        logs = torch.tensor([min(time, best + SLOWEST) for time, _ in known], dtype=torch.float64)
        centre = (float(logs.sum()) + min(mean, best + SLOWEST)) / (len(known) + 1)
        variance = max((float((logs - centre).square().sum()) + 0.25) / (len(known) + 1), LEAST_SPREAD**2)
        if known:
            offset, left = self._regress(_matrix([point for _, point in known]), logs - centre, pool, NOISE)
            self._mean, self._spread = centre + offset, (variance * left).sqrt()
        else:
            self._mean = torch.full((count,), centre, dtype=torch.float64)
            self._spread = torch.full((count,), math.sqrt(variance), dtype=torch.float64)
        tried = list(self._tried.items())[-POINTS:]
        built = torch.tensor([time is not None for _, time in tried], dtype=torch.float64)
        rate = (float(built.sum()) + CHANCE[0]) / (len(tried) + CHANCE[1])
        self._chance = torch.full((count,), rate, dtype=torch.float64)
        if tried:
            offset, _ = self._regress(_matrix([point for point, _ in tried]), built - rate, pool, 0.1)
            self._chance = (self._chance + offset).clamp(LEAST_CHANCE, 1.0) * self._by_value(tried, rate, pool)

    def _by_value(self, tried: Sequence[tuple[Point, float | None]], rate: float, pool: torch.Tensor) -> torch.Tensor:
        """Of each point's least lucky value, the share of tries that built, next to that of all tries; at most 1."""
        least = torch.ones(len(pool), dtype=torch.float64)
        for knob, values in enumerate(self._values):
            built = torch.full((len(values) + 1,), 2 * rate, dtype=torch.float64)  # the last is for a knob left out
            count = torch.full_like(built, 2.0)
            for point, time in tried:
                built[point[knob]] += time is not None
                count[point[knob]] += 1
            least = torch.minimum(least, (built / count / rate)[pool[:, knob]])
        return least

    def _regress(
        self, known: torch.Tensor, values: torch.Tensor, pool: torch.Tensor, noise: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A Gaussian process of variance 1: its mean at the pool's points, and the variance that is left there."""
        among = self._likeness(known, known) + noise * torch.eye(len(known), dtype=torch.float64)
        factor = torch.linalg.cholesky(among)
        across = self._likeness(known, pool)
        weights = torch.cholesky_solve(values[:, None], factor)[:, 0]
        explained = torch.linalg.solve_triangular(factor, across, upper=False).square().sum(0)
        return weights @ across, (1.0 - explained).clamp(1e-6)

    def _likeness(self, ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Of each of the first points with each of the others; 1 for a point with itself."""
        total = torch.zeros(len(ones), len(others), dtype=torch.float64)
        together = torch.ones_like(total)
        for knob, table in enumerate(self._alike):
            alike = table[ones[:, knob]][:, others[:, knob]]  # -1, a knob left out, is the table's last row
            total += alike
            together *= DIFFERENT + (1 - DIFFERENT) * alike
        if self._alike:
            total /= len(self._alike)
        else:
            total += 1
        return ADDITIVE * total + (1 - ADDITIVE) * together

    def promise(self, best: float) -> float:
        """The highest expected gain for each second in the pool, whose point becomes `best_point`."""
        if not self._pool:
            self.best_point = None
            return math.inf  # taken next, and closed
        distance = (best - self._mean) / self._spread
        density = torch.exp(-0.5 * distance.square()) / math.sqrt(2 * math.pi)
        below = 0.5 * torch.erfc(-distance / math.sqrt(2))
        gain = self._spread * (distance * below + density) * self._chance
        place = int(gain.argmax())
        self.best_point = self._pool[place]
        return float(gain[place]) / self._each_s


def _likeness_table(count: int) -> torch.Tensor:
    """How alike the values of one knob are, by position; one row and column more for a knob that is left out."""
    places = torch.arange(count, dtype=torch.float64)
    reach = max(count / 4, 1.0)
    if count > FINE_POSITIONS:  # such as ways to split a sum, where 1000 and 1001 are the same
        places = 8 * torch.log2(places + 1)
        reach = 8.0
    table = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    table[:count, :count] = NEARBY * torch.exp(-(places[:, None] - places).abs() / reach)
    return table.fill_diagonal_(1.0)


def _matrix(points: Sequence[Point]) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.int64).reshape(len(points), -1)


def _all_points(values: Sequence[Sequence[int]]) -> Iterable[Point]:
    points: list[Point] = [()]
    for options in values:
        points = [(*point, place) for point in points for place in range(len(options))]
    return points

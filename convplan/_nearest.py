"""Nearest shapes: which tuned problems differ from a new one in batch and spatial sizes only, and what they foretell.

Pure data and arithmetic: problems and records come in, an order of configurations goes out. Whether one of them may run
and builds is the planner's business, when to tune is `_deciding`'s.

Sizes are compared as logarithms to the base of two, since times and the number of tiles go with ratios: a distance of 1
is a factor of two in work.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from convplan._environment import Environment
from convplan._lru import LeastRecentlyUsed
from convplan._plan import Evidence, PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem, TensorSpec

SHAPE_WEIGHT = 0.25
MOST_RELATIVES = 64  # of one family
CELL = 0.25  # of two relatives that differ by less than this in every size, the later replaces the earlier
MOST_KEPT = 16  # leading configurations of one relative
MOST_LIKELY = 4  # configurations handed on
NEAR = 1.0  # within a factor of two in work, a tuned relative speaks for a problem
ABSENT = math.log(2)  # a configuration that one of two relatives did not time counts as twice as slow there, at least
COMPILED = "RUNTIME_COMPILATION"  # a note: building takes 0.03 to 0.9 s (cuDNN 9.19, H200), for every shape anew
CONDEMNED = ("verify", "run")  # rejections that say more than that it was slow, or refused there


def family(problem: Problem) -> Hashable | None:
    """What two problems share whose tuned choices say something about each other: all but batch and spatial sizes.

    Layouts count by their class. None for tensors that are neither contiguous nor channels-last, whose strides are a
    matter of their own, and for problems without elements.
    """
    specs = (problem.x, problem.w, problem.y)
    layouts = tuple(spec.layout for spec in specs)
    if "strided" in layouts or problem.is_empty:
        return None
    tensors = tuple((spec.dtype, spec.alignment_bytes) for spec in specs)
    window = (problem.padding, problem.stride, problem.dilation, problem.groups)
    return (problem.op, problem.w.dims, layouts, tensors, window, problem.epilogue, problem.device)


class Sizes(NamedTuple):
    """Where a problem lies in its family, in logarithms to the base of two.

    work: output positions, which the number of operations is proportional to.
    shape: batch, and the spatial sizes of x.
    """

    work: float
    shape: tuple[float, ...]

    @classmethod
    def of(cls, problem: Problem) -> Sizes:
        positions = problem.y.dims[0] * math.prod(problem.y.dims[2:])
        sizes = (problem.x.dims[0], *problem.x.dims[2:])
        return cls(math.log2(positions), tuple(map(math.log2, sizes)))

    def distance(self, other: Sizes) -> float:
        apart = sum(abs(one - two) for one, two in zip(self.shape, other.shape, strict=True))
        return abs(self.work - other.work) + SHAPE_WEIGHT * apart


def distance(a: Problem, b: Problem) -> float:
    """How far two problems of one family are apart: 0 for equal ones, about 1.5 when all is twice as much.

    The ratio of their work counts in full. It decides how many tiles there are, and so which configuration fills the
    machine and what share overheads take. How the same work is divided among batch, height and width changes what
    happens at borders and how rows fit into tiles, which is less: these ratios count a quarter each.
    """
    return Sizes.of(a).distance(Sizes.of(b))


def is_near(a: Problem, b: Problem) -> bool:
    """Whether the work of two problems of one family is within a factor of two, so that one speaks for the other."""
    return abs(Sizes.of(a).work - Sizes.of(b).work) <= NEAR


class Likely(NamedTuple):
    """A configuration that relatives speak for: its evidence there, and which relative that was."""

    evidence: Evidence
    remark: str


def likely(problem: Problem, relatives: Sequence[PlanRecord], most: int = MOST_LIKELY) -> list[Likely]:
    """The configurations that should be fastest, best first, each once.

    Where the problem's work lies between that of the first two relatives, each configuration's slowdown against the
    relative's own choice is interpolated between them: exact for times that are powers of the work, so the place where
    one configuration overtakes another is found although nothing was measured there. Otherwise the nearest decides, and
    what others add stands behind. What gave a wrong result or failed for one of them is left out. What is
    compiled when it is built stands behind all the rest: for a shape that may never come again that takes longer than
    it can save.

    Args:
        problem: the new one.
        relatives: tuned records of its family, nearest first.
        most: configurations.
    """
    if not relatives:
        return []
    nearest, *others = relatives
    weight = _weight_of_second(problem, nearest, others[0]) if others else 0.0
    first, second = _slowdowns(nearest), _slowdowns(others[0]) if others else {}
    condemned = {e.config for record in relatives for e in record.rejected if e.rejected in CONDEMNED}
    found: dict[Hashable, tuple[bool, float, Likely]] = {}
    for record in relatives:
        for rank, evidence in enumerate(record.ranking, start=1):
            config = evidence.config
            if config in condemned or config in found:
                continue
            here, there = _both(first.get(config), second.get(config))
            score = here if weight == 0.0 else (1 - weight) * here + weight * there
            compiles = COMPILED in evidence.notes.behavior
            found[config] = (compiles, score, Likely(evidence, _remark(record, evidence, rank)))
    return [one for _, _, one in sorted(found.values(), key=lambda item: item[:2])[:most]]


def _both(here: float | None, there: float | None) -> tuple[float, float]:
    """Slowdowns at both relatives, where one that was not timed at one of them cannot be told to be fast there."""
    known = max(here or 0.0, there or 0.0, ABSENT)
    return (known if here is None else here), (known if there is None else there)


def _slowdowns(record: PlanRecord) -> dict[Hashable, float]:
    """Logarithms of each timed configuration's time over the choice's; ties with the choice count as equal to it."""
    best_us = record.ranking[0].median_us
    if not best_us or best_us <= 0:
        return {record.config: 0.0}
    timed = [(e.config, e.median_us) for e in record.ranking if e.median_us is not None and e.median_us > 0]
    return {config: max(math.log(median_us / best_us), 0.0) for config, median_us in timed}


def _weight_of_second(problem: Problem, first: PlanRecord, second: PlanRecord) -> float:
    """How far the problem lies on the way from the first relative to the second, when it lies between them."""
    here, one, two = Sizes.of(problem), Sizes.of(first.problem), Sizes.of(second.problem)
    if (one.work - here.work) * (two.work - here.work) >= 0:
        return 0.0
    to_one, to_two = here.distance(one), here.distance(two)
    return to_one / (to_one + to_two)


def _remark(record: PlanRecord, evidence: Evidence, rank: int) -> str:
    timed = "" if evidence.median_us is None else f", {evidence.median_us:.1f} us there"
    return f"ranked {rank} for its relative x={_text(record.problem.x)}{timed}; untuned here"


def _text(spec: TensorSpec) -> str:
    return "x".join(map(str, spec.dims))


def _leading(record: PlanRecord) -> PlanRecord:
    """What is kept of a record: its leading configurations and those it condemned, without the single timings."""
    leading = tuple(msgspec.structs.replace(e, samples_us=()) for e in record.ranking[:MOST_KEPT])
    condemned = tuple(e for e in record.rejected if e.rejected in CONDEMNED)
    return msgspec.structs.replace(record, ranking=leading, rejected=condemned, curve=())


class _Family:
    """The tuned members of one family, those that run by the engines' own order, and how many shapes of it were met."""

    def __init__(self) -> None:
        self.tuned: LeastRecentlyUsed[tuple[int, ...], tuple[Sizes, PlanRecord]] = LeastRecentlyUsed(MOST_RELATIVES)
        self.untuned: LeastRecentlyUsed[tuple[int, ...], tuple[Sizes, PlanRecord]] = LeastRecentlyUsed(MOST_RELATIVES)
        self.shapes: set[Sizes] = set()
        self.claimed: list[float] = []  # work of problems whose tuning was begun for the family's sake


FamilyKey = tuple[Hashable, tuple[tuple[str, object], ...], Environment]


class Relatives:
    """Tuned records by family, policy and environment. Bounded, and safe from several threads.

    Args:
        limit: gives the most families to keep, those used longest ago going first; 0: unlimited, negative: none. Read
            at first use.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._load_lock = threading.Lock()
        self._loaded: set[Hashable] = set()
        self._families: LeastRecentlyUsed[FamilyKey, _Family] | None = None

    def add(self, record: PlanRecord) -> bool:
        """Take a record in; False for one whose problem has no family.

        An untuned one speaks for problems near to it, while nothing of the family is tuned: what the engines put first
        at one size they nearly always put first at the next, and asking them takes ten times as long as building.
        """
        named = family(record.problem)
        if named is None:
            return False
        sizes = Sizes.of(record.problem)
        cell = tuple(round(size / CELL) for size in sizes.shape)
        kept = _leading(record)
        with self._lock:
            found = self._family((named, record.policy.key_items(), record.environment))
            (found.untuned if record.effort == "instant" else found.tuned).add(cell, (sizes, kept))
        return True

    def load_once(self, key: Hashable, load: Callable[[], Iterable[PlanRecord]]) -> None:
        """Take in all that `load` gives, the first time that this is asked for with this key."""
        if key in self._loaded:
            return
        with self._load_lock:
            if key not in self._loaded:
                for record in load():
                    self.add(record)
                self._loaded.add(key)

    def nearest(self, problem: Problem, policy: Policy, environment: Environment, count: int = 2) -> list[PlanRecord]:
        """The tuned relatives nearest to a problem, at most `count`; while there are none, the nearest untuned one that
        is within a factor of two.

        The first is the nearest of all. After it come those on the other side of the problem, with more work than it
        where the first has less, and then the rest, so that the first two enclose the problem where that can be had.

        Args:
            policy: resolved.
        """
        named = family(problem)
        if named is None:
            return []
        here = Sizes.of(problem)
        with self._lock:
            found = self._family((named, policy.key_items(), environment))
            members, untuned = list(found.tuned.values()), list(found.untuned.values())
        by_distance = sorted(members, key=lambda member: here.distance(member[0]))
        if not by_distance:
            near = [member for member in untuned if abs(member[0].work - here.work) <= NEAR]
            return [min(near, key=lambda member: here.distance(member[0]))[1]] if near else []
        first, *others = by_distance
        others.sort(key=lambda member: (member[0].work > here.work) == (first[0].work > here.work))
        return [record for _, record in (first, *others)][:count]

    def has_tuned_near(self, problem: Problem, policy: Policy, environment: Environment) -> bool:
        """Whether a tuned relative is within a factor of two of the problem's work."""
        nearest = self.nearest(problem, policy, environment, count=1)
        return bool(nearest) and nearest[0].effort != "instant" and is_near(problem, nearest[0].problem)

    def meet(self, problem: Problem, policy: Policy, environment: Environment, *, most: int) -> int:
        """Note the shape of a problem that is met first.

        Args:
            policy: resolved.
            most: shapes of a family that are counted.

        Returns:
            How many different shapes of its family were met by now.
        """
        named = family(problem)
        if named is None:
            return 0
        with self._lock:
            shapes = self._family((named, policy.key_items(), environment)).shapes
            if len(shapes) < most:
                shapes.add(Sizes.of(problem))
            return len(shapes)

    def met(self, problem: Problem, policy: Policy, environment: Environment) -> int:
        """How many different shapes of a problem's family `meet` has counted."""
        named = family(problem)
        if named is None:
            return 0
        with self._lock:
            return len(self._family((named, policy.key_items(), environment)).shapes)

    def claim(self, problem: Problem, policy: Policy, environment: Environment, *, shapes: int) -> bool:
        """Count one more shape of a family, and say whether its problem is to be tuned for the family's sake.

        It is when that many different shapes of the family were met and none within a factor of two of the problem's
        work has been tuned, or was claimed before: so a family costs at most one such tuning for each factor of two
        between its smallest and its largest, whatever becomes of them and however many threads ask.

        Args:
            policy: resolved.
            shapes: how many different ones, this one included, make a family worth it.
        """
        named = family(problem)
        if named is None or self.meet(problem, policy, environment, most=shapes) < shapes:
            return False
        here = Sizes.of(problem)
        with self._lock:
            found = self._family((named, policy.key_items(), environment))
            known = (*found.claimed, *(sizes.work for sizes, _ in found.tuned.values()))
            if any(abs(here.work - work) <= NEAR for work in known):
                return False
            found.claimed.append(here.work)
            return True

    def _family(self, key: FamilyKey) -> _Family:
        """The family, as the one used last; under the lock."""
        if self._families is None:
            self._families = LeastRecentlyUsed(self._limit())
        found = self._families.get(key) or _Family()
        self._families.add(key, found)
        return found

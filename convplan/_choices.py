"""What a process remembers of problems: the choice made for each, tuned relatives, the open stores; and the switch.

A choice is one for the process, shared by all threads (B22), and is found by what a stored plan's key is made of. How
it is made is `_deciding`'s business, and what runs by it `_runtime`'s.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from convplan._counts import cache_limit, counts
from convplan._lru import LeastRecentlyUsed
from convplan._nearest import Relatives
from convplan._plan import Plan, PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem
from convplan.engines import registry

if TYPE_CHECKING:
    from convplan._agreement import Agreement
    from convplan._environment import Environment
    from convplan._store import ForgivingStore

MOST_LAYERS = 64  # that are told apart when sightings of one problem are counted
STORE_VARIABLES = ("CONVPLAN_STORE", "CONVPLAN_CACHE_DIR")

Observe = Callable[[Problem, tuple[bool, bool]], None]
"""Told of a problem that is asked for, and whether gradients of its input and its weight may be asked for later."""


class State:
    """The switch: whether convolutions of the process go through convplan, and under which policy.

    `token` changes whenever an earlier choice may no longer hold, and is part of every caller's key.
    """

    def __init__(self) -> None:
        self.enabled = False
        self.policy = Policy()
        self.token = 0
        self.captures: tuple[Observe, ...] = ()

    def touch(self) -> None:
        self.token += 1


Layer = weakref.ref[Any]
"""What tells the layers of a network apart: a weak reference to a weight."""


class Failure(NamedTuple):
    """A search that found nothing: what to raise again, and which engines it asked. Holds no traceback, no tensor."""

    problem: str
    policy: str
    rejections: tuple[tuple[str, str], ...]
    generation: int


class Ready(NamedTuple):
    """A plan that is built, by the engines of which generation, and the GPUs `tune` made it ready on (-1: the CPU).

    On none: planning left it, and it is for whoever runs the problem first. Else it stays with the choice and is shared
    by all, since each call of a CUDA graph's capture asks for it anew, as does each layer and each thread: a plan runs
    in any thread, and what belongs to one is made when it is bound.
    """

    record: PlanRecord
    plan: Plan
    generation: int
    devices: frozenset[int] = frozenset()

    def is_for(self, record: PlanRecord | None) -> bool:
        """Whether it is what building a record's choice would give now."""
        return self.record is record and self.generation == registry.generation


class Choice:
    """The record that a problem runs by, how often it was seen, or why there is none."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.record: PlanRecord | None = None
        self.failure: Failure | None = None
        self.sightings = 0  # by the layer that has met the problem most often
        self._by_layer: list[tuple[Layer | None, int]] = []
        self.gave_up = False  # tuning broke off; the untuned plan stays
        self.has_near_relative = False  # whose choice it runs by
        self.one_of_many = False  # of a family whose shapes vary
        self.job: Agreement | None = None  # with the other ranks
        self._ready: Ready | None = None

    def sight(self, layer: Layer | None) -> None:
        """Count a sighting by one layer; None: by whom is not known. Under the lock.

        Layers of a network share problems, so that meeting one again says nothing about whether it will come again;
        that the same layer meets it again does. What takes the place of a layer that is gone counts on from there.
        """
        here = None if layer is None else layer()
        before, gone, others = 0, 0, []
        for other, count in self._by_layer:
            there = None if other is None else other()
            if there is here and (other is None) == (layer is None):
                before = count
            elif other is not None and there is None:
                gone = max(gone, count)
            else:
                others.append((other, count))
        before = before or gone
        if len(others) == MOST_LAYERS:
            others, before = others[1:], self.sightings
        self.sightings = max(self.sightings, before + 1)
        self._by_layer = [*others, (layer, before + 1)]

    def hand_over(self, record: PlanRecord, plan: Plan) -> None:
        """Leave what planning built for the first runner, which need not build it again."""
        self._ready = Ready(record, plan, registry.generation)

    def keep_ready(self, record: PlanRecord, plan: Plan, device: int) -> None:
        """Keep a plan for every runner, after it was made ready on a device. Under the lock."""
        before = self._ready
        others = before.devices if before is not None and before.plan is plan else frozenset[int]()
        self._ready = Ready(record, plan, registry.generation, others | {device})

    def take_ready(self, record: PlanRecord) -> Plan | None:
        """The plan that was left with this record; for one caller only, unless it was made ready for all."""
        if self._ready is None:
            return None
        with self.lock:
            ready = self._ready
            found = ready.plan if ready is not None and ready.is_for(record) else None
            if ready is None or found is None or not ready.devices:
                self._ready = None
        return found

    def ready_on(self, device: int) -> Ready | None:
        """What was made ready on a device of the record that holds now. Waits for nobody: a graph may be captured."""
        ready = self._ready
        return ready if ready is not None and ready.is_for(self.record) and device in ready.devices else None


ChoiceKey = tuple[Problem, tuple[tuple[str, object], ...], "Environment"]


class _Choices:
    """Choices by what a stored plan's key is made of: policies that differ in effort or patience share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: LeastRecentlyUsed[ChoiceKey, Choice] | None = None

    def get(self, problem: Problem, policy: Policy, environment: Environment) -> Choice:
        """The choice for a problem; a new one where there is none."""
        key = (problem, policy.key_items(), environment)
        with self._lock:
            if self._kept is None:
                self._kept = LeastRecentlyUsed(cache_limit())
            found = self._kept.get(key)
            if found is None:
                found = Choice()
            self._kept.add(key, found)
            return found

    def find(self, problem: Problem, policy: Policy, environment: Environment) -> Choice | None:
        """The same, None where there is none."""
        with self._lock:
            return None if self._kept is None else self._kept.get((problem, policy.key_items(), environment))

    def engines(self) -> dict[str, int]:
        """For each engine, how many of the choices are its."""
        with self._lock:
            records = [choice.record for choice in (self._kept or {}).values()]
        return dict(Counter(record.config.engine for record in records if record is not None))

    def clear(self) -> None:
        with self._lock:
            self._kept = None


class _Known:
    """All that the process remembers of problems."""

    def __init__(self) -> None:
        self.choices = _Choices()
        self.relatives = Relatives(cache_limit)
        self._lock = threading.Lock()
        self._stores: dict[tuple[str | None, ...], ForgivingStore] = {}

    def store(self) -> ForgivingStore:
        """The plan store that the environment variables name now; opened when first used."""
        from convplan._store import ForgivingStore

        where = tuple(os.environ.get(name) for name in STORE_VARIABLES)
        with self._lock:
            if where not in self._stores:
                self._stores[where] = ForgivingStore()
            return self._stores[where]

    def forget(self) -> None:
        """Drop every choice and relative; the stores keep their rows, and are opened again when next used."""
        self.choices.clear()
        self.relatives = Relatives(cache_limit)
        state.touch()
        with self._lock:
            self._stores.clear()

    def start_afresh_in_child(self) -> None:
        """A fork copies locks as they are, and the threads that would release them stay behind."""
        self.choices, self.relatives, self._lock = _Choices(), Relatives(cache_limit), threading.Lock()
        counts.renew_lock()
        state.touch()


state = State()
known = _Known()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=known.start_afresh_in_child)
registry.on_change(state.touch)

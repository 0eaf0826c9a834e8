"""What happens to a convolution after planning: remembered choices, plans ready to run, and what to do when one fails.

Two levels of memory, both least-recently-used and of the same limit:

    choice   problem + policy + environment -> ranked record. One for the process, shared by all threads (B22).
    caller   the arguments of a call as they came -> something that runs. One per thread; a hit does nothing but this
             look-up and the call.

A choice starts as the stored record, or as an untuned plan that counts how often it is used and is exchanged for a
tuned one at the sighting the policy names. When a plan fails while it runs, the next-ranked takes over (B23).
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from convplan import _agreement, _environment
from convplan._candidates import COMPILED
from convplan._errors import CaptureMiss, ConvPlanError, ConvPlanWarning, ExecutionFailed, NoPlan, ReplayMiss, TooLarge
from convplan._learned import learned_from, verdict
from convplan._lru import LeastRecentlyUsed
from convplan._measure import first_line
from convplan._nearest import Relatives, is_near
from convplan._plan import Evidence, Plan, PlanRecord
from convplan._planner import find_plans
from convplan._policy import EFFORTS, Effort, Policy
from convplan._problem import Problem
from convplan._ranges import ranged
from convplan._relatives import RELATIVE, plan_like
from convplan.engines import registry
from convplan.engines.base import LAST_RESORT, Restoring

if TYPE_CHECKING:
    import torch

    from convplan._store import ForgivingStore
    from convplan.engines.base import Run

log = logging.getLogger("convplan.runtime")

CACHE_LIMIT_VARIABLE = "CONVPLAN_CACHE_LIMIT"
DEFAULT_CACHE_LIMIT = 10_000
MOST_SEEN = 4_096  # weights
MOST_LAYERS = 64  # that are told apart when sightings of one problem are counted
STORE_VARIABLES = ("CONVPLAN_STORE", "CONVPLAN_CACHE_DIR")
COUNTERS = (
    "hits",
    "misses",
    "planned",
    "tuned",
    "from_store",
    "from_relative",
    "from_rank",
    "replay_misses",
    "restored",
    "compiled",
    "fell_back",
    "failed",
    "left_to_torch",
    "capture_misses",
)
SECONDS = ("planning_s", "tuning_s")  # the second is part of the first
# Times `tune_after`: how many shapes make a family worth tuning, and how many sightings make a problem worth it that
# has a near relative's choice already, beyond which little is to be gained. An untuned GPU plan costs its engine's
# lists, 7 to 20 ms (H200, cuDNN 9.19): with `tune_after=2`, those of 16 shapes have cost about what one tuning does.
PATIENCE = 8
# Of the time since the process met its first problem, for tuning problems that are one shape of many of their family,
# each of which may never come again.
FAMILIES_SHARE = 0.1

Observe = Callable[[Problem, tuple[bool, bool]], None]
"""Told of a problem that is asked for, and whether gradients of its input and its weight may be asked for later."""


def cache_limit() -> int:
    """The limit from the environment variable; a value that is no integer warns once and gives the default."""
    text = os.environ.get(CACHE_LIMIT_VARIABLE)
    if text is None:
        return DEFAULT_CACHE_LIMIT
    try:
        return int(text)
    except ValueError:
        warn_once(
            f"{CACHE_LIMIT_VARIABLE} is {text!r}, expected an integer (0: unlimited, negative: no caching); "
            f"using {DEFAULT_CACHE_LIMIT}"
        )
        return DEFAULT_CACHE_LIMIT


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn the first time in this process, log at DEBUG after that."""
    if message in _warned:
        log.debug("%s", message)
        return
    _warned.add(message)
    warnings.warn(message, ConvPlanWarning, stacklevel=3)


class _Counts:
    """Counters that any thread may raise. Hits are counted without a lock, in a cell of each thread's own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rare = dict.fromkeys(COUNTERS, 0)
        self.since = time.perf_counter()
        self.families_s = 0.0  # of the seconds below, those for the sake of families
        self.tuning_s = 0.0  # spent on problems that programs met; what was asked for by name is not in it
        self._spent_s = dict.fromkeys(SECONDS, 0.0)
        self._hit_cells: list[list[int]] = []

    def renew_lock(self) -> None:
        """After a fork, in the child."""
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self._rare[name] += 1

    def spend(self, name: str, seconds: float) -> None:
        """Add to one of `SECONDS`."""
        with self._lock:
            self._spent_s[name] += seconds

    def new_hit_cell(self, owner: object) -> list[int]:
        """A cell for the calling thread; its count is kept when `owner`, which lives as long as the thread, goes."""
        cell = [0]
        with self._lock:
            self._hit_cells.append(cell)
        weakref.finalize(owner, self._retire, cell).atexit = False
        return cell

    def _retire(self, cell: list[int]) -> None:
        with self._lock:
            self._rare["hits"] += cell[0]
            self._hit_cells = [c for c in self._hit_cells if c is not cell]

    def read(self, reset: bool) -> tuple[dict[str, int], dict[str, float]]:
        with self._lock:
            seen = {**self._rare, "hits": self._rare["hits"] + sum(cell[0] for cell in self._hit_cells)}
            spent_s = dict(self._spent_s)
            if reset:
                self._rare = dict.fromkeys(COUNTERS, 0)
                self._spent_s = dict.fromkeys(SECONDS, 0.0)
                for cell in self._hit_cells:
                    cell[0] = 0
            return seen, spent_s


class _Anchor:
    """Lives as long as a thread's local storage."""


class Callers(LeastRecentlyUsed[Hashable, Callable[..., Any]]):
    """Plans of one thread that are ready to run, with the thread's count of hits beside them."""

    def __init__(self, limit: int, hits: list[int]) -> None:
        super().__init__(limit)
        self.hits = hits


class Local(threading.local):
    """What each thread has of its own: plans that are ready to run, and its count of hits."""

    def __init__(self) -> None:
        self.anchor = _Anchor()
        self.hits = counts.new_hit_cell(self.anchor)
        self.token = -1
        self.callers = Callers(cache_limit(), self.hits)
        # The dispatcher's side keeps its last call of each weight here, by the weight's address.
        self.forwards: dict[int, Any] = {}
        self.backwards: dict[int, Any] = {}

    def keep_seen(self, table: dict[int, Any], address: int, seen: Any) -> None:
        """Keep a call in one of the tables, which never hold more than a small cache does."""
        if len(table) >= MOST_SEEN:
            table.clear()
        table[address] = seen

    def remember(self, key: Hashable, token: int, caller: Callable[..., Any], device: int) -> None:
        """Keep a caller; those of an earlier token (another policy, other engines) are dropped first.

        While problems are captured nothing is kept, so that every call is seen; nor while a CUDA graph is, when a
        caller may stand in for a plan that could not be built.
        """
        if state.captures or in_graph_capture(device):
            return
        if self.token != token or self.callers.limit != cache_limit():
            self.callers = Callers(cache_limit(), self.hits)
            self.token = token
            self._forget_seen()
        self.callers.add(key, caller)
        if self.callers.crowded:  # it matters now who is used, so that every call must go by its key
            self._forget_seen()

    def _forget_seen(self) -> None:
        self.forwards.clear()
        self.backwards.clear()


def in_graph_capture(device: int) -> bool:
    """Whether a CUDA graph is being captured on the calling thread's stream; `device` is its index, -1 the CPU."""
    if device < 0:
        return False
    import torch

    return torch.cuda.is_current_stream_capturing()


def on_device(device: int) -> AbstractContextManager[object]:
    """A block in which GPU number `device` is the current one; nothing for the CPU (-1)."""
    if device < 0:
        return nullcontext()
    import torch

    return torch.cuda.device(device)


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


counts = _Counts()
state = State()
local = Local()


Layer = weakref.ref[Any]
"""What tells the layers of a network apart: a weak reference to a weight."""


class _Failure(NamedTuple):
    """A search that found nothing: what to raise again, and which engines it asked. Holds no traceback, no tensor."""

    problem: str
    policy: str
    rejections: tuple[tuple[str, str], ...]
    generation: int


class _Choice:
    """The record that a problem runs by, how often it was seen, or why there is none."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.record: PlanRecord | None = None
        self.failure: _Failure | None = None
        self.sightings = 0  # by the layer that has met the problem most often
        self._by_layer: list[tuple[Layer | None, int]] = []
        self.gave_up = False  # tuning broke off; the untuned plan stays
        self.has_near_relative = False  # whose choice it runs by
        self.one_of_many = False  # of a family whose shapes vary
        self.job: _agreement.Agreement | None = None  # with the other ranks
        self._ready: tuple[PlanRecord, Plan] | None = None

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
        self._ready = (record, plan)

    def take_ready(self, record: PlanRecord) -> Plan | None:
        """The plan that was left with this record, for one caller only."""
        if self._ready is None:
            return None
        with self.lock:
            ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] is record else None


ChoiceKey = tuple[Problem, tuple[tuple[str, object], ...], _environment.Environment]


class _Choices:
    """Choices by what a stored plan's key is made of: policies that differ in effort or patience share one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: LeastRecentlyUsed[ChoiceKey, _Choice] | None = None

    def get(self, problem: Problem, policy: Policy, environment: _environment.Environment) -> _Choice:
        key = (problem, policy.key_items(), environment)
        with self._lock:
            if self._kept is None:
                self._kept = LeastRecentlyUsed(cache_limit())
            found = self._kept.get(key)
            if found is None:
                found = _Choice()
            self._kept.add(key, found)
            return found

    def engines(self) -> dict[str, int]:
        """For each engine, how many of the choices are its."""
        with self._lock:
            records = [choice.record for choice in (self._kept or {}).values()]
        return dict(Counter(record.config.engine for record in records if record is not None))

    def clear(self) -> None:
        with self._lock:
            self._kept = None


_choices = _Choices()
_relatives = Relatives(cache_limit)
_store_lock = threading.Lock()


def _start_afresh_in_child() -> None:
    """A fork copies locks as they are, and the threads that would release them stay behind."""
    global _choices, _relatives, _store_lock
    _choices, _relatives, _store_lock = _Choices(), Relatives(cache_limit), threading.Lock()
    counts.renew_lock()
    state.touch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_in_child)
registry.on_change(state.touch)
_stores: dict[tuple[str | None, ...], ForgivingStore] = {}


def store() -> ForgivingStore:
    """The plan store that the environment variables name now; opened when first used."""
    from convplan._store import ForgivingStore

    where = tuple(os.environ.get(name) for name in STORE_VARIABLES)
    with _store_lock:
        if where not in _stores:
            _stores[where] = ForgivingStore()
        return _stores[where]


def forget() -> None:
    """Drop every choice, relative and ready plan of this process; the store keeps its rows."""
    global _relatives
    _choices.clear()
    _relatives = Relatives(cache_limit)
    state.touch()
    with _store_lock:
        _stores.clear()


def decide(problem: Problem, policy: Policy, layer: Layer | None = None) -> tuple[_Choice, PlanRecord]:
    """The record to run a problem by: the remembered, the stored, or a newly planned one.

    Args:
        problem: not empty.
        policy: as the user gave it; flags left None follow torch's.
        layer: whose sighting of the problem this is, a weak reference to its weight; None: not known.

    Raises:
        NoPlan: no engine runs it. ReplayMiss: replay mode, and it is not stored.
    """
    resolved = policy.resolve()
    environment = _environment.current(problem.device)
    choice = _choices.get(problem, resolved, environment)
    with choice.lock:
        choice.sight(layer)
        _raise_known_failure(choice)
        job = choice.job = _agreement.agreement(choice.job, problem, resolved, environment)
        if choice.record is None or (choice.record.effort == "instant" and _refuses_untuned(resolved)):
            agreed = None if _refuses_untuned(resolved) else _agreed_by_now(choice, "final")
            choice.record = agreed or _agree(choice, _first_sight(choice, problem, resolved, environment), resolved)
        elif job is not None and not job.seen:  # chosen before there was a job
            choice.record = _agree(choice, choice.record, resolved)
        elif not is_settled(choice.record, resolved) and not choice.gave_up:
            choice.record = _seen_again(choice, choice.record, problem, resolved, environment)
        return choice, choice.record


def _seen_again(
    choice: _Choice, record: PlanRecord, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord:
    """A later sighting of a problem that runs untuned."""
    job = choice.job
    if job is not None:
        if not job.may_look:
            return record
        agreed = _agreed_by_now(choice, "final")
        if agreed is not None:
            return agreed
        if _limit_is_spent(policy):
            with job.turn() as turn:  # nobody is tuning it, and this rank will not
                choice.gave_up = turn.mine
                return _agree(choice, record, policy) if turn.mine else record
    if not _is_due(choice, policy):
        return record
    if not _varies(problem, policy, environment):
        return _tune(choice, problem, policy, environment)
    if not _share_is_spent():
        return _tune_one_of_many(choice, problem, policy, environment)
    if job is not None or choice.has_near_relative:  # ranks that agreed on this plan must not part
        return record
    if not _known_relatives(environment).has_tuned_near(problem, policy, environment):
        return record
    return _like_relatives(choice, problem, policy, environment) or record  # tuned since it was met


def _agreed_by_now(choice: _Choice, kind: _agreement.Kind) -> PlanRecord | None:
    """What the other ranks run the problem by already, if it can be had here."""
    agreed = None if choice.job is None else choice.job.look(kind)
    return None if agreed is None else _take_over(choice, agreed)


def _agree(choice: _Choice, record: PlanRecord, policy: Policy) -> PlanRecord:
    """The record that all ranks use, if they are to agree: this one, or the one that another rank was first with."""
    job = choice.job
    if job is None:
        return record
    if policy.deterministic and record.effort == "instant":
        choice.gave_up = True  # a later plan would round differently
    stays = choice.gave_up or is_settled(record, policy)
    agreed = job.publish(record, "final" if stays else "provisional")
    return record if agreed.record is record else _take_over(choice, agreed, own=record) or record


def _take_over(choice: _Choice, agreed: _agreement.Agreed, own: PlanRecord | None = None) -> PlanRecord | None:
    """Use what another rank found. None: it does not build here, and this rank stays alone with the problem."""
    record, job = agreed.record, choice.job
    assert job is not None
    plan = None if own is None or own.config != record.config else choice.take_ready(own)
    try:
        plan = plan or _build(record)
    except ConvPlanError as exc:
        job.alone = True
        warn_once(f"rank {job.board.rank} cannot use the plan of the other ranks ({exc}): {record.problem}")
        return None
    job.take(agreed)
    choice.failure = None
    choice.gave_up = agreed.kind == "final" and record.effort == "instant"
    choice.has_near_relative = any(evidence.source == RELATIVE for evidence in record.ranking)
    choice.hand_over(record, plan)
    counts.add("from_rank")
    if record.effort != "instant":
        _relatives.add(record)
        wanted = record.policy.replace(effort=record.effort)
        if store().lookup(record.problem, wanted, record.environment) is None:
            store().remember(record)
    return record


def is_settled(record: PlanRecord, policy: Policy) -> bool:
    """Whether seeing the problem more often changes nothing."""
    if record.effort != "instant" or policy.tunes_at_sight is None:
        return True
    return _limit_is_spent(policy) and _agreement.board_for(policy) is None  # else another rank may still tune it


def _limit_is_spent(policy: Policy) -> bool:
    return policy.tuning_limit_s is not None and counts.tuning_s >= policy.tuning_limit_s


def _is_due(choice: _Choice, policy: Policy) -> bool:
    at = policy.tunes_at_sight
    if at is None or choice.gave_up or _limit_is_spent(policy):
        return False
    return choice.sightings >= at * (PATIENCE if choice.has_near_relative else 1)


def _refuses_untuned(policy: Policy) -> bool:
    return policy.mode == "replay" and policy.replay_miss == "error" and policy.effort != "instant"


def _first_sight(
    choice: _Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord:
    stored = _stored(choice, problem, policy, environment)
    if stored is None and not (_refuses_untuned(policy) or _is_due(choice, policy)):
        stored = _built_ahead(choice, problem, policy, environment)
    if stored is not None:
        return stored
    if policy.mode == "replay":
        counts.add("replay_misses")
    if policy.mode == "replay" and policy.replay_miss == "error":
        counts.add("failed")
        raise ReplayMiss(problem=str(problem), policy=str(policy))
    if _is_due(choice, policy):
        return _tune(choice, problem, policy, environment)
    if _family_is_due(problem, policy, environment):
        return _tune_one_of_many(choice, problem, policy, environment)
    like = _agreed_by_now(choice, "provisional") or _like_relatives(choice, problem, policy, environment)
    if like is not None:
        return like
    # Stored only where that is what the policy asks for, and not when it stands in for a tuned one.
    keep = policy.effort == "instant" and policy.mode == "auto"
    record = _plan(choice, problem, policy, environment, "instant", keep=keep)
    if _uses_relatives(policy):
        _relatives.add(record)
    return record


def _uses_relatives(policy: Policy) -> bool:
    """Whether a first sight may take over what its relatives were tuned to.

    Not under a deterministic policy: which relatives there are depends on what was met before and on what else was
    tuned, and the same convolution must not round differently for that. Not at effort `instant`, which is the engines'
    own order.
    """
    return policy.nearest and not policy.deterministic and policy.effort != "instant"


def _known_relatives(environment: _environment.Environment) -> Relatives:
    """The index of tuned problems, with those of the store in it: they are read once for each environment."""
    where = tuple(os.environ.get(name) for name in STORE_VARIABLES)
    _relatives.load_once((where, environment), lambda: _stored_relatives(environment))
    return _relatives


def _stored_relatives(environment: _environment.Environment) -> Iterable[PlanRecord]:
    """Every record that the store holds for an environment."""
    return store().records(environment)


def _family_is_due(problem: Problem, policy: Policy, environment: _environment.Environment) -> bool:
    """Whether to tune a problem at once for its family's sake: many shapes of it were met, and none near this is tuned.

    Problems whose shapes never repeat are never seen twice, so without this none of them would ever be tuned.
    """
    at = policy.tunes_at_sight
    if at is None or not _uses_relatives(policy) or _limit_is_spent(policy):
        return False
    relatives, enough = _known_relatives(environment), at * PATIENCE
    if _share_is_spent():
        relatives.meet(problem, policy, environment, most=enough)
        return False
    return relatives.claim(problem, policy, environment, shapes=enough)


def _varies(problem: Problem, policy: Policy, environment: _environment.Environment) -> bool:
    """Whether so many shapes of a problem's family were met that this one is one of many, and tuning it can wait."""
    if not _uses_relatives(policy):
        return False
    return _known_relatives(environment).met(problem, policy, environment) >= PATIENCE


def _share_is_spent() -> bool:
    """Whether tuning problems of which there are many has had its share of the time."""
    return counts.families_s > FAMILIES_SHARE * (time.perf_counter() - counts.since)


def _tune_one_of_many(
    choice: _Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord:
    """Tune, on the account of problems whose shapes vary."""
    before = counts.tuning_s
    choice.one_of_many = True
    try:
        return _tune(choice, problem, policy, environment)
    finally:
        counts.families_s += counts.tuning_s - before


def _like_relatives(
    choice: _Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord | None:
    """An untuned plan by the choices of the nearest tuned relatives; None where there are none, or none builds here."""
    if not _uses_relatives(policy):
        return None
    nearest = _known_relatives(environment).nearest(problem, policy, environment)
    if not nearest:
        return None
    try:
        errata = store().errata(environment)
        record, plan = plan_like(
            problem, policy, environment, nearest, learned=lambda _, one: verdict(errata, problem, one.config)
        )
    except NoPlan as exc:
        log.info("no relative's choice builds here: %s", exc)
        return None
    counts.add("from_relative")
    choice.failure = None
    choice.has_near_relative = nearest[0].effort != "instant" and is_near(problem, nearest[0].problem)
    choice.hand_over(record, plan)
    return record


def _build(record: PlanRecord, rank: int = 0) -> Plan:
    """One of the record's plans: restored where the store has its serialized form, else built."""
    evidence = record.ranking[rank]
    restores = isinstance(registry.get(evidence.config.engine), Restoring)
    serialized = store().serialized(record, evidence.config) if restores else None
    plan = record.build(rank, serialized=serialized)
    if restores:
        if plan.restored:
            counts.add("restored")
        elif COMPILED in evidence.notes.behavior:
            counts.add("compiled")
    return plan


def _stored(
    choice: _Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord | None:
    """The store's record, unless its choice cannot be built here any more: then the problem is planned anew."""
    found = store().lookup(problem, policy, environment)
    if found is None:
        return None
    try:
        plan = _build(found)
    except ConvPlanError as exc:
        log.info("stored plan of %s does not build any more (%s): planning it again", problem, exc)
        return None
    choice.hand_over(found, plan)
    counts.add("from_store")
    _relatives.add(found)
    return found


def _built_ahead(
    choice: _Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord | None:
    """The store's record that was built for this GPU on a machine without one; it is untuned, as instant ones are."""
    ahead = _environment.ahead_of_time(environment)
    return None if ahead is None else _stored(choice, problem, policy.replace(effort="instant"), ahead)


def _tune(choice: _Choice, problem: Problem, policy: Policy, environment: _environment.Environment) -> PlanRecord:
    """Measure, once for all ranks of a job. A rank whose turn it is not goes on untuned, since a collective may wait
    for it; or waits, if its policy forbids that the plan changes later."""
    job = choice.job
    if job is None:
        return _tune_here(choice, problem, policy, environment)
    with job.turn(_agreement.patience_s(policy) if policy.deterministic else 0.0) as turn:
        if turn.mine:
            return _agree(choice, _tune_here(choice, problem, policy, environment), policy)
    taken = None if turn.record is None else _take_over(choice, _agreement.Agreed(turn.record, "final"))
    if taken is not None:
        return taken
    untuned = choice.record or _agreed_by_now(choice, "provisional")
    return untuned or _plan(choice, problem, policy, environment, "instant", keep=False)


def _tune_here(choice: _Choice, problem: Problem, policy: Policy, environment: _environment.Environment) -> PlanRecord:
    """Measure; where that breaks off, as for want of memory, the problem runs untuned and is not tried again."""
    begin = time.perf_counter()
    try:
        return _plan(choice, problem, policy, environment, "measure")
    except Exception as exc:  # tuning is extra work that the convolution does not depend on
        if isinstance(exc, ConvPlanError) and not isinstance(exc, TooLarge):
            raise
        counts.add("failed")
        choice.gave_up = True
        warn_once(f"tuning broke off ({type(exc).__name__}: {first_line(exc)}); it runs untuned: {problem}")
        return choice.record or _plan(choice, problem, policy, environment, "instant", keep=False)
    finally:
        counts.tuning_s += time.perf_counter() - begin
        if _limit_is_spent(policy):
            log.info(
                "tuning has taken %.1f s, the policy's limit: problems met from now on run untuned", counts.tuning_s
            )


def _plan(
    choice: _Choice,
    problem: Problem,
    policy: Policy,
    environment: _environment.Environment,
    effort: Effort,
    *,
    keep: bool = True,
) -> PlanRecord:
    """Plan and store. When nothing survives, the choice notes it, so that later calls do not search again."""
    choice.failure = None
    unfused = None if problem.epilogue.is_plain else _unfused(problem, policy, environment, effort)
    try:
        errata = store().errata(environment)
        found = find_plans(
            problem,
            policy,
            environment,
            effort=effort,
            learned=errata,
            one_of_many=choice.one_of_many,
            unfused=unfused,
        )
    except NoPlan as exc:
        counts.add("failed")
        choice.failure = _Failure(exc.problem, exc.policy, exc.rejections, registry.generation)
        raise
    record = found.record
    if found.plan is not None:
        choice.hand_over(record, found.plan)
    counts.add("planned")
    counts.spend("planning_s", record.planning_s)
    if all(evidence.source == LAST_RESORT for evidence in record.ranking):
        counts.add("fell_back")
        log.info("nothing but torch's own kernel runs %s", problem)
    if effort != "instant":
        counts.add("tuned")
        counts.spend("tuning_s", record.planning_s)
        _relatives.add(record)
    store().learn(learned_from(record))
    if keep:
        store().remember(record, found.serialized())
    return record


def _unfused(
    problem: Problem, policy: Policy, environment: _environment.Environment, effort: Effort
) -> PlanRecord | None:
    """What runs the convolution alone: remembered, stored or planned now, and kept for its own sake as well."""
    core, wanted = problem.core, policy.replace(effort="instant" if effort == "instant" else "measure")
    choice = _choices.get(core, policy, environment)
    with choice.lock:
        try:
            if not _suffices(choice.record, wanted):
                choice.record = _stored(choice, core, wanted, environment) or choice.record
            if not _suffices(choice.record, wanted):
                keep = policy.effort == "instant" or effort != "instant"
                choice.record = _plan(choice, core, policy, environment, wanted.effort, keep=keep)
        except NoPlan:
            return None
        return choice.record


def _raise_known_failure(choice: _Choice) -> None:
    """Raise what the last search ended with, unless engines were registered since."""
    known = choice.failure
    if known is not None and known.generation == registry.generation:
        raise NoPlan(problem=known.problem, policy=known.policy, rejections=known.rejections)


def adopt(problem: Problem, policy: Policy, *, force: bool = False) -> tuple[PlanRecord, bool]:
    """Plan a problem now, with the policy's effort and whatever `tune_after` says, and use it from here on.

    Returns:
        The record, and whether it was planned now (False: a record of that effort was already there).
    """
    resolved = policy.resolve()
    environment = _environment.current(problem.device)
    choice = _choices.get(problem, resolved, environment)
    replay = resolved.mode == "replay"
    with choice.lock:
        job = choice.job = _agreement.agreement(choice.job, problem, resolved, environment, asked=resolved.effort)
        if not _suffices(choice.record, resolved):
            choice.record = _stored(choice, problem, resolved, environment) or choice.record
        if choice.record is None and resolved.effort == "instant":
            choice.record = _built_ahead(choice, problem, resolved, environment)
        if choice.record is not None and _suffices(choice.record, resolved) and (replay or not force):
            choice.record = _agree(choice, choice.record, resolved)
            return choice.record, False
        if replay:
            counts.add("replay_misses")
            counts.add("failed")
            raise ReplayMiss(problem=str(problem), policy=str(resolved))
        choice.one_of_many = False  # somebody wants this very one
        with nullcontext(_agreement.Turn(True)) if job is None else job.turn(_agreement.patience_s(resolved)) as turn:
            taken = None if turn.record is None else _take_over(choice, _agreement.Agreed(turn.record, "final"))
            choice.record = taken or _agree(
                choice, _plan(choice, problem, resolved, environment, resolved.effort), resolved
            )
        state.touch()
        return choice.record, taken is None


def _suffices(record: PlanRecord | None, policy: Policy) -> bool:
    return record is not None and EFFORTS.index(record.effort) >= EFFORTS.index(policy.effort)


class Runner:
    """Runs one problem by its choice: `runner(first, second, bias, out)`, with what else its `Run` takes behind that.

    Belongs to one thread and one device. While its choice is provisional, each call counts as one more sighting of the
    problem. While a CUDA graph is captured nothing is planned, built or counted.

    Args:
        problem, policy, layer: as for `decide`.
        device: index of the GPU, -1 for the CPU.

    Attributes:
        layer: whose call comes next, while calls count.
        settled: they do not count any more: nothing but a new token can change the choice.

    Raises:
        NoPlan: as `decide`. CaptureMiss: a CUDA graph is being captured.
    """

    def __init__(self, problem: Problem, policy: Policy, device: int = -1, layer: Layer | None = None) -> None:
        self.layer = layer
        self._problem = problem
        self._policy = policy
        self._device = device
        with on_device(device):
            if in_graph_capture(device):
                counts.add("capture_misses")
                raise CaptureMiss(problem=str(problem), policy=str(policy))
            self._choice, self._record = decide(problem, policy, layer)
            self._take(self._record)
        self._fresh = True

    def _take(self, record: PlanRecord) -> None:
        self._record = record
        self.settled = self._choice.gave_up or is_settled(record, self._policy.resolve())
        self._plan = self._build()
        self._run: Run = ranged(self._plan.bound_run(), self._plan)
        log.debug("%s runs by %s (effort %s)", self._problem, self._plan.config, self._record.effort)

    def _build(self) -> Plan:
        """Build the record's choice, or the first of those ranked after it that still builds."""
        ready = self._choice.take_ready(self._record)
        if ready is not None:
            return ready
        tried = []
        for record in self._records():
            for rank in range(len(record.ranking)):
                try:
                    plan = _build(record, rank)
                except ConvPlanError as exc:
                    tried.append((str(record.ranking[rank].config), str(exc)))
                else:
                    self._record = record
                    return plan
        raise NoPlan(problem=str(self._problem), policy=str(self._policy), rejections=tried)

    def _records(self) -> Iterator[PlanRecord]:
        """Where plans are looked for: the record, and behind one taken over from relatives the engines' own choice."""
        yield self._record
        if not any(evidence.source == RELATIVE for evidence in (*self._record.ranking, *self._record.rejected)):
            return
        with self._choice.lock, on_device(self._device):
            other = self._choice.record
            if other is None or other is self._record:  # else another thread has moved on already
                environment = _environment.current(self._problem.device)
                try:
                    other = _plan(
                        self._choice, self._problem, self._policy.resolve(), environment, "instant", keep=False
                    )
                except NoPlan:
                    return
                self._choice.record = other
                self._choice.has_near_relative = False
        yield other

    def __call__(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        *more: torch.Tensor | None,
    ) -> torch.Tensor:
        if not self.settled or self._choice.record is not self._record:
            self._look_again()
        try:
            return self._run(first, second, bias, out, *more)
        except Exception as exc:  # whatever an engine raises, the convolution must still be computed
            return self._next_ranked(exc, first, second, bias, out, *more)

    @property
    def unwatched(self) -> Run | None:
        """The bare plan once nothing but a new token can change the choice; its failures are for `recover`."""
        return self._run if self.settled else None

    @property
    def plan(self) -> Plan:
        """What runs the problem now."""
        return self._plan

    @property
    def settled_as(self) -> str:
        """The entry of torch that the settled plan is nothing but a call of; empty while it may still change."""
        return self._plan.as_torch if self.settled else ""

    def recover(
        self, exc: Exception, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute what the bare plan failed to, by the plans ranked behind it.

        Raises:
            ExecutionFailed: they fail as well.
        """
        return self._next_ranked(exc, first, second, bias, None)

    def _look_again(self) -> None:
        """Count one more sighting of a provisional choice; take over the record when another one was chosen."""
        with on_device(self._device):
            if in_graph_capture(self._device):
                log.info("a CUDA graph keeps an untuned plan, more calls before its capture tune it: %s", self._problem)
                return
            record = self._choice.record
            if self._fresh:  # the sighting that made this runner is counted already
                self._fresh = False
            elif not self.settled:
                self._choice, record = decide(self._problem, self._policy, self.layer)
            if record is not None and record is not self._record:
                self._take(record)

    def _next_ranked(
        self,
        exc: Exception,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        *more: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the best-ranked plan that works, and demote those that failed for the rest of the process (B18, B23)."""
        counts.add("failed")
        failed = {self._plan.config: first_line(exc)}
        drop_tensors(exc)
        if in_graph_capture(self._device):
            raise ExecutionFailed(plan=str(self._problem), tried=[(str(self._plan.config), first_line(exc))]) from exc
        for record in self._records():
            for rank, evidence in enumerate(record.ranking):
                if evidence.config in failed:
                    continue
                try:
                    with on_device(self._device):
                        plan = _build(record, rank)
                    result = plan.unchecked_run(first, second, bias, out, *more)
                except Exception as next_exc:  # same as above: try the one after
                    failed[evidence.config] = first_line(next_exc)
                    drop_tensors(next_exc)
                    continue
                warn_once(
                    f"plan {self._plan.config} failed ({first_line(exc)}); using {plan.config} for {self._problem}"
                )
                counts.add("fell_back")
                self._demote(record, failed)
                self._plan, self._run = plan, ranged(plan.unchecked_run, plan)
                return result
        tried = [(str(config), reason) for config, reason in failed.items()]
        raise ExecutionFailed(plan=str(self._problem), tried=tried) from exc

    def _demote(self, record: PlanRecord, failed: dict[Any, str]) -> None:
        """Re-rank: what failed goes to the rejected, in this process only, since memory may be short for now alone."""

        def with_reason(evidence: Evidence) -> Evidence:
            return msgspec.structs.replace(evidence, rejected="run", reason=failed[evidence.config])

        with self._choice.lock:
            self._record = msgspec.structs.replace(
                record,
                ranking=tuple(e for e in record.ranking if e.config not in failed),
                rejected=(*record.rejected, *(with_reason(e) for e in record.ranking if e.config in failed)),
            )
            self._choice.record = self._record
        state.touch()  # callers of every thread look again


def drop_tensors(exc: BaseException) -> None:
    """Let go of what the frames of a failed run hold: its output may be just the memory that the next plan needs."""
    traceback.clear_frames(exc.__traceback__)


def check_policy(policy: Policy) -> Policy:
    """The policy itself, after making sure that the engines it names exist.

    Raises:
        PolicyError: one does not; lists those that do.
    """
    if not isinstance(policy, Policy):
        from convplan._errors import PolicyError

        raise PolicyError(f"policy is {policy!r}, expected a convplan.Policy or None")
    registry.allowed(policy.engines)
    return policy

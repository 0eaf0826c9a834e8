"""The store as a running program sees it: `ForgivingStore`. Trouble is one warning, and work goes on in memory.

What belongs to this environment is read from the store in one look, when something is first asked (`Snapshot`), and
stays undecoded until it is asked for. A SQLite file is read by `_snapshot`, without SQLAlchemy; every other store, and
a file in which anything is odd, by `PlanStore`. A plan that the snapshot lacks, or has with too little effort, is asked
for once more by its key, so that processes share what they find while they run.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

from convplan._environment import Environment
from convplan._errors import ConvPlanWarning, SpecError, StoreError
from convplan._key import choice_key, plan_key
from convplan._learned import LearnedErratum, RawErratum, in_scope, merged
from convplan._plan import PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._rows import RawRow, read_row, satisfies
from convplan._serialized import MAX_PLAIN_BYTES, RawPart, config_key, read_part
from convplan.engines.base import EngineConfig

if TYPE_CHECKING:
    from convplan._snapshot import QuickReader
    from convplan._store import PlanStore

log = logging.getLogger("convplan.store")

RETRY_AFTER_S = 30.0  # how long a store that failed is left alone
MOST_ROWS = 4_000  # in a store, of all environments: with more, plans are read one at a time
MOST_BYTES = 64 * 2**20  # of records that are kept undecoded
MOST_ENVIRONMENTS = 8  # whose snapshots are kept: a program may change its number of threads
NOTHING: Mapping[EngineConfig, bytes] = MappingProxyType({})

Answer = TypeVar("Answer")


class Odd(Exception):
    """A file cannot be read in the quick way."""


class Snapshot(NamedTuple):
    """What a store held for one environment at one moment.

    Attributes:
        rows: its plans by key, not looked at yet; None where there are too many to look through or to keep.
        errata: rows for its device.
    """

    rows: dict[str, RawRow] | None
    errata: list[RawErratum]


class Index(NamedTuple):
    """Which plans a store holds, of all environments, and what tells that nothing was written since."""

    version: object
    keys: frozenset[str]
    choices: frozenset[str]


class Reader(Protocol):
    """Who answers what is asked of a store while a program runs."""

    def snapshot(self, environment: Environment) -> Snapshot:
        """Everything for one environment."""

    def index(self, known: Index | None) -> Index | None:
        """Which plans there are: `known` itself while that holds; None where only asking for each plan tells."""

    def raw_row(self, key: str) -> RawRow | None:
        """One plan's row."""

    def raw_part(self, key: str, config_key: str) -> RawPart | None:
        """One serialized plan's row."""

    def find_elsewhere(self, choice: str, environment: Environment) -> list[Environment]:
        """The other environments that hold a plan for the same question."""


class _Waiting(NamedTuple):
    """What the store does not hold yet."""

    record: PlanRecord
    serialized: Mapping[EngineConfig, bytes]


class ForgivingStore:
    """The store as a running program sees it: never an error, one warning for each kind of trouble, then memory.

    Records that could not be written are kept in memory, answer later look-ups, and are written with the next record
    once the store works again. A store that failed is left alone for `RETRY_AFTER_S` seconds, so that a lock or a dead
    server costs one wait and not one for every convolution; one that can only be read goes on being read.

    Args:
        store: None: the default store, looked up at first use.
        clock: seconds, monotonic; tests give their own.

    Safe from several threads: state is single dictionary operations, and no lock is held that a fork could leave
    locked.
    """

    def __init__(self, store: PlanStore | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._memory: dict[str, _Waiting] = {}  # what the store does not hold
        self._unstorable: dict[str, object] = {}  # keys in there that it refused for good
        self._snapshots: dict[Environment, Snapshot] = {}
        self._index: Index | None = None
        self._quick: QuickReader | None = None
        self._quick_failed = False
        self._own_errata: dict[str, LearnedErratum] = {}  # that this process learned, in the store or not
        self._unwritten_errata: dict[str, LearnedErratum] = {}
        self._errata: dict[Environment, tuple[LearnedErratum, ...]] = {}
        self._warned: dict[str, object] = {}
        self._rests_until = {"read": -math.inf, "written": -math.inf}

    @property
    def location(self) -> str:
        """Path or URL of the store, without a password."""
        try:
            return self._opened().location
        except StoreError as exc:
            return exc.path

    @property
    def unwritten(self) -> int:
        """Number of records that exist only in this process."""
        return len(self._memory)

    # ---- plans

    def lookup(self, problem: Problem, policy: Policy, environment: Environment) -> PlanRecord | None:
        """The stored plan for this question, if it was found in this environment with at least the policy's effort.

        When there is none, but another environment holds one, a warning says so once: those rows are not used and stay.

        Args:
            policy: resolved; its `effort` is the least that counts.
        """
        key = plan_key(problem, policy, environment)
        kept = self._memory.get(key)
        if kept is not None and satisfies(kept.record.effort, policy.effort):
            return kept.record
        if self._rests("read"):
            return None
        try:
            record = self._from_snapshot(key, environment)
            if record is None or not satisfies(record.effort, policy.effort):
                # Most problems that are met first are in no store: then nothing more is asked.
                index = self._index = self._ask(lambda reader: reader.index(self._index))
                if index is None or key in index.keys:
                    record = self._checked(self._ask(lambda reader: reader.raw_row(key)))
                elsewhere = record is None and kept is None and not environment.is_ahead
                if elsewhere and "elsewhere" not in self._warned:
                    choice = choice_key(problem, policy)
                    if index is None or choice in index.choices:
                        self._report_elsewhere(choice, environment)
        except StoreError as exc:
            self._trouble("read", exc)
            return None
        return record if record is not None and satisfies(record.effort, policy.effort) else None

    def records(self, environment: Environment) -> list[PlanRecord]:
        """Every usable plan that was found in an environment, as the store is now, with those that only memory holds.

        One look at the store, and every record decoded: for who wants all of them.
        """
        kept = {key: item.record for key, item in list(self._memory.items())}
        mine = [record for record in kept.values() if record.environment == environment]
        if self._rests("read"):
            return mine
        try:
            rows = self._ask(lambda reader: reader.snapshot(environment)).rows
            if rows is None:  # too many for one look
                listed = (row.record for row in self._opened().rows(device=environment.device))
                found = [record for record in listed if record is not None and record.environment == environment]
            else:
                found = [record for record in map(self._checked, rows.values()) if record is not None]
        except StoreError as exc:
            self._trouble("read", exc)
            return mine
        return [*(record for record in found if record.key not in kept), *mine]

    def serialized(self, record: PlanRecord, config: EngineConfig) -> bytes | None:
        """What was serialized of one candidate of a record, if it is there and unharmed.

        One that was altered is not used; a warning names the first.
        """
        key = record.key
        kept = self._memory.get(key)
        if kept is not None and config in kept.serialized:
            return kept.serialized[config]
        if self._rests("read"):
            return None
        try:
            row = self._ask(lambda reader: reader.raw_part(key, config_key(config)))
        except StoreError as exc:
            self._trouble("read", exc)
            return None
        if row is None:
            return None
        plain, trouble = read_part(row, key, config)
        if plain is None:
            self._warn_once(
                "serialized",
                f"plan store {self.location}: the serialized plan of {config} under key {key} is not used: {trouble}. "
                "It is built anew; `convplan check` lists all of them",
            )
        return plain

    def remember(self, record: PlanRecord, serialized: Mapping[EngineConfig, bytes] = NOTHING) -> None:
        """Store a record, and those that could not be stored before; what cannot be written stays in memory.

        Args:
            serialized: what `Built.serialize` gave for candidates of the ranking; stored with the record or not at all.
        """
        key = record.key
        kept = self._memory.get(key)
        if kept is None or satisfies(record.effort, kept.record.effort):
            self._memory[key] = _Waiting(record, self._storable(record, serialized))
            self._unstorable.pop(key, None)
        if self._rests("written"):
            return
        self._index = None
        for waiting, item in list(self._memory.items()):
            if waiting in self._unstorable:
                continue
            try:
                self._opened().put(item.record, item.serialized)
            except StoreError as exc:
                self._trouble("written", exc)
                return
            except SpecError as exc:
                self._unstorable[waiting] = None
                self._warn_once(str(exc), f"{exc}; it is used in this process only")
                continue
            for snapshot in list(self._snapshots.values()):
                if snapshot.rows is not None:
                    snapshot.rows.pop(waiting, None)
            if self._memory.get(waiting) is item:
                self._memory.pop(waiting, None)
        self._write_errata()

    def _from_snapshot(self, key: str, environment: Environment) -> PlanRecord | None:
        rows = self._snapshot(environment).rows
        # Taken out: the caller remembers it, and whoever asks again is told the newest.
        return None if rows is None else self._checked(rows.pop(key, None))

    def _snapshot(self, environment: Environment) -> Snapshot:
        found = self._snapshots.get(environment)
        if found is None:
            found = self._ask(lambda reader: reader.snapshot(environment))
            while len(self._snapshots) >= MOST_ENVIRONMENTS:
                self._snapshots.pop(next(iter(list(self._snapshots)), environment), None)
            self._snapshots[environment] = found
        return found

    def _checked(self, row: RawRow | None) -> PlanRecord | None:
        if row is None:
            return None
        record, trouble = read_row(row)
        if trouble:
            log.debug("%s: row %s is not used: %s", self.location, row.key, trouble)
        return record

    def _storable(self, record: PlanRecord, serialized: Mapping[EngineConfig, bytes]) -> Mapping[EngineConfig, bytes]:
        """Without those that no store takes: the record is worth more than they are."""
        ranked = {evidence.config for evidence in record.ranking}
        fit = {
            config: plain
            for config, plain in serialized.items()
            if config in ranked and 0 < len(plain) <= MAX_PLAIN_BYTES
        }
        if len(fit) < len(serialized):
            log.info("%d serialized plans of %s are too large to be stored", len(serialized) - len(fit), record.key)
        return fit

    # ---- learned errata

    def errata(self, environment: Environment) -> tuple[LearnedErratum, ...]:
        """What was learned about configurations that fail there: what the store held, and what this process adds."""
        if environment not in self._errata and not self._rests("read"):
            try:
                self._errata[environment] = in_scope(self._snapshot(environment).errata, environment)
            except StoreError as exc:
                self._trouble("read", exc)
        own = {key: one for key, one in list(self._own_errata.items()) if one.applies_in(environment)}
        return (*(one for one in self._errata.get(environment, ()) if one.id not in own), *own.values())

    def learn(self, errata: Iterable[LearnedErratum]) -> None:
        """Store observations; what cannot be written counts in this process and is written later."""
        for one in errata:
            key = one.id
            known = self._own_errata.get(key)
            self._own_errata[key] = one if known is None else merged(known, one)
            waiting = self._unwritten_errata.get(key)
            self._unwritten_errata[key] = one if waiting is None else merged(waiting, one)
        self._write_errata()

    def _write_errata(self) -> None:
        if not self._unwritten_errata or self._rests("written"):
            return
        for key, one in list(self._unwritten_errata.items()):
            try:
                self._opened().learn([one])
            except StoreError as exc:
                self._trouble("written", exc)
                return
            except SpecError as exc:
                log.debug("%s: %s", self.location, exc)
            if self._unwritten_errata.get(key) is one:
                self._unwritten_errata.pop(key, None)

    # ---- the store behind it

    def close(self) -> None:
        """Give the connections back; records in memory stay."""
        if self._quick is not None:
            self._quick.close()
        if self._store is not None:
            self._store.close()

    def _opened(self) -> PlanStore:
        if self._store is None:
            from convplan._store import PlanStore

            self._store = PlanStore.default()
        return self._store

    def _ask(self, question: Callable[[Reader], Answer]) -> Answer:
        """The answer of the quick reader, or where it is put off, of the store itself, which names what is wrong."""
        store = self._opened()
        if self._quick is None and store.path is not None and not self._quick_failed:
            from convplan._snapshot import QuickReader

            self._quick = QuickReader(store.path, shown=store.location, wait_s=store.wait_s)
        quick = self._quick
        if quick is not None:
            try:
                return question(quick)
            except Odd as exc:
                log.debug("%s: read by SQLAlchemy from now on: %s", store.location, exc)
                self._quick, self._quick_failed = None, True
        return question(store)

    def _rests(self, what: str) -> bool:
        return self._clock() < self._rests_until[what]

    def _trouble(self, what: Literal["read", "written"], exc: StoreError) -> None:
        until = self._clock() + RETRY_AFTER_S
        self._rests_until["written"] = until
        if what == "read":
            self._rests_until["read"] = until
        self._warn_once(
            exc.reason,
            f"plan store {exc.path} cannot be {what}: {exc.reason}. Work goes on in memory; plans found now are lost "
            "when this process ends, unless the store can be written before",
        )

    def _report_elsewhere(self, choice: str, environment: Environment) -> None:
        others = self._ask(lambda reader: reader.find_elsewhere(choice, environment))
        if others and not any(other.differs_by_switches(environment) for other in others):
            changes = min((other.differences(environment) for other in others), key=lambda text: text.count(","))
            self._warn_once(
                "elsewhere",
                f"plan store {self.location} answers this problem for another environment ({changes}); those plans "
                "are not used here and stay as they are, this environment gets its own",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        mine = object()
        if self._warned.setdefault(kind, mine) is mine:
            warnings.warn(message, ConvPlanWarning, stacklevel=4)
        else:
            log.debug("%s", message)

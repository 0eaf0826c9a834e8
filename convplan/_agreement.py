"""Which plan the ranks of a distributed job agree on: one problem's place on their board, and what a row there must be.

Two kinds of plans are agreed on, and for each the first that is published stays:

    provisional   the untuned plan that runs until the problem is tuned
    final         the plan that the problem stays with: the tuned one, or the untuned where nobody will tune it

Rows on the board come from strangers and go through the same checks as those of a store. One that cannot be believed,
or used, counts as not there: whoever meets it goes on to the next place under the same name, and so do all others to
whom it looks the same. The board itself is `_ranks`; building plans and counting sightings is `_deciding`'s business.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal, NamedTuple

import msgspec

from convplan import _ranks
from convplan._environment import Environment, ahead_of_time
from convplan._errors import ConvPlanWarning, SpecError
from convplan._key import plan_key
from convplan._plan import PlanRecord
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan._ranks import MOST_BYTES, Board, BoardGone
from convplan._rows import ROW_SCHEMA, RawRow, read_row, row_of, satisfies

log = logging.getLogger("convplan.ranks")

PLACES = 3  # under one name: the second is used when the first is damaged
MOST_BRIEF = 16  # candidates of a record that is too large to be published whole
FIRST_PAUSE_S = 0.01  # between two looks at what another rank is working on
LONGEST_PAUSE_S = 1.0
PATIENCE_S = 30.0  # how long another's tuning is waited for, beside ten times what the race may take
IMPATIENCE_S = 1.0  # the same once a wait was in vain

Kind = Literal["provisional", "final"]


class Agreed(NamedTuple):
    """What the ranks run a problem by."""

    record: PlanRecord
    kind: Kind


class Turn(NamedTuple):
    """Who tunes: this rank, or nobody any more since there is a final record, or (neither) another rank, still."""

    mine: bool
    record: PlanRecord | None = None


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    schema: int
    checksum: str
    record: str


_decoder = msgspec.json.Decoder(_Row)


def board_for(policy: Policy) -> Board | None:
    """The board of the job that this process belongs to, where the policy wants agreement."""
    return _ranks.current() if policy.ranks == "agree" else None


def patience_s(policy: Policy) -> float:
    """How long another rank's tuning of one problem may take before it is no longer waited for."""
    search_s = 2 * policy.search_s if policy.effort == "exhaustive" else 0.0
    return PATIENCE_S + 10 * policy.budget_s + search_s


def start_of(total: int, policy: Policy) -> int:
    """Where in a list of problems this rank begins to tune, so that the ranks share the work."""
    board = board_for(policy)
    return 0 if board is None else total * board.rank // board.ranks


def agreement(
    known: Agreement | None,
    problem: Problem,
    policy: Policy,
    environment: Environment,
    *,
    asked: Effort | None = None,
) -> Agreement | None:
    """A problem's place on the job's board, None outside of a job.

    Args:
        known: the one of an earlier call, which is kept where it is still the right one.
        policy: resolved.
        asked: the effort that somebody asked for by name; None: as the policy has it for a problem that is met.
    """
    board = board_for(policy)
    if board is None:
        return None
    wanted = asked or ("instant" if policy.tunes_at_sight is None else policy.effort)
    if known is not None and known.board is board:
        if (known.wanted, known.least) == (wanted, asked):
            return known
        return Agreement(board, known.keys, wanted, least=asked, seen=known.seen)
    ahead = ahead_of_time(environment)
    places = (environment,) if ahead is None else (environment, ahead)
    return Agreement(board, tuple(plan_key(problem, policy, place) for place in places), wanted, least=asked)


class Agreement:
    """One problem's place on the board. Not safe from several threads: its owner's lock protects it.

    Everything here answers as if the rank were alone once the board is gone.

    Args:
        board: of the job.
        keys: of the plan, and of one that was built ahead of time for this device. Environments are part of them, so
            ranks on different devices share nothing.
        wanted: the effort of the final plan. Each has its own name on the board.
        least: final records of less effort count as not there. None: all count.
        seen: this rank has its plan from here already.

    Attributes:
        alone: what the others agreed on cannot be used here; set by the owner.
    """

    def __init__(
        self, board: Board, keys: tuple[str, ...], wanted: Effort, *, least: Effort | None = None, seen: bool = False
    ) -> None:
        from convplan import __version__

        self.board, self.keys, self.wanted, self.least, self.seen = board, keys, wanted, least, seen
        self.alone = False
        self._name = f"{__version__}/{ROW_SCHEMA}/{keys[0]}/{wanted}"
        self._has: Agreed | None = None  # what this rank runs by
        self._pause_s = FIRST_PAUSE_S
        self._next_look_s = 0.0

    @property
    def may_look(self) -> bool:
        """Whether it is time to look again at what another rank works on."""
        return time.monotonic() >= self._next_look_s

    def look(self, kind: Kind) -> Agreed | None:
        """What the ranks agreed on so far. Waits for nobody."""
        record = None
        if not self.alone:
            with suppress(BoardGone):
                record = self._read(kind)
        return None if record is None else Agreed(record, kind)

    def publish(self, record: PlanRecord, kind: Kind) -> Agreed:
        """Propose a record; what was proposed first is what counts.

        Returns:
            What the ranks agree on now: the record itself, or that of another rank.
        """
        self.seen = True
        if self._has is not None and self._has.record is record and self._has.kind in (kind, "final"):
            return self._has
        found = record
        if not self.alone:
            with suppress(BoardGone):
                found = self._publish(record, kind)
        self._has = Agreed(found, kind)
        return self._has

    def take(self, agreed: Agreed) -> None:
        """Note that this rank runs by what was agreed."""
        self.seen, self._has = True, agreed

    @contextmanager
    def turn(self, wait_s: float = 0.0) -> Iterator[Turn]:
        """A block in which this rank tunes the problem, if that is its turn; no other rank does meanwhile.

        Args:
            wait_s: how long to wait for another rank that is at it. It is waited for no longer than it lives.
        """
        found = Turn(mine=True) if self.alone else self._take_turn(wait_s)
        try:
            yield found
        finally:
            if found.mine and not self.alone:
                with suppress(BoardGone):
                    self.board.release(self._name)

    def _take_turn(self, wait_s: float) -> Turn:
        if self.board.lost_patience:
            wait_s = min(wait_s, IMPATIENCE_S)
        until_s, pause_s = time.monotonic() + wait_s, FIRST_PAUSE_S
        try:
            while True:
                mine = self.board.claim(self._name)
                record = self._read("final")  # after the claim: whoever had it before may have published
                if record is not None:
                    if mine:
                        self.board.release(self._name)
                    return Turn(mine=False, record=record)
                if mine:
                    return Turn(mine=True)
                if time.monotonic() >= until_s:
                    break
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S / 4)
        except BoardGone:
            return Turn(mine=True)
        if wait_s > 0:
            self.board.lost_patience = True
            log.info("rank %s: another rank has tuned for longer than %.0f s: %s", self.board.rank, wait_s, self._name)
        self._next_look_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return Turn(mine=False)

    # ---- rows

    def _places(self, kind: Kind) -> list[str]:
        return [f"{self._name}/{kind}/{place}" for place in range(PLACES)]

    def _read(self, kind: Kind) -> PlanRecord | None:
        for place in self._places(kind):
            row = self.board.read(place)
            if row is None:
                return None
            record = self._believed(row, place)
            if record is not None:
                return record
        return None

    def _publish(self, record: PlanRecord, kind: Kind) -> PlanRecord:
        try:
            text = _row_text(record)
        except SpecError as exc:
            log.info("%s", exc)
            return self._read(kind) or record
        for place in self._places(kind):
            row = self.board.publish(place, text)
            found = record if row == text.encode() else self._believed(row, place)
            if found is not None:
                return found
        return record

    def _believed(self, row: bytes, place: str) -> PlanRecord | None:
        """The record of a row, or None where it cannot be used here."""
        record, trouble = _read_text(row, self.keys)
        if record is None:
            message = f"rank {self.board.rank}: what the job's key-value store holds as a plan is not used: {trouble}"
            if not self.board.warned:
                self.board.warned = True
                warnings.warn(message, ConvPlanWarning, stacklevel=2)
            log.debug("%s (%s)", message, place)
        elif "/final/" in place and self.least is not None and not satisfies(record.effort, self.least):
            return None
        return record


def _read_text(row: bytes, keys: tuple[str, ...]) -> tuple[PlanRecord | None, str]:
    from convplan._store import registered_engines, usable_trouble

    if len(row) > MOST_BYTES:
        return None, f"it has {len(row)} bytes, expected at most {MOST_BYTES}"
    try:
        found = _decoder.decode(row)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None, "it is no row of this convplan"
    if found.key not in keys:
        return None, "it belongs to another problem, policy or environment"
    record, trouble = read_row(RawRow(found.key, found.schema, found.checksum, found.record))
    trouble = trouble if record is None else usable_trouble(record, registered_engines())
    return (None, trouble) if trouble else (record, "")


def _row_text(record: PlanRecord) -> str:
    """A record's row, without the single timings and the rejected candidates where it would be too large.

    Raises:
        SpecError: it cannot be published.
    """
    text = _encoded(record)
    if len(text) > MOST_BYTES // 4:
        leading = tuple(msgspec.structs.replace(one, samples_us=()) for one in record.ranking[:MOST_BRIEF])
        text = _encoded(msgspec.structs.replace(record, ranking=leading, rejected=(), curve=()))
    if len(text.encode()) > MOST_BYTES:
        raise SpecError(f"this plan record is too large for the other ranks: {record}")
    return text


def _encoded(record: PlanRecord) -> str:
    row = row_of(record)
    return msgspec.json.encode({name: row[name] for name in ("key", "schema", "checksum", "record")}).decode()

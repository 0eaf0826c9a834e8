"""What the processes of one distributed job tell each other: `Board`, rows of text under names, in the job's own
key-value store.

The store is the one that `torch.distributed.init_process_group` brought along (TCP, file or memory). It answers each
process by itself, so nothing here is a collective: a process that asks for what nobody else ever will gets its answer,
and none waits for another unless it says so. What a row means, and whether it may be believed, is `_agreement`'s
business: rows come from strangers.

torch.distributed is only looked at where the program has imported and initialized it.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from convplan._errors import ConvPlanWarning

log = logging.getLogger("convplan.ranks")

PREFIX = "convplan"
ANSWER_S = 10.0  # how long the store may take to answer; its host may be stopped, and a socket waits without end
BEAT_S = 1.0  # a process that holds a claim says this often that it lives
EXPIRY_S = 10.0  # a claim whose holder said nothing for so long is free
MOST_BYTES = 2**20  # of one row; the TCP store takes 8 MiB
MOST_WATCHED = 4_096  # claims of others that are kept an eye on
MOST_TOKEN_BYTES = 200
FREE = "free"  # a claim that was given back


class KeyValueStore(Protocol):
    """What is used of a `torch.distributed.Store`; none of it waits for another process."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all of them have a value."""

    def get(self, key: str, /) -> bytes:
        """The value of a key that has one."""

    def set(self, key: str, value: str, /) -> None:
        """Write a value."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Write where the value is the expected one, or where there is none and "" is expected; the value after it."""


class BoardGone(Exception):
    """The store failed, or did not answer in time; it is not asked again."""


class _Seen(NamedTuple):
    """Another's claim: its holder's token, the last sign of life, and when that was first seen."""

    holder: bytes
    beat: bytes
    since_s: float


class _Question:
    """One piece of work for the board's thread, and its answer."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.answered = threading.Event()
        self.answer: Any = None
        self.error: Exception | None = None


class Board:
    """Rows under names, and claims to work on them, for the processes of one job.

    The first row published under a name stays. A claim belongs to one process until that gives it back or dies: while
    it holds one it gives signs of life, and others see those stop by their own clocks.

    All questions go through one thread of the board's own, so that a store that does not answer costs `ANSWER_S` once.

    Args:
        connect: gives the job's store; called once, on the board's thread.
        rank, ranks: which of how many processes this is.
        clock: seconds, monotonic; tests give their own.

    Safe from several threads. Every method raises `BoardGone` once the store has failed, after one warning.
    """

    def __init__(
        self,
        connect: Callable[[], KeyValueStore],
        rank: int,
        ranks: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.gone = False
        self.lost_patience = False  # a wait ended in vain
        self.warned = False  # of a row that cannot be used
        self._store: KeyValueStore
        self._clock = clock
        self._token = f"{rank}.{uuid.uuid4().hex}"
        self._beats = 0
        self._next_beat_s = 0.0
        self._held: set[str] = set()
        self._watched: dict[str, _Seen] = {}
        self._questions: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, args=(connect,), name="convplan-ranks", daemon=True).start()

    # ---- rows

    def read(self, name: str) -> bytes | None:
        """The row under a name; None while there is none."""
        found: bytes | None = self._ask(lambda: self._value(f"row/{name}"))
        return found

    def publish(self, name: str, row: str) -> bytes:
        """Put a row under a name, unless there is one.

        Returns:
            The row under that name from now on.
        """
        found: bytes = self._ask(lambda: self._store.compare_set(f"row/{name}", "", row))
        return found

    # ---- claims

    def claim(self, name: str) -> bool:
        """Ask for the work on a name; True: it is the caller's, who ends it by `release`.

        One that another process holds becomes free once this process has seen no sign of life from it for `EXPIRY_S`,
        so ask again now and then.
        """
        found: bool = self._ask(lambda: self._try_claim(name))
        return found

    def release(self, name: str) -> None:
        """Give a claim back: whoever asks next gets it."""
        self._ask(lambda: self._end_claim(name))

    def close(self) -> None:
        """Stop answering, and let go of the connection."""
        self.gone = True
        self._questions.put(None)

    # ---- on the board's own thread

    def _value(self, key: str) -> bytes | None:
        return self._store.get(key) if self._store.check([key]) else None

    def _try_claim(self, name: str) -> bool:
        key = f"claim/{name}"
        self._give_sign_of_life()  # before the claim can be seen
        holder = self._store.compare_set(key, "", self._token)
        if holder == FREE.encode():
            holder = self._store.compare_set(key, FREE, self._token)
        if holder != self._token.encode() and not self._take_over(key, name, holder):
            return False
        self._watched.pop(name, None)
        self._held.add(name)
        return True

    def _take_over(self, key: str, name: str, holder: bytes) -> bool:
        """Take a claim from a holder who gives no sign of life any more."""
        told = holder.decode("utf-8", "replace") if len(holder) <= MOST_TOKEN_BYTES else ""
        beat = self._value(f"beat/{told}") or b""
        now, seen = self._clock(), self._watched.get(name)
        if seen is None or (seen.holder, seen.beat) != (holder, beat):
            if len(self._watched) >= MOST_WATCHED:
                self._watched.clear()
            self._watched[name] = _Seen(holder, beat, now)
            return False
        if now - seen.since_s < EXPIRY_S:
            return False
        if told.encode() != holder:  # nobody of this package wrote it, and it cannot be named to be exchanged
            return True
        log.info("rank %s: the work on %s was left by %s; it is taken over", self.rank, name, told)
        return self._store.compare_set(key, told, self._token) == self._token.encode()

    def _end_claim(self, name: str) -> None:
        self._held.discard(name)
        self._store.compare_set(f"claim/{name}", self._token, FREE)

    def _give_sign_of_life(self) -> None:
        self._beats += 1
        self._next_beat_s = self._clock() + BEAT_S
        self._store.set(f"beat/{self._token}", str(self._beats))

    def _serve(self, connect: Callable[[], KeyValueStore]) -> None:
        failed: Exception | None = None
        try:
            self._store = connect()
        except Exception as exc:
            failed = exc
        while (question := self._next_question()) is not None:
            try:
                if failed is not None:
                    raise failed
                question.answer = question.work()
            except Exception as exc:
                question.error = exc
            question.answered.set()
            del question

    def _next_question(self) -> _Question | None:
        """Wait for the next question, None for the end; as long as claims are held, give signs of life meanwhile."""
        while True:
            if self._held and self._clock() >= self._next_beat_s:
                try:
                    self._give_sign_of_life()
                except Exception as exc:  # the next question meets it too, and its asker is told
                    log.debug("rank %s: the store takes no sign of life: %s", self.rank, exc)
                    self._held.clear()
            try:
                return self._questions.get(timeout=BEAT_S / 2 if self._held else None)
            except queue.Empty:
                continue

    # ---- on the caller's

    def _ask(self, work: Callable[[], Any]) -> Any:
        if self.gone:
            raise BoardGone
        question = _Question(work)
        self._questions.put(question)
        if not question.answered.wait(ANSWER_S):
            question.error = TimeoutError(f"no answer within {ANSWER_S:g} s")
        if question.error is not None:
            self._give_up(question.error)
            raise BoardGone from question.error
        return question.answer

    def _give_up(self, exc: Exception) -> None:
        with self._lock:
            first, self.gone = not self.gone, True
        self._questions.put(None)
        if first:
            reason = str(exc).partition("\n")[0]
            warnings.warn(
                f"rank {self.rank}: the job's key-value store fails ({type(exc).__name__}: {reason}); from here on "
                "this rank chooses its plans without the others",
                ConvPlanWarning,
                stacklevel=5,
            )


_lock = threading.Lock()
_board: Board | None = None
_source: object = None  # the store that the board was made from
_inherited: object = None  # the store of a parent that this process was forked from; its connection is the parent's


def current() -> Board | None:
    """The board of this process's job; None outside of one, in one of a single rank, and once its store has failed."""
    global _board, _source
    distributed = _initialized()
    if distributed is None:
        if _board is not None:
            _let_go()
        return None
    source = _default_store(distributed)
    if source is None or source is _inherited:
        return None
    with _lock:
        if source is not _source:
            if _board is not None:
                _board.close()
            _board, _source = _open(distributed, source), source
        return None if _board is None or _board.gone else _board


def _initialized() -> Any:
    """torch.distributed, where the program uses it already."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _default_store(distributed: Any) -> object:
    try:
        return distributed.distributed_c10d._get_default_store()
    except (AttributeError, ValueError, RuntimeError):  # the group was destroyed by another thread just now
        return None


def _open(distributed: Any, source: Any) -> Board | None:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if ranks < 2 or rank < 0 or distributed.get_backend() == "fake":  # which stands in for ranks that are not there
        return None

    def connect() -> KeyValueStore:
        # A connection of its own: torch's may be busy for minutes, waiting for what another rank has yet to write.
        try:
            own = source.clone()
        except (AttributeError, RuntimeError):  # a kind of store that has no such thing
            own = source
        store: KeyValueStore = distributed.PrefixStore(PREFIX, own)
        return store

    return Board(connect, rank, ranks)


def _let_go() -> None:
    global _board, _source
    with _lock:
        if _board is not None:
            _board.close()
        _board, _source = None, None


def _start_afresh_in_child() -> None:
    """After a fork: the parent's threads are not here, and its connections are not to be used."""
    global _lock, _board, _source, _inherited
    _lock, _board, _source = threading.Lock(), None, None
    distributed = _initialized()
    _inherited = None if distributed is None else _default_store(distributed)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh_in_child)

"""What a process counts of its convolutions, and what it warns of once.

Counted here, and nowhere else, is what `convplan.stats()` shows. What a counter means is said there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings
import weakref

from convplan._errors import ConvPlanWarning

log = logging.getLogger("convplan.runtime")

CACHE_LIMIT_VARIABLE = "CONVPLAN_CACHE_LIMIT"
DEFAULT_CACHE_LIMIT = 10_000
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


counts = _Counts()

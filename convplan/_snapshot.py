"""Stored plans of a SQLite file, read quickly: one look at everything that belongs here, without SQLAlchemy.

A second process finds all its plans in the store and needs nothing else of it, and importing SQLAlchemy would cost it
more than all its look-ups. So this reader opens the file by the standard library alone and only reads. It is as strict
as the other way of reading and more easily put off: whatever it does not expect is `Odd`, and the caller asks
`PlanStore` instead, which knows how to name what is wrong with a store. A file that is not there is an empty store.

Rows are kept as they lie there; `_rows`, `_serialized` and `_learned` check them when they are used.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from convplan._environment import Environment, ahead_of_time
from convplan._errors import StoreError
from convplan._forgiving import MOST_BYTES, MOST_ROWS, Index, Odd, Snapshot
from convplan._learned import MAX_ERRATA, RawErratum
from convplan._rows import RawRow, environment_text, read_environment
from convplan._serialized import RawPart
from convplan._sqlite import META_TABLE, Opened, default_wait_s, file_identity, open_file, watch

KNOWN_SCHEMAS = ("1", "2")  # of the tables, as `_database.STORE_SCHEMA` and its older ones; those of 1 hold plans only


class QuickReader:
    """Reads one SQLite file. Safe from several threads and across forks; closes its file at exit.

    Args:
        path: the file.
        shown: how messages name it.
        wait_s: seconds to wait for a lock; None: as everywhere.

    Each method raises `Odd` for whatever is not as expected. What another process commits is seen by the next call.
    """

    def __init__(self, path: Path, *, shown: str, wait_s: float | None) -> None:
        self._path = path
        self._log = path.with_name(f"{path.name}-wal")
        self._shown = shown
        self._wait_s = default_wait_s() if wait_s is None else wait_s
        self._lock = threading.RLock()
        self._opened: Opened | None = None
        self._seen: tuple[object, ...] | None = None
        self._schema = ""
        watch(self)

    def snapshot(self, environment: Environment) -> Snapshot:
        """Everything for one environment: one look at the file."""
        with self._session() as connection:
            if connection is None:
                return Snapshot({}, [])
            errata: list[RawErratum] = []
            if self._has_parts(connection):
                found = connection.execute(
                    "SELECT id, schema, checksum, erratum FROM convplan_errata WHERE device = ? ORDER BY id LIMIT ?",
                    (environment.device, MAX_ERRATA),
                )
                errata = [RawErratum(*row) for row in found]
            return Snapshot(_bounded(connection, environment_text(environment)), errata)

    def index(self, known: Index | None) -> Index | None:
        """Which plans there are; None for a store with too many to list."""
        with self._session() as connection:
            if connection is None:
                return Index(None, frozenset(), frozenset())
            version = self._version()  # first, so that what is written meanwhile is a difference
            if known is not None and known.version == version:
                return known
            found = connection.execute(
                "SELECT key, choice_key FROM convplan_plans LIMIT ?", (MOST_ROWS + 1,)
            ).fetchall()
            if len(found) > MOST_ROWS:
                return None
            return Index(version, frozenset(str(row[0]) for row in found), frozenset(str(row[1]) for row in found))

    def raw_row(self, key: str) -> RawRow | None:
        """One plan's row."""
        with self._session() as connection:
            if connection is None:
                return None
            found = connection.execute(
                "SELECT key, schema, checksum, record FROM convplan_plans WHERE key = ?", (key,)
            ).fetchone()
            return None if found is None else RawRow(*found)

    def raw_part(self, key: str, config_key: str) -> RawPart | None:
        """One serialized plan's row."""
        with self._session() as connection:
            if connection is None or not self._has_parts(connection):
                return None
            found = connection.execute(
                "SELECT key, config, format, size, checksum, version, created, provenance, data "
                "FROM convplan_serialized WHERE key = ? AND config_key = ?",
                (key, config_key),
            ).fetchone()
            return None if found is None else RawPart(*found)

    def find_elsewhere(self, choice: str, environment: Environment) -> list[Environment]:
        """As `PlanStore.find_elsewhere`."""
        with self._session() as connection:
            if connection is None:
                return []
            found = connection.execute(
                "SELECT DISTINCT environment FROM convplan_plans WHERE choice_key = ?", (choice,)
            ).fetchall()
        others = (read_environment(row[0]) for row in found)
        here = (environment, ahead_of_time(environment))
        return [other for other in others if other is not None and other not in here]

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.connection.close()

    def __del__(self) -> None:
        self.close()

    def hold(self) -> None:
        """Close and keep every thread out until `let_go`, for the time of a fork."""
        self._lock.acquire()
        self.close()

    def let_go(self) -> None:
        """End of `hold`."""
        self._lock.release()

    @contextlib.contextmanager
    def _session(self) -> Iterator[sqlite3.Connection | None]:
        """The open file, for one thread at a time; None when there is no file."""
        with self._lock:
            try:
                yield self._connection()
            except (sqlite3.Error, sqlite3.Warning, OSError, StoreError, TypeError, ValueError) as exc:
                self.close()
                raise Odd(str(exc)) from exc
            except BaseException:
                self.close()
                raise

    def _connection(self) -> sqlite3.Connection | None:
        if self._opened is not None and self._seen != self._state(unlocked=self._opened.unlocked):
            self.close()  # deleted, exchanged, or written to while it was read without locks
        if self._opened is None:
            if file_identity(self._path) is None and not _is_there(self._path):
                return None
            opened = open_file(self._path, shown=self._shown, wait_s=self._wait_s, mode="rw")
            try:
                self._schema = _schema_of(opened.connection)
                self._seen = self._state(unlocked=opened.unlocked)
            except BaseException:
                opened.connection.close()
                raise
            self._opened = opened
        return self._opened.connection

    def _state(self, *, unlocked: bool) -> tuple[object, ...]:
        """What must stay the same for the open file to be read on: without locks, its content."""
        if not unlocked:
            return (file_identity(self._path),)
        found = self._path.stat()
        return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, self._log.exists())

    def _version(self) -> tuple[object, ...]:
        """What changes whenever something is committed: sizes and times of the file and of what is not in it yet."""
        found: list[object] = []
        for path in (self._path, self._log):
            try:
                one = path.stat()
            except FileNotFoundError:
                found.append(None)
            else:
                found.append((one.st_dev, one.st_ino, one.st_mtime_ns, one.st_size))
        return tuple(found)

    def _has_parts(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables hold more than plans by now: another process may upgrade them while they are open."""
        if self._schema == KNOWN_SCHEMAS[0]:
            self._schema = _schema_of(connection)
        return self._schema != KNOWN_SCHEMAS[0]


def _is_there(path: Path) -> bool:
    """Whether there is something of that name; anything but a plain no is an OSError."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _schema_of(connection: sqlite3.Connection) -> str:
    found = connection.execute(f"SELECT value FROM {META_TABLE} WHERE name = 'schema'").fetchone()
    if found is None or found[0] not in KNOWN_SCHEMAS:
        raise Odd(f"store schema {found}")
    return str(found[0])


def _bounded(connection: sqlite3.Connection, environment: str) -> dict[str, RawRow] | None:
    """The plans of an environment; None when looking through the store, or keeping them, would be too much."""
    (count,) = connection.execute("SELECT count(*) FROM convplan_plans").fetchone()
    if count > MOST_ROWS:
        return None
    found = connection.execute(
        "SELECT key, schema, checksum, record FROM convplan_plans WHERE environment = ?", (environment,)
    )
    rows: dict[str, RawRow] = {}
    room = MOST_BYTES
    for row in found:
        room -= len(row[3]) if isinstance(row[3], (str, bytes)) else 0
        if room < 0:
            return None
        rows[str(row[0])] = RawRow(*row)
    return rows

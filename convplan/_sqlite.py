"""SQLite files: how they are opened, what their errors mean, and what becomes of open ones at a fork and at exit.

Only the standard library is imported here, so that reading a stored plan costs no second's quarter for SQLAlchemy:
`_database` (every database, reading and writing) and `_snapshot` (SQLite files, reading only) both open files by this
module. What lies in the tables is their business.
"""

from __future__ import annotations

import atexit
import enum
import os
import sqlite3
import threading
import weakref
from pathlib import Path
from typing import Literal, Protocol

from convplan._errors import StoreBusy, StoreError

META_TABLE = "convplan_meta"  # a database without it is not a plan store

PRAGMAS: dict[str, object] = {  # for every connection to a SQLite file
    "busy_timeout": 5_000,  # milliseconds to wait for another process's write, then StoreBusy
    "synchronous": "normal",  # with a write-ahead log a power cut can undo the last commits, a killed process none
    "journal_size_limit": 4 * 2**20,  # bytes; gives the log's space back after a large import
    "cell_size_check": "on",  # a damaged page is reported instead of being read as rows
    "trusted_schema": "off",  # a file from elsewhere cannot run functions through its views and triggers
}
FILE_PRAGMAS: dict[str, object] = {  # kept in the file itself, so set only once the file is known to be a plan store
    "journal_mode": "wal",  # readers go on reading while one process writes; killing that one loses only its own row
}


class Sqlite(enum.IntEnum):
    """SQLite's primary result codes that mean something for a plan store (sqlite.org/rescode.html)."""

    PERM = 3
    BUSY = 5
    LOCKED = 6
    READONLY = 8
    IOERR = 10
    CORRUPT = 11
    FULL = 13
    CANTOPEN = 14
    NOTADB = 26


SQLITE_REASONS: dict[int, str] = {  # what they mean here and what to do; for other codes SQLite's own words are given
    Sqlite.PERM: "the file may not be opened; check its permissions",
    Sqlite.READONLY: "the plan store is read-only here; give write permission, or set CONVPLAN_CACHE_DIR or "
    "CONVPLAN_STORE to a place that can be written",
    Sqlite.IOERR: "reading or writing the file failed (disk error, file size limit, or a network drive that went "
    "away), so this write was undone",
    Sqlite.CORRUPT: "the file is damaged or cut short; it is left as it is. Put back a copy, or move it away and a new "
    "store is begun",
    Sqlite.FULL: "the disk or quota is full, so this write was undone; free some space and try again",
    Sqlite.CANTOPEN: "the file cannot be opened or created; check that its directory exists and may be written",
    Sqlite.NOTADB: "the file is not a SQLite database, expected a convplan plan store; it is left as it is. Set "
    "CONVPLAN_STORE to another path",
}
SQLITE_WORDS: dict[str, int] = {  # Python tells the code only from 3.11 on; before, these fixed texts of SQLite do
    "access permission denied": Sqlite.PERM,
    "database is locked": Sqlite.BUSY,
    "database table is locked": Sqlite.LOCKED,
    "attempt to write a readonly database": Sqlite.READONLY,
    "disk I/O error": Sqlite.IOERR,
    "database disk image is malformed": Sqlite.CORRUPT,
    "database or disk is full": Sqlite.FULL,
    "unable to open database file": Sqlite.CANTOPEN,
    "file is not a database": Sqlite.NOTADB,
}


def default_wait_s() -> float:
    """Seconds to wait for another process's lock where nobody says otherwise."""
    return float(str(PRAGMAS["busy_timeout"])) / 1000


def sqlite_code(exc: BaseException | None) -> int | None:
    """SQLite's primary result code; None for an error that is not SQLite's, or that it has no code for."""
    if not isinstance(exc, sqlite3.Error):
        return None
    code = getattr(exc, "sqlite_errorcode", None)
    return SQLITE_WORDS.get(str(exc)) if code is None else int(code) & 0xFF


def named_error(exc: BaseException, shown: str, wait_s: float) -> StoreError | None:
    """What an error of SQLite means for the store at `shown`; None where it has no name here."""
    code = sqlite_code(exc)
    if code in (Sqlite.BUSY, Sqlite.LOCKED):
        return StoreBusy(path=shown, waited_s=wait_s)
    if code in SQLITE_REASONS:
        return StoreError(path=shown, reason=SQLITE_REASONS[code])
    return None


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Opened:
    """An open file, and whether it is read without locks, as a file that nobody changes."""

    def __init__(self, connection: sqlite3.Connection, *, unlocked: bool) -> None:
        self.connection = connection
        self.unlocked = unlocked


def open_file(path: Path, *, shown: str, wait_s: float, mode: Literal["rwc", "rw"]) -> Opened:
    """Open a store's file as well as can be.

    Args:
        shown: how messages name it.
        wait_s: seconds to wait for a lock.
        mode: `rwc` makes a missing file and may write; `rw` opens one to read only. Not SQLite's own `ro`, which would
            leave the log's files behind when it is the last to close.

    Raises:
        StoreError: it is the file of something else. sqlite3.Error: it cannot be opened.
    """
    try:
        return Opened(connect(f"{path.as_uri()}?mode={mode}", shown=shown, wait_s=wait_s, mode=mode), unlocked=False)
    except sqlite3.OperationalError as exc:
        # Reading a file with a write-ahead log needs an index file beside it, which a read-only directory does not
        # allow. Without a log there is nothing to index: all rows are in the file and it is read as it stands.
        cannot = sqlite_code(exc) in (Sqlite.CANTOPEN, Sqlite.READONLY)
        if not cannot or not path.is_file() or path.with_name(f"{path.name}-wal").exists():
            raise
    uri = f"{path.as_uri()}?mode=ro&immutable=1"
    return Opened(connect(uri, shown=shown, wait_s=wait_s, mode=mode), unlocked=True)


def connect(uri: str, *, shown: str, wait_s: float, mode: Literal["rwc", "rw"]) -> sqlite3.Connection:
    """One connection with the pragmas for a file from elsewhere. Transactions are begun by the caller.

    Raises:
        StoreError: it is the database of something else. sqlite3.Error: it cannot be opened.
    """
    connection = sqlite3.connect(uri, uri=True, timeout=wait_s, isolation_level=None, check_same_thread=False)
    try:
        connection.text_factory = _text  # one row that is no UTF-8 must not hide the others
        for name, value in {**PRAGMAS, "busy_timeout": round(wait_s * 1000)}.items():
            connection.execute(f"PRAGMA {name}={value}")
        tables = [str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        if tables and META_TABLE not in tables:
            raise StoreError(
                path=shown,
                reason=f"a SQLite database of something else (tables {', '.join(tables[:5])}), expected a convplan "
                "plan store; it is left as it is. Set CONVPLAN_STORE to another path",
            )
        if mode == "rwc":
            _set_file_pragmas(connection)
        else:
            connection.execute("PRAGMA query_only=on")
    except BaseException:
        connection.close()
        raise
    return connection


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _set_file_pragmas(connection: sqlite3.Connection) -> None:
    for name, value in FILE_PRAGMAS.items():
        if connection.execute(f"PRAGMA {name}").fetchone() == (value,):
            continue
        try:
            connection.execute(f"PRAGMA {name}={value}")
        except sqlite3.OperationalError as exc:
            # Read-only, or another process is using the new file this instant. The file is right without it, only
            # readers and writers wait for each other; the next opening sets it.
            if sqlite_code(exc) not in (Sqlite.BUSY, Sqlite.LOCKED, Sqlite.READONLY):
                raise


# ---- fork and exit
#
# SQLite keeps its locks in process memory and a child inherits that memory without the locks: a child that opens the
# same file again would believe it holds them. So nothing is open while a process forks; both sides reopen when needed.
# At exit a proper close folds the log into the file, so that a copy of the one file is the whole store.


class Holder(Protocol):
    """Whatever keeps a file open."""

    def hold(self) -> None:
        """Close, and keep every thread out until `let_go`, for the time of a fork."""

    def let_go(self) -> None:
        """End of `hold`."""

    def close(self) -> None:
        """Close; the next use opens it again."""


_open: weakref.WeakSet[Holder] = weakref.WeakSet()
_forking = threading.Lock()
_held: list[Holder] = []


def watch(holder: Holder) -> None:
    """Have a holder closed around forks and at exit, for as long as it lives."""
    _open.add(holder)


def _before_fork() -> None:
    _forking.acquire()
    for holder in list(_open):
        holder.hold()
        _held.append(holder)


def _after_fork() -> None:
    while _held:
        _held.pop().let_go()
    _forking.release()


def _close_all() -> None:
    for holder in list(_open):
        holder.close()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

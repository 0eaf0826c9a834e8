"""The database under the plan store: tables, opening, transactions, and the one place where its errors get a name.

What a row means is decided in `_store`; this module only brings rows in and out, safely. It is the only one that
imports SQLAlchemy (a quarter of a second), and `_store` imports it when a store is first used.

Everything is plain SQLAlchemy Core and works on any database it has a dialect for, except the section on SQLite files,
which deals with what a file can suffer: two processes, a foreign file, a read-only directory, a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import enum
import functools
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from convplan._errors import StoreBusy, StoreError, StoreMismatch

log = logging.getLogger("convplan.store")

STORE_SCHEMA = 1  # of the tables below; the records inside have a number of their own, `_store.ROW_SCHEMA`
CREATE_ATTEMPTS = 5  # several processes may create the tables of one database at the same moment
_WRITE = "convplan_write"  # execution option: this transaction is going to write

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

metadata = sa.MetaData()

# MySQL's plain TEXT ends at 64 KiB, which the record of a long race can exceed.
_LONG_TEXT = sa.Text().with_variant(sa.Text(2**24 - 1), "mysql", "mariadb")

meta = sa.Table(
    "convplan_meta",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
)

plans = sa.Table(
    "convplan_plans",
    metadata,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("choice_key", sa.String(32), nullable=False, index=True),
    sa.Column("schema", sa.Integer, nullable=False),
    sa.Column("environment", _LONG_TEXT, nullable=False),
    sa.Column("device", sa.String(16), nullable=False),
    sa.Column("effort", sa.String(16), nullable=False),
    sa.Column("engine", sa.String(64), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("created", sa.String(64), nullable=False),
    sa.Column("checksum", sa.String(64), nullable=False),
    sa.Column("record", _LONG_TEXT, nullable=False),
)

_P = plans.c
one_row = sa.select(plans).where(_P.key == sa.bindparam("key"))
next_rows = sa.select(plans).where(_P.key > sa.bindparam("after")).order_by(_P.key).limit(sa.bindparam("count"))
environments_of = sa.select(_P.environment).distinct().where(_P.choice_key == sa.bindparam("choice"))
insert_row = sa.insert(plans)
# Replaces the row only while it is still the one that was looked at: the checksum changes with every change of a row.
replace_row = sa.update(plans).where(_P.key == sa.bindparam("seen_key"), _P.checksum == sa.bindparam("seen_checksum"))


class LostRace(Exception):
    """Another process inserted the same key first. The writer looks again and decides anew."""


class Database:
    """One database, opened at first use, shared by the threads of one process and reopened in forked children.

    Args:
        url: a database URL, or None for `path`.
        path: a SQLite file. Made, with its directory, when it is missing.
        shown: how messages name it, without a password.
        wait_s: seconds to wait for a lock.
    """

    def __init__(self, *, url: str | None, path: Path | None, shown: str, wait_s: float | None = None) -> None:
        self.shown = shown
        self.wait_s = _default_wait_s() if wait_s is None else wait_s
        self._url = url
        self._path = path
        self._lock = threading.RLock()
        self._engine: sa.Engine | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the open file
        self._unlocked_view = False  # opened without locks (immutable): reopened for every transaction
        _databases.add(self)

    @contextlib.contextmanager
    def session(self, *, write: bool = False) -> Iterator[sa.Connection]:
        """One transaction: committed at the end, undone on any error.

        Threads take turns. On SQLite a writer takes the write lock at the start, so that what it reads stays true until
        it commits; a reader sees, with each statement, the last committed state and blocks nobody.

        Raises:
            StoreError, StoreBusy, StoreMismatch: whatever the database said, with its cause attached.
            LostRace: an insert met a row of the same key.
        """
        with self._lock, self._named():
            try:
                with self._opened().connect() as connection:
                    connection.execution_options(**{_WRITE: write})
                    with connection.begin():
                        yield connection
            except BaseException:
                self.close()  # the next transaction starts from a fresh connection, whatever this one suffered
                raise
            if self._unlocked_view:
                self.close()

    def close(self) -> None:
        """Close the connection; the next transaction opens a new one."""
        with self._lock:
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.dispose()

    def __del__(self) -> None:
        self.close()

    def hold(self) -> None:
        """Close and keep every thread out until `let_go`, for the time of a fork."""
        self._lock.acquire()
        self.close()

    def let_go(self) -> None:
        """End of `hold`."""
        self._lock.release()

    def integrity(self) -> tuple[str, ...]:
        """What SQLite's own check of the file complains about; nothing on other databases."""
        with self.session() as connection:
            if connection.dialect.name != "sqlite":
                return ()
            found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
        return () if found == ["ok"] else tuple(found)

    def _opened(self) -> sa.Engine:
        if self._engine is not None and self._path is not None and _identity(self._path) != self._file:
            self.close()  # deleted or exchanged under us: writing on would fill a file that nobody can find
        if self._engine is None:
            engine = self._make_engine()
            try:
                self._prepare(engine)
            except BaseException:
                engine.dispose()
                raise
            self._file = None if self._path is None else _identity(self._path)
            self._engine = engine
        return self._engine

    def _make_engine(self) -> sa.Engine:
        if self._url is not None:
            url = sa.make_url(self._url)
            if url.get_backend_name() != "sqlite":
                # A server drops connections that were quiet for long: ping before use.
                return sa.create_engine(url, pool_size=1, max_overflow=1, pool_pre_ping=True)
            if url.query:
                raise StoreError(path=self.shown, reason="a SQLite URL takes no options here, expected sqlite:///PATH")
            memory = url.database in (None, "", ":memory:")
            self._path = None if memory else Path(str(url.database)).absolute()
        # The engine must not keep this object alive: dropping the last reference to it is to close the file.
        this = weakref.ref(self)
        engine = sa.create_engine(
            "sqlite://",
            creator=functools.partial(_connect_file_of, this),
            poolclass=sa.QueuePool,
            pool_size=1,
            max_overflow=1,
        )
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _prepare(self, engine: sa.Engine) -> None:
        """Check the schema, making the tables in a new database."""
        for attempt in range(CREATE_ATTEMPTS):
            with engine.connect() as connection:
                found, complete = _schema_number(connection), sa.inspect(connection).has_table(plans.name)
            if found not in (None, str(STORE_SCHEMA)):
                raise StoreMismatch(path=self.shown, found=str(found), expected=str(STORE_SCHEMA))
            if found is not None and complete:
                return
            try:
                with engine.connect() as connection:
                    connection.execution_options(**{_WRITE: True})
                    with connection.begin():
                        metadata.create_all(connection)
                        if _schema_number(connection) is None:
                            connection.execute(sa.insert(meta).values(name="schema", value=str(STORE_SCHEMA)))
                return
            except DBAPIError as exc:
                # Not every database can create tables in a transaction: another process may be half way through.
                if attempt + 1 == CREATE_ATTEMPTS or isinstance(exc.orig, sqlite3.Error):
                    raise
                log.debug("creating tables in %s: %s; looking again", self.shown, exc.orig)
                time.sleep(0.05 * 2**attempt)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Give every foreign exception its name in convplan's error tree."""
        try:
            yield
        except IntegrityError as exc:
            raise LostRace from exc
        except DBAPIError as exc:
            raise self._name(exc.orig or exc) from exc
        except (SQLAlchemyError, sqlite3.Error, OSError, ImportError) as exc:
            raise self._name(exc) from exc

    def _name(self, exc: BaseException) -> StoreError:
        code = _sqlite_code(exc)
        if code in (Sqlite.BUSY, Sqlite.LOCKED):
            return StoreBusy(path=self.shown, waited_s=self.wait_s)
        if code in SQLITE_REASONS:
            return StoreError(path=self.shown, reason=SQLITE_REASONS[code])
        if isinstance(exc, ImportError):
            return StoreError(path=self.shown, reason=f"the driver of this database is not installed: {exc}")
        if isinstance(exc, ArgumentError):
            # Its own words may hold the URL, and with it a password; a missing dialect names only itself.
            detail = f": {exc}" if isinstance(exc, NoSuchModuleError) else ""
            return StoreError(path=self.shown, reason=f"expected a file path or a SQLAlchemy database URL{detail}")
        if isinstance(exc, OSError):
            place = f" ({exc.filename})" if exc.filename else ""
            return StoreError(path=self.shown, reason=f"cannot be opened: {exc.strerror or exc}{place}")
        said = str(exc).strip().splitlines() or [type(exc).__name__]
        return StoreError(path=self.shown, reason=f"the database said: {said[0]}")

    # ---- SQLite files

    def connect_file(self) -> sqlite3.Connection:
        """Open the file for reading and writing, or as well as can be."""
        path = self._path
        if path is None:
            return self._connect_sqlite(":memory:")
        if path.is_dir():
            raise StoreError(path=self.shown, reason="is a directory, expected a file or a path where one can be made")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._unlocked_view = False
        try:
            return self._connect_sqlite(f"{path.as_uri()}?mode=rwc")
        except sqlite3.OperationalError as exc:
            # Reading a file with a write-ahead log needs an index file beside it, which a read-only directory does not
            # allow. Without a log there is nothing to index: all rows are in the file and it is read as it stands.
            cannot = _sqlite_code(exc) in (Sqlite.CANTOPEN, Sqlite.READONLY)
            if not cannot or not path.is_file() or path.with_name(f"{path.name}-wal").exists():
                raise
        connection = self._connect_sqlite(f"{path.as_uri()}?mode=ro&immutable=1")
        self._unlocked_view = True
        return connection

    def _connect_sqlite(self, uri: str) -> sqlite3.Connection:
        # Transactions are begun by `_begin_sqlite`, so the driver is told to begin none (isolation_level=None).
        connection = sqlite3.connect(uri, uri=True, timeout=self.wait_s, isolation_level=None, check_same_thread=False)
        try:
            connection.text_factory = _text  # one row that is no UTF-8 must not hide the others
            for name, value in {**PRAGMAS, "busy_timeout": round(self.wait_s * 1000)}.items():
                connection.execute(f"PRAGMA {name}={value}")
            tables = [str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
            if tables and meta.name not in tables:
                raise StoreError(
                    path=self.shown,
                    reason=f"a SQLite database of something else (tables {', '.join(tables[:5])}), expected a convplan "
                    "plan store; it is left as it is. Set CONVPLAN_STORE to another path",
                )
            _set_file_pragmas(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def _connect_file_of(database: weakref.ref[Database]) -> sqlite3.Connection:
    alive = database()
    if alive is None:
        raise AssertionError("convplan bug: a connection was asked of a database that is gone")
    return alive.connect_file()


def _default_wait_s() -> float:
    return float(str(PRAGMAS["busy_timeout"])) / 1000


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sqlite_code(exc: BaseException | None) -> int | None:
    """SQLite's primary result code; None for an error that is not SQLite's, or that it has no code for."""
    if not isinstance(exc, sqlite3.Error):
        return None
    code = getattr(exc, "sqlite_errorcode", None)
    return SQLITE_WORDS.get(str(exc)) if code is None else int(code) & 0xFF


def _set_file_pragmas(connection: sqlite3.Connection) -> None:
    for name, value in FILE_PRAGMAS.items():
        if connection.execute(f"PRAGMA {name}").fetchone() == (value,):
            continue
        try:
            connection.execute(f"PRAGMA {name}={value}")
        except sqlite3.OperationalError as exc:
            # Read-only, or another process is using the new file this instant. The file is right without it, only
            # readers and writers wait for each other; the next opening sets it.
            if _sqlite_code(exc) not in (Sqlite.BUSY, Sqlite.LOCKED, Sqlite.READONLY):
                raise


def _begin_sqlite(connection: sa.Connection) -> None:
    # At once and not at the first write: a transaction that has read is refused the write lock when another process
    # wrote in between. Reads begin none, a single statement sees one state anyway.
    if connection.get_execution_options().get(_WRITE, False):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _schema_number(connection: sa.Connection) -> str | None:
    """The schema the database says it has; None for one that says nothing yet."""
    if not sa.inspect(connection).has_table(meta.name):
        return None
    found = connection.execute(sa.select(meta.c.value).where(meta.c.name == "schema")).scalar()
    return None if found is None else str(found)


# ---- fork and exit
#
# SQLite keeps its locks in process memory and a child inherits that memory without the locks: a child that opens the
# same file again would believe it holds them. So nothing is open while a process forks; both sides reopen when needed.
# At exit a proper close folds the log into the file, so that a copy of the one file is the whole store.

_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_forking = threading.Lock()
_held: list[Database] = []


def _before_fork() -> None:
    _forking.acquire()
    for database in list(_databases):
        database.hold()
        _held.append(database)


def _after_fork() -> None:
    while _held:
        _held.pop().let_go()
    _forking.release()


def _close_all() -> None:
    for database in list(_databases):
        database.close()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

"""The database under the plan store: tables, opening, transactions, and the one place where its errors get a name.

What a row means is decided in `_rows`, `_serialized` and `_learned`; this module only brings rows in and out, safely.
It is the only one that imports SQLAlchemy (a quarter of a second), and `_store` imports it when something is written or
listed; plans in a SQLite file are read without it, see `_snapshot`.

Everything is plain SQLAlchemy Core and works on any database it has a dialect for. What SQLite files can suffer (two
processes, a foreign file, a read-only directory, a fork) is dealt with in `_sqlite`.

Tables of schema 1 had no serialized plans and no errata. They are read as they are, and the first write adds what is
missing, so that looking at a store never changes it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError

from convplan._errors import StoreError, StoreMismatch
from convplan._sqlite import META_TABLE, connect, default_wait_s, file_identity, named_error, open_file, watch

log = logging.getLogger("convplan.store")

STORE_SCHEMA = 2  # of the tables below; the records inside have a number of their own, `_rows.ROW_SCHEMA`
OLDER_SCHEMAS = (1,)  # that are read, and upgraded by the first write
CREATE_ATTEMPTS = 5  # several processes may create the tables of one database at the same moment
_WRITE = "convplan_write"  # execution option: this transaction is going to write

metadata = sa.MetaData()

# MySQL's plain TEXT ends at 64 KiB, which the record of a long race can exceed.
_LONG_TEXT = sa.Text().with_variant(sa.Text(2**24 - 1), "mysql", "mariadb")
# The same with BLOB; of this length MySQL takes LONGBLOB, since MEDIUMBLOB ends a byte before 16 MiB.
_LONG_BYTES = sa.LargeBinary().with_variant(sa.LargeBinary(2**25), "mysql", "mariadb")

meta = sa.Table(
    META_TABLE,
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

serialized = sa.Table(
    "convplan_serialized",
    metadata,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("config_key", sa.String(32), primary_key=True),
    sa.Column("config", _LONG_TEXT, nullable=False),
    sa.Column("format", sa.String(32), nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("checksum", sa.String(64), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("created", sa.String(64), nullable=False),
    sa.Column("provenance", sa.String(255), nullable=False),
    sa.Column("data", _LONG_BYTES, nullable=False),
)

errata = sa.Table(
    "convplan_errata",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("schema", sa.Integer, nullable=False),
    sa.Column("device", sa.String(64), nullable=False),
    sa.Column("engine", sa.String(64), nullable=False),
    sa.Column("checksum", sa.String(64), nullable=False),
    sa.Column("erratum", _LONG_TEXT, nullable=False),
)

_P, _S, _E = plans.c, serialized.c, errata.c
one_row = sa.select(plans).where(_P.key == sa.bindparam("key"))
next_rows = sa.select(plans).where(_P.key > sa.bindparam("after")).order_by(_P.key).limit(sa.bindparam("count"))
environments_of = sa.select(_P.environment).distinct().where(_P.choice_key == sa.bindparam("choice"))
insert_row = sa.insert(plans)
# Replaces the row only while it is still the one that was looked at: the checksum changes with every change of a row.
replace_row = sa.update(plans).where(_P.key == sa.bindparam("seen_key"), _P.checksum == sa.bindparam("seen_checksum"))

# For `RawRow`s: a whole environment at once, where there are not too many rows to look through.
count_rows = sa.select(sa.func.count()).select_from(plans)
rows_of_environment = sa.select(_P.key, _P.schema, _P.checksum, _P.record).where(
    _P.environment == sa.bindparam("environment")
)

_PART = (_S.key, _S.config, _S.format, _S.size, _S.checksum, _S.version, _S.created, _S.provenance, _S.data)  # RawPart
one_part = sa.select(*_PART).where(_S.key == sa.bindparam("key"), _S.config_key == sa.bindparam("config_key"))
parts_of = sa.select(*_PART).where(_S.key == sa.bindparam("key")).order_by(_S.config_key)
part_keys = sa.select(_S.key).distinct().order_by(_S.key)
insert_part = sa.insert(serialized)
delete_parts = sa.delete(serialized).where(_S.key == sa.bindparam("seen_key"))
delete_part = sa.delete(serialized).where(
    _S.key == sa.bindparam("seen_key"), _S.config_key == sa.bindparam("seen_config_key")
)
delete_orphans = sa.delete(serialized).where(_S.key.not_in(sa.select(_P.key)))

all_errata = sa.select(_E.id, _E.schema, _E.checksum, _E.erratum).order_by(_E.id)  # RawErratum
errata_of_device = all_errata.where(_E.device == sa.bindparam("device"))
one_erratum = all_errata.where(_E.id == sa.bindparam("id"))
count_errata = sa.select(sa.func.count()).select_from(errata)
insert_erratum = sa.insert(errata)
replace_erratum = sa.update(errata).where(
    _E.id == sa.bindparam("seen_id"), _E.checksum == sa.bindparam("seen_checksum")
)


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
        self.wait_s = default_wait_s() if wait_s is None else wait_s
        self._url = url
        self._path = path
        self._lock = threading.RLock()
        self._engine: sa.Engine | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the open file
        self._unlocked_view = False  # opened without locks (immutable): reopened for every transaction
        self._is_older = False  # tables of an older schema, to be upgraded by the first write
        watch(self)

    @contextlib.contextmanager
    def session(self, *, write: bool = False, upgrade: bool = True) -> Iterator[sa.Connection]:
        """One transaction: committed at the end, undone on any error.

        Threads take turns. On SQLite a writer takes the write lock at the start, so that what it reads stays true until
        it commits; a reader sees, with each statement, the last committed state and blocks nobody. A writer upgrades
        older tables first, unless `upgrade` is False.

        Raises:
            StoreError, StoreBusy, StoreMismatch: whatever the database said, with its cause attached.
            LostRace: an insert met a row of the same key.
        """
        with self._lock, self._named():
            try:
                engine = self._opened()
                if write and upgrade and self._is_older:
                    self._make_tables(engine)
                with engine.connect() as connection:
                    connection.execution_options(**{_WRITE: write})
                    with connection.begin():
                        yield connection
            except BaseException:
                self.close()  # the next transaction starts from a fresh connection, whatever this one suffered
                raise
            if self._unlocked_view:
                self.close()

    def is_older(self, connection: sa.Connection) -> bool:
        """Whether the tables are those of an older schema still: no serialized plans, no errata."""
        if self._is_older:
            self._is_older = _schema_number(connection) != str(STORE_SCHEMA)  # somebody else may have upgraded it
        return self._is_older

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
        if self._engine is not None and self._path is not None and file_identity(self._path) != self._file:
            self.close()  # deleted or exchanged under us: writing on would fill a file that nobody can find
        if self._engine is None:
            engine = self._make_engine()
            try:
                self._prepare(engine)
            except BaseException:
                engine.dispose()
                raise
            self._file = None if self._path is None else file_identity(self._path)
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
        with engine.connect() as connection:
            found, complete = self._known_schema(connection), sa.inspect(connection).has_table(plans.name)
        self._is_older = complete and found is not None and found != str(STORE_SCHEMA)
        if found is None or not complete:
            self._make_tables(engine)

    def _known_schema(self, connection: sa.Connection) -> str | None:
        found = _schema_number(connection)
        if found is not None and found not in map(str, (STORE_SCHEMA, *OLDER_SCHEMAS)):
            raise StoreMismatch(path=self.shown, found=found, expected=str(STORE_SCHEMA))
        return found

    def _make_tables(self, engine: sa.Engine) -> None:
        """Make what is missing and write the schema down, in one transaction where the database can; rows stay."""
        for attempt in range(CREATE_ATTEMPTS):
            try:
                with engine.connect() as connection:
                    connection.execution_options(**{_WRITE: True})
                    with connection.begin():
                        found = self._known_schema(connection)
                        metadata.create_all(connection)
                        if found is None:
                            connection.execute(sa.insert(meta).values(name="schema", value=str(STORE_SCHEMA)))
                        elif found != str(STORE_SCHEMA):
                            changed = sa.update(meta).where(meta.c.name == "schema").values(value=str(STORE_SCHEMA))
                            connection.execute(changed)
                            log.info("%s: upgraded from schema %s to %s", self.shown, found, STORE_SCHEMA)
                self._is_older = False
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
        named = named_error(exc, self.shown, self.wait_s)
        if named is not None:
            return named
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
            return connect(":memory:", shown=self.shown, wait_s=self.wait_s, mode="rwc")
        if path.is_dir():
            raise StoreError(path=self.shown, reason="is a directory, expected a file or a path where one can be made")
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open_file(path, shown=self.shown, wait_s=self.wait_s, mode="rwc")
        self._unlocked_view = opened.unlocked
        return opened.connection


def _connect_file_of(database: weakref.ref[Database]) -> sqlite3.Connection:
    alive = database()
    if alive is None:
        raise AssertionError("convplan bug: a connection was asked of a database that is gone")
    return alive.connect_file()


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

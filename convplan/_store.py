"""Plans that outlive the process: `PlanStore`, in a SQLite file or a team database.

`PlanStore` says what happened: every method raises `StoreError` or a child of it when the store cannot do what was
asked. `ForgivingStore` (in `_forgiving`) is what planning uses while a program runs its convolutions: the same trouble
becomes one warning, and work goes on in memory. The database itself, its tables and its errors are in `_database`,
which is loaded when something is written or listed; the tables beside the plans are in `_store_tables`, JSON files of
plans in `_exchange`. Nothing here knows how a convolution is computed.

What a row must be to be used is decided in `_rows`, and for serialized plans in `_serialized`. A row that is not is
never used and never a reason to fail. It stays for its owner, `check` names it, and only a new plan for the same key
replaces it. Rows of a newer schema are not even replaced.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Literal

import msgspec

from convplan._environment import Environment, ahead_of_time
from convplan._errors import StoreBusy, StoreError
from convplan._forgiving import MOST_BYTES, MOST_ROWS, RETRY_AFTER_S, ForgivingStore, Index, Snapshot
from convplan._plan import PlanRecord
from convplan._rows import (
    ROW_SCHEMA,
    RawRow,
    environment_text,
    keeps_row,
    read_environment,
    read_row,
    record_trouble,
    row_of,
    satisfies,
    showable,
)
from convplan._serialized import Part, check_parts, pack
from convplan._store_tables import ErrataTable, PartsTable, write_parts
from convplan.engines.base import EngineConfig

if TYPE_CHECKING:
    import sqlalchemy as sa

    from convplan._database import Database

__all__ = [
    "RETRY_AFTER_S",
    "ROW_SCHEMA",
    "CheckReport",
    "Deleted",
    "ForgivingStore",
    "PlanStore",
    "RowProblem",
    "StoredRow",
    "current_environments",
    "default_location",
    "hide_password",
    "record_trouble",
    "registered_engines",
    "satisfies",
    "showable",
    "usable_trouble",
]

log = logging.getLogger("convplan.store")

STORE_VARIABLE = "CONVPLAN_STORE"  # a file path, or a database URL (anything with ://)
DIRECTORY_VARIABLE = "CONVPLAN_CACHE_DIR"  # the directory of the default file
FILE_NAME = "plans.sqlite"

PAGE_ROWS = 200  # rows read at a time when all are listed
PUT_ATTEMPTS = 8  # lost races with other writers of the same key before giving up
NOTHING: Mapping[EngineConfig, bytes] = MappingProxyType({})

Put = Literal["added", "replaced", "kept"]


class StoredRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row as it lies in the store, usable or not.

    Attributes:
        key: the plan's key, 32 hexadecimal digits.
        schema: row schema it was written with; 0 for a row whose number cannot be read.
        device, effort, engine, version, created: the columns beside the record; `engine` is the chosen one.
        environment: where it belongs, None when that cannot be read.
        record: the plan, None when the row cannot be used.
        trouble: why it cannot be used, empty when it can.
    """

    key: str
    schema: int
    device: str
    effort: str
    engine: str
    version: str
    created: str
    environment: Environment | None
    record: PlanRecord | None
    trouble: str


class RowProblem(msgspec.Struct, frozen=True):
    """A row that `check` complains about: its key (of a plan, or `erratum ID`) and the reason."""

    key: str
    reason: str


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `PlanStore.check` found.

    Attributes:
        location: which store.
        rows: number of rows looked at.
        elsewhere: usable rows that belong to another environment; they are in order and wait for their owner.
        problems: rows that are not in order.
        integrity: complaints of SQLite's own check of the file.
        serialized: number of serialized plans looked at.
        errata: number of learned errata looked at.
    """

    location: str
    rows: int
    elsewhere: int
    problems: tuple[RowProblem, ...]
    integrity: tuple[str, ...]
    serialized: int = 0
    errata: int = 0

    @property
    def ok(self) -> bool:
        """Every row is in order and so is the file."""
        return not self.problems and not self.integrity


class Deleted(msgspec.Struct, frozen=True):
    """What `PlanStore.delete` did, or would do.

    Attributes:
        removed: rows that were deleted.
        left: rows that the filters name but that a newer convplan wrote; they stay.
    """

    removed: int
    left: int


def default_location(environ: Mapping[str, str] = os.environ) -> str:
    """Path or URL of the default store: `CONVPLAN_STORE`, else `plans.sqlite` in `CONVPLAN_CACHE_DIR` or the cache.

    Variables that are set to an empty text count as not set.
    """
    if chosen := environ.get(STORE_VARIABLE):
        return chosen
    if directory := environ.get(DIRECTORY_VARIABLE):
        return str(Path(directory) / FILE_NAME)
    import platformdirs

    return str(Path(platformdirs.user_cache_dir("convplan", appauthor=False)) / FILE_NAME)


def hide_password(url: str) -> str:
    """The URL with `***` for its password, for messages."""
    shown = re.sub(r"(://[^:@/]*):.*@", r"\1:***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:passw|pwd|secret|token)[^=&]*=)[^&]*", r"\1***", shown)


class PlanStore(PartsTable, ErrataTable):
    """Plans in a SQLite file or a database. Opened at first use; safe from several threads, processes and forks.

    Args:
        url_or_path: a file path, made with its directories when missing, or a SQLAlchemy database URL (anything with
            `://`), whose tables (`convplan_…`) are made when missing.
        wait_s: seconds to wait for another process's lock. None: 5.

    Every method raises `StoreError` when the store cannot be used (the message names the store, what was found and
    what to do), `StoreBusy` when a lock was not given in time, and `StoreMismatch` when a newer convplan made the
    tables. The store is then as it was.

    Two processes at once: readers see a row as it was before a write or after it; writers take turns. After a crash
    every row whose `put` returned is there, and the one being written is there in full or not at all. (A power cut
    can in addition undo the last moments of writes to a SQLite file.)
    """

    def __init__(self, url_or_path: str | os.PathLike[str], *, wait_s: float | None = None) -> None:
        text = os.fspath(url_or_path)
        self._url = text if "://" in text else None
        self.path = None if self._url is not None else _absolute(text)  # None for a URL
        self.wait_s = wait_s
        self._opened: dict[str, Database] = {}  # empty until first use
        self.location = str(self.path) if self._url is None else hide_password(self._url)

    @classmethod
    def default(cls) -> PlanStore:
        """The store that the environment variables name now, see `default_location`."""
        return cls(default_location())

    def get(self, key: str) -> PlanRecord | None:
        """The plan of this key; None when there is none, or when its row cannot be used."""
        row = self.raw_row(key)
        if row is None:
            return None
        record, trouble = read_row(row)
        if trouble:
            log.debug("%s: row %s is not used: %s", self.location, key, trouble)
        return record

    # ---- the four questions of `ForgivingStore`, which `_snapshot.QuickReader` answers for a file

    def snapshot(self, environment: Environment) -> Snapshot:
        """What the store holds for one environment now, rows not looked at yet."""
        database = self._db()
        from convplan import _database as db

        errata = self.raw_errata(environment.device)
        rows: dict[str, RawRow] = {}
        room = MOST_BYTES
        with database.session() as connection:
            if connection.execute(db.count_rows).scalar_one() > MOST_ROWS:
                return Snapshot(None, errata)
            for row in connection.execute(db.rows_of_environment, {"environment": environment_text(environment)}):
                room -= len(row.record) if isinstance(row.record, (str, bytes)) else 0
                if room < 0:
                    return Snapshot(None, errata)
                rows[str(row.key)] = RawRow(*row)
        return Snapshot(rows, errata)

    def index(self, known: Index | None) -> Index | None:
        """Nothing: what others write to a database is seen by asking it for each plan."""
        return None

    def raw_row(self, key: str) -> RawRow | None:
        """One plan's row as it lies there."""
        database = self._db()
        from convplan import _database as db

        with database.session() as connection:
            row = connection.execute(db.one_row, {"key": key}).first()
        return None if row is None else RawRow(row.key, row.schema, row.checksum, row.record)

    def find_elsewhere(self, choice: str, environment: Environment) -> list[Environment]:
        """The other environments that hold a plan for the same question.

        Args:
            choice: from `choice_key(problem, policy)`.
            environment: the one that is left out, and with it what was built ahead of time for it.
        """
        database = self._db()
        from convplan import _database as db

        with database.session() as connection:
            found = connection.execute(db.environments_of, {"choice": choice}).scalars().all()
        others = (read_environment(text) for text in found)
        here = (environment, ahead_of_time(environment))
        return [other for other in others if other is not None and other not in here]

    def put(
        self,
        record: PlanRecord,
        serialized: Mapping[EngineConfig, bytes] = NOTHING,
        *,
        keep_equal: bool = False,
        dry_run: bool = False,
    ) -> Put:
        """Store a plan under its key, and what was serialized of its candidates: both or neither.

        A row that cannot be used is replaced. A row found with more effort is kept, and so is one that a newer convplan
        wrote. Looking and writing are one step: of two processes that store the same key at once, the second sees what
        the first wrote. Numbers that are not finite are stored as unknown, and control characters in reasons as `?`.
        With a row, what was serialized for it is replaced too.

        Args:
            serialized: what `Built.serialize` gave, for candidates of the ranking.
            keep_equal: keep a row of the same effort too, instead of replacing it by the newer one.
            dry_run: decide, but write nothing.

        Returns:
            `added`, `replaced`, or `kept` when the store was left as it is.

        Raises:
            SpecError: the record makes no sense (see `record_trouble`), or a serialized plan is too large or none of
                its candidates'; nothing is stored.
        """
        key = record.key if serialized else ""
        parts = [pack(key, config, plain, created=record.created) for config, plain in serialized.items()]
        return self.put_parts(record, parts, keep_equal=keep_equal, dry_run=dry_run)[0]

    def put_parts(
        self, record: PlanRecord, parts: Sequence[Part], *, keep_equal: bool = False, dry_run: bool = False
    ) -> tuple[Put, int]:
        """`put` with parts that are packed already; also returns how many of them were stored.

        Beside a row that is kept, and is this very record, the parts that it lacks are added.
        """
        check_parts(parts, record)
        row = row_of(record)
        database = self._db()
        from convplan import _database as db

        for _ in range(PUT_ATTEMPTS):
            try:
                with database.session(write=not dry_run) as connection:
                    done = _put_row(connection, row, record, keep_equal=keep_equal, dry_run=dry_run)
                    if done is None:
                        continue
                    # Of the same checksum: the same record, whoever stored it.
                    if done[0] == "kept" and not (done[1] == row["checksum"] and parts):
                        return "kept", 0
                    older = database.is_older(connection)
                    return done[0], write_parts(connection, parts, row["key"], done[0], dry_run=dry_run, older=older)
            except db.LostRace:
                log.debug("%s: another process stored %s at the same moment; looking again", self.location, row["key"])
        raise StoreBusy(path=self.location, waited_s=0)

    def rows(
        self, *, key_prefix: str = "", engine: str | None = None, device: str | None = None
    ) -> Iterator[StoredRow]:
        """Every row in the order of the keys, usable or not; a bad row does not end the listing.

        Rows are read in pages, so a row that another process adds or removes meanwhile may or may not be seen.

        Args:
            key_prefix: only keys that begin like this.
            engine: only rows whose chosen engine has this name.
            device: only rows of this torch device type.
        """
        database = self._db()
        from convplan import _database as db

        query = db.next_rows.where(*_conditions(key_prefix=key_prefix, engine=engine, device=device))
        after = ""
        while True:
            with database.session() as connection:
                page = connection.execute(query, {"after": after, "count": PAGE_ROWS}).all()
            for row in page:
                record, trouble = read_row(row)
                yield StoredRow(
                    key=showable(str(row.key)),
                    schema=row.schema if isinstance(row.schema, int) else 0,
                    device=showable(str(row.device)),
                    effort=showable(str(row.effort)),
                    engine=showable(str(row.engine)),
                    version=showable(str(row.version)),
                    created=showable(str(row.created)),
                    environment=read_environment(row.environment),
                    record=record,
                    trouble=trouble,
                )
            if len(page) < PAGE_ROWS:
                return
            after = str(page[-1].key)

    def __iter__(self) -> Iterator[StoredRow]:
        return self.rows()

    def delete(
        self,
        *,
        key_prefix: str = "",
        engine: str | None = None,
        device: str | None = None,
        not_in: Collection[Environment] | None = None,
        dry_run: bool = False,
    ) -> Deleted:
        """Delete the rows that all given filters name; every row when none is given. All of them go, or none.

        What was serialized of their plans goes with them. Learned errata stay, see `forget_errata`.

        Rows that a newer convplan wrote stay. Unreadable rows go like others.

        Args:
            key_prefix, engine, device: as for `rows`.
            not_in: only rows of environments other than these.
            dry_run: count, but delete nothing.
        """
        database = self._db()
        import sqlalchemy as sa

        from convplan import _database as db

        named = _conditions(key_prefix=key_prefix, engine=engine, device=device)
        if not_in is not None:
            named.append(db.plans.c.environment.not_in([environment_text(environment) for environment in not_in]))
        ours = db.plans.c.schema <= ROW_SCHEMA
        count = sa.select(sa.func.count()).select_from(db.plans)
        with database.session(write=not dry_run, upgrade=False) as connection:
            left = connection.execute(count.where(*named, sa.not_(ours))).scalar_one()
            if dry_run:
                return Deleted(connection.execute(count.where(*named, ours)).scalar_one(), left)
            removed = connection.execute(sa.delete(db.plans).where(*named, ours)).rowcount
            if not database.is_older(connection):
                connection.execute(db.delete_orphans)
            return Deleted(removed, left)

    def check(
        self, *, engines: Collection[str] | None = None, here: Collection[Environment] | None = None
    ) -> CheckReport:
        """Look at every row and at the file; changes nothing.

        Args:
            engines: names that rows may hold. None: the registered ones.
            here: the environments of this machine, to count the rows of others. None: this process's own.

        Raises:
            StoreError: the store cannot be opened at all. Damage that shows up while reading is part of the report.
        """
        known = registered_engines() if engines is None else engines
        mine = current_environments() if here is None else here
        database = self._db()
        with database.session():
            pass  # a store that cannot be opened is an error, what is found inside is a report
        integrity: list[str] = []
        problems: list[RowProblem] = []
        count = {"rows": 0, "elsewhere": 0, "serialized": 0, "errata": 0}
        try:
            integrity.extend(database.integrity())
            for row in self.rows():
                count["rows"] += 1
                trouble = row.trouble if row.record is None else usable_trouble(row.record, known)
                if trouble:
                    problems.append(RowProblem(row.key, trouble))
                count["elsewhere"] += not trouble and row.environment not in mine
            for key, config, trouble in self.checked_parts():
                count["serialized"] += 1
                if trouble:
                    problems.append(RowProblem(key, f"serialized plan of {config}: {trouble}"))
            for erratum in self.errata_rows():
                count["errata"] += 1
                if erratum.trouble:
                    problems.append(RowProblem(f"erratum {erratum.id}", erratum.trouble))
        except StoreError as exc:
            integrity.append(exc.reason)
        return CheckReport(location=self.location, problems=tuple(problems), integrity=tuple(integrity), **count)

    def close(self) -> None:
        """Give the connection back. The next call opens it again."""
        for database in self._opened.values():
            database.close()

    def __enter__(self) -> PlanStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PlanStore({self.location!r})"

    def _db(self) -> Database:
        found = self._opened.get("database")
        if found is not None:
            return found
        try:
            from convplan._database import Database
        except ImportError as exc:
            raise StoreError(path=self.location, reason=f"needs SQLAlchemy and SQLite: {exc}") from exc
        made = Database(url=self._url, path=self.path, shown=self.location, wait_s=self.wait_s)
        return self._opened.setdefault("database", made)  # one step, so that two threads end with the same one


def usable_trouble(record: PlanRecord, engines: Collection[str]) -> str:
    """Why a record cannot be used in this installation, empty when it can: senseless, or an engine nobody knows."""
    unknown = sorted({evidence.config.engine for evidence in record.ranking} - set(engines))
    if unknown:
        return f"unknown engine {', '.join(map(repr, unknown))}; registered engines: {', '.join(engines)}"
    return record_trouble(record)


def current_environments() -> tuple[Environment, ...]:
    """The environments of this process now: its CPU, each GPU that torch sees, and that of plans built ahead for it."""
    import torch

    from convplan import _environment

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    found = [_environment.current("cuda", index) for index in gpus]
    ahead = (_environment.ahead_of_time(one) for one in found)
    return (_environment.current("cpu"), *found, *(one for one in ahead if one is not None))


def registered_engines() -> tuple[str, ...]:
    """The names of the engines of this installation."""
    from convplan.engines import registry

    return registry.names()


def _absolute(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as exc:  # no home directory to expand ~ to, no working directory
        raise StoreError(path=text, reason=f"is not a usable path: {exc}") from exc


def _put_row(
    connection: sa.Connection, row: dict[str, object], record: PlanRecord, *, keep_equal: bool, dry_run: bool
) -> tuple[Put, object] | None:
    """What was done with the row, and the checksum of the one that was there; None when another writer was quicker."""
    from convplan import _database as db

    existing = connection.execute(db.one_row, {"key": row["key"]}).first()
    if existing is None:
        if not dry_run:
            connection.execute(db.insert_row, row)
        return "added", None
    if keeps_row(existing, record.effort, keep_equal=keep_equal):
        return "kept", existing.checksum
    seen = {"seen_key": row["key"], "seen_checksum": existing.checksum}
    if not dry_run and connection.execute(db.replace_row, {**row, **seen}).rowcount != 1:
        return None
    return "replaced", existing.checksum


def _conditions(*, key_prefix: str, engine: str | None, device: str | None) -> list[sa.ColumnElement[bool]]:
    from convplan._database import plans

    conditions: list[sa.ColumnElement[bool]] = []
    if key_prefix:
        conditions.append(plans.c.key.startswith(key_prefix, autoescape=True))
    if engine is not None:
        conditions.append(plans.c.engine == engine.strip().lower())
    if device is not None:
        conditions.append(plans.c.device == device)
    return conditions

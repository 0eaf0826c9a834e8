"""Plans that outlive the process: `PlanStore`, in a SQLite file or a team database, and `ForgivingStore` over it.

`PlanStore` says what happened: every method raises `StoreError` or a child of it when the store cannot do what was
asked. `ForgivingStore` is what planning uses while a program runs its convolutions: the same trouble becomes one
warning, and work goes on in memory. The database itself, its tables and its errors are in `_database`, which is
loaded when a store is first used; JSON files of plans are in `_exchange`. Nothing here knows how a convolution is
computed.

What a row must be to be used: written with this or an older row schema, its checksum right, its record valid, and its
key equal to the key computed anew from that record. A row that is not is never used and never a reason to fail. It
stays for its owner, `check` names it, and only a new plan for the same key replaces it. Rows of a newer schema are
not even replaced.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from convplan._environment import Environment
from convplan._errors import ConvPlanWarning, SpecError, StoreBusy, StoreError
from convplan._key import choice_key, plan_key
from convplan._plan import Evidence, PlanRecord
from convplan._policy import EFFORTS, Effort, Policy
from convplan._problem import Problem

if TYPE_CHECKING:
    import sqlalchemy as sa

    from convplan._database import Database

log = logging.getLogger("convplan.store")

STORE_VARIABLE = "CONVPLAN_STORE"  # a file path, or a database URL (anything with ://)
DIRECTORY_VARIABLE = "CONVPLAN_CACHE_DIR"  # the directory of the default file
FILE_NAME = "plans.sqlite"

ROW_SCHEMA = 1  # goes up when a record written now would not decode, or would mean something else, in an older convplan
PAGE_ROWS = 200  # rows read at a time when all are listed
PUT_ATTEMPTS = 8  # lost races with other writers of the same key before giving up
RETRY_AFTER_S = 30.0  # how long a store that failed is left alone by `ForgivingStore`

MAX_TEXT = 100_000  # characters in one text of a record; a rejection's reason can hold a compiler's output
MAX_LABEL = 64  # characters in version and created, which are columns of their own
MAX_KNOB = 2**63

Put = Literal["added", "replaced", "kept"]

_encode = msgspec.json.Encoder()
_record_decoder = msgspec.json.Decoder(PlanRecord)
_environment_decoder = msgspec.json.Decoder(Environment)


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
    """A row that `check` complains about: its key and the reason."""

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
    """

    location: str
    rows: int
    elsewhere: int
    problems: tuple[RowProblem, ...]
    integrity: tuple[str, ...]

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


def satisfies(found: Effort, wanted: Effort) -> bool:
    """Whether a plan found with one effort answers a policy that asks for another: more work answers for less."""
    return EFFORTS.index(found) >= EFFORTS.index(wanted)


def record_trouble(record: PlanRecord) -> str:
    """Why a record that decodes still makes no sense, empty for a good one.

    Times and errors must be finite and not negative, texts printable and of bounded length (they are shown in
    terminals), the device the same throughout, and usable candidates apart from rejected ones.
    """
    if record.problem.device != record.environment.device:
        return (
            f"device is {record.problem.device!r} in the problem and {record.environment.device!r} in the environment"
        )
    if len(record.version) > MAX_LABEL or len(record.created) > MAX_LABEL:
        return (
            f"version and created have {len(record.version)} and {len(record.created)} characters, at most {MAX_LABEL}"
        )
    for name, group in (("ranking", record.ranking), ("rejected", record.rejected)):
        for index, evidence in enumerate(group):
            if bool(evidence.rejected) != (name == "rejected"):
                return f"{name}[{index}].rejected is {evidence.rejected!r}, which belongs into the other list"
            if evidence.workspace_bytes is not None and evidence.workspace_bytes < 0:
                return f"{name}[{index}].workspace_bytes is {evidence.workspace_bytes}, expected 0 or more"
            if any(not -MAX_KNOB <= value < MAX_KNOB for _, value in evidence.config.knobs):
                return f"{name}[{index}].config.knobs hold a number of more than 64 bits"
    return _value_trouble(msgspec.to_builtins(record), "record")


def _value_trouble(value: Any, where: str) -> str:
    if isinstance(value, str):
        if not _shows(value):
            return f"{where} has {len(value)} characters, expected at most {MAX_TEXT} and no control characters"
    elif isinstance(value, float):
        if not (math.isfinite(value) and value >= 0):
            return f"{where} is {value}, expected a finite number of 0 or more"
    elif isinstance(value, dict):
        return next((found for k, v in value.items() if (found := _value_trouble(v, f"{where}.{k}"))), "")
    elif isinstance(value, (list, tuple)):
        return next((found for i, v in enumerate(value) if (found := _value_trouble(v, f"{where}[{i}]"))), "")
    return ""


class PlanStore:
    """Plans in a SQLite file or a database. Opened at first use; safe from several threads, processes and forks.

    Args:
        url_or_path: a file path, made with its directories when missing, or a SQLAlchemy database URL (anything with
            `://`), whose tables `convplan_plans` and `convplan_meta` are made when missing.
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
        self._path = None if self._url is not None else _absolute(text)
        self._wait_s = wait_s
        self._opened: dict[str, Database] = {}  # empty until first use
        self.location = str(self._path) if self._url is None else hide_password(self._url)

    @classmethod
    def default(cls) -> PlanStore:
        """The store that the environment variables name now, see `default_location`."""
        return cls(default_location())

    def get(self, key: str) -> PlanRecord | None:
        """The plan of this key; None when there is none, or when its row cannot be used."""
        database = self._db()
        from convplan import _database as db

        with database.session() as connection:
            row = connection.execute(db.one_row, {"key": key}).first()
        if row is None:
            return None
        record, trouble = _read(row)
        if trouble:
            log.debug("%s: row %s is not used: %s", self.location, key, trouble)
        return record

    def find_elsewhere(self, choice: str, environment: Environment) -> list[Environment]:
        """The other environments that hold a plan for the same question.

        Args:
            choice: from `choice_key(problem, policy)`.
            environment: the one that is left out.
        """
        database = self._db()
        from convplan import _database as db

        with database.session() as connection:
            found = connection.execute(db.environments_of, {"choice": choice}).scalars().all()
        others = (_read_environment(text) for text in found)
        return [other for other in others if other is not None and other != environment]

    def put(self, record: PlanRecord, *, keep_equal: bool = False, dry_run: bool = False) -> Put:
        """Store a plan under its key.

        A row that cannot be used is replaced. A row found with more effort is kept, and so is one that a newer convplan
        wrote. Looking and writing are one step: of two processes that store the same key at once, the second sees what
        the first wrote. Numbers that are not finite are stored as unknown, and control characters in reasons as `?`.

        Args:
            keep_equal: keep a row of the same effort too, instead of replacing it by the newer one.
            dry_run: decide, but write nothing.

        Returns:
            `added`, `replaced`, or `kept` when the store was left as it is.

        Raises:
            SpecError: the record makes no sense (see `record_trouble`) and is not stored.
        """
        row = _row(record)
        database = self._db()
        from convplan import _database as db

        for _ in range(PUT_ATTEMPTS):
            try:
                with database.session(write=not dry_run) as connection:
                    existing = connection.execute(db.one_row, {"key": row["key"]}).first()
                    if existing is None:
                        if not dry_run:
                            connection.execute(db.insert_row, row)
                        return "added"
                    if _keeps(existing, record.effort, keep_equal=keep_equal):
                        return "kept"
                    if dry_run:
                        return "replaced"
                    seen = {"seen_key": row["key"], "seen_checksum": existing.checksum}
                    if connection.execute(db.replace_row, {**row, **seen}).rowcount == 1:
                        return "replaced"
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
                record, trouble = _read(row)
                yield StoredRow(
                    key=showable(str(row.key)),
                    schema=row.schema if isinstance(row.schema, int) else 0,
                    device=showable(str(row.device)),
                    effort=showable(str(row.effort)),
                    engine=showable(str(row.engine)),
                    version=showable(str(row.version)),
                    created=showable(str(row.created)),
                    environment=_read_environment(row.environment),
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
            named.append(db.plans.c.environment.not_in([_environment_text(environment) for environment in not_in]))
        ours = db.plans.c.schema <= ROW_SCHEMA
        count = sa.select(sa.func.count()).select_from(db.plans)
        with database.session(write=not dry_run) as connection:
            left = connection.execute(count.where(*named, sa.not_(ours))).scalar_one()
            if dry_run:
                return Deleted(connection.execute(count.where(*named, ours)).scalar_one(), left)
            return Deleted(connection.execute(sa.delete(db.plans).where(*named, ours)).rowcount, left)

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
        count = elsewhere = 0
        try:
            integrity.extend(database.integrity())
            for row in self.rows():
                count += 1
                trouble = row.trouble if row.record is None else usable_trouble(row.record, known)
                if trouble:
                    problems.append(RowProblem(row.key, trouble))
                elsewhere += not trouble and row.environment not in mine
        except StoreError as exc:
            integrity.append(exc.reason)
        return CheckReport(
            location=self.location,
            rows=count,
            elsewhere=elsewhere,
            problems=tuple(problems),
            integrity=tuple(integrity),
        )

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
        made = Database(url=self._url, path=self._path, shown=self.location, wait_s=self._wait_s)
        return self._opened.setdefault("database", made)  # one step, so that two threads end with the same one


def usable_trouble(record: PlanRecord, engines: Collection[str]) -> str:
    """Why a record cannot be used in this installation, empty when it can: senseless, or an engine nobody knows."""
    unknown = sorted({evidence.config.engine for evidence in record.ranking} - set(engines))
    if unknown:
        return f"unknown engine {', '.join(map(repr, unknown))}; registered engines: {', '.join(engines)}"
    return record_trouble(record)


def current_environments() -> tuple[Environment, ...]:
    """The environments of this process now: its CPU and each GPU that torch sees."""
    import torch

    from convplan import _environment

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return (_environment.current("cpu"), *(_environment.current("cuda", index) for index in gpus))


def registered_engines() -> tuple[str, ...]:
    """The names of the engines of this installation."""
    from convplan.engines import registry

    return registry.names()


def _absolute(text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as exc:  # no home directory to expand ~ to, no working directory
        raise StoreError(path=text, reason=f"is not a usable path: {exc}") from exc


def _environment_text(environment: Environment) -> str:
    return _encode.encode(environment).decode()


def _read_environment(text: object) -> Environment | None:
    try:
        return _environment_decoder.decode(text) if isinstance(text, str) else None
    except (msgspec.DecodeError, RecursionError):
        return None


def _checksum(record: str) -> str:
    return hashlib.sha256(record.encode()).hexdigest()


def _row(record: PlanRecord) -> dict[str, object]:
    text = _encode.encode(_printable(record)).decode()
    try:
        trouble = record_trouble(_record_decoder.decode(text))
    except msgspec.DecodeError as exc:
        trouble = str(exc)
    if trouble:
        raise SpecError(f"this plan record cannot be stored: {trouble}")
    return {
        "key": record.key,
        "choice_key": choice_key(record.problem, record.policy),
        "schema": ROW_SCHEMA,
        "environment": _environment_text(record.environment),
        "device": record.environment.device,
        "effort": record.effort,
        "engine": record.config.engine,
        "version": record.version,
        "created": record.created,
        "checksum": _checksum(text),
        "record": text,
    }


def _printable(record: PlanRecord) -> PlanRecord:
    """The record with reasons that may be shown: they hold other libraries' words, colour codes and all."""

    def cleaned(group: tuple[Evidence, ...]) -> tuple[Evidence, ...]:
        return tuple(
            item if _shows(item.reason) else msgspec.structs.replace(item, reason=showable(item.reason))
            for item in group
        )

    return msgspec.structs.replace(record, ranking=cleaned(record.ranking), rejected=cleaned(record.rejected))


def _shows(text: str) -> bool:
    return len(text) <= MAX_TEXT and (text.isprintable() or all(c.isprintable() or c in "\n\t" for c in text))


def showable(text: str) -> str:
    """The text cut at `MAX_TEXT`, with `?` for control characters: fit for a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text[:MAX_TEXT])


def _is_newer(schema: object) -> bool:
    """Written by a newer convplan. A number that is none counts as newer too: nobody here knows whose row that is."""
    return not isinstance(schema, int) or schema > ROW_SCHEMA


def _read(row: sa.Row[Any]) -> tuple[PlanRecord | None, str]:
    """The row's record, or None and the reason why it cannot be used."""
    if _is_newer(row.schema):
        return None, f"row schema is {row.schema!r}, expected {ROW_SCHEMA} or older: a newer convplan wrote it"
    # SQLite keeps whatever type was written into a column, so an edited file can hold anything here.
    if not isinstance(row.record, str) or row.checksum != _checksum(row.record):
        return None, "damaged: the record does not match its checksum"
    try:
        record = _record_decoder.decode(row.record)
    except (msgspec.DecodeError, RecursionError) as exc:
        return None, showable(f"the record is not a plan record: {exc}")
    if record.key != row.key:
        return None, f"the key does not belong to the record, whose key is {record.key}"
    return record, ""


def _keeps(existing: sa.Row[Any], effort: Effort, *, keep_equal: bool) -> bool:
    """Whether a row stays although a record of the same key is offered."""
    if _is_newer(existing.schema):
        return True
    record, _ = _read(existing)
    if record is None:
        return False
    return satisfies(record.effort, effort) and (keep_equal or record.effort != effort)


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
        self._memory: dict[str, PlanRecord] = {}  # what the store does not hold
        self._unstorable: dict[str, object] = {}  # keys in there that it refused for good
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

    def lookup(self, problem: Problem, policy: Policy, environment: Environment) -> PlanRecord | None:
        """The stored plan for this question, if it was found in this environment with at least the policy's effort.

        When there is none, but another environment holds one, a warning says so once: those rows are not used and stay.

        Args:
            policy: resolved; its `effort` is the least that counts.
        """
        key = plan_key(problem, policy, environment)
        kept = self._memory.get(key)
        if kept is not None and satisfies(kept.effort, policy.effort):
            return kept
        if self._rests("read"):
            return None
        try:
            store = self._opened()
            record = store.get(key)
            if record is None and kept is None and "elsewhere" not in self._warned:
                self._report_elsewhere(store, choice_key(problem, policy), environment)
        except StoreError as exc:
            self._trouble("read", exc)
            return None
        return record if record is not None and satisfies(record.effort, policy.effort) else None

    def records(self, environment: Environment) -> list[PlanRecord]:
        """Every usable record that was found in this environment, in one pass over the store."""
        kept = [record for record in list(self._memory.values()) if record.environment == environment]
        if self._rests("read"):
            return kept
        try:
            rows = list(self._opened().rows(device=environment.device))
        except StoreError as exc:
            self._trouble("read", exc)
            return kept
        stored = [row.record for row in rows if row.record is not None and row.environment == environment]
        return [*stored, *kept]

    def remember(self, record: PlanRecord) -> None:
        """Store a record, and those that could not be stored before; what cannot be written stays in memory."""
        key = record.key
        kept = self._memory.get(key)
        if kept is None or satisfies(record.effort, kept.effort):
            self._memory[key] = record
            self._unstorable.pop(key, None)
        if self._rests("written"):
            return
        for waiting, item in list(self._memory.items()):
            if waiting in self._unstorable:
                continue
            try:
                self._opened().put(item)
            except StoreError as exc:
                self._trouble("written", exc)
                return
            except SpecError as exc:
                self._unstorable[waiting] = None
                self._warn_once(str(exc), f"{exc}; it is used in this process only")
                continue
            if self._memory.get(waiting) is item:
                self._memory.pop(waiting, None)

    def close(self) -> None:
        """Give the connection back; records in memory stay."""
        if self._store is not None:
            self._store.close()

    def _opened(self) -> PlanStore:
        if self._store is None:
            self._store = PlanStore.default()
        return self._store

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

    def _report_elsewhere(self, store: PlanStore, choice: str, environment: Environment) -> None:
        others = store.find_elsewhere(choice, environment)
        if others:
            changes = min((other.differences(environment) for other in others), key=lambda text: text.count(","))
            self._warn_once(
                "elsewhere",
                f"plan store {store.location} answers this problem for another environment ({changes}); those plans "
                "are not used here and stay as they are, this environment gets its own",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        mine = object()
        if self._warned.setdefault(kind, mine) is mine:
            warnings.warn(message, ConvPlanWarning, stacklevel=4)
        else:
            log.debug("%s", message)

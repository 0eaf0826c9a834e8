"""The store's tables beside the plans: serialized plans (`PartsTable`) and learned errata (`ErrataTable`).

`PlanStore` derives from both. What a row of them is and which may be used is decided in `_serialized` and `_learned`.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from convplan._environment import Environment
from convplan._errors import StoreBusy, StoreError
from convplan._learned import (
    ERRATUM_SCHEMA,
    MAX_ERRATA,
    LearnedErratum,
    RawErratum,
    in_scope,
    merged,
    read_erratum,
    row_of_erratum,
)
from convplan._rows import showable
from convplan._serialized import Part, RawPart, config_key, part_of_row, read_part, row_of_part, unpack
from convplan.engines.base import EngineConfig

if TYPE_CHECKING:
    import sqlalchemy as sa

    from convplan._database import Database

log = logging.getLogger("convplan.store")

ATTEMPTS = 8  # lost races with other writers of the same erratum before giving up

Learned = Literal["added", "updated", "kept"]


class StoredErratum(NamedTuple):
    """One row of errata as it lies in the store: its id, and the erratum or the reason why it cannot be used."""

    id: str
    erratum: LearnedErratum | None
    trouble: str


class Tables(abc.ABC):
    """What the parts of `PlanStore` have in common."""

    location: str

    @abc.abstractmethod
    def _db(self) -> Database:
        """The database, opened at first use."""


class PartsTable(Tables):
    """What `PlanStore` does with serialized plans."""

    def serialized(self, key: str, config: EngineConfig) -> bytes | None:
        """The serialized plan of one candidate; None when there is none, or when it was altered."""
        row = self.raw_part(key, config_key(config))
        if row is None:
            return None
        plain, trouble = read_part(row, key, config)
        if trouble:
            log.warning("%s: serialized plan of %s, %s is not used: %s", self.location, key, config, trouble)
        return plain

    def parts(self, key: str) -> list[tuple[Part | None, str]]:
        """Everything serialized that lies beside a plan: each part, or None and the reason why it cannot be used."""
        database = self._db()
        from convplan import _database as db

        with database.session() as connection:
            if database.is_older(connection):
                return []
            rows = [RawPart(*row) for row in connection.execute(db.parts_of, {"key": key})]
        return [_checked_part(row) for row in rows]

    def raw_part(self, key: str, config_key: str) -> RawPart | None:
        """One serialized plan's row as it lies there."""
        database = self._db()
        from convplan import _database as db

        with database.session() as connection:
            if database.is_older(connection):
                return None
            row = connection.execute(db.one_part, {"key": key, "config_key": config_key}).first()
        return None if row is None else RawPart(*row)

    def checked_parts(self) -> Iterator[tuple[str, str, str]]:
        """Key, configuration and trouble of every serialized plan; those of one key are in memory at a time."""
        database = self._db()
        from convplan import _database as db

        with database.session() as connection:
            if database.is_older(connection):
                return
            keys = [str(key) for key in connection.execute(db.part_keys).scalars()]
        for key in keys:
            for part, trouble in self.parts(key):
                yield showable(key), "-" if part is None else str(part.config), showable(trouble)


class ErrataTable(Tables):
    """What `PlanStore` does with errata."""

    def learn(
        self, errata: Iterable[LearnedErratum], *, count_again: bool = True, dry_run: bool = False
    ) -> dict[Learned, int]:
        """Store observations. All of them are stored, or none.

        Args:
            count_again: an erratum that is there already was seen once more. False: it is kept as it is, so that
                importing a file twice changes nothing.
            dry_run: decide, but write nothing.

        Returns:
            How many were `added`, `updated` and `kept`. Rows that a newer convplan wrote are kept.

        Raises:
            SpecError: one makes no sense; nothing is stored.
            StoreError: the store cannot be written, or would hold more than `MAX_ERRATA`.
        """
        offered = [(erratum, row_of_erratum(erratum)) for erratum in errata]
        if not offered:
            return {"added": 0, "updated": 0, "kept": 0}
        database = self._db()
        from convplan import _database as db

        for _ in range(ATTEMPTS):
            done: dict[Learned, int] = {"added": 0, "updated": 0, "kept": 0}
            try:
                with database.session(write=not dry_run) as connection:
                    room = MAX_ERRATA
                    if not database.is_older(connection):
                        room -= connection.execute(db.count_errata).scalar_one()
                    for erratum, row in offered:
                        done[self._learn_one(connection, erratum, row, count_again, dry_run)] += 1
                    if done["added"] > room:
                        raise StoreError(
                            path=self.location,
                            reason=f"there is room for {max(room, 0)} more learned errata of {MAX_ERRATA}, found "
                            f"{done['added']} new ones; `convplan errata clear` makes room",
                        )
                return done
            except db.LostRace:
                continue
        raise StoreBusy(path=self.location, waited_s=0)

    def _learn_one(
        self,
        connection: sa.Connection,
        erratum: LearnedErratum,
        row: dict[str, object],
        count_again: bool,
        dry_run: bool,
    ) -> Learned:
        from convplan import _database as db

        if dry_run and self._db().is_older(connection):
            return "added"
        found = connection.execute(db.one_erratum, {"id": row["id"]}).first()
        if found is None:
            if not dry_run:
                connection.execute(db.insert_erratum, row)
            return "added"
        raw = RawErratum(*found)
        if not isinstance(raw.schema, int) or raw.schema > ERRATUM_SCHEMA:
            return "kept"
        known, _ = read_erratum(raw)
        if known is not None and not count_again:
            return "kept"
        if not dry_run:
            new = row if known is None else row_of_erratum(merged(known, erratum))
            seen = {"seen_id": raw.id, "seen_checksum": raw.checksum}
            if connection.execute(db.replace_erratum, {**new, **seen}).rowcount != 1:
                raise db.LostRace
        return "updated"

    def errata(self, environment: Environment | None = None) -> list[LearnedErratum]:
        """The usable errata, in the order of their ids.

        Args:
            environment: only those that count there. None: all.
        """
        if environment is None:
            return [row.erratum for row in self.errata_rows() if row.erratum is not None]
        return list(in_scope(self.raw_errata(environment.device), environment))

    def errata_rows(self) -> Iterator[StoredErratum]:
        """Every row of errata, usable or not."""
        for raw in self.raw_errata(None):
            erratum, trouble = read_erratum(raw)
            yield StoredErratum(showable(str(raw.id)), erratum, showable(trouble))

    def raw_errata(self, device: str | None) -> list[RawErratum]:
        """The rows of a device type as they lie there, `MAX_ERRATA` at most. None: of all."""
        database = self._db()
        from convplan import _database as db

        query = db.all_errata if device is None else db.errata_of_device
        values: dict[str, Any] = {} if device is None else {"device": device}
        with database.session() as connection:
            if database.is_older(connection):
                return []
            return [RawErratum(*row) for row in connection.execute(query.limit(MAX_ERRATA), values)]

    def forget_errata(self, prefix: str = "", *, dry_run: bool = False) -> int:
        """Delete the errata whose id begins like this, every one without a prefix; returns how many.

        All of them go, or none. Rows that a newer convplan wrote stay.

        Args:
            dry_run: count, but delete nothing.
        """
        database = self._db()
        import sqlalchemy as sa

        from convplan import _database as db

        table = db.errata
        named = [table.c.schema <= ERRATUM_SCHEMA]
        if prefix:
            named.append(table.c.id.startswith(prefix, autoescape=True))
        with database.session(write=not dry_run, upgrade=False) as connection:
            if database.is_older(connection):
                return 0
            if dry_run:
                return connection.execute(sa.select(sa.func.count()).select_from(table).where(*named)).scalar_one()
            return connection.execute(sa.delete(table).where(*named)).rowcount


def _checked_part(row: RawPart) -> tuple[Part | None, str]:
    part, trouble = part_of_row(row)
    return part, trouble if part is None else unpack(part)[1]


def write_parts(
    connection: sa.Connection, parts: Sequence[Part], key: object, put: str, *, dry_run: bool, older: bool
) -> int:
    """Store the parts of a row that was just written, or add to a kept one what it lacks; returns how many."""
    from convplan import _database as db

    usable: set[EngineConfig] = set()
    if put == "kept" and not older:
        found = (_checked_part(RawPart(*row)) for row in connection.execute(db.parts_of, {"key": key}))
        usable = {part.config for part, trouble in found if part is not None and not trouble}
    wanted = [part for part in parts if part.config not in usable]
    if dry_run:
        return len(wanted)
    if put != "kept":
        connection.execute(db.delete_parts, {"seen_key": key})
    for part in wanted:
        if put == "kept":
            connection.execute(db.delete_part, {"seen_key": key, "seen_config_key": config_key(part.config)})
        connection.execute(db.insert_part, row_of_part(part))
    return len(wanted)

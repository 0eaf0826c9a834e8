"""Plans as JSON files: export, import, and the functions that look after a whole store (check, clear).

The format is a `PlanFile`, published as JSON Schema in `convplan/schemas/plans.schema.json` (made from the struct by
`scripts/write_plan_schema.py`). Files come from anywhere, so reading is strict: bounded in size, no unknown fields,
every record checked like a new one and again by `record_trouble`, and nothing in a file is ever executed. What a row
of the store is, and which of two plans for one key stays, is decided in `_store`.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import msgspec

from convplan._environment import Environment
from convplan._errors import PlanFileError, StoreError, StoreMismatch
from convplan._plan import PlanRecord
from convplan._policy import EFFORTS
from convplan._store import (
    CheckReport,
    Deleted,
    PlanStore,
    current_environments,
    registered_engines,
    showable,
    usable_trouble,
)

FORMAT = "convplan-plans"
FILE_SCHEMA = 1  # goes up when an older convplan could not read the file, or would misread it
MAX_FILE_BYTES = 64 * 2**20
MAX_PLANS = 100_000
SCHEMA_FILE = Path(__file__).parent / "schemas" / "plans.schema.json"

AnyStore = PlanStore | str | os.PathLike[str]


class EnvironmentCount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many plans of a file belong to one environment. For readers; import looks at the plans themselves."""

    environment: Environment
    plans: int


class _Head(msgspec.Struct, frozen=True):
    """The two fields every version of the format has; read first, so that a newer file is told from a broken one."""

    format: str
    schema: int


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `PlanFile` whose plans are not decoded yet, so that one bad plan is refused and the others are read."""

    format: Literal["convplan-plans"]
    schema: int
    plans: list[msgspec.Raw]
    version: str = ""
    created: str = ""
    environments: tuple[EnvironmentCount, ...] = ()


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of plans.

    Attributes:
        format: always `convplan-plans`.
        schema: `FILE_SCHEMA`.
        plans: whole plan records, evidence included.
        version: the convplan that wrote the file.
        created: UTC time in ISO 8601.
        environments: which environments the plans belong to.
    """

    format: Literal["convplan-plans"]
    schema: int
    plans: tuple[PlanRecord, ...]
    version: str = ""
    created: str = ""
    environments: tuple[EnvironmentCount, ...] = ()


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `export_plans` wrote.

    Attributes:
        path: the file.
        exported: number of plans in it.
        left_out: (key, reason) of rows that cannot be used and so are not in it.
    """

    path: str
    exported: int
    left_out: tuple[tuple[str, str], ...]


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `import_plans` did, or would do.

    Attributes:
        added: plans that the store did not have.
        replaced: plans that took the place of one found with less effort, or of an unusable row.
        kept: plans that were not needed: the store (or the file, a second time) has one of the same or more effort.
        elsewhere: how many of the added, replaced and kept ones belong to other environments than this process's; they
            are stored for those and never used here.
        refused: (key or position in the file, reason) of plans that were not taken.
        dry_run: True when nothing was written.
    """

    added: int
    replaced: int
    kept: int
    elsewhere: int
    refused: tuple[tuple[str, str], ...]
    dry_run: bool


def export_plans(
    path: str | os.PathLike[str],
    *,
    store: AnyStore | None = None,
    key_prefix: str = "",
    engine: str | None = None,
    device: str | None = None,
) -> ExportReport:
    """Write plans of a store to a JSON file that `import_plans` reads.

    The file appears complete or not at all: an older file of that name stays until the new one is on disk, also
    through a crash. Rows that cannot be used are left out and reported. The file says nothing about the user or the
    machine's name, only the environments (device model, library versions, number of threads) that the plans belong
    to.

    Args:
        path: the file; replaced when it exists.
        store: a `PlanStore`, a path or a URL. None: the default store.
        key_prefix: only keys that begin like this.
        engine: only plans whose chosen engine has this name.
        device: only plans for this torch device type.

    Raises:
        StoreError: the store cannot be read, or the file not written; the message names which.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise StoreError(path=str(target), reason="is a directory, expected the name of a file to write")
    records: list[PlanRecord] = []
    left_out: list[tuple[str, str]] = []
    with _opened(store) as source:
        for row in source.rows(key_prefix=key_prefix, engine=engine, device=device):
            if row.record is None:
                left_out.append((row.key, row.trouble))
            else:
                records.append(row.record)
    from convplan import __version__

    counts = Counter(record.environment for record in records)
    content = msgspec.json.encode(
        PlanFile(
            format="convplan-plans",
            schema=FILE_SCHEMA,
            plans=tuple(records),
            version=__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environments=tuple(EnvironmentCount(environment, count) for environment, count in counts.items()),
        )
    )
    if len(content) > MAX_FILE_BYTES or len(records) > MAX_PLANS:
        raise StoreError(
            path=str(target),
            reason=f"{len(records)} plans make {len(content)} bytes, but import accepts at most {MAX_PLANS} plans and "
            f"{MAX_FILE_BYTES} bytes; export in parts, by engine, device or key",
        )
    _write_whole(target, content + b"\n")
    return ExportReport(path=str(target), exported=len(records), left_out=tuple(left_out))


def import_plans(path: str | os.PathLike[str], *, store: AnyStore | None = None, dry_run: bool = False) -> ImportReport:
    """Take the plans of a JSON file into a store. Importing several files merges them.

    A plan replaces a stored one only if it was found with more effort, so importing the same file twice changes
    nothing. A plan of another environment is stored too: it waits there for that environment and is never used in
    this one. Each plan is one write: other processes may use the store meanwhile, and after a crash the plans taken
    so far are there and importing again completes them.

    Args:
        path: a file that `export_plans` wrote.
        store: a `PlanStore`, a path or a URL. None: the default store.
        dry_run: report what would happen, but write nothing.

    Raises:
        PlanFileError: the file is malformed or too large; nothing is imported.
        StoreMismatch: it is no file of plans, or a newer convplan wrote it; nothing is imported.
        StoreError: the file cannot be read, or the store not written.
    """
    envelope = _read_envelope(Path(path))
    known, here = registered_engines(), current_environments()
    chosen: dict[str, PlanRecord] = {}
    refused: list[tuple[str, str]] = []
    counts: Counter[str] = Counter()
    for index, raw in enumerate(envelope.plans):
        name, record, reason = _read_record(raw, index, known)
        if record is None:
            refused.append((name, reason))
            continue
        counts["elsewhere"] += record.environment not in here
        twin = chosen.get(name)
        if twin is not None:
            counts["kept"] += 1
            if EFFORTS.index(twin.effort) >= EFFORTS.index(record.effort):
                continue
        chosen[name] = record
    with _opened(store) as target:
        for record in chosen.values():
            counts[target.put(record, keep_equal=True, dry_run=dry_run)] += 1
    return ImportReport(
        added=counts["added"],
        replaced=counts["replaced"],
        kept=counts["kept"],
        elsewhere=counts["elsewhere"],
        refused=tuple(refused),
        dry_run=dry_run,
    )


def check_plans(*, store: AnyStore | None = None) -> CheckReport:
    """Look at every stored plan and at the store itself; changes nothing.

    Args:
        store: a `PlanStore`, a path or a URL. None: the default store.

    Returns:
        `report.ok` is True when all is well; `report.problems` names every row that cannot be used, with the reason.

    Raises:
        StoreError: the store cannot be opened.
    """
    with _opened(store) as opened:
        return opened.check()


def clear_plans(
    *,
    store: AnyStore | None = None,
    key_prefix: str = "",
    engine: str | None = None,
    device: str | None = None,
    other_environments: bool = False,
    dry_run: bool = False,
) -> Deleted:
    """Delete stored plans: those that all given filters name, or every one when none is given.

    All named rows go in one step, or none. Plans that running processes already hold in memory stay in use there. Rows
    that a newer convplan wrote stay.

    Args:
        store: a `PlanStore`, a path or a URL. None: the default store.
        key_prefix: only keys that begin like this.
        engine: only plans whose chosen engine has this name.
        device: only plans for this torch device type.
        other_environments: only plans that cannot be used by a process like this one: another machine, library version,
            number of threads. In a team's database those are other people's plans.
        dry_run: count, but delete nothing.

    Raises:
        StoreError: the store cannot be opened or written.
    """
    with _opened(store) as opened:
        return opened.delete(
            key_prefix=key_prefix,
            engine=engine,
            device=device,
            not_in=current_environments() if other_environments else None,
            dry_run=dry_run,
        )


def plan_file_schema() -> bytes:
    """The JSON Schema of the format, as `SCHEMA_FILE` holds it.

    Descriptions of the structs are left out: they are written for readers of the code and change with it.
    """
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "convplan plan file",
        "description": "Convolution plans written by convplan.export_plans. Beyond this schema, import checks that "
        f"sizes fit together and that times are finite and not negative; it accepts {MAX_PLANS} plans and "
        f"{MAX_FILE_BYTES} bytes at most.",
        **_without_descriptions(msgspec.json.schema(PlanFile)),
    }
    schema["$defs"]["PlanFile"]["properties"]["schema"] = {"const": FILE_SCHEMA}
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"


def _without_descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_descriptions(v) for k, v in value.items() if not (k == "description" and isinstance(v, str))
        }
    return [_without_descriptions(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _opened(store: AnyStore | None) -> Iterator[PlanStore]:
    """The store to work on; closed again if it was opened here."""
    if isinstance(store, PlanStore):
        yield store
        return
    with PlanStore.default() if store is None else PlanStore(store) as opened:
        yield opened


def _read_envelope(path: Path) -> _Envelope:
    content = _read_bounded(path)
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.format != FORMAT:
            raise StoreMismatch(path=str(path), found=repr(head.format), expected=f"{FORMAT!r} {FILE_SCHEMA}")
        if head.schema != FILE_SCHEMA:
            raise StoreMismatch(path=str(path), found=str(head.schema), expected=str(FILE_SCHEMA))
        envelope = msgspec.json.decode(content, type=_Envelope)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise PlanFileError(
            path=str(path), reason=showable(f"is not a file of plans: {exc}; nothing was imported")
        ) from exc
    if len(envelope.plans) > MAX_PLANS:
        raise PlanFileError(
            path=str(path),
            reason=f"holds {len(envelope.plans)} plans, expected at most {MAX_PLANS}; nothing was imported",
        )
    return envelope


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise StoreError(path=str(path), reason=f"cannot be read: {exc.strerror or exc}") from exc
    if len(content) > MAX_FILE_BYTES:
        raise PlanFileError(
            path=str(path), reason=f"is larger than {MAX_FILE_BYTES} bytes, the most that is read; nothing was imported"
        )
    return content


def _read_record(raw: msgspec.Raw, index: int, known: tuple[str, ...]) -> tuple[str, PlanRecord | None, str]:
    """One plan of a file: its key and record, or its position, None and the reason of the refusal."""
    position = f"plans[{index}]"
    try:
        record = msgspec.json.decode(raw, type=PlanRecord)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        return position, None, showable(str(exc))
    if trouble := usable_trouble(record, known):
        return f"{position} {record.key}", None, trouble
    return record.key, record, ""


def _write_whole(target: Path, content: bytes) -> None:
    """Write beside the target and rename, so that nobody ever sees half a file."""
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        try:
            with beside.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as exc:
        raise StoreError(path=str(target), reason=f"cannot be written: {exc.strerror or exc}") from exc

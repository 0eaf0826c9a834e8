"""Plans as JSON files: export, import, and the functions that look after a whole store (check, clear).

The format is a `PlanFile`, published as JSON Schema in `convplan/schemas/plans.schema.json` (made from the struct by
`scripts/write_plan_schema.py`). Files come from anywhere, so reading is strict: bounded in size, no unknown fields,
every record checked like a new one and again by `record_trouble`, every serialized plan unpacked within bounds and
held against its checksum, and nothing in a file is executed by reading it. What a row of the store is, and which of two
plans for one key stays, is decided in `_store`; what a serialized plan is, in `_serialized`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from convplan._environment import Environment
from convplan._errors import PlanFileError, StoreError
from convplan._files import (
    UNREADABLE,
    AnyStore,
    FileFormat,
    decode_item,
    file_to_write,
    opened_store,
    read_envelope,
    write_whole,
)
from convplan._plan import PlanRecord, utc_now
from convplan._policy import EFFORTS
from convplan._rows import MAX_LABEL
from convplan._serialized import MAX_PARTS, Part, part_trouble
from convplan._store import (
    CheckReport,
    Deleted,
    current_environments,
    registered_engines,
    showable,
    usable_trouble,
)

FORMAT = "convplan-plans"
FILE_SCHEMA = 2  # goes up when an older convplan could not read the file, or would misread it
OLDER_SCHEMAS = (1,)  # that are read too; they hold no serialized plans
MAX_FILE_BYTES = 256 * 2**20
MAX_PLANS = 100_000
SCHEMA_FILE = Path(__file__).parent / "schemas" / "plans.schema.json"


class EnvironmentCount(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many plans of a file belong to one environment. For readers; import looks at the plans themselves."""

    environment: Environment
    plans: int


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `PlanFile` whose plans are not decoded yet, so that one bad plan is refused and the others are read."""

    format: Literal["convplan-plans"]
    schema: int
    plans: list[msgspec.Raw]
    version: str = ""
    created: str = ""
    environments: tuple[EnvironmentCount, ...] = ()
    serialized: list[msgspec.Raw] = []
    content_sha256: str = ""


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of plans.

    Attributes:
        format: always `convplan-plans`.
        schema: `FILE_SCHEMA`.
        plans: whole plan records, evidence included.
        version: the convplan that wrote the file.
        created: UTC time in ISO 8601.
        environments: which environments the plans belong to.
        serialized: serialized plans of candidates of `plans`.
        content_sha256: see `content_digest`; empty where the writer did not say.
    """

    format: Literal["convplan-plans"]
    schema: int
    plans: tuple[PlanRecord, ...]
    version: str = ""
    created: str = ""
    environments: tuple[EnvironmentCount, ...] = ()
    serialized: tuple[Part, ...] = ()
    content_sha256: str = ""


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `export_plans` wrote.

    Attributes:
        path: the file.
        exported: number of plans in it.
        left_out: (key, reason) of rows that cannot be used and so are not in it, and of serialized plans.
        serialized: number of serialized plans in it.
    """

    path: str
    exported: int
    left_out: tuple[tuple[str, str], ...]
    serialized: int = 0


class ImportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `import_plans` did, or would do.

    Attributes:
        added: plans that the store did not have.
        replaced: plans that took the place of one found with less effort, or of an unusable row.
        kept: plans that were not needed: the store (or the file, a second time) has one of the same or more effort.
        elsewhere: how many of the added, replaced and kept ones belong to other environments than this process's; they
            are stored for those and never used here.
        refused: (key or position in the file, reason) of plans, and of serialized plans, that were not taken.
        dry_run: True when nothing was written.
        serialized: serialized plans that were stored beside these.
    """

    added: int
    replaced: int
    kept: int
    elsewhere: int
    refused: tuple[tuple[str, str], ...]
    dry_run: bool
    serialized: int = 0


def export_plans(
    path: str | os.PathLike[str],
    *,
    store: AnyStore | None = None,
    key_prefix: str = "",
    engine: str | None = None,
    device: str | None = None,
    serialized: bool = True,
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
        serialized: False: without the serialized plans beside them; whoever imports it builds them anew.

    Raises:
        StoreError: the store cannot be read, or the file not written; the message names which.
    """
    target = file_to_write(path)
    records: list[PlanRecord] = []
    parts: list[Part] = []
    left_out: list[tuple[str, str]] = []
    size = 0
    with opened_store(store) as source:
        for row in source.rows(key_prefix=key_prefix, engine=engine, device=device):
            if row.record is None:
                left_out.append((row.key, row.trouble))
                continue
            records.append(row.record)
            for part, trouble in source.parts(row.key) if serialized else ():
                trouble = trouble or ("" if part is None else part_trouble(part, row.record))
                if part is None or trouble:
                    left_out.append((row.key, f"a serialized plan: {showable(trouble)}"))
                    continue
                parts.append(msgspec.structs.replace(part, provenance=""))
                size += len(part.data) * 4 // 3
                if size > MAX_FILE_BYTES:
                    raise _too_large(target, len(records), size)
    content = msgspec.json.encode(_plan_file(records, parts))
    if len(content) > MAX_FILE_BYTES or len(records) > MAX_PLANS:
        raise _too_large(target, len(records), len(content))
    write_whole(target, content + b"\n")
    return ExportReport(path=str(target), exported=len(records), left_out=tuple(left_out), serialized=len(parts))


def _plan_file(records: Sequence[PlanRecord], parts: Sequence[Part]) -> PlanFile:
    from convplan import __version__

    counts = Counter(record.environment for record in records)
    return PlanFile(
        format="convplan-plans",
        schema=FILE_SCHEMA,
        plans=tuple(records),
        version=__version__,
        created=utc_now(),
        environments=tuple(EnvironmentCount(environment, count) for environment, count in counts.items()),
        serialized=tuple(parts),
        content_sha256=content_digest(map(msgspec.json.encode, (*records, *parts))),
    )


def _too_large(target: Path, plans: int, size: int) -> StoreError:
    return StoreError(
        path=str(target),
        reason=f"{plans} plans make {size} bytes, but import accepts at most {MAX_PLANS} plans and "
        f"{MAX_FILE_BYTES} bytes; export in parts, by engine, device or key, or without serialized plans",
    )


def content_digest(items: Iterable[bytes | msgspec.Raw]) -> str:
    """SHA-256 over the plans and then the serialized plans of a file, however their JSON is spaced and ordered."""
    digest = hashlib.sha256()
    for item in items:
        try:
            piece = msgspec.json.encode(msgspec.json.decode(item), order="deterministic")
        except UNREADABLE:  # no plan, and refused as such later
            piece = bytes(item)
        digest.update(len(piece).to_bytes(8, "big") + piece)
    return digest.hexdigest()


def import_plans(
    path: str | os.PathLike[str], *, store: AnyStore | None = None, dry_run: bool = False, serialized: bool = True
) -> ImportReport:
    """Take the plans of a JSON file into a store. Importing several files merges them.

    A plan replaces a stored one only if it was found with more effort, so importing the same file twice changes
    nothing. A plan of another environment is stored too: it waits there for that environment and is never used in
    this one. Each plan is one write, with what was serialized of it: other processes may use the store meanwhile, and
    after a crash the plans taken so far are there and importing again completes them.

    A serialized plan is code for a GPU, which runs with your rights when the plan runs: take those of people only whose
    wheels you would install.

    Args:
        path: a file that `export_plans` wrote.
        store: a `PlanStore`, a path or a URL. None: the default store.
        dry_run: report what would happen, but write nothing.
        serialized: False: take the plans and leave their serialized parts; they are built anew where they run.

    Raises:
        PlanFileError: the file is malformed, altered or too large; nothing is imported.
        StoreMismatch: it is no file of plans, or a newer convplan wrote it; nothing is imported.
        StoreError: the file cannot be read, or the store not written.
    """
    envelope = _read_envelope(Path(path))
    counts: Counter[str] = Counter()
    chosen, refused = _choose(envelope, counts)
    parts: dict[str, list[Part]] = {}
    if serialized:
        parts, bad = _read_parts(envelope, chosen)
        refused += bad
    with opened_store(store) as target:
        for key, record in chosen.items():
            put, taken = target.put_parts(record, parts.get(key, ()), keep_equal=True, dry_run=dry_run)
            counts[put] += 1
            counts["serialized"] += taken
    return ImportReport(
        added=counts["added"],
        replaced=counts["replaced"],
        kept=counts["kept"],
        elsewhere=counts["elsewhere"],
        refused=tuple(refused),
        dry_run=dry_run,
        serialized=counts["serialized"],
    )


def _choose(envelope: _Envelope, counts: Counter[str]) -> tuple[dict[str, PlanRecord], list[tuple[str, str]]]:
    """The good plans of a file by key, and the refused ones; counts those of elsewhere, and those not needed."""
    known, here = registered_engines(), current_environments()
    chosen: dict[str, PlanRecord] = {}
    refused: list[tuple[str, str]] = []
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
    return chosen, refused


def _read_parts(
    envelope: _Envelope, chosen: Mapping[str, PlanRecord]
) -> tuple[dict[str, list[Part]], list[tuple[str, str]]]:
    """The good serialized plans of a file by their plan's key, and the refused ones."""
    provenance = _provenance(envelope)
    parts: dict[str, list[Part]] = {}
    refused: list[tuple[str, str]] = []
    for index, raw in enumerate(envelope.serialized):
        name = f"serialized[{index}]"
        part, trouble = decode_item(raw, Part)
        if part is None:
            refused.append((name, trouble))
            continue
        part = msgspec.structs.replace(part, provenance=provenance)
        record = chosen.get(part.key)
        beside = parts.setdefault(part.key, []) if record is not None else []
        if record is None:
            trouble = "its plan is not among those taken from this file"
        elif len(beside) >= MAX_PARTS or any(part.config == other.config for other in beside):
            trouble = f"its plan has one for this configuration already, or {MAX_PARTS} of them"
        else:
            trouble = part_trouble(part, record)
        if trouble:
            refused.append((f"{name} {showable(part.key[:32])} {showable(str(part.config))}", showable(trouble)))
        else:
            beside.append(part)
    return parts, refused


def _provenance(envelope: _Envelope) -> str:
    """Who made a file, in words for the store; what the file says of itself is cut and cleaned."""
    version, created = (showable(text)[:MAX_LABEL].replace("\n", " ") for text in (envelope.version, envelope.created))
    digest = content_digest((*envelope.plans, *envelope.serialized))
    return f"imported from a file made by convplan {version or '?'} at {created or '?'}, sha256 {digest}"


def check_plans(*, store: AnyStore | None = None) -> CheckReport:
    """Look at every stored plan and at the store itself; changes nothing.

    Args:
        store: a `PlanStore`, a path or a URL. None: the default store.

    Returns:
        `report.ok` is True when all is well; `report.problems` names every row that cannot be used, with the reason.

    Raises:
        StoreError: the store cannot be opened.
    """
    with opened_store(store) as opened:
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

    What was serialized of them goes too; learned errata stay (`convplan errata clear`). All named rows go in one step,
    or none. Plans that running processes already hold in memory stay in use there. Rows that a newer convplan wrote
    stay.

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
    with opened_store(store) as opened:
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
    schema["$defs"]["PlanFile"]["properties"]["schema"] = {"enum": [*OLDER_SCHEMAS, FILE_SCHEMA]}
    return msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"


def _without_descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_descriptions(v) for k, v in value.items() if not (k == "description" and isinstance(v, str))
        }
    return [_without_descriptions(item) for item in value] if isinstance(value, list) else value


def _read_envelope(path: Path) -> _Envelope:
    form = FileFormat(FORMAT, "file of plans", (FILE_SCHEMA, *OLDER_SCHEMAS), "plans", MAX_PLANS, MAX_FILE_BYTES)
    envelope = read_envelope(path, _Envelope, form)
    digest = envelope.content_sha256 and content_digest((*envelope.plans, *envelope.serialized))
    if digest != envelope.content_sha256:
        raise PlanFileError(
            path=str(path),
            reason=f"was altered after it was written: content_sha256 is {showable(envelope.content_sha256)[:64]}, its "
            f"content gives {digest}; nothing was imported. To take an edited file all the same, remove that field",
        )
    return envelope


def _read_record(raw: msgspec.Raw, index: int, known: tuple[str, ...]) -> tuple[str, PlanRecord | None, str]:
    """One plan of a file: its key and record, or its position, None and the reason of the refusal."""
    position = f"plans[{index}]"
    record, reason = decode_item(raw, PlanRecord)
    if record is None:
        return position, None, reason
    if trouble := usable_trouble(record, known):
        return f"{position} {record.key}", None, trouble
    return record.key, record, ""

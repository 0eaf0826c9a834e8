"""Learned errata as JSON files: export and import, as `_exchange` does for plans.

The format is an `ErrataFile`. Files come from anywhere, so reading is strict: bounded in size, no unknown fields, every
erratum checked like a stored one. An imported erratum can only take a candidate out of the race where its scope fits;
it cannot make anything run.
"""

from __future__ import annotations

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import msgspec

from convplan._errors import PlanFileError, StoreError, StoreMismatch
from convplan._exchange import AnyStore, opened_store, read_bounded, write_whole
from convplan._learned import MAX_ERRATA, LearnedErratum, erratum_trouble
from convplan._rows import showable

FORMAT = "convplan-errata"
FILE_SCHEMA = 1  # goes up when an older convplan could not read the file, or would misread it
MAX_FILE_BYTES = 32 * 2**20


class _Head(msgspec.Struct, frozen=True):
    """The two fields every version of the format has."""

    format: str
    schema: int


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An `ErrataFile` whose errata are not decoded yet, so that one bad erratum is refused and the others are read."""

    format: Literal["convplan-errata"]
    schema: int
    errata: list[msgspec.Raw]
    version: str = ""
    created: str = ""


class ErrataFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of learned errata.

    Attributes:
        format: always `convplan-errata`.
        schema: `FILE_SCHEMA`.
        errata: the errata.
        version: the convplan that wrote the file.
        created: UTC time in ISO 8601.
    """

    format: Literal["convplan-errata"]
    schema: int
    errata: tuple[LearnedErratum, ...]
    version: str = ""
    created: str = ""


class ErrataExport(msgspec.Struct, frozen=True, kw_only=True):
    """What `export_errata` wrote: the file, how many, and (id, reason) of rows that cannot be used."""

    path: str
    exported: int
    left_out: tuple[tuple[str, str], ...]


class ErrataImport(msgspec.Struct, frozen=True, kw_only=True):
    """What `import_errata` did, or would do.

    Attributes:
        added: errata that the store did not have.
        kept: errata that it had; they stay as they are.
        updated: rows that could not be used and were replaced.
        refused: (position in the file, reason) of errata that were not taken.
        dry_run: True when nothing was written.
    """

    added: int
    kept: int
    updated: int
    refused: tuple[tuple[str, str], ...]
    dry_run: bool


def export_errata(path: str | os.PathLike[str], *, store: AnyStore | None = None) -> ErrataExport:
    """Write every learned erratum of a store to a JSON file, complete or not at all.

    Raises:
        StoreError: the store cannot be read, or the file not written.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise StoreError(path=str(target), reason="is a directory, expected the name of a file to write")
    with opened_store(store) as source:
        rows = list(source.errata_rows())
    from convplan import __version__

    errata = tuple(row.erratum for row in rows if row.erratum is not None)
    file = ErrataFile(
        format="convplan-errata",
        schema=FILE_SCHEMA,
        errata=errata,
        version=__version__,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    content = msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"
    if len(content) > MAX_FILE_BYTES:
        raise StoreError(
            path=str(target), reason=f"{len(errata)} errata make {len(content)} bytes, import accepts {MAX_FILE_BYTES}"
        )
    write_whole(target, content)
    left_out = tuple((row.id, row.trouble) for row in rows if row.erratum is None)
    return ErrataExport(path=str(target), exported=len(errata), left_out=left_out)


def import_errata(
    path: str | os.PathLike[str], *, store: AnyStore | None = None, dry_run: bool = False
) -> ErrataImport:
    """Take the errata of a JSON file into a store; all of the good ones in one step. Importing twice changes nothing.

    Raises:
        PlanFileError: the file is malformed or too large; nothing is imported.
        StoreMismatch: it is no file of learned errata, or a newer convplan wrote it; nothing is imported.
        StoreError: the file cannot be read, or the store not written.
    """
    envelope = _read_envelope(Path(path))
    chosen: dict[str, LearnedErratum] = {}
    refused: list[tuple[str, str]] = []
    twins = 0
    for index, raw in enumerate(envelope.errata):
        try:
            erratum = msgspec.json.decode(raw, type=LearnedErratum)
            trouble = erratum_trouble(erratum)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
            refused.append((f"errata[{index}]", showable(str(exc))))
            continue
        if trouble:
            refused.append((f"errata[{index}]", trouble))
            continue
        twins += erratum.id in chosen
        chosen.setdefault(erratum.id, erratum)
    with opened_store(store) as target:
        done = target.learn(chosen.values(), count_again=False, dry_run=dry_run)
    return ErrataImport(
        added=done["added"],
        kept=done["kept"] + twins,
        updated=done["updated"],
        refused=tuple(refused),
        dry_run=dry_run,
    )


def _read_envelope(path: Path) -> _Envelope:
    content = read_bounded(path, MAX_FILE_BYTES)
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.format != FORMAT:
            raise StoreMismatch(path=str(path), found=repr(head.format), expected=f"{FORMAT!r} {FILE_SCHEMA}")
        if head.schema != FILE_SCHEMA:
            raise StoreMismatch(path=str(path), found=str(head.schema), expected=str(FILE_SCHEMA))
        envelope = msgspec.json.decode(content, type=_Envelope)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise PlanFileError(
            path=str(path), reason=showable(f"is not a file of learned errata: {exc}; nothing was imported")
        ) from exc
    if len(envelope.errata) > MAX_ERRATA:
        raise PlanFileError(
            path=str(path),
            reason=f"holds {len(envelope.errata)} errata, expected at most {MAX_ERRATA}; nothing was imported",
        )
    return envelope

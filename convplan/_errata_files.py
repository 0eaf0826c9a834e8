"""Learned errata as JSON files: export and import, as `_exchange` does for plans.

The format is an `ErrataFile`. Files come from anywhere, so reading is strict: bounded in size, no unknown fields, every
erratum checked like a stored one. An imported erratum can only take a candidate out of the race where its scope fits;
it cannot make anything run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from convplan._errors import StoreError
from convplan._files import AnyStore, FileFormat, decode_item, file_to_write, opened_store, read_envelope, write_whole
from convplan._learned import MAX_ERRATA, LearnedErratum, erratum_trouble
from convplan._plan import utc_now

FORMAT = "convplan-errata"
FILE_SCHEMA = 1  # goes up when an older convplan could not read the file, or would misread it
MAX_FILE_BYTES = 32 * 2**20


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
    target = file_to_write(path)
    with opened_store(store) as source:
        rows = list(source.errata_rows())
    from convplan import __version__

    errata = tuple(row.erratum for row in rows if row.erratum is not None)
    file = ErrataFile(
        format="convplan-errata",
        schema=FILE_SCHEMA,
        errata=errata,
        version=__version__,
        created=utc_now(),
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
    form = FileFormat(FORMAT, "file of learned errata", (FILE_SCHEMA,), "errata", MAX_ERRATA, MAX_FILE_BYTES)
    envelope = read_envelope(Path(path), _Envelope, form)
    chosen: dict[str, LearnedErratum] = {}
    refused: list[tuple[str, str]] = []
    twins = 0
    for index, raw in enumerate(envelope.errata):
        erratum, trouble = decode_item(raw, LearnedErratum)
        trouble = trouble or ("" if erratum is None else erratum_trouble(erratum))
        if erratum is None or trouble:
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

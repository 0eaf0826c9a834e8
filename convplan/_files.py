"""What the JSON files that stores exchange have in common: bounded reading, telling formats apart, writing whole.

A file begins with `format` and `schema`, so that a newer file is told from a broken one, and holds one list of items,
each decoded by itself, so that one bad item is refused and the others are read. What an item is and what becomes of it
is `_exchange`'s for plans and `_errata_files`'s for learned errata.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from convplan._errors import PlanFileError, StoreError, StoreMismatch
from convplan._rows import showable
from convplan._store import PlanStore

AnyStore = PlanStore | str | os.PathLike[str]
T = TypeVar("T")

UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)  # what decoding raises, whatever the bytes are


class FileFormat(NamedTuple):
    """A kind of file, and how much of one is read.

    Args:
        name: its field `format`.
        title: what to call it in an error.
        schemas: those that can be read, the one that is written first.
        items: the name of its list.
        most_items, most_bytes: a file with more is refused as a whole.
    """

    name: str
    title: str
    schemas: tuple[int, ...]
    items: str
    most_items: int
    most_bytes: int


class _Head(msgspec.Struct, frozen=True):
    """The two fields every version of every format has."""

    format: str
    schema: int


@contextlib.contextmanager
def opened_store(store: AnyStore | None) -> Iterator[PlanStore]:
    """The store to work on; closed again if it was opened here."""
    if isinstance(store, PlanStore):
        yield store
        return
    with PlanStore.default() if store is None else PlanStore(store) as opened:
        yield opened


def read_envelope(path: Path, kind: type[T], form: FileFormat) -> T:
    """A file's outer struct, its items not decoded yet.

    Args:
        path: the file.
        kind: the struct.
        form: what it must be.

    Raises:
        PlanFileError: the file is malformed or too large.
        StoreMismatch: it is of another format, or of a schema that cannot be read.
        StoreError: it cannot be read.
    """
    content = _read_bounded(path, form.most_bytes)
    try:
        head = msgspec.json.decode(content, type=_Head)
        if head.format != form.name:
            raise StoreMismatch(path=str(path), found=repr(head.format), expected=f"{form.name!r} {form.schemas[0]}")
        if head.schema not in form.schemas:
            raise StoreMismatch(path=str(path), found=str(head.schema), expected=str(form.schemas[0]))
        envelope = msgspec.json.decode(content, type=kind)
    except UNREADABLE as exc:
        raise PlanFileError(
            path=str(path), reason=showable(f"is not a {form.title}: {exc}; nothing was imported")
        ) from exc
    count = len(getattr(envelope, form.items))
    if count > form.most_items:
        raise PlanFileError(
            path=str(path),
            reason=f"holds {count} {form.items}, expected at most {form.most_items}; nothing was imported",
        )
    return envelope


def _read_bounded(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as exc:
        raise StoreError(path=str(path), reason=f"cannot be read: {exc.strerror or exc}") from exc
    if len(content) > limit_bytes:
        raise PlanFileError(
            path=str(path), reason=f"is larger than {limit_bytes} bytes, the most that is read; nothing was imported"
        )
    return content


def decode_item(raw: msgspec.Raw, kind: type[T]) -> tuple[T | None, str]:
    """One item of a file; None, and the reason to refuse it, where it is none."""
    try:
        return msgspec.json.decode(raw, type=kind), ""
    except UNREADABLE as exc:
        return None, showable(str(exc))


def file_to_write(path: str | os.PathLike[str]) -> Path:
    """The absolute path.

    Raises:
        StoreError: it is a directory's.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise StoreError(path=str(target), reason="is a directory, expected the name of a file to write")
    return target


def write_whole(target: Path, content: bytes) -> None:
    """Write beside the target and rename, so that nobody ever sees half a file.

    Raises:
        StoreError: it cannot be written; an older file of that name stays.
    """
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

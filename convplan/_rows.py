"""What a row of the store is, and what it must be to be used: the checks that every way of reading goes through.

A row is used when it was written with this or an older row schema, its checksum is right, its record valid, and its key
equal to the key computed anew from that record. How rows are brought in and out is elsewhere: `_database` and
`_snapshot`.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple, Protocol

import msgspec

from convplan._environment import Environment
from convplan._errors import SpecError
from convplan._key import choice_key
from convplan._plan import Evidence, PlanRecord
from convplan._policy import EFFORTS, Effort

ROW_SCHEMA = 2  # goes up when a record written now would not decode, or would mean something else, in an older convplan

MAX_TEXT = 100_000  # characters in one text of a record; a rejection's reason can hold a compiler's output
MAX_LABEL = 64  # characters in version and created, which are columns of their own
MAX_KNOB = 2**63

_encode = msgspec.json.Encoder()
_record_decoder = msgspec.json.Decoder(PlanRecord)
_environment_decoder = msgspec.json.Decoder(Environment)


class RawRow(NamedTuple):
    """What is needed of a row to read its plan. The values are whatever the file holds."""

    key: Any
    schema: Any
    checksum: Any
    record: Any


class LikeRow(Protocol):
    """A `RawRow`, or a row with more columns that a database gave."""

    @property
    def key(self) -> Any: ...
    @property
    def schema(self) -> Any: ...
    @property
    def checksum(self) -> Any: ...
    @property
    def record(self) -> Any: ...


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
    return value_trouble(msgspec.to_builtins(record), "record")


def value_trouble(value: Any, where: str) -> str:
    if where == "record.problem.epilogue":  # its numbers may be negative, and are looked at when it is made
        return ""
    if isinstance(value, str):
        if not shows(value):
            return f"{where} has {len(value)} characters, expected at most {MAX_TEXT} and no control characters"
    elif isinstance(value, float):
        if not (math.isfinite(value) and value >= 0):
            return f"{where} is {value}, expected a finite number of 0 or more"
    elif isinstance(value, dict):
        return next((found for k, v in value.items() if (found := value_trouble(v, f"{where}.{k}"))), "")
    elif isinstance(value, (list, tuple)):
        return next((found for i, v in enumerate(value) if (found := value_trouble(v, f"{where}[{i}]"))), "")
    return ""


def environment_text(environment: Environment) -> str:
    return _encode.encode(environment).decode()


def read_environment(text: object) -> Environment | None:
    try:
        return _environment_decoder.decode(text) if isinstance(text, str) else None
    except (msgspec.DecodeError, RecursionError):
        return None


def checksum_of(record: str) -> str:
    return hashlib.sha256(record.encode()).hexdigest()


def row_of(record: PlanRecord) -> dict[str, object]:
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
        "environment": environment_text(record.environment),
        "device": record.environment.device,
        "effort": record.effort,
        "engine": record.config.engine,
        "version": record.version,
        "created": record.created,
        "checksum": checksum_of(text),
        "record": text,
    }


def _printable(record: PlanRecord) -> PlanRecord:
    """The record with reasons that may be shown: they hold other libraries' words, colour codes and all."""

    def cleaned(group: tuple[Evidence, ...]) -> tuple[Evidence, ...]:
        return tuple(
            item if shows(item.reason) else msgspec.structs.replace(item, reason=showable(item.reason))
            for item in group
        )

    return msgspec.structs.replace(record, ranking=cleaned(record.ranking), rejected=cleaned(record.rejected))


def shows(text: str) -> bool:
    return len(text) <= MAX_TEXT and (text.isprintable() or all(c.isprintable() or c in "\n\t" for c in text))


def showable(text: str) -> str:
    """The text cut at `MAX_TEXT`, with `?` for control characters: fit for a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text[:MAX_TEXT])


def is_newer(schema: object) -> bool:
    """Written by a newer convplan. A number that is none counts as newer too: nobody here knows whose row that is."""
    return not isinstance(schema, int) or schema > ROW_SCHEMA


def read_row(row: LikeRow) -> tuple[PlanRecord | None, str]:
    """The row's record, or None and the reason why it cannot be used."""
    if is_newer(row.schema):
        return None, f"row schema is {row.schema!r}, expected {ROW_SCHEMA} or older: a newer convplan wrote it"
    # SQLite keeps whatever type was written into a column, so an edited file can hold anything here.
    if not isinstance(row.record, str) or row.checksum != checksum_of(row.record):
        return None, "damaged: the record does not match its checksum"
    try:
        record = _record_decoder.decode(row.record)
    except (msgspec.DecodeError, RecursionError) as exc:
        return None, showable(f"the record is not a plan record: {exc}")
    if record.key != row.key:
        return None, f"the key does not belong to the record, whose key is {record.key}"
    return record, ""


def keeps_row(existing: LikeRow, effort: Effort, *, keep_equal: bool) -> bool:
    """Whether a row stays although a record of the same key is offered."""
    if is_newer(existing.schema):
        return True
    record, _ = read_row(existing)
    if record is None:
        return False
    return satisfies(record.effort, effort) and (keep_equal or record.effort != effort)

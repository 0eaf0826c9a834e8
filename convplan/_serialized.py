"""Serialized plans as the store and plan files keep them: packed, bounded in size, and checked before they are used.

A serialized plan is what an engine's `Built.serialize` gives: bytes that its `restore` makes a plan of without building
one. Only the engine knows what they mean. Here: packing them (zlib), the checksum, and unpacking what may have been
altered or made to harm: nothing is unpacked that its checksum does not fit, and never more than `MAX_PLAIN_BYTES`.

A checksum shows damage. It does not say who made the bytes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from convplan._errors import SpecError
from convplan._plan import PlanRecord
from convplan._rows import MAX_LABEL, showable, shows
from convplan.engines.base import EngineConfig

FORMAT = "zlib"
MAX_PLAIN_BYTES = 16 * 2**20  # of one serialized plan
MAX_PACKED_BYTES = MAX_PLAIN_BYTES + 2**16  # zlib makes what it cannot compress a little longer
MAX_PARTS = 256  # of one plan record
MAX_PROVENANCE = 255  # characters
TUNED_HERE = "tuned here"

_encode = msgspec.json.Encoder()
_config_decoder = msgspec.json.Decoder(EngineConfig)


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The serialized form of one candidate of a plan record.

    Attributes:
        key: the plan's key.
        config: which candidate of its ranking.
        format: how the bytes are packed; `zlib`.
        size: bytes before packing.
        sha256: see `checksum_of_part`.
        data: the packed bytes; base64 in JSON.
        version: the convplan that packed it.
        created: UTC time in ISO 8601.
        provenance: where it comes from, such as `tuned here`; filled in by the store that takes it, never by a file.
    """

    key: str
    config: EngineConfig
    format: str
    size: int
    sha256: str
    data: bytes
    version: str = ""
    created: str = ""
    provenance: str = ""


class RawPart(NamedTuple):
    """A row of serialized plans. The values are whatever the store holds."""

    key: Any
    config: Any
    format: Any
    size: Any
    checksum: Any
    version: Any
    created: Any
    provenance: Any
    data: Any


def config_text(config: EngineConfig) -> str:
    """A configuration as the store's column holds it."""
    return _encode.encode(config).decode()


def config_key(config: EngineConfig) -> str:
    """32 hexadecimal digits that stand for a configuration beside its plan's key."""
    return hashlib.sha256(config_text(config).encode()).hexdigest()[:32]


def checksum_of_part(key: str, config: str, form: str, size: int, data: bytes) -> str:
    """SHA-256 over what a part is and belongs to, length-prefixed: the bytes of one cannot pose as another's.

    Args:
        config: from `config_text`.
        form: the format's name.
    """
    digest = hashlib.sha256()
    for piece in (key.encode(), config.encode(), form.encode(), str(size).encode(), data):
        digest.update(len(piece).to_bytes(8, "big") + piece)
    return digest.hexdigest()


def pack(key: str, config: EngineConfig, plain: bytes, *, provenance: str = TUNED_HERE, created: str = "") -> Part:
    """Pack one serialized plan.

    Raises:
        SpecError: it is empty or larger than `MAX_PLAIN_BYTES`.
    """
    if not 0 < len(plain) <= MAX_PLAIN_BYTES:
        raise SpecError(
            f"the serialized plan of {config} has {len(plain)} bytes, expected 1 to {MAX_PLAIN_BYTES}; the plan can be "
            "stored without it"
        )
    from convplan import __version__

    data = zlib.compress(plain)
    return Part(
        key=key,
        config=config,
        format=FORMAT,
        size=len(plain),
        sha256=checksum_of_part(key, config_text(config), FORMAT, len(plain), data),
        data=data,
        version=__version__,
        created=created,
        provenance=provenance,
    )


def unpack(part: Part) -> tuple[bytes | None, str]:
    """The serialized plan, or None and the reason why it cannot be used."""
    if part.format != FORMAT:
        return None, f"unknown format {part.format!r}, expected {FORMAT!r}: a newer convplan made it"
    if not 0 < part.size <= MAX_PLAIN_BYTES or len(part.data) > MAX_PACKED_BYTES:
        return None, (
            f"too large: it says {part.size} bytes and has {len(part.data)} packed, expected at most {MAX_PLAIN_BYTES} "
            f"and {MAX_PACKED_BYTES}"
        )
    text = config_text(part.config)
    if part.sha256 != checksum_of_part(part.key, text, part.format, part.size, part.data):
        return None, "altered: its bytes do not match their checksum"
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(part.data, part.size)  # never makes more than that, whatever the bytes say
        rest = unpacker.decompress(unpacker.unconsumed_tail, 1)
    except zlib.error as exc:
        return None, f"not packed as {FORMAT}: {exc}"
    if rest or len(plain) != part.size or not unpacker.eof or unpacker.unused_data:
        return None, f"its size is not the {part.size} bytes that it says"
    return plain, ""


def part_of_row(row: RawPart) -> tuple[Part | None, str]:
    """A row's part, its bytes not yet looked at, or None and the reason why it is none."""
    texts = (row.key, row.config, row.format, row.checksum, row.version, row.created, row.provenance)
    data = bytes(row.data) if isinstance(row.data, (bytes, memoryview)) else None
    if not all(isinstance(text, str) for text in texts) or not isinstance(row.size, int) or data is None:
        return None, "altered: a column holds something else than it should"
    try:
        config = _config_decoder.decode(row.config)
    except (msgspec.DecodeError, RecursionError) as exc:
        return None, f"altered: its configuration cannot be read: {exc}"
    return Part(
        key=row.key,
        config=config,
        format=row.format,
        size=row.size,
        sha256=row.checksum,
        data=data,
        version=row.version,
        created=row.created,
        provenance=row.provenance,
    ), ""


def read_part(row: RawPart, key: str, config: EngineConfig) -> tuple[bytes | None, str]:
    """The serialized plan that a row holds for this plan and configuration, or None and the reason."""
    part, trouble = part_of_row(row)
    if part is None:
        return None, trouble
    if part.key != key or part.config != config:
        return None, f"altered: it says it belongs to {part.config} of {showable(part.key)}"
    return unpack(part)


def row_of_part(part: Part) -> dict[str, object]:
    """The columns of a part's row."""
    return {
        "key": part.key,
        "config_key": config_key(part.config),
        "config": config_text(part.config),
        "format": part.format,
        "size": part.size,
        "checksum": part.sha256,
        "version": part.version,
        "created": part.created,
        "provenance": part.provenance,
        "data": part.data,
    }


def part_trouble(part: Part, record: PlanRecord) -> str:
    """Why a part cannot be stored beside a record, empty when it can: it is damaged, or none of its candidates'."""
    if part.key != record.key or all(part.config != evidence.config for evidence in record.ranking):
        return f"it belongs to {part.config} of plan {part.key[:32]}, which is no candidate of {record.key}"
    if max(len(part.version), len(part.created)) > MAX_LABEL or len(part.provenance) > MAX_PROVENANCE:
        return f"version, created and provenance are longer than {MAX_LABEL}, {MAX_LABEL} and {MAX_PROVENANCE}"
    if not all(shows(text) for text in (part.version, part.created, part.provenance)):
        return "version, created or provenance hold control characters"
    return unpack(part)[1]


def check_parts(parts: Iterable[Part], record: PlanRecord) -> None:
    """Refuse parts that cannot be stored beside a record.

    Raises:
        SpecError: one of them cannot, or there are more than `MAX_PARTS`, or two for one configuration.
    """
    listed = list(parts)
    if len(listed) > MAX_PARTS or len({part.config for part in listed}) < len(listed):
        raise SpecError(f"{len(listed)} serialized plans, expected at most {MAX_PARTS}, one for each configuration")
    for part in listed:
        if trouble := part_trouble(part, record):
            raise SpecError(f"the serialized plan of {part.config} cannot be stored: {trouble}")

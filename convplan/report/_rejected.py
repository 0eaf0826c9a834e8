"""Rejected candidates by stage and reason, so that fifty that one rule drops take one line and not fifty."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from convplan.report._numbers import human_bytes
from convplan.report._table import one_line

if TYPE_CHECKING:
    from convplan._plan import Evidence

SHOWN = 2  # candidates named for each reason, when there are more than one more
_VARIES = "…"
_UNITS = frozenset({"us", "ms", "s", "x", "bytes"})
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


class RejectedGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Candidates that one stage dropped for one reason.

    Attributes:
        stage: of planning: `enumerate`, `filter`, `build`, `verify`, `measure` or `run`.
        reason: what they have in common; `…` where measured numbers differ.
        candidates: their configurations as text, in the record's order.
    """

    stage: str
    reason: str
    candidates: tuple[str, ...]


def group_rejected(rejected: Sequence[Evidence]) -> list[tuple[RejectedGroup, list[Evidence]]]:
    """Groups in the order of their first member, each with its members.

    Reasons that differ in nothing but times and sizes are one reason. Other numbers, such as those in the name of a
    rule or in a status, keep reasons apart.
    """
    members: dict[tuple[str, ...], list[Evidence]] = {}
    for evidence in rejected:
        members.setdefault((evidence.rejected, *_pattern(evidence.reason)), []).append(evidence)
    return [
        (
            RejectedGroup(
                stage=group[0].rejected,
                reason=_common([one_line(evidence.reason).split(" ") for evidence in group]),
                candidates=tuple(one_line(str(evidence.config)) for evidence in group),
            ),
            group,
        )
        for group in members.values()
    ]


def rejected_lines(rejected: Sequence[Evidence], *, every: bool) -> list[str]:
    """The section's lines: a line for each group, and with `every` one below it for each candidate."""
    if not rejected:
        return []
    lines = [f"rejected ({len(rejected)})"]
    for group, members in group_rejected(rejected):
        head = f"  {one_line(group.stage)}: {group.reason} ({len(members)})"
        lines.append(head if every else f"{head}: {_some(group.candidates)}")
        if every:
            lines += [f"    {one_line(_one(evidence, group.reason))}" for evidence in members]
    return lines


def _some(candidates: Sequence[str]) -> str:
    if len(candidates) <= SHOWN + 1:
        return ", ".join(candidates)
    return f"{', '.join(candidates[:SHOWN])}, and {len(candidates) - SHOWN} more"


def _one(evidence: Evidence, common: str) -> str:
    own = one_line(evidence.reason)
    parts = [
        str(evidence.config),
        "" if evidence.workspace_bytes is None else f"workspace {human_bytes(evidence.workspace_bytes)}",
        "" if evidence.error is None else f"error {evidence.error:.2g}",
        str(evidence.notes),
        "" if own == common else own,
    ]
    return "; ".join(part for part in parts if part)


def _pattern(reason: str) -> tuple[str, ...]:
    """The reason's words, with times and sizes blanked."""
    words = one_line(reason).split(" ")
    return tuple(_VARIES if _is_quantity(words, place) else word for place, word in enumerate(words))


def _is_quantity(words: Sequence[str], place: int) -> bool:
    following = words[place + 1].rstrip(".,;:)") if place + 1 < len(words) else ""
    return following in _UNITS and _NUMBER.fullmatch(words[place]) is not None


def _common(reasons: Sequence[Sequence[str]]) -> str:
    return " ".join(words[0] if len(set(words)) == 1 else _VARIES for words in zip(*reasons, strict=True))

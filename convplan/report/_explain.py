"""A plan record as text: the question, then every candidate with its evidence. Prints only what planning stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convplan.report._numbers import ABSENT, human_bytes, human_s
from convplan.report._table import Side, one_line, table

if TYPE_CHECKING:
    from convplan._plan import Evidence, PlanRecord

COLUMNS: dict[str, Side] = {
    "rank": "right",
    "engine": "left",
    "config": "left",
    "median us": "right",
    "spread us": "right",
    "workspace": "right",
    "error": "right",
    "note": "left",
}


def explain_record(record: PlanRecord) -> str:
    """The question a record answers, one line each, and the table of all its candidates, best first.

    `error` is the largest difference from the float64 reference, as a share of what the arithmetic allows.
    """
    made = " by convplan ".join(part for part in (record.created, record.version) if part)
    facts = {
        "problem": str(record.problem),
        "policy": str(record.policy),
        "environment": str(record.environment),
        "effort": record.effort,
        "planning": human_s(record.planning_s) + (f", {made}" if made else ""),
        "key": record.key,
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {one_line(value)}" for name, value in facts.items()]
    rows = [_row(str(rank), evidence, _note(rank, evidence)) for rank, evidence in enumerate(record.ranking, start=1)]
    rows += [_row(ABSENT, evidence, _rejection(evidence)) for evidence in record.rejected]
    return "\n".join([*lines, "", table(COLUMNS, rows)])


def _row(rank: str, evidence: Evidence, note: str) -> tuple[str, ...]:
    knobs = " ".join(f"{name}={value}" for name, value in evidence.config.knobs)
    return (
        rank,
        evidence.config.engine,
        knobs or ABSENT,
        ABSENT if evidence.median_us is None else f"{evidence.median_us:.1f}",
        ABSENT if evidence.spread_us is None else f"{evidence.spread_us:.1f}",
        human_bytes(evidence.workspace_bytes),
        ABSENT if evidence.error is None else f"{evidence.error:.2g}",
        note,
    )


def _note(rank: int, evidence: Evidence) -> str:
    parts = [
        "chosen" if rank == 1 else "",
        "last resort" if evidence.source == "fallback" else "",
        {"full": "", "no": "not verified"}.get(evidence.verified, f"verified: {evidence.verified}"),
        str(evidence.notes),
        evidence.reason,
    ]
    return ", ".join(part for part in parts if part)


def _rejection(evidence: Evidence) -> str:
    notes = f" ({evidence.notes})" if str(evidence.notes) else ""
    return f"rejected in {evidence.rejected}: {evidence.reason}{notes}"

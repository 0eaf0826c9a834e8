"""A plan record as text: the question, the yardsticks, every candidate with its evidence. Only what planning stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convplan.report._curve import curve_text
from convplan.report._numbers import ABSENT, human_bytes, human_s
from convplan.report._rejected import rejected_lines
from convplan.report._table import Side, one_line, table
from convplan.report._yardsticks import limit_line, stock_lines

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


def explain_record(record: PlanRecord, *, every_rejection: bool = False) -> str:
    """What a record holds, for people.

    First the question and what its answer is compared with, one line each; then the table of the candidates that may
    run, best first; then the curve of an exhaustive search; then what was rejected, by stage and reason.

    `error` is the largest difference from the float64 reference, as a share of what the arithmetic allows.

    Args:
        record: any plan record, of this machine or another.
        every_rejection: list each rejected candidate below its reason, instead of naming a few.
    """
    facts = _facts(record)
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {one_line(value)}" for name, value in facts]
    rows = [_row(str(rank), evidence, _note(rank, evidence)) for rank, evidence in enumerate(record.ranking, start=1)]
    lines += ["", table(COLUMNS, rows)]
    # The curve of an exhaustive search has its place here.
    if record.curve:
        lines += ["", "search", curve_text(record.curve)]
    if record.rejected:
        lines += ["", *rejected_lines(record.rejected, every=every_rejection)]
    return "\n".join(lines)


def _facts(record: PlanRecord) -> list[tuple[str, str]]:
    made = " by convplan ".join(part for part in (record.created, record.version) if part)
    stock, *more = stock_lines(record)
    return [
        ("problem", str(record.problem)),
        ("policy", str(record.policy)),
        ("environment", str(record.environment)),
        ("effort", record.effort),
        ("planning", human_s(record.planning_s) + (f", {made}" if made else "")),
        ("key", record.key),
        ("stock torch", stock),
        *(("", line) for line in more),
        ("hardware limit", limit_line(record)),
    ]


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

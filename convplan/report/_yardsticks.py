"""What the choice is compared with: stock torch's own way, and the least time that the hardware allows.

Both are read from the record; nothing is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from convplan.report._numbers import human_count, human_us

if TYPE_CHECKING:
    from convplan._limits import Limit
    from convplan._plan import Evidence, PlanRecord

STOCK_ENGINE = "aten"  # the engine that has torch's own kernels
FLAG_NOTE = "benchmark=True lets torch time cuDNN's plans itself, and pick another"


class StockTorch(msgspec.Struct, frozen=True, kw_only=True):
    """What stock torch would run, and how it compares.

    Attributes:
        call: what it is to torch, such as `convolution`, with the flags it ran with.
        config: the candidate that is exactly this.
        median_us, spread_us: its time in microseconds, None when it was not timed.
        speedup: its time over the choice's, None when one of them was not timed.
        reason: why it was not timed, empty when it was.
    """

    call: str
    config: str
    median_us: float | None
    spread_us: float | None
    speedup: float | None
    reason: str


def stock_torch(record: PlanRecord) -> list[StockTorch]:
    """Every way in which stock torch comes to this problem: none, one, or two for a dgrad."""
    found = [evidence for evidence in (*record.ranking, *record.rejected) if evidence.stock]
    return [_compared(evidence, record) for evidence in sorted(found, key=lambda evidence: evidence.stock)]


def _compared(evidence: Evidence, record: PlanRecord) -> StockTorch:
    stock_us, choice_us = evidence.median_us, record.median_us
    reason = f"rejected in {evidence.rejected}: {evidence.reason}" if evidence.rejected else f"effort {record.effort}"
    return StockTorch(
        call=evidence.stock,
        config=str(evidence.config),
        median_us=stock_us,
        spread_us=evidence.spread_us,
        speedup=stock_us / choice_us if stock_us is not None and choice_us else None,
        reason=reason if stock_us is None else "",
    )


def stock_lines(record: PlanRecord) -> list[str]:
    """Stock torch in words, a line for each way that it has, or one line that says why there is none."""
    found = stock_torch(record)
    if not found:
        return [_why_no_stock(record)]
    lines = [_stock_line(one, chosen=one.config == str(record.config)) for one in found]
    if record.problem.device == "cuda":
        policy = record.policy
        lines.append(
            f"with deterministic={policy.deterministic}, allow_tf32={policy.allow_tf32} as planned; {FLAG_NOTE}"
        )
    return lines


def _stock_line(one: StockTorch, *, chosen: bool) -> str:
    named = f"{one.config}: "
    if one.median_us is None:
        return f"{named}not timed: {one.reason} ({one.call})"
    spread = "" if one.spread_us is None else f" ± {human_us(one.spread_us)}"
    compared = "it is the choice" if chosen else "the choice was not timed"
    if one.speedup is not None and not chosen:
        compared = f"the choice is {one.speedup:.2f} x as fast"
    return f"{named}{human_us(one.median_us)}{spread}, {compared} ({one.call})"


def _why_no_stock(record: PlanRecord) -> str:
    engines = record.policy.engines
    if engines is not None and STOCK_ENGINE not in engines:
        return f"did not take part (policy engines={','.join(engines)})"
    for evidence in record.rejected:
        if evidence.config.engine == STOCK_ENGINE and evidence.rejected == "enumerate":
            return f"not timed: {STOCK_ENGINE} is rejected in enumerate: {evidence.reason}"
    return "not known: torch's own way was not proposed, or the plan is older than its mark"


def limit_line(record: PlanRecord) -> str:
    """The hardware limit in words, and how far the choice is from it."""
    peaks, limit = record.peaks, record.limit
    if peaks is None:
        return "not known: the plan holds no peak rates of its machine"
    if limit is None or peaks.flops_per_us is None or peaks.bytes_per_us is None:
        return f"not known: {peaks.missing or 'a peak rate is missing'}"
    if limit.bound == "memory":
        work, rate, unit = record.problem.least_bytes, peaks.bytes_per_us, "B"
    else:
        work, rate, unit = record.problem.flops, peaks.flops_per_us, "FLOP"
    at = f"{human_count(work)}{unit} at {human_count(rate * 1e6)}{unit}/s {peaks.kind} peak"
    return f"{human_us(limit.us)} ({limit.bound}: {at}); {_distance(record, limit)}"


def _distance(record: PlanRecord, limit: Limit) -> str:
    if record.median_us is None:
        return "the choice was not timed"
    if not limit.us:
        return "there is nothing to compute"
    ratio = record.median_us / limit.us
    text = f"the choice takes {ratio:.{1 if ratio >= 1 else 2}f} x that"
    if ratio >= 1:
        return text
    if limit.bound == "memory":
        return f"{text}, with data that a cache holds"
    return (
        text if record.ranking[0].notes.direct else f"{text}, with fewer operations than the direct method counted here"
    )

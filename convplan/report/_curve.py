"""How a search went, as text: the best time so far against the seconds since it began."""

from __future__ import annotations

from collections.abc import Sequence

from convplan.report._numbers import human_s, human_us
from convplan.report._table import table

BAR = 40  # characters of the first time's bar
LINES = 10


def curve_text(curve: Sequence[tuple[float, float]], *, lines: int = LINES) -> str:
    """One line for each improvement, with a bar as long as the time, and one for the end; empty without a search.

    Args:
        curve: (seconds since the search began, best microseconds so far), the last pair for its end.
        lines: at most so many; of more improvements the first, the last and those between that changed most are shown.
    """
    if not curve:
        return ""
    *steps, end = curve
    shown = sorted(_most_telling(steps, max(lines - 1, 1)))
    longest = max(best for _, best in curve) or 1.0
    rows = [(human_s(seconds), human_us(best), "#" * max(round(BAR * best / longest), 1)) for seconds, best in shown]
    rows.append((human_s(end[0]), human_us(end[1]), "the end, as raced"))
    return table({"after": "right", "best so far": "right", "": "left"}, rows)


def _most_telling(steps: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    if len(steps) <= count:
        return list(steps)
    inner = range(1, len(steps) - 1)
    by_gain = sorted(inner, key=lambda place: steps[place][1] / max(steps[place - 1][1], 1e-9))
    kept = {0, len(steps) - 1, *by_gain[: max(count - 2, 0)]}
    return [steps[place] for place in sorted(kept)][-count:]

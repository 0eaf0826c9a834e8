"""The curve of an exhaustive search as text: when each improvement came, and when the search ended."""

from __future__ import annotations

from collections.abc import Sequence

from convplan.report._numbers import human_s, human_us


def curve_lines(curve: Sequence[tuple[float, float]]) -> list[str]:
    """One line for each (seconds since the search began, best microseconds so far), under a heading."""
    return ["search", *(f"  after {human_s(seconds)}  {human_us(best_us)}" for seconds, best_us in curve)]

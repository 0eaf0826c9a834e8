"""Which engine refuses which case: the one table. Everything it does not list is expected to run and to be right.

An engine that refuses more, or accepts what stands here, fails its tests, so a gap can neither open nor close unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from convplan._problem import Problem


class Refusal(NamedTuple):
    """One row: which engine, for which problems, and a word of the reason it must give."""

    engine: str
    when: Callable[[Problem], bool]
    reason: str


REFUSALS = (
    Refusal(
        "cudnn", lambda problem: problem.device != "cuda", "supported: cuda"
    ),  # tests/cudnn and tests/gpu have its own
    Refusal("onednn", lambda problem: problem.epilogue.is_plain, "a bias alone"),  # tests/test_onednn.py has the others
    Refusal("fft", lambda problem: prod(problem.w.dims[2:]) == 1, "one tap"),
)


def refusal(engine: str, problem: Problem) -> str | None:
    """A word of the reason with which an engine must refuse; None where it must not."""
    return next((row.reason for row in REFUSALS if row.engine == engine and row.when(problem)), None)

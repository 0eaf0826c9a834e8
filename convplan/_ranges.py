"""Named ranges around plans, for profilers: which engine with which knobs ran which problem, and for how long.

Off, they cost nothing: whether a run is wrapped is decided when it is bound, and switching makes every caller bind anew
(`profiling` in `_api`, which changes the runtime's token). On, each run is a range of torch's own profiler, and on a
GPU an NVTX range too, which Nsight Systems shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from convplan._plan import Plan

VARIABLE = "CONVPLAN_RANGES"
PREFIX = "convplan"  # of every range's name

Result = TypeVar("Result")


class _Switch:
    """Whether runs that are bound from now on are wrapped; at first as the environment variable says."""

    def __init__(self) -> None:
        self.on = os.environ.get(VARIABLE, "0").strip().lower() not in ("", "0", "off", "false", "no")


switch = _Switch()


def name_of(plans: Iterable[Plan]) -> str:
    """`convplan cudnn[engine=45, kblock=3] fprop float16 x=…`: engine, knobs, and the problem, to be read by `parse`.

    Where one call of torch serves two problems, the one stands behind the other.
    """
    return " + ".join(f"{PREFIX} {plan.config} {plan.problem}" for plan in plans)


def ranged(run: Callable[..., Result], *plans: Plan) -> Callable[..., Result]:
    """`run` within a range that names the plans, or `run` itself while ranges are off."""
    if not (switch.on and plans):
        return run
    from torch.cuda import nvtx
    from torch.profiler import record_function

    name = name_of(plans)

    def in_range(*args: object) -> Result:
        with record_function(name):
            return run(*args)

    if plans[0].problem.device != "cuda" or not _has_nvtx():
        return in_range

    def in_both_ranges(*args: object) -> Result:
        nvtx.range_push(name)
        try:
            return in_range(*args)
        finally:
            nvtx.range_pop()

    return in_both_ranges


def _has_nvtx() -> bool:
    """Whether torch was built with NVTX. Asked before a plan runs: there, an error would be taken for the plan's."""
    from torch.cuda import nvtx

    try:
        nvtx.range_push(PREFIX)
        nvtx.range_pop()
    except RuntimeError:
        return False
    return True

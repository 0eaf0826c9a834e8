"""An engine that writes statistics, rightly or not as its script says; a worker process makes its equal."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch

from convplan import EngineConfig, Policy, Problem
from convplan.engines._support import deliver
from convplan.engines.base import Built, Notes
from convplan.engines.fake import FakeCandidate, FakeEngine, convolve_by_taps

# What each candidate does with its sums, in the order of the knob `index`; the first and the last one are right.
HOW = ("right", "sum", "square", "unwritten", "first run alone", "past the end", "right and faster")
IN_A_WORKER_ONLY = ("first run alone", "past the end")  # what is found there
RUN_S = {"right": 9e-3, "right and faster": 4e-3}  # wrong ones are faster than any right one
WRONG_RUN_S = 1e-3
NOTES = {"first run alone": Notes(numerical=("WINOGRAD",))}  # no run on integers finds what is left from before


class Summing(FakeEngine):
    """Computes the output rightly."""

    fuses = True

    def remake(self) -> tuple[str, bytes]:
        return f"{__name__}:remade", b""

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        how = HOW[self._index(config)]
        runs = [0]

        def run(first: Any, second: Any, bias: Any, out: Any, residual: Any, scale: Any, sums: Any) -> torch.Tensor:
            runs[0] += 1
            y = deliver(convolve_by_taps(problem, first, second, bias), problem.output, out)
            if how != "unwritten" and (how != "first run alone" or runs[0] == 1):
                write_sums(y, sums, how)
            time.sleep(RUN_S.get(how, WRONG_RUN_S))
            return y

        return Built(run=run, workspace_bytes=0)


def write_sums(y: torch.Tensor, sums: torch.Tensor, how: str) -> None:
    """The statistics of an output, and the harm."""
    wide, over = y.double(), [0, *range(2, y.dim())]
    sums.copy_(torch.stack([wide.sum(over), wide.square().sum(over)]))
    if how == "sum":
        sums[0, 3] += 1
    if how == "square":
        sums[1, 3] *= 1.01
    if how == "past the end":
        ctypes.memset(sums.data_ptr() + sums.nbytes, 0, 8)


def summing(count: int = len(HOW)) -> Summing:
    """The engine with so many of its candidates, under the name `mine`."""
    return Summing([FakeCandidate(time_us=1.0, notes=NOTES.get(how, Notes())) for how in HOW[:count]], name="mine")


def remade(payload: bytes) -> Summing:
    return summing()

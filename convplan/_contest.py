"""The stages measure and rank: the verified candidates race on inputs of one problem, and what that says of them.

Rounds, cut-offs and statistics are `_measure`'s, which knows no convolutions; timing on a GPU is `_measure_cuda`'s.
A worker process races by the same inputs and ranks by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from convplan._candidates import Live, failure_reason
from convplan._measure import CUTOFF, Clock, Contestant, Measurement, race
from convplan._plan import Evidence
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._proof import timed_call
from convplan.engines.base import LAST_RESORT, Run

if TYPE_CHECKING:
    import torch

    from convplan._inputs import Inputs
    from convplan._measure_cuda import GraphTimer
    from convplan._verify import Verifier

MOST_TURNS = 32  # sets of inputs; problems too small for that many to fill a cache are timed in it
TORCH_MARGIN = 0.03  # share by which torch's own way must be ahead on a GPU


def measure_candidates(
    live: Sequence[Live],
    policy: Policy,
    verifier: Verifier,
    clock: Clock,
    synchronize: Callable[[], object] | None,
) -> tuple[list[tuple[Live, Measurement]], list[Evidence]]:
    """Race the verified candidates; at most `benchmark_limit` of them, in engine order (B15)."""
    limit = policy.benchmark_limit or len(live)
    rejected = [item.evidence("measure", f"beyond benchmark_limit={limit}") for item in live[limit:]]
    timed = {item.candidate.config: item for item in live[:limit]}
    turns = inputs_in_turns(verifier, policy)
    calls = {config: InTurns(item.ready.run, turns) for config, item in timed.items()}
    best_us = min((item.first_us for item in timed.values()), default=0.0)
    once = {config for config, item in timed.items() if not item.candidate.notes.direct}  # not run on integers
    slow = {config for config in once if timed[config].first_us > CUTOFF * best_us}
    contestants = []
    for config, item in timed.items():
        try:
            time_us = timed_call(calls[config], clock, synchronize)[1] if config in slow else item.first_us
        except Exception as exc:  # an engine's failure costs its candidate, never the planning
            rejected.append(item.evidence("measure", f"failed while timed: {failure_reason(exc)}"))
        else:
            contestants.append(Contestant(config, calls[config], min(time_us, item.first_us)))
    timer = _gpu_timer(verifier.problem, clock, len(turns))
    measurements, slower = race(
        contestants, budget_s=policy.budget_s, clock=clock, synchronize=synchronize, timer=timer
    )
    for config, call in calls.items():
        if timer is not None and timer.sampled(call) and not timer.is_captured(call):
            timed[config].add("timed without a CUDA graph, into which it could not be captured")
    for measured in measurements:
        if measured.in_final:
            timed[measured.config].add("timed in the final, under load")
    rejected += [timed[one.config].evidence("measure", one.reason) for one in slower]
    return [(timed[m.config], m) for m in measurements], rejected


class InTurns:
    """Runs a candidate on several sets of inputs, one after the other."""

    def __init__(self, run: Run, turns: Sequence[Inputs]) -> None:
        self._run, self._turns, self._next = run, turns, 0

    def __call__(self) -> torch.Tensor:
        inputs = self._turns[self._next]
        self._next = (self._next + 1) % len(self._turns)
        return inputs.given_to(self._run)


def inputs_in_turns(verifier: Verifier, policy: Policy) -> list[Inputs]:
    """The inputs to time with: one set, or for a cold cache so many that together they are twice as large as it."""
    inputs, problem = verifier.random, verifier.problem
    if problem.device != "cuda" or policy.l2 == "warm":
        return [inputs]
    import torch

    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    count = min(math.ceil(2 * cache_bytes / max(problem.least_bytes, 1)), MOST_TURNS)
    return [inputs] + [inputs.copy() for _ in range(count - 1)]


def _gpu_timer(problem: Problem, clock: Clock, turns: int) -> GraphTimer | None:
    """CUDA graphs where there is a GPU to time; None: the host's clock."""
    if problem.device != "cuda":
        return None
    import torch

    from convplan._measure_cuda import GraphTimer

    return GraphTimer(torch.device("cuda", torch.cuda.current_device()), clock, turns=turns)


def rank(measured: Sequence[tuple[Live, Measurement]], live: Sequence[Live]) -> list[Evidence]:
    """As the race has them, except that those who tie with the fastest are ordered by what does not change from run to
    run: deterministic first, last resorts last, then less workspace, then the engines' order (C5)."""
    if not measured:
        return []
    order = {item.candidate.config: place for place, item in enumerate(live)}

    def tie_order(pair: tuple[Live, Measurement]) -> tuple[bool, bool, int, int]:
        item, _ = pair
        return (
            not item.candidate.notes.deterministic,
            item.candidate.source == LAST_RESORT,  # what is behind it, and its workspace, are torch's secret
            item.ready.workspace_bytes,
            order[item.candidate.config],
        )

    measured = _with_torch_last(measured)
    leader_us = measured[0][1].median_us
    ties = sorted((pair for pair in measured if pair[1].ties_with_leader(leader_us)), key=tie_order)
    rest = [pair for pair in measured if not pair[1].ties_with_leader(leader_us)]
    return [item.evidence(measured=m) for item, m in (*ties, *rest)]


def _with_torch_last(measured: Sequence[tuple[Live, Measurement]]) -> Sequence[tuple[Live, Measurement]]:
    """Where torch's own way leads on a GPU by no more than `TORCH_MARGIN`, the next one instead of it.

    What runs behind torch's way depends on what its caches hold and which flags were set when they were filled; the
    same call took 30 us while it was timed and 33 us when it was used.
    """
    (first, leader), *rest = measured
    if first.candidate.source != LAST_RESORT or not leader.precise:
        return measured
    for place, (item, one) in enumerate(rest):
        if item.candidate.source != LAST_RESORT and one.behind_us <= TORCH_MARGIN * leader.median_us:
            ahead = one._replace(behind_us=0.0, behind_error_us=0.0)
            return [(item, ahead), (first, leader._replace(behind_us=math.inf)), *rest[:place], *rest[place + 1 :]]
    return measured

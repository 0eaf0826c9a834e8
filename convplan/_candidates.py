"""A candidate on its way through planning, and the stage that finds them: enumerate.

Each candidate ends as a measurement or as a rejection with its stage and reason, and both stay in the record. The other
stages are `_filter`, `_build`, `_proof` and `_contest`, in that order; `_planner` strings them together.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from convplan._errors import ConvPlanError, NoPlan, PlanRejected
from convplan._measure import Measurement, first_line
from convplan._plan import Evidence
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan.engines import composed, registry
from convplan.engines.base import FALLBACK, LAST_RESORT, Built, Candidate, Engine, EngineConfig, support

if TYPE_CHECKING:
    from concurrent.futures import Future

log = logging.getLogger("convplan.planner")

COMPILED = "RUNTIME_COMPILATION"
FEWER_OPERATIONS = 20  # a method with that many times fewer operations goes first when nothing is timed
_LATER = {FALLBACK: 1, LAST_RESORT: 2}


class Live(msgspec.Struct):
    """A candidate on its way through the stages."""

    candidate: Candidate
    engine: Engine
    built: Built | None = None
    first_us: float = 0.0
    error: float | None = None
    verified: str = "no"
    remark: str = ""
    pending: Future[str] | None = None  # being built by another thread; why it cannot be, empty once it is

    def add(self, remark: str) -> None:
        """One more remark."""
        self.remark = ", ".join(filter(None, (self.remark, remark)))

    def evidence(self, rejected: str = "", reason: str = "", measured: Measurement | None = None) -> Evidence:
        workspace = self.candidate.workspace_bytes if self.built is None else self.built.workspace_bytes
        return Evidence(
            config=self.candidate.config,
            source=self.candidate.source,
            stock=self.candidate.stock,
            notes=self.candidate.notes,
            workspace_bytes=workspace,
            median_us=None if measured is None else round(measured.median_us, 3),
            spread_us=None if measured is None else round(measured.spread_us, 3),
            samples_us=() if measured is None else measured.samples_us,
            error=self.error,
            verified=self.verified,
            rejected=rejected,
            reason=reason or self.remark,
        )

    @property
    def ready(self) -> Built:
        """What was built of it; asked of those only that were."""
        assert self.built is not None
        return self.built


Stage = tuple[list[Live], list[Evidence]]
"""What a stage leaves: the candidates still in, and the rejections it made."""


def enumerate_candidates(problem: Problem, policy: Policy, effort: Effort, unfused: Sequence[Evidence] = ()) -> Stage:
    """Everything the allowed engines propose, in engine order; an engine that refuses leaves one rejection.

    Args:
        problem, policy, effort: as for `find_plans`.
        unfused: leading plans of the problem's core, to be run with the epilogue behind them.
    """
    live: list[Live] = []
    rejected: list[Evidence] = []
    for engine in registry.allowed(policy.engines):
        proposals, reason = ask(engine, problem, effort)
        if not proposals:
            rejected.append(Evidence(config=EngineConfig(engine.name), rejected="enumerate", reason=reason))
        first_of_equals = {candidate.config: candidate for candidate in reversed(proposals)}
        wanted = dict.fromkeys(candidate.config for candidate in proposals)
        live += [Live(first_of_equals[config], engine) for config in wanted]
    if unfused:
        composing = registry.get(composed.NAME)
        live += [Live(composed.composed_candidate(evidence), composing) for evidence in unfused]
    if effort == "instant":
        live.sort(key=functools.partial(instant_order, problem))
    return live, rejected


def ask(engine: Engine, problem: Problem, effort: Effort) -> tuple[Sequence[Candidate], str]:
    """What one engine proposes, and why it proposes nothing."""
    try:
        answer = support(engine, problem)
        proposals = engine.configs(problem, effort) if answer.ok else ()
    except Exception as exc:  # an engine's failure costs its candidates, never the planning
        return (), failure_reason(exc)
    return proposals, answer.reason or "it proposes no configuration"


def instant_order(problem: Problem, item: Live) -> tuple[int, bool]:
    """Engine order, except that fallbacks and last resorts go last, and on the CPU a method with far fewer operations
    goes first: a GPU's rates differ by more than that between kinds of arithmetic."""
    if not problem.epilogue.is_plain and COMPILED in item.candidate.notes.behavior:
        return 1, False  # what can run at once goes before what takes a second to compile
    flops = item.candidate.flops
    needs_few = problem.device == "cpu" and flops is not None and flops * FEWER_OPERATIONS < problem.flops
    return _LATER.get(item.candidate.source, 0), not needs_few


def split(live: Sequence[Live], stage: str, reason_of: Callable[[Live], str]) -> Stage:
    kept: list[Live] = []
    rejected: list[Evidence] = []
    for item in live:
        reason = reason_of(item)
        if reason:
            log.debug("%s drops %s: %s", stage, item.candidate.config, reason)
            rejected.append(item.evidence(stage, reason))
        else:
            kept.append(item)
    return kept, rejected


def failure_reason(exc: Exception) -> str:
    if isinstance(exc, PlanRejected):
        return exc.reason
    if isinstance(exc, ConvPlanError):
        return str(exc)
    return f"{type(exc).__name__}: {first_line(exc)}"


def no_plan(problem: Problem, policy: Policy, rejected: Sequence[Evidence]) -> NoPlan:
    """The error for a problem that nothing runs, with every candidate's reason (B19)."""
    reasons = [(str(e.config), f"{e.rejected}: {e.reason}") for e in rejected]
    return NoPlan(problem=str(problem), policy=str(policy), rejections=reasons)

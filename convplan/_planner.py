"""The one pipeline: enumerate, filter, build, verify, measure, rank. What each effort runs of it, in which order.

The stages are plain functions: `_candidates` enumerates, `_filter`, `_build`, `_proof` verifies, `_contest` measures
and ranks, and `_search` takes over for effort `exhaustive`. No stage calls back into an earlier one. The short way, by
what is known of a problem's relatives, is `_relatives`.

Planning works on tensors of its own and frees them; the caller's are never touched. Remembering is the caller's last
step: the store is handed in by `_deciding`, and nothing here knows how it works.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from convplan import __version__
from convplan._build import build_candidates, first_that_builds
from convplan._candidates import COMPILED, Live, enumerate_candidates, instant_order, no_plan, split
from convplan._contest import measure_candidates, rank
from convplan._environment import Environment
from convplan._errors import ConvPlanError, ConvPlanWarning, NoPlan
from convplan._filter import filter_candidates, forbidden
from convplan._learned import LearnedErratum, verdict
from convplan._limits import peaks_of
from convplan._measure import Clock
from convplan._memory import cache_emptied, fit_workspace, workspace_limit_bytes
from convplan._plan import Evidence, Plan, PlanRecord, utc_now
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan._proof import verifier_for, verify_candidates
from convplan.engines import registry
from convplan.engines.base import Built, EngineConfig

if TYPE_CHECKING:
    from convplan._search import Found

log = logging.getLogger("convplan.planner")

UNFUSED = 2  # plans of a problem's core that race with its epilogue behind them
SERIALIZED = 2  # plans of a record that are kept serialized: the choice, and the one behind it


def plan_problem(
    problem: Problem,
    policy: Policy,
    environment: Environment,
    *,
    effort: Effort | None = None,
    clock: Clock = time.perf_counter_ns,
    learned: Sequence[LearnedErratum] = (),
) -> PlanRecord:
    """Find the ranking of plans for a problem: the record that `find_plans` makes."""
    return find_plans(problem, policy, environment, effort=effort, clock=clock, learned=learned).record


def find_plans(
    problem: Problem,
    policy: Policy,
    environment: Environment,
    *,
    effort: Effort | None = None,
    clock: Clock = time.perf_counter_ns,
    learned: Sequence[LearnedErratum] = (),
    one_of_many: bool = False,
    unfused: PlanRecord | None = None,
) -> Planned:
    """Find the ranking of plans for a problem.

    Args:
        problem: what to compute; must not be empty.
        policy: the rules, resolved.
        environment: where the plan will belong.
        effort: None: the policy's.
        clock: nanoseconds, for timing candidates and planning itself.
        learned: configurations that failed before; those that count in this environment are not run again.
        one_of_many: it is tuned for what it says of others; what must be compiled for each shape anew says nothing.
        unfused: a record of the problem's core, whose leading plans race with the epilogue behind them;
            None: the core is planned first, where there is one.

    Returns:
        A record with at least one usable candidate, and what was built.

    Raises:
        NoPlan: nothing survived; lists every candidate with its reason.
        PolicyError: the policy names an engine that is not registered.
        TooLarge: there is no memory to measure it with.
    """
    import torch

    # A default device, as users and Inductor set one, is a mode of torch's that everything would be asked through.
    with torch._C.DisableTorchFunction():
        rules = _Rules(policy, environment, effort or policy.effort, learned, one_of_many)
        return _find(problem, rules, clock, unfused)


def _find(problem: Problem, rules: _Rules, clock: Clock, unfused: PlanRecord | None) -> Planned:
    """Find a ranking by the rules; the rest as of `find_plans`."""
    policy = rules.policy
    begin = clock()
    stages = _Stages(clock)
    if unfused is None and not problem.epilogue.is_plain:
        with stages("unfused"):
            unfused = _plan_core(problem, rules, clock)
    leading = () if unfused is None else unfused.ranking[:UNFUSED]
    outcome = _through_stages(problem, rules, clock, stages, leading)
    if not outcome.ranking:
        raise no_plan(problem, policy, outcome.rejected)
    record = PlanRecord(
        problem=problem,
        policy=policy,
        environment=rules.environment,
        effort=outcome.effort,
        ranking=tuple(outcome.ranking),
        rejected=tuple(outcome.rejected),
        peaks=peaks_of(problem, policy, measure=outcome.effort != "instant"),
        planning_s=round((clock() - begin) / 1e9, 6),
        stages_s=tuple(stages.seconds.items()),
        created=utc_now(),
        version=__version__,
        curve=outcome.curve,
    )
    log.info(
        "planned %s in %.3f s (%d usable, %d rejected)",
        record,
        record.planning_s,
        len(record.ranking),
        len(record.rejected),
    )
    built = {item.candidate.config: item.built for item in outcome.live if item.built is not None}
    return Planned(record, built)


def _plan_core(problem: Problem, rules: _Rules, clock: Clock) -> PlanRecord | None:
    """The convolution alone, at the same effort, but for a search; None where no engine runs it."""
    effort: Effort = "instant" if rules.effort == "instant" else "measure"
    try:
        return plan_problem(
            problem.core, rules.policy, rules.environment, effort=effort, clock=clock, learned=rules.learned
        )
    except NoPlan as exc:
        log.info("nothing runs the convolution alone: %s", exc)
        return None


class _Outcome(NamedTuple):
    """What the stages leave for the record; `effort` is the one that there really was."""

    effort: Effort
    live: Sequence[Live]
    ranking: Sequence[Evidence]
    rejected: Sequence[Evidence]
    curve: tuple[tuple[float, float], ...] = ()


class _Rules(NamedTuple):
    """What is asked of the stages."""

    policy: Policy
    environment: Environment
    effort: Effort
    learned: Sequence[LearnedErratum]
    one_of_many: bool


def _through_stages(
    problem: Problem, rules: _Rules, clock: Clock, stages: _Stages, unfused: Sequence[Evidence]
) -> _Outcome:
    policy, environment, effort = rules.policy, rules.environment, rules.effort
    with stages("enumerate"):
        live, rejected = enumerate_candidates(problem, policy, effort, unfused)
    with stages("filter"):
        here = [one for one in rules.learned if one.applies_in(environment)]
        live, dropped = filter_candidates(live, problem, policy, learned=here)
        rejected += dropped
        if rules.one_of_many and effort == "measure":
            live, dropped = split(live, "filter", _compiled_in_vain)
            rejected += dropped
    if effort == "exhaustive":
        with stages("search"):
            found = _search(live, problem, policy, environment, here)
        if found is not None:
            return _Outcome(effort, live, found.ranking, [*rejected, *found.rejected], found.curve)
    if effort == "instant":
        with stages("build"):
            ranking, dropped = first_that_builds(live, problem, policy, workspace_limit_bytes(problem, policy))
        return _Outcome(effort, live, ranking, [*rejected, *dropped])
    with stages("build"):
        live, unbuilt = build_candidates(live, problem, policy)
    ranking, dropped = _prove_and_time(live, problem, policy, clock, stages)
    return _Outcome("measure", live, ranking, [*rejected, *unbuilt, *dropped])


def _compiled_in_vain(item: Live) -> str:
    if COMPILED not in item.candidate.notes.behavior:
        return ""
    return "it is compiled for each shape anew, and this one was tuned for the sake of many others"


class Planned:
    """A record with what was built while it was made, so that nobody needs to build its choice again.

    Attributes:
        record: the ranking with all evidence.
        plan: the choice, ready to run; None where another process had built it.
    """

    def __init__(self, record: PlanRecord, built: Mapping[EngineConfig, Built]) -> None:
        self.record = record
        self._leading = {e.config: built[e.config] for e in record.ranking[:SERIALIZED] if e.config in built}
        choice = built.get(record.config)
        self.plan = None if choice is None else Plan(record.problem, record.config, choice)

    def serialized(self) -> dict[EngineConfig, bytes]:
        """The serialized forms of the leading plans, of those that have one (C1)."""
        found = {}
        for config, built in self._leading.items():
            if built.serialize is not None:
                try:
                    found[config] = built.serialize()
                except ConvPlanError as exc:
                    log.debug("%s is not serialized: %s", config, exc)
        return found


class _Stages:
    """Seconds by stage."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = self._clock()
        yield
        self.seconds[name] = round((self._clock() - begin) / 1e9, 6)


def _search(
    live: Sequence[Live],
    problem: Problem,
    policy: Policy,
    environment: Environment,
    learned: Sequence[LearnedErratum],
) -> Found | None:
    """Effort `exhaustive`; None, with a warning, where there can be no worker process to do it in."""
    from convplan._search import search_candidates
    from convplan._worker_link import NoWorker

    limit = workspace_limit_bytes(problem, policy)
    proposals = [(item.candidate, item.engine) for item in sorted(live, key=functools.partial(instant_order, problem))]
    try:
        return search_candidates(
            proposals,
            problem,
            policy,
            environment,
            forbidden=lambda candidate: (
                forbidden(candidate, problem, policy, limit) or verdict(learned, problem, candidate.config)
            ),
            engines=registry.allowed(policy.engines),
            workspace_limit_bytes=limit,
        )
    except NoWorker as exc:
        warnings.warn(
            f"effort 'exhaustive' needs a worker process, and there is none, so 'measure' it is: {exc}",
            ConvPlanWarning,
            stacklevel=5,
        )
        return None


def _prove_and_time(
    live: Sequence[Live], problem: Problem, policy: Policy, clock: Clock, stages: _Stages
) -> tuple[list[Evidence], list[Evidence]]:
    """Stages verify, measure and rank, which share one set of tensors."""
    import torch

    if not live:
        return [], []
    device = torch.device(problem.device)
    rejected = fit_workspace(live, device) if device.type == "cuda" else []
    live = [item for item in live if not any(item.candidate.config == out.config for out in rejected)]
    with torch.no_grad(), cache_emptied(device):
        synchronize = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
        with stages("verify"):
            verifier = verifier_for(problem, device, policy)
            right, wrong = verify_candidates(live, problem, verifier, clock, synchronize)
        with stages("measure"):
            measured, slower = measure_candidates(right, policy, verifier, clock, synchronize)
    ranking = rank(measured, live)
    return ranking, rejected + wrong + slower

"""Plans for a problem met first, by what was measured for its relatives: the short way past the stages.

Which relatives are near and what their records foretell is `_nearest`'s; finding them in memory and in the store, and
what happens when none helps, is `_deciding`'s.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import msgspec

from convplan import __version__
from convplan._candidates import Live, failure_reason, no_plan
from convplan._environment import Environment
from convplan._filter import forbidden
from convplan._measure import Clock
from convplan._memory import MOST_WORKSPACE_BYTES, over_limit, workspace_limit_bytes
from convplan._nearest import Likely, likely
from convplan._plan import Evidence, Plan, PlanRecord, utc_now
from convplan._policy import Policy
from convplan._problem import Problem
from convplan.engines import composed, registry
from convplan.engines.base import LAST_RESORT, Candidate, Engine, EngineConfig, Offer, Offering, Searchable, support

log = logging.getLogger("convplan.planner")

RELATIVE = "relative"  # source of candidates that a relative's record proposes and no engine was asked for

Learned = Callable[[Problem, Candidate], str]
"""Why a configuration must not run, by what was learned of it in searches; empty when nothing was."""


def plan_like(
    problem: Problem,
    policy: Policy,
    environment: Environment,
    relatives: Sequence[PlanRecord],
    *,
    learned: Learned | None = None,
    clock: Clock = time.perf_counter_ns,
) -> tuple[PlanRecord, Plan]:
    """An untuned plan by what runs problems that differ in batch and spatial sizes only.

    No engine is asked for its lists, nothing is timed and nothing verified: the leading configurations of the relatives
    pass the filter, and the first that builds is the choice.

    Args:
        problem, policy, environment: as for `plan_problem`.
        relatives: records of the problem's family, policy and environment, tuned where there are such, nearest first.
        learned: says of a candidate why it must not run, if something is known against it.
        clock: nanoseconds.

    Returns:
        A record of effort `instant`, which is not for the store, and its choice, built.

    Raises:
        NoPlan: none of them may run here or builds; lists each with its reason.
        PolicyError: the policy names an engine that is not registered.
    """
    begin = clock()
    engines = {engine.name: engine for engine in registry.allowed(policy.engines)}
    rejected: list[Evidence] = []
    known = [
        item
        for one in likely(problem, relatives)
        if (item := _as_known(one, engines, problem, policy, learned, rejected)) is not None
    ]
    # Torch alone is what an instant plan ends with anyway, and the engines may know something better here.
    if all(item.candidate.source == LAST_RESORT for item in known):
        raise no_plan(problem, policy, [*rejected, *(item.evidence("filter", "a last resort") for item in known)])
    while known:
        stage, reason = _proposed(known[0], problem, policy)
        if not reason:
            break
        rejected.append(known.pop(0).evidence(stage, reason))
    else:
        raise no_plan(problem, policy, rejected)
    ranking = [item.evidence() for item in known]
    record = PlanRecord(
        problem=problem,
        policy=policy,
        environment=environment,
        effort="instant",
        ranking=tuple(ranking),
        rejected=tuple(rejected),
        planning_s=round((clock() - begin) / 1e9, 6),
        created=utc_now(),
        version=__version__,
    )
    log.info("planned %s in %.6f s: %s", record, record.planning_s, ranking[0].reason)
    return record, Plan(problem, ranking[0].config, known[0].ready)


def _as_known(
    one: Likely,
    engines: Mapping[str, Engine],
    problem: Problem,
    policy: Policy,
    learned: Learned | None,
    rejected: list[Evidence],
) -> Live | None:
    """A relative's configuration as a candidate, by what is known of it there; None, with a rejection, where that is
    enough to drop it. Cheap: most of them are never asked for."""
    config = one.evidence.config
    # What needs nothing but torch stays marked as that: it counts as falling back when nothing else is left.
    source = LAST_RESORT if one.evidence.source == LAST_RESORT else RELATIVE
    candidate = Candidate(config=config, notes=one.evidence.notes, source=source)
    engine = _allowed(config, engines)
    if engine is None:
        reason = f"engine {config.engine!r} is not among those that may run: {', '.join(engines)}"
        rejected.append(
            Evidence(config=config, source=source, notes=candidate.notes, rejected="enumerate", reason=reason)
        )
        return None
    item = Live(candidate, engine, remark=one.remark)
    reason = forbidden(candidate, problem, policy, MOST_WORKSPACE_BYTES)
    if not reason and learned is not None:
        reason = learned(problem, candidate)
    if reason:
        rejected.append(item.evidence("filter", reason))
        return None
    return item


def _allowed(config: EngineConfig, engines: Mapping[str, Engine]) -> Engine | None:
    """The engine of a configuration, if it may run; a composed plan may where the engine behind it may."""
    if config.engine != composed.NAME:
        return engines.get(config.engine)
    return registry.get(composed.NAME) if composed.unfused_config(config).engine in engines else None


def _proposed(item: Live, problem: Problem, policy: Policy) -> tuple[str, str]:
    """Ask its engine about a relative's configuration and build it; the stage and reason where that ends, or empty."""
    engine = item.engine
    try:
        answer = support(engine, problem)
        if not answer.ok:
            return "enumerate", answer.reason
        item.candidate, build = _offer(engine, problem, item.candidate)
        reason = forbidden(item.candidate, problem, policy, MOST_WORKSPACE_BYTES)
        if reason:
            return "filter", reason
        item.built = build(policy)
    except Exception as exc:  # an engine's failure costs its candidate, never the planning
        return "build", failure_reason(exc)
    # Asking what memory there is takes longer than all the rest, and most plans need none.
    workspace = item.built.workspace_bytes
    over = over_limit(workspace, workspace_limit_bytes(problem, policy)) if workspace else ""
    return ("build", over) if over else ("", "")


@functools.lru_cache(maxsize=64)
def _offers(kind: type) -> bool:
    """Kept, since asking a protocol takes longer than what it is asked for on the way to a first run."""
    return issubclass(kind, Offering)


def _offer(engine: Engine, problem: Problem, candidate: Candidate) -> Offer:
    """What an engine says of a configuration by name; the candidate as it is known elsewhere where it says nothing."""
    config = candidate.config
    if _offers(type(engine)):
        offer = cast(Offering, engine).offer(problem, config)
        return Offer(msgspec.structs.replace(offer.candidate, source=candidate.source), offer.build)
    if isinstance(engine, Searchable):
        candidate = msgspec.structs.replace(engine.candidate(problem, config), source=candidate.source)
    return Offer(candidate, functools.partial(engine.build, problem, config))

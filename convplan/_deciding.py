"""Which plan runs a problem: the remembered, the stored, one like its relatives', another rank's, or a new one.

A choice starts as the stored record, or as an untuned plan that counts how often it is used and is exchanged for a
tuned one at the sighting the policy names. While a CUDA graph is captured only what `make_ready` left counts. What is
remembered, and where, is `_choices`; how a plan is found is `_planner`; running it, and what to do when it fails, is
`_runtime`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext

from convplan import _agreement, _environment
from convplan._candidates import COMPILED
from convplan._choices import STORE_VARIABLES, Choice, Failure, Layer, Ready, known, state
from convplan._counts import counts, warn_once
from convplan._errors import ConvPlanError, NoPlan, ReplayMiss, TooLarge
from convplan._learned import learned_from, verdict
from convplan._measure import first_line
from convplan._nearest import Relatives, is_near
from convplan._plan import Plan, PlanRecord
from convplan._planner import find_plans
from convplan._policy import EFFORTS, Effort, Policy
from convplan._problem import Problem
from convplan._proof import run_once
from convplan._relatives import RELATIVE, plan_like
from convplan.engines import registry
from convplan.engines.base import LAST_RESORT, Restoring

log = logging.getLogger("convplan.runtime")

# Times `tune_after`: how many shapes make a family worth tuning, and how many sightings make a problem worth it that
# has a near relative's choice already, beyond which little is to be gained. An untuned GPU plan costs its engine's
# lists, 7 to 20 ms (H200, cuDNN 9.19): with `tune_after=2`, those of 16 shapes have cost about what one tuning does.
PATIENCE = 8
# Of the time since the process met its first problem, for tuning problems that are one shape of many of their family,
# each of which may never come again.
FAMILIES_SHARE = 0.1


def decide(problem: Problem, policy: Policy, layer: Layer | None = None) -> tuple[Choice, PlanRecord]:
    """The record to run a problem by: the remembered, the stored, or a newly planned one.

    Args:
        problem: not empty.
        policy: as the user gave it; flags left None follow torch's.
        layer: whose sighting of the problem this is, a weak reference to its weight; None: not known.

    Raises:
        NoPlan: no engine runs it. ReplayMiss: replay mode, and it is not stored.
    """
    resolved = policy.resolve()
    environment = _environment.current(problem.device)
    choice = known.choices.get(problem, resolved, environment)
    with choice.lock:
        choice.sight(layer)
        _raise_known_failure(choice)
        job = choice.job = _agreement.agreement(choice.job, problem, resolved, environment)
        if choice.record is None or (choice.record.effort == "instant" and _refuses_untuned(resolved)):
            agreed = None if _refuses_untuned(resolved) else _agreed_by_now(choice, "final")
            choice.record = agreed or _agree(choice, _first_sight(choice, problem, resolved, environment), resolved)
        elif job is not None and not job.seen:  # chosen before there was a job
            choice.record = _agree(choice, choice.record, resolved)
        elif not is_settled(choice.record, resolved) and not choice.gave_up:
            choice.record = _seen_again(choice, choice.record, problem, resolved, environment)
        return choice, choice.record


def ready_choice(problem: Problem, policy: Policy, device: int) -> tuple[Choice, Ready] | None:
    """What a problem that is met while a CUDA graph is captured runs by: what was made ready before, if anything.

    Nothing is planned, built, read or counted, and no other thread is waited for.

    Args:
        problem, policy: as for `decide`.
        device: index of the GPU, which is the current one.
    """
    resolved = policy.resolve()
    choice = known.choices.find(problem, resolved, _environment.current(problem.device))
    ready = None if choice is None else choice.ready_on(device)
    if choice is None or ready is None:
        return None
    board, job = _agreement.board_for(resolved), choice.job
    if board is not None and (job is None or job.board is not board or not job.seen):  # chosen before there was a job
        return None
    return choice, ready


def _seen_again(
    choice: Choice, record: PlanRecord, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord:
    """A later sighting of a problem that runs untuned."""
    job = choice.job
    if job is not None:
        if not job.may_look:
            return record
        agreed = _agreed_by_now(choice, "final")
        if agreed is not None:
            return agreed
        if _limit_is_spent(policy):
            with job.turn() as turn:  # nobody is tuning it, and this rank will not
                choice.gave_up = turn.mine
                return _agree(choice, record, policy) if turn.mine else record
    if not _is_due(choice, policy):
        return record
    if not _varies(problem, policy, environment):
        return _tune(choice, problem, policy, environment)
    if not _share_is_spent():
        return _tune_one_of_many(choice, problem, policy, environment)
    if job is not None or choice.has_near_relative:  # ranks that agreed on this plan must not part
        return record
    if not _known_relatives(environment).has_tuned_near(problem, policy, environment):
        return record
    return _like_relatives(choice, problem, policy, environment) or record  # tuned since it was met


def _agreed_by_now(choice: Choice, kind: _agreement.Kind) -> PlanRecord | None:
    """What the other ranks run the problem by already, if it can be had here."""
    agreed = None if choice.job is None else choice.job.look(kind)
    return None if agreed is None else _take_over(choice, agreed)


def _agree(choice: Choice, record: PlanRecord, policy: Policy) -> PlanRecord:
    """The record that all ranks use, if they are to agree: this one, or the one that another rank was first with."""
    job = choice.job
    if job is None:
        return record
    if policy.deterministic and record.effort == "instant":
        choice.gave_up = True  # a later plan would round differently
    stays = choice.gave_up or is_settled(record, policy)
    agreed = job.publish(record, "final" if stays else "provisional")
    return record if agreed.record is record else _take_over(choice, agreed, own=record) or record


def _take_over(choice: Choice, agreed: _agreement.Agreed, own: PlanRecord | None = None) -> PlanRecord | None:
    """Use what another rank found. None: it does not build here, and this rank stays alone with the problem."""
    record, job = agreed.record, choice.job
    assert job is not None
    plan = None if own is None or own.config != record.config else choice.take_ready(own)
    try:
        plan = plan or build(record)
    except ConvPlanError as exc:
        job.alone = True
        warn_once(f"rank {job.board.rank} cannot use the plan of the other ranks ({exc}): {record.problem}")
        return None
    job.take(agreed)
    choice.failure = None
    choice.gave_up = agreed.kind == "final" and record.effort == "instant"
    choice.has_near_relative = any(evidence.source == RELATIVE for evidence in record.ranking)
    choice.hand_over(record, plan)
    counts.add("from_rank")
    if record.effort != "instant":
        known.relatives.add(record)
        wanted = record.policy.replace(effort=record.effort)
        if known.store().lookup(record.problem, wanted, record.environment) is None:
            known.store().remember(record)
    return record


def is_settled(record: PlanRecord, policy: Policy) -> bool:
    """Whether seeing the problem more often changes nothing."""
    if record.effort != "instant" or policy.tunes_at_sight is None:
        return True
    return _limit_is_spent(policy) and _agreement.board_for(policy) is None  # else another rank may still tune it


def _limit_is_spent(policy: Policy) -> bool:
    return policy.tuning_limit_s is not None and counts.tuning_s >= policy.tuning_limit_s


def _is_due(choice: Choice, policy: Policy) -> bool:
    at = policy.tunes_at_sight
    if at is None or choice.gave_up or _limit_is_spent(policy):
        return False
    return choice.sightings >= at * (PATIENCE if choice.has_near_relative else 1)


def _refuses_untuned(policy: Policy) -> bool:
    return policy.mode == "replay" and policy.replay_miss == "error" and policy.effort != "instant"


def _first_sight(choice: Choice, problem: Problem, policy: Policy, environment: _environment.Environment) -> PlanRecord:
    stored = _stored(choice, problem, policy, environment)
    if stored is None and not (_refuses_untuned(policy) or _is_due(choice, policy)):
        stored = _built_ahead(choice, problem, policy, environment)
    if stored is not None:
        return stored
    if policy.mode == "replay":
        counts.add("replay_misses")
    if policy.mode == "replay" and policy.replay_miss == "error":
        counts.add("failed")
        raise ReplayMiss(problem=str(problem), policy=str(policy))
    if _is_due(choice, policy):
        return _tune(choice, problem, policy, environment)
    if _family_is_due(problem, policy, environment):
        return _tune_one_of_many(choice, problem, policy, environment)
    like = _agreed_by_now(choice, "provisional") or _like_relatives(choice, problem, policy, environment)
    if like is not None:
        return like
    # Stored only where that is what the policy asks for, and not when it stands in for a tuned one.
    keep = policy.effort == "instant" and policy.mode == "auto"
    record = plan_now(choice, problem, policy, environment, "instant", keep=keep)
    if _uses_relatives(policy):
        known.relatives.add(record)
    return record


def _uses_relatives(policy: Policy) -> bool:
    """Whether a first sight may take over what its relatives were tuned to.

    Not under a deterministic policy: which relatives there are depends on what was met before and on what else was
    tuned, and the same convolution must not round differently for that. Not at effort `instant`, which is the engines'
    own order.
    """
    return policy.nearest and not policy.deterministic and policy.effort != "instant"


def _known_relatives(environment: _environment.Environment) -> Relatives:
    """The index of tuned problems, with those of the store in it: they are read once for each environment."""
    where = tuple(os.environ.get(name) for name in STORE_VARIABLES)
    known.relatives.load_once((where, environment), lambda: _stored_relatives(environment))
    return known.relatives


def _stored_relatives(environment: _environment.Environment) -> Iterable[PlanRecord]:
    """Every record that the store holds for an environment."""
    return known.store().records(environment)


def _family_is_due(problem: Problem, policy: Policy, environment: _environment.Environment) -> bool:
    """Whether to tune a problem at once for its family's sake: many shapes of it were met, and none near this is tuned.

    Problems whose shapes never repeat are never seen twice, so without this none of them would ever be tuned.
    """
    at = policy.tunes_at_sight
    if at is None or not _uses_relatives(policy) or _limit_is_spent(policy):
        return False
    relatives, enough = _known_relatives(environment), at * PATIENCE
    if _share_is_spent():
        relatives.meet(problem, policy, environment, most=enough)
        return False
    return relatives.claim(problem, policy, environment, shapes=enough)


def _varies(problem: Problem, policy: Policy, environment: _environment.Environment) -> bool:
    """Whether so many shapes of a problem's family were met that this one is one of many, and tuning it can wait."""
    if not _uses_relatives(policy):
        return False
    return _known_relatives(environment).met(problem, policy, environment) >= PATIENCE


def _share_is_spent() -> bool:
    """Whether tuning problems of which there are many has had its share of the time."""
    return counts.families_s > FAMILIES_SHARE * (time.perf_counter() - counts.since)


def _tune_one_of_many(
    choice: Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord:
    """Tune, on the account of problems whose shapes vary."""
    before = counts.tuning_s
    choice.one_of_many = True
    try:
        return _tune(choice, problem, policy, environment)
    finally:
        counts.families_s += counts.tuning_s - before


def _like_relatives(
    choice: Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord | None:
    """An untuned plan by the choices of the nearest tuned relatives; None where there are none, or none builds here."""
    if not _uses_relatives(policy):
        return None
    nearest = _known_relatives(environment).nearest(problem, policy, environment)
    if not nearest:
        return None
    try:
        errata = known.store().errata(environment)
        record, plan = plan_like(
            problem, policy, environment, nearest, learned=lambda _, one: verdict(errata, problem, one.config)
        )
    except NoPlan as exc:
        log.info("no relative's choice builds here: %s", exc)
        return None
    counts.add("from_relative")
    choice.failure = None
    choice.has_near_relative = nearest[0].effort != "instant" and is_near(problem, nearest[0].problem)
    choice.hand_over(record, plan)
    return record


def build(record: PlanRecord, rank: int = 0) -> Plan:
    """One of the record's plans: restored where the store has its serialized form, else built."""
    evidence = record.ranking[rank]
    restores = isinstance(registry.get(evidence.config.engine), Restoring)
    serialized = known.store().serialized(record, evidence.config) if restores else None
    plan = record.build(rank, serialized=serialized)
    if restores:
        if plan.restored:
            counts.add("restored")
        elif COMPILED in evidence.notes.behavior:
            counts.add("compiled")
    return plan


def _stored(
    choice: Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord | None:
    """The store's record, unless its choice cannot be built here any more: then the problem is planned anew."""
    found = known.store().lookup(problem, policy, environment)
    if found is None:
        return None
    try:
        plan = build(found)
    except ConvPlanError as exc:
        log.info("stored plan of %s does not build any more (%s): planning it again", problem, exc)
        return None
    choice.hand_over(found, plan)
    counts.add("from_store")
    known.relatives.add(found)
    return found


def _built_ahead(
    choice: Choice, problem: Problem, policy: Policy, environment: _environment.Environment
) -> PlanRecord | None:
    """The store's record that was built for this GPU on a machine without one; it is untuned, as instant ones are."""
    ahead = _environment.ahead_of_time(environment)
    return None if ahead is None else _stored(choice, problem, policy.replace(effort="instant"), ahead)


def _tune(choice: Choice, problem: Problem, policy: Policy, environment: _environment.Environment) -> PlanRecord:
    """Measure, once for all ranks of a job. A rank whose turn it is not goes on untuned, since a collective may wait
    for it; or waits, if its policy forbids that the plan changes later."""
    job = choice.job
    if job is None:
        return _tune_here(choice, problem, policy, environment)
    with job.turn(_agreement.patience_s(policy) if policy.deterministic else 0.0) as turn:
        if turn.mine:
            return _agree(choice, _tune_here(choice, problem, policy, environment), policy)
    taken = None if turn.record is None else _take_over(choice, _agreement.Agreed(turn.record, "final"))
    if taken is not None:
        return taken
    untuned = choice.record or _agreed_by_now(choice, "provisional")
    return untuned or plan_now(choice, problem, policy, environment, "instant", keep=False)


def _tune_here(choice: Choice, problem: Problem, policy: Policy, environment: _environment.Environment) -> PlanRecord:
    """Measure; where that breaks off, as for want of memory, the problem runs untuned and is not tried again."""
    begin = time.perf_counter()
    try:
        return plan_now(choice, problem, policy, environment, "measure")
    except Exception as exc:  # tuning is extra work that the convolution does not depend on
        if isinstance(exc, ConvPlanError) and not isinstance(exc, TooLarge):
            raise
        counts.add("failed")
        choice.gave_up = True
        warn_once(f"tuning broke off ({type(exc).__name__}: {first_line(exc)}); it runs untuned: {problem}")
        return choice.record or plan_now(choice, problem, policy, environment, "instant", keep=False)
    finally:
        counts.tuning_s += time.perf_counter() - begin
        if _limit_is_spent(policy):
            log.info(
                "tuning has taken %.1f s, the policy's limit: problems met from now on run untuned", counts.tuning_s
            )


def plan_now(
    choice: Choice,
    problem: Problem,
    policy: Policy,
    environment: _environment.Environment,
    effort: Effort,
    *,
    keep: bool = True,
) -> PlanRecord:
    """Plan and store. When nothing survives, the choice notes it, so that later calls do not search again."""
    choice.failure = None
    unfused = None if problem.epilogue.is_plain else _unfused(problem, policy, environment, effort)
    try:
        errata = known.store().errata(environment)
        found = find_plans(
            problem,
            policy,
            environment,
            effort=effort,
            learned=errata,
            one_of_many=choice.one_of_many,
            unfused=unfused,
        )
    except NoPlan as exc:
        counts.add("failed")
        choice.failure = Failure(exc.problem, exc.policy, exc.rejections, registry.generation)
        raise
    record = found.record
    if found.plan is not None:
        choice.hand_over(record, found.plan)
    counts.add("planned")
    counts.spend("planning_s", record.planning_s)
    if all(evidence.source == LAST_RESORT for evidence in record.ranking):
        counts.add("fell_back")
        log.info("nothing but torch's own kernel runs %s", problem)
    if effort != "instant":
        counts.add("tuned")
        counts.spend("tuning_s", record.planning_s)
        known.relatives.add(record)
    known.store().learn(learned_from(record))
    if keep:
        known.store().remember(record, found.serialized())
    return record


def _unfused(
    problem: Problem, policy: Policy, environment: _environment.Environment, effort: Effort
) -> PlanRecord | None:
    """What runs the convolution alone: remembered, stored or planned now, and kept for its own sake as well."""
    core, wanted = problem.core, policy.replace(effort="instant" if effort == "instant" else "measure")
    choice = known.choices.get(core, policy, environment)
    with choice.lock:
        try:
            if not _suffices(choice.record, wanted):
                choice.record = _stored(choice, core, wanted, environment) or choice.record
            if not _suffices(choice.record, wanted):
                keep = policy.effort == "instant" or effort != "instant"
                choice.record = plan_now(choice, core, policy, environment, wanted.effort, keep=keep)
        except NoPlan:
            return None
        return choice.record


def _raise_known_failure(choice: Choice) -> None:
    """Raise what the last search ended with, unless engines were registered since."""
    known = choice.failure
    if known is not None and known.generation == registry.generation:
        raise NoPlan(problem=known.problem, policy=known.policy, rejections=known.rejections)


def adopt(problem: Problem, policy: Policy, *, force: bool = False) -> tuple[PlanRecord, bool]:
    """Plan a problem now, with the policy's effort and whatever `tune_after` says, and use it from here on.

    Returns:
        The record, and whether it was planned now (False: a record of that effort was already there).
    """
    resolved = policy.resolve()
    environment = _environment.current(problem.device)
    choice = known.choices.get(problem, resolved, environment)
    replay = resolved.mode == "replay"
    with choice.lock:
        before = choice.record
        job = choice.job = _agreement.agreement(choice.job, problem, resolved, environment, asked=resolved.effort)
        if not _suffices(choice.record, resolved):
            choice.record = _stored(choice, problem, resolved, environment) or choice.record
        if choice.record is None and resolved.effort == "instant":
            choice.record = _built_ahead(choice, problem, resolved, environment)
        if choice.record is not None and _suffices(choice.record, resolved) and (replay or not force):
            choice.record = _agree(choice, choice.record, resolved)
            if before is not None and choice.record is not before:
                state.touch()  # it runs by another plan here
            return choice.record, False
        if replay:
            counts.add("replay_misses")
            counts.add("failed")
            raise ReplayMiss(problem=str(problem), policy=str(resolved))
        choice.one_of_many = False  # somebody wants this very one
        with nullcontext(_agreement.Turn(True)) if job is None else job.turn(_agreement.patience_s(resolved)) as turn:
            taken = None if turn.record is None else _take_over(choice, _agreement.Agreed(turn.record, "final"))
            choice.record = taken or _agree(
                choice, plan_now(choice, problem, resolved, environment, resolved.effort), resolved
            )
        state.touch()
        return choice.record, taken is None


def make_ready(problem: Problem, policy: Policy) -> None:
    """Have the plan of a problem that was adopted ready on the current device, for CUDA graphs that are captured next.

    It is built, or restored where the store has its serialized form, unless planning has left it, and on a GPU it runs
    once, on made-up tensors: what an engine does in a plan's first run (kernels are loaded or compiled, tensors of its
    own made) it could not do while a graph is captured. Then it stays with the choice, and goes when that is forgotten.
    Where it fails, the problem's next call sees to it.
    """
    device = -1
    if problem.device == "cuda":
        import torch

        device = torch.cuda.current_device()
    choice = known.choices.get(problem, policy.resolve(), _environment.current(problem.device))
    with choice.lock:
        record = choice.record
        if record is None or choice.ready_on(device) is not None:  # None: the cache keeps nothing
            return
        try:
            plan = choice.take_ready(record) or build(record)
            if device >= 0:
                run_once(plan)
        except Exception as exc:  # whatever an engine raises: the next call knows the plans behind this one
            log.info("left to its next call to make ready (%s: %s): %s", type(exc).__name__, first_line(exc), problem)
            return
        choice.keep_ready(record, plan, device)


def _suffices(record: PlanRecord | None, policy: Policy) -> bool:
    return record is not None and EFFORTS.index(record.effort) >= EFFORTS.index(policy.effort)

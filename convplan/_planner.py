"""The one pipeline: enumerate, filter, build, verify, measure, rank. Plain functions, one for each stage.

Each candidate ends as a measurement or as a rejection with its stage and reason, and both stay in the record. No stage
calls back into an earlier one. Planning works on tensors of its own and frees them; the caller's are never touched.
Remembering is the caller's last step: the store is handed in by `_runtime`, and nothing here knows how it works.
"""

from __future__ import annotations

import datetime
import functools
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import msgspec

from convplan import __version__
from convplan._environment import Environment
from convplan._errors import ConvPlanError, ConvPlanWarning, NoPlan, PlanRejected, TooLarge, WrongResult
from convplan._learned import LearnedErratum, verdict
from convplan._limits import gpu_bytes_per_us, gpu_plain_flops_per_us, measured_flops_per_us, peaks_of
from convplan._measure import CUTOFF, Clock, Contestant, Measurement, first_line, race
from convplan._nearest import Likely, likely
from convplan._plan import Evidence, Plan, PlanRecord
from convplan._policy import Effort, Policy
from convplan._problem import DTYPES, Problem
from convplan.engines import registry
from convplan.engines.base import (
    FALLBACK,
    LAST_RESORT,
    Built,
    Candidate,
    Engine,
    EngineConfig,
    Offer,
    Offering,
    Run,
    Searchable,
)

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    import torch

    from convplan._inputs import Inputs
    from convplan._measure_cuda import GraphTimer
    from convplan._search import Found
    from convplan._verify import Verifier

log = logging.getLogger("convplan.planner")

BUILDERS = 4  # threads
COMPILED = "RUNTIME_COMPILATION"
ALWAYS_DROPPED_NOTES = ("DOWN_CONVERT_INPUTS",)  # B9: unless the policy lets them through by name
FEWER_OPERATIONS = 20  # a method with that many times fewer operations goes first when nothing is timed
INEXACT = "not exact on small integers: its arithmetic is that of a transform, which its engine does not note"
FIRST_RUN_CUTOFF = 4 * CUTOFF  # the first call may hold one-time work; beyond this it is hopeless all the same
FIRST_RUN_GRACE_US = 20_000.0  # and below this, one-time work can be all of it
SERIALIZED = 2  # plans of a record that are kept serialized: the choice, and the one behind it
RELATIVE = "relative"  # source of candidates that a relative's record proposes and no engine was asked for
_LATER = {FALLBACK: 1, LAST_RESORT: 2}
MOST_WORKSPACE_BYTES = 2**40  # more is out of memory without trying
MOST_TURNS = 32  # sets of inputs; problems too small for that many to fill a cache are timed in it
TORCH_MARGIN = 0.03  # share by which torch's own way must be ahead on a GPU
SAFETY_BYTES = 64 * 2**20  # memory left alone when the limit is what the machine can provide


class _Live(msgspec.Struct):
    """A candidate on its way through the stages."""

    candidate: Candidate
    engine: Engine
    built: Built | None = None
    first_us: float = 0.0
    error: float | None = None
    verified: str = "no"
    remark: str = ""
    pending: Future[str] | None = None  # being built elsewhere; why it cannot be, empty once it is

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


Stage = tuple[list[_Live], list[Evidence]]
"""What a stage leaves: the candidates still in, and the rejections it made."""


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
) -> Planned:
    """Find the ranking of plans for a problem.

    Args:
        problem: what to compute; must not be empty.
        policy: the rules, resolved.
        environment: where the plan will belong.
        effort: None: the policy's.
        clock: nanoseconds, for timing candidates and planning itself.
        learned: configurations that failed before; those that count in this environment are not run again.

    Returns:
        A record with at least one usable candidate, and what was built.

    Raises:
        NoPlan: nothing survived; lists every candidate with its reason.
        PolicyError: the policy names an engine that is not registered.
        TooLarge: there is no memory to measure it with.
    """
    begin = clock()
    work: Effort = effort or policy.effort
    stages = _Stages(clock)
    with stages("enumerate"):
        live, rejected = enumerate_candidates(problem, policy, work)
    with stages("filter"):
        here = [one for one in learned if one.applies_in(environment)]
        live, dropped = filter_candidates(live, problem, policy, learned=here)
    rejected += dropped
    found = None
    if work == "exhaustive":
        with stages("search"):
            found = _search(live, problem, policy, environment, here)
    curve: tuple[tuple[float, float], ...] = ()
    if found is not None:
        ranking, dropped, curve = found
    elif work == "instant":
        with stages("build"):
            ranking, dropped = _first_that_builds(live, problem, policy, workspace_limit_bytes(problem, policy))
    else:
        work = "measure"
        with stages("build"):
            live, unbuilt = build_candidates(live, problem, policy)
        ranking, dropped = _prove_and_time(live, problem, policy, clock, stages)
        dropped = [*unbuilt, *dropped]
    rejected += dropped
    if not ranking:
        raise no_plan(problem, policy, rejected)
    record = PlanRecord(
        problem=problem,
        policy=policy,
        environment=environment,
        effort=work,
        ranking=tuple(ranking),
        rejected=tuple(rejected),
        peaks=peaks_of(problem, policy, measure=work != "instant"),
        planning_s=round((clock() - begin) / 1e9, 6),
        stages_s=tuple(stages.seconds.items()),
        created=_now(),
        version=__version__,
        curve=curve,
    )
    log.info("planned %s in %.3f s (%d usable, %d rejected)", record, record.planning_s, len(ranking), len(rejected))
    built = {item.candidate.config: item.built for item in live if item.built is not None}
    return Planned(record, built)


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


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


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
    """An untuned plan by what was measured for problems that differ in batch and spatial sizes only.

    No engine is asked for its lists, nothing is timed and nothing verified: the leading configurations of the relatives
    pass the filter, and the first that builds is the choice.

    Args:
        problem, policy, environment: as for `plan_problem`.
        relatives: tuned records of the problem's family, policy and environment, nearest first.
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
        created=_now(),
        version=__version__,
    )
    log.info("planned %s in %.6f s: %s", record, record.planning_s, ranking[0].reason)
    return record, Plan(problem, ranking[0].config, _built(known[0]))


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


def _as_known(
    one: Likely,
    engines: Mapping[str, Engine],
    problem: Problem,
    policy: Policy,
    learned: Learned | None,
    rejected: list[Evidence],
) -> _Live | None:
    """A relative's configuration as a candidate, by what is known of it there; None, with a rejection, where that is
    enough to drop it. Cheap: most of them are never asked for."""
    config = one.evidence.config
    # What needs nothing but torch stays marked as that: it counts as falling back when nothing else is left.
    source = LAST_RESORT if one.evidence.source == LAST_RESORT else RELATIVE
    candidate = Candidate(config=config, notes=one.evidence.notes, source=source)
    engine = engines.get(config.engine)
    if engine is None:
        reason = f"engine {config.engine!r} is not among those that may run: {', '.join(engines)}"
        rejected.append(
            Evidence(config=config, source=source, notes=candidate.notes, rejected="enumerate", reason=reason)
        )
        return None
    item = _Live(candidate, engine, remark=one.remark)
    reason = _forbidden(candidate, problem, policy, MOST_WORKSPACE_BYTES)
    if not reason and learned is not None:
        reason = learned(problem, candidate)
    if reason:
        rejected.append(item.evidence("filter", reason))
        return None
    return item


def _proposed(item: _Live, problem: Problem, policy: Policy) -> tuple[str, str]:
    """Ask its engine about a relative's configuration and build it; the stage and reason where that ends, or empty."""
    engine = item.engine
    try:
        support = engine.supports(problem)
        if not support.ok:
            return "enumerate", support.reason
        item.candidate, build = _offer(engine, problem, item.candidate)
        reason = _forbidden(item.candidate, problem, policy, MOST_WORKSPACE_BYTES)
        if reason:
            return "filter", reason
        item.built = build(policy)
    except Exception as exc:  # an engine's failure costs its candidate, never the planning
        return "build", _reason(exc)
    # Asking what memory there is takes longer than all the rest, and most plans need none.
    workspace = item.built.workspace_bytes
    over = _over_limit(workspace, workspace_limit_bytes(problem, policy)) if workspace else ""
    return ("build", over) if over else ("", "")


def no_plan(problem: Problem, policy: Policy, rejected: Sequence[Evidence]) -> NoPlan:
    """The error for a problem that nothing runs, with every candidate's reason (B19)."""
    reasons = [(str(e.config), f"{e.rejected}: {e.reason}") for e in rejected]
    return NoPlan(problem=str(problem), policy=str(policy), rejections=reasons)


def enumerate_candidates(problem: Problem, policy: Policy, effort: Effort) -> Stage:
    """Everything the allowed engines propose, in engine order; an engine that refuses leaves one rejection."""
    live: list[_Live] = []
    rejected: list[Evidence] = []
    for engine in registry.allowed(policy.engines):
        proposals, reason = _ask(engine, problem, effort)
        if not proposals:
            rejected.append(Evidence(config=EngineConfig(engine.name), rejected="enumerate", reason=reason))
        first_of_equals = {candidate.config: candidate for candidate in reversed(proposals)}
        wanted = dict.fromkeys(candidate.config for candidate in proposals)
        live += [_Live(first_of_equals[config], engine) for config in wanted]
    if effort == "instant":
        live.sort(key=functools.partial(_instant_order, problem))
    return live, rejected


def _ask(engine: Engine, problem: Problem, effort: Effort) -> tuple[Sequence[Candidate], str]:
    """What one engine proposes, and why it proposes nothing."""
    try:
        support = engine.supports(problem)
        proposals = engine.configs(problem, effort) if support.ok else ()
    except Exception as exc:  # an engine's failure costs its candidates, never the planning
        return (), _reason(exc)
    return proposals, support.reason or "it proposes no configuration"


def _instant_order(problem: Problem, item: _Live) -> tuple[int, bool]:
    """Engine order, except that fallbacks and last resorts go last, and on the CPU a method with far fewer operations
    goes first: a GPU's rates differ by more than that between kinds of arithmetic."""
    flops = item.candidate.flops
    needs_few = problem.device == "cpu" and flops is not None and flops * FEWER_OPERATIONS < problem.flops
    return _LATER.get(item.candidate.source, 0), not needs_few


def filter_candidates(
    live: Sequence[_Live], problem: Problem, policy: Policy, learned: Sequence[LearnedErratum] = ()
) -> Stage:
    """Drop what its engine refuses or the policy forbids, by notes and by workspace where it is known before building,
    and what failed here before (B8-B12)."""
    limit = workspace_limit_bytes(problem, policy)

    def reason_of(item: _Live) -> str:
        forbidden = _forbidden(item.candidate, problem, policy, limit)
        return forbidden or verdict(learned, problem, item.candidate.config)

    return _split(live, "filter", reason_of)


def _forbidden(candidate: Candidate, problem: Problem, policy: Policy, limit_bytes: int) -> str:
    if candidate.refused:
        return candidate.refused
    notes = set(candidate.notes.numerical)
    if policy.deterministic and not candidate.notes.deterministic:
        return "carries NONDETERMINISTIC and the policy asks for deterministic"
    for note in ALWAYS_DROPPED_NOTES:
        if note in notes and note not in policy.allow_notes:
            return f"carries {note}; allow_notes=({note!r},) lets it through"
    if problem.dtype == "float32" and not policy.allow_tf32 and "TENSOR_CORE" in notes:
        return "carries TENSOR_CORE and the policy does not allow TF32"
    return _over_limit(candidate.workspace_bytes, limit_bytes)


def _over_limit(workspace_bytes: int | None, limit_bytes: int) -> str:
    if workspace_bytes is None or workspace_bytes <= limit_bytes:
        return ""
    return f"workspace {workspace_bytes} bytes is over the limit of {limit_bytes} bytes"


def workspace_limit_bytes(problem: Problem, policy: Policy) -> int:
    """The policy's limit, or what the device's allocator can provide now without evicting live memory (B12)."""
    if policy.workspace_limit_bytes is not None:
        return policy.workspace_limit_bytes
    own = 0 if problem.device == "cuda" else problem.least_bytes
    return max(_free_bytes(problem.device) - own - SAFETY_BYTES, 0)


def _free_bytes(device: str) -> int:
    """What can be had now, without evicting live memory."""
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    import psutil

    return int(psutil.virtual_memory().available)


def build_candidates(live: Sequence[_Live], problem: Problem, policy: Policy) -> Stage:
    """Build each; drop what does not build, and what turns out to need more workspace than allowed.

    What is compiled at run time takes a thousand times longer than the rest. On a GPU it is built by other threads,
    while the rest is verified; `_Live.pending` then has the reason to drop it.
    """
    limit = workspace_limit_bytes(problem, policy)
    later = [item for item in live if problem.device == "cuda" and COMPILED in item.candidate.notes.behavior]
    if later:
        import torch

        index = torch.cuda.current_device()
        for item in later:
            item.pending = _builders(os.getpid()).submit(_build_on, index, item, problem, policy, limit)
    return _split(live, "build", lambda item: "" if item.pending else _build(item, problem, policy, limit))


@functools.lru_cache(maxsize=1)
def _builders(pid: int) -> ThreadPoolExecutor:
    """The threads that build; those of a parent process are of no use after a fork."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(BUILDERS, thread_name_prefix="convplan-build")


def _build_on(index: int, item: _Live, problem: Problem, policy: Policy, limit_bytes: int) -> str:
    import torch

    with torch.cuda.device(index):
        return _build(item, problem, policy, limit_bytes)


def _build(item: _Live, problem: Problem, policy: Policy, limit_bytes: int) -> str:
    try:
        item.built = item.engine.build(problem, item.candidate.config, policy)
    except Exception as exc:  # an engine's failure costs its candidate, never the planning
        return _reason(exc)
    return _over_limit(item.built.workspace_bytes, limit_bytes)


def _search(
    live: Sequence[_Live],
    problem: Problem,
    policy: Policy,
    environment: Environment,
    learned: Sequence[LearnedErratum],
) -> Found | None:
    """Effort `exhaustive`; None, with a warning, where there can be no worker process to do it in."""
    from convplan._search import search_candidates
    from convplan._worker_link import NoWorker

    limit = workspace_limit_bytes(problem, policy)
    proposals = [(item.candidate, item.engine) for item in sorted(live, key=functools.partial(_instant_order, problem))]
    try:
        return search_candidates(
            proposals,
            problem,
            policy,
            environment,
            forbidden=lambda candidate: (
                _forbidden(candidate, problem, policy, limit) or verdict(learned, problem, candidate.config)
            ),
            engines=registry.allowed(policy.engines),
            workspace_limit_bytes=limit,
        )
    except NoWorker as exc:
        warnings.warn(
            f"effort 'exhaustive' needs a worker process, and there is none, so 'measure' it is: {exc}",
            ConvPlanWarning,
            stacklevel=4,
        )
        return None


def _first_that_builds(
    live: Sequence[_Live], problem: Problem, policy: Policy, limit_bytes: int
) -> tuple[list[Evidence], list[Evidence]]:
    """Effort `instant`: the first in order that builds is the choice, the rest stand behind it unbuilt (B14)."""
    rejected: list[Evidence] = []
    for place, item in enumerate(live):
        reason = _build(item, problem, policy, limit_bytes)
        if not reason:
            return [later.evidence() for later in live[place:]], rejected
        rejected.append(item.evidence("build", reason))
    return [], rejected


def _prove_and_time(
    live: Sequence[_Live], problem: Problem, policy: Policy, clock: Clock, stages: _Stages
) -> tuple[list[Evidence], list[Evidence]]:
    """Stages verify, measure and rank, which share one set of tensors."""
    import torch

    if not live:
        return [], []
    device = torch.device(problem.device)
    rejected = _fit_workspace(live, device) if device.type == "cuda" else []
    live = [item for item in live if not any(item.candidate.config == out.config for out in rejected)]
    with torch.no_grad(), _cache_emptied(device):
        synchronize = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
        with stages("verify"):
            verifier = _verifier(problem, device, policy)
            right, wrong = verify_candidates(live, problem, verifier, clock, synchronize)
        with stages("measure"):
            measured, slower = measure_candidates(right, policy, verifier, clock, synchronize)
    ranking = rank(measured, live)
    return ranking, rejected + wrong + slower


def _fit_workspace(live: Sequence[_Live], device: torch.device) -> list[Evidence]:
    """Drop candidates whose workspace cannot be had now (B16).

    The largest is tried first, then halves of it; what fits is freed at once, and torch's allocator keeps it at hand
    for the runs that follow.
    """
    import torch

    need = {item.candidate.config: _built(item).workspace_bytes for item in live if item.pending is None}
    room = min(max(need.values(), default=0), MOST_WORKSPACE_BYTES)
    while room:
        try:
            torch.empty(room, dtype=torch.uint8, device=device)
            break
        except torch.OutOfMemoryError:
            room //= 2
    reason = "out of memory: workspace {} bytes, {} bytes could be allocated"
    return [
        item.evidence("measure", reason.format(need[item.candidate.config], room))
        for item in live
        if need.get(item.candidate.config, 0) > room
    ]


@contextmanager
def _cache_emptied(device: torch.device) -> Iterator[None]:
    """Have torch's CUDA allocator give back what it keeps, before and after, if torch's setting asks for it (B17)."""
    import torch

    # Torch asks this of itself around its own benchmarking; CPU builds do not have it.
    setting = getattr(torch._C, "_cuda_get_conv_benchmark_empty_cache", None)
    wanted = device.type == "cuda" and setting is not None and bool(setting())
    if wanted:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        if wanted:
            torch.cuda.empty_cache()


def _verifier(problem: Problem, device: torch.device, policy: Policy) -> Verifier:
    import torch

    from convplan._verify import Verifier

    needed_bytes, free_bytes = 2 * problem.least_bytes, _free_bytes(device.type)
    if needed_bytes > free_bytes:  # not tried: some systems give out more than they have, and end who uses it
        raise TooLarge(problem=str(problem), needed_bytes=needed_bytes, free_bytes=free_bytes)
    try:
        return Verifier(problem, device, tf32=bool(policy.allow_tf32))
    except torch.OutOfMemoryError as exc:
        raise TooLarge(problem=str(problem), needed_bytes=needed_bytes, free_bytes=free_bytes) from exc


def verify_candidates(
    live: Sequence[_Live],
    problem: Problem,
    verifier: Verifier,
    clock: Clock,
    synchronize: Callable[[], object] | None,
) -> Stage:
    """Run each once on random numbers and once on small integers, and compare with the reference (C3).

    Those so slow that their time can never count are dropped unverified: after their first run, or before it where
    even the machine's peak rate could not make them competitive.
    """
    best_us = float("inf")
    kept: list[_Live] = []
    rejected: list[Evidence] = []
    slack = 1.0 if problem.device == "cuda" else CUTOFF  # on the CPU peak rates are measured, and only roughly
    for item in sorted(live, key=lambda item: (item.pending is not None, _instant_order(problem, item))):
        reason = "" if item.pending is None else item.pending.result()
        if reason:
            rejected.append(item.evidence("build", reason))
            continue
        bound_us = _least_us(item.candidate, problem)
        if bound_us > slack * best_us:
            reason = f"cut off unrun: {bound_us:.0f} us at the machine's peak rate, best so far {best_us:.0f} us"
            rejected.append(item.evidence("measure", reason))
            continue
        stage, reason = _verify(item, verifier, best_us, clock, synchronize)
        if reason:
            rejected.append(item.evidence(stage, reason))
        else:
            best_us = min(best_us, item.first_us)
            kept.append(item)
    survivors = [item for item in kept if item.candidate.config not in verifier.condemned]
    rejected += [
        item.evidence("verify", verifier.condemned[item.candidate.config]) for item in kept if item not in survivors
    ]
    order = {id(item): place for place, item in enumerate(live)}
    return sorted(survivors, key=lambda item: order[id(item)]), rejected


def _verify(
    item: _Live, verifier: Verifier, best_us: float, clock: Clock, synchronize: Callable[[], object] | None
) -> tuple[str, str]:
    """The stage and reason to drop one candidate, empty when it passed; fills in its first time and its error."""
    assert item.built is not None
    run, config, notes = item.built.run, item.candidate.config, item.candidate.notes

    def run_again(*arguments: Any) -> torch.Tensor:
        """The first run may have held one-time work, which must not decide who races."""
        out, time_us = _timed(lambda: run(*arguments), clock, synchronize)
        item.first_us = min(item.first_us, time_us)
        return out

    try:
        out, item.first_us = _timed(lambda: run(*verifier.random, None), clock, synchronize)
        if item.first_us > max(FIRST_RUN_CUTOFF * best_us, FIRST_RUN_GRACE_US):
            return "measure", f"cut off: first run {item.first_us:.0f} us, best so far {best_us:.0f} us"
        item.error = round(verifier.check(config, notes, out), 6)
        item.verified = verifier.scope
        if notes.direct and not verifier.check_exactly(config, run_again):
            item.remark = INEXACT
    except Exception as exc:  # an engine's failure costs its candidate, never the planning
        return "verify" if isinstance(exc, WrongResult) else "run", _reason(exc)
    return "", ""


def _peak_flops_per_us(dtype: str, device: str, threads: int) -> float:
    """A rate no direct method reaches, in operations per microsecond.

    For the CPU: twice the rate of a matrix product of a size that runs near the peak, and for 16-bit types, whose
    matrix units a product of that size may not reach, sixteen times that of float32. Infinite on other devices.
    """
    if device != "cpu":
        return float("inf")
    half = DTYPES[dtype].itemsize_bytes <= 2
    return (16 if half else 2) * measured_flops_per_us("float64" if dtype == "float64" else "float32", threads)


def _least_us(candidate: Candidate, problem: Problem) -> float:
    """Microseconds below which this candidate cannot come; 0 where its operations are unknown or may be skipped."""
    if problem.device == "cuda":
        return _least_us_on_gpu(candidate, problem)
    if candidate.flops is None or not candidate.notes.direct or candidate.flops < 1e9:
        return 0.0
    import torch

    return candidate.flops / _peak_flops_per_us(problem.dtype, problem.device, torch.get_num_threads())


def _least_us_on_gpu(candidate: Candidate, problem: Problem) -> float:
    """By operations where no tensor cores do them, and by the bytes that the method is known to move."""
    if candidate.source == LAST_RESORT:  # what is behind it is torch's secret
        return 0.0
    by_flops = by_bytes = 0.0
    if candidate.flops is not None and "TENSOR_CORE" not in candidate.notes.numerical:
        by_flops = candidate.flops / (gpu_plain_flops_per_us(problem.dtype) or math.inf)
    if candidate.moved_bytes is not None:
        by_bytes = candidate.moved_bytes / (gpu_bytes_per_us() or math.inf)
    return max(by_flops, by_bytes)


def measure_candidates(
    live: Sequence[_Live],
    policy: Policy,
    verifier: Verifier,
    clock: Clock,
    synchronize: Callable[[], object] | None,
) -> tuple[list[tuple[_Live, Measurement]], list[Evidence]]:
    """Race the verified candidates; at most `benchmark_limit` of them, in engine order (B15)."""
    limit = policy.benchmark_limit or len(live)
    rejected = [item.evidence("measure", f"beyond benchmark_limit={limit}") for item in live[limit:]]
    timed = {item.candidate.config: item for item in live[:limit]}
    turns = _turns(verifier, policy)
    calls = {config: _InTurns(_built(item).run, turns) for config, item in timed.items()}
    best_us = min((item.first_us for item in timed.values()), default=0.0)
    once = {config for config, item in timed.items() if not item.candidate.notes.direct}  # not run on integers
    slow = {config for config in once if timed[config].first_us > CUTOFF * best_us}
    contestants = []
    for config, item in timed.items():
        try:
            time_us = _timed(calls[config], clock, synchronize)[1] if config in slow else item.first_us
        except Exception as exc:  # an engine's failure costs its candidate, never the planning
            rejected.append(item.evidence("measure", f"failed while timed: {_reason(exc)}"))
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


class _InTurns:
    """Runs a candidate on several sets of inputs, one after the other."""

    def __init__(self, run: Run, turns: Sequence[Inputs]) -> None:
        self._run, self._turns, self._next = run, turns, 0

    def __call__(self) -> torch.Tensor:
        inputs = self._turns[self._next]
        self._next = (self._next + 1) % len(self._turns)
        return self._run(*inputs, None)


def _turns(verifier: Verifier, policy: Policy) -> list[Inputs]:
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


def _timed(
    call: Callable[[], torch.Tensor], clock: Clock, synchronize: Callable[[], object] | None
) -> tuple[torch.Tensor, float]:
    """A call's result and its microseconds: the host's where calls return when they are done, else the device's."""
    if synchronize is not None:
        from convplan._measure_cuda import launch_us

        return launch_us(call)
    begin = clock()
    out = call()
    return out, (clock() - begin) / 1e3


def _built(item: _Live) -> Built:
    assert item.built is not None
    return item.built


def rank(measured: Sequence[tuple[_Live, Measurement]], live: Sequence[_Live]) -> list[Evidence]:
    """As the race has them, except that those who tie with the fastest are ordered by what does not change from run to
    run: deterministic first, last resorts last, then less workspace, then the engines' order (C5)."""
    if not measured:
        return []
    order = {item.candidate.config: place for place, item in enumerate(live)}

    def tie_order(pair: tuple[_Live, Measurement]) -> tuple[bool, bool, int, int]:
        item, _ = pair
        return (
            not item.candidate.notes.deterministic,
            item.candidate.source == LAST_RESORT,  # what is behind it, and its workspace, are torch's secret
            _built(item).workspace_bytes,
            order[item.candidate.config],
        )

    measured = _with_torch_last(measured)
    leader_us = measured[0][1].median_us
    ties = sorted((pair for pair in measured if pair[1].ties_with_leader(leader_us)), key=tie_order)
    rest = [pair for pair in measured if not pair[1].ties_with_leader(leader_us)]
    return [item.evidence(measured=m) for item, m in (*ties, *rest)]


def _with_torch_last(measured: Sequence[tuple[_Live, Measurement]]) -> Sequence[tuple[_Live, Measurement]]:
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


def verify_plan(plan: Plan, notes: object = None, *, tf32: bool = False) -> tuple[float, str]:
    """Run a built plan on made-up tensors and compare it with the reference.

    Args:
        plan: any built plan.
        notes: its `Notes` as the record holds them; None: a direct method.
        tf32: its record's policy allows TF32.

    Returns:
        Error over tolerance (at most 1), and how much was compared: `full` or `sample`.

    Raises:
        WrongResult: it is wrong.
    """
    import torch

    from convplan._verify import Verifier
    from convplan.engines.base import Notes

    found = notes if isinstance(notes, Notes) else Notes()
    with torch.no_grad():
        verifier = Verifier(plan.problem, torch.device(plan.problem.device), tf32=tf32)
        error = verifier.check(plan.config, found, plan.unchecked_run(*verifier.random, None))
        if found.direct:
            verifier.check_exactly(plan.config, plan.unchecked_run)
    return error, verifier.scope


def _split(live: Sequence[_Live], stage: str, reason_of: Callable[[_Live], str]) -> Stage:
    kept: list[_Live] = []
    rejected: list[Evidence] = []
    for item in live:
        reason = reason_of(item)
        if reason:
            log.debug("%s drops %s: %s", stage, item.candidate.config, reason)
            rejected.append(item.evidence(stage, reason))
        else:
            kept.append(item)
    return kept, rejected


def _reason(exc: Exception) -> str:
    if isinstance(exc, PlanRejected):
        return exc.reason
    if isinstance(exc, ConvPlanError):
        return str(exc)
    return f"{type(exc).__name__}: {first_line(exc)}"

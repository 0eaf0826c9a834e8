"""Effort `exhaustive`: try what the engines propose and then what their knobs offer, in a worker process, on a budget.

Nothing unproven runs in this process. Every candidate is built, verified and timed in a worker (`_worker`, spoken to
through `_worker_link`), the leaders race there, and only the winner is built here, where it is verified once more.
Where to look next is `_walk`'s business.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import torch

from convplan._environment import Environment
from convplan._errors import PlanRejected, WrongResult
from convplan._measure import CUTOFF, first_line
from convplan._plan import Evidence, Plan
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._proof import verify_plan
from convplan._torch_state import torch_state
from convplan._walk import Walk
from convplan._worker_link import Lost, NoWorker, WorkerLink
from convplan._worker_messages import EngineSpec, Race, Raced, Racer, Setup, Tried, Try, kind_of
from convplan.engines.base import SEARCHED, Candidate, Engine, EngineConfig, Remakable, Searchable, Space, support

log = logging.getLogger("convplan.search")

RACE_SHARE = 0.2  # of the time, for the race at the end
LEADERS = 12
LEADING = 1.3  # times the best first sample: who is that close may have had bad luck
RACES = 4  # at most, when racers take workers along
MOST_TRIES = 5_000
OVERTIME_S = 30.0  # past the budget, while nothing usable was found at all
FILTERED_SHOWN = 3  # of one engine's forbidden configurations, among those that nobody proposed


class Found(NamedTuple):
    """What a search leaves for the record."""

    ranking: list[Evidence]
    rejected: list[Evidence]
    curve: tuple[tuple[float, float], ...]


def search_candidates(
    proposals: Sequence[tuple[Candidate, Engine]],
    problem: Problem,
    policy: Policy,
    environment: Environment,
    *,
    forbidden: Callable[[Candidate], str],
    engines: Sequence[Engine],
    workspace_limit_bytes: int,
    on_worker: Callable[[WorkerLink], object] = lambda _: None,
) -> Found:
    """Search for at most `policy.search_s` seconds and what the candidate takes that is under way then.

    Args:
        proposals: what the engines propose and the policy allows, in the order in which to try it.
        problem, policy, environment: the question, as for `plan_problem`.
        forbidden: why the policy forbids a candidate, or empty.
        engines: whose knobs to walk.
        workspace_limit_bytes: what a built candidate may need.
        on_worker: told of the link before the search begins.

    Raises:
        NoWorker: no worker process can be had, so nothing was tried.
    """
    setup = Setup(
        problem=problem,
        policy=policy,
        environment=environment,
        engines=tuple(_spec(engine) for engine in engines),
        torch=torch_state(),
        device_index=torch.cuda.current_device() if problem.device == "cuda" else -1,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    with WorkerLink(setup) as link:
        on_worker(link)
        search = _Search(problem, policy, link, forbidden, {engine.name: engine for engine in engines})
        link.start()
        search.try_proposals(proposals)
        search.walk()
        ranking = search.race()
    return search.found(ranking)


def _spec(engine: Engine) -> EngineSpec:
    maker, payload = "", b""
    if isinstance(engine, Remakable):
        try:
            maker, payload = engine.remake()
        except Exception as exc:  # an engine's failure costs its candidates, never the search
            log.info("engine %s cannot be remade: %s: %s", engine.name, type(exc).__name__, first_line(exc))
    return EngineSpec(engine.name, kind_of(engine), maker, payload)


class _Search:
    def __init__(
        self,
        problem: Problem,
        policy: Policy,
        link: WorkerLink,
        forbidden: Callable[[Candidate], str],
        engines: dict[str, Engine],
    ) -> None:
        self._problem, self._policy, self._link = problem, policy, link
        self._forbidden, self._engines = forbidden, engines
        self._begin = time.perf_counter()
        self._usable: dict[EngineConfig, tuple[Candidate, Tried]] = {}  # in the order of trying
        self._tried: list[tuple[EngineConfig, float | None, float]] = []  # with time and cost, for the walk
        self._rejected: list[Evidence] = []
        self._curve: list[tuple[float, float]] = []
        self._over = ""  # why no more can be tried

    # --- trying -------------------------------------------------------------------------------------------------------

    @property
    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._begin

    @property
    def _race_s(self) -> float:
        return min(RACE_SHARE * self._policy.search_s, 2 * self._policy.budget_s)

    @property
    def _best_us(self) -> float | None:
        return self._curve[-1][1] if self._curve else None

    def _time_is_up(self) -> bool:
        limit_s = self._policy.search_s - self._race_s if self._usable else self._policy.search_s + OVERTIME_S
        return self._elapsed_s >= limit_s

    def try_proposals(self, proposals: Sequence[tuple[Candidate, Engine]]) -> None:
        """What the engines propose comes first: knobs are walked from there."""
        told: set[str] = set()
        for candidate, engine in proposals:
            reason = self._link.missing.get(engine.name, "")
            if reason:
                if engine.name not in told:
                    self._reject(Candidate(EngineConfig(engine.name)), "enumerate", reason)
                told.add(engine.name)
            elif self._over:
                self._reject(candidate, "measure", f"not tried: {self._over}")
            elif self._time_is_up():
                self._reject(candidate, "measure", f"not tried: search_s = {self._policy.search_s:g} was over")
            else:
                self._try(candidate)

    def _try(self, candidate: Candidate) -> float | None:
        """Have one candidate tried, and take down what came of it."""
        begin = time.perf_counter()
        time_us = self._answer(candidate)
        self._tried.append((candidate.config, time_us, time.perf_counter() - begin))
        if time_us is not None and (self._best_us is None or time_us < self._best_us):
            self._curve.append((round(self._elapsed_s, 3), round(time_us, 3)))
            log.info("after %.1f s: %s, %.1f us", self._elapsed_s, candidate.config, time_us)
        return time_us

    def _answer(self, candidate: Candidate) -> float | None:
        for attempt in range(2):
            try:
                tried = self._link.tried(Try(candidate, self._best_us))
            except Lost as exc:
                log.info("%s: %s", candidate.config, exc)
                if exc.from_outside and attempt == 0:
                    continue  # once may be an accident
                self._reject(candidate, exc.stage, exc.reason)
                return None
            except NoWorker as exc:
                self._over = str(exc)
                self._reject(candidate, "measure", f"not tried: {exc}")
                return None
            if tried.evidence.rejected:
                self._rejected.append(tried.evidence)
                return tried.first_us or None  # how slow it is, where that is why
            self._usable[candidate.config] = (candidate, tried)
            return tried.evidence.median_us
        raise AssertionError("convplan bug: the second attempt returns")

    def _reject(self, candidate: Candidate, stage: str, reason: str) -> None:
        self._rejected.append(
            Evidence(
                config=candidate.config,
                source=candidate.source,
                notes=candidate.notes,
                workspace_bytes=candidate.workspace_bytes,
                rejected=stage,
                reason=reason,
            )
        )

    # --- walking ------------------------------------------------------------------------------------------------------

    def walk(self) -> None:
        """Try what nobody proposed, while there is time."""
        walk = Walk(self._spaces())
        for config, time_us, cost_s in self._tried:
            walk.learn(config, time_us, cost_s)
        seen = {config for config, _, _ in self._tried} | {evidence.config for evidence in self._rejected}
        filtered: dict[str, int] = {}
        while self._usable and not self._over and not self._time_is_up() and len(self._tried) < MOST_TRIES:
            proposed = walk.propose()
            if proposed is None:
                return
            if proposed in seen:
                continue
            begin = time.perf_counter()
            candidate, reason = self._candidate(proposed)
            if reason:
                filtered[proposed.engine] = filtered.get(proposed.engine, 0) + 1
                if filtered[proposed.engine] <= FILTERED_SHOWN:
                    self._reject(candidate, "filter", reason)
                walk.learn(proposed, None, time.perf_counter() - begin)
                continue
            time_us = self._try(candidate)
            walk.learn(proposed, time_us, time.perf_counter() - begin)

    def _spaces(self) -> list[tuple[str, Space]]:
        found: list[tuple[str, Space]] = []
        for engine in self._engines.values():
            if engine.name in self._link.missing or not isinstance(engine, Searchable):
                continue
            try:
                if support(engine, self._problem).ok:
                    found += [(engine.name, space) for space in engine.spaces(self._problem)]
            except Exception as exc:  # an engine's failure costs its own knobs, never the search
                log.info("engine %s does not tell its knobs: %s: %s", engine.name, type(exc).__name__, first_line(exc))
        return found

    def _candidate(self, config: EngineConfig) -> tuple[Candidate, str]:
        """The candidate of a configuration, and why it must not be tried."""
        engine = self._engines[config.engine]
        assert isinstance(engine, Searchable)
        try:
            found = engine.candidate(self._problem, config)
        except Exception as exc:  # an engine's failure costs its candidate, never the search
            reason = exc.reason if isinstance(exc, PlanRejected) else f"{type(exc).__name__}: {first_line(exc)}"
            return Candidate(config, source=SEARCHED), reason
        return msgspec.structs.replace(found, source=SEARCHED), self._forbidden(found)

    # --- the end ------------------------------------------------------------------------------------------------------

    def race(self) -> list[Evidence]:
        """The leaders against each other, in the worker; the ranking of those that came through."""
        patience: set[EngineConfig] = set()
        for _ in range(RACES):
            racers = self._racers()
            if len(racers) < 2 or self._over:
                break
            try:
                raced = self._link.raced(Race(tuple(racers), self._race_s))
            except NoWorker as exc:
                self._over = str(exc)
                break
            except Lost as exc:
                raced = Raced((), unfit=exc.reason, config=exc.config, stage=exc.stage)
                if exc.from_outside and exc.config is not None and exc.config not in patience:
                    patience.add(exc.config)  # once may be an accident
                    continue
            if raced.ranking:
                for evidence in raced.rejected:
                    self._drop(evidence.config, evidence.rejected, evidence.reason)
                return list(raced.ranking)
            log.info("the race broke off: %s", raced.unfit or "nobody finished")
            if raced.config is not None:
                self._drop(raced.config, raced.stage, f"in the last race: {raced.unfit}")
            for evidence in raced.rejected:
                self._drop(evidence.config, evidence.rejected, evidence.reason)
        return []

    def _racers(self) -> list[Racer]:
        best_us = min((_median_us(tried) for _, tried in self._usable.values()), default=0.0)
        leading = [config for config, (_, tried) in self._usable.items() if _median_us(tried) <= LEADING * best_us]
        fastest = set(sorted(leading, key=lambda config: _median_us(self._usable[config][1]))[:LEADERS])
        return [
            Racer(candidate, tried.first_us, tried.evidence.error, tried.evidence.verified)
            for config, (candidate, tried) in self._usable.items()
            if config in fastest
        ]

    def _drop(self, config: EngineConfig, stage: str, reason: str) -> None:
        _, tried = self._usable.pop(config)
        self._rejected.append(msgspec.structs.replace(tried.evidence, rejected=stage, reason=reason))

    def found(self, raced: list[Evidence]) -> Found:
        """The ranking: the race's, then the others by their first sample, the first of which is proven here."""
        in_race = {evidence.config for evidence in raced}
        others = [tried.evidence for config, (_, tried) in self._usable.items() if config not in in_race]
        ranking = [*raced, *sorted(others, key=_us)]
        # First samples are compared with first samples: those of the race are another hour's.
        best_us = min((_median_us(tried) for _, tried in self._usable.values()), default=0.0)
        far = [evidence for evidence in ranking if evidence in others and _us(evidence) > CUTOFF * best_us]
        ranking = self._proven([evidence for evidence in ranking if evidence not in far])
        if ranking:
            for evidence in far:
                reason = f"cut off: {_us(evidence):.1f} us, {_us(evidence) / best_us:.1f} x the best"
                self._rejected.append(msgspec.structs.replace(evidence, rejected="measure", reason=reason))
        else:
            ranking = self._proven(far)  # slow is better than nothing
        if ranking:
            self._curve.append((round(self._elapsed_s, 3), _us(ranking[0])))
        return Found(ranking, self._rejected, tuple(self._curve))

    def _proven(self, ranking: list[Evidence]) -> list[Evidence]:
        """The ranking from the first on that builds and is right in this process too."""
        for place, evidence in enumerate(ranking):
            stage, reason = self._trouble_here(evidence)
            if not stage:
                return ranking[place:]
            reason = f"passed in the worker process, not in this one: {reason}"
            self._rejected.append(msgspec.structs.replace(evidence, rejected=stage, reason=reason))
        return []

    def _trouble_here(self, evidence: Evidence) -> tuple[str, str]:
        stage = "build"
        try:
            built = self._engines[evidence.config.engine].build(self._problem, evidence.config, self._policy)
            stage = "run"
            plan = Plan(self._problem, evidence.config, built)
            verify_plan(plan, evidence.notes, tf32=bool(self._policy.allow_tf32))
        except Exception as exc:  # an engine's failure costs its candidate, never the search
            reason = exc.reason if isinstance(exc, PlanRejected) else f"{type(exc).__name__}: {first_line(exc)}"
            return "verify" if isinstance(exc, WrongResult) else stage, reason
        return "", ""


def _median_us(tried: Tried) -> float:
    return _us(tried.evidence)


def _us(evidence: Evidence) -> float:
    return evidence.median_us or 0.0

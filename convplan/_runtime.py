"""Running convolutions by their choices: plans ready to run, and what to do when one fails.

Two levels of memory, both least-recently-used and of the same limit:

    choice   problem + policy + environment -> ranked record. One for the process, shared by all threads (B22).
    caller   the arguments of a call as they came -> something that runs. One per thread; a hit does nothing but this
             look-up and the call.

How a choice is made, and when it changes, is `_deciding`'s business. When a plan fails while it runs, the next-ranked
takes over (B23).
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import msgspec

from convplan import _environment
from convplan._choices import Layer, known, state
from convplan._counts import cache_limit, counts, warn_once
from convplan._deciding import build, decide, is_settled, plan_now, ready_choice
from convplan._errors import CaptureMiss, ConvPlanError, ExecutionFailed, NoPlan
from convplan._lru import LeastRecentlyUsed
from convplan._measure import first_line
from convplan._plan import Evidence, Plan, PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._ranges import ranged
from convplan._relatives import RELATIVE
from convplan.engines import registry

if TYPE_CHECKING:
    import torch

    from convplan.engines.base import Run

log = logging.getLogger("convplan.runtime")

MOST_SEEN = 4_096  # weights
MOST_OF_ONE_SIZE = 4  # calls that differ in something else


class _Anchor:
    """Lives as long as a thread's local storage."""


class Callers(LeastRecentlyUsed[Hashable, Callable[..., Any]]):
    """Plans of one thread that are ready to run, with the thread's count of hits beside them."""

    def __init__(self, limit: int, hits: list[int]) -> None:
        super().__init__(limit)
        self.hits = hits

    def used(self, key: Hashable) -> Callable[..., Any] | None:
        """What is kept for a key, which counts as a hit. (`override` and `normalized` spare themselves the call.)"""
        caller = self.get(key)
        if caller is not None:
            self.hits[0] += 1
            if self.crowded:
                self.move_to_end(key)
        return caller


class Local(threading.local):
    """What each thread has of its own: plans that are ready to run, and its count of hits."""

    def __init__(self) -> None:
        self.anchor = _Anchor()
        self.hits = counts.new_hit_cell(self.anchor)
        self.token = -1
        self.callers = Callers(cache_limit(), self.hits)
        # The dispatcher's side keeps its last call of each weight here, by the weight's address.
        self.forwards: dict[int, Any] = {}
        self.backwards: dict[int, Any] = {}
        # And some by the sizes of input and weight, for weights that are somewhere else in every step.
        self.forward_sizes: dict[Any, list[Any]] = {}
        self.backward_sizes: dict[Any, list[Any]] = {}

    def keep_seen(self, table: dict[int, Any], address: int, seen: Any) -> None:
        """Keep a call in one of the tables, which never hold more than a small cache does."""
        if len(table) >= MOST_SEEN:
            table.clear()
        table[address] = seen

    def keep_by_size(self, table: dict[Any, list[Any]], sizes: Hashable, seen: Any) -> None:
        """The same with a table by sizes, where a few may have the same."""
        if len(table) >= MOST_SEEN:
            table.clear()
        kept = table.setdefault(sizes, [])
        kept.insert(0, seen)
        del kept[MOST_OF_ONE_SIZE:]

    def remember(self, key: Hashable, token: int, caller: Callable[..., Any], device: int) -> None:
        """Keep a caller; those of an earlier token (another policy, other engines) are dropped first.

        While problems are captured nothing is kept, so that every call is seen; nor while a CUDA graph is, when a
        caller may stand in for a plan that could not be built.
        """
        if state.captures or in_graph_capture(device):
            return
        if self.token != token or self.callers.limit != cache_limit():
            self.callers = Callers(cache_limit(), self.hits)
            self.token = token
            self._forget_seen()
        self.callers.add(key, caller)
        if self.callers.crowded:  # it matters now who is used, so that every call must go by its key
            self._forget_seen()

    def _forget_seen(self) -> None:
        for table in (self.forwards, self.backwards, self.forward_sizes, self.backward_sizes):
            table.clear()


def in_graph_capture(device: int) -> bool:
    """Whether a CUDA graph is being captured on the calling thread's stream; `device` is its index, -1 the CPU."""
    if device < 0:
        return False
    import torch

    return torch.cuda.is_current_stream_capturing()


def on_device(device: int) -> AbstractContextManager[object]:
    """A block in which GPU number `device` is the current one; nothing for the CPU (-1)."""
    if device < 0:
        return nullcontext()
    import torch

    return torch.cuda.device(device)


local = Local()


def forget() -> None:
    """Drop every choice, relative and ready plan of this process; the store keeps its rows."""
    known.forget()


class Runner:
    """Runs one problem by its choice: `runner(first, second, bias, out)`, with what else its `Run` takes behind that.

    Belongs to one thread and one device. While its choice is provisional, each call counts as one more sighting of the
    problem. While a CUDA graph is captured nothing is planned, built or counted: one that is made then runs by the plan
    that `tune` made ready.

    Args:
        problem, policy, layer: as for `decide`.
        device: index of the GPU, -1 for the CPU.

    Attributes:
        layer: whose call comes next, while calls count.
        settled: they do not count any more: nothing but a new token can change the choice.

    Raises:
        NoPlan: as `decide`. CaptureMiss: a CUDA graph is being captured, and no plan is ready.
    """

    def __init__(self, problem: Problem, policy: Policy, device: int = -1, layer: Layer | None = None) -> None:
        self.layer = layer
        self._problem = problem
        self._policy = policy
        self._device = device
        with on_device(device):
            if in_graph_capture(device):
                self._take_ready()
            else:
                self._choice, record = decide(problem, policy, layer)
                self._take(record)
        self._fresh = True

    def _take_ready(self) -> None:
        """Run by what was made ready before the capture. It is not used up: each call of the capture asks for it."""
        found = ready_choice(self._problem, self._policy, self._device)
        if found is not None:
            self._choice, ready = found
            try:
                self._take(ready.record, ready.plan)
                return
            except ConvPlanError as exc:  # something is left to be made for this thread
                log.info("what is ready cannot be captured (%s): %s", exc, self._problem)
        counts.add("capture_misses")
        raise CaptureMiss(problem=str(self._problem), policy=str(self._policy))

    def _take(self, record: PlanRecord, ready: Plan | None = None) -> None:
        self._record = record
        self.settled = self._choice.gave_up or is_settled(record, self._policy.resolve())
        self._plan = ready or self._build()
        self._run: Run = ranged(self._plan.bound_run(), self._plan)
        log.debug("%s runs by %s (effort %s)", self._problem, self._plan.config, self._record.effort)

    def _build(self) -> Plan:
        """Build the record's choice, or the first of those ranked after it that still builds."""
        ready = self._choice.take_ready(self._record)
        if ready is not None:
            return ready
        tried = []
        for record in self._records():
            for rank in range(len(record.ranking)):
                try:
                    plan = build(record, rank)
                except ConvPlanError as exc:
                    tried.append((str(record.ranking[rank].config), str(exc)))
                else:
                    self._record = record
                    return plan
        raise NoPlan(problem=str(self._problem), policy=str(self._policy), rejections=tried)

    def _records(self) -> Iterator[PlanRecord]:
        """Where plans are looked for: the record, and behind one taken over from relatives the engines' own choice."""
        yield self._record
        if not any(evidence.source == RELATIVE for evidence in (*self._record.ranking, *self._record.rejected)):
            return
        with self._choice.lock, on_device(self._device):
            other = self._choice.record
            if other is None or other is self._record:  # else another thread has moved on already
                environment = _environment.current(self._problem.device)
                try:
                    other = plan_now(
                        self._choice, self._problem, self._policy.resolve(), environment, "instant", keep=False
                    )
                except NoPlan:
                    return
                self._choice.record = other
                self._choice.has_near_relative = False
        yield other

    def __call__(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        *more: torch.Tensor | None,
    ) -> torch.Tensor:
        if not self.settled or self._choice.record is not self._record:
            self._look_again()
        try:
            return self._run(first, second, bias, out, *more)
        except Exception as exc:  # whatever an engine raises, the convolution must still be computed
            return self._next_ranked(exc, first, second, bias, out, *more)

    @property
    def unwatched(self) -> Run | None:
        """The bare plan once nothing but a new token can change the choice; its failures are for `recover`."""
        return self._run if self.settled else None

    @property
    def plan(self) -> Plan:
        """What runs the problem now."""
        return self._plan

    @property
    def settled_as(self) -> str:
        """The entry of torch that the settled plan is nothing but a call of; empty while it may still change."""
        return self._plan.as_torch if self.settled else ""

    def recover(
        self,
        exc: Exception,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
        *more: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute what the bare plan failed to, by the plans ranked behind it.

        Raises:
            ExecutionFailed: they fail as well.
        """
        return self._next_ranked(exc, first, second, bias, out, *more)

    def _look_again(self) -> None:
        """Count one more sighting of a provisional choice; take over the record when another one was chosen."""
        with on_device(self._device):
            if in_graph_capture(self._device):
                log.info("a CUDA graph keeps an untuned plan, more calls before its capture tune it: %s", self._problem)
                return
            record = self._choice.record
            if self._fresh:  # the sighting that made this runner is counted already
                self._fresh = False
            elif not self.settled:
                self._choice, record = decide(self._problem, self._policy, self.layer)
            if record is not None and record is not self._record:
                self._take(record)

    def _next_ranked(
        self,
        exc: Exception,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        *more: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the best-ranked plan that works, and demote those that failed for the rest of the process (B18, B23)."""
        counts.add("failed")
        failed = {self._plan.config: first_line(exc)}
        drop_tensors(exc)
        if in_graph_capture(self._device):
            raise ExecutionFailed(plan=str(self._problem), tried=[(str(self._plan.config), first_line(exc))]) from exc
        for record in self._records():
            for rank, evidence in enumerate(record.ranking):
                if evidence.config in failed:
                    continue
                try:
                    with on_device(self._device):
                        plan = build(record, rank)
                    result = plan.unchecked_run(first, second, bias, out, *more)
                except Exception as next_exc:  # same as above: try the one after
                    failed[evidence.config] = first_line(next_exc)
                    drop_tensors(next_exc)
                    continue
                warn_once(
                    f"plan {self._plan.config} failed ({first_line(exc)}); using {plan.config} for {self._problem}"
                )
                counts.add("fell_back")
                self._demote(record, failed)
                self._plan, self._run = plan, ranged(plan.unchecked_run, plan)
                return result
        tried = [(str(config), reason) for config, reason in failed.items()]
        raise ExecutionFailed(plan=str(self._problem), tried=tried) from exc

    def _demote(self, record: PlanRecord, failed: dict[Any, str]) -> None:
        """Re-rank: what failed goes to the rejected, in this process only, since memory may be short for now alone."""

        def with_reason(evidence: Evidence) -> Evidence:
            return msgspec.structs.replace(evidence, rejected="run", reason=failed[evidence.config])

        with self._choice.lock:
            self._record = msgspec.structs.replace(
                record,
                ranking=tuple(e for e in record.ranking if e.config not in failed),
                rejected=(*record.rejected, *(with_reason(e) for e in record.ranking if e.config in failed)),
            )
            self._choice.record = self._record
        state.touch()  # callers of every thread look again


def drop_tensors(exc: BaseException) -> None:
    """Let go of what the frames of a failed run hold: its output may be just the memory that the next plan needs."""
    traceback.clear_frames(exc.__traceback__)


def check_policy(policy: Policy) -> Policy:
    """The policy itself, after making sure that the engines it names exist.

    Raises:
        PolicyError: one does not; lists those that do.
    """
    if not isinstance(policy, Policy):
        from convplan._errors import PolicyError

        raise PolicyError(f"policy is {policy!r}, expected a convplan.Policy or None")
    registry.allowed(policy.engines)
    return policy

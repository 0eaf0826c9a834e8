"""Benchmark problems with a process for each side, through shared, shuffled rounds: what `convplan bench` does.

Stock torch's cuDNN backend fills its cache of plans by whichever mode runs a problem first, and planning runs problems.
So stock torch is timed where nothing else ever ran (`_bench_child`), and convplan in a process of its own, as in a
user's program. In every round each side is asked for one sample, in random order, while the others wait: all meet the
same clocks and the same temperature.

A side that fails, hangs or dies costs its problem: that is noted with how it ended, the side is started again, and the
next problem is compared. Nothing here computes or prints.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from convplan._bench import (
    HOST_CLOCK,
    MAX_REPEATS,
    MAX_ROUNDS,
    MIN_ROUNDS,
    MIN_SAMPLE_US,
    SLOW_ROUNDS,
    SLOW_US,
    BenchReport,
    Comparison,
    Failure,
    Timing,
    bench_report,
    comparison,
)
from convplan._bench_child import (
    SIDES,
    Answer,
    Failed,
    Kernels,
    LookAtKernels,
    MeasureRegret,
    Prepare,
    Ready,
    RegretFound,
    Request,
    Sample,
    SideName,
    Take,
)
from convplan._child import Child, ChildDied, ChildLate
from convplan._policy import Policy
from convplan._problem_files import NamedProblem
from convplan._regret import Regret

MODULE = "convplan._bench_child"

Expected = TypeVar("Expected", Ready, Sample, Kernels, RegretFound)
Progress = Callable[[int, int, str], object]


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How problems are compared.

    Args:
        seconds: rounds of one problem go on until they have taken that long, and for a least number of them.
        rounds: exactly that many, whatever they take.
        compile: also time `torch.compile`, for forward problems.
        regret: so many tunings of each problem, for the regret of the choice; 0: none.
        benchmark: stock torch's benchmark mode.
        benchmark_limit: how many candidates that tries; None: as torch has it by default; 0: all.
        kernels: name both sides' kernels where convplan loses on a GPU, which restarts both processes.
        seed: of the order inside the rounds.
        prepare_s: deadline for a side to make ready, on top of what the policy lets planning take.
        compile_s: the same for `torch.compile`.
        sample_s: deadline for one sample, on top of ten times what it should take.
    """

    seconds: float = 2.0
    rounds: int | None = None
    compile: bool = False
    regret: int = 0
    benchmark: bool = True
    benchmark_limit: int | None = None
    kernels: bool = True
    seed: int = 0
    prepare_s: float = 180.0
    compile_s: float = 400.0
    sample_s: float = 60.0

    @property
    def stock(self) -> str:
        """How stock torch is set on a GPU, in words."""
        if not self.benchmark:
            return "benchmark off"
        limit = {None: "torch's default limit", 0: "no limit"}.get(
            self.benchmark_limit, f"limit {self.benchmark_limit}"
        )
        return f"benchmark on from the first call, {limit}"


class SideFailed(Exception):
    """One side could not do what was asked of it.

    Attributes:
        side: its name.
        reason: how it ended, in words.
    """

    def __init__(self, side: str, reason: str) -> None:
        super().__init__(f"{side}: {reason}")
        self.side = side
        self.reason = reason


class Bench:
    """The sides' processes, started when first used and again whenever one is lost. Use as a context manager.

    Args:
        policy: convplan's; each problem decides TF32 where it leaves that open.
        options: how to compare.
        module: the program of a side; another one in tests.
    """

    def __init__(
        self, policy: Policy | None = None, options: BenchOptions | None = None, *, module: str = MODULE
    ) -> None:
        self.policy = policy or Policy()
        self.options = options or BenchOptions()
        self.environments: set[str] = set()
        self._module = module
        self._children: dict[SideName, Child] = {}

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for side in tuple(self._children):
            self._stop(side)

    def compare(self, named: NamedProblem) -> tuple[Comparison | None, list[Failure]]:
        """Time one problem on every side.

        Returns:
            What was found, None when stock torch or convplan failed; and what failed.
        """
        failures: list[Failure] = []

        def note(exc: SideFailed) -> None:
            failures.append(Failure(named.name, named.suite, exc.side, exc.reason))

        sides: tuple[SideName, ...] = ("stock", "convplan")
        if self.options.compile and named.op == "fprop" and not named.problem.is_empty:
            sides = SIDES
        self._start(sides)
        try:
            return self._compare(named, sides, note), failures
        except SideFailed as exc:
            note(exc)
            return None, failures

    def _compare(
        self, named: NamedProblem, sides: Sequence[SideName], note: Callable[[SideFailed], object]
    ) -> Comparison:
        ready: dict[SideName, Ready] = {}
        for side in sides:  # one after the other: planning and stock torch's search want the machine for themselves
            try:
                ready[side] = self._prepare(side, named)
            except SideFailed as exc:
                if side != "compile":
                    raise
                note(exc)
        samples, units = self._rounds(ready)
        ours = ready["convplan"]
        self.environments.add(ours.environment)
        timings = {side: Timing.of(one.call, samples[side], one.how) for side, one in ready.items()}
        found = comparison(
            named,
            timings["stock"],
            timings["convplan"],
            repeats=units,
            problem=ours.problem,
            from_plan=ours.from_plan,
            compiled=timings.get("compile"),
            regret=self._regret(ours, note),
            **ours.plan,
        )
        return self._with_kernels(found) if found.is_loss and self.options.kernels else found

    def _prepare(self, side: SideName, named: NamedProblem) -> Ready:
        options, policy = self.options, self.policy
        deadline_s = options.compile_s if side == "compile" else options.prepare_s
        if side == "convplan":
            deadline_s += 20 * policy.budget_s + (3 * policy.search_s if policy.effort == "exhaustive" else 0)
        request = Prepare(
            named=named,
            policy=policy,
            threads=_threads(),
            benchmark=options.benchmark,
            benchmark_limit=options.benchmark_limit,
        )
        return self._ask(side, request, Ready, deadline_s)

    def _rounds(self, ready: dict[SideName, Ready]) -> tuple[dict[SideName, list[float]], int]:
        """One sample of each side in every round, and how many units made one."""
        options = self.options
        fastest_us, slowest_us = (bound(one.unit_us for one in ready.values()) for bound in (min, max))
        slow = slowest_us > SLOW_US
        units = 1 if slow else min(max(math.ceil(MIN_SAMPLE_US / max(fastest_us, 1e-3)), 1), MAX_REPEATS)
        deadline_s = options.sample_s + 10 * units * slowest_us / 1e6
        samples: dict[SideName, list[float]] = {side: [] for side in ready}
        order, shuffle = list(ready), random.Random(options.seed).shuffle
        least = SLOW_ROUNDS if slow else MIN_ROUNDS
        end = time.perf_counter() + options.seconds
        for done in range(MAX_ROUNDS if options.rounds is None else options.rounds):
            if options.rounds is None and done >= least and time.perf_counter() >= end:
                break
            shuffle(order)
            for side in order:
                samples[side].append(self._ask(side, Take(units), Sample, deadline_s).us)
        return samples, units

    def _regret(self, ours: Ready, note: Callable[[SideFailed], object]) -> Regret | None:
        repeats, policy = self.options.regret, self.policy
        if not repeats or not ours.plan:
            return None
        seconds = max(self.options.seconds, 0.1)
        once_s = self.options.prepare_s + 20 * policy.budget_s
        try:
            found = self._ask("convplan", MeasureRegret(repeats, seconds), RegretFound, repeats * once_s + 10 * seconds)
        except SideFailed as exc:
            note(exc)
            self._start(("convplan",))
            return None
        return found.regret

    def _with_kernels(self, found: Comparison) -> Comparison:
        """The comparison with the names of the kernels, where there is a GPU to ask."""
        if found.stock.how == HOST_CLOCK:
            return found
        sides: tuple[SideName, ...] = ("stock", "convplan")
        try:
            names = [self._ask(side, LookAtKernels(), Kernels, self.options.sample_s).names for side in sides]
        except SideFailed:
            return found
        finally:
            for side in sides:  # a process that was profiled may launch more slowly ever after
                self._stop(side)
        stock, ours = (
            msgspec.structs.replace(timing, kernels=kernels)
            for timing, kernels in zip((found.stock, found.convplan), names, strict=True)
        )
        return msgspec.structs.replace(found, stock=stock, convplan=ours)

    # ---- processes

    def _start(self, sides: Sequence[SideName]) -> None:
        """All at once: importing torch takes its time in each."""
        for side in sides:
            if side not in self._children:
                self._children[side] = Child(self._module, [side])

    def _stop(self, side: SideName) -> None:
        child = self._children.pop(side, None)
        if child is not None:
            child.close()

    def _ask(self, side: SideName, request: Request, expected: type[Expected], deadline_s: float) -> Expected:
        child = self._children[side]
        try:
            child.send(msgspec.json.encode(request))
            answer = msgspec.json.decode(child.receive(deadline_s), type=Answer)
        except ChildLate as exc:
            child.kill()
            self._stop(side)
            raise SideFailed(side, f"{exc}, given up") from exc
        except ChildDied as exc:
            self._stop(side)
            raise SideFailed(side, str(exc)) from exc
        except msgspec.MsgspecError as exc:
            self._stop(side)
            raise SideFailed(side, f"answered what is no answer: {exc}") from exc
        if isinstance(answer, expected):
            return answer
        assert isinstance(answer, Failed), f"{side} answered {answer!r}"
        if not answer.usable:
            self._stop(side)
        raise SideFailed(side, f"{answer.kind}: {answer.message}")


def run_bench(
    problems: Sequence[NamedProblem],
    policy: Policy | None = None,
    options: BenchOptions | None = None,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    found: Callable[[Comparison], Any] | None = None,
) -> BenchReport:
    """Compare each problem, and put together what a reader needs.

    Args:
        problems: of a file.
        policy, options: see `Bench`.
        progress: called as `progress(done, total, name)` before and after each.
        stop: asked before each problem; True ends the run there.
        found: called with each comparison as soon as it is there.
    """
    comparisons: list[Comparison] = []
    failures: list[Failure] = []
    tell = progress or (lambda done, total, name: None)
    with Bench(policy, options) as bench:
        for done, named in enumerate(problems):
            if stop is not None and stop():
                break
            tell(done, len(problems), named.name)
            one, failed = bench.compare(named)
            failures += failed
            if one is not None:
                comparisons.append(one)
                if found is not None:
                    found(one)
            tell(done + 1, len(problems), named.name)
        return bench_report(
            comparisons,
            bench.policy,
            failures=failures,
            environments=bench.environments,
            stock=bench.options.stock,
        )


def _threads() -> int:
    import torch

    return torch.get_num_threads()

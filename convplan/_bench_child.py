"""The program of one side of a benchmark: `python -m convplan._bench_child stock|convplan|compile`.

It is told a problem, makes its tensors and its call, warms up, and then gives one sample each time it is asked, so that
whoever asks can interleave several such processes. Stock torch is alone in its process: its benchmark mode is on from
the first call, and nothing of convplan plans or runs there. What is compared, and when, is the business of
`_bench_processes`; the calls are made in `_bench_calls`.

On the CPU a sample is timed by the host's clock. On a GPU it is the middle of many replays of a CUDA graph, each timed
by events, so it holds no gap between launches; a call that cannot be captured is launched as often in a row.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from convplan._bench import EVENTS, GRAPH, HOST_CLOCK, SLOW_US, plan_facts
from convplan._bench_calls import Call, Side, make_tensors, our_side, runs_a_ready_plan, stock_side
from convplan._child import connection_to_parent
from convplan._errors import ConvPlanError
from convplan._measure import first_line
from convplan._policy import Policy
from convplan._problem_files import NamedProblem
from convplan._regret import Regret, measure_regret

if TYPE_CHECKING:
    from convplan._measure_cuda import GraphTimer
    from convplan._plan import PlanRecord

SideName = Literal["stock", "convplan", "compile"]
SIDES: tuple[SideName, ...] = ("stock", "convplan", "compile")
COMPILE_MODE = "max-autotune-no-cudagraphs"  # its own search; graphs are for whoever samples
SETTLING_US = (
    3_000.0  # untimed before a sample: what ran in the other process has caches and spinning threads behind it
)
SETTLING_CALLS = 2


# ---- what is asked, and what is answered


class Prepare(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Make ready for a problem, and forget the one before.

    Args:
        named: the problem.
        policy: what convplan's side may do; stock torch is set to be deterministic where it says so.
        threads: torch's, on the CPU.
        benchmark: stock torch's benchmark mode.
        benchmark_limit: how many candidates that tries; None: as torch has it by default; 0: all.
    """

    named: NamedProblem
    policy: Policy
    threads: int
    benchmark: bool = True
    benchmark_limit: int | None = None


class Take(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Take one sample of so many units: calls on the CPU, replays on a GPU."""

    units: int


class LookAtKernels(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Name the kernels that a call runs. The process should take no more samples after that: it has been profiled."""


class MeasureRegret(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Tune the problem so many times anew, and race what was chosen for so many seconds."""

    repeats: int
    seconds: float


class Ready(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """The problem is ready to be sampled.

    Args:
        call: in words.
        how: what times it, see `Timing`.
        unit_us: how long one unit takes.
        environment: of this process, in words.
        problem: what is computed, in words.
        from_plan: the calls run by a plan; always False but on convplan's side.
        plan: what is known of the plan, as `plan_facts` names it; empty without one.
    """

    call: str
    how: str
    unit_us: float
    environment: str
    problem: str
    from_plan: bool = False
    plan: dict[str, str | float | bool | None] = {}


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Microseconds of one call."""

    us: float


class Kernels(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Names, in the order in which they ran; empty where there is nobody to ask."""

    names: tuple[str, ...]


class RegretFound(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """The answer to `MeasureRegret`."""

    regret: Regret


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """It did not work. `usable`: the process is as good as before."""

    kind: str
    message: str
    usable: bool


Request = Prepare | Take | LookAtKernels | MeasureRegret
Answer = Ready | Sample | Kernels | RegretFound | Failed


# ---- the program


class _Prepared(NamedTuple):
    """One problem, ready to be sampled; closing `stack` leaves `enabled()`."""

    side: Side
    timer: _Timer
    record: PlanRecord | None
    policy: Policy
    stack: contextlib.ExitStack


class Program:
    """Answers requests, one after the other; holds the tensors of one problem at a time."""

    def __init__(self, side: SideName) -> None:
        self._side = side
        self._prepared: _Prepared | None = None

    def answer(self, request: Request) -> Answer:
        """Do as asked; whatever is raised becomes a `Failed`."""
        import torch

        try:
            with torch.no_grad():
                return self._answer(request)
        except Exception as exc:  # it costs the problem; the parent decides whether it costs this process too
            usable = isinstance(exc, (ConvPlanError, torch.OutOfMemoryError, MemoryError))
            message = str(exc) if isinstance(exc, ConvPlanError) else first_line(exc)
            failed = Failed(type(exc).__name__, message, usable)
        self._forget()  # not before the exception is gone, whose frames hold tensors
        return failed

    def _answer(self, request: Request) -> Answer:
        if isinstance(request, Prepare):
            self._forget()
            return self._prepare(request)
        ready = self._prepared
        if ready is None:
            raise ValueError("no problem is prepared, expected one before it is sampled")
        if isinstance(request, Take):
            return Sample(ready.timer.sample_us(request.units))
        if isinstance(request, LookAtKernels):
            return Kernels(_kernels(ready.side.call, ready.timer))
        if ready.record is None:
            raise ValueError("the problem has no plan, expected one whose regret can be measured")
        problem = ready.record.problem
        return RegretFound(measure_regret(problem, ready.policy, repeats=request.repeats, seconds=request.seconds))

    def _prepare(self, request: Prepare) -> Ready:
        from convplan import _environment

        named = request.named
        policy = named.policy(request.policy)
        _set_torch(request, policy)
        tensors = make_tensors(named)
        record, from_plan, stack = None, False, contextlib.ExitStack()
        if self._side == "convplan":
            side, record = our_side(named, policy, tensors)
            from_plan = record is not None and runs_a_ready_plan(side)
            stack.enter_context(side.active())
        else:
            side = stock_side(named, tensors)
            if self._side == "compile":
                side = _compiled(side)
        with contextlib.ExitStack() as undo:
            undo.push(stack)
            timer = _CpuTimer(side.call) if named.problem.device == "cpu" else _GpuTimer(side.call)
            unit_us = timer.warm_up()
            undo.pop_all()
        self._prepared = _Prepared(side, timer, record, policy, stack)
        return Ready(
            call=side.wording,
            how=timer.how,
            unit_us=unit_us,
            environment=str(_environment.current(named.problem.device)),
            problem=str(named.problem if record is None else record.problem),
            from_plan=from_plan,
            plan={} if record is None else plan_facts(record),
        )

    def _forget(self) -> None:
        if self._prepared is not None:
            self._prepared.stack.close()
        self._prepared = None
        if self._side == "compile":
            import torch

            torch.compiler.reset()
        gc.collect()
        _return_gpu_memory()


def _set_torch(request: Prepare, policy: Policy) -> None:
    """Torch's flags, before anything runs: threads, and for a GPU what stock torch's search may do."""
    import torch

    if torch.get_num_threads() != request.threads:
        torch.set_num_threads(request.threads)
    if request.named.problem.device != "cuda":
        return
    cudnn = torch.backends.cudnn
    cudnn.benchmark = request.benchmark
    cudnn.deterministic = bool(policy.deterministic)
    cudnn.allow_tf32 = request.named.allow_tf32
    if request.benchmark_limit is not None:
        cudnn.benchmark_limit = request.benchmark_limit


def _compiled(side: Side) -> Side:
    import torch

    call = side.call

    def forward() -> object:
        return call()

    compiled: Call = torch.compile(forward, dynamic=False, mode=COMPILE_MODE)
    return Side(f"torch.compile({side.wording})", compiled, side.active)


def _return_gpu_memory() -> None:
    """Have torch's allocator give back what it keeps: another process needs the room."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class _CpuTimer:
    """A unit is one call, timed by the host's clock."""

    how = HOST_CLOCK

    def __init__(self, call: Call) -> None:
        self._call = call
        self._unit_us = 0.0

    def warm_up(self) -> float:
        """Microseconds of one unit, once what is done only once is done."""
        self._call()  # it may search or compile
        self._unit_us = self._timed(1)
        if self._unit_us < SLOW_US:
            self._unit_us = min(self._timed(1), self._timed(2))
        return self._unit_us

    def sample_us(self, units: int) -> float:
        """Microseconds of one call, the mean of so many."""
        settle = 0 if self._unit_us > SLOW_US else max(SETTLING_CALLS, round(SETTLING_US / max(self._unit_us, 1.0)))
        was_on = gc.isenabled()
        gc.disable()
        try:
            for _ in range(settle):
                self._call()
            return self._timed(units)
        finally:
            if was_on:
                gc.enable()

    def _timed(self, units: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(units):
            self._call()
        return (time.perf_counter_ns() - begin) / 1e3 / units


class _GpuTimer:
    """A unit is one replay of a graph of many launches, timed by events."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._launches = 1
        self._unit_us = 0.0
        self._graphs: GraphTimer | None = None

    @property
    def how(self) -> str:
        """Whether the call could be captured."""
        captured = self._graphs is not None and self._graphs.is_captured(self._call)
        return GRAPH if captured else EVENTS

    def warm_up(self) -> float:
        """Microseconds of one unit. Stock torch's search runs here, before anything is captured."""
        import torch

        from convplan._measure_cuda import GraphTimer

        self._call()  # it may search or compile
        first_us = self._once_us()
        if first_us < SLOW_US:
            first_us = min(self._once_us() for _ in range(3))
        _return_gpu_memory()  # what was tried and dropped
        self._graphs = GraphTimer(torch.device("cuda", torch.cuda.current_device()))
        self._launches = self._graphs.repeats(first_us)
        self._unit_us = self._graphs.sample_us(self._call, self._launches) * self._launches
        return self._unit_us

    def sample_us(self, units: int) -> float:
        """Microseconds of one launch, the middle of so many replays."""
        assert self._graphs is not None
        settle = 0 if self._unit_us > SLOW_US else max(SETTLING_CALLS, round(SETTLING_US / max(self._unit_us, 1.0)))
        # Queued without a pause: a card that rests between replays runs at clocks that it does not keep under load.
        found = self._graphs.round_us([(self._call, self._launches)] * (settle + units))
        for one in found:
            if isinstance(one, Exception):
                raise one
        return statistics.median(one for one in found[settle:] if not isinstance(one, Exception))

    def _once_us(self) -> float:
        import torch

        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        self._call()
        torch.cuda.synchronize()
        return (time.perf_counter_ns() - begin) / 1e3


_Timer = _CpuTimer | _GpuTimer


def _kernels(call: Call, timer: _Timer) -> tuple[str, ...]:
    """What torch's profiler sees on the GPU while the call runs; nothing on the CPU, or where it sees nothing."""
    if isinstance(timer, _CpuTimer):
        return ()
    import torch
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    except RuntimeError:  # no permission, or no such library: then nobody knows
        return ()
    events: list[Any] = [event for event in seen.events() or () if event.device_type.name == "CUDA"]
    events.sort(key=lambda event: event.time_range.start)
    return tuple(event.name[:300] for event in events)


def serve(receive: Callable[[], bytes], send: Callable[[bytes], object], program: Program) -> None:
    """Answer until nobody asks any more."""
    while True:
        try:
            message = receive()
        except EOFError:
            return
        send(msgspec.json.encode(program.answer(msgspec.json.decode(message, type=Request))))


def main() -> None:
    """Run as one side until the parent closes its end."""
    connection = connection_to_parent()
    sides = [side for side in SIDES if side in sys.argv[1:2]]
    if not sides:
        raise SystemExit(f"found {sys.argv[1:]}, expected one of {', '.join(SIDES)}")
    serve(connection.recv_bytes, connection.send_bytes, Program(sides[0]))


if __name__ == "__main__":
    main()

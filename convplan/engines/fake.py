"""Engine `fake`: right answers at scripted times, and scripted failures, so that every path of planning runs anywhere.

A supported part of the package, for tests of programs that use convplan as much as for its own. It never takes part by
default: a policy must name it (`Policy(engines=("fake",))`), or someone registers an instance under another name.

    register_engine(FakeEngine([FakeCandidate(time_us=80), FakeCandidate(time_us=50, fails="wrong")], name="mine"))

The answer is a plain sum over filter taps in float64, cast once: slow, and independent of every other engine. Time
passes on a `VirtualClock` when the engine has one, else for real.

Some failures are real ones that take a process along (`DANGEROUS`). They happen in a worker process of exhaustive
search only, and raise RuntimeError in any other. There the engine has its equal by `remake`, where time passes for
real.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import msgspec
import torch

from convplan._child import in_child
from convplan._errors import EngineUnavailable, PlanRejected, SpecError
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan.engines._support import deliver
from convplan.engines.base import YES, Built, Candidate, EngineConfig, Notes, Space, Support, no

SLOW = 4_000
LEAKED_BYTES = 4 * 2**20
CORRUPTED_BYTES = 64

Failure = Literal[
    "",
    "unavailable",
    "build",
    "run",
    "memory",
    "late",
    "wrong",
    "nan",
    "shape",
    "strides",
    "writes_input",
    "slow",
    "segfault",
    "hangs",
    "hangs_in_build",
    "leaks",
    "corrupts",
    "kills",
]

FAILURES: dict[Failure, str] = {
    "": "never fails",
    "unavailable": "raises EngineUnavailable when built",
    "build": "raises PlanRejected when built",
    "run": "raises RuntimeError at every run",
    "memory": "runs out of memory at every run",
    "late": "raises RuntimeError after `good_runs` runs",
    "wrong": "leaves the last filter tap out",
    "nan": "returns one NaN",
    "shape": "returns one column too few",
    "strides": "returns another layout than asked for",
    "writes_input": "adds one to its first input",
    "slow": f"takes {SLOW:,} times as long",
    "segfault": "reads address 0: SIGSEGV",
    "hangs": "never returns, and ignores polite signals",
    "hangs_in_build": "the same when built",
    "leaks": f"keeps {LEAKED_BYTES // 2**20} MiB at every run",
    "corrupts": f"writes {CORRUPTED_BYTES} bytes past the end of its output",
    "kills": "ends its process by SIGKILL, as a system short of memory does",
}
DANGEROUS = ("segfault", "hangs", "hangs_in_build", "leaks", "corrupts", "kills")  # in a worker process only


class VirtualClock:
    """A clock that only moves when told to; call it for nanoseconds, as planning calls its clock."""

    def __init__(self) -> None:
        self._now_ns = 0
        self._lock = threading.Lock()

    def __call__(self) -> int:
        """Nanoseconds since the clock was made."""
        return self._now_ns

    def advance(self, time_us: float) -> None:
        """Let `time_us` microseconds pass."""
        with self._lock:
            self._now_ns += round(time_us * 1e3)


class FakeCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """The script of one configuration.

    Args:
        time_us: microseconds that a run takes.
        jitter_us: added in turn as 0, +jitter, -jitter, so that runs differ in the same way every time.
        first_us: added to the first run, as for one-time work.
        fails: a key of `FAILURES`.
        good_runs: runs before a `late` failure.
        notes, workspace_bytes, flops, source: what the candidate says of itself.
        proposed: `configs` lists it; else only a search through the engine's space finds it.
        built_workspace_bytes: what it turns out to need once built; None: as said before.
    """

    time_us: float = 50.0
    jitter_us: float = 0.0
    first_us: float = 0.0
    fails: Failure = ""
    good_runs: int = 3
    notes: Notes = Notes()
    workspace_bytes: int | None = 0
    built_workspace_bytes: int | None = None
    flops: float | None = None
    source: str = "heuristic"
    proposed: bool = True

    def __post_init__(self) -> None:
        if self.fails not in FAILURES:
            raise SpecError(f"fails is {self.fails!r}, expected one of {', '.join(map(repr, FAILURES))}")


class FakeEngine:
    """An engine that follows a script.

    Args:
        script: one entry for each configuration, which are named `NAME[index=0]` and so on.
        name: lower case.
        refuses: a reason to refuse every problem with; empty: supports all.
        clock: passes virtual time; None: real time passes.

    Attributes:
        builds, runs: how often each configuration was built and run, by index.
    """

    by_default = False

    def __init__(
        self,
        script: Sequence[FakeCandidate] = (FakeCandidate(time_us=50.0), FakeCandidate(time_us=80.0)),
        *,
        name: str = "fake",
        refuses: str = "",
        clock: VirtualClock | None = None,
    ) -> None:
        self.name = name
        self.script = tuple(script)
        self.refuses = refuses
        self.clock = clock
        self.builds = [0] * len(self.script)
        self.runs = [0] * len(self.script)
        self._lock = threading.Lock()

    def supports(self, problem: Problem) -> Support:
        """Everything that has elements, unless the script refuses."""
        if self.refuses:
            return no(self.refuses)
        return no("the problem is empty") if problem.is_empty else YES

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """The script's entries that are proposed, in order."""
        return [self._candidate(index) for index, entry in enumerate(self.script) if entry.proposed]

    def _candidate(self, index: int) -> Candidate:
        entry = self.script[index]
        return Candidate(
            config=EngineConfig.of(self.name, index=index),
            notes=entry.notes,
            workspace_bytes=entry.workspace_bytes,
            flops=entry.flops,
            source=entry.source,
        )

    def spaces(self, problem: Problem) -> Sequence[Space]:
        """One: the knob `index`, with a value for each entry of the script."""
        return [Space(free=(("index", tuple(range(len(self.script)))),))]

    def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
        """One entry.

        Raises:
            PlanRejected: the script has no such entry.
        """
        return self._candidate(self._index(config))

    def remake(self) -> tuple[str, bytes]:
        """For a worker process. Without the clock: there, time passes for real."""
        return f"{__name__}:remade", msgspec.json.encode(_Remade(self.name, self.script, self.refuses))

    def _index(self, config: EngineConfig) -> int:
        index = config.knob("index", -1)
        if not 0 <= index < len(self.script):
            raise PlanRejected(
                engine=self.name, config=str(config), reason=f"index is {index}, the script has {len(self.script)}"
            )
        return index

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Build one entry, or fail as it says.

        Raises:
            PlanRejected: the script says so, or has no such entry.
            EngineUnavailable: the script says so.
        """
        index = self._index(config)
        entry = self.script[index]
        with self._lock:
            self.builds[index] += 1
        if entry.fails == "hangs_in_build":
            _hang(entry)
        if entry.fails == "unavailable":
            raise EngineUnavailable(engine=self.name, needs="a script that does not fail")
        if entry.fails == "build":
            raise PlanRejected(engine=self.name, config=str(config), reason="the script says that it does not build")
        workspace = entry.built_workspace_bytes
        if workspace is None:
            workspace = entry.workspace_bytes or 0

        def run(
            first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
        ) -> torch.Tensor:
            return self._run(problem, index, first, second, bias, out)

        return Built(run=run, workspace_bytes=workspace)

    def _run(
        self,
        problem: Problem,
        index: int,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        entry = self.script[index]
        with self._lock:
            before = self.runs[index]
            self.runs[index] += 1
        begin = time.perf_counter()
        _maybe_fail(entry, before)
        if entry.fails == "writes_input":
            first += 1
        result = convolve_by_taps(problem, first, second, bias, leave_out_last=entry.fails == "wrong")
        answer = _spoiled(entry, deliver(result, problem.output, out))
        if entry.fails == "corrupts":
            _in_worker_only(entry)
            ctypes.memset(answer.data_ptr() + answer.numel() * answer.itemsize, 0, CORRUPTED_BYTES)
        jitter_us = (0.0, entry.jitter_us, -entry.jitter_us)[before % 3]
        time_us = entry.time_us * (SLOW if entry.fails == "slow" else 1)
        self._pass_time(time_us + jitter_us + (entry.first_us if before == 0 else 0.0), begin)
        return answer

    def _pass_time(self, time_us: float, begin: float) -> None:
        if self.clock is not None:
            self.clock.advance(time_us)
            return
        left_s = time_us / 1e6 - (time.perf_counter() - begin)
        if left_s > 0:
            time.sleep(left_s)


def _maybe_fail(entry: FakeCandidate, runs_before: int) -> None:
    if entry.fails == "run" or (entry.fails == "late" and runs_before >= entry.good_runs):
        _raise("the script says that it fails here")
    if entry.fails == "memory":
        raise torch.OutOfMemoryError("the script says that there is no memory")

    if entry.fails in DANGEROUS:
        _do_harm(entry)


def _in_worker_only(entry: FakeCandidate) -> None:
    if not in_child():
        _raise(f"the script says {entry.fails!r} ({FAILURES[entry.fails]}), which is for a worker process only")


def _do_harm(entry: FakeCandidate) -> None:
    _in_worker_only(entry)
    if entry.fails == "segfault":
        ctypes.string_at(0)
    if entry.fails == "hangs":
        _hang(entry)
    if entry.fails == "leaks":
        _leaked.append(b"\x01" * LEAKED_BYTES)
    if entry.fails == "kills":
        os.kill(os.getpid(), signal.SIGKILL)


def _hang(entry: FakeCandidate) -> NoReturn:
    _in_worker_only(entry)
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)
    while True:
        time.sleep(1.0)


_leaked: list[bytes] = []


class _Remade(msgspec.Struct, frozen=True):
    name: str
    script: tuple[FakeCandidate, ...]
    refuses: str


def remade(payload: bytes) -> FakeEngine:
    """An engine equal to the one that `remake` was called on."""
    found = msgspec.json.decode(payload, type=_Remade)
    return FakeEngine(found.script, name=found.name, refuses=found.refuses)


def _raise(reason: str) -> NoReturn:
    raise RuntimeError(reason)


def _spoiled(entry: FakeCandidate, answer: torch.Tensor) -> torch.Tensor:
    if entry.fails == "nan":
        answer.view(-1)[-1:].fill_(float("nan")) if answer.is_contiguous() else answer[..., -1:].fill_(float("nan"))
    if entry.fails == "shape":
        return answer[..., :-1]
    if entry.fails == "strides":
        return answer.transpose(-1, 1).contiguous().transpose(-1, 1)
    return answer


def convolve_by_taps(
    problem: Problem,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    leave_out_last: bool = False,
) -> torch.Tensor:
    """The problem's answer in float64: for each filter tap, the products that it contributes, added up.

    Args:
        problem: any operation.
        first, second, bias: as `Plan.run` takes them.
        leave_out_last: forget the last tap, as a broken engine might.
    """
    groups, rank = problem.groups, problem.spatial_rank
    padded = [size + before + after for size, (before, after) in zip(problem.x.dims[2:], problem.padding, strict=True)]
    inside: tuple[Any, ...] = tuple(
        slice(before, before + size) for size, (before, _) in zip(problem.x.dims[2:], problem.padding, strict=True)
    )
    wide = first.double(), second.double()
    x = torch.zeros(*problem.x.dims[:2], *padded, dtype=torch.float64, device=first.device)
    w = torch.zeros(problem.w.dims, dtype=torch.float64, device=first.device)
    y = torch.zeros(problem.y.dims, dtype=torch.float64, device=first.device)
    if problem.op != "dgrad":
        x[(..., *inside)] = wide[0]
    if problem.op != "wgrad":
        w.copy_(wide[1])
    if problem.op != "fprop":
        y.copy_(wide[0] if problem.op == "dgrad" else wide[1])
    xs, ys = x.unflatten(1, (groups, -1)), y.unflatten(1, (groups, -1))
    ws = w.unflatten(0, (groups, -1))
    letters = "def"[:rank]
    taps = list(itertools.product(*map(range, problem.w.dims[2:])))
    for tap in taps[:-1] if leave_out_last else taps:
        window: tuple[Any, ...] = tuple(
            slice(at * dil, at * dil + (out - 1) * step + 1, step)
            for at, dil, out, step in zip(tap, problem.dilation, problem.y.dims[2:], problem.stride, strict=True)
        )
        seen, at_tap = xs[(..., *window)], ws[(..., *tap)]
        if problem.op == "fprop":
            ys += torch.einsum(f"ngc{letters},gkc->ngk{letters}", seen, at_tap)
        elif problem.op == "dgrad":
            seen += torch.einsum(f"ngk{letters},gkc->ngc{letters}", ys, at_tap)
        else:
            at_tap += torch.einsum(f"ngc{letters},ngk{letters}->gkc", seen, ys)
    result = {"fprop": y, "dgrad": x[(..., *inside)], "wgrad": w}[problem.op]
    return result if bias is None else result + bias.double().view(-1, *[1] * rank)

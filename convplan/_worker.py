"""The program of the process in which exhaustive search builds, verifies and times: `python -m convplan._worker`.

Whatever a candidate does, it does it here: crash, stall, write where it must not. This program answers one request
after the other, says what it is about to do before it does it, and judges itself unfit once a candidate may have
spoilt its memory or its GPU; whoever started it then starts another. It makes no choice and keeps no deadline: both
are the parent's (`_search`, `_worker_link`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from convplan import _environment
from convplan._build import build_one
from convplan._candidates import Live, failure_reason
from convplan._child import connection_to_parent, end_with_parent
from convplan._contest import InTurns, inputs_in_turns, rank
from convplan._errors import PolicyError, WrongResult
from convplan._guards import LEAK_RUNS, Bench, Fingerprints, leak
from convplan._measure import CUTOFF, Contestant, Measurement, Timer, _HostTimer, first_line, race
from convplan._plan import Evidence
from convplan._proof import FIRST_RUN_CUTOFF, FIRST_RUN_GRACE_US, INEXACT
from convplan._torch_state import adopt_torch_state
from convplan._verify import Verifier
from convplan._worker_messages import (
    Answer,
    Began,
    Broken,
    Doing,
    Ended,
    EngineSpec,
    Race,
    Raced,
    Racer,
    Ready,
    Request,
    Setup,
    Stage,
    Tried,
    Try,
    kind_of,
)
from convplan.engines import _builtin, registry
from convplan.engines.base import SEARCHED, EngineConfig

NOT_COMPARED = ("_last_out", "sums")  # of what a verifier holds: candidates write it
CHECK_LIMIT_S = 60.0  # comparing one output with the reference: this program's own work
SAMPLE_S = 0.05  # for a first sample of one candidate
LEAK_LOOK_US = 200_000.0  # runs that only look for a leak take at most about that long
CHANCES = 4  # more runs of what seems far behind: a busy machine can make any run slow
SLOW_START_US = 10 * FIRST_RUN_GRACE_US  # a first run shorter than that may have been slow to start
FAR_BEHIND = 1.3  # times the best: what nobody proposed and runs that long on a GPU's own clock, is left there
KEPT = 24  # candidates that stay built, the fastest: the race will want them
RACE_PATIENCE = 20.0  # times what a sample should take, after which it is stuck


class _Unfit(BaseException):
    """This process can be trusted no more. No `Exception`: nothing that goes on with the next candidate may take it."""

    def __init__(self, reason: str, config: EngineConfig) -> None:
        super().__init__(reason)
        self.config = config


def main() -> None:
    """Fork a worker for each `Setup`, so that the next one has everything imported, until the parent closes its end.

    Nothing here starts a thread or touches a GPU, neither of which survives a fork. While a worker lives, it has the
    connection to itself.
    """
    connection = connection_to_parent()
    importlib.import_module("psutil")
    tuple(_builtin())  # for their imports; the engines themselves are made by each worker
    faulthandler.enable()  # says on stderr where a signal struck
    while True:
        try:
            request = msgspec.json.decode(connection.recv_bytes(), type=Request)
        except EOFError:
            return
        assert isinstance(request, Setup), "convplan bug: a request before the first"
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            end_with_parent(parent)
            _work(connection, request)
            os._exit(0)  # what the program does at its end is for the process that was there first
        _, status = os.waitpid(pid, 0)
        _send(connection, Ended(os.waitstatus_to_exitcode(status)))


def _work(connection: Connection, setup: Setup) -> None:
    """Answer requests about one problem until the parent closes its end."""
    _send(connection, Began(os.getpid()))
    worker, answer = _set_up(setup, connection)
    _send(connection, answer)
    while worker is not None:
        try:
            request = msgspec.json.decode(connection.recv_bytes(), type=Request)
        except EOFError:
            return
        assert not isinstance(request, Setup), "convplan bug: a worker is for one problem"
        _send(connection, worker.tried(request) if isinstance(request, Try) else worker.raced(request))


def _send(connection: Connection, answer: Answer) -> None:
    connection.send_bytes(msgspec.json.encode(answer))


def _set_up(setup: Setup, connection: Connection) -> tuple[_Worker | None, Answer]:
    """Be as the parent is: torch's settings, the GPU, the engines."""
    adopt_torch_state(setup.torch)
    if setup.problem.device == "cuda":
        torch.cuda.set_device(setup.device_index)
    here = _environment.current(setup.problem.device)
    if here != setup.environment:
        differences = setup.environment.differences(here)
        return None, Broken(f"the worker process is in another environment: {differences}")
    missing = {spec.name: reason for spec in setup.engines if (reason := _have_engine(spec))}
    try:
        return _Worker(setup, connection), Ready(missing)
    except Exception as exc:  # such as too little memory for another copy of the problem
        return None, Broken(f"the worker process cannot work on the problem: {type(exc).__name__}: {first_line(exc)}")


def _have_engine(spec: EngineSpec) -> str:
    """See to it that the registry has the engine; why it cannot, where it cannot."""
    try:
        if spec.maker:
            module, _, function = spec.maker.partition(":")
            engine = getattr(importlib.import_module(module), function)(spec.payload)
            registry.register(engine, replace=True)
        found = kind_of(registry.get(spec.name))
    except PolicyError:
        return "the worker process does not have it: it was registered by hand, and has no remake()"
    except Exception as exc:  # an engine's failure costs its candidates, never the search
        return f"the worker process cannot have it: {type(exc).__name__}: {first_line(exc)}"
    if found != spec.kind:
        return f"the worker process has another engine of that name, {found}: {spec.kind} has no remake()"
    return ""


class _Told:
    """A race's timer that says whose turn it is, and ends the race when the GPU is lost."""

    def __init__(
        self,
        timer: Timer,
        say: Callable[[Callable[[], object], int], None],
        after: Callable[[Callable[[], object]], None],
    ):
        self._timer, self._say, self._after = timer, say, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._timer, name)

    def round_us(self, calls: Sequence[tuple[Callable[[], object], int]]) -> list[float | Exception]:
        """Samples of the other timer's, each of them announced: whatever happens then is this candidate's doing."""
        return [self._sampled(*one) for one in calls]

    def _sampled(self, call: Callable[[], object], repeats: int) -> float | Exception:
        self._say(call, repeats)
        (found,) = self._timer.round_us([(call, repeats)])
        if isinstance(found, Exception):
            self._after(call)
        return found


class _Worker:
    """One problem's candidates, one request at a time."""

    def __init__(self, setup: Setup, connection: Connection) -> None:
        self._problem, self._policy = setup.problem, setup.policy
        self._limit_bytes = setup.workspace_limit_bytes
        self._connection = connection
        self._device = torch.device(setup.problem.device)
        self._built: dict[EngineConfig, Live] = {}
        self._warm: set[str] = set()  # engines that have run here
        with torch.no_grad():
            self._verifier = Verifier(self._problem, self._device, tf32=bool(self._policy.allow_tf32))
            # Guarded copies to run on; the reference keeps reading its own.
            self._bench = Bench(self._problem, self._verifier.random, self._device)
            self._verifier.random = self._bench.inputs
            self._turns = inputs_in_turns(self._verifier, self._policy)
        self._synchronize()

    # --- one candidate ------------------------------------------------------------------------------------------------

    def tried(self, request: Try) -> Tried:
        """Build, verify, time."""
        item = Live(request.candidate, registry.get(request.candidate.config.engine))
        unfit = self._build(item)
        if unfit:
            return unfit
        fingerprints = Fingerprints(self._verifier, leave_out=NOT_COMPARED)
        stage = reason = ""
        measured: Measurement | None = None
        try:
            with torch.no_grad():
                self._prove(item, request.best_us or float("inf"))
                measured = self._sample(item)
        except _Refused as exc:
            stage, reason = exc.stage, exc.reason
        except _Unfit as exc:
            return Tried(item.evidence("crash", str(exc)), unfit=str(exc))
        except Exception as exc:  # an engine's failure costs its candidate, never the search
            stage, reason = "verify" if isinstance(exc, WrongResult) else "run", failure_reason(exc)
        return self._judged(item, stage, reason, measured, fingerprints)

    def _build(self, item: Live) -> Tried | None:
        """Why there is nothing to try, None where there is."""
        self._say("building", self._policy.build_limit_s)
        begin = time.perf_counter()
        reason = build_one(item, self._problem, self._policy, self._limit_bytes)
        took_s = time.perf_counter() - begin
        if not reason and took_s > self._policy.build_limit_s:
            reason = f"building took {took_s:.3g} s, longer than build_limit_s = {self._policy.build_limit_s:g}"
        lost = self._lost()
        if lost:
            return Tried(item.evidence("crash", f"while it was built: {lost}"), unfit=lost)
        return Tried(item.evidence("build", reason)) if reason else None

    def _judged(
        self, item: Live, stage: str, reason: str, measured: Measurement | None, fingerprints: Fingerprints
    ) -> Tried:
        """What came out, unless something worse is seen now: a lost GPU, or memory that was written to."""
        lost = self._lost()
        if lost:
            return Tried(item.evidence("crash", lost), unfit=lost)
        self._say("checking", CHECK_LIMIT_S)
        spoilt = self._bench.trouble()
        if not spoilt and fingerprints.changed():
            spoilt = "what its output is compared with changed while it ran"
        if spoilt:
            return Tried(item.evidence("corrupt", spoilt), unfit=spoilt)
        if stage:
            first_us = item.first_us if stage == "measure" else 0.0
            return Tried(item.evidence(stage, reason), first_us, unfit=reason if stage == "leak" else "")
        condemned = self._verifier.condemned.get(item.candidate.config)
        if condemned:
            return Tried(item.evidence("verify", condemned))
        self._keep(item)
        return Tried(item.evidence(measured=measured), first_us=item.first_us)

    def _prove(self, item: Live, best_us: float) -> None:
        """One run into guarded memory, one into memory of the engine's, one on integers; each timed and compared."""
        run, config, notes = item.ready.run, item.candidate.config, item.candidate.notes
        place = self._bench.fresh_output()
        first_us = self._launch(item, lambda: self._bench.inputs.given_to(run, place))
        # At once, while what is behind the output is still there to be compared with.
        spoilt = self._bench.trouble()
        if spoilt:
            raise _Refused("corrupt", spoilt)
        hopeless_us = max(FIRST_RUN_CUTOFF * best_us, FIRST_RUN_GRACE_US)
        if first_us > hopeless_us and (config.engine not in self._warm or first_us < SLOW_START_US):
            # An engine's first run in a process sets its library up, and a kernel's loads it, which is nobody's fault.
            first_us = self._launch(item, lambda: self._bench.inputs.given_to(run, place))
        self._warm.add(config.engine)
        if first_us > hopeless_us:
            raise _Refused("measure", f"cut off: first run {first_us:.0f} us, best so far {best_us:.0f} us")
        self._leave_if_far(item, first_us, best_us, lambda: self._bench.inputs.given_to(run, place))
        self._say("checking", CHECK_LIMIT_S)
        self._verifier.check(config, notes, _copy(place))
        outs: list[torch.Tensor] = []
        self._bench.inputs.forget_sums()
        again_us = self._launch(item, lambda: outs.append(self._bench.inputs.given_to(run)))
        self._say("checking", CHECK_LIMIT_S)
        item.error = round(self._verifier.check(config, notes, outs.pop()), 6)
        item.verified = self._verifier.scope
        item.first_us = min(first_us, again_us)
        if notes.direct and not self._verifier.check_exactly(config, functools.partial(self._on_integers, item)):
            item.add(INEXACT)
        for _ in range(CHANCES):
            if item.first_us > CUTOFF * best_us:
                self._on_inputs_again(item)
        if item.first_us > CUTOFF * best_us:
            raise _Refused("measure", f"cut off: {item.first_us:.1f} us, {item.first_us / best_us:.1f} x the best")

    def _leave_if_far(self, item: Live, first_us: float, best_us: float, call: Callable[[], object]) -> None:
        """Most of what a walk meets is far from the best; proving it would take ten times as long as seeing that."""
        if item.candidate.source != SEARCHED or self._device.type != "cuda" or first_us <= FAR_BEHIND * best_us:
            return
        item.first_us = min(first_us, self._launch(item, call), self._launch(item, call))
        if item.first_us > FAR_BEHIND * best_us:
            raise _Refused(
                "measure", f"cut off unproven: {item.first_us:.1f} us, {item.first_us / best_us:.1f} x the best"
            )

    def _on_inputs_again(self, item: Live) -> None:
        item.first_us = min(item.first_us, self._launch(item, self._call(item)))

    def _on_integers(self, item: Live, *arguments: Any) -> torch.Tensor:
        run, outs = item.ready.run, list[torch.Tensor]()
        item.first_us = min(item.first_us, self._launch(item, lambda: outs.append(run(*arguments))))
        self._say("checking", CHECK_LIMIT_S)
        return outs.pop()

    def _sample(self, item: Live) -> Measurement:
        """A first time, good enough to say which ones to look at again; and whether it keeps memory."""
        call = self._call(item)
        runs = int(min(LEAK_RUNS, max(LEAK_LOOK_US // max(item.first_us, 1.0), 1)))
        self._say("running", self._policy.run_limit_s * 3 * runs)

        def run_once() -> None:
            call()
            self._synchronize()

        lost = leak(run_once, runs, self._device)
        if lost:
            raise _Refused("leak", lost)
        measured, rejected = self._race({call: item}, SAMPLE_S)
        if not measured:
            raise _Refused("measure", rejected[0].reason)
        return measured[0]

    def _launch(self, item: Live, call: Callable[[], object]) -> float:
        """Microseconds of one run that is waited for, the device's own where it is a GPU."""
        limit_s = self._policy.run_limit_s
        self._say("running", limit_s)
        if self._device.type == "cuda":
            from convplan._measure_cuda import launch_us

            _, took_us = launch_us(call)
            self._synchronize()
        else:
            begin = time.perf_counter_ns()
            call()
            took_us = (time.perf_counter_ns() - begin) / 1e3
        if took_us > limit_s * 1e6:
            raise _Refused("measure", f"one run took {took_us / 1e6:.3g} s, longer than run_limit_s = {limit_s:g}")
        return took_us

    def _call(self, item: Live) -> Callable[[], object]:
        return InTurns(item.ready.run, self._turns)

    def _keep(self, item: Live) -> None:
        self._built[item.candidate.config] = item
        if len(self._built) > KEPT:
            del self._built[max(self._built, key=lambda config: self._built[config].first_us)]

    # --- the race -----------------------------------------------------------------------------------------------------

    def raced(self, request: Race) -> Raced:
        """Time the leaders against each other, and rank them."""
        fingerprints = Fingerprints(self._verifier, leave_out=NOT_COMPARED)
        rejected: list[Evidence] = []
        live = [item for racer in request.racers if (item := self._ready(racer, rejected)) is not None]
        try:
            with torch.no_grad():
                measured, slower = self._race({self._call(item): item for item in live}, request.budget_s)
        except _Unfit as exc:
            return Raced((), unfit=str(exc), config=exc.config)
        by_config = {item.candidate.config: item for item in live}
        self._say("checking", CHECK_LIMIT_S)
        spoilt = self._bench.trouble() or (fingerprints.changed() and "what outputs are compared with changed")
        if spoilt:
            return Raced((), unfit=spoilt)
        ranking = rank([(by_config[one.config], one) for one in measured], live)
        return Raced(tuple(ranking), (*rejected, *slower))

    def _ready(self, racer: Racer, rejected: list[Evidence]) -> Live | None:
        """A racer that is built; None where it does not build any more."""
        config = racer.candidate.config
        item = self._built.get(config) or Live(racer.candidate, registry.get(config.engine))
        item.first_us, item.error, item.verified = racer.first_us, racer.error, racer.verified
        if item.built is None:
            failed = self._build(item)
            if failed is not None:
                rejected.append(failed.evidence)
                return None
            with torch.no_grad():  # what a first run sets up is no part of its time
                self._launch(item, self._call(item))
        return item

    def _race(
        self, items: dict[Callable[[], object], Live], budget_s: float
    ) -> tuple[list[Measurement], list[Evidence]]:
        def say(call: Callable[[], object], repeats: int) -> None:
            item = items[call]
            expected_s = RACE_PATIENCE * repeats * item.first_us / 1e6
            self._say("racing", max(self._policy.run_limit_s, expected_s), item.candidate.config)

        def after(call: Callable[[], object]) -> None:
            lost = self._lost()
            if lost:
                raise _Unfit(lost, items[call].candidate.config)

        timer = _timer(self._device, len(self._turns))
        contestants = [Contestant(item.candidate.config, call, item.first_us) for call, item in items.items()]
        measured, slower = race(contestants, budget_s=budget_s, timer=_Told(timer, say, after))
        captured = getattr(timer, "is_captured", None)
        for call, item in items.items():
            if captured is not None and not captured(call):
                item.add("timed without a CUDA graph, into which it could not be captured")
        by_config = {item.candidate.config: item for item in items.values()}
        # Those that are merely far behind stay good for the day when the others fail.
        failed = [one for one in slower if not one.reason.startswith("cut off")]
        return measured, [by_config[one.config].evidence("measure", one.reason) for one in failed]

    # --- this process -------------------------------------------------------------------------------------------------

    def _say(self, doing: Doing, limit_s: float, config: EngineConfig | None = None) -> None:
        _send(self._connection, Stage(doing, limit_s, config))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _lost(self) -> str:
        """What the GPU answers to everything from now on; empty while it works."""
        if self._device.type != "cuda":
            return ""
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()  # an error that passes is told once
        try:
            torch.cuda.synchronize()
        except Exception as exc:  # whatever it is, it stays
            return f"the GPU is lost to this process: {first_line(exc)}"
        return ""


class _Refused(Exception):
    """A candidate is out, at this stage and for this reason."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage, self.reason = stage, reason


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor with the same strides, whatever they are."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _timer(device: torch.device, turns: int) -> Timer:
    if device.type != "cuda":
        return _HostTimer(time.perf_counter_ns, None)
    from convplan._measure_cuda import GraphTimer

    return GraphTimer(torch.device("cuda", torch.cuda.current_device()), turns=turns)


if __name__ == "__main__":
    main()

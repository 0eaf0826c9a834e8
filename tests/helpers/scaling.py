"""An engine whose scripted times depend on the problem's size, and with them which configuration is best."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import msgspec
import torch

from convplan._errors import PlanRejected
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan.engines._support import deliver
from convplan.engines.base import YES, Built, Candidate, EngineConfig, Notes, Support
from convplan.engines.fake import VirtualClock, convolve_by_taps


def work(problem: Problem) -> int:
    """Output positions."""
    return problem.y.dims[0] * math.prod(problem.y.dims[2:])


class OwnClock(VirtualClock):
    """A virtual clock of each thread's own, so that none sees the time that another one's runs take."""

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()

    def __call__(self) -> int:
        return int(getattr(self._local, "now_ns", 0))

    def advance(self, time_us: float) -> None:
        self._local.now_ns = self() + round(time_us * 1e3)


class Law(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration: it takes `fixed_us + each_us * work ** power` microseconds."""

    fixed_us: float = 0.0
    each_us: float = 0.0
    power: float = 1.0
    notes: Notes = Notes()
    source: str = "heuristic"
    builds: Callable[[Problem], bool] = lambda problem: True
    runs: Callable[[Problem], bool] = lambda problem: True
    workspace_bytes: Callable[[Problem], int] = lambda problem: 0

    def time_us(self, problem: Problem) -> float:
        """The truth about a problem."""
        return self.fixed_us + self.each_us * work(problem) ** self.power


class ScalingEngine:
    """Right answers at times by law, on a virtual clock.

    Attributes:
        asked: how often its lists were asked for.
        built, ran: (problem, configuration's index) of every build and run.
    """

    by_default = False

    def __init__(self, laws: Sequence[Law], clock: VirtualClock, name: str = "scaling") -> None:
        self.name = name
        self.laws = list(laws)
        self.clock = clock
        self.asked = 0
        self.built: list[tuple[Problem, int]] = []
        self.ran: list[tuple[Problem, int]] = []
        self._lock = threading.Lock()

    def supports(self, problem: Problem) -> Support:
        """Everything."""
        return YES

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """The laws in order."""
        with self._lock:
            self.asked += 1
        return [
            Candidate(EngineConfig.of(self.name, index=index), law.notes, source=law.source)
            for index, law in enumerate(self.laws)
        ]

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """One law, where it says that it builds."""
        index = config.knob("index")
        law = self.laws[index]
        with self._lock:
            self.built.append((problem, index))
        if not law.builds(problem):
            raise PlanRejected(engine=self.name, config=str(config), reason="its law says that it does not build here")

        def run(
            first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
        ) -> torch.Tensor:
            with self._lock:
                self.ran.append((problem, index))
            if not law.runs(problem):
                raise RuntimeError("its law says that it does not run here")
            self.clock.advance(law.time_us(problem))
            return deliver(convolve_by_taps(problem, first, second, bias), problem.output, out)

        return Built(run=run, workspace_bytes=law.workspace_bytes(problem))

    def regret(self, problem: Problem, config: EngineConfig) -> float:
        """Time of a configuration over that of the best one."""
        best_us = min(law.time_us(problem) for law in self.laws)
        return self.laws[config.knob("index")].time_us(problem) / best_us

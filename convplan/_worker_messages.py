"""What the searching process and its worker say to each other: JSON, one struct for each message. No behaviour here.

The worker answers every request, and says between with `Stage` what it is about to do and how long that may take, so
that whoever waits knows when to give up, and on whom to pin it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from convplan._environment import Environment
from convplan._plan import Evidence
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._torch_state import TorchState
from convplan.engines.base import Candidate, EngineConfig

Doing = Literal["starting", "building", "running", "checking", "racing"]


class EngineSpec(msgspec.Struct, frozen=True):
    """How the worker comes by an engine.

    Args:
        name: in the registry.
        kind: `module:class` of the engine, which the worker's own of that name must be.
        maker, payload: from `Remakable.remake`; empty where the worker has the engine by itself.
    """

    name: str
    kind: str
    maker: str = ""
    payload: bytes = b""


def kind_of(engine: object) -> str:
    """`module:class`, by which two processes know that they mean the same engine."""
    return f"{type(engine).__module__}:{type(engine).__qualname__}"


class Setup(msgspec.Struct, frozen=True, tag="setup"):
    """The first request: what all others are about. `device_index` is the GPU's, -1 for none."""

    problem: Problem
    policy: Policy
    environment: Environment
    engines: tuple[EngineSpec, ...]
    torch: TorchState
    device_index: int
    workspace_limit_bytes: int


class Try(msgspec.Struct, frozen=True, tag="try"):
    """Build, verify and time one candidate. `best_us` is the best time so far, None when there is none."""

    candidate: Candidate
    best_us: float | None


class Racer(msgspec.Struct, frozen=True):
    """A candidate that passed a `Try`, with what that found out."""

    candidate: Candidate
    first_us: float
    error: float | None
    verified: str


class Race(msgspec.Struct, frozen=True, tag="race"):
    """Time candidates against each other, in the order that breaks ties."""

    racers: tuple[Racer, ...]
    budget_s: float


Request = Setup | Try | Race


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Answers `Setup`: engines that this process cannot have, with the reason."""

    missing: dict[str, str]


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """Answers `Setup`: nothing measured here would be worth anything, and why."""

    reason: str


class Began(msgspec.Struct, frozen=True, tag="began"):
    """The worker's first word: its process's number."""

    pid: int


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The worker's process is no more. `status`: as of `subprocess`, below 0 the number of a signal."""

    status: int


class Stage(msgspec.Struct, frozen=True, tag="stage"):
    """What comes next, and the seconds after which waiting for it is given up. `config`: whose turn it is in a race."""

    doing: Doing
    limit_s: float
    config: EngineConfig | None = None


class Tried(msgspec.Struct, frozen=True, tag="tried"):
    """Answers `Try`.

    Args:
        evidence: a time from a first sample, or the stage and reason of the rejection.
        first_us: one run's time, for the race, or because it was too slow; else 0.
        unfit: why this process's memory or GPU can be trusted no more; empty when it can.
    """

    evidence: Evidence
    first_us: float = 0.0
    unfit: str = ""


class Raced(msgspec.Struct, frozen=True, tag="raced"):
    """Answers `Race`: the ranking, and who fell out.

    `unfit` as in `Tried`; the ranking is empty then, and `config` and `stage` say whom it is pinned on, if on anyone.
    """

    ranking: tuple[Evidence, ...]
    rejected: tuple[Evidence, ...] = ()
    unfit: str = ""
    config: EngineConfig | None = None
    stage: str = "crash"


Answer = Began | Ended | Ready | Broken | Stage | Tried | Raced

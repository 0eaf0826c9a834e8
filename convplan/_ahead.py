"""Plans built ahead of time, on a machine without the GPU that will run them (C7).

The heuristics' candidates go through the planner's own filter, the leading ones are built and serialized, and the
records say by their environment that they were timed nowhere. On the GPU's machine they are the untuned plans that a
problem starts with: restored, not built. Enumerating and building is the engine's business, which plans are allowed the
planner's, and a file of plans is `_exchange`'s.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from convplan import __version__
from convplan._build import build_one
from convplan._candidates import Live, ask, instant_order, no_plan
from convplan._environment import Environment
from convplan._errors import PlanRejected, SpecError, StoreError
from convplan._exchange import ExportReport, export_plans
from convplan._filter import filter_candidates
from convplan._memory import MOST_WORKSPACE_BYTES
from convplan._plan import Evidence, PlanRecord, utc_now
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._store import PlanStore
from convplan.engines.base import EngineConfig
from convplan.engines.cudnn.device import WRITE_AGAIN, Device
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.errata import Errata
from convplan.engines.cudnn.target import Target

LEADING = 3  # plans that are built for a problem: the one that runs, and those that take over when it fails


class AheadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A problem's plans for a GPU that is elsewhere.

    Args:
        record: ranked as the heuristics rank them, those that were built first; nothing in it was timed or verified.
        serialized: what the engine's `restore` takes, for each configuration that was built.
    """

    record: PlanRecord
    serialized: dict[EngineConfig, bytes]


class AheadBuilder:
    """Builds plans for one GPU.

    Args:
        device: the GPU, by its properties.

    Attributes:
        environment: where the plans belong: the GPU's model and the version of cuDNN that built them.

    Raises:
        SpecError: the properties are of another cuDNN version, or do not say how many multiprocessors there are.
        EngineUnavailable: cuDNN is missing, or what stands in for the driver cannot be made.
        ErrataError: the user's own file of errata is malformed.
    """

    def __init__(self, device: Device) -> None:
        Errata.load()  # a malformed file is everybody's error, and not each problem's
        target = Target.absent(device)
        if device.multiprocessors is None:
            raise SpecError(
                f"device properties of {device.name}: multiProcessorCount is missing, expected one number. "
                f"{WRITE_AGAIN}"
            )
        self.engine = CudnnEngine(target)
        self.environment = Environment.ahead_of(
            gpu=device.name,
            capability=device.compute_capability,
            multiprocessors=device.multiprocessors,
            cudnn=target.library.version,
        )

    def build(self, problem: Problem, policy: Policy, *, leading: int = LEADING) -> AheadPlan:
        """The leading plans of one problem.

        Args:
            problem: whichever device it names, it is built for the GPU.
            policy: the rules. Where no workspace limit is given there is none below 1 TiB, for how much memory is free
                is only known where the plans run; the record keeps the policy as it was given, under which programs
                look for it.
            leading: how many are built; the candidates behind them stand in the record unbuilt.

        Raises:
            NoPlan: nothing builds; lists every candidate with its reason.
        """
        begin = time.perf_counter()
        asked, resolved = msgspec.structs.replace(problem, device="cuda"), policy.resolve()
        limit = resolved.workspace_limit_bytes
        limit_bytes = MOST_WORKSPACE_BYTES if limit is None else limit
        live, rejected = self._allowed(asked, resolved.replace(workspace_limit_bytes=limit_bytes))
        built: list[Evidence] = []
        behind: list[Evidence] = []
        serialized: dict[EngineConfig, bytes] = {}
        for item in live:
            if len(built) >= leading:
                behind.append(item.evidence())
                continue
            if reason := build_one(item, asked, resolved, limit_bytes):
                rejected.append(item.evidence("build", reason))
                continue
            try:
                serialized[item.candidate.config] = _serialized(item)
            except PlanRejected as exc:  # it can be built where it runs
                item.remark = exc.reason
                behind.append(item.evidence())
            else:
                built.append(item.evidence())
        if not built:
            raise no_plan(asked, resolved, [*rejected, *(_unserialized(evidence) for evidence in behind)])
        record = PlanRecord(
            problem=asked,
            policy=resolved,
            environment=self.environment,
            effort="instant",
            ranking=(*built, *behind),
            rejected=tuple(rejected),
            planning_s=round(time.perf_counter() - begin, 6),
            created=utc_now(),
            version=__version__,
        )
        return AheadPlan(record=record, serialized=serialized)

    def _allowed(self, problem: Problem, policy: Policy) -> tuple[list[Live], list[Evidence]]:
        """The candidates that the policy lets through, fallbacks last, and what it drops."""
        proposals, reason = ask(self.engine, problem, "instant")
        if not proposals:
            return [], [Evidence(config=EngineConfig(self.engine.name), rejected="enumerate", reason=reason)]
        live = [Live(candidate, self.engine) for candidate in proposals]
        return filter_candidates(sorted(live, key=functools.partial(instant_order, problem)), problem, policy)


def _serialized(item: Live) -> bytes:
    if item.ready.serialize is None:
        raise AssertionError("convplan bug: a plan of cuDNN's without a serialized form")
    return item.ready.serialize()


def _unserialized(evidence: Evidence) -> Evidence:
    return msgspec.structs.replace(evidence, rejected="build", reason=evidence.reason)


def build_ahead(
    problems: Sequence[Problem], policy: Policy, device: Device, *, leading: int = LEADING
) -> list[AheadPlan]:
    """The leading plans of each problem, in their order, see `AheadBuilder.build`.

    Raises:
        NoPlan: for the first problem that has none.
        SpecError, EngineUnavailable, ErrataError: see `AheadBuilder`.
    """
    builder = AheadBuilder(device)
    return [builder.build(problem, policy, leading=leading) for problem in problems]


def check_writable(out: Path) -> None:
    """Make sure that a file can be written there, before an hour of building depends on it.

    Raises:
        StoreError: it cannot.
    """
    if out.is_dir():
        raise StoreError(path=str(out), reason="is a directory, expected the name of a file to write")
    try:
        with tempfile.TemporaryFile(dir=out.absolute().parent):
            pass
    except OSError as exc:
        raise StoreError(path=str(out), reason=f"cannot be written: {exc.strerror or exc}") from exc


def write_ahead(plans: Sequence[AheadPlan], out: Path) -> ExportReport:
    """Write plans to a file that `convplan import` reads. The file appears complete or not at all.

    Raises:
        StoreError: it cannot be written, or the plans are more than one file holds.
    """
    with (
        tempfile.TemporaryDirectory(prefix="convplan-ahead-") as folder,
        PlanStore(Path(folder) / "plans.sqlite") as store,
    ):
        for plan in plans:
            store.put(plan.record, plan.serialized)
        return export_plans(out, store=store)

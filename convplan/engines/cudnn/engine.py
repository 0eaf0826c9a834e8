"""Engine `cudnn`: every plan that cuDNN's backend offers for a convolution on a GPU.

A configuration's knobs are `engine`, cuDNN's index of the engine, and cuDNN's own knobs by name. Two knobs are ours:

    dense   1: strided inputs are copied into a dense layout first, for engines that need one
    fused   what follows the convolution is in its graph; 1: in the general form and with statistics, 2: in
            the specialised one (`fusion`)

cuDNN counts engines anew for each kind of graph: number 10 of a convolution and number 10 of the same one with a ReLU
behind it are two engines, which `fused` tells apart.

How a built plan runs on tensors is deliberately elsewhere (`running`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import torch

from convplan._errors import EngineUnavailable, PlanRejected
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan.engines.base import SEARCHED, Built, Candidate, EngineConfig, Offer, Space, Support, no
from convplan.engines.cudnn.configs import (
    Configuration,
    described_configuration,
    engine_spaces,
    heuristic_configurations,
)
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor
from convplan.engines.cudnn.errata import Errata, GraphKind
from convplan.engines.cudnn.fusion import is_specialised, takes_bias
from convplan.engines.cudnn.graph import dense, is_strided, needs_copy, operation_graph, refusal
from convplan.engines.cudnn.library import clear_cuda_error
from convplan.engines.cudnn.plans import ExecutionPlan, build_configured, build_plan, restore_plan
from convplan.engines.cudnn.running import Form, bound_run, make_run
from convplan.engines.cudnn.serialized import pattern_of, vetted
from convplan.engines.cudnn.target import Target, present

_SOURCES: dict[str, tuple[str, ...]] = {
    "instant": ("mode_a", "fallback"),
    "measure": ("mode_a", "mode_b", "fallback"),
    "exhaustive": ("mode_a", "mode_b", "fallback"),
}
COMPILED = "RUNTIME_COMPILATION"
OURS = ("dense", "fused")  # knobs that cuDNN knows nothing of
GENERAL, SPECIALISED = 1, 2  # values of `fused`
_GRAPH_KINDS: dict[int, GraphKind] = {0: "convolution", GENERAL: "general", SPECIALISED: "specialised"}
# Plans of one fused problem that are compiled, at 0.3 to 2.5 s each, unless the effort is `exhaustive`.
MOST_COMPILED = 8


class CudnnEngine:
    """The cuDNN backend; see the module's text.

    Args:
        target: the GPU to plan for, which need not be present (its plans are then built and not run). None: the current
            GPU of this machine.
    """

    name = "cudnn"
    by_default = True
    fuses = True

    def __init__(self, target: Target | None = None) -> None:
        self._fixed = target

    @property
    def plans_for_absent(self) -> bool:
        """Its plans are for a GPU that is not in this machine: they can be built and kept, and not run."""
        return self._fixed is not None and self._fixed.index is None

    def _target(self) -> Target:
        if self._fixed is not None:
            return self._fixed
        if not torch.cuda.is_available():
            raise EngineUnavailable(
                engine=self.name, needs="a GPU that torch can use (torch.cuda.is_available() is False)"
            )
        if not torch.backends.cudnn.enabled:
            raise EngineUnavailable(engine=self.name, needs="torch.backends.cudnn.enabled, which is False")
        return present(torch.cuda.current_device())

    def supports(self, problem: Problem) -> Support:
        """Convolutions on CUDA devices, where cuDNN can be loaded."""
        if problem.device != "cuda":
            return no(f"device is {problem.device!r}, supported: cuda")
        reason = refusal(problem)
        if reason:
            return no(reason)
        try:
            self._target()
        except EngineUnavailable as exc:
            return no(str(exc))
        return Support(True)

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """What the heuristics and the fallback list propose, in cuDNN's order, each configuration once (B13)."""
        if not self.supports(problem).ok:
            return ()
        target = self._target()
        found: dict[EngineConfig, Candidate] = {}
        errata = Errata.load()
        graphs = list(_graphs(problem, target))
        if effort != "exhaustive" and is_strided(problem):
            # Some engines take strided inputs and compute something else of them, or read where nothing is and take the
            # process's GPU away with them (cuDNN 9.19, H200). Only a worker process tries that; all else copies such
            # inputs, as stock torch does.
            graphs = [variant for variant in graphs if "dense" in variant[0]]
        for knobs, graph in graphs:
            for source in _SOURCES[effort]:
                for configuration in heuristic_configurations(graph, target, source):
                    candidate = _candidate(configuration, knobs, problem, target, errata)
                    found.setdefault(candidate.config, candidate)
        if effort == "exhaustive":
            return list(found.values())
        return _with_few_compiled(found.values(), 0 if problem.epilogue.is_plain else MOST_COMPILED)

    def spaces(self, problem: Problem) -> Sequence[Space]:
        """One for each of cuDNN's engines that has anything to offer, with its knobs in the ranges that cuDNN tells.

        The heuristics propose values outside of those now and then (a `split_k_buf` of -1, cuDNN 9.19): these belong
        to the space too.
        """
        if not self.supports(problem).ok:
            return ()
        target = self._target()
        proposed: dict[tuple[int, int], dict[str, set[int]]] = {}
        for candidate in self.configs(problem, "exhaustive"):
            form, number = candidate.config.knob("fused"), candidate.config.knob("engine")
            for name, value in candidate.config.knobs:
                proposed.setdefault((form, number), {}).setdefault(name, set()).add(value)
        return [
            Space(
                fixed=(("engine", space.engine), *knobs.items()),
                free=tuple(
                    (name, tuple(sorted({*range(low, high + 1, step), *also.get(name, ())})))
                    for name, low, high, step in space.knobs
                ),
            )
            for knobs, graph in _graphs(problem, target)
            for space in engine_spaces(graph, target)
            for also in (proposed.get((knobs.get("fused", 0), space.engine), {}),)
        ]

    def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
        """Any configuration, with its notes, the verdict of the errata, and its workspace where cuDNN tells.

        Raises:
            PlanRejected: cuDNN has no such configuration; the reason is cuDNN's own.
        """
        return self.offer(problem, config).candidate

    def offer(self, problem: Problem, config: EngineConfig) -> Offer:
        """The same, with what builds it.

        Raises:
            PlanRejected: as `candidate`.
        """
        target, plans = self._target(), _Plans(self, problem, config)
        knobs = dict(config.knobs)
        ours = {name: value for name in OURS if (value := knobs.pop(name, 0))}
        number = knobs.pop("engine", -1)
        try:
            graph = next((graph for variant, graph in _graphs(problem, target) if variant == ours), None)
            if graph is None:
                raise plans.rejected(f"there is no variant {ours or 'as given'} of this problem")
            described, finalised = described_configuration(graph, target, number, knobs, SEARCHED)
        except (CudnnError, ValueError) as exc:
            raise plans.rejected(str(exc)) from exc
        candidate = _candidate(described, ours, problem, target, Errata.load())
        return Offer(candidate, lambda policy: _built(plans, plans.build(target, finalised)))

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Build one configuration for the target.

        Raises:
            PlanRejected: cuDNN refuses it; the reason is cuDNN's own.
            EngineUnavailable: cuDNN is missing.
        """
        plans = _Plans(self, problem, config)
        return _built(plans, plans.build(self._target()))

    def restore(self, problem: Problem, config: EngineConfig, policy: Policy, serialized: bytes) -> Built:
        """The same as `build`, from what `Built.serialize` gave, here or elsewhere, without compiling anything (C1).

        It is for the current GPU; on another one of this machine it is built when it first runs there.

        Raises:
            PlanRejected: it is no plan for this problem, configuration, GPU and cuDNN, or cuDNN does not take it.
            EngineUnavailable: cuDNN is missing.
        """
        plans = _Plans(self, problem, config)
        return _built(plans, plans.restore(self._target(), serialized))

    def build_execution_plan(self, problem: Problem, config: EngineConfig) -> ExecutionPlan:
        """The same as cuDNN's own plan, to be serialized or looked at."""
        return _Plans(self, problem, config).build(self._target())

    def restore_execution_plan(self, problem: Problem, config: EngineConfig, serialized: bytes) -> ExecutionPlan:
        """A plan from its JSON, after making sure that it is one for this problem and this GPU (C1).

        Raises:
            PlanRejected: it is not, or cuDNN does not take it.
        """
        return _Plans(self, problem, config).restore(self._target(), serialized)


def _variants(problem: Problem) -> list[tuple[Problem, dict[str, int]]]:
    """The problem as given, and with dense inputs where it has strided ones, in each form that cuDNN has engines for.

    With each the knobs that say which it is. What is not compiled comes first.
    """
    arranged = [(problem, dict[str, int]())]
    if is_strided(problem):
        as_given = [] if any(map(needs_copy, problem.inputs)) else arranged
        arranged = [*as_given, (dense(problem), {"dense": 1})]
    forms = [{"fused": form} if form else dict[str, int]() for form in _forms(problem)]
    return [(variant, {**knobs, **form}) for variant, knobs in arranged for form in forms]


def _forms(problem: Problem) -> tuple[int, ...]:
    """The values of `fused` that a problem can have."""
    if problem.epilogue.is_plain:
        return (SPECIALISED, 0) if takes_bias(problem) else (0,)
    return (SPECIALISED, GENERAL) if is_specialised(problem) else (GENERAL,)


def _graphs(problem: Problem, target: Target) -> Iterator[tuple[dict[str, int], Descriptor]]:
    """The operation graph of each variant that cuDNN takes at all, with the knobs that say which it is.

    Raises:
        CudnnError: it takes none; why it does not take the last of them.
    """
    refused: CudnnError | None = None
    taken = False
    for variant, knobs in _variants(problem):
        try:
            graph = operation_graph(target, variant, specialised=knobs.get("fused") == SPECIALISED)
        except CudnnError as exc:
            refused = exc
            continue
        taken = True
        yield knobs, graph
    if refused is not None and not taken:
        raise refused


def _with_few_compiled(candidates: Iterable[Candidate], most: int) -> list[Candidate]:
    """All of them, with those refused that fuse, are compiled, and come after so many that are."""
    compiled, found = 0, []
    for candidate in candidates:
        fuses = bool(candidate.config.knob("fused"))
        if fuses and COMPILED in candidate.notes.behavior and not candidate.refused:
            compiled += 1
            if compiled > most:
                before = f"{most} plans before it are compiled too" if most else "it is compiled to add a bias"
                reason = f"{before}; effort 'exhaustive' builds more"
                candidate = msgspec.structs.replace(candidate, refused=reason)
        found.append(candidate)
    return found


def _candidate(
    configuration: Configuration, knobs: dict[str, int], problem: Problem, target: Target, errata: Errata
) -> Candidate:
    config = EngineConfig.of(CudnnEngine.name, **{"engine": configuration.engine, **dict(configuration.knobs), **knobs})
    refused = errata.verdict(
        problem,
        configuration.engine,
        dict(configuration.knobs),
        cudnn_version=target.library.version,
        compute_capability=target.compute_capability,
        notes=configuration.notes.numerical,
        graph="statistics" if problem.epilogue.statistics else _GRAPH_KINDS[knobs.get("fused", 0)],
    )
    if not refused and COMPILED in configuration.notes.behavior and not target.library.can_compile:
        refused = "it is compiled at run time, and what that needs is missing; `convplan doctor` says what"
    extra = sum(spec.nbytes for spec in problem.inputs if spec.layout == "strided") if "dense" in knobs else 0
    workspace = configuration.workspace_bytes
    return Candidate(
        config=config,
        notes=configuration.notes,
        workspace_bytes=None if workspace is None else workspace + extra,
        # Engines may skip the zeros around an image, and then do little more than half in the smallest ones.
        flops=problem.flops / 2 if configuration.notes.direct else None,
        source=configuration.source,
        refused=refused,
    )


class _Plans:
    """One configuration's plans, one for each GPU that it has run on."""

    def __init__(self, engine: CudnnEngine, problem: Problem, config: EngineConfig) -> None:
        self._engine = engine
        self._problem = dense(problem) if config.knob("dense") else problem
        self._config = config
        if config.knob("fused") not in _forms(problem):
            raise self.rejected(f"there is no variant of this problem with fused={config.knob('fused')}")
        self._specialised = config.knob("fused") == SPECIALISED
        self.form = Form.of(problem, self._problem, self._specialised)
        self.by_index: dict[int, ExecutionPlan] = {}

    def build(self, target: Target, finalised: Descriptor | None = None) -> ExecutionPlan:
        """Build for a target; kept where that is a GPU of this machine.

        Args:
            finalised: the configuration as the target's cuDNN has it, where that was asked for already.
        """
        engine, knobs = self._chosen()
        try:
            if finalised is None:
                graph = operation_graph(target, self._problem, specialised=self._specialised)
                plan = build_plan(graph, target, engine, knobs, self.form.uids)
            else:
                plan = build_configured(finalised, target, self.form.uids)
        except (CudnnError, ValueError) as exc:
            clear_cuda_error(target.library)
            raise self.rejected(str(exc)) from exc
        return self._kept(target, plan)

    def restore(self, target: Target, serialized: bytes) -> ExecutionPlan:
        """The plan for a target from its serialized form; kept as a built one is."""
        engine, knobs = self._chosen()
        try:
            pattern = pattern_of(target)
            own = vetted(serialized, self._problem, pattern, engine, knobs, specialised=self._specialised)
            plan = restore_plan(target, own, self.form.uids)
        except (CudnnError, ValueError) as exc:
            clear_cuda_error(target.library)
            raise self.rejected(f"its serialized form: {exc}") from exc
        return self._kept(target, plan)

    def _chosen(self) -> tuple[int, dict[str, int]]:
        """cuDNN's index of the engine, and its knobs by name."""
        knobs = {name: value for name, value in self._config.knobs if name not in OURS}
        engine = knobs.pop("engine", None)
        if engine is None:
            raise self.rejected("the knob `engine`, cuDNN's index of an engine, is missing")
        return engine, knobs

    def _kept(self, target: Target, plan: ExecutionPlan) -> ExecutionPlan:
        if target.index is not None:
            self.by_index[target.index] = plan
        return plan

    def serialize(self, plan: ExecutionPlan) -> bytes:
        """One of the plans as JSON.

        Raises:
            PlanRejected: cuDNN does not offer that for its engine.
        """
        try:
            return plan.serialize()
        except CudnnError as exc:
            raise self.rejected(f"it cannot be serialized: {exc}") from exc

    def at(self, index: int) -> ExecutionPlan:
        """The plan for a GPU, which must be the current device; built at its first use there, but in no capture."""
        found = self.by_index.get(index)
        if found is not None:
            return found
        if self._engine.plans_for_absent:
            raise EngineUnavailable(
                engine=CudnnEngine.name,
                needs="the GPU that this plan was built for; plan anew for the one that is here",
            )
        if torch.cuda.is_current_stream_capturing():
            raise EngineUnavailable(engine=CudnnEngine.name, needs="a plan that ran on this GPU before the capture")
        return self.build(present(index))

    def rejected(self, reason: str) -> PlanRejected:
        """The error for this configuration."""
        return PlanRejected(engine=CudnnEngine.name, config=str(self._config), reason=reason)


def _built(plans: _Plans, plan: ExecutionPlan) -> Built:
    """What runs a plan that was built or restored."""
    run = make_run(plans.form, plans.at)
    copies = sum(spec.nbytes for spec in plans.form.copies if spec is not None)
    return Built(
        run=run,
        workspace_bytes=plan.workspace_bytes + copies,
        bind=functools.partial(bound_run, plans.form, plans.at, run),
        serialize=functools.partial(plans.serialize, plan),
        exact_strides=True,  # every result is allocated with them
    )

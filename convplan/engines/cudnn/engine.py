"""Engine `cudnn`: every plan that cuDNN's backend offers for a convolution on a GPU.

A configuration's knobs are `engine`, cuDNN's index of the engine, and cuDNN's own knobs by name. One knob is ours:

    dense   1: strided inputs are copied into a dense layout first, for engines that need one

A plan runs on the device of its first input and torch's current stream (B25), with workspace from torch's caching
allocator (B26), which hands memory out again only in stream order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_void_p
from typing import NamedTuple

import torch

from convplan._errors import EngineUnavailable, PlanRejected
from convplan._policy import Effort, Policy
from convplan._problem import Problem, TensorSpec
from convplan.engines._support import TORCH_DTYPES, empty
from convplan.engines.base import SEARCHED, Built, Candidate, EngineConfig, Offer, Run, Space, Support, no
from convplan.engines.cudnn.configs import (
    Configuration,
    described_configuration,
    engine_spaces,
    heuristic_configurations,
)
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor
from convplan.engines.cudnn.errata import Errata
from convplan.engines.cudnn.graph import UIDS, dense, is_strided, needs_copy, operation_graph, refusal
from convplan.engines.cudnn.library import clear_cuda_error
from convplan.engines.cudnn.plans import ExecutionPlan, build_configured, build_plan, restore_plan
from convplan.engines.cudnn.serialized import pattern_of, vetted
from convplan.engines.cudnn.target import Target, handle_of, present

_SOURCES: dict[str, tuple[str, ...]] = {
    "instant": ("mode_a", "fallback"),
    "measure": ("mode_a", "mode_b", "fallback"),
    "exhaustive": ("mode_a", "mode_b", "fallback"),
}
_LETTERS = {"fprop": "xwy", "dgrad": "ywx", "wgrad": "xyw"}  # first input, second input, output
COMPILED = "RUNTIME_COMPILATION"

# Bound once: a call costs a few microseconds in all. Builds of torch without CUDA lack them, and run no plan.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def _inductors_allocator() -> Callable[..., torch.Tensor] | None:
    """`empty_strided(dims, strides, dtype)` on the current GPU, as torch's own compiled code calls it.

    1.9 us on the host, where `torch.empty_strided` takes 3.3 (torch 2.11). None where torch does not have it.
    """
    guards = getattr(torch._C, "_dynamo", None)
    found = getattr(getattr(guards, "guards", None), "_empty_strided_cuda", None)
    return found if callable(found) else None


_allocate = _inductors_allocator()


class CudnnEngine:
    """The cuDNN backend; see the module's text.

    Args:
        target: the GPU to plan for, which need not be present (its plans are then built and not run). None: the current
            GPU of this machine.
    """

    name = "cudnn"
    by_default = True

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
        if effort == "instant":
            # Some engines take strided inputs and compute something else of them (cuDNN 9.19, H200). A plan that runs
            # unverified copies them, as stock torch does.
            graphs.reverse()
        for knobs, graph in graphs:
            for source in _SOURCES[effort]:
                for configuration in heuristic_configurations(graph, target, source):
                    candidate = _candidate(configuration, knobs, problem, target, errata)
                    found.setdefault(candidate.config, candidate)
        return list(found.values())

    def spaces(self, problem: Problem) -> Sequence[Space]:
        """One for each of cuDNN's engines that has anything to offer, with its knobs in the ranges that cuDNN tells.

        The heuristics propose values outside of those now and then (a `split_k_buf` of -1, cuDNN 9.19): these belong
        to the space too.
        """
        if not self.supports(problem).ok:
            return ()
        target = self._target()
        proposed: dict[tuple[int, str], set[int]] = {}
        for candidate in self.configs(problem, "exhaustive"):
            for name, value in candidate.config.knobs:
                proposed.setdefault((candidate.config.knob("engine"), name), set()).add(value)
        return [
            Space(
                fixed=(("engine", space.engine), *knobs.items()),
                free=tuple(
                    (name, tuple(sorted({*range(low, high + 1, step), *proposed.get((space.engine, name), ())})))
                    for name, low, high, step in space.knobs
                ),
            )
            for knobs, graph in _graphs(problem, target)
            for space in engine_spaces(graph, target)
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
        ours = {"dense": 1} if knobs.pop("dense", 0) else {}
        number = knobs.pop("engine", -1)
        try:
            graph = next((graph for variant, graph in _graphs(problem, target) if variant == ours), None)
            if graph is None:
                raise plans.rejected(f"there is no variant {ours or 'as given'} of this problem")
            described, finalised = described_configuration(graph, target, number, knobs, SEARCHED)
        except (CudnnError, ValueError) as exc:
            raise plans.rejected(str(exc)) from exc
        candidate = _candidate(described, ours, problem, target, Errata.load())
        return Offer(candidate, lambda policy: _built(problem, config, plans, plans.build(target, finalised)))

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Build one configuration for the target.

        Raises:
            PlanRejected: cuDNN refuses it; the reason is cuDNN's own.
            EngineUnavailable: cuDNN is missing.
        """
        plans = _Plans(self, problem, config)
        return _built(problem, config, plans, plans.build(self._target()))

    def restore(self, problem: Problem, config: EngineConfig, policy: Policy, serialized: bytes) -> Built:
        """The same as `build`, from what `Built.serialize` gave, here or elsewhere, without compiling anything (C1).

        It is for the current GPU; on another one of this machine it is built when it first runs there.

        Raises:
            PlanRejected: it is no plan for this problem, configuration, GPU and cuDNN, or cuDNN does not take it.
            EngineUnavailable: cuDNN is missing.
        """
        plans = _Plans(self, problem, config)
        return _built(problem, config, plans, plans.restore(self._target(), serialized))

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
    """The problem as given, and with dense inputs where it has strided ones, with the knob that says so."""
    if not is_strided(problem):
        return [(problem, {})]
    as_given = [] if any(map(needs_copy, problem.inputs)) else [(problem, dict[str, int]())]
    return [*as_given, (dense(problem), {"dense": 1})]


def _graphs(problem: Problem, target: Target) -> Iterator[tuple[dict[str, int], Descriptor]]:
    """The operation graph of each variant that cuDNN takes at all, with the knob that says which it is."""
    for variant, knobs in _variants(problem):
        try:
            graph = operation_graph(target, variant)
        except CudnnError:
            if knobs or len(_variants(problem)) == 1:
                raise
            continue  # strides that no engine reads; the dense variant follows
        yield knobs, graph


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
    )
    if not refused and COMPILED in configuration.notes.behavior and not target.library.can_compile:
        refused = "it is compiled at run time, and what that needs is missing; `convplan doctor` says what"
    extra = sum(spec.nbytes for spec in problem.inputs if spec.layout == "strided") if knobs else 0
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
        self.uids = tuple(UIDS[letter] for letter in _LETTERS[problem.op])
        self.by_index: dict[int, ExecutionPlan] = {}

    def build(self, target: Target, finalised: Descriptor | None = None) -> ExecutionPlan:
        """Build for a target; kept where that is a GPU of this machine.

        Args:
            finalised: the configuration as the target's cuDNN has it, where that was asked for already.
        """
        engine, knobs = self._chosen()
        try:
            if finalised is None:
                plan = build_plan(operation_graph(target, self._problem), target, engine, knobs, self.uids)
            else:
                plan = build_configured(finalised, target, self.uids)
        except (CudnnError, ValueError) as exc:
            clear_cuda_error(target.library)
            raise self.rejected(str(exc)) from exc
        return self._kept(target, plan)

    def restore(self, target: Target, serialized: bytes) -> ExecutionPlan:
        """The plan for a target from its serialized form; kept as a built one is."""
        engine, knobs = self._chosen()
        try:
            plan = restore_plan(target, vetted(serialized, self._problem, pattern_of(target), engine, knobs), self.uids)
        except (CudnnError, ValueError) as exc:
            clear_cuda_error(target.library)
            raise self.rejected(f"its serialized form: {exc}") from exc
        return self._kept(target, plan)

    def _chosen(self) -> tuple[int, dict[str, int]]:
        """cuDNN's index of the engine, and its knobs by name."""
        knobs = dict(self._config.knobs)
        knobs.pop("dense", None)
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
        """The plan for a GPU, which must be the current device."""
        found = self.by_index.get(index)
        if found is not None:
            return found
        if self._engine.plans_for_absent:
            raise EngineUnavailable(
                engine=CudnnEngine.name,
                needs="the GPU that this plan was built for; plan anew for the one that is here",
            )
        return self.build(present(index))

    def rejected(self, reason: str) -> PlanRejected:
        """The error for this configuration."""
        return PlanRejected(engine=CudnnEngine.name, config=str(self._config), reason=reason)


def _built(problem: Problem, config: EngineConfig, plans: _Plans, plan: ExecutionPlan) -> Built:
    """What runs a plan that was built or restored."""
    form = _Form.of(problem, config)
    run = _make_run(form, plans)
    copies = sum(spec.nbytes for spec in form.copies if spec is not None)
    return Built(
        run=run,
        workspace_bytes=plan.workspace_bytes + copies,
        bind=functools.partial(_bound_run, form, plans, run),
        serialize=functools.partial(plans.serialize, plan),
        exact_strides=True,  # every result is allocated with them
    )


class _Form(NamedTuple):
    """What a run needs to know of its problem, worked out once."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    bias_shape: tuple[int, ...]
    copies: tuple[TensorSpec | None, TensorSpec | None]  # the layout that an input is copied into, None for as it is

    @classmethod
    def of(cls, problem: Problem, config: EngineConfig) -> _Form:
        made = dense(problem) if config.knob("dense") else problem
        pairs = zip(problem.inputs, made.inputs, strict=True)
        first, second = (after if before.strides != after.strides else None for before, after in pairs)
        spec = problem.output
        bias_shape = (1, -1, *[1] * problem.spatial_rank)
        return cls(spec.dims, spec.strides, TORCH_DTYPES[spec.dtype], bias_shape, (first, second))

    def place(self, out: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """`out` where a plan can write to it, else a new tensor."""
        if out is not None and out.stride() == self.strides and not out.data_ptr() & 31:
            return out
        return torch.empty_strided(self.dims, self.strides, dtype=self.dtype, device=device)

    def arranged(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs in layouts that the engine reads."""
        one, two = self.copies
        return (
            first if one is None else empty(one, first.device).copy_(first),
            second if two is None else empty(two, second.device).copy_(second),
        )


def _make_run(form: _Form, plans: _Plans) -> Run:
    """A run for any thread and any GPU of this machine."""

    def run(
        first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        index = first.get_device()
        if index < 0 or not torch.cuda.is_available():
            raise EngineUnavailable(engine=CudnnEngine.name, needs=f"tensors on a GPU to run, found {first.device}")
        with torch.cuda.device(index):
            first, second = form.arranged(first, second)
            result = form.place(out, first.device)
            plan = plans.at(index)
            handle = handle_of(plan.descriptor.library, index)
            handle.set_stream(_raw_stream(index))
            # Freed when this returns, and given out again in the order of this stream only.
            scratch = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=first.device)
            plan.execute(handle, (first.data_ptr(), second.data_ptr(), result.data_ptr(), scratch.data_ptr()))
            if bias is not None:
                result.add_(bias.reshape(form.bias_shape))
        return result if out is None or result is out else out.copy_(result)

    return run


def _bound_run(form: _Form, plans: _Plans, run: Run) -> Run:
    """The same for the calling thread and the current GPU: what the hot path calls.

    One allocation for the output, one for workspace if any, a look-up, a launch. Whatever is rare goes to `run`.
    """
    if not torch.cuda.is_available():
        raise EngineUnavailable(engine=CudnnEngine.name, needs="a GPU to run plans on (they can be built without)")
    index = torch.cuda.current_device()
    plan = plans.at(index)
    handle = handle_of(plan.descriptor.library, index)
    if any(form.copies) or _allocate is None:
        return run
    dims, strides, dtype, bias_shape = form.dims, form.strides, form.dtype, form.bias_shape
    allocate, raw_stream, current_device = _allocate, _raw_stream, _current_device
    packs, execute = plan.packs, plan.descriptor.library.execute_unchecked
    # Made once: ctypes would make them from numbers at every call.
    handle_pointer, plan_pointer = c_void_p(handle.pointer), c_void_p(plan.descriptor.pointer)
    workspace, several = (plan.workspace_bytes,), torch.cuda.device_count() > 1
    no_scratch, byte, unit = not plan.workspace_bytes, torch.uint8, (1,)

    def bound(
        first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        if out is not None or (several and current_device() != index):
            return run(first, second, bias, out)
        result: torch.Tensor = allocate(dims, strides, dtype)
        stream = raw_stream(index)
        if stream != handle.stream:
            handle.set_stream(stream)
        if no_scratch:
            addresses = (first.data_ptr(), second.data_ptr(), result.data_ptr(), 0)
        else:
            scratch = allocate(workspace, unit, byte)
            addresses = (first.data_ptr(), second.data_ptr(), result.data_ptr(), scratch.data_ptr())
        pack = packs.get(addresses)
        if pack is None:
            pack = plan.pack(addresses)
        status = execute(handle_pointer, plan_pointer, pack)
        if status:
            plan.failed(status)
        return result if bias is None else result.add_(bias.reshape(bias_shape))

    return bound

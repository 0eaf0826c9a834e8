"""Engine `composed`: an unfused plan of another engine, and what follows it behind that (B31).

On a GPU that is one pass over the result, `kernels.follow`, where it is channels-last; elsewhere torch's elementwise
kernels, one after the other. Statistics are `kernels.column_sums` of what the unfused plan wrote, and a gate is torch's
`threshold_backward` of it.

It proposes nothing by itself: the planner hands it the leading plans of the problem's `core`, and they race against the
engines that fuse. Its configuration holds the other engine's knobs and, as the name of one more, that engine:

    composed[by_cudnn=1, engine=62, tile_size=3]

What is not plain for the other engine is done in the dtype of the core's output: by torch's kernels each step rounded
to it, as its own modules do, by the one pass in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from convplan import engines
from convplan._errors import PlanRejected, PolicyError
from convplan._plan import Evidence
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan.engines._epilogues import apply_epilogue
from convplan.engines._support import TORCH_DTYPES, deliver, in_range
from convplan.engines.base import (
    LAST_RESORT,
    YES,
    Built,
    Candidate,
    Engine,
    EngineConfig,
    Offer,
    Offering,
    Restoring,
    Run,
    Searchable,
    Support,
    no,
)
from convplan.kernels import column_sums, follow

NAME = "composed"
SOURCE = "unfused"
_BY = "by_"


def composed_config(config: EngineConfig) -> EngineConfig:
    """The configuration that runs another one, with the epilogue behind it."""
    return EngineConfig(NAME, tuple(sorted((*config.knobs, (f"{_BY}{config.engine}", 1)))))


def unfused_config(config: EngineConfig) -> EngineConfig:
    """The configuration that a composed one runs.

    Raises:
        PlanRejected: it names no other engine, or several.
    """
    names = [name for name, _ in config.knobs if name.startswith(_BY)]
    if config.engine != NAME or len(names) != 1 or names[0] == f"{_BY}{NAME}":
        raise PlanRejected(engine=NAME, config=str(config), reason=f"found {names}, expected one knob {_BY}ENGINE")
    return EngineConfig(names[0].removeprefix(_BY), tuple(knob for knob in config.knobs if knob[0] != names[0]))


def composed_candidate(evidence: Evidence) -> Candidate:
    """A candidate for a problem, by what is known of its core's."""
    return Candidate(
        config=composed_config(evidence.config),
        notes=evidence.notes,
        workspace_bytes=evidence.workspace_bytes,
        source=evidence.source if evidence.source == LAST_RESORT else SOURCE,
    )


class ComposedEngine:
    """Other engines' unfused plans with the epilogue behind them; see the module's text."""

    name = NAME
    by_default = False
    fuses = True

    def supports(self, problem: Problem) -> Support:
        """Problems with an epilogue of more than a bias."""
        return no("nothing follows the convolution") if problem.epilogue.is_plain else YES

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """None: which unfused plans are worth it is known to the planner."""
        return ()

    def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
        """A configuration, with what its engine says of the one that it runs.

        Raises:
            PlanRejected: there is no such configuration.
        """
        return self.offer(problem, config).candidate

    def offer(self, problem: Problem, config: EngineConfig) -> Offer:
        """The same, with what builds it.

        Raises:
            PlanRejected: as `candidate`.
        """
        engine, inner, core = _unfused(problem, config)
        known = Candidate(inner)
        if isinstance(engine, Offering):
            known = engine.offer(core, inner).candidate
        elif isinstance(engine, Searchable):
            known = engine.candidate(core, inner)
        candidate = Candidate(
            config,
            notes=known.notes,
            workspace_bytes=known.workspace_bytes,
            refused=known.refused,
            source=known.source if known.source == LAST_RESORT else SOURCE,
        )
        return Offer(candidate, lambda policy: self.build(problem, config, policy))

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Build the unfused plan.

        Raises:
            PlanRejected: its engine refuses it, or there is no such engine.
            EngineUnavailable: its library is missing.
        """
        engine, inner, core = _unfused(problem, config)
        return _with_epilogue(problem, core, engine.build(core, inner, policy))

    def restore(self, problem: Problem, config: EngineConfig, policy: Policy, serialized: bytes) -> Built:
        """The same from the unfused plan's serialized form.

        Raises:
            PlanRejected: its engine restores nothing, or not this.
        """
        engine, inner, core = _unfused(problem, config)
        if not isinstance(engine, Restoring):
            raise PlanRejected(engine=NAME, config=str(config), reason=f"engine {engine.name} restores no plans")
        return _with_epilogue(problem, core, engine.restore(core, inner, policy, serialized))


def _unfused(problem: Problem, config: EngineConfig) -> tuple[Engine, EngineConfig, Problem]:
    """The other engine, its configuration, and the problem it runs."""
    inner = unfused_config(config)
    if problem.epilogue.is_plain:
        raise PlanRejected(engine=NAME, config=str(config), reason="nothing follows the convolution")
    try:
        engine = engines.registry.get(inner.engine)
    except PolicyError as exc:
        raise PlanRejected(engine=NAME, config=str(config), reason=str(exc)) from exc
    core = problem.core
    answer = engine.supports(core)
    if not answer.ok:
        raise PlanRejected(engine=NAME, config=str(config), reason=answer.reason)
    return engine, inner, core


def _with_epilogue(problem: Problem, core: Problem, built: Built) -> Built:
    converts = core.dtype != problem.dtype
    extra = core.inputs[0].nbytes + core.inputs[1].nbytes if converts else 0
    extra += core.output.nbytes if core.output_dtype != problem.output_dtype else 0

    def bound() -> Run:
        assert built.bind is not None
        return _run(problem, core, built.bind())

    return Built(
        run=_run(problem, core, built.run),
        workspace_bytes=built.workspace_bytes + extra,
        bind=None if built.bind is None else bound,
        serialize=built.serialize,
    )


def _run(problem: Problem, core: Problem, run_core: Run) -> Run:
    epilogue, output = problem.epilogue, problem.output
    read = TORCH_DTYPES[core.dtype] if core.dtype != problem.dtype else None
    strides, dtype = output.strides, TORCH_DTYPES[output.dtype]
    bias_in_core = core.epilogue.bias
    gated, closed = epilogue.gate, torch.ops.aten.threshold_backward.grad_input
    how = (epilogue.alpha, epilogue.activation, epilogue.parameters)
    # Torch has this as one pass on the CPU, in float32.
    adds_and_ends = (problem.device, core.output_dtype, output.dtype) == ("cpu", "float32", "float32") and (
        epilogue.residual and not epilogue.scale and epilogue.activation == "relu"
    )

    def run(
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor | None,
        residual: torch.Tensor | None,
        scale: torch.Tensor | None,
        beside: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if read is not None:
            first, second = first.to(read), second.to(read)
        result = run_core(first, second, bias if bias_in_core else None, None)
        if gated:
            closed(result, beside, 0, grad_input=result)
        elif beside is not None:
            column_sums(result, beside)
        elif adds_and_ends:
            torch.ops.aten._add_relu_.Tensor(result, residual, alpha=epilogue.alpha)
        else:
            added = None if bias_in_core else bias
            if not follow(result, added, residual, scale, *how):
                result = apply_epilogue(result, epilogue, added, residual, scale)
        if out is None and result.dtype == dtype and result.stride() == strides:
            return result
        if result.dtype != dtype:
            result = in_range(result, output.dtype)
        return deliver(result, output, out)

    return cast(Run, run)

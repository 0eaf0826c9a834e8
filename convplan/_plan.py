"""The result of planning: `PlanRecord`, which is ranked, explained and stored, and `Plan`, which runs."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from convplan._environment import Environment
from convplan._epilogue import MAX_ALIGNMENT_BYTES
from convplan._errors import ExecutionFailed, PlanRejected, SpecError
from convplan._key import plan_key
from convplan._limits import Limit, Peaks, limit_us
from convplan._policy import Effort, Policy
from convplan._problem import Problem, TensorSpec, normalize_strides
from convplan._ranges import ranged
from convplan.engines.base import Built, Engine, EngineConfig, Notes, Restoring, Run

if TYPE_CHECKING:
    import torch

log = logging.getLogger("convplan.plan")

MAX_CANDIDATES = 10_000


def utc_now() -> str:
    """The time in ISO 8601, as records and files hold it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What planning found out about one candidate: a measurement, or the stage and reason of its rejection.

    Args:
        config: which candidate.
        source: the list that proposed it.
        stock: what stock torch runs exactly like this, such as `convolution`; empty for what it does not do by itself.
        notes: its numerical and behaviour notes.
        workspace_bytes: scratch memory, None when it was dropped before that was known.
        median_us, spread_us: middle and half the interquartile range of the timed runs, in microseconds; None when
            it was not timed (effort `instant`, or rejected before).
        samples_us: every timed run.
        error: largest difference from the float64 reference over what the arithmetic allows; 1 is the limit.
        verified: how the output was checked: `full`, `sample` (some outputs against the reference, all against the
            other candidates), or `no`.
        rejected: the stage that dropped it (`enumerate`, `filter`, `build`, `verify`, `measure`, or `run` for one that
            failed later; in an exhaustive search also `crash`, `stall`, `corrupt` for one that wrote where it must not,
            and `leak`), empty for a usable one.
        reason: why; for a usable one a remark, such as how it was timed where that is not the usual way.
    """

    config: EngineConfig
    source: str = "heuristic"
    stock: str = ""
    notes: Notes = Notes()
    workspace_bytes: int | None = None
    median_us: float | None = None
    spread_us: float | None = None
    samples_us: tuple[float, ...] = ()
    error: float | None = None
    verified: str = "no"
    rejected: str = ""
    reason: str = ""


class PlanRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One planned problem with all the evidence: usable candidates best first, then the rejected ones.

    Args:
        problem, policy, environment: the question; the policy is resolved (no flag is None).
        effort: the work that produced the answer.
        ranking: candidates that may run, best first; `ranking[0]` is the choice, the next ones are its fallbacks.
        rejected: every other candidate, with its reason.
        planning_s: seconds that planning took.
        stages_s: how they fell to the stages, as (name, seconds); empty where that was not kept.
        created: UTC time in ISO 8601.
        version: convplan's version.
        curve: how an exhaustive search went: (seconds since it began, best microseconds so far), one pair for each
            improvement and one for its end.
        peaks: the machine's peak rates for this problem, None in plans of a convplan that did not note them.
    """

    problem: Problem
    policy: Policy
    environment: Environment
    effort: Effort
    ranking: tuple[Evidence, ...]
    rejected: tuple[Evidence, ...] = ()
    planning_s: float = 0.0
    stages_s: tuple[tuple[str, float], ...] = ()
    created: str = ""
    version: str = ""
    curve: tuple[tuple[float, float], ...] = ()
    peaks: Peaks | None = None

    def __post_init__(self) -> None:
        if not self.ranking or len(self.ranking) + len(self.rejected) > MAX_CANDIDATES:
            raise SpecError(f"a plan record needs 1 to {MAX_CANDIDATES} candidates, found {len(self.ranking)} usable")
        if self.policy.deterministic is None or self.policy.allow_tf32 is None:
            raise SpecError("a plan record needs a resolved policy: deterministic and allow_tf32 must not be null")

    @property
    def key(self) -> str:
        """The stored plan's key: 32 hexadecimal digits."""
        return plan_key(self.problem, self.policy, self.environment)

    @property
    def config(self) -> EngineConfig:
        """The chosen configuration."""
        return self.ranking[0].config

    @property
    def median_us(self) -> float | None:
        """The choice's time in microseconds, None when it was not timed."""
        return self.ranking[0].median_us

    @property
    def limit(self) -> Limit | None:
        """The least time that the machine's peak rates allow for the direct method; None where they are not known."""
        return None if self.peaks is None else limit_us(self.problem, self.peaks)

    def explain(self, *, every_rejection: bool = False) -> str:
        """What planning found, as text: times, stock torch, the hardware limit, notes and reasons. Measures nothing.

        Args:
            every_rejection: list each rejected candidate, instead of a few for each reason.
        """
        from convplan.report import explain_record

        return explain_record(self, every_rejection=every_rejection)

    def build(self, rank: int = 0, *, serialized: bytes | None = None) -> Plan:
        """Build the choice, or the candidate ranked `rank`, into something that runs.

        Args:
            rank: which candidate.
            serialized: what `Built.serialize` gave for it, here or elsewhere: it is restored then, if its engine takes
                that, and else built. None: it is built.

        Raises:
            PlanRejected: the engine refuses the configuration now.
            EngineUnavailable: its library is missing now.
            PolicyError: no engine of that name is registered.
            SpecError: there is no such rank.
        """
        if not 0 <= rank < len(self.ranking):
            raise SpecError(f"rank is {rank}, expected 0 to {len(self.ranking) - 1} ({len(self.ranking)} usable plans)")
        from convplan.engines import registry

        evidence = self.ranking[rank]
        engine = registry.get(evidence.config.engine)
        built = None if serialized is None else self._restored(engine, evidence.config, serialized)
        restored = built is not None
        built = built or engine.build(self.problem, evidence.config, self.policy)
        return Plan(self.problem, evidence.config, built, restored=restored)

    def _restored(self, engine: Engine, config: EngineConfig, serialized: bytes) -> Built | None:
        if not isinstance(engine, Restoring):
            return None
        try:
            return engine.restore(self.problem, config, self.policy, serialized)
        except PlanRejected as exc:
            log.warning("a serialized plan is not used, and built anew: %s", exc)
            return None

    def __str__(self) -> str:
        timed = "" if self.median_us is None else f" {self.median_us:.1f} us"
        return f"{self.problem} -> {self.config}{timed} ({self.effort})"

    def __repr__(self) -> str:
        return f"<PlanRecord {self}>"


class Plan:
    """A convolution that is ready to run, as often as you like, from any thread. Holds no tensor.

    Made by `PlanRecord.build()`.

    Attributes:
        problem: what it computes; fixes dims, strides and dtype of every tensor.
        config: engine and knobs.
        workspace_bytes: scratch memory it takes while it runs.
        restored: it was restored from its serialized form, and not built.
        as_torch: the entry of torch it is nothing but a call of, see `Built`.
        exact_strides: its results have just the strides that the problem says, see `Built`.
    """

    __slots__ = (
        "_bind", "as_torch", "config", "exact_strides", "problem", "restored", "unchecked_run", "workspace_bytes"
    )  # fmt: skip

    def __init__(self, problem: Problem, config: EngineConfig, built: Built, *, restored: bool = False) -> None:
        self.restored = restored
        self.problem = problem
        self.config = config
        self.workspace_bytes = built.workspace_bytes
        self.as_torch, self.exact_strides = built.as_torch, built.exact_strides
        self._bind = built.bind
        self.unchecked_run = built.run

    def run(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute. No gradient is recorded; use `convplan.conv2d` and friends for that.

        Args:
            first, second: (x, w) for fprop, (y, w) for dgrad, (x, y) for wgrad, as the problem describes them.
            bias: one number per output channel, required when the problem's epilogue has a bias.
            residual: a tensor like the output, required when the epilogue has one.
            scale: one number per output channel, required when the epilogue has a scale.
            out: a tensor of the output's dims and dtype to write into, with any strides. None: a new one.
            sums: (2, K), float32, contiguous, to write each channel's sum and sum of squares into, required when the
                epilogue has statistics.
            gate: a tensor like the output, at an address that 32 divides on a GPU, required when the epilogue has a
                gate: the result is 0 where it is not above 0.

        Returns:
            The output; `out` itself when given.

        Raises:
            SpecError: a tensor does not match the problem.
            ExecutionFailed: the engine failed; it carries the reason.
        """
        first_spec, second_spec = self.problem.inputs
        _check_tensor("first input", first, first_spec, self.problem.device)
        _check_tensor("second input", second, second_spec, self.problem.device)
        epilogue = self.problem.epilogue
        if bias is not None or epilogue.bias:
            self._check_vector("bias", bias, epilogue.bias, self.problem.bias_dtype)
        if scale is not None or epilogue.scale:
            self._check_vector("scale", scale, epilogue.scale, self.problem.scale_dtype)
        if residual is not None or epilogue.residual:
            self._check_residual(residual)
        if sums is not None or epilogue.statistics:
            self._check_sums(sums)
        if gate is not None or epilogue.gate:
            self._check_gate(gate)
        if out is not None:
            check_distinct(out)
            _check_tensor("out", out, self.problem.output, self.problem.device, any_strides=True)
        import torch

        try:
            with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
                run = ranged(self.unchecked_run, self)
                more = () if epilogue.is_plain else (residual, scale)
                beside = gate if sums is None else sums
                if beside is not None:
                    more = (*more, beside)
                if out is not None and shares_memory(out, (first, second, bias, *more)):
                    return out.copy_(run(first, second, bias, None, *more))
                return run(first, second, bias, out, *more)
        except RuntimeError as exc:
            raise ExecutionFailed(plan=f"{self.problem}", tried=[(str(self.config), str(exc))]) from exc

    __call__ = run

    def bound_run(self) -> Run:
        """`unchecked_run` for the calling thread and the current device only, which is cheaper where that matters."""
        return self.unchecked_run if self._bind is None else self._bind()

    def _check_vector(self, name: str, given: torch.Tensor | None, wanted: bool, dtype: str) -> None:
        if given is None or not wanted:
            found = "missing" if given is None else "given"
            raise SpecError(f"{name} is {found}, the problem says Epilogue({name}={wanted})")
        channels = self.problem.output.dims[1]
        if tuple(given.shape) != (channels,) or _dtype_name(given) != dtype:
            raise SpecError(f"{name} is {tuple(given.shape)} {_dtype_name(given)}, expected ({channels},) {dtype}")

    def _check_sums(self, sums: torch.Tensor | None) -> None:
        if sums is None or not self.problem.epilogue.statistics:
            found, wanted = "missing" if sums is None else "given", self.problem.epilogue.statistics
            raise SpecError(f"sums is {found}, the problem says Epilogue(statistics={wanted})")
        dims = (2, self.problem.output.dims[1])
        if tuple(sums.shape) != dims or _dtype_name(sums) != "float32" or not sums.is_contiguous():
            kind = "contiguous" if sums.is_contiguous() else f"with strides {sums.stride()}"
            raise SpecError(
                f"sums is {tuple(sums.shape)} {_dtype_name(sums)} {kind}, expected {dims} float32 contiguous"
            )
        if sums.device.type != self.problem.device:
            raise SpecError(f"sums is on {sums.device}, expected device type {self.problem.device!r}")
        if self.problem.device != "cpu" and sums.data_ptr() % MAX_ALIGNMENT_BYTES:
            raise SpecError(
                f"sums is at an address that {MAX_ALIGNMENT_BYTES} does not divide, expected one that torch.empty gives"
            )

    def _check_gate(self, gate: torch.Tensor | None) -> None:
        if gate is None or not self.problem.epilogue.gate:
            found, wanted = "missing" if gate is None else "given", self.problem.epilogue.gate
            raise SpecError(f"gate is {found}, the problem says Epilogue(gate={wanted})")
        spec = msgspec.structs.replace(self.problem.output, alignment_bytes=MAX_ALIGNMENT_BYTES)
        _check_tensor("gate", gate, spec, self.problem.device)

    def _check_residual(self, residual: torch.Tensor | None) -> None:
        epilogue = self.problem.epilogue
        if residual is None or not epilogue.residual:
            found = "missing" if residual is None else "given"
            raise SpecError(f"residual is {found}, the problem says Epilogue(residual={epilogue.residual})")
        spec = msgspec.structs.replace(self.problem.output, alignment_bytes=epilogue.residual_alignment_bytes)
        _check_tensor("residual", residual, spec, self.problem.device)

    def __repr__(self) -> str:
        return f"Plan({self.config}, {self.problem})"


def shares_memory(out: torch.Tensor, inputs: Sequence[torch.Tensor | None]) -> bool:
    """Whether writing to `out` could change an input while it is still read."""
    mine = out.untyped_storage().data_ptr()
    return any(tensor is not None and tensor.untyped_storage().data_ptr() == mine for tensor in inputs)


def check_distinct(out: torch.Tensor) -> None:
    """Refuse an `out` whose elements share memory, as an expanded tensor's do.

    Raises:
        SpecError: it does.
    """
    if any(size > 1 and stride == 0 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise SpecError(f"out has strides {out.stride()}, expected a place in memory for each element; use .clone()")


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_tensor(what: str, tensor: torch.Tensor, spec: TensorSpec, device: str, *, any_strides: bool = False) -> None:
    if tensor.device.type != device:
        raise SpecError(f"{what} is on {tensor.device}, expected device type {device!r}")
    dims = tuple(tensor.shape)
    if dims != spec.dims or _dtype_name(tensor) != spec.dtype:
        raise SpecError(f"{what} is {dims} {_dtype_name(tensor)}, expected {spec.dims} {spec.dtype}")
    if device != "cpu" and not any_strides and tensor.data_ptr() % spec.alignment_bytes:
        # A GPU engine chosen for wider loads would fault, and take the process's CUDA context with it.
        raise SpecError(
            f"{what} is at an address that {spec.alignment_bytes} does not divide, expected alignment_bytes "
            f"{spec.alignment_bytes}; plan a problem for its alignment"
        )
    if any_strides or tensor.stride() == spec.strides:
        return
    if normalize_strides(dims, tensor.stride()) != spec.strides:
        raise SpecError(f"{what} has strides {tensor.stride()}, expected {spec.strides}; plan a problem for its layout")

"""Every exception convplan raises, as one tree.

    ConvPlanError
    ├── SpecError (also ValueError)     the problem is malformed
    │   └── PolicyError                 the policy is malformed, or names an engine nobody registered
    ├── NoPlan                          nothing survived              .problem .policy .rejections
    │   ├── ReplayMiss                  replay mode, and the store does not hold the problem
    │   └── CaptureMiss                 met while a CUDA graph is captured, with no plan ready, when none may be made
    ├── TooLarge                        no memory to measure with     .problem .needed_bytes .free_bytes
    ├── PlanRejected                    one engine, one config        .engine .config .reason
    │   └── WrongResult                 its output differs from the reference
    ├── EngineUnavailable               library or device missing     .engine .needs
    ├── ExecutionFailed                 failed while running          .plan .tried
    ├── FuseError                       a model cannot be fused       .model .reason
    ├── ErrataError (also ValueError)   a file of errata is malformed .path .rule .field
    └── StoreError                      plan store or plan file       .path
        ├── StoreBusy                   locked too long               .waited_s
        ├── StoreMismatch               other schema                  .found .expected
        └── PlanFileError (also ValueError)  a JSON file of plans or problems that cannot be read

Each exception carries its data as attributes and builds its sentence from them, so callers never parse text, and each
survives pickling (planning may happen in another process).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


def _rebuild(cls: type[ConvPlanError], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvPlanError:
    return cls(*args, **kwargs)


class ConvPlanError(Exception):
    """Base of everything convplan raises on purpose."""

    _kwargs: Mapping[str, Any] = MappingProxyType({})  # what to call the constructor with again

    def __reduce__(self) -> tuple[Callable[..., ConvPlanError], tuple[Any, ...]]:
        # The default rebuilds from `args` alone and fails for constructors that take keywords only.
        return _rebuild, (type(self), () if self._kwargs else self.args, dict(self._kwargs))


class SpecError(ConvPlanError, ValueError):
    """A convolution is described in a way that has no meaning: says what was found, what was expected and why."""


class PolicyError(SpecError):
    """A policy holds a value that has no meaning, or names an engine that is not registered."""


class NoPlan(ConvPlanError):
    """No candidate survived planning.

    Attributes:
        problem: text of the problem.
        policy: text of the policy.
        rejections: one `(config, reason)` pair of strings for each candidate, in the order they were tried.
    """

    def __init__(self, *, problem: str, policy: str, rejections: Sequence[tuple[str, str]] = ()) -> None:
        self._kwargs = {"problem": problem, "policy": policy, "rejections": tuple(rejections)}
        self.problem, self.policy, self.rejections = problem, policy, tuple(rejections)
        listed = "".join(f"\n  {config}: {reason}" for config, reason in self.rejections)
        super().__init__(
            f"no engine runs this problem within the policy\n  problem: {problem}\n  policy: {policy}"
            + (listed or "\n  no engine proposed a candidate")
        )


class ReplayMiss(NoPlan):
    """Replay mode never tunes, and the store holds no plan for this problem."""

    def __init__(self, *, problem: str, policy: str, rejections: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(problem=problem, policy=policy, rejections=rejections)
        self.args = (
            f"replay mode: no stored plan for {problem} under {policy}. Tune it first (convplan.tune), "
            "or set replay_miss='instant' to run an untuned plan",
        )


class CaptureMiss(NoPlan):
    """A problem was met while a CUDA graph was being captured, and no plan was ready: none may be built then."""

    def __init__(self, *, problem: str, policy: str, rejections: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(problem=problem, policy=policy, rejections=rejections)
        self.args = (
            f"no plan is ready for {problem} under {policy}, and none can be made while a CUDA graph is captured. Run "
            "the same code before the capture (on a side stream, in the same threads) or tune it (convplan.tune), "
            "or set capture_miss='stock' to capture stock torch's kernel",
        )


class TooLarge(ConvPlanError):
    """There is too little memory to measure a problem: planning works on tensors of its own.

    Attributes:
        problem: text of the problem.
        needed_bytes: what two sets of its tensors take, the least that comparing needs.
        free_bytes: what the device can provide now.
    """

    def __init__(self, *, problem: str, needed_bytes: int, free_bytes: int) -> None:
        self._kwargs = {"problem": problem, "needed_bytes": needed_bytes, "free_bytes": free_bytes}
        self.problem, self.needed_bytes, self.free_bytes = problem, needed_bytes, free_bytes
        super().__init__(
            f"too large to be measured here: planning needs {needed_bytes} bytes or more for tensors of its own, and "
            f"{free_bytes} are free, for {problem}. Free some memory, tune it on a larger device, or use "
            "effort='instant', which measures nothing"
        )


class PlanRejected(ConvPlanError):
    """One engine refuses, or fails at, one configuration."""

    def __init__(self, *, engine: str, reason: str, config: str = "") -> None:
        self._kwargs = {"engine": engine, "reason": reason, "config": config}
        self.engine, self.config, self.reason = engine, config, reason
        super().__init__(f"{config or engine}: {reason}")


class WrongResult(PlanRejected):
    """A candidate's output differs from the reference by more than its arithmetic can explain."""


class EngineUnavailable(ConvPlanError):
    """An engine's library or device is missing."""

    def __init__(self, *, engine: str, needs: str) -> None:
        self._kwargs = {"engine": engine, "needs": needs}
        self.engine, self.needs = engine, needs
        super().__init__(f"engine {engine!r} is not available: {needs}")


class ExecutionFailed(ConvPlanError):
    """A plan failed while it ran, and so did every plan ranked after it."""

    def __init__(self, *, plan: str, tried: Sequence[tuple[str, str]]) -> None:
        self._kwargs = {"plan": plan, "tried": tuple(tried)}
        self.plan, self.tried = plan, tuple(tried)
        listed = "".join(f"\n  {config}: {reason}" for config, reason in self.tried)
        super().__init__(f"every plan failed while running {plan}{listed}")


class FuseError(ConvPlanError):
    """A model cannot be fused, or the fused one differs from it: says what was found and what can be done.

    Attributes:
        model: name of its class.
        reason: what was found.
    """

    def __init__(self, *, model: str, reason: str) -> None:
        self._kwargs = {"model": model, "reason": reason}
        self.model, self.reason = model, reason
        super().__init__(
            f"{model} cannot be fused: {reason}. Fuse parts of it that can be traced, or leave that to torch.compile "
            "with convplan.compile_options(fuse=True)"
        )


class ErrataError(ConvPlanError, ValueError):
    """A file of errata cannot be read or is malformed: says which rule and field, what was found and what expected.

    Attributes:
        path: the file.
        rule: id of the rule, `rules[0]` for one without, empty when it is about the whole file.
        field: the field, empty when it is about the whole rule or file.
    """

    def __init__(self, *, path: str, reason: str, rule: str = "", field: str = "") -> None:
        self._kwargs = {"path": path, "reason": reason, "rule": rule, "field": field}
        self.path, self.rule, self.field, self.reason = path, rule, field, reason
        place = ", ".join(text for text in (rule and f"rule {rule}", field and f"field {field}") if text)
        super().__init__(f"{path}: {place}: {reason}" if place else f"{path}: {reason}")


class StoreError(ConvPlanError):
    """The plan store or a plan file cannot be used."""

    def __init__(self, *, path: str, reason: str) -> None:
        self._kwargs = {"path": path, "reason": reason}
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class StoreBusy(StoreError):
    """Another process held the store's lock for too long."""

    def __init__(self, *, path: str, waited_s: float) -> None:
        super().__init__(path=path, reason=f"locked by another process for more than {waited_s:g} s; try again later")
        self._kwargs = {"path": path, "waited_s": waited_s}
        self.waited_s = waited_s


class StoreMismatch(StoreError):
    """The store or file was written with another schema."""

    def __init__(self, *, path: str, found: str, expected: str) -> None:
        super().__init__(path=path, reason=f"schema {found}, expected {expected}; it is left as it is")
        self._kwargs = {"path": path, "found": found, "expected": expected}
        self.found, self.expected = found, expected


class PlanFileError(StoreError, ValueError):
    """A JSON file of plans or problems is malformed: says which field holds what, and what was expected."""


class ConvPlanWarning(UserWarning):
    """Something went wrong that a program survives: convplan says what it does instead, once per kind of trouble."""

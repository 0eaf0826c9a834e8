"""What an engine is: one small protocol, the data it speaks in, and the registry. It knows no engine by name.

An engine answers three questions about a `Problem`: can it run it (`supports`), in which configurations (`configs`),
and how (`build`). It proposes and builds; which candidate is allowed, right and fastest is the planner's business.

To add one: a class with the members of `Engine`, and either `convplan.register_engine(MyEngine())` or an entry point in
the group `convplan.engines` that names the class. Nothing else changes.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import msgspec

from convplan._errors import PolicyError, SpecError
from convplan._policy import Effort, Policy
from convplan._problem import Problem

if TYPE_CHECKING:
    import torch

log = logging.getLogger("convplan.engines")

ENTRY_POINT_GROUP = "convplan.engines"
MAX_NAME = 64  # characters
FALLBACK, LAST_RESORT = "fallback", "last_resort"  # sources of candidates that come after all others, in this order
SEARCHED = "search"  # the source of candidates that nobody proposed

Run = Callable[..., "torch.Tensor"]
"""What a built candidate is: `run(first, second, bias, out)`, with the problem's two inputs in order.

For a problem whose epilogue is not plain it is called as `run(first, second, bias, out, residual, scale)`, with None
for what the epilogue does not have. With statistics it is given one argument more, the tensor that they are written to
(float32, (2, K), contiguous), and with a gate that tensor. Returns a tensor with the dims and strides of
`problem.output`: a new one, or `out` when that is given (any strides). `out` shares no memory with what is read.
"""


@functools.lru_cache(maxsize=1024)
def _in_order(engine: str, names: tuple[str, ...]) -> bool:
    """Check the names of a configuration, and say whether its knobs are sorted. The same few come again and again.

    Raises:
        SpecError: one of them is no name.
    """
    if not engine or len(engine) > MAX_NAME or engine != normalize_name(engine):
        raise SpecError(f"engine is {engine!r}, expected a lower-case name of 1 to {MAX_NAME} characters")
    if any(not name or len(name) > MAX_NAME for name in names) or len(names) > 64:
        raise SpecError(f"knobs are named {names!r}, expected at most 64 names of 1 to {MAX_NAME} characters")
    if len(set(names)) != len(names):
        raise SpecError(f"knobs are named {names!r}, expected every name once")
    return list(names) == sorted(names)


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True, cache_hash=True):
    """One way to run a problem: an engine's name and its knobs, named integers sorted by name.

    This identity is what is stored, never a position in a list.
    """

    engine: str
    knobs: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        # A stored plan holds some sixty of these, and most of the time of reading it is spent here.
        names = tuple([name for name, _ in self.knobs])
        if not _in_order(self.engine, names) or {type(value) for _, value in self.knobs} - {int}:
            # int(): engines count knobs with enumerations of their own, which have no place in a stored identity.
            in_order = tuple(sorted((name, int(value)) for name, value in self.knobs))
            msgspec.structs.force_setattr(self, "knobs", in_order)

    @classmethod
    def of(cls, engine: str, /, **knobs: int) -> EngineConfig:
        """A configuration from keyword arguments: `EngineConfig.of("fft", block=4096)`."""
        return cls(engine, tuple(sorted(knobs.items())))

    def knob(self, name: str, default: int = 0) -> int:
        """The value of one knob."""
        return dict(self.knobs).get(name, default)

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value}" for name, value in self.knobs)
        return f"{self.engine}[{inside}]" if inside else self.engine


class Notes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """What an engine says of a candidate's arithmetic and behaviour, as upper-case names.

    numerical: NONDETERMINISTIC, DOWN_CONVERT_INPUTS, TENSOR_CORE, FFT, WINOGRAD, REDUCED_PRECISION_REDUCTION …
    behavior: RUNTIME_COMPILATION …
    """

    numerical: tuple[str, ...] = ()
    behavior: tuple[str, ...] = ()

    @property
    def deterministic(self) -> bool:
        """The result is the same bits every time."""
        return "NONDETERMINISTIC" not in self.numerical

    @property
    def direct(self) -> bool:
        """Every output is a plain sum of products, so small integers come out exactly."""
        return not {"FFT", "WINOGRAD"} & set(self.numerical)

    def __str__(self) -> str:
        return " ".join((*self.numerical, *self.behavior))


class Support(msgspec.Struct, frozen=True):
    """An engine's answer to a problem: yes, or no with the reason."""

    ok: bool
    reason: str = ""


YES = Support(True)


def no(reason: str) -> Support:
    """A refusal."""
    return Support(False, reason)


class Candidate(msgspec.Struct, frozen=True):
    """One configuration an engine proposes, with what is known before it is built.

    Args:
        config: identity.
        notes: numerical and behaviour notes.
        workspace_bytes: scratch memory it will need, None where only building tells.
        flops: operations this method does at least, None where unknown. Lets candidates that cannot win be left unrun,
            on a GPU unless they carry TENSOR_CORE.
        moved_bytes: bytes this method reads and writes for certain, None where unknown; for the same purpose.
        source: which list it comes from: `heuristic` or an engine's own name for it, `fallback` for what is tried after
            all of those, `last_resort` for what comes after everything.
        refused: why the engine itself says this configuration must not run, empty when it may.
        stock: what torch runs exactly like this when convplan is not there, in words such as `convolution`, and with
            the flags it then has; empty for what torch does not do by itself.
    """

    config: EngineConfig
    notes: Notes = Notes()
    workspace_bytes: int | None = None
    flops: float | None = None
    source: str = "heuristic"
    refused: str = ""
    moved_bytes: int | None = None
    stock: str = ""


class Built(msgspec.Struct, frozen=True):
    """A candidate that can run.

    Args:
        run: the function.
        workspace_bytes: scratch memory, known for certain now.
        as_torch: the entry of torch that `run` calls with the tensors as they are and nothing else, exactly as torch
            would by itself: `convolution`, `convolution_backward`, or empty. Lets the dispatcher's side make one such
            call for several plans.
        bind: makes a `run` for the calling thread and the current device only, which need not look up either; None
            where `run` is that already. Where `run` was called on the device before, it may be called while a CUDA
            graph is captured, and then raises a `ConvPlanError` where it lacks something that cannot be made there.
        exact_strides: its results have the very strides of `problem.output`, also in dimensions of size 1, where any
            would do.
        serialize: the plan as bytes that the engine's `restore` takes in another process; None where there is nothing
            to be gained by that. Raises `PlanRejected` when this plan cannot be.
    """

    run: Run
    workspace_bytes: int
    as_torch: str = ""
    bind: Callable[[], Run] | None = None
    serialize: Callable[[], bytes] | None = None
    exact_strides: bool = False


class Space(msgspec.Struct, frozen=True):
    """A part of what an engine can be set to: some knobs fixed, each free one with the values that it takes.

    Not every combination builds.
    """

    fixed: tuple[tuple[str, int], ...] = ()
    free: tuple[tuple[str, tuple[int, ...]], ...] = ()


@runtime_checkable
class Engine(Protocol):
    """Who can compute a convolution.

    Attributes:
        name: lower-case, unique in the registry.
        by_default: False for engines that run only where a policy names them.
        fuses: optional; True for engines that compute epilogues of more than a bias. The others are not asked about
            problems that have one.

    `supports` and `configs` look at the problem alone, allocate nothing and are cheap. `build` may load libraries and
    compile; it raises `PlanRejected` for a configuration it refuses and `EngineUnavailable` when something is missing.
    A built plan holds no tensor of the caller, never writes to its inputs, and may be called from several threads.
    """

    name: str
    by_default: bool

    def supports(self, problem: Problem) -> Support:
        """Whether it can run the problem in any configuration, or why not."""

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """What it proposes for a problem it supports, best guess first."""

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Make one configuration runnable."""


@runtime_checkable
class Searchable(Protocol):
    """What an engine has besides, when effort `exhaustive` may walk its knobs."""

    def spaces(self, problem: Problem) -> Sequence[Space]:
        """Every knob with its range; cheap."""

    def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
        """One configuration, proposed by nobody, with what is known before it is built.

        Raises:
            PlanRejected: there is no such configuration.
        """


class Offer(NamedTuple):
    """A configuration that was asked for by name, with what is known of it, and what builds it under a policy."""

    candidate: Candidate
    build: Callable[[Policy], Built]


@runtime_checkable
class Offering(Protocol):
    """What an engine has besides, when it builds what it was just asked about with less work than anew."""

    def offer(self, problem: Problem, config: EngineConfig) -> Offer:
        """One configuration, proposed by nobody.

        Raises:
            PlanRejected: there is no such configuration; `Offer.build` raises what `Engine.build` does.
        """


@runtime_checkable
class Restoring(Protocol):
    """What an engine has besides, when its plans survive the process."""

    def restore(self, problem: Problem, config: EngineConfig, policy: Policy, serialized: bytes) -> Built:
        """A plan from its serialized form, which may come from a stranger and is checked against the problem.

        Raises:
            PlanRejected: it is no plan for this problem, configuration and device, or cannot be restored here.
        """


@runtime_checkable
class Remakable(Protocol):
    """What an engine that was registered by hand has besides, so that a worker process can have the same one."""

    def remake(self) -> tuple[str, bytes]:
        """`module:function` and bytes; the function makes an equal engine of those bytes."""


def support(engine: Engine, problem: Problem) -> Support:
    """An engine's answer to a problem, and no for epilogues that it does not say it knows of."""
    if not (problem.epilogue.is_plain or getattr(engine, "fuses", False)):
        return no(f"it fuses nothing with a convolution, and the problem has {problem.epilogue}")
    return engine.supports(problem)


def normalize_name(name: str) -> str:
    """The one form in which engine names are checked and stored."""
    return name.strip().lower()


class Registry:
    """Engines by name, in the order in which they were registered: that order breaks ties between equal times."""

    def __init__(self, builtin: Callable[[], Iterable[Engine]]) -> None:
        self._builtin = builtin
        self._engines: dict[str, Engine] | None = None
        self._lock = threading.RLock()
        self.generation = 0  # goes up with every change
        self._told: list[Callable[[], object]] = []

    def on_change(self, tell: Callable[[], object]) -> None:
        """Have `tell` called after every change, for caches of what engines said."""
        self._told.append(tell)

    def _changed(self, engines: dict[str, Engine]) -> None:
        self._engines = engines
        self.generation += 1
        for tell in self._told:
            tell()

    def _loaded(self) -> dict[str, Engine]:
        if self._engines is None:
            with self._lock:
                if self._engines is None:
                    engines = {engine.name: engine for engine in self._builtin()}
                    _load_entry_points(engines)
                    self._engines = engines
        return self._engines

    def register(self, engine: Engine, *, replace: bool = False) -> None:
        """Add an engine, see `convplan.register_engine`."""
        if not isinstance(engine, Engine):
            missing = [m for m in ("name", "by_default", "supports", "configs", "build") if not hasattr(engine, m)]
            raise SpecError(f"engine is {engine!r}, expected an object with the Engine protocol; lacks {missing}")
        name = normalize_name(engine.name)
        if name != engine.name or not name:
            raise SpecError(f"engine name is {engine.name!r}, expected lower case without spaces around it")
        with self._lock:
            engines = self._loaded()
            if name in engines and not replace:
                raise SpecError(f"engine {name!r} is already registered; pass replace=True to exchange it")
            self._changed({**engines, name: engine})

    def unregister(self, name: str) -> None:
        """Take an engine out again; unknown names are an error that lists the known."""
        with self._lock:
            self.get(name)
            self._changed({k: v for k, v in self._loaded().items() if k != normalize_name(name)})

    def names(self) -> tuple[str, ...]:
        """Every registered name, in order."""
        return tuple(self._loaded())

    def get(self, name: str) -> Engine:
        """One engine; an unknown name raises `PolicyError` that lists the known ones."""
        engines = self._loaded()
        found = engines.get(normalize_name(name))
        if found is None:
            raise PolicyError(f"unknown engine {name!r}; registered engines: {', '.join(engines)}")
        return found

    def allowed(self, names: Sequence[str] | None) -> list[Engine]:
        """The engines a policy lets run: those it names, in its order, or all that run by default."""
        if names is None:
            return [engine for engine in self._loaded().values() if engine.by_default]
        return [self.get(name) for name in names]


def _load_entry_points(engines: dict[str, Engine]) -> None:
    """Add third-party engines; one that cannot be loaded is named in a warning and left out."""
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            engine = point.load()()
            if not isinstance(engine, Engine) or engine.name != normalize_name(engine.name):
                raise SpecError(f"{engine!r} does not follow the Engine protocol")
            if engine.name in engines:
                raise SpecError(f"the name {engine.name!r} is taken")
            engines[engine.name] = engine
        except Exception as exc:  # whatever a stranger's import raises must not take convolutions down
            log.warning("engine %r from %s cannot be used: %s", point.name, point.value, exc)

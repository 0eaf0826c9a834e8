"""What is allowed: the rules a plan must keep, and how much work may go into finding it. Not how an engine obeys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from convplan._errors import PolicyError

Effort = Literal["instant", "measure", "exhaustive"]
Mode = Literal["auto", "replay"]

EFFORTS: tuple[Effort, ...] = ("instant", "measure", "exhaustive")  # in the order of the work they take


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, cache_hash=True):
    """The rules for choosing a plan. Immutable; make a changed copy with `policy.replace(...)`.

    Args:
        deterministic: drop engines whose result can change from run to run. Also, no plan is then exchanged for a
            faster one while a program runs: a problem is tuned at its first sight (`tune_after=1`) or not at all, so
            that a run never depends on a stopwatch. None: follow torch's own flags, read when a problem is met.
        allow_tf32: let float32 problems use TensorFloat-32. None: follow torch's own flags.
        workspace_limit_bytes: scratch memory one plan may need. None: what the allocator can provide at planning time;
            0: only plans that need none.
        effort: `measure` times what the engines propose; `exhaustive` also walks their knobs, in a process of its own
            that may crash; `instant` takes the first that the engines' own order proposes, untimed.
        mode: `auto`, or `replay`: never tune; a problem that the store lacks is handled as `replay_miss` says.
        replay_miss: `error` raises `ReplayMiss`; `instant` runs an untuned plan.
        capture_miss: what happens to a problem that no plan is ready for while a CUDA graph is captured, when none can
            be built: `stock` captures stock torch's kernel, with a warning; `error` raises `CaptureMiss`.
        engines: names of the engines that may be used, in order of preference. None: all that are registered for use.
        allow_notes: names of numerical notes to let through that are dropped otherwise, e.g. DOWN_CONVERT_INPUTS.
        tune_after: a problem is tuned when a layer sees it for this many times; until then it runs an untuned plan.
            Eight times as many where a tuned relative within a factor of two of its work stands in.
        tuning_limit_s: seconds of tuning that a process may spend on problems it meets, all together; those met after
            that run untuned plans. What `tune()` and `plan()` do on request is not counted. None: no limit; 0: nothing
            is tuned without being asked.
        budget_s: seconds that racing the candidates of one problem may take, after one run of each.
        benchmark_limit: most candidates timed for one problem. 0: no limit.
        l2: what the second-level cache of a GPU holds when a candidate is timed: `warm`, whatever the run before left
            there; `cold`, nothing of its tensors.
        nearest: a problem that is met first runs by the choices of its nearest tuned relatives, which differ from it in
            batch and spatial sizes only. False, or under a deterministic policy: by the engines' own order.
        ranks: in a distributed job (an initialized `torch.distributed` process group of more than one rank), `agree`
            makes all ranks use the same plan for a problem, tuned by one of them; `alone` has each choose by itself.
        search_s: seconds that the exhaustive search of one problem may take.
        build_limit_s, run_limit_s: seconds after which a candidate of the exhaustive search is given up, while it is
            built and while it runs.
    """

    deterministic: bool | None = None
    allow_tf32: bool | None = None
    workspace_limit_bytes: int | None = None
    effort: Effort = "measure"
    mode: Mode = "auto"
    replay_miss: Literal["error", "instant"] = "error"
    capture_miss: Literal["stock", "error"] = "stock"
    engines: tuple[str, ...] | None = None
    allow_notes: tuple[str, ...] = ()
    tune_after: int = 2
    tuning_limit_s: float | None = None
    budget_s: float = 1.0
    benchmark_limit: int = 0
    l2: Literal["warm", "cold"] = "warm"
    nearest: bool = True
    ranks: Literal["agree", "alone"] = "agree"
    search_s: float = 60.0
    build_limit_s: float = 20.0
    run_limit_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("deterministic", "allow_tf32"):
            if not any(getattr(self, name) is known for known in (None, True, False)):
                raise PolicyError(f"{name} is {getattr(self, name)!r}, expected True, False or None")
        self._check_choice("effort", EFFORTS)
        self._check_choice("mode", ("auto", "replay"))
        self._check_choice("replay_miss", ("error", "instant"))
        self._check_choice("capture_miss", ("stock", "error"))
        self._check_choice("l2", ("warm", "cold"))
        self._check_choice("ranks", ("agree", "alone"))
        if not isinstance(self.nearest, bool):
            raise PolicyError(f"nearest is {self.nearest!r}, expected True or False")
        self._check_count("tune_after", 1)
        self._check_count("benchmark_limit", 0)
        if self.workspace_limit_bytes is not None:
            self._check_count("workspace_limit_bytes", 0)
        for name in ("budget_s", "search_s", "build_limit_s", "run_limit_s"):
            if not _is_seconds(getattr(self, name)) or not getattr(self, name):
                raise PolicyError(f"{name} is {getattr(self, name)!r}, expected a finite number of seconds > 0")
        if self.tuning_limit_s is not None and not _is_seconds(self.tuning_limit_s):
            raise PolicyError(f"tuning_limit_s is {self.tuning_limit_s!r}, expected None or a number of seconds >= 0")
        for name in ("engines", "allow_notes"):
            self._normalize_names(name)
        if self.engines == ():
            raise PolicyError("engines is empty, expected None (all) or at least one engine's name")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise PolicyError(f"{name} is {value!r}, expected one of {', '.join(choices)}")

    def _check_count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise PolicyError(f"{name} is {value!r}, expected an integer >= {low}")

    def _normalize_names(self, name: str) -> None:
        """Lists become tuples and names take the form the registry stores, so that equal policies are equal."""
        value = getattr(self, name)
        if value is None:
            return
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        if not listed or not all(isinstance(item, str) and item.strip() for item in value):
            raise PolicyError(f"{name} is {value!r}, expected a sequence of names")
        fold = str.lower if name == "engines" else str.upper
        names = tuple(fold(item.strip()) for item in value)
        if len(set(names)) != len(names):
            raise PolicyError(f"{name} is {value!r}, expected every name once")
        msgspec.structs.force_setattr(self, name, names)

    @classmethod
    def from_torch(cls) -> Policy:
        """The policy that torch's own flags describe now: determinism and TF32, in either spelling."""
        return cls().resolve()

    def resolve(self, flags: TorchFlags | None = None) -> Policy:
        """A copy in which `deterministic` and `allow_tf32` are decided, from torch's flags where they were None."""
        if self.deterministic is not None and self.allow_tf32 is not None:
            return self
        seen = flags or torch_flags()
        return self.replace(
            deterministic=seen.deterministic if self.deterministic is None else self.deterministic,
            allow_tf32=seen.allow_tf32 if self.allow_tf32 is None else self.allow_tf32,
        )

    def replace(self, **changes: object) -> Policy:
        """A copy with some fields changed, checked like a new one."""
        return msgspec.structs.replace(self, **changes)

    @property
    def tunes_at_sight(self) -> int | None:
        """The sighting at which a problem is tuned; None when it never is without being asked."""
        if self.mode == "replay" or self.effort == "instant":
            return None
        if self.deterministic and self.tune_after > 1:
            return None
        return self.tune_after

    def key_items(self) -> tuple[tuple[str, object], ...]:
        """The parts that change which plan is chosen.

        Left out: `effort` (kept beside the record and compared by the reader), and what says when and how long to
        search (`mode`, `replay_miss`, `capture_miss`, `tune_after`, `tuning_limit_s`, `budget_s`, `nearest`, `ranks`,
        `search_s` and the limits beside it) and not what is allowed.
        """
        return (
            ("deterministic", self.deterministic),
            ("allow_tf32", self.allow_tf32),
            ("workspace_limit_bytes", self.workspace_limit_bytes),
            ("engines", self.engines),
            ("allow_notes", tuple(sorted(self.allow_notes))),
            ("benchmark_limit", self.benchmark_limit),
            ("l2", self.l2),
        )

    def __str__(self) -> str:
        default = _DEFAULT
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(default, name)
        ]
        return f"Policy({', '.join(changed)})"


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


class TorchFlags(msgspec.Struct, frozen=True):
    """Torch's own flags that a policy may follow."""

    deterministic: bool
    allow_tf32: bool


def torch_flags() -> TorchFlags:
    """Read torch's flags as they are now (they may be changed or scoped at any time)."""
    import torch

    return TorchFlags(
        deterministic=torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic,
        allow_tf32=_cudnn_allows_tf32(),
    )


def _cudnn_allows_tf32() -> bool:
    """Whether cuDNN convolutions may use TF32, asked in the new spelling where torch has it.

    The new spelling answers whichever was used to set the flag; reading the old one raises once both were mixed.
    """
    import torch

    getter = getattr(torch._C, "_get_fp32_precision_getter", None)
    if getter is not None:
        return str(getter("cuda", "conv")) == "tf32"
    return bool(torch.backends.cudnn.allow_tf32)


_DEFAULT = Policy()

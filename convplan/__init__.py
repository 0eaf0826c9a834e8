"""convplan: the fastest engine for every convolution PyTorch runs, within your rules, checked, and remembered.

    import convplan
    convplan.enable()                    # every F.conv*, nn.Conv* and gradient goes through convplan from here on

    y = convplan.conv2d(x, w)            # or one call
    record = convplan.plan(problem)      # or plan once, look at it, run it often
    print(record.explain())
    y = record.build().run(x, w)

Importing this costs nothing: torch, engines and stores load when something needs them. Everything public is listed
here; modules whose names start with an underscore are not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convplan._api import Capture, Stats, capture, plan, problem, profiling, stats, tune
    from convplan._epilogue import Epilogue
    from convplan._errors import (
        CaptureMiss,
        ConvPlanError,
        ConvPlanWarning,
        EngineUnavailable,
        ErrataError,
        ExecutionFailed,
        FuseError,
        NoPlan,
        PlanFileError,
        PlanRejected,
        PolicyError,
        ReplayMiss,
        SpecError,
        StoreBusy,
        StoreError,
        StoreMismatch,
        TooLarge,
        WrongResult,
    )
    from convplan._exchange import check_plans, clear_plans, export_plans, import_plans
    from convplan._plan import Evidence, Plan, PlanRecord
    from convplan._policy import Policy
    from convplan._problem import Problem, TensorSpec
    from convplan.engines import register_engine
    from convplan.engines.base import Built, Candidate, Engine, EngineConfig, Notes, Support
    from convplan.torch_ops.functional import (
        conv1d,
        conv2d,
        conv3d,
        conv_transpose1d,
        conv_transpose2d,
        conv_transpose3d,
    )
    from convplan.torch_ops.fuse import fuse
    from convplan.torch_ops.fuse_training import fuse_training
    from convplan.torch_ops.kept import compile_options
    from convplan.torch_ops.override import disable, enable, enabled

_HOMES = {
    "convplan._api": ("Capture", "Stats", "capture", "plan", "problem", "profiling", "stats", "tune"),
    "convplan._errors": (
        "CaptureMiss",
        "ConvPlanError",
        "ConvPlanWarning",
        "EngineUnavailable",
        "ErrataError",
        "ExecutionFailed",
        "FuseError",
        "NoPlan",
        "PlanFileError",
        "PlanRejected",
        "PolicyError",
        "ReplayMiss",
        "SpecError",
        "StoreBusy",
        "StoreError",
        "StoreMismatch",
        "TooLarge",
        "WrongResult",
    ),
    "convplan._exchange": ("check_plans", "clear_plans", "export_plans", "import_plans"),
    "convplan._plan": ("Evidence", "Plan", "PlanRecord"),
    "convplan._policy": ("Policy",),
    "convplan._epilogue": ("Epilogue",),
    "convplan._problem": ("Problem", "TensorSpec"),
    "convplan.engines": ("register_engine",),
    "convplan.engines.base": ("Built", "Candidate", "Engine", "EngineConfig", "Notes", "Support"),
    "convplan.torch_ops.functional": (
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ),
    "convplan.torch_ops.fuse": ("fuse",),
    "convplan.torch_ops.fuse_training": ("fuse_training",),
    "convplan.torch_ops.kept": ("compile_options",),
    "convplan.torch_ops.override": ("disable", "enable", "enabled"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Built",
    "Candidate",
    "Capture",
    "CaptureMiss",
    "ConvPlanError",
    "ConvPlanWarning",
    "Engine",
    "EngineConfig",
    "EngineUnavailable",
    "Epilogue",
    "ErrataError",
    "Evidence",
    "ExecutionFailed",
    "FuseError",
    "NoPlan",
    "Notes",
    "Plan",
    "PlanFileError",
    "PlanRecord",
    "PlanRejected",
    "Policy",
    "PolicyError",
    "Problem",
    "ReplayMiss",
    "SpecError",
    "Stats",
    "StoreBusy",
    "StoreError",
    "StoreMismatch",
    "Support",
    "TensorSpec",
    "TooLarge",
    "WrongResult",
    "__version__",
    "capture",
    "check_plans",
    "clear_plans",
    "compile_options",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "disable",
    "enable",
    "enabled",
    "export_plans",
    "fuse",
    "fuse_training",
    "import_plans",
    "plan",
    "problem",
    "profiling",
    "register_engine",
    "stats",
    "tune",
]


def __getattr__(name: str) -> object:
    """Load a public name's module when it is first asked for."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'convplan' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""An engine whose candidates take the times that they are told to, and what is asked of it in tests of the runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import convplan
from convplan import Policy
from convplan.engines.fake import FakeCandidate, FakeEngine, VirtualClock

UNTUNED, TUNED, SECOND_BEST = 0, 1, 2  # candidates of `registered`


def take(time_us: float = 50.0, **changes: Any) -> FakeCandidate:
    return FakeCandidate(time_us=time_us, **changes)


def registered(clock: VirtualClock) -> FakeEngine:
    """Registered as `mine`. Untuned, its first candidate runs; tuned, the second, which is faster."""
    engine = FakeEngine([take(90), take(50), take(70)], name="mine", clock=clock)
    convplan.register_engine(engine)
    return engine


def rules(**changes: Any) -> Policy:
    return Policy(**{"engines": ("mine",), "deterministic": False, "allow_tf32": False, **changes})


def tensors(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(2, 3, size, size, generator=generator), torch.randn(4, 3, 3, 3, generator=generator)


def ran(engine: FakeEngine, call: Callable[[], object]) -> list[int]:
    """Which candidates a call ran, each as often as it ran."""
    before = list(engine.runs)
    call()
    return [index for index, (old, new) in enumerate(zip(before, engine.runs, strict=True)) for _ in range(new - old)]

"""What memory planning may use: the limit on workspace, what can be had now, and torch's allocator around a race.

Whether a candidate is within the limit is asked twice, by `_filter` where its engine knows the workspace beforehand and
by `_build` where only the built plan does. How much memory a problem's own tensors take is `_problem`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from convplan._candidates import Live
from convplan._plan import Evidence
from convplan._policy import Policy
from convplan._problem import Problem

if TYPE_CHECKING:
    import torch

MOST_WORKSPACE_BYTES = 2**40  # more is out of memory without trying
SAFETY_BYTES = 64 * 2**20  # memory left alone when the limit is what the machine can provide


def workspace_limit_bytes(problem: Problem, policy: Policy) -> int:
    """The policy's limit, or what the device's allocator can provide now without evicting live memory (B12)."""
    if policy.workspace_limit_bytes is not None:
        return policy.workspace_limit_bytes
    own = 0 if problem.device == "cuda" else problem.least_bytes
    return max(available_bytes(problem.device) - own - SAFETY_BYTES, 0)


def available_bytes(device: str) -> int:
    """What can be had now, without evicting live memory."""
    if device == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    import psutil

    return int(psutil.virtual_memory().available)


def over_limit(workspace_bytes: int | None, limit_bytes: int) -> str:
    if workspace_bytes is None or workspace_bytes <= limit_bytes:
        return ""
    return f"workspace {workspace_bytes} bytes is over the limit of {limit_bytes} bytes"


def fit_workspace(live: Sequence[Live], device: torch.device) -> list[Evidence]:
    """Drop candidates whose workspace cannot be had now (B16).

    The largest is tried first, then halves of it; what fits is freed at once, and torch's allocator keeps it at hand
    for the runs that follow.
    """
    import torch

    need = {item.candidate.config: item.ready.workspace_bytes for item in live if item.pending is None}
    room = min(max(need.values(), default=0), MOST_WORKSPACE_BYTES)
    while room:
        try:
            torch.empty(room, dtype=torch.uint8, device=device)
            break
        except torch.OutOfMemoryError:
            room //= 2
    reason = "out of memory: workspace {} bytes, {} bytes could be allocated"
    return [
        item.evidence("measure", reason.format(need[item.candidate.config], room))
        for item in live
        if need.get(item.candidate.config, 0) > room
    ]


@contextmanager
def cache_emptied(device: torch.device) -> Iterator[None]:
    """Have torch's CUDA allocator give back what it keeps, before and after, if torch's setting asks for it (B17)."""
    import torch

    # Torch asks this of itself around its own benchmarking; CPU builds do not have it.
    setting = getattr(torch._C, "_cuda_get_conv_benchmark_empty_cache", None)
    wanted = device.type == "cuda" and setting is not None and bool(setting())
    if wanted:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        if wanted:
            torch.cuda.empty_cache()

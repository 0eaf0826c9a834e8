"""The stage build: candidates become plans that can run, here or in threads beside.

How an engine builds is its own business; restoring a plan from its serialized form is `_plan`'s, and building in a
worker process `_worker`'s, by `build_one`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from convplan._candidates import COMPILED, Live, Stage, failure_reason, split
from convplan._memory import over_limit, workspace_limit_bytes
from convplan._plan import Evidence
from convplan._policy import Policy
from convplan._problem import Problem

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

BUILDERS = min(8, max(4, os.cpu_count() or 1))  # threads; compiling is the processor's work


def build_candidates(live: Sequence[Live], problem: Problem, policy: Policy) -> Stage:
    """Build each; drop what does not build, and what turns out to need more workspace than allowed.

    What is compiled at run time takes a thousand times longer than the rest. On a GPU it is built by other threads,
    while the rest is verified; `Live.pending` then has the reason to drop it.
    """
    limit = workspace_limit_bytes(problem, policy)
    later = [item for item in live if problem.device == "cuda" and COMPILED in item.candidate.notes.behavior]
    if later:
        import torch

        index = torch.cuda.current_device()
        for item in later:
            item.pending = _builders(os.getpid()).submit(_build_on, index, item, problem, policy, limit)
    return split(live, "build", lambda item: "" if item.pending else build_one(item, problem, policy, limit))


def first_that_builds(
    live: Sequence[Live], problem: Problem, policy: Policy, limit_bytes: int
) -> tuple[list[Evidence], list[Evidence]]:
    """Effort `instant`: the first in order that builds is the choice, the rest stand behind it unbuilt (B14)."""
    rejected: list[Evidence] = []
    for place, item in enumerate(live):
        reason = build_one(item, problem, policy, limit_bytes)
        if not reason:
            return [later.evidence() for later in live[place:]], rejected
        rejected.append(item.evidence("build", reason))
    return [], rejected


def build_one(item: Live, problem: Problem, policy: Policy, limit_bytes: int) -> str:
    try:
        item.built = item.engine.build(problem, item.candidate.config, policy)
    except Exception as exc:  # an engine's failure costs its candidate, never the planning
        return failure_reason(exc)
    return over_limit(item.built.workspace_bytes, limit_bytes)


def _build_on(index: int, item: Live, problem: Problem, policy: Policy, limit_bytes: int) -> str:
    import torch

    with torch.cuda.device(index):
        return build_one(item, problem, policy, limit_bytes)


@functools.lru_cache(maxsize=1)
def _builders(pid: int) -> ThreadPoolExecutor:
    """The threads that build; those of a parent process are of no use after a fork."""
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(BUILDERS, thread_name_prefix="convplan-build")

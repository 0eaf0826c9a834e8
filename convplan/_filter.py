"""The stage filter: what its engine refuses or the policy forbids, before anything is built.

By notes, by workspace where it is known, and by what was learned of crashes. Errata are the cuDNN engine's, which hands
out such a candidate as refused; what memory there is, is `_memory`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from convplan._candidates import Live, Stage, split
from convplan._learned import LearnedErratum, verdict
from convplan._memory import over_limit, workspace_limit_bytes
from convplan._policy import Policy
from convplan._problem import Problem
from convplan.engines.base import Candidate

ALWAYS_DROPPED_NOTES = ("DOWN_CONVERT_INPUTS",)  # B9: unless the policy lets them through by name


def filter_candidates(
    live: Sequence[Live], problem: Problem, policy: Policy, learned: Sequence[LearnedErratum] = ()
) -> Stage:
    """Drop what its engine refuses or the policy forbids, by notes and by workspace where it is known before building,
    and what failed here before (B8-B12)."""
    limit = workspace_limit_bytes(problem, policy)

    def reason_of(item: Live) -> str:
        return forbidden(item.candidate, problem, policy, limit) or verdict(learned, problem, item.candidate.config)

    return split(live, "filter", reason_of)


def forbidden(candidate: Candidate, problem: Problem, policy: Policy, limit_bytes: int) -> str:
    """Why a candidate must not be built, by the policy and its engine; empty when it may be."""
    if candidate.refused:
        return candidate.refused
    notes = set(candidate.notes.numerical)
    if policy.deterministic and not candidate.notes.deterministic:
        return "carries NONDETERMINISTIC and the policy asks for deterministic"
    for note in ALWAYS_DROPPED_NOTES:
        if note in notes and note not in policy.allow_notes:
            return f"carries {note}; allow_notes=({note!r},) lets it through"
    if problem.dtype == "float32" and not policy.allow_tf32 and "TENSOR_CORE" in notes:
        return "carries TENSOR_CORE and the policy does not allow TF32"
    return over_limit(candidate.workspace_bytes, limit_bytes)

"""The key of a stored plan: schema number first, then every part of problem, policy and environment, each labelled.

Parts are length-prefixed before hashing, so that no two different lists of parts run together into the same bytes. The
number `KEY_SCHEMA` goes up when the meaning of a part changes; rows with an older one are then tuned again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

from convplan._environment import Environment
from convplan._policy import Policy
from convplan._problem import Problem

KEY_SCHEMA = 2
KEY_LENGTH = 32  # hexadecimal digits, 128 bits


def problem_items(problem: Problem) -> tuple[tuple[str, object], ...]:
    """Every part of a problem. Strides were normalized when the tensor specs were made (B2)."""
    items: list[tuple[str, object]] = [("op", problem.op)]
    for letter, spec in (("x", problem.x), ("w", problem.w), ("y", problem.y)):
        items += [
            (f"{letter}.dims", spec.dims),
            (f"{letter}.strides", spec.strides),
            (f"{letter}.dtype", spec.dtype),
            (f"{letter}.alignment_bytes", spec.alignment_bytes),
        ]
    items += [
        ("padding", problem.padding),
        ("stride", problem.stride),
        ("dilation", problem.dilation),
        ("groups", problem.groups),
        ("epilogue.bias", problem.epilogue.bias),
        ("device", problem.device),
    ]
    # What goes beyond a bias is named only where there is something: keys of plain problems stay what they were.
    epilogue = problem.epilogue
    if not epilogue.is_plain:
        items += [
            (f"epilogue.{name}", getattr(epilogue, name))
            for name in epilogue.__struct_fields__
            if name != "bias" and (name not in ("statistics", "gate") or getattr(epilogue, name))
        ]
    return tuple(items)


def plan_key(problem: Problem, policy: Policy, environment: Environment) -> str:
    """The key of a plan for this problem under this resolved policy in this environment."""
    digest = _choice_digest(problem, policy, KEY_SCHEMA).copy()
    digest.update(_environment_bytes(environment))
    return digest.hexdigest()[:KEY_LENGTH]


def choice_key(problem: Problem, policy: Policy) -> str:
    """The same without the environment: finds the rows that other environments stored for the same question."""
    return _choice_digest(problem, policy, KEY_SCHEMA).hexdigest()[:KEY_LENGTH]


# A problem that is met first is looked for under several keys, which all begin with the same parts.
@functools.lru_cache(maxsize=16)
def _choice_digest(problem: Problem, policy: Policy, schema: int) -> hashlib._Hash:
    return hashlib.sha256(_bytes((("schema", schema), *_choice_items(problem, policy))))


@functools.lru_cache(maxsize=16)
def _environment_bytes(environment: Environment) -> bytes:
    return _bytes(_labelled("environment", environment.key_items()))


def _choice_items(problem: Problem, policy: Policy) -> tuple[tuple[str, object], ...]:
    if policy.deterministic is None or policy.allow_tf32 is None:
        raise AssertionError("convplan bug: a key needs a resolved policy (Policy.resolve)")
    return (
        *_labelled("problem", problem_items(problem)),
        *_labelled("policy", policy.key_items()),
    )


def _labelled(prefix: str, items: Iterable[tuple[str, object]]) -> Iterable[tuple[str, object]]:
    return ((f"{prefix}.{label}", value) for label, value in items)


def _bytes(items: Iterable[tuple[str, object]]) -> bytes:
    parts = (f"{label}={value!r}".encode() for label, value in items)
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)

"""Running tables of cases on a GPU: many to a test, within a time, with what differs in the findings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import convplan
from convplan import _runtime
from helpers.compat import GPU_POLICIES, Case, check
from helpers.compat_cases import cases

PER_GROUP = 40
MOST_S = 200  # of all groups of a file; scripts/gpu.sh ends a file after 250 s


def groups(*tables: str) -> list[Any]:
    """The cases of some tables in parts, each for one test."""
    found = []
    for table in tables:
        here = cases("cuda", table)
        for number, first in enumerate(range(0, len(here), PER_GROUP)):
            found.append(pytest.param(here[first : first + PER_GROUP], id=f"{table}-{number}"))
    return found


@contextmanager
def exact_float32() -> Iterator[None]:
    """A GPU of which torch asks no TF32, with nothing planned yet."""
    _runtime.forget()
    convplan.stats(reset=True)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        convplan.disable()
        torch.cuda.synchronize()


def run(group: list[Case], name: str, findings: dict[str, Any], begun: float) -> None:
    """Run cases one after the other, and name each that differs.

    Args:
        begun: when the first group of this file began, on the monotonic clock.
    """
    wrong = {}
    for number, case in enumerate(group):
        if time.monotonic() - begun > MOST_S:
            findings[f"compat {name}"] = {"ran": number, "of": len(group), "wrong": wrong}
            assert not wrong, "\n\n".join(wrong.values())
            pytest.skip(f"{len(group) - number} of {len(group)} cases were not run, the {MOST_S} s are over")
        try:
            check(case, "cuda", GPU_POLICIES)
        except AssertionError as exc:
            wrong[case.id] = str(exc)
    findings[f"compat {name}"] = {"ran": len(group), "of": len(group), "wrong": wrong}
    assert not wrong, "\n\n".join(wrong.values())

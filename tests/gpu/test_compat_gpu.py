"""The compatibility suite on a GPU: the cases of the CPU's, with every tensor on the GPU and plans of cuDNN.

A test runs the cases of one group one after the other and names each that differs, so that thousands of cases cost
seconds. What differed goes to the findings in full.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.compat import GPU_POLICIES, Case, check
from helpers.compat_cases import TABLES

import convplan
from convplan import _runtime

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

MOST_S = 100  # of one group; what is left then is counted and not run
PER_GROUP = 60


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _runtime.forget()
    convplan.stats(reset=True)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # otherwise stock torch's float32 is no better than TF32
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    convplan.disable()
    torch.cuda.synchronize()


def groups() -> list[Any]:
    found = []
    for table, cases in TABLES.items():
        here = [case for case in cases if "cuda" in case.devices]
        for number in itertools.count():
            part = here[number * PER_GROUP : (number + 1) * PER_GROUP]
            if not part:
                break
            found.append(pytest.param(part, id=f"{table}-{number}"))
    return found


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("cases", groups())
def test_a_group_of_cases_is_as_in_stock_torch(cases: list[Case], request: Any, findings: dict[str, Any]) -> None:
    wrong, ran, end = [], 0, time.monotonic() + MOST_S
    for case in cases:
        if time.monotonic() > end:
            break
        ran += 1
        try:
            check(case, "cuda", GPU_POLICIES)
        except AssertionError as exc:
            wrong.append(str(exc))
    findings[f"compat {request.node.callspec.id}"] = {"cases": ran, "wrong": wrong}
    assert ran == len(cases), f"{len(cases) - ran} cases were left out after {MOST_S} s"
    assert wrong == [], "\n\n".join(wrong)

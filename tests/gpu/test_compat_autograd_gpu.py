"""Derivatives of every kind on a GPU, as in stock torch: the cases that the CPU's suite runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.compat import Case
from helpers.compat_gpu import exact_float32, groups, run

pytestmark = [pytest.mark.behaviour("C8"), pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")]


@pytest.fixture(scope="module")
def begun() -> float:
    return time.monotonic()


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_float32():
        yield


@pytest.mark.parametrize("cases", groups("autograd"))
def test_cases_of_a_table(cases: list[Case], request: Any, findings: dict[str, Any], begun: float) -> None:
    run(cases, request.node.callspec.id, findings, begun)

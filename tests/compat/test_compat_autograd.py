"""Autograd and `torch.func` under `enable()` as in stock torch: every case of `helpers.compat_autograd` on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.compat import CPU_POLICIES, Case, check
from helpers.compat_cases import cases
from helpers.fresh import fresh_process

# Torch's own, at the first forward derivative of a process.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("case", cases("cpu", "autograd"), ids=lambda case: case.id)
def test_derivatives_are_those_of_stock_torch(case: Case) -> None:
    check(case, "cpu", CPU_POLICIES)

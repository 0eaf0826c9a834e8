"""Autocast, gradient scaling and torch's settings under `enable()`: `helpers.compat_settings` on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.compat import CPU_POLICIES, Case, check
from helpers.compat_cases import cases
from helpers.fresh import fresh_process


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("case", cases("cpu", "autocast", "flags"), ids=lambda case: case.id)
def test_settings_hold_as_in_stock_torch(case: Case) -> None:
    check(case, "cpu", CPU_POLICIES)

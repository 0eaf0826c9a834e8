"""What convolutions take, give and refuse under `enable()`: `helpers.compat_semantics` and `compat_tensors`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.compat import CPU_POLICIES, Case, check
from helpers.fresh import fresh_process


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.mark.parametrize(
    "case", cases("cpu", "layouts", "types", "sizes", "errors", "routes", "tensors"), ids=lambda case: case.id
)
def test_the_call_means_what_it_means_in_stock_torch(case: Case) -> None:
    check(case, "cpu", CPU_POLICIES)

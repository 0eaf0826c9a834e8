"""What convolutions take, give and refuse under `enable()`: `helpers.compat_semantics` and `compat_tensors`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.compat import CPU_POLICIES, Case, check
from helpers.compat_cases import cases
from helpers.fresh import fresh_process

import convplan
from convplan import Policy


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.mark.parametrize(
    "case", cases("cpu", "layouts", "types", "sizes", "errors", "routes", "tensors"), ids=lambda case: case.id
)
def test_the_call_means_what_it_means_in_stock_torch(case: Case) -> None:
    check(case, "cpu", CPU_POLICIES)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_a_trace_holds_torchs_own_convolution(calls_before: int) -> None:
    x, layer = torch.randn(2, 3, 8, 8), torch.nn.Conv2d(3, 4, 3)
    held = [node.kind() for node in torch.jit.trace(layer, x).graph.nodes()]
    with convplan.enabled(Policy(effort="instant", engines=("matmul", "aten"))):
        for _ in range(calls_before):
            layer(x)
        traced = torch.jit.trace(layer, x)  # warnings are errors here
        assert [node.kind() for node in traced.graph.nodes()] == held
        for _ in range(2):
            layer(x)
            torch.testing.assert_close(traced(x[:, :, 2:]), layer(x[:, :, 2:]))
    assert convplan.stats()["planned"] == 2

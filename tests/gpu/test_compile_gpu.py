"""`torch.compile` on a GPU: what reaches convplan by itself, what Inductor is made to keep, layouts, export."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fresh import fresh_process
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck

import convplan
from convplan import Policy

Tensor = torch.Tensor
INSTANT = Policy(effort="instant", engines=("cudnn", "aten"))

pytestmark = [
    pytest.mark.behaviour("C8"),
    # Inductor and what it imports warn of their own: of TF32 that is not switched on, of functions about to go.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_process(), torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1, groups=64),
        nn.Conv2d(64, 32, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2, stride=2),
    ).cuda()


def images() -> Tensor:
    return torch.randn(4, 16, 32, 32, device="cuda")


def step(run: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
    y = run(x)
    (0.01 * y.float().square().sum()).backward()
    return [y.detach(), *(parameter.grad for parameter in net.parameters())]


def near(found: list[Tensor], right: list[Tensor], share: float) -> None:
    """Each number within a share of the largest one beside it."""
    for one, two in zip(found, right, strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=share, atol=share * float(two.float().abs().max()))


WAYS: dict[str, dict[str, Any] | None] = {
    "enabled": None,
    "kept": {},
    "kept-as-written": {"channels_last": False},
    "kept-channels-last": {"channels_last": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_step_is_right_and_runs_by_plans(way: str, findings: dict[str, object]) -> None:
    keep, net, x = WAYS[way], model(), images()
    reference = copy.deepcopy(net)
    options = None if keep is None else convplan.compile_options(INSTANT, **keep)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
        right = step(reference, reference, x)
        run = torch.compile(net, fullgraph=True, options=options)
        with convplan.enabled(INSTANT) if keep is None else nullcontext():
            found = step(run, net, x)
    stats = convplan.stats()
    findings[f"compiled step {way}"] = stats
    assert found[0].stride() == right[0].stride()
    near(found, right, 1e-3)
    assert (stats["fell_back"], stats["failed"]) == (0, 0)
    # Four convolutions, and under `enable()` one call for both gradients; the images need none.
    assert stats["misses"] + stats["hits"] == (8 if keep is None else 11)


def test_max_autotune_leaves_kept_convolutions_alone() -> None:
    net, x = model().half().eval().to(memory_format=torch.channels_last), images().half()
    options = {"max_autotune": True, **convplan.compile_options(INSTANT)}
    run = torch.compile(net, fullgraph=True, options=options)
    with torch.no_grad():
        near([run(x)], [net(x)], 1e-2)
    stats = convplan.stats()
    assert (stats["misses"] + stats["hits"], stats["fell_back"]) == (4, 0)


def test_kept_convolutions_stand_in_the_code_and_the_bias_is_added_by_inductor() -> None:
    net, x = model().half().eval(), images().half()
    run = torch.compile(net, fullgraph=True, options=convplan.compile_options(INSTANT))
    with torch.no_grad():
        found, (code, *_) = run_and_get_code(run, x)
        near([found], [net(x)], 1e-2)
    assert code.count("convplan_kept.convolution(") == 4
    assert "extern_kernels.convolution(" not in code


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_in_and_around_a_compiled_model(dtype: torch.dtype) -> None:
    net, x = model(), images()
    reference = copy.deepcopy(net)
    run = torch.compile(net, fullgraph=True, options=convplan.compile_options(INSTANT))
    with torch.autocast("cuda", dtype):
        found, right = step(run, net, x), step(reference, reference, x)
    assert found[0].dtype == dtype
    near(found, right, 5e-2)
    assert convplan.stats()["fell_back"] == 0


def test_sizes_that_vary_share_one_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    w = torch.randn(32, 16, 3, 3, device="cuda").half()
    run = torch.compile(
        lambda x: convplan.conv2d(x, w, padding=1, policy=INSTANT).relu(), backend=counter, dynamic=True, fullgraph=True
    )
    for batch, size in ((2, 17), (3, 24), (5, 40)):
        x = torch.randn(batch, 16, size, size + 3, device="cuda").half()
        near([run(x)], [F.conv2d(x, w, padding=1).relu()], 1e-2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_operators_pass_torchs_own_check(form: torch.memory_format) -> None:
    last = form == torch.channels_last
    x, w, dy = (
        torch.randn(dims, device="cuda").half().contiguous(memory_format=form)
        for dims in ((2, 8, 12, 10), (16, 8, 3, 3), (2, 16, 12, 10))
    )
    geometry = ([1, 1], [1] * 4, [1, 1], False, [0, 0], 1, '{"effort":"instant"}')
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.convplan
    opcheck(ops.convolution.default, (x, w, None, *geometry), test_utils=tests)
    opcheck(ops.input_gradient.default, (dy, w, list(x.shape), last, *geometry), test_utils=tests)
    opcheck(ops.weight_gradient.default, (dy, x, list(w.shape), last, *geometry), test_utils=tests)


def test_an_exported_program_runs() -> None:
    class Planned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 16, 3, 3, device="cuda"))

        def forward(self, x: Tensor) -> Tensor:
            return convplan.conv2d(x, self.weight, stride=2, padding=1, policy=INSTANT).relu()

    net, x = Planned(), images()
    program = torch.export.export(net, (x,))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.no_grad():
        near([program.module()(x)], [net(x)], 1e-4)

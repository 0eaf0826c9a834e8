"""Fused calls on a GPU: values against float64, gradients, autocast, compiled, inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.definition import worst
from helpers.following import ACTIVATIONS, Case, built, cases
from helpers.fresh import fresh_process

import convplan
from convplan import Policy, SpecError
from convplan._activations import resolve

pytestmark = [
    pytest.mark.behaviour("B30"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    # Inductor and what it imports warn of their own: of TF32 that is not switched on, of functions about to go.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*"),
]

Tensor = torch.Tensor
INSTANT = Policy(effort="instant", allow_tf32=False)
CASES = cases((torch.float32, torch.bfloat16, torch.float16))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_process():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_are_right(case: Case, findings: dict[str, Any]) -> None:
    one = built(case, "cuda")
    y = one.run(convplan, policy=INSTANT)
    off = worst(y, one.right, one.limit)
    findings.setdefault("fused calls, error over its limit", {})[case.id] = round(off, 3)
    assert off <= 1
    stats = convplan.stats()
    assert (stats["misses"], stats["fell_back"], stats["failed"], stats["left_to_torch"]) == (1, 0, 0, 0)


def operands(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    dims = {"x": (4, 32, 14, 14), "w": (64, 32, 3, 3), "bias": (64,), "residual": (4, 64, 14, 14)}
    found = {name: torch.randn(size, generator=draw) * (0.1 if name == "w" else 1) for name, size in dims.items()}
    last = torch.channels_last
    return {
        name: (one.to(memory_format=last) if one.dim() == 4 else one).to("cuda", dtype) for name, one in found.items()
    }


@pytest.mark.parametrize("activation", ["none", "relu", "leaky-relu", "tanh", "elu", "gelu", "clamp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_near_those_of_double(dtype: torch.dtype, activation: str) -> None:
    given, keyword = operands(dtype), ACTIVATIONS[activation][0]
    scale = torch.rand(64, device="cuda") + 0.5
    leaves = [one.requires_grad_() for one in given.values()]
    x, w, bias, z = leaves
    y = convplan.conv2d(x, w, bias, padding=1, residual=z, alpha=0.5, scale=scale, activation=keyword, policy=INSTANT)
    dy = torch.randn_like(y)
    wide = [one.detach().cpu().double().requires_grad_() for one in leaves]
    a, b, c, d = wide
    total = F.conv2d(a, b, padding=1) * scale.cpu().double().view(-1, 1, 1) + 0.5 * d + c.view(-1, 1, 1)
    right = resolve(keyword).of(total)
    share = 0.05 if dtype == torch.bfloat16 else 0.01
    _near(y, right, share)
    found = torch.autograd.grad(y, leaves, dy)
    # Where rounding decides on which side of a corner an output is, single gradients differ by all of `dy`: so their
    # mean error counts.
    for one, two in zip(found, torch.autograd.grad(right, wide, dy.cpu().double()), strict=True):
        off = (one.cpu().double() - two).abs().mean() / two.abs().mean()
        assert float(off) <= share
    assert convplan.stats()["fell_back"] == 0


def _near(found: Tensor, right: Tensor, share: float) -> None:
    torch.testing.assert_close(
        found.cpu().double(), right.double(), rtol=share, atol=share * float(right.detach().abs().max())
    )


def test_gradients_of_every_order_in_double() -> None:
    draw = torch.Generator(device="cuda").manual_seed(0)
    dims = ((1, 2, 4, 4), (3, 2, 3, 3), (3,), (1, 3, 2, 2))
    leaves = [
        torch.randn(size, generator=draw, device="cuda", dtype=torch.float64, requires_grad=True) for size in dims
    ]
    for activation in ("sigmoid", "silu"):

        def run(x: Tensor, w: Tensor, bias: Tensor, z: Tensor, activation: str = activation) -> Tensor:
            return convplan.conv2d(x, w, bias, residual=z, alpha=0.5, activation=activation, policy=INSTANT)

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True, nondet_tol=1e-9)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, nondet_tol=1e-9)


def test_autocast_casts_as_torch_does_and_leaves_the_scale() -> None:
    given = operands()
    leaves = [one.requires_grad_() for one in given.values()]
    x, w, bias, z = leaves
    scale = torch.rand(64, device="cuda") + 0.5
    for activation in ("relu", "softplus"):  # torch's autocast computes softplus in float32
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = convplan.conv2d(x, w, bias, padding=1, residual=z, scale=scale, activation=activation, policy=INSTANT)
        assert y.dtype == torch.bfloat16
        total = F.conv2d(x.double(), w.double(), padding=1) * scale.double().view(-1, 1, 1) + z + bias.view(-1, 1, 1)
        _near(y, resolve(activation).of(total).cpu(), 0.03)
        assert [one.dtype for one in torch.autograd.grad(y.float().sum(), leaves)] == [torch.float32] * 4


@pytest.mark.parametrize("graded", [False, True], ids=["values", "gradients"])
def test_inductor_compiles_it_into_one_graph(graded: bool) -> None:
    given = operands(torch.float16)
    leaves = [one.requires_grad_(graded) for one in given.values()]

    def step(x: Tensor, w: Tensor, bias: Tensor, z: Tensor) -> Tensor:
        y = convplan.conv2d(x, w, bias, padding=1, residual=z, activation="relu", policy=INSTANT)
        return y * 2

    found, right = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(found, right, rtol=1e-2, atol=1e-2)
    assert found.stride() == right.stride()
    if graded:
        dy = torch.randn_like(right)
        for one, two in zip(
            torch.autograd.grad(found, leaves, dy), torch.autograd.grad(right, leaves, dy), strict=True
        ):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2 * float(two.abs().max()))


def test_out_may_be_the_residual_itself() -> None:
    given = operands(torch.float16)
    x, w, bias, z = given.values()
    right = torch.relu(F.conv2d(x.double(), w.double(), padding=1) + bias.double().view(-1, 1, 1) + z.double())
    assert convplan.conv2d(x, w, bias, padding=1, residual=z, activation="relu", out=z, policy=INSTANT) is z
    _near(z, right.cpu(), 0.01)


@pytest.mark.behaviour("C8")
def test_a_cuda_graph_holds_a_fused_call() -> None:
    x, w, bias, z = operands(torch.float16).values()
    scale = torch.rand(64, device="cuda") + 0.5
    policy = INSTANT.replace(capture_miss="error")

    def run() -> Tensor:
        return convplan.conv2d(x, w, bias, padding=1, residual=z, activation="relu", scale=scale, policy=policy)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, run(), rtol=1e-2, atol=1e-2)


def test_a_bad_scale_is_refused_when_the_first_is_seen() -> None:
    x, w, _, _ = operands(torch.float16).values()
    scale = torch.ones(64, device="cuda")
    scale[5] = float("nan")
    with pytest.raises(SpecError, match=r"scale\[5\] is nan"):
        convplan.conv2d(x, w, padding=1, scale=scale, policy=INSTANT)


@pytest.mark.behaviour("B24")
@pytest.mark.parametrize("offset", [1, 2, 4, 8], ids=lambda offset: f"{2 * offset}-bytes")
def test_residual_and_bias_at_any_address(offset: int) -> None:
    x, w, bias, z = operands(torch.float16).values()

    def moved(one: Tensor) -> Tensor:
        flat = torch.empty(one.numel() + offset, dtype=one.dtype, device="cuda")[offset:]
        return flat.as_strided(one.shape, one.stride(), flat.storage_offset()).copy_(one)

    b, c = moved(bias), moved(z)
    assert (b.data_ptr() & 31, c.data_ptr() & 31) == (2 * offset, 2 * offset)
    y = convplan.conv2d(x, w, b, padding=1, residual=c, activation="relu", policy=INSTANT)
    right = torch.relu(F.conv2d(x.double(), w.double(), padding=1) + bias.double().view(-1, 1, 1) + z.double())
    _near(y, right.cpu(), 0.01)
    assert convplan.stats()["fell_back"] == 0

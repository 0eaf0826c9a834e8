"""Triton's kernels on a GPU: against float64, twice the same bits, in a graph, on any stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.normalizing import (
    ACTIVATIONS,
    DTYPES,
    SHAPES,
    Case,
    built,
    distances,
    far_from_zero,
    following,
    moving,
    off,
    same_bits,
)

from convplan import kernels
from convplan.kernels import Norm

Tensor = torch.Tensor

# Every way through the kernels, with as few to compile as show it: what is computed is float32 whatever is read.
CASES = [Case((6, 24, 5, 5), torch.float16, activation) for activation in ACTIVATIONS]
CASES += [Case((6, 24, 5, 5), torch.bfloat16, name, True, sums=True) for name in ("relu", "silu", "hardtanh")]
CASES += [
    Case(shape, dtype, "relu", True)
    for shape, dtype in zip((*SHAPES, (40, 330, 2, 2)), itertools.cycle(DTYPES), strict=False)
]
CASES += [
    Case((64, 64, 56, 56), torch.float16, "relu", True),
    Case((32, 2048, 7, 7), torch.bfloat16, "relu", False, sums=True),
    Case((8, 256, 28, 28), torch.float32, "relu", True),
]


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel fails to compile and leaves its work to torch's operations."""
    monkeypatch.setattr(kernels, "_gave_up", False)
    yield
    assert not kernels._gave_up


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_are_right(case: Case, findings: dict[str, Any]) -> None:
    found = distances(case, "cuda")
    assert kernels._launches is not None
    findings.setdefault("kernels of batch normalization, error over its limit", {})[case.id] = round(
        max(found.values()), 3
    )
    assert {name: value for name, value in found.items() if not value <= 1} == {}


def test_what_follows_a_convolution_is_right(findings: dict[str, Any]) -> None:
    from convplan.kernels import launches  # which imports Triton

    found = following(launches.follow, "cuda")
    findings["kernels of what follows a convolution, largest error over its limit"] = round(max(found.values()), 3)
    assert {name: value for name, value in found.items() if not value <= 1} == {}


def test_concatenations_and_max_pools_are_torchs_to_the_bit() -> None:
    assert moving("cuda", every=11) == []


def test_what_kernels_move() -> None:
    x = torch.randn(8, 64, 64, 64, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    part = x[:, :24].contiguous(memory_format=torch.channels_last)
    two, no = ((2, 2), (2, 2), (0, 0), (1, 1)), None
    for one, right in (
        (kernels.concatenate((x, part)), torch.cat((x, part), 1)),
        (kernels.max_pool(x, *two, False), torch.nn.functional.max_pool2d(x, 2)),
    ):
        assert one is not None
        assert one.stride() == right.stride()
        assert torch.equal(one, right)
    small = torch.empty_like(x[:1])
    assert kernels.concatenate((small, small)) is kernels.max_pool(small, *two, False) is no
    assert kernels.concatenate((x, x.contiguous())) is kernels.max_pool(x.contiguous(), *two, False) is no
    assert kernels.concatenate((x.double(), x.double())) is kernels.max_pool(x.double(), *two, False) is no
    assert kernels.concatenate((x, x.half())) is kernels.concatenate((x, x.cpu())) is kernels.concatenate((x,)) is no
    assert kernels.concatenate((x, x[:, :4].contiguous(memory_format=torch.channels_last))) is no
    assert kernels.concatenate((x, x[:, :, :32].contiguous(memory_format=torch.channels_last))) is no
    places = x.movedim(1, -1).reshape(-1, 64, 1, 1)
    assert kernels.concatenate((places, places)) is no
    assert kernels.max_pool(x, (9, 9), (1, 1), (0, 0), (1, 1), False) is no
    assert kernels.max_pool(x, (2, 2), (2, 2), (2, 2), (1, 1), False) is no
    assert kernels.max_pool(x, (3, 3), (1, 1), (0, 0), (90, 90), False) is no


def test_which_operations_a_kernel_does() -> None:
    small = torch.ones(2, 64, 8, 8, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    large = torch.ones(16, 64, 64, 64, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    bias = torch.ones(64, device="cuda", dtype=torch.float16)
    assert not kernels.follow(small, bias)
    assert kernels.follow(small, bias, activation="relu")
    assert kernels.follow(large, bias)
    assert not kernels.follow(large)
    assert not kernels.follow(large.contiguous(), bias, activation="relu")
    assert not kernels.follow(large, bias.cpu(), activation="relu")
    assert not kernels.follow(large, bias, large.contiguous())
    assert not kernels.follow(large.double(), bias, activation="relu")
    assert (float(small.min()), float(small.max())) == (2, 2)
    assert (float(large.min()), float(large.max())) == (2, 2)


def test_what_follows_is_left_to_torch_where_it_would_be_compiled_in_a_capture() -> None:
    y = torch.zeros(3, 40, 6, 6, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    bias, answers = torch.ones(40, device="cuda", dtype=torch.float16), []
    kernels._load()._following.cache_clear()  # type: ignore[union-attr]
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            torch.zeros(1, device="cuda")  # of a graph with nothing in it torch warns
            answers.append(kernels.follow(y, bias, activation="relu"))
        answers.append(kernels.follow(y, bias, activation="relu"))
    graph.replay()
    assert answers == [False, True, True, True]
    assert float(y.min()) == float(y.max()) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contiguous_tensors_go_by_torch(dtype: torch.dtype) -> None:
    found = distances(Case((4, 6, 5, 3), dtype, "relu", True), "cuda", last=False, steps=6)
    assert {name: value for name, value in found.items() if not value <= 1} == {}


def test_two_runs_write_the_same_bits() -> None:
    assert same_bits("cuda")


def test_a_large_mean_costs_no_digits() -> None:
    assert far_from_zero("cuda") <= 1


def test_gradients_of_another_layout_are_laid_out_first() -> None:
    given = built(Case((4, 24, 6, 6), torch.float16, "relu", True), "cuda")
    y, norm = given["y"], given["norm"]
    out, saved = kernels.normalize(y, None, norm, given["residual"].contiguous(), "relu")
    again, _ = kernels.normalize(y, None, norm, given["residual"], "relu")
    assert torch.equal(out, again)
    grad = torch.ones((), device="cuda", dtype=torch.float16).expand(y.shape)
    found = kernels.normalize_backward(grad, y, out, saved, norm, "relu")
    right = kernels.normalize_backward(torch.ones_like(y), y, out, saved, norm, "relu")
    for one, two in zip(found, right, strict=True):
        assert torch.equal(one, two)


def step(given: dict[str, Any], norm: Norm) -> list[Tensor]:
    y, residual, grad = given["y"], given["residual"], given["grad"]
    out, saved = kernels.normalize(y, kernels.column_sums(y), norm, residual, "relu")
    results = kernels.normalize_backward(grad, y, out, saved, norm, "relu")
    g, total = kernels.activation_backward(grad, out, "relu", from_output=True, bias=True)
    return [out, saved, *results, g, total]


def test_a_cuda_graph_holds_them() -> None:
    given = built(Case((16, 64, 28, 28), torch.float16, "relu", True), "cuda")
    norm = given["norm"]._replace(running_mean=None, running_var=None)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(given, norm)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(given, norm)
    given["y"].copy_(torch.randn_like(given["y"]))
    graph.replay()
    for one, two in zip(held, step(given, norm), strict=True):
        assert torch.equal(one, two)


def test_the_current_stream_is_the_one_that_runs_them() -> None:
    given = built(Case((16, 64, 28, 28), torch.float16, "relu", True), "cuda")
    norm = given["norm"]._replace(running_mean=None, running_var=None)
    right = step(given, norm)
    fresh = {**given, "y": torch.zeros_like(given["y"])}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a kernel on another stream would see the zeros
        fresh["y"].copy_(given["y"])
        found = step(fresh, norm)
    side.synchronize()
    for one, two in zip(found, right, strict=True):
        assert torch.equal(one, two)


def test_a_second_call_does_not_ask_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from convplan.kernels import ready, sources

    y = torch.randn(4, 32, 9, 9, device="cuda").half().to(memory_format=torch.channels_last)
    first = kernels.normalize(y, None, Norm(), None, "relu")
    asked: list[str] = []
    for name in ("sums", "moments", "normalize", "finish"):
        kernel = getattr(sources, name)
        monkeypatch.setattr(kernel, "run", lambda *given, _name=name, **more: asked.append(_name))
    second = kernels.normalize(y, None, Norm(), None, "relu")
    assert asked == []
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    monkeypatch.setattr(ready._runtime.launch_enter_hook, "calls", [lambda told: None])
    kernels.normalize(y, None, Norm(), None, "relu")
    assert "normalize" in asked  # whoever listens to Triton's launches is told


def test_tensors_at_odd_addresses() -> None:
    numbers = torch.randn(1 + 4 * 32 * 81, device="cuda").half()
    y = numbers.as_strided((4, 32, 9, 9), (32 * 81, 1, 9 * 32, 32), 1)
    right = torch.stack([y.double().sum((0, 2, 3)), y.double().square().sum((0, 2, 3))])
    for _ in range(2):
        torch.testing.assert_close(kernels.column_sums(y).double(), right, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    case = Case((4, 24, 6, 6), torch.float16, "relu", True)
    assert torch.cuda.current_device() == 0
    found = distances(case, "cuda:1")
    assert {name: value for name, value in found.items() if not value <= 1} == {}


def test_more_elements_than_32_bits_count() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("24 GiB of memory are not free")
    images = 2**31 // (64 * 64 * 64) + 40
    y = torch.empty((images, 64, 64, 64), dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    y.normal_()
    y[-1] += 1
    sums = kernels.column_sums(y)
    right = torch.zeros((2, 64), dtype=torch.float64)
    for part in y.split(512):
        wide = part.float()
        right += torch.stack((wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3)))).cpu().double()
        del wide
    rows = y.numel() // 64
    assert off(sums[1], right[1], 1e-4) <= 1
    assert float((sums[0].cpu().double() - right[0]).abs().max()) <= 1e-5 * rows
    out, saved = kernels.normalize(y, None, Norm(), None, "relu")
    mean, invstd = (one.view(1, 64, 1, 1).cpu().double() for one in saved)
    for place in (0, -1):
        assert off(out[place], torch.relu((y[place].cpu().double() - mean) * invstd)[0], 2e-3) <= 1
    del out
    grad = torch.ones_like(y)
    grad_y, _, _, grad_bias = kernels.normalize_backward(
        grad, y, None, saved, Norm(), "none", (), (True, False, False, True)
    )
    assert grad_bias is not None
    assert grad_y is not None
    assert off(grad_bias, torch.full((64,), float(rows), dtype=torch.float64), 1e-5) <= 1
    assert float(grad_y[-1].abs().max()) < 1e-2

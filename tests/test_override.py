"""`enable()` behind torch's own functions and modules: right, in torch's layouts, with its errors, and gone when off.

What is right comes from `helpers.definition`, which knows no convolution. What is torch's (strides, dtypes, exception
types) comes from running the same call with convplan off.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.calls import CALLS, Call, call
from helpers.definition import defined, worst
from helpers.fresh import fresh_process, registered
from torch import nn
from torch.utils.checkpoint import checkpoint

import convplan
from convplan import ConvPlanWarning, Policy, PolicyError, _choices, _runtime
from convplan.engines.fake import FakeCandidate, FakeEngine

# Torch warns of the copy that it makes itself.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

Tensor = torch.Tensor

# Runs the first plan that builds, and neither times nor stores anything.
FAST = Policy(tune_after=10**9)
# Other engines than torch's own first; what they refuse falls to `aten`.
MATMUL_FIRST = Policy(tune_after=10**9, engines=("matmul", "aten"))
FFT_FIRST = Policy(tune_after=10**9, engines=("fft", "aten"))
POLICIES = {"aten": FAST, "matmul": MATMUL_FIRST, "fft": FFT_FIRST}

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}

# Each dtype with torch's own kernels, and the other engines in the two dtypes they compute in.
RUNS = [("aten", name) for name in DTYPES] + [(engine, name) for engine in ("matmul", "fft") for name in ("f32", "f64")]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


def dispatch_tables() -> str:
    """Torch's own account of what runs for the two operations."""
    names = ("aten::convolution", "aten::convolution_backward")
    return "".join(torch._C._dispatch_dump_table(name) for name in names)


def rewritten(tensor: Tensor) -> Tensor:
    """Ones in the shape of `tensor`, scaled so that every element differs, in its dtype."""
    numbers = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return (numbers % 7 - 3).to(tensor.dtype)


# --- right values


@pytest.mark.behaviour("B5")
@pytest.mark.behaviour("B6")
@pytest.mark.behaviour("B28")
@pytest.mark.parametrize(("engine", "dtype"), RUNS, ids=["-".join(run) for run in RUNS])
@pytest.mark.parametrize("one", CALLS, ids=lambda one: one.id)
def test_results_and_gradients_are_right_and_look_like_torchs(one: Call, engine: str, dtype: str) -> None:
    x, w, bias = one.tensors(DTYPES[dtype])
    stock, stock_grads = one.differentiate(F, x, w, bias, rewritten)
    before = [None if t is None else t.clone() for t in (x, w, bias)]
    with convplan.enabled(POLICIES[engine]):
        y, grads = one.differentiate(F, x, w, bias, rewritten)
    stats = convplan.stats()
    assert (stats["fell_back"], stats["failed"]) == (0, 0)
    assert stats["planned"] == (3 if one.planned else 0)
    dy = rewritten(stock)
    right, limits = one.right(x, w, bias, dy), one.limits(x, w, bias, dy)
    for name, found, torchs in zip(right._fields, (y, *grads), (stock, *stock_grads), strict=False):
        if one.planned:
            assert worst(found, getattr(right, name), getattr(limits, name)) <= 1, name
        else:
            assert torch.equal(found, torchs), name
        assert (found.dtype, found.stride(), found.layout) == (torchs.dtype, torchs.stride(), torchs.layout), name
    assert y.requires_grad
    for given, kept in zip((x, w, bias), before, strict=True):
        assert given is None or torch.equal(given, kept)


MODULES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("conv1d", lambda: nn.Conv1d(3, 4, 5, padding=2), (2, 3, 12)),
    ("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 8)),
    ("conv2d-no-bias", lambda: nn.Conv2d(3, 4, 1, bias=False), (2, 3, 5, 5)),
    ("conv2d-same-even", lambda: nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 8, 7)),
    ("conv2d-reflect", lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 6, 7)),
    ("conv2d-replicate-same", lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="replicate"), (1, 2, 6, 6)),
    ("conv1d-circular", lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 9)),
    ("conv3d", lambda: nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (1, 2, 3, 5, 4)),
    ("conv2d-no-batch", lambda: nn.Conv2d(3, 4, 3), (3, 6, 5)),
]


@pytest.mark.parametrize(("make", "dims"), [row[1:] for row in MODULES], ids=[row[0] for row in MODULES])
def test_modules(make: Callable[[], nn.Module], dims: tuple[int, ...]) -> None:
    module: Any = make()
    x = torch.randn(dims)
    with convplan.enabled(FAST):
        y = module(x)
    padding, given = module.padding, x
    if module.padding_mode != "zeros":
        padding, given = 0, F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    right = defined(
        given, module.weight, module.bias, stride=module.stride, padding=padding, dilation=module.dilation,
        groups=module.groups,
    )  # fmt: skip
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    assert y.stride() == make()(x).stride()
    assert convplan.stats()["planned"] == 1


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_transposed_modules_take_an_output_size(spatial: int) -> None:
    make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    module = make(3, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 3, *[5, 4, 3][:spatial])
    wanted = [2 * size for size in x.shape[2:]]
    with convplan.enabled(FAST):
        y = module(x, output_size=wanted)
    right = defined(x, module.weight, module.bias, stride=2, padding=1, output_padding=1, transposed=True)
    assert list(y.shape[2:]) == wanted
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    assert convplan.stats()["planned"] == 1


# --- layout


def _channels_last(t: Tensor) -> Tensor:
    if t.dim() == 3:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels-last": _channels_last,
    "batch-inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "one-sample-for-all": lambda t: t[:1].expand_as(t),
    "slice": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every-other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}

# Every layout meets every kind of partner, and those that differ from another only in being odd meet one.
PAIRS = [
    *itertools.product(
        ("contiguous", "channels-last", "swapped", "one-sample-for-all"), ("contiguous", "channels-last")
    ),
    *(("channels-last", "batch-inside"), ("contiguous", "batch-inside"), ("batch-inside", "channels-last")),
    *(("slice", "contiguous"), ("every-other", "slice"), ("unaligned", "unaligned")),
]

SHAPES: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = [
    ("1d", (2, 4, 9), (6, 4, 3), 1),
    ("1d-one-long", (2, 4, 1), (6, 4, 1), 1),
    ("2d", (2, 4, 5, 6), (6, 4, 3, 3), 1),
    ("2d-one-pixel", (2, 4, 1, 1), (6, 4, 1, 1), 1),
    ("2d-1x1", (2, 4, 5, 6), (6, 4, 1, 1), 1),
    ("2d-one-channel-in", (2, 1, 5, 5), (3, 1, 3, 3), 1),
    ("2d-one-channel-out", (1, 4, 5, 5), (1, 4, 3, 3), 1),
    ("2d-one-of-each", (1, 1, 5, 5), (1, 1, 1, 1), 1),
    ("2d-depthwise", (2, 4, 5, 5), (4, 1, 3, 3), 4),
    ("2d-one-column", (2, 4, 5, 1), (6, 4, 1, 1), 1),
    ("3d", (2, 4, 3, 4, 5), (6, 4, 2, 3, 3), 1),
    ("3d-one-sample", (1, 4, 3, 4, 5), (6, 4, 2, 3, 3), 1),
    ("3d-groups-flat", (2, 4, 3, 1, 1), (6, 2, 2, 1, 1), 2),
]


def _stepped(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that are ever stepped over."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


# Half precision runs the same kernels as float32 or none of its own; other engines write the layout they are told.
LAYOUT_RUNS = [
    *(
        (engine, dtype, row[0])
        for engine, dtype in (("aten", "f32"), ("aten", "f64"), ("matmul", "f32"))
        for row in SHAPES
    ),
    *(("aten", dtype, shape) for dtype in ("bf16", "f16") for shape in ("2d", "2d-1x1", "3d")),
    *(("fft", "f32", shape) for shape in ("1d", "2d", "2d-one-channel-out", "3d")),
]


@pytest.mark.behaviour("B3")
@pytest.mark.parametrize(("engine", "dtype", "shape"), LAYOUT_RUNS, ids=["-".join(run) for run in LAYOUT_RUNS])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_every_combination_of_layouts_gives_torchs_strides(
    transposed: bool, engine: str, dtype: str, shape: str
) -> None:
    x_dims, w_dims, groups = next(row[1:] for row in SHAPES if row[0] == shape)
    if transposed:
        w_dims = (x_dims[1], w_dims[0] // groups, *w_dims[2:])
    one = Call("", x_dims, w_dims, {"groups": groups}, bias=False, transposed=transposed)
    x, w, _ = one.tensors(DTYPES[dtype])
    given = [(LAYOUTS[x_name](x), LAYOUTS[w_name](w)) for x_name, w_name in PAIRS]
    stock = [_with_gradients(one, *pair) for pair in given]
    with convplan.enabled(POLICIES[engine]):
        mine = [_with_gradients(one, *pair) for pair in given]
    dy = torch.ones_like(stock[0][0])
    expected_values = {
        expanded: (one.right(given_x, w, None, dy), one.limits(given_x, w, None, dy))
        for expanded, given_x in ((False, x), (True, LAYOUTS["one-sample-for-all"](x)))
    }
    wrong = []
    for pair, found, expected in zip(PAIRS, mine, stock, strict=True):
        for name, tensor, torchs in zip(("y", "dx", "dw"), found, expected, strict=True):
            strides = (tensor.stride(), torchs.stride())
            if name == "dw":
                # Which number stands in the stride of a size-1 dimension of a weight's gradient, no layer ever reads.
                strides = (_stepped(tensor), _stepped(torchs))
            if strides[0] != strides[1]:
                wrong.append(f"{name} of {pair[0]} input, {pair[1]} weight: {strides[0]}, in torch {strides[1]}")
        right, limits = expected_values["one-sample-for-all" in pair]
        wrong += [
            f"values of {name} of {pair[0]} input, {pair[1]} weight"
            for name, tensor in zip(("y", "dx", "dw"), found, strict=True)
            if not worst(tensor, getattr(right, name), getattr(limits, name)) <= 1
        ]
    assert wrong == []


@pytest.mark.behaviour("B3")
@pytest.mark.parametrize("outer", [0, 1, (0, 1, 0)], ids=str)
@pytest.mark.parametrize(("engine", "dtype"), [("aten", "f32"), ("matmul", "f32"), ("aten", "bf16")])
def test_output_padding_of_the_stride_and_more_takes_torch_to_kernels_that_know_one_layout(
    engine: str, dtype: str, outer: int | tuple[int, ...]
) -> None:
    one = Call("", (2, 3, 2, 2, 3), (3, 2, 2, 3, 2), {"padding": 1, "dilation": 2, "output_padding": outer}, bias=False)
    x, w, _ = one.tensors(DTYPES[dtype])
    w = _channels_last(w)
    right = F.conv_transpose3d(x, w, **one.arguments)
    with convplan.enabled(POLICIES[engine]):
        found = F.conv_transpose3d(x, w, **one.arguments)
    assert _stepped(found) == _stepped(right)
    torch.testing.assert_close(found, right, rtol=0.02, atol=0.02)


def _with_gradients(one: Call, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, (dx, dw) = one.differentiate(F, x, w, None, torch.ones_like)
    return y, dx, dw


@pytest.mark.behaviour("B3")
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("flag", ["one-thread", "no-onednn"])
@pytest.mark.parametrize("name", ["2d", "2d-1x1", "3d", "3d-groups-flat"])
def test_layouts_follow_torch_where_its_settings_change_its_kernels(name: str, flag: str, dtype: str) -> None:
    x_dims, w_dims, groups = next(row[1:] for row in SHAPES if row[0] == name)
    one = Call("", x_dims, w_dims, {"groups": groups}, bias=False)
    x, w, _ = one.tensors(DTYPES[dtype])
    x = _channels_last(x)
    with one_thread() if flag == "one-thread" else onednn_off():
        stock = _with_gradients(one, x, w)
        with convplan.enabled(FAST):
            mine = _with_gradients(one, x, w)
    assert [t.stride() for t in mine[:2]] == [t.stride() for t in stock[:2]]
    assert _stepped(mine[2]) == _stepped(stock[2])


@pytest.mark.behaviour("B3")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_layout_stays_torchs_through_a_network_with_one_channel_in_the_middle(policy: Policy) -> None:
    # Torch reads the next layer's layout from the strides that stand in size-1 dimensions.
    layers = [nn.Conv2d(3, 1, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)]
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)

    def strides() -> list[tuple[int, ...]]:
        seen, y = [], x
        for layer in layers:
            y = layer(y)
            seen.append(y.stride())
        return seen

    stock = strides()
    with convplan.enabled(policy):
        assert strides() == stock


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", ["1d", "2d", "2d-1x1", "3d", "t2d-stride-output-padding"])
def test_a_bias_of_any_stride(name: str, policy: Policy) -> None:
    one = call(name)
    x, w, _ = one.tensors(torch.float32)
    wide = torch.arange(2.0 * one.filters)
    with convplan.enabled(policy):
        for bias in (wide[::2], wide[: one.filters], wide[:1].expand(one.filters) + 1, wide[1:2].expand(one.filters)):
            y = one.run(F, x, w, bias)
            right = defined(x, w, bias, transposed=one.transposed, **one.arguments)
            torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    assert convplan.stats()["planned"] == 1


# --- gradients


# Calls with one weight that differ from the first in one part, which its last call is compared by.
SAME_WEIGHT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda x, w, b: F.conv2d(x, w),
    "stride": lambda x, w, b: F.conv2d(x, w, stride=2),
    "padding": lambda x, w, b: F.conv2d(x, w, padding=1),
    "dilation": lambda x, w, b: F.conv2d(x, w, dilation=2),
    "groups": lambda x, w, b: F.conv2d(torch.cat([x, x], 1), w, groups=2),
    "transposed": lambda x, w, b: F.conv_transpose2d(x, w),
    "output-padding": lambda x, w, b: F.conv_transpose2d(x, w, stride=2, output_padding=1),
    "transposed-stride": lambda x, w, b: F.conv_transpose2d(x, w, stride=2),
    "transposed-groups": lambda x, w, b: F.conv_transpose2d(x, w, groups=2),
    "bias": lambda x, w, b: F.conv2d(x, w, b),
    "input-sizes": lambda x, w, b: F.conv2d(x[:, :, 1:], w),
    "input-strides": lambda x, w, b: F.conv2d(x.transpose(2, 3), w),
    "input-dtype": lambda x, w, b: F.conv2d(x.double(), w.double()),
    "weight-sizes": lambda x, w, b: F.conv2d(x, w[:2]),
    "weight-strides": lambda x, w, b: F.conv2d(x, w.transpose(2, 3)),
    "alignment": lambda x, w, b: F.conv2d(x.flatten()[1:].as_strided((1, 4, 9, 9), (324, 81, 9, 1)), w),
}


# The call before, where the plain one would differ in more than that part.
BEFORE = {"output-padding": "transposed-stride", "transposed-groups": "transposed"}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", SAME_WEIGHT)
def test_a_call_that_differs_from_the_last_of_its_weight_runs_as_itself(name: str, grad: bool) -> None:
    x, w, bias = torch.randn(2, 4, 9, 9), torch.randn(4, 4, 3, 3), torch.randn(4)

    def run(which: str) -> tuple[Tensor, ...]:
        given = x.clone().requires_grad_(grad), w.requires_grad_(grad), bias
        y = SAME_WEIGHT[which](*given)
        return (y, *torch.autograd.grad(y, given[:2], torch.ones_like(y))) if grad else (y,)

    before = BEFORE.get(name, "plain")
    expected = {which: run(which) for which in (before, name)}
    with convplan.enabled(Policy(effort="instant", engines=("aten",))):
        for which in [before] * 3 + [name] * 3 + [before] * 2:
            for mine, right in zip(run(which), expected[which], strict=True):
                torch.testing.assert_close(mine, right, rtol=0, atol=0)


def _kernels(run: Callable[[], object]) -> list[str]:
    """Names of the operators that a piece of code ends in, below the two entries that convplan replaces."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sorted(e.name for e in profile.events() if "mkldnn" in e.name or "slow_conv" in e.name or "sum" in e.name)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_backward_that_torch_does_best_is_one_call_as_in_torch(spatial: int) -> None:
    x = torch.randn(2, 4, *[9] * spatial, requires_grad=True)
    layer = nn.Conv1d(4, 6, 3) if spatial == 1 else nn.Conv2d(4, 6, 3) if spatial == 2 else nn.Conv3d(4, 6, 3)

    def backward() -> tuple[Tensor, ...]:
        y = layer(x)
        return torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))

    expected, stock = backward(), _kernels(backward)
    with convplan.enabled(Policy(engines=("aten",), effort="instant")):
        found, mine = backward(), _kernels(backward)
    assert stock
    assert mine == stock
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [m for m in itertools.product([False, True], repeat=3) if any(m)], ids=str)
@pytest.mark.parametrize("name", ["2d-each-its-own", "t2d-stride-output-padding", "1d", "3d"])
def test_only_the_gradients_asked_for_are_computed(name: str, mask: tuple[bool, bool, bool]) -> None:
    one = call(name)
    tensors = one.tensors(torch.float32)
    leaves = [t.requires_grad_(wanted) for t, wanted in zip(tensors, mask, strict=True)]  # type: ignore[union-attr]
    with convplan.enabled(FAST):
        y = one.run(F, *leaves)
        dy = rewritten(y)
        y.backward(dy)
    right, limits = one.right(*tensors, dy), one.limits(*tensors, dy)
    for leaf, wanted, field in zip(leaves, mask, ("dx", "dw", "db"), strict=True):
        if not wanted:
            assert leaf.grad is None
        else:
            assert worst(leaf.grad, getattr(right, field), getattr(limits, field)) <= 1
    assert convplan.stats()["planned"] == 1 + mask[0] + mask[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["1d", "2d", "2d-depthwise", "3d", "t1d", "t2d-stride-output-padding", "t3d-groups"])
def test_an_expanded_incoming_gradient(name: str, dtype: str) -> None:
    one = call(name)
    x, w, bias = one.tensors(DTYPES[dtype])
    leaves = [t.detach().requires_grad_() for t in (x, w, bias) if t is not None]
    with convplan.enabled(FAST):
        y = one.run(F, *leaves, *([] if bias is not None else [None]))
        y.sum().backward()  # one number, seen in every place
    right, limits = (f(x, w, bias, torch.ones_like(y)) for f in (one.right, one.limits))
    for leaf, field in zip(leaves, ("dx", "dw", "db"), strict=False):
        assert worst(leaf.grad, getattr(right, field), getattr(limits, field)) <= 1, field  # type: ignore[arg-type]


GRADIENT_CHECKED = (
    "1d-stride-dilation-groups",
    "2d-each-its-own",
    "2d-depthwise",
    "2d-no-batch",
    "2d-same-even",
    "3d-stride-groups",
    "t1d-no-batch",
    "t2d-groups-dilation",
    "t2d-output-padding-above-stride",
    "t3d",
)


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", GRADIENT_CHECKED)
def test_gradients_of_every_order_agree_with_finite_differences(name: str, policy: Policy) -> None:
    one = call(name)
    tensors = [t.requires_grad_() for t in one.tensors(torch.float64) if t is not None]
    bias = [] if one.bias else [None]
    with convplan.enabled(policy):
        assert torch.autograd.gradcheck(lambda *given: one.run(F, *given, *bias), tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *given: one.run(F, *given, *bias), tensors, fast_mode=True)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("name", ["2d", "t2d-stride-output-padding", "1d", "3d-stride-groups"])
def test_a_second_derivative_is_the_definitions(name: str) -> None:
    one = call(name)
    x, w, bias = one.tensors(torch.float64)

    def penalty(convolve: Callable[..., Tensor]) -> list[Tensor]:
        given = [t.detach().requires_grad_() for t in (x, w, bias) if t is not None]
        y = convolve(*given)
        (dx,) = torch.autograd.grad(y.square().sum(), given[0], create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), given[:2]))

    with convplan.enabled(FAST):
        found = penalty(lambda *given: one.run(F, *given, *([] if one.bias else [None])))
    right = penalty(lambda *given: defined(*given, transposed=one.transposed, **one.arguments))
    torch.testing.assert_close(found, right)


# --- bad arguments


def _zeros(*dims: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(dims, dtype=dtype, device=device)


X, W = (2, 4, 6, 6), (6, 4, 3, 3)

BAD_CALLS: dict[str, Callable[[], object]] = {
    "channels": lambda: F.conv2d(_zeros(*X), _zeros(6, 3, 3, 3)),
    "channels-transposed": lambda: F.conv_transpose2d(_zeros(*X), _zeros(3, 4, 3, 3)),
    "groups-and-input": lambda: F.conv2d(_zeros(*X), _zeros(6, 1, 3, 3), groups=3),
    "groups-and-filters": lambda: F.conv2d(_zeros(*X), _zeros(5, 2, 3, 3), groups=2),
    "groups-zero": lambda: F.conv2d(_zeros(*X), _zeros(*W), groups=0),
    "groups-negative": lambda: F.conv2d(_zeros(*X), _zeros(*W), groups=-2),
    "input-rank": lambda: F.conv2d(_zeros(2, 4), _zeros(*W)),
    "input-rank-high": lambda: F.conv2d(_zeros(1, *X), _zeros(*W)),
    "weight-rank": lambda: F.conv2d(_zeros(*X), _zeros(6, 4, 3)),
    "weight-rank-1d": lambda: F.conv1d(_zeros(2, 4, 6), _zeros(*W)),
    "dtypes": lambda: F.conv2d(_zeros(*X), _zeros(*W, dtype=torch.float64)),
    "dtypes-half": lambda: F.conv2d(_zeros(*X, dtype=torch.bfloat16), _zeros(*W)),
    "dtype-of-bias": lambda: F.conv2d(_zeros(*X), _zeros(*W), _zeros(6, dtype=torch.float64)),
    "integer-weight": lambda: F.conv2d(_zeros(*X), _zeros(*W, dtype=torch.int32)),
    "negative-padding": lambda: F.conv2d(_zeros(*X), _zeros(*W), padding=-1),
    "negative-padding-1d": lambda: F.conv1d(_zeros(2, 4, 6), _zeros(6, 4, 3), padding=-1),
    "negative-padding-transposed": lambda: F.conv_transpose2d(_zeros(*X), _zeros(4, 6, 3, 3), padding=-1),
    "zero-stride": lambda: F.conv2d(_zeros(*X), _zeros(*W), stride=0),
    "zero-stride-transposed": lambda: F.conv_transpose2d(_zeros(*X), _zeros(4, 6, 3, 3), stride=0),
    "zero-dilation": lambda: F.conv2d(_zeros(*X), _zeros(*W), dilation=0),
    "negative-stride": lambda: F.conv2d(_zeros(*X), _zeros(*W), stride=-1),
    "filter-larger-than-input": lambda: F.conv2d(_zeros(2, 4, 2, 6), _zeros(*W)),
    "filter-larger-than-input-3d": lambda: F.conv3d(_zeros(1, 1, 2, 2, 2), _zeros(1, 1, 3, 1, 1)),
    "dilated-filter-larger": lambda: F.conv2d(_zeros(*X), _zeros(*W), dilation=3),
    "transposed-all-cropped": lambda: F.conv_transpose2d(_zeros(*X), _zeros(4, 6, 1, 1), padding=3),
    "bias-length": lambda: F.conv2d(_zeros(*X), _zeros(*W), _zeros(5)),
    "bias-rank": lambda: F.conv2d(_zeros(*X), _zeros(*W), _zeros(6, 1)),
    "bias-length-transposed": lambda: F.conv_transpose2d(_zeros(*X), _zeros(4, 6, 3, 3), _zeros(4)),
    "same-with-stride": lambda: F.conv2d(_zeros(*X), _zeros(*W), stride=2, padding="same"),
    "padding-word": lambda: F.conv2d(_zeros(*X), _zeros(*W), padding="full"),
    "padding-entries": lambda: F.conv2d(_zeros(*X), _zeros(*W), padding=(1, 1, 1)),
    "stride-entries": lambda: F.conv2d(_zeros(*X), _zeros(*W), stride=(1, 1, 1)),
    "output-padding-large": lambda: F.conv_transpose2d(_zeros(*X), _zeros(4, 6, 3, 3), output_padding=1),
    "output-padding-negative": lambda: F.conv_transpose2d(_zeros(*X), _zeros(4, 6, 3, 3), stride=2, output_padding=-1),
    "weight-elsewhere": lambda: F.conv2d(_zeros(*X), _zeros(*W, device="meta")),
    "input-elsewhere": lambda: F.conv2d(_zeros(*X, device="meta"), _zeros(*W)),
    "bias-elsewhere": lambda: F.conv2d(_zeros(*X), _zeros(*W), _zeros(6, device="meta")),
    "sparse-input": lambda: F.conv2d(_zeros(*X).to_sparse(), _zeros(*W)),
    "boolean": lambda: F.conv2d(_zeros(*X, dtype=torch.bool), _zeros(*W, dtype=torch.bool)),
    "empty-filter": lambda: F.conv2d(_zeros(*X), _zeros(6, 4, 0, 3)),
    "no-tensor": lambda: F.conv2d(_zeros(*X), None),  # type: ignore[arg-type]
    "backward-shape": lambda: torch.ops.aten.convolution_backward(
        _zeros(2, 6, 9, 9), _zeros(*X), _zeros(*W), [6], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True]
    ),
    "backward-dtype": lambda: torch.ops.aten.convolution_backward(
        _zeros(2, 6, 4, 4, dtype=torch.float64), _zeros(*X), _zeros(*W),
        [6], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True],
    ),
}  # fmt: skip


def outcome(run: Callable[[], object]) -> tuple[str, str]:
    """The type and first line of what a call raises; of a result, what it looks like."""
    try:
        result = run()
    except Exception as exc:
        return type(exc).__name__, str(exc).splitlines()[0] if str(exc) else ""
    results = result if isinstance(result, tuple) else (result,)
    return "result", str([(t.shape, t.dtype, t.device.type, t.layout) if t is not None else None for t in results])


@pytest.mark.parametrize("run", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_fails_as_in_torch_and_changes_nothing(run: Callable[[], object]) -> None:
    stock = outcome(run)
    with convplan.enabled(FAST):
        good = call("2d")
        x, w, bias = good.tensors(torch.float32)
        first = good.run(F, x, w, bias)
        assert outcome(run) == stock
        assert outcome(run) == stock  # and the second time, when the call is remembered
        assert torch.equal(good.run(F, x, w, bias), first)
    stats = convplan.stats()
    assert (stats["planned"], stats["fell_back"], stats["failed"]) == (1, 0, 0)


# --- what is left to torch


def _complex(*dims: int) -> Tensor:
    return torch.randn(dims, dtype=torch.complex64, generator=torch.Generator().manual_seed(len(dims)))


def _numbers(*dims: int) -> Tensor:
    return torch.randn(dims, generator=torch.Generator().manual_seed(len(dims)))


UNPLANNED: dict[str, Callable[[], Tensor]] = {
    "int64": lambda: F.conv2d(torch.arange(50).view(1, 2, 5, 5), torch.arange(24).view(3, 2, 2, 2), padding=1),
    "int32-transposed": lambda: F.conv_transpose1d(
        torch.arange(10, dtype=torch.int32).view(1, 2, 5), torch.ones(2, 1, 3, dtype=torch.int32)
    ),
    "no-samples": lambda: F.conv2d(_numbers(0, 3, 5, 5), _numbers(4, 3, 3, 3), _numbers(4)),
    "no-samples-transposed": lambda: F.conv_transpose2d(_numbers(0, 3, 5, 5), _numbers(3, 4, 3, 3)),
    "no-channels": lambda: F.conv2d(_numbers(2, 0, 5, 5), _numbers(4, 0, 3, 3), _numbers(4)),
    "no-filters": lambda: F.conv2d(_numbers(2, 3, 5, 5), _numbers(0, 3, 3, 3)),
    "no-pixels": lambda: F.conv2d(_numbers(2, 3, 0, 5), _numbers(4, 3, 1, 1)),
    "meta": lambda: F.conv2d(_numbers(2, 3, 5, 5).to("meta"), _numbers(4, 3, 3, 3).to("meta")),
    "mkldnn": lambda: F.conv2d(_numbers(2, 3, 5, 5).to_mkldnn(), _numbers(4, 3, 3, 3), _numbers(4)).to_dense(),
}


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize("run", UNPLANNED.values(), ids=UNPLANNED)
def test_what_is_not_planned_is_torchs_to_the_bit(run: Callable[[], Tensor]) -> None:
    stock_outcome = outcome(run)
    stock = run() if stock_outcome[0] == "result" else None
    with convplan.enabled(FAST):
        assert outcome(run) == stock_outcome
        if stock is not None:
            again = run()
            assert again.stride() == stock.stride()
            assert stock.device.type == "meta" or torch.equal(again, stock)
    stats = convplan.stats()
    assert (stats["planned"], stats["fell_back"], stats["failed"]) == (0, 0, 0)


def test_complex_tensors_are_right() -> None:
    # Torch takes a complex convolution apart into real ones, which come through convplan.
    x, w = _complex(2, 3, 6, 5), _complex(4, 3, 3, 3)
    stock = F.conv2d(x, w)
    with convplan.enabled(FAST):
        found = F.conv2d(x, w)
    torch.testing.assert_close(found, stock, rtol=1e-5, atol=1e-5)
    assert found.stride() == stock.stride()
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_gradients_of_an_empty_batch_are_zeros(transposed: bool) -> None:
    one = Call("", (0, 3, 5, 5), (3, 4, 3, 3) if transposed else (4, 3, 3, 3), transposed=transposed)
    x, w, bias = one.tensors(torch.float32)
    stock, stock_grads = one.differentiate(F, x, w, bias, torch.ones_like)
    with convplan.enabled(FAST):
        y, grads = one.differentiate(F, x, w, bias, torch.ones_like)
    assert y.shape == stock.shape
    for found, torchs in zip(grads, stock_grads, strict=True):
        assert torch.equal(found, torchs)
        assert not found.any()
    assert convplan.stats()["planned"] == 0


# --- switch


@pytest.mark.behaviour("B33")
def test_off_is_torchs_own_path_to_the_bit() -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    stock, tables = one.run(F, x, w, bias), dispatch_tables()
    convplan.enable(FAST)
    assert dispatch_tables() != tables
    one.run(F, x, w, bias)
    convplan.disable()
    stats = convplan.stats()
    assert dispatch_tables() == tables  # no Python function is on the way any more
    assert torch.equal(one.run(F, x, w, bias), stock)
    assert convplan.stats() == stats


@pytest.mark.behaviour("B33")
def test_a_block_gives_back_what_held_before_it() -> None:
    tables = dispatch_tables()
    outer, inner = FAST, FAST.replace(engines=("aten",))
    with convplan.enabled(outer):
        with convplan.enabled(inner):
            assert _choices.state.policy is inner
        assert _choices.state.policy is outer
        with pytest.raises(ZeroDivisionError), convplan.enabled(inner):
            raise ZeroDivisionError
        assert _choices.state.policy is outer
        call("2d").run(F, *call("2d").tensors(torch.float32))
        assert convplan.stats()["planned"] == 1
    assert dispatch_tables() == tables


def test_enabling_twice_exchanges_the_policy_and_one_disable_is_enough() -> None:
    tables = dispatch_tables()
    one = call("2d")
    tensors = one.tensors(torch.float32)
    convplan.enable(FAST)
    one.run(F, *tensors)
    convplan.enable(FFT_FIRST)
    one.run(F, *tensors)
    assert convplan.stats()["planned"] == 2  # the second policy chose for itself
    convplan.disable()
    assert dispatch_tables() == tables
    convplan.disable()
    assert dispatch_tables() == tables


@pytest.mark.parametrize("policy", [Policy(engines=("nobody",)), "fast"], ids=["unknown-engine", "no-policy"])
def test_a_wrong_policy_is_refused_and_leaves_everything_as_it_was(policy: Any) -> None:
    tables = dispatch_tables()
    with pytest.raises(PolicyError, match=r"nobody.*aten|fast"):
        convplan.enable(policy)
    with pytest.raises(PolicyError), convplan.enabled(policy):
        pass
    assert dispatch_tables() == tables
    convplan.enable(FAST)
    with pytest.raises(PolicyError):
        convplan.enable(policy)
    assert _choices.state.policy is FAST


def in_thread(run: Callable[[], None]) -> None:
    """Run in another thread, and raise here what it raises there."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.behaviour("B22")
def test_one_switch_and_one_choice_for_all_threads() -> None:
    one = call("2d")
    tensors = one.tensors(torch.float32)
    in_thread(lambda: convplan.enable(FAST))
    one.run(F, *tensors)
    in_thread(lambda: [one.run(F, *tensors) for _ in range(3)])  # type: ignore[arg-type, return-value]
    stats = convplan.stats()
    # Each thread made a caller of its own (a miss) from the one choice, and the other thread's hits are counted too.
    assert (stats["planned"], stats["misses"], stats["hits"]) == (1, 2, 2)
    in_thread(convplan.disable)
    one.run(F, *tensors)
    assert convplan.stats() == stats


@pytest.mark.behaviour("B36")
@pytest.mark.parametrize("tune_after", [10**9, 5], ids=["untuned", "tuned-on-the-way"])
def test_many_threads_at_once(tune_after: int) -> None:
    names = ("1d", "2d", "2d-1x1", "2d-depthwise", "3d", "t2d-stride-output-padding", "1d-long-filter", "t1d")
    work = []
    for name in names:
        one = call(name)
        x, w, bias = one.tensors(torch.float32)
        dy = rewritten(one.run(F, x, w, bias))
        work.append((one, (x, w, bias), one.right(x, w, bias, dy), one.limits(x, w, bias, dy)))
    wrong: list[str] = []
    start = threading.Barrier(4)

    def convolve(number: int) -> None:
        start.wait()
        for i in range(200):
            one, tensors, right, limits = work[(i * (number + 1) + number) % len(work)]
            if i % 3:
                y, grads = one.run(F, *tensors), []
            else:
                y, grads = one.differentiate(F, *tensors, rewritten)
            for field, found in zip(right._fields, (y, *grads), strict=False):
                if not worst(found, getattr(right, field), getattr(limits, field)) <= 1:
                    wrong.append(f"{one.id} {field} in call {i} of thread {number}")

    with convplan.enabled(Policy(tune_after=tune_after, budget_s=0.001)):
        threads = [threading.Thread(target=convolve, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    stats = convplan.stats()
    assert (stats["fell_back"], stats["failed"]) == (0, 0)
    assert stats["planned"] - stats["tuned"] == 3 * len(names)
    assert stats["tuned"] == (3 * len(names) if tune_after == 5 else 0)


# --- torch's modes and flags


@pytest.mark.behaviour("C8")
def test_autocast_chooses_the_dtype_as_ever() -> None:
    x, w, bias = call("2d").tensors(torch.float32)
    x.requires_grad_(), w.requires_grad_()
    with convplan.enabled(FAST), convplan.capture() as seen, torch.autocast("cpu", torch.bfloat16):
        y = F.conv2d(x, w, bias, padding=1)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert [problem.dtype for problem in seen] == ["bfloat16"] * 3
    assert (x.grad.dtype, w.grad.dtype) == (torch.float32, torch.float32)  # type: ignore[union-attr]
    given = [t.detach().bfloat16() for t in (x, w, bias)]  # type: ignore[union-attr]
    one = call("2d")
    right, limits = one.right(*given, torch.ones_like(y)), one.limits(*given, torch.ones_like(y))
    assert worst(y, right.y, limits.y) <= 1
    assert worst(x.grad, right.dx, limits.dx) <= 1  # type: ignore[arg-type]


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    w.requires_grad_()
    stock = one.run(F, x, w, bias)
    with convplan.enabled(FAST):
        with mode():
            y = one.run(F, x, w, bias)
        assert not y.requires_grad
        assert y.is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(y, stock)
        assert one.run(F, x, w, bias).requires_grad  # the plan found without gradients serves with them, too
    assert convplan.stats()["planned"] == 1


@pytest.mark.behaviour("C8")
def test_an_inference_mode_plan_serves_training_and_the_other_way_round() -> None:
    one = call("2d")
    tensors = one.tensors(torch.float32)
    with convplan.enabled(Policy(tune_after=1, budget_s=0.001)):
        with torch.inference_mode():
            one.run(F, *tensors)
        _, grads = one.differentiate(F, *tensors, rewritten)
        with torch.inference_mode():
            one.run(F, *tensors)
    assert all(grad.isfinite().all() for grad in grads)
    assert not any(grad.is_inference() for grad in grads)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("C8")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at the first forward derivative
@pytest.mark.parametrize("name", ["2d", "1d", "t2d-stride-output-padding"])
def test_function_transforms(name: str) -> None:
    one = call(name)
    x, w, bias = one.tensors(torch.float64)
    samples = torch.stack([x, x + 1, 2 * x])

    def loss(convolve: Callable[..., Tensor], sample: Tensor, weight: Tensor) -> Tensor:
        return convolve(sample, weight, bias).square().sum()

    def torchs(*given: Any) -> Tensor:
        return one.run(F, *given)

    def definitions(*given: Any) -> Tensor:
        return defined(*given, transposed=one.transposed, **one.arguments)

    with convplan.enabled(FAST):
        gradient = torch.func.grad(lambda weight: loss(torchs, x, weight))(w)
        batched = torch.vmap(lambda sample: torchs(sample, w, bias))(samples)
        per_sample_gradient = torch.func.grad(lambda weight, sample: loss(torchs, sample, weight))
        per_sample = torch.vmap(per_sample_gradient, (None, 0))(w, samples)
        _, tangent = torch.func.jvp(lambda given: torchs(given, w, bias), (x,), (torch.ones_like(x),))
    expected = [torch.func.grad(lambda weight, s=s: loss(definitions, s, weight))(w) for s in samples]
    torch.testing.assert_close(gradient, expected[0])
    torch.testing.assert_close(batched, torch.stack([definitions(s, w, bias) for s in samples]))
    torch.testing.assert_close(per_sample, torch.stack(expected))
    torch.testing.assert_close(tangent, definitions(torch.ones_like(x), w, None))


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_runs_the_forward_again(reentrant: bool) -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, bias) if t is not None]
    with convplan.enabled(FAST):
        y = checkpoint(lambda *given: one.run(F, *given), *leaves, use_reentrant=reentrant)
        dy = rewritten(y)
        y.backward(dy)
    right, limits = one.right(x, w, bias, dy), one.limits(x, w, bias, dy)
    for leaf, field in zip(leaves, ("dx", "dw", "db"), strict=True):
        assert worst(leaf.grad, getattr(right, field), getattr(limits, field)) <= 1  # type: ignore[arg-type]


@pytest.mark.behaviour("C8")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the compiler's own modules
def test_compiled_code_runs_through_convplan_too() -> None:
    one = call("2d")
    leaves = [t.requires_grad_() for t in one.tensors(torch.float32) if t is not None]
    compiled = torch.compile(lambda *given: one.run(F, *given).relu(), backend="aot_eager")
    with convplan.enabled(FAST):
        y = compiled(*leaves)
        grads = torch.autograd.grad(y.square().sum(), leaves)
    assert convplan.stats()["planned"] == 3
    stock = one.run(F, *leaves).relu()
    torch.testing.assert_close(y, stock)
    for found, expected in zip(grads, torch.autograd.grad(stock.square().sum(), leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.behaviour("C8")
def test_a_graph_that_torch_traced_runs_through_convplan_too() -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda *given: one.run(F, *given).relu())(x, w, bias)
    assert "aten.convolution" in graph.code
    with convplan.enabled(FAST):
        y = graph(x, w, bias)
    torch.testing.assert_close(y, one.run(F, x, w, bias).relu())
    assert convplan.stats()["planned"] == 1


class one_thread:  # noqa: N801 - reads as the setting it is
    """Torch computes with one thread inside the block."""

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


class onednn_off:  # noqa: N801
    """Torch leaves oneDNN out inside the block."""

    def __enter__(self) -> None:
        torch._C._set_mkldnn_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch._C._set_mkldnn_enabled(True)


class deterministic:  # noqa: N801
    """Torch asks for deterministic algorithms inside the block."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("setting", [one_thread, onednn_off, deterministic])
@pytest.mark.parametrize("name", ["2d", "t2d-stride-output-padding", "3d"])
def test_torchs_settings_are_followed_while_they_hold(name: str, setting: Callable[[], Any]) -> None:
    one = call(name)
    x, w, bias = one.tensors(torch.float32)
    dy = rewritten(one.run(F, x, w, bias))
    right, limits = one.right(x, w, bias, dy), one.limits(x, w, bias, dy)

    def check() -> dict[str, int]:
        y, grads = one.differentiate(F, x, w, bias, rewritten)
        for field, found in zip(right._fields, (y, *grads), strict=True):
            assert worst(found, getattr(right, field), getattr(limits, field)) <= 1
        return convplan.stats(reset=True)

    with convplan.enabled(FAST):
        assert check()["planned"] == 3
        with setting():
            assert check()["planned"] == 3  # decided anew
            assert (check()["planned"], convplan.stats()["misses"]) == (0, 0)
        assert (check()["planned"], convplan.stats()["misses"]) == (0, 0)  # and what was decided before holds again


@pytest.mark.filterwarnings("ignore:.*for another environment:convplan.ConvPlanWarning")
def test_a_changed_setting_shows_in_the_plans_environment() -> None:
    problem = convplan.problem("fprop", _numbers(2, 3, 8, 8), _numbers(4, 3, 3, 3))
    instant = Policy(effort="instant")
    usual = dict(convplan.plan(problem, instant).environment.items)
    with one_thread():
        assert dict(convplan.plan(problem, instant).environment.items) == {**usual, "threads": "1"}
    with onednn_off():
        assert dict(convplan.plan(problem, instant).environment.items) == {**usual, "onednn": "off"}


# --- fork


def forked(run: Callable[[], None], limit_s: float = 60) -> int:
    """Run in a forked child, as a data loader's worker does, and return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer Pythons, about threads at a fork
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # as data loaders do: a pool of threads does not survive a fork
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    for _ in range(int(limit_s * 50)):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError(f"the child did not end within {limit_s} s")


@pytest.mark.filterwarnings("ignore:.*for another environment:convplan.ConvPlanWarning")  # the child has one thread
@pytest.mark.parametrize("policy", [FAST, Policy(tune_after=1, budget_s=0.001)], ids=["untuned", "tuned"])
def test_a_forked_child_convolves(policy: Policy) -> None:
    old, new = call("2d"), call("2d-depthwise")
    x, w, bias = new.tensors(torch.float32)
    right = defined(x, w, bias, **new.arguments)

    def child() -> None:
        old.run(F, *old.tensors(torch.float32))
        torch.testing.assert_close(new.run(F, x, w, bias).double(), right, rtol=1e-5, atol=1e-5)
        assert convplan.stats()["fell_back"] == 0

    with convplan.enabled(policy):
        old.run(F, *old.tensors(torch.float32))
        assert forked(child) == 0
        new.run(F, x, w, bias)
    assert convplan.check_plans().ok


# --- what goes wrong


def test_an_engine_that_fails_while_running_is_replaced_with_one_warning() -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    with registered(FakeEngine([FakeCandidate(fails="run")], name="broken")):
        policy = FAST.replace(engines=("broken", "aten"))
        with convplan.enabled(policy), pytest.warns(ConvPlanWarning, match="broken.*aten") as seen:
            results = [one.run(F, x, w, bias) for _ in range(3)]
    assert len(seen) == 1
    for result in results:
        torch.testing.assert_close(result.double(), defined(x, w, bias, **one.arguments), rtol=1e-5, atol=1e-5)
    assert convplan.stats()["fell_back"] == 1


def test_a_bug_of_convplans_does_not_take_the_convolution_down(monkeypatch: pytest.MonkeyPatch) -> None:
    one = call("2d")
    tensors = one.tensors(torch.float32)
    stock = one.run(F, *tensors)

    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(_runtime, "decide", broken)
    with convplan.enabled(FAST), pytest.warns(ConvPlanWarning, match="KeyError.*a bug"):
        found = one.run(F, *tensors)
    assert torch.equal(found, stock)
    assert convplan.stats()["fell_back"] == 1


def test_where_nothing_may_run_torch_does_with_one_warning() -> None:
    one = call("2d-1x1")  # one tap, which the transform engine refuses
    x, w, bias = one.tensors(torch.float32)
    stock = one.run(F, x, w, bias)
    with convplan.enabled(FAST.replace(engines=("fft",))), pytest.warns(ConvPlanWarning, match="stock torch") as seen:
        results = [one.run(F, x, w, bias) for _ in range(3)]
    assert len(seen) == 1
    assert all(torch.equal(result, stock) for result in results)


def test_replay_tells_of_a_missing_plan() -> None:
    one = call("2d")
    with convplan.enabled(Policy(mode="replay")), pytest.raises(convplan.ReplayMiss, match=r"convplan\.tune"):
        one.run(F, *one.tensors(torch.float32))

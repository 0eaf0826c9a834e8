"""`convplan.conv1d` … `conv_transpose3d`: torch's arguments and results, and what they take beyond torch's.

What is right comes from `helpers.definition`. What a call leaves alone (tensors, `out`, torch's own path) is compared
with what was there before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.calls import CALLS, Call, call
from helpers.definition import defined, worst
from helpers.fresh import fresh_process

import convplan
from convplan import EngineConfig, Policy, PolicyError, Problem, ReplayMiss, SpecError
from convplan.torch_ops import override

# Torch warns of the copy that it makes itself.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

Tensor = torch.Tensor

# Runs the first plan that builds, and neither times nor stores anything.
FAST = Policy(tune_after=10**9)
MATMUL_FIRST = Policy(tune_after=10**9, engines=("matmul", "aten"))
FFT_FIRST = Policy(tune_after=10**9, engines=("fft", "aten"))
POLICIES = {"aten": FAST, "matmul": MATMUL_FIRST, "fft": FFT_FIRST}

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
NAMES = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


def rewritten(tensor: Tensor) -> Tensor:
    """Small integers in the shape of `tensor`, in its dtype."""
    numbers = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return (numbers % 7 - 3).to(tensor.dtype)


def numbers(*dims: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(dims, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_policy(one: Call, policy: Policy) -> Callable[..., Tensor]:
    """The call as a function of its tensors."""
    return lambda x, w, bias=None: one.run(convplan, x, w, bias, policy=policy)


# --- right values


@pytest.mark.behaviour("B5")
@pytest.mark.behaviour("B6")
@pytest.mark.behaviour("B28")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("one", CALLS, ids=lambda one: one.id)
def test_results_and_gradients_are_right(one: Call, dtype: str) -> None:
    x, w, bias = one.tensors(DTYPES[dtype])
    before = [None if t is None else t.clone() for t in (x, w, bias)]
    leaves = [t.detach().requires_grad_() for t in (x, w, bias) if t is not None]
    y = with_policy(one, FAST)(*leaves)
    dy = rewritten(y)
    grads = torch.autograd.grad(y, leaves, dy)
    if one.planned:  # half-precision kernels of torch's own, which run the others, answer to torch alone
        right, limits = one.right(x, w, bias, dy), one.limits(x, w, bias, dy)
        for name, found in zip(right._fields, (y, *grads), strict=False):
            assert worst(found, getattr(right, name), getattr(limits, name)) <= 1, name
    assert y.dtype == DTYPES[dtype]
    for given, kept in zip((x, w, bias), before, strict=True):
        assert given is None or torch.equal(given, kept)
    stats = convplan.stats()
    assert (stats["planned"], stats["fell_back"], stats["failed"]) == (3 if one.planned else 0, 0, 0)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("engine", ["matmul", "fft"])
@pytest.mark.parametrize("one", [one for one in CALLS if one.planned], ids=lambda one: one.id)
def test_other_engines_are_right_without_gradients(one: Call, engine: str, dtype: str) -> None:
    x, w, bias = one.tensors(DTYPES[dtype])
    y = with_policy(one, POLICIES[engine])(x, w, bias)
    dy = torch.ones_like(y)
    assert worst(y, one.right(x, w, bias, dy).y, one.limits(x, w, bias, dy).y) <= 1
    assert not y.requires_grad
    assert y.stride() == one.run(F, x, w, bias).stride()


def test_positions_of_arguments_are_torchs() -> None:
    x, w, b = numbers(2, 4, 9, 8), numbers(6, 2, 3, 3), numbers(6)
    arguments: tuple[Any, ...] = ((2, 1), (1, 2), (1, 2), 2)  # stride, padding, dilation, groups
    torch.testing.assert_close(convplan.conv2d(x, w, b, *arguments), F.conv2d(x, w, b, *arguments))
    w, arguments = numbers(4, 3, 3, 3), ((2, 1), (1, 2), (1, 0), 2, (1, 2))
    # stride, padding, output_padding, groups, dilation: torch puts them in another order here
    torch.testing.assert_close(
        convplan.conv_transpose2d(x, w, b, *arguments), F.conv_transpose2d(x, w, b, *arguments), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_keywords_are_torchs_and_the_others_have_no_position(name: str) -> None:
    spatial = int(name[-2])
    w_dims = (3, 4, *[3] * spatial) if "transpose" in name else (4, 3, *[3] * spatial)
    x, w, b = numbers(2, 3, *[5] * spatial), numbers(*w_dims), numbers(4)
    keywords = {"input": x, "weight": w, "bias": b, "stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    torch.testing.assert_close(getattr(convplan, name)(**keywords), getattr(F, name)(**keywords), rtol=1e-5, atol=1e-5)
    positions = (x, w, b, 1, 1, 0, 1, 1) if "transpose" in name else (x, w, b, 1, 1, 1, 1)
    with pytest.raises(TypeError, match="positional"):
        getattr(convplan, name)(*positions, FAST)


PADDINGS: list[tuple[str, Any]] = [
    ("number", 2),
    ("numbers", (1, 2)),
    ("list", [2, 0]),
    ("one-for-both", (1,)),
    ("pairs", ((1, 2), (0, 3))),
    ("pair-and-number", ((2, 0), 1)),
    ("before-only", ((3, 0), (0, 0))),
    ("lists-of-lists", [[0, 1], [2, 0]]),
    ("same", "same"),
    ("valid", "valid"),
]


@pytest.mark.behaviour("B5")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("padding", [row[1] for row in PADDINGS], ids=[row[0] for row in PADDINGS])
def test_padding(padding: Any, policy: Policy) -> None:
    x, w, b = numbers(2, 3, 8, 9), numbers(4, 3, 3, 2), numbers(4)
    y = convplan.conv2d(x, w, b, padding=padding, dilation=(1, 2), policy=policy)
    right = defined(x, w, b, padding=padding, dilation=(1, 2))
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.behaviour("B5")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("padding", [((1, 0), (0, 2)), ((0, 3), 1)], ids=str)
def test_asymmetric_padding_of_a_transposed_convolution(padding: Any, policy: Policy) -> None:
    x, w, b = numbers(2, 3, 5, 4), numbers(3, 4, 3, 4), numbers(4)
    arguments = {"stride": 2, "padding": padding, "output_padding": 1}
    y = convplan.conv_transpose2d(x, w, b, policy=policy, **arguments)
    right = defined(x, w, b, transposed=True, **arguments)
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)


# --- out=


def _outs(dims: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.full((*dims[:-1], 2 * dims[-1]), 7.0, dtype=dtype)
    return {
        "contiguous": torch.full(dims, 7.0, dtype=dtype),
        "channels-last": torch.full(dims, 7.0, dtype=dtype).contiguous(memory_format=torch.channels_last),
        "every-other": wide[..., ::2],
        "swapped": torch.full((*dims[:2], dims[3], dims[2]), 7.0, dtype=dtype).transpose(2, 3),
    }


@pytest.mark.behaviour("B35")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("kind", ["contiguous", "channels-last", "every-other", "swapped"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_out_is_filled_whatever_its_strides(transposed: bool, kind: str, policy: Policy) -> None:
    one = call("t2d-stride-output-padding" if transposed else "2d")
    x, w, bias = one.tensors(torch.float32)
    right = defined(x, w, bias, transposed=transposed, **one.arguments)
    out = _outs(tuple(right.shape), torch.float32)[kind]
    strides, place = out.stride(), out.data_ptr()
    result = one.run(convplan, x, w, bias, out=out, policy=policy)
    assert result is out
    assert (out.stride(), out.data_ptr()) == (strides, place)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    if kind == "every-other":
        between = out.as_strided((out.numel(),), (2,), out.storage_offset() + 1)
        assert bool((between == 7).all())  # what lies between is not touched


@pytest.mark.behaviour("B35")
def test_out_of_an_unbatched_and_of_an_empty_call() -> None:
    one = call("2d-no-batch")
    x, w, bias = one.tensors(torch.float32)
    right = defined(x, w, bias, **one.arguments)
    out = torch.full(right.shape, 7.0)
    assert one.run(convplan, x, w, bias, out=out, policy=FAST) is out
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    out = torch.full((2, 4, 3, 3), 7.0)
    assert convplan.conv2d(numbers(2, 0, 5, 5), numbers(4, 0, 3, 3), numbers(4), out=out) is out
    assert torch.equal(out, numbers(4).view(-1, 1, 1).expand(2, 4, 3, 3))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_out_may_be_the_input_itself(policy: Policy) -> None:
    x, w = numbers(2, 3, 6, 6), numbers(3, 3, 3, 3)
    right = defined(x, w, padding=1)
    convplan.conv2d(x, w, padding=1, out=x, policy=policy)
    torch.testing.assert_close(x.double(), right, rtol=1e-5, atol=1e-5)


WRONG_OUTS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "shape": (lambda: torch.full((2, 4, 6, 5), 7.0), r"\(2, 4, 6, 5\).*expected \(2, 4, 6, 6\)"),
    "rank": (lambda: torch.full((4, 6, 6), 7.0), r"\(4, 6, 6\).*expected \(2, 4, 6, 6\)"),
    "dtype": (lambda: torch.full((2, 4, 6, 6), 7.0, dtype=torch.float64), "float64.*expected.*float32"),
    "device": (lambda: torch.full((2, 4, 6, 6), 7.0, device="meta"), "meta.*expected.*cpu"),
    "shared-places": (lambda: torch.full((1, 4, 6, 6), 7.0).expand(2, 4, 6, 6), r"strides \(0, 36, 6, 1\)"),
}


@pytest.mark.parametrize(("make", "match"), WRONG_OUTS.values(), ids=WRONG_OUTS)
def test_a_wrong_out_is_refused_untouched(make: Callable[[], Tensor], match: str) -> None:
    x, w, out = numbers(2, 3, 6, 6), numbers(4, 3, 3, 3), make()
    for _ in range(2):  # planned for the first time, and remembered
        with pytest.raises(SpecError, match=match):
            convplan.conv2d(x, w, padding=1, out=out, policy=FAST)
    assert out.device.type == "meta" or bool((out == 7).all())
    with pytest.raises(SpecError, match=match):
        convplan.conv2d(x, w, padding=1, out=out, policy=Policy(mode="replay", replay_miss="instant"))


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["input", "weight", "bias", "out"])
def test_out_and_gradients_exclude_each_other(which: int) -> None:
    x, w, b = numbers(2, 3, 6, 6), numbers(4, 3, 3, 3), numbers(4)
    out = torch.full((2, 4, 6, 6), 7.0)
    (x, w, b, out)[which].requires_grad_()
    with pytest.raises(SpecError, match=r"out=.*gradient.*no_grad"):
        convplan.conv2d(x, w, b, padding=1, out=out, policy=FAST)
    assert bool((out == 7).all())
    with torch.no_grad():
        convplan.conv2d(x, w, b, padding=1, out=out, policy=FAST)
    assert not bool((out == 7).all())


# --- gradients

ASYMMETRIC: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": ("conv1d", (2, 2, 9), (3, 2, 3), {"padding": ((3, 0),), "dilation": 2}),
    "2d": ("conv2d", (2, 2, 5, 4), (3, 2, 3, 2), {"padding": ((0, 2), (1, 0)), "stride": (2, 1)}),
    "2d-groups": ("conv2d", (1, 4, 5, 5), (4, 2, 2, 3), {"padding": ((2, 1), (0, 1)), "groups": 2}),
    "2d-same-even": ("conv2d", (1, 2, 5, 5), (2, 2, 4, 2), {"padding": "same"}),
    "2d-no-batch": ("conv2d", (2, 5, 4), (3, 2, 3, 2), {"padding": ((0, 2), (1, 0))}),
    "3d": ("conv3d", (1, 2, 3, 4, 3), (2, 2, 2, 2, 2), {"padding": ((1, 0), 1, (0, 1)), "stride": 2}),
    "t1d": ("conv_transpose1d", (2, 2, 5), (2, 3, 4), {"padding": ((2, 0),), "stride": 2}),
    "t2d": ("conv_transpose2d", (1, 2, 4, 3), (2, 3, 3, 3), {
        "padding": ((0, 1), (2, 1)), "stride": 2, "output_padding": (1, 0),
    }),
    "t2d-groups": ("conv_transpose2d", (1, 4, 3, 4), (4, 1, 2, 3), {"padding": ((1, 0), 0), "groups": 2}),
    "t3d": ("conv_transpose3d", (1, 2, 3, 2, 3), (2, 2, 2, 3, 2), {
        "padding": ((1, 0), (1, 2), 0), "stride": (1, 2, 2),
    }),
}  # fmt: skip


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize(("name", "x_dims", "w_dims", "arguments"), ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_gradients_of_every_order_with_asymmetric_padding(
    name: str, x_dims: tuple[int, ...], w_dims: tuple[int, ...], arguments: dict[str, Any], policy: Policy
) -> None:
    filters = w_dims[1] * int(arguments.get("groups", 1)) if "transpose" in name else w_dims[0]
    tensors = [numbers(*dims, dtype=torch.float64).requires_grad_() for dims in (x_dims, w_dims, (filters,))]

    def convolve(*given: Tensor) -> Tensor:
        result: Tensor = getattr(convplan, name)(*given, policy=policy, **arguments)
        return result

    right = defined(*tensors, transposed="transpose" in name, **arguments)
    torch.testing.assert_close(convolve(*tensors), right)
    assert torch.autograd.gradcheck(convolve, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, tensors, fast_mode=True)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.parametrize("mask", [m for m in itertools.product([False, True], repeat=3) if any(m)], ids=str)
@pytest.mark.parametrize("name", ["2d-each-its-own", "t2d-stride-output-padding"])
def test_only_the_gradients_asked_for_are_computed(name: str, mask: tuple[bool, bool, bool]) -> None:
    one = call(name)
    tensors = one.tensors(torch.float32)
    leaves = [t.requires_grad_(wanted) for t, wanted in zip(tensors, mask, strict=True)]  # type: ignore[union-attr]
    y = one.run(convplan, *leaves, policy=FAST)
    y.sum().backward()  # one number, seen in every place
    dy = torch.ones_like(y)
    right, limits = one.right(*tensors, dy), one.limits(*tensors, dy)
    for leaf, wanted, field in zip(leaves, mask, ("dx", "dw", "db"), strict=True):
        if not wanted:
            assert leaf.grad is None
        else:
            assert worst(leaf.grad, getattr(right, field), getattr(limits, field)) <= 1
    assert convplan.stats()["planned"] == 1 + mask[0] + mask[1]


@pytest.mark.behaviour("C8")
def test_a_network_of_them_trains() -> None:
    x, first, second = numbers(4, 2, 8), numbers(3, 2, 3), numbers(2, 3, 3)
    torchs = [w.clone().requires_grad_() for w in (first, second)]
    mine = [w.clone().requires_grad_() for w in (first, second)]
    for home, weights in ((F, torchs), (convplan, mine)):
        y = home.conv1d(home.conv1d(x, weights[0], padding=1).relu(), weights[1], stride=2)  # type: ignore[attr-defined]
        y.square().mean().backward()
    for found, expected in zip(mine, torchs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.behaviour("C8")
def test_autocast_leaves_float64_and_whole_numbers_alone() -> None:
    x, w, b = (numbers(*dims).double() for dims in ((2, 3, 6, 6), (4, 3, 3, 3), (4,)))
    with torch.autocast("cpu", torch.bfloat16):
        found = convplan.conv2d(x, w, b, policy=FAST)
        expected = F.conv2d(x, w, b)
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    whole = [torch.randint(-4, 5, dims) for dims in ((2, 3, 6, 6), (4, 3, 3, 3))]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(convplan.SpecError, match=r"dtype is torch\.int64"):
        convplan.conv2d(*whole, policy=FAST)


@pytest.mark.behaviour("C8")
def test_autocast_modes_and_transforms() -> None:
    x, w, b = numbers(2, 3, 6, 6), numbers(4, 3, 3, 3), numbers(4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = convplan.conv2d(x, w, b, policy=FAST)
        expected = F.conv2d(x, w, b)
    assert cast.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(cast, expected, rtol=2**-6, atol=2**-6)
    with torch.inference_mode():
        assert convplan.conv2d(x, w.requires_grad_(), b, policy=FAST).is_inference()
    w.requires_grad_(False)
    samples = torch.stack([x, 2 * x])
    batched = torch.vmap(lambda one: convplan.conv2d(one, w, b, policy=FAST))(samples)
    torch.testing.assert_close(batched, torch.stack([F.conv2d(one, w, b) for one in samples]), rtol=1e-4, atol=1e-5)
    gradient = torch.func.grad(lambda weight: convplan.conv2d(x, weight, b, policy=FAST).square().sum())(w)
    expected = torch.func.grad(lambda weight: F.conv2d(x, weight, b).square().sum())(w)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


# --- nothing to compute


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("name", "x_dims", "w_dims", "y_dims"),
    [
        ("conv2d", (0, 3, 5, 5), (4, 3, 3, 3), (0, 4, 3, 3)),
        ("conv2d", (2, 0, 5, 5), (4, 0, 3, 3), (2, 4, 3, 3)),
        ("conv2d", (2, 3, 5, 5), (0, 3, 3, 3), (2, 0, 3, 3)),
        ("conv1d", (0, 3, 5), (4, 3, 3), (0, 4, 3)),
        ("conv3d", (2, 0, 3, 3, 3), (4, 0, 1, 1, 1), (2, 4, 3, 3, 3)),
        ("conv_transpose2d", (0, 3, 5, 5), (3, 4, 3, 3), (0, 4, 7, 7)),
        ("conv_transpose1d", (2, 0, 5), (0, 4, 3), (2, 4, 7)),
    ],
)
def test_an_empty_sum_is_the_bias_and_touches_no_engine(
    name: str, x_dims: tuple[int, ...], w_dims: tuple[int, ...], y_dims: tuple[int, ...], bias: bool
) -> None:
    b = numbers(y_dims[1]) if bias else None
    y = getattr(convplan, name)(numbers(*x_dims), numbers(*w_dims), b)
    expected = torch.zeros(y_dims) if b is None else b.view(-1, *[1] * (len(y_dims) - 2)).expand(y_dims)
    assert torch.equal(y, expected)
    assert convplan.stats()["planned"] == 0


def test_a_transposed_convolution_cropped_to_nothing() -> None:
    assert convplan.conv_transpose2d(numbers(2, 4, 6, 6), numbers(4, 6, 1, 1), padding=3).shape == (2, 6, 0, 0)


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize(("x_dims", "w_dims"), [((0, 3, 5, 5), (4, 3, 3, 3)), ((2, 0, 5, 5), (4, 0, 3, 3))], ids=str)
def test_gradients_through_an_empty_sum(x_dims: tuple[int, ...], w_dims: tuple[int, ...]) -> None:
    leaves = [numbers(*dims).requires_grad_() for dims in (x_dims, w_dims, w_dims[:1])]
    y = convplan.conv2d(*leaves)
    y.sum().backward()
    x, w, b = leaves
    assert x.grad is not None
    assert w.grad is not None
    assert b.grad is not None
    assert not w.grad.any()
    assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)
    assert torch.equal(b.grad, torch.full_like(b, float(y.numel() / y.shape[1])))


# --- bad arguments

X, W = (2, 4, 6, 6), (6, 4, 3, 3)


def zeros(*dims: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(dims, dtype=dtype, device=device)


BAD: dict[str, tuple[str, Callable[[], tuple[Any, ...]], dict[str, Any], str]] = {
    "channels": ("conv2d", lambda: (zeros(*X), zeros(6, 3, 3, 3)), {}, r"weight.shape\[1\] is 3, .*4/1 = 4"),
    "channels-groups": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"groups": 2}, r"is 4, expected C/groups = 4/2 = 2"),
    "channels-transposed": ("conv_transpose2d", lambda: (zeros(*X), zeros(3, 4, 3, 3)), {}, "3.*4|4.*3"),
    "groups-input": ("conv2d", lambda: (zeros(*X), zeros(6, 1, 3, 3)), {"groups": 3}, "groups is 3.*4"),
    "groups-filters": ("conv2d", lambda: (zeros(*X), zeros(5, 2, 3, 3)), {"groups": 2}, "groups is 2.*K = 5"),
    "groups-zero": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"groups": 0}, "groups is 0.*>= 1"),
    "groups-fraction": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"groups": 1.0}, r"groups is 1\.0.*integer"),
    "input-rank": ("conv2d", lambda: (zeros(2, 4), zeros(*W)), {}, "input has 2 dimensions.*expected 4"),
    "input-rank-high": ("conv1d", lambda: (zeros(*X), zeros(6, 4, 3)), {}, "input has 4 dimensions.*expected 3"),
    "weight-rank": ("conv2d", lambda: (zeros(*X), zeros(6, 4, 3)), {}, "weight 3, expected 4"),
    "dtypes": ("conv2d", lambda: (zeros(*X), zeros(*W, dtype=torch.float64)), {}, "float32.*float64"),
    "dtype-of-bias": (
        "conv2d", lambda: (zeros(*X), zeros(*W), zeros(6, dtype=torch.float64)), {}, "float64.*expected.*float32",
    ),
    "unplanned-dtype": (
        "conv2d", lambda: (zeros(*X, dtype=torch.int64), zeros(*W, dtype=torch.int64)), {}, "int64.*float32",
    ),
    "devices": ("conv2d", lambda: (zeros(*X), zeros(*W, device="meta")), {}, "cpu, meta.*one device"),
    "device-of-bias": ("conv2d", lambda: (zeros(*X), zeros(*W), zeros(6, device="meta")), {}, "cpu, meta.*one device"),
    "padding-negative": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"padding": -1}, "padding is -1.*>= 0"),
    "padding-negative-side": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"padding": ((0, -2), 1)}, "-2.*>= 0"),
    "padding-entries": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"padding": (1, 1, 1)}, r"\(1, 1, 1\).*2 entries"),
    "padding-triple": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"padding": ((1, 1, 1), 0)}, r"\(1, 1, 1\).*pair"),
    "padding-fraction": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"padding": 0.5}, r"padding is 0\.5"),
    "padding-word": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"padding": "full"}, "'full'.*'same' or 'valid'"),
    "padding-word-transposed": (
        "conv_transpose2d", lambda: (zeros(*X), zeros(4, 6, 3, 3)), {"padding": "same"}, "'same'.*numbers or pairs",
    ),
    "stride-zero": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"stride": 0}, r"stride is \(0, 0\).*>= 1"),
    "stride-negative": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"stride": (1, -1)}, r"stride is \(1, -1\).*>= 1"),
    "stride-entries": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"stride": (1, 1, 1)}, r"\(1, 1, 1\).*2 integers"),
    "stride-fraction": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"stride": 1.5}, r"stride is 1\.5"),
    "dilation-zero": ("conv2d", lambda: (zeros(*X), zeros(*W)), {"dilation": 0}, r"dilation is \(0, 0\).*>= 1"),
    "same-with-stride": (
        "conv2d", lambda: (zeros(*X), zeros(*W)), {"padding": "same", "stride": 2}, r"'same' and stride \(2, 2\)",
    ),
    "filter-larger": ("conv2d", lambda: (zeros(2, 4, 2, 6), zeros(*W)), {}, "filter size is 3, padded input size is 2"),
    "filter-dilated-larger": (
        "conv1d", lambda: (zeros(1, 1, 5), zeros(1, 1, 3)), {"dilation": 3}, "filter size is 7, padded input size is 5",
    ),
    "filter-empty": ("conv2d", lambda: (zeros(*X), zeros(6, 4, 0, 3)), {}, r"\(0, 3\).*>= 1"),
    "transposed-all-cropped": (
        "conv_transpose2d", lambda: (zeros(*X), zeros(4, 6, 1, 1)), {"padding": 5}, r"\(2, 6, -4, -4\)",
    ),
    "output-padding-large": (
        "conv_transpose2d", lambda: (zeros(*X), zeros(4, 6, 3, 3)), {"stride": 2, "output_padding": 2},
        r"output_padding is \(2, 2\).*= 2",
    ),
    "output-padding-negative": (
        "conv_transpose2d", lambda: (zeros(*X), zeros(4, 6, 3, 3)), {"output_padding": -1}, r"\(-1, -1\)",
    ),
    "bias-length": ("conv2d", lambda: (zeros(*X), zeros(*W), zeros(5)), {}, r"\(5,\), expected \(6,\)"),
    "bias-rank": ("conv2d", lambda: (zeros(*X), zeros(*W), zeros(6, 1)), {}, r"\(6, 1\), expected \(6,\)"),
    "bias-transposed": (
        "conv_transpose2d", lambda: (zeros(*X), zeros(4, 6, 3, 3), zeros(4)), {}, r"\(4,\), expected \(6,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("graded", [False, True], ids=["", "graded"])
@pytest.mark.parametrize(("name", "make", "arguments", "match"), BAD.values(), ids=BAD)
def test_a_bad_call_says_what_was_found_and_expected_and_changes_nothing(
    name: str, make: Callable[[], tuple[Any, ...]], arguments: dict[str, Any], match: str, graded: bool
) -> None:
    tensors = make()
    if graded:
        tensors = tuple(t.requires_grad_() if t.is_floating_point() else t for t in tensors)
    for _ in range(2):
        with pytest.raises(SpecError, match=match):
            getattr(convplan, name)(*tensors, policy=FAST, **arguments)
    stats = convplan.stats()
    assert (stats["planned"], stats["fell_back"], stats["failed"], stats["hits"]) == (0, 0, 0, 0)
    assert all(not t.detach().to_dense().any() for t in tensors if t.device.type == "cpu")


def test_layouts_that_have_no_strides_are_torchs_business() -> None:
    x, w = numbers(*X), numbers(*W)
    with pytest.raises(RuntimeError, match="Input type") as torchs:
        F.conv2d(x.to_sparse(), w)
    with pytest.raises(RuntimeError, match="Input type") as mine:
        convplan.conv2d(x.to_sparse(), w, policy=FAST)
    assert str(mine.value) == str(torchs.value)
    found = convplan.conv2d(x.to("meta"), w.to("meta"), policy=FAST)
    assert (found.shape, found.device.type) == ((2, 6, 4, 4), "meta")
    assert convplan.stats()["planned"] == 0


@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_what_is_no_tensor_is_refused_as_in_torch(where: str) -> None:
    tensors: dict[str, Any] = {"input": numbers(*X), "weight": numbers(*W), "bias": numbers(6), where: [1.0]}
    with pytest.raises(TypeError, match="list"):
        F.conv2d(**tensors)
    with pytest.raises((TypeError, SpecError), match="list"):
        convplan.conv2d(**tensors, policy=FAST)


# --- policy


def test_a_policy_holds_for_its_call_alone() -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    with convplan.enabled(FAST), convplan.capture() as seen:
        one.run(convplan, x, w, bias, policy=FFT_FIRST)
        one.run(convplan, x, w, bias)
    assert seen.calls == {seen[0]: 2}
    record = convplan.plan(seen[0], FFT_FIRST.replace(effort="instant"))
    assert record.config.engine == "fft"
    assert convplan.plan(seen[0], FAST.replace(effort="instant")).config.engine == "aten"


def test_an_unknown_engine_lists_the_known_ones() -> None:
    x, w, bias = call("2d").tensors(torch.float32)
    for _ in range(2):
        with pytest.raises(PolicyError, match=r"'warp'.*aten, matmul, fft"):
            convplan.conv2d(x, w, bias, policy=Policy(engines=("warp",)))
    with pytest.raises(PolicyError, match=r"expected a convplan\.Policy"):
        convplan.conv2d(x, w, bias, policy="fast")  # type: ignore[arg-type]


def test_replay_raises_where_nothing_is_stored_and_runs_what_is() -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    replay = Policy(mode="replay")
    for _ in range(2):
        with pytest.raises(ReplayMiss, match=r"convplan\.tune"):
            one.run(convplan, x, w, bias, policy=replay)
    convplan.tune(convplan.problem("fprop", x, w, bias, padding=1), policy=Policy(budget_s=0.001))
    torch.testing.assert_close(one.run(convplan, x, w, bias, policy=replay), one.run(F, x, w, bias))


# --- the same plan by hand


@pytest.mark.behaviour("B29")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", ["1d", "2d", "2d-depthwise", "3d", "t2d-stride-output-padding", "2d-same-even"])
def test_bit_identical_to_the_plan_run_directly(name: str, policy: Policy) -> None:
    one = call(name)
    x, w, bias = one.tensors(torch.float32)
    with convplan.capture() as seen:
        one.run(convplan, x, w, bias, policy=policy)
    record = convplan.plan(seen[0], policy.replace(effort="instant"))
    by_hand = record.build().run(x, w, bias)
    for _ in range(3):
        assert torch.equal(one.run(convplan, x, w, bias, policy=policy), by_hand)


@pytest.mark.behaviour("B29")
@pytest.mark.parametrize("name", ["2d", "t2d-stride-output-padding"])
def test_bit_identical_to_the_tuned_plan(name: str) -> None:
    one = call(name)
    x, w, bias = one.tensors(torch.float32)
    policy = Policy(tune_after=1, budget_s=0.001)
    found = one.run(convplan, x, w, bias, policy=policy)
    with convplan.capture() as seen:
        one.run(convplan, x, w, bias, policy=policy)
    record = convplan.plan(seen[0], policy)
    assert record.effort == "measure"
    assert torch.equal(record.build().run(x, w, bias), found)
    out = torch.empty_like(found)
    assert torch.equal(record.build().run(x, w, bias, out=out), found)
    assert convplan.stats()["tuned"] == 1


@pytest.mark.behaviour("B35")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_each_operation_runs_by_hand_also_into_the_callers_tensor(op: Any, policy: Policy) -> None:
    one = call("2d-each-its-own")
    x, w, bias = one.tensors(torch.float64)
    dy = rewritten(defined(x, w, bias, **one.arguments))
    right = one.right(x, w, bias, dy)
    bias = bias if op == "fprop" else None
    problem = convplan.problem(op, x, w, bias, **one.arguments)
    plan = convplan.plan(problem, policy.replace(effort="instant")).build()
    tensors = {"fprop": (x, w, bias), "dgrad": (dy, w), "wgrad": (x, dy)}[op]
    expected = {"fprop": right.y, "dgrad": right.dx, "wgrad": right.dw}[op]
    torch.testing.assert_close(plan.run(*tensors), expected)
    for out in _outs(tuple(expected.shape), torch.float64).values():
        assert plan.run(*tensors, out=out) is out
        torch.testing.assert_close(out, expected)
    assert torch.equal(plan.run(*tensors), plan(*tensors))


# --- without enable()


@pytest.mark.behaviour("B33")
def test_no_switch_is_needed_and_torchs_own_path_is_left_alone() -> None:
    tables = torch._C._dispatch_dump_table("aten::convolution")
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    stock = one.run(F, x, w, bias)
    leaves = [t.detach().requires_grad_() for t in (x, w, bias) if t is not None]
    one.run(convplan, *leaves, policy=FAST).sum().backward()
    stats = convplan.stats()
    assert stats["planned"] == 3
    assert override._library is None
    assert torch._C._dispatch_dump_table("aten::convolution") == tables
    assert torch.equal(one.run(F, x, w, bias), stock)
    assert convplan.stats() == stats


def test_hits_are_counted_and_a_changed_layout_is_another_call() -> None:
    one = call("2d")
    x, w, bias = one.tensors(torch.float32)
    for _ in range(3):
        one.run(convplan, x, w, bias, policy=FAST)
    stats = convplan.stats(reset=True)
    assert (stats["planned"], stats["misses"], stats["hits"]) == (1, 1, 2)
    y = one.run(convplan, x.contiguous(memory_format=torch.channels_last), w, bias, policy=FAST)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert convplan.stats()["planned"] == 1


# --- problem()

# Words for padding and inputs without batch are for the functions alone.
DESCRIBED = [
    one
    for one in CALLS
    if one.planned and len(one.x) == len(one.w) and not isinstance(one.arguments.get("padding"), str)
]


@pytest.mark.behaviour("B6")
@pytest.mark.parametrize("one", DESCRIBED, ids=lambda one: one.id)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_problems_are_those_that_torch_runs(one: Call, layout: str) -> None:
    x, w, bias = one.tensors(torch.float32)
    if layout == "channels-last" and x.dim() > 3:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    with convplan.capture() as seen:
        y, _ = one.differentiate(F, x, w, bias, lambda y: y.detach().clone())
    described = {
        op: convplan.problem(op, x, w, bias, transposed=one.transposed, **one.arguments)  # type: ignore[arg-type]
        for op in ("fprop", "dgrad", "wgrad")
    }
    assert set(seen) == set(described.values())
    assert [problem.op for problem in described.values()] == [
        "dgrad" if one.transposed else "fprop", "fprop" if one.transposed else "dgrad", "wgrad",
    ]  # fmt: skip
    assert described["fprop"].output.dims == tuple(y.shape)
    assert described["dgrad"].output.dims == one.x
    assert described["wgrad"].output.dims == one.w


def test_a_problem_is_what_its_arguments_say() -> None:
    x, w = numbers(2, 4, 9, 8), numbers(6, 2, 3, 3)
    arguments: dict[str, Any] = {"stride": (2, 1), "padding": ((1, 2), 0), "dilation": 2, "groups": 2}
    found = convplan.problem("fprop", x, w, numbers(6), **arguments)
    expected = Problem.dense(
        "fprop", x.shape, w.shape, epilogue=convplan.Epilogue(bias=True), **{**arguments, "dilation": (2, 2)}
    )
    assert found == expected
    assert found.y.dims == (2, 6, 4, 4)
    gradient = convplan.problem("wgrad", x, w, **arguments)
    assert (gradient.op, gradient.output.dims, gradient.epilogue.bias) == ("wgrad", (6, 2, 3, 3), False)
    turned = convplan.problem(
        "fprop", numbers(2, 4, 5, 5), numbers(4, 3, 3, 3), stride=2, transposed=True, output_padding=1
    )
    assert (turned.op, turned.output.dims, turned.inputs[0].dims) == ("dgrad", (2, 3, 12, 12), (2, 4, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"op": "forward"}, "'forward'.*fprop, dgrad, wgrad"),
        ({"x": numbers(3, 4)}, "2 dimensions.*3, 4 or 5"),
        ({"padding": "same"}, "padding is 'same'"),
        ({"padding": -1}, "-1.*>= 0"),
        ({"stride": (1, 2, 3)}, r"\(1, 2, 3\).*2 integers"),
        ({"groups": 3}, "groups is 3.*4"),
        ({"bias": numbers(5)}, r"\(5,\), expected \(6,\)"),
        ({"w": numbers(6, 3, 3, 3)}, r"is 3, expected C/groups = 4/1 = 4"),
        ({"x": numbers(2, 4, 2, 2)}, "filter size is 3, padded input size is 2"),
        ({"w": numbers(6, 4, 3)}, "rank"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_problem_is_refused(arguments: dict[str, Any], match: str) -> None:
    good: dict[str, Any] = {"op": "fprop", "x": numbers(*X), "w": numbers(*W)}
    with pytest.raises(SpecError, match=match):
        convplan.problem(**{**good, **arguments})


def test_an_empty_problem_has_no_plan() -> None:
    with pytest.raises(SpecError, match="no elements"):
        convplan.plan(convplan.problem("fprop", numbers(0, 3, 5, 5), numbers(4, 3, 3, 3)))
    with pytest.raises(SpecError, match=r"convplan\.problem"):
        convplan.plan("conv")  # type: ignore[arg-type]


def test_a_tensor_that_does_not_fit_the_plan_is_refused() -> None:
    x, w, bias = call("2d").tensors(torch.float32)
    plan = convplan.plan(convplan.problem("fprop", x, w, bias, padding=1), FAST.replace(effort="instant")).build()
    assert plan.config == EngineConfig.of("aten", **dict(plan.config.knobs))
    with pytest.raises(SpecError, match=r"\(1, 3, 8, 7\).*expected \(2, 3, 8, 7\)"):
        plan.run(x[:1], w, bias)
    with pytest.raises(SpecError, match="bias is missing"):
        plan.run(x, w)
    with pytest.raises(SpecError, match="strides"):
        plan.run(x.contiguous(memory_format=torch.channels_last), w, bias)
    with pytest.raises(SpecError, match=r"out is.*expected"):
        plan.run(x, w, bias, out=torch.empty(2, 4, 8, 8))

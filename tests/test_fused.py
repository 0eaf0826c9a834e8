"""`convplan.conv*` with residual, alpha, activation and scale: values, `out=`, what is refused, and what is remembered.

What is right comes from `helpers.following`, in float64. Gradients and compilers are in `test_fused_autograd`.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.definition import worst
from helpers.following import ACTIVATIONS, CALLED, SUBSETS, Built, Case, built, cases
from helpers.fresh import fresh_process, registered

import convplan
from convplan import Policy, ReplayMiss, SpecError
from convplan._activations import resolve
from convplan.engines import registry

pytestmark = [
    pytest.mark.behaviour("B35"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

Tensor = torch.Tensor
FAST = Policy(effort="instant")
CASES = cases()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


def numbers(*dims: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(dims, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- values


def test_the_cases_cover_every_pair_that_matters() -> None:
    by = {name: {(getattr(case, name), case.dtype) for case in CASES} for name in ("activation", "parts", "called")}
    assert len(by["activation"]) == 4 * len(ACTIVATIONS)
    assert len(by["parts"]) == 4 * len(SUBSETS)
    assert len(by["called"]) >= 3 * len(CALLED)
    assert len({(case.parts, case.layout) for case in CASES}) == 2 * len(SUBSETS)
    known = {resolve(keyword).fused_name for keyword, _, _ in ACTIVATIONS.values()}
    assert known == set(convplan._epilogue.ACTIVATIONS)


@pytest.mark.behaviour("B30")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_are_right(case: Case) -> None:
    one = built(case)
    before = {name: value.clone() for name, value in one.keywords.items() if isinstance(value, Tensor)}
    y = one.run(convplan, policy=FAST)
    assert worst(y, one.right, one.limit) <= 1
    assert y.dtype == case.dtype
    for name, kept in before.items():
        assert torch.equal(one.keywords[name], kept)
    stats = convplan.stats()
    assert (stats["misses"], stats["fell_back"], stats["failed"], stats["left_to_torch"]) == (1, 0, 0, 0)


@pytest.mark.behaviour("B30")
def test_a_wrong_result_is_seen() -> None:
    one = built(Case("relu", ("bias", "residual", "scale"), "2d", torch.bfloat16, "contiguous"))
    for name in ("bias", "residual", "scale", "alpha", "activation"):
        less = one._replace(keywords={key: value for key, value in one.keywords.items() if key != name})
        assert worst(less.run(convplan, policy=FAST), one.right, one.limit) > 1, name


@pytest.mark.parametrize("activation", [None, "relu", ("clamp", -2, 5)], ids=str)
def test_small_integers_come_out_exactly(activation: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    x, w, z, b = (
        torch.randint(-2, 3, dims, generator=draw).bfloat16()
        for dims in ((2, 4, 6, 5), (8, 4, 3, 3), (2, 8, 6, 5), (8,))
    )
    s = torch.randint(1, 3, (8,), generator=draw).float()
    with torch.no_grad():
        y = convplan.conv2d(x, w, b, padding=1, residual=z, alpha=2, scale=s, activation=activation, policy=FAST)
        total = (
            F.conv2d(x.double(), w.double(), padding=1) * s.view(-1, 1, 1) + 2 * z.double() + b.double().view(-1, 1, 1)
        )
    low, high = {"relu": (0, math.inf), None: (-math.inf, math.inf)}.get(activation, (-2, 5))
    assert torch.equal(y.double(), total.clamp(low, high).bfloat16().double())


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize("function", ["conv2d", "conv_transpose2d"])
def test_nothing_summed_leaves_what_follows(function: str) -> None:
    w_dims = (0, 4, 3, 3) if "transpose" in function else (4, 0, 3, 3)
    z, b = numbers(2, 4, 5, 5), numbers(4, seed=1)
    y = getattr(convplan, function)(
        numbers(2, 0, 5, 5),
        numbers(*w_dims),
        b,
        padding=1,
        residual=z,
        alpha=0.5,
        activation="relu",
        scale=torch.ones(4),
    )
    torch.testing.assert_close(y, torch.relu(0.5 * z + b.view(-1, 1, 1)))
    none = convplan.conv2d(numbers(0, 3, 5, 5), numbers(4, 3, 3, 3), residual=numbers(0, 4, 3, 3), activation="relu")
    assert none.shape == (0, 4, 3, 3)


@pytest.mark.behaviour("B7")
def test_an_activation_of_nothing_is_not_nothing() -> None:
    y = convplan.conv2d(numbers(1, 0, 5, 5), numbers(4, 0, 3, 3), activation="sigmoid")
    assert torch.equal(y, torch.full((1, 4, 3, 3), 0.5))


def test_alpha_without_a_residual_multiplies_nothing() -> None:
    x, w = numbers(1, 2, 5, 5), numbers(3, 2, 3, 3)
    assert torch.equal(convplan.conv2d(x, w, alpha=3, policy=FAST), convplan.conv2d(x, w, policy=FAST))


def test_vectors_with_gaps_and_odd_addresses_are_taken() -> None:
    x, w = numbers(1, 2, 5, 5), numbers(4, 2, 3, 3)
    wide = numbers(13).abs() + 0.5
    for bias, scale in ((wide[::2][:4], wide[1::3]), (wide[1:5], wide[3:7])):
        y = convplan.conv2d(x, w, bias, scale=scale, activation="tanh", policy=FAST)
        torch.testing.assert_close(
            y, torch.tanh(F.conv2d(x, w) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)), rtol=1e-5, atol=1e-5
        )


# --- out=


@pytest.mark.parametrize("parts", [("residual",), ("bias", "residual", "scale")], ids="+".join)
@pytest.mark.parametrize("called", ["2d", "2d-no-batch", "t2d-stride-output-padding"])
def test_out_may_be_the_residual_itself(called: str, parts: tuple[str, ...]) -> None:
    one = built(Case("relu", parts, called, torch.float32, "contiguous"))
    z = one.keywords["residual"]
    place = z.data_ptr()
    assert one.run(convplan, out=z, policy=FAST) is z
    assert z.data_ptr() == place
    assert worst(z, one.right, one.limit) <= 1


@pytest.mark.parametrize("kind", ["contiguous", "channels-last", "every-other"])
def test_out_is_filled_whatever_its_strides(kind: str) -> None:
    one = built(Case("gelu", ("bias", "residual"), "2d", torch.float32, "contiguous"))
    out = torch.full_like(one.right, 7, dtype=torch.float32)
    if kind == "channels-last":
        out = out.contiguous(memory_format=torch.channels_last)
    if kind == "every-other":
        out = out.repeat_interleave(2, -1)[..., ::2]
    assert one.run(convplan, out=out, policy=FAST) is out
    assert worst(out, one.right, one.limit) <= 1


def test_a_wrong_out_is_refused_untouched() -> None:
    one = built(Case("relu", ("residual",), "2d", torch.float32, "contiguous"))
    for out, match in (
        (torch.full((2, 4, 8, 8), 7.0), r"out is \(2, 4, 8, 8\).*expected \(2, 4, 8, 7\)"),
        (torch.full((1, 4, 8, 7), 7.0).expand(2, 4, 8, 7), "expected a place in memory for each"),
    ):
        with pytest.raises(SpecError, match=match):
            one.run(convplan, out=out, policy=FAST)
        assert bool((out == 7).all())


# --- what does not fit

Z = (2, 4, 6, 6)  # the result's shape
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "residual-shape": (
        {"residual": numbers(2, 4, 6, 5)}, r"residual.shape is \(2, 4, 6, 5\), expected \(2, 4, 6, 6\).*make",
    ),
    "residual-rank": ({"residual": numbers(4, 6, 6)}, r"residual.shape is \(4, 6, 6\), expected \(2, 4, 6, 6\)"),
    "residual-dtype": (
        {"residual": numbers(*Z).double()}, r"residual is torch.float64, expected .*32.*\.to\(torch.float32",
    ),
    "residual-device": ({"residual": numbers(*Z).to("meta")}, r"residual is on meta, expected cpu.*\.to\('cpu'\)"),
    "residual-layout": (
        {"residual": numbers(*Z).contiguous(memory_format=torch.channels_last)},
        r"strides \(144, 1, 24, 4\), expected \(144, 36, 6, 1\).*use residual\.contiguous\(\)",
    ),
    "residual-expanded": ({"residual": numbers(1, 4, 6, 6).expand(Z)}, r"strides \(0, 36, 6, 1\).*\.contiguous\(\)"),
    "residual-sparse": ({"residual": numbers(*Z).to_sparse()}, r"layout torch.sparse_coo, expected .*to_dense"),
    "bias-length": ({"bias": numbers(3)}, r"bias.shape is \(3,\), expected \(4,\), one number for each output channel"),
    "activation-unknown": (
        {"activation": "mish"}, r"activation is 'mish', expected one of none, relu, .*softplus, relu6",
    ),
    "activation-numbers": ({"activation": ("relu", 1.0)}, r"relu got 1 parameters, expected at most: no parameters"),
    "activation-nan": ({"activation": ("elu", math.nan)}, r"elu's alpha is nan, expected a finite number"),
    "activation-true": ({"activation": ("clamp", 0, True)}, r"clamp's high is True, expected a finite number"),
    "activation-bounds": ({"activation": ("clamp", 2, 1)}, r"clamp's bounds are \(2.0, 1.0\), expected low <= high"),
    "activation-object": ({"activation": torch.relu}, r"activation is .*, expected a name or \(name, \*numbers\)"),
    "activation-dict": ({"activation": ("clamp", {})}, r"clamp's low is \{\}, expected a finite number"),
    "alpha-nan": ({"residual": numbers(*Z), "alpha": math.nan}, r"alpha is nan, expected a finite number"),
    "alpha-infinite": ({"residual": numbers(*Z), "alpha": -math.inf}, r"alpha is -inf, expected a finite number"),
    "alpha-alone": ({"alpha": math.inf}, r"alpha is inf, expected a finite number"),
    "alpha-tensor": (
        {"residual": numbers(*Z), "alpha": torch.tensor(2.0)}, r"alpha is tensor\(2.\), expected a finite",
    ),
    "alpha-huge": ({"residual": numbers(*Z), "alpha": 10**400}, r"alpha is 10000.*, expected a finite number"),
    "scale-length": ({"scale": numbers(5)}, r"scale.shape is \(5,\), expected \(4,\)"),
    "scale-rank": ({"scale": torch.ones(4, 1, 1)}, r"scale.shape is \(4, 1, 1\), expected \(4,\)"),
    "scale-dtype": ({"scale": torch.ones(4).half()}, r"scale is torch.float16, expected torch.float32.*\.to\("),
    "scale-zero": (
        {"scale": torch.tensor([1.0, 0, 1, 0])}, r"scale\[1\] is 0.0, expected finite .* other than 0 \(2 of 4",
    ),
    "scale-nan": ({"scale": torch.tensor([1.0, 1, 1, math.nan])}, r"scale\[3\] is nan, expected finite numbers"),
    "scale-infinite": ({"scale": torch.tensor([-math.inf, 1, 1, 1])}, r"scale\[0\] is -inf, expected finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize(("keywords", "match"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_before_anything_runs(keywords: dict[str, Any], match: str) -> None:
    out = torch.full(Z, 7.0)
    arguments = {"activation": "relu", **keywords}
    with pytest.raises(SpecError, match=match):
        convplan.conv2d(numbers(2, 3, 6, 6), numbers(4, 3, 3, 3), padding=1, out=out, policy=FAST, **arguments)
    assert bool((out == 7).all())
    assert convplan.stats()["planned"] == 0


@pytest.mark.parametrize("function", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_the_fix_that_an_error_tells_is_one(function: str, batched: bool) -> None:
    spatial = int(function[-2])
    # A filter so large that torch's CPU kernels leave the layout to the tensors in 3-D too.
    x, w = numbers(2, 3, *[6] * spatial), numbers(4, 3, *[4] * spatial)
    if spatial == 1:
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        w = w.contiguous(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}[spatial])
    x = x if batched else x[0]
    residual = numbers(*getattr(F, function)(x, w).shape)
    with pytest.raises(SpecError, match="the result is channels-last here") as caught:
        getattr(convplan, function)(x, w, residual=residual, policy=FAST)
    fix = str(caught.value).partition("use ")[2]
    fixed = eval(fix, {"residual": residual, "torch": torch})
    y = getattr(convplan, function)(x, w, residual=fixed, policy=FAST)
    torch.testing.assert_close(y, getattr(F, function)(x, w) + residual, rtol=1e-5, atol=1e-5)


def test_a_scale_that_went_bad_is_seen_on_the_next_call() -> None:
    x, w, scale = numbers(1, 2, 5, 5), numbers(3, 2, 3, 3), torch.ones(3)
    convplan.conv2d(x, w, scale=scale, policy=FAST)
    scale[1] = 0
    with pytest.raises(SpecError, match=r"scale\[1\] is 0"):
        convplan.conv2d(x, w, scale=scale, policy=FAST)


@pytest.mark.parametrize("name", ["residual", "scale"])
def test_what_is_no_tensor_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=r"list.*expected tensors for input, weight, bias, residual and scale"):
        convplan.conv2d(numbers(1, 2, 5, 5), numbers(3, 2, 3, 3), **{name: [1.0]})


# --- what is remembered


@pytest.mark.behaviour("B20")
def test_a_second_call_plans_nothing() -> None:
    one = built(Case("gelu", ("bias", "residual", "scale"), "2d", torch.float32, "contiguous"))
    first = one.run(convplan, policy=FAST)
    convplan.stats(reset=True)
    assert torch.equal(one.run(convplan, policy=FAST), first)
    stats = convplan.stats()
    assert (stats["hits"], stats["misses"], stats["planned"]) == (1, 0, 0)


def _variants() -> Iterator[tuple[str, Callable[[Built], dict[str, Any]]]]:
    base = numbers(2, 4, 8, 7)

    def shifted(one: Built) -> Tensor:
        flat = torch.empty(base.numel() + 1)
        return flat[1:].view(base.shape).copy_(one.keywords["residual"])

    yield "alpha", lambda one: {"alpha": 0.5}
    yield "activation", lambda one: {"activation": "relu6"}
    yield "parameters", lambda one: {"activation": ("clamp", -1, 3)}
    yield "no-activation", lambda one: {"activation": None}
    yield "no-residual", lambda one: {"residual": None}
    yield "no-scale", lambda one: {"scale": None}
    yield "no-bias", lambda one: {"bias": None}
    yield "residual-alignment", lambda one: {"residual": shifted(one)}
    yield "bias-alignment", lambda one: {"bias": torch.cat([one.keywords["bias"][:1], one.keywords["bias"]])[1:]}
    yield "gradients", lambda one: {"residual": one.keywords["residual"].clone().requires_grad_()}
    yield "gradient-of-scale", lambda one: {"scale": one.keywords["scale"].clone().requires_grad_()}
    yield "policy", lambda one: {"policy": FAST.replace(deterministic=True)}


@pytest.mark.behaviour("B21")
@pytest.mark.behaviour("B24")
@pytest.mark.parametrize(("name", "change"), list(_variants()), ids=[name for name, _ in _variants()])
def test_what_differs_has_a_caller_of_its_own(name: str, change: Callable[[Built], dict[str, Any]]) -> None:
    one = built(Case("clamp", ("bias", "residual", "scale"), "2d", torch.float32, "contiguous"))
    one.run(convplan, policy=FAST)
    other = one._replace(keywords={**one.keywords, "policy": FAST, **change(one)})
    convplan.stats(reset=True)
    y = other.run(convplan)
    assert (convplan.stats()["hits"], convplan.stats()["misses"]) == (0, 1)
    k = other.keywords
    total = F.conv2d(one.x, one.w, **one.call.arguments).double()
    total = total if k["scale"] is None else total * k["scale"].view(-1, 1, 1)
    total = total if k["residual"] is None else total + k["alpha"] * k["residual"]
    total = total if k["bias"] is None else total + k["bias"].view(-1, 1, 1)
    torch.testing.assert_close(y, resolve(k["activation"]).of(total).float(), rtol=1e-5, atol=1e-4)


def test_equal_arguments_written_otherwise_share_a_caller() -> None:
    one = built(Case("clamp", ("residual",), "2d", torch.float32, "contiguous"))
    for activation, alpha in itertools.product((("clamp", -1, 2), ["clamp", -1.0, 2.0]), (1, 1.0)):
        one._replace(keywords={**one.keywords, "activation": activation, "alpha": alpha}).run(convplan, policy=FAST)
    assert convplan.stats()["misses"] == 1


@pytest.mark.behaviour("C6")
def test_replay_of_what_is_not_stored_is_an_error() -> None:
    with pytest.raises(ReplayMiss):
        convplan.conv2d(numbers(1, 2, 5, 5), numbers(3, 2, 3, 3), activation="relu", policy=Policy(mode="replay"))


class _Broken:
    """Supports everything with an epilogue, and builds nothing."""

    name, by_default, fuses = "broken", True, True

    def supports(self, problem: convplan.Problem) -> convplan.Support:
        return convplan.Support(True)

    def configs(self, problem: convplan.Problem, effort: str) -> list[convplan.Candidate]:
        return [convplan.Candidate(convplan.EngineConfig("broken"))]

    def build(self, problem: Any, config: Any, policy: Any) -> convplan.Built:
        raise convplan.PlanRejected(engine="broken", config=str(config), reason="as it is")


@pytest.mark.behaviour("B31")
@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_without_any_plan_stock_torch_does_all_of_it_and_says_so_once(parts: tuple[str, ...]) -> None:
    one = built(Case("elu", parts, "t2d-groups-dilation", torch.float32, "contiguous"))
    with registered(_Broken()):
        policy = FAST.replace(engines=("broken",))
        with pytest.warns(convplan.ConvPlanWarning, match="stock torch runs this convolution") as caught:
            y, again = (one.run(convplan, policy=policy) for _ in range(2))
        assert len(caught) == 1
    assert worst(y, one.right, one.limit) <= 1
    assert torch.equal(y, again)
    assert "broken" not in registry.names()


@pytest.mark.behaviour("B36")
def test_threads_run_the_same_call_side_by_side() -> None:
    one = built(Case("silu", ("bias", "residual", "scale"), "2d", torch.float32, "channels_last"))
    found: list[Tensor] = []

    def work() -> None:
        found.extend(one.run(convplan, policy=FAST) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(worst(y, one.right, one.limit) <= 1 for y in found)


# --- what is composed


def test_what_no_problem_describes_is_composed() -> None:
    x, w, b = numbers(1, 2, 4, 5), numbers(2, 3, 2, 2), numbers(3)
    arguments: dict[str, Any] = {"stride": (1, 2), "output_padding": 2, "dilation": 3}
    plain = F.conv_transpose2d(x, w, b, **arguments)
    z = torch.ones_like(plain)
    y = convplan.conv_transpose2d(x, w, b, **arguments, residual=z, alpha=2, activation="relu6", policy=FAST)
    torch.testing.assert_close(y, F.relu6(plain + 2))
    assert convplan.stats()["left_to_torch"] == 1
    with pytest.raises(SpecError, match=r"residual\.shape"):
        convplan.conv_transpose2d(x, w, b, **arguments, residual=z[..., :1])


def test_tensors_without_memory_have_shapes() -> None:
    x, w, z = (numbers(*dims).to("meta") for dims in ((2, 3, 6, 6), (4, 3, 3, 3), (2, 4, 4, 4)))
    y = convplan.conv2d(x, w, residual=z, activation="gelu", scale=torch.ones(4, device="meta"))
    assert (y.shape, y.device.type) == ((2, 4, 4, 4), "meta")
    with pytest.raises(SpecError, match=r"residual\.shape"):
        convplan.conv2d(x, w, residual=z[:1])


def test_vmap_composes_it_of_torchs_own() -> None:
    x, w, z, s = numbers(3, 2, 3, 6, 6), numbers(4, 3, 3, 3), numbers(3, 2, 4, 4, 4), numbers(4).abs() + 1

    def one(x: Tensor, z: Tensor) -> Tensor:
        return convplan.conv2d(x, w, residual=z, alpha=0.5, activation="tanh", scale=s)

    right = torch.stack([one(a, b) for a, b in zip(x, z, strict=True)])
    torch.testing.assert_close(torch.vmap(one)(x, z), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graded", [False, True], ids=["values", "gradients"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does_and_leaves_the_scale(dtype: torch.dtype, graded: bool) -> None:
    x, w, b, z = numbers(2, 3, 6, 6), numbers(4, 3, 3, 3), numbers(4), numbers(2, 4, 4, 4)
    s = numbers(4).abs() + 1
    leaves = [tensor.requires_grad_(graded) for tensor in (x, w, b, z)]
    for activation in ("relu", "softplus"):
        with torch.autocast("cpu", dtype=dtype):
            y = convplan.conv2d(x, w, b, residual=z, scale=s, activation=activation, policy=FAST)
        assert y.dtype == dtype
        total = F.conv2d(x, w) * s.view(-1, 1, 1) + z + b.view(-1, 1, 1)
        torch.testing.assert_close(y.float(), resolve(activation).of(total), rtol=0.05, atol=0.1)
        if graded:
            grads = torch.autograd.grad(y.float().sum(), leaves)
            assert [g.dtype for g in grads] == [torch.float32] * 4

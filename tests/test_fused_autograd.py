"""Gradients of `convplan.conv*` with what follows, to any order, and the operator that a compiler sees.

Values come from `helpers.following`; derivatives from finite differences, and on kinks from torch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from helpers.calls import call
from helpers.definition import worst
from helpers.following import ACTIVATIONS, ALPHA, SUBSETS, Case, built
from helpers.fresh import fresh_process
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import convplan
from convplan import Policy, SpecError
from convplan._activations import resolve
from convplan._choices import state
from convplan.torch_ops import fused, linear
from convplan.torch_ops.fused_library import CallWithEpilogue

pytestmark = [
    pytest.mark.behaviour("C8"),
    # Torch warns of its own, of what it deep-copies while it exports.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

Tensor = torch.Tensor
FAST = Policy(effort="instant")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


def numbers(*dims: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(dims, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(function: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Small tensors that fit together, for a call with stride 2, padding 1."""
    spatial = int(function[-2])
    w_dims = (2, 3, *[3] * spatial) if "transpose" in function else (3, 2, *[3] * spatial)
    x, w = numbers(2, 2, *[4] * spatial), numbers(*w_dims, seed=1)
    y = getattr(F, function)(x, w, stride=2, padding=1)
    found = {"x": x, "w": w, "bias": numbers(3, seed=2), "residual": numbers(*y.shape, seed=3)}
    found["scale"] = numbers(3, seed=4).abs() + 0.5
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def calling(function: str, activation: Any, names: tuple[str, ...], **more: Any) -> Callable[..., Tensor]:
    """The function of its tensors alone: x, w, then those named."""

    def run(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        keywords = dict(zip(names, rest, strict=True))
        found: Tensor = getattr(convplan, function)(
            x, w, stride=2, padding=1, alpha=ALPHA, activation=activation, policy=FAST, **keywords, **more
        )
        return found

    return run


def composed(function: str, activation: Any, names: tuple[str, ...]) -> Callable[..., Tensor]:
    """The same of torch's own operations."""

    def run(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(names, rest, strict=True))
        y: Tensor = getattr(F, function)(x, w, stride=2, padding=1)
        channels = (-1, *[1] * (y.dim() - 2))
        y = y * given["scale"].view(channels) if "scale" in given else y
        y = y + ALPHA * given["residual"] if "residual" in given else y
        y = y + given["bias"].view(channels) if "bias" in given else y
        return resolve(activation).of(y)

    return run


FUNCTIONS = ("conv2d", "conv_transpose2d", "conv1d", "conv3d", "conv_transpose1d", "conv_transpose3d")
DIFFERENTIATED = [
    (activation, SUBSETS[1:][(3 * i) % 7], FUNCTIONS[i % 6]) for i, activation in enumerate(ACTIVATIONS)
] + [(activation, SUBSETS[-1], "conv2d") for activation in ("relu", "sigmoid", "elu", "gelu", "none")]


@pytest.mark.parametrize(("activation", "names", "function"), DIFFERENTIATED, ids=str)
def test_gradients_of_every_order_are_right(activation: str, names: tuple[str, ...], function: str) -> None:
    given = operands(function)
    leaves = [given[name].requires_grad_() for name in ("x", "w", *names)]
    run = calling(function, ACTIVATIONS[activation][0], names)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_so_are_those_with_a_constant_scale(activation: str) -> None:
    given = operands("conv2d")
    scale = given["scale"]
    leaves = [given[name].requires_grad_() for name in ("x", "w", "bias", "residual")]
    run = calling("conv2d", ACTIVATIONS[activation][0], ("bias", "residual"), scale=scale)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_kinks_and_bounds_gradients_are_torchs(activation: str) -> None:
    keyword = ACTIVATIONS[activation][0]
    # A 1x1 convolution with weight 1: the activation meets these very numbers, its corners among them.
    x = torch.tensor([-3, -1, -0.5, -0.0, 0.0, 0.5, 1, 2, 2.5, 3, 6, 7]).double().view(1, 1, 3, 4).requires_grad_()
    one = torch.ones(1, 1, 1, 1).double()
    z = torch.zeros(1, 1, 3, 4).double()
    found = torch.autograd.grad(convplan.conv2d(x, one, residual=z, activation=keyword, policy=FAST).sum(), x)[0]
    right = torch.autograd.grad(resolve(keyword).of(x).sum(), x)[0]
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: torch.clamp(x, 0, 6),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "softplus": F.softplus,
}


@pytest.mark.parametrize("name", TORCHS)
def test_names_are_those_of_torchs_functions(name: str) -> None:
    x = torch.arange(-8, 8).double().div(1).requires_grad_()
    y, right = resolve(name).of(x), TORCHS[name](x)
    assert torch.equal(y, right)
    if resolve(name).from_output:
        found = resolve(name).gradient(torch.ones_like(y), y)
        torch.testing.assert_close(found, torch.autograd.grad(right.sum(), x)[0], rtol=1e-12, atol=1e-12)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    given = operands("conv2d")
    given["bias"].requires_grad_()
    y = calling("conv2d", "relu", ("bias", "residual"))(*(given[name] for name in ("x", "w", "bias", "residual")))
    convplan.stats(reset=True)
    y.sum().backward()
    assert given["bias"].grad is not None
    assert all(given[name].grad is None for name in ("x", "w", "residual"))
    assert convplan.stats()["misses"] == 0  # neither dgrad nor wgrad


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_a_result_that_was_written_to_is_torchs_usual_error(activation: str) -> None:
    given = operands("conv2d")
    y = calling("conv2d", activation, ())(given["x"].requires_grad_(), given["w"])
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_an_activation_a_result_may_be_written_to() -> None:
    given = operands("conv2d")
    y = calling("conv2d", None, ("residual",))(given["x"].requires_grad_(), given["w"], given["residual"])
    y.add_(1)
    y.sum().backward()
    assert given["x"].grad is not None


def test_the_forward_is_one_plan_where_its_result_is_enough() -> None:
    given = operands("conv2d", torch.float32)
    leaves = [given[name].requires_grad_() for name in ("x", "w", "bias", "residual")]
    for activation, inside in (("relu", "+relu"), ("gelu", "")):
        seen: list[str] = []
        note = seen.append
        state.captures = (lambda problem, gradients, note=note: note(str(problem)),)
        calling("conv2d", activation, ("bias", "residual"))(*leaves).sum().backward()
        assert [text.partition(" ")[0] for text in seen] == [f"fprop+residual*0.75+bias{inside}", "dgrad", "wgrad"]


def test_out_and_gradients_do_not_go_together() -> None:
    given = operands("conv2d")
    for name in ("x", "scale"):
        leaves = {**given, name: given[name].clone().requires_grad_()}
        run = calling("conv2d", "relu", ("residual", "scale"), out=torch.empty_like(given["residual"]))
        with pytest.raises(SpecError, match=r"out= is given and a tensor requires a gradient"):
            run(*(leaves[key] for key in ("x", "w", "residual", "scale")))


def test_a_second_step_plans_nothing() -> None:
    given = operands("conv2d", torch.float32)
    leaves = [given[name].requires_grad_() for name in ("x", "w", "bias", "residual")]
    run = calling("conv2d", "relu", ("bias", "residual"))
    run(*leaves).sum().backward()
    convplan.stats(reset=True)
    run(*leaves).sum().backward()
    stats = convplan.stats()
    assert (stats["hits"], stats["misses"], stats["planned"]) == (3, 0, 0)


def test_gradients_of_a_batch_of_one_without_its_dimension() -> None:
    x, w, z = numbers(2, 5, 5).requires_grad_(), numbers(3, 2, 3, 3).requires_grad_(), numbers(3, 3, 3).requires_grad_()

    def run(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
        return convplan.conv2d(x, w, residual=z, alpha=2, activation="tanh", policy=FAST)

    assert torch.autograd.gradcheck(run, (x, w, z), fast_mode=True)


# --- the operator


def geometry(transposed: bool) -> tuple[Any, ...]:
    return ([2, 2], [1, 0, 1, 2] if not transposed else [1, 1, 1, 1], [1, 1], transposed, [0, 0], 1, FAST_TEXT)


FAST_TEXT = '{"effort":"instant"}'


CHEAP = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
)  # the fourth, with dynamic sizes, takes seconds


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_the_operator_passes_torchs_own_checks(transposed: bool) -> None:
    fmt = FORMATS["channels_last" if transposed else "contiguous"]
    x = numbers(2, 4, 7, 7, dtype=torch.float32).to(memory_format=fmt).requires_grad_()
    w = numbers(*((4, 6) if transposed else (6, 4)), 3, 3, dtype=torch.float32).to(memory_format=fmt).requires_grad_()
    bias = numbers(6, dtype=torch.float32).requires_grad_()
    op = torch.ops.convplan.fused_convolution.default
    plain = op(x, w, None, None, None, 1.0, "none", [], *geometry(transposed)).detach()
    residual = torch.empty_like(plain).normal_().requires_grad_()
    scale = torch.rand(6) + 0.5
    whole = (x, w, bias, residual, scale, 0.5, "elu" if transposed else "relu", [], *geometry(transposed))
    opcheck(op, whole)
    for name, parameters in (("none", []), ("leaky_relu", [0.2]), ("hardtanh", [-1.0, 2.0]), ("sigmoid", [])):
        opcheck(op, (*whole[:6], name, parameters, *whole[8:]), test_utils=CHEAP)
    opcheck(op, (x, w, None, None, None, 1.0, "tanh", [], *geometry(transposed)), test_utils=CHEAP)
    with torch.no_grad():
        given = [t.detach() for t in (x, w, bias, residual)]
        opcheck(op, (*given, scale, 0.5, "gelu_tanh", [], *geometry(transposed)), test_utils=CHEAP)
        call = call_with(geometry(transposed), alpha=0.5, activation="leaky_relu", parameters=(0.2,))
        opcheck(torch.ops.convplan.fused_convolution.kept, (*given, scale, call))
        long = op(*given, scale, 0.5, "leaky_relu", [0.2], *geometry(transposed))
        torch.testing.assert_close(torch.ops.convplan.fused_convolution.kept(*given, scale, call), long)


def call_with(geometry: Any, **following: Any) -> str:
    stride, padding, dilation, swapped, outer, groups, policy = geometry
    return CallWithEpilogue(
        stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation), transposed=swapped,
        output_padding=tuple(outer), groups=groups, policy=policy, **following,
    ).text  # fmt: skip


def test_the_operator_has_gradients_of_every_order() -> None:
    given = operands("conv2d")
    leaves = [given[name].requires_grad_() for name in ("x", "w", "bias", "residual")]

    def run(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        rest = ([2, 2], [1, 1, 1, 1], [1, 1], False, [0, 0], 1, FAST_TEXT)
        return torch.ops.convplan.fused_convolution(x, w, bias, residual, given["scale"], 0.5, "sigmoid", [], *rest)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_the_operator_says_which_gradients_it_has_not() -> None:
    given = operands("conv2d")
    x, w, s = given["x"], given["w"], given["scale"].clone().requires_grad_()
    rest = ([2, 2], [1, 1, 1, 1], [1, 1], False, [0, 0], 1, FAST_TEXT)
    with pytest.raises(SpecError, match=r"the scale needs more than .*expected a call of convplan.conv1d"):
        torch.ops.convplan.fused_convolution(x, w, None, None, s, 1.0, "relu", [], *rest)
    with pytest.raises(SpecError, match=r"activation gelu\(\) needs more than"):
        torch.ops.convplan.fused_convolution(x.requires_grad_(), w, None, None, None, 1.0, "gelu", [], *rest)


BOTH_FAMILIES = ("none", "relu", "hardtanh-wide", "leaky-relu-turned", "tanh", "gelu", "clamp", "softplus-sharp")
COMPILED = [("conv2d", name) for name in BOTH_FAMILIES] + [(f, "relu") for f in FUNCTIONS[1:]]


@pytest.mark.parametrize(("function", "activation"), COMPILED, ids=str)
def test_the_functions_compile_into_one_graph(function: str, activation: str) -> None:
    torch._dynamo.reset()
    given = operands(function, torch.float32)
    names = ("bias", "residual") if activation != "tanh" else ("bias", "residual", "scale")
    leaves = [given[name].requires_grad_() for name in ("x", "w", *names)]
    run = calling(function, ACTIVATIONS[activation][0], names)
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
    right = composed(function, ACTIVATIONS[activation][0], names)(*leaves)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    dy = torch.linspace(-1, 1, right.numel()).view(right.shape)
    for one, two in zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(right, leaves, dy), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_without_gradients_a_compiled_call_is_one_operator() -> None:
    torch._dynamo.reset()
    given = operands("conv2d", torch.float32)
    run = calling("conv2d", "gelu", ("bias", "residual", "scale"))
    leaves = [given[name] for name in ("x", "w", "bias", "residual", "scale")]
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        found = torch.compile(run, backend=counter, fullgraph=True)(*leaves)
    calls = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == ["convplan.fused_convolution"]
    torch.testing.assert_close(found, run(*leaves))


def test_sizes_that_vary_need_no_second_graph() -> None:
    torch._dynamo.reset()

    def run(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
        return convplan.conv2d(x, w, residual=z, activation="relu6", alpha=0.5, policy=FAST)

    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    w = numbers(4, 3, 3, 3, dtype=torch.float32)
    for size in (8, 10, 13):  # no two dimensions are the same by chance, which Dynamo would take for a rule
        x, z = numbers(2, 3, size, size, dtype=torch.float32), numbers(2, 4, size - 2, size - 2, dtype=torch.float32)
        torch.testing.assert_close(fast(x, w, z), run(x, w, z), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_alpha_may_be_an_argument_of_what_is_compiled() -> None:
    torch._dynamo.reset()

    def run(x: Tensor, w: Tensor, z: Tensor, alpha: float) -> Tensor:
        return convplan.conv2d(x, w, residual=z, activation="relu", alpha=alpha, policy=FAST)

    fast = torch.compile(run, backend="aot_eager", fullgraph=True)
    x, w, z = (numbers(*dims, dtype=torch.float32) for dims in ((1, 2, 6, 6), (3, 2, 3, 3), (1, 3, 4, 4)))
    for alpha in (0.5, 1.5, 2.5):
        torch.testing.assert_close(fast(x, w, z, alpha), run(x, w, z, alpha), rtol=1e-5, atol=1e-5)


def test_a_compiled_call_casts_under_autocast_and_has_gradients() -> None:
    torch._dynamo.reset()
    given = operands("conv2d", torch.float32)
    leaves = [given[name].requires_grad_() for name in ("x", "w", "bias", "residual")]
    run = calling("conv2d", "relu", ("bias", "residual"))

    def step(*leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(*leaves)

    found, right = torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves), step(*leaves)
    assert found.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close(found, right)
    grads = torch.autograd.grad(found.float().sum(), leaves)
    for one, two in zip(grads, torch.autograd.grad(right.float().sum(), leaves), strict=True):
        torch.testing.assert_close(one, two)


def test_an_exported_program_holds_the_operator() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(numbers(3, 3, 3, 3, dtype=torch.float32))

        def forward(self, x: Tensor) -> Tensor:
            return convplan.conv2d(x, self.weight, padding=1, residual=x, activation="silu", policy=FAST)

    block, x = Block().eval(), numbers(2, 3, 6, 6, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        found = program.module()(numbers(5, 3, 6, 6, dtype=torch.float32))
    assert sum(node.target is torch.ops.convplan.fused_convolution.default for node in program.graph.nodes) == 1
    assert found.shape == (5, 3, 6, 6)


def test_a_compiled_call_refuses_what_an_eager_one_does() -> None:
    torch._dynamo.reset()
    given = operands("conv2d", torch.float32)
    run = calling("conv2d", "mish", ())
    with pytest.raises(Exception, match="activation is 'mish', expected one of none, relu"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(given["x"], given["w"])
    run = calling("conv2d", "relu", ("residual",))
    with pytest.raises(Exception, match=r"residual.shape is \(1, 3, 2, 2\), expected \(2, 3, 2, 2\)"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(given["x"], given["w"], given["residual"][:1])


def test_half_precision_gradients_are_near_those_of_double() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        one = built(Case("sigmoid", ("bias", "residual", "scale"), "2d", dtype, "channels_last"))
        leaves = [
            one.x.requires_grad_(),
            one.keywords["bias"].requires_grad_(),
            one.keywords["residual"].requires_grad_(),
        ]
        y = one.run(convplan, policy=FAST)
        assert worst(y, one.right, one.limit) <= 1
        dx, db, dz = torch.autograd.grad(y.float().sum(), leaves)
        slope = one.right * (1 - one.right)
        torch.testing.assert_close(dz.double(), ALPHA * slope, rtol=0.02, atol=0.01)
        torch.testing.assert_close(db.double(), slope.sum((0, 2, 3)), rtol=0.02, atol=0.1)
        scale = one.keywords["scale"].double().view(-1, 1, 1)
        right = torch.nn.grad.conv2d_input(one.x.shape, one.w.double(), slope * scale, **call("2d").arguments)
        torch.testing.assert_close(dx.double(), right, rtol=0.05, atol=0.1)


def test_backward_inside_autocast_checkpoints_and_torchs_transforms() -> None:
    given = operands("conv2d", torch.float32)
    x, w = given["x"].requires_grad_(), numbers(2, 2, 3, 3, dtype=torch.float32).requires_grad_()

    def block(x: Tensor, w: Tensor) -> Tensor:
        y = convplan.conv2d(x, w, padding=1, residual=x, activation="sigmoid", policy=FAST)
        return convplan.conv2d(y, w, padding=1, residual=y, activation="silu", policy=FAST).float().sum()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        y = torch.sigmoid(F.conv2d(x, w, padding=1) + x)
        return F.silu(F.conv2d(y, w, padding=1) + y).sum()

    right = torch.autograd.grad(plain(x, w), (x, w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(block(x, w), (x, w))
    for one, two in zip(found, right, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=0.05, atol=0.05 * float(two.abs().max()))
    again = torch.utils.checkpoint.checkpoint(block, x, w, use_reentrant=False)
    for one, two in zip(torch.autograd.grad(again, (x, w)), right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.grad(block)(x.detach(), w.detach()), right[0], rtol=1e-4, atol=1e-4)


def test_tuning_a_step_tunes_what_is_fused_and_its_gradients() -> None:
    given = operands("conv2d", torch.float32)
    x, w = given["x"].requires_grad_(), given["w"].requires_grad_()
    y = calling("conv2d", "relu", ("bias", "residual"))
    records = convplan.tune(lambda: y(x, w, given["bias"], given["residual"]), policy=Policy(budget_s=0.02))
    assert [str(record.problem).partition(" ")[0] for record in records] == [
        "fprop+residual*0.75+bias+relu", "dgrad", "wgrad",
    ]  # fmt: skip


@pytest.mark.parametrize("activation", [None, "relu", "tanh", ("elu", 0.5), "relu6", "silu"])
def test_gradients_are_the_same_where_one_kernel_computes_what_is_behind(
    activation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def has_kernels(grad: Tensor) -> bool:
        asked.append(not torch.is_grad_enabled())
        return asked[-1]

    given = operands("conv2d")
    tensors = tuple(given[name].requires_grad_() for name in ("x", "w", "bias", "residual"))
    run = calling("conv2d", activation, ("bias", "residual"))
    right = torch.autograd.grad(run(*tensors).square().sum(), tensors)
    monkeypatch.setattr(fused, "has_kernels", has_kernels)
    monkeypatch.setattr(linear, "has_kernels", has_kernels)
    found = torch.autograd.grad(run(*tensors).square().sum(), tensors)
    assert asked
    assert all(asked)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)
    assert not all(asked)

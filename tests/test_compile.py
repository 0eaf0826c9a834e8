"""Convolutions in compiled and exported programs: operators, traced functions, and what Inductor is made to keep.

Graphs run by `aot_eager` and by passes called on their own need no C++ compiler. What goes through Inductor itself
holds convolutions alone, for which it writes no kernel.
"""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers.calls import CALLS, Call
from helpers.fresh import fresh_process
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import convplan
from convplan import Policy, PolicyError, SpecError
from convplan.torch_ops import kept, kept_calls, library
from convplan.torch_ops.adapter import ConvArgs

pytestmark = [
    pytest.mark.behaviour("C8"),
    # Torch warns of its own: of what export deep-copies, and of the even filter's copy for `same`.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

Tensor = torch.Tensor
FAST = Policy(effort="instant")
MATMUL = Policy(effort="instant", engines=("matmul", "aten"))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_process():
        yield
    torch._dynamo.reset()


def close(found: Tensor, right: Tensor) -> None:
    assert found.stride() == right.stride()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def numbers(*dims: int, form: torch.memory_format = torch.contiguous_format, grad: bool = False) -> Tensor:
    return torch.randn(dims).contiguous(memory_format=form).requires_grad_(grad)


# --- the operators

PLAIN = ([1, 2], [1, 0, 0, 2], [1, 1], False, [0, 0], 2, '{"effort":"instant"}')
TRANSPOSED = ([2, 2], [1, 1, 0, 0], [1, 1], True, [1, 0], 2, '{"effort":"instant"}')


def operands(geometry: tuple[Any, ...], form: torch.memory_format, grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and a gradient of the output for one of the two geometries."""
    x = numbers(2, 4, 5, 6, form=form, grad=grad)
    w = numbers(6, 2, 3, 3, form=form, grad=grad) if geometry is PLAIN else numbers(4, 3, 3, 3, form=form, grad=grad)
    dy = numbers(2, 6, 4, 3, form=form, grad=grad) if geometry is PLAIN else numbers(2, 6, 10, 13, form=form, grad=grad)
    return x, w, numbers(6, grad=grad), dy


def as_text(geometry: tuple[Any, ...], last: bool) -> str:
    stride, padding, dilation, transposed, outer, groups, policy = geometry
    pairs = tuple(zip(padding[::2], padding[1::2], strict=True))
    return library.Call.of(
        ConvArgs(tuple(stride), pairs, tuple(dilation), transposed, tuple(outer), groups), policy, last
    ).text


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("geometry", [PLAIN, TRANSPOSED], ids=["plain", "transposed"])
def test_the_operators_pass_torchs_own_check(geometry: tuple[Any, ...], form: str) -> None:
    x, w, bias, dy = operands(geometry, FORMATS[form], grad=True)
    last = form == "channels_last"
    ops = torch.ops.convplan
    opcheck(ops.convolution.default, (x, w, bias, *geometry))
    opcheck(ops.input_gradient.default, (dy, w, list(x.shape), last, *geometry))
    opcheck(ops.weight_gradient.default, (dy, x, list(w.shape), last, *geometry))


@pytest.mark.parametrize("geometry", [PLAIN, TRANSPOSED], ids=["plain", "transposed"])
def test_so_do_the_overloads_that_have_no_gradient(geometry: tuple[Any, ...]) -> None:
    x, w, bias, dy = operands(geometry, torch.channels_last, grad=False)
    text, ops = as_text(geometry, True), torch.ops.convplan
    opcheck(ops.convolution.kept, (x, w, bias, text))
    opcheck(ops.input_gradient.kept, (dy, w, list(x.shape), text))
    opcheck(ops.weight_gradient.kept, (dy, x, list(w.shape), text))
    close(ops.convolution.kept(x, w, bias, text), ops.convolution(x, w, bias, *geometry))
    close(ops.weight_gradient.kept(dy, x, w.shape, text), ops.weight_gradient(dy, x, w.shape, True, *geometry))


@pytest.mark.parametrize("geometry", [PLAIN, TRANSPOSED], ids=["plain", "transposed"])
def test_gradients_of_every_order_are_right(geometry: tuple[Any, ...]) -> None:
    x, w, bias, _ = (t.detach().double().requires_grad_() for t in operands(geometry, torch.contiguous_format, False))

    def run(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.convplan.convolution(x, w, bias, *geometry)

    assert torch.autograd.gradcheck(run, (x, w, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, w, bias), fast_mode=True)


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAID_OUT = [(one, form) for one in CALLS for form in FORMATS if form == "contiguous" or len(one.x) in LAST]


@pytest.mark.parametrize(("one", "form"), LAID_OUT, ids=lambda value: getattr(value, "id", value))
def test_what_a_compiler_is_told_is_what_it_gets(one: Call, form: str) -> None:
    """Sizes, strides and dtype of a call on tensors without memory are those of the same call on real ones."""
    x, w, bias = one.tensors(torch.float32)
    if form == "channels_last":
        x = x.contiguous(memory_format=LAST[x.dim()])
    x = x if x.dim() == w.dim() else x[None]
    arguments = geometry_of(one, w)
    real = torch.ops.convplan.convolution(x, w, bias, *arguments)
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in (x, w, bias)]
        fake = torch.ops.convplan.convolution(*fakes, *arguments)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def geometry_of(one: Call, w: Tensor) -> tuple[Any, ...]:
    """A call's arguments as the operator takes them."""
    from convplan.torch_ops.arguments import arguments

    given = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1, **one.arguments}
    args = arguments(
        w.dim() - 2, w, given["stride"], given["padding"], given["dilation"], one.transposed,
        given["output_padding"], given["groups"],
    )  # fmt: skip
    policy = library.policy_text(FAST)
    return (
        args.stride,
        library.flat_padding(args),
        args.dilation,
        args.transposed,
        args.output_padding,
        args.groups,
        policy,
    )


def test_texts_of_strangers_are_refused_with_what_was_found() -> None:
    x, w = numbers(1, 2, 4, 4), numbers(2, 2, 3, 3)
    with pytest.raises(PolicyError, match=r"policy is .*sometimes"):
        torch.ops.convplan.convolution(x, w, None, [1, 1], [0] * 4, [1, 1], False, [0, 0], 1, '{"effort":"sometimes"}')
    with pytest.raises(SpecError, match="call is 'nonsense'"):
        torch.ops.convplan.convolution.kept(x, w, None, "nonsense")
    with pytest.raises(SpecError, match=r"padding is .* expected 4 entries"):
        torch.ops.convplan.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, "")


def test_policies_come_back_from_their_texts() -> None:
    for policy in (Policy(), FAST, MATMUL, Policy(deterministic=True, workspace_limit_bytes=2**20, budget_s=0.25)):
        assert library.policy_of(library.policy_text(policy)) == policy
    assert library.policy_of(library.policy_text(None)) is None
    assert library.policy_of('{"effort":"instant"}') == FAST


def test_texts_can_stand_between_quotation_marks_in_any_language() -> None:
    call = library.call_of(as_text(PLAIN, last=True))
    for text in (library.policy_text(MATMUL), call.text):
        assert not {'"', "'", "\\", "\n"} & {*text}
    assert library.call_of(call.text) == call
    assert (call.policy, call.groups, call.channels_last) == ('{"effort":"instant"}', 2, True)


# --- the functions, traced


def compiled(function: Callable[..., Any], backend: Any = "aot_eager", **more: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True, **more)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "conv_transpose2d"])
def test_the_functions_compile_into_one_graph(name: str, dynamic: bool) -> None:
    spatial = int(name[-2])
    x, w = (
        numbers(2, 4, *[7] * spatial, grad=True),
        numbers(*((4, 6) if "transpose" in name else (6, 4)), *[3] * spatial, grad=True),
    )
    bias = numbers(6, grad=True)

    def step(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = getattr(convplan, name)(x, w, bias, 2, 1, policy=MATMUL)
        return found.tanh()

    y = compiled(step, dynamic=dynamic)(x, w, bias)
    right = step(x, w, bias)
    close(y, right)
    incoming = torch.randn_like(right)
    for found, expected in zip(
        torch.autograd.grad(y, (x, w, bias), incoming), torch.autograd.grad(right, (x, w, bias), incoming), strict=True
    ):
        close(found, expected)


def test_pairs_names_and_inputs_without_batch_compile() -> None:
    x, w = numbers(4, 9, 8), numbers(6, 2, 2, 3)

    def several(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (
            convplan.conv2d(x, w, padding=((2, 0), 1), stride=(2, 1), groups=2, policy=FAST),
            convplan.conv2d(x[None], w, padding="same", groups=2, policy=FAST),
            convplan.conv2d(x, w, padding="valid", dilation=2, groups=2, policy=FAST),
        )

    for found, right in zip(compiled(several, dynamic=True)(x, w), several(x, w), strict=True):
        close(found, right)


def test_what_a_problem_cannot_express_compiles_too() -> None:
    x, w = numbers(2, 4, 7, 7, grad=True), numbers(4, 6, 3, 3, grad=True)

    def step(x: Tensor, w: Tensor) -> Tensor:
        return convplan.conv_transpose2d(x, w, dilation=2, output_padding=1, policy=FAST)

    found, right = compiled(step)(x, w), F.conv_transpose2d(x, w, dilation=2, output_padding=1)
    close(found, right)
    incoming = torch.randn_like(right)
    for one, two in zip(*(torch.autograd.grad(y, (x, w), incoming) for y in (found, right)), strict=True):
        close(one, two)


def test_one_graph_serves_sizes_that_vary() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    w = numbers(6, 4, 3, 3)
    run = compiled(lambda x: convplan.conv2d(x, w, padding=1, policy=FAST), counter, dynamic=True)
    for batch, height, width in ((2, 7, 9), (3, 12, 5), (5, 8, 8)):
        x = numbers(batch, 4, height, width)
        close(run(x), F.conv2d(x, w, padding=1))
    assert counter.frame_count == 1


def test_each_policy_is_a_graph_of_its_own() -> None:
    counter = CompileCounterWithBackend("eager")
    x, w = numbers(2, 4, 7, 7), numbers(6, 4, 3, 3)
    run = compiled(lambda policy: convplan.conv2d(x, w, policy=policy), counter)
    for policy in (FAST, MATMUL, FAST, MATMUL, None):
        close(run(policy), F.conv2d(x, w))
    assert counter.frame_count == 3


def test_without_a_policy_that_of_enable_holds_when_the_graph_runs() -> None:
    x, w = numbers(2, 4, 7, 7), numbers(6, 4, 3, 3)
    run = compiled(lambda x: convplan.conv2d(x, w))
    with convplan.enabled(FAST):
        run(x)
    with convplan.enabled(Policy(mode="replay")), pytest.raises(convplan.ReplayMiss):
        run(numbers(2, 4, 7, 7))


def test_autocast_is_seen_by_the_compiler() -> None:
    x, w = numbers(2, 4, 7, 7), numbers(6, 4, 3, 3)

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return convplan.conv2d(x, w, policy=FAST)

    found = compiled(step)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, step(x))


def test_out_is_written_in_a_graph_and_judged() -> None:
    x, w = numbers(2, 4, 7, 7), numbers(6, 4, 3, 3)
    out = torch.empty(2, 6, 5, 5).to(memory_format=torch.channels_last)
    assert compiled(lambda x, out: convplan.conv2d(x, w, policy=FAST, out=out))(x, out) is out
    torch.testing.assert_close(out, F.conv2d(x, w))
    with pytest.raises(Exception, match=r"out is \(2, 6, 5, 4\)"):
        torch.compile(lambda x, out: convplan.conv2d(x, w, policy=FAST, out=out), backend="eager")(x, out[..., :4])


def test_tensors_that_do_not_fit_are_refused_while_compiling() -> None:
    with pytest.raises(Exception, match=r"input has 3 channels, expected weight.shape\[1\] \* groups = 4"):
        compiled(convplan.conv2d)(numbers(2, 3, 7, 7), numbers(6, 4, 3, 3))
    with pytest.raises(Exception, match=r"input is torch\.complex64"):
        compiled(convplan.conv2d)(*[torch.randn(1, 1, 5, 5, dtype=torch.complex64)] * 2)


def test_transforms_inside_a_graph_go_to_torchs_convolution() -> None:
    x, w = numbers(3, 2, 4, 7, 7), numbers(6, 4, 3, 3)

    def per_sample(conv: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def loss(w: Tensor, x: Tensor) -> Tensor:
            return conv(x, w).square().sum()

        return lambda x, w: torch.vmap(torch.func.grad(loss), (None, 0))(w, x)

    found = compiled(per_sample(lambda x, w: convplan.conv2d(x, w, policy=FAST)))(x, w)
    torch.testing.assert_close(found, per_sample(F.conv2d)(x, w), rtol=1e-3, atol=1e-3)


class Dispatched(TorchDispatchMode):
    """The operators that were called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_eager_calls_do_not_take_the_way_of_compiled_ones() -> None:
    x, w = numbers(2, 4, 7, 7), numbers(6, 4, 3, 3, grad=True)
    with Dispatched() as seen:
        convplan.conv2d(x, w, policy=FAST).sum().backward()
    assert seen.names
    assert not [name for name in seen.names if name.startswith("convplan")]


# --- export


class Planned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(6, 4, 2, 2))
        self.policy = MATMUL

    def forward(self, x: Tensor) -> Tensor:
        y = convplan.conv2d(x, self.first, padding=((1, 0), (1, 1)), policy=self.policy).relu()
        return convplan.conv_transpose2d(y, self.second, stride=2, policy=self.policy)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_a_model_that_calls_the_functions_is_exported_and_runs(strict: bool) -> None:
    model, example = Planned(), numbers(2, 3, 8, 9)
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height", min=4, max=64)
    program = torch.export.export(model, (example,), strict=strict, dynamic_shapes=({0: batch, 2: height},))
    assert sum(node.target is torch.ops.convplan.convolution.default for node in program.graph.nodes) == 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other = numbers(3, 3, 13, 9)
    for exported in (program, torch.export.load(file), program.run_decompositions()):
        close(exported.module()(other), model(other))


# --- models under enable()


def model(form: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
    )
    return layers.to(memory_format=form)


def trained(run: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> list[Tensor]:
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def test_a_compiled_model_under_enable_has_no_breaks_and_is_planned_forward_and_backward() -> None:
    net, x = model(), numbers(2, 3, 12, 12)
    reference = copy.deepcopy(net)
    right = trained(reference, reference, x)
    with convplan.enabled(MATMUL):
        found = trained(compiled(net), net, x)
    stats = convplan.stats()
    assert (stats["misses"], stats["fell_back"], stats["failed"]) == (8, 0, 0)  # four forwards and their backwards
    for one, two in zip(found, right, strict=True):
        close(one, two)


@pytest.mark.parametrize("way", ["enabled", "function"])
def test_what_runs_between_graphs_is_planned_without_dynamo_looking_into_it(way: str) -> None:
    w, seen = numbers(6, 4, 3, 3), []
    policy = Policy(budget_s=0.02, tune_after=1, engines=("matmul", "aten"))

    def observing(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(module)
        return module

    @torch._dynamo.disable(recursive=False)
    def eagerly(x: Tensor) -> Tensor:
        return torch.conv2d(x, w) if way == "enabled" else convplan.conv2d(x, w, policy=policy)

    run = torch.compile(lambda x: eagerly(x + 1).relu(), backend=observing)
    x = numbers(2, 4, 7, 7)
    with convplan.enabled(policy):
        for _ in range(2):
            torch.testing.assert_close(run(x), F.conv2d(x + 1, w).relu(), rtol=1e-4, atol=1e-4)
    assert convplan.stats()["tuned"] >= 1
    names = {str(node.target) for module in seen for node in module.graph.nodes if node.op == "call_function"}
    assert names <= {"<built-in function add>", "convplan.convolution"}, names


# --- what Inductor keeps


def with_pass(keep: kept.KeepConvolutions, graphs: list[torch.fx.Graph]) -> Any:
    """A backend that runs graphs as Inductor's pass leaves them."""

    def run(module: torch.fx.GraphModule, _: Any) -> Any:
        keep(module.graph)
        module.graph.lint()
        module.recompile()
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=run, bw_compiler=run)


def targets(graphs: list[torch.fx.Graph]) -> list[str]:
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return sorted(str(node.target) for node in calls if "conv" in str(node.target))


EVERY = ["convplan.convolution.kept"] * 4 + ["convplan.input_gradient.kept"] * 3 + ["convplan.weight_gradient.kept"] * 4


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("channels_last", [None, False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_the_pass_replaces_every_convolution_and_changes_no_result(
    form: str, channels_last: bool | None, dynamic: bool
) -> None:
    net, x = model(FORMATS[form]), numbers(2, 3, 12, 10, form=FORMATS[form])
    reference, graphs = copy.deepcopy(net), []
    keep = kept.KeepConvolutions(library.policy_text(MATMUL), channels_last)
    found = trained(compiled(net, with_pass(keep, graphs), dynamic=dynamic), net, x)
    right = trained(reference, reference, x)
    assert targets(graphs) == EVERY
    assert convplan.stats()["failed"] == 0
    for one, two in zip(found, right, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_layouts_are_the_models_own_where_that_is_asked_for() -> None:
    asked: dict[object, set[str]] = {}
    for channels_last in (False, True):
        with convplan.capture() as seen:
            net, keep = model(), kept.KeepConvolutions(library.policy_text(FAST), channels_last)
            trained(compiled(net, with_pass(keep, [])), net, numbers(2, 3, 12, 10))
        asked[channels_last] = {spec.layout for problem in seen for spec in (problem.x, problem.y) if spec.dims[1] > 1}
        torch._dynamo.reset()
    assert asked == {False: {"contiguous"}, True: {"channels_last"}}


def test_convolutions_that_are_not_planned_for_stay_torchs() -> None:
    w = torch.arange(4 * 27).reshape(4, 3, 3, 3)

    def several(x: Tensor) -> Tensor:
        real = F.conv_transpose2d(x, x[:3, :, :3, :3], dilation=2, output_padding=1)
        return real.sum() + F.conv2d(x.long(), w).sum()

    graphs: list[torch.fx.Graph] = []
    x = numbers(3, 3, 6, 6)
    with torch.no_grad():
        found = compiled(several, with_pass(kept.KeepConvolutions("", None), graphs))(x)
        torch.testing.assert_close(found, several(x), rtol=1e-4, atol=1e-4)
    assert targets(graphs) == ["aten.convolution.default"] * 2


def test_memory_that_a_graph_reads_by_strides_is_laid_out_as_it_was() -> None:
    w = numbers(4, 3, 3, 3)

    def strided(x: Tensor) -> Tensor:
        y = F.conv2d(x, w)
        return y.as_strided((4, 4), (16, 1), 3)

    graphs: list[torch.fx.Graph] = []
    x = numbers(1, 3, 6, 6)
    with torch.no_grad():
        close(compiled(strided, with_pass(kept.KeepConvolutions("", True), graphs))(x), strided(x))
    assert targets(graphs) == ["convplan.convolution.kept"]


def test_options_carry_the_mode_and_the_pass() -> None:
    options = convplan.compile_options(FAST, mode="reduce-overhead")
    assert options["triton.cudagraphs"] is True
    keep = options["post_grad_custom_pre_pass"]
    assert keep == convplan.compile_options(Policy(effort="instant"))["post_grad_custom_pre_pass"]
    others = (
        convplan.compile_options(),
        convplan.compile_options(FAST, channels_last=True),
        convplan.compile_options(MATMUL),
    )
    assert len({keep.uuid(), *(other["post_grad_custom_pre_pass"].uuid() for other in others)}) == 4
    with pytest.raises(SpecError, match=r"mode is 'fastest', expected one of .*max-autotune"):
        convplan.compile_options(mode="fastest")
    with pytest.raises(PolicyError, match="nobody"):
        convplan.compile_options(Policy(engines=("nobody",)))


@pytest.fixture
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


@pytest.mark.usefixtures("_no_cache")
@pytest.mark.parametrize("way", ["enabled", "kept"])
def test_inductors_own_code_reaches_convplan(way: str) -> None:
    """Of convolutions alone, in the layout that it wants, Inductor makes calls and no kernels."""
    from torch._inductor.utils import run_and_get_code

    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 3)).to(memory_format=torch.channels_last)
    x = numbers(2, 4, 12, 12, form=torch.channels_last)
    right = net(x)
    options = {} if way == "enabled" else convplan.compile_options(MATMUL)
    run = torch.compile(net, fullgraph=True, options={**options, "fx_graph_cache": False})
    with torch.no_grad(), convplan.enabled(MATMUL) if way == "enabled" else torch.no_grad():
        found, (code, *_) = run_and_get_code(run, x)
    close(found, right)
    calls = "extern_kernels.convolution(" if way == "enabled" else "convplan_kept.convolution("
    assert code.count(calls) == 2
    assert convplan.stats()["misses"] == 2


def plain_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ConvTranspose2d(8, 6, 3, stride=2, bias=False))


DIRECT = {"convolution": 2, "input_gradient": 2, "weight_gradient": 2}


def counted(codes: list[str], form: str) -> dict[str, int]:
    """How often generated code calls each operator in one form, such as `torch.ops.convplan.{}.kept(`."""
    return {name: sum(code.count(form.format(name)) for code in codes) for name in DIRECT}


@pytest.mark.usefixtures("_no_cache")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_generated_code_calls_kernels_without_the_dispatcher(dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    net = plain_net()
    reference = copy.deepcopy(net)
    options = {**convplan.compile_options(MATMUL, channels_last=False), "fx_graph_cache": False}
    run = torch.compile(net, fullgraph=True, dynamic=dynamic, options=options)

    def step(run: Any, x: Tensor) -> list[Tensor]:
        y = run(x)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        return [y.detach(), x.grad]

    codes = []
    for size in (7, 9):
        x = numbers(2, 4, size, size + 1, grad=True)
        other = x.detach().clone().requires_grad_()
        found, more = run_and_get_code(step, run, x)
        codes += more if size == 7 or not dynamic else []
        for one, two in zip(found, step(reference, other), strict=True):
            close(one, two)
    for one, two in zip(net.parameters(), reference.parameters(), strict=True):
        close(one.grad, two.grad)  # type: ignore[arg-type]
    times = 1 if dynamic else 2
    assert counted(codes, "convplan_kept.{}(") == {name: times * count for name, count in DIRECT.items()}
    assert not any(counted(codes, "torch.ops.convplan.{}.kept(").values())
    assert convplan.stats()["failed"] == 0


@pytest.fixture
def _no_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A version of Inductor that has no table of operators whose calls are written in their own way."""
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN

    for name in DIRECT:
        monkeypatch.delitem(CUSTOM_EXTERN_KERNEL_CODEGEN, f"torch.ops.convplan.{name}.kept", raising=False)
    monkeypatch.setitem(sys.modules, "torch._inductor.codegen.custom_extern_kernel_codegen", None)
    kept_calls.call_kernels.cache_clear()
    yield
    kept_calls.call_kernels.cache_clear()


@pytest.mark.usefixtures("_no_cache", "_no_table")
def test_without_a_place_to_say_so_operators_are_called(caplog: pytest.LogCaptureFixture) -> None:
    from torch._inductor.utils import run_and_get_code

    net, x = plain_net(), numbers(2, 4, 7, 8)
    options = {**convplan.compile_options(MATMUL, channels_last=False), "fx_graph_cache": False}
    with torch.no_grad(), caplog.at_level("DEBUG", "convplan.compile"):
        found, codes = run_and_get_code(torch.compile(net, fullgraph=True, options=options), x)
        close(found, net(x))
    assert counted(codes, "torch.ops.convplan.{}.kept(")["convolution"] == 2
    assert "calls operators by the dispatcher" in caplog.text


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("_no_cache")
def test_inductors_cpp_calls_the_operators() -> None:
    from torch._inductor.utils import run_and_get_code

    net, x = plain_net(), numbers(2, 4, 7, 8)
    options = {**convplan.compile_options(MATMUL, channels_last=False), "fx_graph_cache": False, "cpp_wrapper": True}
    with torch.no_grad():
        found, codes = run_and_get_code(torch.compile(net, fullgraph=True, options=options), x)
        close(found, net(x))
    assert "convplan_kept" not in "".join(codes)
    assert (convplan.stats()["misses"], convplan.stats()["failed"]) == (2, 0)


@pytest.mark.parametrize("name", ["convolution", "input_gradient", "weight_gradient", "fused_convolution"])
def test_a_kernel_that_is_called_by_itself_is_an_operator_to_modes(name: str) -> None:
    x, w = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3)
    y = F.conv2d(x, w)
    args = kept.conv_args(
        stride=(1, 1), padding=(0, 0), dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1, spatial=2
    )
    text = library.Call.of(args, "").text
    given: dict[str, tuple[tuple[Any, ...], Tensor]] = {
        "convolution": ((x, w, None, text), y),
        "fused_convolution": ((x, w, None, None, None, text), y),
        "input_gradient": ((y, w, [*x.shape], text), torch.nn.grad.conv2d_input(x.shape, w, y)),
        "weight_gradient": ((y, x, [*w.shape], text), torch.nn.grad.conv2d_weight(x, w.shape, y)),
    }
    arguments, right = given[name]
    called: list[str] = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listening():
        result = getattr(kept_calls, name)(*arguments)
    close(result, right)
    assert called == [f"convplan.{name}.kept"]
    with torch.device("meta"):  # a mode of the other kind
        found = [getattr(kept_calls, name)(*arguments) for _ in range(2)]
    for one in found:
        close(one, right)
    assert convplan.stats()["fell_back"] == 0


def test_where_inductor_writes_cpp_the_line_is_its_own() -> None:
    from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN
    from torch._inductor.codegen.wrapper import ExternKernelAllocLine
    from torch._inductor.virtualized import V

    assert kept_calls.call_kernels()
    write = CUSTOM_EXTERN_KERNEL_CODEGEN["torch.ops.convplan.convolution.kept"].python
    for cpp in (False, True):
        lines: list[Any] = []
        with V.set_graph_handler(SimpleNamespace(cpp_wrapper=cpp, wrapper_code=None)):
            write(None, lines.append)
        assert (type(lines[0]) is ExternKernelAllocLine) is cpp


FROM_CACHE = """
import torch
from torch import nn
from torch._dynamo.utils import counters
import convplan
from convplan.torch_ops.kept_calls import call_kernels

torch.manual_seed(0)
net, x = nn.Conv2d(4, 8, 3, bias=False), torch.randn(2, 4, 7, 8)
policy = convplan.Policy(effort="instant", engines=("aten",))
run = torch.compile(net, fullgraph=True, options=convplan.compile_options(policy, channels_last=False))
with torch.no_grad():
    torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-4)
stats = convplan.stats()
print(counters["inductor"]["fxgraph_cache_hit"], call_kernels.cache_info().currsize, stats["misses"], stats["failed"])
"""


def test_code_from_inductors_cache_finds_the_kernels_by_itself(tmp_path: Path) -> None:
    """A process that compiles nothing has told Inductor nothing."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    said = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", FROM_CACHE], env=environment, capture_output=True, text=True
        )
        for _ in range(2)
    ]
    assert [one.stdout.split() for one in said] == [["0", "1", "1", "0"], ["1", "0", "1", "0"]], said[-1].stderr
    codes = [path.read_text() for path in (tmp_path / "inductor").rglob("*.py")]
    assert counted(codes, "convplan_kept.{}(")["convolution"] == 1

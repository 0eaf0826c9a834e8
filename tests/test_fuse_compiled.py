"""What `compile_options(fuse=True)` makes of a compiled model's graph, and compiled models that were fused before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers.fresh import fresh_process
from helpers.fusing import ready
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import convplan
from convplan import Policy, SpecError
from convplan.torch_ops import fused_library, kept, library

Tensor = torch.Tensor
QUICK = Policy(effort="instant", engines=("aten",))
FUSED, KEPT = "convplan.fused_convolution.kept", "convplan.convolution.kept"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_process():
        yield
    torch._dynamo.reset()


class Layer(nn.Module):
    def __init__(self, follow: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.follow = nn.Conv2d(4, 4, 3, padding=1), follow

    def forward(self, x: Tensor) -> Tensor:
        return self.follow(self.conv(x), x)


def compiled(model: nn.Module, graphs: list[torch.fx.Graph], channels_last: bool | None = False) -> Any:
    keep = kept.KeepConvolutions(library.policy_text(QUICK), channels_last, fuse=True)

    def run(module: torch.fx.GraphModule, _: Any) -> Any:
        keep(module.graph)
        module.graph.lint()
        module.recompile()
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=run, bw_compiler=run, decompositions=select_decomp_table())
    return torch.compile(model, backend=backend, fullgraph=True)


def calls(graphs: list[torch.fx.Graph]) -> list[str]:
    return [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]


FOLLOWING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda y, x: F.relu(y),
    "in place": lambda y, x: y.relu_(),
    "sigmoid": lambda y, x: torch.sigmoid(y),
    "tanh": lambda y, x: y.tanh(),
    "add": lambda y, x: y + x,
    "add and relu": lambda y, x: F.relu(x + y),
    "alpha": lambda y, x: torch.add(y, x, alpha=-0.5).tanh(),
    "add_": lambda y, x: y.add_(x).clamp(-0.5, 0.5),
    "relu6": lambda y, x: F.relu6(y),
}


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FOLLOWING)
def test_what_follows_is_one_call_in_the_graph(name: str, form: torch.memory_format) -> None:
    model = Layer(FOLLOWING[name]).to(memory_format=form)
    x, graphs = torch.randn(2, 4, 6, 5).to(memory_format=form), []
    with torch.no_grad():
        found, right = compiled(model, graphs)(x), model(x)
    assert calls(graphs) == [FUSED]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert found.stride() == right.stride()


APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "broadcast": lambda y, x: y + x[:, :, :1],
    "twice": lambda y, x: F.relu(y) * y,
    "number": lambda y, x: y + 2,
    "itself": lambda y, x: y + y,
    "layout": lambda y, x: y + x.to(memory_format=torch.channels_last),
    "dtype": lambda y, x: y + x.double(),
    "alpha": lambda y, x: torch.add(x, y, alpha=2),
}


@pytest.mark.parametrize("name", APART)
def test_what_a_plan_cannot_add_stays_apart(name: str) -> None:
    model, x, graphs = Layer(APART[name]), torch.randn(2, 4, 6, 5), []
    with torch.no_grad():
        found, right = compiled(model, graphs)(x), model(x)
    assert KEPT in calls(graphs)
    assert FUSED not in calls(graphs)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_two_convolutions_with_a_sum_of_both_and_channels_last_throughout() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.beside = (nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(4, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.two(F.relu(self.one(x))) + self.beside(x))

    model, x, graphs = Block(), torch.randn(2, 4, 6, 5), []
    with torch.no_grad():
        found = compiled(model, graphs, channels_last=True)(x)
    kinds = [one for one in calls(graphs) if "conv" in one]
    assert sorted(kinds) == [KEPT, FUSED, FUSED]
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_training_through_fused_calls_gives_the_same_gradients() -> None:
    model = Layer(FOLLOWING["add and relu"])
    mine, x, graphs = copy.deepcopy(model), torch.randn(2, 4, 6, 5), []
    compiled(mine, graphs)(x).square().sum().backward()
    model(x).square().sum().backward()
    assert FUSED in calls(graphs)
    for one, other in zip(mine.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_sizes_that_are_symbols_are_fused_where_nothing_is_added() -> None:
    graphs: list[torch.fx.Graph] = []
    model = Layer(FOLLOWING["relu"])
    keep = compiled(model, graphs)
    with torch.no_grad():
        for width in (5, 6, 7):
            x = torch.randn(2, 4, 6, width)
            torch.testing.assert_close(keep(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2
    assert calls(graphs).count(FUSED) == 2


def test_the_setting_is_part_of_what_tells_passes_apart() -> None:
    plain, fusing = (convplan.compile_options(QUICK, fuse=fuse)["post_grad_custom_pre_pass"] for fuse in (False, True))
    assert plain != fusing
    assert plain.uuid() != fusing.uuid()
    assert fusing == convplan.compile_options(QUICK, fuse=True)["post_grad_custom_pre_pass"]


def test_a_fused_model_compiles_to_convplans_operators() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SiLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.norm(self.conv(x)) + x))

    model = ready(Block())
    fused, x = convplan.fuse(model, policy=QUICK), torch.randn(2, 4, 6, 5)
    run = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """As in a ResNet, with a transposed convolution behind it and an activation that only plans fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 4, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(4)])
        self.wider, self.last = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.one(x)))
        y = F.relu(self.norms[1](self.two(y)) + x)
        return F.silu(self.last(self.wider(y)))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_fused_model_that_is_compiled_has_its_sums_in_its_plans(form: torch.memory_format) -> None:
    model = ready(Residual()).to(memory_format=form)
    fused, x = convplan.fuse(model, policy=QUICK), torch.randn(2, 4, 6, 5).to(memory_format=form)
    graphs: list[torch.fx.Graph] = []
    with torch.no_grad():
        found, right = compiled(fused, graphs)(x), model(x)
    assert calls(graphs) == [FUSED, FUSED, KEPT, FUSED]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert found.stride() == right.stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, while Inductor is imported
def test_inductors_own_code_calls_the_plans_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    model = ready(Residual()).to(memory_format=torch.channels_last)
    fused = convplan.fuse(model, policy=QUICK)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    options = {**convplan.compile_options(fuse=True), "fx_graph_cache": False}
    with torch.no_grad():
        found, (code, *_) = run_and_get_code(torch.compile(fused, options=options), x)
        right = model(x)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert found.stride() == right.stride()
    assert code.count("convplan_kept.fused_convolution(") == 3
    assert code.count("convplan_kept.convolution(") == 1
    assert "extern_kernels.convolution" not in code
    assert ".kept(" not in code
    assert convplan.stats()["misses"] == 4


def test_functions_keep_their_policy_and_what_they_already_fuse() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, 3, 3))
            self.scale = torch.tensor([1.0, 2.0, -1.0, 0.5])

        def forward(self, x: Tensor) -> Tensor:
            y = convplan.conv2d(x, self.w, padding=1, scale=self.scale, policy=QUICK)
            y = (y + x).sigmoid()
            y = convplan.conv2d(y, self.w, padding=1, residual=x, alpha=0.5, activation=("leaky_relu", 0.1)) + x
            y = convplan.conv2d(y, self.w, padding=1, residual=x).relu()
            y = convplan.conv2d(y, self.w[:, :2], padding=1, groups=2, residual=x) + x
            return convplan.conv2d(y, self.w, padding=1, activation="silu").relu()

    model, x, graphs = Called(), torch.randn(2, 4, 6, 5), []
    with torch.no_grad():
        found, right = compiled(model, graphs)(x), model(x)
    kinds = calls(graphs)
    kinds = [one for one in kinds if "slice" not in one]
    assert kinds == [FUSED, FUSED, "aten.add.Tensor", FUSED, FUSED, "aten.add.Tensor", FUSED, "aten.relu.default"]
    told = [fused_library.call_with_epilogue_of(node.args[-1]) for graph in graphs for node in graph.nodes
            if str(node.target) == FUSED]  # fmt: skip
    assert [one.activation for one in told] == ["sigmoid", "leaky_relu", "relu", "none", "silu"]
    assert [one.alpha for one in told] == [1.0, 0.5, 1.0, 1.0, 1.0]
    assert [one.groups for one in told] == [1, 1, 1, 2, 1]
    assert [one.policy for one in told] == [library.policy_text(QUICK), "", "", "", ""]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_functions_take_their_short_form(form: torch.memory_format) -> None:
    class Called(nn.Module):
        def __init__(self, call: Callable[..., Tensor]) -> None:
            super().__init__()
            self.w, self.call = nn.Parameter(torch.randn(4, 4, 3, 3)), call

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x, self.w, padding=1).relu()

    torch.manual_seed(0)
    model = Called(F.conv2d)
    mine, graphs = Called(convplan.conv2d), []
    mine.load_state_dict(model.state_dict())
    model, mine = model.to(memory_format=form), mine.to(memory_format=form)
    x = torch.randn(2, 4, 6, 5).to(memory_format=form).requires_grad_()
    other = x.detach().clone().requires_grad_()
    compiled(mine, graphs)(x).square().sum().backward()
    model(other).square().sum().backward()
    kinds = calls(graphs)
    assert {"convplan.input_gradient.kept", "convplan.weight_gradient.kept", FUSED} <= set(kinds)
    assert not any("convplan" in kind and kind.endswith(".default") for kind in kinds)
    torch.testing.assert_close(mine.w.grad, model.w.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    found = [node.meta["val"] for graph in graphs for node in graph.nodes if "gradient.kept" in str(node.target)]
    assert [one.is_contiguous(memory_format=form) for one in found] == [True, True]


def test_what_a_layout_becomes_is_followed_through_functions() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.w = nn.Conv2d(4, 4, 3, padding=1), nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = convplan.conv2d(y, self.w, padding=1).exp()
            return (convplan.conv2d(y, self.w, padding=1) + z).relu()

    model, x, graphs = Mixed(), torch.randn(2, 4, 6, 5), []
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, graphs, channels_last=True)(x), model(x), rtol=1e-4, atol=1e-4)
    assert [one for one in calls(graphs) if "conv" in one] == [KEPT, KEPT, FUSED]


def test_an_address_of_another_alignment_is_another_problem() -> None:
    text = fused_library.CallWithEpilogue(
        stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), output_padding=(0, 0), policy=library.policy_text(QUICK),
        activation="relu",
    ).text  # fmt: skip
    memory = torch.randn(1 + 4 * 5 * 5)
    w = torch.randn(4, 4, 3, 3)
    convplan.stats(reset=True)
    for start in (0, 1, 0, 1):
        x = memory[start : start + 100].view(1, 4, 5, 5)
        found = torch.ops.convplan.fused_convolution.kept(x, w, None, None, None, text)
        torch.testing.assert_close(found, F.conv2d(x, w).relu(), rtol=1e-4, atol=1e-4)
    assert (convplan.stats()["misses"], convplan.stats()["hits"]) == (2, 2)


def test_sizes_that_are_symbols_stay_in_the_long_form() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return convplan.conv2d(x, w, padding="same", policy=QUICK).relu()

    graphs: list[torch.fx.Graph] = []
    keep = compiled(run, graphs)  # type: ignore[arg-type]
    with torch.no_grad():
        for size in (3, 5, 7):
            x, w = torch.randn(2, 4, 9, 8), torch.randn(4, 4, size, size)
            torch.testing.assert_close(keep(x, w), run(x, w), rtol=1e-4, atol=1e-4)
    kinds = calls(graphs)
    assert FUSED in kinds  # of the first graph, where all sizes were numbers
    assert "convplan.convolution.default" in kinds


def test_the_short_form_says_what_is_wrong_with_its_text() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    kept_form = torch.ops.convplan.fused_convolution.kept
    with pytest.raises(SpecError, match="expected an operator's arguments as JSON"):
        kept_form(x, w, None, None, None, '{"stride": [1, 1], "sum": 3}')
    text = fused_library.CallWithEpilogue(
        stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), output_padding=(0, 0), activation="relux"
    ).text
    with pytest.raises(SpecError, match="relux"):
        kept_form(x, w, None, None, None, text)

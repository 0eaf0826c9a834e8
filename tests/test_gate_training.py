"""`fuse_training` where a ReLU stands between two convolutions: its backward pass is the later one's dgrad's.

What runs on a GPU is made to run on the CPU too, where the gate is a pass behind dgrad. Gradients are compared with
those of the model itself in float64.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import convplan
from convplan import Policy
from convplan.torch_ops import gated_call
from convplan.torch_ops.gated import Gated, Masked, Step

QUICK = Policy(effort="instant", engines=("aten",))
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Tensor = torch.Tensor


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The operation runs on the CPU. For each gradient that went through a gate, whether it was taken as it is."""
    monkeypatch.setitem(gated_call.TAKEN, "cpu", FLOATS)
    seen: list[bool] = []
    is_still = Masked.is_still

    def noted(self: Masked, grad: Tensor) -> bool:
        seen.append(is_still(self, grad))
        return seen[-1]

    monkeypatch.setattr(Masked, "is_still", noted)
    return seen


class Made(nn.Module):
    """Convolutions of 6 channels and a function of them and the input."""

    def __init__(self, run: Callable[..., Any], count: int = 3, **parts: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(count))
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class Residual(nn.Module):
    """As in EDSR."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(True), nn.Conv2d(6, 6, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x).mul(0.5)


def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(12, 12, 3, stride=2, bias=False), nn.ReLU(),
        nn.Conv2d(12, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def twice(model: Any, x: Tensor) -> Tensor:
    a, b = model.convs[:2]
    y = torch.relu(a(x))
    return b(y) * y.sigmoid()


def chain(model: Any, x: Tensor) -> Tensor:
    a, b, c = model.convs
    return c(F.relu(b(torch.relu(a(x)))))


def one_relu(model: Any, x: Tensor) -> Tensor:
    a, b, c = model.convs
    return c(model.act(b(model.act(a(x)))))


# Model, and how many gates it has.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vgg": (vgg, 3),
    "edsr": (lambda: nn.Sequential(Residual(), Residual()), 2),
    "functions": (lambda: Made(chain), 2),
    "methods": (lambda: Made(lambda m, x: m.convs[1](m.convs[0](x).relu_())), 1),
    "one ReLU for all": (lambda: Made(one_relu, act=nn.ReLU()), 2),
    "one convolution for all": (lambda: Made(lambda m, x: m.convs[0](m.convs[0](m.convs[0](x).relu()).relu())), 2),
    "two users of the ReLU": (lambda: Made(twice), 0),
    "two users of the convolution": (lambda: Made(lambda m, x: m.convs[1](torch.relu(y := m.convs[0](x))) + y), 0),
    "two convolutions behind": (
        lambda: Made(lambda m, x: m.convs[1](y := torch.relu(m.convs[0](x))) + m.convs[2](y)), 0
    ),
    "returned too": (lambda: Made(lambda m, x: torch.cat([m.convs[1](y := torch.relu(m.convs[0](x))), y])), 0),
    "a product between": (lambda: Made(lambda m, x: m.convs[1](torch.relu(m.convs[0](x)) * 2)), 0),
    "other activations": (lambda: Made(lambda m, x: m.convs[2](F.leaky_relu(m.convs[1](F.relu6(m.convs[0](x)))))), 0),
}  # fmt: skip


def built(name: str = "vgg", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model fused for training, the model in float64, and an input that asks for gradients."""
    torch.manual_seed(0)
    model = MODELS[name][0]().to(memory_format=torch.channels_last)
    fused = convplan.fuse_training(copy.deepcopy(model).to(dtype), policy=QUICK)
    x = torch.randn(3, 6, 12, 12).to(memory_format=torch.channels_last)
    return fused, model.double(), x.to(dtype)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Output and gradients of one step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {"output": y.detach(), "input": x.grad} | {name: one.grad for name, one in model.named_parameters()}


def compare(fused: nn.Module, exact: nn.Module, x: Tensor, tolerance: float = 1e-4) -> None:
    """Gradients of both, and that those which are missing are missing in both."""
    found, right = gradients(fused, x), gradients(exact, x.double())
    assert {name for name, one in found.items() if one is None} == {name for name, one in right.items() if one is None}
    for name, one in found.items():
        other = right[name]
        if one is not None and other is not None:
            off, size = float((one.double() - other).norm()), float(other.norm())
            assert off <= tolerance * size + 1e-9, f"{name} is off by {off / size:.3g}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_the_models(name: str, dtype: torch.dtype, masks: list[bool]) -> None:
    fused, exact, x = built(name, dtype)
    assert fused.fusion_report.counts.get("relu backward", 0) == MODELS[name][1]
    compare(fused, exact, x, 1e-4 if dtype == torch.float32 else 1e-12)
    expected = MODELS[name][1] if dtype == torch.float32 else 0  # of float64 there are no such plans
    assert masks == [True] * expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_it_did(dtype: torch.dtype, masks: list[bool]) -> None:
    fused, exact, x = built()
    stock = copy.deepcopy(exact).float()
    with torch.autocast("cpu", dtype):
        assert fused(x).dtype == stock(x).dtype == dtype
        found, right, exactly = gradients(fused, x), gradients(stock, x), gradients(exact, x.double())
    assert masks == [True] * 3
    for name, one in found.items():
        assert one is not None
        mine, other = ((some.double() - exactly[name]).norm() for some in (one, right[name]))
        assert mine <= 2 * other + 1e-2 * exactly[name].norm()


def test_without_the_gpus_layout_or_device_the_modules_run() -> None:
    fused, exact, x = built()
    seen = []
    fused[0].register_forward_hook(lambda *_: seen.append("hook"))
    compare(fused, exact, x)
    assert seen == ["hook"]


@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["first", "ReLU", "second", "last ReLU"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook", "register_forward_pre_hook"])
def test_hooks_that_come_later_are_called(place: int, kind: str, masks: list[bool]) -> None:
    fused, exact, x = built()
    if kind == "register_full_backward_hook":  # which torch forbids before a module that writes in place
        for model in (fused, exact):
            model[1].inplace = model[3].inplace = False
    seen: list[list[Any]] = [[], []]
    for model, calls in zip((fused, exact), seen, strict=True):
        getattr(model[place], kind)(lambda module, *given, calls=calls: calls.append(given[-1]))
    compare(fused, exact, x)
    assert len(seen[0]) == len(seen[1]) == 1
    torch.testing.assert_close(_first(seen[0][0]).double(), _first(seen[1][0]), rtol=1e-4, atol=1e-5)


def _first(given: Any) -> Tensor:
    return _first(given[0]) if isinstance(given, tuple) else given


def test_gradients_of_the_relus_result_are_whole() -> None:
    """Whoever asks for the gradient of what stands between two convolutions gets it without a gate."""
    a, b, x = (torch.randn(dims) for dims in ((6, 6, 3, 3), (6, 6, 3, 3), (2, 6, 8, 8)))
    for watch in ("retain_grad", "hook", "nobody"):
        one, two = _step(x, a, True), _step(x, b, False)
        y = Gated.apply(one, None, x, a.requires_grad_(), None)
        seen: list[Tensor] = []
        if watch == "retain_grad":
            y.retain_grad()
        if watch == "hook":
            y.register_hook(seen.append)
        z = Gated.apply(two, y.grad_fn, y, b.requires_grad_(), None)
        found = torch.autograd.grad(z.square().sum(), (a, b)) if watch != "retain_grad" else None
        if watch == "retain_grad":
            z.square().sum().backward()
            found, seen = (a.grad, b.grad), [y.grad]
        given = [one.detach().double().requires_grad_() for one in (a, b)]
        middle = torch.relu(F.conv2d(x.double(), given[0], padding=1))
        last = F.conv2d(middle, given[1], padding=1).square().sum()
        right = torch.autograd.grad(last, (*given, middle))
        for mine, other in zip((*found, *seen), right, strict=False):
            torch.testing.assert_close(mine.double(), other, rtol=1e-3, atol=1e-3)
        assert len(seen) == (watch != "nobody")
        a, b = a.detach(), b.detach()


def _step(x: Tensor, weight: Tensor, relu: bool) -> Step:
    args = convplan.torch_ops.arguments.arguments(2, weight, 1, 1, 1, False, 0, 1)
    activation = gated_call.RELU if relu else gated_call.NONE
    given = gated_call.Given(x, weight, None, None, None)
    return Step(gated_call.fused_problem(given, args, 1.0, activation), args, QUICK, activation)


@pytest.mark.parametrize("other", ["product", "another", "in place"])
def test_what_others_add_is_masked_whatever_was_promised(other: str, masks: list[bool]) -> None:
    """Two users, which `fuse_training` would not let happen: the gradient is a sum, and is masked once more."""
    x, a, b = torch.randn(2, 6, 8, 8), torch.randn(6, 6, 3, 3) / 8, torch.randn(6, 6, 3, 3) / 8
    one, two = _step(x, a, True), _step(x, b, False)

    def mine(a: Tensor, b: Tensor) -> Tensor:
        y = Gated.apply(one, None, x, a, None)
        if other == "in place":
            y.register_hook(lambda grad: None)  # seen by the later one: nothing is gated
        z = Gated.apply(two, y.grad_fn, y, b, None)
        more = Gated.apply(two, y.grad_fn, y, b, None) if other == "another" else y * x
        return (z.sin() + more.cos()).sum()

    def right(a: Tensor, b: Tensor) -> Tensor:
        y = torch.relu(F.conv2d(x.double(), a, padding=1))
        z = F.conv2d(y, b, padding=1)
        return (z.sin() + (z if other == "another" else y * x.double()).cos()).sum()

    found = torch.autograd.grad(mine(a.requires_grad_(), b.requires_grad_()), (a, b))
    wide = [one.detach().double().requires_grad_() for one in (a, b)]
    for left, exact in zip(found, torch.autograd.grad(right(*wide), wide), strict=True):
        torch.testing.assert_close(left.double(), exact, rtol=1e-3, atol=1e-3)
    assert masks == ([] if other == "in place" else [False])


def test_what_a_batch_norm_takes_in_has_no_gate() -> None:
    model = Made(lambda m, x: m.bn(m.convs[1](torch.relu(m.convs[0](x)))), bn=nn.BatchNorm2d(6))
    assert convplan.fuse_training(model, policy=QUICK).fusion_report.counts == {"convolution": 1}


def test_a_gradient_that_was_written_to_is_no_longer_it() -> None:
    grad = torch.ones(3)
    masked = Masked(grad, grad._version)
    assert masked.is_still(grad)
    assert not masked.is_still(grad.clone())
    assert not masked.is_still(grad.view(3))
    grad.add_(1)
    assert not masked.is_still(grad)


@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 2), (5, 7), (0, 2, 5, 7, 9)], ids=str)
@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_weights(frozen: tuple[int, ...], input_grad: bool, masks: list[bool]) -> None:
    fused, exact, x = built()
    for model in (fused, exact):
        for place in frozen:
            model[place].requires_grad_(False)
    if input_grad:
        compare(fused, exact, x)
        return
    for model, given in ((fused, x), (exact, x.double())):
        model(given).square().sum().backward()
    for one, other in zip(fused.parameters(), exact.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=1e-5)


def test_a_part_without_gradients_stays_without() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.relu(model.convs[0](x))
        return model.convs[2](torch.relu(model.convs[1](y)))

    model = Made(run)
    fused = convplan.fuse_training(model, policy=QUICK)
    assert fused.fusion_report.untraced == {"": "it switches gradients or autocast on or off"}
    compare(fused, copy.deepcopy(model).double(), torch.randn(2, 6, 8, 8))


def test_one_half_without_gradients(masks: list[bool]) -> None:
    """Halves that run apart: the earlier one records nothing, and the later one has no node to speak to."""
    fused, exact, x = built("functions")
    with torch.no_grad():
        y = fused(x)
    compare(fused, exact, y)
    assert masks == [True] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, masks: list[bool]) -> None:
    fused, exact, x = built()

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    compare(Checkpointed(fused), Checkpointed(exact), x)
    assert masks == [True] * 3


def test_gradients_twice_from_one_graph(masks: list[bool]) -> None:
    fused, _, x = built()
    y = fused(x).square().sum()
    parameters = list(fused.parameters())
    once = torch.autograd.grad(y, parameters, retain_graph=True)
    part = torch.autograd.grad(y, parameters[-4:], retain_graph=True)
    again = torch.autograd.grad(y, parameters)
    assert all(map(torch.equal, once, again))
    assert all(map(torch.equal, once[-4:], part))


@pytest.mark.parametrize("most", [0, 8])
def test_gradients_of_gradients(most: int, masks: list[bool]) -> None:
    fused, exact, x = built("edsr")

    def penalty(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = x.clone().requires_grad_()
        firsts = torch.autograd.grad(model(x).sin().sum(), (x, *list(model.parameters())[:most]), create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in firsts), list(model.parameters())[:-1])

    for one, other in zip(penalty(fused, x), penalty(exact, x.double()), strict=True):
        assert float((one.double() - other).norm()) <= 1e-3 * float(other.norm())
    # The gradient of a weight's gradient comes in where the ReLU's result went, too: the sum is masked once more.
    assert masks == [most == 0] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its forward mode
def test_transforms_see_the_modules(masks: list[bool]) -> None:
    fused, exact, x = built("functions")
    values = dict(fused.named_parameters())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(fused, values, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x.unsqueeze(1))
    exact(x.double()).square().sum().backward()
    for name, one in exact.named_parameters():
        torch.testing.assert_close(found[name].sum(0).double(), one.grad, rtol=1e-3, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(fused(dual)).tangent is not None
    assert masks == []


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_train_by_themselves(way: str, masks: list[bool]) -> None:
    fused, exact, x = built()
    fused(x)
    other = copy.deepcopy(fused) if way == "copy" else pickle.loads(pickle.dumps(fused))
    compare(other, exact, x)
    assert masks == [True] * 3
    assert all(one.grad is None for one in fused.parameters())


def test_modules_that_are_exchanged_are_seen(masks: list[bool]) -> None:
    fused, exact, x = built()
    for model in (fused, exact):
        model[1] = nn.GELU()
    compare(fused, exact, x)
    assert masks == [True] * 2


def test_other_sizes_and_no_batch(masks: list[bool]) -> None:
    fused, exact, x = built("functions")
    for given in (x[:, :, :7], x[:1], x[0]):
        compare(fused, exact, given)


def test_a_plan_that_fails_is_replaced(monkeypatch: pytest.MonkeyPatch, masks: list[bool]) -> None:
    fused, exact, x = built("functions")
    monkeypatch.setattr("convplan.torch_ops.gated.planned_runner", lambda *given: None)
    compare(fused, exact, x[:2])
    assert masks == [True] * 2

"""`fuse(model)`: what is taken into a convolution, what is left and why, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import logging
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fusing import ready
from torch import nn

import convplan
from convplan import FuseError, Policy, SpecError
from convplan.torch_ops.between import Joined, Pooled
from convplan.torch_ops.fuse import FusionReport
from convplan.torch_ops.fused_modules import FusedConv

QUICK = Policy(effort="instant", engines=("aten",))
Tensor = torch.Tensor


class Made(nn.Module):
    """Some modules and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def image(*dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(dims or (2, 4, 9, 7), dtype=dtype)


def conv(channels: int = 4, out: int = 4, size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, padding=size // 2, **more)


def fused(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The fused model, after it has been compared on the inputs, and the caller's found unchanged."""
    model = ready(model)
    before = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    kinds = {name: type(one) for name, one in model.named_modules()}
    new = convplan.fuse(model, inputs, strict=True, policy=QUICK)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is old and torch.equal(old, copy) for name, (old, copy) in before.items())
    assert {name: type(one) for name, one in model.named_modules()} == kinds
    return new


def rows(model: nn.Module) -> dict[str, tuple[tuple[str, ...], str]]:
    report = model.fusion_report
    assert isinstance(report, FusionReport)
    return {row.name: (row.parts, row.ended) for row in report.rows}


# --- activations

MODULES = [
    (nn.ReLU(), "relu"), (nn.ReLU(inplace=True), "relu"), (nn.ReLU6(), "hardtanh"), (nn.LeakyReLU(0.2), "leaky_relu"),
    (nn.Hardtanh(-0.3, 0.4), "hardtanh"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"),
    (nn.Sigmoid(), "sigmoid"), (nn.Tanh(), "tanh"), (nn.Hardswish(inplace=True), "hardswish"), (nn.ELU(0.7), "elu"),
    (nn.Softplus(2.0, 3.0), "softplus"),
]  # fmt: skip
FUNCTIONS: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (F.relu, "relu"), (lambda x: F.relu(x, inplace=True), "relu"), (torch.relu, "relu"), (lambda x: x.relu(), "relu"),
    (lambda x: x.relu_(), "relu"), (torch.relu_, "relu"), (F.relu6, "relu6"),
    (lambda x: F.leaky_relu(x, 0.3, True), "leaky_relu"), (lambda x: F.hardtanh(x, min_val=-0.5), "hardtanh"),
    (lambda x: x.clamp(-0.2, 0.9), "clamp"), (lambda x: torch.clamp(x, min=0.0, max=6.0), "clamp"),
    (F.gelu, "gelu"), (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"), (F.silu, "silu"),
    (torch.sigmoid, "sigmoid"), (lambda x: x.sigmoid_(), "sigmoid"), (torch.tanh, "tanh"), (lambda x: x.tanh(), "tanh"),
    (F.hardswish, "hardswish"), (lambda x: F.elu(x, 0.5), "elu"), (lambda x: F.softplus(x, 2), "softplus"),
]  # fmt: skip
PLAIN_NAMES = {"relu6": "hardtanh"}  # as which torch differentiates it


@pytest.mark.parametrize(("module", "name"), MODULES, ids=[str(module) for module, _ in MODULES])
def test_a_module_that_computes_an_activation_is_taken_in(module: nn.Module, name: str) -> None:
    new = fused(nn.Sequential(conv(), nn.BatchNorm2d(4), module), image())
    assert rows(new) == {"0": (("bias", "batch norm", name), "")}
    assert [type(one) for one in new.children()] == [FusedConv]


@pytest.mark.parametrize(("run", "name"), FUNCTIONS, ids=[f"{i}-{name}" for i, (_, name) in enumerate(FUNCTIONS)])
def test_a_function_that_computes_an_activation_is_taken_in(run: Callable[[Tensor], Tensor], name: str) -> None:
    new = fused(Made(lambda m, x: run(m.conv(x)), conv=conv(bias=False)), image())
    assert rows(new) == {"conv": ((PLAIN_NAMES.get(name, name),), "")}


def test_what_no_plan_computes_stays() -> None:
    model = nn.Sequential(conv(), nn.Mish(), conv(), nn.Softplus(-1.0), conv(), nn.Hardtanh(-torch.inf, 1.0))
    found = rows(fused(model, image()))
    assert found["0"] == (("bias",), "then Mish 1")
    assert "beta is -1.0" in found["2"][1]
    assert "-inf" in found["4"][1]


# --- batch norms

SHAPES = {
    "1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 11)),
    "2d-grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 6)),
    "3d": (nn.Conv3d(4, 6, 2, stride=2), nn.BatchNorm3d(6), (1, 4, 5, 4, 6)),
    "transposed-1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed-2d-grouped": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 4)
    ),
    "transposed-3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), nn.BatchNorm3d(6), (1, 4, 3, 4, 3)),
    "same": (nn.Conv2d(4, 6, 4, padding="same"), nn.BatchNorm2d(6), (2, 4, 7, 6)),
    "no-affine": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (2, 4, 7, 6)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own convolution says that it copies
@pytest.mark.parametrize("name", SHAPES)
def test_batch_norms_are_folded_into_convolutions_of_every_kind(name: str) -> None:
    first, norm, dims = SHAPES[name]
    new = fused(nn.Sequential(first, norm, nn.ReLU()), image(*dims))
    (found,) = rows(new).values()
    assert found == ((*(("bias",) if first.bias is not None else ()), "batch norm", "relu"), "")
    assert sorted(new.state_dict()) == ["0.bias", "0.weight"]


def test_folding_is_computed_in_float64_and_rounded_once() -> None:
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4))).half()
    new = convplan.fuse(model, policy=QUICK)
    first, norm = model
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = first.weight.double() * scale.view(-1, 1, 1, 1)
    bias = (first.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    state = new.state_dict()
    assert torch.equal(state["0.weight"], weight.half())
    assert torch.equal(state["0.bias"], bias.half())


def test_a_weight_that_grows_too_large_is_not_folded() -> None:
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4))).half()
    model[1].running_var.zero_()
    model[1].weight.data.fill_(6e4)
    model[1].eps = 1e-5
    new = convplan.fuse(model, policy=QUICK)
    assert rows(new) == {"0": (("bias",), "the folded weight does not fit float16")}
    assert "1.running_var" in new.state_dict()


def test_a_batch_norm_called_as_a_function_is_folded() -> None:
    model = Made(lambda m, x: F.relu(_norm(m, m.conv(x))), conv=conv(), norm=nn.BatchNorm2d(4))
    assert rows(fused(model, image())) == {"conv": (("bias", "batch norm", "relu"), "")}


def _norm(m: Any, y: Tensor) -> Tensor:
    norm = m.norm
    torch._assert(y.ndim == 4, "expected 4 dimensions")
    return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, 1e-3)


NOT_FOLDED = {
    "own statistics": (nn.BatchNorm2d(4, track_running_stats=False), "takes its statistics from the batch"),
    "group norm": (nn.GroupNorm(2, 4), "then GroupNorm 1"),
    "dropout": (nn.Dropout(), "then Dropout 1"),
    "pool": (nn.MaxPool2d(2), "then MaxPool2d 1"),
}


@pytest.mark.parametrize("name", NOT_FOLDED)
def test_other_modules_stay_and_are_named(name: str) -> None:
    part, reason = NOT_FOLDED[name]
    (found,) = rows(fused(nn.Sequential(conv(), part, nn.ReLU()), image())).values()
    assert found[0] == ("bias",)
    assert reason in found[1]


def test_a_batch_norm_in_training_mode_stays_and_goes_on_learning() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4)).eval()
    model[1].train()
    new = convplan.fuse(model, policy=QUICK)
    assert "training mode" in rows(new)["0"][1]
    before = model[1].running_mean.clone()
    new(image())
    assert torch.equal(model[1].running_mean, before)  # the caller's
    assert not torch.equal(new.state_dict()["1.running_mean"], before)


# --- sums

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda y, x: y + x,
    "+ the other way": lambda y, x: x + y,
    "+=": operator.iadd,
    "add": torch.add,
    "add with alpha": lambda y, x: torch.add(y, x, alpha=0.5),
    "add_": lambda y, x: y.add_(x, alpha=2),
    "method": lambda y, x: x.add(y),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_taken_in(name: str) -> None:
    model = Made(lambda m, x: F.relu(SUMS[name](m.norm(m.conv(x)), x)), conv=conv(), norm=nn.BatchNorm2d(4))
    new = fused(model, image())
    assert rows(new) == {"conv": (("bias", "batch norm", "add", "relu"), "")}


def test_a_residual_block_with_a_projection_is_two_calls() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.two(m.one(x))
        y += m.beside(x)
        return m.act(y)

    model = Made(
        run,
        one=nn.Sequential(conv(4, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        two=nn.Sequential(conv(8, 8), nn.BatchNorm2d(8)),
        beside=nn.Sequential(conv(4, 8, 1), nn.BatchNorm2d(8)),
        act=nn.ReLU(inplace=True),
    )
    new = fused(model, image())
    assert rows(new) == {
        "one.0": (("bias", "batch norm", "relu"), ""),
        "two.0": (("bias", "batch norm", "add", "relu"), ""),
        "beside.0": (("bias", "batch norm"), "then two.0"),
    }


@pytest.mark.parametrize(
    ("dims", "dtype"), [((1, 4, 1, 1), torch.float32), ((2, 4, 9, 1), torch.float32), ((2, 4, 9, 7), torch.float64)]
)
def test_what_broadcasts_or_has_another_dtype_is_added_apart(dims: tuple[int, ...], dtype: torch.dtype) -> None:
    model = Made(lambda m, pair: F.relu(m.conv(pair[0]) + pair[1]), conv=conv())
    pair = (image(), image(*dims, dtype=dtype))
    new = convplan.fuse(model.eval(), (pair,), strict=True, policy=QUICK)
    assert rows(new) == {"conv": (("bias", "add", "relu"), "its sum is computed apart: another shape, dtype or layout "
                                  "is added")}  # fmt: skip
    assert new(pair).dtype == dtype
    same = (image(), image())  # and one that fits is fused by the same model
    torch.testing.assert_close(new(same), model(same))
    assert set(new.conv._fits.values()) == {True, False}


@pytest.mark.parametrize("other", [torch.channels_last, torch.contiguous_format])
def test_a_residual_of_another_layout_is_added_as_the_model_does(other: torch.memory_format) -> None:
    model = Made(lambda m, pair: F.relu(pair[1] + m.conv(pair[0])), conv=conv()).eval()
    new = convplan.fuse(model, policy=QUICK)
    mine = torch.contiguous_format if other is torch.channels_last else torch.channels_last
    pair = (image().to(memory_format=mine), image().to(memory_format=other))
    assert new(pair).stride() == model(pair).stride()
    torch.testing.assert_close(new(pair), model(pair))


def test_a_number_that_is_added_stays() -> None:
    found = rows(fused(Made(lambda m, x: F.relu(m.conv(x) + 3), conv=conv()), image()))
    assert found == {"conv": (("bias",), "a number is added")}


def test_a_result_added_to_itself_stays() -> None:
    found = rows(fused(Made(lambda m, x: _twice(m.conv(x)), conv=conv()), image()))
    assert found["conv"] == (("bias",), "it is added to itself")


def _twice(y: Tensor) -> Tensor:
    return y + y


def test_alpha_on_the_side_of_the_convolution_stays() -> None:
    model = Made(lambda m, x: torch.add(x, m.conv(x), alpha=0.5), conv=conv())
    assert rows(fused(model, image())) == {
        "conv": (("bias",), "alpha belongs to the convolution's side of the sum")
    }  # fmt: skip


# --- memory


def test_a_sum_that_writes_into_the_callers_tensor_still_does() -> None:
    model = Made(lambda m, x: x.add_(m.conv(x)), conv=conv()).eval()
    new = convplan.fuse(model, policy=QUICK)
    assert "the sum writes into x" in rows(new)["conv"][1]
    x = image()
    expected, y = x + model.conv(x), x.clone()
    assert new(y) is y
    torch.testing.assert_close(y, expected)


def test_a_sum_that_writes_into_what_nobody_else_sees_is_taken_in() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.enter(x)
        y += m.conv(y)
        return y

    found = rows(fused(Made(run, enter=conv(), conv=conv()), image()))
    assert found["conv"] == (("bias", "add"), "")


def test_a_sum_that_writes_into_what_is_used_again_stays() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.enter(x)
        seen = y.flatten(1)
        y += m.conv(y)
        return y.flatten(1) * seen

    found = rows(fused(Made(run, enter=conv(), conv=conv()), image()))
    assert found["conv"] == (("bias",), "the sum writes into enter")


def test_what_is_written_between_a_convolution_and_its_sum_is_read_before() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        x.relu_()
        return F.silu(y + x)

    model = Made(run, conv=conv()).eval()
    new = convplan.fuse(model, policy=QUICK)
    x = image()
    torch.testing.assert_close(new(x.clone()), model(x.clone()))
    parts, reason = rows(new)["conv"]
    assert parts == ("bias",)
    assert "relu_, which is computed before the end" in reason


# --- left alone


def test_a_result_that_is_used_twice_is_whole() -> None:
    model = Made(lambda m, x: _both(m.conv(x)), conv=conv())
    assert rows(fused(model, image())) == {"conv": (("bias",), "the result is used 2 times")}


def _both(y: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(y), y


@pytest.mark.parametrize("hooked", ["0", "1", "2"])
def test_modules_with_hooks_are_called_as_ever(hooked: str) -> None:
    calls: list[str] = []
    model = ready(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()))
    model.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(hooked))
    new = convplan.fuse(model, policy=QUICK)
    x = image()
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)
    assert calls == [hooked, hooked]
    assert "has hooks" in rows(new)["0"][1]


def test_a_block_with_hooks_is_called_as_ever_and_fused_inside() -> None:
    calls: list[int] = []
    block = nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten())
    model = ready(nn.Sequential(conv(), nn.ReLU(), block))
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    new = convplan.fuse(model, policy=QUICK)
    new(image())
    assert calls == [1]
    assert rows(new) == {"2.0.0": (("bias", "batch norm", "relu"), ""), "0": (("bias", "relu"), "")}
    assert new.fusion_report.untraced == {"2": "has hooks"}


def _own_forward(one: nn.Module) -> nn.Module:
    one.forward = one.forward  # type: ignore[method-assign]
    return one


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(conv()), "has hooks"),
    "spectral": (lambda: nn.utils.parametrizations.spectral_norm(conv()), "no plain parameter"),
    "spectral by hooks": (lambda: nn.utils.spectral_norm(conv()), "has hooks"),
    "circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "pads with 'circular'"),
    "complex": (lambda: nn.Conv2d(4, 4, 3, padding=1, dtype=torch.complex64), "complex64"),
    "own forward": (lambda: _own_forward(conv()), "forward of its own"),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*ComplexHalf.*")
@pytest.mark.parametrize("name", LEFT)
def test_convolutions_that_are_more_than_that_are_left_alone(name: str) -> None:
    make, reason = LEFT[name]
    inside = make()
    model = Made(lambda m, x: F.relu(m.last(F.relu(m.odd(x).abs()))), odd=inside, last=conv()).eval()
    new = convplan.fuse(model, policy=QUICK)
    parts, found = rows(new)["odd"]
    assert parts == ()
    assert reason in found
    assert rows(new)["last"] == (("bias", "relu"), "")
    x = image(dtype=torch.complex64 if name == "complex" else torch.float32)
    torch.testing.assert_close(new(x), model(x))


def test_a_subclass_of_a_convolution_is_traced_into() -> None:
    model = Made(lambda m, x: F.relu(m.odd(x)), odd=Twice(4, 4, 3), last=conv())
    found = fused(model, image())
    x = image()
    torch.testing.assert_close(found(x), model(x))


def test_a_subclass_that_computes_what_convolutions_do_is_one() -> None:
    class Named(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)

    assert rows(fused(nn.Sequential(Named(), nn.BatchNorm2d(4)), image())) == {"0": (("bias", "batch norm"), "")}


def test_weights_that_are_shared_stay() -> None:
    one, two = conv(), conv()
    two.weight = one.weight
    model = nn.Sequential(one, nn.ReLU(), two, nn.BatchNorm2d(4), conv(), nn.ReLU())
    found = rows(fused(model, image()))
    assert found["0"] == found["2"] == ((), "its weight or bias is shared with another module")
    assert found["4"] == (("bias", "relu"), "")


def test_a_convolution_that_is_called_twice_stays() -> None:
    model = Made(lambda m, x: F.relu(m.last(F.relu(m.conv(F.relu(m.conv(x)))))), conv=conv(), last=conv())
    found = rows(fused(model, image()))
    assert found == {"conv": ((), "is called 2 times"), "last": (("bias", "relu"), "")}


def test_a_weight_that_is_read_elsewhere_stays() -> None:
    model = Made(
        lambda m, x: F.relu(m.norm(m.conv(x))) * m.conv.weight.abs().max(), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    assert rows(fused(model, image())) == {"conv": ((), "its weight is read elsewhere")}


def test_a_weight_whose_dtype_is_asked_for_is_folded() -> None:
    model = Made(lambda m, x: m.norm(m.conv(x.to(m.conv.weight.dtype))), conv=conv(), norm=nn.BatchNorm2d(4))
    new = fused(model, image())
    assert rows(new) == {"conv": (("bias", "batch norm"), "")}
    assert new.double()(image()).dtype == torch.float64


def test_a_convolution_of_computed_weights_takes_in_what_follows() -> None:
    model = Made(lambda m, x: F.silu(F.conv2d(x, m.conv.weight / 2, m.conv.bias, padding=1) + x), conv=conv())
    new = fused(model, image())
    (name,) = rows(new)
    assert name.startswith("call of conv2d")
    assert rows(new)[name] == (("bias", "add", "silu"), "")


# --- what cannot be traced


class Branching(nn.Module):
    """Looks at its input, so that nobody can trace it; what it holds can be."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, turned: bool = False) -> Tensor:
        if x.sum() > 1e6 or turned:
            x = -x
        for part in self.parts:
            x = part(x)
        return x


def test_parts_of_what_cannot_be_traced_are_fused() -> None:
    model = ready(Branching(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), conv()))
    new = fused(model, image())
    assert type(new) is Branching
    assert rows(new) == {
        "parts.0.0": (("bias", "batch norm", "relu"), ""),
        "parts.1": (("bias",), "what follows it is not known"),
    }
    assert "with or without 'turned'" in new.fusion_report.untraced[""]
    x = image()
    torch.testing.assert_close(new(x, turned=True), model(x, turned=True), rtol=1e-4, atol=1e-5)


def test_a_part_that_cannot_be_traced_is_called_by_the_graph() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), Branching(nn.Sequential(conv(), nn.SiLU())), conv(), nn.Tanh())
    new = fused(model, image())
    assert {name: parts for name, (parts, _) in rows(new).items()} == {
        "2.parts.0.0": ("bias", "silu"), "0": ("bias", "relu"), "3": ("bias", "tanh"),
    }  # fmt: skip
    assert "2" in new.fusion_report.untraced


class Writes(nn.Module):
    """Keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(conv(), nn.ReLU())
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x):
        self.seen.append(x)
        self.last = self.inside(x)
        return self.last


def test_a_forward_that_keeps_things_goes_on_keeping_them() -> None:
    new = convplan.fuse(nn.Sequential(Writes(), nn.Flatten()).eval(), policy=QUICK)
    assert new.fusion_report.untraced == {"0": "its forward writes to its own attributes"}
    x = image()
    writer = next(one for one in new.modules() if isinstance(one, Writes))
    assert writer.seen == []
    new(x)
    assert writer.seen[0] is x
    assert isinstance(writer.last, Tensor)


def test_a_forward_that_makes_random_numbers_is_no_constant() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(conv(), nn.ReLU())

        def forward(self, x):
            return self.inside(x) + torch.rand(1)

    new = convplan.fuse(Noisy().eval(), policy=QUICK)
    assert "tensors of its own" in new.fusion_report.untraced[""]
    x = image()
    assert not torch.equal(new(x), new(x))


def test_a_part_that_asks_what_it_is_given_is_kept() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(conv(), nn.ReLU())

        def forward(self, x):
            return self.inside(x if isinstance(x, Tensor) else x[0])

    model = Branching(Picky()).eval()
    new = convplan.fuse(model, policy=QUICK)
    assert "asks what kind of thing 'x' is" in new.fusion_report.untraced["parts.0"]
    x = image()
    torch.testing.assert_close(new.parts[0]([x]), new(x))


def test_ordered_dictionaries_come_back_as_such() -> None:
    model = Made(lambda m, x: OrderedDict(out=F.relu(m.conv(x))), conv=conv())
    new = fused(model, image())
    again = torch.load(_saved(new), weights_only=False)
    assert type(new(image())) is type(again(image())) is OrderedDict


# --- between convolutions

POOLS: dict[str, tuple[Callable[[Made, Tensor], Tensor], nn.Module, tuple[int, ...]]] = {
    "module": (lambda m, x: m.pool(x), nn.MaxPool2d(3, 2, padding=1), (2, 4, 9, 7)),
    "module-ceil": (lambda m, x: m.pool(x), nn.MaxPool2d((2, 3), ceil_mode=True), (2, 4, 9, 7)),
    "module-3d": (lambda m, x: m.pool(x), nn.MaxPool3d(2, 1, dilation=(1, 2, 1)), (2, 4, 5, 4, 6)),
    "function": (lambda m, x: F.max_pool2d(x, 2), nn.Identity(), (2, 4, 9, 7)),
    "function-named": (lambda m, x: F.max_pool2d(x, kernel_size=(3, 2), stride=[1, 2]), nn.Identity(), (2, 4, 9, 7)),
    "torch": (lambda m, x: torch.max_pool2d(x, 3, 2, 1, 1, True), nn.Identity(), (2, 4, 9, 7)),
    "function-3d": (lambda m, x: F.max_pool3d(x, (1, 2, 2), padding=(0, 1, 1)), nn.Identity(), (2, 4, 3, 5, 6)),
    "no-batch": (lambda m, x: m.pool(x[0]), nn.MaxPool2d(2), (2, 4, 9, 7)),
}


@pytest.mark.parametrize("name", POOLS)
def test_max_pools_become_one_pass(name: str) -> None:
    run, pool, dims = POOLS[name]
    layer = nn.Conv3d(4, 4, 1) if len(dims) == 5 else conv()
    new = fused(Made(lambda m, x: run(m, m.conv(x)), conv=layer, pool=pool), image(*dims))
    (found,) = [one for one in new.modules() if isinstance(one, Pooled)]
    assert len(found.windows.kernel) == len(dims) - 2
    assert len(new.fusion_report.passes) == 1


JOINS: dict[str, Callable[..., Tensor]] = {
    "list": lambda m, x: torch.cat([m.conv(x), x], 1),
    "tuple": lambda m, x: torch.cat((m.conv(x), x, x), dim=1),
    "negative": lambda m, x: torch.concat([m.conv(x), x], -3),
    "axis": lambda m, x: torch.concatenate(tensors=[m.conv(x), x], axis=1),
    "height": lambda m, x: torch.cat([m.conv(x), x], 2),
    "batch": lambda m, x: torch.cat([m.conv(x), x]),
}


@pytest.mark.parametrize("name", JOINS)
def test_concatenations_become_one_pass(name: str) -> None:
    model, x = Made(JOINS[name], conv=conv()), image()
    new = fused(model, x)
    (found,) = [one for one in new.modules() if isinstance(one, Joined)]
    assert found.dim == {"height": 2, "batch": 0, "negative": -3}.get(name, 1)
    assert len(new.fusion_report.passes) == 1
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        found(x, x[:1, :, :3])


def test_what_is_no_plain_max_pool_or_concatenation_stays() -> None:
    hooked = nn.MaxPool2d(2)
    hooked.register_forward_hook(lambda module, given, result: result + 1)
    made = Made(
        lambda m, x: (
            m.hooked(m.conv(x)), m.indices(x)[0], F.max_pool2d(x, 2, return_indices=True)[0], F.max_pool2d(x, x.dim()),
            torch.cat([x]), F.max_pool1d(x[0], 2), m.average(x),
            torch.cat([x, x], x.dim() - 3),
        ),
        conv=conv(), hooked=hooked, indices=nn.MaxPool2d(2, return_indices=True), average=nn.AvgPool2d(2),
    )  # fmt: skip
    new = fused(made, image())
    assert new.fusion_report.passes == ()
    assert not [one for one in new.modules() if isinstance(one, (Joined, Pooled))]


def test_a_pool_that_is_called_at_several_places_is_replaced_at_each() -> None:
    made = Made(
        lambda m, x: m.fused_pool(m.pool(m.pool(m.conv(x)))),
        conv=conv(), pool=nn.MaxPool2d(2), fused_pool=nn.Softsign(),  # of the name that a new module would have
    )  # fmt: skip
    new = fused(made, image(2, 4, 16, 16))
    assert new.fusion_report.passes == ("pool", "pool")
    assert "by one pass on a GPU: pool, pool" in str(new.fusion_report)
    torch.testing.assert_close(torch.load(_saved(new), weights_only=False)(image()).shape, (2, 4, 2, 1))


def test_gradients_and_transforms_go_through_what_stands_between() -> None:
    made = Made(lambda m, x: torch.cat([m.pool(m.conv(x)), m.pool(x)], 1), conv=conv(), pool=nn.MaxPool2d(2))
    model = ready(made)
    new, x = convplan.fuse(model, policy=QUICK), image().requires_grad_()
    (found,), (right,) = torch.autograd.grad(new(x).square().sum(), x), torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    several = torch.randn(3, 2, 4, 9, 7)
    torch.testing.assert_close(torch.vmap(new)(several), torch.vmap(model)(several), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("graded", [False, True])
def test_a_trace_of_torchs_holds_torchs_operators(graded: bool) -> None:
    made = Made(
        lambda m, x: m.up(torch.cat([m.pool(F.relu(m.conv(x) + x)), m.pool(x)], 1)),
        conv=conv(), pool=nn.MaxPool2d(2), up=nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, dilation=2),
    )  # fmt: skip
    model, x = ready(made), image()
    new = convplan.fuse(model, policy=QUICK)
    with torch.set_grad_enabled(graded):
        for _ in range(2):  # the second call is known by now
            new(x)
        traced = torch.jit.trace(new, x)
        held = {node.kind() for node in traced.inlined_graph.nodes()}
        assert {"aten::_convolution", "aten::relu", "aten::add", "aten::max_pool2d", "aten::cat"} <= held
        other = image(3, 4, 16, 12)
        torch.testing.assert_close(traced(other), model(other), rtol=1e-4, atol=1e-4)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "training": (lambda: nn.Sequential(conv()), r"training mode.*model\.eval\(\)"),
    "untraceable": (lambda: Branching(conv()).eval(), r"Branching cannot be fused.*'turned'.*torch\.compile"),
    "uncopyable": (lambda: Made(lambda m, x: x, conv=conv(), lock=__import__("threading").Lock()).eval(), "be copied"),
    "script": (lambda: torch.jit.trace(conv().eval(), image()), "ScriptModule"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fused_is_refused_with_what_to_do(name: str) -> None:
    make, told = REFUSED[name]
    with pytest.raises(FuseError, match=told):
        convplan.fuse(make())


def test_arguments_of_the_wrong_kind_are_named() -> None:
    with pytest.raises(SpecError, match=r"model is list, expected a torch\.nn\.Module"):
        convplan.fuse([conv()])  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="example_inputs is None"):
        convplan.fuse(conv().eval(), strict=True)
    with pytest.raises(SpecError, match="example_inputs is int"):
        convplan.fuse(conv().eval(), 3)  # type: ignore[arg-type]
    with pytest.raises(convplan.PolicyError):
        convplan.fuse(conv().eval(), policy=Policy(engines=("warp",)))


def test_a_model_without_convolutions_comes_back_as_it_was() -> None:
    new = convplan.fuse(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval())
    assert new.fusion_report.rows == ()
    assert new(torch.ones(1, 3)).shape == (1, 3)


# --- the new model


def _saved(model: nn.Module) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return stream


def block() -> nn.Module:
    return ready(
        Made(_residual, one=nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()), two=conv(), norm=nn.BatchNorm2d(4))
    )


def _residual(m: Any, x: Tensor) -> Tensor:
    return F.relu(m.norm(m.two(m.one(x))) + x)


def test_the_new_model_can_be_copied_pickled_and_its_state_loaded() -> None:
    model, x = block(), image()
    new = convplan.fuse(model, x, policy=QUICK)
    y = new(x)
    again = torch.load(_saved(new), weights_only=False)
    for other in (copy.deepcopy(new), again, copy.deepcopy(again)):
        assert torch.equal(other(x), y)
        assert other.fusion_report == new.fusion_report
        assert not any(one.training for one in other.modules())
    blank = copy.deepcopy(new)
    for one in blank.parameters():
        nn.init.zeros_(one)
    blank.load_state_dict(new.state_dict())
    assert torch.equal(blank(x), y)


def test_the_new_model_moves_to_other_dtypes_and_layouts_and_the_callers_does_not() -> None:
    model, x = block(), image()
    new = convplan.fuse(model, policy=QUICK)
    y = model(x)
    torch.testing.assert_close(new.to(torch.float64)(x.double()).float(), y, rtol=1e-4, atol=1e-5)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    last = new.float().to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, rtol=1e-4, atol=1e-5)
    assert model.two.weight.is_contiguous()


def test_parameters_that_nothing_is_folded_into_share_memory() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(252, 2)).eval()
    new = convplan.fuse(model, policy=QUICK).state_dict()
    old = model.state_dict()
    shared = {name for name in old if name in new and old[name].data_ptr() == new[name].data_ptr()}
    assert shared == {"0.weight", "0.bias", "5.weight", "5.bias"}


def test_under_autocast_the_new_model_computes_in_its_dtype() -> None:
    model, x = block(), image()
    new = convplan.fuse(model, policy=QUICK)
    with torch.autocast("cpu", torch.bfloat16):
        mine, torchs = new(x), model(x)
    assert mine.dtype == torchs.dtype
    torch.testing.assert_close(mine.float(), torchs.float(), rtol=0.1, atol=0.1)


def test_gradients_go_through_the_new_model() -> None:
    new = convplan.fuse(block(), policy=QUICK).double()
    x = image(1, 4, 4, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(new, x)


def test_sizes_that_vary_and_inputs_without_a_batch_are_taken() -> None:
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.Tanh()).eval()
    new = convplan.fuse(model, policy=QUICK)
    for dims in ((1, 4, 5, 5), (3, 4, 8, 6), (4, 6, 6)):
        x = image(*dims)
        torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_report_is_a_table_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.MaxPool2d(2)).eval()
    with caplog.at_level(logging.INFO, "convplan.fuse"):
        new = convplan.fuse(model, policy=QUICK)
    lines = [line.split() for line in str(new.fusion_report).splitlines()]
    assert lines[0] == ["convolution", "fused", "and", "then"]
    assert lines[1] == ["0", "bias", "+", "batch", "norm", "+", "relu", "-"]
    assert lines[2] == ["3", "bias", "then", "MaxPool2d", "4"]
    assert new.fusion_report.counts == {"bias": 2, "batch norm": 1, "relu": 1}
    assert caplog.messages == ["fused Sequential: 2 x bias, 1 x batch norm, 1 x relu"]


def test_strict_says_where_and_how_much_outputs_differ() -> None:
    class Later(nn.Module):
        """Computes something else the second time."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(conv(), nn.ReLU())

        def forward(self, x, twice=False):
            y = self.inside(x)
            y[0, 1, 2, 3] += 100.0 * isinstance(self.inside, torch.fx.GraphModule)
            return {"y": y}

    with pytest.raises(FuseError, match=r"output\['y'\] differs by 100 at \(0, 1, 2, 3\).*expected at most 0.001"):
        convplan.fuse(Later().eval(), image(), strict=True, policy=QUICK)

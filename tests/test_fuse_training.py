"""`fuse_training(model)`: values, gradients and running statistics are the model's, and the model's ways still work.

On the CPU fused calls leave batch norms to torch. Here most of them do not: the operation that runs on a GPU is made to
run on the CPU too, by the same plans and by the kernels' composed form. Half of the tests are in float64, where the
difference from the model may be nothing but the order of sums.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import convplan
from convplan import FuseError, Policy, PolicyError, SpecError
from convplan.torch_ops import normalized_call
from convplan.torch_ops.normalized import Normalized

QUICK = Policy(effort="instant", engines=("aten",))
Tensor = torch.Tensor
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["operation", "apart"])
def everywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the operation runs on the CPU as it does on a GPU."""
    if request.param:
        monkeypatch.setitem(normalized_call.TAKEN, "cpu", FLOATS)
    return bool(request.param)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operation runs on the CPU; what each run of it adds and ends with."""
    monkeypatch.setitem(normalized_call.TAKEN, "cpu", FLOATS)
    seen: list[str] = []
    forward = Normalized.forward

    def noted(ctx: Any, step: Any, *rest: Any) -> Tensor:
        seen.append(f"{'conv ' if rest[1] is not None else ''}{'add ' if step.adds else ''}{step.activation.name}")
        return forward(ctx, step, *rest)

    monkeypatch.setattr(Normalized, "forward", staticmethod(noted))
    return seen


class Made(nn.Module):
    """Some modules and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class Bottleneck(nn.Module):
    """As in a ResNet, of modules that write in place."""

    def __init__(self, channels: int = 8, wide: int = 16, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(wide, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Inverted(nn.Module):
    """As in MobileNetV2 or EfficientNet: expand, depthwise, project, and a sum without activation."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(4, 12, 1, bias=False), nn.BatchNorm2d(12), activation,
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), activation,
            nn.Conv2d(12, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=0.3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Dense(nn.Module):
    """As in DenseNet: norms before convolutions, and results that are used more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm3, self.relu = nn.BatchNorm2d(10), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.norm2(self.conv1(self.relu(self.norm1(x))))))
        y = F.dropout(y, p=0.3, training=self.training)
        return self.relu(self.norm3(torch.cat([x, y], 1)))


class UNet3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.LeakyReLU(0.1))
        self.low = nn.Sequential(nn.Conv3d(4, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ELU())
        self.up, self.norm = nn.ConvTranspose3d(8, 4, 2, 2), nn.BatchNorm3d(4)
        self.last = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        return self.last(torch.cat([first, F.gelu(self.norm(self.up(self.low(first))))], 1))


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 5, 3, padding="same", dilation=2), nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).tanh()


def sequence(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "bottleneck": (
        lambda: sequence(Bottleneck(), Bottleneck(stride=2)), (3, 16, 6, 5),
        {"convolution": 7, "add": 2, "relu": 6},
    ),
    "mobilenet": (lambda: Inverted(nn.ReLU6(inplace=True)), (2, 4, 5, 6), {"convolution": 3, "hardtanh": 2, "add": 1}),
    "efficientnet": (lambda: Inverted(nn.SiLU(inplace=True)), (2, 4, 5, 6), {"convolution": 3, "silu": 2, "add": 1}),
    "densenet": (Dense, (2, 6, 5, 4), {"relu": 3, "convolution": 1}),
    "u-net-3d": (UNet3d, (2, 2, 4, 4, 6), {"convolution": 3, "leaky_relu": 1, "elu": 1, "gelu": 1}),
    "line": (Line, (2, 3, 9), {"convolution": 1, "tanh": 1}),
    "no-running-statistics": (
        lambda: sequence(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Hardswish()),
        (2, 3, 5, 5), {"convolution": 1, "hardswish": 1},
    ),
    "silu-after-sum": (
        lambda: Made(lambda m, x: F.silu(m.norm(m.conv(x)) + x), conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)),
        (2, 3, 5, 5), {"convolution": 1, "add": 1, "silu": 1},
    ),
}  # fmt: skip


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the same one fused, with parameters of its own, and an input."""
    torch.manual_seed(1)
    make, dims, _ = MODELS[name]
    model = make().to(dtype)
    for one in model.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.affine:
            nn.init.uniform_(one.weight, -1.0, 1.5)
            nn.init.uniform_(one.bias, -0.5, 0.5)
    return model, convplan.fuse_training(copy.deepcopy(model), policy=QUICK), torch.randn(dims, dtype=dtype)


def step(model: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """Everything that one step leaves behind."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y.float() if y.dtype.itemsize < 4 else y).square().mean().backward()
    found = {"y": y.detach(), "x": x.grad}
    found |= {f"gradient of {name}": one.grad for name, one in model.named_parameters()}
    found |= {name: one.clone() for name, one in model.named_buffers()}
    return {key: value for key, value in found.items() if value is not None}


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor], close: float = 1e-9) -> None:
    assert found.keys() == right.keys()
    for key, value in right.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        torch.testing.assert_close(
            found[key].double(), value.double(), rtol=close, atol=close, msg=lambda text, key=key: f"{key}: {text}"
        )


# --- what is computed


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_models(name: str, layout: torch.memory_format, everywhere: bool) -> None:
    model, fused, x = pair(name)
    counts = fused.fusion_report.counts
    assert {part: counts.get(part) for part in MODELS[name][2]} == MODELS[name][2], str(fused.fusion_report)
    if layout is torch.channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=layout)
    for training in (True, True, False, True):
        model.train(training)
        fused.train(training)
        assert_same(step(fused, x), step(model, x))
    model.eval()
    fused.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["bottleneck", "efficientnet", "densenet", "silu-after-sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_nearly_the_models_in_fewer_digits(name: str, dtype: torch.dtype, everywhere: bool) -> None:
    model, fused, x = pair(name, torch.float32)
    right = step(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        found, stock = step(fused, x), step(model, x)
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in stock.items()}
    least = 1e-5 if dtype == torch.float32 else 2e-2
    for key, value in right.items():
        size, off, allowed = (float(one.double().norm()) for one in (value, found[key] - value, stock[key] - value))
        assert off <= 1.5 * allowed + least * size + 1e-6, (key, off, allowed, size)


def test_all_of_a_bottleneck_is_the_operations(runs: list[str]) -> None:
    _, fused, x = pair("bottleneck")
    fused(x)
    block = ["conv relu", "conv relu"]
    assert runs == [*block, "conv add relu", *block, "conv none", "conv add relu"]


def test_plans_write_the_statistics_of_channels_last_results_along(runs: list[str]) -> None:
    model, fused, x = pair("bottleneck", torch.float32)
    right = step(copy.deepcopy(model).double(), x.double())
    for one in (model, fused):
        one.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = step(model, x)
        with convplan.capture() as seen:
            found = step(fused, x)
    asked = [problem.epilogue.statistics for problem in seen if problem.op == "fprop"]
    assert asked
    assert all(asked)
    for key, value in right.items():
        size, off, allowed = (float(one.double().norm()) for one in (value, found[key] - value, stock[key] - value))
        assert off <= 1.5 * allowed + 2e-2 * size + 1e-6, (key, off, allowed, size)


@pytest.mark.parametrize("name", ["bottleneck", "efficientnet", "silu-after-sum", "no-running-statistics"])
def test_gradients_of_both_orders_are_right(name: str, everywhere: bool) -> None:
    _, fused, x = pair(name)
    x = x[:2, :, :3, :3].clone().requires_grad_()
    parameters = [one for one in fused.parameters() if one.requires_grad][:5]
    names = [key for key, one in fused.named_parameters() if any(one is other for other in parameters)]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        for key, value in zip(names, values, strict=True):
            owner, _, last = key.rpartition(".")
            fused.get_submodule(owner)._parameters[last] = value
        return fused(x)

    given = (x, *(one.detach().clone().requires_grad_() for one in parameters))
    assert torch.autograd.gradcheck(run, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, given, fast_mode=True, atol=1e-4)


def _small(**settings: Any) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, **settings), nn.ReLU())


def test_gradients_of_second_order_under_autocast_are_the_models(runs: list[str]) -> None:
    model = _small()
    fused, x = convplan.fuse_training(model, policy=QUICK), torch.randn(3, 4, 6, 6, requires_grad=True)
    found = []
    for one in (fused, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = one(x).float().square().mean()
        leaves = [x, model[0].weight, model[1].weight]
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        assert [one.dtype for one in first] == [torch.float32] * 3
        second = torch.autograd.grad(sum(one.square().sum() for one in first), leaves)
        found.append([*first, *second])
    assert len(runs) == 1
    for mine, stock in zip(*found, strict=True):
        assert (mine - stock).norm() <= 3e-2 * stock.norm()


def test_a_weight_that_is_not_what_it_was_is_told(runs: list[str]) -> None:
    model = _small()
    fused, x = convplan.fuse_training(model, policy=QUICK), torch.randn(3, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused(x).float().square().mean()
    with torch.no_grad():
        model[0].weight.mul_(2)
    torch.autograd.grad(loss, x, retain_graph=True)  # which needs only its cast, as in torch
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_weights_that_were_made_in_inference_mode_are_cast_too(runs: list[str]) -> None:
    with torch.inference_mode():
        model = _small()
        fused = convplan.fuse_training(model, policy=QUICK)
        x = torch.randn(3, 4, 6, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(fused(x), model(x), rtol=2e-2, atol=2e-2)
    assert runs


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_batches_are_counted_once_however_they_are_counted(dtype: torch.dtype, everywhere: bool) -> None:
    model = _small()
    model[1].num_batches_tracked = torch.tensor(7, dtype=dtype)
    fused = convplan.fuse_training(model, policy=QUICK)
    for _ in range(3):
        fused(torch.randn(3, 4, 6, 6))
    assert model[1].num_batches_tracked.item() == 10
    assert model[1].num_batches_tracked.dtype == dtype


def test_a_tensor_that_outlived_its_transform_is_looked_through(runs: list[str]) -> None:
    fused = convplan.fuse_training(_small(), policy=QUICK)
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(torch.randn(3, 4, 6, 6))
    right = fused(kept[0] + 0)
    torch.testing.assert_close(fused(kept[0]), right)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(x)) + other)

    added, x = convplan.fuse_training(Sum(), policy=QUICK), torch.randn(3, 4, 6, 6)
    right = added(x, kept[0] + 0)
    torch.testing.assert_close(added(x, kept[0]), right)
    assert runs[-1] == "conv add relu"


def test_what_ran_a_step_before_is_asked_again_under_another_policy(runs: list[str]) -> None:
    fused = convplan.fuse_training(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    x = torch.randn(3, 4, 8, 8, requires_grad=True)

    def step() -> dict[str, int]:
        convplan.stats(reset=True)
        fused(x).square().mean().backward()
        return convplan.stats()

    with convplan.enabled(QUICK):
        step()
        again = step()
    assert (again["misses"], again["hits"]) == (0, 3)
    with convplan.enabled(QUICK.replace(deterministic=True)):
        assert step()["misses"] == 3
        assert step()["misses"] == 0
    assert len(runs) == 4


def test_an_optimizer_comes_to_the_same_parameters(everywhere: bool) -> None:
    model, fused, x = pair("bottleneck")
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9) for one in (model, fused)]
    for seed in range(4):
        for one, optimizer in zip((model, fused), optimizers, strict=True):
            step(one, x * (1 + seed))
            optimizer.step()
    assert_same(dict(fused.state_dict()), dict(model.state_dict()), 1e-7)


def test_a_sum_of_another_kind_is_computed_apart(runs: list[str]) -> None:
    parts = {"conv": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4), "beside": nn.Parameter(torch.randn(4, 1, 1))}
    model = Made(lambda m, x: torch.relu(m.norm(m.conv(x)) + m.beside), **parts).double()
    fused = convplan.fuse_training(copy.deepcopy(model), policy=QUICK)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert_same(step(fused, x), step(model, x))
    assert runs == ["conv none"]


def test_what_is_written_to_in_place_is_seen_as_in_the_model(everywhere: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        start = x * 2
        y = m.norm(m.conv(start))
        start += 1  # after the convolution read it
        z = m.other(m.conv(start))
        start += z  # the sum is written to what is used again
        return torch.relu(y) + torch.relu(start)

    parts = {"conv": nn.Conv2d(4, 4, 1), "norm": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4)}
    model = Made(run, **parts).double().requires_grad_(False)
    fused = convplan.fuse_training(copy.deepcopy(model), policy=QUICK)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


def test_one_value_for_a_channel_is_torchs_error(everywhere: bool) -> None:
    _, fused, _ = pair("no-running-statistics")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused(torch.randn(1, 3, 3, 3, dtype=torch.float64))


# --- what is fused


def test_what_is_left_alone_and_why() -> None:
    class Own(nn.BatchNorm2d):
        pass

    hooked = nn.BatchNorm2d(4)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4),
        nn.Conv2d(4, 4, 1), hooked, Own(4), nn.Conv2d(4, 4, 1, padding_mode="circular"), nn.BatchNorm2d(4), nn.Mish(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), nn.ReLU(),
    )  # fmt: skip
    told = {row.name: (row.parts, row.ended) for row in convplan.fuse_training(model).fusion_report.rows}
    assert told["1"] == ((), "its momentum is None: a cumulative average is kept")
    assert told["3"] == ((), "is a SyncBatchNorm, which computes something else")
    assert told["5"] == ((), "has hooks")
    assert told["6"] == ((), "is a Own, which computes something else")
    assert told["8"] == ((), "7: pads with 'circular'; then Mish 9")
    assert told["11"][0] == ("relu",)
    assert told["11"][1].startswith("10: ")


def test_a_convolution_whose_result_is_used_twice_stays() -> None:
    model = Made(lambda m, x: torch.relu(m.norm(y := m.conv(x))) * y, conv=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3))
    fused = convplan.fuse_training(model)
    (row,) = fused.fusion_report.rows
    assert str(fused.fusion_report).split()[:2] == ["batch", "norm"]
    assert row == ("norm", ("relu",), "conv: its result is used 2 times")


def test_a_model_without_batch_norms_comes_back_with_an_empty_report() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3))
    fused = convplan.fuse_training(model)
    assert fused.fusion_report.rows == ()
    assert fused.fusion_report.counts == {}
    torch.testing.assert_close(fused(torch.ones(1, 3, 2, 2)), model(torch.ones(1, 3, 2, 2)))


def test_a_norm_that_nothing_is_around_is_named_once() -> None:
    report = convplan.fuse_training(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.MaxPool2d(2))).fusion_report
    assert report.rows == (("1", (), "then MaxPool2d 2"),)


def test_modules_that_look_at_their_mode_follow_it() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y + 100 if self.training else y

    fused = convplan.fuse_training(nn.Sequential(Looks(), nn.Dropout(0.0)).eval())
    x = torch.randn(2, 3, 4, 4)
    assert fused(x).max() < 50
    assert fused.train()(x).min() > 50
    assert "0" in fused.fusion_report.untraced
    assert fused.fusion_report.counts == {"convolution": 1, "relu": 1}


def test_bad_arguments_are_refused() -> None:
    _, fused, _ = pair("line")
    for wrong, text in (
        (fused, "fused for training already"),
        (torch.compile(nn.ReLU(), backend="eager"), "is compiled"),
    ):
        with pytest.raises(FuseError, match=text):
            convplan.fuse_training(wrong)
    with pytest.raises(SpecError, match=r"expected a torch\.nn\.Module"):
        convplan.fuse_training(3)  # type: ignore[arg-type]
    with pytest.raises(PolicyError):
        convplan.fuse_training(nn.ReLU(), policy=Policy(engines=("nothing-of-this-name",)))


# --- the model's ways


def test_parameters_and_buffers_are_the_models_own() -> None:
    model = MODELS["bottleneck"][0]().eval()
    fused = convplan.fuse_training(model)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    mine, other = fused.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert mine.keys() == other.keys()
    assert all(mine[key] is other[key] for key in other)
    assert not any(one.training for one in fused.modules())
    assert all(one.training for one in fused.train().modules())
    assert not any(one.training for one in model.modules())
    assert "forward" not in vars(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("name", ["bottleneck", "densenet", "u-net-3d"])
def test_copies_compute_the_same_with_their_own_parameters(name: str, how: str, runs: list[str]) -> None:
    _, fused, x = pair(name)
    if how == "save":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
    assert other.fusion_report == fused.fusion_report
    right = step(fused, x)
    for one in fused.parameters():
        one.data.zero_()
    before = len(runs)
    assert_same(step(other, x), right)
    assert len(runs) == 2 * before > 0


def test_state_goes_there_and_back() -> None:
    model, fused, x = pair("bottleneck")
    step(fused, x)
    model.load_state_dict(fused.state_dict())
    fused.load_state_dict(model.state_dict())
    assert_same(step(fused, x), step(model, x))


def test_checkpointing_computes_the_same(everywhere: bool) -> None:
    model, fused, x = pair("bottleneck")

    class Kept(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    assert_same(step(Kept(fused), x), step(Kept(model), x))


def test_hooks_and_modules_that_come_later_are_heeded(runs: list[str]) -> None:
    _, fused, x = pair("no-running-statistics")
    called: list[str] = []
    handle = fused[1].register_forward_hook(lambda *_: called.append("norm"))
    fused(x)
    assert (called, runs) == (["norm"], [])
    handle.remove()
    fused[1] = nn.InstanceNorm2d(4).double()
    expected = F.hardswish(fused[1](fused[0](x)))
    torch.testing.assert_close(fused(x), expected)
    assert runs == []


def test_a_frozen_norm_in_a_model_that_trains_keeps_its_statistics(everywhere: bool) -> None:
    model, fused, x = pair("bottleneck")
    for one in (model, fused):
        one[0].bn2.eval()
        one[0].bn1.requires_grad_(False)
    assert_same(step(fused, x), step(model, x))
    assert fused[0].bn2.num_batches_tracked == 0


def test_a_norm_that_switches_a_channel_off_is_computed_in_eval_mode(everywhere: bool) -> None:
    model, fused, x = pair("bottleneck")
    for one in (model.eval(), fused.eval()):
        nn.init.zeros_(one[0].bn3.weight)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


def test_transforms_and_compilers_see_the_modules(runs: list[str]) -> None:
    model, fused, x = pair("bottleneck", torch.float32)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.eval()
    fused.eval()  # torch lets no transform write to running statistics
    parameters = {key: value.detach() for key, value in fused.named_parameters()}
    buffers = {key: value.clone() for key, value in fused.named_buffers()}

    def loss(which: nn.Module, values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(which, (values, buffers), (x,)).square().mean()

    found = torch.func.grad(lambda values: loss(fused, values))(parameters)
    right = torch.func.grad(lambda values: loss(model, values))(parameters)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    batches = torch.stack([x, x + 1])
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(fused)(batches), torch.vmap(model)(batches), rtol=1e-4, atol=1e-4)
    assert runs == []

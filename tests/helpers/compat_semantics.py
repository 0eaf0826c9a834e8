"""What a convolution takes and gives: dtypes, layouts, sizes, faults, modules, and tensors that are not plain ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from helpers.compat import BF16, F16, F32, F64, Case, Place, Tensor
from helpers.compat_autograd import weights

FUNCTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def given(on: Place, function: str, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias that fit the function: 4 channels in, 6 out, or as many as said."""
    spatial = int(function[-2])
    transposed = "transpose" in function
    x = on.randn(2, channels, *(7, 6, 5)[:spatial])
    w = on.randn(*((channels, 6) if transposed else (6, channels)), *(3, 2, 3)[:spatial], seed=1)
    return x, w, on.randn(6, seed=2)


def with_gradients(on: Place, function: str, x: Tensor, w: Tensor, bias: Tensor | None = None, **arguments: Any) -> Any:
    """The result and all gradients of one call."""
    leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, w, bias) if t is not None]
    y = getattr(F, function)(*leaves, **arguments)
    return y, torch.autograd.grad(y, leaves, weights(y))


# --- layouts


def channels_last(t: Tensor) -> Tensor:
    """Channels innermost, for tensors of any rank."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def overlapping(t: Tensor) -> Tensor:
    """A view whose rows share elements, as a sliding window does."""
    flat = t.flatten()[: t.shape[-1] + sum(size - 1 for size in t.shape)]
    return flat.as_strided(t.shape, (*[1] * (t.dim() - 1), 1))


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels-last": channels_last,
    "expanded-batch": lambda t: t[:1].expand_as(t),
    "expanded-channels": lambda t: t[:, :1].expand_as(t),
    "expanded-all": lambda t: t.flatten()[1].expand(t.shape),
    "overlapping": overlapping,
    "reversed-strides": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "slice": lambda t: torch.cat([t, t], -1)[..., 1 : 1 + t.shape[-1]],
    "every-other": lambda t: torch.stack([t, t], -1)[..., 0],
    "negated": lambda t: torch._neg_view(t),
    "imaginary-of-conjugate": lambda t: torch.complex(t.float(), t.float()).conj().imag.to(t.dtype),
    "flipped": lambda t: t.flip(-1),
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "odd-strides-of-one": lambda t: t[:1].as_strided((1, *t.shape[1:]), (3, *t.stride()[1:])),
    "channel-slice": lambda t: channels_last(torch.cat([t, t], 1))[:, : t.shape[1]],
}
WEIGHT_FORMS = ("channels-last", "expanded-all", "overlapping", "every-other", "negated", "reversed-strides")


def in_form(function: str, x_form: str, w_form: str, on: Place) -> Any:
    x, w, bias = given(on, function)
    return with_gradients(on, function, FORMS[x_form](x), FORMS[w_form](w), bias, padding=1)


def one_by_one(x_form: str, w_form: str, on: Place) -> Any:
    x, w = FORMS[x_form](on.randn(2, 4, 5, 6)), FORMS[w_form](on.randn(6, 4, 1, 1))
    return with_gradients(on, "conv2d", x, w)


def depthwise(x_form: str, w_form: str, on: Place) -> Any:
    x, w = FORMS[x_form](on.randn(2, 4, 5, 6)), FORMS[w_form](on.randn(8, 1, 3, 3))
    return with_gradients(on, "conv2d", x, w, groups=4, padding=1)


def with_bias(function: str, form: Callable[[Tensor], Tensor], how: str, on: Place) -> Any:
    x, w, bias = given(on, function)
    bias = form(bias)
    run = getattr(F, function)
    if how == "keyword":
        return run(x, w, bias=bias, padding=1)
    return run(x, w, bias, 2, 1)


BIASES: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda b: b,
    "every-other": lambda b: torch.stack([b, b], -1)[:, 0],
    "expanded": lambda b: b[:1].expand(6),
    "negated": lambda b: torch._neg_view(b),
    "unaligned": lambda b: torch.cat([b[:1], b])[1:],
    "none": lambda b: None,
    "parameter": lambda b: nn.Parameter(b.clone()),
    "zero-dimensional": lambda b: b[0],
    "two-dimensional": lambda b: b[:, None],
    "short": lambda b: b[:5],
    "empty": lambda b: b[:0],
    "double": lambda b: b.double(),
    "half": lambda b: b.half(),
    "integer": lambda b: b.long(),
    "number": lambda b: 1.0,
}

LAYOUTS = [
    *(
        Case(f"{function}-{x_form}-{w_form}", partial(in_form, function, x_form, w_form), (F32,))
        for function in ("conv1d", "conv2d", "conv3d", "conv_transpose2d")
        for x_form, w_form in [*((form, "contiguous") for form in FORMS), *(("contiguous", w) for w in WEIGHT_FORMS)]
    ),
    *(
        Case(
            f"{run.__name__}-{x_form}-{w_form}",
            partial(run, x_form, w_form),
            (F32, F64, BF16, F16),
            weight_gradients=(2,),
        )
        for run in (one_by_one, depthwise)
        for x_form, w_form in itertools.product(
            ("contiguous", "channels-last", "expanded-all", "overlapping", "channel-slice"),
            ("contiguous", "channels-last", "expanded-all"),
        )
    ),
    *(
        Case(f"{function}-cl-{x_form}-{w_form}", partial(in_form, function, x_form, w_form), (F64, BF16, F16))
        for function in ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d")
        for x_form, w_form in itertools.product(("contiguous", "channels-last"), repeat=2)
    ),
    *(
        Case(f"bias-{name}-{how}-{function}", partial(with_bias, function, form, how), planned=None)
        for name, form in BIASES.items()
        for how in ("keyword", "position")
        for function in ("conv1d", "conv2d", "conv_transpose2d")
    ),
]


# --- dtypes


DTYPES = {
    "f64": F64, "f32": F32, "f16": F16, "bf16": BF16, "c64": torch.complex64, "c128": torch.complex128,
    "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


def mixed(function: str, dtypes: tuple[torch.dtype, ...], on: Place) -> Any:
    """The numbers -2 to 2, which all but the unsigned dtypes hold."""
    tensors = [
        (torch.arange(t.numel()).reshape(t.shape) % 5 - 2).to(on.device).to(dtype)
        for t, dtype in zip(given(on, function), dtypes, strict=False)
    ]
    return getattr(F, function)(*tensors)


def complex_numbers(function: str, grad: bool, on: Place) -> Any:
    x, w, bias = (torch.complex(t, t.flip(0)) for t in given(on, function))
    return with_gradients(on, function, x, w, bias) if grad else getattr(F, function)(x.conj(), w, bias.conj())


TYPES = [
    *(
        Case(f"{function}-{x}-{w}", partial(mixed, function, (DTYPES[x], DTYPES[w])), planned=None)
        for function in ("conv2d", "conv_transpose2d")
        for x, w in itertools.product(DTYPES, repeat=2)
    ),
    *(
        Case(f"conv1d-{x}-{x}-{b}", partial(mixed, "conv1d", (DTYPES[x], DTYPES[x], DTYPES[b])), planned=None)
        for x, b in itertools.product(("f64", "f32", "bf16", "c64", "i64"), DTYPES)
    ),
    *(
        Case(f"complex-{function}{'-grad' * grad}", partial(complex_numbers, function, grad), planned=None)
        for function in FUNCTIONS
        for grad in (False, True)
    ),
]


# --- sizes


EMPTY: dict[str, tuple[int, ...]] = {  # batch, channels, filters, size, taps
    "no-samples": (0, 4, 6, 7, 3),
    "no-channels": (2, 0, 6, 7, 3),
    "no-filters": (2, 4, 0, 7, 3),
    "no-pixels": (2, 4, 6, 0, 1),
    "no-taps": (2, 4, 6, 7, 0),
    "no-samples-no-channels": (0, 0, 6, 7, 3),
    "one-of-each": (1, 1, 1, 1, 1),
    "too-small": (2, 4, 6, 2, 3),
    "no-samples-too-small": (0, 4, 6, 2, 3),
}


def sized(function: str, sizes: tuple[int, ...], batched: bool, on: Place) -> Any:
    samples, channels, filters, size, taps = sizes
    spatial = int(function[-2])
    x = on.randn(*([samples] if batched else []), channels, *[size] * spatial)
    w = on.randn(*((channels, filters) if "transpose" in function else (filters, channels)), *[taps] * spatial)
    return with_gradients(on, function, x, w, on.randn(filters))


def unbatched(function: str, on: Place) -> Any:
    x, w, bias = given(on, function)
    y, grads = with_gradients(on, function, channels_last(x)[1], w, bias, stride=2)
    return y, grads, getattr(F, function)(x[0], w)


SIZES = [
    *(
        Case(f"{name}-{function}{'' if batched else '-no-batch'}", partial(sized, function, sizes, batched),
             planned=None if name in ("no-pixels", "no-taps", "too-small", "one-of-each") else False)
        for name, sizes in EMPTY.items()
        for function in FUNCTIONS
        for batched in (True, False)
        if batched or sizes[0]
    ),
    *(Case(f"no-batch-{function}", partial(unbatched, function), (F32, BF16)) for function in FUNCTIONS),
]  # fmt: skip


# --- faults


FAULTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Any, ...] | dict[str, Any]]] = {
    "channels": lambda x, w, b: (x[:, :3], w, b),
    "channels-of-weight": lambda x, w, b: (x, w[:, :3], b),
    "filters": lambda x, w, b: (x, w[:5], b),
    "rank-of-input": lambda x, w, b: (x[None, None], w, b),
    "rank-of-input-low": lambda x, w, b: (x[0, 0], w, b),
    "rank-of-weight": lambda x, w, b: (x, w[0], b),
    "zero-dimensional": lambda x, w, b: (x.sum(), w, b),
    "weight-elsewhere": lambda x, w, b: (x, w.cpu(), b),
    "input-elsewhere": lambda x, w, b: (x.cpu(), w, b),
    "bias-elsewhere": lambda x, w, b: (x, w, b.cpu()),
    "sparse-weight": lambda x, w, b: (x, w.to_sparse(), b),
    "none": lambda x, w, b: (None, w, b),
    "number": lambda x, w, b: (x, 3.0, b),
    "stride-zero": lambda x, w, b: {"stride": 0},
    "stride-negative": lambda x, w, b: {"stride": -1},
    "stride-entries": lambda x, w, b: {"stride": (1, 1, 1, 1)},
    "stride-empty": lambda x, w, b: {"stride": ()},
    "stride-float": lambda x, w, b: {"stride": 1.5},
    "padding-negative": lambda x, w, b: {"padding": -1},
    "padding-entries": lambda x, w, b: {"padding": (1, 1, 1, 1)},
    "padding-word": lambda x, w, b: {"padding": "full"},
    "padding-same": lambda x, w, b: {"padding": "same"},
    "padding-same-strided": lambda x, w, b: {"padding": "same", "stride": 2},
    "dilation-zero": lambda x, w, b: {"dilation": 0},
    "dilation-large": lambda x, w, b: {"dilation": 9},
    "dilation-entries": lambda x, w, b: {"dilation": (1, 1, 1, 1)},
    "groups-zero": lambda x, w, b: {"groups": 0},
    "groups-negative": lambda x, w, b: {"groups": -1},
    "groups-that-do-not-divide": lambda x, w, b: {"groups": 3},
    "groups-float": lambda x, w, b: {"groups": 1.0},
    "output-padding": lambda x, w, b: {"output_padding": 1},
    "output-padding-negative": lambda x, w, b: {"output_padding": -1},
    "unknown-argument": lambda x, w, b: {"colour": 1},
    "huge-padding": lambda x, w, b: {"padding": 2**62},
    "huge-stride": lambda x, w, b: {"stride": 2**40},
    "numbers-too-large": lambda x, w, b: {"stride": 2**70},
}


def faulty(function: str, fault: str, on: Place) -> Any:
    tensors = given(on, function)
    changed = FAULTS[fault](*tensors)
    if isinstance(changed, dict):
        return getattr(F, function)(*tensors, **changed)
    return getattr(F, function)(*changed)


def faulty_after_a_good_call(function: str, fault: str, on: Place) -> Any:
    """The good call is known by then, and differs in the device of one tensor alone."""
    tensors = given(on, function)
    for _ in range(3):
        getattr(F, function)(*tensors)
    getattr(F, function)(*FAULTS[fault](*tensors))


def wrong_gradient(how: str, on: Place) -> Any:
    x, w, bias = given(on, "conv2d")
    y = F.conv2d(x, w.requires_grad_(), bias)
    right = y.detach()
    dy: Any = {
        "shape": right[:1],
        "dtype": right.long(),
        "none": None,
        "meta": right.to("meta"),
        "complex": torch.complex(right, right) if right.dtype in (F32, F64) else right,
    }[how]
    return torch.autograd.grad(y, w, dy)


ERRORS = [
    *(
        Case(
            f"{run.__name__.replace('_', '-')}-{fault}-{function}",
            partial(run, function, fault),
            planned=None,
            devices=devices,
        )
        for fault in FAULTS
        for function in FUNCTIONS
        for run, devices in (
            [(faulty, ("cuda",)), (faulty_after_a_good_call, ("cuda",))] if "elsewhere" in fault
            else [(faulty, ("cpu",) if "huge" in fault else ("cpu", "cuda"))]
        )
    ),
    *(
        Case(f"wrong-gradient-{how}", partial(wrong_gradient, how))
        for how in ("shape", "dtype", "none", "meta", "complex")
    ),
]  # fmt: skip


# --- modules and other ways to a convolution


def module(make: Callable[[], nn.Module], dims: tuple[int, ...], on: Place) -> Any:
    torch.manual_seed(1)
    made = make().to(on.device, on.dtype)
    x = on.randn(*dims).requires_grad_()
    y = made(x)
    parameters = [p for p in made.parameters() if p.requires_grad]
    return y, torch.autograd.grad(y, [x, *parameters], weights(y))


def _transposed_to_size(spatial: int, on: Place) -> Any:
    kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    torch.manual_seed(1)
    made = kind(4, 6, 3, stride=3, padding=1).to(on.device, on.dtype)
    x = on.randn(2, 4, *(5, 4, 3)[:spatial])
    return [made(x, output_size=[s * 3 - 2 + more for s in x.shape[2:]]) for more in (0, 1, 2)]


KINDS = ((nn.Conv1d, (2, 4, 9)), (nn.Conv2d, (2, 4, 7, 8)), (nn.Conv3d, (1, 4, 5, 4, 6)))
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        f"{kind.__name__}-{mode}-{padding}-{taps}": (
            partial(kind, 4, 6, taps, padding=padding, padding_mode=mode), dims
        )
        for kind, dims in KINDS
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding, taps in ((1, 3), ("same", 4), ("same", 2), ("valid", 3))
        if not (mode == "reflect" and kind is nn.Conv3d and taps > 3)
    },
    **{
        f"same-{kind.__name__}-{taps}-dilation-{dilation}": (
            partial(kind, 4, 4, taps, padding="same", dilation=dilation, groups=2), dims
        )
        for kind, dims in KINDS
        for taps in (2, 3, 4)
        for dilation in (2, 3)
    },
    "lazy": (lambda: nn.LazyConv2d(5, 3), (2, 4, 7, 7)),
    "lazy-transposed": (lambda: nn.LazyConvTranspose2d(5, 3, stride=2), (2, 4, 5, 5)),
    "weight-norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), (2, 4, 7, 7)),
    "spectral-norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 6, 3)), (2, 4, 9)),
    "no-batch": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "channels-last-weight": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 7, 7)),
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
                              nn.ConvTranspose2d(8, 2, 2, stride=2), nn.Conv2d(2, 1, 1)), (2, 4, 6, 6)),
}  # fmt: skip


def other_ways(name: str, on: Place) -> Any:
    x, w, bias = given(on, "conv2d")
    xt, wt, bt = given(on, "conv_transpose2d")
    aten = torch.ops.aten
    whole: tuple[Any, ...] = (x, w, bias, [1, 1], [1, 0], [1, 1], False, [0, 0], 1)
    ways: dict[str, Callable[[], Any]] = {
        "torch.conv2d": lambda: torch.conv2d(x, w, bias, padding=(1, 0)),
        "torch.conv2d-string": lambda: torch.conv2d(x, w, bias, padding="same"),
        "torch.convolution": lambda: torch.convolution(*whole),
        "torch._convolution": lambda: torch._convolution(*whole, False, False, True, True),
        "aten.convolution": lambda: aten.convolution(*whole),
        "aten.convolution.out": lambda: aten.convolution.out(*whole, out=x.new_empty(0)),
        "aten.convolution-one-number": lambda: aten.convolution(x, w, bias, [1], [1], [1], False, [0], 1),
        "aten.convolution-transposed": lambda: aten.convolution(xt, wt, bt, [2], [1], [1], True, [1], 1),
        "aten.convolution-output-padding-ignored": lambda: aten.convolution(
            x, w, bias, [1, 1], [0, 0], [1, 1], False, [1, 1], 1
        ),
        "aten.convolution_overrideable": lambda: aten.convolution_overrideable(*whole),
        "aten.conv2d": lambda: aten.conv2d(x, w, bias, [1], [1]),
        "aten.conv2d.padding": lambda: aten.conv2d.padding(x, w, bias, [1], "same"),
        "conv_tbc": lambda: torch.conv_tbc(x[..., 0].permute(2, 0, 1), w[..., 0].permute(2, 1, 0), bias),
        "out-of-place-relu": lambda: F.conv2d(x, w, bias).relu(),
        "fused-eval": lambda: nn.utils.fusion.fuse_conv_bn_eval(
            nn.Conv2d(4, 6, 3).to(on.device, on.dtype).eval(), nn.BatchNorm2d(6).to(on.device, on.dtype).eval()
        )(x),
        "script": lambda: _scripted()(x, w, bias),
        "trace": lambda: _traced(x, w, bias),
        "default-dtype": lambda: _with_default_dtype(x, w, bias),
        "default-device": lambda: _with_default_device(x, w, bias),
    }
    return ways[name]()


WAYS = (
    "torch.conv2d", "torch.conv2d-string", "torch.convolution", "torch._convolution", "aten.convolution",
    "aten.convolution.out", "aten.convolution-one-number", "aten.convolution-transposed",
    "aten.convolution-output-padding-ignored", "aten.convolution_overrideable", "aten.conv2d", "aten.conv2d.padding",
    "conv_tbc", "out-of-place-relu", "fused-eval", "script", "trace", "default-dtype", "default-device",
)  # fmt: skip


def _scripted() -> Any:
    graph = torch.jit.CompilationUnit("def f(x, w, b):\n    return torch.conv2d(x, w, b, [2, 1], [1, 1]).relu()\n")
    return graph.f


def _traced(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    """A trace made from tensors of one size, the operators it holds, and what it gives for tensors of another."""
    graph = torch.jit.trace(lambda *given: F.conv2d(*given, padding=1).relu(), (x, w, bias), check_trace=False)
    held = [node.kind() for node in graph.graph.nodes() if node.kind().startswith("aten")]
    return graph(x[:1, :, 1:], w * 2, bias), held


def _with_default_dtype(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        leaf = x.detach().requires_grad_()
        y = F.conv2d(leaf, w, bias, padding=1)
        return y, torch.autograd.grad(y, leaf, weights(y))
    finally:
        torch.set_default_dtype(before)


def _with_default_device(x: Tensor, w: Tensor, bias: Tensor) -> Any:
    with torch.device("meta"):
        leaf = x.detach().requires_grad_()
        y = F.conv2d(leaf, w, bias, stride=2)
        y.sum().backward()
        return y, leaf.grad, torch.convolution(x, w, bias, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)


# Not-numbers must come out where they go in: what is summed into an output is the same in every direct method.
def with_infinities(function: str, on: Place) -> Any:
    x, w, bias = given(on, function)
    x = x.clone()
    x.view(-1)[3], x.view(-1)[-2] = float("inf"), float("nan")
    return getattr(F, function)(x, w.abs() + 0.5, bias)


ROUTES = [
    *(Case(name, partial(module, *row)) for name, row in MODULES.items()),
    *(Case(f"output-size-{n}d", partial(_transposed_to_size, n), planned=None) for n in (1, 2, 3)),
    *(Case(f"way-{name}", partial(other_ways, name), (F32, F64), planned=None) for name in WAYS),
    *(Case(f"infinities-{f}", partial(with_infinities, f), by_transform=False) for f in FUNCTIONS),
]


TABLES = {"layouts": LAYOUTS, "types": TYPES, "sizes": SIZES, "errors": ERRORS, "routes": ROUTES}

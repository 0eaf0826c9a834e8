"""Autocast, gradient scaling, and torch's global settings, which are read while they hold and not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from helpers.compat import BF16, F16, F32, F64, Call, Case, Place, Tensor, call
from helpers.compat_autograd import backward, convolve, double_backward, func_grad, over, weights

KINDS = ("1d", "2d", "2d-depthwise", "2d-1x1", "3d", "t2d-stride-output-padding")
HALVES = {"bf16": BF16, "f16": F16}

# --- autocast


def cast(half: torch.dtype, run: Callable[[Place, Call], Any], one: Call, on: Place) -> Any:
    with torch.autocast(on.device, half):
        return run(on, one)


def cast_forward_only(half: torch.dtype, one: Call, on: Place) -> Any:
    leaves = on.tensors(one)
    with torch.autocast(on.device, half):
        y = convolve(one, *leaves)
    return y, torch.autograd.grad(y, leaves, weights(y))


def cast_in_and_out(half: torch.dtype, one: Call, on: Place) -> Any:
    leaves = on.tensors(one)
    with torch.autocast(on.device, half):
        first = convolve(one, *leaves)
        with torch.autocast(on.device, enabled=False):
            second = convolve(one, *leaves)
        third = convolve(one, *leaves)
    return first, second, third, convolve(one, *leaves)


def cast_without_cache(half: torch.dtype, one: Call, on: Place) -> Any:
    leaves = on.tensors(one)
    with torch.autocast(on.device, half, cache_enabled=False):
        ys = [convolve(one, *leaves) for _ in range(2)]
    return ys, torch.autograd.grad(ys[0].float().sum() + ys[1].float().square().sum(), leaves)


def cast_of_mixed(half: torch.dtype, which: int, one: Call, on: Place) -> Any:
    """Some tensors are in half precision already: autocast brings them together, and without it they are refused."""
    tensors = [t.to(half) if which >> i & 1 else t for i, t in enumerate(on.tensors(one, grad=False))]
    with torch.autocast(on.device, half):
        y = convolve(one, *tensors)
    return y, convolve(one, *tensors) if which in (0, 7) else None


def cast_doubles(half: torch.dtype, one: Call, on: Place) -> Any:
    tensors = [t.double() for t in on.tensors(one, grad=False)]
    with torch.autocast(on.device, half):
        return convolve(one, *tensors)


def cast_in_a_mode(half: torch.dtype, mode: Callable[[], Any], one: Call, on: Place) -> Any:
    leaves = on.tensors(one)
    with mode(), torch.autocast(on.device, half):
        y = convolve(one, *leaves)
    with torch.autocast(on.device, half):
        return y, convolve(one, *leaves)


def cast_in_a_custom_function(half: torch.dtype, on: Place) -> Any:
    one = call("2d")

    class Convolve(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type=on.device, cast_inputs=F32)
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return convolve(one, x, w)

        @staticmethod
        @torch.amp.custom_bwd(device_type=on.device)
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return torch.nn.grad.conv2d_input(x.shape, w, dy, padding=1), None

    x, w, *_ = on.tensors(one)
    with torch.autocast(on.device, half):
        y: Any = Convolve.apply(x, w)
    return y, torch.autograd.grad(y, x, weights(y))


def scaled_training(half: torch.dtype, blow_up: bool, on: Place) -> Any:
    """Three steps with a gradient scaler; where a gradient is not finite, the step is left out and the scale halved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2)).to(
        on.device, on.dtype
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(on.device, init_scale=2.0**8)
    x, scales = on.randn(2, 3, 8, 8), []
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast(on.device, half):
            loss = model(x).float().square().mean()
        if blow_up and step == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return [p.detach() for p in model.parameters()], scales


USES: dict[str, Any] = {
    "autocast": partial(cast, run=backward),
    "autocast-double-backward": partial(cast, run=double_backward),
    "autocast-func-grad": partial(cast, run=func_grad),
    "autocast-vmap": partial(cast, run=partial(over, 1)),
    "autocast-forward-only": cast_forward_only,
    "autocast-in-and-out": cast_in_and_out,
    "autocast-without-cache": cast_without_cache,
    "autocast-of-doubles": cast_doubles,
    **{f"autocast-of-mixed-{which:03b}": partial(cast_of_mixed, which=which) for which in range(8)},
    "autocast-no-grad": partial(cast_in_a_mode, mode=torch.no_grad),
    "autocast-inference-mode": partial(cast_in_a_mode, mode=torch.inference_mode),
}


def _use(run: Any, half: torch.dtype, one: Call, on: Place) -> Any:
    return run(half, one=one, on=on)


AUTOCAST = [
    *(
        Case(f"{use}-{name}-{half}", partial(_use, run, HALVES[half], call(name)), rounds_to=HALVES[half])
        for use, run in USES.items()
        for name in (KINDS if use == "autocast" else ("1d", "2d", "t2d-stride-output-padding"))
        for half in (HALVES if use == "autocast" else ("bf16",))
    ),
    *(Case(f"autocast-custom-function-{h}", partial(cast_in_a_custom_function, d)) for h, d in HALVES.items()),
    *(
        Case(f"scaled-training-{h}{'-blown-up' * blow_up}", partial(scaled_training, d, blow_up), rounds_to=d)
        for h, d in HALVES.items()
        for blow_up in (False, True)
    ),
]  # fmt: skip


# --- torch's settings


@contextmanager
def _attribute(home: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(home, name)
    setattr(home, name, value)
    try:
        yield
    finally:
        setattr(home, name, before)


@contextmanager
def _precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _fp32_precision(value: str, *pairs: tuple[str, str]) -> Iterator[None]:
    """The new spelling, by whatever it is set on: everything, one backend, or one of its operations."""
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before = [get(*pair) for pair in pairs]
    for pair in pairs:
        put(*pair, value)
    try:
        yield
    finally:
        for pair, old in zip(pairs, before, strict=True):
            put(*pair, old)


@contextmanager
def _deterministic(warn_only: bool = False, fill: bool = True) -> Iterator[None]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _frozen() -> Any:
    """Torch forbids to assign flags outside of scopes."""

    @contextmanager
    def scope() -> Iterator[None]:
        before = torch.backends.__allow_nonbracketed_mutation_flag
        torch.backends.__allow_nonbracketed_mutation_flag = False
        try:
            yield
        finally:
            torch.backends.__allow_nonbracketed_mutation_flag = before

    return scope()


cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
SETTINGS: dict[str, Callable[[], Any]] = {
    "cudnn.flags-off": lambda: cudnn.flags(enabled=False),
    "cudnn.flags-benchmark": lambda: cudnn.flags(enabled=True, benchmark=True),
    "cudnn.flags-deterministic": lambda: cudnn.flags(enabled=True, deterministic=True),
    "cudnn.flags-no-tf32": lambda: cudnn.flags(enabled=True, allow_tf32=False),
    "cudnn.flags-tf32": lambda: cudnn.flags(enabled=True, allow_tf32=True),
    "cudnn.enabled": lambda: _attribute(cudnn, "enabled", False),
    "cudnn.benchmark": lambda: _attribute(cudnn, "benchmark", True),
    "cudnn.deterministic": lambda: _attribute(cudnn, "deterministic", True),
    "cudnn.allow_tf32": lambda: _attribute(cudnn, "allow_tf32", False),
    "matmul.allow_tf32": lambda: _attribute(torch.backends.cuda.matmul, "allow_tf32", True),
    "mkldnn.flags-off": lambda: mkldnn.flags(enabled=False),
    "mkldnn.flags-deterministic": lambda: mkldnn.flags(enabled=True, deterministic=True),
    "precision-high": lambda: _precision("high"),
    "precision-medium": lambda: _precision("medium"),
    **{
        f"fp32_precision-{'-'.join('.'.join(pair) for pair in pairs)}-{value}": partial(_fp32_precision, value, *pairs)
        for pairs, values in (
            ((("generic", "all"),), ("ieee", "tf32")),
            ((("cuda", "all"),), ("ieee", "tf32")),
            ((("cuda", "conv"),), ("ieee", "tf32", "none")),
            ((("cuda", "matmul"),), ("ieee", "tf32")),
            ((("mkldnn", "matmul"),), ("ieee", "bf16", "tf32")),
            ((("mkldnn", "conv"),), ("ieee", "tf32")),
            ((("cuda", "conv"), ("cuda", "matmul")), ("ieee", "tf32")),
        )
        for value in values
    },
    "deterministic": _deterministic,
    "deterministic-unfilled": lambda: _deterministic(fill=False),
    "deterministic-warn-only": lambda: _deterministic(warn_only=True),
    "one-thread": lambda: _threads(1),
    "frozen-flags": _frozen,
    "nothing": nullcontext,
}  # fmt: skip


def under(setting: Callable[[], Any], one: Call, on: Place) -> Any:
    """The call before, inside and after the setting: what was chosen for one must not be used for the other."""
    before = backward(on, one)
    with setting():
        inside = [backward(on, one) for _ in range(2)]
    return before, inside, backward(on, one)


def changed_for_backward(setting: Callable[[], Any], one: Call, on: Place) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    with setting():
        return torch.autograd.grad(y, leaves, weights(y))


def padding_under_determinism(mode: str, warn_only: bool, on: Place) -> Any:
    """The gradients of some ways of padding have no deterministic form on a GPU, which torch says."""
    torch.manual_seed(1)
    module = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode).to(on.device, on.dtype)
    x = on.randn(2, 4, 6, 7).requires_grad_()
    with _deterministic(warn_only=warn_only):
        y = module(x)
        return y, torch.autograd.grad(y, x, weights(y))


def reading_flags_back(on: Place) -> Any:
    """Convolutions leave every flag as they found it."""
    seen = []

    def flags() -> Any:
        return (
            cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, cudnn.benchmark_limit,
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(), mkldnn.is_available(), torch.get_num_threads(),
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(on.device),
            torch.get_default_dtype(), torch.random.get_rng_state().sum().item(),
        )  # fmt: skip

    for name in ("nothing", "cudnn.flags-benchmark", "deterministic", "precision-high"):
        with SETTINGS[name]():
            seen.append(flags())
            backward(on, call("2d"))
            seen.append(flags())
    return seen


def random_numbers(on: Place) -> Any:
    """Nobody draws random numbers on the way."""
    torch.manual_seed(7)
    y = F.dropout(convolve(call("2d"), *on.tensors(call("2d"))), 0.5)
    drawn = torch.rand(8, device=on.device), torch.rand(8)
    return y != 0, [(1e6 * t).long() for t in drawn]


FLAGS = [
    *(
        Case(f"{name}-{kind}", partial(under, setting, call(kind)), (F32, F64), rounds_to=F16, rounds_on=("cuda",))
        for name, setting in SETTINGS.items()
        for kind in ("2d", "2d-depthwise", "t2d-stride-output-padding", "3d")
    ),
    *(
        Case(
            f"{name}-in-backward",
            partial(changed_for_backward, setting, call("2d")),
            rounds_to=F16,
            rounds_on=("cuda",),
        )
        for name, setting in SETTINGS.items()
    ),
    *(
        Case(f"determinism-{mode}{'-warn-only' * warn_only}", partial(padding_under_determinism, mode, warn_only),
             (F32, F64), rounds_to=F16, rounds_on=("cuda",))
        for mode in ("zeros", "reflect", "replicate", "circular")
        for warn_only in (False, True)
    ),
    Case("flags-stay", reading_flags_back),
    Case("random-numbers", random_numbers, rounds_to=F16, rounds_on=("cuda",)),
]  # fmt: skip

CASES = [*AUTOCAST, *FLAGS]

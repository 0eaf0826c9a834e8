"""When convplan pays in compiled models: eager, compiled, compiled under `enable()`, and with convolutions kept.

    python benchmarks/compiled.py --device cuda --modes default,reduce-overhead,max-autotune
    python benchmarks/compiled.py --device cpu --models small --modes default

Each variant has a copy of the model. Rounds are interleaved and shuffled, so that drift of the clocks falls on all
alike; the figure is the median of the rounds. What tuning and compiling took is told beside it, and how far results
are from those of stock torch. Writes compiled.json and compiled.md to $OUT (default results/compiled).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from run_cpu import commit
from torch import nn

import convplan
from convplan import Policy

HERE = Path(__file__).parent
WARM_UPS = 4


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, or a ConvNeXt-like one of a depthwise and two 1x1."""

    def __init__(self, width: int, depthwise: bool) -> None:
        super().__init__()
        if depthwise:
            layers = [nn.Conv2d(width, width, 7, padding=3, groups=width), nn.BatchNorm2d(width)]
            layers += [nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)]
        else:
            layers = [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.layers(x))


def stages(widths: tuple[int, ...], blocks: int, depthwise: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, stride=2, padding=3)]
    for before, width in zip((widths[0], *widths), widths, strict=False):
        if width != before:
            layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
        layers += [Block(width, depthwise) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000)))


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return Logits(ConvNextForImageClassification(ConvNextConfig(num_labels=1000)))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def unet3d() -> nn.Module:
    down = [nn.Conv3d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv3d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    up = [nn.Conv3d(64, 64, 3, padding=1), nn.ReLU(), nn.ConvTranspose3d(64, 32, 2, stride=2), nn.Conv3d(32, 4, 1)]
    return nn.Sequential(*down, *up)


# Model, input dims.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small": (lambda: stages((16, 32), 1), (2, 3, 64, 64)),
    "residual": (lambda: stages((64, 128, 256), 2), (32, 3, 224, 224)),
    "depthwise": (lambda: stages((96, 192), 2, depthwise=True), (32, 3, 224, 224)),
    "resnet-50": (resnet50, (32, 3, 224, 224)),
    "convnext": (convnext, (32, 3, 224, 224)),
    "unet-3d": (unet3d, (2, 1, 64, 64, 64)),
}
VARIANTS = ("eager", "compiled", "enabled", "kept", "kept-as-written")


class Variant:
    """One way to run a copy of the model: what to call, and what must hold around it."""

    def __init__(self, name: str, net: nn.Module, x: torch.Tensor, mode: str, policy: Policy, training: bool) -> None:
        self.name, self._policy, self._x, self._training = name, policy, x, training
        self._net = copy.deepcopy(net).train(training)
        self._run: Callable[..., torch.Tensor] = self._net
        if name in ("compiled", "enabled"):
            self._run = torch.compile(self._net, mode=None if mode == "default" else mode)
        elif name.startswith("kept"):
            own = False if name == "kept-as-written" else None
            options = convplan.compile_options(policy, mode=mode, channels_last=own)
            self._run = torch.compile(self._net, options=options)
        begin = time.perf_counter()
        with self.around():
            for _ in range(WARM_UPS):
                self.step()
            wait(x)
        self.first_calls_s = time.perf_counter() - begin
        self.samples_ms: list[float] = []

    def around(self) -> AbstractContextManager[object]:
        return convplan.enabled(self._policy) if self.name == "enabled" else nullcontext()

    def step(self) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        if not self._training:
            with torch.no_grad():
                return self._run(self._x)
        self._net.zero_grad(set_to_none=True)
        y = self._run(self._x)
        y.float().square().mean().backward()
        return y

    def result(self) -> torch.Tensor:
        with self.around():
            return self.step().detach().float().clone()

    def time_once(self, calls: int) -> None:
        with self.around():
            for _ in range(2):  # a changed switch has every plan looked up anew
                self.step()
            wait(self._x)
            begin = time.perf_counter()
            for _ in range(calls):
                self.step()
            wait(self._x)
        self.samples_ms.append((time.perf_counter() - begin) / calls * 1e3)


def wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measured(name: str, mode: str, training: bool, options: argparse.Namespace) -> dict[str, Any]:
    """All variants of one model in one mode."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, dims = MODELS[name]
    form = {4: torch.channels_last, 5: torch.channels_last_3d}[len(dims)]
    dtype = getattr(torch, options.dtype)
    net = make().to(options.device, dtype)
    x = torch.randn(dims, device=options.device, dtype=dtype)
    if options.channels_last:
        net, x = net.to(memory_format=form), x.contiguous(memory_format=form)
    policy = Policy(tune_after=1, budget_s=options.budget_s)
    convplan.stats(reset=True)
    variants, stats = [], {}
    for variant in VARIANTS:
        variants.append(Variant(variant, net, x, mode, policy, training))
        stats[variant] = {counter: count for counter, count in convplan.stats(reset=True).items() if count}
    right = variants[0].result()
    apart = {one.name: float((one.result() - right).abs().max() / right.abs().max()) for one in variants}
    for _ in range(options.rounds):
        for one in random.sample(variants, len(variants)):
            one.time_once(options.calls)
    return {
        "model": name,
        "mode": mode,
        "training": training,
        "median_ms": {one.name: statistics.median(one.samples_ms) for one in variants},
        "samples_ms": {one.name: one.samples_ms for one in variants},
        "first_calls_s": {one.name: one.first_calls_s for one in variants},
        "share_apart": apart,
        "stats": stats,
    }


def table(rows: list[dict[str, Any]], machine: dict[str, object]) -> str:
    """Medians in ms, and each against the compiled model without convplan (above 1: faster)."""
    lines = [", ".join(f"{name}: {value}" for name, value in machine.items()), ""]
    lines += ["| model | mode | step | " + " | ".join(f"{name}, ms" for name in VARIANTS) + " | enabled | kept |"]
    lines += ["|---" * (len(VARIANTS) + 5) + "|"]
    for row in rows:
        medians = row["median_ms"]
        ours = {"enabled": medians["enabled"], "kept": min(medians["kept"], medians["kept-as-written"])}
        against = [f"{medians['compiled'] / median:.3f}x" for median in ours.values()]
        cells = [row["model"], row["mode"], "training" if row["training"] else "inference"]
        cells += [f"{medians[name]:.3f}" for name in VARIANTS] + against
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: float16 on a GPU, float32 on the CPU")
    parser.add_argument("--models", default="residual,depthwise,unet-3d", help=", ".join(MODELS))
    parser.add_argument("--modes", default="default", help="as torch.compile's, separated by commas")
    parser.add_argument("--steps", default="inference,training")
    parser.add_argument("--channels-last", action="store_true", help="models and inputs are channels-last as written")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=10, help="in one round")
    parser.add_argument("--budget-s", type=float, default=0.2, help="of tuning, for each problem")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float16" if options.device.startswith("cuda") else "float32")
    out = Path(os.environ.get("OUT", HERE / "results" / "compiled"))
    out.mkdir(parents=True, exist_ok=True)
    name = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )
    machine: dict[str, object] = {
        "device": name, "torch": torch.__version__, "dtype": options.dtype, "channels-last": options.channels_last,
        "commit": commit(),
    }  # fmt: skip
    rows = []
    for model in options.models.split(","):
        for mode in options.modes.split(","):
            for step in options.steps.split(","):
                begin = time.perf_counter()
                rows.append(measured(model, mode, step == "training", options))
                print(f"{model} {mode} {step}: {time.perf_counter() - begin:.0f} s", flush=True)
                (out / "compiled.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
                (out / "compiled.md").write_text(table(rows, machine))
    print((out / "compiled.md").read_text())


if __name__ == "__main__":
    main()

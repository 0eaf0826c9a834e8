"""The most memory that a training step holds: stock torch beside `enable()`, for three models.

    python benchmarks/memory.py --out results/gpu           # memory.json and memory.md, on a GPU
    python benchmarks/memory.py --gpus 0,1 --parallel 4     # four sides at once, two on each GPU
    python benchmarks/memory.py --device cpu --out /tmp     # small models, to see that it runs; resident memory, rough

Each side of each model runs in a process of its own: some steps in which it plans whatever there is to plan, whose
peak is told apart, then steps as they go on. What may not be exceeded is stock torch's peak, with benchmark mode off,
and the policy's workspace limit. Each process counts its own memory, so several may share a GPU, and what is written
grows by each that ends; times of a step mean something only where one runs at a time.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import queue
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from run_cpu import commit

MIB = 2**20
ROUNDING_BYTES = 2 * MIB  # the allocator's
FIRST_STEPS, STEPS = 3, 5
LIMITS = "256MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", Path(__file__).parent / "results")))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--limits", default=LIMITS, help="workspace limits, one run of convplan for each")
    parser.add_argument("--budget-s", type=float, default=0.1, help="Policy.budget_s")
    parser.add_argument("--parallel", type=int, default=1, help="sides that run at once")
    parser.add_argument("--gpus", default=os.environ.get("CUDA_VISIBLE_DEVICES") or "0", help="which, taken in turn")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # in a process of its own: MODEL SIDE
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measured(options.models, options.side, options.device, options.budget_s)))
        return
    from convplan.cli.arguments import byte_count

    limits = {text: byte_count(text) for text in options.limits.split(",")}
    options.out.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {
        "commit": commit(),
        "limits_bytes": limits,
        "device": options.device,
        "parallel": options.parallel,
        "models": {model: {} for model in options.models.split(",")},
    }
    failed = run_all(options, raw)
    print(table(raw))
    if failed or not all(row["kept"] for row in rows(raw)):
        sys.exit("\n".join(failed) or 1)


def run_all(options: argparse.Namespace, raw: dict[str, Any]) -> list[str]:
    """Every side of every model into `raw`, and onto the disk as each ends; what went wrong."""
    ours = [f"convplan {limit}" for limit in raw["limits_bytes"].values()]
    sides = [*ours, "stock", "stock, benchmark mode"]  # the slow ones first
    places: queue.Queue[str] = queue.Queue()
    for _, gpu in zip(range(options.parallel), itertools.cycle(options.gpus.split(",")), strict=False):
        places.put(gpu)
    failed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.parallel) as pool:
        jobs = {
            pool.submit(in_process, options, model, side, folder, places): (model, side)
            for side in sides
            for model in raw["models"]
        }
        for done in as_completed(jobs):
            model, side = jobs[done]
            try:
                found = done.result()
            except SideFailed as exc:
                failed.append(f"{model}, {side}: {exc}")
                continue
            raw["machine"] = found.pop("machine")
            raw["models"][model][side] = found
            print(f"{model}, {side}: {found['step_peak_bytes'] / MIB:.0f} MiB", file=sys.stderr, flush=True)
            (options.out / "memory.json").write_text(json.dumps(raw, indent=1) + "\n")
            (options.out / "memory.md").write_text(table(raw))
    return failed


class SideFailed(Exception):
    """A side's process ended with an error, which is the text."""


def in_process(
    options: argparse.Namespace, model: str, side: str, folder: str, places: queue.Queue[str]
) -> dict[str, Any]:
    """Run one side, on a GPU that has room for it."""
    gpu = places.get()
    try:
        return in_process_on(options, model, side, folder, gpu)
    finally:
        places.put(gpu)


def in_process_on(options: argparse.Namespace, model: str, side: str, folder: str, gpu: str) -> dict[str, Any]:
    argv = [sys.executable, __file__, "--models", model, "--side", side, "--device", options.device]
    argv += ["--budget-s", str(options.budget_s)]
    environment = {**os.environ, "CONVPLAN_CACHE_DIR": str(Path(folder, model)), "CUDA_VISIBLE_DEVICES": gpu}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SideFailed(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(name: str, side: str, device: str, budget_s: float) -> dict[str, Any]:
    """One side of one model: peaks in bytes, and the time of a step."""
    import torch

    torch.backends.cudnn.benchmark = side == "stock, benchmark mode"
    step = MODELS[name](device)
    found: dict[str, Any] = {"machine": machine(device)}
    if side.startswith("convplan"):
        import convplan

        convplan.enable(convplan.Policy(workspace_limit_bytes=int(side.split()[1]), budget_s=budget_s, tune_after=1))
    found["first_steps_peak_bytes"], _ = peak_of(step, FIRST_STEPS, device)
    found["step_peak_bytes"], found["step_ms"] = peak_of(step, STEPS, device)
    if device == "cuda":
        found["reserved_bytes"] = torch.cuda.memory_reserved()
    if side.startswith("convplan"):
        found["stats"] = convplan.stats()
        found["engines"] = convplan.stats().engines
    return found


def peak_of(step: Callable[[], float], steps: int, device: str) -> tuple[int, float]:
    import torch

    times_ms = []
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        begin = time.perf_counter()
        step()  # waits for the GPU
        times_ms.append((time.perf_counter() - begin) * 1e3)
    if device == "cuda":
        return torch.cuda.max_memory_allocated(), statistics.median(times_ms)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, statistics.median(times_ms)


def machine(device: str) -> str:
    import torch

    from convplan._environment import current

    return f"{torch.cuda.get_device_name()}, {current('cuda')}" if device == "cuda" else str(current("cpu"))


# --- the models' steps: forward, backward, update; mixed precision on a GPU


def training_step(model: Any, inputs: Any, device: str, dtype: str) -> Callable[[], float]:
    import torch

    model = model.to(device).train()
    inputs = inputs.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=getattr(torch, dtype), enabled=device == "cuda"):
            found = model(inputs)
            loss = getattr(found, "logits", found).float().square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return run


def resnet50(device: str) -> Callable[[], float]:
    import torch

    torch.manual_seed(0)
    small = device == "cpu"
    try:
        from torchvision import models

        model = models.resnet18(weights=None) if small else models.resnet50(weights=None)
    except ImportError:
        from transformers import ResNetConfig, ResNetForImageClassification

        sizes = {"hidden_sizes": [16, 32, 48, 64], "embedding_size": 8, "depths": [1, 1, 1, 1]} if small else {}
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000, **sizes))
    images = torch.randn(2 if small else 64, 3, 64 if small else 224, 64 if small else 224)
    layout = torch.channels_last
    return training_step(model.to(memory_format=layout), images.to(memory_format=layout), device, "float16")


def convnext(device: str) -> Callable[[], float]:
    import torch

    torch.manual_seed(0)
    small = device == "cpu"
    try:
        if small:
            raise ImportError
        from torchvision import models

        model = models.convnext_tiny(weights=None)
    except ImportError:
        from transformers import ConvNextConfig, ConvNextForImageClassification

        sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]} if small else {}
        model = ConvNextForImageClassification(ConvNextConfig(num_labels=1000, **sizes))
    images = torch.randn(2 if small else 64, 3, 64 if small else 224, 64 if small else 224)
    layout = torch.channels_last
    return training_step(model.to(memory_format=layout), images.to(memory_format=layout), device, "bfloat16")


def unet3d(device: str) -> Callable[[], float]:
    """A 3-D U-Net: strided convolutions down, transposed ones up, instance norm, skip connections."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    small = device == "cpu"

    def block(channels: int, filters: int, stride: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for first, step in ((channels, stride), (filters, 1)):
            layers += [nn.Conv3d(first, filters, 3, stride=step, padding=1, bias=False)]
            layers += [nn.InstanceNorm3d(filters, affine=True), nn.LeakyReLU(0.01, inplace=True)]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self, widths: list[int]) -> None:
            super().__init__()
            pairs = list(itertools.pairwise(widths))
            self.enter = block(1, widths[0], 1)
            self.down = nn.ModuleList(block(a, b, 2) for a, b in pairs)
            self.up = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, stride=2) for a, b in reversed(pairs))
            self.merge = nn.ModuleList(block(2 * a, a, 1) for a, _ in reversed(pairs))
            self.leave = nn.Conv3d(widths[0], 4, 1)

        def forward(self, x: Any) -> Any:
            skips = [self.enter(x)]
            for down in self.down:
                skips.append(down(skips[-1]))
            y = skips.pop()
            for up, merge in zip(self.up, self.merge, strict=True):
                y = merge(torch.cat([up(y), skips.pop()], dim=1))
            return self.leave(y)

    widths, size = ([4, 8, 16], 16) if small else ([32, 64, 128, 256, 320], 128)
    return training_step(UNet(widths), torch.randn(1 if small else 2, 1, size, size, size), device, "float16")


MODELS = {"ResNet-50": resnet50, "ConvNeXt-T": convnext, "3-D U-Net": unet3d}


# --- the table


def rows(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each model and workspace limit."""
    found = []
    for model, sides in raw["models"].items():
        for text, limit in raw["limits_bytes"].items():
            if "stock" not in sides or f"convplan {limit}" not in sides:
                continue
            stock, ours, tuned = sides["stock"], sides[f"convplan {limit}"], sides.get("stock, benchmark mode")
            found.append(
                {
                    "model": model,
                    "limit": text,
                    "stock": stock["step_peak_bytes"],
                    "stock_benchmark": None if tuned is None else tuned["step_peak_bytes"],
                    "convplan": ours["step_peak_bytes"],
                    "planning": ours["first_steps_peak_bytes"],
                    "kept": ours["step_peak_bytes"] <= stock["step_peak_bytes"] + limit + ROUNDING_BYTES,
                    "step_ms": (stock["step_ms"], None if tuned is None else tuned["step_ms"], ours["step_ms"]),
                }
            )
    return found


def table(raw: dict[str, Any]) -> str:
    what = (
        "Peak of `torch.cuda.max_memory_allocated`" if raw["device"] == "cuda" else "Resident memory's high-water mark"
    )
    lines = [
        "# Memory of a training step",
        "",
        f"Commit {raw['commit']}; {raw.get('machine', 'nothing was measured')}."
        + (f" {raw['parallel']} processes at once, which times of a step suffer from." if raw["parallel"] > 1 else "")
        + raw.get("note", ""),
        f"{what} over {STEPS} steps, in MiB, each side in a process of its own; `benchmarks/memory.py` says what runs.",
        "",
        "| model | workspace limit | stock | stock, benchmark mode | `enable()` | over stock | within the limit "
        "| while planning | step: stock / benchmark / `enable()` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(raw):
        peaks = [row[name] for name in ("stock", "stock_benchmark", "convplan")]
        sizes = ["-" if peak is None else f"{peak / MIB:.0f}" for peak in peaks]
        over = f"{(row['convplan'] - row['stock']) / MIB:+.0f}"
        times = " / ".join("-" if ms is None else f"{ms:.1f}" for ms in row["step_ms"]) + " ms"
        cells = [
            row["model"],
            row["limit"],
            *sizes,
            over,
            "yes" if row["kept"] else "NO",
            f"{row['planning'] / MIB:.0f}",
        ]
        lines.append(f"| {' | '.join([*cells, times])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

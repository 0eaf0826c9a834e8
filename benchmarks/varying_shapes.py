"""A detection-style stream: images of sizes that never repeat go through a small backbone, stock torch beside convplan.

    python benchmarks/varying_shapes.py [--device cpu] [--count 300] [--out FILE.json]

Three passes, each over sizes that no other pass has seen, so that neither side finds anything remembered:

    cold          an empty store: convplan runs untuned plans, tunes for families of shapes, then runs by relatives
    own order     the same with `nearest=False`: every new shape is planned by the engines' own order
    warm          a new start that finds what the cold pass stored

Every image goes through both sides, in alternating order, and all that a side does for it is in its time. Regret is the
time of what ran over that of the best candidate, when the same layers are measured in full afterwards; what runs on a
GPU is waited for after each image.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convplan
from convplan import Policy, Problem, _counts, _deciding, _environment, _runtime
from convplan._planner import plan_problem

Size = tuple[int, int]

SIZES = {"cpu": (48, 176), "cuda": (320, 800)}  # smallest and largest side, in pixels
LAYOUTS = {"cpu": torch.contiguous_format, "cuda": torch.channels_last}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}


class Block(nn.Module):
    """A residual bottleneck."""

    def __init__(self, channels: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inner, 1)
        self.spatial = nn.Conv2d(inner, inner, 3, stride, 1)
        self.expand = nn.Conv2d(inner, out, 1)
        self.shortcut = nn.Conv2d(channels, out, 1, stride) if stride > 1 or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(self.reduce(x).relu()).relu()
        return (self.expand(y) + self.shortcut(x)).relu()


def backbone(width: int) -> nn.Module:
    """A stem and three stages, 14 convolutions; `width` channels after the stem."""
    return nn.Sequential(
        nn.Conv2d(3, width, 7, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Block(width, width // 2, 2 * width, 1),
        Block(2 * width, width, 4 * width, 2),
        Block(4 * width, 2 * width, 8 * width, 2),
        nn.Conv2d(8 * width, width, 3, padding=1),
    )


def run(
    device: str = "cpu",
    count: int = 300,
    *,
    seed: int = 0,
    policy: Policy | None = None,
    regret_images: int = 5,
    sizes: Size | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """All passes on a device.

    Args:
        device: `cpu` or `cuda`.
        count: images of each pass.
        seed: of sizes and weights.
        policy: convplan's side; None: the defaults. Its `nearest` is set by the passes.
        regret_images: of the warm pass, measured in full afterwards.
        sizes: smallest and largest side in pixels; None: `SIZES`.
        width: channels of the backbone; None: 16 on the CPU, 64 elsewhere.

    Returns:
        machine, settings, passes (by name: seconds of either side, those without the first tenth, what convplan
        counted, seconds it tuned) and regret.
    """
    low, high = sizes or SIZES[device]
    draw = random.Random(seed)
    # Multiples of 4, as data loaders pad to; each size once.
    places = [(4 * h, 4 * w) for h in range(low // 4, high // 4 + 1) for w in range(low // 4, high // 4 + 1)]
    if 3 * count > len(places):
        raise ValueError(f"count is {count}, expected at most {len(places) // 3} for sides of {low} to {high} pixels")
    drawn = draw.sample(places, 3 * count)
    torch.manual_seed(seed)
    model = backbone(width or (16 if device == "cpu" else 64)).to(device, DTYPES[device]).eval()
    model = model.to(memory_format=LAYOUTS[device])
    rules = policy or Policy()
    near, own = rules.replace(nearest=True), rules.replace(nearest=False)
    passes = {}
    with torch.no_grad(), _store_of_its_own() as start_anew:
        _forward(model, (high, high), device)()  # libraries load
        passes["cold"] = _one_pass(model, drawn[:count], device, near)
        start_anew(keep_store=True)
        warm = drawn[2 * count :]
        passes["warm"] = _one_pass(model, warm, device, near)
        regret = _regret(model, warm[-regret_images:] if regret_images else [], device, near)
        start_anew(keep_store=False)
        passes["own order"] = _one_pass(model, drawn[count : 2 * count], device, own)
    settings = {"device": device, "count": count, "sizes": [low, high], "seed": seed, "policy": str(rules)}
    return {"machine": machine(device), "settings": settings, "passes": passes, "regret": regret}


def _forward(model: nn.Module, size: Size, device: str) -> Callable[[], float]:
    image = torch.randn(1, 3, *size, device=device, dtype=DTYPES[device]).contiguous(memory_format=LAYOUTS[device])

    def timed_s() -> float:
        begin = time.perf_counter()
        model(image)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return timed_s


def _one_pass(model: nn.Module, stream: Sequence[Size], device: str, policy: Policy) -> dict[str, Any]:
    """Every image through both sides; seconds of each."""
    convplan.stats(reset=True)
    tuned_before_s = _counts.counts.tuning_s
    stock_s, ours_s = [], []
    for number, size in enumerate(stream):
        forward = _forward(model, size, device)

        def ours() -> None:
            with convplan.enabled(policy):
                ours_s.append(forward())

        def stock() -> None:
            stock_s.append(forward())

        for side in (ours, stock) if number % 2 else (stock, ours):
            side()
    tenth = len(stream) // 10
    return {
        "stock_s": sum(stock_s),
        "convplan_s": sum(ours_s),
        "stock_after_a_tenth_s": sum(stock_s[tenth:]),
        "convplan_after_a_tenth_s": sum(ours_s[tenth:]),
        "stock_median_ms": statistics.median(stock_s) * 1e3,
        "convplan_median_ms": statistics.median(ours_s) * 1e3,
        "tuning_s": _counts.counts.tuning_s - tuned_before_s,
        "stats": convplan.stats(),
        "stock_ms": [round(1e3 * value, 3) for value in stock_s],
        "convplan_ms": [round(1e3 * value, 3) for value in ours_s],
    }


def _regret(model: nn.Module, stream: Sequence[Size], device: str, policy: Policy) -> dict[str, Any]:
    """What ran for these images against the best of a full measurement, layer by layer and for all together."""
    layers = []
    for size in stream:
        with convplan.capture() as seen:
            _forward(model, size, device)()
        layers += [_layer_regret(problem, policy.replace(tuning_limit_s=0)) for problem in seen]
    # What full tuning would not even have timed, as too slow or not proposed here, cannot be told.
    known = [layer for layer in layers if layer["chosen_us"] is not None]
    ratios = sorted(layer["chosen_us"] / layer["best_us"] for layer in known)
    if not ratios:
        return {"layers": layers}
    return {
        "layers": layers,
        "untimed": len(layers) - len(known),
        "median": statistics.median(ratios),
        "percentile_95": ratios[int(0.95 * (len(ratios) - 1))],
        "worst": ratios[-1],
        "of_all_time": sum(one["chosen_us"] for one in known) / sum(one["best_us"] for one in known),
    }


def _layer_regret(problem: Problem, policy: Policy) -> dict[str, Any]:
    ran = _deciding.decide(problem, policy)[1]
    resolved = policy.resolve()
    full = plan_problem(problem, resolved, _environment.current(problem.device), effort="measure")
    times = {one.config: one.median_us for one in full.ranking}
    return {
        "problem": str(problem),
        "ran": str(ran.config),
        "source": ran.ranking[0].source,
        "chosen_us": times.get(ran.config),
        "best": str(full.config),
        "best_us": full.median_us,
    }


@contextmanager
def _store_of_its_own() -> Iterator[Callable[..., None]]:
    """A store in a temporary folder; gives a function that starts anew, with that store or another empty one."""
    variable = "CONVPLAN_STORE"
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory() as folder:
        stores = (str(Path(folder) / f"{number}.sqlite") for number in range(99))

        def start_anew(*, keep_store: bool) -> None:
            if not keep_store:
                os.environ[variable] = next(stores)
            _runtime.forget()

        start_anew(keep_store=False)
        try:
            yield start_anew
        finally:
            _runtime.forget()
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before


def machine(device: str) -> dict[str, str]:
    """Where this ran."""
    return {"platform": platform.platform(), "environment": str(_environment.current(device))}


def table(found: dict[str, Any]) -> str:
    """The passes as a Markdown table, and a line on regret."""
    lines = [
        "| pass | stock s | convplan s | stock / convplan | without the first tenth | of that tuning s | tuned |"
        " by relatives | by the engines' order |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found["passes"].items():
        stats = one["stats"]
        later = one["stock_after_a_tenth_s"] / one["convplan_after_a_tenth_s"]
        lines.append(
            f"| {name} | {one['stock_s']:.2f} | {one['convplan_s']:.2f} | {one['stock_s'] / one['convplan_s']:.2f} | "
            f"{later:.2f} | {one['tuning_s']:.2f} | {stats['tuned']} | {stats['from_relative']} | "
            f"{stats['planned'] - stats['tuned']} |"
        )
    regret = found["regret"]
    if "median" in regret:
        lines += [
            "",
            f"Regret of {len(regret['layers'])} layers once warm: median {regret['median']:.3f}, 95 % below "
            f"{regret['percentile_95']:.3f}, worst {regret['worst']:.3f}, of all their time {regret['of_all_time']:.3f}"
            f" ({regret['untimed']} ran what full tuning did not time).",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=1.0, help="for racing the candidates of one problem")
    parser.add_argument("--tuning-limit-s", type=float, default=None, help="for all tuning of the process")
    parser.add_argument("--regret-images", type=int, default=5)
    parser.add_argument("--out", type=Path, help="raw numbers as JSON")
    options = parser.parse_args()
    policy = Policy(budget_s=options.budget_s, tuning_limit_s=options.tuning_limit_s)
    found = run(options.device, options.count, seed=options.seed, policy=policy, regret_images=options.regret_images)
    found["command"] = " ".join(["python", *sys.argv])
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

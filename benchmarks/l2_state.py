"""Which state of a GPU's second-level cache, while candidates are timed, says best what real models see?

    python benchmarks/l2_state.py                # $OUT/l2_state.json, l2_state.md (default results/search)

Each model's convolutions are tuned twice: with what the run before left in the cache (`warm`) and with nothing of the
candidate's tensors in it (`cold`). Then the model trains, by either set of plans, and every convolution is timed where
it stands, by events around it, the host running ahead of the device. Compared are the times that tuning foretold with
those in the model, and whole steps by either set in shuffled rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import convplan
from convplan import Policy, _choices
from convplan._problem import Problem

HERE = Path(__file__).parent
STATES = ("warm", "cold")
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
STEPS, ROUNDS = 6, 8
HEAD_START_CYCLES = 100_000_000  # about 50 ms, in which the host queues a whole step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="resnet50,convnext_tiny,deeplabv3_resnet50")
    parser.add_argument("--budget-s", type=float, default=0.3)
    options = parser.parse_args()
    out = Path(os.environ.get("OUT", HERE / "results" / "search"))
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("CONVPLAN_CACHE_DIR", tempfile.mkdtemp())
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "models": {}}
    for name in options.models.split(","):
        found["models"][name] = look_at(training(name), options.budget_s)
        (out / "l2_state.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "l2_state.md").write_text(table(found))
        torch.cuda.empty_cache()
    print(table(found))


def training(name: str) -> Callable[[], None]:
    """A step of training in bfloat16 autocast, channels-last."""
    import torchvision

    torch.manual_seed(0)
    large = name.startswith("deeplab")
    zoo = torchvision.models.segmentation if large else torchvision.models
    options = {"weights_backbone": None} if large else {}
    model = getattr(zoo, name)(weights=None, **options).cuda().to(memory_format=torch.channels_last).train()
    size = (8, 3, 512, 512) if large else (64, 3, 224, 224)
    images = torch.randn(size, device="cuda").to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = model(images)
            y = y["out"] if isinstance(y, dict) else y
        y.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


class Watch(TorchDispatchMode):
    """Events around every convolution, in order, and the problems that each one asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.problems: list[list[Problem]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in CONVOLUTIONS:
            return func(*args, **(kwargs or {}))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.problems.append([])
        begin.record()
        result = func(*args, **(kwargs or {}))
        end.record()
        self.events.append((begin, end))
        return result

    def observe(self, problem: Problem, wanted: tuple[bool, bool]) -> None:
        if self.problems:
            self.problems[-1].append(problem)


def look_at(step: Callable[[], None], budget_s: float) -> dict[str, Any]:
    step()
    with convplan.capture() as problems:
        step()
    wanted = [problem for problem in problems if not problem.is_empty]
    policies = {state: Policy(l2=state, budget_s=budget_s) for state in STATES}
    records = {
        state: {record.problem: record for record in convplan.tune(wanted, policy=policy)}
        for state, policy in policies.items()
    }
    asked = in_order(step)
    found: dict[str, Any] = {"problems": len(wanted), "convolutions": len(asked)}
    for state, policy in policies.items():
        with convplan.enabled(policy):
            actual_us = in_place(step, len(asked))
        rows = []
        for group, actual in zip(asked, actual_us, strict=True):
            foretold = {s: [records[s][p].median_us for p in group if p in records[s]] for s in STATES}
            if group and all(len(times) == len(group) and None not in times for times in foretold.values()):
                other = "cold" if state == "warm" else "warm"
                same = all(records[state][p].config == records[other][p].config for p in group)
                sums = {s: round(math.fsum(times), 2) for s, times in foretold.items()}
                rows.append({"problems": [str(p) for p in group], "actual_us": actual, "same_choice": same, **sums})
        found[state] = rows
    found["step_ms"] = steps(step, policies)
    return found


def in_order(step: Callable[[], None]) -> list[list[Problem]]:
    """What each convolution of a step asks for."""
    watch = Watch()
    _choices.state.captures = (watch.observe,)
    _choices.state.touch()
    try:
        with convplan.enabled(Policy(effort="instant")), watch:
            step()
    finally:
        _choices.state.captures = ()
        _choices.state.touch()
    return watch.problems


def in_place(step: Callable[[], None], count: int) -> list[float]:
    """Median microseconds of each convolution of a step."""
    for _ in range(3):
        step()
    times: list[list[float]] = [[] for _ in range(count)]
    for _ in range(STEPS):
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        with Watch() as watch:
            step()
        torch.cuda.synchronize()
        assert len(watch.events) == count
        for place, (begin, end) in enumerate(watch.events):
            times[place].append(begin.elapsed_time(end) * 1e3)
    return [round(statistics.median(one), 2) for one in times]


def steps(step: Callable[[], None], policies: dict[str, Policy]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {state: [] for state in policies}
    order = list(policies)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ROUNDS):
        random.shuffle(order)
        for state in order:
            with convplan.enabled(policies[state]):
                for _ in range(2):
                    step()
                torch.cuda._sleep(HEAD_START_CYCLES)
                begin.record()
                for _ in range(2):
                    step()
                end.record()
                end.synchronize()
            found[state].append(round(begin.elapsed_time(end) / 2, 4))
    return found


def table(found: dict[str, Any]) -> str:
    columns = ["model", "plans of", "error, warm", "error, cold", "bias, warm", "bias, cold"]
    columns += ["sum in the model us", "sum warm us", "sum cold us", "step ms"]
    lines = [
        f"# The second-level cache while candidates are timed\n\n{found['gpu']}, torch {found['torch']}. For what "
        "tuning foretold, warm and cold: `error` is the middle of |log(foretold / in the model)| over the model's "
        "convolutions, `bias` the geometric mean of foretold / in the model. The sums are of a step's convolutions.\n",
        f"| {' | '.join(columns)} |",
        "|---|---|" + "---:|" * (len(columns) - 2),
    ]
    for name, one in found["models"].items():
        for state in STATES:
            rows = one[state]
            logs = {s: [math.log(row[s] / row["actual_us"]) for row in rows] for s in STATES}
            errors = [statistics.median(map(abs, logs[s])) for s in STATES]
            biases = [math.exp(statistics.fmean(logs[s])) for s in STATES]
            sums = [math.fsum(row[column] for row in rows) for column in ("actual_us", *STATES)]
            numbers = [*(f"{v:.3f}" for v in (*errors, *biases)), *(f"{v:.0f}" for v in sums)]
            step_ms = statistics.median(one["step_ms"][state])
            lines.append(f"| {name} | {state} | {' | '.join(numbers)} | {step_ms:.3f} |")
        different = sum(not row["same_choice"] for row in one["warm"])
        lines.append(
            f"\n{name}: {one['problems']} problems, {different} of {len(one['warm'])} convolutions got another plan.\n"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

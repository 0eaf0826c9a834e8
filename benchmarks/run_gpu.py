"""What the cuDNN engine costs and gives on a GPU: finding, building and restoring plans, a hit, and the untuned choice.

    python benchmarks/run_gpu.py          # suites/dev.json -> $OUT (default results/gpu): gpu.json, gpu.md

Device times are replays of CUDA graphs in shuffled, interleaved rounds; host times are medians over rounds that
alternate between both sides. Stock torch runs with benchmark off in this process from the first call on, which is what
the untuned choice is compared with.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
import torch.nn.functional as F

import convplan
from convplan import Policy
from convplan._inputs import Inputs, random_inputs
from convplan._problem import Problem
from convplan._problem_files import NamedProblem, read_problems
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.plans import restore_plan
from convplan.engines.cudnn.target import present

HERE = Path(__file__).parent
UIDS = {"fprop": "xwy", "dgrad": "ywx", "wgrad": "xyw"}
ROUNDS = 12
GRAPH_US = 400.0  # work in one replay, so that its launch disappears
HOST_LAYERS, HOST_ROUNDS = 50, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, default=HERE / "suites" / "dev.json")
    parser.add_argument("--parts", default="finding,host,instant")
    options = parser.parse_args()
    out = Path(os.environ.get("OUT", HERE / "results" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = False
    problems = [on_gpu(one) for one in read_problems(options.suite)]
    raw: dict[str, object] = {"machine": machine(), "suite": str(options.suite.name)}
    parts = {"finding": lambda: finding(problems), "host": host, "instant": lambda: chosen(problems, "instant")}
    parts["measured"] = lambda: chosen(problems[::4], "measure")
    for name in options.parts.split(","):
        begin = time.perf_counter()
        raw[name] = parts[name]()
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        (out / "gpu.json").write_text(json.dumps(raw, indent=1) + "\n")
        (out / "gpu.md").write_text(table(raw))
    print(table(raw))


def machine() -> dict[str, str]:
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return {
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "cpu": str(convplan._environment.cpu_model()) if hasattr(convplan, "_environment") else "",
    }


def on_gpu(named: NamedProblem) -> NamedProblem:
    return msgspec.structs.replace(named, problem=msgspec.structs.replace(named.problem, device="cuda"))


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "median": round(statistics.median(ordered), 4),
        "p95": round(ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)], 4),
        "largest": round(ordered[-1], 4),
    }


def timed_ms(call: Callable[[], object]) -> tuple[float, object]:
    begin = time.perf_counter()
    result = call()
    return (time.perf_counter() - begin) * 1e3, result


def finding(problems: list[NamedProblem]) -> dict[str, object]:
    """Milliseconds to list a problem's configurations, to build one, to restore one from its JSON."""
    engine, target = CudnnEngine(), present(0)
    engine.configs(problems[0].problem, "measure")
    found: dict[str, list[float]] = {name: [] for name in ("list_measure", "list_instant", "build", "build_compiled")}
    restored: list[float] = []
    restored_compiled: list[float] = []
    counts = []
    for number, named in enumerate(problems):
        problem = named.problem
        took, _ = timed_ms(lambda: engine.configs(problem, "instant"))
        found["list_instant"].append(took)
        took, configs = timed_ms(lambda: engine.configs(problem, "measure"))
        found["list_measure"].append(took)
        counts.append(len(configs))
        for place, candidate in enumerate(configs):
            compiled = "RUNTIME_COMPILATION" in candidate.notes.behavior
            if compiled and number % 6 and place > 2:
                continue  # each takes up to a second
            try:
                took, plan = timed_ms(lambda: engine.build_execution_plan(problem, candidate.config))
            except convplan.PlanRejected:
                continue
            found["build_compiled" if compiled else "build"].append(took)
            if place % 7 == 0:
                try:
                    text = plan.serialize()
                except RuntimeError:
                    continue
                took, _ = timed_ms(lambda: restore_plan(target, text, tuple(map(ord, UIDS[problem.op]))))
                (restored_compiled if compiled else restored).append(took)
    slowest = sorted(zip(found["list_measure"], (one.name for one in problems), strict=True), reverse=True)[:8]
    result = {name: quantiles(values) for name, values in found.items() if values}
    if restored:
        result["restore"] = quantiles(restored)
    if restored_compiled:
        result["restore_compiled"] = quantiles(restored_compiled)
    return {"milliseconds": result, "configurations": quantiles([float(c) for c in counts]), "slowest_lists": slowest}


def host() -> dict[str, object]:
    """Host microseconds a layer of 50 tiny convolutions in a row: forward, and forward with backward."""
    policy = Policy(effort="instant")
    found: dict[str, object] = {}
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(1, 8, 8, 8, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        weights = [
            torch.randn(8, 8, 3, 3, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
            for _ in range(HOST_LAYERS)
        ]

        def forward() -> torch.Tensor:
            y = x
            for w in weights:
                y = F.conv2d(y, w, None, 1, 1)
            return y

        def training() -> None:
            y = forward()
            torch.autograd.grad(y.sum(), weights)

        for name, call, graded in (("forward", forward, False), ("training", training, True)):
            for w in weights:
                w.requires_grad_(graded)
            with torch.set_grad_enabled(graded):
                found[f"{name} {str(dtype)[6:]}"] = host_rounds(call, policy)
    return found


def host_rounds(call: Callable[[], object], policy: Policy) -> dict[str, float]:
    def sample() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        took = (time.perf_counter_ns() - begin) / 1e3 / HOST_LAYERS
        torch.cuda.synchronize()
        return took

    stock, ours = [], []
    for _ in range(5):
        sample()
    with convplan.enabled(policy):
        for _ in range(5):
            sample()
    for _ in range(HOST_ROUNDS // 6):
        sample()
        stock += [sample() for _ in range(6)]
        with convplan.enabled(policy):
            for _ in range(3):
                sample()
            ours += [sample() for _ in range(6)]
    return {
        "stock_us": round(statistics.median(stock), 2),
        "convplan_us": round(statistics.median(ours), 2),
        "convplan_over_stock": round(statistics.median(ours) / statistics.median(stock), 3),
    }


def chosen(problems: list[NamedProblem], effort: str) -> list[dict[str, object]]:
    """Device time of the chosen plan against stock torch with benchmark off."""
    rows = []
    for named in problems:
        try:
            rows.append(chosen_row(named, effort))
        except Exception as exc:
            rows.append({"name": named.name, "suite": named.suite, "failed": f"{type(exc).__name__}: {exc}"[:300]})
        torch.cuda.empty_cache()
    return rows


def chosen_row(named: NamedProblem, effort: str) -> dict[str, object]:
    problem = named.problem
    policy = named.policy(Policy(effort=effort, budget_s=0.3))
    inputs = random_inputs(problem, torch.device("cuda"))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=named.allow_tf32, deterministic=False):
        planned_ms, record = timed_ms(lambda: convplan.plan(problem, policy))
        plan = record.build()
        first, second, bias = inputs
        sides = {
            "stock": graphed(lambda: stock_call(problem, inputs)),
            "convplan": graphed(lambda: plan.unchecked_run(first, second, bias, None)),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        order = list(sides)
        for _ in range(ROUNDS):
            random.shuffle(order)
            for name in order:
                graph, launches = sides[name]
                times[name].append(replay_us(graph) / launches)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "name": named.name,
        "suite": named.suite,
        "chosen": str(record.config),
        "planned_ms": round(planned_ms, 2),
        "stages_s": dict(record.stages_s),
        "stock_us": round(medians["stock"], 2),
        "convplan_us": round(medians["convplan"], 2),
        "ratio": round(medians["stock"] / medians["convplan"], 4),
        "samples_us": {name: [round(v, 2) for v in values] for name, values in times.items()},
    }


def stock_call(problem: Problem, inputs: Inputs) -> torch.Tensor:
    stride, dilation = list(problem.stride), list(problem.dilation)
    padding = [before for before, _ in problem.padding]
    zeros = [0] * len(stride)
    first, second, bias = inputs
    if problem.op == "fprop":
        return torch.ops.aten.convolution(first, second, bias, stride, padding, dilation, False, zeros, problem.groups)
    x = (
        first
        if problem.op == "wgrad"
        else torch.empty_strided(problem.x.dims, problem.x.strides, dtype=first.dtype, device="cuda")
    )
    w = (
        second
        if problem.op == "dgrad"
        else torch.empty_strided(problem.w.dims, problem.w.strides, dtype=first.dtype, device="cuda")
    )
    dy = first if problem.op == "dgrad" else second
    mask = [problem.op == "dgrad", problem.op == "wgrad", False]
    grads = torch.ops.aten.convolution_backward(
        dy, x, w, None, stride, padding, dilation, False, zeros, problem.groups, mask
    )
    return grads[0 if problem.op == "dgrad" else 1]


def graphed(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of as many launches as make a replay long against its own launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
        side.synchronize()
        begin = time.perf_counter()
        for _ in range(3):
            call()
        side.synchronize()
        once_us = (time.perf_counter() - begin) / 3 * 1e6
    torch.cuda.current_stream().wait_stream(side)
    launches = max(1, min(20, math.ceil(GRAPH_US / once_us)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    replay_us(graph)
    return graph, launches


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def geometric_mean(values: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else float("nan")


def choices(title: str, rows: list[dict]) -> list[str]:
    good = [row for row in rows if "ratio" in row]
    ratios = [row["ratio"] for row in good]
    lines = [
        f"{title} against stock torch with benchmark off: {len(good)} problems, geometric mean "
        f"{geometric_mean(ratios):.3f}, lowest {min(ratios, default=0):.3f}, highest {max(ratios, default=0):.3f}; "
        f"planned in {statistics.median([row['planned_ms'] for row in good] or [0]):.1f} ms (median).",
        "",
        "| suite | problem | stock us | convplan us | stock / convplan | plan |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['suite']} | {row['name']} | {row['stock_us']:.1f} | {row['convplan_us']:.1f} | {row['ratio']:.3f} | "
        f"{row['chosen']} |"
        for row in sorted(good, key=lambda row: row["ratio"])
    ]
    lines += [f"| {row['suite']} | {row['name']} | failed | | | {row['failed']} |" for row in rows if "failed" in row]
    return [*lines, ""]


def table(raw: dict) -> str:
    lines = ["# The cuDNN engine on a GPU", "", ", ".join(f"{k} {v}" for k, v in raw["machine"].items() if v) + ".", ""]
    if "finding" in raw:
        lines += ["| finding plans, milliseconds | n | median | 95th percentile | largest |", "|---|---|---|---|---|"]
        names = {
            "list_measure": "list all configurations (modes A, B, fallback)",
            "list_instant": "list for effort `instant`",
            "build": "build a plan, precompiled engine",
            "build_compiled": "build a plan, engine compiled at run time",
            "restore": "restore a serialized plan, precompiled engine",
            "restore_compiled": "restore a serialized plan, engine compiled at run time",
        }
        for name, q in raw["finding"]["milliseconds"].items():
            lines.append(f"| {names[name]} | {q['n']} | {q['median']:.2f} | {q['p95']:.2f} | {q['largest']:.2f} |")
        q = raw["finding"]["configurations"]
        lines += ["", f"Configurations a problem: median {q['median']:.0f}, largest {q['largest']:.0f}.", ""]
        slowest = ", ".join(f"{name} {ms:.0f} ms" for ms, name in raw["finding"]["slowest_lists"])
        lines += [f"Slowest lists, nearly all of it in cuDNN's mode B: {slowest}.", ""]
    if "host" in raw:
        lines += [
            f"| host time a layer, {HOST_LAYERS} tiny layers in a row | stock us | convplan us | ratio |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {row['stock_us']:.1f} | {row['convplan_us']:.1f} | {row['convplan_over_stock']:.3f} |"
            for name, row in raw["host"].items()
        ]
        lines.append("")
    titles = {
        "instant": 'Untuned choice (`effort="instant"`)',
        "measured": 'Tuned choice (`effort="measure"`, a race of at most 0.3 s; every fourth problem)',
    }
    for part in (part for part in titles if part in raw):
        lines += choices(titles[part], raw[part])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

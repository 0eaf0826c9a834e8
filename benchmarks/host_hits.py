"""A call that hits the cache, on the host: 50 tiny layers in a row, stock torch beside `enable()`. For `host_cost.py`.

    python benchmarks/host_hits.py --device cpu             # one JSON object: microseconds a call, by case and side
    python benchmarks/host_hits.py --device cuda --profile  # where the time of a hit goes, stage by stage

Sides alternate in rounds of one process, and every figure is a median over rounds. On a GPU the kernels are so small
that the host is what takes the time; it waits for the GPU between rounds only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import convplan
from convplan import Policy
from convplan.engines import registry
from convplan.engines.aten import stock_backward
from convplan.torch_ops import override, seen

LAYERS = 50
POLICY = Policy(effort="instant")  # the engine's own first choice, which is what stock torch runs

Tensor = torch.Tensor


class Case(NamedTuple):
    """One kind of call: rank, with or without bias, which gradients, and which function convplan's side calls."""

    name: str
    spatial: int = 2
    bias: bool = False
    gradients: str = ""  # "recorded": a graph is made for autograd; "computed": backward too
    function: bool = False  # convplan's own function, without `enable()`


CASES = (
    Case("2-D"),
    Case("2-D, bias", bias=True),
    Case("3-D", spatial=3),
    Case("3-D, bias", spatial=3, bias=True),
    Case("1-D", spatial=1),
    Case("2-D, graph for autograd", gradients="recorded"),
    Case("2-D, forward and backward", gradients="computed"),
    Case("2-D, bias, forward and backward", bias=True, gradients="computed"),
    Case("3-D, forward and backward", spatial=3, gradients="computed"),
    Case("`convplan.conv2d`", function=True),
    Case("`convplan.conv3d`, bias", spatial=3, bias=True, function=True),
)


class Layers(NamedTuple):
    """Input, and a weight and bias for each layer."""

    x: Tensor
    parameters: list[tuple[Tensor, Tensor | None]]

    @classmethod
    def of(cls, case: Case, device: str) -> Layers:
        channels = 32 if device == "cuda" else 4
        dtype = torch.float16 if device == "cuda" else torch.float32
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(case.spatial, torch.contiguous_format)
        layout = layout if device == "cuda" else torch.contiguous_format

        def made(*dims: int) -> Tensor:
            tensor = torch.randn(*dims, device=device, dtype=dtype)
            tensor = tensor.contiguous(memory_format=layout) if len(dims) > 2 else tensor
            return tensor.requires_grad_(bool(case.gradients))

        sizes, taps = (8, 8, 4)[: case.spatial], (3,) * case.spatial
        biases = [made(channels) if case.bias else None for _ in range(LAYERS)]
        return cls(made(1, channels, *sizes), [(made(channels, channels, *taps), bias) for bias in biases])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = False
    if options.device == "cpu":
        torch.set_num_threads(1)  # tiny work, which more threads only wait for
    run = profiled if options.profile else hits
    print(json.dumps(run(options.device, options.rounds)))


def hits(device: str, rounds: int) -> dict[str, Any]:
    """For each case, microseconds a call of each side, and their ratio."""
    return {case.name: compared(case, device, rounds) for case in CASES}


def compared(case: Case, device: str, rounds: int) -> dict[str, float]:
    layers = Layers.of(case, device)
    samples: dict[str, list[float]] = {"stock": [], "convplan": []}
    ours: Any = getattr(convplan, f"conv{case.spatial}d") if case.function else None
    for turn in range(rounds):
        for side in ("stock", "convplan") if turn % 2 else ("convplan", "stock"):
            mine = side == "convplan"
            with convplan.enabled(POLICY) if mine and ours is None else nullcontext():
                one = step(case, layers, ours if mine and ours is not None else None)
                for _ in range(4):  # a switch makes every caller anew, and the third call is a hit of the quickest kind
                    one()
                samples[side].append(timed_us(one, device) / LAYERS)
    ratios = [b / a for a, b in zip(samples["stock"], samples["convplan"], strict=True)]
    medians = {f"{side}_us": statistics.median(values) for side, values in samples.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def step(case: Case, layers: Layers, ours: Callable[..., Tensor] | None) -> Callable[[], object]:
    """All layers once, each on the same input."""
    call = ours or getattr(F, f"conv{case.spatial}d")
    x, parameters = layers
    if ours is not None:

        def function() -> None:
            for w, bias in parameters:
                call(x, w, bias, 1, 1, policy=POLICY)

        return function

    def forward() -> None:
        for w, bias in parameters:
            call(x, w, bias, 1, 1)

    if case.gradients != "computed":
        return forward
    wanted = [(x, w) if bias is None else (x, w, bias) for w, bias in parameters]
    with torch.no_grad():
        dy = torch.ones_like(call(x, *parameters[0], 1, 1))

    def both() -> None:
        for (w, bias), leaves in zip(parameters, wanted, strict=True):
            torch.autograd.grad(call(x, w, bias, 1, 1), leaves, dy)

    return both


def timed_us(call: Callable[[], object], device: str, calls: int = 5) -> float:
    """Host microseconds of a call, which may leave work to the GPU: the middle of a few, as some are interrupted."""
    if device == "cuda":
        torch.cuda.synchronize()
    times_us = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times_us.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times_us)


# --- where the time of a hit goes


def profiled(device: str, rounds: int) -> dict[str, Any]:
    """Stages of a 2-D hit without bias, in microseconds: what each adds to the one before, and the parts of a run."""
    layers = Layers.of(Case("2-D"), device)
    x, parameters = layers
    stages: dict[str, list[float]] = {}
    with torch.no_grad():
        result = F.conv2d(x, parameters[0][0], None, 1, 1)

        def nothing(*arguments: object) -> Tensor:
            return result

        def sample(name: str, call: Callable[[], object]) -> None:
            for _ in range(4):
                call()
            stages.setdefault(name, []).append(timed_us(call, device) / LAYERS)

        loop = step(Case("2-D"), layers, None)
        for _ in range(rounds):
            sample("stock", loop)
            with replaced(nothing, device):
                sample("entry", loop)
            with convplan.enabled(POLICY):
                sample("all", loop)
                known = [override.local.forwards[w.data_ptr()] for w, _ in parameters]
                runs = [one.run for one in known]
                calls = list(zip(runs, (w for w, _ in parameters), strict=True))
                sample("run", lambda calls=calls: [run(x, w, None, None) for run, w in calls])
                for one in known:
                    one.run = nothing
                sample("compared", loop)
                for one, run in zip(known, runs, strict=True):
                    one.run = run
                config = convplan.plan(convplan.problem("fprop", x, parameters[0][0], padding=1), POLICY).config
        parts = run_parts(device, layers, rounds)
    us = {name: statistics.median(values) for name, values in stages.items()}
    return {
        "config": str(config),
        "stock": us["stock"],
        "stages": {
            "stock torch, for comparison": us["stock"],
            "`F.conv2d`, the dispatcher, and an entry in Python that returns at once": us["entry"],
            "comparing the call with the weight's last": us["compared"] - us["entry"],
            "the plan's run": us["run"],
            "all of it, measured as a whole": us["all"],
        },
        "parts_of_the_run": parts,
        "ratio": us["all"] / us["stock"],
        "forward_and_backward": backward_stages(device, rounds),
    }


def backward_stages(device: str, rounds: int) -> dict[str, float]:
    """The same of a 2-D call with its gradients, of which an entry in Python is handed eleven arguments."""
    case = Case("2-D", gradients="computed")
    both, (kernel, keys) = step(case, Layers.of(case, device), None), stock_backward(device)
    blocks: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "stock torch, for comparison": nullcontext,
        "with an entry in Python for the gradients, which hands all on to torch's own kernel": lambda: replaced(
            lambda *given: kernel.call_boxed(keys, *given), device, "convolution_backward"
        ),
        "all of it under `enable()`": lambda: convplan.enabled(POLICY),
    }
    found: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(rounds):
        for name, block in blocks.items():
            with block():
                for _ in range(4):
                    both()
                found[name].append(timed_us(both, device) / LAYERS)
    return {name: statistics.median(values) for name, values in found.items()}


class replaced:  # noqa: N801 - reads as what holds in the block
    """A block in which a function stands at one of the dispatcher's entries."""

    def __init__(self, function: Callable[..., Any], device: str, name: str = "convolution") -> None:
        self._function, self._device, self._name = function, device.upper(), name

    def __enter__(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._library.impl(self._name, self._function, self._device)

    def __exit__(self, *raised: object) -> None:
        self._library._destroy()


def run_parts(device: str, layers: Layers, rounds: int) -> dict[str, float]:
    """What a plan's run is made of, each timed by itself."""
    x, w = layers.x, layers.parameters[0][0]
    alike, index = seen.like(x, w), x.get_device()
    parts: dict[str, Callable[[], object]] = {
        "one address": x.data_ptr,
        "shape and strides of a tensor": lambda: (x.shape, x.stride()),
        "comparing all that of two tensors, in one call": lambda: alike(x, w),
        "torch's flags": lambda: seen.live_flags(index, x.dtype),
    }
    problem = convplan.problem("fprop", x, w, padding=1)
    y = torch.empty_strided(problem.y.dims, problem.y.strides, dtype=x.dtype, device=device)
    if device == "cpu":
        dims, strides, dtype = problem.y.dims, problem.y.strides, x.dtype
        parts["the output, by `torch.empty_strided`"] = lambda: torch.empty_strided(dims, strides, dtype=dtype)
    else:
        parts |= cudnn_parts(problem, x, w, y)
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, call in parts.items():
            found[name].append(timed_us(lambda call=call: [call() for _ in range(100)], device) / 100)
    empty = statistics.median(timed_us(lambda: [nothing_at_all() for _ in range(100)], device) / 100 for _ in range(9))
    return {name: max(0.0, statistics.median(values) - empty) for name, values in found.items()}


def nothing_at_all() -> None:
    """What calling costs."""


def cudnn_parts(problem: convplan.Problem, x: Tensor, w: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """The pieces of a bound run of cuDNN's."""
    from convplan.engines.cudnn import running as cudnn
    from convplan.engines.cudnn.target import present

    config = convplan.plan(problem, POLICY.replace(engines=("cudnn",))).config
    found: Any = registry.get("cudnn")
    plan = found.build_execution_plan(problem, config)
    scratch = torch.empty(max(plan.workspace_bytes, 1), dtype=torch.uint8, device="cuda")
    handle = present(0).handle
    addresses = (x.data_ptr(), w.data_ptr(), y.data_ptr(), scratch.data_ptr() if plan.workspace_bytes else 0)
    plan.execute(handle, addresses)
    pack = plan.packs[addresses]
    handle_pointer, plan_pointer = cudnn.c_void_p(handle.pointer), cudnn.c_void_p(plan.descriptor.pointer)
    execute = plan.descriptor.library.execute_unchecked
    dims, strides, dtype = problem.y.dims, problem.y.strides, x.dtype
    allocate = cudnn._allocate or (lambda *given: torch.empty_strided(*given[:2], dtype=given[2], device="cuda"))
    return {
        "the output's allocation": lambda: allocate(dims, strides, dtype),
        "the current stream": lambda: cudnn._raw_stream(0),
        "the pack of these addresses": lambda: plan.packs.get((x.data_ptr(), w.data_ptr(), y.data_ptr(), addresses[3])),
        "cudnnBackendExecute, through ctypes": lambda: execute(handle_pointer, plan_pointer, pack),
        "ctypes alone (cudnnGetVersion)": plan.descriptor.library.cdll.cudnnGetVersion,
    }


if __name__ == "__main__":
    main()

"""The kernels of batch normalization against the time to move their bytes, and against torch's.

    python benchmarks/kernels.py                 # -> $OUT/kernels.json, kernels.md (default results/kernels)
    python benchmarks/kernels.py --dtypes float16 --limit-s 20

Each function of `convplan.kernels` on the sizes of a ResNet-50's layers at batch 64, in CUDA graphs, so that the host's
time does not count, and over as many copies of the tensors as do not fit the second-level cache. Beside each is what
torch takes for the same: `batch_norm`, sum and ReLU, forward, and the gradients of all of them. The rounds of both are
neighbours in time. What the host takes to call each is measured apart, on a small tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from run_cpu import commit

from convplan import kernels
from convplan.kernels import Norm

HERE = Path(__file__).parent
Tensor = torch.Tensor
Call = Callable[[int], Any]

LAYERS = (
    (64, 64, 112, 112),
    (64, 64, 56, 56),
    (64, 256, 56, 56),
    (64, 512, 28, 28),
    (64, 1024, 14, 14),
    (64, 2048, 7, 7),
)
COPIES_BYTES = 200e6  # of y's copies together: four times an H200's second-level cache
MOST_COPIES = 16
ROUNDS = 9
CALLS_OF_HOST = 300


class Job(NamedTuple):
    """One function as it is timed.

    Args:
        name: what it does.
        passes: tensors of y's size that have to be read or written at least once.
        ours, torch: a call with the tensors of a given copy; torch's is None where it has no counterpart.
    """

    name: str
    passes: int
    ours: Call
    torch: Call | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float16,bfloat16,float32")
    parser.add_argument("--limit-s", type=float, default=30, help="stop, and write what there is")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", HERE / "results" / "kernels")))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Autograd runs a gradient on the stream of its forward call, and a graph holds what its own stream ran: one for all.
    with torch.cuda.stream(torch.cuda.Stream()):
        run(options)


def run(options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    raw: dict[str, Any] = {
        "commit": commit(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_per_s": copying(),
        "host": host(),
        "rows": [],
        "not_reached": [],
    }
    dtypes = options.dtypes.split(",")
    # Every layer in the first dtype before any in the next.
    for dtype, shape in ((dtype, shape) for dtype in dtypes for shape in LAYERS):
        if time.perf_counter() - begin > options.limit_s:
            raw["not_reached"].append(f"{dtype} {shape}")
            continue
        raw["rows"] += measured(shape, getattr(torch, dtype), raw["copy_tb_per_s"])
        torch.cuda.empty_cache()
        write(options.out, raw)
    write(options.out, raw)
    print(table(raw))


def measured(shape: tuple[int, ...], dtype: torch.dtype, peak: float) -> Iterator[dict[str, Any]]:
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    copies = max(2, min(MOST_COPIES, round(COPIES_BYTES / n_bytes)))
    for job in jobs(shape, dtype, copies):
        graphs = {"ours": captured(job.ours, copies)}
        if job.torch is not None:
            graphs["torch"] = captured(job.torch, copies)
        times: dict[str, list[float]] = {side: [] for side in graphs}
        for _ in range(ROUNDS):
            for side in random.sample(sorted(graphs), len(graphs)):
                times[side].append(timed(graphs[side].replay) / copies)
        medians = {side: statistics.median(found) for side, found in times.items()}
        least_us = job.passes * n_bytes / peak / 1e6
        yield {
            "shape": list(shape),
            "dtype": str(dtype)[6:],
            "name": job.name,
            "mebibytes": job.passes * n_bytes / 2**20,
            "least_us": least_us,
            **{f"{side}_us": median for side, median in medians.items()},
            **{f"{side}_spread_us": max(found) - min(found) for side, found in times.items()},
        }


def jobs(shape: tuple[int, ...], dtype: torch.dtype, copies: int) -> list[Job]:
    def made() -> list[Tensor]:
        return [laid(shape, dtype) for _ in range(copies)]

    ys, residuals, grads = made(), made(), made()
    norm = Norm(*(torch.rand(shape[1], device="cuda") for _ in range(4)))
    sums = [kernels.column_sums(y) for y in ys]
    plain = [kernels.normalize(y, None, norm, None, "relu") for y in ys]
    added = [kernels.normalize(y, None, norm, z, "relu") for y, z in zip(ys, residuals, strict=True)]

    def backward(at: int, made: list[Any], other: bool) -> Any:
        out, saved = made[at]
        needs = (True, other, True, True)
        return kernels.normalize_backward(grads[at], ys[at], out if other else None, saved, norm, "relu", (), needs)

    torch_norm = [one.clone().requires_grad_(place < 2) for place, one in enumerate(norm[:4])]
    leaves = [y.clone().requires_grad_() for y in ys]
    added_leaves = [z.clone().requires_grad_() for z in residuals]

    def forward(y: Tensor, residual: Tensor | None) -> Tensor:
        weight, bias, mean, var = torch_norm
        out = F.batch_norm(y, mean, var, weight, bias, True, 0.1, 1e-5)
        return torch.relu_(out if residual is None else out.add_(residual))

    def forward_alone(at: int, residual: bool) -> Tensor:
        with torch.no_grad():
            return forward(ys[at], residuals[at] if residual else None)

    outs = {False: [forward(y, None) for y in leaves]}
    outs[True] = [forward(y, z) for y, z in zip(leaves, added_leaves, strict=True)]

    def torch_backward(at: int, residual: bool) -> Any:
        wanted = [leaves[at], *torch_norm[:2], *([added_leaves[at]] if residual else [])]
        return torch.autograd.grad(outs[residual][at], wanted, grads[at], retain_graph=True)

    def activation(at: int) -> Any:
        return kernels.activation_backward(grads[at], plain[at][0], "relu", from_output=True, bias=True)

    def torch_activation(at: int) -> Any:
        g = torch.ops.aten.threshold_backward(grads[at], plain[at][0], 0)
        return g, g.sum((0, 2, 3))

    return [
        Job("column_sums", 1, lambda at: kernels.column_sums(ys[at])),
        Job("normalize, relu, sums given", 2, lambda at: kernels.normalize(ys[at], sums[at], norm, None, "relu")),
        Job(
            "normalize, residual, relu, sums given",
            3,
            lambda at: kernels.normalize(ys[at], sums[at], norm, residuals[at], "relu"),
        ),
        Job(
            "normalize, relu",
            3,
            lambda at: kernels.normalize(ys[at], None, norm, None, "relu"),
            lambda at: forward_alone(at, False),
        ),
        Job(
            "normalize, residual, relu",
            4,
            lambda at: kernels.normalize(ys[at], None, norm, residuals[at], "relu"),
            lambda at: forward_alone(at, True),
        ),
        Job("gradients of relu", 5, lambda at: backward(at, plain, False), lambda at: torch_backward(at, False)),
        Job(
            "gradients of residual, relu", 7, lambda at: backward(at, added, True), lambda at: torch_backward(at, True)
        ),
        Job("relu's gradient and the bias's", 3, activation, torch_activation),
    ]


def laid(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)


def captured(call: Call, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of one call for each copy of the tensors."""
    for at in range(copies):
        call(at)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for at in range(copies):
            call(at)
    graph.replay()
    return graph


def timed(run: Callable[[], None]) -> float:
    """Microseconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def copying() -> float:
    """What a plain copy of a gigabyte reaches, in TB/s read and written."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(ROUNDS)]
    return 2 * 2**30 / statistics.median(times) / 1e6


def host() -> dict[str, float]:
    """Microseconds of the host's for one call, on tensors that the device is done with at once."""
    found = {}
    for job in jobs((2, 64, 4, 4), torch.float16, 1):
        for side, call in (("ours", job.ours), ("torch", job.torch)):
            if call is None:
                continue
            for _ in range(20):
                call(0)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS_OF_HOST):
                call(0)
            found[f"{job.name}: {side}"] = (time.perf_counter() - begin) / CALLS_OF_HOST * 1e6
            torch.cuda.synchronize()
    return found


def write(out: Path, raw: dict[str, Any]) -> None:
    (out / "kernels.json").write_text(json.dumps(raw, indent=1) + "\n")
    (out / "kernels.md").write_text(table(raw))


def table(raw: dict[str, Any]) -> str:
    lines = [
        "# Kernels of batch normalization",
        "",
        f"Commit {raw['commit']}; {raw['gpu']}, torch {raw['torch']}. A plain copy moves {raw['copy_tb_per_s']:.2f} "
        "TB/s; `least` is the time in which it would read and write what has to be, once.",
        "",
        "| function | y | dtype | MiB | least us | convplan us | ± | of the copy's rate | torch us | ± "
        "| torch / convplan |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in raw["rows"]:
        theirs = row.get("torch_us")
        beside = ["-", "-", "-"]
        if theirs is not None:
            beside = [f"{theirs:.1f}", f"{row['torch_spread_us']:.1f}", f"{theirs / row['ours_us']:.2f}"]
        lines.append(
            f"| {row['name']} | {'x'.join(map(str, row['shape']))} | {row['dtype']} | {row['mebibytes']:.0f} | "
            f"{row['least_us']:.1f} | {row['ours_us']:.1f} | {row['ours_spread_us']:.1f} | "
            f"{row['least_us'] / row['ours_us']:.2f} | {' | '.join(beside)} |"
        )
    lines += ["", "The host's time for one call, in us:", "", "| function | convplan | torch |", "|---|---|---|"]
    for name in [name.removesuffix(": ours") for name in raw["host"] if name.endswith(": ours")]:
        theirs = raw["host"].get(f"{name}: torch")
        lines.append(f"| {name} | {raw['host'][f'{name}: ours']:.1f} | {'-' if theirs is None else f'{theirs:.1f}'} |")
    lines += ["", f"Not reached: {'; '.join(raw['not_reached'])}"] if raw["not_reached"] else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Inference of whole models: stock torch eager, compiled and graphed, against `convplan.fuse` in the same three ways.

    python benchmarks/fused_models.py                     # $OUT/fused_models.json, .md (default results/gpu)
    python benchmarks/fused_models.py --device cpu --small --models unet-2d,resnet-50 --dtypes float32
    CUDA_VISIBLE_DEVICES=0 python benchmarks/fused_models.py --dtypes float16 --name a --limit-s 400 &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/fused_models.py --dtypes bfloat16 --name b --limit-s 400 &
    wait; python benchmarks/fused_models.py --merge a,b   # put together as fused_models.json, fused_models.md

Every side runs in a process of its own, with weights in the dtype that is named, channels-last: stock torch with
benchmark mode on from its first call, convplan with its plans in a store that is filled by tuning first. A round asks
each side of a case for one sample, in shuffled order, while the others wait; the figure is the middle of the rounds.
Results are compared with float32 in stock torch: a side may be off by half as much again as stock torch's eager run is.
The fused model is compiled with `convplan.compile_options(fuse=True)`, stock torch's by `torch.compile` as it comes.
The ratios compare like with like: both eager, both compiled, both in a CUDA graph; and the fused model, eager, with a
compiled one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from run_cpu import commit
from run_models import ALLOWANCE, LATE, REFERENCE, WARM_UPS, Process, deeplab, merge, resnet50, serve, timed
from run_models import Side as ModelSide
from torch import Tensor, nn

HERE = Path(__file__).parent
WAYS = ("eager", "compiled", "graphed")
SIDES = tuple((library, way) for library in ("stock", "fuse") for way in WAYS)
# Columns of ratios: stock torch's way, and the fused model's that it is compared with.
RATIOS = (("eager", "eager"), ("compiled", "eager"), ("compiled", "compiled"), ("graphed", "graphed"))
FEWEST_SAMPLES = 5  # of a side whose rounds were cut short
ROUNDS_S = 25.0  # left for comparing and timing what was ready in time
FLOOR = 1e-4  # folded weights are rounded elsewhere, which float32 alone would tell
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class UNet2d(nn.Module):
    """Four levels of two convolutions with batch norm and ReLU, as for segmenting images."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(channels: int, out: int) -> nn.Module:
            layers: list[nn.Module] = []
            for size in (channels, out):
                layers += [nn.Conv2d(size, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        widths = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        self.wider = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.up = nn.ModuleList(block(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level in self.down:
            x = level(self.pool(x) if kept else x)
            kept.append(x)
        for wider, level, beside in zip(self.wider, self.up, reversed(kept[:-1]), strict=True):
            x = level(torch.cat([wider(x), beside], dim=1))
        return self.head(x)


# Model; dims of one input, those of a small one, and how many at a time.
MODELS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "resnet-50": (resnet50, (3, 224, 224), (3, 64, 64), (1, 32)),
    "unet-2d": (lambda small: UNet2d(8 if small else 64), (3, 256, 256), (3, 32, 32), (1, 32)),
    "deeplabv3": (deeplab, (3, 512, 512), (3, 64, 64), (1, 32)),
}


class Side(ModelSide):
    """One way to run a model, by one library, in one dtype."""

    def __init__(self, options: argparse.Namespace, name: str, library: str, way: str) -> None:
        make, dims, few, _ = MODELS[name]
        torch.backends.cudnn.benchmark = library == "stock"
        torch.manual_seed(0)
        self.device, self.cuda, self.training = options.device, options.device == "cuda", False
        self.library, self.way, self.exact = library, way, library == REFERENCE
        dtype = torch.float32 if self.exact else DTYPES[options.dtypes]
        if self.exact:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        net, x = make(options.small), torch.randn(int(options.batches), *(few if options.small else dims))
        self._calibrate(net, few)
        self.net = net.eval().to(self.device, dtype).to(memory_format=torch.channels_last)
        self.x = x.to(self.device, dtype).to(memory_format=torch.channels_last)
        self.call: Callable[[Tensor], Tensor] = self.net
        self.run: Callable[[], Tensor] = self.step

    @staticmethod
    def _calibrate(net: nn.Module, dims: tuple[int, ...]) -> None:
        """Batch norms that have seen something, the same in every process, with weights that matter."""
        generator = torch.Generator().manual_seed(1)
        norms = [one for one in net.modules() if isinstance(one, nn.BatchNorm2d)]
        net.eval()
        for one in norms:
            one.weight.data.copy_(0.7 + 0.6 * torch.rand(one.weight.shape, generator=generator))
            one.momentum = 1.0
            one.train()
        with torch.no_grad():
            net(torch.randn(4, *dims, generator=generator))

    def prepare(self, phase: str) -> None:
        """Everything that happens once: fusing, tuning, compiling, capturing."""
        assert phase == "inference"
        options = None
        if self.library == "fuse":
            import convplan

            self.call = convplan.fuse(self.net)
            convplan.tune(self.step)
            options = convplan.compile_options(fuse=True)
        if self.way == "compiled":
            self.call = torch.compile(self.call, options=options)
            if self.library == "fuse":
                convplan.tune(self.step)  # of what Inductor has laid out in another way
        for _ in range(WARM_UPS):
            self.step()
        self.wait()
        if self.way == "graphed":
            self.capture()

    def step(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.x)


def compare(options: argparse.Namespace, name: str, dtype: str, batch: int) -> dict[str, Any] | None:
    """All sides of one case, or those that were ready in time; None where both eager ones were not."""
    chosen = [side for side in SIDES if side[1] != "graphed" or options.device == "cuda"]
    more = ("--dtypes", dtype, "--batches", str(batch))
    keys = [(REFERENCE, "eager"), *chosen]
    sides = {key: Process(options, name, *key, script=Path(__file__), more=more) for key in keys}
    try:
        for side in sides.values():
            side.deadline = options.deadline - ROUNDS_S
        ready = prepared(sides)
        late = [key for key, answer in ready.items() if answer.get("failed") == LATE]
        if any(key[1] == "eager" for key in late):
            return None
        for key, side in sides.items():
            if key in late:
                side.end()  # it would disturb the others
            side.deadline = options.deadline
        rows = timed(options, list(sides.values()), list(ready.values()))
    finally:
        for side in sides.values():
            side.end()
    return {"model": name, "dtype": dtype, "batch": batch, "rows": rows} if in_time(rows) else None


def in_time(rows: list[dict[str, Any]]) -> bool:
    """Whether the rounds were more than begun when the time was over; what they have then counts.

    A side that was not ready in time has no samples, and stays failed.
    """
    for row in rows:
        if row["failed"] == LATE and row["samples_ms"]:
            if len(row["samples_ms"]) < FEWEST_SAMPLES:
                return False
            row["failed"] = ""
    return True


def prepared(sides: dict[tuple[str, str], Process]) -> dict[tuple[str, str], dict[str, Any]]:
    """What each side says once it is ready. Convplan's eager one tunes, and the others find its plans in the store."""
    first = ("fuse", "eager")
    waiting = [key for key in sides if key[0] == "fuse" and key != first]
    for key, side in sides.items():
        if key not in waiting:
            side.say(do="prepare", phase="inference")
    heard = {first: sides[first].hear()}
    for key in waiting:
        sides[key].say(do="prepare", phase="inference")
    return {key: heard[key] if key in heard else side.hear() for key, side in sides.items()}


# ---- the table


def table(raw: dict[str, Any]) -> str:
    lines = ["# Fused models, inference", "", *raw["about"], ""]
    lines += [
        "Milliseconds, with half the distance between the quartiles of the rounds. Ratios: stock torch's time over the",
        "fused model's; `eager / eager` is both eager, `compiled / eager` stock torch compiled, the fused model eager,",
        "and so on.",
        "",
    ]
    heads = [f"{library} {way}" for library, way in SIDES]
    named = [f"{stock} / {mine}" for stock, mine in RATIOS]
    lines += [f"| model | dtype | batch | {' | '.join(heads)} | {' | '.join(named)} | |"]
    lines += ["|---|---|---:|" + "---:|" * (len(heads) + len(named)) + "---|"]
    ratios: dict[str, list[float]] = {one: [] for one in named}
    for case in raw["cases"]:
        rows = {(row["library"], row["way"]): row for row in case["rows"]}
        cells = [cell(rows.get(key)) for key in SIDES]
        for one, (stock, mine) in zip(named, RATIOS, strict=True):
            found = over(rows.get(("stock", stock)), rows.get(("fuse", mine)))
            cells.append("-" if found is None else f"{found:.2f}")
            ratios[one] += [] if found is None else [found]
        told = trouble(rows)
        lines.append(f"| {case['model']} | {case['dtype']} | {case['batch']} | {' | '.join(cells)} | {told} |")
    lines.append("")
    for one, found_ones in ratios.items():
        if found_ones:
            mean, lowest = statistics.geometric_mean(found_ones), min(found_ones)
            lines.append(f"{one}: geometric mean {mean:.3f} over {len(found_ones)} cases, lowest {lowest:.3f}.")
    return "\n".join(lines) + "\n"


def over(stock: dict[str, Any] | None, mine: dict[str, Any] | None) -> float | None:
    """How many times as fast; None where either has no time."""
    if stock is None or mine is None or not stock["ms"] or not mine["ms"]:
        return None
    return float(stock["ms"] / mine["ms"])


def cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None or row["ms"] is None else f"{row['ms']:.3f} ± {row['spread_ms']:.3f}"


def trouble(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """What failed, and what is farther from float32 than it may be."""
    eager = rows.get(("stock", "eager"), {}).get("off")
    told = []
    for (library, way), row in rows.items():
        if row["failed"]:
            told.append(f"{library} {way}: {row['failed']}")
        elif row["off"] is not None and eager is not None and row["off"] > ALLOWANCE * eager + FLOOR:
            told.append(f"{library} {way}: off by {row['off']:.2g}, stock eager by {eager:.2g}")
    return "; ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="", help="by default those of each model")
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--seconds", type=float, default=3.0, help="rounds of one case")
    parser.add_argument("--small", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--name", default="fused_models", help="of the files, without their ending")
    parser.add_argument("--merge", default="", help="run nothing: put the files of these names together")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="stop then, with what there is")
    options = parser.parse_args()
    options.deadline = time.perf_counter() + options.limit_s
    if options.side:
        serve(lambda: Side(options, *options.side))
        return
    options.out = Path(os.environ.get("OUT", HERE / "results" / "gpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        merge(options, options.merge.split(","), "cases", write)
        return
    unknown = sorted(set(options.models.split(",")) - set(MODELS)) + sorted(
        set(options.dtypes.split(",")) - set(DTYPES)
    )
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; models are {', '.join(MODELS)}, dtypes {', '.join(DTYPES)}")
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    about = [f"Commit {os.environ.get('COMMIT') or commit()}, torch {torch.__version__}, {gpu}."]
    raw: dict[str, Any] = {"about": about, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            os.environ["CONVPLAN_CACHE_DIR"] = str(Path(folder, name))
            batches = [int(one) for one in options.batches.split(",")] if options.batches else MODELS[name][3]
            for dtype in options.dtypes.split(","):
                for batch in batches:
                    late = time.perf_counter() > options.deadline
                    case = None if late else compare(options, name, dtype, batch)
                    if case is None:
                        about.append(f"Not reached: {name}, {dtype}, batch {batch}.")
                    else:
                        raw["cases"].append(case)
                    write(options, raw)
    print(table(raw))


def write(options: argparse.Namespace, raw: dict[str, Any]) -> None:
    (options.out / f"{options.name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    (options.out / f"{options.name}.md").write_text(table(raw))


if __name__ == "__main__":
    main()

"""Training steps: stock torch eager and compiled against `convplan.fuse_training`, launched and in a CUDA graph.

    python benchmarks/training.py                         # $OUT/training.json, training.md (default results/gpu)
    python benchmarks/training.py --device cpu --small --models bottleneck,unet-3d --dtypes float32
    CUDA_VISIBLE_DEVICES=0 python benchmarks/training.py --dtypes float16 --name a --limit-s 550 &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/training.py --dtypes bfloat16 --name b --limit-s 550 &
    wait; python benchmarks/training.py --merge a,b       # put together as training.json, training.md

A step is forward, loss, backward and SGD with momentum, channels-last, in autocast, with weights in float32. Every side
has a process of its own: stock torch with benchmark mode on from its first call, the same compiled, and the fused model
under `enable()` with tuned plans. What is chosen by timing is chosen alone on the GPU, but for convplan's plans: while
those are tuned, another process fills Inductor's cache. Then a round asks each side for one sample, in shuffled order,
while the others wait; the figure is the middle of the rounds. The same processes then run the whole step as one CUDA
graph. Of the bottleneck block, forward and backward are graphs of their own too, each timed by events. Of whole models,
last, the model alone is made a graphed callable, which is one line in a training loop: by
`torch.cuda.make_graphed_callables`, and the compiled one by `mode="reduce-overhead"`; loss and optimizer are launched.

Before each kind of rounds every side is put back to the same weights and takes two steps: the loss after the first one
and some gradients of it are compared with float32. A side may be off by half as much again as stock torch's eager run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fused_models import DTYPES, cell, in_time, over
from run_cpu import commit
from run_models import ALLOWANCE, LATE, REFERENCE, WARM_UPS, Process, UNet3d, merge, serve, timed
from run_models import Side as ModelSide
from torch import Tensor, nn

HERE = Path(__file__).parent
STOCK, COMPILED, OURS = ("stock", "eager"), ("stock", "compiled"), ("convplan", "fused")
SIDES = (STOCK, COMPILED, OURS)
STAGES = ("forward", "backward")
FLOORS = {"loss": 0.01, "gradients": 0.05}  # what any side may be off by
LEARNING_RATE = 0.01
FP16_SCALE = 1024.0  # of the loss, so that small gradients are not lost
COMPARED = 8  # gradients, from the first parameter to the last
CLASSES = 4  # of a voxel


class Model(NamedTuple):
    """A model to train.

    Args:
        make: of whether it is to be small.
        dims, few: of one input, and of a small one.
        batches: how many at a time.
        target: what the loss compares with: labels of images, labels of voxels, or "gradient": the model is a part of
            one, its input wants a gradient, and its output's is given.
        stages: forward and backward are timed on their own as well.
    """

    make: Callable[[bool], nn.Module]
    dims: tuple[int, ...]
    few: tuple[int, ...]
    batches: tuple[int, ...]
    target: str = "labels"
    stages: bool = False


def gentle(net: nn.Module) -> nn.Module:
    """The same, with branches that add little: else gradients of 16-bit runs have next to nothing in common with
    those of float32 at the weights that a deep network begins with, and comparing them would tell nothing."""
    from torchvision.models.mobilenetv2 import InvertedResidual
    from torchvision.models.resnet import Bottleneck

    for part in net.modules():
        if isinstance(part, Bottleneck):
            nn.init.constant_(part.bn3.weight, 0.2)
        elif isinstance(part, InvertedResidual) and part.use_res_connect:
            nn.init.constant_(part.conv[-1].weight, 0.2)
    return net


def bottleneck(small: bool) -> nn.Module:
    from torchvision.models.resnet import Bottleneck

    return Bottleneck(32, 8) if small else Bottleneck(256, 64)


def resnet50(small: bool) -> nn.Module:
    import torchvision

    return gentle(torchvision.models.resnet50(num_classes=10 if small else 1000))


def mobilenet(small: bool) -> nn.Module:
    import torchvision

    return gentle(torchvision.models.mobilenet_v2(num_classes=10 if small else 1000, width_mult=0.25 if small else 1.0))


MODELS = {
    "resnet-50": Model(resnet50, (3, 224, 224), (3, 64, 64), (64, 256)),
    "bottleneck": Model(bottleneck, (256, 56, 56), (32, 8, 8), (64,), "gradient", stages=True),
    "mobilenet-v2": Model(mobilenet, (3, 224, 224), (3, 64, 64), (64,)),
    "unet-3d": Model(
        lambda small: UNet3d(8 if small else 32, nn.BatchNorm3d), (1, 128, 128, 128), (1, 16, 16, 16), (2,), "voxels"
    ),
}


# ---- one side, in a process of its own


class Side(ModelSide):
    """A model that is trained by one library in one dtype, in one way at a time."""

    def __init__(self, options: argparse.Namespace, name: str, library: str, way: str) -> None:
        self.model = MODELS[name]
        torch.backends.cudnn.benchmark = library == "stock"
        torch.manual_seed(0)
        self.device, self.cuda, self.training = options.device, options.device == "cuda", True
        self.library, self.way, self.exact = library, way, library == REFERENCE
        if self.exact:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.dtype = DTYPES[options.dtypes]
        dims = self.model.few if options.small else self.model.dims
        form = torch.channels_last if len(dims) == 3 else torch.channels_last_3d
        net, x = self.model.make(options.small), torch.randn(int(options.batches), *dims)
        self.net = net.train().to(self.device).to(memory_format=form)
        self.x = x.to(self.device).to(memory_format=form)
        self._set_target(x, small=options.small)
        scaled = self.dtype is torch.float16 and self.model.target != "gradient" and not self.exact
        self.scale = FP16_SCALE if scaled else 1.0
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LEARNING_RATE / self.scale, momentum=0.9)
        self.start = {name: value.detach().clone() for name, value in self.net.state_dict().items()}
        self.call: Callable[[Tensor], Tensor] = self.net
        self.pieces: list[Callable[[], Tensor]] = [self.step]
        self.run = self.all_pieces
        self.root: Tensor | None = None
        self.phase = ""

    def _set_target(self, x: Tensor, *, small: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        if (
            self.model.target == "gradient"
        ):  # inside a network activations are in autocast's dtype, and so is this input
            self.x = self.x.to(self.dtype)
            given = torch.randn(x.shape, generator=generator).to(self.dtype) / 64
            if self.exact:
                self.x, given = self.x.float(), given.float()
            self.x.requires_grad_()
            form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            self.target = given.to(self.device).to(memory_format=form)
            return
        classes, dims = (CLASSES, (len(x), *x.shape[2:])) if self.model.target == "voxels" else (1000, (len(x),))
        if small and self.model.target == "labels":
            classes = 10
        self.target = torch.randint(classes, dims, generator=generator).to(self.device)

    def around(self) -> AbstractContextManager[object]:
        if self.exact or self.dtype is torch.float32:
            return nullcontext()
        # A graph keeps the addresses of the weights' copies, which must not be those of a cache that is emptied.
        return torch.autocast(self.device, self.dtype, cache_enabled=False)

    # ---- a step and its parts

    def forward(self) -> Tensor:
        with self.around():
            y = self.call(self.x)
            if self.model.target == "gradient":
                self.root = y
                return y.detach()
            loss = F.cross_entropy(y, self.target)
        self.root = loss * self.scale
        return loss.detach()

    def backward(self) -> Tensor:
        assert self.root is not None
        root, self.root = self.root, None  # a graph that lives on would tie gradients to the stream it was made on
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None
        root.backward(self.target.to(root.dtype) if self.model.target == "gradient" else None)
        return root.detach()

    def update(self) -> Tensor:
        self.optimizer.step()
        return self.x

    def step(self) -> Tensor:
        value = self.forward()
        self.backward()
        self.update()
        return value

    def all_pieces(self) -> Tensor:
        """What was prepared; the loss, or the output of a part of a network."""
        value, *_ = [piece() for piece in self.pieces]
        return value

    # ---- preparing

    def prepare(self, phase: str) -> None:
        """Everything that happens once: fusing, tuning, compiling at first; capturing."""
        if not self.phase and not self.exact:
            self._make_ready()
        self.phase = phase
        if self.exact:
            return
        self.pieces = [self.forward, self.backward, self.update] if phase in STAGES else [self.step]
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()  # of the graph before, and of what was tried: others need the room
            if phase == "callable":
                self._graph_model()
            elif phase != "eager":
                self.pieces = self._captured(self.pieces)
        self.wait()

    def _make_ready(self) -> None:
        if self.library == "convplan":
            import convplan

            convplan.enable()
            self.call = convplan.fuse_training(self.net)
            convplan.tune(self.step)
        elif self.way == "compiled":
            self.call = torch.compile(self.net)
        for _ in range(WARM_UPS):
            self.step()
        self.wait()

    def _graph_model(self) -> None:
        """For good: nothing else can be captured with it afterwards."""
        if self.way == "compiled":
            self.call = torch.compile(self.net, mode="reduce-overhead")
        else:
            with self.around():
                self.call = torch.cuda.make_graphed_callables(self.call, (self.x,))
        for _ in range(WARM_UPS):
            self.step()

    def _captured(self, pieces: list[Callable[[], Tensor]]) -> list[Callable[[], Tensor]]:
        """Each piece as a graph that is replayed; they are meant to run in this order."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                for piece in pieces:
                    piece()
        torch.cuda.current_stream().wait_stream(side)
        found: list[Callable[[], Tensor]] = []
        pool: Any = None
        for piece in pieces:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                value = piece()
            pool = graph.pool()
            found.append(replaying(graph, value))
        return found

    # ---- what is asked of it

    def sample_ms(self, calls: int) -> float:
        if self.phase not in STAGES:
            return super().sample_ms(calls)
        before, after = STAGES.index(self.phase), STAGES.index(self.phase) + 1
        self.wait()
        marks: list[list[Any]] = []
        for _ in range(calls):
            marks.append([self._mark()])
            for piece in self.pieces:
                piece()
                marks[-1].append(self._mark())
        self.wait()
        took = [self._between_ms(one[before], one[after]) for one in marks]
        return sum(took) / calls

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between_ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) if self.cuda else (end - begin) * 1e3

    def result(self) -> list[Tensor]:
        """From the weights it began with: the loss after one step, then some gradients of that step."""
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                value.copy_(self.start[name])
            for state in self.optimizer.state.values():
                if (momentum := state.get("momentum_buffer")) is not None:
                    momentum.zero_()
        self.run()
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        places = sorted({round(n * (len(gradients) - 1) / (COMPARED - 1)) for n in range(COMPARED)})
        found = [gradients[place].detach().float().cpu() / self.scale for place in places]
        value = self.run().float()
        if self.model.target == "gradient":
            value = (value * self.target).sum()
        loss = value.detach().cpu()
        if self.exact and self.cuda:
            self.net.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return [loss, *found]


def replaying(graph: torch.cuda.CUDAGraph, value: Tensor) -> Callable[[], Tensor]:
    def replay() -> Tensor:
        graph.replay()
        return value

    return replay


# ---- the rounds


def apart(found: list[Tensor] | None, right: list[Tensor] | None) -> dict[str, float] | None:
    """How far the loss after a step is from the reference's, and the gradients, each over its own size."""
    if found is None or right is None or len(found) != len(right):
        return None
    (loss, *gradients), (right_loss, *right_gradients) = found, right
    squares = [
        float((a - b).square().sum() / b.square().sum().clamp_min(1e-30))
        for a, b in zip(gradients, right_gradients, strict=True)
    ]
    return {
        "loss": abs(float(loss - right_loss)) / max(abs(float(right_loss)), 1e-30),
        "gradients": math.sqrt(sum(squares) / max(len(squares), 1)),
    }


def compare(options: argparse.Namespace, case: dict[str, Any], write_all: Callable[[], None]) -> bool:
    """All sides of one case, its phases written as they end; whether there was time for all of them."""
    phases = ["eager", *(["graphed"] if options.device == "cuda" else [])]
    phases += STAGES if MODELS[case["model"]].stages else ["callable"] if options.device == "cuda" else []
    more = ("--dtypes", case["dtype"], "--batches", str(case["batch"]))

    def process(key: tuple[str, str]) -> Process:
        return Process(options, case["model"], *key, script=Path(__file__), more=more)

    sides = {key: process(key) for key in ((REFERENCE, "eager"), *SIDES)}
    fills_cache = process(COMPILED) if options.device == "cuda" else None
    try:
        for phase in phases:
            ready = prepared(sides, phase, fills_cache)
            fills_cache = None
            if any(answer.get("failed") == LATE for answer in ready):
                return False
            rows = timed(options, list(sides.values()), ready, apart)
            if not in_time(rows):
                return False
            case["phases"][phase] = rows
            write_all()
    finally:
        for side in (*sides.values(), *([fills_cache] if fills_cache else [])):
            side.end()
    return True


def prepared(sides: dict[tuple[str, str], Process], phase: str, fills_cache: Process | None) -> list[dict[str, Any]]:
    """What each side says once it is ready: one after the other, so that none disturbs another's choice.

    Args:
        sides: the processes.
        phase: what for.
        fills_cache: compiles the same model first, while plans are tuned, and is ended then.
    """
    heard = {}
    for key in ((REFERENCE, "eager"), STOCK):
        heard[key] = sides[key].ask(do="prepare", phase=phase)
    if fills_cache is not None:
        fills_cache.say(do="prepare", phase=phase)
    heard[OURS] = sides[OURS].ask(do="prepare", phase=phase)
    if fills_cache is not None:
        fills_cache.hear()
        fills_cache.end()
    heard[COMPILED] = sides[COMPILED].ask(do="prepare", phase=phase)
    return [heard[key] for key in sides]


# ---- the table

HEADS = {
    "eager": "step", "graphed": "step, one CUDA graph", "forward": "forward", "backward": "backward",
    "callable": "step, the model a graphed callable",
}  # fmt: skip


def table(raw: dict[str, Any]) -> str:
    lines = ["# Training steps", "", *raw["about"], ""]
    lines += [
        "Milliseconds, with half the distance between the quartiles of the rounds. Ratios: stock torch's time over the",
        "fused model's, run in the same way. Off: how far the loss after a step and some of its gradients are from",
        "float32, in stock torch's eager run and in the fused model.",
        "",
        "| model | dtype | batch | what | stock eager | stock compiled | fused | eager / fused | compiled / fused "
        "| off: loss | off: gradients | |",
        "|---|---|---:|---|" + "---:|" * 5 + "---|---|---|",
    ]
    ratios: dict[tuple[str, str], list[float]] = {}
    for case in raw["cases"]:
        for phase, listed in case["phases"].items():
            rows = {(row["library"], row["way"]): row for row in listed}
            cells = [cell(rows.get(key)) for key in SIDES]
            for key in (STOCK, COMPILED):
                found = over(rows.get(key), rows.get(OURS))
                cells.append("-" if found is None else f"{found:.2f}")
                if found is not None:
                    ratios.setdefault((phase, key[1]), []).append(found)
            cells += [f"{off(rows, STOCK, what)} / {off(rows, OURS, what)}" for what in FLOORS]
            named = f"{case['model']} | {case['dtype']} | {case['batch']} | {HEADS[phase]}"
            lines.append(f"| {named} | {' | '.join(cells)} | {trouble(rows)} |")
    lines.append("")
    for (phase, way), each in ratios.items():
        mean = statistics.geometric_mean(each)
        lines.append(
            f"- {HEADS[phase]}, stock {way} / fused: geometric mean {mean:.3f} of {len(each)}, lowest {min(each):.3f}"
        )
    return "\n".join(lines) + "\n"


def off(rows: dict[tuple[str, str], dict[str, Any]], key: tuple[str, str], what: str) -> str:
    found = rows.get(key, {}).get("off")
    return "-" if found is None else f"{found[what]:.2g}"


def trouble(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    """What failed, and what is farther from float32 than it may be."""
    stock = rows.get(STOCK, {}).get("off")
    told = []
    for (library, way), row in rows.items():
        if row["failed"]:
            told.append(f"{library} {way}: {row['failed']}")
        for what, floor in FLOORS.items():
            if row["off"] is None or stock is None:
                continue
            allowed = ALLOWANCE * stock[what] + floor
            if not row["off"][what] <= allowed:  # NaN is not
                told.append(f"{library} {way}: {what} off by {row['off'][what]:.2g}, allowed {allowed:.2g}")
    return "; ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="", help="by default those of each model")
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--seconds", type=float, default=4.0, help="rounds of one case, launched; again in a graph")
    parser.add_argument("--small", action="store_true", help="small models and inputs, to see that it runs")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="stop then, with what there is")
    parser.add_argument("--name", default="training", help="of the files, without their ending")
    parser.add_argument("--merge", default="", help="run nothing: put the files of these names together")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
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
    unknown = sorted({*options.models.split(",")} - {*MODELS}) + sorted({*options.dtypes.split(",")} - {*DTYPES})
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; models are {', '.join(MODELS)}, dtypes {', '.join(DTYPES)}")
    run(options)


def run(options: argparse.Namespace) -> None:
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    about = [f"Commit {os.environ.get('COMMIT') or commit()}, torch {torch.__version__}, {gpu}."]
    raw: dict[str, Any] = {"about": about, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
        for name in options.models.split(","):
            os.environ["CONVPLAN_CACHE_DIR"] = str(Path(folder, name))
            batches = [int(one) for one in options.batches.split(",")] if options.batches else MODELS[name].batches
            for batch in batches:
                for dtype in options.dtypes.split(","):
                    case: dict[str, Any] = {"model": name, "dtype": dtype, "batch": batch, "phases": {}}
                    raw["cases"].append(case)
                    late = time.perf_counter() > options.deadline
                    if late or not compare(options, case, lambda: write(options, raw)):
                        what = "the rest of it" if case["phases"] else "all of it"
                        about.append(f"Not reached: {name}, {dtype}, batch {batch}, {what}.")
                    write(options, raw)
    print(table(raw))


def write(options: argparse.Namespace, raw: dict[str, Any]) -> None:
    (options.out / f"{options.name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    (options.out / f"{options.name}.md").write_text(table(raw))


if __name__ == "__main__":
    main()

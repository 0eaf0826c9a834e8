"""Whole models, eager, compiled, graphed and fused, by convplan and by stock torch: times, and results compared.

    python benchmarks/run_models.py                                  # $OUT/models.json, models.md (default results/gpu)
    python benchmarks/run_models.py --device cpu --small --ways eager
    CUDA_VISIBLE_DEVICES=0 python benchmarks/run_models.py --models resnet-50,convnext-t --name a --limit-s 500 &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/run_models.py --models unet-3d,vae-decoder --name b --limit-s 500 &
    wait; python benchmarks/run_models.py --merge a,b                # put together as models.json, models.md

Every side runs in a process of its own: stock torch with benchmark mode on from its first call, convplan with its plans
in a store that is filled by tuning first. On a GPU in bfloat16 autocast, channels-last. A round asks each side of a
model for one sample, in shuffled order, while the others wait; the figure is the middle of the rounds. Results are
compared with float32 without autocast in stock torch: a side may be off by half as much again as stock torch is,
eager or in the same way. What counts is the best of stock torch's ways over the best of convplan's: of all ways, of
those without CUDA graphs, and the better of stock torch's eager and compiled runs over all that convplan has.

    eager          the model as it is; convplan's side under `enable()`
    compiled       `torch.compile`, the same
    kept           `torch.compile` with `convplan.compile_options()`, by which Inductor keeps convplan's plans; for
                   inference with `fuse=True`
    reduced        compiled into CUDA graphs by Inductor (`mode="reduce-overhead"`); convplan's side keeps its plans
    graphed        the eager step as one CUDA graph
    fused          convplan's `fuse`, and `fuse_training` for the training step, launched one by one
    fused-graphed  the same as one CUDA graph; both only of models with batch norms, for the others are left as they are
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from run_cpu import commit
from torch import Tensor, nn

HERE = Path(__file__).parent
WAYS = ("eager", "compiled", "kept", "reduced", "graphed", "fused", "fused-graphed")
GRAPHS = ("reduced", "graphed", "fused-graphed")  # CUDA's, for GPUs only
STOCK_LACKS = ("kept", "fused", "fused-graphed")
FUSED = ("fused", "fused-graphed")
FUSIBLE = ("resnet-50", "deeplabv3")  # models with batch norms
LAUNCHED = tuple(way for way in WAYS if way not in GRAPHS)
# What is compared, and the ways of stock torch and of convplan that it is compared of.
COMPARED = (
    ("all ways", WAYS, WAYS),
    ("without CUDA graphs", LAUNCHED, LAUNCHED),
    ("stock torch eager or compiled, convplan in any way", ("eager", "compiled"), WAYS),
)
PHASES = ("inference", "training")
REFERENCE = "reference"
ALLOWANCE = 1.5  # times stock torch's own distance from float32
WARM_UPS = 4
SAMPLE_S = 0.05
LATE = "the time was over"


# ---- models


class Residual(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU, as in the decoders of diffusion models."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        groups = min(32, channels // 4)
        self.first, self.one = nn.GroupNorm(groups, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.second, self.two = nn.GroupNorm(min(32, out // 4), out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(F.silu(self.first(x)))
        return self.shortcut(x) + self.two(F.silu(self.second(y)))


class Doubled(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def vae_decoder(width: int) -> nn.Module:
    """Latents to pixels, eight times as large: the convolutions of a latent diffusion model's decoder."""
    layers: list[nn.Module] = [nn.Conv2d(4, 4 * width, 3, padding=1), Residual(4 * width, 4 * width)]
    channels = 4 * width
    for place, out in enumerate((4 * width, 4 * width, 2 * width, width)):
        layers += [Residual(channels, out), Residual(out, out), Residual(out, out)]
        layers += [Doubled(out)] if place < 3 else []
        channels = out
    return nn.Sequential(
        *layers, nn.GroupNorm(min(32, width // 4), width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)
    )


class UNet3d(nn.Module):
    """Three levels, a norm (instance norm, if not told) and leaky ReLU, as for segmenting volumes."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        make_norm = norm or (lambda channels: nn.InstanceNorm3d(channels, affine=True))

        def block(channels: int, out: int, stride: int = 1) -> nn.Module:
            first = nn.Conv3d(channels, out, 3, stride=stride, padding=1, bias=False)
            second = nn.Conv3d(out, out, 3, padding=1, bias=False)
            norms = (make_norm(out) for _ in range(2))
            return nn.Sequential(first, next(norms), nn.LeakyReLU(0.01), second, next(norms), nn.LeakyReLU(0.01))

        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList([block(1, widths[0]), block(widths[0], widths[1], 2), block(widths[1], widths[2], 2)])
        self.wider = nn.ModuleList([nn.ConvTranspose3d(widths[n + 1], widths[n], 2, stride=2) for n in (1, 0)])
        self.up = nn.ModuleList([block(2 * widths[n], widths[n]) for n in (1, 0)])
        self.head = nn.Conv3d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level in self.down:
            x = level(x)
            kept.append(x)
        for wider, level, beside in zip(self.wider, self.up, (kept[1], kept[0]), strict=True):
            x = level(torch.cat([wider(x), beside], dim=1))
        return self.head(x)


class Output(nn.Module):
    """A model whose result is a field of another."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(x)
        return found[self.field] if isinstance(found, dict) else getattr(found, self.field)


def resnet50(small: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    sizes = {"hidden_sizes": [16, 32, 48, 64], "embedding_size": 8, "depths": [1, 1, 1, 1]} if small else {}
    return Output(ResNetModel(ResNetConfig(**sizes)), "pooler_output")


def convnext(small: bool) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    sizes = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]} if small else {}
    return Output(ConvNextModel(ConvNextConfig(**sizes)), "pooler_output")


def deeplab(small: bool) -> nn.Module:
    import torchvision

    return Output(torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None), "out")


# Model; dims of its input, and those of a small one.
MODELS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "resnet-50": (resnet50, (64, 3, 224, 224), (2, 3, 64, 64)),
    "convnext-t": (convnext, (64, 3, 224, 224), (2, 3, 64, 64)),
    "unet-3d": (lambda small: UNet3d(8 if small else 32), (2, 1, 128, 128, 128), (1, 1, 16, 16, 16)),
    "vae-decoder": (lambda small: vae_decoder(16 if small else 128), (1, 4, 64, 64), (1, 4, 8, 8)),
    "deeplabv3": (deeplab, (8, 3, 512, 512), (2, 3, 64, 64)),
}


# ---- one side, in a process of its own


class Side:
    """One way to run a model, by one library."""

    def __init__(self, options: argparse.Namespace, name: str, library: str, way: str) -> None:
        make, dims, few = MODELS[name]
        torch.backends.cudnn.benchmark = library == "stock"
        torch.manual_seed(0)
        self.device, self.cuda = options.device, options.device == "cuda"
        self.exact = library == REFERENCE
        if self.exact:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.net = make(options.small).to(self.device)
        self.x = torch.randn(few if options.small else dims, device=self.device)
        if self.x.dim() == 4 or self.cuda:
            form = torch.channels_last if self.x.dim() == 4 else torch.channels_last_3d
            self.net, self.x = self.net.to(memory_format=form), self.x.to(memory_format=form)
        self.library, self.way = library, way
        self.run: Callable[[], Tensor] = self.step

    def around(self) -> AbstractContextManager[object]:
        if self.exact or not self.cuda:
            return nullcontext()
        # A graph keeps the addresses of the weights' copies, which must not be those of a cache that is emptied.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=self.way not in GRAPHS)

    def prepare(self, phase: str) -> None:
        """Everything that happens once: tuning, compiling, capturing."""
        self.training = phase == "training"
        self.net.train(self.training)
        self.call: Callable[[Tensor], Tensor] = self.net
        self.run = self.step
        if self.library == "convplan":
            import convplan

            if self.way not in ("kept", "reduced"):
                convplan.enable()
            if self.way in FUSED:
                self.call = (convplan.fuse_training if self.training else convplan.fuse)(self.net)
            convplan.tune(self.step)
        if self.way in ("compiled", "kept", "reduced"):
            self._compile()
        for _ in range(WARM_UPS):
            self.step()
        self.wait()
        if self.way in ("graphed", "fused-graphed"):
            self.capture()

    def _compile(self) -> None:
        mode = "reduce-overhead" if self.way == "reduced" else None
        if self.library == "stock" or self.way == "compiled":
            self.call = torch.compile(self.net, mode=mode)
        else:
            import convplan

            # Of a compiled graph one call alone comes before its capture: that one has to tune.
            policy = convplan.Policy(tune_after=1) if mode else None
            options = convplan.compile_options(policy, mode=mode, fuse=not self.training)
            self.call = torch.compile(self.net, options=options)
        if self.library == "convplan" and not mode:
            import convplan

            convplan.tune(self.step)  # of what Inductor has laid out in another way

    def step(self) -> Tensor:
        with self.around():
            if not self.training:
                with torch.no_grad():
                    return self.call(self.x)
            self.net.zero_grad(set_to_none=True)
            y = self.call(self.x)
        y.float().square().mean().backward()
        return y

    def capture(self) -> None:
        """The whole step as one graph, replayed."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = self.step()

        def replay() -> Tensor:
            graph.replay()
            return y

        self.run = replay

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sample_ms(self, calls: int) -> float:
        self.wait()
        begin = time.perf_counter()
        for _ in range(calls):
            self.run()
        self.wait()
        return (time.perf_counter() - begin) * 1e3 / calls

    def result(self) -> list[Tensor]:
        """The output, or what a step leaves in the gradients."""
        y = self.run()
        self.wait()
        found = [p.grad for p in self.net.parameters() if p.grad is not None] if self.training else [y]
        return [one.detach().float().cpu() for one in found]


def side_program(options: argparse.Namespace) -> None:
    serve(lambda: Side(options, *options.side))


def serve(make: Callable[[], Side]) -> None:
    """Answers one JSON object a line with one a line.

    Args:
        make: makes the side, which prepares itself for a phase, takes samples and hands out its result.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    side = make()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if request["do"] == "prepare":
                begin = time.perf_counter()
                side.prepare(request["phase"])
                answer["seconds"] = time.perf_counter() - begin
            elif request["do"] == "sample":
                answer["ms"] = side.sample_ms(request["calls"])
            else:
                torch.save(side.result(), request["path"])
        except Exception as exc:  # one side's failure is a line of the table
            answer["failed"] = f"{type(exc).__name__}: {str(exc).splitlines()[0][:300]}"
        answers.write(json.dumps(answer) + "\n")


class Process:
    """A side from outside.

    Args:
        options: of the script, whose device and size the side is told.
        name, library, way: which side.
        script: has an option `--side` that takes these three, and serves.
        more: further options of the script.

    Attributes:
        deadline: when answers are no longer waited for, on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        name: str,
        library: str,
        way: str,
        script: Path = Path(__file__),
        more: tuple[str, ...] = (),
    ) -> None:
        self.library, self.way, self.failed = library, way, ""
        self.deadline: float = options.deadline
        command = [sys.executable, str(script.resolve()), "--device", options.device, *more]
        command += ["--small"] if options.small else []
        command += ["--side", name, library, way]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, **request: Any) -> None:
        if not self.failed and self._child.stdin is not None:
            with suppress(BrokenPipeError):
                self._child.stdin.write(json.dumps(request) + "\n")
                self._child.stdin.flush()

    def hear(self) -> dict[str, Any]:
        if self.failed or self._child.stdout is None:
            return {}
        left_s = self.deadline - time.perf_counter()
        # Nothing of an earlier answer is left behind: each is one line, and is read before the next is asked for.
        if not select.select([self._child.stdout], [], [], None if left_s == math.inf else max(left_s, 0.0))[0]:
            self.failed = LATE
            return {"failed": LATE}
        line = self._child.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": "the process ended"}
        self.failed = answer.get("failed", "")
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        self.say(**request)
        return self.hear()

    def end(self) -> None:
        self._child.kill()
        self._child.wait()


# ---- the rounds


def compare(options: argparse.Namespace, found: dict[str, Any], write: Callable[[], None]) -> None:
    """All sides of one model; its phases are written as they end."""
    name = found["model"]
    ways = [way for way in options.ways.split(",") if way not in GRAPHS or options.device == "cuda"]
    ways = [way for way in ways if way not in FUSED or name in FUSIBLE]
    # The first of convplan's tunes, while stock torch's get ready; the others find its plans in the store. What is
    # fused is tuned by the first of the fused ones.
    waves: list[list[tuple[str, str]]] = [[(REFERENCE, "eager")], [], []]
    waves[0] += [("stock", way) for way in ways if way not in STOCK_LACKS] + [("convplan", "eager")]
    waves[1] += [("convplan", way) for way in ways if way not in ("eager", "fused-graphed")]
    waves[2] += [("convplan", way) for way in ways if way == "fused-graphed"]
    waiting = [[Process(options, name, *key) for key in wave] for wave in waves]
    sides = [side for wave in waiting for side in wave]
    try:
        for phase in options.phases.split(","):
            ready = []
            for wave in waiting:
                for side in wave:
                    side.say(do="prepare", phase=phase)
                ready += [side.hear() for side in wave]
            found["phases"][phase] = timed(options, sides, ready)
            write()
    finally:
        for side in sides:
            side.end()


def timed(
    options: argparse.Namespace,
    sides: list[Process],
    ready: list[dict[str, Any]],
    apart: Callable[[list[Tensor] | None, list[Tensor] | None], Any] | None = None,
) -> list[dict[str, Any]]:
    """Rounds of all sides but the reference, and how far each is from it: what `apart` says, else `distance`."""
    results: list[list[Tensor] | None] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, side in enumerate(sides):
            path = Path(folder, f"{number}.pt")
            side.ask(do="result", path=str(path))
            results.append(torch.load(path, weights_only=True) if path.is_file() else None)
    racing = [side for side in sides if side.library != REFERENCE and not side.failed]
    once_ms = [side.ask(do="sample", calls=1).get("ms", math.inf) for side in racing]
    calls = max(1, round(SAMPLE_S * 1e3 / max(min(once_ms, default=1.0), 1e-3)))
    samples: dict[Process, list[float]] = {side: [] for side in racing}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < min(end, options.deadline) or min(map(len, samples.values()), default=5) < 5:
        random.shuffle(racing)
        for side in racing:
            answer = side.ask(do="sample", calls=calls)
            samples[side] += [answer["ms"]] if "ms" in answer else []
        if any(side.failed for side in racing):
            break
    return [
        {
            "library": side.library,
            "way": side.way,
            "failed": side.failed,
            "ms": statistics.median(samples[side]) if samples.get(side) else None,
            "spread_ms": spread(samples.get(side, [])),
            "samples_ms": samples.get(side, []),
            "ready_s": prepared.get("seconds"),
            "off": (apart or distance)(result, results[0]),
        }
        for side, prepared, result in zip(sides, ready, results, strict=True)
        if side.library != REFERENCE
    ]


def spread(samples: list[float]) -> float:
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2


def distance(found: list[Tensor] | None, right: list[Tensor] | None) -> float | None:
    """How far results are from the reference's, over its size."""
    if found is None or right is None or len(found) != len(right):
        return None
    off = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(found, right, strict=True)))
    return off / max(math.sqrt(sum(float(b.square().sum()) for b in right)), 1e-30)


# ---- the table


def table(raw: dict[str, Any]) -> str:
    lines = ["# Whole models", "", *raw["about"], ""]
    ratios: dict[tuple[str, str], list[float]] = {}
    for model in raw["models"]:
        for phase, rows in model["phases"].items():
            lines += [f"## {model['model']}, {phase}", "", "| library | way | ms | ± | ready after s | off | |"]
            lines += ["|---|---|---:|---:|---:|---:|---|"]
            stock = {row["way"]: row["off"] for row in rows if row["library"] == "stock" and row["off"] is not None}
            for row in rows:
                same_way = stock.get("compiled" if row["way"] == "kept" else row["way"], 0.0)
                lines.append(row_text(row, max(same_way, stock["eager"]) if "eager" in stock else None))
            found = [(told, over(rows, *ways)) for told, *ways in COMPARED]
            for told, ratio in found:
                ratios.setdefault((phase, told), []).extend([ratio] if ratio else [])
            if any(ratio for _, ratio in found):
                lines += ["", "Best of stock torch over best of convplan:"]
                lines[-1] += " " + "; ".join(f"{told} {ratio:.3f}" for told, ratio in found if ratio) + "."
            lines.append("")
    for (phase, told), each in ratios.items():
        if each:
            mean = statistics.geometric_mean(each)
            lines.append(
                f"- {phase}, {told}: geometric mean {mean:.3f} over {len(each)} models, lowest {min(each):.3f}"
            )
    return "\n".join(lines) + "\n"


def over(rows: list[dict[str, Any]], stock: tuple[str, ...], mine: tuple[str, ...]) -> float:
    """The best of some ways of stock torch's over the best of some of convplan's; 0 where either has none."""

    def best_ms(library: str, ways: tuple[str, ...]) -> float:
        asked = [row for row in rows if row["library"] == library and row["way"] in ways]
        return min((row["ms"] for row in asked if row["ms"] and not row["failed"]), default=0.0)

    convplan_ms = best_ms("convplan", mine)
    return best_ms("stock", stock) / convplan_ms if convplan_ms else 0.0


def row_text(row: dict[str, Any], stock: float | None) -> str:
    off, ms = row["off"], row["ms"]
    wrong = off is not None and stock is not None and off > ALLOWANCE * stock + 1e-6
    told = row["failed"] or ("farther from float32 than allowed" if wrong else "")
    numbers = ("" if ms is None else f"{ms:.2f}", f"{row['spread_ms']:.2f}", f"{row['ready_s'] or 0:.0f}")
    return (
        f"| {row['library']} | {row['way']} | {' | '.join(numbers)} | {'' if off is None else f'{off:.2g}'} | {told} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", default=",".join(name for name in MODELS if name != "deeplabv3"))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="rounds of one model and phase")
    parser.add_argument("--small", action="store_true", help="small models, to see that it runs")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="stop then, with what there is")
    parser.add_argument("--name", default="models", help="of the files, without their ending")
    parser.add_argument("--merge", default="", help="run nothing: put the files of these names together")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.deadline = time.perf_counter() + options.limit_s
    if options.side:
        side_program(options)
        return
    options.out = Path(os.environ.get("OUT", HERE / "results" / "gpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        merge(options, options.merge.split(","))
        return
    unknown = sorted(set(options.models.split(",")) - set(MODELS)) + sorted(set(options.ways.split(",")) - set(WAYS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; models are {', '.join(MODELS)}, ways {', '.join(WAYS)}")
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    raw: dict[str, Any] = {
        "about": [f"Commit {os.environ.get('COMMIT') or commit()}, torch {torch.__version__}, {gpu}."],
        "models": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            os.environ["CONVPLAN_CACHE_DIR"] = str(Path(folder, name))
            found: dict[str, Any] = {"model": name, "phases": {}}
            if time.perf_counter() > options.deadline:
                raw["about"].append(f"{name}: {LATE}.")
            else:
                raw["models"].append(found)
                compare(options, found, lambda: write(options, raw))
            write(options, raw)
    print(table(raw))


def write(options: argparse.Namespace, raw: dict[str, Any]) -> None:
    (options.out / f"{options.name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    (options.out / f"{options.name}.md").write_text(table(raw))


def merge(
    options: argparse.Namespace,
    names: list[str],
    kind: str = "models",
    put: Callable[[argparse.Namespace, dict[str, Any]], None] = write,
) -> None:
    """One file and one table of several, each of which ran some of the models.

    Args:
        options: with the folder and the name of the result.
        names: of the files.
        kind: the key of what is put together.
        put: writes the whole and its table.
    """
    raw: dict[str, Any] = {"about": [], kind: []}
    missing = []
    for name in names:
        file = options.out / f"{name}.json"
        if not file.is_file():
            missing.append(name)
            continue
        part = json.loads(file.read_text())
        raw["about"] += [line for line in part["about"] if line not in raw["about"]]
        raw[kind] += part[kind]
    raw["about"] += [f"{name}: no file of that name was there." for name in missing]
    put(options, raw)
    for name in {*names} - {options.name, *missing}:
        (options.out / f"{name}.json").unlink()
        (options.out / f"{name}.md").unlink(missing_ok=True)
    print((options.out / f"{options.name}.md").read_text())


if __name__ == "__main__":
    main()

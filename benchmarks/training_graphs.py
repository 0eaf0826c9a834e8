"""What cuDNN's graphs for training cost beside the passes over memory that they would save, layer by layer.

    python benchmarks/training_graphs.py                       # $OUT/training_graphs.json, .md (default results/gpu)
    python benchmarks/training_graphs.py --absent H200.json    # no GPU needed: how many configurations cuDNN offers

Convolutions with the sums of batch norm behind them, with a normalization folded into their input, with ReLU's backward
and batch norm's reductions behind dgrad: each form's best plan, of those that the heuristics propose and that build in
time, is timed in a CUDA graph. Beside them stand copies of the tensors, which say what a pass over memory takes. This
is the evidence for what was built and what was not; float16, channels last, batch 64. With `--absent` the GPU is
known by its properties alone (`convplan doctor --device-properties`), and nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from run_cpu import commit

from convplan._problem import channels_last_strides
from convplan.engines.cudnn import configs
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor
from convplan.engines.cudnn.enums import Attribute, ConvolutionMode, DataType, DescriptorType, PointwiseMode
from convplan.engines.cudnn.plans import ExecutionPlan, build_plan
from convplan.engines.cudnn.target import Target, present

HERE = Path(__file__).parent
ALIGNMENT_BYTES = 16
SUM_AND_SQUARES = 0  # cudnnGenStatsMode_t
SOURCES = ("mode_a", "mode_b", "fallback")
RUNS = 10  # in one CUDA graph
REPLAYS = 7
TOO_LONG_MS = 5.0  # a plan that takes that long is not worth timing


class Layer(NamedTuple):
    """A convolution: channels in and out, size of the filter and of the image, batch."""

    c: int
    k: int
    window: int
    size: int
    n: int = 64

    def __str__(self) -> str:
        return f"{self.c}->{self.k} {self.window}x{self.window} @{self.size}"

    @property
    def x(self) -> tuple[int, ...]:
        return (self.n, self.c, self.size, self.size)

    @property
    def w(self) -> tuple[int, ...]:
        return (self.k, self.c, self.window, self.window)

    @property
    def y(self) -> tuple[int, ...]:
        return (self.n, self.k, self.size, self.size)


LAYERS = (
    Layer(64, 64, 3, 56),
    Layer(64, 256, 1, 56),
    Layer(512, 128, 1, 28),
    Layer(256, 256, 3, 14),
    Layer(256, 1024, 1, 14),
    Layer(512, 2048, 1, 7),
)


# ---- graphs


class Building:
    """A graph in the making.

    Attributes:
        given: identifier, dims and dtype of each tensor that a run reads or writes.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.given: list[tuple[int, tuple[int, ...], DataType]] = []
        self._operations: list[Descriptor] = []
        self._count = 0

    def tensor(self, dims: tuple[int, ...], dtype: DataType = DataType.HALF, *, virtual: bool = False) -> Descriptor:
        self._count += 1
        made = Descriptor(self.target.library, DescriptorType.TENSOR)
        made.set(Attribute.TENSOR_UNIQUE_ID, self._count).set(Attribute.TENSOR_DATA_TYPE, dtype)
        made.set(Attribute.TENSOR_BYTE_ALIGNMENT, ALIGNMENT_BYTES)
        made.set(Attribute.TENSOR_DIMENSIONS, dims).set(Attribute.TENSOR_STRIDES, channels_last_strides(dims))
        if virtual:
            made.set(Attribute.TENSOR_IS_VIRTUAL, True)
        else:
            self.given.append((self._count, dims, dtype))
        return made.finalize()

    def virtual(self, dims: tuple[int, ...], dtype: DataType = DataType.FLOAT) -> Descriptor:
        """What stands between two nodes."""
        return self.tensor(dims, dtype, virtual=True)

    def vector(self, channels: int, dtype: DataType = DataType.FLOAT) -> Descriptor:
        return self.tensor((1, channels, 1, 1), dtype)

    def add(self, kind: DescriptorType, values: dict[Attribute, object]) -> None:
        operation = Descriptor(self.target.library, kind)
        for attribute, value in values.items():
            operation.set(attribute, value)
        self._operations.append(operation.finalize())

    def convolution(self, op: str, layer: Layer, x: Descriptor, w: Descriptor, y: Descriptor) -> None:
        """fprop, dgrad or wgrad; which of the three tensors is written follows from that."""
        kind, prefix, roles = {
            "fprop": (DescriptorType.OPERATION_CONVOLUTION_FORWARD, "FORWARD", ("X", "W", "Y")),
            "dgrad": (DescriptorType.OPERATION_CONVOLUTION_BACKWARD_DATA, "BWD_DATA", ("DX", "W", "DY")),
            "wgrad": (DescriptorType.OPERATION_CONVOLUTION_BACKWARD_FILTER, "BWD_FILTER", ("X", "DW", "DY")),
        }[op]
        around = (layer.window // 2,) * 2
        window = Descriptor(self.target.library, DescriptorType.CONVOLUTION)
        window.set(Attribute.CONVOLUTION_COMP_TYPE, DataType.FLOAT).set(Attribute.CONVOLUTION_SPATIAL_DIMS, 2)
        window.set(Attribute.CONVOLUTION_CONV_MODE, ConvolutionMode.CROSS_CORRELATION)
        window.set(Attribute.CONVOLUTION_PRE_PADDINGS, around).set(Attribute.CONVOLUTION_POST_PADDINGS, around)
        window.set(Attribute.CONVOLUTION_FILTER_STRIDES, (1, 1)).set(Attribute.CONVOLUTION_DILATIONS, (1, 1))
        named = f"OPERATION_CONVOLUTION_{prefix}"
        values = {Attribute[f"{named}_{role}"]: tensor for role, tensor in zip(roles, (x, w, y), strict=True)}
        settings = {"CONV_DESC": window.finalize(), "ALPHA": 1.0, "BETA": 0.0}
        self.add(kind, values | {Attribute[f"{named}_{name}"]: value for name, value in settings.items()})

    def pointwise(self, mode: PointwiseMode, x: Descriptor, b: Descriptor | None, y: Descriptor) -> None:
        """y of x, and of b where the mode has two inputs; of a backward mode, b is the gradient and y its result."""
        how = Descriptor(self.target.library, DescriptorType.POINTWISE).set(Attribute.POINTWISE_MODE, mode)
        how.set(Attribute.POINTWISE_MATH_PREC, DataType.FLOAT)
        values: dict[Attribute, object] = {
            Attribute.OPERATION_POINTWISE_PW_DESCRIPTOR: how.finalize(),
            Attribute.OPERATION_POINTWISE_XDESC: x,
        }
        backward = mode is PointwiseMode.RELU_BWD
        if b is not None:
            values[Attribute.OPERATION_POINTWISE_DYDESC if backward else Attribute.OPERATION_POINTWISE_BDESC] = b
        values[Attribute.OPERATION_POINTWISE_DXDESC if backward else Attribute.OPERATION_POINTWISE_YDESC] = y
        self.add(DescriptorType.OPERATION_POINTWISE, values)

    def statistics(self, y: Descriptor, channels: int) -> None:
        """Sum and sum of squares of each channel."""
        values: dict[Attribute, object] = {
            Attribute.OPERATION_GENSTATS_MODE: SUM_AND_SQUARES,
            Attribute.OPERATION_GENSTATS_MATH_PREC: DataType.FLOAT,
            Attribute.OPERATION_GENSTATS_XDESC: y,
            Attribute.OPERATION_GENSTATS_SUMDESC: self.vector(channels),
            Attribute.OPERATION_GENSTATS_SQSUMDESC: self.vector(channels),
        }
        self.add(DescriptorType.OPERATION_GEN_STATS, values)

    def column_sum(self, y: Descriptor, channels: int) -> None:
        how = Descriptor(self.target.library, DescriptorType.REDUCTION).set(Attribute.REDUCTION_OPERATOR, 0)
        how.set(Attribute.REDUCTION_COMP_TYPE, DataType.FLOAT)
        values: dict[Attribute, object] = {
            Attribute.OPERATION_REDUCTION_DESC: how.finalize(),
            Attribute.OPERATION_REDUCTION_XDESC: y,
            Attribute.OPERATION_REDUCTION_YDESC: self.vector(channels),
        }
        self.add(DescriptorType.OPERATION_REDUCTION, values)

    def folded(self, layer: Layer) -> Descriptor:
        """relu(x * scale + shift), which is never written. With a step in float32 cuDNN has fewer engines for it."""
        x = self.tensor(layer.x)
        times, plus, result = (self.virtual(layer.x, DataType.HALF) for _ in range(3))
        self.pointwise(PointwiseMode.MUL, x, self.vector(layer.c, DataType.HALF), times)
        self.pointwise(PointwiseMode.ADD, times, self.vector(layer.c, DataType.HALF), plus)
        self.pointwise(PointwiseMode.RELU_FWD, plus, None, result)
        return result

    def finished(self) -> Descriptor:
        graph = Descriptor(self.target.library, DescriptorType.OPERATIONGRAPH)
        graph.set(Attribute.OPERATIONGRAPH_OPS, self._operations)
        if self.target.index is not None:
            graph.set(Attribute.OPERATIONGRAPH_HANDLE, self.target.handle)
        return graph.finalize()


def forward(building: Building, layer: Layer, *, folds: bool = False, counts: bool = False) -> None:
    x = building.folded(layer) if folds else building.tensor(layer.x)
    y = building.tensor(layer.y)
    building.convolution("fprop", layer, x, building.tensor(layer.w), y)
    if counts:
        building.statistics(y, layer.k)


def weights(building: Building, layer: Layer, *, before: str = "") -> None:
    """wgrad, of a plain input and gradient, or of one that is computed on the way."""
    dy = building.tensor(layer.y)
    if before == "folded":
        x = building.folded(layer)
    elif before == "relu":
        x = building.virtual(layer.x, DataType.HALF)
        building.pointwise(PointwiseMode.RELU_FWD, building.tensor(layer.x), None, x)
    else:
        x = building.tensor(layer.x)
    if before == "relu backward":
        through = building.virtual(layer.y, DataType.HALF)
        building.pointwise(PointwiseMode.RELU_BWD, building.tensor(layer.y), dy, through)
        dy = through
    building.convolution("wgrad", layer, x, building.tensor(layer.w), dy)
    if before == "bias":
        building.column_sum(dy, layer.k)


def data(building: Building, layer: Layer, *, before: bool = False) -> None:
    """dgrad, perhaps of what ReLU's backward leaves of a gradient."""
    dy = building.tensor(layer.y)
    if before:
        through = building.virtual(layer.y, DataType.HALF)
        building.pointwise(PointwiseMode.RELU_BWD, building.tensor(layer.y), dy, through)
        dy = through
    building.convolution("dgrad", layer, building.tensor(layer.x), building.tensor(layer.w), dy)


def data_relu(building: Building, layer: Layer) -> None:
    dx = building.virtual(layer.x)
    building.convolution("dgrad", layer, dx, building.tensor(layer.w), building.tensor(layer.y))
    building.pointwise(PointwiseMode.RELU_BWD, building.tensor(layer.x), dx, building.tensor(layer.x))


def data_relu_norm(building: Building, layer: Layer) -> None:
    """dgrad, ReLU's backward with its input computed anew, and the two sums that batch norm's backward begins with."""
    dx = building.virtual(layer.x)
    building.convolution("dgrad", layer, dx, building.tensor(layer.w), building.tensor(layer.y))
    x = building.tensor(layer.x)
    mean, invstd, scale, bias = (building.vector(layer.c) for _ in range(4))
    last = x
    modes = (PointwiseMode.SUB, PointwiseMode.MUL, PointwiseMode.MUL, PointwiseMode.ADD)
    for mode, by in zip(modes, (mean, invstd, scale, bias), strict=True):
        before, last = last, building.virtual(layer.x)
        building.pointwise(mode, before, by, last)
    masked = building.tensor(layer.x)
    building.pointwise(PointwiseMode.RELU_BWD, last, dx, masked)
    roles: dict[str, object] = {
        "MATH_PREC": DataType.FLOAT,
        "MEAN_DESC": mean,
        "INVSTD_DESC": invstd,
        "BN_SCALE_DESC": scale,
        "X_DESC": x,
        "DY_DESC": masked,
    }
    written = ("DBN_SCALE_DESC", "DBN_BIAS_DESC", "EQ_DY_SCALE_DESC", "EQ_X_SCALE_DESC", "EQ_BIAS")
    roles |= {role: building.vector(layer.c) for role in written}
    values = {Attribute[f"OPERATION_BN_BWD_WEIGHTS_{role}"]: value for role, value in roles.items()}
    building.add(DescriptorType.OPERATION_BN_BWD_WEIGHTS, values)


Form = Callable[[Building, Layer], None]
FORMS: dict[str, Form] = {
    "fprop": forward,
    "fprop + statistics": lambda building, layer: forward(building, layer, counts=True),
    "folded -> fprop": lambda building, layer: forward(building, layer, folds=True),
    "folded -> fprop + statistics": lambda building, layer: forward(building, layer, folds=True, counts=True),
    "wgrad": weights,
    "folded -> wgrad": lambda building, layer: weights(building, layer, before="folded"),
    "dgrad": data,
    "dgrad + relu backward": data_relu,
    "dgrad + relu backward + norm's sums": data_relu_norm,
}
# Asked for too; cuDNN 9.19 offers nothing for them.
UNOFFERED: dict[str, Form] = {
    "relu backward -> dgrad": lambda building, layer: data(building, layer, before=True),
    "relu backward -> wgrad": lambda building, layer: weights(building, layer, before="relu backward"),
    "relu -> wgrad": lambda building, layer: weights(building, layer, before="relu"),
    "wgrad + bias gradient": lambda building, layer: weights(building, layer, before="bias"),
}


class Idea(NamedTuple):
    """Something to fuse.

    Args:
        costs: pairs of forms; what the first takes longer than the second is added up.
        copies: what is saved, in copies of `of`; a copy reads it once and writes it once.
        of: tensor `x` or `y` of the layer.
    """

    costs: tuple[tuple[str, str], ...]
    copies: float
    of: str


IDEAS = {
    "statistics": Idea((("fprop + statistics", "fprop"),), 0.5, "y"),
    "normalization folded into fprop and wgrad": Idea(
        (("folded -> fprop + statistics", "fprop + statistics"), ("folded -> wgrad", "wgrad")), 1.0, "x"
    ),
    "relu backward behind dgrad": Idea((("dgrad + relu backward", "dgrad"),), 1.5, "x"),
    "relu backward and norm's sums behind dgrad": Idea((("dgrad + relu backward + norm's sums", "dgrad"),), 1.0, "x"),
}


# ---- asking and timing


def offered(target: Target, form: Form, layer: Layer) -> tuple[Building, Descriptor | None, list[Any]]:
    """What the heuristics propose for a form, each once, in their order; nothing where cuDNN refuses the graph."""
    building = Building(target)
    try:
        form(building, layer)
        graph = building.finished()
    except CudnnError as exc:
        if not exc.not_supported:
            raise
        return building, None, []
    found: dict[tuple[Any, ...], Any] = {}
    for source in SOURCES:
        for one in configs.heuristic_configurations(graph, target, source):
            found.setdefault((one.engine, one.knobs), one)
    return building, graph, list(found.values())


def count(target: Target, layers: tuple[Layer, ...]) -> dict[str, dict[str, int]]:
    """How many configurations each form has at each layer."""
    return {
        name: {str(layer): len(offered(target, form, layer)[2]) for layer in layers}
        for name, form in {**FORMS, **UNOFFERED}.items()
    }


def best_us(target: Target, form: Form, layer: Layer, *, seconds: float) -> dict[str, Any]:
    """The fastest plan of a form that builds within so many seconds, and what came of the others."""
    import torch

    building, graph, found = offered(target, form, layer)
    told: dict[str, Any] = {"offered": len(found), "failed": 0, "us": None, "engine": None}
    if graph is None:
        return told
    dtypes = {DataType.HALF: torch.float16, DataType.FLOAT: torch.float32}
    tensors = [
        torch.randn(dims, device="cuda").to(dtypes[dtype]).contiguous(memory_format=torch.channels_last)
        for _, dims, dtype in building.given
    ]
    uids = tuple(uid for uid, _, _ in building.given)
    end = time.perf_counter() + seconds
    for one in found:
        if time.perf_counter() > end:
            break
        try:
            plan = build_plan(graph, target, one.engine, dict(one.knobs), uids)
            us = plan_us(target, plan, [tensor.data_ptr() for tensor in tensors])
        except (CudnnError, RuntimeError):  # counted, and the others go on
            told["failed"] += 1
            continue
        if us is not None and (told["us"] is None or us < told["us"]):
            told["us"], told["engine"] = us, one.engine
    return told


def plan_us(target: Target, plan: ExecutionPlan, addresses: list[int]) -> float | None:
    import torch

    workspace = torch.empty(max(plan.workspace_bytes, 1), dtype=torch.uint8, device="cuda")
    given = (*addresses, workspace.data_ptr())

    def call() -> None:
        target.handle.set_stream(torch.cuda.current_stream().cuda_stream)
        plan.execute(target.handle, given)

    try:
        return timed_us(call)
    finally:
        target.handle.set_stream(torch.cuda.current_stream().cuda_stream)


def timed_us(call: Callable[[], object]) -> float | None:
    """Microseconds of a call among others of its kind, in a CUDA graph; None where it is too slow to matter."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    if begin.elapsed_time(end) > TOO_LONG_MS:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RUNS):
            call()
    found = []
    for _ in range(REPLAYS):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / RUNS)
    return statistics.median(found)


def copy_us(dims: tuple[int, ...]) -> float | None:
    """A copy of a tensor."""
    import torch

    source = torch.randn(dims, device="cuda").half().contiguous(memory_format=torch.channels_last)
    target = torch.empty_like(source)
    return timed_us(lambda: target.copy_(source))


def measure(options: argparse.Namespace, raw: dict[str, Any]) -> None:
    import torch

    target = present(torch.cuda.current_device())
    end = time.perf_counter() + options.limit_s
    for layer in LAYERS[: options.layers]:
        row: dict[str, Any] = {"layer": str(layer), "forms": {}, "copies_us": {}}
        raw["layers"].append(row)
        row["copies_us"] = {"x": copy_us(layer.x), "y": copy_us(layer.y)}
        for name, form in {**FORMS, **UNOFFERED}.items():
            if time.perf_counter() > end:
                raw["not_reached"].append(f"{name} at {layer}")
                continue
            row["forms"][name] = best_us(target, form, layer, seconds=options.seconds)
        write(options, raw)


# ---- the table


def gain_us(row: dict[str, Any], idea: Idea) -> float | None:
    """What an idea saves less what it costs; None where a part of that is not known."""
    costs = []
    for more, less in idea.costs:
        a, b = (row["forms"].get(name, {}).get("us") for name in (more, less))
        if a is None or b is None:
            return None
        costs.append(a - b)
    copy = row["copies_us"][idea.of]
    return None if copy is None else float(idea.copies * copy - sum(costs))


def table(raw: dict[str, Any]) -> str:
    lines = ["# Graphs for training", "", *raw["about"], ""]
    if "offered" in raw:
        names = list(next(iter(raw["offered"].values())))
        lines += ["How many configurations cuDNN offers.", "", f"| form | {' | '.join(names)} |"]
        lines += ["|---|" + "---:|" * len(names)]
        lines += [
            f"| {form} | {' | '.join(str(found[name]) for name in names)} |" for form, found in raw["offered"].items()
        ]
        return "\n".join(lines) + "\n"
    rows = raw["layers"]
    heads = [f"| us | {' | '.join(row['layer'] for row in rows)} |", "|---|" + "---:|" * len(rows)]
    lines += ["The best plan of each form, and copies of the layer's tensors.", "", *heads]
    for name in FORMS:
        lines.append(line(name, [row["forms"].get(name, {}).get("us") for row in rows]))
    for name in UNOFFERED:
        counts = [row["forms"][name]["offered"] for row in rows if name in row["forms"]]
        lines.append(f"| {name} | " + " | ".join(f"{number} offered" for number in counts) + " |")
    for of in "xy":
        lines.append(line(f"a copy of {of}", [row["copies_us"].get(of) for row in rows]))
    lines += ["", "What each idea gains in microseconds: the copies that it saves, less what it adds.", "", *heads]
    for name, idea in IDEAS.items():
        lines.append(line(f"{name} ({idea.copies:g} copies of {idea.of})", [gain_us(row, idea) for row in rows]))
    lines += ["", f"Not reached: {', '.join(raw['not_reached'])}."] if raw["not_reached"] else []
    return "\n".join(lines) + "\n"


def line(name: str, values: list[float | None]) -> str:
    return f"| {name} | " + " | ".join("-" if value is None else f"{value:.1f}" for value in values) + " |"


def write(options: argparse.Namespace, raw: dict[str, Any]) -> None:
    (options.out / "training_graphs.json").write_text(json.dumps(raw, indent=1) + "\n")
    (options.out / "training_graphs.md").write_text(table(raw))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--absent", type=Path, help="properties of a GPU that need not be there: only count")
    parser.add_argument("--layers", type=int, default=len(LAYERS), help="so many of them")
    parser.add_argument("--seconds", type=float, default=2.0, help="building and timing one form at one layer")
    parser.add_argument("--limit-s", type=float, default=130.0, help="stop then, with what there is")
    options = parser.parse_args()
    options.out = Path(os.environ.get("OUT", HERE / "results" / "gpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {"about": [f"Commit {os.environ.get('COMMIT') or commit()}; float16, channels last."]}
    if options.absent is not None:
        from convplan.engines.cudnn.device import Device

        device = Device.from_properties(options.absent)
        raw["about"].append(f"Device properties: {options.absent.name}.")
        raw["offered"] = count(Target.absent(device), LAYERS[: options.layers])
    else:
        import torch

        version = torch.backends.cudnn.version()
        raw["about"].append(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {version}.")
        raw |= {"layers": [], "not_reached": []}
        measure(options, raw)
    write(options, raw)
    print(table(raw))


if __name__ == "__main__":
    main()

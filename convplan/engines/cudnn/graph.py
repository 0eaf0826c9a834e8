"""A `Problem` as cuDNN's operation graph: one convolution node over three tensors, and nodes for what follows it (B30).

Here is what a convolution is to cuDNN: dims, strides, dtypes, alignments, the compute type, padding before and after.
Which nodes an epilogue becomes is in `fusion`. Which configurations exist for a graph is in `configs`; how it runs, in
`plans`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from convplan._problem import DTYPES, WRITES, Problem, TensorSpec, channels_last_strides, contiguous_strides
from convplan.engines.cudnn import fusion
from convplan.engines.cudnn.descriptors import Descriptor
from convplan.engines.cudnn.enums import (
    Attribute,
    AttributeType,
    ConvolutionMode,
    DataType,
    DescriptorType,
    GenStatsMode,
    PointwiseMode,
)
from convplan.engines.cudnn.library import Library

if TYPE_CHECKING:
    from convplan.engines.cudnn.target import Target

# Identifiers of the tensors in a graph are letters (B27).
UIDS = {letter: ord(letter) for letter in "xywzbsmqg"}

DATA_TYPES: dict[str, DataType] = {
    "float64": DataType.DOUBLE,
    "float32": DataType.FLOAT,
    "bfloat16": DataType.BFLOAT16,
    "float16": DataType.HALF,
    "int8": DataType.INT8,
    "int32": DataType.INT32,
    "float8_e4m3fn": DataType.FP8_E4M3,
    "float8_e5m2": DataType.FP8_E5M2,
}

_OPERATIONS = {
    "fprop": (DescriptorType.OPERATION_CONVOLUTION_FORWARD, "OPERATION_CONVOLUTION_FORWARD", ("X", "W", "Y")),
    "dgrad": (DescriptorType.OPERATION_CONVOLUTION_BACKWARD_DATA, "OPERATION_CONVOLUTION_BWD_DATA", ("DX", "W", "DY")),
    "wgrad": (
        DescriptorType.OPERATION_CONVOLUTION_BACKWARD_FILTER,
        "OPERATION_CONVOLUTION_BWD_FILTER",
        ("X", "DW", "DY"),
    ),
}


def refusal(problem: Problem) -> str:
    """Why a problem cannot be a graph at all; empty when it can."""
    if problem.is_empty:
        return "the problem is empty"
    for spec in (*problem.inputs, problem.output):
        if spec.dtype not in DATA_TYPES:
            return f"dtype is {spec.dtype}, supported: {', '.join(DATA_TYPES)}"
        largest = max(spec.dims)
        if largest >= 2**31:
            return f"a dimension is {largest}, supported: below 2**31"
    if _overlaps(problem.output):
        return f"the output has strides {problem.output.strides}, supported: a place in memory for each element"
    return fusion.refusal(problem)


def needs_copy(spec: TensorSpec) -> bool:
    """Whether an input must be copied before any engine can read it: elements that share memory."""
    return _overlaps(spec)


def is_strided(problem: Problem) -> bool:
    """Whether an input lies in memory as neither dense layout does."""
    return any(spec.layout == "strided" for spec in problem.inputs)


def dense(problem: Problem) -> Problem:
    """The same problem with its strided inputs in the layout of the other tensors."""
    given = [spec.layout for spec in (*problem.inputs, problem.output) if spec.layout != "strided"]
    layout = "channels_last" if "channels_last" in given else "contiguous"

    def densify(spec: TensorSpec) -> TensorSpec:
        return TensorSpec.dense(spec.dims, spec.dtype, layout) if spec.layout == "strided" else spec

    if problem.op == "fprop":
        return msgspec.structs.replace(problem, x=densify(problem.x), w=densify(problem.w))
    if problem.op == "dgrad":
        return msgspec.structs.replace(problem, y=densify(problem.y), w=densify(problem.w))
    return msgspec.structs.replace(problem, x=densify(problem.x), y=densify(problem.y))


def _overlaps(spec: TensorSpec) -> bool:
    """Two different indices may mean the same element."""
    reach = 1
    for size, stride in sorted(zip(spec.dims, spec.strides, strict=True), key=lambda pair: pair[1]):
        if size > 1:
            if stride < reach:
                return True
            reach += (size - 1) * stride
    return False


def operation_graph(target: Target, problem: Problem, *, specialised: bool = False) -> Descriptor:
    """The finalised graph of a problem that `refusal` has nothing against.

    Args:
        target: what it is for.
        problem: a bias alone is no part of the graph; every other epilogue is.
        specialised: in the form that cuDNN has ready-made engines for; only where `fusion` says that it fits.

    Raises:
        CudnnError: cuDNN refuses a tensor, the convolution, or their combination.
    """
    library = target.library
    accumulate = DTYPES[problem.dtype].accumulate
    kind, prefix, roles = _OPERATIONS[problem.op]
    operation = Descriptor(library, kind)
    dense_strides = dense_strides_of(problem)
    tensors = {letter: tensor(library, letter, getattr(problem, letter), dense_strides) for letter in "xwy"}
    fused = fusion.nodes_behind(problem, specialised)
    nodes = [] if fused is None else _pointwise_nodes(library, problem, fused, tensors, dense_strides)
    ends = tensors if fused is None else {**tensors, WRITES[problem.op]: tensors[fused.result]}
    for role, letter in zip(roles, "xwy", strict=True):
        operation.set(Attribute[f"{prefix}_{role}"], ends[letter])
    operation.set(Attribute[f"{prefix}_CONV_DESC"], _convolution(library, DATA_TYPES[accumulate], window_of(problem)))
    scaling = AttributeType.DOUBLE if accumulate == "float64" else AttributeType.FLOAT
    operation.set(Attribute[f"{prefix}_ALPHA"], 1.0, as_type=scaling)
    operation.set(Attribute[f"{prefix}_BETA"], 0.0, as_type=scaling)
    operation.finalize()

    graph = Descriptor(library, DescriptorType.OPERATIONGRAPH)
    graph.set(Attribute.OPERATIONGRAPH_OPS, [operation, *nodes])
    if target.index is not None:  # engines and heuristics learn from it which GPU they are asked about
        graph.set(Attribute.OPERATIONGRAPH_HANDLE, target.handle)
    return graph.finalize()


def _pointwise_nodes(
    library: Library,
    problem: Problem,
    fused: fusion.Fusion,
    tensors: dict[str, Descriptor],
    dense_strides: Strides,
) -> list[Descriptor]:
    """The nodes behind the convolution; their tensors join `tensors`."""
    for name, spec in fused.given.items():
        tensors[name] = tensor(library, name, spec, dense_strides)
    for name in (*fused.virtual, *fused.constants):
        tensors[name] = tensor(library, name, spec_of(problem, name), dense_strides)
    nodes = [_pointwise_node(library, node, tensors) for node in fused.nodes]
    return [*nodes, _statistics_node(library, tensors[fused.result], tensors)] if fused.statistics else nodes


def spec_of(problem: Problem, name: str) -> TensorSpec:
    """A tensor of a fused graph that is nowhere in the GPU's memory: virtual, or a number that is given by value."""
    if name.startswith("v"):
        alignment_bytes = fusion.VIRTUAL_ALIGNMENT_BYTES
        return msgspec.structs.replace(problem.output, dtype=fusion.INTERMEDIATE, alignment_bytes=alignment_bytes)
    ones = (1,) * len(problem.output.dims)
    return TensorSpec(ones, ones, fusion.INTERMEDIATE)


def _pointwise_node(library: Library, node: fusion.Node, tensors: dict[str, Descriptor]) -> Descriptor:
    operation = Descriptor(library, DescriptorType.OPERATION_POINTWISE)
    operation.set(Attribute.OPERATION_POINTWISE_PW_DESCRIPTOR, _pointwise(library, node.mode, node.settings))
    if node.mode in fusion.BACKWARD:
        operation.set(Attribute.OPERATION_POINTWISE_XDESC, tensors[node.b])
        operation.set(Attribute.OPERATION_POINTWISE_DYDESC, tensors[node.x])
        operation.set(Attribute.OPERATION_POINTWISE_DXDESC, tensors[node.y])
        return operation.finalize()
    operation.set(Attribute.OPERATION_POINTWISE_XDESC, tensors[node.x])
    if node.b:
        operation.set(Attribute.OPERATION_POINTWISE_BDESC, tensors[node.b])
    operation.set(Attribute.OPERATION_POINTWISE_YDESC, tensors[node.y])
    if node.alpha2 != 1:
        operation.set(Attribute.OPERATION_POINTWISE_ALPHA2, node.alpha2)
    return operation.finalize()


def _statistics_node(library: Library, result: Descriptor, tensors: dict[str, Descriptor]) -> Descriptor:
    operation = Descriptor(library, DescriptorType.OPERATION_GEN_STATS)
    operation.set(Attribute.OPERATION_GENSTATS_MODE, GenStatsMode.SUM_SQSUM)
    operation.set(Attribute.OPERATION_GENSTATS_MATH_PREC, DATA_TYPES[fusion.INTERMEDIATE])
    operation.set(Attribute.OPERATION_GENSTATS_XDESC, result)
    for role, letter in zip(("SUMDESC", "SQSUMDESC"), fusion.SUMS, strict=True):
        operation.set(Attribute[f"OPERATION_GENSTATS_{role}"], tensors[letter])
    return operation.finalize()


Strides = Callable[[Sequence[int]], tuple[int, ...]]


def forget_parts() -> None:
    """Let go of the descriptors that graphs share."""
    _convolution.cache_clear()
    _pointwise.cache_clear()
    tensor.cache_clear()


def dense_strides_of(problem: Problem) -> Strides:
    """The layout that is meant where sizes of 1 leave it open, as in a depthwise filter: that of the other tensors.

    Engines that want channels last look at the strides (B2).
    """
    layouts = {spec.layout for spec in (problem.x, problem.w, problem.y)}
    return channels_last_strides if "channels_last" in layouts else contiguous_strides


class Window(NamedTuple):
    """A window as cuDNN takes it: padding before and after, stride and dilation, two or three numbers each."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


def window_of(problem: Problem) -> Window:
    """The window; one spatial dimension is computed as two, the first of size 1 (B5)."""
    before, after = zip(*problem.padding, strict=True)
    if problem.spatial_rank > 1:
        return Window(before, after, problem.stride, problem.dilation)
    return Window((0, *before), (0, *after), (1, *problem.stride), (1, *problem.dilation))


# Kept, because one network has few of them and asks for them at every size of its images.
@functools.lru_cache(maxsize=64)
def _convolution(library: Library, accumulate: DataType, window: Window) -> Descriptor:
    convolution = Descriptor(library, DescriptorType.CONVOLUTION)
    convolution.set(Attribute.CONVOLUTION_COMP_TYPE, accumulate)
    convolution.set(Attribute.CONVOLUTION_CONV_MODE, ConvolutionMode.CROSS_CORRELATION)
    convolution.set(Attribute.CONVOLUTION_SPATIAL_DIMS, len(window.stride))
    convolution.set(Attribute.CONVOLUTION_PRE_PADDINGS, window.before)
    convolution.set(Attribute.CONVOLUTION_POST_PADDINGS, window.after)
    convolution.set(Attribute.CONVOLUTION_FILTER_STRIDES, window.stride)
    convolution.set(Attribute.CONVOLUTION_DILATIONS, window.dilation)
    return convolution.finalize()


@functools.lru_cache(maxsize=64)
def _pointwise(library: Library, mode: PointwiseMode, settings: fusion.Settings) -> Descriptor:
    pointwise = Descriptor(library, DescriptorType.POINTWISE)
    pointwise.set(Attribute.POINTWISE_MODE, mode)
    pointwise.set(Attribute.POINTWISE_MATH_PREC, DATA_TYPES[fusion.INTERMEDIATE])
    for attribute, value in settings:
        pointwise.set(attribute, value)
    return pointwise.finalize()


@functools.lru_cache(maxsize=128)
def tensor(library: Library, name: str, spec: TensorSpec, dense_strides: Strides = contiguous_strides) -> Descriptor:
    """One tensor of a graph; `name` identifies it, `dense_strides` is the layout that it has if its strides allow."""
    dims, strides = tensor_layout(spec, dense_strides)
    descriptor = Descriptor(library, DescriptorType.TENSOR)
    descriptor.set(Attribute.TENSOR_UNIQUE_ID, fusion.uid_of(name))
    descriptor.set(Attribute.TENSOR_DATA_TYPE, DATA_TYPES[spec.dtype])
    descriptor.set(Attribute.TENSOR_BYTE_ALIGNMENT, spec.alignment_bytes)
    descriptor.set(Attribute.TENSOR_DIMENSIONS, dims)
    descriptor.set(Attribute.TENSOR_STRIDES, strides)
    if len(name) > 1:
        virtual = name.startswith("v")
        descriptor.set(Attribute.TENSOR_IS_VIRTUAL if virtual else Attribute.TENSOR_IS_BY_VALUE, True)
    return descriptor.finalize()


def tensor_layout(spec: TensorSpec, dense_strides: Strides) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dims and strides of a tensor of a graph, see `tensor`."""
    dims, strides = with_unit_dimension(spec.dims, spec.strides)
    wanted = dense_strides(dims)
    dense_as_wanted = all(size == 1 or have == want for size, have, want in zip(dims, strides, wanted, strict=True))
    return dims, wanted if dense_as_wanted else strides


def with_unit_dimension(dims: Sequence[int], strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dims and strides of at least four dimensions: one spatial dimension gets one of size 1 before it (B5)."""
    if len(dims) > 3:
        return tuple(dims), tuple(strides)
    lifted = (dims[0], dims[1], 1, dims[2])
    for layout in (contiguous_strides, channels_last_strides):
        if layout(dims) == tuple(strides):
            return lifted, layout(lifted)
    return lifted, (strides[0], strides[1], dims[2] * strides[2], strides[2])

"""Graphs, configurations and plans in descriptors, for tests of the layer that makes them."""

from __future__ import annotations

from convplan.engines.cudnn.descriptors import Descriptor
from convplan.engines.cudnn.enums import Attribute, ConvolutionMode, DataType, DescriptorType, HeurMode
from convplan.engines.cudnn.library import Library

HALF_NHWC = ((8, 64, 56, 56), (64 * 56 * 56, 1, 56 * 64, 64))
FILTER = ((64, 64, 3, 3), (64 * 9, 1, 3 * 64, 64))


def tensor(library: Library, letter: str, dims: tuple[int, ...], strides: tuple[int, ...]) -> Descriptor:
    return (
        Descriptor(library, DescriptorType.TENSOR)
        .set(Attribute.TENSOR_DATA_TYPE, DataType.HALF)
        .set(Attribute.TENSOR_DIMENSIONS, dims)
        .set(Attribute.TENSOR_STRIDES, strides)
        .set(Attribute.TENSOR_UNIQUE_ID, ord(letter))
        .set(Attribute.TENSOR_BYTE_ALIGNMENT, 16)
        .finalize()
    )


def convolution(library: Library) -> Descriptor:
    descriptor = (
        Descriptor(library, DescriptorType.CONVOLUTION)
        .set(Attribute.CONVOLUTION_COMP_TYPE, DataType.FLOAT)
        .set(Attribute.CONVOLUTION_CONV_MODE, ConvolutionMode.CROSS_CORRELATION)
        .set(Attribute.CONVOLUTION_SPATIAL_DIMS, 2)
    )
    for name in ("DILATIONS", "FILTER_STRIDES", "POST_PADDINGS", "PRE_PADDINGS"):
        descriptor.set(Attribute[f"CONVOLUTION_{name}"], [1, 1])
    return descriptor.finalize()


def fprop(library: Library) -> Descriptor:
    """The operation graph of an fp16 NHWC convolution, 8x64x56x56, 64 filters of 3x3."""
    x, w, y = tensor(library, "x", *HALF_NHWC), tensor(library, "w", *FILTER), tensor(library, "y", *HALF_NHWC)
    operation = Descriptor(library, DescriptorType.OPERATION_CONVOLUTION_FORWARD)
    values = {"ALPHA": 1.0, "BETA": 0.0, "CONV_DESC": convolution(library), "W": w, "X": x, "Y": y}
    for name, value in values.items():
        operation.set(Attribute[f"OPERATION_CONVOLUTION_FORWARD_{name}"], value)
    graph = Descriptor(library, DescriptorType.OPERATIONGRAPH)
    return graph.set(Attribute.OPERATIONGRAPH_OPS, [operation.finalize()]).finalize()


def configurations(graph: Descriptor, device: Descriptor, mode: HeurMode = HeurMode.A) -> list[Descriptor]:
    heuristic = (
        Descriptor(graph.library, DescriptorType.ENGINEHEUR)
        .set(Attribute.ENGINEHEUR_OPERATION_GRAPH, graph)
        .set(Attribute.ENGINEHEUR_MODE, mode)
        .set(Attribute.ENGINEHEUR_DEVICEPROP, device)
        .finalize()
    )
    return heuristic.get_descriptors(Attribute.ENGINEHEUR_RESULTS, DescriptorType.ENGINECFG, at_most=200)


def plan(config: Descriptor, device: Descriptor) -> Descriptor:
    return (
        Descriptor(config.library, DescriptorType.EXECUTION_PLAN)
        .set(Attribute.EXECUTION_PLAN_ENGINE_CONFIG, config)
        .set(Attribute.EXECUTION_PLAN_DEVICEPROP, device)
        .finalize()
    )

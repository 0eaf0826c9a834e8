"""Every number against the header that is installed, and the types of attributes against the library itself."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from convplan.engines.cudnn import enums
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor
from convplan.engines.cudnn.enums import Attribute, AttributeType, DescriptorType
from convplan.engines.cudnn.library import Library

# enumeration, its name in C, prefix, suffix, members that only count the others, complete in cuDNN 9.19
ENUMERATIONS: list[tuple[type[IntEnum], str, str, str, str, bool]] = [
    (enums.Status, "cudnnStatus_t", "CUDNN_STATUS_", "", "", True),
    (enums.DescriptorType, "cudnnBackendDescriptorType_t", "CUDNN_BACKEND_", "_DESCRIPTOR", "", True),
    (enums.AttributeType, "cudnnBackendAttributeType_t", "CUDNN_TYPE_", "", "", True),
    (enums.Attribute, "cudnnBackendAttributeName_t", "CUDNN_ATTR_", "", "", False),
    (enums.DataType, "cudnnDataType_t", "CUDNN_DATA_", "", "", True),
    (enums.ConvolutionMode, "cudnnConvolutionMode_t", "CUDNN_", "", "", True),
    (enums.HeurMode, "cudnnBackendHeurMode_t", "CUDNN_HEUR_MODE_", "", "CUDNN_HEUR_MODES_COUNT", True),
    (enums.NumericalNote, "cudnnBackendNumericalNote_t", "CUDNN_NUMERICAL_NOTE_", "", "TYPE_COUNT", True),
    (enums.BehaviorNote, "cudnnBackendBehaviorNote_t", "CUDNN_BEHAVIOR_NOTE_", "", "TYPE_COUNT", True),
    (enums.LayoutType, "cudnnBackendLayoutType_t", "CUDNN_LAYOUT_TYPE_", "", "COUNT", True),
    (enums.TensorReordering, "cudnnBackendTensorReordering_t", "CUDNN_TENSOR_REORDERING_", "", "", True),
    (enums.KnobType, "cudnnBackendKnobType_t", "CUDNN_KNOB_TYPE_", "", "COUNTS", True),
    (enums.PointwiseMode, "cudnnPointwiseMode_t", "CUDNN_POINTWISE_", "", "", True),
    (enums.GenStatsMode, "cudnnGenStatsMode_t", "CUDNN_GENSTATS_", "", "", True),
]


@pytest.fixture
def header(library: Library) -> str:
    path = Path(library.path).parents[1] / "include" / "cudnn_graph.h"
    if not path.exists():
        pytest.skip("this cuDNN came without its headers")
    return re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def members(header: str, name: str, prefix: str, suffix: str, counting: str) -> dict[str, int]:
    """The members of a C enumeration without prefix and suffix; aliases of others and counts are left out."""
    (body,) = re.findall(rf"typedef enum \{{([^}}]*)\}} {name}\b", header)
    found = {}
    for entry in body.split(","):
        match = re.fullmatch(r"\s*(\w+)(?:\s+CUDNN_DEPRECATED_ENUM)?\s*=\s*(\w+)\s*", entry)
        assert match or not entry.strip(), f"cannot read {entry!r} of {name}"
        if match and match[2].isdigit() and not (counting and match[1].endswith(counting)):
            found[match[1].removeprefix(prefix).removesuffix(suffix)] = int(match[2])
    return found


@pytest.mark.parametrize("row", ENUMERATIONS, ids=lambda row: row[0].__name__)
def test_every_number_is_the_headers(header: str, library: Library, row: tuple[Any, ...]) -> None:
    ours, name, prefix, suffix, counting, complete = row
    theirs = members(header, name, prefix, suffix, counting)
    assert theirs
    mine = {member.name: int(member) for member in ours}
    assert {key: value for key, value in mine.items() if theirs.get(key) != value} == {}
    if complete and library.version // 100 == 919:
        assert set(theirs) - set(mine) == set(), "the header knows more than the enumeration"


def test_the_header_is_read_with_its_deprecated_members_and_without_aliases() -> None:
    text = "typedef enum { A_X = 1, A_Y CUDNN_DEPRECATED_ENUM = 20, A_Z CUDNN_DEPRECATED_ENUM = A_X, A_COUNT = 3, } t;"
    assert members(text, "t", "A_", "", "COUNT") == {"X": 1, "Y": 20}


def test_numbers_of_newer_libraries_have_a_name_to_show() -> None:
    assert enums.name_of(enums.KnobType, 40) == "TILE_M"
    assert enums.name_of(enums.KnobType, 4044) == "KnobType(4044)"


# Descriptors whose attributes can be set one by one, with a prefix of their attributes' names.
SETTABLE = {
    "POINTWISE_": DescriptorType.POINTWISE,
    "CONVOLUTION_": DescriptorType.CONVOLUTION,
    "TENSOR_": DescriptorType.TENSOR,
    "KNOB_CHOICE_": DescriptorType.KNOB_CHOICE,
    "OPERATION_CONVOLUTION_FORWARD_": DescriptorType.OPERATION_CONVOLUTION_FORWARD,
    "OPERATION_CONVOLUTION_BWD_DATA_": DescriptorType.OPERATION_CONVOLUTION_BACKWARD_DATA,
    "OPERATION_CONVOLUTION_BWD_FILTER_": DescriptorType.OPERATION_CONVOLUTION_BACKWARD_FILTER,
    "OPERATION_POINTWISE_ALPHA": DescriptorType.OPERATION_POINTWISE,
    "ENGINEHEUR_SM_": DescriptorType.ENGINEHEUR,
    "ENGINE_SM_": DescriptorType.ENGINE,
    "DEVICEPROP_DEVICE_ID": DescriptorType.DEVICEPROP,
}
TYPED = [
    (attribute, kind)
    for prefix, kind in SETTABLE.items()
    for attribute in Attribute
    if attribute.name.startswith(prefix) and attribute.type != AttributeType.BACKEND_DESCRIPTOR
]


@pytest.mark.parametrize(("attribute", "kind"), TYPED, ids=lambda value: value.name)
def test_the_library_takes_an_attribute_with_the_type_of_the_table_only(
    library: Library, attribute: Attribute, kind: DescriptorType, no_descriptor_left: None
) -> None:
    descriptor = Descriptor(library, kind)
    assert descriptor.set(attribute, 1) is descriptor
    with pytest.raises(CudnnError, match=rf"cudnnBackendSetAttribute\({attribute.name}\)"):
        Descriptor(library, kind).set(attribute, 1, as_type=AttributeType.FRACTION)

"""Serialized plans as data: what cuDNN writes into them, and making sure of it before it reads them again (C1).

cuDNN reads such JSON trustingly: it ends the process over a list that is none, restores a plan for larger tensors
without a word, and writes addresses to wherever a kernel's parameters say. So nothing that a stranger wrote is handed
on as it is. All that can be known here is written anew from the problem and the GPU, and compared with what was found;
the rest, which is the engine's own part, is read by a strict schema and written anew too.

What cannot be told from a forgery is the compiled code in it: as with any program, what matters is where it is from.

Building and restoring are deliberately elsewhere (`plans`).
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import msgspec

from convplan._measure import first_line
from convplan._problem import DTYPES, WRITES, Problem, TensorSpec
from convplan.engines.cudnn.descriptors import CudnnError
from convplan.engines.cudnn.enums import Attribute, DataType, PointwiseMode
from convplan.engines.cudnn.fusion import BACKWARD, INTERMEDIATE, SUMS, Fusion, Node, nodes_behind, uid_of
from convplan.engines.cudnn.graph import (
    DATA_TYPES,
    UIDS,
    Strides,
    dense_strides_of,
    operation_graph,
    spec_of,
    tensor_layout,
    window_of,
)
from convplan.engines.cudnn.plans import MOST_JSON_BYTES, build_plan

if TYPE_CHECKING:
    from convplan.engines.cudnn.target import Target

# Which slot of a machine a GPU sits in, and how fast it is clocked, makes no other GPU of it.
_PLACES = ("pciDeviceId", "cudaDeviceId", "smClockRateKHz", "memClockRateKHz", "totalGlobalMem", "driverVer")
_KNOB_PREFIX = "CUDNN_KNOB_TYPE_"
_WRITTEN_BYTES = {"pointer": 8, "workspace": 8, "tma_desc": 128, "value": 4}  # into a kernel's parameters, at a run
_IDENTIFIERS = tuple(UIDS[letter] for letter in "xwy")
MOST_PIECES = 16  # of a workspace; cuDNN numbers them from 0, and 3 were seen
_ELF = b"\x7fELF"

# Operation by operation: how cuDNN calls the graph, the node, and the node's ends in the order of x, w, y.
_NODES: dict[str, tuple[str, str, tuple[str, str, str]]] = {
    "fprop": ("CONV_FORWARD", "FORWARD", ("X", "W", "Y")),
    "dgrad": ("CONV_BWD_DATA", "BACKWARD_DATA", ("dX", "W", "dY")),
    "wgrad": ("CONV_BWD_FILTER", "BACKWARD_FILTER", ("X", "dW", "dY")),
}
# What graphs are called instead whose engines are all compiled: those of fp8, and fused ones of whichever operation.
_GENERAL_GRAPH = "GENERIC_CONV_FUSION"
_STATISTICS_GRAPH = "SCALE_BIAS_ADD_RELU_CONV_STATS"  # of which only the last two are there
_SPECIALISED_GRAPH = "CONV_ADD_BIAS_ACT"  # with a residual or without, with an activation or without

# What cuDNN writes about a mode that has settings: their names, and their values where they are not set.
_CLIPS = {
    "upperClip": (Attribute.POINTWISE_RELU_UPPER_CLIP, sys.float_info.max),
    "lowerClip": (Attribute.POINTWISE_RELU_LOWER_CLIP, 0.0),
    "lowerClipSlope": (Attribute.POINTWISE_RELU_LOWER_CLIP_SLOPE, 0.0),
}
_SETTINGS: dict[PointwiseMode, dict[str, tuple[Attribute, float]]] = {
    PointwiseMode.RELU_FWD: _CLIPS,
    PointwiseMode.RELU_BWD: _CLIPS,
    PointwiseMode.ELU_FWD: {"alpha": (Attribute.POINTWISE_ELU_ALPHA, 1.0)},
    PointwiseMode.SWISH_FWD: {"beta": (Attribute.POINTWISE_SWISH_BETA, 1.0)},
    PointwiseMode.SOFTPLUS_FWD: {"beta": (Attribute.POINTWISE_SOFTPLUS_BETA, 1.0)},
}

Number = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
Name = Annotated[str, msgspec.Meta(max_length=1024)]


class _Offset(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A place in a kernel's parameters; with `update_as`, one into which cuDNN writes an address when the plan runs.

    `uid` is the tensor's for a `pointer`, the number of a piece for `workspace`, and either for `tma_desc`. For a
    `value` it is that of a constant, which is written itself, in `size` bytes.
    """

    value: Number
    uid: Number | None = None
    size: Number | None = None
    update_as: Literal["pointer", "workspace", "tma_desc", "value"] | None = None


class _Parameters(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    offsets: list[_Offset]
    raw_data: str


class _Kernel(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, rename="camel"):
    kernel_name: Name
    kernel_params: _Parameters | None = None
    cubin: str = ""


class _Payload(msgspec.Struct, forbid_unknown_fields=True):
    kernels: list[_Kernel]


class _Engine(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, rename="camel"):
    """The engine's own part. Those that are compiled have a payload."""

    engine_id: Number
    sm_version: Number
    knob_choices: dict[Name, Number]
    payload: _Payload | None = None


class _Plan(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A whole plan, in the order in which cuDNN writes it."""

    cudnn_version: Any
    schema_version: Any
    operation_graph: Any
    profile: Any = msgspec.field(name="GPUProfile")
    engine: msgspec.Raw


_plan_decoder = msgspec.json.Decoder(_Plan)
_engine_decoder = msgspec.json.Decoder(_Engine)
_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class Pattern(NamedTuple):
    """What all plans that are serialized for one GPU have in common, as cuDNN writes it here.

    Attributes:
        cudnn_version: such as 91900.
        schema_version: of the JSON.
        profile: the GPU's properties.
    """

    cudnn_version: Any
    schema_version: Any
    profile: dict[str, Any]


_patterns: WeakKeyDictionary[Target, Pattern] = WeakKeyDictionary()
_SMALLEST = Problem.dense("fprop", (1, 1, 1, 1), (1, 1, 1, 1), device="cuda")
_ENGINES_OF_PATTERN = (0, 1)  # every cuDNN has them for every GPU, and neither is compiled


def pattern_of(target: Target) -> Pattern:
    """What plans for a GPU have in common, from the smallest of them; built once (1 ms), and nothing is compiled.

    Taken from a plan and not from the GPU's properties, so that it holds for any cuDNN: how it writes plans belongs to
    its version, and that what is written here about graphs is what it writes is checked with the same plan.

    Raises:
        ValueError: this cuDNN writes plans in a form that is not known here, or builds no such plan.

    Concurrency: two threads may make the same pattern, harmlessly.
    """
    found = _patterns.get(target)
    if found is None:
        found = _patterns[target] = _pattern(target)
    return found


def _pattern(target: Target) -> Pattern:
    text = _smallest_plan(target)
    try:
        plan = _plan_decoder.decode(text)
        _engine_decoder.decode(plan.engine)
        known = isinstance(plan.profile, dict) and _same(plan.operation_graph, graph_json(_SMALLEST))
    except (msgspec.DecodeError, RecursionError):
        known = False
    if not known:
        raise ValueError(
            f"cuDNN {target.library.version_text} writes plans in a form that convplan cannot vet: they are built anew"
        )
    return Pattern(plan.cudnn_version, plan.schema_version, plan.profile)


def _smallest_plan(target: Target) -> bytes:
    failed: CudnnError | None = None
    for engine in _ENGINES_OF_PATTERN:
        try:
            graph = operation_graph(target, _SMALLEST)
            return build_plan(graph, target, engine, {}, _IDENTIFIERS).serialize()
        except CudnnError as exc:
            failed = exc
    raise ValueError(f"there is no plan to compare it with: {failed}")


def graph_json(problem: Problem, specialised: bool = False) -> dict[str, Any]:
    """A problem's operation graph as cuDNN writes it into the plans for it, keys in the same order.

    Args:
        problem: with its epilogue, unless that is a bias alone.
        specialised: as for `graph.operation_graph`.
    """
    mode, _, _ = _NODES[problem.op]
    dense_strides = dense_strides_of(problem)
    specs = {letter: getattr(problem, letter) for letter in "wxy"}
    fused = nodes_behind(problem, specialised)
    if fused is None:
        if problem.dtype.startswith("float8"):
            mode = _GENERAL_GRAPH
        tensors = [_tensor_json(name, spec, dense_strides) for name, spec in specs.items()]
        return {"finalizeMode": mode, "tensors": tensors, "nodes": [_convolution_json(problem, {})]}
    specs |= fused.given | {name: spec_of(problem, name) for name in (*fused.virtual, *fused.constants)}
    mode = _STATISTICS_GRAPH if fused.statistics else _SPECIALISED_GRAPH if specialised else _GENERAL_GRAPH
    return {
        "finalizeMode": mode,
        "tensors": [_tensor_json(name, specs[name], dense_strides) for name in sorted(specs, key=uid_of)],
        "nodes": [
            _convolution_json(problem, {WRITES[problem.op]: fused.result}),
            *map(_pointwise_json, fused.nodes),
            *([_statistics_json(fused)] if fused.statistics else ()),
        ],
    }


def _convolution_json(problem: Problem, instead: Mapping[str, str]) -> dict[str, Any]:
    """The convolution's node; `instead` names tensors that take the place of the problem's own."""
    _, operation, ends = _NODES[problem.op]
    window = window_of(problem)
    padding = (
        {"pad": window.before}
        if window.before == window.after
        else {"pad_upper": window.after, "pad_lower": window.before}
    )
    node = {
        "operation": f"CUDNN_BACKEND_OPERATION_CONVOLUTION_{operation}_DESCRIPTOR",
        "mode": "CUDNN_CROSS_CORRELATION",
        "mathPrec": _data_type(DATA_TYPES[DTYPES[problem.dtype].accumulate]),
        "alpha": 1.0,
        "beta": 0.0,
        **padding,
        "stride": window.stride,
        "dilation": window.dilation,
        **{end: _name(instead.get(letter, letter)) for end, letter in zip(ends, "xwy", strict=True)},
    }
    if problem.groups > 1:
        node["groupCount"] = problem.groups
    return node


def _pointwise_json(node: Node) -> dict[str, Any]:
    given, named = dict(node.settings), _SETTINGS.get(node.mode, {})
    ends = {"X": node.x, "Y": node.y, "B": node.b}
    if node.mode in BACKWARD:
        ends = {"X": node.b, "dX": node.y, "dY": node.x}
    return {
        "operation": "CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR",
        "pointwiseMode": f"CUDNN_POINTWISE_{node.mode.name}",
        "mathPrec": _data_type(DATA_TYPES[INTERMEDIATE]),
        **{name: float(given.get(attribute, usual)) for name, (attribute, usual) in named.items()},
        "alpha1": 1.0,
        "alpha2": ctypes.c_float(node.alpha2).value,  # which the attribute is
        **{end: _name(tensor) for end, tensor in ends.items() if tensor},
    }


def _statistics_json(fused: Fusion) -> dict[str, Any]:
    sums, squares = SUMS
    return {
        "operation": "CUDNN_BACKEND_OPERATION_GEN_STATS_DESCRIPTOR",
        "mathPrec": _data_type(DATA_TYPES[INTERMEDIATE]),
        "X": _name(fused.result),
        "Sum": _name(sums),
        "SqSum": _name(squares),
    }


def _tensor_json(name: str, spec: TensorSpec, dense_strides: Strides) -> dict[str, Any]:
    dims, strides = tensor_layout(spec, dense_strides)
    return {
        "name": _name(name),
        "dataType": _data_type(DATA_TYPES[spec.dtype]),
        "dim": dims,
        "stride": strides,
        "isVirtual": name.startswith("v"),
        "isByValue": name.startswith("c"),
        "vectCount": 1,
        "vectDim": -1,
        "ptrAlignment": spec.alignment_bytes,
        "reordering": "CUDNN_TENSOR_REORDERING_NONE",
    }


def _name(tensor: str) -> str:
    return str(uid_of(tensor))


def _data_type(number: DataType) -> str:
    return f"CUDNN_DATA_{number.name}"


def vetted(
    serialized: bytes,
    problem: Problem,
    pattern: Pattern,
    engine: int,
    knobs: Mapping[str, int],
    *,
    specialised: bool = False,
) -> bytes:
    """The same plan written anew, after making sure that it is one for this problem, GPU, engine and knobs.

    Args:
        serialized: from anywhere.
        problem: what the plan must compute.
        pattern: of the GPU that it must be for.
        engine, knobs: cuDNN's index of the engine that it must be of, and its knobs by name; -1 and absent are one.
        specialised: the form of its graph, as for `graph.operation_graph`.

    Raises:
        ValueError: it is no plan, or another one: says in which part.
    """
    found = _decoded(serialized)
    graph = graph_json(problem, specialised)
    for part, mine, theirs in (
        ("cudnnVersion", pattern.cudnn_version, found.cudnn_version),
        ("schemaVersion", pattern.schema_version, found.schema_version),
        ("operationGraph", graph, found.operation_graph),
        ("GPUProfile", _without_places(pattern.profile), _without_places(found.profile)),
    ):
        if not _same(mine, theirs):
            raise ValueError(f"the serialized plan's {part} is not that of the problem, the GPU and cuDNN here")
    fused = nodes_behind(problem, specialised)
    own = _vetted_engine(found.engine, engine, knobs, _targets(fused))
    return _encode(
        {
            "cudnnVersion": pattern.cudnn_version,
            "schemaVersion": pattern.schema_version,
            "operationGraph": graph,
            "GPUProfile": pattern.profile,
            "engine": own,
        }
    )


def _decoded(serialized: bytes) -> _Plan:
    if len(serialized) > MOST_JSON_BYTES:
        raise ValueError(f"a serialized plan of {len(serialized)} bytes, expected at most {MOST_JSON_BYTES}")
    try:
        return _plan_decoder.decode(serialized)
    except msgspec.ValidationError as exc:
        raise ValueError(f"a serialized plan that is none: {first_line(exc)}") from exc
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise ValueError(f"a serialized plan that is no JSON: {first_line(exc)}") from exc


def _same(mine: object, theirs: object) -> bool:
    """As text: 1 and 1.0 and true are equal to Python, and not to a reader in C++."""
    try:
        return _encode_sorted(mine) == _encode_sorted(theirs)
    except (RecursionError, ValueError, OverflowError):  # nested more deeply, or numbers larger, than is written here
        return False


def _without_places(profile: object) -> object:
    if not isinstance(profile, dict):
        return profile
    kept = {name: value for name, value in profile.items() if name not in _PLACES}
    return {**kept, "places": {name: type(value).__name__ for name, value in profile.items() if name in _PLACES}}


Targets = dict[str | None, tuple[int | None, ...]]


def _targets(fused: Fusion | None) -> Targets:
    """What may be written into a kernel's parameters: addresses of tensors and pieces of workspace, and constants."""
    given, constants = ((), ()) if fused is None else (fused.given, fused.constants)
    tensors = (*_IDENTIFIERS, *map(uid_of, given))
    return {
        None: (None,),
        "pointer": tensors,
        "workspace": tuple(range(MOST_PIECES)),
        "tma_desc": (*tensors, *range(MOST_PIECES)),
        "value": tuple(map(uid_of, constants)),
    }


def _vetted_engine(raw: msgspec.Raw, engine: int, knobs: Mapping[str, int], targets: Targets) -> _Engine:
    """The engine's own part, of the right engine with the right knobs, every place in it within bounds."""
    try:
        found = _engine_decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise ValueError(f"the serialized plan's engine: {first_line(exc)}") from exc
    if found.engine_id != engine:
        raise ValueError(f"the serialized plan is of engine {found.engine_id}, expected {engine}")
    theirs = {name.removeprefix(_KNOB_PREFIX).lower(): value for name, value in found.knob_choices.items()}
    if _chosen(theirs) != _chosen(knobs):
        raise ValueError(f"the serialized plan has the knobs {_chosen(theirs)}, expected {_chosen(knobs)}")
    for kernel in found.payload.kernels if found.payload is not None else ():
        _vet_kernel(kernel, targets)
    return found


def _chosen(knobs: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in knobs.items() if value != -1}


def _vet_kernel(kernel: _Kernel, targets: Targets) -> None:
    if not _bytes_of(kernel.cubin, "cubin").startswith(_ELF):
        raise ValueError(f"the serialized plan's kernel {kernel.kernel_name[:80]!r} is no compiled code")
    if kernel.kernel_params is None:
        return
    room = len(_bytes_of(kernel.kernel_params.raw_data, "rawData"))
    for offset in kernel.kernel_params.offsets:
        kind = offset.update_as
        if not 0 <= offset.value <= room - (0 if kind is None else _WRITTEN_BYTES[kind]):
            raise ValueError(f"the serialized plan has an offset of {offset.value} into {room} bytes of parameters")
        if offset.size != (_WRITTEN_BYTES["value"] if kind == "value" else None):
            raise ValueError(f"the serialized plan writes {offset.size} bytes as {kind}, expected 4 of a constant")
        expected = targets[kind]
        if offset.uid not in expected:
            raise ValueError(
                f"the serialized plan wants the address of tensor {offset.uid}, expected one of {expected}"
            )


def _bytes_of(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ValueError(f"the serialized plan's {what} is not in base 64: {first_line(exc)}") from exc

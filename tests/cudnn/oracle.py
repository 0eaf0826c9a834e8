"""Which configurations cuDNN proposes for a convolution, asked through NVIDIA's own front end, for an absent GPU.

An oracle for the enumeration in `convplan/engines/cudnn`: another implementation (C++, in the package
`nvidia-cudnn-frontend`) builds the operation graph from the same plain data and puts the same question to the same
library. Nothing here uses convplan. The device is the one in the stored properties, so no GPU is needed.

What is to be compared. The front end keeps every configuration that the heuristics return, in their order and with
their repetitions: its filter lets all of them through (`plans.h` and `cudnn_frontend_Heuristics.h` of version 1.18.0),
and nothing is built, so configurations that would not build are in the list too. For all cases of `oracle_cases.py` in
all modes the lists were equal to the raw attribute `CUDNN_ATTR_ENGINEHEUR_RESULTS`. So before convplan removes
repetitions and drops anything, its list must equal this one element by element, provided that it asks the same:

- every tensor has `ALIGNMENT_BYTES`; the front end offers no other;
- strides are the spec's, those of dimensions of size 1 too: what stride the one channel of a depthwise filter has (1 in
  channels-last, the filter's size otherwise) decides which engines there are;
- the type of sums is the spec's `compute`, also for int8 (int32);
- one mode at a time: B answers as A for many problems, and the same configuration may be in several lists.

What the heuristics propose depends on the process, too: without a driver library they silently leave out engines, all
of them for 8-bit floats. A stand-in that can run nothing will do, but has to be complete, so convplan's is a good one:
load it first (`convplan.engines.cudnn.device.load_for_absent_gpu`); that is all that the two sides share.

A configuration is `(engine, knobs)`, with cuDNN's global index of the engine and the knobs by name in lower case, as
convplan stores them. The front end only gives a name such as `eng22_k2=5_k13=1`; knob numbers become names through the
enumeration `cudnnBackendKnobType_t` of the header that is installed beside the library.

The package's module is called `cudnn`: this folder must stay without an `__init__.py`, or it would be found instead.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

Mode = Literal["A", "B", "FALLBACK"]
Configs = list[tuple[int, dict[str, int]]]

MODES: tuple[Mode, ...] = ("A", "B", "FALLBACK")
ALIGNMENT_BYTES = 16
CUDNN_VERSION = 91900  # the library that the stored device properties belong to
PROPERTIES = Path(__file__).with_name("h200-cudnn-9.19.0.deviceprop.json")

# Ours, as torch calls them, and the front end's.
DTYPES = {
    "float64": "DOUBLE",
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BFLOAT16",
    "float8_e4m3fn": "FP8_E4M3",
    "float8_e5m2": "FP8_E5M2",
    "int8": "INT8",
    "uint8": "UINT8",
    "int32": "INT32",
}
# Operation: method, its two inputs as (argument, tensor), the tensor written.
OPERATIONS = {
    "fprop": ("conv_fprop", (("image", "x"), ("weight", "w")), "y"),
    "dgrad": ("conv_dgrad", (("loss", "y"), ("filter", "w")), "x"),
    "wgrad": ("conv_wgrad", (("image", "x"), ("loss", "y")), "w"),
}


class Spec(TypedDict):
    """One convolution as plain data; tensors are called x (input), w (weight, K C/groups …) and y (output).

    `dims`, `strides` (in elements) and `dtypes` have an entry for each of them; `padding` has a (before, after) pair
    for each spatial dimension; groups follow from the channels of x and w; `compute` is the type of sums.
    """

    op: str
    dims: dict[str, Sequence[int]]
    strides: dict[str, Sequence[int]]
    dtypes: dict[str, str]
    padding: Sequence[tuple[int, int]]
    stride: Sequence[int]
    dilation: Sequence[int]
    compute: str


def frontend_configs(spec: Spec, mode: Mode, *, properties: str | None = None) -> Configs:
    """What the heuristics of a mode propose for a convolution, in their order.

    Args:
        spec: two or three spatial dimensions.
        mode: `A`, `B` or `FALLBACK`.
        properties: of the device, as cuDNN serializes them to JSON. None: the stored ones.

    Returns:
        (engine, knobs) of each configuration; empty when cuDNN has none.
    """
    cudnn = frontend()
    graph = _graph(cudnn, spec, properties)
    try:
        graph.create_execution_plans([getattr(cudnn.heur_mode, mode)])
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError) as exc:
        if "No valid engine configs" in str(exc):
            return []
        raise
    return [parse_name(graph.get_plan_name_at_index(place)) for place in range(graph.get_execution_plan_count())]


def parse_name(name: str) -> tuple[int, dict[str, int]]:
    """A configuration from the front end's name for it: `eng22_k2=5_k13=1` has engine 22 and two knobs."""
    if not re.fullmatch(r"eng\d+(_k\d+=-?\d+)*", name):
        raise ValueError(f"the front end calls a configuration {name!r}, expected a name such as 'eng22_k2=5_k13=1'")
    engine, *choices = name.split("_")
    knobs = {}
    for choice in choices:
        number, value = choice.removeprefix("k").split("=")
        knobs[knob_names()[int(number)]] = int(value)
    assert len(knobs) == len(choices), f"{name} has a knob twice"
    return int(engine.removeprefix("eng")), knobs


@functools.cache
def knob_names() -> dict[int, str]:
    """Every knob's number and name in lower case, from the header installed beside the library."""
    import nvidia.cudnn

    (folder,) = nvidia.cudnn.__path__
    header = (Path(folder) / "include" / "cudnn_graph.h").read_text(encoding="utf-8")
    found = re.findall(r"\bCUDNN_KNOB_TYPE_(\w+)(?:\s+CUDNN_DEPRECATED_ENUM)?\s*=\s*(\d+)", header)
    return {int(number): name.lower() for name, number in found if name != "COUNTS"}


@functools.cache
def frontend() -> Any:
    """The front end's module, working on the library that the stored properties belong to.

    Raises:
        ImportError: it is not installed, works on another library, or there is no driver library in this process.
    """
    try:
        ctypes.CDLL("libcuda.so.1")  # the machine's, or the stand-in that goes by this name
    except OSError as exc:
        raise ImportError(f"answers would be incomplete, load convplan's stand-in for the driver first: {exc}") from exc
    import cudnn

    if not hasattr(cudnn, "pygraph"):
        raise ImportError(f"'cudnn' is {cudnn.__path__}, not the front end: is there an __init__.py in tests/cudnn?")
    if cudnn.backend_version() != CUDNN_VERSION:
        raise ImportError(f"the front end loaded cuDNN {cudnn.backend_version()}, expected {CUDNN_VERSION}")
    return cudnn


@functools.lru_cache(maxsize=4)
def _device(properties: str) -> Any:
    return frontend().create_device_properties(properties)


def _graph(cudnn: Any, spec: Spec, properties: str | None) -> Any:
    """The operation graph. A new one for each question: a graph collects the plans of all modes it is asked for."""
    compute = getattr(cudnn.data_type, DTYPES[spec["compute"]])
    graph = cudnn.pygraph(
        intermediate_data_type=compute,
        compute_data_type=compute,
        device_property=_device(PROPERTIES.read_text(encoding="utf-8") if properties is None else properties),
    )
    method, inputs, output = OPERATIONS[spec["op"]]
    given = {
        argument: graph.tensor(
            name=name,
            dim=list(spec["dims"][name]),
            stride=list(spec["strides"][name]),
            data_type=getattr(cudnn.data_type, DTYPES[spec["dtypes"][name]]),
        )
        for argument, name in inputs
    }
    written = getattr(graph, method)(
        **given,
        pre_padding=[before for before, _ in spec["padding"]],
        post_padding=[after for _, after in spec["padding"]],
        stride=list(spec["stride"]),
        dilation=list(spec["dilation"]),
        compute_data_type=compute,
        name="conv",
    )
    written.set_output(True).set_dim(list(spec["dims"][output])).set_stride(list(spec["strides"][output]))
    written.set_data_type(getattr(cudnn.data_type, DTYPES[spec["dtypes"][output]]))
    graph.validate()
    graph.build_operation_graph()
    return graph

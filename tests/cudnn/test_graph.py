"""A problem as cuDNN understands it: which problems become graphs that build, and what is in a graph.

What a graph says is read back from the library: a plan serialized to JSON has the operation graph in it, in cuDNN's own
words. That tells more than the attributes that were set, which cuDNN gives back as it was given them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import pytest
import torch

import convplan
from convplan import Problem, TensorSpec
from convplan._problem import DTYPES, FLOAT_DTYPES, OPS, WRITES, channels_last_strides, contiguous_strides
from convplan.engines.base import Candidate
from convplan.engines.cudnn import graph as graphs
from convplan.engines.cudnn.descriptors import CudnnError, live_descriptors
from convplan.engines.cudnn.engine import CudnnEngine
from convplan.engines.cudnn.enums import Attribute
from convplan.engines.cudnn.graph import operation_graph, tensor, with_unit_dimension
from convplan.engines.cudnn.target import Target

LAYOUTS = ("contiguous", "channels_last")
CHANNELS = 32
SPATIAL = {1: (40,), 2: (12, 10), 3: (6, 8, 8)}
GROUPS = {"dense": 1, "grouped": 4, "depthwise": CHANNELS}
FP8 = ("float8_e4m3fn", "float8_e5m2")

# Inputs' dtype, output's dtype, spatial ranks. Engines for 8-bit floats are compiled at run time, up to a second each,
# and do not differ by the output's dtype: not all pairs in all ranks.
DTYPE_ROWS = (
    *((dtype, dtype, (1, 2, 3)) for dtype in FLOAT_DTYPES),
    *(("int8", output, (1, 2, 3)) for output in DTYPES["int8"].outputs),
    ("float8_e4m3fn", "bfloat16", (1, 2, 3)),
    ("float8_e4m3fn", "float8_e4m3fn", (2,)),
    ("float8_e4m3fn", "float32", (2,)),
    ("float8_e5m2", "float16", (2,)),
)


class Gap(NamedTuple):
    """One row of what cuDNN 9.19 has no configuration for on an H200. Everything else is expected to build."""

    when: Callable[[Problem], bool]
    why: str


GAPS = (
    Gap(lambda problem: problem.dtype not in FLOAT_DTYPES and problem.op != "fprop", "8 bits: only fprop"),
    Gap(lambda problem: problem.dtype in FP8 and problem.groups == CHANNELS, "8-bit floats: not depthwise"),
)


def gap(problem: Problem) -> str:
    return next((row.why for row in GAPS if row.when(problem)), "")


def geometry(rank: int, groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dims of input and weight, small."""
    return (2, CHANNELS, *SPATIAL[rank]), (CHANNELS, CHANNELS // groups, *(3,) * rank)


def small(op: str = "fprop", rank: int = 2, groups: int = 1, **changes: Any) -> Problem:
    settings = {"dtype": "float16", "layout": "channels_last", "padding": 1, "device": "cuda", **changes}
    return Problem.dense(op, *geometry(rank, groups), groups=groups, **settings)


def with_tensor(problem: Problem, letter: str, **changes: Any) -> Problem:
    """The problem with one of its tensors changed."""
    return msgspec.structs.replace(problem, **{letter: msgspec.structs.replace(getattr(problem, letter), **changes)})


class Understood(NamedTuple):
    """A graph in cuDNN's words: its one node, and its tensors by the letter that identifies them."""

    node: dict[str, Any]
    tensors: dict[str, dict[str, Any]]

    @property
    def padding(self) -> list[tuple[int, int]]:
        """Before and after, whichever way cuDNN writes it."""
        before, after = (self.node.get(name) or self.node["pad"] for name in ("pad_lower", "pad_upper"))
        return [*zip(before, after, strict=True)]


def understood(engine: CudnnEngine, problem: Problem, candidate: Candidate | None = None) -> Understood:
    """What cuDNN made of a problem, told by a plan for it."""
    config = (candidate or engine.configs(problem, "instant")[0]).config
    graph = json.loads(engine.build_execution_plan(problem, config).serialize())["operationGraph"]
    (node,) = graph["nodes"]
    return Understood(node, {chr(int(one["name"])): one for one in graph["tensors"]})


# ---- which problems build


@pytest.mark.behaviour("B5")
@pytest.mark.behaviour("B6")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "output", "rank"),
    [(dtype, output, rank) for dtype, output, ranks in DTYPE_ROWS for rank in ranks],
    ids=[f"{dtype}-to-{output}-{rank}d" for dtype, output, ranks in DTYPE_ROWS for rank in ranks],
)
def test_what_should_be_supported_builds(
    op: str, dtype: str, output: str, rank: int, layout: str, groups: int, cudnn: CudnnEngine
) -> None:
    problem = small(op, rank, groups, dtype=dtype, output_dtype=output, layout=layout)
    assert cudnn.supports(problem).ok
    candidates = cudnn.configs(problem, "instant")
    if reason := gap(problem):
        assert candidates == [], f"the table says {reason!r}, and cuDNN proposes something: correct the table"
        return
    assert candidates, "cuDNN proposes nothing, and the table of gaps does not say so"
    plan = cudnn.build_execution_plan(problem, candidates[0].config)
    assert plan.workspace_bytes == candidates[0].workspace_bytes


def test_every_gap_is_one_of_the_problems_above() -> None:
    asked = [
        small(op, rank, groups, dtype=dtype, output_dtype=output)
        for dtype, output, ranks in DTYPE_ROWS
        for rank in ranks
        for groups in GROUPS.values()
        for op in OPS
    ]
    assert [row.why for row in GAPS if not any(row.when(problem) for problem in asked)] == []


def test_every_dtype_has_a_type_of_cudnns() -> None:
    assert set(graphs.DATA_TYPES) == set(DTYPES)
    assert len(set(graphs.DATA_TYPES.values())) == len(DTYPES)


@pytest.mark.parametrize(("first", "second"), [FP8, FP8[::-1]])
def test_the_two_8_bit_floats_may_mix(first: str, second: str, cudnn: CudnnEngine) -> None:
    problem = with_tensor(small(dtype=first, output_dtype="float16"), "w", dtype=second)
    found = understood(cudnn, problem)
    types = {name: f"CUDNN_DATA_FP8_{dtype.split('_')[1][:4].upper()}" for name, dtype in (("x", first), ("w", second))}
    assert {name: found.tensors[name]["dataType"] for name in "xw"} == types


# ---- the window


WINDOWS = [
    # id, rank, arguments, padding, stride and dilation as the graph has them
    ("plain", 2, {"padding": 0}, [(0, 0), (0, 0)], [1, 1], [1, 1]),
    ("padding", 2, {"padding": (1, 2)}, [(1, 1), (2, 2)], [1, 1], [1, 1]),
    ("padding-after-only", 2, {"padding": ((0, 1), (0, 2))}, [(0, 1), (0, 2)], [1, 1], [1, 1]),
    ("padding-before-more", 2, {"padding": ((2, 1), (1, 0))}, [(2, 1), (1, 0)], [1, 1], [1, 1]),
    ("stride", 2, {"stride": (2, 3)}, [(1, 1), (1, 1)], [2, 3], [1, 1]),
    ("dilation", 2, {"dilation": (2, 3)}, [(1, 1), (1, 1)], [1, 1], [2, 3]),
    (
        "all",
        2,
        {"padding": ((3, 1), (0, 2)), "stride": (2, 1), "dilation": (1, 2)},
        [(3, 1), (0, 2)],
        [2, 1],
        [1, 2],
    ),
    (
        "1d",
        1,
        {"padding": ((8, 0),), "stride": 3, "dilation": 4},
        [(0, 0), (8, 0)],
        [1, 3],
        [1, 4],
    ),
    (
        "3d",
        3,
        {"padding": ((0, 1), (2, 1), (1, 1)), "stride": (1, 2, 1), "dilation": (1, 1, 2)},
        [(0, 1), (2, 1), (1, 1)],
        [1, 2, 1],
        [1, 1, 2],
    ),
]  # fmt: skip


@pytest.mark.behaviour("B4")
@pytest.mark.behaviour("B5")
@pytest.mark.behaviour("B6")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("rank", "window", "padding", "stride", "dilation"), [row[1:] for row in WINDOWS],
                         ids=[row[0] for row in WINDOWS])  # fmt: skip
def test_cudnn_computes_the_window_that_was_meant(
    op: str,
    rank: int,
    window: dict[str, Any],
    padding: list[tuple[int, int]],
    stride: list[int],
    dilation: list[int],
    cudnn: CudnnEngine,
) -> None:
    problem = small(op, rank, **window)
    found = understood(cudnn, problem)
    assert (found.padding, found.node["stride"], found.node["dilation"]) == (padding, stride, dilation)
    assert found.node["mode"] == "CUDNN_CROSS_CORRELATION"
    assert (found.node["alpha"], found.node["beta"]) == (1.0, 0.0)
    unit = (1,) if rank == 1 else ()
    for letter in "xwy":
        dims = getattr(problem, letter).dims
        assert found.tensors[letter]["dim"] == [*dims[:2], *unit, *dims[2:]]


@pytest.mark.behaviour("B5")
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("op", OPS)
def test_groups_follow_from_the_filters_channels(op: str, groups: int, cudnn: CudnnEngine) -> None:
    found = understood(cudnn, small(op, groups=groups))
    assert found.node.get("groupCount", 1) == groups
    assert found.tensors["w"]["dim"][1] == CHANNELS // groups


@pytest.mark.behaviour("B5")
def test_a_transposed_convolution_is_dgrad_with_x_and_y_exchanged(cudnn: CudnnEngine) -> None:
    given, weight = torch.empty(2, 16, 7, 9), torch.empty(16, 8, 3, 3)
    window = {"stride": 2, "padding": 1, "output_padding": 1}
    problem = convplan.problem("fprop", given, weight, transposed=True, **window)
    result = torch.nn.functional.conv_transpose2d(given, weight, **window)
    found = understood(cudnn, msgspec.structs.replace(problem, device="cuda"))
    assert found.node["operation"] == "CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR"
    assert found.tensors["y"]["dim"] == [*given.shape]
    assert found.tensors["x"]["dim"] == [*result.shape]
    assert [found.node[name] for name in ("dY", "W", "dX")] == [str(ord(letter)) for letter in "ywx"]


# ---- arithmetic, identifiers, alignment, layout


COMPUTED_IN = {
    "float64": "DOUBLE", "float32": "FLOAT", "bfloat16": "FLOAT", "float16": "FLOAT", "int8": "INT32",
    "float8_e4m3fn": "FLOAT", "float8_e5m2": "FLOAT",
}  # fmt: skip


@pytest.mark.behaviour("B4")
@pytest.mark.parametrize(
    ("dtype", "op"), [(d, op) for d in COMPUTED_IN for op in OPS if d in FLOAT_DTYPES or op == "fprop"]
)
def test_sums_are_computed_in_the_type_that_is_wide_enough(dtype: str, op: str, cudnn: CudnnEngine) -> None:
    output = "float32" if dtype == "int8" else None
    assert understood(cudnn, small(op, dtype=dtype, output_dtype=output)).node["mathPrec"] == (
        f"CUDNN_DATA_{COMPUTED_IN[dtype]}"
    )


def test_the_table_of_compute_types_has_every_dtype_of_inputs() -> None:
    assert set(COMPUTED_IN) == {name for name, info in DTYPES.items() if info.outputs}


NODE_NAMES = {"fprop": ("X", "W", "Y"), "dgrad": ("dX", "W", "dY"), "wgrad": ("X", "dW", "dY")}


@pytest.mark.behaviour("B6")
@pytest.mark.behaviour("B27")
@pytest.mark.parametrize("rank", SPATIAL)
@pytest.mark.parametrize("op", OPS)
def test_tensors_are_identified_by_their_letters(op: str, rank: int, cudnn: CudnnEngine) -> None:
    problem = small(op, rank)
    found = understood(cudnn, problem)
    assert set(found.tensors) == {"x", "w", "y"}
    assert [found.node[name] for name in NODE_NAMES[op]] == [str(ord(letter)) for letter in "xwy"]
    for letter in "xwy":
        assert found.tensors[letter]["dim"][:2] == [*getattr(problem, letter).dims[:2]]
        assert found.tensors[letter]["isVirtual"] is False


@pytest.mark.behaviour("B1")
@pytest.mark.parametrize("letter", "xwy")
@pytest.mark.parametrize("alignment", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("op", OPS)
def test_each_tensors_alignment_is_in_the_graph(op: str, alignment: int, letter: str, cudnn: CudnnEngine) -> None:
    problem = with_tensor(small(op), letter, alignment_bytes=alignment)
    found = understood(cudnn, problem)
    aligned = {name: one["ptrAlignment"] for name, one in found.tensors.items()}
    assert aligned == {**dict.fromkeys("xwy", 32), letter: alignment}


@pytest.mark.behaviour("B1")
def test_poorly_aligned_inputs_are_offered_other_engines(cudnn: CudnnEngine) -> None:
    lists = {
        alignment: {c.config for c in cudnn.configs(with_tensor(small(), "x", alignment_bytes=alignment), "measure")}
        for alignment in (2, 32)
    }
    assert lists[2]
    assert lists[32] - lists[2], "wide loads need alignment, so some engine must be missing"


@pytest.mark.behaviour("B2")
@pytest.mark.parametrize(
    ("rank", "layout"), [(rank, layout) for rank in SPATIAL for layout in LAYOUTS], ids=lambda value: str(value)
)
def test_layouts_reach_cudnn_as_they_are(rank: int, layout: str, cudnn: CudnnEngine) -> None:
    problem = small(rank=rank, layout=layout)
    dense = channels_last_strides if layout == "channels_last" else contiguous_strides
    for one in understood(cudnn, problem).tensors.values():
        assert one["stride"] == [*dense(one["dim"])]


@pytest.mark.behaviour("B2")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", SPATIAL)
def test_sizes_of_1_take_the_layout_of_the_other_tensors(rank: int, layout: str, op: str, cudnn: CudnnEngine) -> None:
    """A depthwise filter, a single channel and a single pixel fit both layouts; cuDNN looks at their strides."""
    dense = channels_last_strides if layout == "channels_last" else contiguous_strides
    depthwise = small(op, rank, CHANNELS, layout=layout)
    one_pixel = Problem.dense(
        op, (2, 16, *SPATIAL[rank]), (8, 16, *SPATIAL[rank]), dtype="float16", layout=layout, device="cuda"
    )
    for problem in (depthwise, one_pixel):
        for letter, one in understood(cudnn, problem).tensors.items():
            assert one["stride"] == [*dense(one["dim"])], letter


@pytest.mark.behaviour("B5")
def test_a_line_is_a_plane_one_high() -> None:
    dims, strides = (2, 5, 7), (70, 2, 10)
    assert with_unit_dimension((2, 5, 7), (35, 7, 1)) == ((2, 5, 1, 7), (35, 7, 7, 1))
    assert with_unit_dimension((2, 5, 7), (35, 1, 5)) == ((2, 5, 1, 7), (35, 1, 35, 5))
    assert with_unit_dimension(dims, strides) == ((2, 5, 1, 7), (70, 2, 70, 10)), "neither layout"
    assert with_unit_dimension((2, 5, 3, 7), (105, 21, 7, 1)) == ((2, 5, 3, 7), (105, 21, 7, 1))


def test_the_descriptor_of_a_tensor_is_its_spec(target: Target) -> None:
    spec = TensorSpec((4, 6, 5, 7), (420, 1, 84, 12), "bfloat16", 8)
    made = tensor(target.library, "w", spec)
    read = {name: made.get(Attribute[f"TENSOR_{name}"]) for name in ("UNIQUE_ID", "DIMENSIONS", "STRIDES")}
    assert read == {"UNIQUE_ID": [ord("w")], "DIMENSIONS": [4, 6, 5, 7], "STRIDES": [420, 1, 84, 12]}
    assert made.get_one(Attribute.TENSOR_DATA_TYPE).name == "BFLOAT16"


# ---- inputs that lie as neither layout does


def spaced(problem: Problem, letter: str) -> Problem:
    """Every other element of a longer tensor."""
    spec = getattr(problem, letter)
    return with_tensor(problem, letter, strides=tuple(2 * step for step in contiguous_strides(spec.dims)))


def expanded(problem: Problem, letter: str) -> Problem:
    """One sample (one filter) seen again and again."""
    spec = getattr(problem, letter)
    return with_tensor(problem, letter, strides=(0, *contiguous_strides(spec.dims)[1:]))


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_are_read_as_they_are_or_copied_first(op: str, cudnn: CudnnEngine) -> None:
    first = {"fprop": "x", "dgrad": "y", "wgrad": "x"}[op]
    problem = spaced(small(op, dtype="float32"), first)
    candidates = cudnn.configs(problem, "exhaustive")
    by_copy = {copy: [c for c in candidates if c.config.knob("dense") == copy] for copy in (0, 1)}
    assert all(by_copy.values())
    read = {copy: understood(cudnn, problem, found[0]).tensors[first] for copy, found in by_copy.items()}
    assert read[0]["stride"] == [*getattr(problem, first).strides]
    assert read[1]["stride"] == [*channels_last_strides(read[1]["dim"])], "the layout of the others"
    # Some engines read where nothing is, so that only a worker process tries them on such inputs.
    measured = {candidate.config for candidate in cudnn.configs(problem, "measure")}
    assert measured
    assert measured <= {candidate.config for candidate in by_copy[1]}


@pytest.mark.parametrize("op", OPS)
def test_a_plan_that_runs_unverified_copies_strided_inputs_first(op: str, cudnn: CudnnEngine) -> None:
    first = {"fprop": "x", "dgrad": "y", "wgrad": "x"}[op]
    problem = small(op, dtype="float32")
    spec = getattr(problem, first)
    backwards = tuple(reversed(contiguous_strides(tuple(reversed(spec.dims)))))  # the batch steps least
    for strided in (spaced(problem, first), with_tensor(problem, first, strides=backwards)):
        candidates = cudnn.configs(strided, "instant")
        leading = [one for one in candidates if one.source != "fallback"]
        assert leading[0].config.knob("dense") == 1
        assert {one.config for one in candidates} <= {one.config for one in cudnn.configs(strided, "measure")}


@pytest.mark.parametrize("op", OPS)
def test_inputs_whose_elements_share_memory_are_always_copied(op: str, cudnn: CudnnEngine) -> None:
    first = {"fprop": "x", "dgrad": "y", "wgrad": "x"}[op]
    problem = expanded(small(op), first)
    candidates = cudnn.configs(problem, "measure")
    assert candidates
    assert {c.config.knob("dense") for c in candidates} == {1}


@pytest.mark.behaviour("B12")
def test_the_copy_counts_as_workspace(cudnn: CudnnEngine) -> None:
    dense, strided = small(), spaced(small(), "x")
    plain = {c.config.knobs: c.workspace_bytes for c in cudnn.configs(dense, "measure")}
    copied = {
        tuple(knob for knob in c.config.knobs if knob[0] != "dense"): c.workspace_bytes
        for c in cudnn.configs(strided, "measure")
        if c.config.knob("dense")
    }
    assert copied == {knobs: size + dense.x.nbytes for knobs, size in plain.items()}


# ---- problems that are refused


def huge(**changes: Any) -> Problem:
    return Problem.dense("fprop", (2**31, 1, 1, 1), (1, 1, 1, 1), dtype="float16", device="cuda", **changes)


REFUSED = [
    ("empty-batch", lambda: Problem.dense("fprop", (0, 8, 5, 5), (4, 8, 3, 3), device="cuda"), "the problem is empty"),
    ("nothing-summed", lambda: Problem.dense("fprop", (2, 0, 5, 5), (4, 0, 3, 3), device="cuda"),
     "the problem is empty"),
    ("cpu", lambda: small(device="cpu"), "device is 'cpu', supported: cuda"),
    ("large", huge, r"a dimension is 2147483648, supported: below 2\*\*31"),
    *((f"overlapping-{op}", lambda op=op: expanded(small(op), WRITES[op]),
       r"the output has strides \(0, .*\), supported: a place in memory for each element") for op in OPS),
]  # fmt: skip


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize(("make", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_a_graph_is_refused_with_the_reason(
    make: Callable[[], Problem], reason: str, cudnn: CudnnEngine
) -> None:
    problem = make()
    support = cudnn.supports(problem)
    assert not support.ok
    assert_matches(reason, support.reason)
    before = live_descriptors()
    assert [*cudnn.configs(problem, "measure")] == []
    assert live_descriptors() == before, "no graph was begun"


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_a_dtype_that_cudnn_does_not_have_is_named(cudnn: CudnnEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(graphs.DATA_TYPES, "bfloat16")
    support = cudnn.supports(small(dtype="bfloat16"))
    assert not support.ok
    assert_matches("dtype is bfloat16, supported: .*float32", support.reason)
    assert cudnn.supports(small()).ok


def test_an_address_that_the_dtype_does_not_divide_is_cudnns_refusal(cudnn: CudnnEngine, target: Target) -> None:
    problem = with_tensor(small(), "x", alignment_bytes=1)
    with pytest.raises(CudnnError, match="ptrAlignment") as caught:
        operation_graph(target, problem)
    assert caught.value.bad_param


@pytest.mark.parametrize("shared", ["inner", "sideways", "twice"])
def test_outputs_that_overlap_in_any_way_are_refused(shared: str, cudnn: CudnnEngine) -> None:
    y = small(layout="contiguous").y
    n, c, h, w = y.strides
    strides: dict[str, Sequence[int]] = {"inner": (n, c, h, 0), "sideways": (n, c, 1, w), "twice": (n, n, h, w)}
    assert not cudnn.supports(with_tensor(small(layout="contiguous"), "y", strides=tuple(strides[shared]))).ok
    padded = tuple(2 * step for step in y.strides)
    assert cudnn.supports(with_tensor(small(layout="contiguous"), "y", strides=padded)).ok, "gaps are no overlap"

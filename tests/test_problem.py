"""Problems and tensor specs: shape rules, normalized strides, messages with their numbers, round trips and arithmetic.

The arithmetic is compared with loops that count products one by one, and shapes with torch on tensors without storage.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convplan import Epilogue, Problem, SpecError, TensorSpec
from convplan._problem import (
    DTYPES,
    FLOAT_DTYPES,
    INPUT_DTYPES,
    MAX_ELEMENTS,
    OPS,
    READS,
    WRITES,
    Op,
    channels_last_strides,
    contiguous_strides,
    normalize_strides,
    output_spatial,
    padding_pairs,
    per_dim,
)

CONV = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
FP8 = ("float8_e4m3fn", "float8_e5m2")
ENOUGH = settings(deadline=None, max_examples=50)


# What is drawn


@st.composite
def layouts(draw: st.DrawFn, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor of these dims: dense in any order of dimensions, with gaps, or expanded."""
    strides = [0] * len(dims)
    step = 1
    for dim in draw(st.permutations(range(len(dims)))):
        strides[dim] = step
        step *= max(dims[dim], 1) + draw(st.sampled_from((0, 0, 0, 1)))
    if draw(st.integers(0, 9)) == 0:
        strides[draw(st.integers(0, len(dims) - 1))] = 0
    return tuple(strides)


@st.composite
def dtypes(draw: st.DrawFn, op: Op, choice: tuple[str, ...]) -> dict[str, str]:
    """The dtype of each tensor, by its letter."""
    one = draw(st.sampled_from(choice))
    other = draw(st.sampled_from(FP8)) if one in FP8 else one
    return dict(zip(READS[op], (one, other), strict=True)) | {WRITES[op]: draw(st.sampled_from(DTYPES[one].outputs))}


@st.composite
def problems(
    draw: st.DrawFn, smallest: int = 1, layout: str | None = None, choice: tuple[str, ...] = INPUT_DTYPES
) -> Problem:
    """Any valid problem with small sizes; `smallest` 0 lets the batch be empty, `choice` is of the inputs' dtypes."""
    spatial = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    op = draw(st.sampled_from(OPS))
    few = st.integers(1, 3)
    batch = draw(st.integers(smallest, 3))
    channels, filters = groups * draw(few), groups * draw(few)
    taps = [draw(few) for _ in range(spatial)]
    stride, dilation = ([draw(few) for _ in range(spatial)] for _ in range(2))
    padding = [(draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(spatial)]
    reach = [dil * (tap - 1) + 1 for dil, tap in zip(dilation, taps, strict=True)]
    sizes = [max(1, far - sum(pair)) + draw(st.integers(0, 3)) for far, pair in zip(reach, padding, strict=True)]
    out = output_spatial(sizes, taps, padding, stride, dilation)
    names = draw(dtypes(op, choice))

    def spec(letter: str, *dims: int) -> TensorSpec:
        if layout is not None:
            return TensorSpec.dense(dims, names[letter], layout)
        return TensorSpec(dims, draw(layouts(dims)), names[letter], draw(st.sampled_from((1, 2, 4, 8, 16, 32))))

    return Problem(
        op=op,
        x=spec("x", batch, channels, *sizes),
        w=spec("w", filters, channels // groups, *taps),
        y=spec("y", batch, filters, *out),
        padding=tuple(padding),
        stride=tuple(stride),
        dilation=tuple(dilation),
        groups=groups,
        epilogue=Epilogue(bias=op != "wgrad" and draw(st.booleans())),
        device=draw(st.sampled_from(("cpu", "cuda"))),
    )


def small(**changes: Any) -> Problem:
    """A valid problem with all sizes different, with some fields exchanged."""
    fields: dict[str, Any] = {
        "op": "fprop",
        "x": TensorSpec.dense((2, 6, 9, 11), "float32"),
        "w": TensorSpec.dense((4, 3, 3, 5), "float32"),
        "y": TensorSpec.dense((2, 4, 5, 8), "float32"),
        "padding": ((1, 1), (0, 1)),
        "stride": (2, 1),
        "dilation": (1, 1),
        "groups": 2,
    }
    return Problem(**{**fields, **changes})


def spec(*dims: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec.dense(dims, dtype)


# Shapes


@pytest.mark.behaviour("B5")
@given(problem=problems())
@ENOUGH
def test_output_size_counts_the_places_where_the_filter_fits(problem: Problem) -> None:
    for dim in range(problem.spatial_rank):
        padded = problem.x.dims[2 + dim] + sum(problem.padding[dim])
        last_tap = problem.dilation[dim] * (problem.w.dims[2 + dim] - 1)
        fits = [place for place in range(0, padded, problem.stride[dim]) if place + last_tap < padded]
        assert problem.y.dims[2 + dim] == len(fits)


@pytest.mark.behaviour("B5")
@given(problem=problems())
@ENOUGH
def test_output_size_is_torchs(problem: Problem) -> None:
    symmetric = tuple((before, before) for before, _ in problem.padding)
    sizes = (problem.x.dims[2:], problem.w.dims[2:])
    try:
        found = output_spatial(*sizes, symmetric, problem.stride, problem.dilation)
    except SpecError:
        return
    x, w = (torch.empty(spec.dims, device="meta") for spec in (problem.x, problem.w))
    padding = [before for before, _ in symmetric]
    y = CONV[problem.spatial_rank](x, w, None, problem.stride, padding, problem.dilation, problem.groups)
    assert found == y.shape[2:]


def test_dense_works_out_the_output_and_spreads_single_numbers() -> None:
    problem = Problem.dense("fprop", (2, 6, 9, 11), (4, 3, 3, 5), padding=[1, (0, 1)], stride=[2, 1], groups=2)
    assert problem == small()
    cube = Problem.dense("wgrad", (1, 2, 9, 9, 9), (3, 2, 2, 2, 2), padding=1, stride=2, dilation=3, dtype="float16")
    assert (cube.stride, cube.dilation, cube.padding) == ((2, 2, 2), (3, 3, 3), ((1, 1),) * 3)
    assert cube.y.dims == (1, 3, 4, 4, 4)
    assert {cube.x.dtype, cube.w.dtype, cube.y.dtype} == {"float16"}


@pytest.mark.behaviour("B6")
@pytest.mark.parametrize(("op", "inputs", "output"), [("fprop", "xw", "y"), ("dgrad", "yw", "x"), ("wgrad", "xy", "w")])
def test_each_operation_reads_two_tensors_and_writes_the_third(op: str, inputs: str, output: str) -> None:
    problem = small(op=op)
    assert problem.inputs == tuple(getattr(problem, letter) for letter in inputs)
    assert problem.output == getattr(problem, output)
    assert problem.dtype == "float32"


# Dtypes

# What the inputs and the output may be; every other combination is refused.
ALLOWED = {
    "float64": {"float64"},
    "float32": {"float32"},
    "bfloat16": {"bfloat16"},
    "float16": {"float16"},
    "int8": {"int8", "int32", "float32"},
    "float8_e4m3fn": {*FP8, "bfloat16", "float16", "float32"},
    "float8_e5m2": {*FP8, "bfloat16", "float16", "float32"},
}


@pytest.mark.parametrize("op", OPS)
def test_only_the_listed_dtypes_go_together(op: Op) -> None:
    shapes = {"x": (2, 3, 8), "w": (4, 3, 3), "y": (2, 4, 6)}
    for first, second, written in itertools.product(DTYPES, repeat=3):
        names = dict(zip((*READS[op], WRITES[op]), (first, second, written), strict=True))
        specs = {letter: spec(*dims, dtype=names[letter]) for letter, dims in shapes.items()}
        same = first == second or {first, second} <= set(FP8)
        if same and written in ALLOWED.get(first, ()):
            problem = Problem(op=op, **specs, padding=((0, 0),), stride=(1,), dilation=(1,))
            assert (problem.dtype, problem.output_dtype) == (first, written)
            assert problem.with_output_dtype(first).output_dtype == first
            assert problem.with_output_dtype(first).with_output_dtype(written) == problem
            continue
        with pytest.raises(SpecError, match=f"x {names['x']}, w {names['w']}, y {names['y']}; expected "):
            Problem(op=op, **specs, padding=((0, 0),), stride=(1,), dilation=(1,))


@pytest.mark.parametrize("dtype", ALLOWED)
def test_a_refused_output_dtype_is_answered_with_the_allowed_ones(dtype: str) -> None:
    refused = "float64" if dtype != "float64" else "float32"
    with pytest.raises(SpecError, match=f"w {refused}, .*; expected w, which wgrad writes, to be ") as caught:
        Problem.dense("wgrad", (2, 3, 8), (4, 3, 3), dtype=dtype, output_dtype=refused)
    assert set(str(caught.value).partition(" to be ")[2].split(" or ")) == ALLOWED[dtype]


def test_nothing_reads_int32() -> None:
    with pytest.raises(SpecError, match=r"expected x and w, which fprop reads, to be one of float64, .*, float8_e5m2$"):
        Problem.dense("fprop", (2, 3, 8), (4, 3, 3), dtype="int32")


@pytest.mark.parametrize("op", OPS)
def test_dense_gives_the_output_alone_its_own_dtype(op: Op) -> None:
    problem = Problem.dense(op, (2, 3, 8), (4, 3, 3), dtype="int8", output_dtype="int32")
    assert (problem.dtype, problem.output_dtype, problem.output.dtype) == ("int8", "int32", "int32")
    assert [one.dtype for one in problem.inputs] == ["int8", "int8"]
    assert problem == Problem.dense(op, (2, 3, 8), (4, 3, 3), dtype="int8").with_output_dtype("int32")


@pytest.mark.behaviour("B4")
def test_products_are_summed_in_a_type_that_fits_them() -> None:
    sums = {name: DTYPES[name].accumulate for name in INPUT_DTYPES}
    assert sums.pop("float64") == "float64"
    assert sums.pop("int8") == "int32"
    assert set(sums.values()) == {"float32"}


@pytest.mark.parametrize("name", DTYPES)
def test_the_table_of_dtypes_is_torchs(name: str) -> None:
    info, dtype = DTYPES[name], getattr(torch, name)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    assert (info.itemsize_bytes, info.largest) == (dtype.itemsize, limits.max)
    assert info.is_integer != dtype.is_floating_point
    if dtype.is_floating_point:
        assert 2.0 ** (1 - info.significand_bits) == limits.eps
    whole = torch.arange(2 if dtype.itemsize > 1 else 1, 1 + min(int(info.exact_to), 3_000), dtype=torch.float64)
    assert torch.equal(whole.to(dtype).double(), whole)
    ends = torch.tensor([info.exact_to, -info.exact_to], dtype=torch.float64)
    assert torch.equal(ends.to(dtype).double(), ends)


def test_gradients_of_a_forward_that_writes_another_dtype_are_no_problems() -> None:
    """What comes back has the output's dtype, and nothing multiplies int32 with int8."""
    forward = Problem.dense("fprop", (2, 3, 8), (4, 3, 3), dtype="int8", output_dtype="int32")
    with pytest.raises(SpecError, match="x int8, w int8, y int32; expected one dtype for "):
        forward.gradients()
    to_input, to_weight = Problem.dense("fprop", (2, 3, 8), (4, 3, 3), dtype="float8_e5m2").gradients()
    assert {to_input.output_dtype, to_weight.output_dtype} == {"float8_e5m2"}


# Strides


@pytest.mark.behaviour("B2")
@given(data=st.data(), dims=st.lists(st.integers(1, 4), min_size=3, max_size=5).map(tuple))
@ENOUGH
def test_equal_tensors_with_other_strides_of_size_one_dimensions_are_equal_specs(
    data: st.DataObject, dims: tuple[int, ...]
) -> None:
    strides = data.draw(layouts(dims))
    junk = tuple(
        data.draw(st.integers(0, 100)) if size == 1 else step for size, step in zip(dims, strides, strict=True)
    )
    plain, other = TensorSpec(dims, strides, "float32"), TensorSpec(dims, junk, "float32")
    assert plain == other
    assert hash(plain) == hash(other)
    assert plain.layout == other.layout
    # Only what is never stepped over may change: both still describe the same places in memory.
    memory = torch.arange(2_000)
    assert torch.equal(memory.as_strided(dims, junk), memory.as_strided(dims, other.strides))


@pytest.mark.behaviour("B2")
@given(dims=st.lists(st.integers(1, 4), min_size=3, max_size=5).map(tuple), data=st.data())
@ENOUGH
def test_dense_layouts_are_recognised_whatever_torch_left_in_size_one_strides(
    data: st.DataObject, dims: tuple[int, ...]
) -> None:
    for layout, dense in (("contiguous", contiguous_strides(dims)), ("channels_last", channels_last_strides(dims))):
        junk = [data.draw(st.integers(0, 100)) if size == 1 else step for size, step in zip(dims, dense, strict=True)]
        found = TensorSpec(dims, tuple(junk), "float32")
        both_fit = dims[1] == 1 or math.prod(dims[2:]) == 1
        assert found.layout == ("contiguous" if both_fit else layout)
        assert found == TensorSpec.dense(dims, "float32", found.layout)


@pytest.mark.behaviour("B2")
@given(dims=st.lists(st.integers(0, 4), min_size=3, max_size=5).map(tuple), data=st.data())
@ENOUGH
def test_normalizing_twice_changes_nothing(data: st.DataObject, dims: tuple[int, ...]) -> None:
    once = normalize_strides(dims, data.draw(layouts(dims)))
    assert normalize_strides(dims, once) == once


@given(dims=st.lists(st.integers(2, 4), min_size=3, max_size=5).map(tuple))
@ENOUGH
def test_dense_strides_are_torchs(dims: tuple[int, ...]) -> None:
    assert contiguous_strides(dims) == torch.empty(dims).stride()
    if len(dims) > 3:
        assert channels_last_strides(dims) == torch.empty(dims).to(memory_format=FORMATS[len(dims)]).stride()


@given(problem=problems(smallest=0))
@ENOUGH
def test_spec_counts_elements_bytes_and_memory(problem: Problem) -> None:
    for one in (problem.x, problem.w, problem.y):
        places = list(itertools.product(*map(range, one.dims)))
        assert one.numel == len(places)
        assert one.nbytes == len(places) * getattr(torch, one.dtype).itemsize
        offsets = [sum(i * step for i, step in zip(place, one.strides, strict=True)) for place in places]
        assert one.storage_elements == (max(offsets) + 1 if offsets else 0)


# What bad input gets: the number found and the number expected

SPEC_ERRORS = [
    pytest.param({"dims": (2, 3), "strides": (3, 1)}, r"\(2, 3\): found 2, expected 3, 4 or 5", id="rank-2"),
    pytest.param({"dims": (1,) * 6, "strides": (1,) * 6}, "found 6, expected 3, 4 or 5", id="rank-6"),
    pytest.param({"strides": (12, 4)}, r"strides \(12, 4\) have 2 entries, dims \(2, 3, 4\)", id="strides-short"),
    pytest.param({"dims": (2, -3, 4)}, r"\(2, -3, 4\), expected sizes >= 0", id="negative-size"),
    pytest.param({"dims": (2**30, 2**18, 2)}, r"\(1073741824, 262144, 2\).*at most 2\*\*48", id="too-many-elements"),
    pytest.param({"dims": (0, 2**48, 2)}, r"at most 2\*\*48 elements", id="too-many-elements-behind-a-zero"),
    pytest.param({"strides": (12, -4, 1)}, r"\(12, -4, 1\), expected 0 <= stride", id="negative-stride"),
    pytest.param({"strides": (2**49, 4, 1)}, r"expected 0 <= stride <= 2\*\*48", id="huge-stride"),
    pytest.param({"dtype": "uint8"}, "'uint8', expected one of float64, .*, float16, int8, .*, int32", id="dtype"),
    pytest.param({"alignment_bytes": 3}, "is 3, expected a power of two from 1 to 32", id="alignment-3"),
    pytest.param({"alignment_bytes": 64}, "is 64, expected a power of two from 1 to 32", id="alignment-64"),
]


@pytest.mark.parametrize(("changes", "message"), SPEC_ERRORS)
def test_tensor_spec_errors_name_found_and_expected(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"dims": (2, 3, 4), "strides": (12, 4, 1), "dtype": "float32"}
    assert TensorSpec(**fields).layout == "contiguous"
    with pytest.raises(SpecError, match=message):
        TensorSpec(**{**fields, **changes})


PROBLEM_ERRORS = [
    pytest.param({"op": "forward"}, "op is 'forward', expected one of fprop, dgrad, wgrad", id="op"),
    pytest.param({"device": "cuda:0"}, "device is 'cuda:0', expected a torch device type", id="device-index"),
    pytest.param({"device": "c" * 17}, "device is 'c{17}'", id="device-long"),
    pytest.param({"w": spec(4, 3, 3)}, r"weight \(4, 3, 3\).*expected all of rank 4, the input's", id="weight-rank"),
    pytest.param({"y": spec(2, 4, 5)}, r"output \(2, 4, 5\).*expected all of rank 4", id="output-rank"),
    pytest.param(
        {"w": spec(4, 3, 3, 5, dtype="float16")},
        "x float32, w float16, y float32; expected one dtype for x and w, which fprop reads",
        id="dtypes",
    ),
    pytest.param(
        {"op": "wgrad", "y": spec(2, 4, 5, 8, dtype="int8")},
        "y int8; expected one dtype for x and y",
        id="wgrad-dtypes",
    ),
    pytest.param(
        {"op": "dgrad", "w": spec(4, 3, 3, 5, dtype="int8")}, "w int8, .* for y and w, which dgrad", id="dgrad-dtypes"
    ),
    pytest.param(
        {"y": spec(2, 4, 5, 8, dtype="float16")},
        "x float32, w float32, y float16; expected y, which fprop writes, to be float32$",
        id="output-dtype",
    ),
    pytest.param({"padding": 1}, "padding is 1, expected", id="padding-number"),
    pytest.param({"padding": ((1, 1), (0, 1, 2))}, r"padding is .*\(0, 1, 2\)\), expected", id="padding-trio"),
    pytest.param({"padding": ((1, 1), (0, 1.5))}, "padding is .*1.5", id="padding-float"),
    pytest.param({"stride": 2}, "stride is 2, expected", id="stride-number"),
    pytest.param({"dilation": (1, True)}, r"dilation is \(1, True\), expected", id="dilation-bool"),
    pytest.param({"padding": ((1, 1),)}, r"padding is \(\(1, 1\),\): found 1, expected 2", id="padding-short"),
    pytest.param({"stride": (2, 1, 1)}, r"stride is \(2, 1, 1\): found 3, expected 2", id="stride-long"),
    pytest.param({"dilation": ()}, r"dilation is \(\): found 0, expected 2", id="dilation-none"),
    pytest.param({"padding": ((1, 1), (-2, 1))}, r"\(\(1, 1\), \(-2, 1\)\), expected values >= 0", id="padding-neg"),
    pytest.param({"stride": (0, 1)}, r"stride is \(0, 1\), expected values >= 1", id="stride-0"),
    pytest.param({"dilation": (1, -1)}, r"dilation is \(1, -1\), expected values >= 1", id="dilation-negative"),
    pytest.param({"groups": 0}, "groups is 0, expected a number >= 1", id="groups-0"),
    pytest.param({"groups": 4}, "groups is 4, expected a divisor of C = 6 and K = 4", id="groups-not-of-channels"),
    pytest.param({"groups": 3}, "groups is 3, expected a divisor of C = 6 and K = 4", id="groups-not-of-filters"),
    pytest.param({"groups": 1}, r"weight.shape\[1\] is 3, expected C/groups = 6/1 = 6", id="channels"),
    pytest.param({"w": spec(4, 5, 3, 5)}, r"is 5, expected C/groups = 6/2 = 3 .*weight \(4, 5, 3, 5\)", id="weight-1"),
    pytest.param({"y": spec(3, 4, 5, 8)}, r"output is \(3, 4\), expected \(N, K\) = \(2, 4\)", id="batch"),
    pytest.param({"y": spec(2, 6, 5, 8)}, r"output is \(2, 6\), expected \(N, K\) = \(2, 4\)", id="filters"),
    pytest.param({"y": spec(2, 4, 5, 7)}, r"is \(5, 7\), expected \(5, 8\).*stride \(2, 1\)", id="output-size"),
    pytest.param(
        {"dilation": (1, 4)}, "dilated filter size is 17, padded input size is 12", id="filter-larger-than-input"
    ),
    pytest.param({"w": spec(4, 3, 0, 5)}, r"filter sizes are \(0, 5\), expected values >= 1", id="filter-empty"),
    pytest.param(
        {"op": "wgrad", "epilogue": Epilogue(bias=True)}, r"wgrad has no bias.*Epilogue\(bias=False\)", id="wgrad-bias"
    ),
]


@pytest.mark.parametrize(("changes", "message"), PROBLEM_ERRORS)
def test_problem_errors_name_found_and_expected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        small(**changes)


@pytest.mark.parametrize("value", [True, 2.0, "2", None])
def test_groups_must_be_an_integer(value: object) -> None:
    # 2.0 and True equal integers, and would pass as such with another text, which is another key.
    with pytest.raises(SpecError, match="groups is "):
        small(groups=value, w=spec(4, 6 if value is True else 3, 3, 5))


DENSE_ERRORS = [
    pytest.param({"layout": "nhwc"}, "layout is 'nhwc', expected 'contiguous' or 'channels_last'", id="layout"),
    pytest.param({"w_dims": (4, 6, 3)}, r"input \(2, 6, 9, 9\) and weight \(4, 6, 3\) differ in rank", id="ranks"),
    pytest.param({"x_dims": (6, 9)}, r"\(6, 9\): found 2, expected 3, 4 or 5", id="rank-2"),
    pytest.param({"stride": (1, 1, 1)}, r"stride is \(1, 1, 1\), expected an integer or 2 integers", id="stride-3"),
    pytest.param({"stride": 0}, r"stride is \(0, 0\).*expected values >= 1", id="stride-0"),
    pytest.param({"dilation": True}, "dilation is True, expected an integer or 2 integers", id="dilation-bool"),
    pytest.param({"dilation": 1.5}, "dilation is 1.5, expected an integer or 2 integers", id="dilation-float"),
    pytest.param({"padding": "same"}, "padding is 'same', expected an integer, or 2 integers or", id="padding-text"),
    pytest.param({"padding": [1, 2, 3]}, r"padding is \[1, 2, 3\], expected 2 entries", id="padding-3"),
    pytest.param({"padding": [1, (1, 2, 3)]}, r"padding entry is \(1, 2, 3\), expected a number or", id="padding-trio"),
    pytest.param(
        {"padding": [1, (0, -2)]}, r"padding is \[1, \(0, -2\)\], expected values >= 0", id="padding-negative"
    ),
    pytest.param({"w_dims": (4, 6, 10, 3)}, "dilated filter size is 10, padded input size is 9", id="filter-too-large"),
]


@pytest.mark.parametrize(("changes", "message"), DENSE_ERRORS)
def test_dense_problem_errors_name_found_and_expected(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"x_dims": (2, 6, 9, 9), "w_dims": (4, 6, 3, 3)}
    with pytest.raises(SpecError, match=message):
        Problem.dense("fprop", **{**fields, **changes})


@pytest.mark.parametrize("value", [1.5, [1, 2.5], [True], None, "1", []])
def test_per_dim_refuses_what_is_no_integer(value: object) -> None:
    with pytest.raises(SpecError, match=r"stride is .*expected an integer or 2 integers"):
        per_dim("stride", value, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.5, [1, 2.5], [True, True], None, "1", [], [(1,), 2], ["ab", 1]])
def test_padding_pairs_refuses_what_is_no_padding(value: object) -> None:
    with pytest.raises(SpecError, match="padding"):
        padding_pairs(value, 2)  # type: ignore[arg-type]


def test_spec_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="groups is 5"):
        small(groups=5)


# Round trips


@given(problem=problems(smallest=0))
@ENOUGH
def test_json_round_trip(problem: Problem) -> None:
    text = msgspec.json.encode(problem)
    back = msgspec.json.decode(text, type=Problem)
    assert back == problem
    assert hash(back) == hash(problem)
    assert msgspec.json.encode(back) == text


BAD_JSON = [
    pytest.param({"op": "forward"}, r"op", id="op"),
    pytest.param({"groups": "2"}, r"Expected `int`, got `str` - at `\$.groups`", id="text-for-number"),
    pytest.param({"groups": 2.5}, r"Expected `int`, got `float` - at `\$.groups`", id="float-for-number"),
    pytest.param({"stride": [2, None]}, r"\$.stride", id="null-in-list"),
    pytest.param({"padding": [[1, 1], [0]]}, r"\$.padding", id="short-pair"),
    pytest.param({"colour": 1}, "unknown field `colour`", id="unknown-field"),
    pytest.param({"groups": 4}, "groups is 4, expected a divisor of C = 6", id="no-meaning"),
    pytest.param({"x": {"dims": [2, 6], "strides": [6, 1], "dtype": "float32"}}, r"found 2, expected 3", id="nested"),
    pytest.param({"padding": [[1, 1], [0, 10**30]]}, "padding", id="huge"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_JSON)
def test_decoding_runs_the_checks_of_the_constructor(changes: dict[str, Any], message: str) -> None:
    fields = {**msgspec.to_builtins(small()), **changes}
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.json.decode(json.dumps(fields), type=Problem)  # msgspec itself writes no number that large


@given(problem=problems(smallest=0))
@ENOUGH
def test_text_is_one_line_that_names_the_essentials(problem: Problem) -> None:
    text = str(problem)
    assert "\n" not in text
    start = f"{problem.op}{'+bias' if problem.epilogue.bias else ''} {problem.dtype}"
    if len({problem.x.dtype, problem.w.dtype, problem.y.dtype}) == 1:
        assert text.startswith(f"{start} ")
    else:
        assert text.startswith((f"{start}->{problem.output_dtype} ", f"{start},{problem.inputs[1].dtype}->"))
    assert text.endswith(f" {problem.device}")
    for one in (problem.x, problem.w, problem.y):
        assert "x".join(map(str, one.dims)) in text
    assert (f"groups={problem.groups}" in text) == (problem.groups > 1)


@given(first=problems(), second=problems())
@ENOUGH
def test_different_problems_have_different_texts(first: Problem, second: Problem) -> None:
    assert (str(first) == str(second)) == (first == second)


@given(problem=problems(smallest=0))
@settings(deadline=None, max_examples=200)
def test_text_reads_back_as_the_same_problem(problem: Problem) -> None:
    back = Problem.parse(str(problem))
    assert back == problem
    assert hash(back) == hash(problem)
    assert str(back) == str(problem)


def test_text_of_a_known_problem() -> None:
    assert str(small()) == "fprop float32 x=2x6x9x11 w=4x3x3x5 y=2x4x5x8 pad=1,0:1 stride=2,1 groups=2 cpu"
    narrow = Problem.dense("fprop", (2, 3, 8), (4, 3, 3), dtype="int8", output_dtype="int32")
    assert str(narrow) == "fprop int8->int32 x=2x3x8 w=4x3x3 y=2x4x6 cpu"
    eight = Problem.dense("dgrad", (2, 3, 8), (4, 3, 3), dtype="float8_e4m3fn")
    mixed = msgspec.structs.replace(eight, w=spec(4, 3, 3, dtype="float8_e5m2"))
    assert str(eight).startswith("dgrad float8_e4m3fn x=")
    assert str(mixed).startswith("dgrad float8_e4m3fn,float8_e5m2->float8_e4m3fn x=")
    strided = TensorSpec((2, 3, 4), (100, 4, 1), "float32", 8)
    assert str(strided) == "2x3x4:100,4,1@8"
    assert str(TensorSpec.dense((2, 3, 4, 5), "float16", "channels_last")) == "2x3x4x5:cl"


def test_equal_problems_hash_alike_and_different_ones_are_kept_apart() -> None:
    one, same, other = small(), small(), small(op="wgrad")
    assert one is not same
    assert {one: 1}[same] == 1
    assert len({one, same, other, small(device="cuda")}) == 3


def test_lists_and_sizes_of_tensors_make_the_same_problem() -> None:
    x = torch.empty(2, 6, 9, 11)
    listed = small(
        x=TensorSpec(x.shape, x.stride(), "float32"),
        w=TensorSpec([4, 3, 3, 5], [45, 15, 5, 1], "float32"),  # type: ignore[arg-type]
        padding=[[1, 1], [0, 1]],
        stride=[2, 1],
        dilation=[1, 1],
    )
    assert listed == small()
    assert hash(listed) == hash(small())
    assert repr(listed) == repr(small())


def test_problems_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        small().groups = 1  # type: ignore[misc]


# Arithmetic


def products(problem: Problem) -> dict[str, Counter[tuple[int, ...]]]:
    """For each operation, how many products land on each element it writes, counted one by one, padding left out."""
    channels, filters = problem.w.dims[1], problem.w.dims[0] // problem.groups
    counts: dict[str, Counter[tuple[int, ...]]] = {op: Counter() for op in OPS}
    for n, k, *out in itertools.product(*map(range, problem.y.dims)):
        for c, *taps in itertools.product(range(channels), *map(range, problem.w.dims[2:])):
            place = [
                o * step + tap * dil - before
                for o, tap, step, dil, (before, _) in zip(
                    out, taps, problem.stride, problem.dilation, problem.padding, strict=True
                )
            ]
            if all(0 <= at < size for at, size in zip(place, problem.x.dims[2:], strict=True)):
                counts["fprop"][(n, k, *out)] += 1
                counts["dgrad"][(n, k // filters * channels + c, *place)] += 1
                counts["wgrad"][(k, c, *taps)] += 1
    return counts


SMALL_CASES = [
    pytest.param(Problem.dense("fprop", (2, 4, 7), (6, 2, 3), groups=2), id="1d-groups"),
    pytest.param(Problem.dense("fprop", (1, 2, 9, 8), (3, 2, 3, 2)), id="2d"),
    pytest.param(Problem.dense("fprop", (2, 1, 9, 9), (2, 1, 3, 3), dilation=2), id="2d-dilated"),
    pytest.param(Problem.dense("fprop", (1, 2, 5, 5, 5), (2, 1, 2, 2, 2), groups=2), id="3d-depthwise"),
]


@pytest.mark.parametrize("problem", SMALL_CASES)
@pytest.mark.parametrize("op", OPS)
def test_terms_and_operations_are_what_a_loop_counts(problem: Problem, op: str) -> None:
    one = msgspec.structs.replace(problem, op=op)
    counted = products(one)
    # Without padding and stride nothing is left out, so the middle of each output sums every term.
    assert max(counted[op].values()) == one.n_terms
    assert one.flops == 2 * counted[op].total()


@given(problem=problems())
@ENOUGH
def test_terms_and_operations_are_upper_bounds_where_padding_or_stride_leaves_some_out(problem: Problem) -> None:
    counted = products(problem)[problem.op]
    assert max(counted.values(), default=0) <= problem.n_terms
    assert 2 * counted.total() <= problem.flops
    if not any(map(any, problem.padding)):
        assert 2 * counted.total() == problem.flops


@given(problem=problems(smallest=0))
@ENOUGH
def test_least_bytes_are_those_of_three_tensors(problem: Problem) -> None:
    sizes = [math.prod(one.dims) * getattr(torch, one.dtype).itemsize for one in (problem.x, problem.w, problem.y)]
    assert problem.least_bytes == sum(sizes)


EMPTY_CASES = [
    pytest.param((0, 4, 8), (4, 4, 3), {}, True, id="no-batch"),
    pytest.param((2, 0, 8), (4, 0, 3), {}, True, id="no-channels"),
    pytest.param((2, 4, 8), (0, 4, 3), {}, True, id="no-filters"),
    pytest.param((2, 4, 0), (4, 4, 1), {"padding": 1}, True, id="no-pixels-but-padding"),
    pytest.param((1, 1, 1), (1, 1, 1), {}, False, id="one-element"),
]


@pytest.mark.behaviour("B7")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("x", "w", "arguments", "empty"), EMPTY_CASES)
def test_a_problem_is_empty_when_any_tensor_is(
    op: Any, x: tuple[int, ...], w: tuple[int, ...], arguments: dict[str, Any], empty: bool
) -> None:
    assert Problem.dense(op, x, w, **arguments).is_empty is empty


# Gradients


@pytest.mark.behaviour("B6")
@given(problem=problems(choice=FLOAT_DTYPES).filter(lambda one: one.op != "wgrad"))
@ENOUGH
def test_gradients_keep_the_geometry_and_lose_the_bias(problem: Problem) -> None:
    to_input, to_weight = problem.gradients()
    assert (to_input.op, to_weight.op) == ("dgrad" if problem.op == "fprop" else "fprop", "wgrad")
    for gradient in (to_input, to_weight):
        assert not gradient.epilogue.bias
        assert [one.dims for one in (gradient.x, gradient.w, gradient.y)] == [
            one.dims for one in (problem.x, problem.w, problem.y)
        ]
        for name in ("padding", "stride", "dilation", "groups", "device", "dtype"):
            assert getattr(gradient, name) == getattr(problem, name)
        wanted = "channels_last" if problem.output.layout == "channels_last" else "contiguous"
        assert gradient.output == TensorSpec.dense(gradient.output.dims, problem.dtype, wanted)
    # The incoming gradient lies where the output did, and the other input is the very tensor that the forward read.
    other = to_input.inputs
    assert other == (problem.output, problem.w)
    assert to_weight.inputs == (problem.x, problem.y)


def test_gradients_of_a_dense_problem_are_dense_problems() -> None:
    forward = Problem.dense("fprop", (2, 4, 9, 9), (8, 4, 3, 3), layout="channels_last", stride=2, padding=[(0, 1), 1])
    same = {"layout": "channels_last", "stride": 2, "padding": [(0, 1), 1]}
    assert forward.gradients() == (
        Problem.dense("dgrad", (2, 4, 9, 9), (8, 4, 3, 3), **same),
        Problem.dense("wgrad", (2, 4, 9, 9), (8, 4, 3, 3), **same),
    )


def test_the_largest_tensor_is_still_described() -> None:
    assert TensorSpec.dense((1, 1, MAX_ELEMENTS), "float32").numel == MAX_ELEMENTS

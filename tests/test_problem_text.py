"""A problem's line, read back: what is accepted, and what is said about lines that are not.

That every problem's own text reads back as itself is shown in `test_problem.py`, over generated problems.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convplan import Epilogue, Problem, SpecError, TensorSpec
from convplan._errors import NoPlan, ReplayMiss
from convplan._problem import MAX_ELEMENTS
from convplan._problem_text import EXAMPLE, MAX_CHARACTERS

LINE = "fprop float32 x=2x6x9x11 w=4x3x3x5 y=2x4x5x8 pad=1,0:1 stride=2,1 groups=2 cpu"


def test_a_line_is_read_with_every_part_of_it() -> None:
    assert Problem.parse(
        "dgrad+bias float8_e4m3fn,float8_e5m2->bfloat16 x=2x6x9x11:cl@4 w=4x3x3x5:45,15,9,1@1 y=2x4x5x8:1000,1,40,4 "
        "pad=1,0:1 stride=2,1 dil=1,1 groups=2 cuda"
    ) == Problem(
        op="dgrad",
        x=TensorSpec((2, 6, 9, 11), (594, 1, 66, 6), "bfloat16", 4),
        w=TensorSpec((4, 3, 3, 5), (45, 15, 9, 1), "float8_e5m2", 1),
        y=TensorSpec((2, 4, 5, 8), (1000, 1, 40, 4), "float8_e4m3fn", 32),
        padding=((1, 1), (0, 1)),
        stride=(2, 1),
        dilation=(1, 1),
        groups=2,
        epilogue=Epilogue(bias=True),
        device="cuda",
    )


def test_order_between_dtypes_and_device_and_spaces_do_not_matter() -> None:
    first, dtype, *middle, device = LINE.split()
    assert Problem.parse("  ".join([first, dtype, *reversed(middle), device]) + "\n") == Problem.parse(LINE)


def test_the_example_in_errors_is_one() -> None:
    assert str(Problem.parse(EXAMPLE)) == EXAMPLE


def test_a_line_of_the_largest_numbers_is_read_and_far_from_the_limit() -> None:
    most, thin = MAX_ELEMENTS, (1, 1, 1, 1, MAX_ELEMENTS)
    problem = Problem(
        op="wgrad",
        x=TensorSpec(thin, (0, 0, 0, 0, most), "float8_e4m3fn", 1),
        w=TensorSpec((1,) * 5, (1,) * 5, "bfloat16", 16),
        y=TensorSpec(thin, (0, 0, 0, 0, most), "float8_e5m2", 1),
        padding=((0, 0),) * 3,
        stride=(most, most, 1),
        dilation=(most,) * 3,
        device="cuda" * 4,
    )
    assert Problem.parse(str(problem)) == problem
    # Where strides of all dimensions and paddings of all sides are as long as the longest here.
    assert len(str(problem)) + 3 * 5 * len(f",{most}") + 6 * len(f",{most}") < MAX_CHARACTERS


MALFORMED = {
    "no-string": (5, "found int, expected a string"),
    "empty": ("", "found 0 words in ''"),
    "too-long": ("fprop " * 500, f"found 3000 characters, expected at most {MAX_CHARACTERS}"),
    "record": (f"{LINE} -> aten 12.5 us (measure)", "found 'cpu', expected one of x=, w=, y=, pad="),
    "operation": (LINE.replace("fprop", "conv"), "found 'conv', expected one of fprop, dgrad, wgrad"),
    "epilogue": (LINE.replace("fprop", "fprop+bogus"), r"activation is 'bogus', expected one of none, relu"),
    "nothing-added": (LINE.replace("fprop", "fprop+"), r"found 'fprop\+'"),
    "bias-of-wgrad": (LINE.replace("fprop", "wgrad+bias"), "a wgrad has no bias"),
    "dtype": (LINE.replace("float32", "float"), "found the dtypes 'float', expected .*float32, bfloat16"),
    "two-dtypes": (LINE.replace("float32", "float32,float32"), "found the dtypes"),
    "three-dtypes": (LINE.replace("float32", "int8,int8,int8->int8"), "found the dtypes"),
    "no-dtype": (LINE.replace("float32", "float32->"), "found the dtypes 'float32->'"),
    "dtypes-that-do-not-fit": (LINE.replace("float32", "int8->float64"), "dtypes are .*expected y, which fprop writes"),
    "tensor-missing": (LINE.replace("w=4x3x3x5", "dil=1,1"), "found no w=, expected all three"),
    "tensor-twice": (LINE.replace("w=4x3x3x5", "x=4x3x3x5"), "found x= twice"),
    "field": (LINE.replace("pad=", "padding="), r"found 'padding=1,0:1', expected one of .*pad="),
    "sizes": (LINE.replace("2x6x9x11", "2x6x9x-1"), "found x='2x6x9x-1', expected sizes such as"),
    "arabic-digits": (LINE.replace("2x6x9x11", "٢x6x9x11"), "found x="),
    "one-size": (LINE.replace("2x6x9x11", "2"), "found 1, expected 3, 4 or 5"),
    "one-size-channels-last": (LINE.replace("2x6x9x11", "2:cl"), "found 1, expected 3, 4 or 5"),
    "layout": (LINE.replace("2x6x9x11", "2x6x9x11:nhwc"), "found x='2x6x9x11:nhwc'"),
    "strides": (LINE.replace("2x6x9x11", "2x6x9x11:1,2"), "have 2 entries"),
    "alignment": (LINE.replace("2x6x9x11", "2x6x9x11@3"), "alignment_bytes is 3, expected a power of two"),
    "huge": (LINE.replace("2x6x9x11", f"2x6x9x{10**300}"), r"at most 2\*\*48 elements"),
    "pad": (LINE.replace("pad=1,0:1", "pad=1,0:1:2"), r"found pad='1,0:1:2', expected 2 entries, each .*before:after"),
    "pads": (LINE.replace("pad=1,0:1", "pad=1"), "found pad='1', expected 2 entries"),
    "stride": (LINE.replace("stride=2,1", "stride=2,1,1"), "found stride='2,1,1', expected 2 numbers"),
    "stride-0": (LINE.replace("stride=2,1", "stride=0,1"), "stride is .*expected values >= 1"),
    "no-stride": (LINE.replace("stride=2,1", "stride="), "found stride='', expected 2 numbers"),
    "groups": (LINE.replace("groups=2", "groups=2,2"), "found groups='2,2', expected 1 numbers"),
    "groups-that-do-not-divide": (LINE.replace("groups=2", "groups=4"), "groups is 4, expected a divisor"),
    "output": (LINE.replace("y=2x4x5x8", "y=2x4x5x9"), r"output spatial size is \(5, 9\), expected \(5, 8\)"),
    "device": (LINE.replace(" cpu", " cuda:1"), "device is 'cuda:1', expected a torch device type"),
    "no-device": (LINE.removesuffix(" cpu"), "device is 'groups=2', expected a torch device type"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_refused_with_what_was_found_and_expected(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Problem.parse(text)
    assert len(str(caught.value)) < 1_500


@given(text=st.one_of(st.text(max_size=80), st.text("fpropdgrawx=:,@0123456789 >-cul", max_size=120)))
@settings(deadline=None, max_examples=200)
def test_any_text_is_a_problem_or_refused(text: str) -> None:
    try:
        problem = Problem.parse(text)
    except SpecError:
        return
    assert Problem.parse(str(problem)) == problem


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_line_with_one_character_changed_is_a_problem_or_refused(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(LINE) - 1))
    changed = LINE[:place] + data.draw(st.sampled_from("0129x=:,@ bwyp")) + LINE[place + 1 :]
    try:
        problem = Problem.parse(changed)
    except SpecError as exc:
        assert "expected" in str(exc) or "larger" in str(exc)  # noqa: PT017 - both outcomes are right
        return
    assert Problem.parse(str(problem)) == problem


@pytest.mark.parametrize("error", [NoPlan, ReplayMiss])
def test_errors_that_name_a_problem_name_it_so_that_it_can_be_replayed(error: type) -> None:
    problem = Problem.parse(LINE)
    said = str(error(problem=str(problem), policy="Policy()"))
    assert LINE in said

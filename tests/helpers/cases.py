"""Named convolutions, small, grouped by what they stress. A new case is a new row; the last group failed once.

A case is one geometry. `Case.problem(op, dtype)` turns it into a `Problem` for each operation it lists. Fields that a
row leaves out are stride 1, dilation 1, no padding, one group, contiguous tensors and no bias.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from convplan._epilogue import Epilogue
from convplan._problem import DTYPES, FLOAT_DTYPES, OPS, Op, Problem, TensorSpec, contiguous_strides

DTYPE_NAMES = FLOAT_DTYPES  # those that every engine is run on
NARROW_DTYPES = tuple(  # the others: what is read, and each dtype that may be written for it
    (name, output) for name, info in DTYPES.items() for output in info.outputs if name not in FLOAT_DTYPES
)
DTYPE_PAIRS = (*((name, name) for name in FLOAT_DTYPES), *NARROW_DTYPES)

Numbers = int | tuple[int, ...]
Padding = int | tuple[int | tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    """One named geometry.

    Args:
        id: what the test id shows.
        x, w: dims of input and weight.
        given: how the first input lies in memory: `dense`, `expanded` (one sample seen N times), `spaced` (every other
            element of a longer tensor), `swapped` (last two dimensions exchanged), `offset` (unaligned by one element).
        ops: the operations it is run for.
    """

    id: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    padding: Padding = 0
    stride: Numbers = 1
    dilation: Numbers = 1
    groups: int = 1
    layout: str = "contiguous"
    given: str = "dense"
    bias: bool = False
    ops: tuple[Op, ...] = OPS

    def problem(self, op: Op, dtype: str, output_dtype: str | None = None) -> Problem:
        """The problem of one operation; `output_dtype` None: the inputs'."""
        dense = Problem.dense(
            op,
            self.x,
            self.w,
            dtype=dtype,
            output_dtype=output_dtype,
            layout=self.layout,
            padding=self.padding,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            epilogue=Epilogue(bias=self.bias),
        )
        changes = {"y" if op == "dgrad" else "x": _lay_out(dense.inputs[0], self.given)}
        fields = {name: getattr(dense, name) for name in dense.__struct_fields__}
        return Problem(**{**fields, **changes})


def _lay_out(spec: TensorSpec, given: str) -> TensorSpec:
    if given == "dense":
        return spec
    strides, itemsize = spec.strides, DTYPES[spec.dtype].itemsize_bytes
    if given == "offset":
        return TensorSpec(spec.dims, strides, spec.dtype, itemsize)
    changed = {
        "expanded": lambda: (0, *strides[1:]),
        "spaced": lambda: tuple(2 * stride for stride in strides),
        "swapped": lambda: _swapped(contiguous_strides((*spec.dims[:-2], spec.dims[-1], spec.dims[-2]))),
    }[given]()
    return TensorSpec(spec.dims, changed, spec.dtype)


def _swapped(strides: tuple[int, ...]) -> tuple[int, ...]:
    return (*strides[:-2], strides[-1], strides[-2])


GROUPED: dict[str, list[Case]] = {
    "rank": [
        Case("1d-k3", (2, 3, 11), (4, 3, 3), padding=1),
        Case("2d-k3", (2, 3, 7, 6), (4, 3, 3, 3), padding=1),
        Case("3d-k3", (1, 2, 4, 5, 6), (3, 2, 3, 3, 3), padding=1),
        Case("1d-long-filter", (1, 2, 150), (2, 2, 65), padding=32),
        Case("1d-filter-longer-than-input", (2, 1, 20), (2, 1, 33), padding=16),
    ],
    "one-tap": [
        Case("1x1", (2, 6, 5, 4), (8, 6, 1, 1)),
        Case("1x1-stride", (2, 4, 6, 7), (5, 4, 1, 1), stride=2),
        Case("1x1-pad", (2, 4, 4, 4), (3, 4, 1, 1), padding=1),
        Case("1x1-groups", (2, 6, 4, 4), (4, 3, 1, 1), groups=2),
        Case("1x1-channels-last", (3, 6, 4, 5), (8, 6, 1, 1), layout="channels_last"),
        Case("1d-pointwise", (2, 5, 9), (4, 5, 1)),
        Case("3d-pointwise-stride", (2, 3, 4, 3, 5), (4, 3, 1, 1, 1), stride=(2, 1, 3)),
    ],
    "padding": [
        Case("asymmetric-pad", (2, 3, 6, 5), (4, 3, 3, 3), padding=((2, 0), (0, 1))),
        Case("pad-wider-than-filter", (1, 2, 4, 4), (3, 2, 2, 2), padding=3),
        Case("same-even-filter", (2, 2, 6, 6), (2, 2, 4, 4), padding=((1, 2), (1, 2))),
        Case("1d-causal", (2, 3, 12), (3, 3, 4), padding=((3, 0),)),
        Case("3d-asymmetric-pad", (1, 2, 3, 4, 3), (2, 2, 2, 3, 2), padding=((0, 1), (2, 1), (1, 0))),
    ],
    "stride": [
        Case("stride-2", (2, 3, 9, 8), (4, 3, 3, 3), padding=1, stride=2),
        Case("stride-leftover-rows", (1, 2, 10, 11), (3, 2, 3, 3), stride=4),
        Case("stride-above-filter", (2, 2, 11, 9), (3, 2, 2, 2), stride=3),
        Case("stride-above-filter-pad", (1, 2, 9, 9), (2, 2, 2, 1), padding=((1, 2), (2, 0)), stride=(4, 3)),
        Case("patches", (2, 3, 8, 8), (6, 3, 4, 4), stride=4),
        Case("patches-leftover", (1, 3, 9, 11), (4, 3, 4, 4), stride=4),
        Case("stem-7x7", (2, 3, 16, 16), (4, 3, 7, 7), padding=3, stride=2),
        Case("1d-stride", (2, 1, 40), (6, 1, 10), stride=5),
        Case("3d-stride", (1, 2, 5, 6, 7), (3, 2, 3, 2, 3), padding=1, stride=(2, 1, 3)),
    ],
    "dilation": [
        Case("dilated", (2, 3, 9, 9), (4, 3, 3, 3), padding=2, dilation=2),
        Case("dilated-odd-pad", (2, 2, 8, 9), (3, 2, 2, 3), padding=(1, 3), dilation=(3, 2)),
        Case("dilated-strided", (1, 2, 13, 12), (3, 2, 3, 3), padding=2, stride=2, dilation=3),
        Case("dilated-stride-shares-factor", (1, 2, 14, 9), (2, 2, 3, 2), padding=1, stride=(4, 3), dilation=(2, 3)),
        Case("1d-dilated", (2, 4, 30), (4, 4, 3), padding=8, dilation=8),
    ],
    "groups": [
        Case("groups", (2, 6, 6, 5), (4, 3, 3, 3), padding=1, groups=2),
        Case("depthwise", (2, 5, 7, 6), (5, 1, 3, 3), padding=1, groups=5),
        Case("depthwise-stride", (2, 4, 8, 7), (4, 1, 3, 3), padding=1, stride=2, groups=4),
        Case("depthwise-channels-last", (2, 6, 6, 6), (6, 1, 5, 5), padding=2, groups=6, layout="channels_last"),
        Case("depth-multiplier", (2, 3, 6, 6), (6, 1, 3, 3), padding=1, groups=3),
        Case("1d-depthwise-causal", (2, 6, 17), (6, 1, 4), padding=((3, 0),), groups=6),
        Case("3d-depthwise", (1, 3, 4, 4, 5), (3, 1, 3, 3, 2), padding=1, groups=3),
        Case("groups-dilated-strided", (2, 4, 9, 9), (6, 2, 2, 3), padding=2, stride=2, dilation=2, groups=2),
    ],
    "shape": [
        Case("filter-fills-input", (2, 3, 4, 5), (4, 3, 4, 5)),
        Case("one-pixel", (2, 3, 1, 1), (4, 3, 3, 3), padding=1),
        Case("one-channel", (2, 1, 6, 6), (3, 1, 3, 3)),
        Case("one-filter", (2, 5, 6, 6), (1, 5, 3, 3), padding=1),
        Case("one-of-everything", (1, 1, 1, 1), (1, 1, 1, 1)),
        Case("row-vector", (1, 3, 1, 12), (2, 3, 1, 5), padding=((0, 0), (2, 2))),
        Case("even-filter", (1, 2, 7, 7), (3, 2, 2, 4), padding=1),
        Case("1d-batch-one", (1, 4, 16), (3, 4, 5), padding=2),
        Case("many-samples", (17, 2, 4, 4), (2, 2, 3, 3), padding=1),
    ],
    "layout": [
        Case("channels-last", (2, 4, 6, 7), (5, 4, 3, 3), padding=1, layout="channels_last"),
        Case("channels-last-stride", (2, 3, 8, 8), (4, 3, 3, 3), padding=1, stride=2, layout="channels_last"),
        Case("1d-channels-last", (2, 4, 12), (5, 4, 3), padding=1, layout="channels_last"),
        Case("3d-channels-last", (1, 3, 4, 5, 4), (4, 3, 2, 3, 3), padding=1, layout="channels_last"),
        Case("expanded", (3, 2, 6, 6), (4, 2, 3, 3), padding=1, given="expanded"),
        Case("spaced", (2, 3, 6, 5), (4, 3, 3, 3), given="spaced"),
        Case("swapped", (2, 3, 5, 8), (4, 3, 3, 2), padding=1, given="swapped"),
        Case("1x1-swapped", (2, 3, 5, 8), (4, 3, 1, 1), given="swapped"),
        Case("offset", (2, 3, 6, 6), (4, 3, 3, 3), padding=1, given="offset"),
    ],
    "bias": [
        Case("bias", (2, 3, 6, 6), (4, 3, 3, 3), padding=1, bias=True, ops=("fprop",)),
        Case("bias-1x1-channels-last", (2, 3, 4, 4), (5, 3, 1, 1), bias=True, layout="channels_last", ops=("fprop",)),
        Case("bias-groups", (2, 4, 6), (6, 2, 3), padding=1, groups=2, bias=True, ops=("fprop",)),
        Case("transposed-bias", (2, 3, 9, 9), (4, 3, 3, 3), padding=1, stride=2, bias=True, ops=("dgrad",)),
        Case("transposed-patches-bias", (2, 3, 6, 6), (4, 3, 2, 2), stride=2, bias=True, ops=("dgrad",)),
        Case("transposed-gaps-bias", (1, 4, 11), (6, 2, 2), stride=3, groups=2, bias=True, ops=("dgrad",)),
    ],
    "failed-once": [
        # A stride above the input's size leaves dgrad one phase that sees only some of the taps.
        Case("one-phase-of-many", (2, 2, 1, 6), (4, 2, 4, 3), padding=((2, 3), (1, 1)), stride=(4, 1), dilation=(1, 3)),
        # oneDNN reads past a bfloat16 input of one plane on processors with AMX.
        Case("3d-one-plane", (2, 2, 1, 3, 3), (4, 1, 2, 2, 2), padding=1, groups=2),
    ],
}

CASES: tuple[Case, ...] = tuple(case for group in GROUPED.values() for case in group)


def with_ops(cases: tuple[Case, ...] = CASES) -> list[tuple[Case, Op]]:
    """Every case with each of its operations; a bias has no meaning for wgrad."""
    return [(case, op) for case in cases for op in case.ops]


def case(name: str, **changes: object) -> Case:
    """One case by its id, with fields exchanged."""
    found = next(c for c in CASES if c.id == name)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]

"""Convolutions for a GPU: small, named, spread over operation, dtype, rank, layout, groups, dilation and alignment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from convplan._problem import OPS, WRITES, Op, Problem, TensorSpec, contiguous_strides

FORWARD: tuple[Op, ...] = ("fprop",)


@dataclass(frozen=True)
class GpuCase:
    """One geometry in one dtype; a row says what makes it special.

    Args:
        id: what the test id shows.
        x, w: dims of input and weight.
        tf32: float32 with TF32 allowed.
        output_dtype: of the tensor that is written, "" for the inputs'.
        alignment_bytes: of the first input.
        spaced: the first input is every other element of a longer tensor.
        ops: the operations it is run for.
    """

    id: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    dtype: str = "float16"
    layout: str = "channels_last"
    padding: int | tuple[int | tuple[int, int], ...] = 0
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    tf32: bool = False
    output_dtype: str = ""
    alignment_bytes: int = 32
    spaced: bool = False
    ops: tuple[Op, ...] = OPS

    def problem(self, op: Op) -> Problem:
        """The problem of one operation."""
        made = Problem.dense(
            op,
            self.x,
            self.w,
            dtype=self.dtype,
            output_dtype=self.output_dtype or None,
            layout=self.layout,
            padding=self.padding,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            device="cuda",
        )
        letter = {"fprop": "x", "dgrad": "y", "wgrad": "x"}[op]
        assert letter != WRITES[op]
        spec: TensorSpec = getattr(made, letter)
        strides = tuple(2 * step for step in contiguous_strides(spec.dims)) if self.spaced else spec.strides
        changed = TensorSpec(spec.dims, strides, spec.dtype, self.alignment_bytes)
        fields = {name: getattr(made, name) for name in made.__struct_fields__}
        return Problem(**{**fields, letter: changed})


def _dtypes(row: GpuCase, *names: str) -> list[GpuCase]:
    """The row in several dtypes; `tf32` is float32 with TF32 allowed."""
    return [
        dataclasses.replace(
            row, id=f"{row.id}-{name}", dtype="float32" if name == "tf32" else name, tf32=name == "tf32"
        )
        for name in names
    ]


CASES: tuple[GpuCase, ...] = (
    # every dtype of floating point, both layouts
    *_dtypes(GpuCase("3x3-nhwc", (4, 32, 14, 14), (48, 32, 3, 3), padding=1),
             "float16", "bfloat16", "float32", "tf32", "float64"),
    *_dtypes(GpuCase("3x3-nchw", (4, 32, 14, 14), (48, 32, 3, 3), padding=1, layout="contiguous"),
             "float16", "bfloat16", "float32", "tf32", "float64"),
    *_dtypes(GpuCase("1x1-nhwc", (4, 64, 7, 7), (32, 64, 1, 1)), "bfloat16", "tf32"),
    # windows
    GpuCase("stride-2-uneven-padding", (2, 16, 17, 15), (24, 16, 3, 3), padding=((1, 2), (0, 1)), stride=2),
    *_dtypes(GpuCase("dilated", (2, 16, 20, 20), (16, 16, 3, 3), padding=2, dilation=2), "bfloat16", "float32"),
    GpuCase("stem", (2, 3, 33, 33), (16, 3, 7, 7), padding=3, stride=2),
    GpuCase("tall-filter", (2, 8, 40, 5), (8, 8, 11, 1), padding=((5, 5), (0, 0)), dtype="bfloat16"),
    # groups
    GpuCase("groups-4", (2, 32, 12, 12), (32, 8, 3, 3), padding=1, groups=4),
    GpuCase("depthwise-7x7", (2, 32, 14, 14), (32, 1, 7, 7), padding=3, groups=32),
    *_dtypes(GpuCase("depthwise-nchw", (2, 24, 14, 14), (24, 1, 3, 3), padding=1, groups=24, layout="contiguous"),
             "float32", "bfloat16"),
    GpuCase("depthwise-multiplier", (2, 8, 14, 14), (24, 1, 3, 3), padding=1, groups=8, dtype="float32"),
    # channels and addresses that vector loads do not divide
    GpuCase("odd-channels", (2, 5, 13, 13), (7, 5, 3, 3), padding=1),
    *(GpuCase(f"aligned-to-{n}", (2, 16, 12, 12), (16, 16, 3, 3), padding=1, alignment_bytes=n) for n in (2, 4, 8, 16)),
    GpuCase("spaced-out", (2, 8, 10, 10), (16, 8, 3, 3), padding=1, dtype="float32", layout="contiguous", spaced=True),
    # one and three dimensions
    *_dtypes(GpuCase("1d", (4, 16, 100), (24, 16, 9), padding=4, layout="contiguous"), "float16", "float32"),
    GpuCase("1d-channels-last", (4, 16, 100), (24, 16, 9), padding=((8, 0),), dtype="bfloat16"),
    *_dtypes(GpuCase("3d-ndhwc", (2, 16, 6, 8, 8), (16, 16, 3, 3, 3), padding=1), "float16", "bfloat16", "tf32"),
    *_dtypes(GpuCase("3d-ncdhw", (2, 8, 6, 8, 8), (16, 8, 3, 3, 3), padding=1, layout="contiguous"),
             "float16", "float32", "float64"),
    GpuCase("3d-stride-groups", (2, 16, 8, 9, 8), (16, 4, 3, 3, 3), padding=1, stride=(1, 2, 2), groups=4),
    GpuCase("3d-dilated", (1, 8, 10, 10, 10), (8, 8, 3, 3, 3), padding=2, dilation=2, dtype="bfloat16"),
    # 8 bits
    *(GpuCase(f"int8-to-{out}", (2, 32, 12, 12), (32, 32, 3, 3), dtype="int8", output_dtype=out, padding=1, ops=FORWARD)
      for out in ("int8", "int32", "float32")),
    *(GpuCase(f"e4m3-to-{out}", (2, 32, 12, 12), (32, 32, 3, 3), dtype="float8_e4m3fn", output_dtype=out, padding=1,
              ops=FORWARD)
      for out in ("float8_e4m3fn", "bfloat16", "float32")),
    GpuCase("e5m2-to-float16", (2, 32, 12, 12), (32, 32, 3, 3), dtype="float8_e5m2", output_dtype="float16", padding=1,
            ops=FORWARD),
)  # fmt: skip

RUNS = [(case, op) for case in CASES for op in case.ops]

"""Named convolutions that convplan's enumeration and the oracle are asked about: small, and spread over what differs.

A row says what makes it special; everything else is the plainest value. `Case.spec()` is the plain data that the oracle
takes, worked out here, without convplan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from oracle import Spec


@dataclass(frozen=True)
class Case:
    """One convolution.

    Args:
        name: test id.
        op: `fprop`, `dgrad` or `wgrad`.
        x, w: dims of the input (N, C, spatial…) and the weight (K, C/groups, filter…).
        dtype: of all tensors.
        dtypes: by tensor, where they differ from `dtype`.
        layout: `channels_last` or `contiguous`, of all tensors.
        layouts: by tensor, where they differ from `layout`.
        padding: one (before, after) pair for each spatial dimension.
        compute: the type of sums.
        proposes: cuDNN has configurations for it; False for what 9.19 does not do on an H200.
    """

    name: str
    op: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    dtype: str = "float16"
    dtypes: dict[str, str] = field(default_factory=dict)
    layout: str = "channels_last"
    layouts: dict[str, str] = field(default_factory=dict)
    padding: tuple[tuple[int, int], ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    compute: str = "float32"
    proposes: bool = True

    @property
    def groups(self) -> int:
        """Input channels over those that a filter sees."""
        return self.x[1] // self.w[1]

    def spec(self) -> Spec:
        """Everything filled in: no padding, stride 1 and dilation 1 unless the row says otherwise."""
        rank = len(self.x) - 2
        padding = self.padding or ((0, 0),) * rank
        stride, dilation = self.stride or (1,) * rank, self.dilation or (1,) * rank
        sizes = [
            (size + before + after - step_in * (taps - 1) - 1) // step + 1
            for size, taps, (before, after), step, step_in in zip(
                self.x[2:], self.w[2:], padding, stride, dilation, strict=True
            )
        ]
        dims = {"x": self.x, "w": self.w, "y": (self.x[0], self.w[0], *sizes)}
        return {
            "op": self.op,
            "dims": dict(dims),
            "strides": {name: strides(size, self.layouts.get(name, self.layout)) for name, size in dims.items()},
            "dtypes": {name: self.dtypes.get(name, self.dtype) for name in dims},
            "padding": padding,
            "stride": stride,
            "dilation": dilation,
            "compute": self.compute,
        }


def strides(dims: Sequence[int], layout: str) -> tuple[int, ...]:
    """Strides in elements of a dense tensor."""
    order = [*range(len(dims))] if layout == "contiguous" else [0, *range(2, len(dims)), 1]
    found, step = [0] * len(dims), 1
    for dim in reversed(order):
        found[dim] = step
        step *= dims[dim]
    return tuple(found)


def case(name: str, op: str, x: tuple[int, ...], w: tuple[int, ...], **changes: Any) -> Case:
    return Case(name, op, x, w, **changes)


PAD1 = ((1, 1), (1, 1))
PAD1_3D = ((1, 1), (1, 1), (1, 1))
X, W = (8, 64, 56, 56), (64, 64, 3, 3)
X3, W3 = (2, 32, 8, 28, 28), (64, 32, 3, 3, 3)
INT8 = {"dtype": "int8", "compute": "int32"}

CASES = [
    # operations, types and layouts
    *(
        case(f"{op}-{dtype}-{layout}", op, X, W, dtype=dtype, layout=layout, padding=PAD1)
        for dtype in ("float16", "bfloat16", "float32")
        for layout in ("channels_last", "contiguous")
        for op in ("fprop", "dgrad", "wgrad")
    ),
    *(
        case(f"{op}-float64", op, (2, 16, 14, 14), (16, 16, 3, 3), dtype="float64", compute="float64", padding=PAD1)
        for op in ("fprop", "dgrad", "wgrad")
    ),
    case("fprop-mixed-layouts", "fprop", X, W, layouts={"w": "contiguous"}, padding=PAD1),
    # windows
    case("fprop-1x1", "fprop", X, (128, 64, 1, 1)),
    case("dgrad-1x1-strided", "dgrad", X, (128, 64, 1, 1), stride=(2, 2)),
    case("wgrad-7x7-strided", "wgrad", (4, 3, 224, 224), (64, 3, 7, 7), padding=((3, 3), (3, 3)), stride=(2, 2)),
    case("fprop-uneven-window", "fprop", X, (32, 64, 1, 5), padding=((0, 0), (2, 2)), stride=(1, 2)),
    case("fprop-padding-after-only", "fprop", X, W, padding=((0, 1), (0, 2)), stride=(2, 2)),
    case("dgrad-padding-before-more", "dgrad", X, W, padding=((2, 1), (1, 0)), stride=(2, 2)),
    case("wgrad-padding-after-only", "wgrad", X, W, padding=((0, 1), (0, 1))),
    case("fprop-dilated", "fprop", X, W, padding=((2, 2), (2, 2)), dilation=(2, 2)),
    case("dgrad-dilated", "dgrad", X, W, padding=((12, 12), (12, 12)), dilation=(12, 12)),
    case("wgrad-dilated-float32", "wgrad", X, W, dtype="float32", padding=((2, 2), (2, 2)), dilation=(2, 2)),
    case("fprop-line", "fprop", (4, 64, 1, 1024), (64, 64, 1, 9), padding=((0, 0), (4, 4))),
    # channels and groups
    case("fprop-3-channels", "fprop", (8, 3, 64, 64), (32, 3, 3, 3), padding=PAD1),
    case("fprop-odd-channels", "fprop", (8, 13, 30, 31), (17, 13, 3, 3), dtype="float32", layout="contiguous"),
    case("fprop-one-sample", "fprop", (1, 512, 7, 7), (512, 512, 3, 3), padding=PAD1),
    *(case(f"{op}-grouped", op, (8, 64, 28, 28), (64, 16, 3, 3), padding=PAD1) for op in ("fprop", "dgrad", "wgrad")),
    *(case(f"{op}-depthwise", op, (8, 96, 28, 28), (96, 1, 3, 3), padding=PAD1) for op in ("fprop", "dgrad", "wgrad")),
    # The filter's one channel has another stride when it counts as contiguous, and cuDNN minds.
    *(
        case(
            f"{op}-depthwise-contiguous-filter",
            op,
            (8, 96, 28, 28),
            (96, 1, 3, 3),
            padding=PAD1,
            layouts={"w": "contiguous"},
        )
        for op in ("fprop", "dgrad", "wgrad")
    ),
    case(
        "fprop-depthwise-float32-contiguous",
        "fprop",
        (8, 96, 28, 28),
        (96, 1, 5, 5),
        dtype="float32",
        layout="contiguous",
        padding=((2, 2), (2, 2)),
    ),
    # three dimensions
    *(case(f"{op}-3d", op, X3, W3, padding=PAD1_3D) for op in ("fprop", "dgrad", "wgrad")),
    *(
        case(f"{op}-3d-float32-contiguous", op, X3, W3, dtype="float32", layout="contiguous", padding=PAD1_3D)
        for op in ("fprop", "dgrad", "wgrad")
    ),
    case(
        "fprop-3d-strided-uneven",
        "fprop",
        X3,
        (64, 32, 1, 3, 3),
        dtype="bfloat16",
        padding=((0, 0), (0, 1), (1, 0)),
        stride=(1, 2, 2),
    ),
    case("wgrad-3d-grouped", "wgrad", X3, (64, 8, 3, 3, 3), padding=PAD1_3D),
    # narrow types
    case("fprop-int8-int32", "fprop", X, W, dtypes={"y": "int32"}, padding=PAD1, **INT8),
    case("fprop-int8-int8", "fprop", X, W, padding=PAD1, **INT8),
    case("fprop-int8-float32", "fprop", X, W, dtypes={"y": "float32"}, padding=PAD1, **INT8),
    case("fprop-fp8-fp8", "fprop", X, W, dtype="float8_e4m3fn", padding=PAD1),
    case("fprop-fp8-bfloat16", "fprop", X, W, dtype="float8_e4m3fn", dtypes={"y": "bfloat16"}, padding=PAD1),
    case("fprop-fp8-float32", "fprop", X, W, dtype="float8_e4m3fn", dtypes={"y": "float32"}, padding=PAD1),
    case(
        "dgrad-fp8",
        "dgrad",
        X,
        W,
        dtype="float8_e4m3fn",
        dtypes={"y": "float8_e5m2", "x": "float16"},
        padding=PAD1,
        proposes=False,
    ),
    case(
        "wgrad-fp8",
        "wgrad",
        X,
        W,
        dtype="float8_e4m3fn",
        dtypes={"y": "float8_e5m2", "w": "float32"},
        padding=PAD1,
        proposes=False,
    ),
]

"""What is computed: tensors' shapes and layouts, the operation, and its arithmetic. Plain data, no torch, no engines.

Dimension letters are the same everywhere: input x is N C [D] [H] W, weight w is K C/groups [T] [R] S, output y is
N K [O] [P] Q. The three operations read two of them and write the third:

    fprop   y = conv(x, w)             inputs (x, w)
    dgrad   x = gradient of the input  inputs (y, w)      also transposed convolution, whose input plays y
    wgrad   w = gradient of the weight inputs (x, y)

Everything here is an immutable, hashable `msgspec.Struct`: the same class is the key of a cache and the record in a
file, and decoding a file runs the same checks as calling the constructor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from convplan._epilogue import MAX_ALIGNMENT_BYTES, Epilogue
from convplan._errors import SpecError

Op = Literal["fprop", "dgrad", "wgrad"]
Layout = Literal["contiguous", "channels_last", "strided"]

OPS: tuple[Op, ...] = ("fprop", "dgrad", "wgrad")
READS = {"fprop": "xw", "dgrad": "yw", "wgrad": "xy"}  # in the order in which `Plan.run` takes them
WRITES = {"fprop": "y", "dgrad": "x", "wgrad": "w"}
MAX_ELEMENTS = 2**48  # more than any machine's memory; keeps arithmetic on untrusted sizes small


class DtypeInfo(NamedTuple):
    """One row of `DTYPES`."""

    itemsize_bytes: int
    significand_bits: int  # including the hidden one, for integers without the sign
    largest: float  # finite number
    accumulate: str  # the type that products of two such numbers are summed in (B4)
    outputs: tuple[str, ...]  # types that may be written when the inputs have this one; none: it is no input's
    fused_outputs: tuple[str, ...] = ()  # and these, where an epilogue of more than a bias is computed before

    @property
    def is_integer(self) -> bool:
        """A type of integers."""
        return self.accumulate == "int32"

    @property
    def exact_to(self) -> float:
        """Every integer up to this magnitude is exact."""
        return min(2.0**self.significand_bits, self.largest)


_FP8 = ("float8_e4m3fn", "float8_e5m2")
_FP8_OUTPUTS = (*_FP8, "bfloat16", "float16", "float32")

DTYPES: dict[str, DtypeInfo] = {
    "float64": DtypeInfo(8, 53, 1.7976931348623157e308, "float64", ("float64",)),
    "float32": DtypeInfo(4, 24, 3.4028234663852886e38, "float32", ("float32",)),
    # 16-bit inputs with a float32 output: cuDNN builds no plain convolution of that kind (9.19).
    "bfloat16": DtypeInfo(2, 8, 3.3895313892515355e38, "float32", ("bfloat16",), ("float32",)),
    "float16": DtypeInfo(2, 11, 65504.0, "float32", ("float16",), ("float32",)),
    "int8": DtypeInfo(1, 7, 127.0, "int32", ("int8", "int32", "float32")),
    "float8_e4m3fn": DtypeInfo(1, 4, 448.0, "float32", _FP8_OUTPUTS),
    "float8_e5m2": DtypeInfo(1, 3, 57344.0, "float32", _FP8_OUTPUTS),
    "int32": DtypeInfo(4, 31, 2147483647.0, "int32", ()),
}
INPUT_DTYPES = tuple(name for name, info in DTYPES.items() if info.outputs)
# What the convolutions of `torch.nn.functional` are planned for. Torch has none for the other inputs above on most
# devices; where it has one, as for int8 on the CPU, the results are its own business.
FLOAT_DTYPES = ("float64", "float32", "bfloat16", "float16")
STATISTICS_DTYPES = ("bfloat16", "float16")  # whose sums of squares float32 holds as well as they hold themselves
GATE_DTYPES = ("float32", "bfloat16", "float16")


def contiguous_strides(dims: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a dense tensor in the order of its dimensions (NCHW for a 4-D one)."""
    strides = [1] * len(dims)
    for i in range(len(dims) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(dims[i + 1], 1)
    return tuple(strides)


def channels_last_strides(dims: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a dense tensor with channels innermost (NHWC for a 4-D one)."""
    strides = [1] * len(dims)
    step = max(dims[1], 1)
    for i in range(len(dims) - 1, 1, -1):
        strides[i] = step
        step *= max(dims[i], 1)
    strides[0] = step
    return tuple(strides)


def normalize_strides(dims: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Give every dimension of size 1 the stride that the dense layout of the others would give it (B2).

    A dimension of size 1 is never stepped over, so torch leaves any number in its stride, and tensors that are equal
    in memory would have unequal keys. Where both dense layouts fit (one channel, or one pixel) the result is the
    contiguous one.
    """
    found = tuple(strides)
    for dense in (contiguous_strides(dims), channels_last_strides(dims)):
        if all(size == 1 or have == want for size, have, want in zip(dims, found, dense, strict=True)):
            return dense
    dense = channels_last_strides(dims) if len(dims) > 2 and found[1] == 1 and dims[1] > 1 else contiguous_strides(dims)
    return tuple(want if size == 1 else have for size, have, want in zip(dims, found, dense, strict=True))


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """One tensor: sizes, strides in elements, dtype, and the byte alignment of its first element.

    Args:
        dims: N, C and one to three spatial sizes (for a weight: K, C/groups and the filter's sizes).
        strides: in elements; zero for an expanded dimension. Strides of size-1 dimensions are normalized (B2).
        dtype: a key of `DTYPES`.
        alignment_bytes: largest power of two, at most 32, that divides the data pointer (B1).
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    alignment_bytes: int = MAX_ALIGNMENT_BYTES

    def __post_init__(self) -> None:
        for name in ("dims", "strides"):  # torch.Size and lists become tuples: equal tensors have equal keys
            msgspec.structs.force_setattr(self, name, _integers(name, getattr(self, name)))
        if not 3 <= len(self.dims) <= 5:
            raise SpecError(f"tensor dims are {self.dims}: found {len(self.dims)}, expected 3, 4 or 5 (N, C, spatial)")
        if len(self.strides) != len(self.dims):
            found = f"tensor strides {self.strides} have {len(self.strides)} entries"
            raise SpecError(f"{found}, dims {self.dims} differ, expected as many")
        if min(self.dims) < 0 or math.prod(max(d, 1) for d in self.dims) > MAX_ELEMENTS:
            raise SpecError(f"tensor dims are {self.dims}, expected sizes >= 0 and at most 2**48 elements")
        if any(not 0 <= s <= MAX_ELEMENTS for s in self.strides):
            raise SpecError(f"tensor strides are {self.strides}, expected 0 <= stride <= 2**48 (elements)")
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.alignment_bytes not in (1, 2, 4, 8, 16, 32):
            raise SpecError(f"alignment_bytes is {self.alignment_bytes}, expected a power of two from 1 to 32")
        msgspec.structs.force_setattr(self, "strides", normalize_strides(self.dims, self.strides))

    @classmethod
    def dense(cls, dims: Sequence[int], dtype: str, layout: str = "contiguous") -> TensorSpec:
        """A dense, fully aligned tensor in layout `contiguous` or `channels_last`."""
        if layout not in ("contiguous", "channels_last"):
            raise SpecError(f"layout is {layout!r}, expected 'contiguous' or 'channels_last'")
        sizes = tuple(dims)
        if not 3 <= len(sizes) <= 5:
            raise SpecError(f"tensor dims are {sizes}: found {len(sizes)}, expected 3, 4 or 5 (N, C, spatial)")
        strides = channels_last_strides(sizes) if layout == "channels_last" else contiguous_strides(sizes)
        return cls(sizes, strides, dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, counted once each."""
        return self.numel * DTYPES[self.dtype].itemsize_bytes

    @property
    def layout(self) -> Layout:
        """`contiguous` (also when both fit), `channels_last`, or `strided` for everything else."""
        if self.strides == contiguous_strides(self.dims):
            return "contiguous"
        return "channels_last" if self.strides == channels_last_strides(self.dims) else "strided"

    @property
    def storage_elements(self) -> int:
        """Elements from the first to the last one touched; less than `numel` for an expanded tensor."""
        if self.numel == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.dims, self.strides, strict=True))

    def __str__(self) -> str:
        text = "x".join(map(str, self.dims))
        mark = {"contiguous": "", "channels_last": ":cl", "strided": f":{','.join(map(str, self.strides))}"}
        aligned = "" if self.alignment_bytes == MAX_ALIGNMENT_BYTES else f"@{self.alignment_bytes}"
        return text + mark[self.layout] + aligned


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, cache_hash=True):
    """One convolution: what is read, what is written, and how they are related.

    Args:
        op: `fprop`, `dgrad` or `wgrad`.
        x: input (N, C, spatial…), the output of dgrad.
        w: weight (K, C/groups, filter…), the output of wgrad.
        y: output (N, K, spatial…). The two tensors read have one dtype, or both an fp8 one; `DTYPES` says which
            dtypes the third may have for it. An output that its int8 or fp8 type cannot hold saturates.
        padding: one (before, after) pair for each spatial dimension, in elements.
        stride, dilation: one number >= 1 for each spatial dimension.
        groups: divides C and K.
        epilogue: applied to the output; allowed for fprop and dgrad (transposed convolution).
        device: torch device type, `cpu` or `cuda`.

    Raises:
        SpecError: sizes or dtypes that do not fit together; the message names the field, what was found and what was
            expected.
    """

    op: Op
    x: TensorSpec
    w: TensorSpec
    y: TensorSpec
    padding: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    epilogue: Epilogue = Epilogue()
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("stride", "dilation"):
            msgspec.structs.force_setattr(self, name, _integers(name, getattr(self, name)))
        if not isinstance(self.padding, Sequence):
            raise SpecError(f"padding is {self.padding!r}, expected one (before, after) pair for each dimension")
        msgspec.structs.force_setattr(self, "padding", tuple(_integers("padding", pair) for pair in self.padding))
        if self.op not in OPS:
            raise SpecError(f"op is {self.op!r}, expected one of {', '.join(OPS)}")
        if not (isinstance(self.device, str) and self.device.isalnum() and len(self.device) <= 16):
            raise SpecError(f"device is {self.device!r}, expected a torch device type such as 'cpu' or 'cuda'")
        rank = len(self.x.dims)
        if len(self.w.dims) != rank or len(self.y.dims) != rank:
            raise SpecError(f"{self._shapes()}: ranks differ, expected all of rank {rank}, the input's")
        self._check_dtypes()
        self._check_window()
        self._check_channels()
        self._check_sizes()
        if self.op == "wgrad" and self.epilogue != Epilogue():
            if self.epilogue.is_plain:
                raise SpecError("a wgrad has no bias to add, expected Epilogue(bias=False)")
            raise SpecError(f"a wgrad has no epilogue, found {self.epilogue}, expected Epilogue()")
        if self.epilogue.statistics:
            self._check_statistics()
        if self.epilogue.gate:
            self._check_gate()

    def _check_gate(self) -> None:
        if self.op != "dgrad":
            raise SpecError(f"op is {self.op} with a gate, expected dgrad: it is a ReLU's backward pass")
        dtypes = {self.x.dtype, self.y.dtype}
        if not (len(dtypes) == 1 and dtypes <= set(GATE_DTYPES)):
            raise SpecError(
                f"dtypes are x {self.x.dtype}, y {self.y.dtype} with a gate, expected one of "
                f"{', '.join(GATE_DTYPES)} for both"
            )

    def _check_statistics(self) -> None:
        if self.op != "fprop":
            raise SpecError(f"op is {self.op} with statistics, expected fprop: they are of what a layer hands on")
        dtypes = {self.x.dtype, self.y.dtype}
        if not (len(dtypes) == 1 and dtypes <= set(STATISTICS_DTYPES)):
            # In wider types sums of squares would lose digits that the numbers themselves have.
            raise SpecError(
                f"dtypes are x {self.x.dtype}, y {self.y.dtype} with statistics, expected one of "
                f"{', '.join(STATISTICS_DTYPES)} for both"
            )

    def _check_dtypes(self) -> None:
        first, second, written = (*READS[self.op], WRITES[self.op])
        one, other, output = (getattr(self, letter).dtype for letter in (first, second, written))
        found = f"x {self.x.dtype}, w {self.w.dtype}, y {self.y.dtype}"
        if one != other and not (one in _FP8 and other in _FP8):
            raise SpecError(
                f"dtypes differ: {found}; expected one dtype for {first} and {second}, which {self.op} reads "
                f"({' and '.join(_FP8)} may mix)"
            )
        if not DTYPES[one].outputs:
            raise SpecError(
                f"dtypes are {found}; expected {first} and {second}, which {self.op} reads, to be one of "
                f"{', '.join(INPUT_DTYPES)}"
            )
        outputs = DTYPES[one].outputs if self.epilogue.is_plain else DTYPES[one].outputs + DTYPES[one].fused_outputs
        if output not in outputs:
            raise SpecError(
                f"dtypes are {found}; expected {written}, which {self.op} writes, to be {' or '.join(outputs)}"
            )

    def _check_window(self) -> None:
        spatial = len(self.x.dims) - 2
        for name, values in (("padding", self.padding), ("stride", self.stride), ("dilation", self.dilation)):
            if len(values) != spatial:
                raise SpecError(f"{name} is {values}: found {len(values)}, expected {spatial}, one per dimension")
        if any(not 0 <= side <= MAX_ELEMENTS for pair in self.padding for side in pair):
            raise SpecError(f"padding is {self.padding}, expected values >= 0")
        for name, values in (("stride", self.stride), ("dilation", self.dilation)):
            if any(not 1 <= value <= MAX_ELEMENTS for value in values):
                raise SpecError(f"{name} is {values}, expected values >= 1")
        if any(len(pair) != 2 for pair in self.padding):
            raise SpecError(f"padding is {self.padding}, expected one (before, after) pair for each dimension")
        if not _is_integer(self.groups) or not 1 <= self.groups <= MAX_ELEMENTS:
            raise SpecError(f"groups is {self.groups!r}, expected a number >= 1")

    def _check_channels(self) -> None:
        channels, filters, groups = self.x.dims[1], self.w.dims[0], self.groups
        if channels % groups or filters % groups:
            raise SpecError(
                f"groups is {groups}, expected a divisor of C = {channels} and K = {filters} ({self._shapes()})"
            )
        if self.w.dims[1] != channels // groups:
            raise SpecError(
                f"weight.shape[1] is {self.w.dims[1]}, expected C/groups = {channels}/{groups} = {channels // groups} "
                f"({self._shapes()})"
            )
        if self.y.dims[:2] != (self.x.dims[0], filters):
            raise SpecError(
                f"output is {self.y.dims[:2]}, expected (N, K) = ({self.x.dims[0]}, {filters}) ({self._shapes()})"
            )

    def _check_sizes(self) -> None:
        wanted = output_spatial(self.x.dims[2:], self.w.dims[2:], self.padding, self.stride, self.dilation)
        if self.y.dims[2:] != wanted:
            raise SpecError(
                f"output spatial size is {self.y.dims[2:]}, expected {wanted} ({self._shapes()}, "
                f"padding {self.padding}, stride {self.stride}, dilation {self.dilation})"
            )

    def _shapes(self) -> str:
        return f"input {self.x.dims}, weight {self.w.dims}, output {self.y.dims}, groups={self.groups}"

    @classmethod
    def dense(
        cls,
        op: Op,
        x_dims: Sequence[int],
        w_dims: Sequence[int],
        *,
        dtype: str = "float32",
        output_dtype: str | None = None,
        layout: str = "contiguous",
        padding: Sequence[int | Sequence[int]] | int = 0,
        stride: Sequence[int] | int = 1,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        epilogue: Epilogue | None = None,
        device: str = "cpu",
    ) -> Problem:
        """A problem on dense, aligned tensors of one layout, with the output's size worked out.

        Args:
            op, padding, stride, dilation, groups, epilogue, device: as above; a number stands for all dimensions.
            x_dims, w_dims: of input and weight.
            dtype: of the two tensors that are read.
            output_dtype: of the tensor that is written; None: the same.
            layout: `contiguous` or `channels_last`.
        """
        x = TensorSpec.dense(x_dims, dtype, layout)
        w = TensorSpec.dense(w_dims, dtype, layout)
        if len(x.dims) != len(w.dims):
            raise SpecError(f"input {x.dims} and weight {w.dims} differ in rank, expected the same")
        spatial = len(x.dims) - 2
        pairs = padding_pairs(padding, spatial)
        steps, dilations = per_dim("stride", stride, spatial), per_dim("dilation", dilation, spatial)
        out = output_spatial(x.dims[2:], w.dims[2:], pairs, steps, dilations)
        tensors = {"x": x, "w": w, "y": TensorSpec.dense((x.dims[0], w.dims[0], *out), dtype, layout)}
        if output_dtype is not None:
            written = WRITES.get(op, "y")  # the constructor refuses another op
            tensors[written] = msgspec.structs.replace(tensors[written], dtype=output_dtype)
        return cls(
            op=op,
            **tensors,
            padding=pairs,
            stride=steps,
            dilation=dilations,
            groups=groups,
            epilogue=epilogue or Epilogue(),
            device=device,
        )

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The problem that `str(problem)` wrote, as logs and errors show it: `Problem.parse(str(problem)) == problem`.

        Args:
            text: one line of at most 1,000 characters. What stands between dtypes and device may come in any order.

        Raises:
            SpecError: it is no such line, or its sizes do not fit together.
        """
        from convplan._problem_text import parse_problem

        return parse_problem(text)

    @property
    def spatial_rank(self) -> int:
        """Number of spatial dimensions: 1, 2 or 3."""
        return len(self.x.dims) - 2

    @property
    def dtype(self) -> str:
        """The dtype of the inputs; where two fp8 types mix, the first one's."""
        return self.y.dtype if self.op == "dgrad" else self.x.dtype

    @property
    def output_dtype(self) -> str:
        """The dtype of the output, and of the residual that is added to it."""
        return self.output.dtype

    @property
    def bias_dtype(self) -> str:
        """The dtype of the bias: the output's, or float32 where more is done to what is written in 8 bits."""
        return "float32" if self.output_dtype not in FLOAT_DTYPES and not self.epilogue.is_plain else self.output_dtype

    @property
    def scale_dtype(self) -> str:
        """The dtype of the scale, and of the numbers that the epilogue is computed in."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def core(self) -> Problem:
        """This problem without what torch's own convolutions do not do; itself where that is nothing.

        A bias stays where nothing is multiplied with before it. Numbers that an epilogue still works on are written
        in a floating-point type: 8-bit ones in float32; and 16-bit ones whose epilogue writes float32 are read as that.
        """
        if self.epilogue.is_plain:
            return self
        keeps_bias = self.epilogue.bias and not self.epilogue.scale and self.output_dtype in FLOAT_DTYPES
        return msgspec.structs.replace(self, epilogue=Epilogue(bias=keeps_bias), **self._core_tensors())

    def _core_tensors(self) -> dict[str, TensorSpec]:
        written = self.output_dtype if self.output_dtype in FLOAT_DTYPES else "float32"
        if written in DTYPES[self.dtype].outputs:
            return {WRITES[self.op]: msgspec.structs.replace(self.output, dtype=written)}
        return {
            letter: msgspec.structs.replace(getattr(self, letter), dtype=written, alignment_bytes=MAX_ALIGNMENT_BYTES)
            for letter in "xwy"
        }

    def with_output_dtype(self, dtype: str) -> Problem:
        """The same problem, written in another dtype.

        Raises:
            SpecError: the inputs' dtype does not allow it.
        """
        return msgspec.structs.replace(self, **{WRITES[self.op]: msgspec.structs.replace(self.output, dtype=dtype)})

    @property
    def inputs(self) -> tuple[TensorSpec, TensorSpec]:
        """The two tensors read, in the order `Plan.run` takes them."""
        return {"fprop": (self.x, self.w), "dgrad": (self.y, self.w), "wgrad": (self.x, self.y)}[self.op]

    @property
    def output(self) -> TensorSpec:
        """The tensor written."""
        return {"fprop": self.y, "dgrad": self.x, "wgrad": self.w}[self.op]

    def gradients(self, layout: str | None = None) -> tuple[Problem, Problem]:
        """The problems of this forward's gradients, of its input and of its weight, as torch would ask for them.

        This problem must be a fprop, or a dgrad that stands for a transposed convolution. The incoming gradient is
        taken to lie in memory as this problem's output does.

        Args:
            layout: of the results; None: the output's, which cannot be told where sizes of 1 leave it open.

        Raises:
            SpecError: gradients of this forward's dtypes make no problems: an int8 forward that writes int32 has an
                incoming gradient that cannot be multiplied with int8 tensors.
        """
        given = layout or ("channels_last" if self.output.layout == "channels_last" else "contiguous")

        def written(spec: TensorSpec) -> TensorSpec:
            return TensorSpec.dense(spec.dims, spec.dtype, given)

        def problem(op: Op, **changed: TensorSpec) -> Problem:
            return msgspec.structs.replace(self, op=op, epilogue=Epilogue(), **changed)

        to_weight = problem("wgrad", w=written(self.w))
        if self.op == "fprop":
            return problem("dgrad", x=written(self.x)), to_weight
        return problem("fprop", y=written(self.y)), to_weight

    @property
    def is_empty(self) -> bool:
        """Nothing to compute: the output or everything summed over has no elements (B7)."""
        return 0 in (self.output.numel, self.inputs[0].numel, self.inputs[1].numel)

    @property
    def n_terms(self) -> int:
        """Products summed for one output element, at most (borders sum fewer)."""
        taps = math.prod(self.w.dims[2:])
        if self.op == "fprop":
            return self.w.dims[1] * taps
        if self.op == "dgrad":
            return self.w.dims[0] // self.groups * taps
        return self.y.dims[0] * math.prod(self.y.dims[2:])

    @property
    def flops(self) -> int:
        """Multiplications and additions of the direct method (two for each product), padding counted in."""
        return 2 * self.y.numel * math.prod(self.w.dims[1:])

    @property
    def least_bytes(self) -> int:
        """Bytes that any method moves: each input read once, the output written once."""
        residual = self.output.nbytes if self.epilogue.residual else 0
        return self.inputs[0].nbytes + self.inputs[1].nbytes + residual + self.output.nbytes

    def __str__(self) -> str:
        parts = [f"{self.op}{self.epilogue}", self._dtypes(), f"x={self.x}", f"w={self.w}", f"y={self.y}"]
        if any(map(any, self.padding)):
            parts.append("pad=" + ",".join(str(b) if b == a else f"{b}:{a}" for b, a in self.padding))
        for name, values in (("stride", self.stride), ("dil", self.dilation)):
            if any(value != 1 for value in values):
                parts.append(f"{name}=" + ",".join(map(str, values)))
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        return " ".join([*parts, self.device])

    def _dtypes(self) -> str:
        """`float32`, `int8->int32`, `float8_e4m3fn,float8_e5m2->bfloat16`."""
        read = ",".join(dict.fromkeys(spec.dtype for spec in self.inputs))
        return read if read == self.output_dtype else f"{read}->{self.output_dtype}"


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """A plain tuple of the values, which must be integers."""
    if not isinstance(values, Sequence) or not all(map(_is_integer, values)):
        raise SpecError(f"{name} is {values!r}, expected integers")
    return tuple(map(int, values))


def per_dim(name: str, value: Sequence[int] | int, spatial: int) -> tuple[int, ...]:
    """One integer for each spatial dimension, from a number or a sequence of that length (or of length 1)."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) == 1:
        values *= spatial
    if len(values) != spatial or not all(map(_is_integer, values)):
        raise SpecError(f"{name} is {value!r}, expected an integer or {spatial} integers")
    return values


def padding_pairs(value: Sequence[int | Sequence[int]] | int, spatial: int) -> tuple[tuple[int, int], ...]:
    """One (before, after) pair for each spatial dimension; an entry may be a number (both sides) or a pair."""
    if isinstance(value, bool) or not isinstance(value, (int, Sequence)) or isinstance(value, str):
        raise SpecError(f"padding is {value!r}, expected an integer, or {spatial} integers or (before, after) pairs")
    entries = [value] if isinstance(value, int) else list(value)
    if len(entries) == 1:
        entries *= spatial
    if len(entries) != spatial:
        raise SpecError(f"padding is {value!r}, expected {spatial} entries, each a number or a (before, after) pair")
    pairs = []
    for entry in entries:
        pair = tuple(entry) if isinstance(entry, Sequence) else (entry, entry)
        if len(pair) != 2 or not all(map(_is_integer, pair)):
            raise SpecError(f"padding entry is {entry!r}, expected a number or a (before, after) pair")
        if min(pair) < 0:
            raise SpecError(f"padding is {value!r}, expected values >= 0")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def output_spatial(
    x_spatial: Sequence[int],
    filter_sizes: Sequence[int],
    padding: Sequence[tuple[int, int]],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Spatial sizes of y: floor((size + before + after - dilation * (filter - 1) - 1) / stride) + 1.

    Raises:
        SpecError: a stride, dilation or filter size below 1, or a dilated filter larger than the padded input.
    """
    sizes = []
    for size, taps, (before, after), step, dil in zip(x_spatial, filter_sizes, padding, stride, dilation, strict=True):
        if step < 1 or dil < 1:
            raise SpecError(f"stride is {tuple(stride)} and dilation {tuple(dilation)}, expected values >= 1")
        if taps < 1:
            raise SpecError(f"filter sizes are {tuple(filter_sizes)}, expected values >= 1")
        room = size + before + after - dil * (taps - 1) - 1
        if room < 0:
            raise SpecError(
                f"the filter is larger than the input: dilated filter size is {dil * (taps - 1) + 1}, "
                f"padded input size is {size + before + after}"
            )
        sizes.append(room // step + 1)
    return tuple(sizes)

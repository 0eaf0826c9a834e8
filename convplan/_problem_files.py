"""Problem files: convolutions by name, as JSON that people write and benchmarks share.

A file is `{"comment": …, "problems": [entry, …]}`; an entry is a `ProblemEntry`. `read_problems` decodes it strictly
into `NamedProblem`s and `write_problems` writes them, or captured `Problem`s, back. Files of *plans* are another
format, and live elsewhere; what a problem means, and which sizes fit together, is `_problem`'s business.

An entry speaks torch's language. `n`, `c`, `spatial` describe the input of the call, `k` its output channels, and `op`
is the call itself (`fprop`) or one of its gradients. A transposed convolution is a gradient with the tensors in
exchanged roles, so that its `fprop` is the `Problem` operation `dgrad`, its `dgrad` is `fprop`, and its `wgrad` stays
`wgrad`.

Input is untrusted: size and number of entries are limited, unknown fields are refused, and every complaint is a
`PlanFileError` that names the file, the place, what was found there and what was expected.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import msgspec

from convplan._epilogue import MAX_ALIGNMENT_BYTES, Epilogue, parse_epilogue
from convplan._errors import PlanFileError, SpecError
from convplan._policy import Policy
from convplan._problem import Op, Problem, TensorSpec, output_spatial, padding_pairs

MAX_FILE_BYTES = 16 * 2**20
MAX_PROBLEMS = 100_000
MAX_TEXT = 1_000  # characters of a name or a comment
MAX_QUOTED = 60  # characters of a file's own text in an error
SCHEMA_PATH = Path(__file__).parent / "schemas" / "problems.schema.json"

FileDtype = Literal["float64", "float32", "tf32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"]
FileOutputDtype = Literal[
    "float64", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2", "int32"
]  # fmt: skip
Fp8Dtype = Literal["float8_e4m3fn", "float8_e5m2"]
FileLayout = Literal["contiguous", "channels_last"]

# Sizes are bounded from below here, for messages that name the field, and from above by TensorSpec.
Size = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Sizes = Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=3)]
Counts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=3)]
# Plain int inside padding: msgspec 0.22 confuses a bounded int with a fixed-length tuple in one union, and then crashes
# the process (`tuple[Annotated[int, Meta(ge=0)] | tuple[int, int], ...]` on `[1]`). `padding_pairs` checks the bound.
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]

# The problem's operation for an entry's: a transposed convolution is the gradient of a convolution's input.
TRANSPOSED_OPS: dict[Op, Op] = {"fprop": "dgrad", "dgrad": "fprop", "wgrad": "wgrad"}


class TensorLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What one tensor has beyond its sizes, where the entry's `layout` does not say it.

    Args:
        strides: in elements, one for each dimension. None: as `layout` says.
        alignment_bytes: largest power of two, at most 32, that divides the address of the first element.
        dtype: of a tensor that is read, where the two have different fp8 types. None: the entry's.
    """

    strides: Annotated[tuple[Size, ...], msgspec.Meta(min_length=3, max_length=5)] | None = None
    alignment_bytes: Count = MAX_ALIGNMENT_BYTES
    dtype: Fp8Dtype | None = None

    def applied_to(self, spec: TensorSpec) -> TensorSpec:
        """`spec` with these strides, this alignment and this dtype."""
        return TensorSpec(spec.dims, self.strides or spec.strides, self.dtype or spec.dtype, self.alignment_bytes)


class ProblemEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One problem as a file spells it.

    Args:
        name: unique in the file.
        op: the call (`fprop`), the gradient of its input (`dgrad`), or of its weight (`wgrad`).
        n, c, k: batch size, input channels, output channels.
        spatial, filter: one to three sizes.
        padding: for each spatial dimension a number, or a (before, after) pair.
        stride, dilation: for each spatial dimension a number.
        groups: divides c and k.
        dtype: of the two tensors that are read; `tf32` is float32 with TF32 allowed.
        output_dtype: of the tensor that is written; None: the same.
        layout: of what is read; what is written follows it as torch has it.
        transposed: a transposed convolution, with torch's meaning of padding, stride, dilation and `output_padding`.
        output_padding: for transposed convolutions; empty for none.
        bias: the call adds a bias.
        epilogue: what else is done to the result, in a problem's own words: `residual*0.5+bias+relu`.
        device: torch device type.
        input, weight, output: what one tensor of the call has beyond its sizes.
        model, suite, comment: where the problem comes from, for people.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT)]
    op: Op
    n: Size
    c: Size
    k: Size
    spatial: Sizes
    filter: Counts
    padding: Annotated[tuple[int | tuple[int, int], ...], msgspec.Meta(min_length=1, max_length=3)]
    stride: Counts
    dilation: Counts
    groups: Count
    dtype: FileDtype
    output_dtype: FileOutputDtype | None = None
    layout: FileLayout = "contiguous"
    transposed: bool = False
    output_padding: Annotated[tuple[Size, ...], msgspec.Meta(max_length=3)] = ()
    bias: bool = False
    epilogue: Text = ""
    device: str = "cpu"
    input: TensorLayout | None = None
    weight: TensorLayout | None = None
    output: TensorLayout | None = None
    model: Text = ""
    suite: Text = ""
    comment: Text = ""

    def problem(self) -> Problem:
        """The problem this entry describes.

        Raises:
            SpecError: the sizes do not fit together.
        """
        rank = len(self.spatial)
        for field in ("filter", "padding", "stride", "dilation"):
            found = len(getattr(self, field))
            if found != rank:
                raise SpecError(f"{field}: found {found} entries, expected {rank}, as many as spatial has")
        if self.c % self.groups or self.k % self.groups:
            raise SpecError(f"groups: found {self.groups}, expected a divisor of c = {self.c} and k = {self.k}")
        for field in ("bias", "epilogue"):
            if getattr(self, field) and self.op != "fprop":
                value = "true" if field == "bias" else repr(self.epilogue)
                raise SpecError(f"{field}: found {value} with op {self.op}, expected it with fprop only")
        return self._transposed_problem() if self.transposed else self._plain_problem()

    def _plain_problem(self) -> Problem:
        if self.output_padding:
            raise SpecError('output_padding: found without "transposed": true, expected none')
        padding = padding_pairs(self.padding, len(self.spatial))
        size = output_spatial(self.spatial, self.filter, padding, self.stride, self.dilation)
        x, w, y = self._tensors(
            (self.n, self.c, *self.spatial),
            (self.k, self.c // self.groups, *self.filter),
            (self.n, self.k, *size),
        )
        return self._build(op=self.op, x=x, w=w, y=y, padding=padding)

    def _transposed_problem(self) -> Problem:
        size, padding = _transposed_size(self)
        y, w, x = self._tensors(
            (self.n, self.c, *self.spatial),
            (self.c, self.k // self.groups, *self.filter),
            (self.n, self.k, *size),
        )
        return self._build(op=TRANSPOSED_OPS[self.op], x=x, w=w, y=y, padding=padding)

    def _build(
        self, *, op: Op, x: TensorSpec, w: TensorSpec, y: TensorSpec, padding: tuple[tuple[int, int], ...]
    ) -> Problem:
        return Problem(
            op=op,
            x=x,
            w=w,
            y=y,
            padding=padding,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            epilogue=self._epilogue(),
            device=self.device,
        )

    def _epilogue(self) -> Epilogue:
        epilogue = parse_epilogue(self.epilogue)
        return msgspec.structs.replace(epilogue, bias=True) if self.bias else epilogue

    def _tensors(self, *dims: tuple[int, ...]) -> list[TensorSpec]:
        """Input, weight and output of the call.

        The one that is written has the layout that torch gives it, so that programs find the plan: torch writes
        channels-last for two and three spatial dimensions, but for float64 in three.
        """
        dtype = "float32" if self.dtype == "tf32" else self.dtype
        tensors = [TensorSpec.dense(sizes, dtype, self.layout) for sizes in dims]
        written = {"fprop": 2, "dgrad": 0, "wgrad": 1}[self.op]
        contiguous = len(self.spatial) == 1 or (len(self.spatial) == 3 and dtype == "float64")
        layout = "contiguous" if contiguous else self.layout
        tensors[written] = TensorSpec.dense(dims[written], self.output_dtype or dtype, layout)
        layouts = (self.input, self.weight, self.output)
        return [spec if own is None else own.applied_to(spec) for spec, own in zip(tensors, layouts, strict=True)]


class ProblemFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole problem file."""

    comment: Text = ""
    problems: Annotated[tuple[ProblemEntry, ...], msgspec.Meta(max_length=MAX_PROBLEMS)]


class NamedProblem(msgspec.Struct, frozen=True, kw_only=True):
    """A problem with its name, and what the file says of it that the problem itself does not.

    Args:
        name: unique among the problems of one file.
        problem: what is computed.
        transposed: the call is a transposed convolution, whose input is the problem's y and whose output is its x.
        output_padding: of the transposed call, one number for each spatial dimension; empty when it is not transposed.
        allow_tf32: for float32 problems, whether TF32 may be used.
        model, suite: where the problem comes from.
    """

    name: str
    problem: Problem
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    allow_tf32: bool = False
    model: str = ""
    suite: str = ""

    @property
    def op(self) -> Op:
        """The operation as torch's user sees it: `fprop` is the call itself, also when it is transposed."""
        return TRANSPOSED_OPS[self.problem.op] if self.transposed else self.problem.op

    def policy(self, base: Policy) -> Policy:
        """`base`, with TF32 decided as the file says where that means something and `base` leaves it open.

        The CPU has no TF32 that a policy could allow, so there the policy stays as it is, and plans get the key under
        which a program with torch's default flags looks for them.
        """
        if self.problem.device == "cpu" or self.problem.dtype != "float32" or base.allow_tf32 is not None:
            return base
        return base.replace(allow_tf32=self.allow_tf32)


def read_problems(path: str | os.PathLike[str]) -> list[NamedProblem]:
    """Every problem of a file, in its order.

    Raises:
        PlanFileError: the file cannot be read, is larger than 16 MiB, is not JSON, or an entry of it is wrong.
    """
    file = Path(path)
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise PlanFileError(path=str(file), reason=f"cannot be read: {exc.strerror or exc}") from exc
    return parse_problems(data, source=str(file))


def parse_problems(data: bytes, *, source: str = "problems") -> list[NamedProblem]:
    """The problems in the bytes of a problem file; `source` names them in errors.

    Raises:
        PlanFileError: as `read_problems`.
    """
    if len(data) > MAX_FILE_BYTES:
        raise PlanFileError(path=source, reason=f"found more than {MAX_FILE_BYTES} bytes, expected at most that many")
    try:
        decoded = msgspec.json.decode(data, type=ProblemFile)
    except msgspec.ValidationError as exc:
        raise PlanFileError(path=source, reason=_explain(str(exc), data)) from exc
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise PlanFileError(path=source, reason=f"found malformed JSON ({exc}), expected a problem file") from exc

    named: list[NamedProblem] = []
    seen: dict[str, int] = {}
    for index, entry in enumerate(decoded.problems):
        place = f"problems[{index}]"
        if entry.name in seen:
            raise PlanFileError(
                path=source,
                reason=f"{place}.name: found {entry.name!r} as in problems[{seen[entry.name]}], expected a new name",
            )
        seen[entry.name] = index
        try:
            problem = entry.problem()
        except SpecError as exc:
            raise PlanFileError(path=source, reason=f"{place} ({entry.name!r}): {exc}") from exc
        named.append(_named(entry, problem))
    return named


def write_problems(
    path: str | os.PathLike[str], problems: Iterable[Problem | NamedProblem], *, comment: str = ""
) -> int:
    """Write a problem file that `read_problems` reads back as equal problems, and return how many it holds.

    Plain problems, such as `capture()` collects, get a name made of their position and operation, and float32 ones are
    written as `tf32`, torch's own default for convolutions; wrap them in `NamedProblem` to say otherwise. The file
    appears whole or not at all.

    Raises:
        PlanFileError: the file cannot be written.
    """
    file = Path(path)
    entries = tuple(_entry(with_name(problem, index)) for index, problem in enumerate(problems))
    text = msgspec.json.format(msgspec.json.encode(ProblemFile(comment=comment, problems=entries)), indent=1)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(text + b"\n")
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as exc:
        raise PlanFileError(path=str(file), reason=f"cannot be written: {exc.strerror or exc}") from exc
    return len(entries)


def problem_file_schema() -> str:
    """The JSON schema of a problem file, as published in `schemas/problems.schema.json`."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "convplan problem file",
        **msgspec.json.schema(ProblemFile),
    }
    return json.dumps(schema, indent=1) + "\n"


def leftover(problem: Problem) -> tuple[int, ...]:
    """For each spatial dimension, what the forward convolution's windows leave over of padded x: less than the stride.

    This is the output padding of the transposed convolution that has the problem's own padding.
    """
    return tuple(
        size + before + after - dilation * (taps - 1) - 1 - (out - 1) * step
        for size, (before, after), taps, out, step, dilation in zip(
            problem.x.dims[2:],
            problem.padding,
            problem.w.dims[2:],
            problem.y.dims[2:],
            problem.stride,
            problem.dilation,
            strict=True,
        )
    )


def _transposed_size(entry: ProblemEntry) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Output size of a transposed convolution, and the padding of the convolution that it is the gradient of.

    `out = (in - 1) * stride - before - after + dilation * (filter - 1) + output_padding + 1`. A convolution of stride s
    gives the same output size for s input sizes in a row; output_padding says which of them was meant. Torch also
    accepts an output_padding of s and more where it is less than the dilation. No convolution of that padding has such
    an input size, but one with as much less padding at the end has, and it is the same sum.
    """
    rank = len(entry.spatial)
    extras = entry.output_padding or (0,) * rank
    if len(extras) != rank:
        raise SpecError(f"output_padding: found {len(extras)} entries, expected {rank}, as many as spatial has")
    sizes: list[int] = []
    pairs: list[tuple[int, int]] = []
    for size, taps, (before, after), step, dilation, extra in zip(
        entry.spatial,
        entry.filter,
        padding_pairs(entry.padding, rank),
        entry.stride,
        entry.dilation,
        extras,
        strict=True,
    ):
        if extra and extra >= max(step, dilation):
            raise SpecError(
                f"output_padding: found {extra}, expected less than the larger of stride {step} and dilation {dilation}"
            )
        if extra >= step:
            if after < extra:
                raise SpecError(
                    f"output_padding: found {extra} with stride {step} and padding {after} at the end, expected less "
                    "than the stride, or no more than that padding"
                )
            after, extra = after - extra, 0
        out = (size - 1) * step - before - after + dilation * (taps - 1) + extra + 1
        if out < 1:
            raise SpecError(f"output size is {out} for input size {size} (stride {step}, padding {before}+{after})")
        sizes.append(out)
        pairs.append((before, after))
    return tuple(sizes), tuple(pairs)


def _named(entry: ProblemEntry, problem: Problem) -> NamedProblem:
    return NamedProblem(
        name=entry.name,
        problem=problem,
        transposed=entry.transposed,
        output_padding=(entry.output_padding or (0,) * len(entry.spatial)) if entry.transposed else (),
        allow_tf32=entry.dtype == "tf32",
        model=entry.model,
        suite=entry.suite,
    )


def with_name(problem: Problem | NamedProblem, index: int, name: str = "") -> NamedProblem:
    """A problem by a name: its own, the given one, or one made of its position and operation."""
    if isinstance(problem, NamedProblem):
        return problem
    # An epilogue on a dgrad problem only comes from a transposed convolution.
    return NamedProblem(
        name=name or f"{index:04d}-{problem.op}",
        problem=problem,
        transposed=problem.op == "dgrad" and problem.epilogue != Epilogue(),
        allow_tf32=problem.dtype == "float32",
    )


def _entry(named: NamedProblem) -> ProblemEntry:
    problem = named.problem
    source, target = (problem.y, problem.x) if named.transposed else (problem.x, problem.y)
    dtype: Any = "tf32" if problem.dtype == "float32" and named.allow_tf32 else problem.dtype
    channels_last = sum(spec.layout == "channels_last" for spec in (source, problem.w, target)) > 1
    entry = ProblemEntry(
        name=named.name,
        op=named.op,
        n=source.dims[0],
        c=source.dims[1],
        k=target.dims[1],
        spatial=source.dims[2:],
        filter=problem.w.dims[2:],
        padding=tuple(before if before == after else (before, after) for before, after in problem.padding),
        stride=problem.stride,
        dilation=problem.dilation,
        groups=problem.groups,
        dtype=dtype,
        output_dtype=None if problem.output_dtype == problem.dtype else cast("Any", problem.output_dtype),
        layout="channels_last" if channels_last else "contiguous",
        transposed=named.transposed,
        output_padding=leftover(problem) if named.transposed else (),
        bias=problem.epilogue.bias and problem.epilogue.is_plain,
        epilogue="" if problem.epilogue.is_plain else str(problem.epilogue).removeprefix("+"),
        device=problem.device,
        model=named.model,
        suite=named.suite,
    )
    assumed = entry.problem()
    assumed_source, assumed_target = (assumed.y, assumed.x) if named.transposed else (assumed.x, assumed.y)
    return msgspec.structs.replace(
        entry,
        input=_tensor_layout(source, assumed_source),
        weight=_tensor_layout(problem.w, assumed.w),
        output=_tensor_layout(target, assumed_target),
    )


def _tensor_layout(spec: TensorSpec, assumed: TensorSpec) -> TensorLayout | None:
    if spec == assumed:
        return None
    strides = None if spec.strides == assumed.strides else spec.strides
    dtype = None if spec.dtype == assumed.dtype else cast("Any", spec.dtype)
    return TensorLayout(strides=strides, alignment_bytes=spec.alignment_bytes, dtype=dtype)


# What msgspec says, and how it reads here. The place follows each sentence as " - at `$.problems[3].dtype`".
_SENTENCE = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<place>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"([A-Za-z_]\w*)|\[(\d+)\]")
_CHOICES: dict[str, Sequence[str]] = {
    "op": get_args(Op),
    "dtype": get_args(FileDtype),
    "output_dtype": get_args(FileOutputDtype),
    "layout": get_args(FileLayout),
}
_TENSOR_DTYPE = re.compile(r"\.(input|weight|output)\.dtype$")


def _explain(message: str, data: bytes) -> str:
    """`problems[3].dtype: found "float8", expected one of …`, from msgspec's sentence and the file's own bytes."""
    parts = _SENTENCE.match(message)
    what, place = (parts["what"], parts["place"] or "") if parts else (message, "")
    field = place.rpartition(".")[2]
    named = re.match(r"Object (missing required|contains unknown) field `(.*)`$", what, re.DOTALL)
    prefix = f"{place or 'the file'}: "
    if named and named[1] == "missing required":
        return f"{prefix}found no field {named[2]!r}, expected it"
    if named:
        known = ProblemEntry if re.fullmatch(r"problems\[\d+\]", place) else TensorLayout if place else ProblemFile
        fields = ", ".join(known.__struct_fields__)
        return f"{prefix}found unknown field {_shorten(repr(named[2]))}, expected one of {fields}"
    found = _found_at(place, data)
    if field in _CHOICES and what.startswith("Invalid enum value"):
        choices = get_args(Fp8Dtype) if _TENSOR_DTYPE.search(place) else _CHOICES[field]
        return f"{prefix}found {found}, expected one of {', '.join(choices)}"
    if not what.startswith("Expected "):
        return f"{prefix}found {found}: {what}"
    expected = re.sub(r", got .*$", "", what.removeprefix("Expected ")).replace("`", "")
    return f"{prefix}found {found}, expected {expected}"


def _found_at(place: str, data: bytes) -> str:
    """The value at a place of a file, as JSON, cut to a readable length."""
    try:
        value = msgspec.json.decode(data)
        for name, index in _STEP.findall(place):
            value = value[name] if name else value[int(index)]
        text = msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, RecursionError, LookupError, TypeError):
        return "something else"  # nested too deeply, or a number too long, to be read at all
    return _shorten(text)


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"

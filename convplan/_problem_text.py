"""A problem as one line, and back: what `str(problem)` writes in logs and errors, and `Problem.parse` reads.

    fprop+bias float16 x=8x64x56x56:cl w=64x64x3x3:cl y=8x64x56x56:cl pad=1,1:2 stride=2,2 groups=4 cuda

The operation with what is done to its result (`+bias`, `+residual*0.5`, `+leaky_relu(0.1)`), the dtypes, three
tensors, what differs from no padding, stride 1, dilation 1 and one group, and the device. A tensor is its sizes, `:cl`
where it lies channels-last or its strides where it is not dense, and `@4` where its address is not 32-byte aligned. A
padding entry is a number or `before:after`.

Nothing is left out, so that reading gives an equal problem. Lines come from reports and from people: their length is
limited, and every complaint says what was found and what was expected. What fits together is `_problem`'s business.
"""

from __future__ import annotations

import re

from convplan._epilogue import MAX_ALIGNMENT_BYTES, Epilogue, parse_epilogue
from convplan._errors import SpecError
from convplan._problem import (
    DTYPES,
    OPS,
    READS,
    WRITES,
    Op,
    Problem,
    TensorSpec,
    channels_last_strides,
    contiguous_strides,
)

MAX_CHARACTERS = 1_000  # the longest line of a problem has about 800
MAX_QUOTED = 60  # characters of the text in an error
EXAMPLE = "fprop float32 x=8x64x56x56 w=64x64x3x3 y=8x64x56x56 pad=1,1 cpu"

_TENSOR = re.compile(r"(?P<dims>[0-9]+(?:x[0-9]+)*)(?P<layout>:cl|:[0-9]+(?:,[0-9]+)*)?(?:@(?P<aligned>[0-9]+))?")
_NUMBERS = re.compile(r"[0-9]+(?:,[0-9]+)*")
_PADS = re.compile(r"[0-9]+(?::[0-9]+)?(?:,[0-9]+(?::[0-9]+)?)*")
_TENSORS = ("x", "w", "y")
_LISTS = ("pad", "stride", "dil", "groups")


def parse_problem(text: str) -> Problem:
    """The problem that a line describes; see `Problem.parse`."""
    if not isinstance(text, str):
        raise _complaint(f"found {type(text).__name__}", "a string")
    if len(text) > MAX_CHARACTERS:
        raise _complaint(f"found {len(text)} characters", f"at most {MAX_CHARACTERS}")
    words = text.split()
    if len(words) < 6:
        raise _complaint(
            f"found {len(words)} words in {_quoted(text)}", "an operation, its dtype, x=, w=, y= and a device"
        )
    head, dtypes, *middle, device = words
    fields = _fields(middle)
    op, epilogue = _operation(head)
    read, written = _dtypes(dtypes)
    of = {**dict(zip(READS[op], read, strict=True)), WRITES[op]: written}
    tensors = {name: _tensor(name, fields[name], of[name]) for name in _TENSORS}
    spatial = len(tensors["x"].dims) - 2
    return Problem(
        op=op,
        x=tensors["x"],
        w=tensors["w"],
        y=tensors["y"],
        padding=_padding(fields.get("pad"), spatial),
        stride=_numbers("stride", fields.get("stride"), spatial),
        dilation=_numbers("dil", fields.get("dil"), spatial),
        groups=_numbers("groups", fields.get("groups"), 1)[0],
        epilogue=epilogue,
        device=device,
    )


def _fields(words: list[str]) -> dict[str, str]:
    """The words of the form `name=value`, each name once, x, w and y among them."""
    fields: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in (*_TENSORS, *_LISTS):
            raise _complaint(f"found {_quoted(word)}", f"one of {', '.join(f'{one}=' for one in (*_TENSORS, *_LISTS))}")
        if name in fields:
            raise _complaint(f"found {name}= twice", "it once")
        fields[name] = value
    missing = [name for name in _TENSORS if name not in fields]
    if missing:
        raise _complaint(f"found no {missing[0]}=", "all three tensors x=, w= and y=")
    return fields


def _operation(word: str) -> tuple[Op, Epilogue]:
    name, _, behind = word.partition("+")
    if name not in OPS or word.endswith("+"):
        raise _complaint(
            f"found {_quoted(word)}", f"one of {', '.join(OPS)}, and +bias or more of an epilogue behind it"
        )
    try:
        return name, parse_epilogue(behind)
    except SpecError as exc:
        raise SpecError(f"a problem's text: {exc}; copy the whole line, such as {EXAMPLE!r}") from None


def _dtypes(word: str) -> tuple[tuple[str, str], str]:
    """Those of the two tensors that are read, and of the one that is written."""
    names, arrow, written = word.partition("->")
    read = names.split(",")
    unknown = [name for name in (*read, *([written] if arrow else [])) if name not in DTYPES]
    if unknown or len(read) > 2 or (len(read) == 2 and not arrow):
        raise _complaint(
            f"found the dtypes {_quoted(word)}",
            f"`dtype`, `dtype->written` or `first,second->written`, of {', '.join(DTYPES)}",
        )
    return (read[0], read[-1]), written if arrow else read[0]


def _tensor(name: str, text: str, dtype: str) -> TensorSpec:
    found = _TENSOR.fullmatch(text)
    if found is None:
        raise _complaint(
            f"found {name}={_quoted(text)}",
            "sizes such as 8x64x56x56, then :cl for channels-last or strides such as :9,3,1, then @ and an alignment "
            f"in bytes where it is not {MAX_ALIGNMENT_BYTES}",
        )
    dims = tuple(map(int, found["dims"].split("x")))
    layout = found["layout"]
    if layout is None:
        strides = contiguous_strides(dims)
    elif layout == ":cl":
        strides = channels_last_strides(dims) if len(dims) > 2 else ()  # too few, which TensorSpec says
    else:
        strides = tuple(map(int, layout[1:].split(",")))
    return TensorSpec(dims, strides, dtype, int(found["aligned"] or MAX_ALIGNMENT_BYTES))


def _numbers(name: str, text: str | None, count: int) -> tuple[int, ...]:
    """One number for each spatial dimension, all 1 where the line does not have the field."""
    if text is None:
        return (1,) * count
    if _NUMBERS.fullmatch(text) is None or text.count(",") != count - 1:
        raise _complaint(f"found {name}={_quoted(text)}", f"{count} numbers with commas between them")
    return tuple(map(int, text.split(",")))


def _padding(text: str | None, count: int) -> tuple[tuple[int, int], ...]:
    if text is None:
        return ((0, 0),) * count
    if _PADS.fullmatch(text) is None or text.count(",") != count - 1:
        raise _complaint(f"found pad={_quoted(text)}", f"{count} entries, each a number or before:after")
    pairs = []
    for entry in text.split(","):
        before, colon, after = entry.partition(":")
        pairs.append((int(before), int(after if colon else before)))
    return tuple(pairs)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…")


def _complaint(found: str, expected: str) -> SpecError:
    return SpecError(f"a problem's text: {found}, expected {expected}; copy the whole line, such as {EXAMPLE!r}")

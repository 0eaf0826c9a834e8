"""What a worker watches while a candidate runs: memory around its tensors, memory that must not change, memory in use.

A candidate that writes where it must not may do so without any error. Its tensors therefore lie between zones of known
bytes, which are compared exactly after it ran; what its output is compared with is fingerprinted. A candidate that
keeps memory at every run is found by the growth. What to do about either is the worker's business.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch

from convplan._epilogue import MAX_ALIGNMENT_BYTES
from convplan._inputs import Inputs
from convplan._problem import Problem, TensorSpec
from convplan.engines._support import TORCH_DTYPES

GUARD_BYTES = 2**20  # on either side of a tensor
PATTERN = 0xA5  # no plausible number in any dtype
UNWRITTEN = 0xFF  # in every byte of an output before a run: NaN in floating-point types
PIECE_WORDS = 2**22  # of a checksum at once
LEAK_RUNS = 8
LEAK_BYTES = 2 * 2**20  # growth that counts where it is not known to the byte: what a GPU's driver hands out at once
TORCH_BYTES = 512  # what torch's CUDA allocator hands out at once


class Guarded:
    """A tensor between two zones of known bytes.

    Args:
        spec: dims, strides, dtype; its alignment is kept exactly, and is no larger.
        device: where.
        what: its name in sentences.
    """

    def __init__(self, spec: TensorSpec, device: torch.device, what: str) -> None:
        dtype = TORCH_DTYPES[spec.dtype]
        offset = 0 if spec.alignment_bytes == MAX_ALIGNMENT_BYTES else max(spec.alignment_bytes, dtype.itemsize)
        self.what = what
        self._begin = GUARD_BYTES + offset
        self._end = self._begin + max(spec.storage_elements, 1) * dtype.itemsize
        self._bytes = torch.full((self._end + GUARD_BYTES,), PATTERN, dtype=torch.uint8, device=device)
        self.tensor = self._bytes[self._begin : self._end].view(dtype).as_strided(spec.dims, spec.strides)

    def fill(self, given: torch.Tensor) -> None:
        """Hold the same numbers as a tensor of the same strides, of which several elements may share a place."""
        flat = self._bytes[self._begin : self._end].view(given.dtype)
        flat.copy_(given.as_strided(flat.shape, (1,), given.storage_offset()))

    def clear(self) -> None:
        """Make every element something that no right result is."""
        self._bytes[self._begin : self._end] = UNWRITTEN

    def trouble(self) -> str:
        """Where bytes outside of the tensor were written; empty when they are as they were."""
        for zone, where, origin in (
            (self._bytes[self._end :], "past the end", 0),
            (self._bytes[: self._begin], "before the beginning", -self._begin),
        ):
            changed = zone != PATTERN
            if bool(changed.any()):
                first = int(changed.nonzero()[0]) + origin
                return f"it wrote {int(changed.sum())} bytes {where} of its {self.what}, the first at {first:+d}"
        return ""


class Bench:
    """The tensors that candidates of one problem work on: inputs with given numbers, and an output, all guarded."""

    def __init__(self, problem: Problem, numbers: Inputs, device: torch.device) -> None:
        first, second = problem.inputs
        self._guarded = [Guarded(first, device, "first input"), Guarded(second, device, "second input")]
        extra = {name: spec for name, spec in _beside(problem).items() if getattr(numbers, name) is not None}
        self._guarded += [Guarded(spec, device, name) for name, spec in extra.items()]
        for guarded, given in zip(self._guarded, numbers.tensors(), strict=True):
            guarded.fill(given)
        tensors = {guarded.what: guarded.tensor for guarded in self._guarded}
        views = {name: tensors[name] if name in _WHOLE else tensors[name].view(-1) for name in extra}
        self._written = [Guarded(problem.output, device, "output")]
        sums = None
        if numbers.sums is not None:
            self._written.append(Guarded(_sums_spec(problem), device, "statistics"))
            sums = self._written[-1].tensor.view(numbers.sums.shape)
        self.inputs = Inputs(tensors["first input"], tensors["second input"], **views, plain=numbers.plain, sums=sums)

    def fresh_output(self) -> torch.Tensor:
        """The output's place, with nothing in it that a right result has, nor in that of the statistics."""
        for written in self._written:
            written.clear()
        return self._written[0].tensor

    def trouble(self) -> str:
        """What was written outside of the tensors; empty when nothing was."""
        return next(filter(None, (guarded.trouble() for guarded in (*self._written, *self._guarded))), "")


def _sums_spec(problem: Problem) -> TensorSpec:
    """Of (2, K) numbers, as three dimensions, which a spec has at least."""
    return TensorSpec.dense((2, problem.output.dims[1], 1), "float32")


_WHOLE = ("residual", "gate")  # have the output's dims


def _beside(problem: Problem) -> dict[str, TensorSpec]:
    """What an epilogue may read."""
    channels, epilogue = (1, problem.output.dims[1], 1), problem.epilogue
    residual = msgspec.structs.replace(problem.output, alignment_bytes=epilogue.residual_alignment_bytes)
    bias = TensorSpec(channels, (channels[1], 1, 1), problem.bias_dtype, epilogue.bias_alignment_bytes)
    gate = msgspec.structs.replace(problem.output, alignment_bytes=MAX_ALIGNMENT_BYTES)
    return {"bias": bias, "residual": residual, "scale": TensorSpec.dense(channels, problem.scale_dtype), "gate": gate}


def checksum(tensor: torch.Tensor) -> int:
    """Of all memory behind a tensor, gaps included. One changed byte is always seen: every weight is odd."""
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    whole = memory.numel() // 8 * 8
    words, total = memory[:whole].view(torch.int64), 0
    weights = torch.arange(1, 2 * min(PIECE_WORDS, max(len(words), 1)), 2, device=tensor.device)
    for piece in words.split(PIECE_WORDS):
        total = total * 31 + int((piece * weights[: len(piece)]).sum())
    return total * 257 + int(memory[whole:].long().sum())


class Fingerprints:
    """Checksums of everything that an object holds, taken now."""

    def __init__(self, *holders: object, leave_out: Sequence[str] = ()) -> None:
        self._taken = [(tensor, checksum(tensor)) for holder in holders for tensor in _tensors(holder, leave_out)]

    def changed(self) -> bool:
        """Whether any of them differs now."""
        return any(checksum(tensor) != before for tensor, before in self._taken)


def _tensors(thing: object, leave_out: Sequence[str]) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, Inputs):
        for name, item in thing._asdict().items():
            if name not in leave_out:
                yield from _tensors(item, leave_out)
    elif isinstance(thing, (tuple, list)):
        for item in thing:
            yield from _tensors(item, leave_out)
    elif type(thing).__module__.startswith("convplan.") and hasattr(thing, "__dict__"):
        for name, item in vars(thing).items():
            if name not in leave_out:
                yield from _tensors(item, leave_out)


class Use(NamedTuple):
    """Bytes in use, and how much more of them per batch of runs is no accident."""

    size: int
    counts_from: int


def memory_in_use(device: torch.device, runs: int) -> tuple[Use, ...]:
    """By torch, to the byte, and by others on a GPU; by this process elsewhere."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return Use(torch.cuda.memory_allocated(device), TORCH_BYTES * runs), Use(others, LEAK_BYTES)
    import psutil

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)  # else what is kept first fills what others gave back, and nothing seems to grow
    return (Use(int(psutil.Process().memory_info().rss), LEAK_BYTES),)


def leak(run: Callable[[], object], runs: int, device: torch.device) -> str:
    """Whether memory in use grows with every batch of runs, in words; empty when it does not.

    Growth that does not come again (a cache being filled) is none, so only what grew once is looked at again.
    """
    batches: list[list[int]] = []
    for _ in range(3):
        before = memory_in_use(device, runs)
        for _ in range(runs):
            run()
        now = memory_in_use(device, runs)
        batches.append(
            [
                new.size - old.size if new.size - old.size >= new.counts_from else 0
                for new, old in zip(now, before, strict=True)
            ]
        )
        if not any(batches[-1]):
            return ""
    grows = max(map(min, zip(*batches, strict=True)))
    return f"memory in use grows by {grows} bytes in {runs} runs, every time" if grows else ""

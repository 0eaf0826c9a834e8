"""Built plans on torch's tensors: outputs, workspace, streams, and the hot path of a run.

A plan runs on the device of its first input and torch's current stream (B25), with workspace from torch's caching
allocator (B26), which hands memory out again only in stream order.

Problems whose epilogue is more than a bias have runs of their own, with the residual and the scale after `out`: what
follows the convolution is part of the plan (B30). To the others a bias is added in a pass of its own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from ctypes import c_void_p
from typing import Any, NamedTuple

import torch

from convplan._errors import EngineUnavailable
from convplan._problem import READS, WRITES, Problem, TensorSpec
from convplan.engines._support import TORCH_DTYPES, empty
from convplan.engines.base import Run
from convplan.engines.cudnn.fusion import ADDED_ALIGNMENT_BYTES, fusion_of, uid_of
from convplan.engines.cudnn.plans import ExecutionPlan
from convplan.engines.cudnn.target import handle_of
from convplan.kernels import MANY, follow

# Bound once: a call costs a few microseconds in all. Builds of torch without CUDA lack them, and run no plan.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)

At = Callable[[int], ExecutionPlan]  # the plan for a GPU, which must be the current device
Optional = torch.Tensor | None


def _inductors_allocator() -> Callable[..., torch.Tensor] | None:
    """`empty_strided(dims, strides, dtype)` on the current GPU, as torch's own compiled code calls it.

    1.9 us on the host, where `torch.empty_strided` takes 3.3 (torch 2.11). None where torch does not have it.
    """
    guards = getattr(torch._C, "_dynamo", None)
    found = getattr(getattr(guards, "guards", None), "_empty_strided_cuda", None)
    return found if callable(found) else None


_allocate = _inductors_allocator()


class Epilogued:
    """What a run reads besides its two inputs, and writes besides its output.

    Attributes:
        addresses: of residual, bias, scale, and gate or statistics, as far as there are any, and of the constants.
        lacks_bias: the graph has a bias and the problem none, so it is given zeros.

    Args:
        problem: with an epilogue.
        specialised: the form of its graph.
    """

    def __init__(self, problem: Problem, specialised: bool) -> None:
        fused = fusion_of(problem, specialised)
        self.uids = (*map(uid_of, fused.given), *map(uid_of, fused.constants))
        self.lacks_bias = "b" in fused.given and not problem.epilogue.bias
        # Read on the host when a run is started.
        self._constants = (ctypes.c_float * len(fused.constants))(*fused.constants.values())
        first, size = ctypes.addressof(self._constants), ctypes.sizeof(ctypes.c_float)
        constants = tuple(first + size * place for place in range(len(fused.constants)))
        self.addresses = _reader("".join(fused.given), constants)
        self._channels = problem.output.dims[1]
        self._bias_dtype = TORCH_DTYPES[problem.bias_dtype]
        self._zeros: dict[int, torch.Tensor] = {}

    def zeros(self, index: int) -> torch.Tensor:
        """A bias that changes nothing, on a GPU, which must be the current device.

        Made once, and then used on any stream. While a CUDA graph is captured it is made for that graph, which fills
        it at each replay.
        """
        found = self._zeros.get(index)
        if found is None:
            found = torch.zeros(self._channels, dtype=self._bias_dtype, device=torch.device("cuda", index))
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream(index).synchronize()
                self._zeros[index] = found
        return found


UNALIGNED = ADDED_ALIGNMENT_BYTES - 1  # bits of an address
Reader = Callable[[Any, Any, Any, Any], tuple[int, ...]]
# Which of residual, bias and scale a graph reads, in its own order, or that it reads a gate or writes statistics.
# Written out, because this is in the hot path.
_READERS: dict[str, Reader] = {
    "": lambda z, b, s, m: (),
    "z": lambda z, b, s, m: (z.data_ptr(),),
    "b": lambda z, b, s, m: (b.data_ptr(),),
    "s": lambda z, b, s, m: (s.data_ptr(),),
    "zb": lambda z, b, s, m: (z.data_ptr(), b.data_ptr()),
    "zs": lambda z, b, s, m: (z.data_ptr(), s.data_ptr()),
    "sb": lambda z, b, s, m: (s.data_ptr(), b.data_ptr()),
    "zsb": lambda z, b, s, m: (z.data_ptr(), s.data_ptr(), b.data_ptr()),
    "g": lambda z, b, s, m: (m.data_ptr(),),
    "mq": lambda z, b, s, m: ((first := m.data_ptr()), first + m.nbytes // 2),
}


def _reader(letters: str, constants: tuple[int, ...]) -> Reader:
    """Addresses from residual, bias, scale, and gate or statistics, and those of the constants behind them."""
    reader = _READERS[letters]
    return (lambda z, b, s, m: reader(z, b, s, m) + constants) if constants else reader


class Form(NamedTuple):
    """What a run needs to know of its problem, worked out once."""

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    bias_shape: tuple[int, ...]
    copies: tuple[TensorSpec | None, TensorSpec | None]  # the layout that an input is copied into, None for as it is
    uids: tuple[int, ...]  # of the tensors whose addresses a run gives, in that order
    epilogue: Epilogued | None  # None: nothing, or a bias that is added afterwards
    bias_alone: bool  # what follows the convolution is a bias and nothing else
    moved: tuple[bool, bool]  # bias and residual are first copied to where engines can read them

    @classmethod
    def of(cls, problem: Problem, made: Problem, specialised: bool) -> Form:
        """Of a problem that is computed as another one, with strided inputs made dense."""
        pairs = zip(problem.inputs, made.inputs, strict=True)
        first, second = (after if before.strides != after.strides else None for before, after in pairs)
        spec = problem.output
        bias_shape = (1, -1, *[1] * problem.spatial_rank)
        letters = READS[problem.op] + WRITES[problem.op]
        epilogue = Epilogued(problem, specialised) if specialised or not problem.epilogue.is_plain else None
        uids = (*map(uid_of, letters), *(() if epilogue is None else epilogue.uids))
        dtype, then = TORCH_DTYPES[spec.dtype], problem.epilogue
        moved = (
            then.bias and then.bias_alignment_bytes < ADDED_ALIGNMENT_BYTES,
            then.residual and then.residual_alignment_bytes < ADDED_ALIGNMENT_BYTES,
        )
        return cls(spec.dims, spec.strides, dtype, bias_shape, (first, second), uids, epilogue, then.is_plain, moved)

    def place(self, out: Optional, device: torch.device) -> torch.Tensor:
        """`out` where a plan can write to it, else a new tensor."""
        if out is not None and out.stride() == self.strides and not out.data_ptr() & 31:
            return out
        return torch.empty_strided(self.dims, self.strides, dtype=self.dtype, device=device)

    def arranged(self, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs in layouts that the engine reads."""
        one, two = self.copies
        return (
            first if one is None else empty(one, first.device).copy_(first),
            second if two is None else empty(two, second.device).copy_(second),
        )


def make_run(form: Form, at: At) -> Run:
    """A run for any thread and any GPU of this machine."""
    epilogue = form.epilogue
    if epilogue is None:
        return _plain_run(form, at)
    return _as_called(_fused_run(form, epilogue, at), form)


def _as_called(fused: Run, form: Form) -> Run:
    """A fused run that is given whatever its problem allows to be added."""
    if form.bias_alone:

        def run_with_bias(first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor, out: Optional) -> torch.Tensor:
            ready = bias.is_contiguous() and not bias.data_ptr() & UNALIGNED
            return fused(first, second, bias if ready else _moved(bias), out, None, None)

        return run_with_bias
    bias_moves, residual_moves = form.moved
    if not (bias_moves or residual_moves):
        return fused

    def run_moved(
        first: torch.Tensor, second: torch.Tensor, bias: Optional, out: Optional, residual: Optional, scale: Optional
    ) -> torch.Tensor:
        moved = _moved(bias) if bias_moves and bias is not None else bias
        other = residual.clone() if residual_moves and residual is not None else residual
        return fused(first, second, moved, out, other, scale)

    return run_moved


def _moved(bias: torch.Tensor) -> torch.Tensor:
    return bias.clone(memory_format=torch.contiguous_format)


def _gpu_of(first: torch.Tensor) -> int:
    index = first.get_device()
    if index < 0 or not torch.cuda.is_available():
        raise EngineUnavailable(engine="cudnn", needs=f"tensors on a GPU to run, found {first.device}")
    return index


def _execute(plan: ExecutionPlan, index: int, addresses: tuple[int, ...]) -> None:
    """Start a plan on the current stream of a GPU, which must be the current device, with new workspace."""
    handle = handle_of(plan.descriptor.library, index)
    handle.set_stream(_raw_stream(index))
    # Freed when this returns, and given out again in the order of this stream only.
    scratch = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=torch.device("cuda", index))
    plan.execute(handle, (*addresses, scratch.data_ptr()))


def _plain_run(form: Form, at: At) -> Run:
    def run(first: torch.Tensor, second: torch.Tensor, bias: Optional, out: Optional) -> torch.Tensor:
        index = _gpu_of(first)
        with torch.cuda.device(index):
            first, second = form.arranged(first, second)
            result = form.place(out, first.device)
            _execute(at(index), index, (first.data_ptr(), second.data_ptr(), result.data_ptr()))
            if bias is not None and not follow(result, bias):
                result.add_(bias.reshape(form.bias_shape))
        return result if out is None or result is out else out.copy_(result)

    return run


def _fused_run(form: Form, epilogue: Epilogued, at: At) -> Run:
    def run(
        first: torch.Tensor, second: torch.Tensor, bias: Optional, out: Optional, residual: Optional, scale: Optional,
        beside: Optional = None,
    ) -> torch.Tensor:  # fmt: skip
        index = _gpu_of(first)
        # A plan that reads the residual after it has begun to write would read what it wrote.
        in_place = out is not None and residual is not None and out.data_ptr() == residual.data_ptr()
        with torch.cuda.device(index):
            first, second = form.arranged(first, second)
            result = form.place(None if in_place else out, first.device)
            if epilogue.lacks_bias:
                bias = epilogue.zeros(index)
            more = epilogue.addresses(residual, bias, scale, beside)
            _execute(at(index), index, (first.data_ptr(), second.data_ptr(), result.data_ptr(), *more))
        return result if out is None or result is out else out.copy_(result)

    return run


def bound_run(form: Form, at: At, run: Run) -> Run:
    """The same for the calling thread and the current GPU: what the hot path calls.

    One allocation for the output, one for workspace if any, a look-up, a launch. Whatever is rare goes to `run`.

    Raises:
        EngineUnavailable: there is no GPU; or a CUDA graph is captured, and the plan has not run on this one before, or
            nothing of cuDNN's in this thread.
    """
    if not torch.cuda.is_available():
        raise EngineUnavailable(engine="cudnn", needs="a GPU to run plans on (they can be built without)")
    index = torch.cuda.current_device()
    plan = at(index)
    handle_of(plan.descriptor.library, index)  # made or refused now, and not in a run
    if any(form.copies) or _allocate is None:
        return run
    epilogue = form.epilogue
    if epilogue is None:
        return _bound_plain(form, plan, index, _allocate, run)
    if epilogue.lacks_bias and torch.cuda.is_current_stream_capturing():
        return run
    return _as_called(_bound_fused(form, epilogue, plan, index, _allocate, _fused_run(form, epilogue, at)), form)


def _bound_plain(form: Form, plan: ExecutionPlan, index: int, allocate: Callable[..., torch.Tensor], run: Run) -> Run:
    dims, strides, dtype, bias_shape = form.dims, form.strides, form.dtype, form.bias_shape
    raw_stream, current_device = _raw_stream, _current_device
    handle = handle_of(plan.descriptor.library, index)
    packs, execute = plan.packs, plan.descriptor.library.execute_unchecked
    # Made once: ctypes would make them from numbers at every call.
    handle_pointer, plan_pointer = c_void_p(handle.pointer), c_void_p(plan.descriptor.pointer)
    workspace, several = (plan.workspace_bytes,), torch.cuda.device_count() > 1
    no_scratch, byte, unit = not plan.workspace_bytes, torch.uint8, (1,)
    many = math.prod(dims) >= MANY

    def bound(first: torch.Tensor, second: torch.Tensor, bias: Optional, out: Optional) -> torch.Tensor:
        if out is not None or (several and current_device() != index):
            return run(first, second, bias, out)
        result: torch.Tensor = allocate(dims, strides, dtype)
        stream = raw_stream(index)
        if stream != handle.stream:
            handle.set_stream(stream)
        if no_scratch:
            addresses = (first.data_ptr(), second.data_ptr(), result.data_ptr(), 0)
        else:
            scratch = allocate(workspace, unit, byte)
            addresses = (first.data_ptr(), second.data_ptr(), result.data_ptr(), scratch.data_ptr())
        pack = packs.get(addresses)
        if pack is None:
            pack = plan.pack(addresses)
        status = execute(handle_pointer, plan_pointer, pack)
        if status:
            plan.failed(status)
        if bias is None or (many and follow(result, bias)):
            return result
        return result.add_(bias.reshape(bias_shape))

    return bound


def _bound_fused(
    form: Form,
    epilogue: Epilogued,
    plan: ExecutionPlan,
    index: int,
    allocate: Callable[..., torch.Tensor],
    run: Run,
) -> Run:
    dims, strides, dtype, more = form.dims, form.strides, form.dtype, epilogue.addresses
    raw_stream, current_device = _raw_stream, _current_device
    handle = handle_of(plan.descriptor.library, index)
    packs, execute = plan.packs, plan.descriptor.library.execute_unchecked
    handle_pointer, plan_pointer = c_void_p(handle.pointer), c_void_p(plan.descriptor.pointer)
    workspace, several = (plan.workspace_bytes,), torch.cuda.device_count() > 1
    no_scratch, byte, unit = not plan.workspace_bytes, torch.uint8, (1,)
    zeros = epilogue.zeros(index) if epilogue.lacks_bias else None

    def bound(
        first: torch.Tensor, second: torch.Tensor, bias: Optional, out: Optional, residual: Optional, scale: Optional,
        beside: Optional = None,
    ) -> torch.Tensor:  # fmt: skip
        if out is not None or (several and current_device() != index):
            return run(first, second, bias, out, residual, scale, beside)
        result: torch.Tensor = allocate(dims, strides, dtype)
        stream = raw_stream(index)
        if stream != handle.stream:
            handle.set_stream(stream)
        read = more(residual, zeros if bias is None else bias, scale, beside)
        if no_scratch:
            addresses = (first.data_ptr(), second.data_ptr(), result.data_ptr(), *read, 0)
        else:
            scratch = allocate(workspace, unit, byte)
            addresses = (first.data_ptr(), second.data_ptr(), result.data_ptr(), *read, scratch.data_ptr())
        pack = packs.get(addresses)
        if pack is None:
            pack = plan.pack(addresses)
        status = execute(handle_pointer, plan_pointer, pack)
        if status:
            plan.failed(status)
        return result

    return bound

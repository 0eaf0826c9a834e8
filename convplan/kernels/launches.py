"""Triton's kernels called: what is allocated, which kernels, with which cut. The tensors are dense channels-last.

What follows from sizes, dtypes and settings alone is worked out once for each of them (`_Summing` and so on), because a
layer's kernels take less time on a GPU than deciding about them would on the host.

The device may also be Triton's interpreter, which is how these run without a GPU. Importing this imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from convplan._problem import channels_last_strides
from convplan.kernels import choices, sources
from convplan.kernels.ready import Ready

if TYPE_CHECKING:
    from convplan.kernels import Norm

Tensor = torch.Tensor
Parameters = tuple[float, ...]
Dtypes = tuple[torch.dtype | None, ...]
Windows = tuple[int, ...]

MOST_KEPT = 2048  # of each kind: sizes, dtypes and settings; one model's training has some dozens

# As torch's own compiled code allocates on the current GPU; None where torch has no such function.
_allocate: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -2)  # no tensor's device
_float32 = torch.float32


class Unusable(Exception):
    """Triton did not launch a kernel: its message says why. Nothing has been written that anyone reads."""


def column_sums(y: Tensor, out: Tensor | None) -> Tensor:
    """Sums and sums of squares of each channel, float32 (2, K)."""
    made = _summing(y.shape, y.dtype, None if out is None else out.dtype)
    index = y.get_device()
    target = floats(y, index, made.pair) if out is None else out
    partials = target if made.finish is None else floats(y, index, made.parts)
    _launch(made.sums, index, y, partials)
    if made.finish is not None:
        _launch(made.finish, index, partials, target)
    return target


def normalize(
    y: Tensor, sums: Tensor | None, norm: Norm, residual: Tensor | None, activation: str, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """One kernel where `sums` are given; else the moments first, and where they are many parts, a kernel for those."""
    weight, bias, running_mean, running_var, momentum, eps, batches = norm
    made = _normalizing(
        y.shape, y.dtype, sums is None, residual is None,
        _dtypes(weight, bias, running_mean, running_var, sums, batches), momentum, eps, activation, parameters,
    )  # fmt: skip
    index, given = y.get_device(), sums
    if given is None:
        assert made.moments is not None  # such it is
        given = floats(y, index, made.parts)
        _launch(made.moments, index, y, given)
        if made.finish is not None:
            partials, given = given, floats(y, index, made.pair)
            _launch(made.finish, index, partials, given)
    out, saved = _like(y, index, made.shape), floats(y, index, made.pair)
    _launch(made.normalize, index, y, residual, out, given, weight, bias, running_mean, running_var, saved, batches)
    return out, saved


def follow(
    y: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    parameters: Parameters,
) -> bool:
    """One kernel; False, and nothing done, where it would have to be compiled while a CUDA graph is captured."""
    ready = _following(y.shape, y.dtype, _dtypes(residual, bias, scale), alpha, activation, parameters).follow
    index = y.get_device()
    if not _may_launch(index, ready):
        return False
    _launch(ready, index, y, residual, bias, scale)
    return True


def concatenate(tensors: tuple[Tensor, ...]) -> Tensor | None:
    """One kernel for each; None, and nothing done, where one would have to be compiled in a capture."""
    x = tensors[0]
    made = _joining(tuple([one.shape for one in tensors]), x.dtype)
    index = x.get_device()
    if not _may_launch(index, *made.places):
        return None
    out = _strided(x, index, made.shape, made.strides)
    for one, ready, first in zip(tensors, made.places, made.firsts, strict=True):
        _launch(ready, index, one, out if not first else out.narrow(1, first, one.shape[1]))
    return out


def max_pool(x: Tensor, shape: tuple[int, ...], windows: Windows) -> Tensor | None:
    """One kernel; None, and nothing done, where it would have to be compiled in a capture.

    Args:
        x: (N, C, H, W) or (N, C, D, H, W).
        shape: of the result.
        windows: kernel, stride, padding and dilation, each of three dimensions, in one tuple.
    """
    made = _pooling(x.shape, shape, x.dtype, windows)
    index = x.get_device()
    if not _may_launch(index, made.pool):
        return None
    out = _strided(x, index, made.shape, made.strides)
    _launch(made.pool, index, x, out)
    return out


def normalize_backward(
    grad: Tensor,
    y: Tensor,
    other: Tensor | None,
    from_output: bool,
    saved: Tensor,
    norm: Norm,
    activation: str,
    parameters: Parameters,
    wants_y: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of y, of what was added behind the normalization, and (2, K) the sums for bias and weight."""
    weight, bias = norm.weight, norm.bias
    if activation == "none":
        other = None
    made = _going_back(
        y.shape, y.dtype, other is None, from_output, _dtypes(weight, bias, saved), activation, parameters, wants_y
    )
    index = y.get_device()
    g = None if other is None else _like(y, index, made.shape)
    totals = floats(y, index, made.pair)
    partials = totals if made.count == 1 else floats(y, index, made.parts)
    _launch(made.sums, index, grad, y, other, saved, weight, bias, g, partials)
    if made.finish is not None:
        _launch(made.finish, index, partials, totals)
        partials = totals
    behind = grad if g is None else g
    if made.input is None:
        return None, behind, totals
    grad_y = _like(y, index, made.shape)
    _launch(made.input, index, behind, y, saved, weight, bias, partials, totals, grad_y)
    return grad_y, behind, totals


def activation_backward(
    grad: Tensor, other: Tensor | None, activation: str, parameters: Parameters, from_output: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """What comes in behind the activation, and its sums over all but the channels."""
    nothing = activation == "none"
    if nothing and not bias:
        return grad, None
    made = _going_back_alone(grad.shape, grad.dtype, _dtypes(other), activation, parameters, from_output, bias)
    index = grad.get_device()
    g = grad if nothing else _like(grad, index, made.shape)
    partials = floats(grad, index, made.parts) if bias else None
    _launch(made.backward, index, grad, None if nothing else other, None if nothing else g, partials)
    if partials is None:
        return g, None
    if made.finish is not None:
        totals = floats(grad, index, made.pair)
        _launch(made.finish, index, partials, totals)
        return g, totals[0]
    return g, partials[0, 0]


# ---- what is worked out once


class _Pass:
    """What all passes over a tensor share.

    Attributes:
        shape: of the tensor.
        pair: the shape of two numbers for each channel.
    """

    def __init__(self, shape: torch.Size) -> None:
        self.shape, self.columns = tuple(shape), shape[1]
        self.rows = shape.numel() // self.columns
        self.align = choices.alignment(self.columns)
        self.units = self.columns // self.align
        self.pair = (2, self.columns)
        self.finish: Ready | None = None

    def finishing(self, count: int, rows_each: int, *, moments: bool = False) -> Ready:
        """Adds up so many partial sums, or moments, of so many rows each."""
        cut = choices.finishing(count, self.columns)
        return Ready(
            sources.finish, cut,
            (self.rows, rows_each, count, self.units, moments, self.align, cut.block_rows, cut.block_columns),
        )  # fmt: skip


class _Summing(_Pass):
    """For `column_sums`: `parts` is the shape of its partial sums."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__(shape)
        cut = choices.reducing(self.rows, self.columns)
        self.parts = (cut.grid[1], 2, self.columns)
        numbers = (self.rows, self.units, cut.rows_each, self.align, cut.block_rows, cut.block_columns)
        self.sums = Ready(sources.sums, cut, numbers)
        if cut.grid[1] > 1:
            self.finish = self.finishing(cut.grid[1], cut.rows_each)


class _Normalizing(_Pass):
    """For `normalize`: `moments` is there where no sums are given, `parts` the shape of what it writes."""

    def __init__(
        self, shape: torch.Size, own_sums: bool, momentum: float, eps: float, activation: str, parameters: Parameters
    ) -> None:
        super().__init__(shape)
        rows, columns = self.rows, self.columns
        count, rows_of_count, self.moments = 1, rows, None
        if own_sums:
            cut = choices.reducing(rows, columns)
            count, rows_of_count = cut.grid[1], cut.rows_each
            self.parts = (count, 2, columns)
            numbers = (rows, self.units, cut.rows_each, self.align, cut.block_rows, cut.block_columns)
            self.moments = Ready(sources.moments, cut, numbers)
            if count == 1 or count > choices.FEW_PARTIALS:
                self.finish = self.finishing(count, rows_of_count, moments=True)
                count = 1
        cut = choices.passing(rows, columns, count)
        self.normalize = Ready(
            sources.normalize, cut,
            (float(momentum), float(eps), rows, self.units, cut.rows_each, count, rows_of_count,
             "moments" if own_sums else "sums", activation, *_two(parameters), self.align,
             choices.power_of_two(count), cut.block_rows, cut.block_columns),
        )  # fmt: skip


class _Following(_Pass):
    """For `follow`."""

    def __init__(self, shape: torch.Size, alpha: float, activation: str, parameters: Parameters) -> None:
        super().__init__(shape)
        cut = choices.passing(self.rows, self.columns)
        self.follow = Ready(
            sources.follow, cut,
            (float(alpha), self.rows, self.units, cut.rows_each, activation, *_two(parameters), self.align,
             cut.block_rows, cut.block_columns),
        )  # fmt: skip


class _Joining:
    """For `concatenate`: what places each tensor, and the channel that it begins at."""

    def __init__(self, shapes: tuple[torch.Size, ...]) -> None:
        first, channels = shapes[0], [shape[1] for shape in shapes]
        self.shape = (first[0], sum(channels), *first[2:])
        self.strides = channels_last_strides(self.shape)
        self.firsts = [sum(channels[:place]) for place in range(len(channels))]
        align = min(choices.alignment(one) for one in channels)
        self.places = []
        for shape in shapes:
            rows, columns = shape.numel() // shape[1], shape[1]
            cut = choices.passing(rows, columns)
            numbers = (rows, columns // align, cut.rows_each, self.shape[1] // align, align)
            self.places.append(Ready(sources.place, cut, (*numbers, cut.block_rows, cut.block_columns)))


class _Pooling(_Pass):
    """For `max_pool`; its rows are those of the result."""

    def __init__(self, before: torch.Size, shape: tuple[int, ...], windows: Windows) -> None:
        super().__init__(torch.Size(shape))
        self.strides = channels_last_strides(shape)
        cut = choices.passing(self.rows, self.columns)
        self.pool = Ready(
            sources.max_pool, cut,
            (self.rows, self.units, cut.rows_each, *_three(before), *_three(shape), *windows, self.align,
             cut.block_rows, cut.block_columns),
        )  # fmt: skip


def _three(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Depth, height and width."""
    return (1, 1, *shape[2:])[-3:]


class _GoingBack(_Pass):
    """For `normalize_backward`: `count` partial sums, of shape `parts`; `input` is there where it is wanted."""

    def __init__(
        self, shape: torch.Size, no_other: bool, from_output: bool, activation: str, parameters: Parameters,
        wants_y: bool,
    ) -> None:  # fmt: skip
        super().__init__(shape)
        rows, columns, numbers = self.rows, self.columns, _two(parameters)
        cut = choices.reducing(rows, columns)
        count = self.count = cut.grid[1]
        self.parts = (count, 2, columns)
        self.sums = Ready(
            sources.backward_sums, cut,
            (rows, self.units, cut.rows_each, from_output, activation, *numbers, self.align, cut.block_rows,
             cut.block_columns),
        )  # fmt: skip
        if count > 1 and (count > choices.FEW_PARTIALS or not wants_y):
            self.finish = self.finishing(count, cut.rows_each)
            count = 1
        self.input: Ready | None = None
        if wants_y:
            cut = choices.passing(rows, columns, count)
            self.input = Ready(
                sources.backward_input, cut,
                (rows, self.units, cut.rows_each, count, activation if no_other else "none", *numbers, self.align,
                 choices.power_of_two(count), cut.block_rows, cut.block_columns),
            )  # fmt: skip


class _GoingBackAlone(_Pass):
    """For `activation_backward`: `parts` is the shape of a bias's partial sums."""

    def __init__(
        self, shape: torch.Size, activation: str, parameters: Parameters, from_output: bool, bias: bool
    ) -> None:
        super().__init__(shape)
        cut = choices.reducing(self.rows, self.columns) if bias else choices.passing(self.rows, self.columns)
        self.parts = (cut.grid[1], 2, self.columns)
        self.backward = Ready(
            sources.activation_backward, cut,
            (self.rows, self.units, cut.rows_each, from_output, activation, *_two(parameters), self.align,
             cut.block_rows, cut.block_columns),
        )  # fmt: skip
        if bias and cut.grid[1] > 1:
            self.finish = self.finishing(cut.grid[1], cut.rows_each)


# Their first arguments are sizes and dtypes: another dtype is another compiled kernel, and so another `Ready`.


@lru_cache(maxsize=MOST_KEPT)
def _summing(shape: torch.Size, dtype: torch.dtype, out: torch.dtype | None) -> _Summing:
    return _Summing(shape)


@lru_cache(maxsize=MOST_KEPT)
def _normalizing(
    shape: torch.Size, dtype: torch.dtype, own_sums: bool, no_residual: bool, dtypes: Dtypes, momentum: float,
    eps: float, activation: str, parameters: Parameters,
) -> _Normalizing:  # fmt: skip
    return _Normalizing(shape, own_sums, momentum, eps, activation, parameters)


@lru_cache(maxsize=MOST_KEPT)
def _following(
    shape: torch.Size, dtype: torch.dtype, dtypes: Dtypes, alpha: float, activation: str, parameters: Parameters
) -> _Following:
    return _Following(shape, alpha, activation, parameters)


@lru_cache(maxsize=MOST_KEPT)
def _joining(shapes: tuple[torch.Size, ...], dtype: torch.dtype) -> _Joining:
    return _Joining(shapes)


@lru_cache(maxsize=MOST_KEPT)
def _pooling(before: torch.Size, shape: tuple[int, ...], dtype: torch.dtype, windows: Windows) -> _Pooling:
    return _Pooling(before, shape, windows)


@lru_cache(maxsize=MOST_KEPT)
def _going_back(
    shape: torch.Size, dtype: torch.dtype, no_other: bool, from_output: bool, dtypes: Dtypes, activation: str,
    parameters: Parameters, wants_y: bool,
) -> _GoingBack:  # fmt: skip
    return _GoingBack(shape, no_other, from_output, activation, parameters, wants_y)


@lru_cache(maxsize=MOST_KEPT)
def _going_back_alone(
    shape: torch.Size, dtype: torch.dtype, dtypes: Dtypes, activation: str, parameters: Parameters, from_output: bool,
    bias: bool,
) -> _GoingBackAlone:  # fmt: skip
    return _GoingBackAlone(shape, activation, parameters, from_output, bias)


def _dtypes(*tensors: Tensor | None) -> Dtypes:
    return tuple([None if one is None else one.dtype for one in tensors])


# ---- memory, launches


def floats(y: Tensor, index: int, dims: tuple[int, ...]) -> Tensor:
    """Memory for float32 numbers on the device of `y`, whose index that is: a row of channels, or (…, 2) of them."""
    if _allocate is not None and index == _current_device():
        columns = dims[-1]
        return _allocate(dims, (columns, 1) if len(dims) == 2 else (2 * columns, columns, 1), _float32)
    return torch.empty(dims, dtype=_float32, device=y.device)


def _like(y: Tensor, index: int, dims: tuple[int, ...]) -> Tensor:
    """Memory for what lies as `y` does, which is dense."""
    if _allocate is not None and index == _current_device():
        return _allocate(dims, y.stride(), y.dtype)  # it takes plain tuples alone
    return torch.empty_like(y)


def _strided(y: Tensor, index: int, dims: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Memory for numbers of y's dtype, where it is."""
    if _allocate is not None and index == _current_device():
        return _allocate(dims, strides, y.dtype)
    return torch.empty_strided(dims, strides, dtype=y.dtype, device=y.device)


def _may_launch(index: int, *kernels: Ready) -> bool:
    """Whether kernels are compiled for a device, or may be now: not while a CUDA graph is captured."""
    if index < 0 or all(one.is_known(index) for one in kernels):
        return True
    return not torch.cuda.is_current_stream_capturing()


def _two(parameters: Parameters) -> Parameters:
    return (*parameters, 0.0, 0.0)[:2]


def _launch(ready: Ready, index: int, *tensors: Tensor | None) -> None:
    try:
        ready(index, *tensors)
    except Exception as error:  # of the compiler, of ptxas, of the driver: each has its own
        raise Unusable(f"{ready.name}: {type(error).__name__}: {error}") from error

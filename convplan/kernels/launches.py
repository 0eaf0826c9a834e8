"""Triton's kernels called: what is allocated, which kernels, with which cut. The tensors are dense channels-last.

The device may also be Triton's interpreter, which is how these run without a GPU. Importing this imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from convplan.kernels import choices, sources
from convplan.kernels.ready import launch

if TYPE_CHECKING:
    from convplan.kernels import Norm

Tensor = torch.Tensor
Parameters = tuple[float, ...]


# As torch's own compiled code allocates on the current GPU; None where torch has no such function.
_allocate: Callable[..., Tensor] | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -2)  # no tensor's device


class Unusable(Exception):
    """Triton did not launch a kernel: its message says why. Nothing has been written that anyone reads."""


def column_sums(y: Tensor, out: Tensor | None) -> Tensor:
    """Sums and sums of squares of each channel, float32 (2, K)."""
    rows, columns = _matrix(y)
    target = _floats(y, 2, columns) if out is None else out
    cut = choices.reducing(rows, columns)
    height = cut.grid[1]
    partials = target if height == 1 else _floats(y, height, 2, columns)
    align = choices.alignment(columns)
    numbers = (rows, columns // align, cut.rows_each, align, cut.block_rows, cut.block_columns)
    _launch(sources.sums, cut, (y, partials), numbers)
    if height > 1:
        _finish(partials, target, rows, cut.rows_each, False)
    return target


def normalize(
    y: Tensor, sums: Tensor | None, norm: Norm, residual: Tensor | None, activation: str, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """One kernel where `sums` are given; else the moments first, and where they are many parts, a kernel for those."""
    rows, columns = _matrix(y)
    align = choices.alignment(columns)
    units = columns // align
    count, rows_of_count, kind = 1, rows, "sums"
    given = sums
    if given is None:
        cut, kind = choices.reducing(rows, columns), "moments"
        count, rows_of_count = cut.grid[1], cut.rows_each
        given = _floats(y, count, 2, columns)
        numbers = (rows, units, cut.rows_each, align, cut.block_rows, cut.block_columns)
        _launch(sources.moments, cut, (y, given), numbers)
        if count == 1 or count > choices.FEW_PARTIALS:
            partials, given = given, _floats(y, 2, columns)
            _finish(partials, given, rows, rows_of_count, True)
            count = 1
    out, saved = _like(y), _floats(y, 2, columns)
    cut = choices.passing(rows, columns, count)
    _launch(
        sources.normalize, cut,
        (y, residual, out, given, norm.weight, norm.bias, norm.running_mean, norm.running_var, saved),
        (float(norm.momentum), float(norm.eps), rows, units, cut.rows_each, count, rows_of_count, kind, activation,
         *_two(parameters), align, choices.power_of_two(count), cut.block_rows, cut.block_columns),
    )  # fmt: skip
    return out, saved


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
    rows, columns = _matrix(y)
    align = choices.alignment(columns)
    units, numbers = columns // align, _two(parameters)
    g = None if other is None or activation == "none" else _like(y)
    cut = choices.reducing(rows, columns)
    count = cut.grid[1]
    totals = _floats(y, 2, columns)
    partials = totals if count == 1 else _floats(y, count, 2, columns)
    _launch(
        sources.backward_sums, cut,
        (grad, y, None if activation == "none" else other, saved, norm.weight, norm.bias, g, partials),
        (rows, units, cut.rows_each, from_output, activation, *numbers, align, cut.block_rows, cut.block_columns),
    )  # fmt: skip
    if count > 1 and (count > choices.FEW_PARTIALS or not wants_y):
        _finish(partials, totals, rows, cut.rows_each, False)
        partials, count = totals, 1
    behind = grad if g is None else g
    if not wants_y:
        return None, behind, totals
    grad_y = _like(y)
    cut = choices.passing(rows, columns, count)
    _launch(
        sources.backward_input, cut, (behind, y, saved, norm.weight, norm.bias, partials, totals, grad_y),
        (rows, units, cut.rows_each, count, activation if g is None else "none", *numbers, align,
         choices.power_of_two(count), cut.block_rows, cut.block_columns),
    )  # fmt: skip
    return grad_y, behind, totals


def activation_backward(
    grad: Tensor, other: Tensor | None, activation: str, parameters: Parameters, from_output: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """What comes in behind the activation, and its sums over all but the channels."""
    rows, columns = _matrix(grad)
    align = choices.alignment(columns)
    nothing = activation == "none"
    g = grad if nothing else _like(grad)
    if nothing and not bias:
        return g, None
    cut = choices.reducing(rows, columns) if bias else choices.passing(rows, columns)
    partials = _floats(grad, cut.grid[1], 2, columns) if bias else None
    _launch(
        sources.activation_backward, cut, (grad, None if nothing else other, None if nothing else g, partials),
        (rows, columns // align, cut.rows_each, from_output, activation, *_two(parameters), align, cut.block_rows,
         cut.block_columns),
    )  # fmt: skip
    if partials is None:
        return g, None
    if cut.grid[1] > 1:
        totals = _floats(grad, 2, columns)
        _finish(partials, totals, rows, cut.rows_each, False)
        return g, totals[0]
    return g, partials[0, 0]


def _finish(partials: Tensor, out: Tensor, rows: int, rows_each: int, are_moments: bool) -> None:
    count, columns = partials.shape[0], partials.shape[-1]
    cut, align = choices.finishing(count, columns), choices.alignment(columns)
    numbers = (rows, rows_each, count, columns // align, are_moments, align, cut.block_rows, cut.block_columns)
    _launch(sources.finish, cut, (partials, out), numbers)


def _matrix(y: Tensor) -> tuple[int, int]:
    """Rows and columns: places and channels."""
    columns = y.shape[1]
    return y.numel() // columns, columns


def _floats(y: Tensor, *dims: int) -> Tensor:
    if _allocate is not None and y.get_device() == _current_device():
        strides = (dims[1], 1) if len(dims) == 2 else (dims[1] * dims[2], dims[2], 1)
        return _allocate(dims, strides, torch.float32)
    return torch.empty(dims, dtype=torch.float32, device=y.device)


def _like(y: Tensor) -> Tensor:
    """Memory for what lies as `y` does, which is dense."""
    if _allocate is not None and y.get_device() == _current_device():
        return _allocate(tuple(y.shape), y.stride(), y.dtype)  # it takes plain tuples alone
    return torch.empty_like(y)


def _two(parameters: Parameters) -> Parameters:
    return (*parameters, 0.0, 0.0)[:2]


def _launch(kernel: Any, cut: choices.Cut, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> None:
    try:
        launch(kernel, cut, tensors, numbers)
    except Exception as error:  # of the compiler, of ptxas, of the driver: each has its own
        raise Unusable(f"{kernel.__name__}: {type(error).__name__}: {error}") from error

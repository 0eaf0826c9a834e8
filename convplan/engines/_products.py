"""Convolution as matrix products, four ways, each for fprop, dgrad and wgrad: the arithmetic of the `matmul` engine.

    gather    copy what each output reads into a column, then one product with the filter matrix (im2col); a 1x1 filter
              needs no copy. dgrad gathers over dy, one stride-1 problem for each phase of the stride.
    shift     gather along all but the first spatial dimension; each tap of the first is a product with a shifted view
              of the same columns, summed in place. Columns are smaller by the taps of that dimension.
    scatter   one product of the filter matrix with the input, then every tap's share is added where it belongs
              (col2im). Where windows do not overlap that is one copy: a patch embedding is a product and a reshape.
    taps      no matrices: for each tap, and each channel of a group, one multiply-add over shifted views. For depthwise
              filters, whose matrices would be single rows.

Each maker takes a `Setting` and returns a `Method`: a function and the scratch memory it needs. All index arithmetic
happens in the maker; the function allocates, copies and multiplies. Which method is proposed for which problem is
`matmul`'s business, and slices and windows are worked out in `_windows`.

Inside, tensors are seen in "layout order": N C spatial (channels first) or N spatial C (channels last). Sums are kept
in the compute type, which is float32 or wider wherever more than one product adds up to an output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

import torch

from convplan._problem import Problem
from convplan.engines._windows import Axis, Phase, backward_phases, forward_window, tap_slices

Fill = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""`fill(first, second, work)`: compute into `work`, which is in layout order and the compute type."""

Correlate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""`correlate(read, weight, work)`: `read` in layout order, `weight` as (G, out, in, *taps), `work` as for `Fill`."""

_ALL = slice(None)


class Method(NamedTuple):
    """A function and the most scratch memory it allocates, the output not counted."""

    fill: Fill
    workspace_bytes: int


@dataclass(frozen=True)
class Setting:
    """What every maker needs to know.

    Args:
        problem: what to compute.
        channels_last: the layout order.
        dtype: the compute type.
        chunk: samples worked on at a time.
    """

    problem: Problem
    channels_last: bool
    dtype: torch.dtype
    chunk: int

    @property
    def spatial(self) -> tuple[int, ...]:
        """The spatial dimensions of a tensor in layout order."""
        return tuple(range(1, self.rank + 1)) if self.channels_last else tuple(range(2, self.rank + 2))

    @property
    def rank(self) -> int:
        return self.problem.spatial_rank

    @property
    def groups(self) -> int:
        return self.problem.groups

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """First and one-past-last sample of each piece."""
        samples = self.problem.x.dims[0]
        return [(low, min(low + self.chunk, samples)) for low in range(0, samples, self.chunk)]

    def shape(self, samples: int, channels: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """Dims in layout order."""
        return (samples, *sizes, channels) if self.channels_last else (samples, channels, *sizes)

    def arrange(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view in layout order of a tensor with dims N C spatial."""
        return tensor.movedim(1, -1) if self.channels_last else tensor

    def index(self, slices: Sequence[slice]) -> tuple[slice, ...]:
        """An index in layout order that cuts the spatial dimensions."""
        return (_ALL, *slices) if self.channels_last else (_ALL, _ALL, *slices)

    def nbytes(self, elements: int) -> int:
        return elements * self.dtype.itemsize

    def converted_bytes(self, elements: int, always: bool = False) -> int:
        """Bytes of a converted copy, where one is needed."""
        narrow = self.problem.x.dtype in ("float16", "bfloat16")
        return self.nbytes(elements) if always or (narrow and self.dtype.itemsize > 2) else 0


def split_weight(setting: Setting, weight: torch.Tensor) -> torch.Tensor:
    """The weight in the compute type as (G, K/G, C/G, *taps)."""
    groups, dims = setting.groups, setting.problem.w.dims
    split: torch.Tensor = weight.to(setting.dtype).unflatten(0, (groups, dims[0] // groups))
    return split


class _Frame:
    """Cuts a tensor in layout order to what a window reads, with zeros around it where the window leaves it.

    Needs no copy where there is no padding and the tensor already has the compute type.
    """

    def __init__(self, setting: Setting, axes: Sequence[Axis], channels: int, lengths: Sequence[int]) -> None:
        sources, targets = [], []
        for axis, length in zip(axes, lengths, strict=True):
            first = min(max(0, -axis.before), axis.size)
            last = max(first, min(axis.size, length - axis.before))
            sources.append(slice(first, last))
            targets.append(slice(max(0, axis.before), max(0, axis.before) + last - first))
        whole = all(t == slice(0, length) for t, length in zip(targets, lengths, strict=True))
        self._source = setting.index(sources)
        self._target = None if whole else setting.index(targets)
        self._shape = setting.shape(0, channels, lengths)[1:]
        self._dtype = setting.dtype
        elements = setting.chunk * channels * math.prod(lengths)
        self.workspace_bytes = setting.converted_bytes(elements, always=not whole)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        inside = tensor[self._source]
        if self._target is None:
            # Converted into layout order, so that what gathers next does not have to copy once more.
            return inside if inside.dtype == self._dtype else _dense(inside, self._dtype)
        frame = inside.new_zeros((inside.shape[0], *self._shape), dtype=self._dtype)
        frame[self._target].copy_(inside)
        return frame


def _windows_view(setting: Setting, axes: Sequence[Axis], frame: torch.Tensor) -> torch.Tensor:
    """Every window of a framed tensor, without a copy: (N, C, *taps, *out) or (N, *out, *taps, C)."""
    strides = frame.stride()
    taps, outs = tuple(a.taps for a in axes), tuple(a.out for a in axes)
    per_axis = [strides[d] for d in setting.spatial]
    tap_strides = tuple(map(mul, per_axis, (a.dilation for a in axes)))
    out_strides = tuple(map(mul, per_axis, (a.step for a in axes)))
    if setting.channels_last:
        dims = (frame.shape[0], *outs, *taps, frame.shape[-1])
        return frame.as_strided(dims, (strides[0], *out_strides, *tap_strides, strides[-1]))
    return frame.as_strided((*frame.shape[:2], *taps, *outs), (*strides[:2], *tap_strides, *out_strides))


def _dense(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the compute type whose elements lie in the order of its dimensions; a copy only where they do not."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)  # converts and reorders in one go


def _per_sample(matrices: torch.Tensor, samples: int) -> torch.Tensor:
    """The groups' matrices (G, a, b) for each of the samples: (samples * G, a, b). A view unless both are above one."""
    if matrices.shape[0] == 1:
        return matrices.expand(samples, -1, -1)
    return matrices if samples == 1 else matrices.repeat(samples, 1, 1)


# --- gather -----------------------------------------------------------------------------------------------------------


class _Columns:
    """Im2col of one piece: (n * G, C/G * taps, positions), or (n * positions, taps * C) with channels last."""

    def __init__(self, setting: Setting, axes: Sequence[Axis], channels: int) -> None:
        self._setting, self._axes = setting, tuple(axes)
        self._frame = _Frame(setting, axes, channels, [a.extent for a in axes])
        self.taps = math.prod(a.taps for a in axes)
        self.positions = math.prod(a.out for a in axes)
        self._rows = channels // setting.groups * self.taps
        copied = setting.nbytes(setting.chunk * channels * self.taps * self.positions)
        self.workspace_bytes = self._frame.workspace_bytes + copied

    def __call__(self, read: torch.Tensor) -> torch.Tensor:
        windows = _windows_view(self._setting, self._axes, self._frame(read))
        if self._setting.channels_last:
            return windows.reshape(-1, self._rows)
        return windows.reshape(-1, self._rows, self.positions)


def _gather_correlate(setting: Setting, axes: Sequence[Axis], channels: int, filters: int) -> tuple[Correlate, int]:
    """Correlate by im2col: `channels` are read and `filters` written, over all groups."""
    columns = _Columns(setting, axes, channels)
    groups, pieces, positions = setting.groups, setting.pieces, columns.positions
    weight_bytes = 2 * setting.nbytes(filters * channels // groups * columns.taps)

    def last(read: torch.Tensor, weight: torch.Tensor, work: torch.Tensor) -> None:
        matrix = weight[0].movedim(1, -1).reshape(filters, -1).t()
        rows = work.view(-1, filters)
        for low, high in pieces:
            torch.mm(columns(read[low:high]), matrix, out=rows[low * positions : high * positions])

    def first(read: torch.Tensor, weight: torch.Tensor, work: torch.Tensor) -> None:
        matrices = _per_sample(weight.reshape(groups, filters // groups, -1), setting.chunk)
        batch = work.view(-1, filters // groups, positions)
        for low, high in pieces:
            torch.bmm(
                matrices[: (high - low) * groups], columns(read[low:high]), out=batch[low * groups : high * groups]
            )

    copies = 0 if setting.channels_last or groups == 1 else setting.chunk
    return last if setting.channels_last else first, columns.workspace_bytes + weight_bytes * (1 + copies)


# --- shift ------------------------------------------------------------------------------------------------------------


class _ShiftedColumns:
    """Im2col along all but the first spatial dimension, and where each tap of the first finds its columns.

    With a stride, positions along the first dimension are sorted by their remainder, so that every tap's share is one
    dense block: (n * G, C/G * other taps, step, lead, other positions), with channels last
    (n, step, lead * other positions, other taps * C).
    """

    def __init__(self, setting: Setting, axes: Sequence[Axis], channels: int) -> None:
        self._setting = setting
        axis, self._rest = axes[0], tuple(axes[1:])
        self._axis = axis
        places = [divmod(tap * axis.dilation, axis.step) for tap in range(axis.taps)]
        self._lead = axis.out + places[-1][0]
        self._frame = _Frame(setting, axes, channels, [axis.step * self._lead, *(max(a.extent, 1) for a in self._rest)])
        self._rest_taps = math.prod(a.taps for a in self._rest)
        self._rest_out = math.prod(a.out for a in self._rest)
        self._rows = channels // setting.groups * self._rest_taps
        self.positions = axis.out * self._rest_out
        self._places = [(remainder, shift * self._rest_out) for shift, remainder in places]
        copied = setting.chunk * channels * self._rest_taps * axis.step * self._lead * self._rest_out
        self.workspace_bytes = self._frame.workspace_bytes + setting.nbytes(copied)

    def __call__(self, read: torch.Tensor) -> list[torch.Tensor]:
        """One matrix (or batch of them) for each tap of the first dimension, views of one tensor."""
        frame, step = self._frame(read), self._axis.step
        samples, strides = frame.shape[0], frame.stride()
        per_axis = [strides[d] for d in self._setting.spatial]
        rest_taps, rest_out = tuple(a.taps for a in self._rest), tuple(a.out for a in self._rest)
        tap_strides = tuple(map(mul, per_axis[1:], (a.dilation for a in self._rest)))
        out_strides = tuple(map(mul, per_axis[1:], (a.step for a in self._rest)))
        if self._setting.channels_last:
            dims = (samples, step, self._lead, *rest_out, *rest_taps, frame.shape[-1])
            order = (strides[0], per_axis[0], per_axis[0] * step, *out_strides, *tap_strides, strides[-1])
            columns = frame.as_strided(dims, order).reshape(samples, step, self._lead * self._rest_out, self._rows)
            return [columns[:, at, start : start + self.positions] for at, start in self._places]
        dims = (*frame.shape[:2], *rest_taps, step, self._lead, *rest_out)
        order = (*strides[:2], *tap_strides, per_axis[0], per_axis[0] * step, *out_strides)
        columns = frame.as_strided(dims, order).reshape(-1, self._rows, step, self._lead * self._rest_out)
        return [columns[:, :, at, start : start + self.positions] for at, start in self._places]


def _shift_correlate(setting: Setting, axes: Sequence[Axis], channels: int, filters: int) -> tuple[Correlate, int]:
    """Correlate by one product for each tap of the first dimension."""
    columns = _ShiftedColumns(setting, axes, channels)
    groups, pieces, positions = setting.groups, setting.pieces, columns.positions
    weight_bytes = 2 * setting.nbytes(filters * channels // groups * math.prod(a.taps for a in axes))

    def last(read: torch.Tensor, weight: torch.Tensor, work: torch.Tensor) -> None:
        taps = [w.movedim(1, -1).reshape(1, filters, -1).mT for w in weight[0].unbind(2)]
        batch = work.view(-1, positions, filters)
        for low, high in pieces:
            target = batch[low:high]
            for i, (shifted, matrix) in enumerate(zip(columns(read[low:high]), taps, strict=True)):
                target.baddbmm_(shifted, matrix.expand(high - low, -1, -1), beta=min(i, 1))

    def first(read: torch.Tensor, weight: torch.Tensor, work: torch.Tensor) -> None:
        taps = [_per_sample(w.reshape(groups, filters // groups, -1), setting.chunk) for w in weight.unbind(3)]
        batch = work.view(-1, filters // groups, positions)
        for low, high in pieces:
            target = batch[low * groups : high * groups]
            for i, (shifted, matrices) in enumerate(zip(columns(read[low:high]), taps, strict=True)):
                target.baddbmm_(matrices[: (high - low) * groups], shifted, beta=min(i, 1))

    copies = 0 if setting.channels_last or groups == 1 else setting.chunk
    return last if setting.channels_last else first, columns.workspace_bytes + weight_bytes * (1 + copies)


# --- fprop and dgrad by either of the two -----------------------------------------------------------------------------

_CORRELATE = {"gather": _gather_correlate, "shift": _shift_correlate}


def correlate_fprop(setting: Setting, how: str) -> Method:
    """fprop: one correlation over x."""
    problem = setting.problem
    correlate, workspace = _CORRELATE[how](setting, forward_window(problem), problem.x.dims[1], problem.w.dims[0])

    def fill(x: torch.Tensor, w: torch.Tensor, work: torch.Tensor) -> None:
        correlate(setting.arrange(x), split_weight(setting, w), work)

    return Method(fill, workspace)


def correlate_dgrad(setting: Setting, how: str) -> Method:
    """dgrad: one stride-1 correlation over dy for each phase, with the filter flipped and its channels exchanged."""
    problem = setting.problem
    samples, channels, *sizes = problem.x.dims
    flipped_dims = tuple(range(3, 3 + setting.rank))
    phases = backward_phases(problem)
    steps = [_phase_step(setting, phase, how) for phase in phases]
    written = sum(math.prod(a.out for a in phase.window) for phase in phases)
    covered = written == math.prod(sizes)
    workspace = max((need for _, need in steps), default=0) + 3 * setting.nbytes(problem.w.numel)
    whole = covered and len(phases) == 1
    if not whole:
        workspace += setting.nbytes(
            samples * channels * max((math.prod(a.out for a in p.window) for p in phases), default=0)
        )
    targets = [setting.index(phase.target) for phase in phases]
    shapes = [setting.shape(samples, channels, [a.out for a in phase.window]) for phase in phases]
    taps = [(_ALL, _ALL, _ALL, *phase.taps) for phase in phases]

    def fill(dy: torch.Tensor, w: torch.Tensor, work: torch.Tensor) -> None:
        flipped = split_weight(setting, w).flip(flipped_dims).transpose(1, 2)
        read = setting.arrange(dy)
        if whole:
            steps[0][0](read, flipped[taps[0]], work)
            return
        if not covered:
            work.zero_()
        for (correlate, _), target, shape, tap in zip(steps, targets, shapes, taps, strict=True):
            part = work.new_empty(shape)
            correlate(read, flipped[tap], part)
            work[target].copy_(part)

    return Method(fill, workspace)


def _phase_step(setting: Setting, phase: Phase, how: str) -> tuple[Correlate, int]:
    problem = setting.problem
    return _CORRELATE[how](setting, phase.window, problem.w.dims[0], problem.x.dims[1])


# --- wgrad ------------------------------------------------------------------------------------------------------------


def _dy_matrices(setting: Setting, dy: torch.Tensor) -> torch.Tensor:
    """dy in the compute type as (N * G, K/G, positions), or (N, positions, K) with channels last."""
    problem = setting.problem
    filters, positions = problem.w.dims[0] // setting.groups, math.prod(problem.y.dims[2:])
    arranged = setting.arrange(dy).to(setting.dtype)
    return (
        arranged.reshape(-1, positions, filters) if setting.channels_last else arranged.reshape(-1, filters, positions)
    )


def _accumulate(acc: torch.Tensor, dy: torch.Tensor, columns: torch.Tensor) -> None:
    """Add dy @ columns^T, summed over samples, to the groups' matrices (G, K/G, rows); channels first."""
    groups = acc.shape[0]
    if groups > 1:
        # Weights of one group are small, so a product for each sample costs little memory and fills all cores.
        acc += torch.bmm(dy, columns.mT).unflatten(0, (-1, groups)).sum(0)
        return
    for sample in range(dy.shape[0]):
        acc[0].addmm_(dy[sample], columns[sample].t())


def gather_wgrad(setting: Setting) -> Method:
    """wgrad: dy times the transposed columns of x."""
    problem = setting.problem
    columns = _Columns(setting, forward_window(problem), problem.x.dims[1])
    groups, filters, pieces = setting.groups, problem.w.dims[0], setting.pieces
    workspace = columns.workspace_bytes + setting.nbytes(problem.y.numel) + setting.converted_bytes(problem.y.numel)

    def last(x: torch.Tensor, dy: torch.Tensor, work: torch.Tensor) -> None:
        read, matrices = setting.arrange(x), _dy_matrices(setting, dy)
        acc = work.view(filters, -1)
        for i, (low, high) in enumerate(pieces):
            acc.addmm_(matrices[low:high].reshape(-1, filters).t(), columns(read[low:high]), beta=min(i, 1))

    def first(x: torch.Tensor, dy: torch.Tensor, work: torch.Tensor) -> None:
        read, matrices = setting.arrange(x), _dy_matrices(setting, dy)
        acc = work.zero_().view(groups, filters // groups, -1)
        for low, high in pieces:
            _accumulate(acc, matrices[low * groups : high * groups], columns(read[low:high]))

    if setting.channels_last:
        return Method(last, workspace)
    return Method(first, workspace + (0 if groups == 1 else setting.nbytes(problem.w.numel * (setting.chunk + 1))))


def shift_wgrad(setting: Setting) -> Method:
    """wgrad: dy times the transposed shifted columns of x, one product for each tap of the first dimension."""
    problem = setting.problem
    columns = _ShiftedColumns(setting, forward_window(problem), problem.x.dims[1])
    groups, pieces = setting.groups, setting.pieces
    filters, channels, first_taps = problem.w.dims[:3]
    workspace = columns.workspace_bytes + setting.nbytes(problem.y.numel + problem.w.numel)

    def last(x: torch.Tensor, dy: torch.Tensor, work: torch.Tensor) -> None:
        read, matrices = setting.arrange(x), _dy_matrices(setting, dy)
        taps = work.new_zeros((first_taps, filters, work.numel() // (first_taps * filters)))
        for low, high in pieces:
            for acc, shifted in zip(taps, columns(read[low:high]), strict=True):
                for sample in range(high - low):
                    acc.addmm_(matrices[low + sample].t(), shifted[sample])
        work.view(filters, first_taps, -1).copy_(taps.transpose(0, 1))

    def first(x: torch.Tensor, dy: torch.Tensor, work: torch.Tensor) -> None:
        read, matrices = setting.arrange(x), _dy_matrices(setting, dy)
        taps = work.new_zeros((first_taps, groups, filters // groups, work.numel() // (first_taps * filters)))
        for low, high in pieces:
            for acc, shifted in zip(taps, columns(read[low:high]), strict=True):
                _accumulate(acc, matrices[low * groups : high * groups], shifted)
        work.view(filters, channels, first_taps, -1).copy_(taps.view(first_taps, filters, channels, -1).movedim(0, 2))

    if setting.channels_last:
        return Method(last, workspace)
    return Method(first, workspace + (0 if groups == 1 else setting.nbytes(problem.w.numel * (setting.chunk + 1))))


# --- scatter ----------------------------------------------------------------------------------------------------------


def scatter(setting: Setting) -> Method:
    """fprop or dgrad: one product with the input as it lies, then every tap's share is added where it belongs."""
    problem, groups = setting.problem, setting.groups
    forward = problem.op == "fprop"
    source, target = (problem.x, problem.y) if forward else (problem.y, problem.x)
    read_channels, channels = source.dims[1] // groups, target.dims[1]
    filter_dims = problem.w.dims[2:]
    taps, positions = math.prod(filter_dims), math.prod(source.dims[2:])
    shares = [
        (_flat(tap.position, filter_dims), setting.index(tap.y if forward else tap.x), tap.x if forward else tap.y)
        for tap in tap_slices(problem)
    ]
    pieces, axes = setting.pieces, forward_window(problem)
    tiles = not forward and not any(axis.overlaps or axis.before for axis in axes) and _inside(axes)
    covered = tiles and math.prod(a.taps * a.out for a in axes) == math.prod(target.dims[2:])
    workspace = (
        setting.nbytes(setting.chunk * channels * taps * positions)
        + setting.nbytes(setting.chunk * source.dims[1] * positions)
        + setting.nbytes(problem.w.numel) * (2 if groups == 1 or setting.channels_last else 2 + setting.chunk)
    )

    def multiply_last(read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products = torch.mm(read.view(-1, read_channels), weight)
        return products.view(read.shape[0], *source.dims[2:], taps, channels)

    def multiply_first(read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        columns = read.view(-1, read_channels, positions)
        return torch.bmm(weight[: columns.shape[0]], columns).view(-1, channels, taps, *source.dims[2:])

    def matrix(w: torch.Tensor) -> torch.Tensor:
        split = split_weight(setting, w).flatten(3)  # (G, K/G, C/G, taps)
        if setting.channels_last:
            return split[0].permute((1, 2, 0) if forward else (0, 2, 1)).reshape(read_channels, taps * channels)
        ordered = split.transpose(2, 3) if forward else split.permute(0, 2, 3, 1)
        return _per_sample(ordered.reshape(groups, -1, read_channels), setting.chunk)

    def share_of(tap: int, src: tuple[slice, ...]) -> tuple[slice | int, ...]:
        return (_ALL, *src, tap) if setting.channels_last else (_ALL, _ALL, tap, *src)

    multiply = multiply_last if setting.channels_last else multiply_first
    share_index = [(dst, share_of(tap, src)) for tap, dst, src in shares]

    def fill(first: torch.Tensor, w: torch.Tensor, work: torch.Tensor) -> None:
        weight = matrix(w)
        read = setting.arrange(first)
        for low, high in pieces:
            products = multiply(_dense(read[low:high], setting.dtype), weight)
            part = work[low:high]
            if not covered:
                part.zero_()
            if tiles:
                windows = _windows_view(setting, axes, part)
                windows.copy_(products.view(windows.shape))
                continue
            for dst, src in share_index:
                part[dst].add_(products[src])

    return Method(fill, workspace)


def _flat(index: Sequence[int], dims: Sequence[int]) -> int:
    """Row-major position of an index."""
    position = 0
    for i, size in zip(index, dims, strict=True):
        position = position * size + i
    return position


def _inside(axes: Sequence[Axis]) -> bool:
    """No window reaches beyond the input."""
    return all(axis.extent <= axis.size for axis in axes)


# --- taps -------------------------------------------------------------------------------------------------------------


def taps(setting: Setting) -> Method:
    """fprop or dgrad: one multiply-add over shifted views for each tap and each channel read within a group."""
    problem, groups = setting.problem, setting.groups
    forward = problem.op == "fprop"
    source, target = (problem.x, problem.y) if forward else (problem.y, problem.x)
    loops, channels = source.dims[1] // groups, target.dims[1] // groups
    order = (2, *range(3, 3 + setting.rank), 0, 1) if forward else (1, *range(3, 3 + setting.rank), 0, 2)
    filter_dims = problem.w.dims[2:]
    taps_count = math.prod(filter_dims)
    steps = []
    for tap in tap_slices(problem):
        src, dst = (tap.x, tap.y) if forward else (tap.y, tap.x)
        for channel in range(loops):
            one = slice(channel, channel + 1)
            at = channel * taps_count + _flat(tap.position, filter_dims)
            steps.append((at, _grouped_index(setting, src, one), _grouped_index(setting, dst, _ALL)))
    tail = () if setting.channels_last else (1,) * setting.rank
    pieces = setting.pieces
    workspace = setting.nbytes(setting.chunk * math.prod(source.dims[1:])) + 2 * setting.nbytes(problem.w.numel)

    def fill(first: torch.Tensor, w: torch.Tensor, work: torch.Tensor) -> None:
        ordered = split_weight(setting, w).permute(order).reshape(-1, groups, channels, *tail)
        # Contiguous: a strided factor takes a scalar loop, 0.63 ms a tap instead of 0.09 for 600,000 numbers.
        factors = ordered.contiguous().unbind(0)
        read, written = setting.arrange(first), _split_channels(setting, work.zero_())
        for low, high in pieces:
            piece = _split_channels(setting, _dense(read[low:high], setting.dtype))
            part = written[low:high]
            for at, src, dst in steps:
                part[dst].addcmul_(piece[src], factors[at])

    return Method(fill, workspace)


def taps_wgrad(setting: Setting) -> Method:
    """wgrad: for each tap and each channel of a group, the sum of a product of shifted views."""
    problem, groups = setting.problem, setting.groups
    filters, channels = problem.w.dims[0] // groups, problem.w.dims[1]
    filter_dims = problem.w.dims[2:]
    taps_count = math.prod(filter_dims)
    steps = []
    for tap in tap_slices(problem):
        for channel in range(channels):
            at = channel * taps_count + _flat(tap.position, filter_dims)
            one = slice(channel, channel + 1)
            steps.append((at, _grouped_index(setting, tap.x, one), _grouped_index(setting, tap.y, _ALL)))
    summed = (0, *setting.spatial) if setting.channels_last else (0, *(d + 1 for d in setting.spatial))
    pieces = setting.pieces
    per_sample = 2 * math.prod(problem.y.dims[1:]) + math.prod(problem.x.dims[1:])
    workspace = setting.nbytes(setting.chunk * per_sample + problem.w.numel)

    def fill(x: torch.Tensor, dy: torch.Tensor, work: torch.Tensor) -> None:
        read, gradient = setting.arrange(x), setting.arrange(dy)
        sums = work.new_zeros((channels * taps_count, groups, filters))
        for low, high in pieces:
            x_piece = _split_channels(setting, _dense(read[low:high], setting.dtype))
            dy_piece = _split_channels(setting, _dense(gradient[low:high], setting.dtype))
            for at, x_index, dy_index in steps:
                sums[at] += (x_piece[x_index] * dy_piece[dy_index]).sum(summed)
        found = sums.view(channels, *filter_dims, groups * filters).movedim(-1, 0)  # (K, C/G, *taps)
        work.copy_(setting.arrange(found))

    return Method(fill, workspace)


def _split_channels(setting: Setting, tensor: torch.Tensor) -> torch.Tensor:
    """A view with the channels of a tensor in layout order split into (G, per group)."""
    split: torch.Tensor = tensor.unflatten(-1 if setting.channels_last else 1, (setting.groups, -1))
    return split


def _grouped_index(setting: Setting, spatial: Sequence[slice], channel: slice) -> tuple[slice, ...]:
    """An index for a tensor with split channels that cuts its spatial dimensions and the channels within a group."""
    return (_ALL, *spatial, _ALL, channel) if setting.channels_last else (_ALL, _ALL, channel, *spatial)

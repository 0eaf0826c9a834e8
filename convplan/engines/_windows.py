"""Where a convolution's products come from: windows, phases and taps as plain integers and slices, no arithmetic.

A convolution relates input positions to output positions by x = y * stride + tap * dilation - before, in each spatial
dimension. Engines that compute it step by step need one of three readings of that line, made here once per plan:

    forward_window   for every output, the inputs under its filter
    backward_phases  the same for dgrad: input positions that share their remainder modulo the stride see the same taps
                     and form an ordinary stride-1 window over dy, so that no product with a zero is ever computed
    tap_slices       for every tap, the inputs and the outputs that it connects, cut to those that exist
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from convplan._problem import Problem


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a window that moves over a padded input; all numbers in elements.

    Output p reads input positions p * step + tap * dilation - before; those outside [0, size) count as zero.
    `before` is negative where the first input positions are never read.
    """

    size: int
    before: int
    out: int
    taps: int
    step: int
    dilation: int

    @property
    def extent(self) -> int:
        """Length of the padded input that is read, counted from its first position."""
        return (self.out - 1) * self.step + (self.taps - 1) * self.dilation + 1

    @property
    def overlaps(self) -> bool:
        """Neighbouring windows share positions, or lie within each other's gaps."""
        return self.step <= (self.taps - 1) * self.dilation and self.out > 1


class Phase(NamedTuple):
    """The part of dgrad that writes every stride-th position of x, starting from one remainder.

    window: over dy, with step 1.
    taps: slices of the spatially flipped filter, in the window's order.
    target: slices of x's spatial dimensions that this phase writes.
    """

    window: tuple[Axis, ...]
    taps: tuple[slice, ...]
    target: tuple[slice, ...]


class Tap(NamedTuple):
    """A filter position and what it connects: `x` and `y` are slices of equal length, possibly empty."""

    position: tuple[int, ...]
    x: tuple[slice, ...]
    y: tuple[slice, ...]


def forward_window(problem: Problem) -> tuple[Axis, ...]:
    """The window of the forward convolution over x, one axis for each spatial dimension."""
    return tuple(
        Axis(size, before, out, taps, step, dilation)
        for size, (before, _), out, taps, step, dilation in zip(
            problem.x.dims[2:],
            problem.padding,
            problem.y.dims[2:],
            problem.w.dims[2:],
            problem.stride,
            problem.dilation,
            strict=True,
        )
    )


def backward_phases(problem: Problem) -> list[Phase]:
    """The phases of dgrad that have at least one tap; positions of x in no phase have gradient zero."""
    per_axis = [_axis_phases(axis) for axis in forward_window(problem)]
    return [
        Phase(tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts))
        for parts in itertools.product(*per_axis)
    ]


def count_phases(problem: Problem) -> int:
    """The most phases `backward_phases` can return."""
    return math.prod(min(step, size) for step, size in zip(problem.stride, problem.x.dims[2:], strict=True))


def _axis_phases(axis: Axis) -> list[tuple[Axis, slice, slice]]:
    """The phases of one dimension: window over dy, taps of the flipped filter, positions of x."""
    shared = math.gcd(axis.step, axis.dilation)
    tap_step, dilation = axis.step // shared, axis.dilation // shared
    phases = []
    for rest in range(min(axis.step, axis.size)):
        # x position rest + step * m is read by tap t of output m + (rest + before - t * dilation) / step.
        first = next((t for t in range(min(tap_step, axis.taps)) if _divides(axis, rest, t)), None)
        if first is None:
            continue
        count = -(-(axis.taps - first) // tap_step)
        lead = (rest + axis.before - first * axis.dilation) // axis.step
        flipped_first = axis.taps - 1 - first - (count - 1) * tap_step
        window = Axis(
            size=axis.out,
            before=(count - 1) * dilation - lead,
            out=-(-(axis.size - rest) // axis.step),
            taps=count,
            step=1,
            dilation=dilation,
        )
        phases.append((window, slice(flipped_first, axis.taps, tap_step), slice(rest, axis.size, axis.step)))
    return phases


def _divides(axis: Axis, rest: int, tap: int) -> bool:
    return (rest + axis.before - tap * axis.dilation) % axis.step == 0


def tap_slices(problem: Problem) -> list[Tap]:
    """Every tap of the filter, in row-major order, leaving out those that only ever meet padding."""
    per_axis = [_axis_taps(axis) for axis in forward_window(problem)]
    return [
        Tap(tuple(p[0] for p in parts), tuple(p[1] for p in parts), tuple(p[2] for p in parts))
        for parts in itertools.product(*per_axis)
    ]


def _axis_taps(axis: Axis) -> list[tuple[int, slice, slice]]:
    taps = []
    for tap in range(axis.taps):
        offset = tap * axis.dilation - axis.before
        low = max(0, -(offset // axis.step))  # first output whose input position is not in the padding before
        high = min(axis.out, (axis.size - 1 - offset) // axis.step + 1)
        if low < high:
            start = low * axis.step + offset
            stop = (high - 1) * axis.step + offset + 1
            taps.append((tap, slice(start, stop, axis.step), slice(low, high)))
    return taps

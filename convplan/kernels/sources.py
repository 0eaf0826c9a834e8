"""Triton's kernels, over row-major matrices (rows, columns): a column is a channel, a row one place of one sample.

Program (i, j) has the i-th block of columns and walks down `rows_each` rows from row `j * rows_each`. What a program
sums is stored as partial sums (j, 2, columns), and added up by whoever reads them, always in the same order: nothing is
accumulated in memory, so that results are the same bits in every run.

Arguments of every kernel: `units * ALIGN` is the number of columns, which tells the compiler what divides the length of
a row; offsets from a program's own first element fit 32 bits, and that element's place is computed in 64. How many
programs there are and what they are given is `launches`' business.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convplan.kernels.pointwise import activate, backward, backward_from_output

# Their values mean nothing to a compiler: one kernel for all sizes.
_SIZES = ["rows", "units", "rows_each", "count", "rows_of_count", "units_of_out"]
_SIZES += [f"{which}_{dim}" for which in ("in", "out") for dim in ("depth", "height", "width")]


@triton.jit
def _of_columns(pointer, at, inside, otherwise: tl.constexpr):
    """A vector of one number for each column, which may be absent."""
    if pointer is None:
        values = tl.full(at.shape, otherwise, tl.float32)
    else:
        values = tl.load(pointer + at, mask=inside, other=otherwise).to(tl.float32)
    return values


@triton.jit
def _added(partials, at, inside, columns, count, BLOCK: tl.constexpr):
    """Both sums of each column."""
    if BLOCK == 1:
        first = tl.load(partials + at, mask=inside, other=0.0)
        second = tl.load(partials + columns + at, mask=inside, other=0.0)
    else:
        lines = tl.arange(0, BLOCK)
        mask = (lines < count)[:, None] & inside[None, :]
        places = partials + lines[:, None] * (2 * columns) + at[None, :]
        first = tl.sum(tl.load(places, mask=mask, other=0.0), axis=0)
        second = tl.sum(tl.load(places + columns, mask=mask, other=0.0), axis=0)
    return first, second


@triton.jit
def _merged(partials, at, inside, columns, rows, rows_each, count, BLOCK: tl.constexpr):
    """Mean and biased variance of each column, from the means and the sums of squared differences of blocks of rows."""
    lines = tl.arange(0, BLOCK)
    mask = (lines < count)[:, None] & inside[None, :]
    places = partials + lines[:, None] * (2 * columns) + at[None, :]
    means = tl.load(places, mask=mask, other=0.0)
    squares = tl.load(places + columns, mask=mask, other=0.0)
    left = rows - lines.to(tl.int64) * rows_each
    sizes = tl.where(lines < count, tl.minimum(left, rows_each), 0).to(tl.float32)[:, None]
    mean = tl.sum(sizes * means, axis=0) / rows
    apart = means - mean[None, :]
    return mean, (tl.sum(squares, axis=0) + tl.sum(sizes * apart * apart, axis=0)) / rows


@triton.jit(do_not_specialize=_SIZES)
def sums(y, partials, rows, units, rows_each, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums and sums of squares."""
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    tile = lines[:, None] * columns + at[None, :]
    y += first * columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in tl.range(0, height, ROWS):
        mask = (lines < height - row)[:, None] & inside[None, :]
        v = tl.load(y + tile, mask=mask, other=0.0).to(tl.float32)
        total += v
        squares += v * v
        y += ROWS * columns
    partials += tl.program_id(1) * 2 * columns + at
    tl.store(partials, tl.sum(total, axis=0), mask=inside)
    tl.store(partials + columns, tl.sum(squares, axis=0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def moments(y, partials, rows, units, rows_each, ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Means and sums of squared differences from them, each lane by Welford's way, then the lanes together.

    All of it relative to the program's first row, so that a mean far from zero takes no digits from what differs.
    """
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    tile = lines[:, None] * columns + at[None, :]
    y += first * columns
    origin = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    seen = 0.0
    for row in tl.range(0, height, ROWS):
        here = (lines < height - row)[:, None]
        v = tl.load(y + tile, mask=here & inside[None, :], other=0.0).to(tl.float32) - origin[None, :]
        apart = tl.where(here, v - mean, 0.0)
        seen += 1.0
        mean += apart * (1.0 / seen)
        squares += apart * tl.where(here, v - mean, 0.0)
        y += ROWS * columns
    sizes = ((height - lines + ROWS - 1) // ROWS).to(tl.float32)[:, None]  # rows that each lane has seen
    together = tl.sum(mean * sizes, axis=0) / height
    apart = mean - together[None, :]
    partials += tl.program_id(1) * 2 * columns + at
    tl.store(partials, together + origin, mask=inside)
    tl.store(partials + columns, tl.sum(squares, axis=0) + tl.sum(sizes * apart * apart, axis=0), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def finish(
    partials, out, rows, rows_of_count, count, units,
    MOMENTS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What `sums` left, added up; what `moments` left, as mean and biased variance."""
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    if MOMENTS:
        first, second = _merged(partials, at, inside, columns, rows, rows_of_count, count, BLOCK)
    else:
        first, second = _added(partials, at, inside, columns, count, BLOCK)
    tl.store(out + at, first, mask=inside)
    tl.store(out + columns + at, second, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def normalize(
    y, residual, out, given, weight, bias, running_mean, running_var, saved, batches, momentum, eps,
    rows, units, rows_each, count, rows_of_count,
    GIVEN: tl.constexpr, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`activation((y - mean) * invstd * weight + bias + residual)`.

    `given` holds sums and sums of squares, or moments: partial ones, or (`BLOCK` 1) mean and variance. The programs of
    the first rows write `saved` and the running statistics, and the first of all counts the batch.
    """
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    if GIVEN == "sums":
        mean = tl.load(given + at, mask=inside, other=0.0) / rows
        var = tl.load(given + columns + at, mask=inside, other=0.0) / rows - mean * mean
        var = tl.where(var < 0, 0.0, var)
    elif BLOCK > 1:
        mean, var = _merged(given, at, inside, columns, rows, rows_of_count, count, BLOCK)
    else:
        mean = tl.load(given + at, mask=inside, other=0.0)
        var = tl.load(given + columns + at, mask=inside, other=0.0)
    invstd = 1.0 / tl.sqrt_rn(var + eps)
    if tl.program_id(1) == 0:
        tl.store(saved + at, mean, mask=inside)
        tl.store(saved + columns + at, invstd, mask=inside)
        if running_mean is not None:
            old = tl.load(running_mean + at, mask=inside, other=0.0).to(tl.float32)
            new = (1.0 - momentum) * old + momentum * mean
            tl.store(running_mean + at, new.to(running_mean.dtype.element_ty), mask=inside)
        if running_var is not None:
            old = tl.load(running_var + at, mask=inside, other=0.0).to(tl.float32)
            unbiased = var * (rows.to(tl.float32) / (rows - 1).to(tl.float32))
            new = (1.0 - momentum) * old + momentum * unbiased
            tl.store(running_var + at, new.to(running_var.dtype.element_ty), mask=inside)
        if batches is not None:
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(batches) + 1)
    scale = (invstd * _of_columns(weight, at, inside, 1.0))[None, :]
    shift = _of_columns(bias, at, inside, 0.0)[None, :]
    mean = mean[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    tile = lines[:, None] * columns + at[None, :]
    offset = first * columns
    for row in tl.range(0, height, ROWS):
        mask = (lines < height - row)[:, None] & inside[None, :]
        z = (tl.load(y + offset + tile, mask=mask, other=0.0).to(tl.float32) - mean) * scale + shift
        if residual is not None:
            z += tl.load(residual + offset + tile, mask=mask, other=0.0).to(tl.float32)
        z = activate(z, ACTIVATION, P0, P1)
        tl.store(out + offset + tile, z.to(out.dtype.element_ty), mask=mask)
        offset += ROWS * columns


@triton.jit(do_not_specialize=_SIZES)
def follow(
    y, residual, bias, scale, alpha, rows, units, rows_each,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`activation(scale * y + alpha * residual + bias)`, written over y."""
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    factor = _of_columns(scale, at, inside, 1.0)[None, :]
    shift = _of_columns(bias, at, inside, 0.0)[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    tile = lines[:, None] * columns + at[None, :]
    offset = first * columns
    for row in tl.range(0, height, ROWS):
        mask = (lines < height - row)[:, None] & inside[None, :]
        z = tl.load(y + offset + tile, mask=mask, other=0.0).to(tl.float32) * factor + shift
        if residual is not None:
            z += alpha * tl.load(residual + offset + tile, mask=mask, other=0.0).to(tl.float32)
        z = activate(z, ACTIVATION, P0, P1)
        tl.store(y + offset + tile, z.to(y.dtype.element_ty), mask=mask)
        offset += ROWS * columns


@triton.jit(do_not_specialize=_SIZES)
def place(
    x, out, rows, units, rows_each, units_of_out,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of x copied to where `out` begins, in longer rows of `units_of_out * ALIGN` columns."""
    columns = units * ALIGN
    pitch = units_of_out * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    read = lines[:, None] * columns + at[None, :]
    written = lines[:, None] * pitch + at[None, :]
    x += first * columns
    out += first * pitch
    for row in tl.range(0, height, ROWS):
        mask = (lines < height - row)[:, None] & inside[None, :]
        tl.store(out + written, tl.load(x + read, mask=mask), mask=mask)
        x += ROWS * columns
        out += ROWS * pitch


@triton.jit(do_not_specialize=_SIZES)
def max_pool(
    x, out, rows, units, rows_each, in_depth, in_height, in_width, out_depth, out_height, out_width,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest number of each window, for each row of `out`; not a number where one in the window is none.

    Sizes and windows are those of three dimensions. Rows, of either tensor, are fewer than 2**31.
    """
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    first = tl.program_id(1) * rows_each
    height = tl.minimum(rows - first, rows_each)
    lines = tl.arange(0, ROWS)
    for begin in tl.range(0, height, ROWS):
        here = lines < height - begin
        row = first + begin + lines
        w = row % out_width
        rest = row // out_width
        h = rest % out_height
        rest = rest // out_height
        d = rest % out_depth
        n = rest // out_depth
        d = d * STRIDE_D - PADDING_D
        h = h * STRIDE_H - PADDING_H
        w = w * STRIDE_W - PADDING_W
        largest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        for i in tl.static_range(KERNEL_D):
            dd = d + i * DILATION_D
            for j in tl.static_range(KERNEL_H):
                hh = h + j * DILATION_H
                for k in tl.static_range(KERNEL_W):
                    ww = w + k * DILATION_W
                    there = here & (dd >= 0) & (dd < in_depth) & (hh >= 0) & (hh < in_height)
                    there = there & (ww >= 0) & (ww < in_width)
                    source = ((n * in_depth + dd) * in_height + hh) * in_width + ww
                    places = x + source.to(tl.int64)[:, None] * columns + at[None, :]
                    v = tl.load(places, mask=there[:, None] & inside[None, :], other=float("-inf")).to(tl.float32)
                    largest = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        places = out + row.to(tl.int64)[:, None] * columns + at[None, :]
        tl.store(places, largest.to(out.dtype.element_ty), mask=here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=_SIZES)
def backward_sums(
    grad, y, other, saved, weight, bias, g_out, partials, rows, units, rows_each,
    FROM_OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g, what comes in behind the activation, and the sums of g and of g times the normalized y.

    `other` is the output (`FROM_OUTPUT`), or the residual, or absent; `g_out`, where g is written, may be absent.
    """
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    mean = tl.load(saved + at, mask=inside, other=0.0)[None, :]
    invstd = tl.load(saved + columns + at, mask=inside, other=0.0)
    scale = (invstd * _of_columns(weight, at, inside, 1.0))[None, :]
    shift = _of_columns(bias, at, inside, 0.0)[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    tile = lines[:, None] * columns + at[None, :]
    offset = first * columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in tl.range(0, height, ROWS):
        mask = (lines < height - row)[:, None] & inside[None, :]
        g = tl.load(grad + offset + tile, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(y + offset + tile, mask=mask, other=0.0).to(tl.float32) - mean
        if ACTIVATION != "none":
            if FROM_OUTPUT:
                made = tl.load(other + offset + tile, mask=mask, other=0.0).to(tl.float32)
                g = backward_from_output(g, made, ACTIVATION, P0, P1)
            else:
                z = centred * scale + shift
                if other is not None:
                    z += tl.load(other + offset + tile, mask=mask, other=0.0).to(tl.float32)
                g = backward(g, z, ACTIVATION, P0, P1)
        if g_out is not None:
            rounded = g.to(g_out.dtype.element_ty)
            tl.store(g_out + offset + tile, rounded, mask=mask)
            g = rounded.to(tl.float32)
        total += g
        products += g * centred
        offset += ROWS * columns
    partials += tl.program_id(1) * 2 * columns + at
    tl.store(partials, tl.sum(total, axis=0), mask=inside)
    tl.store(partials + columns, tl.sum(products, axis=0) * invstd, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def backward_input(
    grad, y, saved, weight, bias, partials, totals, grad_y, rows, units, rows_each, count,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of y from g, or from what g was made of; adds up `partials` for `totals` unless they are these."""
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    total, products = _added(partials, at, inside, columns, count, BLOCK)
    if BLOCK > 1:
        if tl.program_id(1) == 0:
            tl.store(totals + at, total, mask=inside)
            tl.store(totals + columns + at, products, mask=inside)
    mean = tl.load(saved + at, mask=inside, other=0.0)[None, :]
    invstd = tl.load(saved + columns + at, mask=inside, other=0.0)
    scale = invstd * _of_columns(weight, at, inside, 1.0)
    shift = _of_columns(bias, at, inside, 0.0)[None, :]
    less = (scale * (total / rows))[None, :]
    tilt = (scale * invstd * (products / rows))[None, :]
    scale = scale[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    tile = lines[:, None] * columns + at[None, :]
    offset = first * columns
    for row in tl.range(0, height, ROWS):
        mask = (lines < height - row)[:, None] & inside[None, :]
        g = tl.load(grad + offset + tile, mask=mask, other=0.0).to(tl.float32)
        centred = tl.load(y + offset + tile, mask=mask, other=0.0).to(tl.float32) - mean
        if ACTIVATION != "none":
            g = backward(g, centred * scale + shift, ACTIVATION, P0, P1)
        dy = g * scale - less - centred * tilt
        tl.store(grad_y + offset + tile, dy.to(grad_y.dtype.element_ty), mask=mask)
        offset += ROWS * columns


@triton.jit(do_not_specialize=_SIZES)
def activation_backward(
    grad, other, g_out, partials, rows, units, rows_each,
    FROM_OUTPUT: tl.constexpr, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """g, what comes in behind the activation, and, where there are `partials`, its sums and sums of zeros."""
    columns = units * ALIGN
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    first = tl.program_id(1).to(tl.int64) * rows_each
    height = tl.minimum(rows - first, rows_each).to(tl.int32)
    lines = tl.arange(0, ROWS)
    tile = lines[:, None] * columns + at[None, :]
    offset = first * columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in tl.range(0, height, ROWS):
        mask = (lines < height - row)[:, None] & inside[None, :]
        g = tl.load(grad + offset + tile, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION != "none":
            x = tl.load(other + offset + tile, mask=mask, other=0.0).to(tl.float32)
            if FROM_OUTPUT:
                g = backward_from_output(g, x, ACTIVATION, P0, P1)
            else:
                g = backward(g, x, ACTIVATION, P0, P1)
        if g_out is not None:
            tl.store(g_out + offset + tile, g.to(g_out.dtype.element_ty), mask=mask)
        total += g
        offset += ROWS * columns
    if partials is not None:
        partials += tl.program_id(1) * 2 * columns + at
        tl.store(partials, tl.sum(total, axis=0), mask=inside)
        tl.store(partials + columns, tl.zeros([COLUMNS], tl.float32), mask=inside)

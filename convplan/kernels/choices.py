"""How a matrix of rows and channels is cut into programs: tiles, and how many rows each program walks down.

Plain numbers, no torch, no Triton. The same numbers on every GPU, so that results are the same bits on every GPU of a
kind, and no stopwatch decides: a kernel that is timed at its first call may be a different one in the next process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

TILE_ELEMENTS = 4096  # of a program's one step: 16 a thread, so that several loads of 16 bytes are under way
WIDEST = 64  # columns of a tile: 128 bytes of a row of half
ELEMENTS_PER_WARP = 512
MOST_WARPS = 8
REDUCING_PROGRAMS = 528  # 4 for each of 132 multiprocessors: one wave
FEW_PROGRAMS = 264  # still fill the memory's pipes, where fewer partial sums spare a kernel
PASSING_PROGRAMS = 2112  # four waves of them, so that the last one's end costs little
FEW_PARTIALS = 16  # so many are summed by whoever needs them, more by a kernel of its own
FINISH_ELEMENTS = 4096


class Cut(NamedTuple):
    """One kernel's grid and tiles.

    Args:
        grid: programs across the columns, and down the rows.
        rows_each: rows that a program walks down, a multiple of `block_rows`.
        block_rows, block_columns: a tile; powers of two.
        warps: threads of a program, by 32.
    """

    grid: tuple[int, int]
    rows_each: int
    block_rows: int
    block_columns: int
    warps: int


@lru_cache(maxsize=4096)
def reducing(rows: int, columns: int) -> Cut:
    """For a pass that sums down the rows: as few programs as keep the memory busy."""
    across = _ceil(columns, _block_columns(columns))
    down = max(1, REDUCING_PROGRAMS // across)
    if across * FEW_PARTIALS >= FEW_PROGRAMS - WIDEST // 8:
        down = min(down, FEW_PARTIALS)
    return _cut(rows, columns, down)


@lru_cache(maxsize=4096)
def passing(rows: int, columns: int, partials: int = 1) -> Cut:
    """For a pass that writes as it reads.

    Args:
        rows, columns: of the matrix.
        partials: sums that each program adds up before it begins, which costs less the fewer programs do it.
    """
    programs = PASSING_PROGRAMS if partials == 1 else REDUCING_PROGRAMS
    return _cut(rows, columns, max(1, programs // _ceil(columns, _block_columns(columns))))


@lru_cache(maxsize=4096)
def finishing(partials: int, columns: int) -> Cut:
    """For adding up partial sums: all of a column at once, few columns to a program."""
    block_rows = power_of_two(partials)
    block_columns = min(max(8, FINISH_ELEMENTS // block_rows), 32, power_of_two(columns))
    return Cut(
        (_ceil(columns, block_columns), 1), partials, block_rows, block_columns, _warps(block_rows * block_columns)
    )


def alignment(columns: int) -> int:
    """The largest power of two up to 8 that divides the length of a row, in elements."""
    return min(columns & -columns, 8)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _cut(rows: int, columns: int, down: int) -> Cut:
    block_columns = _block_columns(columns)
    block_rows = min(TILE_ELEMENTS // block_columns, power_of_two(rows))
    rows_each = _ceil(_ceil(rows, block_rows), down) * block_rows
    grid = (_ceil(columns, block_columns), _ceil(rows, rows_each))
    return Cut(grid, rows_each, block_rows, block_columns, _warps(block_rows * block_columns))


def _block_columns(columns: int) -> int:
    return min(WIDEST, power_of_two(columns))


def _warps(elements: int) -> int:
    return min(MOST_WARPS, max(1, elements // ELEMENTS_PER_WARP))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)

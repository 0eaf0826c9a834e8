"""Aligned columns as plain text, at their natural width: nothing is cut, wrapped or coloured.

Rich does the layout. Cells are plain text to it and never markup, since a configuration such as `fft[block=4096]` would
lose its brackets.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Side = Literal["left", "right"]

_GAP = 2  # spaces between columns


def table(columns: Mapping[str, Side], rows: Iterable[Sequence[str]]) -> str:
    """Rows under their headings, without a newline at the end.

    Args:
        columns: headings, each with the side its cells are aligned to; numbers want `right`.
        rows: as many cells as there are headings. Line breaks and control characters become spaces.
    """
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    grid = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for (heading, side), width in zip(columns.items(), widths, strict=True):
        grid.add_column(Text(heading), justify=side, min_width=width, no_wrap=True)
    for row in cells:
        grid.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=sum(widths) + _GAP * len(widths), color_system=None)
    with console.capture() as captured:
        console.print(grid)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def one_line(text: str) -> str:
    """`text` on one line, without characters that move a terminal's cursor or change its colours."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())

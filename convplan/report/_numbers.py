"""Numbers with the unit that leaves one to four digits before the point. An absent number is a dash."""

from __future__ import annotations

ABSENT = "-"

_TIME_UNITS = ((1e6, "s"), (1e3, "ms"), (1.0, "us"))  # microseconds in one unit
_BYTE_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def human_us(microseconds: float | None) -> str:
    """A time given in microseconds: `41.2 us`, `3.4 ms`, `1.25 s`."""
    if microseconds is None:
        return ABSENT
    for size, unit in _TIME_UNITS:
        if abs(microseconds) >= size:
            return f"{microseconds / size:.{2 if unit == 's' else 1}f} {unit}"
    return f"{microseconds:.2f} us"


def human_s(seconds: float | None) -> str:
    """A time given in seconds, worded like `human_us`."""
    return human_us(None if seconds is None else seconds * 1e6)


def human_bytes(count: int | None) -> str:
    """A number of bytes: `0 B`, `512 B`, `96.0 MiB`."""
    if count is None:
        return ABSENT
    for size, unit in _BYTE_UNITS:
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def human_count(count: float) -> str:
    """A number with a decimal prefix for a unit to follow: `80.3 M`, `4.80 T`, `512 `."""
    for size, prefix in _DECIMAL:
        if abs(count) >= size:
            scaled = count / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {prefix}"
    return f"{count:.0f} "

"""All cases of the compatibility suite, by table. They run on the CPU (tests/compat) and on a GPU (tests/gpu)."""

from __future__ import annotations

from helpers import compat_autograd, compat_semantics, compat_settings
from helpers.compat import Case

TABLES: dict[str, list[Case]] = {
    **compat_semantics.TABLES,
    "autograd": compat_autograd.CASES,
    "autocast": compat_settings.AUTOCAST,
    "flags": compat_settings.FLAGS,
}


def cases(device: str) -> list[Case]:
    """The cases that have a meaning on a device."""
    return [case for table in TABLES.values() for case in table if device in case.devices]


def comparisons(device: str, policies: int) -> int:
    """How many times a case is run in both, over its dtypes and the policies it is run under."""
    return sum(len(case.dtypes) * (policies if case.every_policy else 1) for case in cases(device))

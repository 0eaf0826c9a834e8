"""All cases of the compatibility suite, by table. They run on the CPU (tests/compat) and on a GPU (tests/gpu)."""

from __future__ import annotations

from helpers import compat_autograd, compat_semantics, compat_settings, compat_tensors
from helpers.compat import Case

TABLES: dict[str, list[Case]] = {
    **compat_semantics.TABLES,
    "tensors": compat_tensors.CASES,
    "autograd": compat_autograd.CASES,
    "autocast": compat_settings.AUTOCAST,
    "flags": compat_settings.FLAGS,
}


def cases(device: str, *tables: str) -> list[Case]:
    """The cases of some tables, or of all, that have a meaning on a device."""
    return [case for name in tables or TABLES for case in TABLES[name] if device in case.devices]

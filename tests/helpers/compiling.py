"""Compiles `convplan.kernels`' kernels for an H200, which needs none, and prints how each reads and writes, as JSON."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from convplan.kernels import sources

H200 = GPUTarget("cuda", 90, 32)
INTEGERS = ("rows", "units", "rows_each", "count", "rows_of_count", "units_of_out")
INTEGERS += tuple(f"{which}_{dim}" for which in ("in", "out") for dim in ("depth", "height", "width"))
FLOATS = ("partials", "given", "saved", "weight", "bias", "scale", "running_mean", "running_var", "totals")
TENSORS = ("x", "y", "grad", "other", "residual", "out", "g_out", "grad_y")
TYPES = {
    **dict.fromkeys(INTEGERS, "i32"),
    **dict.fromkeys(FLOATS, "*fp32"),
    "momentum": "fp32",
    "eps": "fp32",
    "alpha": "fp32",
    "batches": "*i64",
}
TILE = {"ALIGN": 8, "ROWS": 64, "COLUMNS": 64, "P0": 0.0, "P1": 0.0, "BLOCK": 1, "ACTIVATION": "relu"}
KERNELS: dict[str, dict[str, Any]] = {
    "sums": {},
    "moments": {},
    "finish": {"MOMENTS": True, "BLOCK": 512, "COLUMNS": 8},
    "normalize": {"GIVEN": "sums"},
    "follow": {},
    "place": {},
    "max_pool": {f"{what}_{dim}": 1 if dim == "D" else 2 for what in ("KERNEL", "STRIDE") for dim in "DHW"}
    | {f"PADDING_{dim}": 0 for dim in "DHW"}
    | {f"DILATION_{dim}": 1 for dim in "DHW"},
    "backward_sums": {"FROM_OUTPUT": True},
    "backward_input": {},
    "activation_backward": {"FROM_OUTPUT": True},
}


def compiled(name: str, dtype: str) -> dict[str, int]:
    """How many instructions of each kind read and write, 16 bytes a thread and fewer."""
    kernel = getattr(sources, name)
    values = {**TILE, **KERNELS[name]}
    signature, constants, hints = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
            constants[(place,)] = values[argument]
            continue
        is_tensor = argument in TENSORS and name != "finish"
        signature[argument] = f"*{dtype}" if is_tensor else TYPES.get(argument, "*fp32")
        if signature[argument].startswith("*"):
            hints[(place,)] = [["tt.divisibility", 16]]
    made = compile(ASTSource(kernel, signature, constants, hints), target=H200, options={"num_warps": 8})
    found = {"shared_bytes": made.metadata.shared, "max of nan": len(re.findall(r"\bmax\.NaN\b", made.asm["ptx"]))}
    for what in ("ld", "st"):
        found[f"{what} wide"] = len(re.findall(rf"\b{what}\.global\S*\.v4\.b32", made.asm["ptx"]))
        found[f"{what} all"] = len(re.findall(rf"\b{what}\.global", made.asm["ptx"]))
    return found


if __name__ == "__main__":
    json.dump(
        {f"{name} {dtype}": compiled(name, dtype) for name in KERNELS for dtype in ("fp16", "bf16", "fp32")}, sys.stdout
    )

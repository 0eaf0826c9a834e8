"""Small things every torch-based engine needs: dtypes, output tensors, filling `out`."""

from __future__ import annotations

import torch

from convplan._problem import TensorSpec

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(spec: TensorSpec) -> torch.memory_format | None:
    """The memory format that gives `spec`'s strides; None for layouts torch has no name for."""
    if spec.layout == "contiguous":
        return torch.contiguous_format
    return _CHANNELS_LAST.get(len(spec.dims)) if spec.layout == "channels_last" else None


def empty(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """A new tensor of `spec`, contents undefined."""
    return torch.empty_strided(spec.dims, spec.strides, dtype=TORCH_DTYPES[spec.dtype], device=device)


def deliver(result: torch.Tensor, spec: TensorSpec, out: torch.Tensor | None) -> torch.Tensor:
    """Hand `result` over as the engine protocol asks: in `spec`'s dtype and layout, or copied into `out`."""
    if out is not None:
        return out.copy_(result)
    wanted = memory_format(spec)
    dtype = TORCH_DTYPES[spec.dtype]
    if wanted is not None:
        return result.to(dtype=dtype).contiguous(memory_format=wanted)
    return empty(spec, result.device).copy_(result)

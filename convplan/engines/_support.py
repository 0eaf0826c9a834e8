"""Small things every torch-based engine needs: dtypes, whose problems to refuse, output tensors, filling `out`."""

from __future__ import annotations

import torch

from convplan._environment import matmul_precision
from convplan._problem import DTYPES, FLOAT_DTYPES, Problem, TensorSpec

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int32": torch.int32,
}

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def dtype_refusal(problem: Problem) -> str:
    """Why torch's own arithmetic cannot compute a problem's dtypes; empty when it can.

    Torch has no convolution, product or transform of int8 and fp8 tensors that sums as a `Problem` asks (B4).
    """
    if problem.dtype in FLOAT_DTYPES:
        return ""
    return f"inputs are {problem.dtype}, supported: {', '.join(FLOAT_DTYPES)}"


def onednn_misreads(problem: Problem) -> bool:
    """Whether oneDNN computes the cross-correlation of a problem's two inputs wrongly, in their own dtype.

    On processors with AMX it reads past a bfloat16 input that is one plane deep where a 3-D filter is deeper: garbage,
    and at times a crash (oneDNN 3.12, in torch 2.13 and 2.14; not with ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16). The case
    `3d-one-plane` of the tests shows it. Such problems are rare and small, so that no processor is asked about.
    """
    first, second = problem.inputs
    return (
        (problem.device, problem.dtype, problem.spatial_rank) == ("cpu", "bfloat16", 3)
        and problem.op != "wgrad"
        and first.dims[2] == 1 < second.dims[2]
    )


def may_use_tf32(problem: Problem) -> bool:
    """Whether torch's products of float32 matrices may round their factors to TF32 on the problem's device now."""
    cuda_float32 = problem.device == "cuda" and problem.dtype == "float32"
    return cuda_float32 and matmul_precision("cuda") != "highest"


def in_range(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Float `values` with those that an integer or fp8 type cannot hold at its nearest end; rounded for integers.

    Torch's own conversion wraps integers around, and turns what is too large for fp8 into NaN or infinity.
    """
    info = DTYPES[dtype]
    if dtype in FLOAT_DTYPES:
        return values
    return (values.round() if info.is_integer else values).clamp(-info.largest - info.is_integer, info.largest)


def memory_format(spec: TensorSpec) -> torch.memory_format | None:
    """The memory format that gives `spec`'s strides; None for layouts torch has no name for."""
    if spec.layout == "contiguous":
        return torch.contiguous_format
    return _CHANNELS_LAST.get(len(spec.dims)) if spec.layout == "channels_last" else None


def empty(spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """A new tensor of `spec`, contents undefined."""
    return torch.empty_strided(spec.dims, spec.strides, dtype=TORCH_DTYPES[spec.dtype], device=device)


def deliver(result: torch.Tensor, spec: TensorSpec, out: torch.Tensor | None) -> torch.Tensor:
    """Hand `result` over as the engine protocol asks: in `spec`'s dtype and layout, or copied into `out`.

    A floating-point result saturates where `spec`'s dtype is an integer or fp8 one.
    """
    if result.is_floating_point() and result.dtype != TORCH_DTYPES[spec.dtype]:
        result = in_range(result, spec.dtype)
    if out is not None:
        return out.copy_(result)
    wanted = memory_format(spec)
    dtype = TORCH_DTYPES[spec.dtype]
    if wanted is not None:
        return result.to(dtype=dtype).contiguous(memory_format=wanted)
    return empty(spec, result.device).copy_(result)

"""Torch's settings that candidates' times and results depend on: read in one process, made the same in another."""

from __future__ import annotations

import msgspec
import torch

from convplan import _environment
from convplan._policy import torch_flags


class TorchState(msgspec.Struct, frozen=True):
    """The settings. `conv_precision` is oneDNN's, "none" where torch has no such setting."""

    threads: int
    onednn: bool
    matmul_precision: str
    conv_precision: str
    deterministic_algorithms: bool
    cudnn_deterministic: bool
    allow_tf32: bool


def torch_state() -> TorchState:
    """Torch's settings in this process."""
    threads, onednn, matmul_precision, conv_precision = _environment.live_state()
    return TorchState(
        threads=threads,
        onednn=onednn,
        matmul_precision=matmul_precision,
        conv_precision=conv_precision,
        deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
        cudnn_deterministic=torch.backends.cudnn.deterministic,
        allow_tf32=torch_flags().allow_tf32,
    )


def adopt_torch_state(wanted: TorchState) -> None:
    """Make torch's settings those, touching only what differs: some setters forbid others afterwards."""
    here = torch_state()
    if here.threads != wanted.threads:
        torch.set_num_threads(wanted.threads)
    if here.onednn != wanted.onednn:
        torch._C._set_mkldnn_enabled(wanted.onednn)
    if here.matmul_precision != wanted.matmul_precision:
        torch.set_float32_matmul_precision(wanted.matmul_precision)
    setter = getattr(torch._C, "_set_fp32_precision_setter", None)
    if setter is not None and here.conv_precision != wanted.conv_precision:
        setter("mkldnn", "conv", wanted.conv_precision)
    if here.allow_tf32 != wanted.allow_tf32:
        if setter is not None:
            setter("cuda", "conv", "tf32" if wanted.allow_tf32 else "ieee")
        else:
            torch.backends.cudnn.allow_tf32 = wanted.allow_tf32
    if here.deterministic_algorithms != wanted.deterministic_algorithms:
        torch.use_deterministic_algorithms(wanted.deterministic_algorithms)  # imports torch's compiler: seconds
    if here.cudnn_deterministic != wanted.cudnn_deterministic:
        torch.backends.cudnn.deterministic = wanted.cudnn_deterministic

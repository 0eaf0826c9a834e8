"""What users hand to convplan's functions, judged and put in one form; and torch's own convolution for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from convplan._errors import SpecError
from convplan._plan import check_distinct
from convplan._problem import TensorSpec, padding_pairs, per_dim
from convplan.engines.base import Run
from convplan.torch_ops.adapter import DTYPE_NAMES, ConvArgs

_any_autocast = torch._C._is_any_autocast_enabled
_autocast_dtype = torch.get_autocast_dtype

Tensor = torch.Tensor
Ints = int | Sequence[int]
Padding = int | Literal["same", "valid"] | Sequence[int | Sequence[int]]
Arguments = tuple[Ints, Padding, Ints, bool, Ints, int]
"""Stride, padding, dilation, transposed, output_padding and groups, as they came."""


def cast_for_autocast(*tensors: Tensor | None) -> Any:
    """Cast as torch's convolutions do under autocast: everything floating to its dtype, float64 left alone."""
    assert tensors[0] is not None
    dtype = _autocast_dtype(tensors[0].device.type)
    return tuple([one if one is None or one.dtype is dtype else _cast(one, dtype) for one in tensors])


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def hashable(value: object) -> object:
    """Lists inside lists as tuples; anything else as it is, for `arguments` to judge."""
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


def check_ranks(spatial: int, input: Tensor, weight: Tensor) -> bool:
    """Whether the input has a batch.

    Raises:
        SpecError: input or weight has too many dimensions, or too few.
    """
    if input.dim() not in (spatial + 1, spatial + 2) or weight.dim() != spatial + 2:
        raise SpecError(
            f"input has {input.dim()} dimensions and weight {weight.dim()}, expected {spatial + 2} each "
            f"(or {spatial + 1} for an input without batch): input {tuple(input.shape)}, weight {tuple(weight.shape)}"
        )
    return input.dim() == spatial + 2


def arguments(
    spatial: int,
    weight: Tensor,
    stride: Ints,
    padding: Padding,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> ConvArgs:
    """The arguments as a user writes them, in one form.

    Raises:
        SpecError: values that no convolution takes.
    """
    steps, dilations = per_dim("stride", stride, spatial), per_dim("dilation", dilation, spatial)
    outer = per_dim("output_padding", output_padding, spatial)
    for name, values in (("stride", steps), ("dilation", dilations)):
        if min(values) < 1:
            raise SpecError(f"{name} is {values}, expected values >= 1")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise SpecError(f"groups is {groups!r}, expected an integer >= 1")
    for extra, step, dil in zip(outer, steps, dilations, strict=True):
        if not 0 <= extra < max(step, dil) and transposed:
            limit = max(step, dil)
            raise SpecError(f"output_padding is {outer}, expected 0 <= value < max(stride, dilation) = {limit}")
    pads = _pads(padding, weight.shape[2:], steps, dilations, transposed)
    return ConvArgs(steps, pads, dilations, transposed, outer, groups)


def _pads(
    padding: Padding, taps: Sequence[int], stride: Sequence[int], dilation: Sequence[int], transposed: bool
) -> tuple[tuple[int, int], ...]:
    if not isinstance(padding, str):
        return padding_pairs(padding, len(taps))
    if padding == "valid" and not transposed:
        return ((0, 0),) * len(taps)
    if padding != "same" or transposed:
        raise SpecError(
            f"padding is {padding!r}, expected numbers or pairs" + ("" if transposed else ", 'same' or 'valid'")
        )
    if max(stride) > 1:
        raise SpecError(f"padding is 'same' and stride {tuple(stride)}, expected stride 1 in every dimension")
    total = [dil * (size - 1) for dil, size in zip(dilation, taps, strict=True)]
    return tuple((both // 2, both - both // 2) for both in total)


def through_torch(spatial: int, raw: Arguments) -> Run:
    """Torch's own convolution, for tensors and arguments that convplan does not plan; padded beforehand if need be."""
    stride, padding, dilation, transposed, output_padding, groups = raw

    def run(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        args = arguments(spatial, weight, stride, padding, dilation, transposed, output_padding, groups)
        pads = [before for before, _ in args.padding]
        if not args.is_symmetric:
            if transposed:
                raise SpecError(f"padding is {args.padding}, expected the same before and after for these tensors")
            flat = [side for pair in reversed(args.padding) for side in pair]
            input, pads = torch.nn.functional.pad(input, flat), [0] * spatial
        x = input.unsqueeze(0) if input.dim() == spatial + 1 else input
        result = torch.convolution(
            x, weight, bias, list(args.stride), pads, list(args.dilation), transposed, list(args.output_padding), groups
        )
        result = result if x is input else result.squeeze(0)
        return result if out is None else out.copy_(result)

    return run


def without_autocast(run: Run, device: str) -> Run:
    """Casting is done by now, and what engines compute in is theirs to say."""

    def run_plainly(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if not _any_autocast():
            return run(input, weight, bias, out)
        with torch.autocast(device, enabled=False):
            return run(input, weight, bias, out)

    return run_plainly


def refuse_out(out: Tensor | None) -> None:
    """Raises SpecError: there is an `out`, where a gradient is asked for."""
    if out is not None:
        raise SpecError("out= is given and a tensor requires a gradient; expected out=None, or torch.no_grad()")


def check_out(out: Tensor, spec: TensorSpec, device: torch.device) -> None:
    """Look at an `out` before anything is written.

    Raises:
        SpecError: it has another shape or dtype, lies elsewhere, or some of its elements share memory.
    """
    check_distinct(out)
    if tuple(out.shape) != spec.dims or DTYPE_NAMES.get(out.dtype) != spec.dtype or out.device != device:
        found, expected = (
            f"{tuple(out.shape)} {out.dtype} on {out.device}",
            f"{spec.dims} torch.{spec.dtype} on {device}",
        )
        raise SpecError(f"out is {found}, expected {expected}")

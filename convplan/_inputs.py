"""Tensors to plan with: made up, never the caller's, in exactly the layout, dtype and alignment of the problem.

Random ones for timing and for comparing with tolerance; small integers whose sums no rounding can touch, for comparing
exactly. Seeds are fixed, so planning a problem twice sees the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from convplan._problem import DTYPES, MAX_ALIGNMENT_BYTES, Problem, TensorSpec
from convplan.engines._support import TORCH_DTYPES

BASE_ALIGNMENT_BYTES = 64  # of torch's CPU allocator; its CUDA allocator aligns to 512
LARGEST_INTEGER = 2

Fill = Callable[[torch.Tensor], object]


class Inputs(NamedTuple):
    """The arguments of `Plan.run` for one problem."""

    first: torch.Tensor
    second: torch.Tensor
    bias: torch.Tensor | None


def random_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Normally distributed numbers, mean 0 and variance 1."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return _make(problem, device, lambda flat: flat.normal_(generator=generator))


def integer_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Integers from -2 to 2, with so many zeros that typical sums stay exact in the problem's dtype.

    A sum of n products of such numbers is exact in any order while the sum of their magnitudes stays at or below
    2**significand_bits. The share of non-zeros is chosen for a quarter of that.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    room = 2.0 ** DTYPES[problem.dtype].significand_bits / 4
    mean_magnitude = 1.5  # of the non-zeros
    share = min(1.0, math.sqrt(room / max(problem.n_terms, 1)) / mean_magnitude)

    def fill(flat: torch.Tensor) -> None:
        magnitude = torch.randint(1, LARGEST_INTEGER + 1, flat.shape, generator=generator, device=device)
        sign = torch.randint(0, 2, flat.shape, generator=generator, device=device) * 2 - 1
        keep = torch.rand(flat.shape, generator=generator, device=device) < share
        flat.copy_(magnitude * sign * keep)

    return _make(problem, device, fill)


def _make(problem: Problem, device: torch.device, fill: Fill) -> Inputs:
    first, second = (_tensor(spec, device, fill) for spec in problem.inputs)
    bias = None
    if problem.epilogue.bias:
        bias = torch.empty(problem.output.dims[1], dtype=TORCH_DTYPES[problem.dtype], device=device)
        fill(bias)
    return Inputs(first, second, bias)


def _tensor(spec: TensorSpec, device: torch.device, fill: Fill) -> torch.Tensor:
    dtype = TORCH_DTYPES[spec.dtype]
    itemsize = DTYPES[spec.dtype].itemsize_bytes
    # Off by the spec's own alignment from a well-aligned base gives exactly that alignment, and none larger.
    offset = 0 if spec.alignment_bytes == MAX_ALIGNMENT_BYTES else max(spec.alignment_bytes // itemsize, 1)
    flat = torch.empty(offset + max(spec.storage_elements, 1), dtype=dtype, device=device)
    fill(flat)
    return flat.as_strided(spec.dims, spec.strides, offset)

"""Tensors to plan with: made up, never the caller's, in exactly the layout, dtype and alignment of the problem.

Random ones for timing and for comparing with tolerance, with outputs that stay in their type's range; small integers
whose sums no rounding can touch, for comparing exactly. For int8 both are integers, and exact. Seeds are fixed, so
planning a problem twice sees the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from convplan._epilogue import MAX_ALIGNMENT_BYTES
from convplan._problem import DTYPES, Problem, TensorSpec
from convplan.engines._support import TORCH_DTYPES
from convplan.engines.base import Run

BASE_ALIGNMENT_BYTES = 64  # of torch's CPU allocator; its CUDA allocator aligns to 512
LARGEST_INTEGER = 2
ONE_ZERO_IN = 7  # numbers of a gate
RANGE_SHARE = 1 / 8  # of the largest number of the output's type: standard deviation of the outputs, at most

# Significand bits that are kept of a running sum, where hardware keeps fewer than the accumulating type has: tensor
# cores of the Hopper generation sum fp8 products in 1 + 8 + 13 bits ("Some Matrix Multiplication Engines Are Not As
# Accurate As We Thought", PyTorch blog).
SUM_BITS = {"float8_e4m3fn": 14, "float8_e5m2": 14}

Fill = Callable[[torch.Tensor], object]


class Inputs(NamedTuple):
    """The arguments of `Plan.run` for one problem."""

    first: torch.Tensor
    second: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    plain: bool = True  # whether the problem's epilogue is
    sums: torch.Tensor | None = None  # written, where the epilogue has statistics
    gate: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those to read that there are, in order."""
        return [one for one in (*self[:5], self.gate) if one is not None]

    def given_to(self, run: Run, out: torch.Tensor | None = None) -> torch.Tensor:
        """What a built candidate makes of them."""
        if self.plain:
            return run(self.first, self.second, self.bias, out)
        beside = self.gate if self.sums is None else self.sums
        if beside is None:
            return run(self.first, self.second, self.bias, out, self.residual, self.scale)
        return run(self.first, self.second, self.bias, out, self.residual, self.scale, beside)

    def forget_sums(self) -> None:
        """Make of the statistics, if there are any, what no right ones are."""
        if self.sums is not None:
            self.sums.fill_(math.nan)

    def copy(self) -> Inputs:
        """The same numbers in memory of their own, with the same strides and alignment."""
        bias, residual, scale, *beside = (None if one is None else _copied(one) for one in (*self[2:5], *self[6:]))
        return Inputs(_copied(self.first), _copied(self.second), bias, residual, scale, self.plain, *beside)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0).clone()
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def exact_limit(problem: Problem) -> float:
    """Integer sums are exact, in any order, while the sum of their products' magnitudes stays at or below this."""
    limit = min(DTYPES[problem.output_dtype].exact_to, DTYPES[DTYPES[problem.dtype].accumulate].exact_to)
    return min(limit, 2.0 ** SUM_BITS[problem.dtype]) if problem.dtype in SUM_BITS else limit


def random_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Normally distributed numbers of mean 0, or for int8 integers.

    Variance is 1, and less where outputs would leave the range of their type: with n products summed, each output's
    standard deviation is at most `RANGE_SHARE` of the largest number. Integers are so small that all sums are exact;
    where that would leave nothing above 2, they are those of `integer_inputs`.
    """
    if DTYPES[problem.dtype].is_integer:
        return _random_integers(problem, device, seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    room = RANGE_SHARE * DTYPES[problem.output_dtype].largest
    scale = min(1.0, math.sqrt(room / math.sqrt(max(problem.n_terms, 1))))

    def fill(flat: torch.Tensor) -> None:
        if flat.dtype.itemsize > 1:
            flat.normal_(generator=generator)
            if scale < 1:
                flat.mul_(scale)
        else:  # torch draws no fp8 numbers
            flat.copy_(torch.randn(flat.shape, generator=generator, device=device).mul_(scale))

    return _make(problem, device, fill)


def _random_integers(problem: Problem, device: torch.device, seed: int) -> Inputs:
    with_bias = problem.n_terms + 1
    largest = int(min(DTYPES[problem.dtype].largest, math.sqrt(exact_limit(problem) / with_bias)))
    if largest <= LARGEST_INTEGER:
        return integer_inputs(problem, device, seed)
    generator = torch.Generator(device=device).manual_seed(seed)

    def fill(flat: torch.Tensor) -> None:
        drawn = torch.randint(-largest, largest + 1, flat.shape, generator=generator, device=device, dtype=torch.int8)
        flat.copy_(drawn)

    return _make(problem, device, fill)


def integer_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Integers from -2 to 2, with so many zeros that typical sums stay exact in the problem's dtypes.

    A sum of products of such numbers is exact in any order while the sum of their magnitudes stays at or below
    `exact_limit`. The share of non-zeros is chosen for a quarter of that.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    room = exact_limit(problem) / 4
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
    epilogue, channels = problem.epilogue, (problem.output.dims[1],)
    bias = residual = scale = None
    if epilogue.bias:
        bias = _vector(channels, problem.bias_dtype, epilogue.bias_alignment_bytes, device, fill)
    if epilogue.residual:
        aligned = msgspec.structs.replace(problem.output, alignment_bytes=epilogue.residual_alignment_bytes)
        residual = _tensor(aligned, device, fill)
    if epilogue.scale:
        scale = _vector(channels, problem.scale_dtype, MAX_ALIGNMENT_BYTES, device, fill)
    sums = torch.zeros(2, *channels, dtype=torch.float32, device=device) if epilogue.statistics else None
    gate = _gate(problem.output, device, fill) if epilogue.gate else None
    return Inputs(first, second, bias, residual, scale, epilogue.is_plain, sums, gate)


def _gate(output: TensorSpec, device: torch.device, fill: Fill) -> torch.Tensor:
    """Numbers of both signs, and zeros."""

    def fill_with_zeros(flat: torch.Tensor) -> None:
        fill(flat)
        flat[::ONE_ZERO_IN] = 0

    return _tensor(msgspec.structs.replace(output, alignment_bytes=MAX_ALIGNMENT_BYTES), device, fill_with_zeros)


def _vector(dims: tuple[int], dtype: str, alignment_bytes: int, device: torch.device, fill: Fill) -> torch.Tensor:
    spec = TensorSpec((1, *dims, 1), (dims[0], 1, 1), dtype, alignment_bytes)
    return _tensor(spec, device, fill).view(dims)


def _tensor(spec: TensorSpec, device: torch.device, fill: Fill) -> torch.Tensor:
    dtype = TORCH_DTYPES[spec.dtype]
    itemsize = DTYPES[spec.dtype].itemsize_bytes
    # Off by the spec's own alignment from a well-aligned base gives exactly that alignment, and none larger.
    offset = 0 if spec.alignment_bytes == MAX_ALIGNMENT_BYTES else max(spec.alignment_bytes // itemsize, 1)
    flat = torch.empty(offset + max(spec.storage_elements, 1), dtype=dtype, device=device)
    fill(flat)
    return flat.as_strided(spec.dims, spec.strides, offset)

"""What the right answer is, and how far from it rounding may lead: a plain loop over filter taps in float64 on the CPU.

It uses slices, products and sums of torch tensors, and nothing from the package but the description of the problem: no
convolution, no matrix product, no FFT. Accepted per output, n being the number of products summed:

    eps(output) * |ref|  +  factor * sqrt(n) * eps(accumulate) * conv(|x|, |w|)

with factor 1 for direct methods. A transform's error spreads evenly over all its outputs, so for those conv(|x|, |w|)
is replaced by its largest value over the output, and `TRANSFORM_FACTORS` says how much more a method may lose.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from convplan._problem import DTYPES, Problem, TensorSpec
from convplan.engines.base import Notes

# FFT: about log2(transform length) roundings per number, three transforms. Winograd: the constants of F(4, 3).
TRANSFORM_FACTORS = {"FFT": 8.0, "WINOGRAD": 16.0}


class Inputs(NamedTuple):
    """Arguments of a built plan: the problem's two inputs and, where it has one, the bias."""

    first: torch.Tensor
    second: torch.Tensor
    bias: torch.Tensor | None


class Answer(NamedTuple):
    """Per output, in float64: the sum, the sum of magnitudes, and what direct summing may be off by."""

    reference: torch.Tensor
    magnitude: torch.Tensor
    bound: torch.Tensor


def make_inputs(problem: Problem, seed: int) -> Inputs:
    """Normally distributed tensors with the problem's dims, strides, dtype and alignment."""
    generator = torch.Generator().manual_seed(seed)
    return _make(problem, lambda size: torch.randn(size, generator=generator, dtype=torch.float64))


def small_integers(problem: Problem, seed: int) -> Inputs:
    """Integers from -2 to 2: every sum of their products is exact in the accumulating type."""
    generator = torch.Generator().manual_seed(seed)
    assert 4 * problem.n_terms + 2 < 2 ** DTYPES[DTYPES[problem.dtype].accumulate].significand_bits
    return _make(problem, lambda size: torch.randint(-2, 3, (size,), generator=generator))


def _make(problem: Problem, numbers) -> Inputs:  # type: ignore[no-untyped-def]
    first, second = (_tensor(spec, numbers) for spec in problem.inputs)
    bias = None
    if problem.epilogue.bias:
        bias = numbers(problem.output.dims[1]).to(getattr(torch, problem.output_dtype))
    return Inputs(first, second, bias)


def _tensor(spec: TensorSpec, numbers) -> torch.Tensor:  # type: ignore[no-untyped-def]
    itemsize = DTYPES[spec.dtype].itemsize_bytes
    skipped = 0 if spec.alignment_bytes == 32 else max(1, spec.alignment_bytes // itemsize)
    flat = numbers(skipped + spec.storage_elements).to(getattr(torch, spec.dtype))
    return flat.as_strided(spec.dims, spec.strides, skipped)


def answer(problem: Problem, inputs: Inputs) -> Answer:
    """The right output with the bound that every direct method keeps."""
    first, second = inputs.first.double(), inputs.second.double()
    reference, magnitude = convolve(problem, first, second), convolve(problem, first.abs(), second.abs())
    if inputs.bias is not None:
        bias = inputs.bias.double().reshape(1, -1, *[1] * problem.spatial_rank)
        reference, magnitude = reference + bias, magnitude + bias.abs()
    return Answer(reference, magnitude, _bound(problem, reference, magnitude))


def bound_for(problem: Problem, right: Answer, notes: Notes) -> torch.Tensor:
    """The bound for a candidate with these notes."""
    factor = max((TRANSFORM_FACTORS.get(note, 1.0) for note in notes.numerical), default=1.0)
    if notes.direct:
        return right.bound
    return _bound(problem, right.reference, right.magnitude.max() * factor)


def _bound(problem: Problem, reference: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    rounded, summed = (_eps(name) for name in (problem.output_dtype, DTYPES[problem.dtype].accumulate))
    if summed == 0.0:  # integers: what is right is exact, also as float32
        return torch.zeros_like(reference)
    terms = problem.n_terms + problem.epilogue.bias
    return rounded * reference.abs() + math.sqrt(terms) * summed * magnitude


def _eps(dtype: str) -> float:
    """Distance from 1 to the next number; float16's smallest numbers are further apart, but no case gets near them."""
    found = getattr(torch, dtype)
    return torch.finfo(found).eps if found.is_floating_point else 0.0


def convolve(problem: Problem, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The problem's sum of products, tap by tap, without bias, in the dtype of its arguments."""
    groups = problem.groups
    samples, channels = problem.x.dims[:2]
    filters = problem.w.dims[0]
    before = [pair[0] for pair in problem.padding]
    padded_sizes = [size + sum(pair) for size, pair in zip(problem.x.dims[2:], problem.padding, strict=True)]
    inside = (..., *(slice(b, b + size) for b, size in zip(before, problem.x.dims[2:], strict=True)))

    padded = first.new_zeros((samples, groups, channels // groups, *padded_sizes))
    if problem.op != "dgrad":
        padded[inside] = _grouped(first, 1, groups)
    w = first.new_zeros(problem.w.dims) if problem.op == "wgrad" else second
    w = _grouped(w, 0, groups)  # (G, K/G, C/G, taps)
    y = {"fprop": None, "dgrad": first, "wgrad": second}[problem.op]
    y = first.new_zeros(problem.y.dims) if y is None else y
    y = _grouped(y, 1, groups)  # (N, G, K/G, out)

    unit = (1,) * problem.spatial_rank
    for tap in itertools.product(*map(range, problem.w.dims[2:])):
        at = (
            ...,
            *(
                slice(t * dil, t * dil + (out - 1) * step + 1, step)
                for t, dil, out, step in zip(tap, problem.dilation, problem.y.dims[2:], problem.stride, strict=True)
            ),
        )
        for k, c in itertools.product(range(filters // groups), range(channels // groups)):
            factor = w[(slice(None), k, c, *tap)].reshape(1, groups, *unit)
            if problem.op == "fprop":
                y[:, :, k] += padded[:, :, c][at] * factor
            elif problem.op == "dgrad":
                padded[:, :, c][at] += y[:, :, k] * factor
            else:
                products = padded[:, :, c][at] * y[:, :, k]
                w[(slice(None), k, c, *tap)] = products.sum((0, *range(2, products.dim())))
    result = {"fprop": y, "dgrad": padded[inside], "wgrad": w}[problem.op]
    return result.reshape(problem.output.dims)


def _grouped(tensor: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    return tensor.unflatten(dim, (groups, -1))


def worst(result: torch.Tensor, right: Answer, bound: torch.Tensor) -> float:
    """The largest error over what is accepted: 1 is the limit. NaN and infinity count as infinitely wrong."""
    error = (result.double() - right.reference).abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return float(torch.nan_to_num(ratio, nan=math.inf, posinf=math.inf).max())

"""Is a candidate's output right? Compared in float64 with sums formed straight from the definition. No timing here.

The reference gathers, for chosen outputs, every product that the definition sums and adds them up in float64: it
shares no code and no method with any engine. Small problems are compared in full. In large ones a sample (corners and
random places) is compared with the reference, and *every* element with the first candidate that passed: where two
candidates disagree by more than both may err, the reference is evaluated at those very places and says which one is
wrong.

Tolerance follows the arithmetic, per output, n being the number of products summed:

    eps(dtype) * |ref| + factor * sqrt(n) * eps(accumulate) * conv(|x|, |w|)

`factor` is 1 for direct methods. Transform methods spread their error evenly over a whole transform instead of in
proportion to each output, so they get the largest conv(|x|, |w|) of the output in place of each one's own, and a factor
of their own (`METHOD_FACTORS`). Small-integer inputs have no rounding at all, and direct methods must match exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from convplan._errors import WrongResult
from convplan._inputs import Inputs, integer_inputs, random_inputs
from convplan._problem import DTYPES, Problem
from convplan.engines._support import TORCH_DTYPES
from convplan.engines.base import EngineConfig, Notes, Run

Scope = Literal["full", "sample"]

METHOD_FACTORS = {"FFT": 8.0, "WINOGRAD": 16.0}  # largest seen over the test cases: 1.2 for FFT
GATHER_ELEMENTS = 4_000_000  # numbers gathered for one reference: 32 MB a tensor, about 50 ms
FULL_ELEMENTS = 8_000_000  # up to here every output is compared
REFERENCE_FLOPS = 5e8
MIN_POSITIONS = 16
ARBITRATED = 32  # places looked at where two candidates disagree


class Values(NamedTuple):
    """Reference at some positions: sums, and sums of magnitudes, both float64."""

    sums: torch.Tensor
    magnitudes: torch.Tensor


class Reference:
    """Evaluates one problem on given inputs at chosen outputs, from the definition, in float64.

    A position is a row (n, spatial…) with all channels for fprop and dgrad, and (k, c, taps…) for wgrad.
    """

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem = problem
        self._inputs = inputs
        self._device = inputs.first.device
        self._taps = self._grid(problem.w.dims[2:])  # (T, spatial)

    def _grid(self, sizes: Sequence[int]) -> torch.Tensor:
        axes = [torch.arange(size, device=self._device) for size in sizes]
        return torch.cartesian_prod(*axes).reshape(-1, len(sizes))

    def _row(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=self._device, dtype=torch.int64)

    def at(self, positions: torch.Tensor) -> Values:
        """Values at `positions` (P, rank); shape (P, channels) for fprop and dgrad, (P,) for wgrad."""
        if self.problem.op == "wgrad":
            return self._wgrad(positions)
        values = self._fprop(positions) if self.problem.op == "fprop" else self._dgrad(positions)
        bias = self._inputs.bias
        if bias is None:
            return values
        wide = bias.double()
        return Values(values.sums + wide, values.magnitudes + wide.abs())

    def _fprop(self, positions: torch.Tensor) -> Values:
        p, groups = self.problem, self.problem.groups
        step, dil = self._row(p.stride), self._row(p.dilation)
        before = self._row([pair[0] for pair in p.padding])
        where = positions[:, None, 1:] * step - before + self._taps * dil  # (P, T, spatial)
        x = self._gather(self._inputs.first, positions[:, 0], where)  # (P, C, T)
        x = x.reshape(len(positions), groups, -1).transpose(0, 1)  # (g, P, C/g*T)
        w = self._inputs.second.double().reshape(groups, p.w.dims[0] // groups, -1).transpose(1, 2)
        return _products(x, w)

    def _dgrad(self, positions: torch.Tensor) -> Values:
        p, groups = self.problem, self.problem.groups
        step, dil = self._row(p.stride), self._row(p.dilation)
        before = self._row([pair[0] for pair in p.padding])
        shifted = positions[:, None, 1:] + before - self._taps * dil  # (P, T, spatial)
        where = torch.where(shifted % step == 0, shifted.div(step, rounding_mode="floor"), -1)
        y = self._gather(self._inputs.first, positions[:, 0], where)  # (P, K, T)
        y = y.reshape(len(positions), groups, -1).transpose(0, 1)  # (g, P, K/g*T)
        filters, channels = p.w.dims[0] // groups, p.w.dims[1]
        w = self._inputs.second.double().reshape(groups, filters, channels, -1).transpose(2, 3)
        return _products(y, w.reshape(groups, -1, channels))

    def _wgrad(self, positions: torch.Tensor) -> Values:
        p = self.problem
        step, dil = self._row(p.stride), self._row(p.dilation)
        before = self._row([pair[0] for pair in p.padding])
        outputs = self._grid((p.y.dims[0], *p.y.dims[2:]))  # (M, 1 + spatial)
        sums, magnitudes = [], []
        for k, c, *taps in positions.tolist():
            channel = k // (p.w.dims[0] // p.groups) * p.w.dims[1] + c
            where = outputs[:, 1:] * step + (self._row(taps) * dil - before)  # (M, spatial)
            inside = ((where >= 0) & (where < self._row(p.x.dims[2:]))).all(1)
            places = (outputs[:, 0], channel, *where.clamp(min=0).minimum(self._row(p.x.dims[2:]) - 1).unbind(1))
            x = self._inputs.first[places].double() * inside
            products = x * self._inputs.second[:, k].reshape(-1).double()
            sums.append(products.sum())
            magnitudes.append(products.abs().sum())
        return Values(torch.stack(sums), torch.stack(magnitudes))

    def _gather(self, tensor: torch.Tensor, samples: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Values (P, channels, T) of `tensor` at spatial places `where` (P, T, spatial); zero outside of it."""
        sizes = self._row(tensor.shape[2:])
        inside = ((where >= 0) & (where < sizes)).all(-1)
        places = where.clamp(min=0).minimum(sizes - 1)
        strides = self._row(tensor.stride())
        offsets = samples[:, None] * strides[0] + (places * strides[2:]).sum(-1)  # (P, T)
        channels = torch.arange(tensor.shape[1], device=self._device) * strides[1]
        flat = tensor.as_strided((_span(tensor),), (1,), tensor.storage_offset())
        picked = flat[offsets[:, None, :] + channels[None, :, None]]
        return picked.double() * inside[:, None, :]

    def choose(self, seed: int = 0) -> tuple[torch.Tensor, Scope]:
        """Positions to compare: all of them when that is cheap, else corners and random ones."""
        p = self.problem
        dims = p.w.dims if p.op == "wgrad" else (p.output.dims[0], *p.output.dims[2:])
        total = math.prod(dims)
        gathered, flops = self._cost_of_one()
        if total * gathered <= FULL_ELEMENTS and total * flops <= REFERENCE_FLOPS:
            return self._grid(dims), "full"
        count = int(min(total, max(MIN_POSITIONS, min(GATHER_ELEMENTS / gathered, REFERENCE_FLOPS / flops))))
        generator = torch.Generator().manual_seed(seed)
        random = torch.stack([torch.randint(0, size, (count,), generator=generator) for size in dims], 1)
        corners = torch.tensor(list(itertools.product(*({0, size - 1} for size in dims)))[: max(count // 2, 4)])
        return torch.cat([corners, random])[:count].unique(dim=0).to(self._device), "sample"

    def _cost_of_one(self) -> tuple[int, int]:
        """Elements gathered and operations done for one position."""
        p, taps = self.problem, math.prod(self.problem.w.dims[2:])
        if p.op == "wgrad":
            return 2 * p.n_terms, 4 * p.n_terms
        channels = p.x.dims[1] if p.op == "fprop" else p.y.dims[1]
        return channels * taps, 4 * p.n_terms * p.output.dims[1]


def _span(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _products(left: torch.Tensor, right: torch.Tensor) -> Values:
    """(g, P, m) times (g, m, channels/g), as (P, channels), with the same of magnitudes."""
    sums, magnitudes = left @ right, left.abs() @ right.abs()
    return Values(sums.transpose(0, 1).flatten(1), magnitudes.transpose(0, 1).flatten(1))


class Verifier:
    """Checks the candidates of one problem, one after the other. Computes the references once, when first needed."""

    def __init__(self, problem: Problem, device: torch.device, seed: int = 0) -> None:
        self.problem = problem
        self.random = random_inputs(problem, device, seed)
        self._reference = Reference(problem, self.random)
        self._positions, self.scope = self._reference.choose(seed)
        self._device, self._seed = device, seed
        self._values: Values | None = None
        self._integers: tuple[Inputs, torch.Tensor, torch.Tensor] | None = None
        self._kept = [tensor.clone() for tensor in self.random if tensor is not None]
        self._last_out: torch.Tensor | None = None
        self._trusted: tuple[EngineConfig, Notes, torch.Tensor] | None = None
        self.condemned: dict[EngineConfig, str] = {}

    def check(self, config: EngineConfig, notes: Notes, out: torch.Tensor) -> float:
        """Compare an output on `self.random`, which must still hold what it held.

        Returns:
            Largest error over the error allowed, among the outputs compared with the reference; at most 1.

        Raises:
            WrongResult: it is wrong; the reason names the place, the value found and the value expected.
        """
        self._check_form(config, out)
        self._last_out = out
        if self._values is None:
            self._values = self._reference.at(self._positions)
        error = self._compare(config, notes, self._pick(out, self._positions), self._values, self._positions)
        if self.scope == "sample":
            self._check_against_trusted(config, notes, out)
        return error

    def check_exactly(self, config: EngineConfig, run: Run) -> None:
        """Run a direct method on small integers and compare bit for bit, wherever sums cannot round.

        Raises:
            WrongResult: an output differs, or a second run changed or shares the first one's output.
        """
        if self._integers is None:
            inputs = integer_inputs(self.problem, self._device, self._seed + 1)
            values = Reference(self.problem, inputs).at(self._positions)
            limit = 2.0 ** DTYPES[self.problem.dtype].significand_bits
            self._integers = (inputs, values.sums, values.magnitudes <= limit)
        inputs, expected, exact = self._integers
        out = run(*inputs, None)
        if self._last_out is not None and _shares_memory(out, self._last_out):
            raise self._wrong(config, "it handed out the memory of an earlier result again")
        found = self._pick(out, self._positions)
        wrong = exact & (found.double() != expected)
        if bool(wrong.any()):
            where = self._place(int(wrong.flatten().nonzero()[0]), wrong)
            value, wanted = float(found[wrong][0]), float(expected[wrong][0])
            raise self._wrong(config, f"small integers must come out exactly: output{where} is {value}, not {wanted}")

    def _check_form(self, config: EngineConfig, out: torch.Tensor) -> None:
        spec = self.problem.output
        if tuple(out.shape) != spec.dims or out.dtype != TORCH_DTYPES[spec.dtype]:
            raise self._wrong(config, f"output is {tuple(out.shape)} {out.dtype}, expected {spec.dims} {spec.dtype}")
        steps = zip(spec.dims, out.stride(), spec.strides, strict=True)
        if any(size > 1 and have != want for size, have, want in steps):
            raise self._wrong(config, f"output has strides {out.stride()}, expected {spec.strides}")
        inputs = [tensor for tensor in self.random if tensor is not None]
        if any(_shares_memory(out, tensor) for tensor in inputs):
            raise self._wrong(config, "its output is a view of an input")
        written = [
            (tensor, kept) for tensor, kept in zip(inputs, self._kept, strict=True) if not torch.equal(tensor, kept)
        ]
        for tensor, kept in written:
            tensor.copy_(kept)
        if written:
            raise self._wrong(config, "it wrote to its inputs")

    def _pick(self, out: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.problem.op == "wgrad":
            return out[tuple(positions.unbind(1))]
        return out.movedim(1, -1)[tuple(positions.unbind(1))]

    def _allowed(self, notes: Notes, values: Values) -> torch.Tensor:
        info = DTYPES[self.problem.dtype]
        eps_out, eps_sum = 2.0 ** (1 - info.significand_bits), 2.0 ** (1 - DTYPES[info.accumulate].significand_bits)
        factor = max((METHOD_FACTORS[note] for note in notes.numerical if note in METHOD_FACTORS), default=1.0)
        magnitudes = values.magnitudes if notes.direct else values.magnitudes.max()
        allowed = eps_out * values.sums.abs() + factor * math.sqrt(self.problem.n_terms) * eps_sum * magnitudes
        return allowed + torch.finfo(TORCH_DTYPES[self.problem.dtype]).tiny

    def _compare(
        self, config: EngineConfig, notes: Notes, found: torch.Tensor, values: Values, positions: torch.Tensor
    ) -> float:
        difference = (found.double() - values.sums).abs()
        ratio = difference / self._allowed(notes, values)
        ratio = torch.where(found.isfinite(), ratio, math.inf)
        worst = int(ratio.argmax())
        error = float(ratio.flatten()[worst])
        if not error <= 1.0:
            place = self._place(worst, ratio, positions)
            value, wanted = float(found.flatten()[worst]), float(values.sums.flatten()[worst])
            raise self._wrong(
                config, f"output{place} is {value:.6g}, the reference {wanted:.6g}: {error:.3g} x tolerance"
            )
        return error

    def _place(self, flat: int, like: torch.Tensor, positions: torch.Tensor | None = None) -> str:
        rows = self._positions if positions is None else positions
        if self.problem.op == "wgrad":
            return str(rows[flat].tolist())
        row, channel = divmod(flat, like.shape[1])
        n, *spatial = rows[row].tolist()
        return str([n, channel, *spatial])

    def _check_against_trusted(self, config: EngineConfig, notes: Notes, out: torch.Tensor) -> None:
        """Compare every element with the first candidate that passed, and let the reference judge where they differ."""
        assert self._values is not None
        if self._trusted is None:
            self._trusted = (config, notes, out)
            return
        trusted_config, trusted_notes, trusted = self._trusted
        info = DTYPES[self.problem.dtype]
        slack = float((self._allowed(notes, self._values) + self._allowed(trusted_notes, self._values)).max())
        relative = 2.0 ** (2 - info.significand_bits)
        excess = (out - trusted).abs() - relative * trusted.abs()
        # NaN compares false with everything, so it is looked for by name, on both sides.
        suspicious = (excess > slack) | ~out.isfinite() | ~trusted.isfinite()
        if not bool(suspicious.any()):
            return
        places = suspicious.nonzero()[:ARBITRATED]
        positions = places if self.problem.op == "wgrad" else torch.cat([places[:, :1], places[:, 2:]], 1).unique(dim=0)
        values = self._reference.at(positions)
        self._compare(config, notes, self._pick(out, positions), values, positions)
        try:
            self._compare(trusted_config, trusted_notes, self._pick(trusted, positions), values, positions)
        except WrongResult as exc:
            self.condemned[trusted_config] = exc.reason
            self._trusted = (config, notes, out)

    def _wrong(self, config: EngineConfig, reason: str) -> WrongResult:
        return WrongResult(engine=config.engine, config=str(config), reason=reason)

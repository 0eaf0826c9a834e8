"""Is a candidate's output right? Compared in float64 with sums formed straight from the definition. No timing here.

The reference gathers, for chosen outputs, every product that the definition sums and adds them up in float64: it
shares no code and no method with any engine. Small problems are compared in full. In large ones a sample (corners and
random places) is compared with the reference, and *every* element with the first candidate that passed: where two
candidates disagree by more than both may err, the reference is evaluated at those very places and says which one is
wrong.

Tolerance follows the arithmetic, per output, n being the number of products summed:

    eps(output) * |ref| + factor * sqrt(n) * eps(accumulate) * conv(|x|, |w|)

With an epilogue, what the convolution may be off by goes through it: scaled, and enlarged by the activation's largest
slope; each of its steps may be rounded to the output's type, as torch's own modules one after the other do. Where a
gate is closed the result must be 0.

Hardware that keeps fewer bits of a running fp8 sum than float32 has (`SUM_BITS`) may lose on top of that
`SHORT_SUM_FACTOR * eps(those bits) * conv(|x|, |w|)`. Where an output leaves the range of an integer or fp8 type it is
expected to saturate; the inputs are chosen so that it does not happen. int8 has no tolerance: all is compared exactly.

`factor` is 1 for direct methods. Transform methods spread their error evenly over a whole transform instead of in
proportion to each output, so they get the largest conv(|x|, |w|) of the output in place of each one's own, and a factor
of their own (`METHOD_FACTORS`). Small-integer inputs have no rounding at all, and direct methods must match exactly.

Statistics are compared with float64 sums of the candidate's own output, which is judged by itself: each within

    (SUMS_FACTOR * eps(output) / sqrt(m) + sqrt(m) * eps(float32)) * sum(|term|)

for m terms, whose own rounding may come after they were summed, or before. On small integers they must be equal
wherever float32 holds the sum of magnitudes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from convplan._epilogue import Epilogue
from convplan._errors import WrongResult
from convplan._inputs import SUM_BITS, Inputs, exact_limit, integer_inputs, random_inputs
from convplan._problem import DTYPES, Problem
from convplan.engines._support import TORCH_DTYPES, in_range
from convplan.engines.base import EngineConfig, Notes, Run

Scope = Literal["full", "sample"]

INTEGERS_ARE_EXACT = "small integers must come out exactly"
INTEGER_ROUNDING = 0.25  # most that rounding may move a sum of small integers
TRANSFORM = Notes(numerical=("WINOGRAD",))
METHOD_FACTORS = {"FFT": 8.0, "WINOGRAD": 16.0}  # largest seen over the test cases: 1.2 for FFT
TF32_BITS = 11  # of a TensorFloat-32 number's significand
SHORT_SUM_FACTOR = 4.0  # sums of 32 products at a time, each cut to `SUM_BITS`, err by 0.3 over some thousand products
GATHER_ELEMENTS = 4_000_000  # numbers gathered for one reference: 32 MB a tensor, about 50 ms
FULL_ELEMENTS = 8_000_000  # up to here every output is compared
REFERENCE_FLOPS = 5e8
MIN_POSITIONS = 16
SUMS_FACTOR = 4.0
PIECE_ELEMENTS = 2**26  # of two outputs compared with each other at once
ARBITRATED = 32  # places looked at where two candidates disagree


class Values(NamedTuple):
    """Reference at some positions: sums, sums of magnitudes, and of those that may be rounded in between, in float64.

    With an epilogue the first are what it makes of the sums; the others are taken before its activation. With a gate,
    `closed` says where the result must be 0.
    """

    sums: torch.Tensor
    magnitudes: torch.Tensor
    rounded: torch.Tensor | None = None
    closed: torch.Tensor | None = None


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
        if not self.problem.epilogue.is_plain:
            return self._with_epilogue(values, positions)
        bias = self._inputs.bias
        if bias is None:
            return values
        wide = bias.double()
        return Values(values.sums + wide, values.magnitudes + wide.abs())

    def _with_epilogue(self, values: Values, positions: torch.Tensor) -> Values:
        """What the epilogue makes of the convolution's values (P, channels)."""
        epilogue, inputs = self.problem.epilogue, self._inputs
        sums, magnitudes = values.sums, values.magnitudes
        if inputs.gate is not None:
            closed = _picked(inputs.gate.movedim(1, -1), tuple(positions.unbind(1))) <= 0
            return Values(sums.masked_fill(closed, 0), magnitudes.masked_fill(closed, 0), closed=closed)
        rounded = sums.abs()
        if inputs.scale is not None:
            sums, magnitudes = sums * inputs.scale.double(), magnitudes * inputs.scale.double().abs()
            rounded = rounded * inputs.scale.double().abs() + sums.abs()
        if inputs.residual is not None:
            residual = epilogue.alpha * _picked(inputs.residual.movedim(1, -1), tuple(positions.unbind(1)))
            sums, magnitudes = sums + residual, magnitudes + residual.abs()
            rounded = rounded + sums.abs()
        if inputs.bias is not None:
            sums, magnitudes = sums + inputs.bias.double(), magnitudes + inputs.bias.double().abs()
        return Values(_activated(sums, epilogue), magnitudes, rounded + sums.abs())

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
            x = _picked(self._inputs.first, places) * inside
            products = x * self._inputs.second[:, k].double().reshape(-1)
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
        return _picked(flat, offsets[:, None, :] + channels[None, :, None]) * inside[:, None, :]

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
        chosen = torch.cat([corners, random])[:count]
        # As numbers: torch takes a hundred times as long to tell rows apart.
        steps = [math.prod(dims[place + 1 :]) for place in range(len(dims))]
        flat = (chosen * torch.tensor(steps)).sum(1).unique()
        return torch.stack(torch.unravel_index(flat, dims), 1).to(self._device), "sample"

    def _cost_of_one(self) -> tuple[int, int]:
        """Elements gathered and operations done for one position."""
        p, taps = self.problem, math.prod(self.problem.w.dims[2:])
        if p.op == "wgrad":
            return 2 * p.n_terms, 4 * p.n_terms
        channels = p.x.dims[1] if p.op == "fprop" else p.y.dims[1]
        return channels * taps, 4 * p.n_terms * p.output.dims[1]


def _activated(x: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The activation, from its definition."""
    name, numbers = epilogue.activation, epilogue.parameters
    if name in ("none", "relu"):
        return x if name == "none" else x.clamp(min=0)
    if name == "leaky_relu":
        return torch.where(x > 0, x, numbers[0] * x)
    if name == "clamp":
        return x.clamp(*numbers)
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "tanh":
        return torch.tanh(x)
    if name == "hardswish":
        return x * (x + 3).clamp(0, 6) / 6
    if name == "elu":
        return torch.where(x > 0, x, numbers[0] * torch.expm1(x.clamp(max=0)))
    if name == "softplus":
        beta, threshold = numbers
        return torch.where(beta * x > threshold, x, torch.log1p(torch.exp((beta * x).clamp(max=threshold))) / beta)
    raise AssertionError(f"convplan bug: no reference for activation {name!r}")


def _channel_sums(out: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 sums of an output's channels, to a power, and of its magnitudes; some images at a time."""
    images = max(1, PIECE_ELEMENTS * out.shape[0] // max(out.numel(), 1))
    over = [0, *range(2, out.dim())]
    sums = torch.zeros(2, out.shape[1], dtype=torch.float64, device=out.device)
    for piece in out.split(images):
        wide = piece.double() ** power
        sums[0] += wide.sum(over)
        sums[1] += wide.abs().sum(over)
    return sums[0], sums[1]


def _span(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, of a type that all of torch's kernels know: where it is fp8, a view of its bytes."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _picked(tensor: torch.Tensor, index: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Elements of a tensor of any type, in float64."""
    return _raw(tensor)[index].view(tensor.dtype).double()


def _differ(one: torch.Tensor, other: torch.Tensor, slack: float, relative: float) -> torch.Tensor:
    """Where two outputs are further apart than `slack` plus a share of the second one, or one of them is not finite."""
    rows = max(1, PIECE_ELEMENTS * len(one) // max(one.numel(), 1))
    return torch.cat(
        [_differ_here(*pair, slack, relative) for pair in zip(one.split(rows), other.split(rows), strict=True)]
    )


def _differ_here(one: torch.Tensor, other: torch.Tensor, slack: float, relative: float) -> torch.Tensor:
    if not one.is_floating_point():
        return one != other  # integers have no tolerance
    if one.dtype.itemsize == 1:  # few of torch's kernels know fp8
        one, other = one.float(), other.float()
    excess = (one - other).abs() - relative * other.abs()
    # NaN compares false with everything, so it is looked for by name, on both sides.
    return (excess > slack) | ~one.isfinite() | ~other.isfinite()


def _shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _products(left: torch.Tensor, right: torch.Tensor) -> Values:
    """(g, P, m) times (g, m, channels/g), as (P, channels), with the same of magnitudes."""
    sums, magnitudes = left @ right, left.abs() @ right.abs()
    return Values(sums.transpose(0, 1).flatten(1), magnitudes.transpose(0, 1).flatten(1))


class Verifier:
    """Checks the candidates of one problem, one after the other. Computes the references once, when first needed."""

    def __init__(self, problem: Problem, device: torch.device, seed: int = 0, *, tf32: bool = False) -> None:
        self.problem = problem
        self._tf32 = tf32 and device.type == "cuda" and problem.dtype == "float32"
        self.random = random_inputs(problem, device, seed)
        self._reference = Reference(problem, self.random)
        self._positions, self.scope = self._reference.choose(seed)
        self._device, self._seed = device, seed
        self._values: Values | None = None
        self._integers: tuple[Inputs, Values, torch.Tensor] | None = None
        self._kept = [tensor.clone() for tensor in self.random.tensors()]
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
        self._check_sums(config, out, self.random.sums, exactly=False)
        self._last_out = out
        if self._values is None:
            self._values = self._reference.at(self._positions)
        error = self._compare(config, notes, self._pick(out, self._positions), self._values, self._positions)
        if self.scope == "sample":
            self._check_against_trusted(config, notes, out)
        return error

    def check_exactly(self, config: EngineConfig, run: Run) -> bool:
        """Run a direct method on small integers and compare bit for bit, wherever sums cannot round.

        Returns:
            Whether all were equal. False: they differ by no more than a transform method may, which some engines are
            without a note that says so.

        Raises:
            WrongResult: an output differs by more, or a second run changed or shares the first one's output.
        """
        if self._integers is None:
            inputs = integer_inputs(self.problem, self._device, self._seed + 1)
            values = Reference(self.problem, inputs).at(self._positions)
            self._integers = (inputs, values, values.magnitudes <= exact_limit(self.problem))
        inputs, values, exact = self._integers
        expected = values.sums
        inputs.forget_sums()
        out = inputs.given_to(run)
        self._check_sums(config, out, inputs.sums, exactly=True)
        if self._last_out is not None and _shares_memory(out, self._last_out):
            raise self._wrong(config, "it handed out the memory of an earlier result again")
        found = self._pick(out, self._positions)
        if not self.problem.epilogue.keeps_integers:
            self._compare(config, Notes(), found, values, self._positions)
            return True
        wrong = exact & (found != expected)
        if not bool(wrong.any()):
            return True
        # A product too many or too few moves a sum of integers by a whole number.
        rounding = self._allowed(TRANSFORM, values).clamp(max=INTEGER_ROUNDING)
        if self._exact or not bool(((found - expected).abs() <= rounding)[wrong].all()):
            where = self._place(int(wrong.flatten().nonzero()[0]), wrong)
            value, wanted = float(found[wrong][0]), float(expected[wrong][0])
            raise self._wrong(config, f"{INTEGERS_ARE_EXACT}: output{where} is {value}, not {wanted}")
        return False

    def _check_form(self, config: EngineConfig, out: torch.Tensor) -> None:
        spec = self.problem.output
        if tuple(out.shape) != spec.dims or out.dtype != TORCH_DTYPES[spec.dtype]:
            raise self._wrong(config, f"output is {tuple(out.shape)} {out.dtype}, expected {spec.dims} {spec.dtype}")
        steps = zip(spec.dims, out.stride(), spec.strides, strict=True)
        if any(size > 1 and have != want for size, have, want in steps):
            raise self._wrong(config, f"output has strides {out.stride()}, expected {spec.strides}")
        inputs = self.random.tensors()
        if any(_shares_memory(out, tensor) for tensor in inputs):
            raise self._wrong(config, "its output is a view of an input")
        written = [
            (tensor, kept)
            for tensor, kept in zip(inputs, self._kept, strict=True)
            if not torch.equal(_raw(tensor), _raw(kept))
        ]
        for tensor, kept in written:
            tensor.copy_(kept)
        if written:
            raise self._wrong(config, "it wrote to its inputs")

    def _check_sums(self, config: EngineConfig, out: torch.Tensor, sums: torch.Tensor | None, *, exactly: bool) -> None:
        if sums is None:
            return
        for row, (name, power) in enumerate((("sum", 1), ("sum of squares", 2))):
            expected, magnitudes = _channel_sums(out, power)
            terms = max(out.numel() // max(out.shape[1], 1), 1)
            eps_out = 2.0 ** (1 - DTYPES[self.problem.output_dtype].significand_bits)
            share = SUMS_FACTOR * eps_out / math.sqrt(terms) + math.sqrt(terms) * torch.finfo(torch.float32).eps
            allowed = share * magnitudes + torch.finfo(torch.float32).tiny
            if exactly:
                allowed = torch.where(magnitudes <= DTYPES["float32"].exact_to, 0.0, allowed)
            found = sums[row].double()
            wrong = ~((found - expected).abs() <= allowed)
            if bool(wrong.any()):
                channel = int(wrong.nonzero()[0])
                raise self._wrong(
                    config,
                    f"the {name} of channel {channel} is {float(found[channel]):.7g}, that of the output it wrote "
                    f"{float(expected[channel]):.7g}, expected at most {float(allowed[channel]):.3g} between them",
                )

    def _pick(self, out: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Outputs at some positions, in float64."""
        if self.problem.op == "wgrad":
            return _picked(out, tuple(positions.unbind(1)))
        return _picked(out.movedim(1, -1), tuple(positions.unbind(1)))

    @property
    def _exact(self) -> bool:
        """Nothing is rounded: the inputs are integers, and stay so."""
        return DTYPES[self.problem.dtype].is_integer and self.problem.epilogue.is_plain

    def _allowed(self, notes: Notes, values: Values) -> torch.Tensor:
        """How far off each output may be; zero where nothing is rounded."""
        if self._exact:
            return torch.zeros_like(values.sums)
        info = DTYPES[self.problem.dtype]
        eps_out = 2.0 ** (1 - DTYPES[self.problem.output_dtype].significand_bits)
        eps_sum = 2.0 ** (1 - DTYPES[info.accumulate].significand_bits)
        factor = max((METHOD_FACTORS[note] for note in notes.numerical if note in METHOD_FACTORS), default=1.0)
        share = factor * math.sqrt(self.problem.n_terms) * eps_sum
        if self.problem.dtype in SUM_BITS:
            share += SHORT_SUM_FACTOR * 2.0 ** (1 - SUM_BITS[self.problem.dtype])
        if self._tf32:
            share += 2.0 ** (1 - TF32_BITS)  # both factors of each product are cut
        magnitudes = values.magnitudes if notes.direct else values.magnitudes.max()
        if self._device.type == "cuda" and values.rounded is None and self.random.bias is not None:
            # As in torch, the sum is rounded to the output's type before the bias is added to it.
            magnitudes = magnitudes + self.random.bias.double().abs() * (eps_out / share)
        if values.rounded is not None:
            # As in torch, each step may be rounded to the output's type before the next one.
            magnitudes = magnitudes + values.rounded * (eps_out / share)
            share *= self.problem.epilogue.slope
        if DTYPES[self.problem.output_dtype].is_integer:
            return 1.0 + share * magnitudes  # ties go either way
        smallest = torch.finfo(TORCH_DTYPES[self.problem.output_dtype]).tiny
        if DTYPES[self.problem.output_dtype].itemsize_bytes == 1:
            smallest *= eps_out  # nobody flushes the small numbers of fp8 to zero: there are too few others
        allowed = eps_out * values.sums.abs() + share * magnitudes + smallest
        return allowed if values.closed is None else allowed.masked_fill(values.closed, 0.0)

    def _compare(
        self, config: EngineConfig, notes: Notes, found: torch.Tensor, values: Values, positions: torch.Tensor
    ) -> float:
        expected = in_range(values.sums, self.problem.output_dtype)
        difference = (found - expected).abs()
        ratio = torch.where(difference == 0, 0.0, difference / self._allowed(notes, values))
        ratio = torch.where(found.isfinite(), ratio, math.inf)
        worst = int(ratio.argmax())
        error = float(ratio.flatten()[worst])
        if not error <= 1.0:
            place = self._place(worst, ratio, positions)
            value, wanted = float(found.flatten()[worst]), float(expected.flatten()[worst])
            if self._exact:
                raise self._wrong(config, f"{INTEGERS_ARE_EXACT}: output{place} is {value}, not {wanted}")
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
        slack = float((self._allowed(notes, self._values) + self._allowed(trusted_notes, self._values)).max())
        relative = 0.0 if self._exact else 2.0 ** (2 - DTYPES[self.problem.output_dtype].significand_bits)
        suspicious = _differ(out, trusted, slack, relative)
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

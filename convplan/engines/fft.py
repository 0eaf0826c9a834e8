"""The `fft` engine: convolution as a product of spectra, for filters too long to be summed tap by tap.

With hats for discrete Fourier transforms of length L, long enough that the circular result does not overlap itself,

    fprop   y^ = sum_c x^ conj(w^)        dgrad   x^ = sum_k y^ w^        wgrad   w^ = sum_n x^ conj(y^)

so transforms of L log L operations, and one complex product for each frequency and pair of channels.

Long signals are cut into blocks (overlap-save): a transform of `block` elements yields `step = block - span + 1` right
results, `span` being the dilated filter's size, and each block starts `step` further on. wgrad sums the spectra of its
blocks before its one inverse transform. `block=0`, or a block as long as the signal, is one transform of everything,
in which circular wrap-around takes the place of padding. In 2-D and 3-D the knob bounds every dimension's transform.

Dilation is a filter with zeros between its taps. Stride is taken out beforehand (`_Fold`), so that no transform is
spent on results that are dropped.

The module reads top down: the engine, the geometry it works out once, and the torch code that runs. That code works on
chunks that fit a CPU's cache: touching fresh pages costs more than the arithmetic done on them. bfloat16 and float16
are computed in float32. Nothing here measures or checks: that is the planner's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from types import EllipsisType
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from convplan._errors import PlanRejected
from convplan._policy import Effort, Policy
from convplan._problem import DTYPES, Op, Problem
from convplan.engines._support import TORCH_DTYPES, deliver, dtype_refusal, empty, may_use_tf32
from convplan.engines.base import YES, Built, Candidate, EngineConfig, Notes, Run, Space, Support, no

NOTES, NOTES_TF32 = Notes(numerical=("FFT",)), Notes(numerical=("FFT", "TENSOR_CORE"))

# Blocks to propose for each rank: the least, and multiples of the smallest power of two that holds the filter's span,
# each shortened to what the number of its blocks needs.
BLOCKS: dict[int, tuple[int, tuple[int, ...]]] = {
    1: (64, (2, 4, 8, 16)),
    2: (16, (2, 4, 8)),
    3: (8, (2, 4)),
}
CHUNK_BYTES = {"cpu": 4 * 2**20}  # spectra worked on at a time, so that they stay in the cache
CHUNK_BYTES_ELSEWHERE = 256 * 2**20  # a GPU wants few large launches instead
GPU_ADVANTAGE = 8  # operations that a GPU does of a direct method in the time of one of ours, which waits for memory
PRODUCTS_FROM = 0.35  # see `_by_products`
ODD_FACTORS = (1, 5, 7)  # good lengths are 2**a 3**b times one of these; a second 5 or 7 costs more than it saves


class FftEngine:
    """Convolution by fast Fourier transforms, on every device that has `torch.fft`.

    Knobs:
        block: elements in each dimension of one transform, at least the filter's span (both after a stride is taken
            out). 0, or more than the signal has: everything in one transform.
    """

    name = "fft"
    by_default = True

    def supports(self, problem: Problem) -> Support:
        """Problems with something to compute and more than one tap, in a floating-point type of 16 bits or more."""
        if problem.is_empty:
            return no("nothing to compute: a tensor has no elements")
        if refusal := dtype_refusal(problem):
            return no(refusal)
        if math.prod(problem.w.dims[2:]) == 1:
            return no("a filter of one tap has nothing to gain from FFT")
        return YES

    def configs(self, problem: Problem, effort: Effort) -> Sequence[Candidate]:
        """The whole signal at once and a few block lengths around the filter's span, least operations first."""
        if not self.supports(problem).ok:
            return ()
        wanted = [
            block
            for block in _block_lengths(problem)
            if problem.device != "cuda" or _flops(_fold(problem, block)) * GPU_ADVANTAGE <= problem.flops
        ]
        candidates = [self._candidate(problem, block) for block in wanted]
        return sorted(candidates, key=lambda candidate: candidate.flops or 0.0)

    def _candidate(self, problem: Problem, block: int) -> Candidate:
        fold = _fold(problem, block)
        workspace = _chunks(problem, fold).workspace_bytes
        return Candidate(
            EngineConfig.of(self.name, block=block),
            notes=NOTES_TF32 if may_use_tf32(problem) else NOTES,
            workspace_bytes=workspace,
            flops=_flops(fold),
            moved_bytes=2 * workspace,  # spectra are written and read
        )

    def spaces(self, problem: Problem) -> Sequence[Space]:
        """Every block that transforms fast, from the shortest that is proposed to the longest."""
        if not self.supports(problem).ok:
            return ()
        proposed = set(_block_lengths(problem))
        blocks, longest = set(proposed), max(proposed)
        length = min(proposed - {0}, default=longest + 1)
        while length <= longest:
            blocks.add(length)
            length = good_length(length + 1)
        return [Space(free=(("block", tuple(sorted(blocks))),))]

    def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
        """Any block.

        Raises:
            PlanRejected: as for `build`, or an unknown knob.
        """
        if {name for name, _ in config.knobs} != {"block"}:
            raise PlanRejected(engine=self.name, config=str(config), reason="expected the knob `block` and no other")
        self._geometry(problem, config)
        return self._candidate(problem, config.knob("block"))

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        """Work out the geometry. Nothing is compiled, and nothing is kept between runs.

        Raises:
            PlanRejected: the problem is not supported, or the block is shorter than the filter's span.
        """
        fold = self._geometry(problem, config)
        chunks = _chunks(problem, fold)
        return Built(_runner(problem, fold, chunks), chunks.workspace_bytes)

    def _geometry(self, problem: Problem, config: EngineConfig) -> _Fold:
        support = self.supports(problem)
        if not support.ok:
            raise PlanRejected(engine=self.name, config=str(config), reason=support.reason)
        block = config.knob("block")
        fold = _fold(problem, block)
        span = max(axis.span for axis in fold.axes)
        if block < 0 or any(axis.step < 1 for axis in fold.axes):
            reason = f"block is {block}, expected 0 or at least the filter's span, {span}"
            raise PlanRejected(engine=self.name, config=str(config), reason=reason)
        return fold


# --- Geometry: plain integers, worked out once for each plan ----------------------------------------------------------


class _Axis(NamedTuple):
    """One dimension of a convolution of stride 1, and how it is cut into blocks. Everything in elements.

    x has `size` elements with `before` zeros in front, y has `out`; the filter covers `span`, one tap each `dilation`.
    A transform of `length` yields `step` results and there are `blocks` of them. `whole`: one block, of x and y as they
    are, the offset between them left to wrap-around.
    """

    size: int
    span: int
    out: int
    before: int
    dilation: int
    length: int
    step: int
    blocks: int
    whole: bool

    @property
    def taps(self) -> int:
        """Taps of the filter."""
        return (self.span - 1) // self.dilation + 1


class _Fold(NamedTuple):
    """A problem with its stride s taken out: with j = q s + r, y[o] = sum_j w[j] x[o s + j - before] becomes

        y[o] = sum_r sum_q w_r[q] x_r[o + q]        x_r[m] = x[m s + r - before]        w_r[q] = w[q s + r]

    a convolution of stride 1 in which the s phases r are channels. Dimensions of stride 1 keep their padding.
    """

    n: int
    groups: int
    c: int  # input channels of one group, times phases
    k: int  # output channels of one group
    axes: tuple[_Axis, ...]

    @property
    def rows(self) -> int:
        """Signals of each channel: images times blocks."""
        return self.n * math.prod(axis.blocks for axis in self.axes)

    @property
    def length(self) -> int:
        """Elements of one transform."""
        return math.prod(axis.length for axis in self.axes)

    @property
    def frequencies(self) -> int:
        """Frequencies of one real transform: half of the last dimension's follow from the others."""
        last = self.axes[-1].length
        return self.length // last * (last // 2 + 1)


class _Chunks(NamedTuple):
    """How much is done at a time: groups, and then rows or output channels (the other in one piece)."""

    groups: int
    rows: int
    outputs: int
    workspace_bytes: int


@lru_cache(maxsize=4096)
def good_length(least: int) -> int:
    """The smallest length from `least` on that transforms fast: even, and a product of small primes."""
    best = 1 << max(1, (least - 1).bit_length())
    for odd in ODD_FACTORS:
        while 2 * odd < best:
            best = min(best, odd << max(1, (-(-least // odd) - 1).bit_length()))
            odd *= 3
    return best


def _axis(op: Op, size: int, span: int, out: int, padding: tuple[int, int], dilation: int, block: int) -> _Axis:
    before, after = padding[0], out + span - 1 - size - padding[0]  # trailing padding that is read; may be negative
    # Circular results are right when reads past either end of x land on its zeros.
    length = good_length(max(size + max(before, after), span, out))
    if block == 0 or block >= length:
        return _Axis(size, span, out, before, dilation, length, length, 1, True)
    step = block - span + 1
    results = size if op == "dgrad" else out
    return _Axis(size, span, out, before, dilation, block, step, -(-results // max(step, 1)), False)


def _fold(problem: Problem, block: int) -> _Fold:
    axes = []
    for size, taps, out, padding, stride, dilation in zip(
        problem.x.dims[2:],
        problem.w.dims[2:],
        problem.y.dims[2:],
        problem.padding,
        problem.stride,
        problem.dilation,
        strict=True,
    ):
        span = dilation * (taps - 1) + 1
        if stride > 1:
            span = -(-span // stride)
            size, padding, dilation = out + span - 1, (0, 0), 1
        axes.append(_axis(problem.op, size, span, out, padding, dilation, block))
    groups = problem.groups
    c, k = problem.w.dims[1] * math.prod(problem.stride), problem.w.dims[0] // groups
    return _Fold(problem.x.dims[0], groups, c, k, tuple(axes))


def _block_lengths(problem: Problem) -> list[int]:
    """0, and a few lengths that are shorter than the longest dimension's one transform.

    Powers of two say how many blocks there are; each length is then no more than that many blocks need.
    """
    axes = _fold(problem, 0).axes
    least, multiples = BLOCKS[len(axes)]
    smallest = max(least // 2, 1 << (max(axis.span for axis in axes) - 1).bit_length())
    longest = max(axis.length for axis in axes)
    lengths = {0}
    for multiple in multiples:
        cut = [axis for axis in _fold(problem, smallest * multiple).axes if not axis.whole]
        results = [(axis.size if problem.op == "dgrad" else axis.out, axis) for axis in cut]
        needed = [good_length(-(-total // axis.blocks) + axis.span - 1) for total, axis in results]
        lengths |= {length for length in (max(needed, default=0),) if length < longest}
    return sorted(lengths)


def _flops(fold: _Fold) -> float:
    """Operations: 2.5 L log2 L for each real transform, 8 for each complex multiply-add."""
    transforms = fold.groups * (fold.rows * (fold.c + fold.k) + fold.c * fold.k)
    products = fold.groups * fold.rows * fold.c * fold.k * fold.frequencies
    return 2.5 * transforms * fold.length * math.log2(max(fold.length, 2)) + 8.0 * products


def _chunks(problem: Problem, fold: _Fold) -> _Chunks:
    """Cut the work so that the spectra of one chunk, or those kept during all of them, are about `CHUNK_BYTES`."""
    budget = CHUNK_BYTES.get(problem.device, CHUNK_BYTES_ELSEWHERE)
    read, written = (fold.k, fold.c) if problem.op == "dgrad" else (fold.c, fold.k)
    signals, filters = fold.rows * (read + written), read * written
    spectrum = 2 * _real_bytes(problem) * fold.frequencies
    group = spectrum * (signals + filters)
    groups, rows, outputs = fold.groups, fold.rows, written
    if group * fold.groups > budget:
        groups = max(1, budget // group)
    held = chunk = group * groups
    if group > budget:
        # Keep the smaller side and stream the other past it, in chunks not much smaller than what each is paired with.
        if signals > filters:
            held, row = spectrum * filters, spectrum * (read + written)
            rows = min(rows, max(1, max(budget, held) // row))
            chunk = row * rows
        else:
            held, output = spectrum * fold.rows * read, spectrum * (fold.rows + read)
            outputs = min(outputs, max(1, max(budget, held) // output))
            chunk = output * outputs
    # Copies made before and after by `_fold_signal` and the like: at most four at a time of what they change.
    x = fold.groups * fold.c * fold.n * math.prod(axis.size for axis in fold.axes) if max(problem.stride) > 1 else 0
    changes_filter = max(problem.stride) > 1 or max(problem.dilation) > 1
    w = fold.groups * fold.c * fold.k * math.prod(axis.span for axis in fold.axes) if changes_filter else 0
    copies = 4 * _real_bytes(problem) * (x + w)
    # What is held exists as spectrum and in the layout of the product; a chunk also as padded signal or result, and in
    # the inverse of several dimensions once more in between.
    return _Chunks(groups, rows, outputs, copies + 2 * held + (3 if len(fold.axes) == 1 else 4) * chunk)


def _real_bytes(problem: Problem) -> int:
    return DTYPES[DTYPES[problem.dtype].accumulate].itemsize_bytes


# --- Running: torch ---------------------------------------------------------------------------------------------------
#
# Shapes: a signal is (N, G, channels, spatial...) with G groups, its blocks are (N, G, channels, B..., L...), and its
# spectrum is (N, G, channels, B, F) with all blocks and all frequencies flattened. A filter is (G, K/G, C/G, taps...),
# its spectrum (G, K/G, C/G, F).


class _Piece(NamedTuple):
    """Results of one dimension: `source` of each of `blocks` from `first` on, written one after the other."""

    target: int
    first: int
    blocks: int
    source: slice


class _Part(NamedTuple):
    """A part of the signals: some images, and some blocks along the first dimension."""

    images: slice
    blocks: slice


class _Work:
    """The convolution of stride 1 that `_Fold` leaves. Holds only integers, so threads may share it."""

    def __init__(self, problem: Problem, fold: _Fold, chunks: _Chunks) -> None:
        self.op, self.fold, self.chunks = problem.op, fold, chunks
        self.dtype = TORCH_DTYPES[DTYPES[problem.dtype].accumulate]
        self.lengths = [axis.length for axis in fold.axes]
        self.spatial = list(range(-len(fold.axes), 0))

    def compute(
        self, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
    ) -> None:
        """Write the result into `target`, group by group; all tensors as the engine gets them, strides taken out."""
        count = self.fold.groups
        signal = torch.unflatten(first, 1, (count, -1))
        other = torch.unflatten(second, *((1, (count, -1)) if self.op == "wgrad" else (0, (count, -1))))
        result = torch.unflatten(target, *((0, (count, -1)) if self.op == "wgrad" else (1, (count, -1))))
        for groups in _slices(count, self.chunks.groups):
            if self.op == "wgrad":
                self._filter(signal[:, groups], other[:, groups], result[groups])
            else:
                added = None if bias is None else torch.unflatten(bias, 0, (count, -1))[groups]
                self._signal(signal[:, groups], other[groups], added, result[:, groups])

    def _signal(
        self, signal: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
    ) -> None:
        """fprop and dgrad: stream the signals past all filters, or the filters past all signals."""
        everything, channels = self._everything(), target.shape[2]
        if self.chunks.outputs >= channels:
            filters = self._filter_spectrum(weight)
            for part in self._parts():
                self._deliver_signal(self._contract(self._signal_spectrum(signal, part), filters), part, bias, target)
            return
        spectrum = self._signal_spectrum(signal, everything)
        for some in _slices(channels, self.chunks.outputs):
            filters = self._filter_spectrum(weight[:, :, some] if self.op == "dgrad" else weight[:, some])
            added = None if bias is None else bias[:, some]
            self._deliver_signal(self._contract(spectrum, filters), everything, added, target[:, :, some])

    def _filter(self, x: torch.Tensor, y: torch.Tensor, target: torch.Tensor) -> None:
        """wgrad: sum over parts of the signals, or go through the channels of y with x in one piece."""
        if self.chunks.outputs >= self.fold.k:
            total = None
            for part in self._parts():
                total = self._correlate(self._signal_spectrum(x, part), self._grad_spectrum(y, part), total)
            assert total is not None  # a supported problem has images
            self._deliver_filter(total, target)
            return
        spectrum = self._signal_spectrum(x, self._everything())
        for some in _slices(self.fold.k, self.chunks.outputs):
            grad = self._grad_spectrum(y[:, :, some], self._everything())
            self._deliver_filter(self._correlate(spectrum, grad, None), target[:, some])

    def _everything(self) -> _Part:
        return _Part(slice(0, self.fold.n), slice(0, self.fold.axes[0].blocks))

    def _parts(self) -> list[_Part]:
        """`chunks.rows` signals at a time: several images, or some blocks of one."""
        blocks = self.fold.axes[0].blocks
        per_image = self.fold.rows // self.fold.n
        if self.chunks.rows >= per_image:
            return [_Part(some, slice(0, blocks)) for some in _slices(self.fold.n, self.chunks.rows // per_image)]
        some_blocks = _slices(blocks, max(1, self.chunks.rows * blocks // per_image))
        return [_Part(slice(n, n + 1), some) for n, some in product(range(self.fold.n), some_blocks)]

    # Signals and filters to spectra.

    def _signal_spectrum(self, signal: torch.Tensor, part: _Part) -> torch.Tensor:
        """Of x, in dgrad of y: blocks that overlap by span - 1 and fill their transforms."""
        lead = [axis.span - 1 - axis.before if self.op == "dgrad" else axis.before for axis in self.fold.axes]
        return self._spectrum(signal, part, lead, self.lengths)

    def _grad_spectrum(self, y: torch.Tensor, part: _Part) -> torch.Tensor:
        """Of y in wgrad, conjugate: blocks that do not overlap, filled up with zeros."""
        steps = [axis.step for axis in self.fold.axes]
        return self._spectrum(y, part, [0] * len(steps), steps).conj_physical_()

    def _filter_spectrum(self, weight: torch.Tensor) -> torch.Tensor:
        """Conjugate for fprop, which correlates; as it is for dgrad, which convolves."""
        spectrum = self._transform(weight)
        return spectrum.conj_physical_() if self.op == "fprop" else spectrum

    def _spectrum(self, signal: torch.Tensor, part: _Part, lead: list[int], sizes: list[int]) -> torch.Tensor:
        """Put `lead` zeros in front of the signal, take a block of `sizes` every `step`, and transform them."""
        axes = self.fold.axes
        bounds = []
        for d, (axis, before, size) in enumerate(zip(axes, lead, sizes, strict=True)):
            begin, end = (part.blocks.start, part.blocks.stop) if d == 0 else (0, axis.blocks)
            cut = (begin * axis.step - before, (end - 1) * axis.step - before + size)
            bounds.append((0, signal.shape[3 + d]) if axis.whole else cut)
        blocks = _section(signal[part.images], bounds)
        for d, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
            blocks = blocks.unfold(3 + d, blocks.shape[3 + d] if axis.whole else size, axis.step)
        return self._transform(blocks).flatten(3, 2 + len(axes))

    def _transform(self, blocks: torch.Tensor) -> torch.Tensor:
        """(..., L...) -> (..., F), with zeros at the end of what is shorter than L."""
        spectrum: torch.Tensor = torch.fft.rfftn(blocks.to(self.dtype), s=self.lengths, dim=self.spatial)
        return spectrum.flatten(-len(self.lengths))

    # Products of spectra.

    def _contract(self, signal: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        """Sum over the channels read. The result has a signal's shape, not necessarily its order in memory."""
        n, groups, read, blocks, frequencies = signal.shape
        written = filters.shape[2 if self.op == "dgrad" else 1]
        if _by_products(n * blocks, read, written):
            by_read = (filters if self.op == "dgrad" else filters.transpose(1, 2)).unsqueeze(3)
            total = signal[:, :, :1] * by_read[:, 0]
            for i in range(1, read):
                total.addcmul_(signal[:, :, i : i + 1], by_read[:, i])
            return total
        left = signal.permute(4, 1, 0, 3, 2).contiguous().view(-1, n * blocks, read)
        right = filters.permute(3, 0, 1, 2).contiguous().view(-1, *filters.shape[1:3])
        result = torch.bmm(left, right if self.op == "dgrad" else right.transpose(1, 2))
        return result.view(frequencies, groups, n, blocks, written).permute(2, 1, 4, 3, 0)

    def _correlate(self, x: torch.Tensor, y: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        """Sum over images and blocks, added to `total`: a filter's spectrum."""
        n, groups, c, blocks, frequencies = x.shape
        k = y.shape[2]
        if _by_products(n * blocks, c, k):
            by_channel = [(y * x[:, :, i : i + 1]).sum(-2).sum(0) for i in range(c)]
            result = torch.stack(by_channel, 2)
            return result if total is None else total.add_(result)
        left = y.permute(4, 1, 2, 0, 3).contiguous().view(-1, k, n * blocks)
        right = x.permute(4, 1, 0, 3, 2).contiguous().view(-1, n * blocks, c)
        result = torch.bmm(left, right).view(frequencies, groups, k, c).permute(1, 2, 3, 0)
        return result if total is None else total.add_(result)

    # Spectra to results.

    def _deliver_signal(
        self, spectrum: torch.Tensor, part: _Part, bias: torch.Tensor | None, target: torch.Tensor
    ) -> None:
        """Write one part of the signals, with the bias of its channels added."""
        axes = self.fold.axes
        counts = [part.blocks.stop - part.blocks.start, *(axis.blocks for axis in axes[1:])]
        results = self._inverse(torch.unflatten(spectrum, 3, counts))
        if bias is not None:
            results.add_(bias.to(self.dtype).reshape(bias.shape + (1,) * (2 * len(axes))))
        ranges = [part.blocks, *(slice(0, axis.blocks) for axis in axes[1:])]
        pieces = [_signal_pieces(self.op, axis, blocks) for axis, blocks in zip(axes, ranges, strict=True)]
        _write(results, pieces, target[part.images])

    def _deliver_filter(self, spectrum: torch.Tensor, target: torch.Tensor) -> None:
        """Write filters (G, K/G, C/G, taps...): of each transform the few elements that are taps."""
        results = self._inverse(torch.unflatten(spectrum, -1, (*(1 for _ in self.lengths), -1)))
        _write(results, [_filter_pieces(axis) for axis in self.fold.axes], target)

    def _inverse(self, spectrum: torch.Tensor) -> torch.Tensor:
        """(..., F) -> (..., L...), a new tensor"""
        shaped = torch.unflatten(spectrum, -1, (*self.lengths[:-1], self.lengths[-1] // 2 + 1))
        results: torch.Tensor = torch.fft.irfftn(shaped, s=self.lengths, dim=self.spatial)
        return results


def _by_products(a: int, b: int, c: int) -> bool:
    """Whether a sum over one of the sizes a, b, c goes faster as elementwise products than as one GEMM per frequency.

    GEMMs multiply some ten times faster, but want the frequency first: their two inputs and the output are transposed,
    which takes a few times as long as an elementwise multiply-add. So compare a b c with 3 (a b + b c + a c). Measured
    best between 0.15 and 0.5 on two cores of a Zen 4 with AVX-512, for 16 to 64 channels and 3 to 40 rows.
    """
    return 1 / a + 1 / b + 1 / c >= PRODUCTS_FROM


def _signal_pieces(op: Op, axis: _Axis, blocks: slice) -> list[_Piece]:
    """Where one dimension's results of fprop and dgrad are, for a range of blocks."""
    total = axis.size if op == "dgrad" else axis.out
    if axis.whole and op == "dgrad":
        return [_Piece(0, 0, 1, slice(axis.before, axis.before + total))]
    if axis.whole:
        wrapped, start = min(axis.before, total), axis.length - axis.before
        pieces = [_Piece(0, 0, 1, slice(start, start + wrapped)), _Piece(wrapped, 0, 1, slice(0, total - wrapped))]
        return [piece for piece in pieces if piece.source.stop > piece.source.start]
    start, full = axis.span - 1 if op == "dgrad" else 0, min(blocks.stop, total // axis.step)
    pieces = []
    if full > blocks.start:
        whole_step = slice(start, start + axis.step)
        pieces.append(_Piece(blocks.start * axis.step, 0, full - blocks.start, whole_step))
    if full < blocks.stop:
        rest = slice(start, start + total - full * axis.step)
        pieces.append(_Piece(full * axis.step, full - blocks.start, 1, rest))
    return pieces


def _filter_pieces(axis: _Axis) -> list[_Piece]:
    """Where one dimension's taps of wgrad are."""
    taps = axis.taps
    if not axis.whole:
        return [_Piece(0, 0, 1, slice(0, axis.span, axis.dilation))]
    wrapped = min(-(-axis.before // axis.dilation), taps)
    start, rest = axis.length - axis.before, wrapped * axis.dilation - axis.before
    pieces = []
    if wrapped:
        pieces.append(_Piece(0, 0, 1, slice(start, start + (wrapped - 1) * axis.dilation + 1, axis.dilation)))
    if taps > wrapped:
        pieces.append(
            _Piece(wrapped, 0, 1, slice(rest, rest + (taps - wrapped - 1) * axis.dilation + 1, axis.dilation))
        )
    return pieces


def _write(results: torch.Tensor, pieces: list[list[_Piece]], target: torch.Tensor) -> None:
    """Copy from results (a, b, c, B..., L...) to target (a, b, c, spatial...): every combination of pieces."""
    rank = len(pieces)
    order = [0, 1, 2, *(3 + d + part for d in range(rank) for part in (0, rank))]  # to B0 L0 B1 L1 ...
    for combination in product(*pieces):
        blocks = [slice(piece.first, piece.first + piece.blocks) for piece in combination]
        source = _at(results, [*blocks, *(piece.source for piece in combination)]).permute(order)
        place = target
        for d in reversed(range(rank)):
            piece, width = combination[d], source.shape[4 + 2 * d]
            place = place.narrow(3 + d, piece.target, piece.blocks * width)
            place = torch.unflatten(place, 3 + d, (piece.blocks, width))
        place.copy_(source)


def _section(tensor: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The elements from `begin` to `end` of each of the last dimensions, zero where the tensor has none.

    A view where nothing is added.
    """
    margins: list[int] = []
    for d, (begin, end) in enumerate(reversed(bounds)):
        size = tensor.shape[-1 - d]
        first, last = min(max(begin, 0), size), max(min(end, size), 0)
        tensor = tensor.narrow(-1 - d, first, max(last - first, 0))
        before = min(max(-begin, 0), end - begin)
        margins += [before, end - begin - before - max(last - first, 0)]
    return pad(tensor, margins) if any(margins) else tensor


def _at(tensor: torch.Tensor, ranges: Sequence[slice]) -> torch.Tensor:
    """A view: one range for each of the last dimensions."""
    index: list[EllipsisType | slice] = [..., *ranges]
    return tensor[tuple(index)]


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


# --- Running: stride to channels and back -----------------------------------------------------------------------------


def _runner(problem: Problem, fold: _Fold, chunks: _Chunks) -> Run:
    """The function that `FftEngine.build` returns; it holds only integers, so threads may share it."""
    work = _Work(problem, fold, chunks)
    signals, filters = fold.groups * fold.c, (fold.groups * fold.k, fold.c)

    def run(
        first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        if problem.op != "dgrad":
            first = _fold_signal(problem, fold, first)
        if problem.op != "wgrad":
            second = _fold_filter(problem, fold, second)
        if problem.op == "fprop" or max(problem.stride) == 1:
            target = empty(problem.output, first.device) if out is None else out
            work.compute(first, second, bias, target)
            return target
        if problem.op == "dgrad":
            folded = first.new_empty(fold.n, signals, *(axis.size for axis in fold.axes), dtype=work.dtype)
            work.compute(first, second, None, folded)
            result = _unfold_signal(problem, fold, folded)
            if bias is not None:
                result = result + bias.to(work.dtype).reshape(-1, *(1 for _ in fold.axes))
        else:
            folded = first.new_empty(*filters, *(axis.taps for axis in fold.axes), dtype=work.dtype)
            work.compute(first, second, None, folded)
            result = _unfold_filter(problem, folded)
        return deliver(result, problem.output, out)

    return run


def _fold_signal(problem: Problem, fold: _Fold, x: torch.Tensor) -> torch.Tensor:
    """(N, C, spatial...) -> (N, C * phases, size...); in dimensions with a stride, padding becomes part of it."""
    if max(problem.stride) == 1:
        return x
    bounds = [
        (-before, axis.size * stride - before) if stride > 1 else (0, axis.size)
        for axis, stride, (before, _) in zip(fold.axes, problem.stride, problem.padding, strict=True)
    ]
    return _phases(_section(x, bounds), problem.stride)


def _unfold_signal(problem: Problem, fold: _Fold, folded: torch.Tensor) -> torch.Tensor:
    """The inverse of `_fold_signal`, with zeros for elements that no filter reached."""
    bounds = [
        (before, before + size) if stride > 1 else (0, size)
        for size, stride, (before, _) in zip(problem.x.dims[2:], problem.stride, problem.padding, strict=True)
    ]
    return _section(_merge(folded, problem.stride), bounds)


def _fold_filter(problem: Problem, fold: _Fold, w: torch.Tensor) -> torch.Tensor:
    """(K, C/G, taps...) -> (K, C/G * phases, span...), with zeros between the taps of a dilated filter."""
    if max(problem.dilation) > 1:
        every = [slice(None, None, dilation) for dilation in problem.dilation]
        spans = [dilation * (taps - 1) + 1 for taps, dilation in zip(w.shape[2:], problem.dilation, strict=True)]
        spread = w.new_zeros(*w.shape[:2], *spans)
        _at(spread, every).copy_(w)
        w = spread
    if max(problem.stride) == 1:
        return w
    bounds = [(0, axis.span * stride) for axis, stride in zip(fold.axes, problem.stride, strict=True)]
    return _phases(_section(w, bounds), problem.stride)


def _unfold_filter(problem: Problem, folded: torch.Tensor) -> torch.Tensor:
    """The inverse of `_fold_filter`, given the taps alone in dimensions without a stride."""
    steps = [d if s > 1 else 1 for d, s in zip(problem.dilation, problem.stride, strict=True)]
    taps = [slice(0, (n - 1) * step + 1, step) for n, step in zip(problem.w.dims[2:], steps, strict=True)]
    return _at(_merge(folded, problem.stride), taps)


def _phases(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """(a, b, m0 * s0, m1 * s1...) -> (a, b * s0 * s1..., m0, m1...)"""
    rank = len(strides)
    for d in reversed(range(rank)):
        tensor = torch.unflatten(tensor, 2 + d, (-1, strides[d]))
    return tensor.permute(0, 1, *range(3, 2 * rank + 2, 2), *range(2, 2 * rank + 2, 2)).flatten(1, 1 + rank)


def _merge(folded: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """The inverse of `_phases`."""
    rank = len(strides)
    order = [0, 1, *(i + d for d in range(rank) for i in (2 + rank, 2))]
    split = torch.unflatten(folded, 1, (-1, *strides)).permute(order)
    for d in range(rank):
        split = split.flatten(2 + d, 3 + d)
    return split

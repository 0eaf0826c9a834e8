"""The `fft` engine: block lengths and their edges, every way the work is cut, and what it says of its cost.

`test_engines.py` runs its proposals on every named case; here the knob takes values that it would not propose. Answers
are judged by `helpers.oracle`, a loop over taps in float64.
"""

from __future__ import annotations

import functools
import itertools
import random

import pytest
import torch
from helpers import oracle
from helpers.cases import Case
from torch.profiler import ProfilerActivity, profile

from convplan._epilogue import Epilogue
from convplan._errors import PlanRejected, SpecError
from convplan._policy import Policy
from convplan._problem import OPS, Op, Problem, normalize_strides
from convplan.engines import fft
from convplan.engines.base import EngineConfig
from convplan.engines.fft import NOTES, FftEngine, good_length

ENGINE = FftEngine()
POLICY = Policy()
SEED = 5

EDGES = (
    # 1-D: a span of 9 in a signal of 50, so that blocks of 9 yield one result each
    Case("one-result-per-block", (2, 3, 50), (4, 3, 9), padding=((3, 1),)),
    Case("pad-wider-than-filter", (2, 2, 10), (3, 2, 3), padding=((11, 7),)),
    Case("pad-wider-than-signal", (1, 2, 3), (2, 2, 4), padding=((9, 0),)),
    Case("filter-longer-than-signal", (2, 2, 8), (3, 2, 21), padding=((10, 9),)),
    Case("filter-fills-padded-signal", (2, 2, 8), (3, 2, 13), padding=((0, 5),)),
    Case("dilated-past-the-padding", (2, 4, 30), (4, 2, 5), padding=((5, 2),), dilation=4, groups=2),
    Case("stride-leaves-a-rest", (2, 3, 47), (2, 3, 7), padding=((2, 0),), stride=3),
    Case("stride-above-span", (2, 2, 40), (3, 2, 3), padding=1, stride=5),
    Case("stride-and-dilation", (1, 2, 41), (2, 1, 4), padding=((3, 6),), stride=2, dilation=3, groups=2),
    Case("nothing-of-x-is-read", (1, 1, 1), (1, 1, 3), padding=((6, 0),), stride=5),
    Case("depthwise", (3, 5, 33), (5, 1, 4), padding=((3, 0),), groups=5),
    Case("channels-last", (2, 6, 30), (4, 6, 5), padding=2, layout="channels_last"),
    Case("expanded", (3, 2, 25), (2, 2, 6), given="expanded"),
    Case("swapped", (2, 3, 12, 9), (4, 3, 4, 3), padding=1, given="swapped"),
    # 2-D and 3-D: dimensions of which some fit one block and some do not
    Case("2d-one-dimension-cut", (2, 3, 5, 40), (4, 3, 3, 5), padding=((1, 1), (4, 0))),
    Case("2d-filter-in-one-dimension", (1, 2, 7, 26), (3, 2, 1, 6), padding=((0, 0), (2, 3))),
    Case("2d-mixed-strides", (2, 2, 15, 14), (2, 2, 4, 3), padding=((1, 2), (0, 1)), stride=(2, 1), dilation=(1, 2)),
    Case("2d-channels-last", (2, 4, 9, 11), (6, 2, 3, 3), padding=1, groups=2, layout="channels_last"),
    Case("3d", (1, 2, 6, 9, 12), (3, 2, 2, 3, 4), padding=((1, 0), (0, 2), (2, 1))),
    Case("3d-strided", (2, 1, 7, 6, 9), (2, 1, 3, 2, 2), padding=1, stride=(1, 2, 3), dilation=(2, 1, 1)),
)
BLOCKS = (0, 9, 10, 13, 16, 27, 64, 1000)  # odd, prime to everything, and longer than any of the signals

every_edge = pytest.mark.parametrize(
    ("shape", "op"), [pytest.param(shape, op, id=f"{shape.id}-{op}") for shape in EDGES for op in OPS]
)


@functools.lru_cache(maxsize=256)
def prepared(problem: Problem) -> tuple[oracle.Inputs, oracle.Answer]:
    inputs = oracle.make_inputs(problem, SEED)
    return inputs, oracle.answer(problem, inputs)


def run(problem: Problem, block: int, out: torch.Tensor | None = None) -> torch.Tensor | None:
    """One block's result; None when the filter is longer than the block."""
    try:
        built = ENGINE.build(problem, EngineConfig.of("fft", block=block), POLICY)
    except PlanRejected:
        return None
    return built.run(*prepared(problem)[0], out)


def error(problem: Problem, result: torch.Tensor) -> float:
    """Over what is accepted: 1 is the limit."""
    right = prepared(problem)[1]
    return oracle.worst(result, right, oracle.bound_for(problem, right, NOTES))


# --- the knob ---------------------------------------------------------------------------------------------------------


@every_edge
def test_every_block_is_right(shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    ran = 0
    for block in BLOCKS:
        result = run(problem, block)
        if result is None:
            continue
        ran += 1
        assert error(problem, result) <= 1, f"block {block}"
        assert normalize_strides(problem.output.dims, result.stride()) == problem.output.strides, f"block {block}"
    assert ran >= 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_short_dtypes_are_summed_in_float32(op: Op, dtype: str) -> None:
    problem = Problem.dense(op, (2, 4, 90), (4, 2, 12), dtype=dtype, padding=5, stride=2, groups=2)
    for block in (0, 16):
        result = run(problem, block)
        assert result is not None
        assert str(result.dtype) == f"torch.{dtype}"
        assert error(problem, result) <= 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", [1, 2], ids=["one-channel", "two-channels"])
def test_thousand_taps(op: Op, channels: int) -> None:
    problem = Problem.dense(op, (1, channels, 5000), (channels, channels, 1025), padding=[(700, 20)])
    for candidate in ENGINE.configs(problem, "measure"):
        result = run(problem, candidate.config.knob("block"))
        assert result is not None
        assert error(problem, result) <= 1, str(candidate.config)


@pytest.mark.parametrize("seed", range(40))
def test_block_and_chunks_never_change_the_result(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random problems: however the work is cut and whichever way spectra are multiplied, float64 results agree."""
    draw = random.Random(seed)
    problem = random_problem(draw)
    whole = run(problem, 0)
    assert whole is not None
    assert error(problem, whole) <= 1
    for chunk_bytes, products_from in itertools.product((1, 3000, 2**22), (0.0, 99.0)):
        monkeypatch.setitem(fft.CHUNK_BYTES, "cpu", chunk_bytes)
        monkeypatch.setattr(fft, "PRODUCTS_FROM", products_from)
        block = draw.choice((0, draw.randint(1, 60)))
        result = run(problem, block)
        assert result is None or error(problem, result) <= 1, f"block {block}, chunks of {chunk_bytes} B"


def random_problem(draw: random.Random) -> Problem:
    while True:
        rank = draw.choice((1, 1, 2, 3))
        groups = draw.choice((1, 1, 2, 3))
        largest, most_taps = {1: (60, 9), 2: (14, 4), 3: (7, 3)}[rank]
        op = draw.choice(OPS)

        def each(low: int, high: int, rank: int = rank) -> tuple[int, ...]:
            return tuple(draw.randint(low, high) for _ in range(rank))

        per_group = draw.choice((1, 2, 3))
        try:
            problem = Problem.dense(
                op,
                (draw.randint(1, 3), groups * per_group, *each(1, largest)),
                (groups * draw.choice((1, 2, 4)), per_group, *each(1, most_taps)),
                dtype="float64",
                layout=draw.choice(("contiguous", "channels_last")),
                padding=list(zip(each(0, 8), each(0, 8), strict=True)),
                stride=each(1, 3),
                dilation=each(1, 3),
                groups=groups,
                epilogue=Epilogue(bias=op != "wgrad" and draw.random() < 0.5),
            )
        except SpecError:  # a filter larger than its padded input
            continue
        if ENGINE.supports(problem).ok:
            return problem


# --- delivery ---------------------------------------------------------------------------------------------------------


@every_edge
def test_out_of_any_strides(shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    for block in (0, 27):
        out = torch.full([2 * size for size in problem.output.dims[::-1]], torch.nan).permute(
            *range(len(problem.output.dims))[::-1]
        )
        every_other = out[tuple(slice(None, None, 2) for _ in problem.output.dims)]
        result = run(problem, block, every_other)
        assert result is None or result is every_other
        assert result is None or error(problem, result) <= 1, f"block {block}"
        assert out.isnan().sum() >= out.numel() - problem.output.numel, "wrote beside out"


@pytest.mark.parametrize(
    "shape",
    [
        Case("1d", (2, 4, 40), (6, 2, 5), padding=2, groups=2, bias=True),
        Case("2d-strided", (2, 4, 11, 10), (6, 2, 3, 3), padding=1, stride=2, groups=2, bias=True),
        Case("3d-channels-last", (1, 2, 5, 6, 7), (4, 2, 2, 2, 2), layout="channels_last", bias=True),
    ],
    ids=lambda shape: shape.id,
)
@pytest.mark.parametrize("op", ["fprop", "dgrad"])
def test_bias(shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    for block in (0, 8, 16):
        result = run(problem, block)
        assert result is not None
        assert error(problem, result) <= 1, f"block {block}"


# --- what it says of itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [-1, 1, 32])
def test_block_shorter_than_the_span_is_refused(block: int) -> None:
    problem = Problem.dense("fprop", (1, 1, 100), (1, 1, 12), dilation=3)
    with pytest.raises(PlanRejected, match=f"block is {block}, expected 0 or at least the filter's span, 34"):
        ENGINE.build(problem, EngineConfig.of("fft", block=block), POLICY)


def test_refusals_have_reasons() -> None:
    pointwise = Problem.dense("fprop", (1, 8, 20, 20), (8, 8, 1, 1))
    empty = Problem.dense("fprop", (0, 8, 20), (8, 8, 3))
    for problem, word in ((pointwise, "one tap"), (empty, "no elements")):
        assert word in ENGINE.supports(problem).reason
        assert ENGINE.configs(problem, "measure") == ()
        with pytest.raises(PlanRejected, match=word):
            ENGINE.build(problem, EngineConfig.of("fft", block=0), POLICY)


@pytest.mark.parametrize(
    ("x", "w", "groups"),
    [
        ((1, 16, 16_384), (16, 16, 1025), 1),
        ((1, 1, 480_000), (1, 1, 48_000), 1),
        ((1, 1024, 4096), (1024, 1, 4), 1024),
        ((2, 96, 56, 56), (96, 1, 7, 7), 96),
        ((1, 4, 20, 20, 20), (4, 4, 3, 3, 3), 1),
        ((1, 1, 5), (1, 1, 3), 1),
    ],
)
def test_proposals_are_few_ordered_and_distinct(x: tuple[int, ...], w: tuple[int, ...], groups: int) -> None:
    for op in OPS:
        problem = Problem.dense(op, x, w, groups=groups)
        candidates = ENGINE.configs(problem, "measure")
        blocks = [candidate.config.knob("block") for candidate in candidates]
        assert 1 <= len(blocks) <= 5
        assert 0 in blocks
        assert len(set(blocks)) == len(blocks)
        assert [c.flops for c in candidates] == sorted(c.flops or 0 for c in candidates)
        longest = max(x[2:])
        assert all(block == 0 or max(w[2:]) <= block < 2 * longest for block in blocks)
        for candidate in candidates:
            assert ENGINE.build(problem, candidate.config, POLICY).workspace_bytes == candidate.workspace_bytes


def test_operations_tell_long_filters_from_short() -> None:
    long, short = (Problem.dense("fprop", (1, 4, 16_384), (4, 4, taps)) for taps in (1025, 2))
    best = {problem: ENGINE.configs(problem, "instant")[0].flops or 0 for problem in (long, short)}
    assert best[long] < long.flops / 10
    assert best[short] > short.flops


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem.dense("fprop", (1, 16, 16_384), (16, 16, 1025)),
        Problem.dense("fprop", (1, 64, 8_192), (64, 1, 1025), groups=64),
        Problem.dense("fprop", (1, 1, 60_000), (1, 1, 9_000)),
        Problem.dense("fprop", (4, 32, 40, 40), (32, 32, 5, 5), stride=2, dilation=2),
        Problem.dense("fprop", (32, 1, 4, 4), (256, 1, 4, 4), padding=3),
        Problem.dense("fprop", (2, 16, 96, 96), (16, 16, 5, 5), stride=2, dtype="bfloat16"),
    ],
    ids=["channels", "depthwise", "one-channel", "strided", "many-filters", "bfloat16"],
)
def test_workspace_covers_what_the_allocator_hands_out(problem: Problem, op: Op) -> None:
    problem = Problem(**{**{name: getattr(problem, name) for name in problem.__struct_fields__}, "op": op})
    inputs = oracle.make_inputs(problem, SEED)
    for candidate in ENGINE.configs(problem, "measure"):
        built = ENGINE.build(problem, candidate.config, POLICY)
        out = built.run(*inputs, None)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            built.run(*inputs, out)
        assert 0 < peak_bytes(recorded) <= built.workspace_bytes, str(candidate.config)


def peak_bytes(recorded: profile) -> int:
    """The most that was allocated at one time."""
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("least", [1, 2, 3, 7, 31, 97, 1025, 16_385, 17_500, 99_991, 527_999])
def test_good_lengths(least: int) -> None:
    length = good_length(least)
    assert length >= least
    assert length % 2 == 0
    assert length <= max(2, 1.2 * least + 2)
    for factor in (2, 3, 5, 7):
        while length % factor == 0:
            length //= factor
    assert length == 1

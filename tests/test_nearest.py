"""Shapes that vary: who is whose relative, what relatives foretell, and what a first sight makes of it.

Engines are scripted: their times follow from a problem's size by known laws, on a virtual clock, so that the best
configuration of every size is known and regret can be computed.
"""

from __future__ import annotations

import functools
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from helpers.fresh import fresh_process
from helpers.scaling import Law, OwnClock, ScalingEngine, work

import convplan
from convplan import Evidence, NoPlan, Policy, Problem, TensorSpec, _counts, _deciding, _environment, _ranks, _runtime
from convplan._nearest import (
    MOST_LIKELY,
    MOST_RELATIVES,
    Relatives,
    distance,
    family,
    likely,
)
from convplan._plan import PlanRecord
from convplan._planner import find_plans
from convplan._ranks import Board
from convplan._relatives import RELATIVE, plan_like
from convplan.engines.base import LAST_RESORT, Candidate, EngineConfig, Notes
from convplan.engines.fake import VirtualClock


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    with fresh_process():
        yield


def conv(height: int = 32, width: int | None = None, batch: int = 1, **changes: Any) -> Problem:
    """1x1 filters: a size has as many output positions as input positions."""
    taps = changes.pop("taps", 1)
    channels = changes.pop("channels", 2)
    dims = (batch, channels, height, height if width is None else width)
    filters = (2, channels // changes.get("groups", 1), taps, taps)
    return Problem.dense(changes.pop("op", "fprop"), dims, filters, **changes)


def rules(**changes: Any) -> Policy:
    return Policy(**{"engines": ("scaling",), "deterministic": False, "allow_tf32": False, **changes})


ENVIRONMENT = _environment.Environment("cpu", (("here", "1"),))


def timed(index: int, median_us: float | None, **changes: Any) -> Evidence:
    return Evidence(config=EngineConfig.of("scaling", index=index), median_us=median_us, samples_us=(1.0,), **changes)


def tuned(problem: Problem, times_us: dict[int, float], **changes: Any) -> PlanRecord:
    """A record as tuning leaves it: the configurations by time."""
    ranking = tuple(timed(index, times_us[index]) for index in sorted(times_us, key=times_us.__getitem__))
    fields = {"policy": rules(), "environment": ENVIRONMENT, "effort": "measure", "ranking": ranking, **changes}
    return PlanRecord(problem=problem, **fields)


def indices(found: Sequence[Any]) -> list[int]:
    return [one.evidence.config.knob("index") for one in found]


# Families


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(conv(33), id="size"),
        pytest.param(conv(32, 7), id="width"),
        pytest.param(conv(batch=8), id="batch"),
        pytest.param(conv(1), id="one-pixel"),
    ],
)
def test_batch_and_spatial_sizes_keep_the_family(other: Problem) -> None:
    assert family(conv()) is not None
    assert family(other) == family(conv())


def _with_alignment(problem: Problem, alignment_bytes: int) -> Problem:
    return msgspec.structs.replace(problem, x=msgspec.structs.replace(problem.x, alignment_bytes=alignment_bytes))


OTHERS = {
    "op": conv(op="dgrad"),
    "channels": conv(channels=4),
    "filter": conv(taps=3),
    "dtype": conv(dtype="bfloat16"),
    "layout": conv(layout="channels_last"),
    "alignment": _with_alignment(conv(), 4),
    "padding": conv(padding=1),
    "stride": conv(stride=2),
    "dilation": conv(taps=3, dilation=2),
    "groups": conv(groups=2),
    "bias": conv(epilogue=convplan.Epilogue(bias=True)),
    "device": conv(device="cuda"),
    "rank": Problem.dense("fprop", (1, 2, 32), (2, 2, 1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_another_family(name: str) -> None:
    assert family(OTHERS[name]) is not None
    reference = conv(taps=3) if name == "dilation" else conv()
    assert family(OTHERS[name]) != family(reference)


def test_other_strides_and_empty_problems_have_no_family() -> None:
    transposed = TensorSpec((1, 2, 32, 32), (2048, 1024, 1, 32), "float32")
    assert transposed.layout == "strided"
    assert family(msgspec.structs.replace(conv(), x=transposed)) is None
    assert family(conv(batch=0)) is None


# Distance


@pytest.mark.parametrize("seed", range(20))
def test_distance_is_a_metric(seed: int) -> None:
    draw = random.Random(seed)
    a, b, c = (conv(draw.randint(1, 99), draw.randint(1, 99), draw.randint(1, 9)) for _ in range(3))
    assert distance(a, a) == 0
    assert distance(a, b) == pytest.approx(distance(b, a))
    assert distance(a, b) > 0 or a == b
    assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-12


def test_work_counts_more_than_how_it_is_divided() -> None:
    here = conv(32, 32)
    assert distance(here, conv(40, 40)) < distance(here, conv(48, 48)) < distance(here, conv(16, 16))
    assert distance(here, conv(16, 64)) < distance(here, conv(32, 64))  # as much work, twice as much
    assert distance(here, conv(16, 16, batch=4)) < distance(here, conv(16, 16, batch=8))
    assert distance(here, conv(64, 64)) == pytest.approx(2 + 2 * 0.25)


def test_distance_follows_the_ratio_and_not_the_difference() -> None:
    assert distance(conv(10), conv(20)) == pytest.approx(distance(conv(100), conv(200)))


# What relatives foretell


def test_one_relative_speaks_by_its_ranking() -> None:
    found = likely(conv(40), [tuned(conv(32), {0: 9, 1: 3, 2: 4, 3: 5, 4: 6, 5: 7})])
    assert indices(found) == [1, 2, 3, 4]
    assert len(found) == MOST_LIKELY
    assert "ranked 1 for its relative x=1x2x32x32, 3.0 us there" in found[0].remark


def test_ties_of_a_relative_stay_in_its_order() -> None:
    # Tuning preferred the slower of two that tie; so do its relatives.
    ranking = (timed(2, 10.1), timed(1, 10.0), timed(0, 15.0))
    assert indices(likely(conv(40), [tuned(conv(32), {}, ranking=ranking)])) == [2, 1, 0]


@pytest.mark.parametrize("width", [33, 40, 60, 62, 64, 66, 70, 100, 127])
def test_between_two_relatives_the_crossing_is_found_where_nothing_was_measured(width: int) -> None:
    """Laws 2000 us and work us cross at a work of 2,000; powers of the work are interpolated exactly."""
    laws = [lambda size: 2000.0, lambda size: float(size), lambda size: 45 * size**0.6]
    relatives = [tuned(one, {i: law(work(one)) for i, law in enumerate(laws)}) for one in (conv(32), conv(32, 128))]
    here = conv(32, width)
    relatives.sort(key=lambda record: distance(here, record.problem))
    truth = sorted(range(3), key=lambda i: laws[i](work(here)))
    assert indices(likely(here, relatives)) == truth


def test_outside_of_both_the_nearest_decides_and_the_other_adds_what_it_lacks() -> None:
    near, far = tuned(conv(32), {0: 1.0, 1: 2.0}), tuned(conv(16), {2: 1.0, 1: 1.5, 0: 4.0})
    assert indices(likely(conv(40), [near, far])) == [0, 1, 2]


def test_a_configuration_that_one_side_never_timed_is_not_trusted_to_be_fast_there() -> None:
    low, high = tuned(conv(32), {0: 1.0, 1: 1.05}), tuned(conv(32, 128), {2: 1.0, 1: 1.05})
    assert indices(likely(conv(32, 64), [low, high]))[0] == 1


def test_what_is_compiled_when_built_comes_last() -> None:
    compiled = Notes(behavior=("RUNTIME_COMPILATION",))
    ranking = (timed(0, 1.0, notes=compiled), timed(1, 2.0), timed(2, 3.0, notes=compiled), timed(3, 4.0))
    assert indices(likely(conv(40), [tuned(conv(32), {}, ranking=ranking)])) == [1, 3, 0, 2]


@pytest.mark.parametrize("stage", ["verify", "run"])
@pytest.mark.parametrize("which", [0, 1])
def test_what_was_wrong_for_either_relative_is_left_out(stage: str, which: int) -> None:
    bad = (timed(0, None, rejected=stage, reason="wrong"),)
    pair = [tuned(conv(32), {0: 1.0, 1: 2.0}), tuned(conv(32, 128), {0: 1.0, 1: 2.0})]
    pair[which] = msgspec.structs.replace(pair[which], ranking=(timed(1, 2.0),), rejected=bad)
    assert indices(likely(conv(32, 64), pair)) == [1]


def test_what_was_too_slow_or_too_large_for_one_relative_may_run() -> None:
    slow = (timed(0, None, rejected="measure", reason="cut off"),)
    pair = [tuned(conv(32), {0: 1.0, 1: 9.0}), tuned(conv(32, 128), {1: 1.0}, rejected=slow)]
    assert 0 in indices(likely(conv(32, 34), pair))


@pytest.mark.parametrize("median_us", [None, 0.0])
def test_a_record_without_times_speaks_by_its_choice(median_us: float | None) -> None:
    ranking = (timed(3, median_us), timed(1, median_us))
    assert indices(likely(conv(40), [tuned(conv(32), {}, ranking=ranking)]))[0] == 3
    assert likely(conv(40), []) == []


# The index


def index(limit: int = 0) -> Relatives:
    return Relatives(lambda: limit)


def sizes(records: Sequence[PlanRecord]) -> list[tuple[int, ...]]:
    return [record.problem.x.dims[2:] for record in records]


def test_the_nearest_comes_first_and_then_one_from_the_other_side() -> None:
    known = index()
    for size in (8, 16, 20, 32, 64):
        assert known.add(tuned(conv(size), {0: 1.0}))
    assert sizes(known.nearest(conv(21), rules(), ENVIRONMENT)) == [(20, 20), (32, 32)]
    assert sizes(known.nearest(conv(31), rules(), ENVIRONMENT)) == [(32, 32), (20, 20)]
    assert sizes(known.nearest(conv(90), rules(), ENVIRONMENT, 3)) == [(64, 64), (32, 32), (20, 20)]
    assert len(known.nearest(conv(90), rules(), ENVIRONMENT, 99)) == 5


@pytest.mark.parametrize("changes", [{"allow_tf32": True}, {"workspace_limit_bytes": 0}, {"l2": "cold"}])
def test_records_of_other_rules_are_no_relatives(changes: dict[str, Any]) -> None:
    known = index()
    known.add(tuned(conv(), {0: 1.0}))
    assert known.nearest(conv(40), rules(**changes), ENVIRONMENT) == []
    assert known.nearest(conv(40), rules(tune_after=7), ENVIRONMENT) != []


def test_records_of_other_environments_families_and_efforts_are_no_relatives() -> None:
    known = index()
    elsewhere = _environment.Environment("cpu", (("here", "2"),))
    known.add(tuned(conv(), {0: 1.0}))
    assert known.nearest(conv(40), rules(), elsewhere) == []
    assert all(not known.nearest(one, rules(), ENVIRONMENT) for name, one in OTHERS.items() if name != "dilation")
    strided = msgspec.structs.replace(conv(), x=TensorSpec((1, 2, 32, 32), (2048, 1024, 1, 32), "float32"))
    assert not known.add(tuned(strided, {0: 1.0}))
    assert known.nearest(strided, rules(), ENVIRONMENT) == []
    assert sizes(known.nearest(conv(41), rules(), ENVIRONMENT)) == [(32, 32)]


def test_an_untuned_relative_speaks_for_those_near_it_until_one_is_tuned() -> None:
    known = index()
    assert known.add(tuned(conv(32), {0: 1.0}, effort="instant"))
    assert sizes(known.nearest(conv(40), rules(), ENVIRONMENT)) == [(32, 32)]
    assert known.nearest(conv(32, 65), rules(), ENVIRONMENT) == [], "more than a factor of two"
    known.add(tuned(conv(200), {1: 1.0}))
    assert sizes(known.nearest(conv(40), rules(), ENVIRONMENT)) == [(200, 200)]


def test_a_family_keeps_so_many_and_each_place_once() -> None:
    known = index()
    for size in range(1, 400):
        known.add(tuned(conv(size), {0: 1.0}))
    for width in range(1, 60):
        known.add(tuned(conv(2, 4 * width), {0: 1.0}))
    kept = known.nearest(conv(), rules(), ENVIRONMENT, 10_000)
    assert len(kept) <= MOST_RELATIVES
    known.add(tuned(conv(77), {5: 2.0}))
    assert known.nearest(conv(77), rules(), ENVIRONMENT)[0].config.knob("index") == 5


def test_families_are_kept_as_far_as_the_cache_limit_goes() -> None:
    known, none = index(limit=2), index(limit=-1)
    for channels in (1, 2, 3):
        known.add(tuned(conv(channels=channels), {0: 1.0}))
        none.add(tuned(conv(channels=channels), {0: 1.0}))
    assert [len(known.nearest(conv(40, channels=c), rules(), ENVIRONMENT)) for c in (3, 2)] == [1, 1]
    assert known.nearest(conv(40, channels=1), rules(), ENVIRONMENT) == []
    assert none.nearest(conv(40, channels=3), rules(), ENVIRONMENT) == []
    assert not any(none.claim(conv(size), rules(), ENVIRONMENT, shapes=2) for size in range(1, 99))


def test_an_index_keeps_no_single_timings() -> None:
    known = index()
    bad = (timed(7, None, rejected="verify"), timed(8, None, rejected="filter"))
    known.add(tuned(conv(), {i: 1.0 + i for i in range(100)}, rejected=bad))
    (kept,) = known.nearest(conv(40), rules(), ENVIRONMENT)
    assert len(kept.ranking) == 16
    assert all(one.samples_us == () for one in kept.ranking)
    assert [one.config.knob("index") for one in kept.rejected] == [7]


def test_what_the_store_holds_is_taken_in_once() -> None:
    known, calls = index(), []

    def load() -> list[PlanRecord]:
        calls.append(1)
        return [tuned(conv(), {0: 1.0})]

    for key in ("here", "here", "there"):
        known.load_once(key, load)
    assert len(calls) == 2
    assert known.nearest(conv(40), rules(), ENVIRONMENT)


# Claims: tuning for a family's sake


def test_a_family_is_worth_tuning_after_so_many_different_shapes() -> None:
    known = index()
    for _ in range(3):
        assert not any(known.claim(conv(size), rules(), ENVIRONMENT, shapes=5) for size in (20, 21, 22, 23))
    assert known.claim(conv(24), rules(), ENVIRONMENT, shapes=5)
    assert not known.claim(conv(25), rules(), ENVIRONMENT, shapes=5)
    assert known.claim(conv(100), rules(), ENVIRONMENT, shapes=5)
    assert not known.claim(OTHERS["channels"], rules(), ENVIRONMENT, shapes=5)


def test_near_a_tuned_relative_nothing_is_claimed() -> None:
    known = index()
    known.add(tuned(conv(32, 32), {0: 1.0}))
    assert not known.claim(conv(32, 64), rules(), ENVIRONMENT, shapes=1)
    assert known.claim(conv(32, 65), rules(), ENVIRONMENT, shapes=1)


@pytest.mark.parametrize("seed", range(5))
def test_claims_are_at_most_one_for_each_factor_of_two(seed: int) -> None:
    draw, known = random.Random(seed), index()
    stream = [conv(draw.randint(8, 64), draw.randint(8, 64)) for _ in range(1000)]
    claims = sum(known.claim(one, rules(), ENVIRONMENT, shapes=16) for one in stream)
    assert 2 <= claims <= math.log2(64 * 64 / (8 * 8)) + 1


def test_threads_that_meet_like_shapes_claim_one() -> None:
    known, claimed = index(), []
    barrier = threading.Barrier(8)

    def meet(size: int) -> None:
        barrier.wait()
        claimed.append(known.claim(conv(64, size), rules(), ENVIRONMENT, shapes=1))

    threads = [threading.Thread(target=meet, args=(60 + i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(claimed) == [False] * 7 + [True]


# Planning like a relative

LAWS = (Law(fixed_us=90), Law(fixed_us=50), Law(fixed_us=70))
UNTUNED, TUNED, SECOND = 0, 1, 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    virtual = OwnClock()
    monkeypatch.setattr(_deciding, "find_plans", functools.partial(find_plans, clock=virtual))
    return virtual


@pytest.fixture
def engine(clock: VirtualClock) -> ScalingEngine:
    """Untuned, its first configuration runs; tuned, the second, and behind it the third."""
    made = ScalingEngine(LAWS, clock)
    convplan.register_engine(made)
    return made


RELATIVES = [tuned(conv(32), {0: 90, 1: 50, 2: 70})]


def like(problem: Problem, relatives: Sequence[PlanRecord] = RELATIVES, **changes: Any) -> PlanRecord:
    record, plan = plan_like(problem, rules(**changes), ENVIRONMENT, relatives)
    assert plan.config == record.config
    return record


def test_a_plan_like_a_relatives_says_what_it_is(engine: ScalingEngine) -> None:
    record = like(conv(40))
    assert (record.effort, record.problem, record.environment) == ("instant", conv(40), ENVIRONMENT)
    assert [one.config.knob("index") for one in record.ranking] == [TUNED, SECOND, UNTUNED]
    for one in record.ranking:
        assert (one.source, one.verified, one.median_us, one.error) == (RELATIVE, "no", None, None)
    assert "ranked 1 for its relative x=1x2x32x32, 50.0 us there" in record.ranking[0].reason
    assert RELATIVE in record.explain()
    assert engine.asked == 0
    assert engine.built == [(conv(40), TUNED)]


def test_what_does_not_build_falls_to_the_next(engine: ScalingEngine) -> None:
    engine.laws[TUNED] = Law(builds=lambda problem: False)
    record = like(conv(40))
    assert record.config.knob("index") == SECOND
    assert [(one.config.knob("index"), one.rejected) for one in record.rejected] == [(TUNED, "build")]
    engine.laws = [Law(builds=lambda problem: False)] * 3
    with pytest.raises(NoPlan, match="does not build here") as caught:
        like(conv(40))
    assert len(caught.value.rejections) == 3


def test_what_needs_too_much_workspace_here_falls_to_the_next(engine: ScalingEngine) -> None:
    engine.laws[TUNED] = Law(workspace_bytes=work)
    assert like(conv(30), workspace_limit_bytes=1000).config.knob("index") == TUNED
    assert like(conv(40), workspace_limit_bytes=1000).config.knob("index") == SECOND


def test_the_filter_reads_the_relatives_notes(engine: ScalingEngine) -> None:
    notes = Notes(numerical=("TENSOR_CORE",))
    relative = tuned(conv(32), {}, ranking=(timed(1, 50.0, notes=notes), timed(2, 70.0)))
    assert like(conv(40), [relative]).config.knob("index") == SECOND
    assert like(conv(40), [relative], allow_tf32=True).ranking[0].notes == notes


def test_an_engine_that_can_be_asked_about_one_configuration_is(engine: ScalingEngine) -> None:
    class Asked(ScalingEngine):
        def spaces(self, problem: Problem) -> list[Any]:
            return []

        def candidate(self, problem: Problem, config: EngineConfig) -> Candidate:
            refused = "an erratum" if config.knob("index") == TUNED else ""
            return Candidate(config, Notes(behavior=("ASKED",)), refused=refused)

    convplan.register_engine(Asked(LAWS, engine.clock), replace=True)
    record = like(conv(40))
    assert record.config.knob("index") == SECOND
    assert record.ranking[0].notes.behavior == ("ASKED",)
    assert record.ranking[0].source == RELATIVE
    assert [(one.rejected, one.reason) for one in record.rejected] == [("filter", "an erratum")]


def test_what_was_learned_against_a_configuration_counts(engine: ScalingEngine) -> None:
    def learned(problem: Problem, candidate: Candidate) -> str:
        return "it crashed" if candidate.config.knob("index") == TUNED else ""

    record, _ = plan_like(conv(40), rules(), ENVIRONMENT, RELATIVES, learned=learned)
    assert record.config.knob("index") == SECOND
    assert record.rejected[0].reason == "it crashed"


def test_an_engine_that_may_not_run_or_refuses_is_left_out(engine: ScalingEngine) -> None:
    other = Evidence(config=EngineConfig("aten"), median_us=1.0)
    relative = tuned(conv(32), {}, ranking=(other, timed(2, 70.0)))
    record = like(conv(40), [relative])
    assert record.config.knob("index") == SECOND
    assert "not among those that may run" in record.rejected[0].reason
    engine.supports = lambda problem: convplan.Support(False, "not today")  # type: ignore[method-assign]
    with pytest.raises(NoPlan, match="not today"):
        like(conv(40), [relative])


def test_a_last_resort_stays_one_and_does_not_stand_alone(engine: ScalingEngine) -> None:
    last = timed(1, 50.0, source=LAST_RESORT)
    both = like(conv(40), [tuned(conv(32), {}, ranking=(last, timed(2, 70.0)))])
    assert [one.source for one in both.ranking] == [LAST_RESORT, RELATIVE]
    with pytest.raises(NoPlan, match="last resort"):
        like(conv(40), [tuned(conv(32), {}, ranking=(last,))])
    assert len(engine.built) == 1


# First sights


def decide(problem: Problem, **changes: Any) -> PlanRecord:
    return _deciding.decide(problem, rules(**changes))[1]


def tune(*problems: Problem) -> None:
    convplan.tune(problems, policy=rules())


def tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = problem.inputs
    return torch.randn(first.dims, generator=generator), torch.randn(second.dims, generator=generator)


def test_a_new_size_runs_by_its_relative_and_asks_nobody(engine: ScalingEngine) -> None:
    tune(conv(32))
    asked, built = engine.asked, len(engine.built)
    x, w = tensors(conv(40))
    with convplan.enabled(rules()):
        result = F.conv2d(x, w)
    torch.testing.assert_close(result, F.conv2d(x, w))
    assert engine.ran[-1] == (conv(40), TUNED)
    assert engine.asked == asked
    assert engine.built[built:] == [(conv(40), TUNED)]  # once: what planning built is what ran
    assert convplan.stats()["from_relative"] == 1
    assert convplan.stats()["planned"] == 1  # that of tune


def test_a_first_sight_costs_one_look_into_the_store(engine: ScalingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from convplan._snapshot import QuickReader
    from convplan._store import PlanStore

    tune(conv(32))
    decide(conv(33))  # reads the store's records, once
    calls: list[str] = []
    reads = [(QuickReader, name) for name in ("snapshot", "index", "raw_row", "raw_part", "find_elsewhere")]
    for kind, name in [*reads, *((PlanStore, name) for name in ("get", "rows", "put", "find_elsewhere"))]:
        real = getattr(kind, name)

        def counting(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
            calls.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(kind, name, counting)
    assert decide(conv(40)).ranking[0].source == RELATIVE
    assert calls == ["index"]


def test_the_nearest_is_the_one_that_counts(engine: ScalingEngine) -> None:
    engine.laws = [Law(fixed_us=500), Law(each_us=0.05), Law(fixed_us=80)]  # 2 overtakes 1 at a work of 1,600
    tune(conv(10), conv(100))
    assert decide(conv(11)).config.knob("index") == 1
    assert decide(conv(90)).config.knob("index") == 2


@pytest.mark.parametrize("name", ["dtype", "layout", "padding", "stride", "channels"])
def test_a_problem_of_another_family_is_planned_by_the_engines_order(engine: ScalingEngine, name: str) -> None:
    tune(conv(32))
    assert decide(OTHERS[name]).config.knob("index") == UNTUNED
    assert convplan.stats()["from_relative"] == 0


def test_when_no_relatives_choice_builds_the_engines_order_does_it(engine: ScalingEngine) -> None:
    tune(conv(32))
    engine.laws = [*LAWS, Law(fixed_us=100)]
    for i in range(3):
        engine.laws[i] = Law(builds=lambda problem: False)
    record = decide(conv(40))
    assert (record.config.knob("index"), record.ranking[0].source) == (3, "heuristic")
    assert convplan.stats()["from_relative"] == 0


def test_when_no_relatives_choice_runs_the_engines_order_does_it(engine: ScalingEngine) -> None:
    tune(conv(32))
    engine.laws = [msgspec.structs.replace(law, runs=lambda problem: False) for law in LAWS] + [Law(fixed_us=100)]
    x, w = tensors(conv(40))
    expected = F.conv2d(x, w)
    with convplan.enabled(rules(tune_after=9)):
        with pytest.warns(convplan.ConvPlanWarning, match="failed .*; using scaling.index=3"):
            torch.testing.assert_close(F.conv2d(x, w), expected)
        torch.testing.assert_close(F.conv2d(x, w), expected)
    assert [i for one, i in engine.ran if one == conv(40)] == [TUNED, SECOND, UNTUNED, 3, 3]
    assert convplan.stats()["failed"] == 1
    assert convplan.stats()["fell_back"] == 1


def test_when_nothing_runs_stock_torch_does_it(engine: ScalingEngine) -> None:
    tune(conv(32))
    engine.laws = [msgspec.structs.replace(law, runs=lambda problem: False) for law in LAWS]
    x, w = tensors(conv(40))
    expected = F.conv2d(x, w)
    with convplan.enabled(rules()), pytest.warns(convplan.ConvPlanWarning, match="stock torch"):
        torch.testing.assert_close(F.conv2d(x, w), expected)


def test_what_a_relative_gave_is_never_stored(engine: ScalingEngine) -> None:
    tune(conv(32))
    assert decide(conv(40)).ranking[0].source == RELATIVE
    _runtime.forget()
    with pytest.raises(convplan.ReplayMiss):
        decide(conv(40), mode="replay", effort="instant")


def test_a_problem_far_from_its_relatives_is_tuned_at_the_second_sight(engine: ScalingEngine) -> None:
    tune(conv(32))
    assert decide(conv(32, 65)).effort == "instant"
    record = decide(conv(32, 65))
    assert record.effort == "measure"
    assert len(record.ranking) == 3
    assert all(one.verified == "full" for one in record.ranking)


@pytest.mark.parametrize("tune_after", [2, 3])
def test_a_problem_with_a_near_relative_is_tuned_later_since_little_is_to_be_gained(
    engine: ScalingEngine, tune_after: int
) -> None:
    tune(conv(32))
    efforts = [decide(conv(32, 64), tune_after=tune_after).effort for _ in range(30)]
    assert efforts.index("measure") + 1 == 8 * tune_after


def test_who_wants_every_problem_tuned_at_once_gets_that(engine: ScalingEngine) -> None:
    tune(conv(32))
    assert [decide(conv(32, 32 + i), tune_after=1).effort for i in range(1, 5)] == ["measure"] * 4


def test_relatives_come_from_the_store_in_another_process(engine: ScalingEngine) -> None:
    tune(conv(32))
    _runtime.forget()
    asked = engine.asked
    assert decide(conv(40)).ranking[0].source == RELATIVE
    assert engine.asked == asked
    assert convplan.stats()["from_store"] == 0


def test_without_the_setting_the_engines_order_decides(engine: ScalingEngine) -> None:
    tune(conv(32))
    assert decide(conv(40), nearest=False).config.knob("index") == UNTUNED
    assert decide(conv(41), effort="instant").config.knob("index") == UNTUNED


@pytest.mark.behaviour("B29")
@pytest.mark.parametrize("restart", [False, True])
def test_a_deterministic_policy_has_no_relatives(engine: ScalingEngine, restart: bool) -> None:
    """Whatever was tuned before, here or in the store, and however many shapes came, a problem has the same plan."""
    policy = rules(deterministic=True)
    convplan.tune([conv(32)], policy=policy)
    if restart:
        _runtime.forget()
    for size in range(33, 80):
        assert _deciding.decide(conv(size), policy)[1].config.knob("index") == UNTUNED
    assert _deciding.decide(conv(32), policy)[1].config.knob("index") == TUNED
    assert convplan.stats()["tuned"] == 1


@pytest.mark.behaviour("C6")
def test_replay_runs_by_relatives_where_it_may_and_counts_the_misses(engine: ScalingEngine) -> None:
    tune(conv(32))
    _runtime.forget()
    asked = engine.asked
    for size in range(33, 60):
        record = decide(conv(size), mode="replay", replay_miss="instant", tune_after=1)
        assert record.config.knob("index") == TUNED
    assert engine.asked == asked
    assert convplan.stats()["tuned"] == 1
    assert convplan.stats()["replay_misses"] == 27
    with pytest.raises(convplan.ReplayMiss):
        decide(conv(61), mode="replay")
    assert convplan.stats()["replay_misses"] == 28


# Patience by family


def test_a_family_of_many_shapes_is_tuned_although_none_comes_twice(engine: ScalingEngine) -> None:
    efforts = [decide(conv(32, 32 + i)).effort for i in range(30)]
    assert efforts == ["instant"] * 15 + ["measure"] + ["instant"] * 14
    assert [decide(conv(32, 32 + i)).config.knob("index") for i in (14, 15, 29)] == [TUNED] * 3
    assert convplan.stats()["from_relative"] == 28, "by what was tuned, and before by the first of them"
    assert convplan.stats()["planned"] == 3, "the first, the one for all, and the one that was met again"


def test_families_take_no_more_than_their_share_of_the_time(
    engine: ScalingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tuned_sizes(sizes: range) -> int:
        return [decide(conv(size)).effort for size in sizes].count("measure")

    monkeypatch.setattr(_counts.counts, "families_s", 0.0)
    monkeypatch.setattr(_deciding, "FAMILIES_SHARE", 1e-9)
    assert tuned_sizes(range(20, 200)) == 1, "the first of them is always within it"
    monkeypatch.setattr(_deciding, "FAMILIES_SHARE", 1e9)
    assert tuned_sizes(range(200, 900, 5)) > 1


def test_shapes_of_a_varying_family_that_come_again_share_in_that_time(
    engine: ScalingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_deciding, "FAMILIES_SHARE", -1.0)
    met = [conv(32, 32 + i) for i in range(20)]
    assert {decide(one).effort for one in met * 3} == {"instant"}
    tune(conv(32, 40))
    again = decide(met[0])
    assert (again.effort, again.ranking[0].source) == ("instant", RELATIVE), "by what was tuned since it was met"
    assert again.config.knob("index") == TUNED
    monkeypatch.setattr(_deciding, "FAMILIES_SHARE", 1e9)
    efforts = [decide(met[0]).effort for _ in range(20)]
    assert set(efforts) == {"instant", "measure"}
    assert efforts == sorted(efforts)
    monkeypatch.setattr(_deciding, "FAMILIES_SHARE", -1.0)
    other = conv(32, channels=4)
    assert [decide(other).effort for _ in range(2)] == ["instant", "measure"], "the one shape of its family"


@pytest.mark.parametrize("ranks", ["agree", "alone"])
def test_a_plan_that_ranks_agreed_on_is_not_left_for_a_relatives(
    engine: ScalingEngine, monkeypatch: pytest.MonkeyPatch, ranks: str
) -> None:
    store = torch.distributed.HashStore()
    board = Board(lambda: store, 0, 2)
    monkeypatch.setattr(_ranks, "current", lambda: board)
    monkeypatch.setattr(_deciding, "FAMILIES_SHARE", -1.0)
    policy = {"ranks": ranks, "tune_after": 2}
    met = [conv(32, 32 + i) for i in range(20)]
    before = [decide(one, **policy).config for one in met]
    tune(conv(32, 40))
    time.sleep(0.2)  # a rank looks at the board only now and then
    after = [decide(met[0], **policy).config for _ in range(4)][-1]
    board.close()
    assert (after == before[0]) == (ranks == "agree")


def test_a_family_waits_longer_under_a_more_patient_policy(engine: ScalingEngine) -> None:
    efforts = [decide(conv(32, 32 + i), tune_after=3).effort for i in range(26)]
    assert efforts.index("measure") == 23


def test_the_limit_on_tuning_holds_for_families_too(engine: ScalingEngine) -> None:
    for i in range(40):
        assert decide(conv(32, 32 + i), tuning_limit_s=0).effort == "instant"
    assert convplan.stats()["tuned"] == 0


def test_a_family_whose_tuning_breaks_off_is_not_tuned_again_and_again(
    engine: ScalingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*args: Any, effort: Any, **kwargs: Any) -> PlanRecord:
        if effort == "measure":
            raise MemoryError("no room")
        return find_plans(*args, effort=effort, **kwargs)

    monkeypatch.setattr(_deciding, "find_plans", breaks)
    with pytest.warns(convplan.ConvPlanWarning, match="tuning broke off"):
        efforts = {decide(conv(32, 32 + i)).effort for i in range(40)}
    assert efforts == {"instant"}
    assert convplan.stats()["failed"] == 1


STREAMS = {
    # Overheads against rates, as of kernels that start fast and of those that stream well; crossings at 640 and 3,200.
    "overheads": [
        Law(fixed_us=400, each_us=0.9),
        Law(fixed_us=8, each_us=0.1),
        Law(fixed_us=40, each_us=0.05),
        Law(fixed_us=120, each_us=0.025),
    ],
    # Powers of the work.
    "powers": [Law(fixed_us=900), Law(each_us=0.1), Law(each_us=2, power=0.6), Law(each_us=0.02, power=1.2)],
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_300_sizes_costs_a_few_tunings_and_little_regret(
    engine: ScalingEngine, name: str, seed: int
) -> None:
    engine.laws = STREAMS[name]
    draw = random.Random(seed)
    places = draw.sample([(high, wide) for high in range(12, 97) for wide in range(12, 97)], 300)
    stream = [conv(*place) for place in places]  # none twice
    chosen = [decide(one).config for one in stream]
    most = math.log2(max(map(work, stream)) / min(map(work, stream))) + 1
    assert 2 <= convplan.stats()["tuned"] <= most
    warm = sorted(engine.regret(one, config) for one, config in zip(stream[100:], chosen[100:], strict=True))
    assert warm[int(0.95 * len(warm))] <= 1.05
    assert engine.regret(stream[0], chosen[0]) > 1.05  # what the engine's own order costs


def test_threads_that_meet_the_same_new_shapes_choose_alike_and_tune_once(engine: ScalingEngine) -> None:
    stream = [conv(16, 16 + i) for i in range(40)]
    found: list[list[PlanRecord]] = []
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work_through() -> None:
        try:
            barrier.wait()
            found.append([decide(one, tune_after=2) for one in stream])
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work_through) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(found) == 2
    by_effort = convplan.stats()
    assert by_effort["tuned"] <= len(stream)  # each was seen twice, and none tuned twice
    assert all(decide(one).config.knob("index") == TUNED for one in stream)
    assert by_effort["from_relative"] + by_effort["planned"] >= len(stream)

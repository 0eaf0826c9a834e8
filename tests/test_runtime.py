"""After planning: when a problem is tuned, what is remembered and for how long, and what happens when a plan fails.

Engines are scripted and planning runs on a virtual clock, so that which plan runs is known, and is read from the
engine's own counts. Convolutions go through torch's dispatcher, as a user's do.
"""

from __future__ import annotations

import functools
import gc
import json
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fresh import fresh_process
from helpers.plans import run_python
from helpers.scripted import SECOND_BEST, TUNED, UNTUNED, ran, registered, rules, take, tensors

import convplan
from convplan import (
    ConvPlanWarning,
    NoPlan,
    Policy,
    PolicyError,
    Problem,
    ReplayMiss,
    SpecError,
    TensorSpec,
    _choices,
    _counts,
    _deciding,
    _runtime,
)
from convplan._choices import known
from convplan._counts import DEFAULT_CACHE_LIMIT, cache_limit
from convplan._lru import LeastRecentlyUsed
from convplan._planner import find_plans
from convplan.engines import registry
from convplan.engines.fake import FakeEngine, VirtualClock
from convplan.torch_ops.statistics import convolution_with_statistics

NAMES = "hits misses planned tuned from_store from_relative from_rank replay_misses restored compiled fell_back failed"
NONE = dict.fromkeys([*NAMES.split(), "left_to_torch", "capture_misses"], 0)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    with fresh_process():
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualClock:
    """Planning's clock, which only scripts move."""
    virtual = VirtualClock()
    monkeypatch.setattr(_deciding, "find_plans", functools.partial(find_plans, clock=virtual))
    return virtual


@pytest.fixture
def mine(clock: VirtualClock) -> FakeEngine:
    """Registered as `mine`. Untuned, its first candidate runs; tuned, the second, which is faster."""
    return registered(clock)


def counted(call: Callable[[], object]) -> dict[str, int]:
    """Counters that a call raised."""
    before = convplan.stats()
    call()
    return {name: value - before[name] for name, value in convplan.stats().items() if value != before[name]}


@contextmanager
def our_warnings(number: int, said: str = "") -> Iterator[None]:
    """Exactly so many warnings of ours inside, each with this text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(one.message) for one in caught if issubclass(one.category, ConvPlanWarning)]
    assert len(texts) == number, texts
    assert all(said in text for text in texts), texts


def in_thread(work: Callable[[], Any]) -> Any:
    """What some work returns in a thread of its own; its error is raised here."""
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]
    return found[0]


def problem_of(x: torch.Tensor, w: torch.Tensor, op: Any = "fprop") -> Problem:
    return convplan.problem(op, x, w)


# When a problem is tuned

ENTRIES: dict[str, Callable[[Policy], Callable[..., torch.Tensor]]] = {
    "torch": lambda policy: (convplan.enable(policy), F.conv2d)[1],
    "convplan": lambda policy: functools.partial(convplan.conv2d, policy=policy),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("tune_after", [1, 2, 5])
def test_a_problem_is_tuned_at_the_sighting_that_the_policy_names(
    mine: FakeEngine, tune_after: int, entry: str
) -> None:
    x, w = tensors()
    conv = ENTRIES[entry](rules(tune_after=tune_after))
    for sighting in range(1, 8):
        which = ran(mine, lambda: conv(x, w))
        assert convplan.stats()["tuned"] == (1 if sighting >= tune_after else 0)
        if sighting != tune_after:
            assert which == [UNTUNED if sighting < tune_after else TUNED]
        else:
            assert set(which) == {0, 1, 2}  # all were measured


@pytest.mark.parametrize("entry", ENTRIES)
def test_results_are_right_before_and_after_tuning(mine: FakeEngine, entry: str) -> None:
    x, w = tensors()
    expected = F.conv2d(x, w)
    conv = ENTRIES[entry](rules(tune_after=3))
    for _ in range(5):
        torch.testing.assert_close(conv(x, w), expected)


def test_each_problem_is_counted_by_itself(mine: FakeEngine) -> None:
    convplan.enable(rules(tune_after=3))
    for _ in range(2):
        for size in (5, 6, 7):
            F.conv2d(*tensors(size))
    assert convplan.stats()["tuned"] == 0
    F.conv2d(*tensors(6))
    assert convplan.stats()["tuned"] == 1


@pytest.mark.behaviour("B29")
def test_a_deterministic_policy_never_changes_the_plan_in_mid_run(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(deterministic=True, tune_after=2))
    results = []
    assert ran(mine, lambda: results.extend(F.conv2d(x, w) for _ in range(10))) == [UNTUNED] * 10
    assert convplan.stats()["tuned"] == 0
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.behaviour("B29")
def test_a_deterministic_policy_may_tune_at_first_sight(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(deterministic=True, tune_after=1))
    F.conv2d(x, w)
    assert convplan.stats()["tuned"] == 1
    assert ran(mine, lambda: [F.conv2d(x, w) for _ in range(5)]) == [TUNED] * 5


def test_torchs_own_switch_is_seen_at_once(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(deterministic=None, tune_after=2))
    for _ in range(3):
        F.conv2d(x, w)
    assert ran(mine, lambda: F.conv2d(x, w)) == [TUNED]
    torch.use_deterministic_algorithms(True)
    try:
        # Another question: untuned, and it stays so.
        assert ran(mine, lambda: [F.conv2d(x, w) for _ in range(4)]) == [UNTUNED] * 4
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran(mine, lambda: F.conv2d(x, w)) == [TUNED]


def test_effort_instant_never_measures(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(effort="instant", tune_after=1))
    assert ran(mine, lambda: [F.conv2d(x, w) for _ in range(6)]) == [UNTUNED] * 6
    assert convplan.stats() == {**NONE, "hits": 5, "misses": 1, "planned": 1}


def test_a_process_tunes_for_so_long_and_no_longer(mine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_counts.counts, "tuning_s", 0.0)
    convplan.enable(rules(tune_after=2, tuning_limit_s=1e-6, nearest=False))
    first, second = tensors(6), tensors(7)
    for _ in range(3):
        F.conv2d(*first)
    assert ran(mine, lambda: F.conv2d(*first)) == [TUNED]
    assert _counts.counts.tuning_s > 1e-6
    assert ran(mine, lambda: [F.conv2d(*second) for _ in range(4)]) == [UNTUNED] * 4
    assert counted(lambda: F.conv2d(*second)) == {"hits": 1}
    x, w = tensors(8)
    convplan.tune([convplan.problem("fprop", x, w)], policy=_choices.state.policy)  # asked for by name
    assert ran(mine, lambda: F.conv2d(x, w)) == [TUNED]
    convplan.enable(rules(tune_after=2))  # no limit any more
    for _ in range(3):
        F.conv2d(*second)
    assert ran(mine, lambda: F.conv2d(*second)) == [TUNED]


@pytest.mark.parametrize("entry", ["enabled", "function"])
def test_a_limit_of_nothing_tunes_nothing(mine: FakeEngine, entry: str) -> None:
    x, w = tensors()
    policy = rules(tune_after=1, tuning_limit_s=0)
    with convplan.enabled(policy):
        conv = F.conv2d if entry == "enabled" else convplan.conv2d
        assert ran(mine, lambda: [conv(x, w) for _ in range(3)]) == [UNTUNED] * 3
    assert convplan.stats()["tuned"] == 0


def test_another_number_of_threads_is_another_question(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=1))
    F.conv2d(x, w)
    torch.set_num_threads(2)
    with our_warnings(1, "threads 1 -> 2"):
        assert counted(lambda: F.conv2d(x, w)) == {"misses": 1, "planned": 1, "tuned": 1}
    torch.set_num_threads(1)
    assert counted(lambda: F.conv2d(x, w)) == {"hits": 1}


# Replay


@pytest.mark.behaviour("C6")
@pytest.mark.parametrize("entry", ENTRIES)
def test_replay_raises_for_what_is_not_stored(mine: FakeEngine, entry: str) -> None:
    x, w = tensors()
    conv = ENTRIES[entry](rules(mode="replay"))
    for _ in range(3):
        with pytest.raises(ReplayMiss) as caught:
            conv(x, w)
    assert caught.value.problem == str(problem_of(x, w))
    assert "convplan.tune" in str(caught.value)
    assert mine.runs == [0, 0, 0]
    assert convplan.stats()["planned"] == 0
    assert convplan.stats()["failed"] == convplan.stats()["replay_misses"] == 3


@pytest.mark.behaviour("C6")
@pytest.mark.parametrize("entry", ENTRIES)
def test_replay_runs_what_was_tuned_before(mine: FakeEngine, entry: str) -> None:
    x, w = tensors()
    conv = ENTRIES[entry](rules(mode="replay"))
    with pytest.raises(ReplayMiss):
        conv(x, w)
    convplan.tune([problem_of(x, w)], policy=rules())
    assert ran(mine, lambda: [conv(x, w) for _ in range(3)]) == [TUNED] * 3
    assert convplan.stats()["tuned"] == 1  # that of `tune`


@pytest.mark.behaviour("C6")
def test_replay_may_run_untuned_plans_instead(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(mode="replay", replay_miss="instant", tune_after=1))
    assert ran(mine, lambda: [F.conv2d(x, w) for _ in range(5)]) == [UNTUNED] * 5
    assert convplan.stats() == {**NONE, "hits": 4, "misses": 1, "planned": 1, "replay_misses": 1}
    # And does not put them into the store, where another replay would take them for tuned ones.
    _runtime.forget()
    with pytest.raises(ReplayMiss):
        convplan.plan(problem_of(x, w), rules(mode="replay"))


@pytest.mark.behaviour("C6")
def test_replay_never_tunes_on_request_either(mine: FakeEngine) -> None:
    problem = problem_of(*tensors())
    for ask in (convplan.plan, lambda one, policy: convplan.tune([one], policy=policy)):
        with pytest.raises(ReplayMiss):
            ask(problem, rules(mode="replay"))
    assert mine.runs == [0, 0, 0]
    convplan.tune([problem], policy=rules())
    assert convplan.plan(problem, rules(mode="replay")).config.knob("index") == TUNED


# How much is remembered


@pytest.mark.behaviour("B20")
@pytest.mark.parametrize(
    ("text", "limit"), [(None, DEFAULT_CACHE_LIMIT), ("5", 5), ("0", 0), ("-1", -1), (" 7 ", 7), ("10000", 10_000)]
)
def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str | None, limit: int) -> None:
    if text is not None:
        monkeypatch.setenv("CONVPLAN_CACHE_LIMIT", text)
    assert DEFAULT_CACHE_LIMIT == 10_000
    with our_warnings(0):
        assert cache_limit() == limit


@pytest.mark.behaviour("B20")
@pytest.mark.parametrize("text", ["many", "1.5", "", "1e3"])
def test_a_limit_that_is_no_integer_warns_once_and_is_the_default(
    monkeypatch: pytest.MonkeyPatch, mine: FakeEngine, text: str
) -> None:
    monkeypatch.setenv("CONVPLAN_CACHE_LIMIT", text)
    with our_warnings(1, f"CONVPLAN_CACHE_LIMIT is {text!r}, expected an integer"):
        assert cache_limit() == DEFAULT_CACHE_LIMIT
        convplan.enable(rules())
        for size in (4, 5, 6):
            F.conv2d(*tensors(size))
        assert counted(lambda: [F.conv2d(*tensors(size)) for size in (4, 5, 6)])["hits"] == 3


@pytest.mark.behaviour("B20")
def test_the_one_used_longest_ago_is_forgotten_and_a_hit_makes_it_the_newest(
    monkeypatch: pytest.MonkeyPatch, mine: FakeEngine
) -> None:
    monkeypatch.setenv("CONVPLAN_CACHE_LIMIT", "2")
    convplan.enable(rules(effort="instant"))
    calls = {name: functools.partial(F.conv2d, *tensors(size)) for name, size in (("a", 5), ("b", 6), ("c", 7))}
    for name, is_hit in [("a", 0), ("b", 0), ("a", 1), ("c", 0), ("a", 1), ("b", 0), ("c", 0), ("a", 0)]:
        before = convplan.stats()["hits"]
        calls[name]()
        assert convplan.stats()["hits"] - before == is_hit


@pytest.mark.behaviour("B20")
def test_no_limit_and_no_caching(monkeypatch: pytest.MonkeyPatch, mine: FakeEngine) -> None:
    shapes = range(3, 15)
    convplan.enable(rules(effort="instant"))
    monkeypatch.setenv("CONVPLAN_CACHE_LIMIT", "0")
    for _ in range(2):
        for size in shapes:
            F.conv2d(*tensors(size))
    assert convplan.stats()["hits"] == len(shapes)
    monkeypatch.setenv("CONVPLAN_CACHE_LIMIT", "-1")
    _runtime.forget()
    found = counted(lambda: [F.conv2d(*tensors(5)) for _ in range(4)])
    assert "hits" not in found
    assert found["misses"] == 4


@pytest.mark.behaviour("B20")
def test_least_recently_used_is_a_dict_with_an_end() -> None:
    kept: LeastRecentlyUsed[str, int] = LeastRecentlyUsed(2)
    for number, name in enumerate("aba"):
        kept.add(name, number)
    kept.add("c", 9)
    assert dict(kept) == {"a": 2, "c": 9}
    nothing: LeastRecentlyUsed[str, int] = LeastRecentlyUsed(-1)
    nothing.add("a", 1)
    assert len(nothing) == 0
    unlimited: LeastRecentlyUsed[int, int] = LeastRecentlyUsed(0)
    for number in range(1000):
        unlimited.add(number, number)
    assert len(unlimited) == 1000


# Counters


def test_counters_are_exact(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=2))
    steps = [
        (lambda: F.conv2d(x, w), {"misses": 1, "planned": 1}),
        (lambda: F.conv2d(x, w), {"hits": 1, "planned": 1, "tuned": 1}),
        (lambda: F.conv2d(x, w), {"hits": 1}),
        (lambda: F.conv2d(x, w, stride=2), {"misses": 1, "planned": 1}),
        (lambda: _runtime.forget(), {}),
        (lambda: F.conv2d(x, w), {"misses": 1, "from_store": 1}),
        (lambda: F.conv2d(x, w), {"hits": 1}),
        (lambda: F.conv2d(x.int(), w.int()), {"misses": 1, "left_to_torch": 1}),  # torch's own
        (lambda: F.conv2d(x[:0], w), {"misses": 1}),
    ]
    for step, expected in steps:
        assert counted(step) == expected
    total = {"hits": 3, "misses": 5, "planned": 3, "tuned": 1, "from_store": 1, "left_to_torch": 1}
    assert convplan.stats(reset=True) == {**NONE, **total}
    assert convplan.stats() == NONE


def test_nothing_is_counted_while_off(mine: FakeEngine) -> None:
    x, w = tensors()
    with convplan.enabled(rules()):
        F.conv2d(x, w)
    convplan.stats(reset=True)
    F.conv2d(x, w)
    assert convplan.stats() == NONE


def test_forward_and_both_gradients_are_counted(mine: FakeEngine) -> None:
    x, w = (t.requires_grad_() for t in tensors())
    convplan.enable(rules(effort="instant"))
    F.conv2d(x, w).sum().backward()
    assert convplan.stats() == {**NONE, "misses": 2, "planned": 3}
    F.conv2d(x, w).sum().backward()
    assert convplan.stats() == {**NONE, "misses": 2, "planned": 3, "hits": 2}


@pytest.mark.behaviour("B7")
def test_an_empty_problem_touches_no_engine(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=1))
    assert F.conv2d(x[:0], w).shape == (0, 4, 4, 4)
    assert convplan.conv2d(x[:0], w).shape == (0, 4, 4, 4)
    assert mine.builds == [0, 0, 0]


# Threads


@pytest.mark.behaviour("B22")
def test_the_choice_is_shared_by_threads_and_plans_are_not(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=1))
    F.conv2d(x, w)
    builds = list(mine.builds)
    assert ran(mine, lambda: in_thread(lambda: F.conv2d(x, w))) == [TUNED]
    assert convplan.stats() == {**NONE, "misses": 2, "planned": 1, "tuned": 1}
    assert [new - old for old, new in zip(builds, mine.builds, strict=True)] == [0, 1, 0]


def layers(number: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """Layers that are one problem, and their input; no input of theirs needs a gradient."""
    weights = [torch.nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(number)]
    return torch.nn.Sequential(*weights), torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_layers_of_one_network_that_share_a_problem_are_no_repetition(mine: FakeEngine, autocast: bool) -> None:
    network, x = layers(5)
    convplan.enable(rules(tune_after=2))
    tuned = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            network(x).float().square().sum().backward()
        tuned.append(convplan.stats()["tuned"])
    # fprop, and where they are asked for dgrad and wgrad
    assert tuned == [0, 3]


def test_a_weight_that_takes_the_place_of_one_that_is_gone_counts_on(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=3))
    for sighting in (1, 2, 3):
        assert convplan.stats()["tuned"] == 0, sighting
        F.conv2d(x, w.clone())
    assert convplan.stats()["tuned"] == 1


def test_more_weights_than_are_told_apart_count_in_the_end(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=2))
    weights = [w.clone() for _ in range(_choices.MOST_LAYERS + 1)]
    for one in weights[:-1]:
        F.conv2d(x, one)
    assert convplan.stats()["tuned"] == 0
    F.conv2d(x, weights[-1])
    assert convplan.stats()["tuned"] == 1


@pytest.mark.behaviour("B22")
def test_sightings_of_all_threads_count_together(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=3))
    F.conv2d(x, w)
    in_thread(lambda: F.conv2d(x, w))
    assert convplan.stats()["tuned"] == 0
    in_thread(lambda: F.conv2d(x, w))
    assert convplan.stats()["tuned"] == 1
    # The thread that began untuned takes over what another one tuned.
    assert ran(mine, lambda: F.conv2d(x, w)) == [TUNED]


@pytest.mark.behaviour("B36")
@pytest.mark.behaviour("B22")
def test_many_threads_at_once_tune_each_problem_once_and_get_right_results(mine: FakeEngine) -> None:
    threads, rounds, sizes = 6, 8, (4, 5, 6)
    data = {size: tensors(size) for size in sizes}
    expected = {size: F.conv2d(*data[size]) for size in sizes}
    convplan.enable(rules(tune_after=2))
    barrier, errors = threading.Barrier(threads), []

    def work(number: int) -> None:
        barrier.wait(30)
        for turn in range(rounds):
            for size in sizes if number % 2 else reversed(sizes):
                try:
                    torch.testing.assert_close(F.conv2d(*data[size]), expected[size])
                except BaseException as exc:
                    errors.append((turn, exc))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert errors == []
    found = convplan.stats()
    assert found["tuned"] == len(sizes)
    assert found["misses"] == threads * len(sizes)
    assert found["hits"] + found["misses"] == threads * rounds * len(sizes)  # also those of threads that are gone
    assert found["failed"] == found["fell_back"] == 0


# Plans that fail while they run


def break_now(engine: FakeEngine, *indices: int, fails: Any = "run") -> None:
    """From here on these candidates fail when they run."""
    script = list(engine.script)
    for index in indices:
        script[index] = take(script[index].time_us, fails=fails, good_runs=engine.runs[index])
    engine.script = tuple(script)


@pytest.mark.behaviour("B18")
@pytest.mark.behaviour("B23")
@pytest.mark.parametrize("fails", ["run", "memory", "late"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_next_ranked_takes_over_when_a_plan_fails(mine: FakeEngine, entry: str, fails: Any) -> None:
    x, w = tensors()
    expected = F.conv2d(x, w)
    conv = ENTRIES[entry](rules(tune_after=1))
    conv(x, w)
    break_now(mine, TUNED, fails=fails)
    convplan.stats(reset=True)
    with our_warnings(1, "plan mine[index=1] failed (the script says"):
        results = []
        assert ran(mine, lambda: results.append(conv(x, w))) == [TUNED, SECOND_BEST]
        torch.testing.assert_close(results[0], expected)
        assert ran(mine, lambda: [conv(x, w) for _ in range(3)]) == [SECOND_BEST] * 3  # not tried again
    # A failure has every thread look its plans up again.
    assert convplan.stats() == {**NONE, "hits": 3, "misses": 1, "fell_back": 1, "failed": 1}


@pytest.mark.behaviour("B23")
def test_it_goes_down_the_ranking_as_far_as_needed(mine: FakeEngine) -> None:
    x, w = tensors()
    expected = F.conv2d(x, w)
    convplan.enable(rules(tune_after=1))
    F.conv2d(x, w)
    break_now(mine, TUNED, SECOND_BEST)
    with our_warnings(1):
        torch.testing.assert_close(F.conv2d(x, w), expected)
        assert ran(mine, lambda: F.conv2d(x, w)) == [UNTUNED]
    record = convplan.plan(problem_of(x, w), rules(tune_after=1))
    assert [evidence.config.knob("index") for evidence in record.ranking] == [UNTUNED]
    assert {e.config.knob("index"): (e.rejected, "the script says" in e.reason) for e in record.rejected} == {
        TUNED: ("run", True),
        SECOND_BEST: ("run", True),
    }


@pytest.mark.behaviour("B23")
def test_an_untuned_plan_that_fails_is_replaced_and_tuning_goes_on(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=4))
    F.conv2d(x, w)
    break_now(mine, UNTUNED)
    with our_warnings(1):
        assert ran(mine, lambda: F.conv2d(x, w)) == [UNTUNED, TUNED]
    F.conv2d(x, w)
    assert convplan.stats()["tuned"] == 0
    F.conv2d(x, w)
    assert convplan.stats()["tuned"] == 1


@pytest.mark.behaviour("B22")
@pytest.mark.behaviour("B23")
def test_other_threads_hear_of_a_plan_that_failed(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=1))
    F.conv2d(x, w)
    go, done = threading.Event(), threading.Event()

    def old_thread() -> list[int]:
        F.conv2d(x, w)  # has built its own plan before anything fails
        done.set()
        go.wait(30)
        return ran(mine, lambda: F.conv2d(x, w))

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(old_thread()))
    thread.start()
    done.wait(30)
    break_now(mine, TUNED)
    with our_warnings(1):
        F.conv2d(x, w)
        go.set()
        thread.join(30)
        assert found == [[SECOND_BEST]]
        assert ran(mine, lambda: in_thread(lambda: F.conv2d(x, w))) == [SECOND_BEST]


def test_what_failed_once_is_not_struck_from_the_store(mine: FakeEngine) -> None:
    """Memory may have been short just then."""
    x, w = tensors()
    script = mine.script
    convplan.enable(rules(tune_after=1))
    F.conv2d(x, w)
    break_now(mine, TUNED, fails="memory")
    with our_warnings(1):
        F.conv2d(x, w)
    mine.script = script
    _runtime.forget()
    assert ran(mine, lambda: F.conv2d(x, w)) == [TUNED]


@pytest.mark.behaviour("B18")
@pytest.mark.parametrize("entry", ENTRIES)
def test_when_every_plan_fails_torch_does_it_with_one_warning(mine: FakeEngine, entry: str) -> None:
    x, w = tensors()
    expected = F.conv2d(x, w)
    conv = ENTRIES[entry](rules(tune_after=1))
    conv(x, w)
    break_now(mine, 0, 1, 2)
    with our_warnings(1, "stock torch runs this convolution: every plan failed"):
        for _ in range(4):
            assert torch.equal(conv(x, w), expected)
    assert convplan.stats()["fell_back"] == 4
    if entry == "convplan":
        out = torch.empty_like(expected)
        assert convplan.conv2d(x, w, policy=rules(tune_after=1), out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.behaviour("B23")
def test_what_takes_over_writes_where_it_is_told(mine: FakeEngine) -> None:
    x, w = tensors()
    policy = rules(tune_after=1)
    out = torch.zeros_like(convplan.conv2d(x, w, policy=policy))
    convplan.conv2d(x, w, policy=policy)
    break_now(mine, TUNED)
    with our_warnings(1):
        assert convplan.conv2d(x, w, policy=policy, out=out) is out
    torch.testing.assert_close(out, F.conv2d(x, w))


def _with_relu(x: torch.Tensor, w: torch.Tensor, policy: Policy) -> list[torch.Tensor]:
    return [convplan.conv2d(x, w, activation="relu", policy=policy)]


def _with_statistics(x: torch.Tensor, w: torch.Tensor, policy: Policy) -> list[torch.Tensor]:
    found = convolution_with_statistics(x, w, 1, 0, 1, 1, policy)
    assert found is not None
    return list(found)


@pytest.mark.behaviour("B18")
@pytest.mark.behaviour("B23")
@pytest.mark.parametrize("call", [_with_relu, _with_statistics])
def test_what_follows_is_computed_whichever_plans_fail(mine: FakeEngine, call: Any) -> None:
    x, w = (t.bfloat16().to(memory_format=torch.channels_last) for t in tensors())
    y = F.conv2d(x.float(), w.float())
    right = [y.relu()] if call is _with_relu else [y, torch.stack((y.sum((0, 2, 3)), y.square().sum((0, 2, 3))))]
    policy = rules(tune_after=1)

    def is_right() -> None:
        for found, wanted in zip(call(x, w, policy), right, strict=True):
            torch.testing.assert_close(found.float(), wanted, rtol=3e-2, atol=0.3)

    for _ in range(3):
        is_right()
    (first,) = ran(mine, is_right)
    break_now(mine, first)
    with our_warnings(1, f"index={first}"):
        again, second = ran(mine, is_right)
        assert again == first != second
        assert ran(mine, is_right) == [second]
    assert (convplan.stats()["failed"], convplan.stats()["fell_back"]) == (1, 1)
    break_now(mine, 0, 1, 2)
    with our_warnings(1, "stock torch runs this convolution: every plan failed"):
        for _ in range(2):
            is_right()


@pytest.mark.behaviour("B18")
def test_gradients_are_computed_when_every_plan_fails(mine: FakeEngine) -> None:
    x, w = (t.requires_grad_() for t in tensors())
    bias = torch.randn(4, requires_grad=True)
    F.conv2d(x, w, bias).square().sum().backward()
    expected = [2 * t.grad for t in (x, w, bias) if t.grad is not None]
    convplan.enable(rules(effort="instant"))
    F.conv2d(x, w, bias).square().sum().backward()
    break_now(mine, 0, 1, 2)
    for tensor in (x, w, bias):
        tensor.grad = None
    with our_warnings(2):  # one for the forward's problem, one for a gradient's
        for _ in range(2):
            F.conv2d(x, w, bias).square().sum().backward()
    for tensor, wanted in zip((x, w, bias), expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted)


# Nothing to run


@pytest.fixture
def hopeless(clock: VirtualClock) -> FakeEngine:
    """Registered as `mine`; nothing of it builds."""
    engine = FakeEngine([take(fails="build"), take(fails="unavailable")], name="mine", clock=clock)
    convplan.register_engine(engine)
    return engine


@pytest.mark.behaviour("B19")
@pytest.mark.parametrize("tune_after", [1, 2])
@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_plan_torch_does_it_with_one_warning_and_one_search(
    hopeless: FakeEngine, entry: str, tune_after: int
) -> None:
    x, w = tensors()
    expected = F.conv2d(x, w)
    conv = ENTRIES[entry](rules(tune_after=tune_after))
    with our_warnings(1, "stock torch runs this convolution: no engine runs this problem"):
        assert torch.equal(conv(x, w), expected)
        builds = list(hopeless.builds)
        for _ in range(3):
            assert torch.equal(conv(x, w), expected)
        in_thread(lambda: conv(x, w))
    assert hopeless.builds == builds
    found = convplan.stats()
    assert (found["failed"], found["planned"], found["tuned"]) == (1, 0, 0)


def test_asking_for_a_plan_raises_with_the_reasons(hopeless: FakeEngine) -> None:
    with pytest.raises(NoPlan) as caught:
        convplan.plan(problem_of(*tensors()), rules())
    assert [config for config, _ in caught.value.rejections] == ["mine[index=0]", "mine[index=1]"]


def test_what_could_not_be_planned_can_be_planned_when_the_engine_is_repaired(hopeless: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=1))
    with our_warnings(1):
        F.conv2d(x, w)
    hopeless.script = (take(50), take(90))
    convplan.tune([problem_of(x, w)])
    assert ran(hopeless, lambda: [F.conv2d(x, w) for _ in range(2)]) == [0, 0]


def test_a_newly_registered_engine_is_asked_about_problems_that_nothing_ran(
    hopeless: FakeEngine, clock: VirtualClock
) -> None:
    x, w = tensors()
    convplan.enable(rules(effort="instant"))
    with our_warnings(1):
        F.conv2d(x, w)
    repaired = FakeEngine([take(50)], name="mine", clock=clock)
    convplan.register_engine(repaired, replace=True)
    assert ran(repaired, lambda: F.conv2d(x, w)) == [0]


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_failed_search_keeps_no_tensor_of_the_user(hopeless: FakeEngine, entry: str) -> None:
    conv = ENTRIES[entry](rules(tune_after=1))
    x, w = tensors()
    with our_warnings(1):
        conv(x, w)
    alive = [weakref.ref(x), weakref.ref(w)]
    del x, w
    gc.collect()
    assert [ref() is None for ref in alive] == [True, True]


@pytest.mark.parametrize("entry", ENTRIES)
def test_plans_keep_no_tensor_of_the_user(mine: FakeEngine, entry: str) -> None:
    conv = ENTRIES[entry](rules(tune_after=2))
    x, w = tensors()
    for _ in range(3):
        conv(x, w)
    alive = [weakref.ref(x), weakref.ref(w)]
    del x, w
    gc.collect()
    assert [ref() is None for ref in alive] == [True, True]


def test_tuning_that_finds_nothing_leaves_the_convolution_to_torch(mine: FakeEngine) -> None:
    """Untuned plans ran unverified; once measured, all turn out to be wrong."""
    mine.script = (take(50, fails="wrong"), take(60, fails="wrong"))
    mine.builds, mine.runs = [0, 0], [0, 0]
    x, w = tensors()
    expected = F.conv2d(x, w)
    convplan.enable(rules(tune_after=2))
    F.conv2d(x, w)
    with our_warnings(1, "stock torch runs this convolution: no engine runs this problem"):
        for _ in range(3):
            assert torch.equal(F.conv2d(x, w), expected)


@pytest.mark.behaviour("B18")
@pytest.mark.parametrize("tune_after", [1, 2])
@pytest.mark.parametrize("entry", ENTRIES)
def test_planning_that_runs_out_of_memory_costs_the_plan_and_not_the_convolution(
    mine: FakeEngine, monkeypatch: pytest.MonkeyPatch, entry: str, tune_after: int
) -> None:
    """Planning needs tensors of its own, which may be more than there is memory for."""

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for tensors to plan with")

    x, w = tensors()
    expected = F.conv2d(x, w)
    conv = ENTRIES[entry](rules(tune_after=tune_after))
    monkeypatch.setattr("convplan._verify.random_inputs", no_memory)
    with our_warnings(1, "too large to be measured here"):
        for _ in range(4):
            torch.testing.assert_close(conv(x, w), expected)


# The store

CHILD = """
import json, hashlib, torch, convplan
import torch.nn.functional as F
torch.set_num_threads(1)
torch.manual_seed(0)
convplan.enable(convplan.Policy(tune_after=1, budget_s=0.01))
x, w = torch.randn(2, 3, 9, 9, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
line, taps = torch.randn(1, 2, 300), torch.randn(2, 2, 65)
outputs = [F.conv2d(x, w, padding=1), F.conv1d(line, taps), F.conv_transpose1d(line, taps)]
outputs += torch.autograd.grad(outputs[0].square().sum(), [x, w])
digest = hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in outputs)).hexdigest()
print(json.dumps([convplan.stats(), digest]))
"""


@pytest.mark.behaviour("C1")
def test_a_second_process_tunes_nothing_and_computes_the_same() -> None:
    first, first_digest = json.loads(run_python(CHILD, timeout_s=120))
    second, second_digest = json.loads(run_python(CHILD, timeout_s=120))
    problems = 5  # three forwards and two gradients
    assert first == {**NONE, "misses": 4, "planned": problems, "tuned": problems}
    assert second == {**NONE, "misses": 4, "from_store": problems}
    assert second_digest == first_digest


FORKING = """
import os, torch, convplan
import torch.nn.functional as F
torch.set_num_threads(1)
convplan.enable(convplan.Policy(effort="instant"))
x, w = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
y = F.conv2d(x, w)
child = os.fork()
if child == 0:
    same = torch.equal(F.conv2d(x, w), y) and F.conv2d(x, w, stride=2).shape == (2, 4, 4, 4)
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_goes_on() -> None:
    assert run_python(FORKING, timeout_s=120).split() == ["0"]


def test_a_stored_plan_is_used_without_planning(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.tune([problem_of(x, w)], policy=rules())
    _runtime.forget()
    convplan.stats(reset=True)
    convplan.enable(rules())
    assert ran(mine, lambda: [F.conv2d(x, w) for _ in range(4)]) == [TUNED] * 4
    assert convplan.stats() == {**NONE, "misses": 1, "hits": 3, "from_store": 1}


@pytest.mark.parametrize("change", ["another-script", "unregistered"])
def test_a_stored_plan_that_builds_no_more_is_planned_again(mine: FakeEngine, clock: VirtualClock, change: str) -> None:
    x, w = tensors()
    expected = F.conv2d(x, w)
    policy = rules(tune_after=1)
    if change == "another-script":
        convplan.tune([problem_of(x, w)], policy=policy)
        convplan.register_engine(FakeEngine([take(30)], name="mine", clock=clock), replace=True)
    else:
        policy = Policy(deterministic=False, allow_tf32=False, tune_after=1, budget_s=0.01)
        mine.by_default = True  # type: ignore[misc]
        mine.script = (take(0.001),) * 3
        record = convplan.plan(problem_of(x, w), policy.replace(effort="instant", engines=("mine",)))
        moved = {"policy": policy, "effort": "measure"}
        known.store().remember(_with(record, **moved))
        registry.unregister("mine")
    _runtime.forget()
    convplan.stats(reset=True)
    convplan.enable(policy)
    with our_warnings(0):
        torch.testing.assert_close(F.conv2d(x, w), expected)
    assert convplan.stats() == {**NONE, "misses": 1, "planned": 1, "tuned": 1}
    # And the new one took the old one's place.
    _runtime.forget()
    assert counted(lambda: F.conv2d(x, w)) == {"misses": 1, "from_store": 1}


def _with(record: convplan.PlanRecord, **changes: Any) -> convplan.PlanRecord:
    import msgspec

    return msgspec.structs.replace(record, **changes)


@pytest.mark.parametrize("trouble", ["directory", "foreign-file", "no-such-driver"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_store_trouble_never_breaks_a_convolution(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mine: FakeEngine, entry: str, trouble: str
) -> None:
    place = tmp_path / "place"
    if trouble == "directory":
        place.mkdir()
    elif trouble == "foreign-file":
        place.write_bytes(b"these are not plans" * 100)
    monkeypatch.setenv("CONVPLAN_STORE", "nosuchdb://somewhere/plans" if trouble == "no-such-driver" else str(place))
    kept = place.read_bytes() if place.is_file() else b""
    pairs = [tensors(size) for size in (5, 6)]
    expected = [F.conv2d(*pair) for pair in pairs]
    conv = ENTRIES[entry](rules(tune_after=1))
    with our_warnings(1, "plan store"):
        for _ in range(3):
            for pair, wanted in zip(pairs, expected, strict=True):
                torch.testing.assert_close(conv(*pair), wanted)
    assert convplan.stats()["tuned"] == 2  # each once: what was found is kept in memory
    assert convplan.stats()["failed"] == 0
    assert (place.read_bytes() if place.is_file() else b"") == kept


def test_forgetting_keeps_the_store_and_clearing_keeps_the_process(mine: FakeEngine) -> None:
    x, w = tensors()
    convplan.enable(rules(tune_after=1))
    F.conv2d(x, w)
    assert counted(_runtime.forget) == {}
    assert counted(lambda: F.conv2d(x, w)) == {"misses": 1, "from_store": 1}
    convplan.clear_plans()
    assert counted(lambda: F.conv2d(x, w)) == {"hits": 1}  # what runs goes on
    _runtime.forget()
    assert counted(lambda: F.conv2d(x, w)) == {"misses": 1, "planned": 1, "tuned": 1}


def test_another_store_is_another_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mine: FakeEngine) -> None:
    problem = problem_of(*tensors())
    convplan.tune([problem], policy=rules())
    _runtime.forget()
    monkeypatch.setenv("CONVPLAN_STORE", str(tmp_path / "other.sqlite"))
    assert counted(lambda: convplan.plan(problem, rules())) == {"planned": 1, "tuned": 1}


# plan


def test_plan_uses_the_policys_effort_at_once_and_remembers(mine: FakeEngine) -> None:
    problem = problem_of(*tensors())
    assert convplan.plan(problem, rules(tune_after=5)).effort == "measure"
    assert counted(lambda: convplan.plan(problem, rules(tune_after=5))) == {}
    _runtime.forget()
    assert counted(lambda: convplan.plan(problem, rules(tune_after=5))) == {"from_store": 1}


def test_a_plan_of_less_effort_does_not_stand_in_for_one_of_more(mine: FakeEngine) -> None:
    problem = problem_of(*tensors())
    assert convplan.plan(problem, rules(effort="instant")).config.knob("index") == UNTUNED
    assert convplan.plan(problem, rules()).config.knob("index") == TUNED
    _runtime.forget()
    # The measured one is what another process finds, also when it asks for less.
    assert convplan.plan(problem, rules(effort="instant")).config.knob("index") == TUNED


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_a_problem_with_no_elements_has_no_plan(mine: FakeEngine, op: Any) -> None:
    empty = Problem.dense(op, (0, 3, 6, 6), (4, 3, 3, 3))
    for ask in (convplan.plan, convplan.tune):
        with pytest.raises(SpecError, match=r"the problem has no elements.*x=0x3x6x6"):
            ask(empty)
    assert mine.builds == [0, 0, 0]


@pytest.mark.parametrize("wrong", [None, "conv", 3, (1, 2)])
def test_what_is_no_problem_is_refused(wrong: Any) -> None:
    with pytest.raises(SpecError, match=r"problem is .*, expected a convplan\.Problem"):
        convplan.plan(wrong)
    with pytest.raises(SpecError, match=r"problem is .*, expected a convplan\.Problem"):
        convplan.tune([wrong])


@pytest.mark.parametrize("wrong", [None, 3])
def test_what_holds_no_problems_is_refused(wrong: Any) -> None:
    with pytest.raises(SpecError, match=f"problems is {wrong}, expected"):
        convplan.tune(wrong)


def test_an_unknown_engine_in_mid_run_is_named(mine: FakeEngine) -> None:
    policy = rules()
    registry.unregister("mine")
    with pytest.raises(PolicyError, match="unknown engine 'mine'"):
        convplan.plan(problem_of(*tensors()), policy)


# tune


def test_tune_plans_each_problem_once_and_tells_how_far_it_is(mine: FakeEngine) -> None:
    problems = [problem_of(*tensors(size)) for size in (5, 6, 5, 7)]
    seen: list[tuple[int, int, object]] = []
    found = counted(
        lambda: seen.append(
            (-1, -1, convplan.tune(iter(problems), policy=rules(), progress=lambda *step: seen.append(step)))
        )
    )
    assert found == {"planned": 3, "tuned": 3}
    records = seen.pop()[2]
    assert isinstance(records, list)
    assert [record.problem for record in records] == [problems[0], problems[1], problems[3]]
    assert seen == [(0, 3, None), *((done, 3, record) for done, record in enumerate(records, start=1))]
    assert all(record.effort == "measure" for record in records)


def test_tune_measures_again_only_when_forced(mine: FakeEngine) -> None:
    problem = problem_of(*tensors())
    convplan.tune(problem, policy=rules())
    assert counted(lambda: convplan.tune(problem, policy=rules())) == {}
    _runtime.forget()
    assert counted(lambda: convplan.tune(problem, policy=rules())) == {"from_store": 1}
    mine.script = (take(90), take(50), take(20))
    (forced,) = convplan.tune(problem, policy=rules(), force=True)
    assert forced.config.knob("index") == 2
    _runtime.forget()
    (stored,) = convplan.tune(problem, policy=rules())
    assert stored == forced


def test_tune_measures_whatever_the_policys_effort_and_sighting(mine: FakeEngine) -> None:
    problem = problem_of(*tensors())
    (record,) = convplan.tune(problem, policy=rules(effort="instant", tune_after=100, deterministic=True))
    assert record.effort == "measure"
    assert record.config.knob("index") == TUNED


@pytest.mark.parametrize(
    "changes", [{}, {"tune_after": 100}, {"deterministic": True}, {"effort": "instant"}, {"budget_s": 0.5}]
)
def test_what_is_tuned_is_used_from_then_on(mine: FakeEngine, changes: dict[str, Any]) -> None:
    x, w = tensors()
    convplan.enable(rules(**changes))
    assert ran(mine, lambda: F.conv2d(x, w)) == [UNTUNED]
    convplan.tune([problem_of(x, w)])
    assert ran(mine, lambda: [F.conv2d(x, w) for _ in range(2)]) == [TUNED] * 2


def test_what_is_tuned_by_another_policy_of_the_same_rules_is_used_too(mine: FakeEngine) -> None:
    """Both have the same key, so the next process uses it: this one should not differ."""
    x, w = tensors()
    convplan.enable(rules(tune_after=100))
    F.conv2d(x, w)
    convplan.tune([problem_of(x, w)], policy=rules(budget_s=0.25))
    assert ran(mine, lambda: F.conv2d(x, w)) == [TUNED]


def test_tune_runs_a_callable_and_counts_the_gradients_it_could_ask_for(mine: FakeEngine) -> None:
    x, w = tensors()
    w.requires_grad_()

    def forward(times: int) -> torch.Tensor:
        return sum((F.conv2d(x, w, padding=1) for _ in range(times)), torch.zeros(()))

    records = convplan.tune(forward, 2, policy=rules())
    assert [record.problem.op for record in records] == ["fprop", "wgrad"]  # nobody asks for that of x
    with torch.no_grad():
        assert len(convplan.tune(forward, 1, policy=rules())) == 1


def test_tune_takes_the_gradients_that_a_callable_computes_itself(mine: FakeEngine) -> None:
    x, w = (t.requires_grad_() for t in tensors())

    def step() -> None:
        torch.autograd.grad(F.conv2d(x, w).sum(), [w])

    records = convplan.tune(step, policy=rules())
    assert [record.problem.op for record in records] == ["fprop", "wgrad"]


def test_a_callable_that_convolves_nothing_is_the_users_mistake() -> None:
    with pytest.raises(SpecError, match="ran no convolution"):
        convplan.tune(lambda: None)


def test_a_callable_that_raises_is_heard_and_leaves_nothing_on(mine: FakeEngine) -> None:
    def fails() -> None:
        F.conv2d(*tensors())
        raise KeyError("mine")

    with pytest.raises(KeyError):
        convplan.tune(fails, policy=rules())
    assert _choices.state.captures == ()
    assert counted(lambda: F.conv2d(*tensors())) == {}


def test_those_planned_before_a_failure_stay_stored(mine: FakeEngine) -> None:
    good, bad = problem_of(*tensors(5)), problem_of(*tensors(6))

    def refuse_large(problem: Problem) -> Any:
        from convplan import Support

        return Support(problem == good, "too large")

    mine.supports = refuse_large  # type: ignore[method-assign]
    with pytest.raises(NoPlan, match="too large"):
        convplan.tune([good, bad], policy=rules())
    _runtime.forget()
    assert counted(lambda: convplan.plan(good, rules())) == {"from_store": 1}


# capture


@pytest.mark.parametrize("on", [False, True])
def test_capture_sees_every_call_and_changes_none(mine: FakeEngine, on: bool) -> None:
    x, w = tensors()
    expected = F.conv2d(x, w)
    if on:
        convplan.enable(rules(effort="instant"))
        F.conv2d(x, w)  # a ready plan must not hide the calls that follow
    with convplan.capture() as seen:
        results = [F.conv2d(x, w) for _ in range(3)]
        F.conv2d(x, w, stride=2)
        convplan.conv2d(x, w, policy=rules(effort="instant"))
        in_thread(lambda: F.conv2d(x, w))
    assert all(torch.allclose(result, expected, atol=1e-5) for result in results)
    one, other = convplan.problem("fprop", x, w), convplan.problem("fprop", x, w, stride=2)
    assert list(seen) == [one, other]
    assert seen.calls == {one: 5, other: 1}
    assert (seen[0], seen[-1], len(seen)) == (one, other, 2)
    assert _choices.state.captures == ()
    before = dict(seen.calls)
    F.conv2d(x, w)
    assert seen.calls == before


def test_captures_may_be_nested(mine: FakeEngine) -> None:
    x, w = tensors()
    with convplan.capture() as outer:
        F.conv2d(x, w)
        with convplan.capture() as inner:
            F.conv2d(x, w, stride=2)
        F.conv2d(x, w)
    assert list(outer.calls.values()) == [2, 1]
    assert list(inner) == [convplan.problem("fprop", x, w, stride=2)]


def test_capture_ends_with_an_error(mine: FakeEngine) -> None:
    with pytest.raises(ZeroDivisionError), convplan.capture():
        _ = 1 / 0
    assert counted(lambda: F.conv2d(*tensors())) == {}


def test_capture_while_off_counts_nothing_and_plans_nothing(mine: FakeEngine) -> None:
    with convplan.capture():
        F.conv2d(*tensors())
    found = convplan.stats()
    assert (found["planned"], found["hits"], found["fell_back"]) == (0, 0, 0)
    assert mine.builds == [0, 0, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradients_foreseen_are_those_that_autograd_asks_for(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, stride=2),
        torch.nn.Conv2d(4, 6, 1, groups=2),
        torch.nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False),
    ).to(dtype=dtype, memory_format=layout)
    x = torch.randn(2, 3, 8, 8, dtype=dtype).to(memory_format=layout)
    with convplan.capture() as forward:
        model(x)
    with convplan.capture() as whole:
        model(x).square().sum().backward()
    assert {one.op for one in whole} == {"fprop", "dgrad", "wgrad"}
    assert set(forward) | set(forward.gradients) == set(whole)
    assert whole.gradients == []


@pytest.mark.behaviour("B3")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("given", ["neither", "input", "weight", "both"])
@pytest.mark.parametrize(("rank", "taps"), [(2, 3), (2, 1), (3, 2), (3, 1)])
def test_results_and_gradients_lie_in_memory_as_torchs_do(
    mine: FakeEngine, dtype: str, given: str, rank: int, taps: int
) -> None:
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[rank]
    x = torch.ones(2, 4, *[4] * rank, dtype=getattr(torch, dtype))
    w = torch.ones(6, 4, *[taps] * rank, dtype=x.dtype)
    x = x.to(memory_format=form) if given in ("input", "both") else x
    w = w.to(memory_format=form) if given in ("weight", "both") else w
    conv = {2: F.conv2d, 3: F.conv3d}[rank]

    def layouts() -> list[TensorSpec]:
        leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
        y = conv(*leaves)
        results = (y, *torch.autograd.grad(y, leaves, torch.ones_like(y)))
        return [TensorSpec(tuple(t.shape), t.stride(), dtype) for t in results]

    expected = layouts()
    with convplan.enabled(rules(effort="instant")):
        assert layouts() == expected


def test_capture_tells_what_it_is() -> None:
    with convplan.capture() as seen:
        F.conv2d(*tensors())
    assert repr(seen) == "<Capture of 1 problems>"
    assert seen[:] == list(seen)

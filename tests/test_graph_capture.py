"""CUDA graphs that are captured directly after `tune`: what is ready is captured, and nothing is made for it.

Captures are simulated, on the CPU: convplan is told that there is one, and while it believes so, planning, building and
the store are out of reach. Real ones are in `tests/gpu`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fresh import fresh_process
from helpers.scripted import SECOND_BEST, TUNED, UNTUNED, ran, registered, rules, take, tensors

import convplan
from convplan import (
    Built,
    Candidate,
    CaptureMiss,
    ConvPlanWarning,
    EngineConfig,
    EngineUnavailable,
    Policy,
    Problem,
    Support,
    _agreement,
    _deciding,
    _runtime,
)
from convplan._choices import known
from convplan._planner import find_plans
from convplan.engines.cudnn import engine as cudnn_engine
from convplan.engines.cudnn.target import handle_of
from convplan.engines.fake import FakeEngine, VirtualClock, convolve_by_taps
from convplan.torch_ops import fused

Tensor = torch.Tensor
Call = Callable[[], Tensor]

pytestmark = pytest.mark.behaviour("C8")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    with fresh_process():
        yield


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Registered as `mine`. Untuned, its first candidate runs; tuned, the second, which is faster."""
    clock = VirtualClock()
    monkeypatch.setattr(_deciding, "find_plans", functools.partial(find_plans, clock=clock))
    return registered(clock)


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


def _forbidden(*args: object, **named: object) -> Any:
    raise AssertionError("this must not happen while a graph is captured")


@contextmanager
def captured(engine: FakeEngine) -> Iterator[None]:
    """While this lasts, convplan takes it that a CUDA graph is captured."""
    builds = list(engine.builds)
    with pytest.MonkeyPatch.context() as patch:
        for module in (_runtime, fused):
            patch.setattr(module, "in_graph_capture", lambda device: True)
        patch.setattr(_deciding, "find_plans", _forbidden)
        patch.setattr(known, "store", _forbidden)
        yield
    assert engine.builds == builds


def _forward(policy: Policy) -> Call:
    x, w = tensors()
    convplan.enable(policy)
    return lambda: F.conv2d(x, w)


def _backward(policy: Policy) -> Call:
    x, w = (one.requires_grad_() for one in tensors())
    convplan.enable(policy)
    return lambda: torch.cat([one.flatten() for one in torch.autograd.grad(F.conv2d(x, w).sum(), (x, w))])


def _function(policy: Policy) -> Call:
    x, w = tensors()
    return lambda: convplan.conv2d(x, w, policy=policy)


def _differentiated(policy: Policy) -> Call:
    x, w = (one.requires_grad_() for one in tensors())

    def call() -> Tensor:
        y = convplan.conv2d(x, w, activation="relu", policy=policy)
        return torch.cat([one.flatten() for one in torch.autograd.grad(y.sum(), (x, w))])

    return call


def _fused(policy: Policy) -> Call:
    x, w = tensors()
    bias, residual = torch.randn(4), torch.randn(2, 4, 4, 4)
    scale = torch.rand(4) + 0.5
    return lambda: convplan.conv2d(x, w, bias, residual=residual, scale=scale, activation="relu", policy=policy)


def _operator(policy: Policy) -> Call:
    from convplan.torch_ops.library import policy_text

    x, w = tensors()
    rest = ([1, 1], [0, 0, 0, 0], [1, 1], False, [0, 0], 1, policy_text(policy))
    return lambda: torch.ops.convplan.convolution(x, w, None, *rest)


WAYS: dict[str, Callable[[Policy], Call]] = {
    "forward": _forward,
    "backward": _backward,
    "function": _function,
    "differentiated": _differentiated,
    "fused": _fused,
    "operator": _operator,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_capture_directly_after_tune_takes_the_tuned_plans(mine: FakeEngine, way: str) -> None:
    call = WAYS[way](rules(capture_miss="error"))
    convplan.tune(call, policy=rules())
    expected, found = call(), []
    convplan.stats(reset=True)
    with captured(mine):
        which = ran(mine, lambda: found.extend([call(), call()]))
    assert set(which) == {TUNED}
    for one in found:
        torch.testing.assert_close(one, expected)
    stats = convplan.stats()
    wanted = ("planned", "from_store", "restored", "fell_back", "failed", "capture_misses")
    assert {name: stats[name] for name in wanted} == dict.fromkeys(wanted, 0)


@pytest.mark.parametrize(
    "changes",
    [{"effort": "instant"}, {"tune_after": 50}, {"tuning_limit_s": 0.0}, {"mode": "replay"}, {"effort": "exhaustive"}],
    ids=str,
)
def test_what_is_tuned_is_ready_for_every_policy_that_allows_the_same(mine: FakeEngine, changes: Any) -> None:
    call = _function(rules(capture_miss="error", **changes))
    x, w = tensors()
    convplan.tune(convplan.problem("fprop", x, w), policy=rules())
    with captured(mine):
        assert ran(mine, call) == [TUNED]


def test_layers_and_threads_that_share_a_problem_share_its_plan(mine: FakeEngine) -> None:
    layers = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(3)])
    x = tensors()[0]
    convplan.enable(rules(capture_miss="error"))
    with torch.no_grad():
        assert len(convplan.tune(layers, x)) == 1
        expected = layers(x)
        with captured(mine):
            for _ in range(2):
                torch.testing.assert_close(layers(x), expected)
            with_another = in_thread(lambda: layers(x))
    torch.testing.assert_close(with_another, expected)
    assert convplan.stats()["capture_misses"] == 0


def test_calls_before_the_capture_do_not_use_the_plan_up(mine: FakeEngine) -> None:
    call = _forward(rules())
    convplan.tune(call)
    builds = list(mine.builds)
    call(), in_thread(call)
    assert mine.builds == builds, "they share it"
    convplan.enable(rules(capture_miss="error"))  # whatever was ready in this thread is dropped
    with captured(mine):
        assert ran(mine, call) == [TUNED]


def test_a_later_process_tunes_again_and_captures(mine: FakeEngine) -> None:
    call = _function(rules(capture_miss="error"))
    (first,) = convplan.tune(call, policy=rules())
    _runtime.forget()
    with captured(mine), pytest.raises(CaptureMiss):
        call()
    convplan.stats(reset=True)
    (again,) = convplan.tune([first.problem], policy=rules())
    assert (again, convplan.stats()["planned"]) == (first, 0)
    with captured(mine):
        assert ran(mine, call) == [TUNED]


def test_a_plan_that_took_over_in_mid_run_is_made_ready_by_tune(mine: FakeEngine) -> None:
    call = _forward(rules(tune_after=1, capture_miss="error"))
    call()
    convplan.enable(rules(capture_miss="error"))
    with captured(mine), pytest.raises(CaptureMiss):
        call()
    before = convplan.stats()
    convplan.tune(convplan.problem("fprop", *tensors()))
    assert convplan.stats() == before, "nothing is planned, and nothing read"
    with captured(mine):
        assert ran(mine, call) == [TUNED]


def test_a_plan_that_the_store_got_meanwhile_replaces_the_one_in_use(mine: FakeEngine, tmp_path: Path) -> None:
    problem = convplan.problem("fprop", *tensors())
    convplan.tune(problem, policy=rules())
    convplan.export_plans(tmp_path / "plans.json")
    convplan.clear_plans()
    _runtime.forget()
    call = _forward(rules(effort="instant", capture_miss="error"))
    assert ran(mine, lambda: [call() for _ in range(3)]) == [UNTUNED] * 3
    convplan.clear_plans()
    convplan.import_plans(tmp_path / "plans.json")
    convplan.tune(problem)
    with captured(mine):
        assert ran(mine, call) == [TUNED]
    assert ran(mine, call) == [TUNED]


@pytest.mark.parametrize("ready", [None, "another problem", "another policy", "untuned"])
def test_what_is_not_ready_is_missed(mine: FakeEngine, ready: str | None) -> None:
    x, w = tensors()
    problem = convplan.problem("fprop", x, w)
    if ready == "another problem":
        convplan.tune(convplan.problem("fprop", *tensors(7)), policy=rules())
    if ready == "another policy":
        convplan.tune(problem, policy=rules(workspace_limit_bytes=0))
    if ready == "untuned":
        convplan.plan(problem, rules(effort="instant"))
    before = convplan.stats()["capture_misses"]
    expected, found = F.conv2d(x, w), []
    said = pytest.warns(ConvPlanWarning, match="while a CUDA graph is captured")
    with captured(mine), said, convplan.enabled(rules()):
        assert ran(mine, lambda: found.append(F.conv2d(x, w))) == []
    torch.testing.assert_close(found[0], expected)
    said = pytest.raises(CaptureMiss, match=r"or tune it \(convplan.tune\)")
    with captured(mine), said, convplan.enabled(rules(capture_miss="error")):
        F.conv2d(x, w)
    assert convplan.stats()["capture_misses"] == before + 2


def test_a_plan_that_failed_since_is_not_captured(mine: FakeEngine) -> None:
    mine.script = (take(90), take(50, fails="late", good_runs=10**9), take(70))
    call = _forward(rules(capture_miss="error"))
    convplan.tune(call)
    mine.script = (take(90), take(50, fails="run"), take(70))
    with pytest.warns(ConvPlanWarning, match="failed"):
        call()
    with captured(mine), pytest.raises(CaptureMiss):
        call()
    convplan.tune(convplan.problem("fprop", *tensors()))
    with captured(mine):
        assert ran(mine, call) == [SECOND_BEST]


def test_a_plan_of_an_engine_that_was_exchanged_is_not_run(mine: FakeEngine) -> None:
    call = _forward(rules(capture_miss="error"))
    convplan.tune(call)
    new = FakeEngine(mine.script, name="mine", clock=mine.clock)
    convplan.register_engine(new, replace=True)
    with captured(new), pytest.raises(CaptureMiss):
        call()
    assert ran(mine, lambda: ran(new, call)) == []
    convplan.tune(convplan.problem("fprop", *tensors()))
    with captured(new):
        assert ran(new, call) == [TUNED]


def test_tune_does_not_fail_where_a_plan_cannot_be_made_ready(
    mine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    call = _forward(rules(tune_after=1, capture_miss="error"))
    call()  # tuned, and its plan is in use
    mine.script = (take(90), take(50, fails="build"), take(70))
    with caplog.at_level(logging.INFO, "convplan.runtime"):
        (record,) = convplan.tune(convplan.problem("fprop", *tensors()))
    assert record.config.knob("index") == TUNED
    assert "left to its next call to make ready (PlanRejected: " in caplog.text
    convplan.enable(rules(capture_miss="error"))
    with captured(mine), pytest.raises(CaptureMiss):
        call()
    assert ran(mine, call) == [SECOND_BEST]


def test_plans_that_are_ready_go_when_the_cache_of_choices_is_full(
    mine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVPLAN_CACHE_LIMIT", "2")
    _runtime.forget()
    convplan.tune([convplan.problem("fprop", *tensors(size)) for size in (5, 6, 7)], policy=rules())
    missed = []
    with captured(mine), convplan.enabled(rules(capture_miss="error")):
        for size in (5, 6, 7):
            try:
                F.conv2d(*tensors(size))
            except CaptureMiss:
                missed.append(size)
    assert missed == [5]


def test_a_plan_is_ready_on_the_devices_that_it_was_made_ready_on(mine: FakeEngine) -> None:
    """GPUs of the same kind share choices, and what was built for one is built anew for another."""
    problem = convplan.problem("fprop", *tensors())
    convplan.tune(problem, policy=rules())
    found = _deciding.ready_choice(problem, rules(), -1)
    assert found is not None
    choice, ready = found
    assert _deciding.ready_choice(problem, rules(), 1) is None
    choice.keep_ready(ready.record, ready.plan, 1)
    assert [_deciding.ready_choice(problem, rules(), device) is None for device in (-1, 0, 1)] == [False, True, False]


def test_what_was_chosen_before_there_was_a_job_is_not_captured(
    mine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks have not agreed on it yet, and cannot while a graph is captured."""
    call = _function(rules(capture_miss="error"))
    convplan.tune(call, policy=rules())
    monkeypatch.setattr(_agreement, "board_for", lambda policy: object())
    with captured(mine), pytest.raises(CaptureMiss):
        call()


class Lacking:
    """An engine whose plans lack something for each thread, which is made when they are bound, and in no capture."""

    name, by_default = "lacking", False

    def __init__(self) -> None:
        self.capturing = False

    def supports(self, problem: Problem) -> Support:
        return Support(True)

    def configs(self, problem: Problem, effort: str) -> Sequence[Candidate]:
        return [Candidate(EngineConfig.of(self.name), workspace_bytes=0)]

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        def run(first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
            y = convolve_by_taps(problem, first, second, bias).to(first.dtype)
            return y if out is None else out.copy_(y)

        def bind() -> Callable[..., Tensor]:
            if self.capturing:
                raise EngineUnavailable(engine=self.name, needs="something from before the capture")
            return run

        return Built(run, 0, bind=bind)


@pytest.mark.parametrize("entry", [_forward, _function])
def test_a_plan_that_something_is_to_be_made_for_is_missed(
    mine: FakeEngine, entry: Callable[[Policy], Call], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Lacking()
    convplan.register_engine(engine)
    call = entry(Policy(engines=("lacking",), budget_s=0.01, capture_miss="error"))
    convplan.tune(call, policy=Policy(engines=("lacking",), budget_s=0.01))
    engine.capturing = True
    caplog.set_level(logging.INFO, "convplan.runtime")
    with captured(mine), pytest.raises(CaptureMiss):
        call()
    assert convplan.stats()["capture_misses"] == 1
    assert "something from before the capture" in caplog.text


def test_cudnn_makes_neither_handle_nor_plan_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    nothing: Any = None
    with pytest.raises(EngineUnavailable, match="a handle of this thread, made before the capture"):
        in_thread(lambda: handle_of(nothing, 0))
    problem = Problem.dense("fprop", (1, 8, 8, 8), (8, 8, 3, 3), dtype="float16", device="cuda")
    plans = cudnn_engine._Plans(cudnn_engine.CudnnEngine(), problem, EngineConfig.of("cudnn", engine=0))
    with pytest.raises(EngineUnavailable, match="a plan that ran on this GPU before the capture"):
        plans.at(0)

"""CUDA graphs of convolutions: captured by hand, by `make_graphed_callables`, and by `mode="reduce-overhead"`.

What a graph holds is what was ready when it was captured. So each test says what was planned before, and what happens
to what was not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fresh import fresh_process
from torch import nn

import convplan
from convplan import CaptureMiss, ConvPlanWarning, Policy, _runtime

Tensor = torch.Tensor
INSTANT = Policy(effort="instant", capture_miss="error")
AT_ONCE = Policy(tune_after=1, budget_s=0.02, capture_miss="error")

pytestmark = [
    pytest.mark.behaviour("C8"),
    # Inductor and what it imports warn of their own: of TF32 that is not switched on, of functions about to go.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch.*"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fresh_process():
        yield
    torch._dynamo.reset()


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.SiLU(),  # smooth: near 0 a rounding must not decide whether there is a gradient
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.SiLU(),  # smooth: near 0 a rounding must not decide whether there is a gradient
        nn.Conv2d(32, 8, 1),
    )
    return layers.cuda().half().to(memory_format=torch.channels_last)


def images() -> Tensor:
    return torch.randn(4, 16, 24, 24, device="cuda").half().contiguous(memory_format=torch.channels_last)


def near(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found.float(), right.float(), rtol=2e-2, atol=2e-2 * float(right.float().abs().max()))


def warmed_up(run: Callable[[], Any], times: int = 3) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("policy", [INSTANT, AT_ONCE], ids=["instant", "tuned"])
def test_a_graph_of_planned_convolutions_follows_its_inputs(policy: Policy) -> None:
    net, x, graph = model(), images(), torch.cuda.CUDAGraph()
    with torch.no_grad(), convplan.enabled(policy):
        warmed_up(lambda: net(x))
        with torch.cuda.graph(graph):
            y = net(x)
    for _ in range(2):
        x.copy_(images())
        graph.replay()
        with torch.no_grad():
            near(y, net(x))
    assert convplan.stats()["fell_back"] == 0


def test_the_functions_are_captured_too() -> None:
    x, w, graph = images(), torch.randn(32, 16, 3, 3, device="cuda").half(), torch.cuda.CUDAGraph()

    def run() -> Tensor:
        return convplan.conv2d(x, w, padding=((1, 0), (0, 2)), policy=INSTANT)

    warmed_up(run)
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(images())
    graph.replay()
    near(y, F.conv2d(F.pad(x, (0, 2, 1, 0)), w))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_what_was_not_planned_before_is_said_with_what_to_do() -> None:
    net, x, graph = model(), images(), torch.cuda.CUDAGraph()
    said = pytest.raises(CaptureMiss, match="Run the same code before the capture")
    with torch.no_grad(), convplan.enabled(INSTANT), said as caught, torch.cuda.graph(graph):
        net(x)
    assert "fprop" in caught.value.problem


def test_by_default_what_was_not_planned_is_captured_as_stock_torch_runs_it() -> None:
    net, x, graph = model(), images(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        warmed_up(lambda: net(x))
        said = pytest.warns(ConvPlanWarning, match="while a CUDA graph is captured")
        with convplan.enabled(Policy(effort="instant")), said, torch.cuda.graph(graph):
            y = net(x)
        graph.replay()
        near(y, net(x))


def test_a_plan_that_is_captured_before_it_is_tuned_is_told(caplog: pytest.LogCaptureFixture) -> None:
    x, w = images(), torch.randn(32, 16, 3, 3, device="cuda").half()
    with torch.no_grad(), convplan.enabled(Policy(tune_after=50, budget_s=0.02, capture_miss="error")):
        warmed_up(lambda: F.conv2d(x, w), times=2)
        with caplog.at_level(logging.INFO, "convplan.runtime"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            F.conv2d(x, w)
    assert "keeps an untuned plan" in caplog.text


@pytest.mark.parametrize("policy", [INSTANT, AT_ONCE], ids=["instant", "tuned"])
def test_make_graphed_callables_trains(policy: Policy) -> None:
    """Its own warm-up, three steps forward and backward, plans everything, in the threads that it is captured from."""
    stock, net, x = model(), model(), images()
    incoming = torch.randn_like(stock(x))
    with convplan.enabled(policy):
        graphed = torch.cuda.make_graphed_callables(net, (x.clone(),))
        for _ in range(2):
            other = images()
            net.zero_grad(), stock.zero_grad()
            y = graphed(other)
            y.backward(incoming)
    with torch.no_grad():
        near(y, stock(other))
    stock(other).backward(incoming)
    for mine, theirs in zip(net.parameters(), stock.parameters(), strict=True):
        near(mine.grad, theirs.grad)
    assert convplan.stats()["fell_back"] == 0


@pytest.mark.parametrize("way", ["enabled", "kept"])
def test_reduced_overhead_captures_plans_that_its_first_call_made(way: str) -> None:
    net, x = model(), images()
    with torch.no_grad():
        right = [net(x), net(x + 1)]
    # `enabled` in both ways: what is not planned when it is captured must be an error here, wherever it comes from.
    with torch.no_grad(), convplan.enabled(AT_ONCE):
        more: dict[str, Any] = {"mode": "reduce-overhead"}
        if way == "kept":
            more = {"options": convplan.compile_options(AT_ONCE, mode="reduce-overhead")}
        run = torch.compile(net, fullgraph=True, **more)
        for step in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            near(run(x + step % 2).clone(), right[step % 2])
    stats = convplan.stats()
    assert (stats["fell_back"], stats["failed"]) == (0, 0)
    # Replays ask for no plan: three convolutions in a few calls at most, of six.
    assert 3 <= stats["misses"] + stats["hits"] < 6 * 3


def test_reduced_overhead_trains() -> None:
    stock, net = model(), model()
    run = torch.compile(net, fullgraph=True, options=convplan.compile_options(AT_ONCE, mode="reduce-overhead"))
    x = images()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        net.zero_grad(), stock.zero_grad()
        (0.01 * run(x).float().square().sum()).backward()
        (0.01 * stock(x).float().square().sum()).backward()
    for mine, theirs in zip(net.parameters(), stock.parameters(), strict=True):
        near(mine.grad, theirs.grad)
    assert convplan.stats()["fell_back"] == 0


# Directly after `tune`

TUNED = Policy(budget_s=0.02, capture_miss="error")  # a warm-up of one call would leave it untuned


@pytest.mark.parametrize("later", [False, True], ids=["measured", "stored"])
def test_a_capture_directly_after_tune_takes_the_tuned_plans(later: bool, caplog: pytest.LogCaptureFixture) -> None:
    net, x, graph = model(), images(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        warmed_up(lambda: net(x))  # torch's own, of what runs its kernels
        records = convplan.tune(net, x, policy=TUNED)
        if later:  # as in a later process: what is stored is all that is left
            _runtime.forget()
            assert convplan.tune([one.problem for one in records], policy=TUNED) == records
        before = convplan.stats()
        caplog.set_level(logging.INFO, "convplan.runtime")
        with convplan.enabled(TUNED), torch.cuda.graph(graph):
            y = net(x)
        changed = {name for name, value in convplan.stats().items() if value != before[name]}
        assert changed <= {"misses", "hits"}
        assert "keeps an untuned plan" not in caplog.text
        for _ in range(2):
            x.copy_(images())
            graph.replay()
            near(y, net(x))
    assert convplan.stats()["capture_misses"] == 0


def test_every_kind_of_epilogue_is_captured_directly_after_tune() -> None:
    """Among what fuses are plans that read a bias of zeros, which is made before the capture."""
    x, w, graph = images(), torch.randn(32, 16, 3, 3, device="cuda").half(), torch.cuda.CUDAGraph()
    w = w.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(32, device="cuda").half()
    residual = torch.randn(4, 32, 24, 24, device="cuda").half().contiguous(memory_format=torch.channels_last)
    kinds: list[dict[str, Any]] = [
        {"bias": bias},
        {"activation": "relu"},
        {"residual": residual, "activation": "relu"},
        {"bias": bias, "residual": residual, "activation": "silu"},
    ]

    def run() -> list[Tensor]:
        return [convplan.conv2d(x, w, padding=1, policy=TUNED, **kind) for kind in kinds]

    with torch.no_grad():
        convplan.tune(run, policy=TUNED)
        before = convplan.stats()
        with torch.cuda.graph(graph):
            found = run()
        after = convplan.stats()
        x.copy_(images())
        graph.replay()
        for one, right in zip(found, run(), strict=True):
            near(one, right)
    names = ("planned", "restored", "compiled", "fell_back", "failed", "capture_misses")
    assert {name: after[name] - before[name] for name in names} == dict.fromkeys(names, 0)


def test_a_training_step_is_captured_directly_after_tune() -> None:
    net, stock, x, graph = model(), model(), images(), torch.cuda.CUDAGraph()
    incoming = torch.randn_like(stock(x))

    def step() -> None:
        for one in net.parameters():
            one.grad = None
        net(x).backward(incoming)

    warmed_up(step)
    with convplan.enabled(TUNED):
        convplan.tune(step)  # runs it once by convplan, so that autograd's thread has what belongs to a thread
        with torch.cuda.graph(graph):
            step()
    assert (convplan.stats()["capture_misses"], convplan.stats()["fell_back"]) == (0, 0)
    x.copy_(images())
    graph.replay()
    stock(x).backward(incoming)
    for mine, theirs in zip(net.parameters(), stock.parameters(), strict=True):
        near(mine.grad, theirs.grad)


@pytest.mark.parametrize("way", ["enabled", "kept"])
def test_reduced_overhead_captures_what_was_tuned(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """The one call that it makes before its capture is the one that `tune` makes."""
    net, x = model(), images()
    with torch.no_grad():
        right = [net(x), net(x + 1)]
    with torch.no_grad(), convplan.enabled(TUNED):
        more: dict[str, Any] = {"mode": "reduce-overhead"}
        if way == "kept":
            more = {"options": convplan.compile_options(TUNED, mode="reduce-overhead")}
        run = torch.compile(net, fullgraph=True, **more)
        assert len(convplan.tune(run, x)) == 3
        before = convplan.stats()
        caplog.set_level(logging.INFO, "convplan.runtime")
        for step in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            near(run(x + step % 2).clone(), right[step % 2])
    changed = {name for name, value in convplan.stats().items() if value != before[name]}
    assert changed <= {"misses", "hits"}
    assert "keeps an untuned plan" not in caplog.text


def test_reduced_overhead_trains_by_what_was_tuned() -> None:
    stock, net, x = model(), model(), images()
    run = torch.compile(net, fullgraph=True, options=convplan.compile_options(TUNED, mode="reduce-overhead"))

    def step(model: Callable[[Tensor], Tensor]) -> None:
        (0.01 * model(x).float().square().sum()).backward()

    convplan.tune(lambda: step(run), policy=TUNED)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        net.zero_grad(), stock.zero_grad()
        step(run), step(stock)
    for mine, theirs in zip(net.parameters(), stock.parameters(), strict=True):
        near(mine.grad, theirs.grad)
    stats = convplan.stats()
    assert (stats["fell_back"], stats["capture_misses"]) == (0, 0)

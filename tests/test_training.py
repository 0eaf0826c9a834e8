"""Training real architectures under `enable()`: the same curve as stock torch, and the same bits when asked for.

How far a float32 training may be from another is read off stock torch itself: it may be `ALLOWANCE` times as far from
the same training in float64 as stock torch's float32 is. Rounding differs between engines, and momentum and batch
normalization carry each difference on, so single steps do not compare; the largest distance on the whole curve does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.fresh import fresh_process
from helpers.plans import run_python, start_python
from helpers.training import Run, convnext, gradients, resnet, train
from torch import nn

import convplan
from convplan import Policy

# Two roundings of the same training lie anywhere between nothing and a few times their typical distance apart.
ALLOWANCE = 10.0

TUNED = Policy(tune_after=2, budget_s=0.005)
DETERMINISTIC = Policy(deterministic=True)
ENGINES: dict[str, Policy] = {
    "tuned": TUNED,
    "untuned": Policy(effort="instant"),
    "matmul": Policy(tune_after=10**9, engines=("matmul", "aten")),
    "fft": Policy(tune_after=10**9, engines=("fft", "aten")),
}

# Transformers and torch's lazy parts warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CHILD = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
import convplan
from helpers.training import resnet, train
with convplan.enabled(convplan.Policy(deterministic=True)):
    run = train(resnet())
stats = convplan.stats()
print(run.digest(), stats["planned"], stats["tuned"], stats["from_store"], stats["fell_back"])
print(stats, convplan._environment.current("cpu"), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.fixture(scope="module")
def right() -> Run:
    """The training in float64, by stock torch."""
    return train(resnet(), dtype=torch.float64)


@pytest.fixture(scope="module")
def stock() -> Run:
    """The training in float32, by stock torch."""
    return train(resnet())


def farthest(run: Run, right: Run) -> float:
    """The largest distance of the losses."""
    return max(abs(mine - theirs) for mine, theirs in zip(run.losses, right.losses, strict=True))


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("policy", ENGINES.values(), ids=ENGINES)
def test_the_loss_curve_is_that_of_stock_torch(policy: Policy, right: Run, stock: Run) -> None:
    with convplan.enabled(policy):
        mine = train(resnet())
    assert farthest(mine, right) <= ALLOWANCE * farthest(stock, right)
    # It learns, and what it learns is large beside what was allowed.
    learned = right.losses[0] - min(right.losses)
    assert learned > 0.5
    assert ALLOWANCE * farthest(stock, right) < 0.01 * learned
    stats = convplan.stats()
    assert (stats["fell_back"], stats["failed"]) == (0, 0)
    assert (stats["tuned"] > 0) == (policy is TUNED)
    assert stats["hits"] > 10 * stats["misses"]


def test_stock_torch_runs_again_to_the_bit_afterwards(stock: Run) -> None:
    with convplan.enabled(Policy(effort="instant")):
        train(resnet(), steps=2)
    stats = convplan.stats()
    assert train(resnet()).digest() == stock.digest()
    assert convplan.stats() == stats


@pytest.mark.behaviour("B29")
def test_deterministic_runs_are_bit_identical() -> None:
    digests = []
    for _ in range(2):
        with convplan.enabled(DETERMINISTIC):
            digests.append(train(resnet()).digest())
    with convplan.enabled(DETERMINISTIC):  # with every plan found anew
        convplan._runtime.forget()
        convplan.clear_plans()
        digests.append(train(resnet()).digest())
    assert len(set(digests)) == 1
    stats = convplan.stats()
    assert (stats["tuned"], stats["fell_back"]) == (0, 0)


@pytest.mark.behaviour("B29")
def test_deterministic_runs_in_two_processes_with_stores_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for name in ("first", "second"):
        monkeypatch.setenv("CONVPLAN_CACHE_DIR", str(tmp_path / name))
        said.append(run_python(CHILD, torch.get_num_threads(), timeout_s=120).split())
    (digest, planned, tuned, from_store, fell_back), again = said
    assert digest == again[0]
    assert (int(planned) > 0, tuned, from_store, fell_back) == (True, "0", "0", "0")
    with convplan.enabled(DETERMINISTIC):
        assert train(resnet()).digest() == digest  # this process has a store of its own, too


@pytest.mark.behaviour("B29")
def test_deterministic_runs_that_share_a_tuned_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVPLAN_STORE", str(tmp_path / "shared.sqlite"))
    records = convplan.tune(lambda: train(resnet(), steps=1), policy=DETERMINISTIC.replace(budget_s=0.005))
    assert all(record.effort == "measure" for record in records)
    convplan._runtime.forget()
    convplan.stats(reset=True)
    with convplan.enabled(DETERMINISTIC):
        digest = train(resnet()).digest()
    stats = convplan.stats()
    assert (stats["planned"], stats["from_store"], stats["fell_back"]) == (0, len(records), 0)
    with start_python(CHILD, torch.get_num_threads()) as child:
        other, said = child.communicate(timeout=120)
    assert other.split() == [digest, "0", "0", str(len(records)), "0"], f"{said}; here: {records[0].environment}"
    assert convplan.check_plans().ok
    assert os.environ["CONVPLAN_STORE"].endswith("shared.sqlite")


def distances(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor: the largest difference over the right one's largest value."""
    assert found.keys() == right.keys()
    return {
        name: float((found[name].double() - wanted).abs().max() / wanted.abs().max())
        for name, wanted in right.items()
        if bool(wanted.abs().max() > 1e-9)  # a bias before a normalization has no gradient but rounding
    }


@pytest.mark.parametrize("policy", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("make", [convnext, resnet])
def test_forward_and_backward_are_as_right_as_stock_torchs(make: Callable[[], nn.Module], policy: Policy) -> None:
    right = gradients(make(), dtype=torch.float64)
    stock = distances(gradients(make()), right)
    with convplan.enabled(policy):
        for _ in range(3):
            mine = distances(gradients(make()), right)
    assert max(mine.values()) <= ALLOWANCE * max(stock.values())
    stats = convplan.stats()
    assert (stats["fell_back"], stats["failed"]) == (0, 0)
    assert stats["planned"] > 10


@pytest.mark.behaviour("B29")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
def test_a_convnext_is_bit_identical_under_a_deterministic_policy(channels_last: bool) -> None:
    runs = []
    for _ in range(2):
        convplan._runtime.forget()
        model = convnext()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with convplan.enabled(DETERMINISTIC):
            runs.append(gradients(model))
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert convplan.stats()["fell_back"] == 0

"""Convolutions in other processes and threads: loaders' workers, forks and spawned ones, copies of models, the switch.

What one process or thread alone does is in `test_override.py`; the store under many processes is in `test_store.py`.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fresh import fresh_process
from helpers.plans import run_python
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import convplan
from convplan import Policy, Problem, _counts

UNTUNED = Policy(engines=("aten", "matmul"), effort="instant")
forks = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning",  # newer Pythons', about threads at a fork
    "ignore:.*for another environment:convplan.ConvPlanWarning",  # workers have one thread
)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


class Blurred(Dataset[tuple[Tensor, Tensor, int]]):
    """Images that are blurred by a convolution in whichever process asks for them, and how often convplan was asked."""

    def __init__(self) -> None:
        self.images = torch.randn(6, 1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        self.blur = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = self.images[index]
        with torch.no_grad():
            found = self.blur(image)
            right = F.conv2d(image.double(), self.blur.weight.double(), padding=1, groups=3)
        stats = convplan.stats()
        return found, right, stats["hits"] + stats["misses"]


def switch_on(_: int) -> None:
    convplan.enable(UNTUNED)


@forks
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_loaders_workers_convolve(start: str) -> None:
    data = Blurred()
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_size=3,
        num_workers=1,
        multiprocessing_context=start,
        worker_init_fn=switch_on if start == "spawn" else None,  # a fork has what its parent switched on
        timeout=120,
    )
    with convplan.enabled(UNTUNED):
        F.conv2d(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 2, 2))
        found, right, asked = (torch.cat(parts) for parts in zip(*loader, strict=True))
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)
    assert asked.min() >= 1
    assert asked.sort().values.tolist() == asked.tolist()  # one worker, which counts on


def train(model: nn.Module, images: Tensor, steps: int) -> None:
    """Plain descent on tensors that other processes may see, written in place."""
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad


@forks
def test_a_forked_process_trains_a_shared_model() -> None:
    torch.set_num_threads(1)
    model, images = network(), torch.randn(2, 3, 8, 8)
    alone = copy.deepcopy(model)
    model.share_memory()
    with convplan.enabled(UNTUNED):
        train(alone, images, 2)
        process = multiprocessing.get_context("fork").Process(target=train, args=(model, images, 2))
        process.start()
        process.join(60)
    assert process.exitcode == 0
    for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding="same"), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(4, 2, 1)
    )


def test_models_are_copied_pickled_and_saved_as_without_convplan() -> None:
    model, images = network(), torch.randn(2, 3, 8, 8)
    plain = pickle.dumps(model)
    with convplan.enabled(UNTUNED):
        y = model(images)
        y.sum().backward()
        model.zero_grad(set_to_none=True)
        assert pickle.dumps(model) == plain  # nothing of convplan's hangs on a model
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        loaded = network()
        loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        for other in (copy.deepcopy(model), pickle.loads(plain), loaded):
            assert torch.equal(other(images), y)
    torch.testing.assert_close(pickle.loads(plain)(images), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("back", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_what_describes_a_plan_travels(back: Any) -> None:
    problem = Problem.dense("fprop", (1, 4, 8, 8), (4, 4, 3, 3), padding=1)
    record = convplan.plan(problem, UNTUNED)
    for one in (problem, UNTUNED, record, record.config):
        assert back(one) == one


REPLICAS = """
import copy, threading, time, torch, convplan
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
images = torch.randn(8, 3, 10, 10)
replicas = [copy.deepcopy(model) for _ in range(4)]
begin, wrong = threading.Barrier(4), []
expected, right = {}, model.double()(images.double())
right.square().sum().backward()

def work(index):
    begin.wait()
    for _ in range(25):
        replica, part = replicas[index], images[2 * index : 2 * index + 2]
        replica.zero_grad(set_to_none=True)
        y = replica(part)
        y.square().sum().backward()
        if not torch.allclose(y.double(), right[2 * index : 2 * index + 2], rtol=1e-4, atol=1e-4):
            wrong.append(index)

threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
orders = ("aten",), ("matmul", "aten"), ("fft", "aten")
policies = [convplan.Policy(engines=names, effort="instant") for names in orders]
for thread in threads:
    thread.start()
turns = 0
while any(thread.is_alive() for thread in threads):
    {switch}
    turns += 1
    time.sleep(0.002)
for thread in threads:
    thread.join()
gradients = [sum(g.double() for g in parts) for parts in zip(*([p.grad for p in r.parameters()] for r in replicas))]
for found, parameter in zip(gradients, model.parameters()):
    torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-3)
print(len(wrong), turns > 0, convplan.stats()["fell_back"], convplan.stats()["failed"])
"""
SWITCHES = {
    "on": "convplan.enable(policies[0])",
    "policies": "convplan.enable(policies[turns % 3])",
    "on-and-off": "convplan.enable(policies[turns % 3]) if turns % 2 else convplan.disable()",
}


@pytest.mark.behaviour("B33")
@pytest.mark.behaviour("B36")
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_replicas_in_threads_agree_with_the_whole_while_the_switch_is_thrown(switch: str) -> None:
    # In a process of its own: replacing a dispatcher's entry under a running call would end it.
    assert run_python(REPLICAS.replace("{switch}", switch), timeout_s=120).split() == ["0", "True", "0", "0"]


@pytest.mark.behaviour("B22")
def test_threads_that_end_leave_nothing_behind_but_their_counts() -> None:
    x, w = torch.randn(1, 2, 6, 6), torch.randn(2, 2, 3, 3)
    with convplan.enabled(UNTUNED):
        F.conv2d(x, w)
        for _ in range(20):
            thread = threading.Thread(target=lambda: [F.conv2d(x, w) for _ in range(3)])
            thread.start()
            thread.join()
    stats = convplan.stats()
    assert (stats["planned"], stats["misses"], stats["hits"]) == (1, 21, 40)
    assert len(_counts.counts._hit_cells) <= 1 + threading.active_count()


def test_a_pool_of_threads_reuses_its_plans() -> None:
    x, w = torch.randn(1, 2, 6, 6), torch.randn(2, 2, 3, 3)
    expected = F.conv2d(x.double(), w.double())
    with convplan.enabled(UNTUNED), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: F.conv2d(x, w), range(60)))
    assert all(torch.allclose(one.double(), expected, rtol=1e-4, atol=1e-4) for one in found)
    stats = convplan.stats()
    assert stats["planned"] == 1
    assert 1 <= stats["misses"] <= 2
    assert stats["hits"] + stats["misses"] == 60

"""The environment of plans built ahead of time: the same words whether a GPU was asked or a file that describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convplan import _environment
from convplan._environment import PROBE_FAILED, Environment, ahead_of_time
from convplan._key import plan_key
from convplan._policy import Policy
from convplan._problem import Problem

H200: dict[str, Any] = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132}
AHEAD = Environment.ahead_of(gpu="NVIDIA H200", capability="9.0", multiprocessors=132, cudnn=91900)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Environment]]:
    """What the real probe makes of a GPU that torch describes like this."""

    def probe(cudnn: object = 91900, **changes: object) -> Environment:
        properties = SimpleNamespace(**{**H200, **changes})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.backends.cudnn, "version", cudnn if callable(cudnn) else lambda: cudnn)
        _environment._cuda_environment.cache_clear()
        return _environment.current("cuda", 0)

    yield probe
    _environment._cuda_environment.cache_clear()


@pytest.mark.behaviour("C7")
def test_a_described_gpu_and_a_live_one_spell_it_alike(live: Callable[..., Environment]) -> None:
    assert ahead_of_time(live()) == AHEAD
    assert AHEAD.is_ahead
    assert not live().is_ahead
    assert dict(AHEAD.items) == {
        "built": "ahead of time",
        "gpu": "NVIDIA H200",
        "capability": "9.0",
        "multiprocessors": "132",
        "cudnn": "91900",
    }


@pytest.mark.parametrize(
    "changes",
    [{"name": "NVIDIA H100"}, {"minor": 1}, {"major": 12}, {"multi_processor_count": 114}, {"cudnn": 91800}],
    ids=str,
)
def test_another_gpu_or_cudnn_gets_another_key(changes: dict[str, Any], live: Callable[..., Environment]) -> None:
    problem, policy = Problem.dense("fprop", (1, 1, 4, 4), (1, 1, 3, 3), device="cuda"), Policy().resolve()
    other = ahead_of_time(live(**changes))
    assert other is not None
    assert other != AHEAD
    assert plan_key(problem, policy, other) != plan_key(problem, policy, AHEAD)


def test_what_the_gpus_machine_alone_knows_does_not_matter(
    live: Callable[..., Environment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(torch.version, "cuda", "14.7")
    assert dict(live().items)["torch"] == "9.9.9"
    assert ahead_of_time(live()) == AHEAD


def test_without_an_answer_nothing_is_looked_up(live: Callable[..., Environment]) -> None:
    def failing() -> int:
        raise RuntimeError("no cuDNN")

    broken = live(cudnn=failing)
    assert dict(broken.items)["cudnn"] == PROBE_FAILED
    assert ahead_of_time(broken) is None


def test_there_is_nothing_ahead_of_a_processor_nor_of_what_is_ahead() -> None:
    assert ahead_of_time(_environment.current("cpu")) is None
    assert ahead_of_time(Environment("cuda", (("gpu", "NVIDIA H200"),))) is None
    assert ahead_of_time(AHEAD) is None

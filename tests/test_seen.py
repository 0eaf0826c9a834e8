"""Calls that were made before: what tells tensors apart, with Dynamo's guards and without, and calls of one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.fresh import fresh_process

import convplan
from convplan import Policy, _runtime
from convplan._runtime import local
from convplan.torch_ops import seen

Tensor = torch.Tensor

MAKERS: dict[str, Callable[..., seen.Same]] = {"as found": seen.like, "in Python": seen._compared_here}


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda one: one[..., :-1] if one.shape[-1] > 1 else one[:-1],
    "strides": lambda one: torch.randn(*one.shape[:-1], 8)[..., : one.shape[-1]],
    "layout": lambda one: one.transpose(0, 1).contiguous().transpose(0, 1),
    "rank": lambda one: one.flatten(2),
    "dtype": lambda one: one.double(),
    "another dtype of that size": lambda one: one.view(torch.int32),
    "device": lambda one: one.to("meta"),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield


def test_this_torch_has_guards_that_tell_tensors_apart() -> None:
    assert seen._guards() is not None


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_tensors_like_those_of_the_call_are_told(make: Callable[..., seen.Same]) -> None:
    x, w = given()
    assert make(x, w)(*given())
    bias = torch.randn(5)
    assert make(x, w, bias)(*given(), torch.randn(5))
    assert not make(x, w, bias)(*given(), torch.randn(6))


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_tensors_that_differ_are_told_apart(
    make: Callable[..., seen.Same], place: int, change: Callable[[Tensor], Tensor]
) -> None:
    tensors = list(given())
    same = make(*tensors)
    tensors[place] = change(tensors[place])
    assert not same(*tensors)


@pytest.mark.parametrize(
    "useless",
    [
        None,
        lambda *tensors, **sizes: (_ for _ in ()).throw(TypeError("other arguments")),
        lambda *tensors, **sizes: type("Agrees", (), {"check": lambda self, *others: True})(),
        lambda *tensors, **sizes: type("Refuses", (), {"check": lambda self, *others: False})(),
    ],
    ids=["none", "other arguments", "agrees to all", "refuses all"],
)
def test_guards_that_are_of_no_use_are_not_used(
    useless: Callable[..., object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", useless)
    seen._guards.cache_clear()
    try:
        assert seen._guards() is None
        x, w = given()
        assert seen.like(x, w)(*given())
        assert not seen.like(x, w)(x.double(), w)
    finally:
        monkeypatch.undo()
        seen._guards.cache_clear()


def test_calls_of_one_weight_that_differ_are_all_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a head that all levels of a pyramid share."""
    w, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    calls = [(torch.randn(1, 3, size, size), bias if size % 2 else None, 1 + size % 3) for size in range(5, 11)]
    wanted = [F.conv2d(x, w, b, step, 1) for x, b, step in calls]
    with convplan.enabled(Policy(effort="instant")):
        for _ in range(3):
            for (x, b, step), y in zip(calls, wanted, strict=True):
                assert torch.equal(F.conv2d(x, w, b, step, 1), y)
        one, kept = local.forwards[w.data_ptr()], 0
        while one is not None:
            one, kept = one.other, kept + 1
        assert kept == len(calls)

        def unneeded(*arguments: object) -> None:
            raise AssertionError("a key was made")

        monkeypatch.setattr(local.callers, "get", unneeded)
        for (x, b, step), y in zip(calls, wanted, strict=True):
            assert torch.equal(F.conv2d(x, w, b, step, 1), y)


def test_no_weight_has_more_than_a_few_known_calls() -> None:
    w = torch.randn(4, 3, 3, 3)
    with convplan.enabled(Policy(effort="instant")):
        for size in range(5, 5 + 3 * seen.MOST_OF_ONE_WEIGHT):
            for _ in range(2):
                F.conv2d(torch.randn(1, 3, size, size), w, None, 1, 1)
            one, kept = local.forwards[w.data_ptr()], 0
            while one is not None:
                one, kept = one.other, kept + 1
            assert 1 <= kept <= seen.MOST_OF_ONE_WEIGHT


def test_a_call_of_another_mode_of_autograd_is_known_beside_the_first() -> None:
    """As activation checkpointing has it: without autograd first, and once more with it."""
    x, w = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with convplan.enabled(Policy(effort="instant")):
        for _ in range(3):
            with torch.no_grad():
                F.conv2d(x.detach(), w, None, 1, 1)
            F.conv2d(x, w, None, 1, 1)
        before = local.forwards[w.data_ptr()]
        with torch.no_grad():
            F.conv2d(x.detach(), w, None, 1, 1)
        F.conv2d(x, w, None, 1, 1)
        assert local.forwards[w.data_ptr()] is before


def _without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def unneeded(*arguments: object) -> None:
        raise AssertionError("a key was made")

    monkeypatch.setattr(local.callers, "get", unneeded)


def test_weights_that_are_made_anew_in_every_step_are_known_by_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast's copies are. Two layers share all sizes but not the stride, and two everything."""
    layers = [
        (torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), 1),
        (torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), 2),
    ]
    layers += [
        (torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), 2),
        (torch.randn(2, 4, 9, 9), torch.randn(5, 4, 1, 1), 1),
    ]
    places = [torch.empty(200) for _ in layers]

    def step(shift: int) -> None:
        for number, (x, w, stride) in enumerate(layers):
            place = places[(number + shift) % len(places)]
            moved = place[: w.numel()].view(w.shape).copy_(w).requires_grad_()
            wanted = moved.detach().clone().requires_grad_()
            given = x.clone().requires_grad_()
            y = F.conv2d(given, moved, None, stride)
            y.square().sum().backward()
            right = F.unfold(x, w.shape[2:], stride=stride).transpose(1, 2) @ wanted.flatten(1).t()
            right = right.transpose(1, 2).reshape(y.shape)
            right.square().sum().backward()
            torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moved.grad, wanted.grad, rtol=1e-4, atol=1e-4)

    with convplan.enabled(Policy(effort="instant")):
        for shift in range(3):
            step(shift)
        _without_keys(monkeypatch)
        for shift in range(len(layers)):
            step(shift)


def test_a_moved_weight_of_other_alignment_is_not_the_same_call() -> None:
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    place = torch.empty(w.numel() + 1)
    with convplan.enabled(Policy(effort="instant")):
        for _ in range(3):
            F.conv2d(x, w)
        odd = place[1:].view(w.shape).copy_(w)
        assert odd.data_ptr() & 31 != w.data_ptr() & 31
        convplan.stats(reset=True)
        assert torch.equal(F.conv2d(x, odd), F.conv2d(x, w))
        assert convplan.stats()["misses"] == 1


def test_no_sizes_have_more_than_a_few_known_calls() -> None:
    x, weights = torch.randn(1, 3, 12, 12), [torch.randn(4, 3, 3, 3) for _ in range(12)]
    with convplan.enabled(Policy(effort="instant")):
        for number, w in enumerate(weights):
            for _ in range(2):
                F.conv2d(x, w, None, 1 + number % 3, number // 3)
        assert 1 <= len(local.forward_sizes[x.shape, weights[0].shape]) <= _runtime.MOST_OF_ONE_SIZE

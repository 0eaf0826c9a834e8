"""What fused modules remember of their calls: the same results, whatever changes between two of them."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import convplan
from convplan import _runtime
from convplan.torch_ops import functional, fused, fused_modules
from convplan.torch_ops.fused_modules import FusedConv

Tensor = torch.Tensor
FAST = convplan.Policy(effort="instant")


class Tail(nn.Module):
    """A convolution with its norm, maybe a sum, maybe a ReLU."""

    def __init__(self, adds: bool, ends: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.adds, self.ends = adds, ends
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            nn.init.uniform_(torch.as_tensor(self.norm.running_mean), -1, 1)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y = torch.add(y, other, alpha=0.5) if self.adds else y
        return torch.relu(y) if self.ends else y


FORMS = [(False, False), (False, True), (True, False), (True, True)]


def made(adds: bool = True, ends: bool = True) -> tuple[Tail, nn.Module, FusedConv]:
    """A model, the fused one, and the module in it."""
    torch.manual_seed(0)
    model = Tail(adds, ends).eval()
    fast = convplan.fuse(model, policy=FAST)
    (inside,) = (one for one in fast.modules() if isinstance(one, FusedConv))
    return model, fast, inside


def inputs(*dims: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*(dims or (2, 4, 6, 6))), torch.randn(*(dims or (2, 4, 6, 6)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which calls were looked up by their key."""
    found: list[str] = []
    for module in (functional, fused):

        def counting(*arguments: Any, _found: Callable[..., Any] = module.found, _name: str = module.__name__) -> Any:
            found.append(_name.rpartition(".")[2])
            return _found(*arguments)

        monkeypatch.setattr(module, "found", counting)
    _runtime.local.callers.clear()
    return found


def check(model: nn.Module, fast: nn.Module, x: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        right = copy.deepcopy(model).double()(x.double(), other.double())
        torch.testing.assert_close(fast(x, other).double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("adds", "ends"), FORMS)
def test_the_third_call_needs_no_key_and_counts_as_a_hit(adds: bool, ends: bool, asked: list[str]) -> None:
    model, fast, inside = made(adds, ends)
    x, other = inputs()
    for _ in range(2):  # the second one finds what the first one has kept, and remembers it
        check(model, fast, x, other)
    assert asked == ["fused" if adds or ends else "functional"] * 2
    hits = convplan.stats()["hits"]
    for _ in range(3):
        check(model, fast, *inputs())
    assert len(asked) == 2
    assert convplan.stats()["hits"] == hits + 3
    assert len(inside._seen) == 1


def test_an_input_that_is_the_residual_too_is_known_again(asked: list[str]) -> None:
    model, fast, inside = made()
    x, other = inputs()
    for given in (x, x, x, other, other, other, x, x):
        check(model, fast, x, given)
    assert len(asked) == 3  # the other kind finds at once what the first has kept
    assert len(inside._seen) == 2
    with torch.no_grad():
        torch.testing.assert_close(fast(x, x.clone()), fast(x, x))


def moved(tensor: Tensor) -> Tensor:
    """The same numbers at an address that 8 divides and 16 does not."""
    memory = torch.empty(tensor.numel() + 16)
    start = next(n for n in range(16) if (memory.data_ptr() + 4 * n) % 16 == 8)
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "input-strides": lambda x, other: (x.mT, other),
    "input-address": lambda x, other: (moved(x), other),
    "input-dtype": lambda x, other: (x.double(), other.double()),
    "input-shape": lambda x, other: (x[:1].clone(), other[:1].clone()),
    "both-layouts": lambda x, other: (
        x.to(memory_format=torch.channels_last), other.to(memory_format=torch.channels_last)
    ),
    "other-strides": lambda x, other: (x, other.to(memory_format=torch.channels_last)),
    "other-shape": lambda x, other: (x, other[:, :1]),
    "other-address": lambda x, other: (x, moved(other)),
    "other-dtype": lambda x, other: (x, other.double()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_tensor_is_looked_up_anew(change: str, asked: list[str]) -> None:
    model, fast, _ = made()
    x, other = inputs()
    for _ in range(3):
        check(model, fast, x, other)
    asked.clear()
    wide = change == "input-dtype"
    for _ in range(3):
        given = CHANGES[change](*inputs())
        check(model.double() if wide else model, fast.double() if wide else fast, *given)
    assert asked
    if wide:
        model.float(), fast.float()
    asked.clear()
    for _ in range(3):
        check(model, fast, x, other)
    assert len(asked) <= 2  # where both have the same shape, the last of them is remembered


@pytest.mark.parametrize("change", ["layout", "address", "numbers", "bias", "no bias"])
def test_another_weight_is_looked_up_anew(change: str, asked: list[str]) -> None:
    model, fast, inside = made()
    x, other = inputs()
    for _ in range(3):
        check(model, fast, x, other)
    asked.clear()
    conv, norm = model.conv, model.norm
    with torch.no_grad():
        if change == "layout":
            inside.weight.data = inside.weight.data.to(memory_format=torch.channels_last)
        elif change == "address":
            inside.weight.data = moved(inside.weight.data)
        elif change == "numbers":
            inside.weight.mul_(2)
            conv.weight.mul_(2)
        elif change == "bias":
            assert inside.bias is not None
            inside.bias = nn.Parameter(torch.stack([inside.bias + 1, inside.bias], 1)[:, 0], requires_grad=False)
            norm.bias.add_(1)
        else:
            assert inside.bias is not None
            norm.bias.sub_(inside.bias)
            inside.bias = None
    for _ in range(3):
        check(model, fast, x, other)
    assert bool(asked) == (change != "numbers")


def test_an_input_of_another_dtype_is_refused_as_by_the_function(asked: list[str]) -> None:
    model, fast, inside = made(adds=False)
    x, other = inputs()
    for _ in range(3):
        check(model, fast, x, other)
    with torch.no_grad():
        with pytest.raises(Exception, match=r"dtype|double") as why:
            fast(x.double(), other)
        with pytest.raises(type(why.value)):
            convplan.conv2d(x.double(), inside.weight, inside.bias, padding=1, activation="relu")


def test_inference_mode_and_no_grad_are_remembered_beside_each_other(asked: list[str]) -> None:
    model, fast, inside = made()
    x, other = inputs()
    right = model(x, other).detach()

    def both() -> None:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(fast(x, other), right, rtol=1e-5, atol=1e-5)

    for _ in range(3):
        both()
    asked.clear()
    for _ in range(3):
        both()
    assert asked == []
    assert len(inside._seen) == 2


def test_what_another_thread_remembers_is_not_taken(asked: list[str]) -> None:
    model, fast, inside = made()
    x, other = inputs()
    for _ in range(3):
        check(model, fast, x, other)
    asked.clear()
    stranger = _runtime.Callers(8, [0])
    for key, known in dict(inside._seen).items():
        inside._seen[key] = known._replace(
            home=weakref.ref(stranger)
        )  # whose table was at the same address, before it went
    check(model, fast, x, other)
    assert asked == ["fused"]


def test_gradients_autocast_and_other_threads_go_their_own_way(asked: list[str]) -> None:
    model, fast, inside = made()
    x, other = inputs()
    for _ in range(3):
        check(model, fast, x, other)
    x.requires_grad_()
    result = fast(x, other)
    result.sum().backward()
    right = x.grad
    x.grad = None
    model(x, other).sum().backward()
    torch.testing.assert_close(right, x.grad, rtol=1e-4, atol=1e-4)
    x.requires_grad_(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(x, other.bfloat16()).dtype == torch.bfloat16
    found: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            results = [fast(x, other) for _ in range(3)]
            found.append((_runtime.local.callers, results))

    with torch.no_grad():
        expected = fast(x, other)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((home, results),) = found
    assert all(torch.equal(one, expected) for one in results)
    homes = [known.home() for known in inside._seen.values()]
    assert len(homes) == 2
    assert any(one is home for one in homes)
    assert any(one is _runtime.local.callers for one in homes)
    del home, homes, found[:]
    gc.collect()
    assert [known.home() is None for known in inside._seen.values()].count(True) == 1, "a thread's plans go with it"


def test_a_new_policy_and_torchs_flags_are_followed(asked: list[str]) -> None:
    torch.manual_seed(0)
    model = Tail(True, True).eval()
    fast = convplan.fuse(model)  # the rules are those of `enable()`
    x, other = inputs()
    with convplan.enabled(FAST):
        for _ in range(3):
            check(model, fast, x, other)
        assert len(asked) == 2
        threads = torch.get_num_threads()
        torch.use_deterministic_algorithms(True)
        try:
            check(model, fast, x, other)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(threads)
        assert len(asked) == 3
    with convplan.enabled(convplan.Policy(effort="instant", engines=("aten",))):
        check(model, fast, x, other)
    assert len(asked) == 4


def test_while_problems_are_captured_every_call_is_seen() -> None:
    model, fast, _ = made()
    x, other = inputs()
    for _ in range(3):
        check(model, fast, x, other)
    with torch.no_grad(), convplan.capture() as problems:
        fast(x, other)
    assert [str(one.epilogue.activation) for one in problems] == ["relu"]


def test_transforms_and_subclasses_go_the_usual_way(asked: list[str]) -> None:
    model, fast, inside = made()
    x, other = inputs()
    for _ in range(3):
        check(model, fast, x, other)
    with torch.no_grad():
        right = torch.stack([model(x, other), model(2 * x, other)])
        found = torch.vmap(fast, in_dims=(0, None))(torch.stack([x, 2 * x]), other)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)

        class Own(Tensor):
            pass

        before = dict(inside._seen)
        torch.testing.assert_close(
            fast(x.as_subclass(Own), other).as_subclass(Tensor), model(x, other), rtol=1e-4, atol=1e-4
        )
        assert inside._seen == before


def test_what_is_remembered_has_a_bound_and_stays_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_modules, "MOST_SHAPES", 3)
    model, fast, inside = made()
    for size in (4, 5, 6, 7, 8):
        for _ in range(2):
            check(model, fast, *inputs(1, 4, size, size))
        assert 0 < len(inside._seen) <= 3
    for other in (copy.deepcopy(inside), pickle.loads(pickle.dumps(inside))):
        assert other._seen == {}
        with torch.no_grad():
            assert torch.equal(other(*inputs_of_one()), inside(*inputs_of_one()))


def inputs_of_one() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 4, 5, 5, generator=generator), torch.randn(1, 4, 5, 5, generator=generator)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_computed_or_exchanged_later_is_what_counts(name: str) -> None:
    _, fast, inside = made(adds=False)
    x, other = inputs()
    with torch.no_grad():
        fast(x, other)
        for _ in range(2):
            torch.nn.utils.parametrize.register_parametrization(inside, name, Halved())
            own = {"weight": inside.weight, "bias": inside.bias}
            right = torch.relu(nn.functional.conv2d(x, **own, padding=1))
            torch.testing.assert_close(fast(x, other), right, rtol=1e-4, atol=1e-5)
            torch.nn.utils.parametrize.remove_parametrizations(inside, name)
        delattr(inside, name)
        setattr(inside, name, torch.ones_like(own[name]))
        own[name] = torch.ones_like(own[name])
        right = torch.relu(nn.functional.conv2d(x, **own, padding=1))
        torch.testing.assert_close(fast(x, other), right, rtol=1e-4, atol=1e-5)

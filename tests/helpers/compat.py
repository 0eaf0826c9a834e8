"""Comparing one piece of code in stock torch and under `enable()`: what it returns, what it looks like, what it raises.

A `Case` is a function of a `Place`, which makes its tensors. It returns tensors and other things in tuples, lists and
dictionaries. Everything about them must be equal in both, but for the numbers, which are judged against the same code
in float64 on the CPU. The tables of cases stand in `compat_cases`, and in the files that it gathers.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

import convplan
from convplan import Policy, _runtime
from helpers.calls import Call, call

Tensor = torch.Tensor

# Calls under each policy. The first plans, the second finds the plan by its key, the third by the weight's last call.
TURNS = (3, 1, 1)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Torch's own modules say this when they are first used.
ONCE = "DeprecationWarning: `torch.jit"

# How far off a number may be beside stock torch's own error: in units of the dtype's last place at the largest number.
UNITS = {F32: 64, F64: 1024, F16: 6, BF16: 6}


class Place:
    """Where a case computes, and in which dtype. Its tensors are the same numbers at every place.

    Args:
        device: of every tensor.
        dtype: the numbers are rounded to it.
        compute: dtype of the tensors, where it is another than the one they were rounded to.
    """

    def __init__(self, device: str, dtype: torch.dtype, compute: torch.dtype | None = None) -> None:
        self.device, self.dtype, self._rounded = device, compute or dtype, dtype
        self._made: dict[Any, Tensor] = {}

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor at this place, in its layout."""
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.to(self.device)
        wanted, rounded = (self.dtype, self._rounded)
        if tensor.is_complex():
            wanted, rounded = wanted.to_complex(), rounded.to_complex()
        return tensor.to(rounded).to(wanted).to(self.device)

    def randn(self, *dims: int, seed: int = 0) -> Tensor:
        """Random numbers, the same tensor each time it is asked for."""
        key = (dims, seed)
        if key not in self._made:
            generator = torch.Generator().manual_seed(1000 * seed + sum(dims))
            self._made[key] = self.put(torch.randn(dims, generator=generator))
        return self._made[key].detach()

    def tensors(self, one: Call, grad: bool = True) -> list[Tensor]:
        """Input, weight, and bias where the call has one, as leaves."""
        found = []
        for letter, given in zip("xwb", one.tensors(F32), strict=True):
            if given is not None:
                found.append(self._made.setdefault((one.id, letter), self.put(given)).detach())
        return [t.requires_grad_(grad) for t in found]


@dataclass(frozen=True)
class Case:
    """One piece of code to run in both.

    Args:
        id: what the test id shows.
        run: the code; gets a `Place`.
        dtypes: those it is run in, one after the other.
        planned: convplan computes some of it (True) or none (False); None: that depends on the machine.
        devices: where it has a meaning.
        rounds_on: the devices where it does.
        every_policy: it is run under all policies of a device, not just the first.
        weight_gradients: which of the returned tensors are gradients of weights. What stands in the stride of a
            dimension of size 1 is not compared for those: no layer ever reads it.
        rounds_to: dtype it computes in where that is less exact than its tensors.
        by_transform: an engine that transforms blocks may run it. False where infinities, or what is not summed into a
            number, matter: those spread in a transform, as docs/differences.md says.
    """

    id: str
    run: Callable[[Place], Any]
    dtypes: tuple[torch.dtype, ...] = (F32,)
    planned: bool | None = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    rounds_to: torch.dtype | None = None
    rounds_on: tuple[str, ...] = ("cpu", "cuda")
    every_policy: bool = False
    weight_gradients: tuple[int, ...] = ()
    by_transform: bool = True


class Look(NamedTuple):
    """Everything about a tensor but its numbers."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None
    device: torch.device
    layout: torch.layout
    requires_grad: bool
    grad_fn: str | None
    is_leaf: bool
    is_inference: bool
    is_neg: bool


def look(tensor: Tensor) -> Look:
    """How a tensor looks."""
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return Look(
        type(tensor).__name__,
        tuple(tensor.shape) if not tensor.is_nested else (),
        tensor.dtype,
        tensor.stride() if strided else None,
        tensor.device,
        tensor.layout,
        tensor.requires_grad,
        None if tensor.grad_fn is None else type(tensor.grad_fn).__name__,
        tensor.is_leaf,
        tensor.is_inference(),
        tensor.is_neg() if strided else False,
    )


@dataclass
class Outcome:
    """What running a case came to."""

    error: str = ""
    message: str = ""
    leaves: list[Any] = field(default_factory=list)
    spec: str = ""
    warned: frozenset[str] = frozenset()


def outcome(run: Callable[[Place], Any], place: Place) -> Outcome:
    """Run a case once, from the same random state every time."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as seen, warn_always():
        warnings.simplefilter("always")
        try:
            leaves, spec = pytree.tree_flatten(run(place))
            result = Outcome(leaves=leaves, spec=str(spec))
        except Exception as exc:
            lines = str(exc).splitlines()
            result = Outcome(error=type(exc).__name__, message=_without_addresses(lines[0] if lines else ""))
    told = {f"{w.category.__name__}: {str(w.message).splitlines()[0]}" for w in seen}
    result.warned = frozenset(text for text in told if not text.startswith(ONCE))
    return result


def _without_addresses(text: str) -> str:
    """Without what differs from run to run: addresses, and how much memory is free."""
    text = re.sub(r"0x[0-9a-fA-F]+", "0x", text)
    return re.sub(r"[\d.]+ (bytes|KiB|MiB|GiB|TiB)", r"N \1", text)


@contextmanager
def warn_always() -> Iterator[None]:
    """Torch warns each time, not once in a process, so that warnings can be compared."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)


def differences(case: Case, dtype: torch.dtype, stock: Outcome, mine: Outcome, right: Outcome) -> list[str]:
    """What is not as in stock torch; numbers are judged by those of `right`."""
    if (mine.error, mine.message) != (stock.error, stock.message):
        return [f"{mine.error or 'a result'} {mine.message!r}, in torch {stock.error or 'a result'} {stock.message!r}"]
    found = []
    if mine.warned != stock.warned:
        found.append(f"warned {sorted(mine.warned)}, in torch {sorted(stock.warned)}")
    if mine.spec != stock.spec:
        return [*found, f"a {mine.spec}, in torch {stock.spec}"]
    judged = right.leaves if len(right.leaves) == len(stock.leaves) else stock.leaves
    for number, (one, other, exact) in enumerate(zip(mine.leaves, stock.leaves, judged, strict=True)):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            if isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
                found.append(f"leaf {number} is {_said(one)}, in torch {_said(other)}")
            continue
        looks = look(one), look(other)
        if number in case.weight_gradients:
            looks = looks[0]._replace(strides=_stepped(one)), looks[1]._replace(strides=_stepped(other))
        if looks[0] != looks[1]:
            pairs = zip(Look._fields, *looks, strict=True)
            found += [f"leaf {number}: {name} is {a}, in torch {b}" for name, a, b in pairs if a != b]
            continue
        found += [f"leaf {number}: {text}" for text in _numbers(case, dtype, one, other, exact)]
    return found


def _stepped(tensor: Tensor) -> tuple[int, ...]:
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _said(leaf: Any) -> str:
    return f"a tensor of {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _numbers(case: Case, dtype: torch.dtype, mine: Tensor, stock: Tensor, right: Any) -> list[str]:
    mine, stock = plain(mine), plain(stock)
    device = mine.device.type
    if mine.device.type == "meta" or not mine.numel():
        return []
    exact = plain(right) if isinstance(right, Tensor) else stock
    if exact.shape != stock.shape:
        exact = stock
    if not (mine.is_floating_point() or mine.is_complex()):
        return [] if torch.equal(mine, stock) else ["numbers differ"]
    mine, stock, exact = (_wide(t) for t in (mine, stock, exact))
    if not torch.equal(mine.isfinite(), stock.isfinite()):
        return [f"{int((~mine.isfinite()).sum())} numbers are not finite, in torch {int((~stock.isfinite()).sum())}"]
    mine, stock, exact = (torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0) for t in (mine, stock, exact))
    rounds_to = case.rounds_to if case.rounds_to and device in case.rounds_on else dtype
    coarse = max((rounds_to, dtype), key=lambda d: torch.finfo(d).eps if d.is_floating_point else 0)
    unit = torch.finfo(coarse).eps if coarse.is_floating_point else torch.finfo(F32).eps
    allowed = 4 * float((stock - exact).abs().max()) + UNITS.get(coarse, 64) * unit * float(exact.abs().max())
    off = float((mine - exact).abs().max())
    return [] if off <= allowed or math.isclose(off, allowed) else [f"off by {off:.3g}, allowed {allowed:.3g}"]


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a tensor of any kind."""
    with torch._C.DisableTorchFunctionSubclass():
        tensor = tensor.detach()
        if hasattr(tensor, "elem"):
            tensor = tensor.elem
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        if type(tensor) is not Tensor and not isinstance(tensor, torch._subclasses.FakeTensor):
            tensor = tensor.as_subclass(Tensor)
        if isinstance(tensor, torch._subclasses.FakeTensor):
            return torch.empty(0)
        if tensor.is_nested:
            return torch.cat([part.flatten() for part in tensor.unbind()])
        if tensor.is_quantized:
            return tensor.dequantize()
        return tensor.to_dense() if tensor.layout != torch.strided else tensor


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor.to(torch.complex128)) if tensor.is_complex() else tensor.double()


def check(case: Case, device: str, policies: Mapping[str, Policy]) -> None:
    """Run a case in stock torch and under each policy, and raise with everything that differs."""
    chosen = [
        (name, policy)
        for name, policy in policies.items()
        if case.by_transform or policy.engines is None or "fft" not in policy.engines
    ]
    wrong = []
    for dtype in case.dtypes:
        stock = outcome(case.run, Place(device, dtype))
        right = outcome(case.run, Place("cpu", dtype, F64)) if not stock.error else stock
        place = Place(device, dtype)
        _runtime.forget()
        convplan.stats(reset=True)
        for turns, (name, policy) in zip(TURNS, chosen if case.every_policy else chosen[:1], strict=False):
            with convplan.enabled(policy):
                for turn in range(turns):
                    found = differences(case, dtype, stock, outcome(case.run, place), right)
                    wrong += [f"{dtype} by {name}, turn {turn}: {text}" for text in found]
        stats = convplan.stats()
        if not stock.error and (stats["fell_back"], stats["failed"]) != (0, 0):
            wrong.append(f"{dtype}: {stats}")
        planned = stats["planned"] + stats["from_store"]
        if case.planned is not None and bool(planned) != case.planned:
            wrong.append(f"{dtype}: {planned} planned, expected {'some' if case.planned else 'none'}")
    assert wrong == [], "\n".join([case.id, *wrong])


# Run the first plan that builds, and neither time nor store anything; the engines' choice differs.
CPU_POLICIES = {
    "matmul": Policy(tune_after=10**9, engines=("matmul", "aten")),
    "aten": Policy(tune_after=10**9, engines=("aten",)),
    "fft": Policy(tune_after=10**9, engines=("fft", "aten")),
}
GPU_POLICIES = {"default": Policy(effort="instant")}

__all__ = [
    "BF16", "CPU_POLICIES", "F16", "F32", "F64", "GPU_POLICIES", "Call", "Case", "Look", "Outcome", "Place", "Tensor",
    "call", "check", "differences", "look", "outcome", "plain",
]  # fmt: skip

"""A whole model in stock torch, under `enable()`, and in float64: what it returns, and its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import convplan
from convplan import Policy

Run = tuple[list[torch.Tensor], dict[str, torch.Tensor]]

# Beside stock torch's own error: as a share of the largest number of a tensor, and of all gradients (a bias before a
# normalization has no gradient but rounding).
SHARE, FLOOR = 1e-4, 1e-6
TIMES_STOCK = 8
# What a few roundings of each weight do in stock torch is allowed as well: to a gradient, a ReLU on the other side of 0
# is no small difference.
ROUNDINGS, SHAKEN = 2.0**-20, 6


def compare(model: Any, given: dict[str, Any], run: Callable[[Any, dict[str, Any]], Run], policy: Policy) -> list[str]:
    """Everything that differs, after two runs under the policy."""
    stock = run(model, given)
    convplan.stats(reset=True)
    with convplan.enabled(policy):
        mine = [run(model, given) for _ in range(2)]
    stats = convplan.stats()
    wrong = []
    if (stats["fell_back"], stats["failed"]) != (0, 0) or not stats["planned"]:
        wrong.append(f"counted {stats}")
    right = _in_float64(model, given, run, stock)
    if any(_differences(found, [stock], right) for found in mine):
        stocks = [stock, *_shaken(model, given, run)]
        for number, found in enumerate(mine):
            wrong += [f"run {number}: {text}" for text in _differences(found, stocks, right)]
    return wrong


def _shaken(model: Any, given: dict[str, Any], run: Callable[[Any, dict[str, Any]], Run]) -> list[Run]:
    """Stock torch's runs of models whose weights differ from this one's by a few roundings."""
    found = []
    for seed in range(SHAKEN):
        other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for one in other.parameters():
                if one.is_floating_point():
                    one.mul_(1 + ROUNDINGS * torch.randn(one.shape, generator=generator).to(one))
        found.append(run(other, given))
    return found


def _in_float64(model: Any, given: dict[str, Any], run: Callable[[Any, dict[str, Any]], Run], stock: Run) -> Run:
    """Where a model casts inside and cannot, stock torch's own float32."""
    doubles = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    try:
        right = run(copy.deepcopy(model).double(), doubles)
    except (RuntimeError, TypeError):
        return stock
    same = len(right[0]) == len(stock[0]) and all(a.shape == b.shape for a, b in zip(right[0], stock[0], strict=True))
    return right if same and right[1].keys() == stock[1].keys() else stock


def _differences(mine: Run, stocks: list[Run], right: Run) -> list[str]:
    """What looks otherwise than in the first of stock torch's runs, and what is farther off than all of them."""
    wrong, stock = [], stocks[0]
    if len(mine[0]) != len(stock[0]) or mine[1].keys() != stock[1].keys():
        return [f"{len(mine[0])} outputs and {len(mine[1])} gradients, in torch {len(stock[0])} and {len(stock[1])}"]
    named = [
        (f"output {i}", found, [one[0][i] for one in stocks], exact)
        for i, (found, exact) in enumerate(zip(mine[0], right[0], strict=True))
    ]
    named += [(name, mine[1][name], [one[1][name] for one in stocks], right[1][name]) for name in stock[1]]
    largest = max((float(t.abs().max()) for t in stock[1].values() if t.numel()), default=0.0)
    for name, found, torchs, exact in named:
        looks = [(t.shape, t.dtype, t.device, _stepped(t)) for t in (found, torchs[0])]
        if looks[0] != looks[1]:
            wrong.append(f"{name} is {looks[0]}, in torch {looks[1]}")
            continue
        off, allowed = _distance(found, exact), TIMES_STOCK * max(_distance(one, exact) for one in torchs)
        size = float(exact.double().nan_to_num(0, 0, 0).abs().max()) if exact.numel() else 0.0
        if not off <= allowed + SHARE * size + FLOOR * largest:
            wrong.append(
                f"{name} is off by {off:.3g}, {allowed / TIMES_STOCK:.3g} in torch, with numbers to {size:.3g}"
            )
    return wrong


def _stepped(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    if not one.numel():
        return 0.0
    if not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf")
    return float((one.double() - other.double()).nan_to_num(0, 0, 0).abs().max())

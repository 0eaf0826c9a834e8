"""Arguments that nobody chose: calls drawn at random, right and wrong ones, in stock torch and under `enable()`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compat import BF16, CPU_POLICIES, F16, F32, F64, Case, Place, check
from helpers.compat_autograd import weights
from helpers.compat_semantics import FORMS, FUNCTIONS
from helpers.fresh import fresh_process
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# Torch's own words about what it is about to do; which of them come is compared.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EXAMPLES = 250
PLAIN_FORMS = ("contiguous", "channels-last", "expanded-batch", "slice", "every-other", "negated", "unaligned")

generated = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)


def _rarely(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One in ten is odd."""
    return st.integers(0, 9).flatmap(lambda number: odd if number == 5 else usual)


@st.composite
def calls(draw: st.DrawFn, wrong: bool) -> dict[str, Any]:
    """One call's sizes, arguments and tensors; `wrong` draws what need not fit together."""
    function = draw(st.sampled_from(FUNCTIONS))
    spatial, transposed = int(function[-2]), "transpose" in function
    groups = draw(st.integers(1, 3))
    channels, filters = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    taps = [draw(st.integers(1, 4)) for _ in range(spatial)]
    each = st.one_of(st.integers(1, 3), st.tuples(*[st.integers(1, 3)] * spatial))
    arguments: dict[str, Any] = {"groups": groups, "stride": draw(each), "dilation": draw(each)}
    padding = st.one_of(st.integers(0, 4), st.tuples(*[st.integers(0, 4)] * spatial))
    arguments["padding"] = draw(padding)
    if transposed:
        arguments["output_padding"] = draw(st.integers(0, 2))
    elif draw(st.integers(0, 4)) == 0:
        arguments["padding"] = draw(st.sampled_from(["same", "valid"]))
        arguments["stride"] = 1 if arguments["padding"] == "same" else arguments["stride"]
    x_dims = [draw(_rarely(st.integers(1, 3), st.just(0))), channels * groups, *[draw(st.integers(1, 8)) for _ in taps]]
    w_dims = [channels * groups, filters, *taps] if transposed else [filters * groups, channels, *taps]
    bias = filters * groups if draw(st.booleans()) else None
    if wrong:
        name = draw(st.sampled_from([*arguments, "x", "w", "bias", "rank"]))
        if name in arguments:
            numbers = st.lists(st.integers(-1, 4), max_size=4)
            arguments[name] = draw(st.one_of(st.integers(-2, 9), numbers, st.text(max_size=3)))
        elif name == "x":
            x_dims[draw(st.integers(0, len(x_dims) - 1))] += draw(st.sampled_from([-1, 1, 5]))
        elif name == "w":
            w_dims[draw(st.integers(0, len(w_dims) - 1))] += draw(st.sampled_from([-1, 1, 5]))
        elif name == "bias":
            bias = draw(st.integers(0, 12))
        else:
            w_dims = w_dims[: draw(st.integers(0, len(w_dims)))]
    return {
        "function": function, "arguments": arguments,
        "x": [max(d, 0) for d in x_dims], "w": [max(d, 0) for d in w_dims],
        "bias": bias, "batched": draw(_rarely(st.just(True), st.just(False))),
        "forms": [draw(st.sampled_from(PLAIN_FORMS)) for _ in "xw"],
        "wanted": draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        "dtype": draw(st.sampled_from([F32, F32, F64, BF16, F16])),
    }  # fmt: skip


def _case(drawn: dict[str, Any]) -> Case:
    def run(on: Place) -> Any:
        made = [on.randn(*drawn["x"]), on.randn(*drawn["w"], seed=1)]
        tensors = [
            FORMS[form](t) if t.numel() and t.dim() > 1 else t for form, t in zip(drawn["forms"], made, strict=True)
        ]
        tensors += [] if drawn["bias"] is None else [on.randn(drawn["bias"], seed=2)]
        if not drawn["batched"] and tensors[0].shape[0]:
            tensors[0] = tensors[0][0]
        leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, drawn["wanted"], strict=False)]
        y = getattr(F, drawn["function"])(*leaves, **drawn["arguments"])
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return y, torch.autograd.grad(y, wanted, weights(y)) if wanted else ()

    gradients = (1 + drawn["wanted"][0],) if drawn["wanted"][1] else ()
    return Case(str(drawn), run, (drawn["dtype"],), planned=None, weight_gradients=gradients)


def _compare(drawn: dict[str, Any]) -> None:
    with fresh_process():
        check(_case(drawn), "cpu", CPU_POLICIES)


@generated
@given(calls(wrong=False))
def test_any_call_is_as_in_stock_torch(drawn: dict[str, Any]) -> None:
    _compare(drawn)


@generated
@given(calls(wrong=True))
def test_any_wrong_call_is_as_in_stock_torch(drawn: dict[str, Any]) -> None:
    _compare(drawn)

"""`fuse_training` on architectures of transformers, small and with random weights, as their own code trains them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from helpers import tiny_models
from helpers.fusing import ready

import convplan
from convplan import Policy
from convplan.torch_ops import normalized_call

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' own warnings

QUICK = Policy(effort="instant", engines=("aten",))


class Case(NamedTuple):
    """A model class, what its configuration is given beyond being made small, and what must at least be fused."""

    model: str
    least: dict[str, int]
    config: dict[str, Any] = {}  # noqa: RUF012
    level: str = "all"


CASES = {
    "resnet": Case("ResNetModel", {"convolution": 17, "relu": 13, "add": 4}),
    "resnet-basic": Case("ResNetModel", {"convolution": 9, "relu": 9, "add": 4}, {"layer_type": "basic"}),
    "regnet": Case("RegNetModel", {"convolution": 17, "relu": 13, "add": 4}),
    "mobilenet-v2": Case("MobileNetV2Model", {"convolution": 40, "hardtanh": 25}, {"tf_padding": False}, "depth"),
    "efficientnet": Case(
        "EfficientNetModel", {"convolution": 14, "silu": 13},
        {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}, "nothing",
    ),
    "hgnet-v2": Case("HGNetV2Backbone", {"convolution": 10, "relu": 5}, {}, "nothing"),
    "convnextv2": Case("ConvNextV2Model", {}),
}  # fmt: skip


def train(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that one step leaves behind."""
    torch.manual_seed(5)
    model.zero_grad()
    found = model(**inputs)
    outputs = found.feature_maps if "feature_maps" in found else [found.last_hidden_state]
    sum(one.square().mean() for one in outputs).backward()
    left = {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    left |= {f"output {place}": one.detach() for place, one in enumerate(outputs)}
    return left | {name: one.clone() for name, one in model.named_buffers()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(normalized_call.TAKEN, "cpu", (torch.float64,))
    case = CASES[name]
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, case.model)
    config = kind.config_class(**case.config)
    tiny_models.shrink(config, case.level)
    for key, value in case.config.items():
        setattr(config, key, value)
    model = ready(kind(config)).double().train()
    inputs = tiny_models.inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"][:, :, :64, :64].double().repeat(2, 1, 1, 1)
    fused = convplan.fuse_training(copy.deepcopy(model), policy=QUICK)
    counts = fused.fusion_report.counts
    assert {part: counts.get(part, 0) for part in case.least if counts.get(part, 0) < case.least[part]} == {}, (
        f"{fused.fusion_report}"
    )
    right, found = train(model, inputs), train(fused, inputs)
    assert found.keys() == right.keys()
    largest = max(float(one.abs().max()) for key, one in right.items() if key.startswith("gradient"))
    for key, value in right.items():
        scale = largest if key.startswith("gradient") else 1.0
        torch.testing.assert_close(
            found[key].double(),
            value.double(),
            rtol=1e-6,
            atol=1e-7 * scale,
            msg=lambda text, key=key: f"{key}: {text}",
        )

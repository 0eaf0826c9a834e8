"""`fuse` on convolutional architectures of transformers, small and with random weights, as their own code runs them."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from helpers import tiny_models
from helpers.fusing import ready

import convplan
from convplan import Policy
from convplan.torch_ops.fused_modules import FusedCall

pytestmark = pytest.mark.filterwarnings("ignore")  # the models' own warnings

QUICK = Policy(effort="instant", engines=("aten",))


class Case(NamedTuple):
    """A model class, what its configuration is given beyond being made small, and what must at least be fused."""

    model: str
    least: dict[str, int]
    config: dict[str, Any] = {}  # noqa: RUF012
    level: str = "all"


CASES = {
    "resnet": Case("ResNetForImageClassification", {"batch norm": 17, "relu": 13, "add": 4}),
    "resnet-basic": Case("ResNetModel", {"batch norm": 9, "relu": 9, "add": 4}, {"layer_type": "basic"}),
    "regnet": Case("RegNetModel", {"batch norm": 17, "relu": 17, "sigmoid": 4, "add": 4}),
    "convnext": Case("ConvNextModel", {"bias": 8}),
    "convnextv2": Case("ConvNextV2Model", {"bias": 8}),
    "mobilenet-v1": Case("MobileNetV1Model", {"batch norm": 20, "hardtanh": 20}, {"tf_padding": False}),
    "mobilenet-v2": Case("MobileNetV2Model", {"batch norm": 40, "hardtanh": 25}, {"tf_padding": False}, "depth"),
    "efficientnet": Case(
        "EfficientNetModel", {"batch norm": 14, "silu": 13, "sigmoid": 7},
        {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}, "nothing",
    ),
    "poolformer": Case("PoolFormerModel", {"bias": 6, "gelu": 2}),
    "segformer": Case("SegformerForSemanticSegmentation", {"bias": 6}),
    "bit": Case(
        "BitModel", {"add": 2},
        {"num_groups": 4, "hidden_sizes": [32, 64], "depths": [2, 1], "embedding_size": 16}, "nothing",
    ),
    "levit": Case("LevitModel", {"batch norm": 1}),
    "hgnet-v2": Case("HGNetV2Backbone", {"batch norm": 10, "relu": 5}, {}, "nothing"),
}  # fmt: skip


def build(case: Case) -> tuple[Any, dict[str, Any]]:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, case.model)
    config = kind.config_class(**case.config)
    tiny_models.shrink(config, case.level)
    for name, value in case.config.items():
        setattr(config, name, value)
    model = ready(kind(config).float())
    inputs = tiny_models.inputs(model)
    inputs["pixel_values"] = inputs["pixel_values"][:, :, :64, :64].contiguous()
    return model, inputs


@pytest.mark.parametrize("name", CASES)
def test_an_architecture_is_fused_and_computes_the_same(name: str) -> None:
    case = CASES[name]
    model, inputs = build(case)
    before = copy.deepcopy(model.state_dict())
    fused = convplan.fuse(model, inputs, strict=True, policy=QUICK)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(isinstance(one, FusedCall) for one in model.modules())
    assert type(fused) is type(model)
    counts = fused.fusion_report.counts
    assert {part: counts.get(part, 0) for part in case.least if counts.get(part, 0) < case.least[part]} == {}, (
        f"{fused.fusion_report}"
    )


def test_hidden_states_are_still_collected() -> None:
    model, inputs = build(CASES["convnext"])
    fused = convplan.fuse(model, policy=QUICK)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        found = fused(**inputs, output_hidden_states=True).hidden_states
    assert expected is not None
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_model_that_has_run_before_is_fused_too() -> None:
    model, inputs = build(CASES["resnet"])
    with torch.no_grad():
        expected = model(**inputs).logits
        fused = convplan.fuse(model, policy=QUICK)
        torch.testing.assert_close(fused(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
    assert fused.fusion_report.counts["add"] == 4

"""Convolutional networks of timm and torchvision on a GPU, forward and backward, in stock torch and under `enable()`.

What is not installed is skipped by name, and what has not run when the time is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.compat_networks import Networks

pytestmark = [pytest.mark.behaviour("C8")]

MOST_S = 140

# Package and name, in the order they are begun in: each has something that those before it lack.
MODELS = (
    ("timm", "resnet18"), ("timm", "convnext_atto"), ("timm", "efficientnet_b0"), ("timm", "regnety_002"),
    ("timm", "densenet121"), ("timm", "ghostnet_100"), ("timm", "hrnet_w18_small"), ("timm", "dla34"),
    ("timm", "repvgg_a0"), ("timm", "mobilevit_xxs"), ("timm", "vit_tiny_patch16_224"), ("timm", "nfnet_l0"),
    ("torchvision", "r3d_18"), ("torchvision", "shufflenet_v2_x0_5"), ("torchvision", "squeezenet1_0"),
    ("torchvision", "alexnet"), ("torchvision", "googlenet"), ("torchvision", "lraspp_mobilenet_v3_large"),
    ("timm", "res2net50_26w_4s"), ("timm", "mixnet_s"), ("timm", "edgenext_xx_small"), ("timm", "poolformer_s12"),
    ("timm", "resnetv2_50"), ("timm", "mobileone_s0"), ("timm", "inception_v3"), ("timm", "vgg11_bn"),
    ("torchvision", "r2plus1d_18"), ("torchvision", "s3d"), ("timm", "skresnet18"), ("timm", "xcit_nano_12_p16_224"),
    ("timm", "rexnet_100"), ("timm", "resnext50_32x4d"), ("timm", "cspresnet50"), ("timm", "darknet53"),
    ("timm", "fastvit_t8"), ("timm", "focalnet_tiny_srf"), ("timm", "coat_lite_tiny"), ("timm", "mnasnet_100"),
    ("timm", "xception41"), ("timm", "starnet_s1"), ("timm", "hgnetv2_b0"), ("timm", "visformer_tiny"),
    ("torchvision", "deeplabv3_mobilenet_v3_large"), ("torchvision", "mc3_18"), ("torchvision", "mnasnet0_5"),
    ("timm", "ese_vovnet19b_dw"), ("timm", "selecsls42"),
    ("timm", "tf_efficientnetv2_b0"), ("timm", "convmixer_768_32"),
)  # fmt: skip


@pytest.fixture(scope="module")
def networks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Networks, float]]:
    """Those that are asked for, every second one channels last; and when their time is over."""
    asked = [
        (*row, not number % 2)
        for number, row in enumerate(MODELS)
        if any(item.name.endswith(f"[{'-'.join(row)}]") for item in request.session.items)
    ]
    found = Networks(asked, str(tmp_path_factory.mktemp("networks")))
    yield found, time.monotonic() + MOST_S
    found.end()


@pytest.mark.parametrize(("package", "name"), MODELS, ids=["-".join(row) for row in MODELS])
def test_a_network_computes_what_it_does_in_stock_torch(
    package: str, name: str, networks: tuple[Networks, float], findings: dict[str, Any]
) -> None:
    processes, end = networks
    found = processes.of(package, name, end - time.monotonic())
    if found is None:
        pytest.skip(f"the {MOST_S} s for networks are over")
    if found.absent:
        pytest.skip(found.absent)
    findings[f"compat {package} {name}"] = found.wrong or f"{found.took_s:.1f} s"
    assert found.wrong == [], "\n".join(found.wrong[:20])

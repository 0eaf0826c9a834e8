"""Convolutional networks of timm and torchvision on a GPU, forward and backward, in stock torch and under `enable()`.

As many as fit into a minute, those that differ most from each other first. What is not installed is skipped by name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.compat_models import Run, compare

import convplan
from convplan import Policy, _runtime

pytestmark = [pytest.mark.behaviour("C8"), pytest.mark.filterwarnings("ignore")]  # the models' own warnings

MOST_S = 60
_started: list[float] = []

# Package and name, in the order they are run in: each has something that those before it lack.
MODELS = (
    ("timm", "resnet18"), ("timm", "convnext_atto"), ("timm", "efficientnet_b0"), ("timm", "regnety_002"),
    ("timm", "densenet121"), ("timm", "ghostnet_100"), ("timm", "hrnet_w18_small"), ("timm", "dla34"),
    ("timm", "repvgg_a0"), ("timm", "mobilevit_xxs"), ("timm", "vit_tiny_patch16_224"), ("timm", "nfnet_l0"),
    ("torchvision", "r3d_18"), ("torchvision", "shufflenet_v2_x0_5"), ("torchvision", "squeezenet1_0"),
    ("torchvision", "alexnet"), ("torchvision", "googlenet"), ("torchvision", "lraspp_mobilenet_v3_large"),
    ("timm", "res2net50_26w_4s"), ("timm", "mixnet_s"), ("timm", "edgenext_xx_small"), ("timm", "poolformer_s12"),
    ("timm", "levit_128s"), ("timm", "mobileone_s0"), ("timm", "inception_v3"), ("timm", "vgg11_bn"),
    ("torchvision", "r2plus1d_18"), ("torchvision", "s3d"), ("timm", "skresnet18"), ("timm", "xcit_nano_12_p16_224"),
    ("timm", "rexnet_100"), ("timm", "resnext50_32x4d"), ("timm", "cspresnet50"), ("timm", "darknet53"),
    ("timm", "fastvit_t8"), ("timm", "focalnet_tiny_srf"), ("timm", "coat_lite_tiny"), ("timm", "mnasnet_100"),
    ("timm", "xception41"), ("timm", "starnet_s1"), ("timm", "hgnetv2_b0"), ("timm", "visformer_tiny"),
    ("torchvision", "deeplabv3_mobilenet_v3_large"), ("torchvision", "mc3_18"), ("torchvision", "mnasnet0_5"),
    ("timm", "ese_vovnet19b_dw"), ("timm", "selecsls42"),
    ("timm", "tf_efficientnetv2_b0"), ("timm", "convmixer_768_32"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    _runtime.forget()
    convplan.stats(reset=True)
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = tf32
    convplan.disable()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def build(package: str, name: str) -> tuple[Any, torch.Tensor]:
    """The model with random weights, and inputs of the smallest size it takes."""
    torch.manual_seed(0)
    if package == "timm":
        timm: Any = pytest.importorskip("timm")
        if name not in timm.list_models():
            pytest.skip(f"timm {timm.__version__} has no {name}")
        model = timm.create_model(name, pretrained=False, num_classes=10)
        fixed = getattr(model, "patch_embed", None) is not None or "levit" in name or "xcit" in name or "coat" in name
        size = 224 if fixed else 128
        return model, torch.randn(2, 3, size, size)
    models: Any = pytest.importorskip("torchvision").models
    arguments = {"weights": None} | ({"weights_backbone": None} if name.startswith(("lraspp", "deeplab")) else {})
    arguments |= {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    video = name in ("r3d_18", "r2plus1d_18", "mc3_18", "s3d")
    return models.get_model(name, **arguments), torch.randn(*((2, 3, 16, 64, 64) if video else (2, 3, 128, 128)))


def run(model: Any, given: dict[str, Any]) -> Run:
    """The outputs, and the gradients of the parameters and of the image."""
    model.zero_grad(set_to_none=True)
    image = given["image"].detach().requires_grad_()
    found = model(image)
    outputs = torch.utils._pytree.tree_leaves(dict(found) if hasattr(found, "items") else found)
    torch.stack([t.double().square().mean() for t in outputs]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], gradients | {"image": image.grad}


@pytest.mark.parametrize(("package", "name"), MODELS, ids=["-".join(row) for row in MODELS])
def test_a_network_computes_what_it_does_in_stock_torch(package: str, name: str, findings: dict[str, Any]) -> None:
    _started.append(time.monotonic())
    if time.monotonic() - _started[0] > MOST_S:
        pytest.skip(f"the {MOST_S} s for networks are over")
    model, image = build(package, name)
    model, image = model.cuda().eval(), image.cuda()
    if len(_started) % 2 and image.dim() == 4:
        model, image = model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    wrong = compare(model, {"image": image}, run, Policy(effort="instant"))
    findings[f"compat {package} {name}"] = wrong or f"{time.monotonic() - _started[-1]:.1f} s"
    assert wrong == [], "\n".join(wrong[:20])

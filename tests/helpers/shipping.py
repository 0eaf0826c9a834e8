"""A model whose plans are tuned by one user and replayed by another: the program that either runs.

    python shipping.py tune FILE | replay

Prints one line of JSON: a digest of all bits of the outputs and the gradients, and convplan's counters.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from torch import nn

import convplan

DETERMINISTIC = convplan.Policy(deterministic=True, allow_tf32=False, budget_s=0.1)
SEED = 7


def model() -> tuple[nn.Module, torch.Tensor]:
    """ResNet-50 on a GPU, in half precision; a ResNet of two stages on the CPU."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(SEED)
    if not torch.cuda.is_available():
        small = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4)
        return ResNetForImageClassification(small), torch.randn(4, 3, 32, 32)
    whole = ResNetForImageClassification(ResNetConfig(num_labels=10)).cuda().half()
    images = torch.randn(16, 3, 128, 128).cuda().half().to(memory_format=torch.channels_last)
    return whole.to(memory_format=torch.channels_last), images


def step(network: nn.Module, images: torch.Tensor) -> str:
    """Forward and backward; the digest. The stem's gradients are left out: pooling before them adds in any order."""
    network.zero_grad()
    logits = network(pixel_values=images).logits
    logits.float().square().sum().backward()
    found = hashlib.sha256(logits.detach().cpu().numpy().tobytes())
    for name, parameter in sorted(network.named_parameters()):
        if parameter.grad is not None and "embedder" not in name:
            found.update(name.encode() + parameter.grad.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def main(role: str, file: str = "") -> None:
    network, images = model()
    if role == "tune":
        convplan.tune(lambda: step(network, images), policy=DETERMINISTIC)
        convplan.export_plans(file)
        network, images = model()
    convplan.stats(reset=True)
    with convplan.enabled(DETERMINISTIC.replace(mode="replay")):
        digest = step(network, images)
    sys.stdout.write(json.dumps({"digest": digest, **convplan.stats()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

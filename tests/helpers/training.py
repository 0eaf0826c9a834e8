"""Real architectures made small, data that can be learned, and a training run that says all it did.

Everything is seeded here, so two runs of the same training differ only by what computes them.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import nn

CLASSES = 4
STEPS = 20


class Run(NamedTuple):
    """One training run: the loss at every step, and the weights and buffers after the last."""

    losses: list[float]
    weights: dict[str, torch.Tensor]

    def digest(self) -> str:
        """All bits of the losses and the weights."""
        found = hashlib.sha256(repr([loss.hex() for loss in self.losses]).encode())
        for name, tensor in sorted(self.weights.items()):
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


def resnet(seed: int = 0) -> nn.Module:
    """A ResNet with basic blocks in two stages: a 7x7 stem, 3x3 layers and 1x1 shortcuts with stride 2."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=CLASSES)
    return ResNetForImageClassification(config)


def convnext(seed: int = 0) -> nn.Module:
    """A ConvNeXt in two stages: patches of 4x4, depthwise 7x7 layers and 2x2 downsampling."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(seed)
    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], image_size=32, num_labels=CLASSES, layer_scale_init_value=0.5
    )
    return ConvNextForImageClassification(config)


def batch(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images with one bright quarter, and which quarter it is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    images = 0.5 * torch.randn(size, 3, 32, 32, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 16 * (label // 2), 16 * (label % 2)
        image[:, top : top + 16, left : left + 16] += 1.0
    return images, labels


def train(model: nn.Module, steps: int = STEPS, dtype: torch.dtype = torch.float32) -> Run:
    """Plain gradient descent with momentum on a few batches."""
    model = model.to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        images, labels = batch(step % 5)
        optimizer.zero_grad()
        loss = model(pixel_values=images.to(dtype), labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


def gradients(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every parameter for one batch."""
    model = model.to(dtype).train()
    images, labels = batch(0)
    found = model(pixel_values=images.to(dtype), labels=labels)
    found.loss.backward()
    return {"logits": found.logits.detach()} | {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }

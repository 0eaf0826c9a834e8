"""Train a model that nobody changed: `enable()` puts convplan behind torch's own convolutions and their gradients."""

import torch
from torch import nn

import convplan


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def stripes(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy stripes in four directions, and which it is."""
    generator = torch.Generator().manual_seed(step % 8)
    labels = torch.randint(0, 4, (16,), generator=generator)
    angle = labels.view(-1, 1, 1, 1) * torch.pi / 4
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    waves = torch.sin(rows * torch.cos(angle) + columns * torch.sin(angle))
    return waves + 0.5 * torch.randn(16, 1, 24, 24, generator=generator), labels


def train(network: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), []
    for step in range(40):
        images, labels = stripes(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


stock = train(model())
with convplan.enabled(convplan.Policy(budget_s=0.02)):
    planned = train(model())
for step in (0, 10, 20, 39):
    print(f"step {step:2}: loss {planned[step]:.6f}, with stock torch {stock[step]:.6f}")
print("counters:", convplan.stats())

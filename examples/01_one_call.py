"""One call: `convplan.conv2d` takes torch's arguments, plans the first time, and runs the plan from then on."""

import torch
import torch.nn.functional as F

import convplan

torch.manual_seed(0)
x, w, bias = torch.randn(4, 32, 56, 56), torch.randn(64, 32, 3, 3), torch.randn(64)

# Tuned at first sight, racing the candidates for a tenth of a second. By default a problem is tuned when seen twice.
policy = convplan.Policy(tune_after=1, budget_s=0.1)
y = convplan.conv2d(x, w, bias, padding=1, policy=policy)
print("largest difference from torch:", float((y - F.conv2d(x, w, bias, padding=1)).abs().max()))

for _ in range(9):
    convplan.conv2d(x, w, bias, padding=1, policy=policy)
print("counters after ten calls:     ", {name: count for name, count in convplan.stats().items() if count})

# Beyond torch: padding that differs before and after, without a padded copy where the engine can.
causal = convplan.conv1d(torch.randn(1, 8, 400), torch.randn(8, 8, 5), padding=((4, 0),), policy=policy)
print("a causal convolution keeps the length:", tuple(causal.shape))

# What makes no sense says what was found and what was expected.
try:
    convplan.conv2d(x, torch.randn(64, 16, 3, 3), groups=4)
except convplan.SpecError as error:
    print("SpecError:", error)

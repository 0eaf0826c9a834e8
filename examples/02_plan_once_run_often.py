"""Plan once, look at what was found, run it often: the steps that `convplan.conv2d` takes for you."""

import torch

import convplan

torch.manual_seed(0)
signal, response = torch.randn(1, 1, 24_000), torch.randn(1, 1, 4_001)  # half a second of sound, and a room

# 1. What is to be computed: sizes, layouts and dtype, no tensors.
problem = convplan.problem("fprop", signal, response, padding=2_000)
print("problem:", problem)

# 2. Every engine proposes, every candidate is checked against a float64 reference, the right ones race.
record = convplan.plan(problem, convplan.Policy(budget_s=0.1))
print(record.explain())

# 3. The choice, ready to run, into a tensor of our own.
plan = record.build()
out = torch.empty(1, 1, 24_000)
for _ in range(5):
    plan.run(signal, response, out=out)
print("ran:", plan.config, "with", plan.workspace_bytes, "bytes of workspace")

# The candidates ranked behind it run as well, and agree.
for rank in range(1, len(record.ranking)):
    other = record.build(rank)
    error = float((other.run(signal, response) - out).abs().max())
    print(f"rank {rank + 1}: {other.config} differs by at most {error:.2g}")

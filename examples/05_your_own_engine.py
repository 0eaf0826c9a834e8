"""Your own engine: a class with three methods. It is checked, raced and remembered as those that come with convplan."""

import torch
import torch.nn.functional as F

import convplan
from convplan import Built, Candidate, EngineConfig, Policy, Problem, Support


class Shifts:
    """Depthwise convolution as a sum of shifted copies of the input, one for each filter tap."""

    name = "shifts"
    by_default = True

    def supports(self, problem: Problem) -> Support:
        channels = problem.x.dims[1]
        if problem.op != "fprop" or not problem.groups == channels == problem.w.dims[0]:
            return Support(False, "only the forward of a depthwise convolution")
        if set(problem.stride) != {1} or problem.spatial_rank != 1:
            return Support(False, "only stride 1 and one dimension")
        return Support(True)

    def configs(self, problem: Problem, effort: str) -> list[Candidate]:
        scratch = 2 * problem.y.nbytes + problem.x.nbytes
        return [Candidate(EngineConfig.of("shifts"), workspace_bytes=scratch, flops=float(problem.flops))]

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        (before, after), (dilation,), length = problem.padding[0], problem.dilation, problem.y.dims[2]

        def run(x, w, bias, out):
            padded = F.pad(x, (before, after))
            y = torch.empty(problem.y.dims, dtype=x.dtype) if out is None else out
            y.zero_() if bias is None else y.copy_(bias.view(-1, 1).expand(y.shape))
            for tap in range(w.shape[2]):
                y.addcmul_(padded[:, :, tap * dilation : tap * dilation + length], w[:, 0, tap, None])
            return y

        return Built(run, workspace_bytes=problem.x.nbytes)


convplan.register_engine(Shifts())
x, w = torch.randn(2, 64, 4_000), torch.randn(64, 1, 4)
record = convplan.plan(convplan.problem("fprop", x, w, padding=((3, 0),), groups=64), Policy(budget_s=0.1))
print(record.explain())
mine = convplan.conv1d(x, w, padding=((3, 0),), groups=64, policy=Policy(engines=("shifts",), effort="instant"))
print("largest difference from torch:", float((mine - F.conv1d(F.pad(x, (3, 0)), w, groups=64)).abs().max()))

"""Convolutions that run whatever happens, and their gradients of every order; without a look at a user's arguments.

`Caller` runs one problem by its plan, or by stock torch where there is none. fprop, dgrad and wgrad are each linear in
both inputs, and the gradient of each is made of the other two (`Linear`). `functional` and `fused` stand on both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch

from convplan._choices import Layer, state
from convplan._counts import counts
from convplan._epilogue import Epilogue
from convplan._errors import ConvPlanError
from convplan._policy import Policy, torch_flags
from convplan._problem import Op, Problem
from convplan._runtime import Runner, check_policy, local
from convplan.engines._support import deliver, empty
from convplan.engines.aten import AtenEngine
from convplan.engines.base import EngineConfig, Run
from convplan.kernels import activation_backward
from convplan.torch_ops.adapter import ALIGNMENT_BYTES, ConvArgs, check_same_place, output_spec, spec_of
from convplan.torch_ops.override import NO_GRADIENTS, note_fallback
from convplan.torch_ops.seen import live_flags

Tensor = torch.Tensor


def planned_runner(
    problem: Problem,
    policy: Policy | None,
    device: int,
    second: Tensor,
    gradients: tuple[bool, bool] = NO_GRADIENTS,
) -> Runner | None:
    """What runs a problem by its plan, at the sight of its second input; None where nothing is to be computed.

    A miss in replay mode is raised; any other failure to plan leaves it to stock torch, and gives None too.
    """
    counts.add("misses")
    wanted = check_policy(state.policy if policy is None else policy)
    if problem.is_empty:
        return None
    for observe in state.captures:
        observe(problem, gradients)
    try:
        return Runner(problem, wanted, device, layer_of(problem.op, second))
    except ConvPlanError as exc:
        note_fallback(exc, wanted)
        return None


class Caller:
    """Runs one problem whatever happens: by its plan, or by stock torch where there is none, or as nothing at all."""

    def __init__(self, problem: Problem, runner: Runner | None) -> None:
        self._problem = problem
        self._runner = runner
        self._bare: Run | None = None  # the plan itself, once the runner has nothing more to say

    @classmethod
    def of(
        cls,
        problem: Problem,
        policy: Policy | None,
        device: int,
        second: Tensor,
        gradients: tuple[bool, bool] = NO_GRADIENTS,
    ) -> Caller:
        """Plan the problem, at the sight of its second input. Raises as `planned_runner`."""
        return cls(problem, planned_runner(problem, policy, device, second, gradients))

    def __call__(self, first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        """The result; in `out`, where that is given."""
        runner = self._runner
        if runner is not None:
            try:
                if self._bare is not None:
                    try:
                        return self._bare(first, second, bias, out)
                    except Exception as exc:  # whatever an engine raises: the runner knows the plans behind it
                        self._bare = None
                        return runner.recover(exc, first, second, bias, out)
                if not runner.settled:
                    runner.layer = layer_of(self._problem.op, second)
                result = runner(first, second, bias, out)
                self._bare = runner.unwatched
                return result
            except ConvPlanError as exc:
                note_fallback(exc)
        return self._without_plan(first, second, bias, out)

    def _without_plan(self, first: Tensor, second: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        problem = self._problem
        if not problem.is_empty:
            return last_resort(problem)(first, second, bias, out)
        result = empty(problem.output, first.device).zero_()
        if bias is not None:
            result += bias.view(-1, *[1] * problem.spatial_rank)
        return deliver(result, problem.output, out)


def layer_of(op: Op, second: Tensor) -> Layer | None:
    """Whose call this is, by its weight; there is none among the inputs of a weight's gradient."""
    return None if op == "wgrad" else weakref.ref(second)


def last_resort(problem: Problem) -> Run:
    """Stock torch's kernel for a problem, as a function like a built candidate's."""
    policy = Policy(deterministic=torch.are_deterministic_algorithms_enabled(), allow_tf32=torch_flags().allow_tf32)
    return AtenEngine().build(problem, EngineConfig("aten"), policy).run


class Geometry:
    """What fprop, dgrad and wgrad of one convolution share, besides tensors: the arguments and all three shapes."""

    def __init__(self, problem: Problem, args: ConvArgs, policy: Policy | None) -> None:
        self.dims = {"fprop": problem.y.dims, "dgrad": problem.x.dims, "wgrad": problem.w.dims}
        self.padding, self.args, self.policy = problem.padding, args, policy
        self._op = problem.op
        # Where the forward's kernels know only contiguous results on a GPU, those of its gradients do as well.
        suggested = "channels_last" in (problem.inputs[0].layout, problem.inputs[1].layout)
        self._cudnn = problem.dtype != "float64" and (not suggested or problem.output.layout != "contiguous")

    def run(
        self,
        op: Op,
        first: Tensor,
        second: Tensor,
        bias: Tensor | None = None,
        gradients: tuple[bool, bool] = NO_GRADIENTS,
    ) -> Tensor:
        """One of the three on (x, w), (dy, w) or (x, dy), planned under the geometry's policy."""
        return self.caller(op, first, second, bias, gradients)[0](first, second, bias, None)

    def caller(
        self, op: Op, first: Tensor, second: Tensor, bias: Tensor | None, gradients: tuple[bool, bool]
    ) -> tuple[Callable[..., Tensor], bool]:
        """What runs it, and whether it is kept for the next call."""
        token = state.token
        key = (
            token, op, self.dims[op], self.args, self.policy, self._cudnn, first.shape, first.stride(), first.dtype,
            second.shape, second.stride(), bias is None, first.get_device(), ALIGNMENT_BYTES[first.data_ptr() & 31],
            ALIGNMENT_BYTES[second.data_ptr() & 31], live_flags(first.get_device()),
        )  # fmt: skip
        caller = local.callers.used(key)
        if caller is not None:
            return caller, True
        device = first.get_device()
        caller = Caller.of(self.problem(op, first, second, bias), self.policy, device, second, gradients)
        local.remember(key, token, caller, device)
        return caller, False

    def problem(self, op: Op, first: Tensor, second: Tensor, bias: Tensor | None = None) -> Problem:
        """What `run` plans."""
        check_same_place(first, second, bias)
        given = {"fprop": ("x", "w"), "dgrad": ("y", "w"), "wgrad": ("x", "y")}[op]
        written = {"fprop": "y", "dgrad": "x", "wgrad": "w"}[op]
        specs = {
            given[0]: spec_of(first),
            given[1]: spec_of(second),
            written: output_spec(
                self.dims[op], first, second, self.args, cudnn=None if op == self._op else self._cudnn
            ),
        }
        return Problem(
            op=op,
            x=specs["x"],
            w=specs["w"],
            y=specs["y"],
            padding=self.padding,
            stride=self.args.stride,
            dilation=self.args.dilation,
            groups=self.args.groups,
            epilogue=Epilogue(bias=bias is not None),
            device=first.device.type,
        )


class Linear(torch.autograd.Function):
    """One of the three operations, with gradients made of the other two, to any order."""

    @staticmethod
    def forward(ctx: Any, op: Op, first: Tensor, second: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The operation `op` of its two inputs, in the order of `Plan.run`."""
        ctx.save_for_backward(first, second)
        ctx.op, ctx.geometry, ctx.has_bias = op, geometry, bias is not None
        # Only the user's own call is a forward whose gradients may follow; wgrad never is.
        gradients = NO_GRADIENTS if op == "wgrad" else (first.requires_grad, second.requires_grad)
        return geometry.run(op, first, second, bias, gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None, None]:
        """The other two operations."""
        grad = grads[0]
        first, second = ctx.saved_tensors
        need_first, need_second, need_bias = ctx.needs_input_grad[1:4]
        to_first, to_second = gradients(ctx.op, first, second, grad, ctx.geometry, (need_first, need_second))
        return None, to_first, to_second, bias_gradient(grad) if ctx.has_bias and need_bias else None, None


def gradients(
    op: Op, first: Tensor, second: Tensor, grad: Tensor, geometry: Geometry, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one operation's two inputs, those that are needed, where `grad` comes in for its result."""

    def linear(op: Op, left: Tensor, right: Tensor) -> Tensor:
        result: Tensor = Linear.apply(op, left, right, None, geometry)  # type: ignore[no-untyped-call]
        return result

    to_first: Tensor | None = None
    to_second: Tensor | None = None
    if op == "fprop":  # first is x, second is w, grad is dy
        to_first = linear("dgrad", grad, second) if needed[0] else None
        to_second = linear("wgrad", first, grad) if needed[1] else None
    elif op == "dgrad":  # first is y, second is w, grad stands where x does
        to_first = linear("fprop", grad, second) if needed[0] else None
        to_second = linear("wgrad", grad, first) if needed[1] else None
    else:  # first is x, second is y, grad stands where w does
        to_first = linear("dgrad", second, grad) if needed[0] else None
        to_second = linear("fprop", first, grad) if needed[1] else None
    return to_first, to_second


def bias_gradient(grad: Tensor) -> Tensor:
    """The gradient of a bias: what comes in, summed for each output channel."""
    if has_kernels(grad):
        return cast(Tensor, activation_backward(grad, None, "none", from_output=True, bias=True)[1]).to(grad.dtype)
    return grad.sum([0, *range(2, grad.dim())])


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_kernels(grad: Tensor) -> bool:
    """Whether a gradient that no other one will be asked of is what `convplan.kernels` computes in one pass."""
    return (
        grad.is_cuda
        and not torch.is_grad_enabled()
        and grad.dtype != torch.float64
        and grad.dim() in _LAYOUTS
        and grad.is_contiguous(memory_format=_LAYOUTS[grad.dim()])
    )

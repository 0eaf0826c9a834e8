"""Everything that autograd and `torch.func` do with a convolution, for calls of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.func import grad as gradient_of
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from helpers.compat import BF16, F16, F32, F64, Call, Case, Place, Tensor, call

Use = Callable[[Place, Call], Any]

KINDS = (
    "1d",
    "1d-stride-dilation-groups",
    "2d",
    "2d-depthwise",
    "2d-each-its-own",
    "2d-no-batch",
    "2d-same-even",
    "3d",
    "t1d",
    "t2d-stride-output-padding",
    "t2d-groups-dilation",
    "t3d",
)
FEW = ("1d", "2d", "2d-each-its-own", "t2d-stride-output-padding")
SMALL = (
    Call("small-1d", (1, 2, 4), (2, 2, 3), {"padding": 1}),
    Call("small-2d", (1, 2, 3, 3), (2, 1, 2, 2), {"groups": 2, "stride": 2}),
    Call("small-t2d", (1, 2, 2, 2), (2, 1, 2, 2), {"stride": 2}, transposed=True),
)


def convolve(one: Call, *tensors: Any) -> Tensor:
    """The call; without a bias where none is given."""
    x, w, bias = (*tensors, None)[:3]
    return one.run(F, x, w, bias)


def weights(y: Tensor, seed: int = 0) -> Tensor:
    """An incoming gradient whose numbers all differ."""
    numbers = torch.arange(y.numel(), dtype=torch.float64, device=y.device).reshape(y.shape)
    return ((numbers + seed) % 7 - 3).to(y.dtype)


def loss_of(one: Call, *tensors: Any) -> Tensor:
    """One number that depends on every output, with a curvature."""
    y = convolve(one, *tensors)
    return (y * weights(y)).sum() + 0.5 * y.square().mean()


# --- plain gradients


def forward(on: Place, one: Call) -> Any:
    return convolve(one, *on.tensors(one))


def backward(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    return y, torch.autograd.grad(y, leaves, weights(y))


def of_some(which: int, on: Place, one: Call) -> Any:
    """`which` has a bit for each tensor that wants a gradient."""
    leaves = [t.requires_grad_(bool(which >> i & 1)) for i, t in enumerate(on.tensors(one, grad=False))]
    y = convolve(one, *leaves)
    if y.requires_grad:
        y.backward(weights(y))
    return y, [t.grad for t in leaves]


def expanded_gradient(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    return torch.autograd.grad(convolve(one, *leaves).sum(), leaves)


def strided_gradient(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    wide = torch.stack([weights(y), weights(y, 3)], -1)
    return torch.autograd.grad(y, leaves, wide[..., 0])


def accumulated(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    for turn in range(3):
        y = convolve(one, *leaves)
        y.backward(weights(y, turn))
    return [t.grad for t in leaves]


def twice_through_one_graph(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    first = torch.autograd.grad(y, leaves, weights(y), retain_graph=True)
    return first, torch.autograd.grad(y, leaves, weights(y, 2))


def freed_graph(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    torch.autograd.grad(y, leaves, weights(y))
    torch.autograd.grad(y, leaves, weights(y))


def double_backward(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    first = torch.autograd.grad((y.square() * weights(y)).sum(), leaves, create_graph=True)
    penalty = sum(t.square().mean() for t in first)
    return first, torch.autograd.grad(penalty, leaves)


def third_order(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    found: Any = loss_of(one, *leaves) ** 2 / 1000
    for _ in range(2):
        (found,) = torch.autograd.grad(found, leaves[0], create_graph=True)
        found = found.square().mean()
    return torch.autograd.grad(found, leaves[:2])


def batched_gradients(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    incoming = torch.stack([weights(y, seed) for seed in range(3)])
    return torch.autograd.grad(y, leaves, incoming, is_grads_batched=True)


def unused_and_undefined(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    return torch.autograd.grad(y.detach().sum() + leaves[0].sum(), leaves, allow_unused=True, materialize_grads=True)


def what_the_node_keeps(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    node: Any = convolve(one, *leaves).grad_fn
    names: list[str] = []
    while node is not None and not node.name().startswith("Convolution"):
        names.append(node.name())
        node = node.next_functions[0][0]
    saved = [getattr(node, f"_saved_{name}") for name in ("stride", "padding", "dilation", "transposed", "groups")]
    nexts = [following[0].name() if following[0] else None for following in node.next_functions]
    return names, saved, nexts, node._saved_input.shape, node._saved_weight.stride()


def one_tensor_for_both(on: Place, one: Call) -> Any:
    both = on.randn(4, 4, *[5] * (len(one.w) - 2)).requires_grad_()
    run = getattr(F, one.function)
    y = run(both, both, padding=2)
    return y, torch.autograd.grad(y, both, weights(y))


# --- forward mode


def forward_mode(on: Place, one: Call) -> Any:
    tensors = on.tensors(one, grad=False)
    found = []
    for chosen in ([0], [1], list(range(len(tensors)))):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, weights(t, i).div(2)) if i in chosen else t for i, t in enumerate(tensors)]
            found.append(tuple(forward_ad.unpack_dual(convolve(one, *duals))))
    return found


def forward_over_reverse(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, weights(t)) for t in leaves]
        grads = torch.autograd.grad(loss_of(one, *duals), leaves[:2], create_graph=True)
        return [tuple(forward_ad.unpack_dual(t)) for t in grads]


def reverse_over_forward(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaves[0], weights(leaves[0]))
        tangent = forward_ad.unpack_dual(convolve(one, dual, *leaves[1:])).tangent
        return torch.autograd.grad(tangent.square().sum(), leaves[1])


# --- torch.func


def func_grad(on: Place, one: Call) -> Any:
    tensors = on.tensors(one, grad=False)
    return gradient_of(partial(loss_of, one), argnums=tuple(range(len(tensors))))(*tensors)


def func_vjp(on: Place, one: Call) -> Any:
    y, pull = vjp(partial(convolve, one), *on.tensors(one, grad=False))
    return y, pull(weights(y))


def func_jvp(on: Place, one: Call) -> Any:
    tensors = tuple(on.tensors(one, grad=False))
    return jvp(partial(convolve, one), tensors, tuple(weights(t) for t in tensors))


def func_linearize(on: Place, one: Call) -> Any:
    tensors = on.tensors(one, grad=False)
    y, push = linearize(partial(convolve, one), *tensors)
    return y, push(*[weights(t) for t in tensors])


def func_grad_of_grad(on: Place, one: Call) -> Any:
    tensors = on.tensors(one, grad=False)
    inner = gradient_of(partial(loss_of, one))
    return gradient_of(lambda x, *rest: inner(x, *rest).square().mean(), argnums=1)(*tensors)


def func_functionalize(on: Place, one: Call) -> Any:
    def run(*tensors: Tensor) -> Tensor:
        y = convolve(one, *tensors)
        y.mul_(2)
        return y.relu_()

    return functionalize(run)(*on.tensors(one, grad=False))


def over(which: int, on: Place, one: Call) -> Any:
    """`vmap` over the tensors whose bits are set in `which`."""
    tensors = on.tensors(one, grad=False)
    dims = tuple(0 if which >> i & 1 else None for i in range(len(tensors)))
    given = [torch.stack([t, t + 1, 2 * t]) if dim == 0 else t for t, dim in zip(tensors, dims, strict=True)]
    return vmap(partial(convolve, one), dims)(*given)


def over_the_last(on: Place, one: Call) -> Any:
    x, *rest = on.tensors(one, grad=False)
    return vmap(partial(convolve, one), (-1, *[None] * len(rest)), out_dims=1)(torch.stack([x, 2 * x], -1), *rest)


def over_two(on: Place, one: Call) -> Any:
    x, w, *rest = on.tensors(one, grad=False)
    inner = vmap(lambda given, weight: convolve(one, given, weight, *rest), (0, None))
    return vmap(inner, (None, 0))(torch.stack([x, 2 * x]), torch.stack([w, w + 1, -w]))


def over_in_chunks(on: Place, one: Call) -> Any:
    x, *rest = on.tensors(one, grad=False)
    samples = torch.stack([x * k for k in range(5)])
    return vmap(lambda given: convolve(one, given, *rest), chunk_size=2)(samples)


def over_nothing(on: Place, one: Call) -> Any:
    x, *rest = on.tensors(one, grad=False)
    return vmap(lambda given: convolve(one, given, *rest))(x[None][:0])


def per_sample_gradients(on: Place, one: Call) -> Any:
    x, w, *rest = on.tensors(one, grad=False)
    gradient = gradient_of(lambda weight, given: loss_of(one, given, weight, *rest))
    return vmap(gradient, (None, 0))(w, torch.stack([x, x + 1]))


def gradients_through_vmap(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = vmap(partial(convolve, one), (0, *[None] * (len(leaves) - 1)))(
        torch.stack([leaves[0], leaves[0] * 2]), *leaves[1:]
    )
    return y, torch.autograd.grad(y, leaves, weights(y))


def vmapped_ensemble(on: Place, one: Call) -> Any:
    x, w, *rest = on.tensors(one, grad=False)
    both = torch.stack([w, w + 0.5])
    gradient = gradient_of(lambda weight: loss_of(one, x, weight, *rest))
    return vmap(gradient)(both)


def func_jacobians(on: Place, one: Call) -> Any:
    x, w, *_ = on.tensors(one, grad=False)
    run = partial(convolve, one)
    return [make(run, argnums=(0, 1))(x, w) for make in (jacrev, jacfwd)]


def func_hessian(on: Place, one: Call) -> Any:
    x, w, *_ = on.tensors(one, grad=False)
    return hessian(lambda given: convolve(one, x, given).square().sum())(w)


def functional_derivatives(on: Place, one: Call) -> Any:
    x, w, *_ = on.tensors(one, grad=False)

    def energy(given: Tensor) -> Tensor:
        return convolve(one, x, given).square().sum()

    of = torch.autograd.functional
    return (
        of.jacobian(lambda given: convolve(one, given, w), x, vectorize=True),
        of.jacobian(lambda given: convolve(one, given, w), x, vectorize=True, strategy="forward-mode"),
        of.hessian(energy, w),
        of.hvp(energy, w, torch.ones_like(w)),
        of.vhp(energy, w, torch.ones_like(w)),
    )


# --- checks by finite differences, which torch itself makes


def finite_differences(on: Place, one: Call) -> Any:
    return torch.autograd.gradcheck(
        partial(convolve, one), on.tensors(one), fast_mode=True, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True, check_undefined_grad=True, nondet_tol=1e-9,
    )  # fmt: skip


def finite_differences_of_gradients(on: Place, one: Call) -> Any:
    return torch.autograd.gradgradcheck(
        partial(convolve, one), on.tensors(one), fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True,
        nondet_tol=1e-9,
    )  # fmt: skip


# --- recomputing, hooks, anomalies


def checkpointed(reentrant: bool, on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = checkpoint(lambda *given: convolve(one, *given).relu(), *leaves, use_reentrant=reentrant)
    y.backward(weights(y))
    return y, [t.grad for t in leaves]


def selectively_checkpointed(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    y = checkpoint(lambda *given: convolve(one, *given).relu().sin(), *leaves, use_reentrant=False, context_fn=contexts)
    return y, torch.autograd.grad(y, leaves, weights(y))


def with_anomaly_detection(on: Place, one: Call) -> Any:
    with torch.autograd.detect_anomaly():
        return backward(on, one)


def anomaly(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    with torch.autograd.detect_anomaly():
        y = convolve(one, *leaves)
        y.backward(torch.full_like(y, float("nan")))


def hooks_on_tensors(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    seen: list[Any] = []
    for t in leaves:
        t.register_hook(lambda g: 2 * g)
        t.register_post_accumulate_grad_hook(lambda p: seen.append((p.grad.shape, p.grad.stride())))
    y.register_hook(lambda g: seen.append(g.shape))
    y.grad_fn.register_prehook(lambda grads: seen.append(len(grads)))  # type: ignore[union-attr]
    y.grad_fn.register_hook(lambda grads, _: seen.append([None if g is None else g.stride() for g in grads]))  # type: ignore[union-attr]
    handle = torch.autograd.graph.register_multi_grad_hook(leaves, lambda grads: seen.append(len(grads)))
    y.backward(weights(y))
    handle.remove()
    return [t.grad for t in leaves], seen


def hooks_on_saved_tensors(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    seen: list[Any] = []

    def pack(t: Tensor) -> Tensor:
        seen.append((tuple(t.shape), t.stride()))
        return t.clone()

    def unpack(t: Tensor) -> Tensor:
        seen.append("unpacked")
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = convolve(one, *leaves)
    return torch.autograd.grad(y, leaves, weights(y)), seen


def saved_on_cpu(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    with torch.autograd.graph.save_on_cpu():
        y = convolve(one, *leaves)
    return torch.autograd.grad(y, leaves, weights(y))


def _module(on: Place, one: Call) -> nn.Module:
    kind: Any = getattr(nn, f"Conv{'Transpose' if one.transposed else ''}{len(one.w) - 2}d")
    _, w, *bias = on.tensors(one, grad=False)
    groups = int(one.arguments.get("groups", 1))
    channels = (one.w[0], one.w[1] * groups) if one.transposed else (one.w[1] * groups, one.w[0])
    module = kind(*channels, one.w[2:], bias=bool(bias), device=on.device, dtype=on.dtype, **one.arguments)
    module.weight.data = w.clone()
    if bias:
        module.bias.data = bias[0].clone()
    return module


def module_training_step(on: Place, one: Call) -> Any:
    module, x = _module(on, one), on.tensors(one)[0]
    seen: list[Any] = []
    module.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    module.register_full_backward_pre_hook(lambda m, g: seen.append(len(g)))
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi[0].shape, go[0].shape)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.001, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    return [*module.parameters(), *[p.grad for p in module.parameters()], x.grad], seen


def functional_module(on: Place, one: Call) -> Any:
    module, x = _module(on, one), on.tensors(one, grad=False)[0]
    parameters = {name: p.detach() * 2 for name, p in module.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return functional_call(module, given, (x,)).square().mean()

    return functional_call(module, parameters, (x,)), gradient_of(loss)(parameters)


# --- in-place changes and modes


def changed_after(which: int, on: Place, one: Call) -> Any:
    """A tensor that backward needs is changed in place after the forward."""
    leaves = [t.clone() for t in on.tensors(one)]
    y = convolve(one, *leaves)
    with torch.no_grad():
        leaves[which].add_(1)
    y.sum().backward()


def result_changed(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    y = convolve(one, *leaves)
    dy = weights(y)
    y.mul_(2).add_(1)
    return y, torch.autograd.grad(y, leaves, dy)


def written_into_a_leaf(on: Place, one: Call) -> Any:
    x, *rest = on.tensors(one)
    x.copy_(convolve(one, x, *rest))


def without_gradients(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    with torch.no_grad():
        first = convolve(one, *leaves)
        with torch.enable_grad():
            second = convolve(one, *leaves)
    with torch.set_grad_enabled(False):
        return first, second, convolve(one, *leaves)


def in_inference_mode(on: Place, one: Call) -> Any:
    leaves = on.tensors(one)
    with torch.inference_mode():
        y = convolve(one, *leaves)
        made_inside = convolve(one, *[t.clone() for t in leaves])
        with torch.inference_mode(False):
            normal = convolve(one, *leaves)
    return y, made_inside, normal


def inference_tensor_in_training(on: Place, one: Call) -> Any:
    x, w, *rest = on.tensors(one)
    with torch.inference_mode():
        frozen = x.clone()
    return convolve(one, frozen, w, *rest)


def frozen_weight(on: Place, one: Call) -> Any:
    x, *rest = on.tensors(one)
    y = convolve(one, x, *[t.detach() for t in rest])
    return y, torch.autograd.grad(y, x, weights(y))


def inside_a_function(on: Place, one: Call) -> Any:
    class Convolve(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return convolve(one, x, w)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            with torch.enable_grad():
                y = convolve(one, x, w)
            return torch.autograd.grad(y, (x, w), dy)

    x, w, *_ = on.tensors(one)
    y = Convolve.apply(x, w)
    return y, torch.autograd.grad(y, (x, w), weights(y))


EVERYWHERE: dict[str, tuple[Use, tuple[torch.dtype, ...]]] = {
    "forward": (forward, (F32, F64, BF16, F16)),
    "backward": (backward, (F32, F64, BF16)),
    "expanded-gradient": (expanded_gradient, (F32,)),
    "strided-gradient": (strided_gradient, (F32,)),
    "double-backward": (double_backward, (F32,)),
    "forward-mode": (forward_mode, (F32,)),
    "func-grad": (func_grad, (F32,)),
    "func-jvp": (func_jvp, (F32,)),
    "vmap-over-all": (partial(over, 7), (F32,)),
    "per-sample-gradients": (per_sample_gradients, (F32,)),
    "no-grad": (without_gradients, (F32,)),
    "inference-mode": (in_inference_mode, (F32, BF16)),
    "node": (what_the_node_keeps, (F32,)),
}

SOMEWHERE: dict[str, Use] = {
    **{f"gradients-of-{which:03b}": partial(of_some, which) for which in range(1, 8)},
    "accumulated": accumulated,
    "twice-through-one-graph": twice_through_one_graph,
    "freed-graph": freed_graph,
    "third-order": third_order,
    "batched-gradients": batched_gradients,
    "unused": unused_and_undefined,
    "forward-over-reverse": forward_over_reverse,
    "reverse-over-forward": reverse_over_forward,
    "func-vjp": func_vjp,
    "func-linearize": func_linearize,
    "func-grad-of-grad": func_grad_of_grad,
    "functionalize": func_functionalize,
    **{f"vmap-over-{which:03b}": partial(over, which) for which in range(1, 7)},
    "vmap-over-the-last": over_the_last,
    "vmap-over-two": over_two,
    "vmap-in-chunks": over_in_chunks,
    "vmap-over-nothing": over_nothing,
    "gradients-through-vmap": gradients_through_vmap,
    "vmapped-ensemble": vmapped_ensemble,
    "checkpoint": partial(checkpointed, False),
    "checkpoint-reentrant": partial(checkpointed, True),
    "checkpoint-selective": selectively_checkpointed,
    "anomaly-detection": with_anomaly_detection,
    "anomaly": anomaly,
    "hooks": hooks_on_tensors,
    "hooks-on-saved": hooks_on_saved_tensors,
    "saved-on-cpu": saved_on_cpu,
    "module-training-step": module_training_step,
    "functional-module": functional_module,
    "input-changed": partial(changed_after, 0),
    "weight-changed": partial(changed_after, 1),
    "bias-changed": partial(changed_after, 2),
    "result-changed": result_changed,
    "written-into-a-leaf": written_into_a_leaf,
    "inference-tensor-in-training": inference_tensor_in_training,
    "frozen-weight": frozen_weight,
    "inside-a-function": inside_a_function,
}

# Nothing to compute, or an error before anything is computed.
LEFT = ("vmap-over-nothing", "inference-tensor-in-training")

ON_SMALL: dict[str, Use] = {
    "func-jacobians": func_jacobians,
    "func-hessian": func_hessian,
    "functional-derivatives": functional_derivatives,
}

IN_FLOAT64: dict[str, Use] = {
    "gradcheck": finite_differences,
    "gradgradcheck": finite_differences_of_gradients,
}


# --- `convolution_backward` itself, and the functions of torch that are made of it


def raw_backward(one: Call, mask: tuple[bool, ...], with_bias: bool, on: Place) -> Any:
    x, w, *_ = on.tensors(one, grad=False)
    y = convolve(one, x, w)
    spatial = w.dim() - 2
    arguments = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0} | one.arguments
    each = {k: [v] * spatial if isinstance(v, int) else list(v) for k, v in arguments.items() if k != "groups"}
    found = torch.ops.aten.convolution_backward(
        weights(y), x, w, [y.shape[1]] if with_bias else None, each["stride"], each["padding"], each["dilation"],
        one.transposed, each["output_padding"], arguments["groups"], list(mask),
    )  # fmt: skip
    # What stands where nothing was asked for, torch leaves to its kernels.
    return [gradient for gradient, asked in zip(found, mask, strict=True) if asked]


def torch_nn_grad(spatial: int, on: Place) -> Any:
    x, w = on.randn(2, 4, *[7] * spatial), on.randn(6, 2, *[3] * spatial)
    arguments: dict[str, Any] = {"stride": 2, "padding": 1, "groups": 2}
    dy = weights(getattr(F, f"conv{spatial}d")(x, w, **arguments))
    of_input = getattr(torch.nn.grad, f"conv{spatial}d_input")(x.shape, w, dy, **arguments)
    return of_input, getattr(torch.nn.grad, f"conv{spatial}d_weight")(x, w.shape, dy, **arguments)


RAW = [
    Case(
        f"convolution_backward-{name}-{''.join('01'[m] for m in mask)}{'-sizes' if with_bias else ''}",
        partial(raw_backward, call(name), mask, with_bias),
    )
    for name in ("1d", "2d", "2d-each-its-own", "3d", "t2d-stride-output-padding", "t2d-groups-dilation")
    for mask in itertools.product((False, True), repeat=3)
    for with_bias in {mask[2], True}
]


def _with(run: Use, one: Call, on: Place) -> Any:
    return run(on, one)


CASES = [
    *(
        Case(f"{use}-{name}", partial(_with, run, call(name)), dtypes, every_policy=True)
        for use, (run, dtypes) in EVERYWHERE.items()
        for name in KINDS
    ),
    *(
        Case(f"{use}-{name}", partial(_with, run, call(name)), planned=None if use in LEFT else True)
        for use, run in SOMEWHERE.items()
        for name in FEW
    ),
    *(Case(f"{use}-{one.id}", partial(_with, run, one)) for use, run in ON_SMALL.items() for one in SMALL),
    *(
        Case(f"{use}-{name}", partial(_with, run, call(name)), (F64,))
        for use, run in IN_FLOAT64.items()
        for name in ("1d-same-even", "2d", "2d-depthwise", "t2d-groups-dilation", "3d")
    ),
    *(
        Case(f"one-tensor-for-both-{name}", partial(_with, one_tensor_for_both, call(name)), (F32, F64))
        for name in ("1d", "2d", "3d")
    ),
    *(Case(f"torch-nn-grad-{n}d", partial(torch_nn_grad, n), (F32, F64)) for n in (1, 2, 3)),
    *RAW,
]

"""A convolution with what follows it as one operator of torch's own kind, for whatever traces programs.

    convplan::fused_convolution (x, w, bias, residual, scale, alpha, activation, parameters, …) -> y

It ends in the same arguments as the operators of `library`, and its gradients are made of them. `activation` is a name
of `Epilogue`'s and `parameters` its numbers. It is differentiable where the activation's derivative can be had from y
and the scale needs no gradient: the others are composed in `traced`, before a compiler sees them.

As those of `library` it has an overload `kept`, which takes all but the tensors as one text (`CallWithEpilogue`) and
has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from convplan._activations import NONE, Resolved, follow, resolve, scale_channels, times
from convplan._choices import state
from convplan._errors import SpecError
from convplan._runtime import local
from convplan.torch_ops.adapter import ALIGNMENT_BYTES, NotExpressible, output_layout, output_strides
from convplan.torch_ops.fused_plan import (
    FusedCaller,
    Given,
    Run,
    aligned,
    alignment_of,
    check_following,
    dense,
    fused_problem,
)
from convplan.torch_ops.library import (
    ENDING,
    TAGS,
    Call,
    args_of,
    decoded,
    new_convolution,
    policy_of,
    result_dims,
    watched,
    without_autocast,
)
from convplan.torch_ops.linear import bias_gradient
from convplan.torch_ops.seen import live_flags
from convplan.torch_ops.undisturbed import undisturbed

Tensor = torch.Tensor

_TENSORS = "Tensor x, Tensor w, Tensor? bias, Tensor? residual, Tensor? scale"
_SCHEMAS = (
    f"fused_convolution({_TENSORS}, float alpha, str activation, float[] parameters, {ENDING}) -> Tensor",
    f"fused_convolution.kept({_TENSORS}, str call) -> Tensor",
)


class CallWithEpilogue(Call, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The arguments beside tensors, as the overload `kept` takes them: as JSON.

    Args:
        alpha, activation, parameters: as the operator takes them. All else: as of `Call`.
    """

    alpha: float = 1.0
    activation: str = "none"
    parameters: tuple[float, ...] = ()


@functools.lru_cache(maxsize=4096)
def call_with_epilogue_of(text: str) -> CallWithEpilogue:
    """The arguments in a text, which may come from a file.

    Raises:
        SpecError: it holds none.
    """
    return decoded(text, CallWithEpilogue)


def _activation(name: str, parameters: Sequence[float]) -> Resolved:
    return resolve((name, *parameters))


def _fake(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    parameters: Sequence[float],
    *geometry: Any,
) -> Tensor:
    args = args_of(geometry)
    dims = result_dims(x, w, args)
    check_following(dims, x, bias, residual, scale)
    _activation(activation, parameters)
    return x.new_empty_strided(dims, output_strides(dims, x, w, args))


def _fake_kept(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, call: str
) -> Tensor:
    given = call_with_epilogue_of(call)
    return _fake(x, w, bias, residual, scale, given.alpha, given.activation, given.parameters, *given.geometry)


def _kernel(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    alpha: float,
    activation: str,
    parameters: Sequence[float],
    *geometry: Any,
) -> Tensor:
    """The kernel of `convplan::fused_convolution`. The numbers in a scale are not looked at here."""
    stride, padding, dilation, transposed, output_padding, groups, policy = geometry
    bias, scale = dense(bias), aligned(scale)
    token, device = state.token, x.get_device()
    key = (
        "fused_convolution", token, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype,
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
        None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.get_device()),
        None if scale is None else (scale.shape, scale.dtype, scale.get_device()), alpha, activation,
        (*parameters, *stride, *padding, *dilation, transposed, *output_padding, groups), policy, device,
        w.get_device(), ALIGNMENT_BYTES[x.data_ptr() & 31], ALIGNMENT_BYTES[w.data_ptr() & 31],
        alignment_of(bias), alignment_of(residual), live_flags(device, x.dtype),
    )  # fmt: skip
    caller = local.callers.used(key)
    if caller is None:
        given = Given(x, w, bias, residual, scale)
        caller = _new(given, alpha, _activation(activation, parameters), geometry)
        local.remember(key, token, caller, device)
    result: Tensor = caller(x, w, bias, None, residual, scale)
    return result


def kept_fused_convolution(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, scale: Tensor | None, call: str
) -> Tensor:
    """The kernel of `convplan::fused_convolution.kept`: the same with a shorter key."""
    if watched():
        return _ops.fused_convolution.kept(x, w, bias, residual, scale, call)  # type: ignore[no-any-return]
    bias, scale = dense(bias), aligned(scale)
    token, device = state.token, x.get_device()
    key = (
        "fused_convolution", call, token, x.shape, x.stride(), x.dtype, w.shape, w.stride(), w.dtype,
        None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
        None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.get_device()),
        None if scale is None else (scale.shape, scale.dtype, scale.get_device()), device, w.get_device(),
        ALIGNMENT_BYTES[x.data_ptr() & 31], ALIGNMENT_BYTES[w.data_ptr() & 31], alignment_of(bias),
        alignment_of(residual), live_flags(device, x.dtype),
    )  # fmt: skip
    caller = local.callers.used(key)
    if caller is None:
        told = call_with_epilogue_of(call)
        activation = _activation(told.activation, told.parameters)
        caller = _new(Given(x, w, bias, residual, scale), told.alpha, activation, told.geometry)
        local.remember(key, token, caller, device)
    result: Tensor = caller(x, w, bias, None, residual, scale)
    return result


def _new(given: Given, alpha: float, activation: Resolved, geometry: Any) -> Run:
    args = args_of(geometry)
    x, w, bias, residual, scale = given
    try:
        problem = fused_problem(given, args, alpha, activation)
    except NotExpressible:
        check_following(result_dims(x, w, args), x, bias, residual, scale)
        convolution = new_convolution(x, w, None, (), geometry)
        return lambda x, w, bias, out, residual, scale: follow(
            convolution(x, w, None), bias, residual, scale, alpha, activation
        )
    strides = output_strides(problem.output.dims, x, w, args)
    caller = FusedCaller(problem, policy_of(geometry[-1]), w)

    def run(*tensors: Tensor | None) -> Tensor:
        result = caller(*tensors)  # type: ignore[arg-type]
        # Strides of size-1 dimensions are open to a plan, and a compiler has been told them.
        return result if result.stride() == strides else result.as_strided(result.shape, strides)

    return without_autocast(run, x.device.type)


# --- gradients


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, _, scale, alpha, name, parameters, *geometry = inputs
    activation = _activation(name, parameters)
    if ctx.needs_input_grad[4] or not activation.from_output:
        what = "the scale" if ctx.needs_input_grad[4] else f"activation {name}{tuple(parameters)}"
        raise SpecError(
            f"{what} needs more than convplan::fused_convolution returns to give a gradient; expected a call of "
            f"convplan.conv1d … conv_transpose3d, which compose it, or torch.no_grad()"
        )
    ctx.save_for_backward(x, w, scale, None if activation == NONE else output)
    ctx.activation, ctx.alpha, ctx.geometry, ctx.sizes = activation, alpha, tuple(geometry), (x.shape, w.shape)
    ctx.channels_last = output_layout(x, w, args_of(ctx.geometry)) == "channels_last"


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, w, scale, y = ctx.saved_tensors
    needs_x, needs_w, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    x_size, w_size = ctx.sizes
    grad = dy if y is None else ctx.activation.gradient(dy, y)
    scaled = grad if scale is None else scale_channels(grad, scale)
    dx = _ops.input_gradient(scaled, w, x_size, ctx.channels_last, *ctx.geometry) if needs_x else None
    dw = _ops.weight_gradient(scaled, x, w_size, ctx.channels_last, *ctx.geometry) if needs_w else None
    db = bias_gradient(grad) if needs_bias else None
    dz = times(grad, ctx.alpha) if needs_residual else None
    return (dx, dw, db, dz, *[None] * (4 + len(ctx.geometry)))


def _register() -> torch.library.Library:
    library = torch.library.Library("convplan", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema, tags=TAGS)
    for name, kernel, fake in (
        ("fused_convolution", _kernel, _fake),
        ("fused_convolution.kept", kept_fused_convolution, _fake_kept),
    ):
        for device in ("CPU", "CUDA"):
            library.impl(name, undisturbed(kernel), device)
        torch.library.register_fake(f"convplan::{name}", fake, lib=library)
    torch.library.register_autograd("convplan::fused_convolution", _backward, setup_context=_setup, lib=library)
    return library


_library = _register()  # kept: torch forgets the operator with it
_ops: Any = torch.ops.convplan

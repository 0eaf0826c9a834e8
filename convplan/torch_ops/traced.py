"""convplan's functions as a compiler sees them: one operator of `library`, and nothing that looks at memory or caches.

What is here is run by Dynamo and by `torch.export`, on tensors that have neither memory nor, at times, known sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from convplan._activations import NONE, Activation, Resolved, follow, resolve
from convplan._errors import SpecError
from convplan._policy import Policy
from convplan.torch_ops.adapter import ConvArgs
from convplan.torch_ops.library import flat_padding, policy_text

Tensor = torch.Tensor


def traced(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    args: ConvArgs,
    policy: Policy | None,
    out: Tensor | None,
) -> Tensor:
    """One of convplan's functions as a compiler sees it, which can look at neither memory nor caches.

    Raises:
        SpecError: as the function itself, while it is compiled.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        input, weight, bias = _autocast(torch.get_autocast_dtype(device), input, weight, bias)
    x = input.unsqueeze(0) if input.dim() == weight.dim() - 1 else input
    result = _convolution(x, weight, bias, args, policy)
    return _delivered(result if x is input else result.squeeze(0), out)


def traced_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    args: ConvArgs,
    alpha: float,
    activation: Activation,
    policy: Policy | None,
    out: Tensor | None,
) -> Tensor:
    """The same with what follows the convolution. What `fused` fuses, this does, as one operator.

    Raises:
        SpecError: as `traced`.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight, bias, residual = _autocast(dtype, input, weight, bias, residual)
    name, parameters, from_output = _constant_activation(activation)
    inside = behind = Resolved(name, parameters)
    x, z = input, residual
    if input.dim() == weight.dim() - 1:
        x, z = input.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    tensors = (x, weight, bias, z, scale)
    graded = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
    learned = graded and scale is not None and scale.requires_grad
    if learned or device not in ("cpu", "cuda") or _is_transformed():
        in_core = scale is None
        result = _convolution(x, weight, bias if in_core else None, args, policy)
        if z is not None and z.shape != result.shape:
            raise SpecError(f"residual.shape is {tuple(z.shape)}, expected {tuple(result.shape)}, the result's")
        result = follow(result, None if in_core else bias, z, scale, alpha, behind)
    else:
        if graded and not from_output:
            inside = NONE
        else:
            behind = NONE
        text = "" if policy is None else _constant_text(policy)
        result = torch.ops.convplan.fused_convolution(
            x, weight, bias, z, scale, alpha, inside.name, list(inside.parameters), args.stride, flat_padding(args),
            args.dilation, args.transposed, args.output_padding, args.groups, text,
        )  # fmt: skip
        result = behind.of(result)
    return _delivered(result if x is input else result.squeeze(0), out)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, args: ConvArgs, policy: Policy | None) -> Tensor:
    if x.device.type in ("cpu", "cuda") and not _is_transformed():
        text = "" if policy is None else _constant_text(policy)
        result: Tensor = torch.ops.convplan.convolution(
            x, weight, bias, args.stride, flat_padding(args), args.dilation, args.transposed, args.output_padding,
            args.groups, text,
        )  # fmt: skip
        return result
    pads = [before for before, _ in args.padding]
    return torch.convolution(
        x, weight, bias, args.stride, pads, args.dilation, args.transposed, args.output_padding, args.groups
    )


def _delivered(result: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return result
    if result.requires_grad or out.requires_grad:
        raise SpecError("out= is given and a tensor requires a gradient; expected out=None, or torch.no_grad()")
    if out.shape != result.shape or out.dtype != result.dtype:
        raise SpecError(f"out is {tuple(out.shape)} {out.dtype}, expected {tuple(result.shape)} {result.dtype}")
    return out.copy_(result)


def _autocast(dtype: torch.dtype, *tensors: Tensor | None) -> Any:
    return [
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    ]


def _is_transformed() -> bool:
    """Whether `torch.vmap` or another transform is being traced, which know torch's own convolution."""
    return torch._C._functorch.maybe_current_level() is not None


def _constant_text(policy: Policy) -> str:
    return policy_text(policy)


def _mark_constant(function: object) -> None:
    """What `torch.compiler.assume_constant_result` does, without importing Dynamo, which takes two seconds."""
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  (functions have no such attribute to type checkers)


def _constant_activation(activation: Activation) -> tuple[str, tuple[float, ...], bool]:
    resolved = resolve(activation)
    return resolved.name, resolved.parameters, resolved.from_output


_mark_constant(_is_transformed)
_mark_constant(_constant_activation)
_mark_constant(_constant_text)
# A policy is a constant to Dynamo, which compiles anew for another one.
torch.utils._pytree.register_constant(Policy)

"""What comes after a convolution, in as few passes over memory as there can be.

    follow                activation(scale * y + alpha * residual + bias), over y: one pass
    concatenate           tensors side by side, channel after channel: one pass
    max_pool              the largest number of each window, and not where it was: one pass
    column_sums           sums and sums of squares of each channel: one pass
    normalize             activation((y - mean) * invstd * weight + bias + residual): one pass, two without sums
    normalize_backward    its gradients: two passes
    activation_backward   the gradient behind an activation, and the bias's: one pass

On a CUDA device these are Triton's kernels (`sources`, `pointwise`; how they are called: `launches`, `ready`; how the
work is cut: `choices`) wherever a tensor (N, K, spatial...) is dense channels-last, which makes it a row-major matrix
of K columns; everywhere else, and for float64, torch's operations (`composed`). Both sum in a fixed order: the same
bits in every run. Nothing here records gradients or finds plans; this package knows no convolutions.

Sums and statistics are float32, those of float64 tensors float64. Activations are those of `convplan._epilogue`, with
all their parameters, and `hardtanh`: a clamp whose derivative is 0 on its bounds, as torch's modules have it.
Concurrency: from any thread, on any stream; running statistics are written without a lock.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch

from convplan.kernels import composed

__all__ = [
    "Norm", "activation_backward", "backward_needs", "column_sums", "concatenate", "empty_sums", "follow", "max_pool",
    "normalize", "normalize_backward",
]  # fmt: skip

Tensor = torch.Tensor
Parameters = tuple[float, ...]
Ints = tuple[int, ...]

log = logging.getLogger("convplan.kernels")

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_TAPS = 32  # of a window: the compiler writes out all of them
MANY = 2**20  # elements: of fewer, one operation takes torch no longer than a launch does
# Their derivative is the same seen from the output, however that was rounded.
_FROM_OUTPUT = ("relu", "leaky_relu", "hardtanh")


class Norm(NamedTuple):
    """A batch normalization's settings.

    Args:
        weight, bias: (K,), float32 or the dtype of what is normalized; None: 1 and 0.
        running_mean, running_var: (K,), written by `normalize`; None: not kept.
        momentum: the new batch's share in the running statistics.
        eps: added to the variance.
        batches: one whole number on y's device, counted up by `normalize`; None: not counted.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5
    batches: Tensor | None = None


def column_sums(y: Tensor, out: Tensor | None = None) -> Tensor:
    """Sums (row 0) and sums of squares (row 1) of each channel.

    Args:
        y: (N, K, spatial...), any layout.
        out: (2, K), contiguous, of the result's dtype, to write to.
    """
    if y.numel() == 0:
        empty = _statistics(y) if out is None else out
        return empty.zero_()
    found: Tensor = _either(y, "column_sums", y, out)
    return found


def follow(
    y: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    alpha: float = 1.0,
    activation: str = "none",
    parameters: Parameters = (),
) -> bool:
    """`activation(scale * y + alpha * residual + bias)`, written over `y`, where one kernel does it sooner than torch.

    Torch takes one pass for each operation, and adds a vector of channels at a third of the memory's rate. For a single
    operation on a small tensor torch is as good, and its call costs the host less.

    Args:
        y: (N, K, spatial...), any layout.
        bias, scale: (K,), or None.
        residual: of y's shape, sharing no memory with it, or None.
        alpha: what the residual is multiplied with.
        activation, parameters: a name and all its numbers.

    Returns:
        False where it was left to the caller, and `y` is as it was.
    """
    operations = (bias is not None) + (residual is not None) + (scale is not None) + (activation != "none")
    if not operations or (operations == 1 and y.numel() < MANY) or not y.numel():
        return False
    if not y.is_cuda or _gave_up or y.dtype not in _KERNEL_DTYPES or not _is_matrix(y):
        return False
    if not all(one is None or (one.is_cuda and one.is_contiguous()) for one in (bias, scale)):
        return False
    if residual is not None and (residual.dtype not in _KERNEL_DTYPES or residual.stride() != y.stride()):
        return False
    return bool(_tried("follow", y, bias, residual, scale, alpha, activation, parameters))


def empty_sums(y: Tensor, channels: int) -> Tensor:
    """Memory for the sums of so many channels, float32 (2, K), where `y` is."""
    if y.is_cuda and _launches is not None:
        made: Tensor = _launches.floats(y, y.get_device(), (2, channels))
        return made
    return torch.empty((2, channels), dtype=torch.float32, device=y.device)


def concatenate(tensors: Sequence[Tensor]) -> Tensor | None:
    """`torch.cat(tensors, 1)`, where kernels do it sooner than torch, whose own moves a third of what memory can.

    Args:
        tensors: (N, C_i, H, W) or (N, C_i, D, H, W), of one dtype, with equal sizes but for the channels.

    Returns:
        (N, sum of C_i, ...), channels-last as its parts are; None where it was left to the caller: small, on the CPU,
        of another layout or dtype, of channels that 8 does not divide, or of sizes that do not fit together.
    """
    first = tensors[0]
    around = (*first.shape[:1], *first.shape[2:])
    if len(tensors) < 2 or sum(one.numel() for one in tensors) < MANY or _moved_by_torch(first):
        return None
    for one in tensors:
        if one.dim() != first.dim() or (*one.shape[:1], *one.shape[2:]) != around or one.shape[1] % 8:
            return None
        if one.dtype != first.dtype or one.get_device() != first.get_device() or _moved_by_torch(one):
            return None
    made: Tensor | None = _tried("concatenate", tuple(tensors))
    return made


def max_pool(
    x: Tensor,
    kernel: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
) -> Tensor | None:
    """`max_pool2d` or `max_pool3d`, where a kernel does it sooner than torch, whose own notes where each number was.

    Args:
        x: (N, C, H, W) or (N, C, D, H, W).
        kernel, stride, padding, dilation: one number for each of the last dimensions.
        ceil_mode: as torch's.

    Returns:
        The result, channels-last as x; None where it was left to the caller: small, on the CPU, of another layout or
        dtype, of windows of more than 32 numbers, or of sizes that have no meaning.
    """
    if x.numel() < MANY or _moved_by_torch(x) or math.prod(kernel) > MOST_TAPS:
        return None
    sizes = x.shape[2:]
    if any(len(one) != len(sizes) for one in (kernel, stride, padding, dilation)):
        return None
    dims = list(zip(kernel, stride, padding, dilation, strict=True))
    if any(k < 1 or s < 1 or d < 1 or not 0 <= p <= k // 2 for k, s, p, d in dims):
        return None
    pooled = [_pooled(size, *dim, ceil_mode) for size, dim in zip(sizes, dims, strict=True)]
    shape = (*x.shape[:2], *pooled)
    if min(pooled) < 1 or max(x.numel(), math.prod(shape)) // x.shape[1] >= 2**31:
        return None
    windows = (*_three(kernel, 1), *_three(stride, 1), *_three(padding, 0), *_three(dilation, 1))
    made: Tensor | None = _tried("max_pool", x, shape, windows)
    return made


def _pooled(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows there are: none begins behind the input and its left padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + padding else count


def _three(numbers: Ints, otherwise: int) -> tuple[int, ...]:
    return (otherwise, otherwise, *numbers)[-3:]


def _moved_by_torch(x: Tensor) -> bool:
    """Whether a tensor is none that kernels move: on a GPU, of whole vectors of channels, and plainly channels-last.

    That is, where its strides say so: of one channel, or one place, they tell nothing, and torch takes it as it likes.
    """
    if not x.is_cuda or _gave_up or x.dtype not in _KERNEL_DTYPES or x.dim() not in (4, 5):
        return True
    return x.shape[1] < 2 or math.prod(x.shape[2:]) < 2 or x.stride()[1] != 1 or not _is_matrix(x)


def _tried(name: str, *arguments: Any) -> Any:
    """What a kernel made; None where there is no Triton or it failed."""
    launches = _launches or _load()
    if launches is None:
        return None
    try:
        return getattr(launches, name)(*arguments)
    except launches.Unusable as error:
        _give_up(str(error))
        return None


def normalize(
    y: Tensor,
    sums: Tensor | None,
    norm: Norm,
    residual: Tensor | None = None,
    activation: str = "none",
    parameters: Parameters = (),
) -> tuple[Tensor, Tensor]:
    """`activation((y - mean) * invstd * weight + bias + residual)`, as batch normalization does while training.

    Args:
        y: (N, K, spatial...), any layout.
        sums: what `column_sums` returns of it, float32 (2, K), contiguous; None: found here, by a pass more, and so
            that a mean far larger than the deviation costs no digits.
        norm: its running statistics are updated in place, with the unbiased variance, and its batches counted.
        residual: of y's shape.
        activation, parameters: a name and all its numbers.

    Returns:
        The output, in y's dtype and strides, and `saved` (2, K): mean, and 1 / sqrt(biased variance + eps).

    Raises:
        ValueError: a single value for each channel, as torch's, or a residual of another shape; nothing has been
            written.
    """
    if y.numel() == 0:
        if norm.batches is not None:
            norm.batches.add_(1)
        return torch.empty_like(y), _statistics(y).zero_()
    if y.numel() == y.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.size()}")
    found: tuple[Tensor, Tensor] = _either(y, "normalize", y, sums, norm, _like(residual, y), activation, parameters)
    return found


def backward_needs(activation: str, parameters: Parameters, residual: bool) -> Literal["nothing", "residual", "out"]:
    """Which tensor beside y `normalize_backward` takes as `residual_or_out`.

    Without a residual everything is computed anew from y. With one, the output takes its place where it tells the
    derivative, for it mostly is kept anyway.
    """
    if not residual or activation == "none":
        return "nothing"
    return "out" if _told_by_output(activation, parameters) else "residual"


def normalize_backward(
    grad: Tensor,
    y: Tensor,
    residual_or_out: Tensor | None,
    saved: Tensor,
    norm: Norm,
    activation: str = "none",
    parameters: Parameters = (),
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of what `normalize` took.

    Args:
        grad: what comes in for the output, of its shape.
        y: as `normalize` got it.
        residual_or_out: what `backward_needs` says; None where that is nothing.
        saved: as `normalize` returned it.
        norm: running statistics are not looked at.
        activation, parameters: as `normalize` got them.
        needs: of y, residual, weight and bias.

    Returns:
        The gradients of y and of the residual, in y's dtype and strides, and of weight and bias, in their dtypes
        (where they are None, that of `saved`); None where not needed. Without an activation the residual's gradient
        may be `grad` itself.
    """
    if not any(needs):
        return None, None, None, None
    if y.numel() == 0:
        behind, totals, grad_y = torch.empty_like(y), _statistics(y).zero_(), torch.empty_like(y)
    else:
        other = None if activation == "none" else _like(residual_or_out, y)
        from_output = other is not None and _told_by_output(activation, parameters)
        grad_y, behind, totals = _either(
            y, "normalize_backward", _like(grad, y), y, other, from_output, saved, norm, activation,
            _seen(activation, parameters, y.dtype) if from_output else parameters, needs[0], fits=_fits(norm),
        )  # fmt: skip
    grad_bias, grad_weight = totals.unbind()
    return (
        grad_y if needs[0] else None,
        behind if needs[1] else None,
        _cast(grad_weight, norm.weight) if needs[2] else None,
        _cast(grad_bias, norm.bias) if needs[3] else None,
    )


def activation_backward(
    grad: Tensor, saved: Tensor | None, activation: str, parameters: Parameters = (), *, from_output: bool, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient behind an activation and, in the same pass, that of a bias which was added before it.

    Args:
        grad: what comes in for the output, (N, K, spatial...).
        saved: of its shape, the activation's output (`from_output`) or its argument; None for activation `none`.
        activation, parameters: a name and all its numbers.
        from_output: only for none, relu, leaky_relu, hardtanh, sigmoid, tanh and elu (the latter and leaky_relu with
            a parameter of at least 0).
        bias: sum it over all dims but the channels.

    Returns:
        The gradient, in the dtype of `grad`, which for activation `none` it is itself; and float32 (K,), or None.
    """
    if grad.numel() == 0:
        return grad, _statistics(grad)[0].zero_() if bias else None
    first = grad if saved is None or activation == "none" else saved
    grad = _like(grad, first)
    if from_output:
        parameters = _seen(activation, parameters, first.dtype)
    found: tuple[Tensor, Tensor | None] = _either(
        first, "activation_backward", grad, saved, activation, parameters, from_output, bias
    )
    return found


# Triton where it can

_launches: ModuleType | None = None
_gave_up = False


def _either(y: Tensor, name: str, *arguments: Any, fits: bool = True) -> Any:
    """By Triton's kernel where it can compute `y`'s, by torch's operations where not."""
    if y.is_cuda and fits and not _gave_up and y.dtype in _KERNEL_DTYPES and _is_matrix(y):
        launches = _launches or _load()
        if launches is not None:
            try:
                return getattr(launches, name)(*arguments)
            except launches.Unusable as error:
                _give_up(str(error))
    return getattr(composed, name)(*arguments)


def _fits(norm: Norm) -> bool:
    """Whether its tensors are what a kernel reads: one number after the other, on a GPU."""
    return all(one is None or (one.is_cuda and one.is_contiguous()) for one in norm[:4])


def _load() -> ModuleType | None:
    global _launches
    try:
        from convplan.kernels import launches
    except Exception as error:  # Triton fails to import in ways of its own, a missing compiler among them
        _give_up(f"{type(error).__name__}: {error}")
        return None
    _launches = launches
    return launches


def _give_up(reason: str) -> None:
    """Torch's operations from now on: what did not compile once would be tried at every call."""
    global _gave_up
    if not _gave_up:
        log.warning("what follows convolutions runs by torch's operations, for Triton's kernels do not: %s", reason)
    _gave_up = True


def _is_matrix(y: Tensor) -> bool:
    """Dense channels-last: places by channels, row after row."""
    dims = y.dim()
    if dims == 4:
        return y.is_contiguous(memory_format=torch.channels_last)
    if dims == 5:
        return y.is_contiguous(memory_format=torch.channels_last_3d)
    return dims >= 2 and y.movedim(1, -1).is_contiguous()


def _like(tensor: Tensor | None, y: Tensor) -> Any:
    """`tensor` in y's dtype, and in y's layout where that is a matrix."""
    if tensor is None:
        return None
    if tensor.shape != y.shape:
        raise ValueError(f"found a tensor of shape {tuple(tensor.shape)}, expected that of y, {tuple(y.shape)}")
    if tensor.dtype != y.dtype:
        tensor = tensor.to(y.dtype)
    if tensor.stride() == y.stride() or not _is_matrix(y) or _is_matrix(tensor):
        return tensor
    return torch.empty_like(y).copy_(tensor)


def _statistics(y: Tensor) -> Tensor:
    return torch.empty((2, y.shape[1]), dtype=composed.wide(y.dtype), device=y.device)


def _cast(gradient: Tensor, parameter: Tensor | None) -> Tensor:
    return gradient if parameter is None or parameter.dtype == gradient.dtype else gradient.to(parameter.dtype)


@lru_cache(maxsize=256)
def _seen(activation: str, parameters: Parameters, dtype: torch.dtype) -> Parameters:
    """The parameters to compare an output with, whose bounds have been rounded to its dtype."""
    if activation != "hardtanh":
        return parameters
    return tuple(torch.tensor(parameters, dtype=torch.float64).to(dtype).tolist())


def _told_by_output(activation: str, parameters: Parameters) -> bool:
    return activation in _FROM_OUTPUT and (activation != "leaky_relu" or parameters[0] >= 0)

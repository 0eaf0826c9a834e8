"""The one adapter between torch's calls and convplan's problems. Knows tensors and arguments, no engine.

`ConvArgs` is a convolution's arguments in one form, whoever called: torch's dispatcher (`override`) or convplan's own
functions (`functional`). From tensors and arguments it makes the `Problem`s of the forward and of both gradients:

                     forward                 gradient of the input       gradient of the weight
    convolution      fprop(x, w)             dgrad(dy, w)                wgrad(x, dy)
    transposed       dgrad(x as y, w)        fprop(dy as x, w)           wgrad(dy as x, x as y)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from convplan._environment import onednn_computes
from convplan._epilogue import Epilogue
from convplan._errors import SpecError
from convplan._problem import (
    FLOAT_DTYPES,
    Op,
    Problem,
    TensorSpec,
    channels_last_strides,
    contiguous_strides,
    output_spatial,
)

# Problems of other dtypes exist too, but calls of torch's own functions with them stay torch's.
DTYPE_NAMES: dict[torch.dtype, str] = {getattr(torch, name): name for name in FLOAT_DTYPES}

# Largest power of two, at most 32, that divides an address, by the address's last five bits (B1).
ALIGNMENT_BYTES = tuple(32 if low == 0 else low & -low for low in range(32))


class NotExpressible(SpecError):
    """A convolution that torch can do and a `Problem` cannot describe."""


class ConvArgs(NamedTuple):
    """Arguments of one convolution; padding as one (before, after) pair for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def is_symmetric(self) -> bool:
        """Torch's own convolution can express the padding."""
        return all(before == after for before, after in self.padding)


def conv_args(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    spatial: int,
) -> ConvArgs:
    """Arguments as torch's dispatcher hands them over; one number may stand for all dimensions.

    Raises:
        SpecError: an argument has neither one entry nor one for each dimension.
    """
    pads = _expand(padding, spatial)
    return ConvArgs(
        stride=_expand(stride, spatial),
        padding=tuple((pad, pad) for pad in pads),
        dilation=_expand(dilation, spatial),
        transposed=transposed,
        output_padding=_expand(output_padding, spatial) if transposed else (0,) * spatial,
        groups=groups,
    )


def _expand(values: Sequence[int], spatial: int) -> tuple[int, ...]:
    found = tuple(values) * spatial if len(values) == 1 else tuple(values)
    if len(found) != spatial:
        raise SpecError(f"found {list(values)}, expected one entry, or {spatial}, one for each spatial dimension")
    return found


def alignment_bytes(tensor: torch.Tensor) -> int:
    """Largest power of two, at most 32, that divides the tensor's data pointer (B1)."""
    return ALIGNMENT_BYTES[tensor.data_ptr() & 31]


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """A tensor's sizes, strides, dtype and alignment.

    Raises:
        SpecError: a dtype or rank that convplan does not plan for.
    """
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise SpecError(f"dtype is {tensor.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    return TensorSpec(tuple(tensor.shape), tensor.stride(), dtype, alignment_bytes(tensor))


def output_spec(
    dims: Sequence[int], x: torch.Tensor, w: torch.Tensor, args: ConvArgs, *, cudnn: bool | None = None
) -> TensorSpec:
    """The output's layout as torch chooses it: channels-last when either input suggests it (B3)."""
    return TensorSpec(tuple(dims), output_strides(dims, x, w, args, cudnn=cudnn), DTYPE_NAMES[x.dtype])


def output_strides(
    dims: Sequence[int], x: torch.Tensor, w: torch.Tensor, args: ConvArgs, *, cudnn: bool | None = None
) -> tuple[int, ...]:
    """The strides that torch gives an output, also where a size-1 dimension leaves them open.

    Args:
        dims: of the output.
        x, w: what is read; of a gradient the two tensors that it is made of.
        args: of the call.
        cudnn: on a GPU, whether torch gives the convolution to cuDNN; None: it is asked, and x and w must be those
            of the call itself.

    Torch computes one spatial dimension as two, from an input that it makes contiguous first, so that the weight alone
    decides. Its own 3-D kernels for the CPU, which serve what oneDNN does not, know only contiguous results, and so do
    its kernels for a GPU that serve what cuDNN does not.
    """
    if x.device.type == "cuda" and not (_cudnn_may_choose(x, w, args) if cudnn is None else cudnn):
        return contiguous_strides(dims)
    if len(dims) == 5 and x.device.type == "cpu" and not _onednn_takes(x, w, args):
        return contiguous_strides(dims)
    seen = (w.unsqueeze(2),) if len(dims) == 3 else (x, w)
    return channels_last_strides(dims) if any(map(suggests_channels_last, seen)) else contiguous_strides(dims)


def output_layout(x: torch.Tensor, w: torch.Tensor, args: ConvArgs) -> str:
    """The same as a name, which holds for outputs of every size, those of gradients too."""
    any_dims = (2,) * x.dim()
    strides = output_strides(any_dims, x, w, args)
    return "channels_last" if strides == channels_last_strides(any_dims) else "contiguous"


def _cudnn_may_choose(x: torch.Tensor, w: torch.Tensor, args: ConvArgs) -> bool:
    """Torch gives the convolution to cuDNN, and lets the tensors decide about the layout: of float64 it does not.

    Raises:
        SpecError: torch refuses the arguments; its own error is for its own call to raise.
    """
    if x.dtype == torch.float64:
        return False
    outer = list(args.output_padding)
    padding = [before for before, _ in args.padding]
    try:
        chosen = torch._C._select_conv_backend(
            x, w, None, list(args.stride), padding, list(args.dilation), args.transposed, outer, args.groups
        )
    except RuntimeError as exc:
        raise SpecError(f"torch refuses these arguments: {exc}") from exc
    return chosen.name in ("Cudnn", "CudnnTranspose")


def _onednn_takes(x: torch.Tensor, w: torch.Tensor, args: ConvArgs) -> bool:
    """Torch's own choice between oneDNN and its native kernels (`use_mkldnn` in its Convolution.cpp)."""
    if not onednn_computes(DTYPE_NAMES[x.dtype]):
        return False
    if args.transposed and any(outer >= step for outer, step in zip(args.output_padding, args.stride, strict=True)):
        return False
    if x.dtype != torch.float32:
        return True
    plain = set(args.stride) | set(args.dilation) == {1}
    flat = w.shape[-1] == w.shape[-2] == 1
    if plain and x.shape[0] < 16 and flat and torch.get_num_threads() == 1:
        return False
    large = w.shape[-1] > 3 and w.shape[-2] > 3
    return args.groups > 1 or large or x.shape[0] > 1 or math.prod(x.shape[:4]) > 20_480


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """Torch's own reading of a layout from raw strides: channels step least, then width, height, depth, batch.

    Where a size-1 dimension leaves it open, the stride that happens to stand there decides, as in torch.
    """
    if tensor.stride(1) == 0:
        return False
    least = 0
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < least or (dim == 0 and least == tensor.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def forward_problem(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, args: ConvArgs) -> Problem:
    """The problem of a forward call; run it with (x, w, bias).

    Raises:
        SpecError: the arguments have no meaning, or none that a `Problem` can express.
    """
    check_same_place(x, w, bias)
    given, weight = spec_of(x), spec_of(w)
    spatial = given.dims[2:]
    if len(given.dims) != len(weight.dims):
        raise SpecError(f"input {given.dims} and weight {weight.dims} differ in rank, expected the same")
    epilogue = Epilogue(bias=bias is not None)
    if not args.transposed:
        _check_bias(bias, weight.dims[0], given.dtype)
        sizes = output_spatial(spatial, weight.dims[2:], args.padding, args.stride, args.dilation)
        y = output_spec((given.dims[0], weight.dims[0], *sizes), x, w, args)
        return _problem("fprop", given, weight, y, args.padding, args, x, epilogue)
    channels = weight.dims[1] * args.groups
    _check_bias(bias, channels, given.dtype)
    sizes = transposed_spatial(spatial, weight.dims[2:], args)
    out = output_spec((given.dims[0], channels, *sizes), x, w, args)
    return _problem("dgrad", out, weight, given, transposed_padding(args), args, x, epilogue)


def transposed_spatial(x_spatial: Sequence[int], filter_sizes: Sequence[int], args: ConvArgs) -> tuple[int, ...]:
    """Spatial sizes of a transposed convolution's output."""
    return tuple(
        (size - 1) * step - before - after + dil * (taps - 1) + outer + 1
        for size, taps, step, (before, after), dil, outer in zip(
            x_spatial, filter_sizes, args.stride, args.padding, args.dilation, args.output_padding, strict=True
        )
    )


def transposed_padding(args: ConvArgs) -> tuple[tuple[int, int], ...]:
    """Padding of the convolution whose dgrad is this transposed convolution.

    Output padding below the stride is what flooring loses and needs nothing. From the stride on, the convolution would
    gain an output; less padding behind takes it away again.

    Raises:
        NotExpressible: there is not enough padding to take away.
    """
    pairs = []
    for (before, after), outer, step, dil in zip(
        args.padding, args.output_padding, args.stride, args.dilation, strict=True
    ):
        if outer >= max(step, dil):
            raise NotExpressible(f"output_padding is {outer} with stride {step} and dilation {dil}; torch refuses it")
        less = outer if outer >= step else 0
        if less > after:
            raise NotExpressible(
                f"output_padding is {outer} with stride {step} and padding {after}, expected less of it"
            )
        pairs.append((before, after - less))
    return tuple(pairs)


def gradient_problem(
    which: str, dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, args: ConvArgs
) -> tuple[Problem, bool]:
    """The problem of one gradient, `input` or `weight`, of a forward call with these arguments.

    Returns:
        The problem, and for the weight's gradient whether its inputs are (dy, x) instead of (x, dy). The input's
        gradient is always run with (dy, w).
    """
    check_same_place(dy, x, w)
    given, weight, grad = spec_of(x), spec_of(w), spec_of(dy)
    if which == "input":
        out = output_spec(given.dims, x, w, args)
        if args.transposed:
            return _problem("fprop", grad, weight, out, transposed_padding(args), args, dy), False
        return _problem("dgrad", out, weight, grad, args.padding, args, dy), False
    out = output_spec(weight.dims, x, w, args)
    if args.transposed:
        return _problem("wgrad", grad, out, given, transposed_padding(args), args, dy), True
    return _problem("wgrad", given, out, grad, args.padding, args, dy), False


def _problem(
    op: Op,
    x: TensorSpec,
    w: TensorSpec,
    y: TensorSpec,
    padding: tuple[tuple[int, int], ...],
    args: ConvArgs,
    tensor: torch.Tensor,
    epilogue: Epilogue | None = None,
) -> Problem:
    return Problem(
        op=op,
        x=x,
        w=w,
        y=y,
        padding=padding,
        stride=args.stride,
        dilation=args.dilation,
        groups=args.groups,
        epilogue=epilogue or Epilogue(),
        device=tensor.device.type,
    )


def check_same_place(*tensors: torch.Tensor | None) -> None:
    """All tensors strided and on one device.

    Raises:
        SpecError: they are not.
    """
    given = [t for t in tensors if t is not None]
    devices = sorted({str(t.device) for t in given})
    if len(devices) > 1:
        raise SpecError(f"tensors are on {', '.join(devices)}, expected one device; move them with .to(device)")
    if any(t.layout != torch.strided for t in given):
        raise SpecError(f"tensor layouts are {[str(t.layout) for t in given]}, expected torch.strided")


def _check_bias(bias: torch.Tensor | None, channels: int, dtype: str) -> None:
    if bias is None:
        return
    if tuple(bias.shape) != (channels,):
        raise SpecError(
            f"bias.shape is {tuple(bias.shape)}, expected ({channels},), one number for each output channel"
        )
    if DTYPE_NAMES.get(bias.dtype) != dtype:
        raise SpecError(f"bias is {bias.dtype}, expected torch.{dtype}, the input's dtype")

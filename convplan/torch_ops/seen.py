"""Calls that were made before, compared with the one that comes: the question that the hot path asks.

What runs such a call, and what happens to any other, is `override`'s business.

After a large convolution the processor's caches hold nothing of Python's, and every function called and every object
made costs about 3 us then, ten times its usual cost. So the C functions are bound once, and few are called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from convplan._choices import state
from convplan._environment import matmul_precision
from convplan._runtime import local

MOST_OF_ONE_WEIGHT = 8  # calls that differ, such as those of a head that all levels of a pyramid share

Tensor = torch.Tensor
Same = Callable[..., bool]

_FLOAT32 = torch.float32
_num_threads = torch.get_num_threads
_matmul_precision = torch._C._get_float32_matmul_precision
algorithms_deterministic = torch._C._get_deterministic_algorithms
cudnn_deterministic = torch._C._get_cudnn_deterministic
cudnn_enabled = torch._C._get_cudnn_enabled
_fp32_precision: Callable[[str, str], str] = getattr(
    torch._C, "_get_fp32_precision_getter", lambda backend, op: str(torch._C._get_cudnn_allow_tf32())
)
_onednn_enabled = torch._C._get_mkldnn_enabled


def live_flags(device: int, dtype: torch.dtype | None = None) -> tuple[object, ...]:
    """Torch's settings that a choice depends on, as they are now.

    Args:
        device: index of the GPU, -1 for the CPU.
        dtype: of the tensors. Only float32 on a GPU has precisions to choose from; None: any.
    """
    if device >= 0 and dtype is not _FLOAT32 and dtype is not None:
        return algorithms_deterministic(), cudnn_deterministic(), cudnn_enabled()
    try:
        precision = _matmul_precision()
    except RuntimeError:  # the new spelling was used
        precision = matmul_precision("cpu" if device < 0 else "cuda")
    if device < 0:
        return _num_threads(), _onednn_enabled(), precision, algorithms_deterministic(), cudnn_deterministic()
    return (
        algorithms_deterministic(),
        cudnn_deterministic(),
        cudnn_enabled(),
        precision,
        _fp32_precision("cuda", "conv"),
    )


class Alike:
    """The tensors of a call, and torch's settings: whether those of another call are like these.

    Args:
        token: the switch's, when the call was made.
        tensors: whose sizes, strides, dtype and device are compared.
        bias: of the call, if any.
        lows: the last five bits of addresses.
        flags: `live_flags` of the call.

    Attributes:
        same: whether tensors are like those of the call. `same_biased`: the same for calls with a bias; the one that
            does not apply says no to all.
    """

    __slots__ = ("device", "dtype", "flags", "lows", "same", "same_biased", "token")

    def __init__(
        self,
        token: int,
        tensors: tuple[Tensor, ...],
        bias: Tensor | None,
        lows: tuple[int, ...],
        flags: tuple[object, ...],
    ) -> None:
        self.token, self.lows, self.flags = token, lows, flags
        self.same = like(*tensors) if bias is None else _unlike
        self.same_biased = _unlike if bias is None else like(*tensors, bias)
        self.dtype, self.device = tensors[0].dtype, tensors[0].get_device()

    def is_like(self, lows: tuple[int, ...], tensors: tuple[Tensor, ...], bias: Tensor | None) -> bool:
        """Whether a call has tensors like these, and torch is set as it was.

        Args:
            lows: the last five bits of the addresses of tensors.
            tensors: of the call, in the order in which they were given here.
            bias: of the call, if any.
        """
        return (
            (self.same(*tensors) if bias is None else self.same_biased(*tensors, bias))
            and lows == self.lows
            and self.token == state.token
            and live_flags(self.device, self.dtype) == self.flags
        )


class Seen(Alike):
    """A call that this thread has made, and what runs it; compared part by part, which is cheaper than making a key.

    Kept by the address of the weight, which tells most convolutions of a program apart. Where weights are made anew in
    every step, as autocast's copies are, addresses tell nothing: then a call is found by the sizes of input and weight,
    and known by its new address from there on. One that differs in any part goes by its key.

    Args:
        token, tensors, bias, flags: as of `Alike`.
        rest: the other arguments, as they came.
        parts: what runs it; `x_low`, `w_low` and `dy_low`, the last five bits of addresses.

    Attributes:
        other: the call of the same weight before this one, if any.
    """

    __slots__ = (
        "algorithms_deterministic", "caller", "cudnn_deterministic", "cudnn_enabled", "depth", "dy_low", "failed",
        "few_flags", "hits", "other", "rest", "run", "w_low", "x_low",
    )  # fmt: skip

    def __init__(
        self,
        token: int,
        tensors: tuple[Tensor, ...],
        bias: Tensor | None,
        rest: tuple[Any, ...],
        flags: tuple[object, ...],
        **parts: Any,
    ) -> None:
        lows = tuple(value for name, value in parts.items() if name.endswith("_low"))
        super().__init__(token, tensors, bias, lows, flags)
        self.rest, self.hits = rest, local.callers.hits
        self.other: Seen | None = None
        self.depth = 1
        for name, value in parts.items():
            setattr(self, name, value)
        # For most tensors on a GPU there are three flags, which are compared one by one, without a tuple of them.
        self.algorithms_deterministic, self.cudnn_deterministic = algorithms_deterministic(), cudnn_deterministic()
        self.cudnn_enabled = cudnn_enabled()
        self.few_flags = len(flags) == 3

    def keep(self, table: dict[int, Any], address: int) -> None:
        """Put this call before those that one of the thread's tables has of its weight; too many of them go."""
        before: Seen | None = table.get(address)
        if before is not None and before.token == self.token and before.depth < MOST_OF_ONE_WEIGHT:
            self.other, self.depth = before, before.depth + 1
        local.keep_seen(table, address, self)


def _unlike(*tensors: Tensor) -> bool:
    return False


def like(*tensors: Tensor) -> Same:
    """A function that says whether as many tensors have the same sizes, strides, dtypes, devices and classes as these.

    May also say no where they differ in something else, such as whether autograd records what is computed from them.
    """
    guards = _guards()
    return _compared_here(*tensors) if guards is None else _compared_by(guards, *tensors)


def _compared_by(guards: Callable[..., Any], *tensors: Tensor) -> Same:
    sizes, strides = [list(one.shape) for one in tensors], [list(one.stride()) for one in tensors]
    check: Same = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def _compared_here(*tensors: Tensor) -> Same:
    wanted = [(type(one), one.dtype, one.shape, one.stride(), one.device) for one in tensors]

    def same(*others: Tensor) -> bool:
        return [(type(one), one.dtype, one.shape, one.stride(), one.device) for one in others] == wanted

    return same


@functools.cache
def _guards() -> Callable[..., Any] | None:
    """What Dynamo compares tensors with: one call of C++ that takes a third of the time of Python's comparisons.

    It is no public part of torch, so it is tried first. None: there is none, or it does not tell tensors apart.
    """
    found: Callable[..., Any] | None = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    if found is None:
        return None
    one, two = torch.empty(2, 3, 4, 4, device="cpu"), torch.empty(3, 3, 1, 1, device="cpu")
    unlike = [
        one[:1], one.double(), one.contiguous(memory_format=torch.channels_last), one[..., :3], one.flatten(2),
        torch.empty(2, 3, 4, 8, device="cpu")[..., :4], one.to("meta"),
    ]  # fmt: skip
    try:
        same = _compared_by(found, one, two)
        right = same(torch.empty_like(one), two) is True and not any(same(other, two) for other in unlike)
        right = right and not any(same(one, other) for other in (two.half(), two[:2], one))
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if right else None

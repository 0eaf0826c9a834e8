"""Compiled kernels, launched again without asking Triton's compiler which one it is.

Triton's own call looks at every argument anew, which takes 30 us of the host and more for a kernel of twenty. A `Ready`
is one kernel with its grid and its numbers, for tensors that are alike in every call: the first call on a GPU goes
through Triton, which compiles, and what came of it is kept. Kept kernels read vectors of 16 bytes, so that a tensor at
another address goes through Triton every time, and so does everything while somebody listens to Triton's launches, as
profilers do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from convplan.kernels.choices import Cut

UNALIGNED = 15  # bits of an address
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
_runtime = triton.knobs.runtime


class Ready:
    """A kernel that is launched again and again.

    Args:
        kernel: a function of `triton.jit`.
        cut: says how many programs there are.
        numbers: its last arguments, constants of the compiler too.
    """

    __slots__ = ("_cut", "_kernel", "_known", "_numbers")

    def __init__(self, kernel: Any, cut: Cut, numbers: tuple[Any, ...]) -> None:
        self._kernel, self._cut, self._numbers = kernel, cut, numbers
        self._known: dict[int, tuple[Any, ...]] = {}

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self._kernel.__name__)

    def is_known(self, index: int) -> bool:
        """Whether it has been compiled for a device, and need not be when it is called."""
        return index in self._known

    def __call__(self, index: int, *tensors: Any) -> None:
        """Run it on the current stream of a device.

        Args:
            index: of the tensors' device.
            tensors: its first arguments, each a tensor or None: of the same dtypes, and None at the same places, in
                every call.

        Raises:
            Exception: whatever Triton, its compiler or the driver raises.
        """
        addresses = [None if one is None else one.data_ptr() for one in tensors]
        bits = 0
        for one in addresses:
            if one is not None:
                bits |= one
        known = self._known.get(index)
        if known is not None and not bits & UNALIGNED and _current_device() == index and not _is_listened():
            run, across, down, function, packed = known
            run(across, down, 1, _raw_stream(index), function, packed, None, None, None, *addresses, *self._numbers)
            return
        cut = self._cut
        if index >= 0 and index != _current_device():
            with torch.cuda.device(index):  # Triton launches on the current one
                compiled = self._kernel[cut.grid](*tensors, *self._numbers, num_warps=cut.warps)
        else:
            compiled = self._kernel[cut.grid](*tensors, *self._numbers, num_warps=cut.warps)
        if index >= 0 and compiled is not None and not bits & UNALIGNED:
            self._known[index] = (compiled.run, *cut.grid, compiled.function, compiled.packed_metadata)


def _is_listened() -> bool:
    """Somebody wants to hear of launches."""
    before, after = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))

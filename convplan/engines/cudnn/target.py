"""What plans are made for: a GPU of this machine, with a handle of the calling thread, or an absent one."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING

from convplan._errors import EngineUnavailable
from convplan.engines.cudnn.library import Library, load

if TYPE_CHECKING:
    from convplan.engines.cudnn.descriptors import Descriptor, Handle
    from convplan.engines.cudnn.device import Device


class Target:
    """A device to plan for.

    Attributes:
        library: cuDNN.
        properties: the device's property descriptor, for a GPU that is not present; None for one of this machine.
        index: of the GPU in this machine, None for one that is not present.
        compute_capability: such as "9.0".
    """

    def __init__(
        self, library: Library, *, index: int | None, properties: Descriptor | None, compute_capability: str
    ) -> None:
        self.library = library
        self.index = index
        self.properties = properties
        self.compute_capability = compute_capability

    @classmethod
    def absent(cls, device: Device) -> Target:
        """A GPU that need not be there (C7).

        Raises:
            EngineUnavailable: cuDNN is missing, or the stand-in for the driver cannot be made.
            SpecError: the properties are of another cuDNN version.
        """
        from convplan.engines.cudnn.device import load_for_absent_gpu

        library = load_for_absent_gpu()
        return cls(
            library,
            index=None,
            properties=device.descriptor(library),
            compute_capability=device.compute_capability,
        )

    @property
    def handle(self) -> Handle:
        """The calling thread's handle for the GPU (B22).

        Raises:
            CudnnError: the device cannot be used. EngineUnavailable: as `handle_of`.
        """
        assert self.index is not None, "convplan bug: a handle for a GPU that is not present"
        return handle_of(self.library, self.index)


@functools.lru_cache(maxsize=64)
def present(index: int) -> Target:
    """GPU number `index` of this machine.

    Raises:
        EngineUnavailable: cuDNN is missing, too old, or does not support the GPU.
    """
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return Target(load(), index=index, properties=None, compute_capability=f"{major}.{minor}")


class _Handles(threading.local):
    def __init__(self) -> None:
        self.by_index: dict[int, Handle] = {}


_handles = _Handles()


def handle_of(library: Library, index: int) -> Handle:
    """The calling thread's handle for a GPU, made at its first use; the current device must be that GPU.

    Raises:
        EngineUnavailable: it would have to be made while a CUDA graph is captured.
    """
    found = _handles.by_index.get(index)
    if found is None:
        import torch

        from convplan.engines.cudnn.descriptors import make_handle

        if torch.cuda.is_current_stream_capturing():
            needs = "a handle of this thread, made before the capture by running any of its plans in this thread"
            raise EngineUnavailable(engine="cudnn", needs=needs)

        found = _handles.by_index[index] = make_handle(library)
    return found

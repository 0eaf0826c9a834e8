"""cuDNN's execution plans: built or restored, with their workspace, run on pointers.

A plan knows addresses and streams, and nothing of torch's tensors; those are `engine`'s. Making a variant pack (the
addresses that a run reads and writes) costs about as much as the run's launch, and a finalised one cannot be changed.
Torch's allocator hands out the same addresses again and again, so each plan keeps its packs of the last few sets of
them; but a loop over new sizes has new addresses all the time, and training settles on its own only after a hundred
steps. So packs are made with the five calls of cuDNN that it takes, and nothing beside.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from ctypes import Array, byref, c_int, c_int64, c_void_p
from typing import TYPE_CHECKING, NoReturn

from convplan.engines.cudnn.configs import engine_configuration
from convplan.engines.cudnn.descriptors import CudnnError, Descriptor, check
from convplan.engines.cudnn.enums import Attribute, AttributeType, DescriptorType
from convplan.engines.cudnn.library import clear_cuda_error

if TYPE_CHECKING:
    from convplan.engines.cudnn.descriptors import Handle
    from convplan.engines.cudnn.target import Target

MOST_PACKS = 256  # of one plan, which all layers of the same sizes share; each holds about 1 KB
MOST_JSON_BYTES = 16 * 2**20  # of a serialized plan; fused ones have about 0.1 MB


_packs_lock = threading.Lock()  # of all plans: held for a dictionary's sake

# As the C calls take them, made once: ctypes would make them from numbers at every call.
_VARIANT_PACK = c_int(DescriptorType.VARIANT_PACK)
_INT64, _VOID_PTR = c_int(AttributeType.INT64), c_int(AttributeType.VOID_PTR)
_UNIQUE_IDS = c_int(Attribute.VARIANT_PACK_UNIQUE_IDS)
_DATA_POINTERS = c_int(Attribute.VARIANT_PACK_DATA_POINTERS)
_WORKSPACE, _ONE = c_int(Attribute.VARIANT_PACK_WORKSPACE), c_int64(1)


class Pack(c_void_p):
    """A variant pack as `cudnnBackendExecute` takes it."""

    descriptor: Descriptor  # owns it


class ExecutionPlan:
    """A finalised plan.

    Args:
        descriptor: of the plan.
        uids: identifiers of the graph's tensors, in the order in which `execute` takes their addresses.

    Attributes:
        workspace_bytes: scratch memory that a run needs.
        packs: variant packs by the addresses they hold, for callers that execute without a method call in between.

    Concurrency: may be executed by several threads at once, each with a handle of its own.
    """

    __slots__ = ("_execute", "_given", "_pointers", "_uids", "descriptor", "packs", "workspace_bytes")

    def __init__(self, descriptor: Descriptor, uids: tuple[int, ...]) -> None:
        self.descriptor = descriptor
        self.workspace_bytes = int(descriptor.get_one(Attribute.EXECUTION_PLAN_WORKSPACE_SIZE))
        self._uids = (c_int64 * len(uids))(*uids)
        self._given = c_int64(len(uids))
        self._pointers: type[Array[c_void_p]] = c_void_p * len(uids)
        self.packs: dict[tuple[int, ...], Pack] = {}
        self._execute = descriptor.library.cdll.cudnnBackendExecute

    def execute(self, handle: Handle, addresses: tuple[int, ...]) -> None:
        """Start a run on the handle's stream.

        Args:
            handle: of the calling thread and the plan's device.
            addresses: of the tensors in the order of `uids`, then that of the workspace (0 for none).

        Raises:
            CudnnError: the run could not be started.
        """
        pack = self.packs.get(addresses)
        if pack is None:
            pack = self.pack(addresses)
        status = self._execute(handle.pointer, self.descriptor.pointer, pack)
        if status:
            self.failed(status)

    def failed(self, status: int) -> NoReturn:
        """Raise what a failed `execute` means, with CUDA's error state cleared for the next plan (B18).

        Raises:
            CudnnError: always.
        """
        try:
            check(self.descriptor.library, status, "cudnnBackendExecute")
        finally:
            clear_cuda_error(self.descriptor.library)
        raise AssertionError("convplan bug: success is no failure")

    def pack(self, addresses: tuple[int, ...]) -> Pack:
        """A new variant pack for these addresses, kept in `packs`.

        Raises:
            CudnnError: it could not be made.
            ValueError: there are more addresses than tensors and a workspace, or fewer.
        """
        if len(addresses) != len(self._uids) + 1:
            raise ValueError(f"found {len(addresses)} addresses, expected {len(self._uids)} and the workspace's")
        library, count = self.descriptor.library, self._given
        create, set_attribute, finalize = library.packing_unchecked
        pack = Pack()
        status = create(_VARIANT_PACK, byref(pack))
        if status:
            check(library, status, "cudnnBackendCreateDescriptor", DescriptorType.VARIANT_PACK.name)
        pack.descriptor = Descriptor.adopt(library, DescriptorType.VARIANT_PACK, pack.value or 0)
        status = (
            set_attribute(pack, _UNIQUE_IDS, _INT64, count, self._uids)
            or set_attribute(pack, _DATA_POINTERS, _VOID_PTR, count, self._pointers(*addresses[:-1]))
            or set_attribute(pack, _WORKSPACE, _VOID_PTR, _ONE, byref(c_void_p(addresses[-1])))
        )
        if status:
            check(library, status, "cudnnBackendSetAttribute", DescriptorType.VARIANT_PACK.name)
        status = finalize(pack)
        if status:
            check(library, status, "cudnnBackendFinalize", DescriptorType.VARIANT_PACK.name)
        with _packs_lock:
            while len(self.packs) >= MOST_PACKS:  # the oldest goes
                del self.packs[next(iter(self.packs))]
            self.packs[addresses] = pack
        return pack

    def serialize(self) -> bytes:
        """The plan as JSON, which `restore_plan` takes in another process without compiling anything (C1).

        Raises:
            CudnnError: its engine does not offer that.
        """
        return self.descriptor.get_text(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION).encode()


def build_plan(
    graph: Descriptor, target: Target, engine: int, knobs: Mapping[str, int], uids: tuple[int, ...]
) -> ExecutionPlan:
    """Build an engine with knobs by name into a plan.

    Raises:
        CudnnError: the engine refuses the graph, a knob's value or the device, or its compilation failed twice.
        ValueError: an unknown knob.
    """
    return build_configured(engine_configuration(graph, target, engine, knobs), target, uids)


def build_configured(config: Descriptor, target: Target, uids: tuple[int, ...]) -> ExecutionPlan:
    """Build a finalised configuration into a plan.

    Raises:
        CudnnError: as `build_plan`.
    """
    try:
        return ExecutionPlan(_finalised(target, config, None), uids)
    except CudnnError as exc:
        # Compiling the same configuration twice in one process failed once and built at the next try (cuDNN 9.19).
        if not exc.compilation_failed:
            raise
    return ExecutionPlan(_finalised(target, config, None), uids)


def restore_plan(target: Target, serialized: bytes, uids: tuple[int, ...]) -> ExecutionPlan:
    """A plan from its JSON, made by the same cuDNN version for the same kind of GPU.

    Args:
        target: the GPU.
        serialized: of a plan that was made here, or what `serialized.vetted` gave back.
        uids: as for `build_plan`.

    Raises:
        CudnnError: cuDNN does not take it: damaged, of another version or for another GPU.
    """
    if len(serialized) > MOST_JSON_BYTES:
        raise ValueError(f"a serialized plan of {len(serialized)} bytes, expected at most {MOST_JSON_BYTES}")
    return ExecutionPlan(_finalised(target, None, serialized), uids)


def _finalised(target: Target, config: Descriptor | None, serialized: bytes | None) -> Descriptor:
    plan = Descriptor(target.library, DescriptorType.EXECUTION_PLAN)
    if target.properties is not None:
        plan.set(Attribute.EXECUTION_PLAN_DEVICEPROP, target.properties)
    else:
        plan.set(Attribute.EXECUTION_PLAN_HANDLE, target.handle)
    if config is not None:
        plan.set(Attribute.EXECUTION_PLAN_ENGINE_CONFIG, config)
    if serialized is not None:
        plan.set(Attribute.EXECUTION_PLAN_JSON_REPRESENTATION, serialized)
    return plan.finalize()

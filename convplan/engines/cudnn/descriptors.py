"""The C calls of cuDNN's backend, made safe: descriptors that own themselves, attributes with types, errors with words.

A descriptor is created, its attributes are set, it is finalized, and from then on it is read or given to others. What
the attributes mean is deliberately elsewhere (`graph`, `configs`, `plans`); so is finding the library (`library`).

Everything here is destroyed with its Python object, except at the end of the process, where destroying could come after
the driver has left. Two threads may use different descriptors at once, and read one; neither setting nor finalizing the
same descriptor from two threads is safe, as in cuDNN itself.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from ctypes import byref, c_bool, c_char, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from typing import Any

from convplan.engines.cudnn.enums import (
    Attribute,
    AttributeType,
    BehaviorNote,
    ConvolutionMode,
    DataType,
    DescriptorType,
    HeurMode,
    KnobType,
    LayoutType,
    NumericalNote,
    PointwiseMode,
    Status,
    TensorReordering,
)
from convplan.engines.cudnn.library import Library

MAX_TEXT = 4096  # bytes of cuDNN's explanation of an error
MAX_VALUES = 2**24  # elements that are read at once; the largest serialized plans seen have 10**5 characters

_LIMITS: dict[Any, int] = {c_int64: 2**63, c_int32: 2**31, c_int: 2**31}

# Types that are not here are C enumerations, 4 bytes each.
_C_TYPES: dict[AttributeType, Any] = {
    AttributeType.HANDLE: c_void_p,
    AttributeType.BOOLEAN: c_bool,
    AttributeType.INT64: c_int64,
    AttributeType.FLOAT: c_float,
    AttributeType.DOUBLE: c_double,
    AttributeType.VOID_PTR: c_void_p,
    AttributeType.BACKEND_DESCRIPTOR: c_void_p,
    AttributeType.INT32: c_int32,
    AttributeType.CHAR: c_char,
}
_ENUMS: dict[AttributeType, type[IntEnum]] = {
    AttributeType.DATA_TYPE: DataType,
    AttributeType.CONVOLUTION_MODE: ConvolutionMode,
    AttributeType.HEUR_MODE: HeurMode,
    AttributeType.KNOB_TYPE: KnobType,
    AttributeType.NUMERICAL_NOTE: NumericalNote,
    AttributeType.LAYOUT_TYPE: LayoutType,
    AttributeType.POINTWISE_MODE: PointwiseMode,
    AttributeType.BEHAVIOR_NOTE: BehaviorNote,
    AttributeType.TENSOR_REORDERING_MODE: TensorReordering,
}

# cuDNN 9.19 ends the process (SIGSEGV) when a plan is restored from JSON with neither of these.
_PLAN_TARGETS = (Attribute.EXECUTION_PLAN_HANDLE, Attribute.EXECUTION_PLAN_DEVICEPROP)

_live: dict[int, object] = {}  # addresses; single dictionary operations, because destroying happens in any thread


def live_descriptors() -> int:
    """How many descriptors exist that were not destroyed yet."""
    return len(_live)


class CudnnError(RuntimeError):
    """A call of cuDNN answered with a status other than success.

    Attributes:
        status: number, see `enums.Status`.
        function: which call, such as `cudnnBackendFinalize`.
        what: what it was called for, such as `EXECUTION_PLAN` or an attribute's name; may be empty.
        text: cuDNN's own explanation, often the condition that failed; may be empty.
    """

    def __init__(self, status: int, function: str, what: str = "", text: str = "") -> None:
        self.status, self.function, self.what, self.text = status, function, what, text
        called = f"{function}({what})" if what else function
        super().__init__(f"{called} returned {self.status_name} ({status})" + (f": {text}" if text else ""))

    def __reduce__(self) -> tuple[type[CudnnError], tuple[int, str, str, str]]:
        return CudnnError, (self.status, self.function, self.what, self.text)

    @property
    def status_name(self) -> str:
        """Such as `NOT_SUPPORTED_SHAPE`; `STATUS_3099` for one that this convplan does not know."""
        try:
            return Status(self.status).name
        except ValueError:
            return f"STATUS_{self.status}"

    @property
    def not_initialized(self) -> bool:
        """No GPU, no driver, or one that does not work."""
        return self.status == Status.NOT_INITIALIZED

    @property
    def bad_param(self) -> bool:
        """The call itself was wrong: a value, a type, an order of calls."""
        return self.status // 1000 == 2

    @property
    def not_supported(self) -> bool:
        """This engine, library or device does not do that; another may."""
        return self.status // 1000 == 3

    @property
    def out_of_memory(self) -> bool:
        """Memory of the host or of the device did not suffice."""
        return self.status in (
            Status.INTERNAL_ERROR_HOST_ALLOCATION_FAILED,
            Status.INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED,
        )

    @property
    def compilation_failed(self) -> bool:
        """An engine could not be compiled at run time. Seen to pass when tried again."""
        return self.status == Status.INTERNAL_ERROR_COMPILATION_FAILED

    @property
    def internal(self) -> bool:
        """cuDNN failed inside, out of memory and failed compilations included."""
        return self.status // 1000 == 4

    @property
    def execution_failed(self) -> bool:
        """The GPU, the driver or a library below failed while working."""
        return self.status // 1000 == 5


def check(library: Library, status: int, function: str, what: str = "") -> None:
    """Raise `CudnnError` for every status but success, with cuDNN's explanation of this thread's last error."""
    if status == Status.SUCCESS:
        return
    raise CudnnError(status, function, what, last_text(library))


def last_text(library: Library) -> str:
    """cuDNN's explanation of this thread's last error, which it then forgets.

    Calls that succeed can leave one behind, and the next error without words of its own would be explained by it.
    """
    text = ctypes.create_string_buffer(MAX_TEXT)
    library.cdll.cudnnGetLastErrorString(text, MAX_TEXT)
    return text.value.decode(errors="replace")


class Handle:
    """A cuDNN handle: a GPU (the current device when it was made) and a stream. From `make_handle`.

    Attributes:
        pointer: the `cudnnHandle_t`, as a number.
        stream: the CUDA stream that work goes to, as a number; 0 is the default stream.
    """

    def __init__(self, library: Library, pointer: int) -> None:
        self.library = library
        self.pointer = pointer
        self.stream = 0

    def set_stream(self, stream: int) -> None:
        """Send later work to this CUDA stream (`torch.cuda.current_stream().cuda_stream`)."""
        if stream != self.stream:
            check(self.library, self.library.cdll.cudnnSetStream(self.pointer, stream), "cudnnSetStream")
            self.stream = stream

    def close(self) -> None:
        """Destroy it now; again is harmless."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            check(self.library, self.library.cdll.cudnnDestroy(pointer), "cudnnDestroy")

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        pointer = getattr(self, "pointer", 0)
        if pointer and not _finalizing():
            self.library.cdll.cudnnDestroy(pointer)


def make_handle(library: Library) -> Handle:
    """A new handle for the current CUDA device.

    Raises:
        CudnnError: `NOT_INITIALIZED` where there is no GPU or no driver.
    """
    pointer = c_void_p()
    check(library, library.cdll.cudnnCreate(byref(pointer)), "cudnnCreate")
    return Handle(library, pointer.value or 0)


class Spare:
    """Empty descriptors for the library to fill. Most of those asked for stay unused: as `Descriptor`s, or made anew
    each time, they would take longer than everything else that is asked of a configuration."""

    def __init__(self, library: Library, kind: DescriptorType) -> None:
        self.library, self.kind = library, kind
        self.pointers: list[int] = []

    def fill(self, count: int) -> None:
        """Have that many at least."""
        create, pointer = self.library.cdll.cudnnBackendCreateDescriptor, c_void_p()
        place = byref(pointer)
        while len(self.pointers) < count:
            status = create(self.kind, place)
            if status:
                check(self.library, status, "cudnnBackendCreateDescriptor", _name(self.kind))
            self.pointers.append(pointer.value or 0)

    def close(self) -> None:
        """Destroy them."""
        while self.pointers:
            self.library.cdll.cudnnBackendDestroyDescriptor(self.pointers.pop())


class Descriptor:
    """One backend descriptor. Destroyed with this object; keeps the descriptors and handles it was given alive.

    Args:
        library: from `library.load()`.
        kind: what it describes.

    Attributes:
        pointer: the `cudnnBackendDescriptor_t`, as a number; 0 once closed.
        finalized: `finalize` was called, or the library handed it out finalized.

    Raises:
        CudnnError: also from every method; says which call failed, with what, and why.
    """

    __slots__ = ("__weakref__", "_given", "_owned", "finalized", "kind", "library", "pointer")

    def __init__(self, library: Library, kind: DescriptorType) -> None:
        self.library = library
        self.kind = kind
        self.pointer = 0
        self.finalized = False
        self._given: set[Attribute] = set()
        self._owned: dict[Attribute, tuple[object, ...]] = {}
        pointer = c_void_p()
        status = library.cdll.cudnnBackendCreateDescriptor(kind, byref(pointer))
        if status:
            check(library, status, "cudnnBackendCreateDescriptor", _name(kind))
        self.pointer = pointer.value or 0
        _live[self.pointer] = None

    def set(self, attribute: Attribute, value: object, *, as_type: AttributeType | None = None) -> Descriptor:
        """Set an attribute and return this descriptor, so that calls can be chained.

        Args:
            attribute: its entry in `enums.Attribute` says what type the values have.
            value: one value or a sequence: numbers, truth values, enumeration members, other descriptors, a `Handle`,
                pointers as numbers (None is the null pointer); `str` or `bytes` for characters.
            as_type: another type than the table's, such as DOUBLE for the alpha of a float64 convolution.
        """
        kind = attribute.type if as_type is None else as_type
        kept: tuple[object, ...] = ()
        array: Any
        if kind is AttributeType.CHAR:
            data = value.encode() if isinstance(value, str) else bytes(value)  # type: ignore[call-overload]
            count, array = len(data), ctypes.create_string_buffer(data, len(data) + 1)
        else:
            values: Sequence[Any] = value if isinstance(value, (list, tuple)) else (value,)
            c_type = _C_TYPES.get(kind, c_int)
            if c_type is c_void_p:
                kept = tuple(item for item in values if isinstance(item, (Descriptor, Handle)))
                values = [item.pointer if isinstance(item, (Descriptor, Handle)) else item for item in values]
                if kind is not AttributeType.VOID_PTR and not all(values):
                    raise ValueError(f"{attribute.name} was given {value!r}, expected open descriptors or handles")
            if c_type in _LIMITS:
                _check_fits(attribute, values, _LIMITS[c_type])
            count, array = len(values), (c_type * len(values))(*values)
        status = self.library.cdll.cudnnBackendSetAttribute(self.pointer, attribute, kind, count, array)
        if status:
            check(self.library, status, "cudnnBackendSetAttribute", attribute.name)
        self._given.add(attribute)
        if kept:
            self._owned[attribute] = kept
        return self

    def finalize(self) -> Descriptor:
        """Check and freeze it, and do the work that belongs to its kind: ask a heuristic, build a plan.

        Raises:
            ValueError: a plan that is restored from JSON was given neither a handle nor device properties.
        """
        if Attribute.EXECUTION_PLAN_JSON_REPRESENTATION in self._given and not self._given.intersection(_PLAN_TARGETS):
            wanted = " or ".join(attribute.name for attribute in _PLAN_TARGETS)
            raise ValueError(f"{_name(self.kind)} is restored from JSON for no GPU; set {wanted} first")
        status = self.library.cdll.cudnnBackendFinalize(self.pointer)
        if status:
            check(self.library, status, "cudnnBackendFinalize", _name(self.kind))
        self.finalized = True
        return self

    def get(self, attribute: Attribute, *, as_type: AttributeType | None = None) -> list[Any]:
        """The values of an attribute: numbers, truth values, or enumeration members where the number is known.

        Args:
            attribute: any but those whose values are descriptors (`get_descriptors`) or characters (`get_text`).
            as_type: as for `set`.
        """
        kind = attribute.type if as_type is None else as_type
        _check_readable(attribute, kind)
        array = self._read(attribute, kind)
        names = _ENUMS.get(kind)
        return list(array) if names is None else [_member(names, number) for number in array]

    def get_one(self, attribute: Attribute, *, as_type: AttributeType | None = None) -> Any:
        """The value of an attribute that has one, asked for without a count; the first where it has several."""
        kind = attribute.type if as_type is None else as_type
        _check_readable(attribute, kind)
        array = (_C_TYPES.get(kind, c_int) * 1)()
        count = self._get(attribute, kind, 1, array)
        if count != 1:
            raise ValueError(f"{attribute.name} of {_name(self.kind)} has {count} values, expected 1")
        names = _ENUMS.get(kind)
        return array[0] if names is None else _member(names, array[0])

    def get_text(self, attribute: Attribute) -> str:
        """The value of an attribute of characters, such as a plan as JSON."""
        return bytes(self._read(attribute, AttributeType.CHAR)).rstrip(b"\0").decode()

    def count(self, attribute: Attribute) -> int:
        """How many values an attribute says it has; knob choices always say 0."""
        return self._get(attribute, attribute.type, 0, None)

    def _read(self, attribute: Attribute, kind: AttributeType) -> Any:
        count = self._get(attribute, kind, 0, None)
        if not 0 <= count <= MAX_VALUES:
            raise ValueError(f"{attribute.name} has {count} values, expected at most {MAX_VALUES}")
        array = (_C_TYPES.get(kind, c_int) * count)()
        got = self._get(attribute, kind, count, array) if count else 0
        return array if got >= count else array[:got]

    def _get(self, attribute: Attribute, kind: AttributeType, count: int, array: Any) -> int:
        found = c_int64(0)
        function = self.library.cdll.cudnnBackendGetAttribute
        status = function(self.pointer, attribute, kind, count, byref(found), array)
        if status:
            check(self.library, status, "cudnnBackendGetAttribute", attribute.name)
        return found.value

    def get_descriptors(
        self, attribute: Attribute, kind: DescriptorType, *, at_most: int = 1, spare: Spare | None = None
    ) -> list[Descriptor]:
        """The descriptors that an attribute holds: copies, finalized by the library and owned by the caller.

        Args:
            attribute: one whose values are descriptors.
            kind: what they describe.
            at_most: the library fills so many and drops the rest: knob choices need 46 or more (a count query
                answers 0 for them), heuristics have had up to 100 results.
            spare: takes and keeps those that stay unfilled, for callers that ask many times.
        """
        stock = Spare(self.library, kind) if spare is None else spare
        try:
            stock.fill(at_most)
            array = (c_void_p * at_most)(*stock.pointers)
            count = min(self._get(attribute, AttributeType.BACKEND_DESCRIPTOR, at_most, array), at_most)
            filled, stock.pointers = stock.pointers[:count], stock.pointers[count:]
            return [Descriptor.adopt(self.library, kind, pointer) for pointer in filled]
        finally:
            if spare is None:
                stock.close()

    @classmethod
    def adopt(cls, library: Library, kind: DescriptorType, pointer: int) -> Descriptor:
        """A descriptor that the library has filled and finalized, or that the caller is about to."""
        made = cls.__new__(cls)
        made.library, made.kind, made.pointer, made.finalized = library, kind, pointer, True
        made._given, made._owned = set(), {}
        _live[pointer] = None
        return made

    def close(self) -> None:
        """Destroy it now; again is harmless."""
        pointer, self.pointer = self.pointer, 0
        self._owned.clear()
        if pointer:
            # First forgotten, then destroyed: another thread may be given the same address right after.
            _live.pop(pointer, None)
            status = self.library.cdll.cudnnBackendDestroyDescriptor(pointer)
            check(self.library, status, "cudnnBackendDestroyDescriptor", _name(self.kind))

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        pointer = getattr(self, "pointer", 0)
        if pointer and not _finalizing():
            _live.pop(pointer, None)
            self.library.cdll.cudnnBackendDestroyDescriptor(pointer)

    def __repr__(self) -> str:
        state = "closed" if not self.pointer else "finalized" if self.finalized else "open"
        return f"<{_name(self.kind)} descriptor, {state}>"


def _check_fits(attribute: Attribute, values: Sequence[Any], limit: int) -> None:
    """ctypes would cut what is too large."""
    for value in values:
        if not -limit <= value < limit:
            raise ValueError(f"{attribute.name} was given {value}, expected -{limit} to {limit - 1}")


def _check_readable(attribute: Attribute, kind: AttributeType) -> None:
    if kind in (AttributeType.BACKEND_DESCRIPTOR, AttributeType.CHAR):
        other = "get_text" if kind is AttributeType.CHAR else "get_descriptors"
        raise TypeError(f"{attribute.name} has values of type {kind.name}; use {other}")


def _name(kind: int) -> str:
    return kind.name if isinstance(kind, IntEnum) else f"descriptor type {kind}"


def _member(names: type[IntEnum], number: int) -> int:
    """The enumeration's member; the bare number where a newer library says something this convplan has no name for."""
    try:
        return names(number)
    except ValueError:
        return number

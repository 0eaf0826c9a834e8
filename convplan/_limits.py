"""How fast this machine could compute a convolution at best: peak rates, and the time they allow.

Two rates bound a direct convolution from below: operations per time, and bytes moved per time. `peaks_of` finds both
for one problem while it is planned, and the plan's record keeps them, so that a record explained on another machine
still speaks of its own. `limit_us` turns them into a time.

A GPU's rates are worked out from what its driver says of it, by the arithmetic of its makers' data sheets, and are
theoretical: no kernel sustains them. A CPU's are measured, in milliseconds and once in a process: a matrix product, and
a copy of as many bytes as the problem moves. Nothing here is called when a plan is only looked up.

Deliberately elsewhere: what the limit looks like in a text (`report`), and what planning leaves unrun because of a rate
(`_proof`). Torch is loaded only to measure or to ask.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import msgspec

from convplan._errors import SpecError
from convplan._policy import Policy
from convplan._problem import FLOAT_DTYPES, Problem

LEAST_RATE = 1.0  # per microsecond; slower than any machine, and large enough to divide by
PROBE_SIDE, SMALL_SIDE, LARGE_SIDE, MOST_SIDE = 128, 512, 1024, 4096  # of the matrices that are multiplied
LARGE_FLOPS = 1e9  # from here on planning a problem takes so long that a large product costs nothing beside it
LONG_ENOUGH_US = 500.0  # a product that takes this long keeps every thread busy
HOPELESS = 4  # a type that is so many times slower than float32 is computed in float32 instead
LEAST_COPY_BYTES, MOST_COPY_BYTES = 2**20, 2**24
REPEATS = 3

Kind = Literal["theoretical", "measured"]


class Peaks(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine's peak rates for the arithmetic of one problem.

    Args:
        kind: `theoretical`, worked out from what the GPU says of itself, or `measured`.
        flops_per_us: operations per microsecond, a multiplication and an addition counted as two; None: unknown.
        bytes_per_us: bytes read and written per microsecond; None: unknown.
        missing: why a rate is unknown, empty when both are known.
    """

    kind: Kind
    flops_per_us: float | None = None
    bytes_per_us: float | None = None
    missing: str = ""

    def __post_init__(self) -> None:
        for name, rate in (("flops_per_us", self.flops_per_us), ("bytes_per_us", self.bytes_per_us)):
            if rate is not None and not (math.isfinite(rate) and rate >= LEAST_RATE):
                raise SpecError(
                    f"peaks.{name} is {rate}, expected a finite number of {LEAST_RATE:.0f} or more, or null"
                )


class Limit(NamedTuple):
    """The least time for a direct convolution: `us` is the larger of `flops_us` and `bytes_us`, `bound` says which."""

    us: float
    flops_us: float
    bytes_us: float
    bound: Literal["arithmetic", "memory"]


class Gpu(NamedTuple):
    """What the driver says of a GPU. Clocks are the highest it is made for; None: it does not say."""

    capability: str
    multiprocessors: int
    clock_khz: int | None
    memory_clock_khz: int | None
    memory_bus_bits: int | None


class _Rates(NamedTuple):
    """Operations per clock and multiprocessor, dense, by type of arithmetic; None: not stated, or not supported."""

    float64: int
    float32: int
    tf32: int | None
    float16: int
    bfloat16: int
    int8: int | None
    float8: int | None


# Tensor cores where the type has them, else plain units; a multiply-add is two operations. Plain rates: NVIDIA, CUDA
# C++ Programming Guide, "Throughput of Native Arithmetic Instructions". Tensor rates: NVIDIA's architecture whitepapers
# (Volta V100, Turing, Ampere A100 and GA102, Ada, Hopper H100, Blackwell datacenter and RTX), dense figures. Where
# GeForce boards halve a rate when sums are kept in float32, the full rate of the same silicon stands here.
RATES: dict[str, _Rates] = {
    "7.0": _Rates(64, 128, None, 1024, 128, None, None),
    "7.5": _Rates(4, 128, None, 1024, 128, 2048, None),
    "8.0": _Rates(128, 128, 1024, 2048, 2048, 4096, None),
    "8.6": _Rates(4, 256, 512, 1024, 1024, 2048, None),
    "8.9": _Rates(4, 256, 512, 1024, 1024, 2048, 2048),
    "9.0": _Rates(256, 256, 2048, 4096, 4096, 8192, 8192),
    "10.0": _Rates(128, 256, 4096, 8192, 8192, 16384, 16384),
    "12.0": _Rates(4, 256, 512, 1024, 1024, 2048, 2048),
}
# The highest clock that tensor cores run at, as a share of the highest clock, where they differ: NVIDIA H100
# whitepaper, table 3 (1830 of 1980 MHz for SXM5, 1620 of 1755 MHz for PCIe). Float32 and float64 run at the highest.
TENSOR_CLOCK_SHARE = {"9.0": 1830 / 1980}
_AT_FULL_CLOCK = ("float64", "float32")

DRIVER_LIBRARY = "libcuda.so.1"
# CUdevice_attribute of the driver's API.
_CLOCK_RATE, _MEMORY_CLOCK_RATE, _MEMORY_BUS_WIDTH = 13, 36, 37


def limit_us(problem: Problem, peaks: Peaks) -> Limit | None:
    """The least microseconds that the direct method needs at these rates; None where a rate is unknown.

    It counts every operation of the direct method once, and each input and the output once. What needs fewer operations
    (FFT, Winograd, skipping the zeros of padding) or finds its data in a cache can be faster.
    """
    if peaks.flops_per_us is None or peaks.bytes_per_us is None:
        return None
    flops_us, bytes_us = problem.flops / peaks.flops_per_us, problem.least_bytes / peaks.bytes_per_us
    return Limit(max(flops_us, bytes_us), flops_us, bytes_us, "arithmetic" if flops_us >= bytes_us else "memory")


def peaks_of(problem: Problem, policy: Policy, *, measure: bool = True) -> Peaks:
    """The peak rates of the device that a problem is planned on. Never fails: what cannot be found out is named.

    Args:
        problem: its device, dtype and size decide.
        policy: resolved; its `allow_tf32` decides how float32 is computed on a GPU.
        measure: rates that take milliseconds to find may be measured.
    """
    kind: Kind = "theoretical" if problem.device == "cuda" else "measured"
    try:
        if problem.device == "cuda":
            return gpu_peaks(_current_gpu(), problem.dtype, tf32=bool(policy.allow_tf32))
        if problem.device != "cpu" or problem.dtype not in FLOAT_DTYPES:
            return Peaks(kind=kind, missing=f"no rates are known for {problem.dtype} on {problem.device}")
        return _cpu_peaks(problem) if measure else Peaks(kind=kind, missing="not measured for a plan made at once")
    except Exception as exc:  # the limit is for people to read; planning goes on without it
        return Peaks(kind=kind, missing=f"{type(exc).__name__} while asking for the machine's rates")


def gpu_peaks(gpu: Gpu, dtype: str, *, tf32: bool) -> Peaks:
    """A GPU's theoretical rates: multiprocessors x clock x operations per clock, and memory clock x bus width x 2.

    Args:
        gpu: what its driver says.
        dtype: of the inputs.
        tf32: float32 may be computed as TF32.
    """
    bandwidth = None
    if gpu.memory_clock_khz and gpu.memory_bus_bits:
        bandwidth = 2 * gpu.memory_clock_khz * 1e3 * gpu.memory_bus_bits / 8 / 1e6  # two transfers in a clock
    operations, column = _operations_per_clock(gpu.capability, dtype, tf32)
    rate = None
    if operations is not None and gpu.clock_khz:
        share = 1.0 if column in _AT_FULL_CLOCK else TENSOR_CLOCK_SHARE.get(gpu.capability, 1.0)
        rate = gpu.multiprocessors * gpu.clock_khz * 1e3 * share * operations / 1e6
    missing = [
        f"no rate is known for {dtype} on a GPU of compute capability {gpu.capability}" if operations is None else "",
        "" if gpu.clock_khz else "the driver does not say the clock",
        "" if bandwidth else "the driver does not say the memory's clock and width",
    ]
    return Peaks(
        kind="theoretical", flops_per_us=rate, bytes_per_us=bandwidth, missing="; ".join(filter(None, missing))
    )


def gpu_plain_flops_per_us(dtype: str) -> float | None:
    """A rate that nothing reaches on the current GPU without tensor cores; None: unknown.

    Four times that of float32 for 16-bit types, which is the largest ratio of those that NVIDIA states.
    """
    gpu = _current_gpu()
    rates = RATES.get(gpu.capability)
    if rates is None or not gpu.clock_khz or dtype not in ("float32", "float16", "bfloat16"):
        return None
    return gpu.multiprocessors * gpu.clock_khz * 1e3 * rates.float32 * (1 if dtype == "float32" else 4) / 1e6


def gpu_bytes_per_us() -> float | None:
    """The current GPU's theoretical memory bandwidth; None: unknown."""
    return gpu_peaks(_current_gpu(), "float32", tf32=False).bytes_per_us


def _operations_per_clock(capability: str, dtype: str, tf32: bool) -> tuple[int | None, str]:
    """Operations per clock and multiprocessor, and the column of `RATES` they are from."""
    column = "float8" if dtype.startswith("float8") else dtype
    rates = RATES.get(capability)
    if rates is None or column not in _Rates._fields:
        return None, column
    if column == "float32" and tf32 and rates.tf32 is not None:
        column = "tf32"
    operations: int | None = getattr(rates, column)
    return operations, column


def _current_gpu() -> Gpu:
    import torch

    return _gpu(torch.cuda.current_device())


@functools.lru_cache(maxsize=64)
def _gpu(index: int) -> Gpu:
    """What torch or, where torch's build leaves it out, the driver says of one GPU."""
    import torch

    found = torch.cuda.get_device_properties(index)

    def ask(name: str, attribute: int) -> int | None:
        value = getattr(found, name, None)
        return int(value) if value else _driver_attribute(index, attribute)

    return Gpu(
        capability=f"{found.major}.{found.minor}",
        multiprocessors=int(found.multi_processor_count),
        clock_khz=ask("clock_rate", _CLOCK_RATE),
        memory_clock_khz=ask("memory_clock_rate", _MEMORY_CLOCK_RATE),
        memory_bus_bits=ask("memory_bus_width", _MEMORY_BUS_WIDTH),
    )


def _driver_attribute(index: int, attribute: int, library: str = DRIVER_LIBRARY) -> int | None:
    """One attribute from the driver, which torch has loaded and initialized; None where it does not answer.

    The driver's library and not the runtime's, since its name does not change with CUDA's version.
    """
    try:
        driver = ctypes.CDLL(library)
        device, value = ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)):
            return None
        if driver.cuDeviceGetAttribute(ctypes.byref(value), ctypes.c_int(attribute), device):
            return None
    except (OSError, AttributeError):
        return None
    return value.value if value.value > 0 else None


def _cpu_peaks(problem: Problem) -> Peaks:
    import torch

    threads = torch.get_num_threads()
    side = LARGE_SIDE if problem.flops >= LARGE_FLOPS else SMALL_SIDE
    rate = measured_flops_per_us("float64" if problem.dtype == "float64" else "float32", threads, side)
    # 16-bit problems may be computed in their own type or in float32, whichever is faster.
    if problem.dtype in ("bfloat16", "float16"):
        probed = measured_flops_per_us(problem.dtype, threads, PROBE_SIDE, PROBE_SIDE)
        if probed * HOPELESS > measured_flops_per_us("float32", threads, PROBE_SIDE, PROBE_SIDE):
            rate = max(rate, measured_flops_per_us(problem.dtype, threads, SMALL_SIDE))
    size = min(max(problem.least_bytes, LEAST_COPY_BYTES), MOST_COPY_BYTES)
    bandwidth = measured_bytes_per_us(1 << (size - 1).bit_length(), threads)
    return Peaks(kind="measured", flops_per_us=round(rate, 1), bytes_per_us=round(bandwidth, 1))


@functools.lru_cache(maxsize=64)
def measured_flops_per_us(dtype: str, threads: int, side: int = LARGE_SIDE, most_side: int = MOST_SIDE) -> float:
    """The CPU's rate in a matrix product, in operations per microsecond.

    Where many threads make short work of the product, larger ones follow. It never ends with a smaller one than asked
    for: on a busy machine a short product can take a hundred times as long as it should, a long one cannot.

    Args:
        dtype: a floating-point type.
        threads: torch's number of them; only tells results apart.
        side: rows and columns of the first matrices.
        most_side: of the last ones.
    """
    import torch

    best = LEAST_RATE
    while side <= most_side:
        matrix = torch.ones(side, side, dtype=getattr(torch, dtype), device="cpu")
        # With `out`, which autocast leaves alone.
        took_us = _best_us(functools.partial(torch.mm, matrix, matrix, out=torch.empty_like(matrix)))
        best = max(best, 2 * side**3 / took_us)
        if took_us >= LONG_ENOUGH_US:
            break
        side *= 2
    return best


@functools.lru_cache(maxsize=32)
def measured_bytes_per_us(size_bytes: int, threads: int) -> float:
    """Bytes per microsecond of a copy that reads and writes `size_bytes` together: what the caches hold counts.

    Args:
        size_bytes: even; the copied half is read, the other written.
        threads: torch's number of them; only tells results apart.
    """
    import torch

    source = torch.ones(size_bytes // 2, dtype=torch.uint8, device="cpu")
    target = torch.zeros_like(source)
    return max(size_bytes / _best_us(functools.partial(target.copy_, source)), LEAST_RATE)


def _best_us(call: Callable[[], object]) -> float:
    """The shortest of a few calls, the first of which also sets things up."""
    times: list[float] = []
    for _ in range(REPEATS):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return max(min(times), 1e-3)

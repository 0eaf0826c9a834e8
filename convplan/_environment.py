"""Where a plan belongs: the machine and the library versions that its timings and its correctness depend on.

A plan found in one environment is never used in another. Parts that a program can change while it runs (threads,
torch's CPU flags) are read live; the rest is read once.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import msgspec

from convplan._errors import SpecError

PROBE_FAILED = "probe failed"  # never equal to an answer of a working probe
PRECISIONS = ("matmul_precision", "conv_precision")  # that programs switch over for a part of their work
SWITCHED_OFF = "off"
_BUILT_AHEAD = ("built", "ahead of time")
_AHEAD_LABELS = ("gpu", "capability", "multiprocessors", "cudnn")  # all that such plans depend on


class Environment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, cache_hash=True):
    """A device and what is installed for it, as labelled strings.

    Args:
        device: torch device type, `cpu` or `cuda`.
        items: (label, value) pairs, such as ("threads", "2"); equal environments have equal items in equal order.
    """

    device: str
    items: tuple[tuple[str, str], ...]

    @classmethod
    def ahead_of(cls, *, gpu: str, capability: str, multiprocessors: int, cudnn: int) -> Environment:
        """Where plans belong that were built ahead of time, on a machine that does not know the rest.

        Args:
            gpu: the device's name, such as `NVIDIA H200`.
            capability: such as `9.0`.
            multiprocessors: how many the GPU has.
            cudnn: version of the library that built them, such as 91900.
        """
        values = (gpu, capability, str(multiprocessors), str(cudnn))
        return cls("cuda", (_BUILT_AHEAD, *zip(_AHEAD_LABELS, values, strict=True)))

    @property
    def is_ahead(self) -> bool:
        """Whether plans that belong here were built ahead of time, and timed nowhere."""
        return _BUILT_AHEAD in self.items

    def key_items(self) -> tuple[tuple[str, object], ...]:
        """The device and every item: all of them tell environments apart."""
        return (("device", self.device), *self.items)

    def differs_by_switches(self, other: Environment) -> bool:
        """Whether a program comes from the one to the other by switching libraries off and on, or precisions over."""
        mine, theirs = dict(self.key_items()), dict(other.key_items())
        differ = {label: (mine.get(label), theirs.get(label)) for label in {*mine, *theirs}}
        return all(SWITCHED_OFF in pair or label in PRECISIONS for label, pair in differ.items() if pair[0] != pair[1])

    def differences(self, other: Environment) -> str:
        """The items that differ, as `threads 2 -> 4, torch 2.12 -> 2.13`; this environment first."""
        mine, theirs = dict(self.key_items()), dict(other.key_items())
        labels = [*mine, *(label for label in theirs if label not in mine)]
        changed = [
            f"{k} {mine.get(k, 'absent')} -> {theirs.get(k, 'absent')}" for k in labels if mine.get(k) != theirs.get(k)
        ]
        return ", ".join(changed)

    def __str__(self) -> str:
        return f"{self.device}: " + ", ".join(f"{label} {value}" for label, value in self.items)


LiveState = tuple[int, bool, str, str]


def live_state() -> LiveState:
    """Torch's CPU settings that change which plan is best: threads, oneDNN on or off, float32 precision allowed.

    Cheap enough for every call (well under 1 µs).
    """
    import torch

    return (
        torch.get_num_threads(),
        onednn_enabled(),
        matmul_precision("cpu"),
        _onednn_conv_precision(),
    )


def matmul_precision(device: str) -> str:
    """How torch may round float32 factors now: `highest` (not), `high` (TF32) or `medium` (bfloat16).

    Torch refuses to read the old spelling once the new one was used for a backend of its own.
    """
    import torch

    try:
        return str(torch.get_float32_matmul_precision())
    except RuntimeError:
        allowed = torch._C._get_fp32_precision_getter("mkldnn" if device == "cpu" else "cuda", "matmul")
        return {"bf16": "medium", "tf32": "high"}.get(str(allowed), "highest")


def _onednn_conv_precision() -> str:
    import torch

    getter = getattr(torch._C, "_get_fp32_precision_getter", None)
    return "none" if getter is None else str(getter("mkldnn", "conv"))


def current(device: str, index: int | None = None) -> Environment:
    """The environment of a device of this process, as it is now.

    Args:
        device: torch device type.
        index: which GPU, for `cuda`; None: the current one.
    """
    if device == "cpu":
        return _cpu_environment(live_state())
    import torch

    if device == "cuda":
        if not torch.cuda.is_available():
            raise SpecError(
                "device is 'cuda', and torch finds no GPU here (torch.cuda.is_available() is False); plans are made "
                "where they run. `convplan configs --device` lists what there is for a GPU that is elsewhere"
            )
        place = torch.cuda.current_device() if index is None else index
        return _cuda_environment(place, matmul_precision("cuda"), bool(torch.backends.cudnn.enabled))
    return Environment(device, (("torch", str(torch.__version__)),))


@functools.lru_cache(maxsize=64)
def ahead_of_time(environment: Environment) -> Environment | None:
    """Where plans belong that were built elsewhere ahead of time, for the GPU and the cuDNN of a live environment.

    None for what is no GPU, and where the GPU or cuDNN could not be asked.
    """
    found = dict(environment.items)
    values = [found.get(label, PROBE_FAILED) for label in _AHEAD_LABELS]
    if environment.device != "cuda" or environment.is_ahead or PROBE_FAILED in values:
        return None
    return Environment("cuda", (_BUILT_AHEAD, *zip(_AHEAD_LABELS, values, strict=True)))


@functools.lru_cache(maxsize=64)
def _cpu_environment(state: LiveState) -> Environment:
    import torch

    threads, onednn, matmul_precision, conv_precision = state
    return Environment(
        "cpu",
        (
            ("cpu", cpu_model()),
            ("capability", _guarded(torch.backends.cpu.get_cpu_capability)),
            ("threads", str(threads)),
            ("torch", str(torch.__version__)),
            ("onednn", _onednn_version() if onednn else SWITCHED_OFF),
            ("matmul_precision", matmul_precision),
            ("conv_precision", conv_precision),
        ),
    )


@functools.lru_cache(maxsize=64)
def _cuda_environment(index: int, matmul_precision: str, cudnn: bool) -> Environment:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Environment(
        "cuda",
        (
            ("gpu", properties.name),
            ("capability", f"{properties.major}.{properties.minor}"),
            ("multiprocessors", str(properties.multi_processor_count)),
            ("torch", str(torch.__version__)),
            ("cuda", str(torch.version.cuda)),
            ("cudnn", _guarded(lambda: str(torch.backends.cudnn.version())) if cudnn else SWITCHED_OFF),
            ("matmul_precision", matmul_precision),
        ),
    )


def _guarded(probe: object) -> str:
    try:
        return str(probe())  # type: ignore[operator]
    except Exception:
        return PROBE_FAILED


@functools.lru_cache(maxsize=1)
def _onednn_version() -> str:
    """The oneDNN version torch was built with, from its own build description."""
    import re

    import torch

    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return found.group(1) if found else PROBE_FAILED


@functools.lru_cache(maxsize=1)
def cpu_model() -> str:
    """The processor's name with family, model and stepping, since cloud machines share one name among generations."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            first = file.read(65_536).split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine() or PROBE_FAILED
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    name = fields.get("model name") or fields.get("CPU part") or platform.machine() or PROBE_FAILED
    numbers = [fields[label] for label in ("cpu family", "model", "stepping") if label in fields]
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return name + (f" ({'/'.join(numbers)})" if numbers else "") + (f" limited to {isa}" if isa else "")


def onednn_computes(dtype: str) -> bool:
    """Whether torch's CPU convolutions of a dtype run on oneDNN, as things are set now and on this processor."""
    return onednn_enabled() and _onednn_has(dtype)


@functools.lru_cache(maxsize=8)
def _onednn_has(dtype: str) -> bool:
    import torch

    probes = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    if dtype in probes:
        return bool(getattr(torch.ops.mkldnn, probes[dtype])())
    return dtype == "float32"


def onednn_enabled() -> bool:
    """Whether torch may use oneDNN on the CPU."""
    import torch

    return bool(torch._C._get_mkldnn_enabled())

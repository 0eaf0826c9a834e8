"""The peak rates that the GPU of this machine reports of itself."""

from __future__ import annotations

import torch

from convplan import _limits
from convplan._limits import RATES, gpu_peaks


def test_the_driver_and_torch_agree_on_clocks_and_bus() -> None:
    gpu = _limits._current_gpu()
    assert gpu.clock_khz is not None
    assert gpu.memory_clock_khz is not None
    assert gpu.memory_bus_bits is not None
    asked = [_limits._driver_attribute(torch.cuda.current_device(), attribute) for attribute in (13, 36, 37)]
    assert asked == [gpu.clock_khz, gpu.memory_clock_khz, gpu.memory_bus_bits]
    assert 500_000 < gpu.clock_khz < 4_000_000


def test_no_matrix_product_is_faster_than_the_theoretical_peak() -> None:
    gpu = _limits._current_gpu()
    peaks = gpu_peaks(gpu, "float16", tf32=False)
    assert (peaks.flops_per_us is not None) == (gpu.capability in RATES)
    if peaks.flops_per_us is None:
        assert gpu.capability in peaks.missing
        return
    matrix = torch.zeros(8192, 8192, dtype=torch.float16, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    matrix @ matrix
    begin.record()
    for _ in range(20):
        matrix @ matrix
    end.record()
    end.synchronize()
    rate = 20 * 2 * 8192**3 / (begin.elapsed_time(end) * 1e3)
    assert rate < 1.1 * peaks.flops_per_us

"""Peak rates and the hardware limit: published figures of real boards, hand-counted operations, and what is kept."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
import torch

import convplan
from convplan import _limits, _planner
from convplan._exchange import export_plans, import_plans
from convplan._limits import Gpu, Peaks, gpu_peaks, limit_us, measured_bytes_per_us, measured_flops_per_us, peaks_of
from convplan._plan import PlanRecord
from convplan._policy import Policy
from convplan._problem import Problem
from convplan._store import PlanStore

# Multiprocessors, clocks and bus as the driver reports them.
H200 = Gpu("9.0", 132, 1_980_000, 3_201_000, 6144)
H100_PCIE = Gpu("9.0", 114, 1_755_000, 1_593_000, 5120)
V100 = Gpu("7.0", 80, 1_530_000, 877_000, 4096)
T4 = Gpu("7.5", 40, 1_590_000, 5_001_000, 256)
A100 = Gpu("8.0", 108, 1_410_000, 1_593_000, 5120)
A40 = Gpu("8.6", 84, 1_740_000, 7_251_000, 384)
L40S = Gpu("8.9", 142, 2_520_000, 9_001_000, 384)
B200 = Gpu("10.0", 148, 1_965_000, 3_996_000, 8192)
RTX_PRO_6000 = Gpu("12.0", 188, 2_617_000, 14_001_000, 512)

# TFLOP/s without sparsity, from NVIDIA's data sheets of these boards.
PUBLISHED = [
    (H200, "float16", False, 989),
    (H200, "bfloat16", False, 989),
    (H200, "float32", True, 495),
    (H200, "float32", False, 67),
    (H200, "float64", False, 67),
    (H200, "int8", False, 1979),
    (H200, "float8_e4m3fn", False, 1979),
    (H100_PCIE, "float16", False, 756),
    (H100_PCIE, "float32", True, 378),
    (H100_PCIE, "float32", False, 51),
    (V100, "float16", False, 125),
    (V100, "float32", True, 15.7),
    (V100, "float64", False, 7.8),
    (T4, "float16", False, 65),
    (T4, "float32", True, 8.1),
    (T4, "int8", False, 130),
    (A100, "bfloat16", False, 312),
    (A100, "float32", True, 156),
    (A100, "float32", False, 19.5),
    (A100, "float64", False, 19.5),
    (A40, "float16", False, 149.7),
    (A40, "float32", True, 74.8),
    (A40, "float32", False, 37.4),
    (L40S, "float16", False, 362),
    (L40S, "float8_e5m2", False, 733),
    (L40S, "float32", False, 91.6),
    (RTX_PRO_6000, "bfloat16", False, 504),
    (RTX_PRO_6000, "float32", False, 125),
    (B200, "float32", False, 75),
    (B200, "float64", False, 37),
]
BANDWIDTHS = [(H200, 4.8), (V100, 0.9), (T4, 0.32), (A100, 2.04), (A40, 0.696), (L40S, 0.864), (RTX_PRO_6000, 1.792)]

LAYER = Problem.dense("fprop", (8, 64, 56, 56), (64, 64, 3, 3), dtype="float16", padding=1, device="cuda")
DEPTHWISE = Problem.dense(
    "fprop", (32, 256, 112, 112), (256, 1, 3, 3), dtype="float16", padding=1, groups=256, device="cuda"
)


@pytest.mark.parametrize(("gpu", "dtype", "tf32", "tera"), PUBLISHED)
def test_arithmetic_rates_are_the_published_ones(gpu: Gpu, dtype: str, tf32: bool, tera: float) -> None:
    peaks = gpu_peaks(gpu, dtype, tf32=tf32)
    assert peaks.flops_per_us == pytest.approx(tera * 1e6, rel=0.015)
    assert (peaks.kind, peaks.missing) == ("theoretical", "")


def test_a_rate_published_for_a_lower_clock_is_not_understated() -> None:
    """B200's data sheet gives 2,250 for tensor cores, at a clock that no public document names: the limit stays one."""
    rate = gpu_peaks(B200, "float16", tf32=False).flops_per_us
    assert rate is not None
    assert 2250e6 <= rate <= 1.07 * 2250e6


@pytest.mark.parametrize(("gpu", "tera"), BANDWIDTHS)
def test_bandwidths_are_the_published_ones(gpu: Gpu, tera: float) -> None:
    assert gpu_peaks(gpu, "float16", tf32=False).bytes_per_us == pytest.approx(tera * 1e6, rel=0.03)


def test_a_layer_of_many_channels_is_bound_by_arithmetic() -> None:
    found = limit_us(LAYER, gpu_peaks(H200, "float16", tf32=False))
    assert found is not None
    # 2 x 8 x 64 x 56 x 56 outputs x 64 x 9 products = 1.8496 G; 2 x 3,211,264 + 73,728 bytes of half precision
    assert found.flops_us == pytest.approx(1_849_688_064 / 989e6, rel=0.02)
    assert found.bytes_us == pytest.approx((2 * 3_211_264 + 73_728) / 4.8e6, rel=0.03)
    assert (found.us, found.bound) == (found.flops_us, "arithmetic")


def test_a_depthwise_layer_is_bound_by_memory() -> None:
    found = limit_us(DEPTHWISE, gpu_peaks(H200, "float16", tf32=False))
    assert found is not None
    elements = 32 * 256 * 112 * 112
    assert found.bytes_us == pytest.approx((4 * elements + 2 * 256 * 9) / 4.8e6, rel=0.03)
    assert found.flops_us == pytest.approx(18 * elements / 989e6, rel=0.02)
    assert (found.us, found.bound) == (found.bytes_us, "memory")


SMALL = [
    pytest.param(Problem.dense("fprop", (2, 6, 5, 4), (4, 3, 3, 2), padding=1, groups=2), id="grouped"),
    pytest.param(Problem.dense("fprop", (1, 4, 6, 5), (8, 1, 3, 3), stride=2, groups=4), id="depthwise"),
    pytest.param(Problem.dense("dgrad", (2, 4, 5, 5), (6, 2, 3, 3), stride=2, padding=1, groups=2), id="dgrad"),
    pytest.param(Problem.dense("wgrad", (2, 3, 7), (4, 3, 3), dilation=2), id="wgrad-1d"),
    pytest.param(Problem.dense("fprop", (1, 2, 4, 3, 4), (2, 2, 2, 2, 2)), id="3d"),
]


@pytest.mark.parametrize("problem", SMALL)
def test_operations_are_those_of_the_definition_counted_one_by_one(problem: Problem) -> None:
    filters, per_group = problem.w.dims[0] // problem.groups, problem.x.dims[1] // problem.groups
    count = 0
    for _sample, k, *_place in itertools.product(*map(range, problem.y.dims)):
        for c in range(problem.x.dims[1]):
            if c // per_group == k // filters:  # other groups' channels do not meet
                count += sum(2 for _tap in itertools.product(*map(range, problem.w.dims[2:])))
    peaks = Peaks(kind="measured", flops_per_us=1.0, bytes_per_us=1e6)
    found = limit_us(problem, peaks)
    assert found is not None
    assert found.flops_us == count
    assert found.bytes_us == pytest.approx(4e-6 * sum(torch.empty(s.dims).numel() for s in tensors(problem)))


def tensors(problem: Problem) -> tuple[convplan.TensorSpec, ...]:
    return problem.x, problem.w, problem.y


@pytest.mark.parametrize(
    ("gpu", "dtype", "missing"),
    [
        (H200._replace(capability="9.9"), "float16", "no rate is known for float16 .*capability 9.9"),
        (V100, "int8", "no rate is known for int8 .*7.0"),
        (A100, "float8_e5m2", "no rate is known for float8_e5m2"),
        (H200._replace(clock_khz=None), "float16", "does not say the clock"),
        (H200._replace(memory_bus_bits=None), "float16", "memory's clock and width"),
    ],
)
def test_what_is_not_known_gives_no_limit_and_is_named(gpu: Gpu, dtype: str, missing: str) -> None:
    peaks = gpu_peaks(gpu, dtype, tf32=False)
    assert msgspec.json.decode(msgspec.json.encode(peaks), type=Peaks) == peaks
    assert limit_us(LAYER, peaks) is None
    with pytest.raises(AssertionError, match=missing):
        raise AssertionError(peaks.missing)


@pytest.mark.parametrize("text", ['{"kind":"measured","flops_per_us":0}', '{"kind":"measured","bytes_per_us":-4e6}'])
def test_rates_from_a_file_must_make_sense(text: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="expected a finite number of 1 or more"):
        msgspec.json.decode(text, type=Peaks)
    with pytest.raises(msgspec.ValidationError, match="kind"):
        msgspec.json.decode('{"kind":"guessed"}', type=Peaks)


PROBLEM = Problem.dense("fprop", (1, 4, 12, 12), (4, 4, 3, 3))
QUICK = Policy(engines=("aten",), budget_s=0.01)


def test_a_processor_is_measured_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = peaks_of(PROBLEM, QUICK)
    assert first.kind == "measured"
    assert first.flops_per_us is not None
    assert first.bytes_per_us is not None
    assert first.flops_per_us >= _limits.LEAST_RATE
    assert first.bytes_per_us >= _limits.LEAST_RATE

    def again(_call: object) -> float:
        raise AssertionError("measured again")

    monkeypatch.setattr(_limits, "_best_us", again)
    assert peaks_of(PROBLEM, QUICK) == first
    with pytest.raises(AssertionError, match="measured again"):
        measured_flops_per_us("float32", threads=-1)
    with pytest.raises(AssertionError, match="measured again"):
        measured_bytes_per_us(2**21, threads=-1)


@pytest.mark.parametrize(("took_us", "last_side"), [(10_000.0, 64), (100.0, 256)], ids=["long", "short"])
def test_a_product_grows_while_it_is_short_and_never_shrinks(
    monkeypatch: pytest.MonkeyPatch, took_us: float, last_side: int
) -> None:
    """A busy machine makes a small product look as slow as a large one: the size asked for is the least that counts."""
    monkeypatch.setattr(_limits, "_best_us", lambda call: call() is None or took_us)
    assert measured_flops_per_us("float32", -3, 64, 256) == max(2 * last_side**3 / took_us, 1.0)
    monkeypatch.undo()
    measured_flops_per_us.cache_clear()


def test_sixteen_bit_types_are_at_least_as_fast_as_float32() -> None:
    """They may be computed in it."""
    rates = [
        peaks_of(Problem.dense("fprop", (1, 4, 12, 12), (4, 4, 3, 3), dtype=dtype), QUICK).flops_per_us
        for dtype in ("float32", "bfloat16", "float16")
    ]
    assert all(rate is not None and rates[0] is not None and rate >= rates[0] for rate in rates)


def test_neither_a_default_device_nor_autocast_changes_what_is_measured() -> None:
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert measured_flops_per_us("float32", threads=-2) > 10
        assert measured_bytes_per_us(2**20, threads=-2) > 10


@pytest.mark.parametrize(
    ("problem", "missing"),
    [
        (Problem.dense("fprop", (1, 4, 9), (4, 4, 3), device="meta"), "no rates are known for float32 on meta"),
        (Problem.dense("fprop", (1, 4, 9), (4, 4, 3), dtype="int8", output_dtype="int32"), "for int8 on cpu"),
    ],
)
def test_other_devices_and_types_have_no_rates(problem: Problem, missing: str) -> None:
    assert missing in peaks_of(problem, QUICK).missing


def test_a_plan_made_at_once_waits_for_no_measurement() -> None:
    record = convplan.plan(PROBLEM, QUICK.replace(effort="instant"))
    assert record.peaks == Peaks(kind="measured", missing="not measured for a plan made at once")
    assert record.limit is None


def test_a_failing_probe_costs_the_limit_and_not_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Peaks:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(_limits, "_cpu_peaks", broken)
    record = convplan.plan(Problem.dense("fprop", (1, 4, 13, 13), (4, 4, 3, 3)), QUICK)
    assert record.peaks == Peaks(kind="measured", missing="RuntimeError while asking for the machine's rates")
    assert record.ranking


def test_rates_are_stored_with_the_plan_and_a_hit_asks_for_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem = Problem.dense("fprop", (1, 4, 15, 15), (4, 4, 3, 3))
    record = convplan.plan(problem, QUICK)
    assert record.limit is not None

    def asked(*_: object, **__: object) -> Peaks:
        raise AssertionError("asked for rates on a hit")

    monkeypatch.setattr(_planner, "peaks_of", asked)
    assert convplan.plan(problem, QUICK).peaks == record.peaks
    with PlanStore.default() as store:
        assert store.get(record.key) == record
        assert store.check().ok
    export_plans(tmp_path / "plans.json")
    assert import_plans(tmp_path / "plans.json", store=tmp_path / "other.sqlite").added == 1
    with PlanStore(tmp_path / "other.sqlite") as other:
        assert other.get(record.key) == record
    with pytest.raises(AssertionError, match="on a hit"):
        convplan.plan(Problem.dense("fprop", (1, 4, 14, 14), (4, 4, 3, 3)), QUICK)


def test_a_record_written_before_rates_were_kept_still_reads() -> None:
    record = convplan.plan(PROBLEM, QUICK)
    data = msgspec.to_builtins(record)
    del data["peaks"]
    for evidence in (*data["ranking"], *data["rejected"]):
        del evidence["stock"]
    old = msgspec.json.decode(msgspec.json.encode(data), type=PlanRecord)
    assert (old.peaks, old.limit, old.key) == (None, None, record.key)
    text = old.explain()
    assert "hardware limit  not known: the plan holds no peak rates of its machine" in text
    assert "stock torch     not known: torch's own way was not proposed, or the plan is older than its mark" in text


DRIVER = """
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 40; return ordinal > 1 ? 101 : 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = device == 41 && attribute == 13 ? 1980000 : attribute == 36 ? 0 : -1;
    return attribute == 37 ? 1 : 0;
}
"""


def test_the_driver_is_asked_where_torch_does_not_say(tmp_path: Path) -> None:
    """A library with the driver's two functions: the device is the one that the ordinal leads to."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = str(tmp_path / "driver.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, str(tmp_path / "driver.c")], check=True)
    assert _limits._driver_attribute(1, 13, library) == 1_980_000
    assert _limits._driver_attribute(0, 13, library) is None, "a negative number is no clock"
    assert _limits._driver_attribute(1, 36, library) is None, "nor is zero"
    assert _limits._driver_attribute(1, 37, library) is None, "the driver refuses"
    assert _limits._driver_attribute(2, 13, library) is None, "there is no such device"
    assert _limits._driver_attribute(1, 13, str(tmp_path / "none.so")) is None, "there is no driver"

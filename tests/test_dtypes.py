"""int8 and fp8 through the whole package: problems from tensors, who computes them, who refuses, what stays torch's.

How results of these dtypes are judged is tested with verification, which dtypes go together with problems.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import NARROW_DTYPES, case

import convplan
from convplan import Epilogue, Policy, Problem, SpecError
from convplan._errors import NoPlan, PlanRejected
from convplan._problem import DTYPES, FLOAT_DTYPES, OPS, Op
from convplan.engines import registry
from convplan.engines._support import TORCH_DTYPES, deliver
from convplan.engines.base import EngineConfig
from convplan.engines.fake import FakeCandidate, FakeEngine
from convplan.torch_ops.adapter import DTYPE_NAMES

QUICK = Policy(effort="instant")
narrow = pytest.mark.parametrize(
    ("dtype", "output"), [pytest.param(*pair, id="-to-".join(pair)) for pair in NARROW_DTYPES]
)


def tensor(*dims: int, dtype: str) -> torch.Tensor:
    """Integers from -2 to 2, which all dtypes hold."""
    generator = torch.Generator().manual_seed(len(dims))
    return torch.randint(-2, 3, dims, generator=generator).to(TORCH_DTYPES[dtype])


# Problems from tensors


@narrow
@pytest.mark.parametrize("op", OPS)
def test_a_problem_of_narrow_tensors_is_that_of_their_sizes(op: Op, dtype: str, output: str) -> None:
    x, w = tensor(2, 6, 9, 11, dtype=dtype), tensor(4, 3, 3, 5, dtype=dtype)
    arguments: dict[str, Any] = {"padding": (1, (0, 1)), "stride": (2, 1), "groups": 2}
    found = convplan.problem(op, x, w, **arguments, output_dtype=TORCH_DTYPES[output])
    assert found == Problem.dense(op, x.shape, w.shape, **arguments, dtype=dtype, output_dtype=output)
    assert convplan.problem(op, x, w, **arguments).output_dtype == dtype
    assert found.device == "cpu"


@pytest.mark.parametrize("op", OPS)
def test_two_fp8_types_mix_and_the_output_has_the_first_ones(op: Op) -> None:
    x, w = tensor(2, 3, 8, dtype="float8_e4m3fn"), tensor(4, 3, 3, dtype="float8_e5m2")
    assert convplan.problem(op, x, w).output_dtype == "float8_e4m3fn" if op != "wgrad" else "float8_e5m2"
    found = convplan.problem(op, x, w, output_dtype=torch.bfloat16)
    assert (found.dtype, found.output_dtype) == ("float8_e4m3fn", "bfloat16")


@pytest.mark.behaviour("B1")
def test_layout_and_alignment_are_those_of_the_tensors() -> None:
    x = tensor(2, 6, 9, 11, dtype="int8").to(memory_format=torch.channels_last)
    w = tensor(37, dtype="int8")[1:].view(4, 1, 3, 3)
    found = convplan.problem("fprop", x, w[:, :, :, :3].expand(4, 6, 3, 3))
    assert (found.x.layout, found.y.layout) == ("channels_last", "channels_last")
    assert (found.x.alignment_bytes, found.w.alignment_bytes) == (32, 1)
    assert found.w.strides == (9, 0, 3, 1)


@pytest.mark.behaviour("B5")
def test_a_transposed_convolution_of_narrow_tensors_is_a_dgrad() -> None:
    x, w, bias = tensor(2, 4, 5, 5, dtype="int8"), tensor(4, 3, 3, 3, dtype="int8"), tensor(3, dtype="int32")
    arguments: dict[str, Any] = {"stride": 2, "transposed": True, "output_padding": 1}
    found = convplan.problem("fprop", x, w, bias, **arguments, output_dtype=torch.int32)
    assert (found.op, found.dtype, found.output_dtype) == ("dgrad", "int8", "int32")
    assert found.epilogue == Epilogue(bias=True)
    assert (found.output.dims, found.inputs[0].dims) == ((2, 3, 12, 12), (2, 4, 5, 5))
    assert convplan.problem("dgrad", x, w, **arguments, output_dtype=torch.int32).op == "fprop"


def test_the_output_dtype_of_a_gradient_is_the_gradients() -> None:
    x, w = tensor(2, 3, 8, dtype="int8"), tensor(4, 3, 3, dtype="int8")
    found = convplan.problem("dgrad", x, w, output_dtype=torch.float32)
    assert [found.y.dtype, found.w.dtype, found.x.dtype] == ["int8", "int8", "float32"]


REFUSED = [
    pytest.param({"output_dtype": torch.float16}, "y float16; expected y, .* int8 or int32 or float32$", id="output"),
    pytest.param({"w": tensor(4, 3, 3, dtype="float32")}, "x int8, w float32, y int32; expected one dtype", id="mixed"),
    pytest.param({"w": tensor(4, 3, 3, dtype="int32")}, "weight is torch.int32, expected one of .*int8", id="int32"),
    pytest.param({"x": torch.zeros(2, 3, 8, dtype=torch.uint8)}, "input is torch.uint8, expected one of", id="uint8"),
    pytest.param({"bias": tensor(4, dtype="int8")}, "bias is torch.int8, expected torch.int32, the output", id="bias"),
    pytest.param({"bias": tensor(5, dtype="int32")}, r"bias.shape is \(5,\), expected \(4,\)", id="bias-length"),
    pytest.param({"w": tensor(4, 2, 3, dtype="int8")}, r"is 2, expected C/groups = 3/1 = 3", id="channels"),
    pytest.param({"w": tensor(4, 3, 9, dtype="int8")}, "filter size is 9, padded input size is 8", id="filter"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_both_sides(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"x": tensor(2, 3, 8, dtype="int8"), "w": tensor(4, 3, 3, dtype="int8")}
    good["output_dtype"] = torch.int32
    with pytest.raises(SpecError, match=message):
        convplan.problem("fprop", **{**good, **changes})


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_other_dtypes_have_their_own_output_alone(dtype: str) -> None:
    x, w = tensor(2, 3, 8, dtype=dtype), tensor(4, 3, 3, dtype=dtype)
    assert convplan.problem("fprop", x, w, output_dtype=TORCH_DTYPES[dtype]) == convplan.problem("fprop", x, w)
    other = torch.float32 if dtype != "float32" else torch.float16
    with pytest.raises(SpecError, match=f"expected y, which fprop writes, to be {dtype}$"):
        convplan.problem("fprop", x, w, output_dtype=other)


# Engines


@narrow
@pytest.mark.parametrize("name", ["aten", "matmul", "fft"])
def test_engines_without_the_arithmetic_refuse_with_the_reason(name: str, dtype: str, output: str) -> None:
    engine = registry.get(name)
    for op in OPS:
        problem = case("2d-k3").problem(op, dtype, output)
        support = engine.supports(problem)
        assert not support.ok
        assert support.reason == f"inputs are {dtype}, supported: float64, float32, bfloat16, float16"
        assert not engine.configs(problem, "measure")
        with pytest.raises(PlanRejected, match=f"inputs are {dtype}"):
            engine.build(problem, EngineConfig.of(name, **({"method": 1} if name == "matmul" else {"block": 8})), QUICK)


def test_a_problem_that_no_engine_computes_has_no_plan_and_says_why() -> None:
    with pytest.raises(NoPlan, match="inputs are int8, supported: float64, float32, bfloat16, float16"):
        convplan.plan(case("2d-k3").problem("fprop", "int8"), QUICK.replace(engines=("matmul", "fft")))


@narrow
def test_a_narrow_problem_is_planned_verified_and_run(dtype: str, output: str) -> None:
    script = [FakeCandidate(time_us=50.0), FakeCandidate(time_us=10.0, fails="wrong")]
    engine = FakeEngine(script, name="narrow")
    convplan.register_engine(engine)
    try:
        problem = case("2d-k3").problem("fprop", dtype, output)
        record = convplan.plan(problem, Policy(engines=("narrow",), budget_s=0.01))
        assert record.config.knob("index") == 0
        assert record.ranking[0].verified == "full"
        assert record.rejected[0].rejected == "verify"
        x, w = tensor(*problem.x.dims, dtype=dtype), tensor(*problem.w.dims, dtype=dtype)
        found = record.build().run(x, w)
    finally:
        registry.unregister("narrow")
    expected = deliver(F.conv2d(x.double(), w.double(), padding=1), problem.y, None)
    assert found.dtype == TORCH_DTYPES[output]
    assert torch.equal(found.double(), expected.double())


# What stays torch's


def test_the_dtypes_of_torchs_own_calls_are_a_list_of_their_own() -> None:
    assert set(DTYPE_NAMES.values()) == set(FLOAT_DTYPES)
    assert set(FLOAT_DTYPES) < set(DTYPES)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_enabled_or_not_torch_does_with_narrow_tensors_what_it_does(dtype: str, transposed: bool) -> None:
    """int8 tensors are computed, with sums that wrap around; fp8 ones are refused: as stock torch does it."""
    call = F.conv_transpose2d if transposed else F.conv2d
    x, w = tensor(2, 40, 9, 9, dtype=dtype), tensor(40, 40, 3, 3, dtype=dtype)

    def outcome() -> tuple[torch.Tensor | None, str]:
        try:
            return call(x, w, padding=1), ""
        except Exception as exc:
            return None, f"{type(exc).__name__}: {exc}"

    stock, refusal = outcome()
    with convplan.enabled(QUICK), convplan.capture() as seen:
        found, said = outcome()
    assert said == refusal
    assert (found is None) == (stock is None)
    if stock is not None and found is not None:
        assert found.dtype == stock.dtype
        assert found.stride() == stock.stride()
        assert torch.equal(found, stock)
    assert len(seen) == 0
    with pytest.raises(SpecError, match=f"dtype is torch.{dtype}, expected one of float64, .*, float16$"):
        (convplan.conv_transpose2d if transposed else convplan.conv2d)(x, w)

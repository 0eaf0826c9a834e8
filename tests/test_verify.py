"""Verification: the reference against the tests' own oracle, what is rejected with which words, what is let through.

The reference gathers products, the oracle loops over taps with slices: they share nothing but the problem. Candidates
here are outputs made by the oracle and spoilt on purpose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from helpers import oracle
from helpers.cases import CASES, DTYPE_PAIRS, NARROW_DTYPES, Case, case, with_ops

from convplan import Built, EngineConfig, Notes, Plan, Policy, Problem, TensorSpec, WrongResult, _verify
from convplan._inputs import Inputs, exact_limit, integer_inputs, random_inputs
from convplan._problem import DTYPES, FLOAT_DTYPES, INPUT_DTYPES, OPS, Op
from convplan._proof import verify_plan
from convplan._verify import Reference, Verifier
from convplan.engines._support import in_range
from convplan.engines.aten import AtenEngine
from convplan.engines.fake import FakeCandidate, FakeEngine
from convplan.engines.fft import FftEngine

CPU = torch.device("cpu")
ONE, TWO, THREE = (EngineConfig(name) for name in ("one", "two", "three"))
DIRECT, FFT = Notes(), Notes(numerical=("FFT",))
BY_RANK = [case("1d-k3"), case("2d-k3"), case("3d-k3")]
every_pair = pytest.mark.parametrize(("dtype", "output"), [pytest.param(*p, id="-to-".join(p)) for p in DTYPE_PAIRS])
every_narrow_pair = pytest.mark.parametrize(
    ("dtype", "output"), [pytest.param(*p, id="-to-".join(p)) for p in NARROW_DTYPES]
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors are tiny here: a second thread only waits."""
    torch.set_num_threads(1)


def everywhere(problem: Problem) -> torch.Tensor:
    """Every position of the output, in the form that `Reference.at` takes."""
    dims = problem.w.dims if problem.op == "wgrad" else (problem.output.dims[0], *problem.output.dims[2:])
    return torch.tensor(list(itertools.product(*map(range, dims)))).reshape(-1, len(dims))


def as_output(problem: Problem, values: torch.Tensor) -> torch.Tensor:
    """Values at `everywhere` as a tensor with the output's dims."""
    if problem.op == "wgrad":
        return values.reshape(problem.output.dims)
    dims = problem.output.dims
    return values.reshape(dims[0], *dims[2:], dims[1]).movedim(-1, 1)


def right_output(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """What an honest engine returns: the oracle's sums, rounded once, in the problem's layout."""
    answer = oracle.answer(problem, inputs)
    return laid_out(problem.output, answer.reference)


def laid_out(spec: TensorSpec, values: torch.Tensor) -> torch.Tensor:
    result = torch.empty_strided(spec.dims, spec.strides, dtype=getattr(torch, spec.dtype))
    return result.copy_(in_range(values, spec.dtype))


def plan_of(problem: Problem, run: Callable[[Inputs], torch.Tensor]) -> Plan:
    """A plan whose engine is a function of the inputs."""
    return Plan(
        problem, ONE, Built(run=lambda first, second, bias, out: run(Inputs(first, second, bias)), workspace_bytes=0)
    )


# The reference


@pytest.mark.behaviour("C3")
@pytest.mark.parametrize(("shape", "op"), [pytest.param(c, op, id=f"{c.id}-{op}") for c, op in with_ops()])
def test_reference_is_the_oracle(shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    inputs = random_inputs(problem, CPU)
    values, expected = Reference(problem, inputs).at(everywhere(problem)), oracle.answer(problem, inputs)
    torch.testing.assert_close(as_output(problem, values.sums), expected.reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(as_output(problem, values.magnitudes), expected.magnitude, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_reference_sums_in_float64_whatever_the_dtype(dtype: str, op: Op) -> None:
    problem = case("groups").problem(op, dtype)
    inputs = random_inputs(problem, CPU)
    values = Reference(problem, inputs).at(everywhere(problem))
    assert values.sums.dtype == torch.float64
    expected = oracle.answer(problem, inputs).reference
    torch.testing.assert_close(as_output(problem, values.sums), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", BY_RANK, ids=lambda c: c.id)
@pytest.mark.parametrize("op", OPS)
def test_reference_at_some_places_is_the_reference_of_those_places(shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    reference, all_positions = Reference(problem, random_inputs(problem, CPU)), everywhere(problem)
    some = torch.randperm(len(all_positions), generator=torch.Generator().manual_seed(1))[:7]
    expected = reference.at(all_positions).sums[some]
    torch.testing.assert_close(reference.at(all_positions[some]).sums, expected, rtol=1e-12, atol=1e-12)


# How much is compared


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of any size count as too large to compare in full, and few places are looked at."""
    monkeypatch.setattr(_verify, "FULL_ELEMENTS", 0)
    monkeypatch.setattr(_verify, "GATHER_ELEMENTS", 0)
    monkeypatch.setattr(_verify, "MIN_POSITIONS", 8)


@pytest.mark.parametrize("shape", BY_RANK, ids=lambda c: c.id)
@pytest.mark.parametrize("op", OPS)
def test_small_problems_are_compared_in_full(shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    positions, scope = Reference(problem, random_inputs(problem, CPU)).choose()
    assert scope == "full"
    assert torch.equal(positions, everywhere(problem))


@pytest.mark.usefixtures("sampling")
@pytest.mark.parametrize("shape", BY_RANK, ids=lambda c: c.id)
@pytest.mark.parametrize("op", OPS)
def test_large_problems_are_compared_at_different_places_with_some_corners(shape: Case, op: Op) -> None:
    problem = shape.problem(op, "float32")
    reference = Reference(problem, random_inputs(problem, CPU))
    positions, scope = reference.choose()
    rows = [tuple(row) for row in positions.tolist()]
    assert scope == "sample"
    assert 1 < len(rows) <= 8
    assert len(set(rows)) == len(rows)
    assert set(rows) <= {tuple(row) for row in everywhere(problem).tolist()}
    assert (0,) * len(rows[0]) in rows
    assert torch.equal(positions, reference.choose()[0])
    assert not torch.equal(positions, reference.choose(seed=1)[0])


def test_the_sample_of_a_large_problem_is_bounded_by_what_it_gathers() -> None:
    large = Problem.dense("fprop", (8, 256, 56, 56), (256, 256, 3, 3), padding=1)
    few = Inputs(torch.zeros(1), torch.zeros(1), None)  # choosing looks at no number
    positions, scope = Reference(large, few).choose()
    assert scope == "sample"
    assert _verify.MIN_POSITIONS <= len(positions) <= max(_verify.GATHER_ELEMENTS / (256 * 9), _verify.MIN_POSITIONS)


# A dropped tap


def without_one_product(problem: Problem, inputs: Inputs, which: tuple[int, ...]) -> torch.Tensor:
    """The output of an engine that forgets one filter tap, or for wgrad one place that it sums over."""
    first, second = inputs.first.double(), inputs.second.double().clone()
    second[(slice(None), slice(None), *which)] = 0.0
    return laid_out(problem.output, oracle.convolve(problem, first, second))


@pytest.mark.behaviour("C3")
@pytest.mark.parametrize("scope", ["full", "sample"])
@every_pair
@pytest.mark.parametrize("shape", BY_RANK, ids=lambda c: c.id)
@pytest.mark.parametrize("op", OPS)
def test_a_dropped_filter_tap_is_rejected(
    request: pytest.FixtureRequest, shape: Case, op: Op, dtype: str, output: str, scope: str
) -> None:
    if scope == "sample":
        if output.startswith("float8"):
            output = "bfloat16"  # eight numbers of 3 or 4 bits cannot tell one product of 54 from rounding
        request.getfixturevalue("sampling")
    problem = shape.problem(op, dtype, output)
    words = "must come out exactly" if dtype == "int8" else "x tolerance"
    verifier = Verifier(problem, CPU)
    assert verifier.scope == scope
    assert verifier.check(ONE, DIRECT, right_output(problem, verifier.random)) <= 1
    for where in (0, -1):  # the first and the last tap
        wrong = without_one_product(problem, verifier.random, (where,) * problem.spatial_rank)
        with pytest.raises(WrongResult, match=words) as caught:
            verifier.check(TWO, DIRECT, wrong)
        assert (caught.value.engine, caught.value.config) == ("two", "two")
        with pytest.raises(WrongResult):
            verifier.check(TWO, FFT, wrong)


@every_pair
@pytest.mark.parametrize("op", OPS)
def test_integers_find_a_dropped_tap_too(op: Op, dtype: str, output: str) -> None:
    problem = case("2d-k3").problem(op, dtype, output)
    verifier = Verifier(problem, CPU)
    with pytest.raises(WrongResult, match="small integers must come out exactly"):
        verifier.check_exactly(
            ONE, lambda first, second, bias, out: without_one_product(problem, Inputs(first, second, bias), (0, 0))
        )


def test_a_forgotten_bias_is_rejected() -> None:
    problem = case("bias").problem("fprop", "float32")
    verifier = Verifier(problem, CPU)
    with pytest.raises(WrongResult, match="the reference"):
        verifier.check(ONE, DIRECT, right_output(problem, verifier.random._replace(bias=None)))


@pytest.mark.parametrize("op", OPS)
def test_the_message_names_the_place_and_both_values(op: Op) -> None:
    problem = case("2d-k3").problem(op, "float32")
    verifier = Verifier(problem, CPU)
    out = right_output(problem, verifier.random)
    expected = float(out[1, 2, 2, 1])
    out[1, 2, 2, 1] = 1000.0
    with pytest.raises(WrongResult) as caught:
        verifier.check(ONE, DIRECT, out)
    assert f"output[1, 2, 2, 1] is 1000, the reference {expected:.6g}" in caught.value.reason


def test_error_is_measured_in_tolerances() -> None:
    problem = case("1d-k3").problem("fprop", "float32")
    verifier = Verifier(problem, CPU)
    answer = oracle.answer(problem, verifier.random)
    for share in (0.25, 0.75):
        found = verifier.check(ONE, DIRECT, (answer.reference + share * answer.bound).float())
        assert found == pytest.approx(share, abs=0.3)
    with pytest.raises(WrongResult):
        verifier.check(ONE, DIRECT, (answer.reference + 1.5 * answer.bound).float())


# Places that the sample misses

UNSAMPLED = [pytest.param(op, value, id=f"{op}-{value}") for op in OPS for value in (1000.0, math.nan, math.inf)]


def spoilt(problem: Problem, verifier: Verifier, value: float) -> tuple[torch.Tensor, list[int]]:
    """The right output but for one element, at a place that is not in the sample."""
    out = right_output(problem, verifier.random)
    sampled = {tuple(row) for row in verifier._positions.tolist()}
    place = next(row for row in everywhere(problem).tolist()[::-1] if tuple(row) not in sampled)
    where = place if problem.op == "wgrad" else [place[0], 1, *place[1:]]
    out[tuple(where)] = value
    return out, where


@pytest.mark.behaviour("C3")
@pytest.mark.usefixtures("sampling")
@pytest.mark.parametrize(("op", "value"), UNSAMPLED)
def test_an_error_that_the_sample_misses_is_found_by_comparing_with_the_trusted_candidate(op: Op, value: float) -> None:
    problem = case("2d-k3").problem(op, "float32")
    verifier = Verifier(problem, CPU)
    out, where = spoilt(problem, verifier, value)
    verifier.check(ONE, DIRECT, right_output(problem, verifier.random))
    with pytest.raises(WrongResult) as caught:
        verifier.check(TWO, DIRECT, out)
    assert f"output{where} is {value:.6g}" in caught.value.reason
    assert verifier.condemned == {}


@pytest.mark.behaviour("C3")
@pytest.mark.usefixtures("sampling")
@pytest.mark.parametrize(("op", "value"), UNSAMPLED)
def test_the_reference_condemns_the_first_candidate_when_that_is_the_wrong_one(op: Op, value: float) -> None:
    problem = case("2d-k3").problem(op, "float32")
    verifier = Verifier(problem, CPU)
    out, where = spoilt(problem, verifier, value)
    right = right_output(problem, verifier.random)
    assert verifier.check(ONE, DIRECT, out) <= 1  # nobody can tell yet
    assert verifier.check(TWO, DIRECT, right) <= 1
    assert list(verifier.condemned) == [ONE]
    assert f"output{where} is {value:.6g}" in verifier.condemned[ONE]
    # The second one is trusted from now on.
    verifier.check(THREE, DIRECT, right)
    with pytest.raises(WrongResult):
        verifier.check(ONE, DIRECT, out)


@pytest.mark.usefixtures("sampling")
def test_honest_candidates_that_round_differently_are_not_condemned() -> None:
    for (dtype, output), op in itertools.product(DTYPE_PAIRS, OPS):
        problem = case("2d-k3").problem(op, dtype, output)
        verifier = Verifier(problem, CPU)
        answer = oracle.answer(problem, verifier.random)
        for number, share in enumerate((-0.4, 0.4, 0.0)):
            out = laid_out(problem.output, answer.reference + share * answer.bound)
            verifier.check(EngineConfig(f"e{number}"), DIRECT, out)
        assert verifier.condemned == {}


# NaN, infinity and form


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("notes", [DIRECT, FFT], ids=["direct", "fft"])
@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_is_wrong(op: Op, notes: Notes, value: float) -> None:
    problem = case("1d-k3").problem(op, "float32")
    verifier = Verifier(problem, CPU)
    out = right_output(problem, verifier.random)
    out[1, 1, 1] = value
    with pytest.raises(WrongResult, match=rf"output\[1, 1, 1\] is {value:.6g}, the reference .* inf x tolerance"):
        verifier.check(ONE, notes, out)


FORMS = [
    pytest.param(
        lambda out: out[:, :-1], r"output is \(2, 3, 7, 6\) torch.float32, expected \(2, 4, 7, 6\)", id="shape"
    ),
    pytest.param(lambda out: out[None], r"output is \(1, 2, 4, 7, 6\)", id="rank"),
    pytest.param(lambda out: out.double(), r"torch.float64, expected \(2, 4, 7, 6\) float32", id="dtype"),
    pytest.param(
        lambda out: out.to(memory_format=torch.channels_last),
        r"output has strides \(168, 1, 24, 4\), expected \(168, 42, 6, 1\)",
        id="strides",
    ),
]


@pytest.mark.parametrize(("change", "message"), FORMS)
def test_another_form_than_the_problem_says_is_wrong(
    change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    problem = case("2d-k3").problem("fprop", "float32")
    verifier = Verifier(problem, CPU)
    with pytest.raises(WrongResult, match=message):
        verifier.check(ONE, DIRECT, change(right_output(problem, verifier.random)))


def test_strides_of_size_one_dimensions_are_nobodys_fault() -> None:
    problem = Problem.dense("fprop", (1, 2, 5, 1), (3, 2, 2, 1))
    verifier = Verifier(problem, CPU)
    out = right_output(problem, verifier.random)
    verifier.check(ONE, DIRECT, out.as_strided(out.shape, (77, 4, 1, 55)))


# Engines that misbehave


@pytest.mark.behaviour("B28")
@pytest.mark.parametrize("name", ["first", "second", "bias"])
def test_writing_to_an_input_is_wrong_and_undone(name: str) -> None:
    problem = case("bias").problem("fprop", "float32")
    verifier = Verifier(problem, CPU)
    right = right_output(problem, verifier.random)
    kept = [tensor.clone() for tensor in verifier.random.tensors()]
    getattr(verifier.random, name)[-1] += 1
    with pytest.raises(WrongResult, match="it wrote to its inputs"):
        verifier.check(ONE, DIRECT, right)
    for tensor, before in zip(verifier.random.tensors(), kept, strict=True):
        assert tensor is not None
        assert torch.equal(tensor, before)
    assert verifier.check(TWO, DIRECT, right) <= 1  # the next one is judged on the numbers of before


def test_handing_out_the_same_memory_twice_is_wrong() -> None:
    """The user's first result would change under his hands at the second call."""
    problem = case("2d-k3").problem("fprop", "float32")
    buffer = torch.empty(problem.output.dims)
    with pytest.raises(WrongResult):
        verify_plan(plan_of(problem, lambda inputs: buffer.copy_(right_output(problem, inputs))))


# Small integers


def one_ulp_off(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """Within any tolerance, and still not what a plain sum of products gives."""
    right = right_output(problem, inputs)
    return laid_out(problem.output, torch.nextafter(right, torch.full_like(right, math.inf)))


def summed_in_bfloat16(problem: Problem, inputs: Inputs) -> torch.Tensor:
    """Every partial sum rounded to 8 bits."""
    out = oracle.convolve(problem, inputs.first.bfloat16(), inputs.second.bfloat16())
    return laid_out(problem.output, out)


@pytest.mark.parametrize("op", OPS)
def test_off_by_one_on_integers_is_no_rounding(op: Op) -> None:
    problem = case("2d-k3").problem(op, "float32")
    plan = plan_of(problem, lambda inputs: right_output(problem, inputs) + 1)
    with pytest.raises(WrongResult, match=r"small integers must come out exactly: output.* is .*, not"):
        Verifier(problem, CPU).check_exactly(ONE, plan.unchecked_run)


def test_off_by_one_is_no_rounding_of_a_long_sum_either() -> None:
    """Where a transform may err by dozens on other numbers."""
    problem = Problem.dense("wgrad", (16, 2, 64, 64), (2, 2, 1, 1))
    verifier = Verifier(problem, CPU)
    plan = plan_of(problem, lambda inputs: right_output(problem, inputs) + 1)
    with pytest.raises(WrongResult, match="small integers must come out exactly"):
        verifier.check_exactly(ONE, plan.unchecked_run)


@pytest.mark.parametrize("op", OPS)
def test_off_by_a_rounding_passes_the_tolerance_and_is_seen_on_integers(op: Op) -> None:
    problem = case("2d-k3").problem(op, "float32")
    verifier = Verifier(problem, CPU)
    assert verifier.check(ONE, DIRECT, one_ulp_off(problem, verifier.random)) <= 1
    run = plan_of(problem, lambda inputs: one_ulp_off(problem, inputs)).unchecked_run
    assert verifier.check_exactly(ONE, run) is False
    error, scope = verify_plan(plan_of(problem, lambda inputs: one_ulp_off(problem, inputs)), FFT)
    assert error <= 1
    assert scope == "full"


def test_sums_in_a_narrower_type_fail_on_integers() -> None:
    problem = Problem.dense("fprop", (2, 500, 8), (3, 500, 3))
    verifier = Verifier(problem, CPU)
    with pytest.raises(WrongResult, match="small integers must come out exactly"):
        verifier.check_exactly(
            ONE, lambda first, second, bias, out: summed_in_bfloat16(problem, Inputs(first, second, bias))
        )
    run = plan_of(problem, lambda inputs: right_output(problem, inputs)).unchecked_run
    assert verifier.check_exactly(ONE, run) is True


@every_pair
@pytest.mark.parametrize("terms", [27, 3_000, 30_000])
def test_integers_are_chosen_so_that_their_sums_are_exact(dtype: str, output: str, terms: int) -> None:
    problem = Problem.dense("fprop", (2, terms // 3, 5), (4, terms // 3, 3), dtype=dtype, output_dtype=output)
    inputs = integer_inputs(problem, CPU)
    for tensor in inputs[:2]:
        assert tensor is not None
        assert set(tensor.double().unique().tolist()) <= {-2, -1, 0, 1, 2}
        assert float(tensor.double().abs().max()) == 2
    # Whole numbers of that size are exact in float64, whoever sums them; the loops of the oracle would take seconds.
    x, w = inputs.first.double(), inputs.second.double()
    sums, magnitudes = torch.nn.functional.conv1d(x, w), torch.nn.functional.conv1d(x.abs(), w.abs())
    limit = exact_limit(problem)
    assert limit <= min(DTYPES[output].largest, 2.0 ** DTYPES[output].significand_bits)
    assert float((magnitudes <= limit).double().mean()) > 0.95
    # And still not all of them vanish; where sums beyond 8 are not exact, more of them do.
    assert float((sums != 0).double().mean()) > (0.5 if limit > 8 else 0.3)


# What is let through


@pytest.mark.behaviour("B4")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_honest_results_of_every_case_are_within_tolerance(dtype: str, op: Op) -> None:
    engine, policy = AtenEngine(), Policy(deterministic=False, allow_tf32=False)
    cases = CASES if dtype == "float32" else CASES[::3]
    for shape in (c for c in cases if op in c.ops):
        problem = shape.problem(op, dtype)
        candidate = engine.configs(problem, "measure")[0]
        plan = Plan(problem, candidate.config, engine.build(problem, candidate.config, policy))
        error, scope = verify_plan(plan, candidate.notes)
        assert error <= 1, shape.id
        assert scope == "full", shape.id


@pytest.mark.behaviour("B4")
@every_narrow_pair
@pytest.mark.parametrize("op", OPS)
def test_honest_int8_and_fp8_results_pass(dtype: str, output: str, op: Op) -> None:
    engine, policy = FakeEngine([FakeCandidate(time_us=0.0)]), Policy(deterministic=False, allow_tf32=False)
    for shape in (c for c in CASES[::3] if op in c.ops):
        problem = shape.problem(op, dtype, output)
        config = engine.configs(problem, "measure")[0].config
        error, scope = verify_plan(Plan(problem, config, engine.build(problem, config, policy)))
        assert error <= (0 if dtype == "int8" else 1), shape.id
        assert scope == "full", shape.id


@every_narrow_pair
def test_int8_is_compared_exactly_and_fp8_in_steps_of_the_output(dtype: str, output: str) -> None:
    problem = case("2d-k3").problem("fprop", dtype, output)
    verifier = Verifier(problem, CPU)
    sums = oracle.answer(problem, verifier.random).reference
    if dtype == "int8":
        with pytest.raises(WrongResult, match=r"must come out exactly: output\[1, 2, 3, 4\] is"):
            verifier.check(ONE, DIRECT, one_more(problem, sums, 1.0))
        return
    steps = 2.0 ** (1 - DTYPES[output].significand_bits) * sums.abs()
    assert verifier.check(ONE, DIRECT, laid_out(problem.output, sums + 0.4 * steps)) <= 1
    with pytest.raises(WrongResult, match=r"output\[1, 2, 3, 4\] is .* x tolerance"):
        verifier.check(ONE, DIRECT, one_more(problem, sums, float(8 * steps[1, 2, 3, 4] + 0.05)))


def one_more(problem: Problem, sums: torch.Tensor, added: float) -> torch.Tensor:
    """The output but for one element."""
    wrong = sums.clone()
    wrong[1, 2, 3, 4] += added
    return laid_out(problem.output, wrong)


@pytest.mark.parametrize("output", ["float8_e4m3fn", "bfloat16", "float32"])
def test_fp8_sums_may_keep_the_fourteen_bits_that_hardware_does_and_not_five(output: str) -> None:
    problem = Problem.dense("fprop", (1, 1536, 8), (2, 1536, 3), dtype="float8_e4m3fn", output_dtype=output)
    verifier = Verifier(problem, CPU)
    x, w = verifier.random.first.double(), verifier.random.second.double()
    for bits, passes in ((14, True), (5, False)):
        partial = torch.zeros(problem.y.dims, dtype=torch.float64)
        for c, tap in itertools.product(range(0, 1536, 32), range(3)):  # 32 products at a time, then cut
            partial += torch.einsum("ncp,kc->nkp", x[:, c : c + 32, tap : tap + 6], w[:, c : c + 32, tap])
            step = 2.0 ** (partial.abs().clamp(min=1e-9).log2().floor() - (bits - 1))
            partial = (partial / step).trunc() * step
        if passes:
            assert verifier.check(ONE, DIRECT, laid_out(problem.output, partial)) <= 1
        else:
            with pytest.raises(WrongResult, match="x tolerance"):
                verifier.check(TWO, DIRECT, laid_out(problem.output, partial))


@pytest.mark.usefixtures("sampling")
@every_narrow_pair
@pytest.mark.parametrize("op", OPS)
def test_every_int8_and_fp8_output_is_compared_with_the_trusted_candidates(dtype: str, output: str, op: Op) -> None:
    problem = case("2d-k3").problem(op, dtype, output)
    verifier = Verifier(problem, CPU)
    right = right_output(problem, verifier.random)
    sampled = {tuple(row) for row in verifier._positions.tolist()}
    place = next(row for row in everywhere(problem).tolist()[::-1] if tuple(row) not in sampled)
    where = tuple(place if op == "wgrad" else [place[0], 1, *place[1:]])
    wrong = right.double()
    wrong[where] = 64.0 if float(wrong[where]) < 32 else -64.0
    verifier.check(ONE, DIRECT, right)
    with pytest.raises(WrongResult, match=f"output\\[{', '.join(map(str, where))}\\] is -?64"):
        verifier.check(TWO, DIRECT, laid_out(problem.output, wrong))
    assert verifier.condemned == {}
    verifier.check(THREE, DIRECT, right)


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127.0), ("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)])
@pytest.mark.parametrize("terms", [3, 3_000, 300_000])
def test_made_up_numbers_keep_outputs_in_range(dtype: str, largest: float, terms: int) -> None:
    problem = Problem.dense("fprop", (1, terms // 3, 6), (4, terms // 3, 3), dtype=dtype)
    inputs = random_inputs(problem, CPU)
    sums = torch.nn.functional.conv1d(inputs.first.double(), inputs.second.double())
    assert float(sums.abs().max()) <= largest
    assert float(sums.abs().max()) > 1  # and do not vanish either
    assert float((sums != 0).double().mean()) > 0.5


@pytest.mark.parametrize(("output", "least"), [("int32", 100), ("float32", 40), ("int8", 2)])
def test_int8_inputs_use_the_range_that_their_sums_leave_them(output: str, least: int) -> None:
    problem = Problem.dense("fprop", (4, 1024, 12), (8, 1024, 3), dtype="int8", output_dtype=output)
    inputs = random_inputs(problem, CPU)
    largest = [int(tensor.abs().max()) for tensor in (inputs.first, inputs.second)]
    assert min(largest) >= least
    assert max(largest) <= 127
    magnitudes = torch.nn.functional.conv1d(inputs.first.double().abs(), inputs.second.double().abs())
    assert float(magnitudes.max()) <= exact_limit(problem)


def test_what_a_type_cannot_hold_is_expected_to_saturate() -> None:
    for dtype, ends in {"int8": (-128.0, 127.0), "float8_e4m3fn": (-448.0, 448.0)}.items():
        values = torch.tensor([-1e6, 1e6, 3.0], dtype=torch.float64)
        assert in_range(values, dtype).tolist() == [*ends, 3.0]
        assert torch.equal(in_range(values, "float16"), values)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_bias_has_the_dtype_of_the_output(dtype: str) -> None:
    problem = case("bias").problem("fprop", dtype, "float32")
    for make in (random_inputs, integer_inputs):
        bias = make(problem, CPU).bias
        assert bias is not None
        assert bias.dtype == torch.float32
        assert float(bias.abs().max()) > 0


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_writing_to_a_narrow_input_is_wrong_and_undone(dtype: str) -> None:
    problem = case("2d-k3").problem("fprop", dtype)
    verifier = Verifier(problem, CPU)
    right, before = right_output(problem, verifier.random), verifier.random.first.double()
    verifier.random.first.copy_(before + 2)
    with pytest.raises(WrongResult, match="it wrote to its inputs"):
        verifier.check(ONE, DIRECT, right)
    assert torch.equal(verifier.random.first.double(), before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_honest_transforms_are_within_their_own_tolerance(dtype: str, op: Op) -> None:
    engine, policy = FftEngine(), Policy(deterministic=False, allow_tf32=False)
    problem = case("1d-long-filter").problem(op, dtype)
    for candidate in engine.configs(problem, "measure"):
        assert not candidate.notes.direct
        plan = Plan(problem, candidate.config, engine.build(problem, candidate.config, policy))
        assert verify_plan(plan, candidate.notes)[0] <= 1


# The tensors that planning makes up

LAYOUTS = [
    "2d-k3",
    "channels-last",
    "3d-channels-last",
    "expanded",
    "spaced",
    "swapped",
    "offset",
    "bias",
    "1x1-swapped",
]


@pytest.mark.behaviour("B1")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("make", [random_inputs, integer_inputs])
def test_made_up_tensors_lie_in_memory_as_the_problem_says(make: Callable[..., Inputs], name: str) -> None:
    problem = case(name).problem("fprop", "float32")
    inputs = make(problem, CPU)
    for tensor, spec in zip(inputs, problem.inputs, strict=False):
        assert tensor is not None
        assert tuple(tensor.shape) == spec.dims
        assert TensorSpec(tuple(tensor.shape), tensor.stride(), "float32", spec.alignment_bytes) == spec
        assert tensor.data_ptr() % spec.alignment_bytes == 0
        assert spec.alignment_bytes == 32 or tensor.data_ptr() % (2 * spec.alignment_bytes)
    assert (inputs.bias is not None) == problem.epilogue.bias
    assert inputs.bias is None or tuple(inputs.bias.shape) == (problem.output.dims[1],)


@pytest.mark.parametrize("make", [random_inputs, integer_inputs])
def test_made_up_numbers_repeat_with_their_seed(make: Callable[..., Inputs]) -> None:
    problem = case("2d-k3").problem("fprop", "float32")
    torch.manual_seed(1)
    one = make(problem, CPU, 5)
    state = torch.get_rng_state()
    same, other = make(problem, CPU, 5), make(problem, CPU, 6)
    assert torch.equal(torch.get_rng_state(), state)  # the user's own random numbers go on as they would
    assert all(torch.equal(a, b) for a, b in zip(one[:2], same[:2], strict=True))
    assert not torch.equal(one.first, other.first)
    assert not torch.equal(one.first.flatten()[:36], one.second.flatten()[:36])

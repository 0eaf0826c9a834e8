"""What a worker watches while a candidate runs, and what it does with what it was told: in this process, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest
import torch
from helpers.cases import CASES

from convplan import EngineConfig, Evidence, Policy, Problem, TensorSpec
from convplan._epilogue import Epilogue
from convplan._guards import GUARD_BYTES, LEAK_BYTES, Bench, Fingerprints, Guarded, checksum, leak
from convplan._inputs import random_inputs
from convplan._problem import OPS
from convplan._torch_state import adopt_torch_state, torch_state
from convplan._verify import Verifier
from convplan._worker_messages import Answer, Ended, Race, Raced, Racer, Ready, Request, Stage, Tried, Try
from convplan.engines.base import Candidate

CPU = torch.device("cpu")
PROBLEM = Problem.dense("fprop", (2, 3, 7, 6), (4, 3, 3, 2), padding=1, epilogue=Epilogue(bias=True))


@pytest.mark.parametrize("alignment", [2, 4, 8, 16, 32])
def test_guarded_tensors_have_the_alignment_that_the_problem_says(alignment: int) -> None:
    spec = TensorSpec((2, 3, 5, 5), (75, 25, 5, 1), "float16", alignment_bytes=alignment)
    address = Guarded(spec, CPU, "input").tensor.data_ptr()
    assert address % alignment == 0
    assert alignment == 32 or address % (2 * alignment)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", OPS)
def test_the_bench_has_the_same_numbers_in_the_same_layout(op: Any, layout: str) -> None:
    problem = Problem.dense(op, (2, 3, 7, 6), (4, 3, 3, 2), padding=1, layout=layout)
    numbers = random_inputs(problem, CPU)
    bench = Bench(problem, numbers, CPU)
    for mine, given in zip(bench.inputs[:2], numbers[:2], strict=True):
        assert mine is not None
        assert given is not None
        assert torch.equal(mine, given)
        assert mine.stride() == given.stride()
        assert mine.data_ptr() != given.data_ptr()
    output = bench.fresh_output()
    assert tuple(output.shape) == problem.output.dims
    assert bool(output.isnan().all())
    assert bench.trouble() == ""


def test_an_expanded_input_can_be_guarded() -> None:
    problem = Problem(
        op="fprop",
        x=TensorSpec((2, 3, 7, 6), (0, 42, 6, 1), "float32"),
        w=TensorSpec.dense((4, 3, 3, 2), "float32"),
        y=TensorSpec.dense((2, 4, 5, 5), "float32"),
        padding=((0, 0), (0, 0)),
        stride=(1, 1),
        dilation=(1, 1),
    )
    numbers = random_inputs(problem, CPU)
    bench = Bench(problem, numbers, CPU)
    assert torch.equal(bench.inputs.first, numbers.first)
    assert bench.inputs.first.stride() == (0, 42, 6, 1)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "int8", "float8_e4m3fn"])
def test_numbers_of_every_type_are_the_same_in_guarded_memory(dtype: str) -> None:
    problem = Problem.dense("fprop", (2, 4, 7, 6), (4, 4, 3, 2), padding=1, dtype=dtype)
    numbers = random_inputs(problem, CPU)
    bench = Bench(problem, numbers, CPU)
    assert torch.equal(bench.inputs.first.view(torch.uint8), numbers.first.view(torch.uint8))


def test_a_bias_is_guarded_too() -> None:
    bench = Bench(PROBLEM, random_inputs(PROBLEM, CPU), CPU)
    assert bench.inputs.bias is not None
    assert bench.inputs.bias.shape == (4,)
    beyond(bench.inputs.bias, 4)
    assert "past the end of its bias, the first at +0" in bench.trouble()


def beyond(tensor: torch.Tensor, element: int, value: float = 0.0) -> None:
    """Write as a pointer would, not looking at the shape."""
    raw = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    raw[tensor.storage_offset() + element] = value


@pytest.mark.parametrize(
    ("element", "text"),
    [
        (168, "it wrote 4 bytes past the end of its output, the first at +0"),
        (170, "it wrote 4 bytes past the end of its output, the first at +8"),
        (168 + GUARD_BYTES // 4 - 1, "past the end"),
        (-1, "it wrote 4 bytes before the beginning of its output, the first at -4"),
        (-(GUARD_BYTES // 4), "before the beginning"),
    ],
)
def test_a_write_outside_is_seen_wherever_it_lands(element: int, text: str) -> None:
    guarded = Guarded(TensorSpec((2, 4, 7, 3), (84, 21, 3, 1), "float32"), CPU, "output")
    guarded.clear()
    guarded.tensor.fill_(1.0)
    assert guarded.trouble() == ""
    beyond(guarded.tensor, element)
    assert text in guarded.trouble()


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 5_000_000])
def test_every_changed_byte_changes_the_checksum(size: int) -> None:
    tensor = torch.randint(0, 255, (size,), dtype=torch.uint8)
    before = checksum(tensor)
    assert checksum(tensor.clone()) == before
    for place in {0, size // 2, size - 1}:
        changed = tensor.clone()
        changed[place] += 1
        assert checksum(changed) != before


def test_values_that_change_places_change_the_checksum() -> None:
    tensor = torch.arange(100.0, dtype=torch.float64)
    assert checksum(tensor.flip(0)) != checksum(tensor)


def test_what_outputs_are_compared_with_is_fingerprinted() -> None:
    verifier = Verifier(PROBLEM, CPU)
    verifier.check(EngineConfig("one"), Candidate(EngineConfig("one")).notes, right_answer(verifier))
    fingerprints = Fingerprints(verifier, leave_out=("_last_out",))
    assert not fingerprints.changed()
    assert verifier._values is not None
    verifier._values.sums[0, 0] += 1e-9
    assert fingerprints.changed()


def right_answer(verifier: Verifier) -> torch.Tensor:
    from convplan.engines.fake import convolve_by_taps

    return convolve_by_taps(PROBLEM, *verifier.random[:3]).float()


def test_memory_that_grows_at_every_batch_is_a_leak() -> None:
    kept: list[bytes] = []
    reason = leak(lambda: kept.append(b"\x01" * 2 * LEAK_BYTES), 2, CPU)
    assert "grows by" in reason
    assert len(kept) == 6


def test_memory_that_is_kept_once_or_given_back_is_none() -> None:
    kept: list[bytes] = []

    def once() -> None:
        if not kept:
            kept.append(b"\x01" * 8 * LEAK_BYTES)

    assert leak(once, 2, CPU) == ""
    assert leak(lambda: torch.ones(LEAK_BYTES), 4, CPU) == ""


def test_messages_come_back_as_they_went() -> None:
    config = EngineConfig.of("fft", block=64)
    candidate = Candidate(config, workspace_bytes=None, flops=2.0)
    evidence = Evidence(config=config, rejected="crash", reason="SIGSEGV")
    requests: list[Request] = [Try(candidate, None), Race((Racer(candidate, 1.0, 0.5, "full"),), 0.1)]
    answers: list[Answer] = [
        Ready({"one": "missing"}),
        Stage("racing", 1.0, config),
        Ended(-11),
        Tried(evidence, 2.0, "lost"),
        Raced((evidence,), (evidence,)),
    ]
    for request in requests:
        assert msgspec.json.decode(msgspec.json.encode(request), type=Request) == request
    for answer in answers:
        assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer


def test_torchs_settings_are_taken_over_and_given_back() -> None:
    before = torch_state()
    try:
        wanted = msgspec.structs.replace(before, threads=1, matmul_precision="high", cudnn_deterministic=True)
        adopt_torch_state(wanted)
        assert torch_state() == wanted
    finally:
        adopt_torch_state(before)
    assert torch_state() == before


def test_the_program_is_of_no_use_on_a_command_line() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "convplan._worker"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "has no use on a command line" in done.stderr


@pytest.mark.parametrize("case", CASES[:6], ids=lambda case: case.id)
def test_policies_and_problems_of_every_kind_can_be_told(case: Any) -> None:
    problem = case.problem("fprop", "float32")
    assert msgspec.json.decode(msgspec.json.encode(problem), type=Problem) == problem
    assert msgspec.json.decode(msgspec.json.encode(Policy()), type=Policy) == Policy()

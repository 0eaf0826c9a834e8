"""Every plan of every source is built, run and compared with a float64 reference computed by a plain loop."""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest
import torch
from gpu_cases import RUNS, GpuCase
from helpers import oracle

from convplan._inputs import SUM_BITS, Inputs
from convplan._policy import Policy
from convplan._problem import Op, Problem
from convplan._verify import SHORT_SUM_FACTOR, TF32_BITS
from convplan.engines.base import Candidate, Notes
from convplan.engines.cudnn.engine import CudnnEngine

SEED = 3
TIMES_SLOWER = 500  # a plan that much slower than the first is listed, and still compared


def on_gpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy with the same strides and the same offset from a well-aligned address."""
    if tensor is None:
        return None
    last = (
        tensor.storage_offset()
        + 1
        + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    )
    flat = tensor.as_strided((last,), (1,), 0).cuda()
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def bound(problem: Problem, right: oracle.Answer, notes: Notes, *, tf32: bool) -> torch.Tensor:
    """What direct summing may be off by, and what the tensor cores' shorter numbers and sums add to it."""
    allowed = oracle.bound_for(problem, right, notes)
    if tf32:
        allowed = allowed + 2.0 ** (1 - TF32_BITS) * right.magnitude
    if problem.dtype in SUM_BITS:
        allowed = allowed + SHORT_SUM_FACTOR * 2.0 ** (1 - SUM_BITS[problem.dtype]) * right.magnitude
    return allowed


def trouble(problem: Problem, candidate: Candidate, inputs: Inputs, right: oracle.Answer, *, tf32: bool) -> str:
    """What is wrong with a plan; empty when it builds, runs and is right."""
    try:
        run = CudnnEngine().build(problem, candidate.config, Policy()).run
        found = inputs.given_to(run)
        torch.cuda.synchronize()
    except Exception as exc:  # listed by name
        return f"{type(exc).__name__}: {exc}"
    output = problem.output
    if tuple(found.shape) != output.dims or str(found.dtype) != f"torch.{output.dtype}":
        return f"output is {tuple(found.shape)} {found.dtype}"
    found = found.cpu()
    error = oracle.worst(found, right, bound(problem, right, candidate.notes, tf32=tf32))
    if error <= 1:
        return ""
    place = int((found.double() - right.reference).abs().argmax())
    value, wanted = found.flatten()[place].item(), right.reference.flatten()[place].item()
    return f"wrong: {error:.3g} times what is allowed; farthest: {value:.6g} for {wanted:.6g}"


@pytest.mark.behaviour("B13")
@pytest.mark.behaviour("B4")
@pytest.mark.parametrize(("case", "op"), RUNS, ids=[f"{case.id}-{op}" for case, op in RUNS])
def test_every_plan_is_right(case: GpuCase, op: Op, findings: dict[str, Any], request: pytest.FixtureRequest) -> None:
    problem = case.problem(op)
    engine = CudnnEngine()
    support = engine.supports(problem)
    assert support.ok, support.reason
    proposed = engine.configs(problem, "measure")
    integers = problem.dtype == "int8"
    inputs = (oracle.small_integers if integers else oracle.make_inputs)(problem, SEED)
    right = oracle.answer(problem, inputs)
    if integers and problem.output_dtype == "int8":  # cuDNN saturates
        right = right._replace(reference=right.reference.clamp(-128, 127))
    given = Inputs(*map(on_gpu, inputs))
    failed: dict[str, str] = {}
    refused: dict[str, dict[str, str]] = {}
    sources: collections.Counter[str] = collections.Counter()
    for candidate in proposed:
        if "TENSOR_CORE" in candidate.notes.numerical and case.dtype == "float32" and not case.tf32:
            continue
        if "DOWN_CONVERT_INPUTS" in candidate.notes.numerical:
            continue
        sources[candidate.source] += 1
        wrong = trouble(problem, candidate, given, right, tf32=case.tf32)
        if candidate.refused:  # run all the same: this is the evidence that rules point to
            refused[str(candidate.config)] = {"rule": candidate.refused, "seen here": wrong or "right"}
        elif wrong:
            failed[str(candidate.config)] = wrong
    findings[f"{case.id}-{op}"] = {
        "problem": str(problem),
        "plans": len(proposed),
        "run": sources,
        "refused": refused,
        "failed": failed,
    }
    assert math.fsum(sources.values()) > 0, "no plan at all"
    assert not failed

"""The stage verify: first runs, each compared with the reference; what is hopelessly slow is not run on.

The reference, the tolerance and the comparing are `_verify`'s, the race of those that pass is `_contest`'s. A plan from
the store is proven here too, by itself: `verify_plan`; or only run, `run_once`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from convplan._candidates import Live, Stage, failure_reason, instant_order
from convplan._errors import TooLarge, WrongResult
from convplan._limits import gpu_bytes_per_us, gpu_plain_flops_per_us, measured_flops_per_us
from convplan._measure import CUTOFF, Clock
from convplan._memory import available_bytes, cache_emptied
from convplan._plan import Evidence, Plan
from convplan._policy import Policy
from convplan._problem import DTYPES, Problem
from convplan.engines.base import LAST_RESORT, Candidate

if TYPE_CHECKING:
    import torch

    from convplan._verify import Verifier

INEXACT = "not exact on small integers: its arithmetic is that of a transform, which its engine does not note"
FIRST_RUN_CUTOFF = 4 * CUTOFF  # the first call may hold one-time work; beyond this it is hopeless all the same
FIRST_RUN_GRACE_US = 20_000.0  # and below this, one-time work can be all of it


def verify_candidates(
    live: Sequence[Live],
    problem: Problem,
    verifier: Verifier,
    clock: Clock,
    synchronize: Callable[[], object] | None,
) -> Stage:
    """Run each once on random numbers and once on small integers, and compare with the reference (C3).

    Those so slow that their time can never count are dropped unverified: after their first run, or before it where
    even the machine's peak rate could not make them competitive.
    """
    best_us = float("inf")
    kept: list[Live] = []
    rejected: list[Evidence] = []
    slack = 1.0 if problem.device == "cuda" else CUTOFF  # on the CPU peak rates are measured, and only roughly
    for item in sorted(live, key=lambda item: (item.pending is not None, instant_order(problem, item))):
        reason = "" if item.pending is None else item.pending.result()
        if reason:
            rejected.append(item.evidence("build", reason))
            continue
        bound_us = _least_us(item.candidate, problem)
        if bound_us > slack * best_us:
            reason = f"cut off unrun: {bound_us:.0f} us at the machine's peak rate, best so far {best_us:.0f} us"
            rejected.append(item.evidence("measure", reason))
            continue
        stage, reason = _verify(item, verifier, best_us, clock, synchronize)
        if reason:
            rejected.append(item.evidence(stage, reason))
        else:
            best_us = min(best_us, item.first_us)
            kept.append(item)
    survivors = [item for item in kept if item.candidate.config not in verifier.condemned]
    rejected += [
        item.evidence("verify", verifier.condemned[item.candidate.config]) for item in kept if item not in survivors
    ]
    order = {id(item): place for place, item in enumerate(live)}
    return sorted(survivors, key=lambda item: order[id(item)]), rejected


def _verify(
    item: Live, verifier: Verifier, best_us: float, clock: Clock, synchronize: Callable[[], object] | None
) -> tuple[str, str]:
    """The stage and reason to drop one candidate, empty when it passed; fills in its first time and its error."""
    run, config, notes = item.ready.run, item.candidate.config, item.candidate.notes

    def run_again(*arguments: Any) -> torch.Tensor:
        """The first run may have held one-time work, which must not decide who races."""
        out, time_us = timed_call(lambda: run(*arguments), clock, synchronize)
        item.first_us = min(item.first_us, time_us)
        return out

    try:
        verifier.random.forget_sums()
        out, item.first_us = timed_call(lambda: verifier.random.given_to(run), clock, synchronize)
        if item.first_us > max(FIRST_RUN_CUTOFF * best_us, FIRST_RUN_GRACE_US):
            return "measure", f"cut off: first run {item.first_us:.0f} us, best so far {best_us:.0f} us"
        item.error = round(verifier.check(config, notes, out), 6)
        item.verified = verifier.scope
        if notes.direct and not verifier.check_exactly(config, run_again):
            item.remark = INEXACT
    except Exception as exc:  # an engine's failure costs its candidate, never the planning
        return "verify" if isinstance(exc, WrongResult) else "run", failure_reason(exc)
    return "", ""


def verifier_for(problem: Problem, device: torch.device, policy: Policy) -> Verifier:
    import torch

    from convplan._verify import Verifier

    needed_bytes, free_bytes = 2 * problem.least_bytes, available_bytes(device.type)
    if needed_bytes > free_bytes:  # not tried: some systems give out more than they have, and end who uses it
        raise TooLarge(problem=str(problem), needed_bytes=needed_bytes, free_bytes=free_bytes)
    try:
        return Verifier(problem, device, tf32=bool(policy.allow_tf32))
    except torch.OutOfMemoryError as exc:
        raise TooLarge(problem=str(problem), needed_bytes=needed_bytes, free_bytes=free_bytes) from exc


def timed_call(
    call: Callable[[], torch.Tensor], clock: Clock, synchronize: Callable[[], object] | None
) -> tuple[torch.Tensor, float]:
    """A call's result and its microseconds: the host's where calls return when they are done, else the device's."""
    if synchronize is not None:
        from convplan._measure_cuda import launch_us

        return launch_us(call)
    begin = clock()
    out = call()
    return out, (clock() - begin) / 1e3


def _least_us(candidate: Candidate, problem: Problem) -> float:
    """Microseconds below which this candidate cannot come; 0 where its operations are unknown or may be skipped."""
    if problem.device == "cuda":
        return _least_us_on_gpu(candidate, problem)
    if candidate.flops is None or not candidate.notes.direct or candidate.flops < 1e9:
        return 0.0
    import torch

    return candidate.flops / _peak_flops_per_us(problem.dtype, problem.device, torch.get_num_threads())


def _least_us_on_gpu(candidate: Candidate, problem: Problem) -> float:
    """By operations where no tensor cores do them, and by the bytes that the method is known to move."""
    if candidate.source == LAST_RESORT:  # what is behind it is torch's secret
        return 0.0
    by_flops = by_bytes = 0.0
    if candidate.flops is not None and "TENSOR_CORE" not in candidate.notes.numerical:
        by_flops = candidate.flops / (gpu_plain_flops_per_us(problem.dtype) or math.inf)
    if candidate.moved_bytes is not None:
        by_bytes = candidate.moved_bytes / (gpu_bytes_per_us() or math.inf)
    return max(by_flops, by_bytes)


def _peak_flops_per_us(dtype: str, device: str, threads: int) -> float:
    """A rate no direct method reaches, in operations per microsecond.

    For the CPU: twice the rate of a matrix product of a size that runs near the peak, and for 16-bit types, whose
    matrix units a product of that size may not reach, sixteen times that of float32. Infinite on other devices.
    """
    if device != "cpu":
        return float("inf")
    half = DTYPES[dtype].itemsize_bytes <= 2
    return (16 if half else 2) * measured_flops_per_us("float64" if dtype == "float64" else "float32", threads)


def verify_plan(plan: Plan, notes: object = None, *, tf32: bool = False) -> tuple[float, str]:
    """Run a built plan on made-up tensors and compare it with the reference.

    Args:
        plan: any built plan.
        notes: its `Notes` as the record holds them; None: a direct method.
        tf32: its record's policy allows TF32.

    Returns:
        Error over tolerance (at most 1), and how much was compared: `full` or `sample`.

    Raises:
        WrongResult: it is wrong.
    """
    import torch

    from convplan._verify import Verifier
    from convplan.engines.base import Notes

    found = notes if isinstance(notes, Notes) else Notes()
    with torch.no_grad():
        verifier = Verifier(plan.problem, torch.device(plan.problem.device), tf32=tf32)
        verifier.random.forget_sums()
        error = verifier.check(plan.config, found, verifier.random.given_to(plan.unchecked_run))
        if found.direct:
            verifier.check_exactly(plan.config, plan.unchecked_run)
    return error, verifier.scope


def run_once(plan: Plan) -> None:
    """Bind a built plan to the calling thread and the current GPU, and run it once on made-up tensors, to its end.

    Raises whatever its engine does, and torch.OutOfMemoryError.
    """
    import torch

    from convplan._inputs import random_inputs

    device = torch.device(plan.problem.device)
    with cache_emptied(device), torch.no_grad(), torch.autocast(device.type, enabled=False):
        random_inputs(plan.problem, device).given_to(plan.bound_run())
        torch.cuda.synchronize(device)

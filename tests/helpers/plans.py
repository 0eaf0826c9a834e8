"""Plan records made by hand, and real Python processes that work on a store of them. No torch: children start fast."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from convplan._environment import Environment
from convplan._plan import Evidence, PlanRecord
from convplan._policy import Effort, Policy
from convplan._problem import Problem
from convplan.engines.base import EngineConfig

HERE = Environment("cpu", (("cpu", "test cpu"), ("threads", "2"), ("torch", "2.13.0")))
ELSEWHERE = Environment("cpu", (("cpu", "test cpu"), ("threads", "4"), ("torch", "2.13.0")))
POLICY = Policy(deterministic=False, allow_tf32=False)


def problem(number: int = 1) -> Problem:
    """A problem of its own for each number."""
    return Problem.dense("fprop", (number, 4, 8, 8), (6, 4, 3, 3), padding=1)


def record(
    number: int = 1,
    *,
    effort: Effort = "measure",
    environment: Environment = HERE,
    engine: str = "aten",
    median_us: float | None = 12.5,
    reason: str = "slower than 3x the best",
) -> PlanRecord:
    """A record for `problem(number)` with one usable and one rejected candidate."""
    samples = () if median_us is None else (median_us, median_us)
    return PlanRecord(
        problem=problem(number),
        policy=POLICY,
        environment=environment,
        effort=effort,
        ranking=(Evidence(config=EngineConfig.of(engine, block=8), median_us=median_us, samples_us=samples),),
        rejected=(Evidence(config=EngineConfig.of("fft"), rejected="measure", reason=reason),),
        planning_s=0.25,
        created="2030-01-01T00:00:00+00:00",
        version="0.1.0",
    )


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process with this package and these helpers importable; input and output are piped."""
    tests = Path(__file__).resolve().parents[1]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    )


def say(child: subprocess.Popen[str], line: str = "") -> None:
    """Give a child that waits in `input()` a line."""
    assert child.stdin is not None
    child.stdin.write(f"{line}\n")
    child.stdin.flush()


def hear(child: subprocess.Popen[str]) -> str:
    """The next line a child prints; its error output when it ends instead."""
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        _, errors = child.communicate(timeout=60)
        raise AssertionError(f"the child ended with {child.returncode}: {errors}")
    return line.rstrip("\n")


def run_python(code: str, *arguments: object, timeout_s: float = 60) -> str:
    """Run a Python process to its end and return what it printed; a failure shows its error output."""
    with start_python(code, *arguments) as child:
        output, errors = child.communicate(timeout=timeout_s)
    assert child.returncode == 0, errors
    return output

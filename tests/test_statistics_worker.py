"""Engines that write wrong statistics beside a right output: refused, each for its own reason, in a worker too."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from helpers.fresh import fresh_process
from helpers.summing import HOW, IN_A_WORKER_ONLY, summing

import convplan
from convplan import Epilogue, Evidence, PlanRecord, Policy, Problem, _environment, _worker_link
from convplan._planner import plan_problem

PROBLEM = Problem.dense(
    "fprop", (2, 8, 9, 7), (12, 8, 3, 3), padding=1, dtype="float16", layout="channels_last",
    epilogue=Epilogue(statistics=True),
)  # fmt: skip
POLICY = Policy(
    deterministic=False, allow_tf32=False, engines=("mine",), budget_s=0.1, build_limit_s=5.0, run_limit_s=5.0
)
REASONS = {
    "sum": ("verify", "the sum of channel 3 is "),
    "square": ("verify", "the sum of squares of channel 3 is "),
    "unwritten": ("verify", "the sum of channel 0 is nan"),
    "first run alone": ("verify", "the sum of channel 0 is nan"),
    "past the end": ("corrupt", "it wrote 8 bytes past the end of its statistics, the first at +0"),
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    # Pytest names the test in a variable, and each has a cache of its own: no reason to import everything anew.
    monkeypatch.setattr(_worker_link, "_circumstances", os.getpid)
    with fresh_process():
        yield
    _worker_link.hosts.close()


def how(evidence: Evidence) -> str:
    return HOW[evidence.config.knob("index", -1)]


def refused(record: PlanRecord) -> dict[str, tuple[str, str]]:
    return {how(one): (one.rejected, one.reason) for one in record.rejected if one.config.engine == "mine"}


def the_reasons_are_those_of(found: dict[str, tuple[str, str]], expected: dict[str, tuple[str, str]]) -> None:
    assert found.keys() == expected.keys()
    for name, (stage, text) in expected.items():
        assert found[name][0] == stage, name
        assert text in found[name][1], name


def test_wrong_statistics_cost_their_candidate() -> None:
    convplan.register_engine(summing(HOW.index(IN_A_WORKER_ONLY[0])), replace=True)
    record = plan_problem(PROBLEM, POLICY.replace(effort="measure"), _environment.current("cpu"))
    assert how(record.ranking[0]) == "right"
    wanted = {name: reason for name, reason in REASONS.items() if name not in IN_A_WORKER_ONLY}
    the_reasons_are_those_of(refused(record), wanted)


@pytest.mark.behaviour("C4")
def test_wrong_statistics_cost_their_candidate_in_a_worker() -> None:
    convplan.register_engine(summing(), replace=True)
    record = plan_problem(PROBLEM, POLICY.replace(effort="exhaustive"), _environment.current("cpu"))
    assert record.effort == "exhaustive"
    assert how(record.ranking[0]) == "right and faster"
    the_reasons_are_those_of(refused(record), REASONS)

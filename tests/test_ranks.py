"""Ranks of a job use the same plan for a problem, which one of them tunes, and none of them waits for another's sake.

Two real processes on gloo run the scenarios of `helpers.ranks`. What a board makes of strangers' rows, of the dead and of
stores that fail is shown in one process, on the memory store of torch and with a clock of our own.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.fresh import fresh_process
from helpers.plans import ELSEWHERE, HERE, POLICY, problem, record, run_python
from helpers.ranks import Job, Scripted

import convplan
from convplan import ConvPlanWarning, Policy, PolicyError, _agreement, _ranks, _runtime
from convplan._agreement import Agreement, agreement
from convplan._key import plan_key
from convplan._plan import PlanRecord
from convplan._ranks import Board, BoardGone
from convplan.engines.base import EngineConfig

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with Job("cpu", tmp_path_factory.mktemp("ranks")) as started:
        yield started


def summed(reports: Reports, counter: str) -> int:
    return sum(report["stats"][counter] for report in reports)


def agree(reports: Reports) -> bool:
    """Whether all ranks run every problem that they share by the very same record."""
    first, second = (report["chosen"] for report in reports)
    shared = first.keys() & second.keys()
    assert shared, "they have something in common"
    return all(first[text] == second[text] for text in shared)


# Two processes


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_training_has_one_plan_for_each_problem_tuned_once_and_equal_parameters(job: Job, scenario: str) -> None:
    reports = job.run(scenario)
    assert agree(reports)
    problems = reports[0]["chosen"]
    assert len(problems) == reports[0]["count"] // 2 * 3 - 1, "forward and both gradients, but for the first input's"
    assert all(effort == "measure" for _, effort, _ in problems.values())
    assert summed(reports, "tuned") == len(problems)
    assert summed(reports, "from_rank") >= len(problems)
    assert reports[0]["parameters"] == reports[1]["parameters"]


def test_ranks_that_do_not_agree_each_tune_and_choose_differently(job: Job) -> None:
    reports = job.run("ddp", ranks="alone")
    assert not agree(reports)
    assert summed(reports, "tuned") == 2 * len(reports[0]["chosen"])
    assert summed(reports, "from_rank") == 0
    assert reports[0]["parameters"] == reports[1]["parameters"], "the gradients are averaged all the same"


def test_a_straggler_finds_what_the_others_tuned(job: Job) -> None:
    reports = job.run("straggler")
    assert agree(reports)
    assert [report["tuned_here"] for report in reports] == [1, 0]
    assert reports[1]["stats"]["from_rank"] == 1
    assert reports[1]["stats"]["planned"] == 0


def test_a_rank_goes_on_untuned_while_another_is_held_up_in_tuning(job: Job) -> None:
    reports = job.run("busy")
    first = next(iter(reports[0]["chosen"].values()))
    assert agree(reports)
    assert first[:2] == [f"mine[index={Scripted.fastest(0)}]", "measure"]
    assert reports[1]["ran"] == [20, 0, 0, 0], "rank 0's own order, which rank 1 does not share"
    assert [report["stats"]["tuned"] for report in reports] == [1, 0]


def test_shapes_that_other_ranks_never_meet_hold_nobody_up(job: Job) -> None:
    reports = job.run("shapes")
    assert [report["total"] for report in reports] == [2.0, 2.0]
    assert agree(reports)
    assert summed(reports, "tuned") == 3, "the shared one once, and each rank's own"
    assert len({*reports[0]["chosen"], *reports[1]["chosen"]}) == 1 + 2 + 8


@pytest.mark.behaviour("B29")
def test_under_a_deterministic_policy_plans_never_change(job: Job) -> None:
    reports = job.run("deterministic")
    assert agree(reports)
    assert summed(reports, "tuned") == 3
    for report in reports:
        assert report["results"] == reports[0]["results"][:3] * 3
        assert {effort for _, effort, _ in report["chosen"].values()} == {"measure"}


@pytest.mark.parametrize(
    "changes",
    [
        {"effort": "instant"},
        {"deterministic": True},
        {"mode": "replay", "replay_miss": "instant"},
        {"tuning_limit_s": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_untuned_plans_are_the_same_too(job: Job, changes: dict[str, Any]) -> None:
    reports = job.run("never_tuned", **changes)
    assert agree(reports)
    assert summed(reports, "tuned") == 0
    assert {effort for _, effort, _ in reports[0]["chosen"].values()} == {"instant"}
    alone = job.run("never_tuned", **changes, ranks="alone")
    assert not agree(alone)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("sure", [False, True], ids=["plans-may-change", "deterministic"])
def test_what_one_ranks_store_holds_does_not_break_agreement(job: Job, sure: bool, first: int) -> None:
    reports = job.run("own_stores", deterministic=sure, first=first)
    assert agree(reports)
    (choice,) = reports[0]["chosen"].values()
    tuned_by_then = not sure or first == 1
    assert choice[1] == ("measure" if tuned_by_then else "instant")


def test_ranks_share_the_work_of_tuning_a_list(job: Job) -> None:
    reports = job.run("tune_together")
    assert agree(reports)
    assert summed(reports, "tuned") == 6
    assert all(report["stats"]["tuned"] for report in reports)
    assert all(report["in_order"] for report in reports)


def test_nonsense_on_the_board_is_told_once_and_ranks_still_agree(job: Job) -> None:
    reports = job.run("damaged")
    assert agree(reports)
    assert summed(reports, "tuned") == 1
    for report in reports:
        (warning,) = report["warned"]
        assert "is not used: it is no row of this convplan" in warning
        assert "\x1b" not in warning


def test_a_forked_child_does_not_use_its_parents_connections(job: Job) -> None:
    reports = job.run("forked")
    assert [report["child"] for report in reports] == ["None 1", "None 1"]
    assert agree(reports)


def test_a_rank_that_is_killed_while_tuning_leaves_its_work_to_the_others(tmp_path: Path) -> None:
    with Job("cpu", tmp_path) as pair:
        (report,) = pair.run("killed", only=(0,))
        pair.processes[1].join(10)
        assert pair.processes[1].exitcode == -signal.SIGKILL
    assert report["stats"]["tuned"] == 2
    assert {effort for _, effort, _ in report["chosen"].values()} == {"measure"}
    assert report["untuned_calls"] > 1, "it went on meanwhile"

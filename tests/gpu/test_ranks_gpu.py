"""Ranks of a job on two GPUs over NCCL: the scenarios of `helpers.ranks`, with cuDNN's plans, not scripted ones."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.ranks import Job

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with Job("cuda", tmp_path_factory.mktemp("ranks")) as started:
        yield started


@pytest.fixture
def run(gpus: Job, findings: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Runs a scenario; what its ranks report goes to the findings."""
    gpus.renew()

    def scenario(name: str, **options: Any) -> Reports:
        reports = gpus.run(name, **options)
        findings.setdefault("ranks", {})[request.node.name] = reports
        return reports

    yield scenario
    gpus.renew()


def summed(reports: Reports, counter: str) -> int:
    return sum(report["stats"][counter] for report in reports)


def agree(reports: Reports) -> bool:
    first, second = (report["chosen"] for report in reports)
    shared = first.keys() & second.keys()
    assert shared, "they have something in common"
    return all(first[text] == second[text] for text in shared)


@pytest.mark.behaviour("C8")
@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_training_has_one_plan_for_each_problem_tuned_once_and_equal_parameters(run: Any, scenario: str) -> None:
    reports = run(scenario)
    assert agree(reports)
    problems = reports[0]["chosen"]
    assert len(problems) >= reports[0]["count"] // 2 * 3 - 1, "forward and both gradients, but for the first input's"
    assert {effort for _, effort, _ in problems.values()} == {"measure"}
    assert summed(reports, "tuned") == len(problems)
    assert summed(reports, "from_rank") >= len(problems)
    assert reports[0]["parameters"] == reports[1]["parameters"]


def test_ranks_that_are_to_choose_alone_tune_each_for_itself(run: Any) -> None:
    reports = run("ddp", ranks="alone")
    assert summed(reports, "tuned") == 2 * len(reports[0]["chosen"])
    assert summed(reports, "from_rank") == 0
    assert reports[0]["parameters"] == reports[1]["parameters"]


def test_a_straggler_finds_what_the_others_tuned(run: Any) -> None:
    reports = run("straggler")
    assert agree(reports)
    assert [report["tuned_here"] for report in reports] == [1, 0]


def test_a_rank_goes_on_untuned_while_another_is_held_up_in_tuning(run: Any) -> None:
    reports = run("busy")
    assert agree(reports)
    assert [report["stats"]["tuned"] for report in reports] == [1, 0]


def test_shapes_that_other_ranks_never_meet_hold_nobody_up(run: Any) -> None:
    reports = run("shapes")
    assert [report["total"] for report in reports] == [2.0, 2.0]
    assert agree(reports)
    assert summed(reports, "tuned") == 3


@pytest.mark.behaviour("B29")
def test_under_a_deterministic_policy_plans_never_change(run: Any) -> None:
    reports = run("deterministic")
    assert agree(reports)
    assert summed(reports, "tuned") == 3
    for report in reports:
        assert report["results"] == reports[0]["results"][:3] * 3


@pytest.mark.parametrize("changes", [{"effort": "instant"}, {"deterministic": True}], ids=["instant", "deterministic"])
def test_untuned_plans_are_the_same_too(run: Any, changes: dict[str, Any]) -> None:
    reports = run("never_tuned", **changes)
    assert agree(reports)
    assert summed(reports, "tuned") == 0


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("sure", [False, True], ids=["plans-may-change", "deterministic"])
def test_what_one_ranks_store_holds_does_not_break_agreement(run: Any, sure: bool, first: int) -> None:
    reports = run("own_stores", deterministic=sure, first=first)
    assert agree(reports)
    (choice,) = reports[0]["chosen"].values()
    assert choice[1] == ("measure" if not sure or first == 1 else "instant")


def test_ranks_share_the_work_of_tuning_a_list(run: Any) -> None:
    reports = run("tune_together")
    assert agree(reports)
    assert summed(reports, "tuned") == 6
    assert all(report["stats"]["tuned"] for report in reports)


def test_nonsense_on_the_board_is_told_once_and_ranks_still_agree(run: Any) -> None:
    reports = run("damaged")
    assert agree(reports)
    assert summed(reports, "tuned") == 1
    assert [len(report["warned"]) for report in reports] == [1, 1]


def test_what_a_question_to_the_board_takes(run: Any) -> None:
    assert all(report["median_us"] for report in run("board_cost"))


def test_a_rank_that_is_killed_while_tuning_leaves_its_work_to_the_others(run: Any, gpus: Job) -> None:
    (report,) = run("killed", only=(0,))
    gpus.processes[1].join(10)
    assert gpus.processes[1].exitcode == -signal.SIGKILL
    assert report["stats"]["tuned"] == 2
    assert {effort for _, effort, _ in report["chosen"].values()} == {"measure"}
    assert report["calls"] > 1

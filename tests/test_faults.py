"""Whatever a candidate does, exhaustive search ends with the right answer, and the user's process lives (C4).

Candidates are scripted, their failures real: signals, endless loops, memory that is overwritten or kept, in a worker
process. Times are real too, so they are far apart; none of them is asserted.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.fresh import fresh_process
from helpers.plans import HERE

import convplan
from convplan import (
    Candidate,
    ConvPlanWarning,
    EngineConfig,
    Evidence,
    NoPlan,
    PlanRecord,
    Policy,
    Problem,
    _environment,
    _search,
    _worker_link,
)
from convplan._planner import plan_problem
from convplan.engines.base import Built
from convplan.engines.fake import DANGEROUS, FakeCandidate, FakeEngine

PROBLEM = Problem.dense("fprop", (2, 3, 7, 6), (4, 3, 3, 2), padding=1)
POLICY = Policy(
    deterministic=False,
    allow_tf32=False,
    engines=("mine",),
    effort="exhaustive",
    budget_s=0.1,
    build_limit_s=1.0,
    run_limit_s=1.0,
)

pytestmark = pytest.mark.behaviour("C4")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    # Pytest names the test in a variable, and each has a cache of its own: no reason to import everything anew.
    monkeypatch.setattr(_worker_link, "_circumstances", os.getpid)
    with fresh_process():
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_host_left() -> Iterator[None]:
    """One process that has everything imported serves all of these tests, and is gone after them."""
    yield
    _worker_link.hosts.close()


def take(time_us: float = 3_000.0, **changes: Any) -> FakeCandidate:
    return FakeCandidate(time_us=time_us, **changes)


def search(*script: FakeCandidate, problem: Problem = PROBLEM, **rules: Any) -> PlanRecord:
    convplan.register_engine(FakeEngine(script, name="mine"), replace=True)
    return plan_problem(problem, POLICY.replace(**rules), _environment.current("cpu"))


def index(evidence: Evidence) -> int:
    return evidence.config.knob("index", -1)


def stages(record: PlanRecord) -> dict[int, str]:
    return {index(evidence): evidence.rejected for evidence in record.rejected}


def reason(record: PlanRecord, which: int) -> str:
    return next(evidence.reason for evidence in record.rejected if index(evidence) == which)


GOOD, FAULTY, LATER = 0, 1, 2

FAULTS = {
    "segfault": ("crash", "SIGSEGV"),
    "kills": ("crash", "SIGKILL"),
    "hangs": ("stall", "did not come back from running within 0.3 s"),
    "hangs_in_build": ("stall", "did not come back from building within 0.3 s"),
    "slow": ("measure", "cut off: first run"),
    "wrong": ("verify", "the reference"),
    "nan": ("verify", "nan"),
    "leaks": ("leak", "memory in use grows by"),
    "corrupts": ("corrupt", "64 bytes past the end of its output, the first at \\+0"),
    "writes_input": ("verify", "it wrote to its inputs"),
    "run": ("run", "the script says"),
    "memory": ("run", "no memory"),
    "build": ("build", "the script says"),
}


@pytest.mark.parametrize("fails", FAULTS)
def test_a_fault_costs_its_candidate_alone(fails: Any) -> None:
    """The good one before it keeps what was measured, and the better one after it is still found."""
    limit_s = 0.3 if fails.startswith("hangs") else 5.0
    faulty = take(40 if fails == "slow" else 10, fails=fails)
    record = search(take(6_000), faulty, take(2_000), run_limit_s=limit_s, build_limit_s=limit_s)
    stage, text = FAULTS[fails]
    assert record.effort == "exhaustive"
    assert index(record.ranking[0]) == LATER, record.explain()
    assert {index(evidence) for evidence in record.ranking} in ({LATER, GOOD}, {LATER})  # GOOD may be cut off
    assert stages(record)[FAULTY] == stage
    assert re.search(text, reason(record, FAULTY)), reason(record, FAULTY)
    assert record.build().run(*convplan_inputs()).shape == PROBLEM.output.dims


def convplan_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    first, second = PROBLEM.inputs
    return torch.randn(first.dims), torch.randn(second.dims)


def test_every_dangerous_failure_is_among_those() -> None:
    assert set(DANGEROUS) <= set(FAULTS)


def test_all_faults_together_and_one_that_is_right() -> None:
    script = [take(50, fails=fails) for fails in FAULTS] + [take(2_000)]
    record = search(*script, run_limit_s=0.3, build_limit_s=0.3)
    assert [index(evidence) for evidence in record.ranking] == [len(FAULTS)]
    assert {stages(record)[number] for number in range(len(FAULTS))} >= {"crash", "stall", "corrupt", "leak", "verify"}


def test_when_nothing_is_right_the_error_names_every_fault() -> None:
    with pytest.raises(NoPlan) as caught:
        search(take(50, fails="segfault"), take(50, fails="wrong"))
    reasons = dict(caught.value.rejections)
    assert "crash: " in reasons["mine[index=0]"]
    assert "SIGSEGV" in reasons["mine[index=0]"]
    assert "verify: " in reasons["mine[index=1]"]


def test_what_nobody_proposed_is_found_and_may_fail_too() -> None:
    hidden = [take(100, fails="segfault", proposed=False), take(1_000, proposed=False), take(9_000, proposed=False)]
    record = search(take(6_000), *hidden)
    assert index(record.ranking[0]) == 2
    assert record.ranking[0].source == "search"
    assert stages(record)[1] == "crash"


def test_the_curve_goes_down_and_ends_with_the_choice() -> None:
    record = search(take(20_000), take(8_000), take(2_000, proposed=False))
    seconds, best = zip(*record.curve, strict=True)
    assert list(seconds) == sorted(seconds)
    assert list(best[:-1]) == sorted(best[:-1], reverse=True)
    assert len(record.curve) >= 3
    assert record.curve[-1][1] == record.median_us


def test_nothing_runs_in_this_process_but_the_winner() -> None:
    engine = FakeEngine([take(4_000), take(1_000), take(30, fails="wrong")], name="mine")
    convplan.register_engine(engine)
    record = plan_problem(PROBLEM, POLICY, _environment.current("cpu"))
    assert index(record.ranking[0]) == 1
    assert engine.builds == [0, 1, 0]
    assert engine.runs[0] == engine.runs[2] == 0


class OnlyThere(FakeEngine):
    """Index 0 is right in a worker process and wrong in this one."""

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        if config.knob("index") == 0:
            return FakeEngine([take(fails="wrong")]).build(problem, EngineConfig.of("fake", index=0), policy)
        return super().build(problem, config, policy)


def test_a_winner_that_is_wrong_in_this_process_makes_way_for_the_next() -> None:
    class Disguised(OnlyThere):
        pass

    Disguised.__module__, Disguised.__qualname__ = FakeEngine.__module__, FakeEngine.__qualname__
    convplan.register_engine(Disguised([take(2_000), take(4_000)], name="mine"))
    record = plan_problem(PROBLEM, POLICY, _environment.current("cpu"))
    assert [index(evidence) for evidence in record.ranking] == [1]
    assert stages(record) == {0: "verify"}
    assert "passed in the worker process, not in this one" in reason(record, 0)


# Limits and budgets


def test_a_run_limit_that_nobody_keeps_is_what_the_error_says() -> None:
    with pytest.raises(NoPlan, match="longer than run_limit_s = 1e-06"):
        search(take(50), take(70), run_limit_s=1e-6)


def test_a_build_limit_that_nobody_keeps_is_what_the_error_says() -> None:
    with pytest.raises(NoPlan, match="longer than build_limit_s = 1e-09"):
        search(take(50), build_limit_s=1e-9)


def test_a_search_without_time_still_finds_something_right() -> None:
    record = search(take(3_000), take(2_000), take(1_000, proposed=False), search_s=1e-3)
    assert index(record.ranking[0]) == 0
    assert stages(record)[1] == "measure"
    assert "search_s = 0.001 was over" in reason(record, 1)


def test_workspace_and_notes_are_looked_at_before_anything_is_built() -> None:
    script = [
        take(2_000),
        take(50, workspace_bytes=2**20, fails="segfault"),
        take(50, workspace_bytes=2**20, fails="segfault", proposed=False),
    ]
    record = search(*script, workspace_limit_bytes=0)
    assert stages(record) == {1: "filter", 2: "filter"}


# Workers and engines that are not there


class ByHand:
    """An engine that no other process can have."""

    by_default = False
    name = "byhand"

    def __init__(self) -> None:
        self.engine = FakeEngine([take(1_000)], name="byhand")

    def supports(self, problem: Problem) -> Any:
        return self.engine.supports(problem)

    def configs(self, problem: Problem, effort: Any) -> list[Candidate]:
        return list(self.engine.configs(problem, effort))

    def build(self, problem: Problem, config: EngineConfig, policy: Policy) -> Built:
        return self.engine.build(problem, config, policy)


def test_an_engine_that_the_worker_cannot_have_is_left_out_and_says_so() -> None:
    convplan.register_engine(ByHand())
    record = search(take(4_000), engines=("byhand", "mine"))
    assert [evidence.config.engine for evidence in record.ranking] == ["mine"]
    (left_out,) = record.rejected
    assert (left_out.config, left_out.rejected) == (EngineConfig("byhand"), "enumerate")
    assert "registered by hand, and has no remake()" in left_out.reason


def test_without_a_worker_process_it_is_measured_here_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("no more processes today")

    monkeypatch.setattr(_worker_link.hosts, "take", refuse)
    with pytest.warns(ConvPlanWarning, match="no worker process can be started: no more processes today") as seen:
        record = search(take(2_000), take(1_000))
    assert len(seen) == 1
    assert record.effort == "measure"
    assert index(record.ranking[0]) == 1
    assert record.curve == ()


def test_a_worker_that_never_gets_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from convplan._child import Child

    monkeypatch.setattr(_worker_link.hosts, "take", lambda: Child("convplan.no_such_module"))
    with pytest.warns(ConvPlanWarning, match="the worker process did not start: .*No module named"):
        record = search(take(1_000))
    assert record.effort == "measure"


def test_another_environment_is_no_place_to_measure_in() -> None:
    convplan.register_engine(FakeEngine([take(1_000)], name="mine"))
    with pytest.warns(ConvPlanWarning, match="the worker process is in another environment"):
        record = plan_problem(PROBLEM, POLICY, HERE)
    assert record.effort == "measure"


def test_the_worker_has_this_process_settings_of_torch() -> None:
    torch.set_num_threads(2)
    assert search(take(1_000)).effort == "exhaustive"  # it compares its environment with ours
    torch.set_float32_matmul_precision("high")
    try:
        assert search(take(1_000)).effort == "exhaustive"
    finally:
        torch.set_float32_matmul_precision("highest")


# Killed from outside


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> list[_worker_link.WorkerLink]:
    """The links that searches make."""
    made: list[_worker_link.WorkerLink] = []

    def remember(setup: Any) -> _worker_link.WorkerLink:
        made.append(_worker_link.WorkerLink(setup))
        return made[-1]

    monkeypatch.setattr(_search, "WorkerLink", remember)
    return made


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3])
def test_a_worker_killed_from_outside_costs_nobody(link: list[_worker_link.WorkerLink], after_s: float) -> None:
    """Whenever it happens: while it starts, while it works, while it races."""
    killed = []

    def kill_it() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            pid = link[0].pid if link else None
            if pid is not None:
                time.sleep(after_s)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_it)
    killer.start()
    try:
        record = search(*[take(6_000 + 100 * number) for number in range(8)], take(1_000))
    finally:
        killer.join()
    assert killed
    assert index(record.ranking[0]) == 8
    assert "crash" not in stages(record).values()
    assert link[0].starts == 2


def test_a_host_killed_from_outside_costs_nobody(link: list[_worker_link.WorkerLink]) -> None:
    search(take(1_000))
    kept = _worker_link.hosts._kept
    assert kept is not None
    os.kill(kept[0].pid, signal.SIGKILL)
    record = search(take(4_000), take(1_000))
    assert index(record.ranking[0]) == 1


def test_a_search_leaves_no_tensors_behind() -> None:
    def live_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    search(take(1_000), take(500))  # what is made once stays
    before = live_tensors()
    search(take(1_000), take(500))
    assert live_tensors() == before


def test_no_process_is_left_after_a_search(link: list[_worker_link.WorkerLink]) -> None:
    search(take(1_000), take(50, fails="hangs"), run_limit_s=0.2)
    assert link[0].pid is None
    _worker_link.hosts.close()
    assert [one for one in psutil.Process().children(recursive=True) if "_worker" in " ".join(one.cmdline())] == []


SEARCHING = """
import sys, torch, convplan
from convplan import Policy, Problem, _environment, _search, _worker_link
from convplan._planner import plan_problem
from convplan.engines.fake import FakeCandidate, FakeEngine
torch.set_num_threads(1)
convplan.register_engine(FakeEngine([FakeCandidate(time_us=50, fails="hangs")], name="mine"))

class Link(_worker_link.WorkerLink):
    def tried(self, request):
        self.start()
        print(self.pid, self._host.pid, flush=True)
        return super().tried(request)

_search.WorkerLink = Link
policy = Policy(deterministic=False, allow_tf32=False, engines=("mine",), effort="exhaustive", run_limit_s=60)
plan_problem(Problem.dense("fprop", (1, 1, 5), (1, 1, 3)), policy, _environment.current("cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal for it")
def test_when_the_searching_process_is_killed_its_worker_goes_too() -> None:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(convplan.__file__).parents[1]), *sys.path[1:]])}
    with subprocess.Popen([sys.executable, "-c", SEARCHING], stdout=subprocess.PIPE, env=environ) as started:
        assert started.stdout is not None
        pids = [int(text) for text in started.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(psutil.pid_exists, pids))
        started.kill()
    deadline = time.monotonic() + 15
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(psutil.pid_exists, pids))


def test_real_engines_are_searched_without_a_word_of_warning() -> None:
    problem = Problem.dense("fprop", (1, 2, 300), (2, 2, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = plan_problem(
            problem,
            POLICY.replace(engines=("aten", "matmul", "fft"), run_limit_s=5.0, build_limit_s=5.0),
            _environment.current("cpu"),
        )
    assert record.effort == "exhaustive"
    assert {evidence.source for evidence in (*record.ranking, *record.rejected)} >= {"heuristic", "search"}
    assert record.ranking[0].verified == "full"


def test_tune_searches_when_it_is_told_to_and_remembers_what_it_found() -> None:
    convplan.register_engine(FakeEngine([take(4_000), take(1_500, proposed=False)], name="mine"))
    (record,) = convplan.tune([PROBLEM], policy=POLICY)
    assert record.effort == "exhaustive"
    assert index(record.ranking[0]) == 1
    assert convplan.plan(PROBLEM, POLICY).created == record.created
    assert convplan.stats()["tuned"] == 1

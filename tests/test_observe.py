"""What a user can watch: torch's and Python's logging, ranges in a profiler, the statistics beside the counters."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.fresh import fresh_process, registered
from torch.profiler import ProfilerActivity, profile

import convplan
from convplan import Policy, Problem, _choices, _ranges
from convplan._counts import COUNTERS
from convplan.engines.fake import FakeCandidate, FakeEngine

ROOT = Path(convplan.__file__).resolve().parents[1]
UNTUNED = Policy(engines=("aten",), effort="instant")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_process():
        yield
    assert not _ranges.switch.on


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)


# --- logging

PROGRAM = """
import convplan, sys
assert "torch" not in sys.modules
import logging, torch
{before}
convplan.enable(convplan.Policy(engines=("aten",), effort="instant"))
torch.nn.functional.conv2d(torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3), padding=1)
print(logging.getLogger("torch._dynamo").level, len(logging.getLogger().handlers))
"""
LINE = "fprop float32 x=1x4x8x8 w=4x4x3x3 y=1x4x8x8 pad=1,1 cpu"


def run_program(tmp_path: Path, before: str = "", **environment: str) -> tuple[str, str]:
    """What the program above writes to stdout and stderr in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM.format(before=before)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CONVPLAN_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.behaviour("B33")
def test_torchs_own_variable_for_logs_shows_each_decision_and_leaves_others_alone(tmp_path: Path) -> None:
    silent, nothing = run_program(tmp_path / "silent")
    assert nothing == ""
    told, log = run_program(tmp_path / "told", TORCH_LOGS="+convplan")
    assert told == silent  # other loggers' levels and the root's handlers are as they were
    assert re.search(rf"planned {re.escape(LINE)} -> aten\[.*\(instant\)", log)
    assert re.search(rf"{re.escape(LINE)} runs by aten\[.*\(effort instant\)", log)
    (problem,) = set(re.findall(r"\bfprop \S+ x=.*? cpu\b", log))
    assert str(Problem.parse(problem)) == LINE


def test_torchs_own_function_for_logs_sets_convplans_level(tmp_path: Path) -> None:
    before = "torch._logging.set_logs(modules={'convplan': logging.INFO})"
    _, log = run_program(tmp_path, before)
    assert "planned" in log
    assert "runs by" not in log  # which is DEBUG


def test_pythons_logging_has_one_logger_for_each_part(caplog: pytest.LogCaptureFixture) -> None:
    x, w = tensors()
    with caplog.at_level(logging.DEBUG, "convplan"), convplan.enabled(UNTUNED):
        F.conv2d(x, w, padding=1)
        F.conv2d(x.long(), w.long())
    said = {record.name: record.getMessage() for record in caplog.records}
    assert said.keys() >= {"convplan.planner", "convplan.runtime", "convplan.override"}
    assert all(name.startswith("convplan.") for name in said)
    assert LINE in said["convplan.runtime"]
    assert "left to torch" in said["convplan.override"]


def test_every_logger_is_in_the_docs() -> None:
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "convplan").rglob("*.py"))
    used = {name for source in sources for name in re.findall(r'getLogger\("([\w.]+)"\)', source)}
    page = (ROOT / "docs" / "observe.md").read_text(encoding="utf-8")
    assert len(used) > 5
    assert {name for name in used if f"`{name}`" not in page} == set()
    assert all(name.startswith("convplan.") for name in used)


# --- ranges


def names_in_profiler(run: Callable[[], object]) -> Counter[str]:
    """How often each of convplan's ranges was seen while something ran."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return Counter(event.name for event in seen.events() if event.name.startswith("convplan"))


def step(x: torch.Tensor, w: torch.Tensor) -> None:
    y = F.conv2d(x, w, padding=1)
    torch.autograd.grad(y.sum(), w)


def test_ranges_name_engine_knobs_and_problem_and_can_be_switched_at_any_time() -> None:
    x, w = tensors()
    w.requires_grad_()
    with registered(FakeEngine([FakeCandidate(workspace_bytes=64)], name="mine")):
        policy = Policy(engines=("mine",), effort="instant")
        config = convplan.plan(Problem.parse(LINE), policy).config
        assert config.knobs
        with convplan.enabled(policy):
            step(x, w)
            assert names_in_profiler(lambda: step(x, w)) == {}  # off by default
            with convplan.profiling():
                found = names_in_profiler(lambda: [step(x, w) for _ in range(3)])
                function = names_in_profiler(lambda: convplan.conv2d(x.detach(), w.detach(), padding=1))
            off_again = names_in_profiler(lambda: step(x, w))
        with convplan.profiling(True):
            direct = names_in_profiler(lambda: convplan.plan(Problem.parse(LINE), policy).build().run(x, w.detach()))
    name = f"convplan {config} {LINE}"
    assert found[name] == 3
    assert sum(found.values()) == 6
    assert all(Problem.parse(one.partition("] ")[2]).op in ("fprop", "wgrad") for one in found)
    assert function == direct == {name: 1}
    assert off_again == {}


def test_a_backward_that_is_one_call_of_torchs_is_one_range_of_both_problems() -> None:
    x, w = tensors()
    x.requires_grad_()
    w.requires_grad_()
    native = Policy(engines=("aten",), budget_s=0.001, tune_after=1)
    with convplan.enabled(native), convplan.profiling():
        records = [
            convplan.plan(one, native)
            for one in convplan.problem("fprop", x.detach(), w.detach(), padding=1).gradients()
        ]
        y = F.conv2d(x, w, padding=1)
        found = names_in_profiler(lambda: torch.autograd.grad(y, (x, w), torch.ones_like(y)))
    parts = [part for name in found for part in name.split(" + ")]
    assert sorted(parts) == sorted(f"convplan {record.config} {record.problem}" for record in records)


def test_off_nothing_is_wrapped_and_results_are_the_same_with_ranges() -> None:
    x, w = tensors()
    plan = convplan.plan(Problem.parse(LINE), UNTUNED).build()
    run = plan.unchecked_run
    assert _ranges.ranged(run, plan) is run
    with convplan.enabled(UNTUNED):
        expected = F.conv2d(x, w, padding=1)
        with convplan.profiling():
            assert _ranges.ranged(run, plan) is not run
            found = F.conv2d(x, w, padding=1)
    assert torch.equal(found, expected)


def test_a_failing_plan_falls_back_within_ranges_too() -> None:
    x, w = tensors()
    with (
        registered(FakeEngine([FakeCandidate(fails="run")], name="broken")),
        convplan.enabled(Policy(engines=("broken", "aten"), effort="instant")),
        convplan.profiling(),
        pytest.warns(convplan.ConvPlanWarning, match=r"broken.* failed .*; using aten"),
    ):
        found = names_in_profiler(lambda: [F.conv2d(x, w, padding=1) for _ in range(2)])
    assert sum(count for name, count in found.items() if name.startswith("convplan aten")) == 1  # the second call
    assert sum(count for name, count in found.items() if name.startswith("convplan broken")) == 1


@pytest.mark.parametrize(("value", "on"), [("", False), ("0", False), ("off", False), ("1", True)])
def test_the_variable_says_how_a_process_begins(monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
    monkeypatch.setenv("CONVPLAN_RANGES", value)
    assert _ranges._Switch().on is on


def test_profiling_wants_true_or_false_and_gives_back_what_held() -> None:
    with pytest.raises(TypeError, match="found 'yes', expected True or False"):
        convplan.profiling("yes")  # type: ignore[arg-type]
    token = _choices.state.token
    convplan.profiling(False)
    assert _choices.state.token == token  # nothing has to be bound anew
    with convplan.profiling():
        with convplan.profiling(False):
            assert not _ranges.switch.on
        assert _ranges.switch.on
        assert _choices.state.token > token


def test_all_threads_see_the_switch() -> None:
    x, w = tensors()
    seen: list[Counter[str]] = []
    with convplan.enabled(UNTUNED):
        F.conv2d(x, w, padding=1)
        ready, switched = threading.Event(), threading.Event()

        def other() -> None:
            F.conv2d(x, w, padding=1)
            ready.set()
            switched.wait()
            seen.append(names_in_profiler(lambda: F.conv2d(x, w, padding=1)))

        thread = threading.Thread(target=other)
        thread.start()
        ready.wait()
        with convplan.profiling():
            switched.set()
            thread.join()
    assert sum(seen[0].values()) == 1


# --- statistics


def test_statistics_are_a_dictionary_of_counters_with_times_and_engines_beside_it() -> None:
    x, w = tensors()
    stats = convplan.stats()
    assert stats == dict.fromkeys(COUNTERS, 0)
    assert (stats.planning_s, stats.tuning_s, stats.engines) == (0, 0, {})
    with convplan.enabled(Policy(engines=("aten", "matmul"), budget_s=0.001)):
        F.conv2d(x, w, padding=1)
        untuned = convplan.stats()
        assert 0 == untuned.tuning_s < untuned.planning_s
        F.conv2d(x, w, padding=1)
        F.conv2d(x.long(), w.long())
    stats = convplan.stats(reset=True)
    assert (stats["planned"], stats["tuned"], stats["misses"], stats["left_to_torch"]) == (2, 1, 2, 1)
    assert untuned.planning_s < stats.planning_s == untuned.planning_s + stats.tuning_s
    assert sum(stats.engines.values()) == 1
    assert set(stats.engines) < {"aten", "matmul"}
    after = convplan.stats()
    assert (set(after.values()), after.planning_s, after.tuning_s) == ({0}, 0, 0)
    assert after.engines == stats.engines  # no counter


@pytest.mark.parametrize("back", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_statistics_travel(back: Callable[[Any], Any]) -> None:
    stats = convplan.stats()
    found = back(stats)
    assert (type(found), found, vars(found)) == (type(stats), stats, vars(stats))
    assert json.loads(json.dumps(stats)) == stats

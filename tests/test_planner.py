"""Planning with scripted engines: every way to be dropped, every tie, what is left behind, and the plans that come out.

Time is virtual: a script says how long a run takes, and nothing depends on the machine.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from helpers import oracle
from helpers.cases import case
from helpers.fresh import fresh_process
from helpers.plans import HERE

import convplan
from convplan import (
    EngineConfig,
    Epilogue,
    Evidence,
    ExecutionFailed,
    NoPlan,
    Notes,
    Plan,
    PlanRecord,
    PlanRejected,
    Policy,
    PolicyError,
    Problem,
    SpecError,
    _limits,
    _proof,
    _verify,
)
from convplan._measure import CUTOFF
from convplan._planner import plan_problem
from convplan._policy import EFFORTS
from convplan._problem import OPS
from convplan._proof import FIRST_RUN_GRACE_US
from convplan.engines.base import Candidate
from convplan.engines.fake import FakeCandidate, FakeEngine, VirtualClock

PROBLEM = Problem.dense("fprop", (2, 3, 7, 6), (4, 3, 3, 2), padding=1)
RESOLVED = Policy(deterministic=False, allow_tf32=False)
NONDETERMINISTIC = Notes(numerical=("NONDETERMINISTIC",))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.set_num_threads(1)
    with fresh_process():
        yield


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


Script = Callable[..., FakeEngine]


@pytest.fixture
def engine(clock: VirtualClock) -> Script:
    """Registers an engine with a script; its name is `mine` unless given."""

    def register(*script: FakeCandidate, name: str = "mine", refuses: str = "") -> FakeEngine:
        made = FakeEngine(script, name=name, refuses=refuses, clock=clock)
        convplan.register_engine(made)
        return made

    return register


Planned = Callable[..., PlanRecord]


@pytest.fixture
def planned(clock: VirtualClock) -> Planned:
    """Plans with engine `mine`, or the engines named, on the virtual clock."""

    def plan(problem: Problem = PROBLEM, *, effort: Any = None, **rules: Any) -> PlanRecord:
        policy = RESOLVED.replace(**{"engines": ("mine",), **rules})
        return plan_problem(problem, policy, HERE, effort=effort, clock=clock)

    return plan


def take(time_us: float = 50.0, **changes: Any) -> FakeCandidate:
    return FakeCandidate(time_us=time_us, **changes)


def index(evidence: Evidence) -> int:
    return evidence.config.knob("index")


def ranks(record: PlanRecord) -> list[int]:
    return [index(evidence) for evidence in record.ranking]


def reasons(record: PlanRecord) -> dict[int, tuple[str, str]]:
    return {index(evidence): (evidence.rejected, evidence.reason) for evidence in record.rejected}


# The pipeline when nothing fails


@pytest.mark.behaviour("B15")
@pytest.mark.parametrize("op", OPS)
def test_measure_builds_verifies_times_and_ranks_all(engine: Script, planned: Planned, op: Any) -> None:
    mine = engine(take(120), take(50), take(80))
    record = planned(case("2d-k3").problem(op, "float32"))
    assert ranks(record) == [1, 2, 0]
    assert [evidence.median_us for evidence in record.ranking] == [50, 80, 120]
    assert record.config == EngineConfig.of("mine", index=1)
    assert record.median_us == 50
    assert record.rejected == ()
    assert mine.builds == [1, 1, 1]
    for evidence in record.ranking:
        assert evidence.verified == "full"
        assert evidence.error is not None
        assert 0 <= evidence.error <= 1
        assert len(evidence.samples_us) >= 5
        assert (evidence.spread_us, evidence.workspace_bytes, evidence.rejected, evidence.reason) == (0, 0, "", "")


def test_a_record_says_what_was_asked_and_how_it_was_found(
    engine: Script, planned: Planned, clock: VirtualClock
) -> None:
    engine(take(100))
    begin = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    record = planned(budget_s=0.5)
    assert (record.problem, record.environment, record.effort) == (PROBLEM, HERE, "measure")
    assert record.policy == RESOLVED.replace(engines=("mine",), budget_s=0.5)
    assert record.version == convplan.__version__
    assert begin <= datetime.datetime.fromisoformat(record.created) <= datetime.datetime.now(datetime.timezone.utc)
    assert record.planning_s == pytest.approx(clock() / 1e9)
    assert "\n" not in str(record)
    assert "mine[index=0] 100.0 us (measure)" in str(record)


def test_the_effort_asked_for_goes_before_the_policys(engine: Script, planned: Planned) -> None:
    engine(take(50))
    assert planned(effort="instant").effort == "instant"
    assert planned(effort="measure", mode="auto").effort == "measure"
    instant = planned(effort="instant").policy
    assert instant.effort == "measure"  # the policy in the record is the user's


@pytest.mark.behaviour("B13")
def test_engines_propose_in_the_policys_order(engine: Script, planned: Planned) -> None:
    engine(take(50), take(50), name="one")
    engine(take(50), name="two")
    for names in (("one", "two"), ("two", "one")):
        order = [str(evidence.config) for evidence in planned(engines=names, effort="instant").ranking]
        assert order == sorted(order, key=lambda text: (names.index(text.partition("[")[0]), text))
        assert len(order) == 3


# Ways to be dropped, each beside a candidate that stays

DROPPED = [
    pytest.param(take(fails="unavailable"), "build", "engine 'mine' is not available: a script", id="unavailable"),
    pytest.param(take(fails="build"), "build", "^the script says that it does not build$", id="build"),
    pytest.param(take(fails="run"), "run", "RuntimeError: the script says that it fails here", id="run"),
    pytest.param(take(fails="memory"), "run", "OutOfMemoryError: the script says that there is no memory", id="memory"),
    pytest.param(take(fails="late", good_runs=1), "run", "RuntimeError: the script says", id="second-run"),
    pytest.param(take(fails="late", good_runs=2), "measure", "failed while timed: RuntimeError: the script", id="late"),
    pytest.param(
        take(fails="late", good_runs=6), "measure", "failed while timed: RuntimeError: the script", id="later"
    ),
    pytest.param(take(fails="wrong"), "verify", r"output\[.*\] is .*, the reference .* x tolerance", id="wrong"),
    pytest.param(take(fails="nan"), "verify", "is nan, the reference .*: inf x tolerance", id="nan"),
    pytest.param(take(fails="shape"), "verify", r"output is \(2, 4, 7, 6\).*expected \(2, 4, 7, 7\)", id="shape"),
    pytest.param(take(fails="strides"), "verify", r"output has strides .*, expected \(196, 49, 7, 1\)", id="strides"),
    pytest.param(take(fails="writes_input"), "verify", "it wrote to its inputs", id="writes-input"),
    pytest.param(
        take(workspace_bytes=2000), "filter", "workspace 2000 bytes is over the limit of 1000", id="workspace"
    ),
    pytest.param(
        take(workspace_bytes=None, built_workspace_bytes=1001),
        "build",
        "1001 bytes is over the limit of 1000",
        id="built",
    ),
    pytest.param(
        take(workspace_bytes=10, built_workspace_bytes=1001),
        "build",
        "1001 bytes is over the limit",
        id="grown-workspace",
    ),
    pytest.param(
        take(notes=Notes(numerical=("DOWN_CONVERT_INPUTS",))), "filter", "DOWN_CONVERT_INPUTS; allow_notes=", id="note"
    ),
    pytest.param(take(3000), "measure", "cut off: 3000.0 us, 60.0 x the best", id="slow"),
    pytest.param(take(30_000), "measure", "cut off: first run 30000 us, best so far 50 us", id="very-slow"),
]


@pytest.mark.behaviour("B18")
@pytest.mark.parametrize("first", [True, False], ids=["before-a-good-one", "after"])
@pytest.mark.parametrize(("bad", "stage", "reason"), DROPPED)
def test_one_candidates_failure_costs_that_candidate_only(
    engine: Script, planned: Planned, bad: FakeCandidate, stage: str, reason: str, first: bool
) -> None:
    engine(*((bad, take(50)) if first else (take(50), bad)))
    record = planned(workspace_limit_bytes=1000)
    at = 0 if first else 1
    assert ranks(record) == [1 - at]
    assert set(reasons(record)) == {at}
    if first and bad.time_us == 30_000:
        reason = "cut off: 30000.0 us, 600.0 x the best"  # nothing to compare its first run with yet
    assert reasons(record)[at][0] == stage
    assert re.search(reason, reasons(record)[at][1])


@pytest.mark.behaviour("B19")
@pytest.mark.parametrize(("bad", "stage", "reason"), [row for row in DROPPED if "slow" not in str(row.id)])
def test_when_the_only_candidate_fails_the_error_says_why(
    engine: Script, planned: Planned, bad: FakeCandidate, stage: str, reason: str
) -> None:
    engine(bad)
    with pytest.raises(NoPlan) as caught:
        planned(workspace_limit_bytes=1000)
    ((config, said),) = caught.value.rejections
    assert config == "mine[index=0]"
    assert said.startswith(f"{stage}: ")
    assert re.search(reason, said.removeprefix(f"{stage}: "))


@pytest.mark.behaviour("B19")
def test_no_plan_names_the_problem_the_policy_and_every_rejection(engine: Script, planned: Planned) -> None:
    bad = [row.values[0] for row in DROPPED if "slow" not in str(row.id)]
    engine(*bad)
    engine(name="strict", refuses="rank 2 only")
    with pytest.raises(NoPlan) as caught:
        planned(engines=("mine", "strict"), workspace_limit_bytes=1000)
    error = caught.value
    assert error.problem == str(PROBLEM)
    assert "engines=('mine', 'strict')" in error.policy
    assert "workspace_limit_bytes=1000" in error.policy
    assert sorted(config for config, _ in error.rejections) == sorted(
        ["strict", *(f"mine[index={number}]" for number in range(len(bad)))]
    )
    assert dict(error.rejections)["strict"] == "enumerate: rank 2 only"
    for text in (error.problem, error.policy, *itertools.chain(*error.rejections)):
        assert text in str(error)


@pytest.mark.parametrize(
    "problem",
    [
        Problem.dense("wgrad", (8, 32, 48, 48), (64, 32, 3, 3), padding=1),
        Problem.dense(
            "fprop", (8, 32, 48, 48), (64, 32, 3, 3), padding=1, epilogue=Epilogue(bias=True, activation="silu")
        ),
    ],
    ids=["wgrad", "fused"],
)
def test_a_default_device_is_nothing_to_planning(problem: Problem) -> None:
    policy = Policy(engines=("aten", "matmul"), budget_s=0.05)
    with torch.device("meta"):  # as torch.set_default_device does
        record = convplan.plan(problem, policy)
        assert convplan.tune(problem, policy=policy)[0].effort == "measure"
    assert record.ranking[0].verified == "sample"
    expected = ("cut off", "it fuses nothing with a convolution")
    assert {one.reason for one in record.rejected if not one.reason.startswith(expected)} == set()


def test_everything_may_fail_while_timed(engine: Script, planned: Planned) -> None:
    engine(take(fails="late", good_runs=2), take(fails="late", good_runs=4))
    with pytest.raises(NoPlan, match="failed while timed"):
        planned()


def test_everything_may_fail_its_verification(engine: Script, planned: Planned) -> None:
    engine(take(fails="wrong"), take(fails="nan"))
    with pytest.raises(NoPlan, match="x tolerance"):
        planned()


def test_an_engine_that_refuses_leaves_its_reason(engine: Script, planned: Planned) -> None:
    engine(take(50))
    engine(name="strict", refuses="groups > 1")
    engine(name="shy")
    record = planned(engines=("strict", "mine", "shy"))
    assert [(str(e.config), e.rejected, e.reason) for e in record.rejected] == [
        ("strict", "enumerate", "groups > 1"),
        ("shy", "enumerate", "it proposes no configuration"),
    ]


@pytest.mark.parametrize("method", ["supports", "configs"])
def test_an_engine_that_raises_when_asked_costs_that_engine_only(
    engine: Script, planned: Planned, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: object) -> object:
        raise OSError("driver is gone")

    engine(take(50))
    monkeypatch.setattr(engine(take(10), name="broken"), method, broken)
    for effort in ("measure", "instant"):
        record = planned(engines=("broken", "mine"), effort=effort)
        assert [str(e.config) for e in record.ranking] == ["mine[index=0]"]
        assert [str(e.config) for e in record.rejected] == ["broken"]
        assert "driver is gone" in record.rejected[0].reason


def test_an_engine_nobody_registered_is_the_users_mistake(planned: Planned) -> None:
    with pytest.raises(PolicyError, match="unknown engine 'mine'; registered engines: cudnn, aten"):
        planned()


@pytest.mark.parametrize("effort", ["measure", "instant"])
def test_every_candidate_is_in_the_record_exactly_once(engine: Script, planned: Planned, effort: str) -> None:
    script = [row.values[0] for row in DROPPED]
    engine(*script, take(50), take(60, source="fallback"))
    record = planned(workspace_limit_bytes=1000, benchmark_limit=4, effort=effort)
    seen = sorted(index(evidence) for evidence in (*record.ranking, *record.rejected))
    assert seen == list(range(len(script) + 2))
    assert all(evidence.reason and evidence.rejected for evidence in record.rejected)
    assert all(not evidence.reason and not evidence.rejected for evidence in record.ranking)


@pytest.mark.behaviour("B13")
@pytest.mark.parametrize("effort", ["measure", "instant"])
@pytest.mark.parametrize("fails", ["", "wrong"])
def test_what_an_engine_proposes_twice_counts_once(
    engine: Script, planned: Planned, monkeypatch: pytest.MonkeyPatch, effort: str, fails: Any
) -> None:
    mine = engine(take(50, fails=fails), take(60))
    twice: Callable[..., list[Candidate]] = lambda *_: [*FakeEngine.configs(mine, PROBLEM, "measure")] * 2  # noqa: E731
    monkeypatch.setattr(mine, "configs", twice)
    record = planned(effort=effort)
    assert sorted(index(evidence) for evidence in (*record.ranking, *record.rejected)) == [0, 1]


# What the policy forbids


@pytest.mark.behaviour("B12")
def test_workspace_over_the_limit_is_dropped_before_building_where_it_is_known(
    engine: Script, planned: Planned
) -> None:
    mine = engine(
        take(10, workspace_bytes=1001),
        take(50, workspace_bytes=1000),
        take(10, workspace_bytes=None, built_workspace_bytes=1001),
        take(60, workspace_bytes=None, built_workspace_bytes=1000),
    )
    record = planned(workspace_limit_bytes=1000)
    assert mine.builds == [0, 1, 1, 1]
    assert mine.runs[0] == mine.runs[2] == 0
    assert ranks(record) == [1, 3]
    assert [(e.rejected, e.workspace_bytes) for e in record.rejected] == [("filter", 1001), ("build", 1001)]


@pytest.mark.behaviour("B12")
def test_a_limit_of_zero_leaves_what_needs_none(engine: Script, planned: Planned) -> None:
    engine(take(10, workspace_bytes=1), take(50, workspace_bytes=0))
    assert ranks(planned(workspace_limit_bytes=0)) == [1]


@pytest.mark.behaviour("B12")
def test_a_smaller_limit_keeps_a_subset(engine: Script, planned: Planned) -> None:
    engine(*(take(50 + size / 10, workspace_bytes=size) for size in (0, 100, 50, 400)))
    kept = [set(ranks(planned(workspace_limit_bytes=limit))) for limit in (0, 60, 100, 1000)]
    assert kept == [{0}, {0, 2}, {0, 1, 2}, {0, 1, 2, 3}]


@pytest.mark.behaviour("B12")
def test_without_a_limit_the_machines_memory_is_the_limit(engine: Script, planned: Planned) -> None:
    engine(
        take(10, workspace_bytes=2**50),
        take(50, workspace_bytes=2**20),
        take(9, workspace_bytes=None, built_workspace_bytes=2**50),
    )
    record = planned()
    assert ranks(record) == [1]
    assert {stage for stage, _ in reasons(record).values()} == {"filter", "build"}


NOTED = [
    pytest.param("NONDETERMINISTIC", "float32", {"deterministic": False}, True, id="any-order"),
    pytest.param("NONDETERMINISTIC", "float32", {"deterministic": True}, False, id="deterministic"),
    pytest.param(
        "NONDETERMINISTIC", "float32", {"deterministic": True, "allow_notes": ("NONDETERMINISTIC",)}, False, id="no-way"
    ),
    pytest.param("DOWN_CONVERT_INPUTS", "float32", {}, False, id="down-convert"),
    pytest.param("DOWN_CONVERT_INPUTS", "float32", {"allow_notes": ("down_convert_inputs",)}, True, id="let-through"),
    pytest.param("DOWN_CONVERT_INPUTS", "float32", {"allow_notes": ("FFT",)}, False, id="another-let-through"),
    pytest.param("TENSOR_CORE", "float32", {"allow_tf32": False}, False, id="no-tf32"),
    pytest.param("TENSOR_CORE", "float32", {"allow_tf32": True}, True, id="tf32"),
    pytest.param("TENSOR_CORE", "float16", {"allow_tf32": False}, True, id="tf32-is-for-float32"),
    pytest.param("TENSOR_CORE", "bfloat16", {"allow_tf32": False}, True, id="tf32-is-for-float32-only"),
    pytest.param("FFT", "float32", {"deterministic": True, "allow_tf32": False}, True, id="other-notes"),
]


@pytest.mark.behaviour("B8")
@pytest.mark.behaviour("B9")
@pytest.mark.behaviour("B10")
@pytest.mark.parametrize("effort", ["measure", "instant"])
@pytest.mark.parametrize(("note", "dtype", "rules", "stays"), NOTED)
def test_notes_decide_who_takes_part(
    engine: Script, planned: Planned, note: str, dtype: str, rules: dict[str, Any], stays: bool, effort: str
) -> None:
    mine = engine(take(10, notes=Notes(numerical=("OTHER", note))), take(20))
    record = planned(case("2d-k3").problem("fprop", dtype), effort=effort, **rules)
    assert ranks(record) == ([0, 1] if stays else [1])
    if not stays:
        assert reasons(record)[0][0] == "filter"
        assert note in reasons(record)[0][1]
        assert mine.builds[0] == 0


def test_transforms_are_not_asked_for_exact_integers(engine: Script, planned: Planned) -> None:
    """A direct method runs once more than a transform before the race: on integers."""
    direct, transform = (
        engine(take(50), name="direct"),
        engine(take(50, notes=Notes(numerical=("FFT",))), name="transform"),
    )
    record = planned(engines=("direct", "transform"))
    rounds = {evidence.config.engine: len(evidence.samples_us) for evidence in record.ranking}
    repeats = 2  # 50 us are too short for one sample
    assert direct.runs[0] - repeats * rounds["direct"] == 2
    assert transform.runs[0] - repeats * rounds["transform"] == 1


# Slow ones


def test_first_runs_far_behind_are_not_run_again(engine: Script, planned: Planned) -> None:
    mine = engine(take(50), take(FIRST_RUN_GRACE_US + 1000), take(FIRST_RUN_GRACE_US - 1000))
    record = planned()
    assert mine.runs[1:] == [1, 2]  # the last one had its chance on integers, and no more
    assert set(reasons(record)) == {1, 2}


def test_one_time_work_in_the_first_run_costs_nobody_the_race(engine: Script, planned: Planned) -> None:
    engine(take(100), take(50, first_us=15_000))
    assert ranks(planned()) == [1, 0]


def test_three_times_the_best_is_the_end(engine: Script, planned: Planned) -> None:
    engine(take(100), take(100 * CUTOFF), take(100 * CUTOFF + 10))
    record = planned()
    assert ranks(record) == [0, 1]
    assert reasons(record)[2][0] == "measure"


def test_what_cannot_win_at_the_machines_peak_rate_is_never_run(engine: Script, planned: Planned) -> None:
    hopeless = 1e18  # operations: hours on any machine that runs this
    mine = engine(
        take(50),
        take(50, flops=hopeless),
        take(50, flops=hopeless, notes=Notes(numerical=("FFT",))),  # may need fewer than it says of a direct method
        take(50, flops=None),
        take(50, flops=1e6),
    )
    record = planned()
    assert mine.runs[1] == 0
    assert set(ranks(record)) == {0, 2, 3, 4}
    assert re.search(r"cut off unrun: \d+ us at the machine's peak rate, best so far 50 us", reasons(record)[1][1])


def test_without_anything_better_even_the_hopeless_is_run(engine: Script, planned: Planned) -> None:
    engine(take(50, flops=1e18), take(50, fails="build"))
    assert ranks(planned()) == [0]


@pytest.mark.behaviour("B15")
@pytest.mark.parametrize("limit", [0, 1, 2, 9])
def test_benchmark_limit_caps_how_many_are_timed(engine: Script, planned: Planned, limit: int) -> None:
    engine(take(fails="wrong"), take(90), take(50), take(40))
    record = planned(benchmark_limit=limit)
    timed = [evidence for evidence in record.ranking if evidence.samples_us]
    assert len(timed) == min(limit or 3, 3)
    assert {index(evidence) for evidence in timed} == set(range(1, 1 + len(timed)))  # in engine order, of those right
    for number in range(1 + len(timed), 4):
        assert reasons(record)[number] == ("measure", f"beyond benchmark_limit={limit}")


# Ties


@pytest.mark.behaviour("C5")
@pytest.mark.parametrize(
    ("script", "order"),
    [
        pytest.param([take(50), take(50), take(50)], [0, 1, 2], id="engine-order"),
        pytest.param([take(50, notes=NONDETERMINISTIC), take(50)], [1, 0], id="deterministic-first"),
        pytest.param(
            [take(50, workspace_bytes=8), take(50, workspace_bytes=4), take(50)], [2, 1, 0], id="less-workspace"
        ),
        pytest.param(
            [take(50, notes=NONDETERMINISTIC), take(50, workspace_bytes=64)], [1, 0], id="determinism-before-workspace"
        ),
        pytest.param(
            [take(50, workspace_bytes=1, built_workspace_bytes=9), take(50, workspace_bytes=5)], [1, 0], id="as-built"
        ),
        pytest.param([take(50.2, workspace_bytes=0), take(50, workspace_bytes=9)], [0, 1], id="within-a-percent"),
        pytest.param([take(60, workspace_bytes=0), take(50, workspace_bytes=9)], [1, 0], id="no-tie"),
        pytest.param(
            [take(60), take(70), take(50.1, workspace_bytes=2), take(50, workspace_bytes=3)], [2, 3, 0, 1], id="rest"
        ),
    ],
)
def test_ties_go_to_what_does_not_change_from_run_to_run(
    engine: Script, planned: Planned, script: list[FakeCandidate], order: list[int]
) -> None:
    engine(*script)
    assert ranks(planned()) == order


@pytest.mark.behaviour("C5")
def test_a_tie_between_engines_goes_to_the_policys_first(engine: Script, planned: Planned) -> None:
    engine(take(50), name="one")
    engine(take(50), name="two")
    for names in (("one", "two"), ("two", "one")):
        assert planned(engines=names).config.engine == names[0]


@pytest.mark.behaviour("C5")
def test_tuning_again_with_jitter_picks_the_same(engine: Script, planned: Planned) -> None:
    mine = engine(take(50.2, jitter_us=2), take(50, jitter_us=3), take(58, jitter_us=2), take(50.1, jitter_us=1))
    choices = []
    for start in range(9):  # each tuning meets the jitter at another place
        mine.runs = [start % 3, start // 3, start, 2 * start]
        choices.append(index(planned().ranking[0]))
    assert set(choices) == {0}


class NoisyClock(VirtualClock):
    """Every run takes up to 4 % more or less than the script says, in another way for each seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._noise = random.Random(seed)

    def advance(self, time_us: float) -> None:
        super().advance(time_us * (1 + 0.04 * self._noise.uniform(-1, 1)))


@pytest.mark.behaviour("C5")
@pytest.mark.parametrize("seed", range(6))
def test_tuning_again_with_noise_picks_one_within_a_percent(seed: int) -> None:
    clock = NoisyClock(seed)
    times = [200.0, 200.5, 201.0, 215.0]
    convplan.register_engine(FakeEngine([take(time_us) for time_us in times], name="mine", clock=clock))
    record = plan_problem(PROBLEM, RESOLVED.replace(engines=("mine",)), HERE, clock=clock)
    assert times[index(record.ranking[0])] <= 1.01 * min(times)


# Effort instant


@pytest.mark.behaviour("B14")
def test_instant_takes_the_first_that_builds_and_runs_nothing(engine: Script, planned: Planned) -> None:
    mine = engine(
        take(fails="build"),
        take(fails="unavailable"),
        take(90),
        take(10),
        take(fails="wrong"),
        take(workspace_bytes=2000),
    )
    record = planned(effort="instant", workspace_limit_bytes=1000)
    assert ranks(record) == [2, 3, 4]
    assert mine.runs == [0] * 6
    assert mine.builds == [1, 1, 1, 0, 0, 0]
    assert {number: stage for number, (stage, _) in reasons(record).items()} == {0: "build", 1: "build", 5: "filter"}
    assert record.effort == "instant"
    for evidence in record.ranking:
        assert (evidence.median_us, evidence.samples_us, evidence.verified, evidence.error) == (None, (), "no", None)


@pytest.mark.behaviour("B14")
def test_instant_prefers_few_operations_and_leaves_last_resorts_for_the_end(engine: Script, planned: Planned) -> None:
    problem = Problem.dense("fprop", (1, 1, 4096), (1, 1, 1024))
    engine(
        take(source="fallback", flops=1.0),
        take(flops=float(problem.flops)),
        take(flops=problem.flops / 19),
        take(flops=problem.flops / 21),
        take(flops=None),
        take(flops=problem.flops / 1000),
        take(source="fallback"),
    )
    assert ranks(planned(problem, effort="instant")) == [3, 5, 1, 2, 4, 0, 6]


@pytest.mark.behaviour("B14")
def test_instant_over_the_workspace_limit_once_built_takes_the_next(engine: Script, planned: Planned) -> None:
    engine(take(workspace_bytes=None, built_workspace_bytes=5000), take(50))
    assert ranks(planned(effort="instant", workspace_limit_bytes=1000)) == [1]


@pytest.mark.behaviour("B14")
def test_instant_with_nothing_that_builds_lists_every_reason(engine: Script, planned: Planned) -> None:
    engine(take(fails="build"), take(fails="unavailable", source="fallback"))
    with pytest.raises(NoPlan) as caught:
        planned(effort="instant")
    assert [config for config, _ in caught.value.rejections] == ["mine[index=0]", "mine[index=1]"]


# A wrong one that looks right at first


class SpoilsOneElement(FakeEngine):
    """Right but for one element."""

    def _run(self, problem: Problem, index: int, *arguments: Any) -> torch.Tensor:
        out = super()._run(problem, index, *arguments)
        out[0, 1, 3, 4] = 1000.0
        return out


@pytest.mark.behaviour("C3")
@pytest.mark.parametrize("names", [("bad", "mine"), ("mine", "bad")])
def test_an_error_that_the_sample_misses_is_found_whoever_comes_first(
    engine: Script, planned: Planned, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(_verify, "FULL_ELEMENTS", 0)
    monkeypatch.setattr(_verify, "GATHER_ELEMENTS", 0)
    monkeypatch.setattr(_verify, "MIN_POSITIONS", 4)
    engine(take(50))
    bad = SpoilsOneElement([take(5, notes=Notes(numerical=("FFT",)))], name="bad", clock=clock)
    convplan.register_engine(bad)
    sampled = _verify.Verifier(PROBLEM, torch.device("cpu"))._positions.tolist()
    assert [0, 3, 4] not in sampled
    record = planned(engines=names)
    assert [evidence.config.engine for evidence in record.ranking] == ["mine"]
    assert record.ranking[0].verified == "sample"
    ((dropped,), rejected) = (record.rejected, record.rejected[0].rejected)
    assert (dropped.config.engine, rejected) == ("bad", "verify")
    assert "output[0, 1, 3, 4] is 1000" in dropped.reason


# What planning leaves behind


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_planning_leaves_no_tensors_behind() -> None:
    policy = RESOLVED.replace(budget_s=0.001)  # with the real engines

    def plan_all() -> list[Plan]:
        problems = [case("2d-k3").problem(op, "float32") for op in OPS]
        records = [plan_problem(one, policy, HERE, effort=work) for one in problems for work in EFFORTS[:2]]
        return [record.build() for record in records]

    plan_all()  # what is made once stays
    before = live_tensors()
    plans = plan_all()
    assert live_tensors() == before
    assert len(plans) == len(OPS) * 2


def test_failed_planning_leaves_no_tensors_behind(engine: Script, planned: Planned) -> None:
    engine(take(fails="wrong"), take(fails="run"))
    before = live_tensors()
    with pytest.raises(NoPlan) as caught:
        planned()
    assert live_tensors() == before
    assert caught.value.rejections


def test_planning_never_touches_the_users_tensors(engine: Script) -> None:
    bad = engine(take(5, fails="writes_input"), take(50))
    x, w = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 2)
    kept = x.clone(), w.clone()
    random_state = torch.get_rng_state()
    y = convplan.conv2d(x, w, padding=1, policy=Policy(engines=("mine",), tune_after=1))
    assert bad.runs[0] > 0
    assert torch.equal(x, kept[0])
    assert torch.equal(w, kept[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, padding=1))


def test_planning_leaves_torchs_settings_as_they_were() -> None:
    def settings() -> tuple[object, ...]:
        return (
            torch.get_num_threads(),
            torch._C._get_mkldnn_enabled(),
            torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(),
            gc.isenabled(),
        )

    before = settings()
    plan_problem(PROBLEM, RESOLVED.replace(budget_s=0.001), HERE)
    assert settings() == before


# Building and running plans


@pytest.mark.parametrize("op", OPS)
def test_a_built_plan_computes_the_problem(op: Any) -> None:
    problem = case("asymmetric-pad").problem(op, "float32")
    record = plan_problem(problem, RESOLVED, HERE, effort="instant")
    inputs = oracle.make_inputs(problem, 1)
    right = oracle.answer(problem, inputs)
    for rank in range(len(record.ranking)):
        plan = record.build(rank)
        assert (plan.problem, plan.config) == (problem, record.ranking[rank].config)
        assert oracle.worst(plan.run(inputs.first, inputs.second), right, right.bound) <= 1
        assert torch.equal(plan(inputs.first, inputs.second), plan.run(inputs.first, inputs.second))


@pytest.mark.parametrize("rank", [-1, 2, 99])
def test_there_are_no_more_ranks_than_usable_plans(engine: Script, planned: Planned, rank: int) -> None:
    engine(take(50), take(60), take(fails="build"))
    with pytest.raises(SpecError, match=rf"rank is {rank}, expected 0 to 1 \(2 usable plans\)"):
        planned().build(rank)


def test_a_rank_builds_the_candidate_of_that_rank(engine: Script, planned: Planned) -> None:
    mine = engine(take(60), take(50, workspace_bytes=None, built_workspace_bytes=24))
    record = planned()
    plan = record.build()
    assert (plan.config, plan.workspace_bytes) == (EngineConfig.of("mine", index=1), 24)
    assert record.build(1).config == EngineConfig.of("mine", index=0)
    assert mine.builds == [2, 2]
    assert "mine[index=1]" in repr(plan)


def test_building_what_is_gone_is_a_clear_error(engine: Script, planned: Planned) -> None:
    engine(take(50), take(60))
    record = planned()
    convplan.register_engine(FakeEngine([], name="mine"), replace=True)
    with pytest.raises(PlanRejected, match=r"mine\[index=0\]: index is 0, the script has 0"):
        record.build()


BIASED = Problem.dense("fprop", (2, 3, 7, 6), (4, 3, 3, 2), padding=1, epilogue=Epilogue(bias=True))
X, W, B = (2, 3, 7, 6), (4, 3, 3, 2), (4,)
Y = (2, 4, 7, 7)

RUN_ERRORS: list[Any] = [
    pytest.param(
        lambda p: p.run(torch.zeros(2, 3, 7, 5), torch.zeros(W), torch.zeros(B)),
        r"first input is \(2, 3, 7, 5\) float32, expected \(2, 3, 7, 6\) float32",
        id="shape",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X), torch.zeros(W).double(), torch.zeros(B)),
        r"second input is .* float64, expected \(4, 3, 3, 2\) float32",
        id="dtype",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X).to(memory_format=torch.channels_last), torch.zeros(W), torch.zeros(B)),
        r"first input has strides \(126, 1, 18, 3\), expected \(126, 42, 6, 1\); plan a problem for its layout",
        id="strides",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X), torch.zeros(W)),
        r"bias is missing, the problem says Epilogue\(bias=True\)",
        id="no-bias",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X), torch.zeros(W), torch.zeros(5)),
        r"bias is \(5,\) float32, expected \(4,\) float32",
        id="bias-length",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X), torch.zeros(W), torch.zeros(B).half()),
        r"bias is \(4,\) float16, expected \(4,\) float32",
        id="bias-dtype",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X), torch.zeros(W), torch.zeros(B), out=torch.zeros(2, 4, 7, 6)),
        r"out is \(2, 4, 7, 6\) float32, expected \(2, 4, 7, 7\) float32",
        id="out-shape",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X), torch.zeros(W), torch.zeros(B), out=torch.zeros(Y).double()),
        r"out is \(2, 4, 7, 7\) float64",
        id="out-dtype",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X, device="meta"), torch.zeros(W), torch.zeros(B)),
        "first input is on meta",
        id="device",
    ),
    pytest.param(
        lambda p: p.run(torch.zeros(X), torch.zeros(W), torch.zeros(B), out=torch.zeros(Y, device="meta")),
        "out is on meta",
        id="out-device",
    ),
]


@pytest.mark.parametrize(("call", "message"), RUN_ERRORS)
def test_tensors_that_do_not_match_the_plan_are_named(call: Callable[[Plan], object], message: str) -> None:
    plan = plan_problem(BIASED, RESOLVED, HERE, effort="instant").build()
    plan.run(torch.zeros(X), torch.zeros(W), torch.zeros(B))
    with pytest.raises(SpecError, match=message):
        call(plan)


def test_a_bias_nobody_asked_for_is_refused() -> None:
    plan = plan_problem(PROBLEM, RESOLVED, HERE, effort="instant").build()
    with pytest.raises(SpecError, match=r"bias is given, the problem says Epilogue\(bias=False\)"):
        plan.run(torch.zeros(X), torch.zeros(W), torch.zeros(B))


def test_strides_of_size_one_dimensions_do_not_matter_to_a_plan() -> None:
    problem = Problem.dense("fprop", (1, 1, 5, 4), (2, 1, 2, 2))
    plan = plan_problem(problem, RESOLVED, HERE, effort="instant").build()
    x, w = torch.randn(1, 1, 5, 4), torch.randn(2, 1, 2, 2)
    odd = x.as_strided(x.shape, (3, 77, 4, 1))
    assert torch.equal(plan.run(odd, w), plan.run(x, w))


OUTS = {
    "contiguous": lambda: torch.full(Y, 9.0),
    "channels-last": lambda: torch.full(Y, 9.0).to(memory_format=torch.channels_last),
    "every-other": lambda: torch.full((2, 4, 7, 14), 9.0)[..., ::2],
    "swapped": lambda: torch.full((2, 4, 7, 7), 9.0).transpose(2, 3),
}


@pytest.mark.behaviour("B35")
@pytest.mark.parametrize("lies", OUTS)
def test_out_may_have_any_strides(lies: str) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(X), torch.randn(W), torch.randn(B)
    record = plan_problem(BIASED, RESOLVED, HERE, effort="instant")
    for rank in range(len(record.ranking)):
        plan, out = record.build(rank), OUTS[lies]()
        strides = out.stride()
        assert plan.run(x, w, b, out=out) is out
        assert out.stride() == strides
        torch.testing.assert_close(out, torch.nn.functional.conv2d(x, w, b, padding=1))


def test_running_a_plan_records_no_gradient() -> None:
    plan = plan_problem(PROBLEM, RESOLVED, HERE, effort="instant").build()
    x, w = torch.randn(X, requires_grad=True), torch.randn(W, requires_grad=True)
    assert not plan.run(x, w).requires_grad


@pytest.mark.parametrize("fails", ["run", "memory"])
def test_a_plan_that_fails_says_which_and_why(engine: Script, planned: Planned, fails: Any) -> None:
    engine(take(50, fails=fails))
    plan = planned(effort="instant").build()
    with pytest.raises(ExecutionFailed) as caught:
        plan.run(torch.zeros(X), torch.zeros(W))
    assert caught.value.plan == str(PROBLEM)
    ((config, reason),) = caught.value.tried
    assert config == "mine[index=0]"
    assert "the script says" in reason
    assert isinstance(caught.value.__cause__, RuntimeError)


# Records as data


def test_records_survive_json(engine: Script, planned: Planned) -> None:
    engine(*(row.values[0] for row in DROPPED), take(50), take(60, jitter_us=3, source="fallback"))
    for record in (planned(), planned(effort="instant"), planned(allow_notes=("DOWN_CONVERT_INPUTS",), budget_s=0.25)):
        text = msgspec.json.encode(record)
        back = msgspec.json.decode(text, type=PlanRecord)
        assert back == record
        assert back.key == record.key
        assert msgspec.json.encode(back) == text
        assert back.build().config == record.config


def broken(record: PlanRecord, **changes: Any) -> bytes:
    return msgspec.json.encode({**msgspec.to_builtins(record), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking": []}, "needs 1 to 10000 candidates, found 0 usable"),
        ({"policy": {}}, "needs a resolved policy"),
        ({"effort": "max"}, "effort"),
        ({"speed": 1}, "unknown field `speed`"),
        ({"ranking": [{"config": {"engine": "Mine"}}]}, "engine is 'Mine', expected a lower-case name"),
        ({"ranking": [{"config": {"engine": "mine", "knobs": [["a", 1], ["a", 2]]}}]}, "every name once"),
        ({"ranking": [{"config": {"engine": "mine"}, "median_us": "fast"}]}, "median_us"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(
    engine: Script, planned: Planned, changes: dict[str, Any], message: str
) -> None:
    engine(take(50))
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.json.decode(broken(planned(), **changes), type=PlanRecord)


def test_explaining_shows_every_candidate(engine: Script, planned: Planned) -> None:
    engine(*(row.values[0] for row in DROPPED), take(50))
    record = planned(workspace_limit_bytes=1000)
    text = record.explain()
    for evidence in (*record.ranking, *record.rejected):
        assert f"index={index(evidence)}" in text


def test_the_peak_rate_is_one_that_no_engine_reaches() -> None:
    """A bound that is too low would cut off the best candidate unrun."""
    rate = _proof._peak_flops_per_us("float32", "cpu", torch.get_num_threads())
    matrix = torch.ones(512, 512)
    begin, runs = _now(), 5
    for _ in range(runs):
        matrix @ matrix
    assert runs * 2 * 512**3 / (_now() - begin) < rate
    assert _proof._peak_flops_per_us("float32", "cuda", 1) == float("inf")


def _now() -> float:
    return time.perf_counter() * 1e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("effort", ["measure", "instant"])
def test_a_problem_for_a_gpu_that_is_not_there_is_refused_in_words(effort: str) -> None:
    problem = Problem.dense("fprop", (1, 8, 8, 8), (8, 8, 3, 3), dtype="float16", device="cuda")
    with pytest.raises(SpecError, match="torch finds no GPU here"):
        convplan.plan(problem, Policy(effort=effort))


H200 = _limits.Gpu("9.0", 132, 1_980_000, 3_201_000, 6016)  # what its driver says


@pytest.mark.parametrize(
    ("gpu", "changes", "expected_us"),
    [
        pytest.param(H200, {"flops": 309.2e9}, 309.2e9 / 267.6e6, id="plain-units"),
        pytest.param(H200, {"flops": 309.2e9, "notes": Notes(("TENSOR_CORE",))}, 0.0, id="tensor-cores"),
        pytest.param(H200, {"flops": 309.2e9, "source": "last_resort"}, 0.0, id="nobody-knows-what-torch-does"),
        pytest.param(H200, {"moved_bytes": 2 * 1_478_500_352}, 2 * 1_478_500_352 / 4.814e6, id="columns"),
        pytest.param(H200._replace(capability="99.0"), {"flops": 309.2e9}, 0.0, id="unknown-gpu"),
        pytest.param(H200._replace(memory_clock_khz=None), {"moved_bytes": 2**33}, 0.0, id="unknown-memory"),
    ],
)
def test_a_gpu_candidate_is_left_unrun_by_what_no_hardware_can_do(
    gpu: _limits.Gpu, changes: dict[str, object], expected_us: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates worked out by hand: 132 x 1.98 GHz x 256 x 4 operations for 16 bits, 2 x 3.201 GHz x 752 bytes."""
    monkeypatch.setattr(_limits, "_current_gpu", lambda: gpu)
    problem = Problem.dense("fprop", (8, 64, 28, 28), (64, 64, 3, 3), dtype="float16", device="cuda")
    candidate = Candidate(EngineConfig("some"), **changes)  # type: ignore[arg-type]
    assert _proof._least_us(candidate, problem) == pytest.approx(expected_us, rel=0.01)


def test_a_problem_that_memory_does_not_hold_twice_is_not_measured() -> None:
    huge = Problem.dense("fprop", (4096, 4096, 64, 64), (4096, 4096, 3, 3), padding=1)
    with pytest.raises(convplan.TooLarge) as caught:
        plan_problem(huge, RESOLVED, HERE)
    assert caught.value.needed_bytes == 2 * huge.least_bytes > caught.value.free_bytes
    assert "effort='instant'" in str(caught.value)
    assert plan_problem(huge, RESOLVED.replace(workspace_limit_bytes=0), HERE, effort="instant").ranking


def test_out_of_memory_while_tensors_are_made_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("convplan._verify.Verifier", refuse)
    with pytest.raises(convplan.TooLarge):
        plan_problem(case("2d-k3").problem("fprop", "float32"), RESOLVED, HERE)


@pytest.mark.behaviour("B16")
def test_a_program_runs_untuned_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, 3, 70, 60), torch.randn(4, 3, 3, 2)
    policy = Policy(tune_after=1, workspace_limit_bytes=2**20)
    monkeypatch.setattr(_proof, "available_bytes", lambda device: 2**10)
    with fresh_process():
        with pytest.warns(convplan.ConvPlanWarning, match="too large to be measured"):
            y = convplan.conv2d(x, w, policy=policy)
        assert convplan.stats()["tuned"] == 0
        assert torch.equal(convplan.conv2d(x, w, policy=policy), y)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w))
